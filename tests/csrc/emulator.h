// The device functions of csrc/cuda/device.cuh for a host compiler: every thread of a block is a fiber, and whatever
// needs several threads (barriers, shuffles, ldmatrix, mma) is a meeting point. What goes wrong on a GPU only sometimes
// goes wrong here always, or soon:
// - shared memory starts as NaN; a copy writes NaN when it is issued and the data only when it is waited for;
// - no thread may end before its copies;
// - warps run in a random order, and each for a random number of turns before another may run;
// - ldmatrix and the copies check their alignment and stay inside the shared memory.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define DEVICE inline
#define KERNEL(threads, blocks) void
#define SHARED_MEMORY(name) unsigned char* name = ::adaptive::emulator::block().shared
#define UNROLL
#define NO_UNROLL
#define UNROLL_BY(steps) static_assert(steps > 0);

namespace adaptive {
namespace emulator {

struct Copy {
  void* target;
  const void* source;  // null: zeros
};

struct Thread {
  ucontext_t context;  // of its start; from then on it goes on at its place
  jmp_buf place;
  std::vector<char> stack;
  bool is_started = false, is_done = false;
  std::vector<Copy> pending;
  std::deque<std::vector<Copy>> groups;
};

// Where threads wait until all of them have come.
struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  const Half* rows[32];
  float a[32][8], b[32][4];
  float values[32];
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  Barrier barrier;
  jmp_buf scheduler;
  std::function<void()> body;
  int current = 0;
  const char* error = nullptr;
  uint64_t random = 0x9E3779B97F4A7C15u;
};

inline Block& block() {
  static Block instance;
  return instance;
}

// From a thread to the scheduler and back. swapcontext would ask the system for the signal mask every time.
[[gnu::noinline]] inline void leave() {
  Block& all = block();
  if (_setjmp(all.threads[all.current].place) == 0) _longjmp(all.scheduler, 1);
}

[[gnu::noinline]] inline void enter(int index) {
  Block& all = block();
  all.current = index;
  if (_setjmp(all.scheduler) != 0) return;
  Thread& thread = all.threads[index];
  if (thread.is_started) _longjmp(thread.place, 1);
  thread.is_started = true;
  setcontext(&thread.context);
}

inline void wait_at(Barrier& barrier, int expected) {
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    barrier.generation++;
  }
  while (barrier.generation == generation) leave();
}

inline Warp& warp() { return block().warps[block().current / 32]; }
inline int lane() { return block().current % 32; }
inline void meet() { wait_at(warp().barrier, 32); }

// Whether 16 bytes at an address are aligned and in shared memory; remembers the error if not.
inline bool is_shared(const void* address, const char* error) {
  Block& all = block();
  const unsigned char* byte = (const unsigned char*)address;
  const bool is_inside = byte >= all.shared && byte + 16 <= all.memory.data() + all.memory.size();
  if (is_inside && (uintptr_t)address % 16 == 0) return true;
  all.error = error;
  return false;
}

inline void run_thread() {
  Block& all = block();
  all.body();
  Thread& thread = all.threads[all.current];
  for (const std::vector<Copy>& group : thread.groups)
    if (!group.empty()) all.error = "the thread ends before its copies to shared memory";
  all.threads[all.current].is_done = true;
  leave();
}

inline uint64_t next_random() {
  uint64_t& state = block().random;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}

// Runs one thread block to its end.
inline void run_block(int num_threads, int shared_memory, const std::function<void()>& body) {
  Block& all = block();
  all.body = body;
  all.barrier = {};
  all.threads.resize(num_threads);
  all.warps.assign(num_threads / 32, {});
  all.memory.assign(shared_memory + 128, 0xFF);
  all.shared = (unsigned char*)(((uintptr_t)all.memory.data() + 127) / 128 * 128);
  // Exactly as many bytes as asked for are valid.
  all.memory.resize(all.shared - all.memory.data() + shared_memory);
  for (Thread& thread : all.threads) {
    thread.stack.resize(256 * 1024);
    thread.is_started = thread.is_done = false;
    thread.pending.clear();
    thread.groups.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;  // no thread returns
    makecontext(&thread.context, run_thread, 0);
  }
  int unfinished = num_threads;
  while (unfinished > 0) {
    const int warp = (int)(next_random() % all.warps.size()), turns = 1 + (int)(next_random() % 64);
    for (int turn = 0; turn < turns; turn++) {
      for (int thread = warp * 32; thread < warp * 32 + 32; thread++) {
        if (all.threads[thread].is_done) continue;
        enter(thread);
      }
    }
    unfinished = 0;
    for (const Thread& thread : all.threads) unfinished += !thread.is_done;
  }
}

}  // namespace emulator

struct Index {
  unsigned int x = 0, y = 0, z = 0;
};
inline Index blockIdx, gridDim;
inline struct {
  struct {
    operator unsigned int() const { return (unsigned int)emulator::block().current; }
  } x;
} threadIdx;

