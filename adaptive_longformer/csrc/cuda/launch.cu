// The library that attention/backends/cuda.py calls: a plain C interface, no header of torch.
#include <cuda_runtime.h>

#include "launch.cuh"

namespace adaptive {

// Of instances.cuh, in the file of the type and head dimension.
template <int TYPE, int D>
int launch_on_gpu(const Launch& launch, const Arguments& arguments, cudaStream_t stream);

}  // namespace adaptive

extern "C" {

// Returns 0, a CUDA error number, or a negative number: there is no such kernel, or it needs other shared memory.
int adaptive_cuda_launch(const adaptive::Launch* launch, const adaptive::Arguments* arguments, void* stream) {
  return adaptive::by_type_and_head_dim(*arguments, [&](auto type, auto head_dim) {
    return adaptive::launch_on_gpu<type.value, head_dim.value>(*launch, *arguments, (cudaStream_t)stream);
  });
}

int adaptive_cuda_arguments_size() { return (int)sizeof(adaptive::Arguments); }

const char* adaptive_cuda_error(int error) {
  return error < 0 ? adaptive::launch_error(error) : cudaGetErrorString((cudaError_t)error);
}
}
