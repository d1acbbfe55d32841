// Finds the instance of a kernel for a launch, whose grid, threads and shared memory attention/kernels/cuda_launches.py chose.
#pragma once

#include "backward.cuh"
#include "forward.cuh"

namespace adaptive {

constexpr int NO_INSTANCE = -1, WRONG_SHARED_MEMORY = -2;

// In the order of attention/kernels/cuda_launches.py, as the fields of Launch are.
enum KernelName { FORWARD, ROW_SUMS, GRAD_KEYS, ADD_PARTS, GRAD_QUERIES };

inline const char* launch_error(int error) {
  return error == WRONG_SHARED_MEMORY ? "another amount of shared memory is needed" : "no kernel for these types and sizes";
}

struct Launch {
  int kernel;
  int grid_x, grid_y, grid_z;
  int threads, shared_memory;
};

struct Instance {
  int type, head_dim, query_block;
};

// Calls run<TYPE, D, QUERY_BLOCK>() of the functor for the call's instance.
template <int TYPE, int D, typename Run>
int with_query_block(int query_block, const Run& run) {
  if (query_block == 64) return run.template operator()<TYPE, D, 64>();
  if (query_block == 128) return run.template operator()<TYPE, D, 128>();
  return NO_INSTANCE;
}

template <int TYPE, typename Run>
int with_head_dim(const Instance& instance, const Run& run) {
  switch (instance.head_dim) {
    case 32: return with_query_block<TYPE, 32>(instance.query_block, run);
    case 64: return with_query_block<TYPE, 64>(instance.query_block, run);
    case 96: return with_query_block<TYPE, 96>(instance.query_block, run);
    case 128: return with_query_block<TYPE, 128>(instance.query_block, run);
    default: return NO_INSTANCE;
  }
}

template <typename Run>
int with_instance(const Instance& instance, const Run& run) {
  if (instance.type == BFLOAT16) return with_head_dim<BFLOAT16>(instance, run);
  if (instance.type == FLOAT16) return with_head_dim<FLOAT16>(instance, run);
  return NO_INSTANCE;
}

inline Instance instance_of(const Arguments& arguments) {
  return {arguments.element_type, arguments.head_dim, arguments.query_block_size};
}

// Calls start(kernel, launch, arguments) with the kernel of a launch. The shared memory that a kernel lays out is what it
// must be given: the caller counted it too.
template <typename Start>
struct LaunchKernel {
  const Launch& launch;
  const Arguments& arguments;
  const Start& start;

  template <int TYPE, int D, int QUERY_BLOCK>
  int operator()() const {
    switch (launch.kernel) {
      case FORWARD: return with(forward_kernel<TYPE, D, QUERY_BLOCK>, forward_shared_memory<D, QUERY_BLOCK>());
      case ROW_SUMS: return with(row_sums_kernel<TYPE>, 0);
      case GRAD_KEYS: return with(grad_keys_kernel<TYPE, D, QUERY_BLOCK>, grad_keys_shared_memory<D>());
      case ADD_PARTS: return with(add_parts_kernel<TYPE>, 0);
      case GRAD_QUERIES:
        return with(grad_queries_kernel<TYPE, D, QUERY_BLOCK>, grad_queries_shared_memory<D, QUERY_BLOCK>());
      default: return NO_INSTANCE;
    }
  }

  template <typename Kernel>
  int with(Kernel kernel, int shared_memory) const {
    if (launch.grid_x == 0 || launch.grid_y == 0 || launch.grid_z == 0) return 0;
    if (launch.shared_memory != shared_memory) return WRONG_SHARED_MEMORY;
    return start(kernel, launch, arguments);
  }
};

template <typename Start>
int launch_kernel(const Launch& launch, const Arguments& arguments, const Start& start) {
  return with_instance(instance_of(arguments), LaunchKernel<Start>{launch, arguments, start});
}

}  // namespace adaptive