template <int TYPE>
inline float unpack(Half bits) {
  if (TYPE == BFLOAT16) {
    const Word word = (Word)bits << 16;
    float result;
    std::memcpy(&result, &word, 4);
    return result;
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp((float)mantissa, -24));
}

template <int TYPE>
inline Half round_to_half(float value) {
  Word word;
  std::memcpy(&word, &value, 4);
  if (value != value) return 0x7FFF;
  if (TYPE == BFLOAT16) return (Half)((word + 0x7FFF + (word >> 16 & 1)) >> 16);
  const Half sign = (Half)(word >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  if (magnitude == 0.0f) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);
  // Units of the last place; rint rounds to nearest even.
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
  const int steps = (int)std::rint(std::ldexp(magnitude, -unit));
  return sign | (Half)(unit == -24 ? steps : ((unit + 24) << 10) + steps);
}

template <int TYPE>
inline Word pack(float low, float high) {
  return round_to_half<TYPE>(low) | (Word)round_to_half<TYPE>(high) << 16;
}

inline float infinity() { return INFINITY; }
inline float power_of_two(float exponent) { return std::exp2(exponent); }

inline int thread_index() { return emulator::block().current; }

inline void synchronize_block() {
  emulator::wait_at(emulator::block().barrier, (int)emulator::block().threads.size());
}

inline float shuffle_xor(float value, int mask) {
  emulator::Warp& warp = emulator::warp();
  const int lane = emulator::lane();
  warp.values[lane] = value;
  emulator::meet();
  const float result = warp.values[lane ^ mask];
  emulator::meet();
  return result;
}

inline Word ballot(bool vote) {
  emulator::Warp& warp = emulator::warp();
  warp.values[emulator::lane()] = vote;
  emulator::meet();
  Word lanes = 0;
  for (int lane = 0; lane < 32; lane++) lanes |= (Word)(warp.values[lane] != 0) << lane;
  emulator::meet();
  return lanes;
}
inline int count_bits(Word word) { return __builtin_popcount(word); }

template <bool TRANSPOSED>
inline void load_four_matrices(Word registers[4], const Half* row) {
  emulator::Warp& warp = emulator::warp();
  const int lane = emulator::lane();
  static const Half nothing[8] = {0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF};
  warp.rows[lane] = emulator::is_shared(row, "ldmatrix outside of shared memory or misaligned") ? row : nothing;
  emulator::meet();
  for (int matrix = 0; matrix < 4; matrix++) {
    const Half* const* rows = warp.rows + matrix * 8;
    const int pair = lane % 4 * 2, other = lane / 4;
    const Half low = TRANSPOSED ? rows[pair][other] : rows[other][pair];
    const Half high = TRANSPOSED ? rows[pair + 1][other] : rows[other][pair + 1];
    registers[matrix] = low | (Word)high << 16;
  }
  emulator::meet();
}

inline void load_matrices(Word registers[4], const Half* row) { load_four_matrices<false>(registers, row); }
inline void load_matrices_transposed(Word registers[4], const Half* row) { load_four_matrices<true>(registers, row); }

template <int TYPE>
inline void multiply_accumulate(float c[4], const Word a[4], const Word b[2]) {
  emulator::Warp& warp = emulator::warp();
  const int lane = emulator::lane();
  for (int i = 0; i < 8; i++) warp.a[lane][i] = unpack<TYPE>((Half)(a[i / 2] >> i % 2 * 16));
  for (int i = 0; i < 4; i++) warp.b[lane][i] = unpack<TYPE>((Half)(b[i / 2] >> i % 2 * 16));
  emulator::meet();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; k++) {
      const int word_of_a = row / 8 + k / 8 * 2, word_of_b = k / 8, half = k % 2;
      sum += warp.a[row % 8 * 4 + k % 8 / 2][word_of_a * 2 + half] * warp.b[column * 4 + k % 8 / 2][word_of_b * 2 + half];
    }
    c[i] = sum;
  }
  emulator::meet();
}

inline void copy_async(void* shared, const void* global, bool is_copied) {
  emulator::Block& all = emulator::block();
  if (!emulator::is_shared(shared, "copy outside of shared memory or misaligned")) return;
  if ((uintptr_t)global % 16 != 0) all.error = "copy from a misaligned address";
  std::memset(shared, 0xFF, 16);
  all.threads[all.current].pending.push_back({shared, is_copied ? global : nullptr});
}

inline void commit_copies() {
  emulator::Thread& thread = emulator::block().threads[emulator::block().current];
  thread.groups.push_back(std::move(thread.pending));
  thread.pending.clear();
}

template <int PENDING>
inline void wait_for_copies() {
  emulator::Thread& thread = emulator::block().threads[emulator::block().current];
  while ((int)thread.groups.size() > PENDING) {
    for (const emulator::Copy& copy : thread.groups.front()) {
      if (copy.source != nullptr)
        std::memcpy(copy.target, copy.source, 16);
      else
        std::memset(copy.target, 0, 16);
    }
    thread.groups.pop_front();
  }
}

}  // namespace adaptive
