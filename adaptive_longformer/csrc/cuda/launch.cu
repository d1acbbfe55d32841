// The library that attention/compiled_cuda.py loads: a plain C interface, no header of torch.
#include <cuda_runtime.h>

#include "launch.cuh"

namespace {

struct CudaLaunch {
  template <typename Kernel>
  int operator()(Kernel kernel, int grid_x, int grid_y, int grid_z, int threads, int shared_memory,
                 const adaptive::Arguments& arguments, void* stream) const {
    if (grid_x == 0 || grid_y == 0 || grid_z == 0) return 0;
    if (shared_memory > 48 * 1024) {
      const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory);
      if (error != cudaSuccess) return (int)error;
    }
    kernel<<<dim3(grid_x, grid_y, grid_z), threads, shared_memory, (cudaStream_t)stream>>>(arguments);
    return (int)cudaGetLastError();
  }
};

}  // namespace

extern "C" {

// Both return 0, a CUDA error number, or -1 if there is no kernel for the types and sizes.
int adaptive_cuda_forward(const adaptive::Arguments* arguments, void* stream) {
  return adaptive::with_instance(adaptive::instance_of(*arguments),
                                 adaptive::RunForward<CudaLaunch>{*arguments, CudaLaunch(), stream});
}

int adaptive_cuda_backward(const adaptive::Arguments* arguments, void* stream) {
  return adaptive::with_instance(adaptive::instance_of(*arguments),
                                 adaptive::RunBackward<CudaLaunch>{*arguments, CudaLaunch(), stream});
}

int adaptive_cuda_shared_memory(int head_dim, int query_block) {
  return adaptive::with_instance({adaptive::BFLOAT16, head_dim, query_block}, adaptive::SharedMemory());
}

int adaptive_cuda_arguments_size() { return (int)sizeof(adaptive::Arguments); }

const char* adaptive_cuda_error(int error) { return cudaGetErrorString((cudaError_t)error); }
}
