// Tasks on torch's own thread pool: a second OpenMP runtime would fight it for the cores.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

// From libtorch_cpu, part of torch's stable C interface (torch/csrc/stable/c/shim.h, torch 2.10 and later).
extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                                      void (*function)(int64_t begin, int64_t end, void* context), void* context);

namespace adaptive {

// Calls task(index, state) for every index in [0, count), handed out in ascending order; every thread has a state of its own.
template <typename State, typename Task>
void parallel_tasks(int64_t count, int64_t num_threads, const Task& task) {
  struct Shared {
    const Task& task;
    int64_t count;
    std::atomic<int64_t> next;
  } shared{task, count, {0}};
  const auto worker = [](int64_t, int64_t, void* context) {
    Shared& work = *(Shared*)context;
    State state;
    for (int64_t index = work.next++; index < work.count; index = work.next++) work.task(index, state);
  };
  // The only exception that a task may throw.
  if (torch_parallel_for(0, std::min(count, num_threads), 1, worker, &shared) != 0) throw std::bad_alloc();
}

// The same without states.
template <typename Task>
void parallel_tasks(int64_t count, int64_t num_threads, const Task& task) {
  struct Nothing {};
  parallel_tasks<Nothing>(count, num_threads, [&](int64_t index, Nothing&) { task(index); });
}

}  // namespace adaptive
