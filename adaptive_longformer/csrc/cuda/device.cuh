// The few instructions that the kernels are made of. nvcc sees inline PTX; a host compiler sees the emulator
// of tests/csrc/emulator.h, which runs every thread of a block as a fiber. No CUDA or torch header is included.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define COMPILES_FOR_CUDA
#endif

namespace adaptive {

typedef unsigned short Half;  // bits of a bfloat16 or a float16
typedef unsigned int Word;
typedef unsigned long long Bits;

enum ElementType { BFLOAT16 = 1, FLOAT16 = 2 };

}  // namespace adaptive

#ifdef COMPILES_FOR_CUDA

#define DEVICE __device__ __forceinline__
// A kernel for blocks of so many threads, and the least number of blocks that a processor has to hold: more of them hide
// more waiting, and as many are asked for as there are registers for without spilling any.
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#define UNROLL _Pragma("unroll")
#define PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(steps) PRAGMA(unroll steps)
#define NO_UNROLL _Pragma("unroll 1")

namespace adaptive {

DEVICE Word shared_address(const void* pointer) { return (Word)__cvta_generic_to_shared(pointer); }

// Four 8x8 matrices from shared memory; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void load_matrices(Word registers[4], const Half* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

DEVICE void load_matrices_transposed(Word registers[4], const Half* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// c[16 x 8] += a[16 x 16] b[16 x 8] by one warp, accumulated in float32.
template <int TYPE>
DEVICE void multiply_accumulate(float c[4], const Word a[4], const Word b[2]) {
  if constexpr (TYPE == BFLOAT16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Starts a copy of 16 bytes from global to shared memory, or fills them with zeros.
DEVICE void copy_async(void* shared, const void* global, bool is_copied) {
  asm volatile("{ .reg .pred %%skip0; setp.eq.u32 %%skip0,%2,0; cp.async.cg.shared.global [%0],[%1],16,%%skip0; }" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"((Word)is_copied)
               : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's committed groups are unfinished.
template <int PENDING>
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

DEVICE float infinity() { return __uint_as_float(0x7F800000u); }
// exp2f would spend more instructions on denormal results, which no sum of weights can see.
DEVICE float power_of_two(float exponent) {
  float result;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(result) : "f"(exponent));
  return result;
}
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }
// A bit for every lane of the warp.
DEVICE Word ballot(bool vote) { return __ballot_sync(0xFFFFFFFFu, vote); }
DEVICE int count_bits(Word word) { return __popc(word); }
DEVICE void synchronize_block() { __syncthreads(); }
// threadIdx.x, read anew: what follows from it is computed again instead of kept in registers.
DEVICE int thread_index() {
  int result;
  asm volatile("mov.u32 %0,%%tid.x;" : "=r"(result));
  return result;
}

// Two floats, rounded to nearest even, as one register; `low` is the element at the lower address.
template <int TYPE>
DEVICE Word pack(float low, float high) {
  Word result;
  if constexpr (TYPE == BFLOAT16)
    asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(result) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

template <int TYPE>
DEVICE float unpack(Half bits) {
  if constexpr (TYPE == BFLOAT16) return __uint_as_float((Word)bits << 16);
  float result;
  asm("cvt.f32.f16 %0,%1;" : "=f"(result) : "h"(bits));
  return result;
}

}  // namespace adaptive

#else
#include "emulator.h"
#endif
