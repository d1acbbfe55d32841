#include "instances.cuh"

template int adaptive::launch_on_gpu<adaptive::FLOAT16, 128>(const Launch&, const Arguments&, cudaStream_t);
