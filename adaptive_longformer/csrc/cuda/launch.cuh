// Finds the instance of a kernel for a launch, whose grid, threads and shared memory attention/kernels/cuda_launches.py chose.
#pragma once

#include "backward.cuh"
#include "forward.cuh"

namespace adaptive {

constexpr int NO_INSTANCE = -1, WRONG_SHARED_MEMORY = -2;

// In the order of attention/kernels/cuda_launches.py, as the fields of Launch are.
enum KernelName { FORWARD, ROW_SUMS, GRAD_SMALL_KEYS, GRAD_KEYS, ADD_PARTS, GRAD_QUERIES };

inline const char* launch_error(int error) {
  return error == WRONG_SHARED_MEMORY ? "another amount of shared memory is needed" : "no kernel for these types and sizes";
}

struct Launch {
  int kernel;
  int grid_x, grid_y, grid_z;
  int threads, shared_memory;
};

// Calls start(kernel, launch, arguments) with the kernel of a launch. The shared memory that a kernel lays out is what it
// must be given: the caller counted it too.
template <int TYPE, int D, int QUERY_BLOCK, int WIDTH, typename Start>
int launch_instance(const Launch& launch, const Arguments& arguments, const Start& start) {
  const auto with = [&](auto kernel, int shared_memory) {
    if (launch.grid_x == 0 || launch.grid_y == 0 || launch.grid_z == 0) return 0;
    if (launch.shared_memory != shared_memory) return WRONG_SHARED_MEMORY;
    return start(kernel, launch, arguments);
  };
  switch (launch.kernel) {
    case FORWARD:
      return with(forward_kernel<TYPE, D, QUERY_BLOCK, WIDTH>, forward_shared_memory<D, QUERY_BLOCK, WIDTH>());
    case ROW_SUMS: return with(row_sums_kernel<TYPE>, 0);
    case GRAD_SMALL_KEYS: return with(grad_small_keys_kernel<TYPE, D>, grad_small_keys_shared_memory<D>());
    case GRAD_KEYS: return with(grad_keys_kernel<TYPE, D, QUERY_BLOCK>, grad_keys_shared_memory<D>());
    case ADD_PARTS: return with(add_parts_kernel<TYPE>, 0);
    case GRAD_QUERIES:
      return with(grad_queries_kernel<TYPE, D, QUERY_BLOCK, WIDTH>, grad_queries_shared_memory<D, QUERY_BLOCK, WIDTH>());
    default: return NO_INSTANCE;
  }
}

// The instances of one type and head dimension.
template <int TYPE, int D, typename Start>
int launch_by_query_block(const Launch& launch, const Arguments& arguments, const Start& start) {
  if (arguments.small_query_block != 0) return launch_instance<TYPE, D, 64, PIECE>(launch, arguments, start);
  if (arguments.query_block_size == 64) return launch_instance<TYPE, D, 64, KEY_BLOCK>(launch, arguments, start);
  if (arguments.query_block_size == 128) return launch_instance<TYPE, D, 128, KEY_BLOCK>(launch, arguments, start);
  return NO_INSTANCE;
}

template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};

// Calls call(type, Constant<head dimension>()) for those of the arguments.
template <typename Type, typename Call>
int by_head_dim(const Arguments& arguments, Type type, const Call& call) {
  switch (arguments.head_dim) {
    case 32: return call(type, Constant<32>());
    case 64: return call(type, Constant<64>());
    case 96: return call(type, Constant<96>());
    case 128: return call(type, Constant<128>());
    default: return NO_INSTANCE;
  }
}

// Calls call(Constant<type>(), Constant<head dimension>()) for those of the arguments.
template <typename Call>
int by_type_and_head_dim(const Arguments& arguments, const Call& call) {
  if (arguments.element_type == BFLOAT16) return by_head_dim(arguments, Constant<BFLOAT16>(), call);
  if (arguments.element_type == FLOAT16) return by_head_dim(arguments, Constant<FLOAT16>(), call);
  return NO_INSTANCE;
}

}  // namespace adaptive
