// Chooses the instance of a kernel for a call and launches it: the one place with grids and block sizes. A backend gives
// `launch(kernel, grid_x, grid_y, grid_z, threads, shared_memory, arguments, stream)`, which returns an error number.
#pragma once

#include "backward.cuh"
#include "forward.cuh"

namespace adaptive {

constexpr int NO_INSTANCE = -1;

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

template <typename Launch>
struct RunForward {
  const Arguments& arguments;
  const Launch& launch;
  void* stream;

  template <int TYPE, int D, int QUERY_BLOCK>
  int operator()() const {
    const int lists = arguments.list_batches * arguments.list_heads * arguments.num_query_blocks;
    return launch(forward_kernel<TYPE, D, QUERY_BLOCK>, lists, arguments.batch / arguments.list_batches,
                  arguments.heads / arguments.list_heads, QUERY_BLOCK * 2, forward_shared_memory<D, QUERY_BLOCK>(),
                  arguments, stream);
  }
};

template <typename Launch>
struct RunBackward {
  const Arguments& arguments;
  const Launch& launch;
  void* stream;

  template <int TYPE, int D, int QUERY_BLOCK>
  int operator()() const {
    const int list_rows = arguments.list_batches * arguments.list_heads;
    const int batches = arguments.batch / arguments.list_batches, heads = arguments.heads / arguments.list_heads;
    const int padded_length = arguments.num_query_blocks * QUERY_BLOCK;
    int error = launch(row_sums_kernel<TYPE>, (padded_length + ROW_SUM_WARPS - 1) / ROW_SUM_WARPS, arguments.heads,
                       arguments.batch, ROW_SUM_WARPS * 32, 0, arguments, stream);
    if (error != 0) return error;
    error = launch(grad_keys_kernel<TYPE, D, QUERY_BLOCK>, arguments.num_items, batches, heads, 128,
                   grad_keys_shared_memory<D>(), arguments, stream);
    if (error != 0) return error;
    if (arguments.num_slots > 0) {
      error = launch(add_parts_kernel<TYPE>, list_rows * arguments.num_blocks, batches, heads, 128, 0, arguments,
                     stream);
      if (error != 0) return error;
    }
    return launch(grad_queries_kernel<TYPE, D, QUERY_BLOCK>, list_rows * arguments.num_query_blocks, batches, heads,
                  QUERY_BLOCK * 2, grad_queries_shared_memory<D, QUERY_BLOCK>(), arguments, stream);
  }
};

// The most shared memory that a thread block of any kernel needs, to choose the query block by.
struct SharedMemory {
  template <int TYPE, int D, int QUERY_BLOCK>
  int operator()() const {
    const int keys = grad_keys_shared_memory<D>(), queries = grad_queries_shared_memory<D, QUERY_BLOCK>();
    return keys > queries ? keys : queries;
  }
};

}  // namespace adaptive
