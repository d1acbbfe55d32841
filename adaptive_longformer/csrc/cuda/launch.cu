// The library that attention/backends/cuda.py calls: a plain C interface, no header of torch.
#include <cuda_runtime.h>

#include "launch.cuh"

namespace {

struct Start {
  cudaStream_t stream;

  template <typename Kernel>
  int operator()(Kernel kernel, const adaptive::Launch& launch, const adaptive::Arguments& arguments) const {
    if (launch.shared_memory > 48 * 1024) {
      const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_memory);
      if (error != cudaSuccess) return (int)error;
    }
    const dim3 grid(launch.grid_x, launch.grid_y, launch.grid_z);
    kernel<<<grid, launch.threads, launch.shared_memory, stream>>>(arguments);
    return (int)cudaGetLastError();
  }
};

}  // namespace

extern "C" {

// Returns 0, a CUDA error number, or a negative number: there is no such kernel, or it needs other shared memory.
int adaptive_cuda_launch(const adaptive::Launch* launch, const adaptive::Arguments* arguments, void* stream) {
  return adaptive::launch_kernel(*launch, *arguments, Start{(cudaStream_t)stream});
}

int adaptive_cuda_arguments_size() { return (int)sizeof(adaptive::Arguments); }

const char* adaptive_cuda_error(int error) {
  return error < 0 ? adaptive::launch_error(error) : cudaGetErrorString((cudaError_t)error);
}
}
