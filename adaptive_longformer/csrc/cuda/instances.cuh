// The kernels of one type and head dimension. Each pair has a file of its own, so that they are compiled at the same time.
#pragma once

#include <cuda_runtime.h>

#include "launch.cuh"

namespace adaptive {

struct Start {
  cudaStream_t stream;

  template <typename Kernel>
  int operator()(Kernel kernel, const Launch& launch, const Arguments& arguments) const {
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

template <int TYPE, int D>
int launch_on_gpu(const Launch& launch, const Arguments& arguments, cudaStream_t stream) {
  return launch_by_query_block<TYPE, D>(launch, arguments, Start{stream});
}

}  // namespace adaptive
