// Dot products of bytes, four at a time: what a processor offers for them, and the same in plain vectors.
#pragma once

#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace adaptive {

#if VECTOR_FLOATS == 16 && defined(__AVX512VNNI__)
#define DOT_BYTES "vpdpbusd"
#elif VECTOR_FLOATS == 8 && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define DOT_BYTES "vpdpbusd"
#elif VECTOR_FLOATS == 8 && defined(__AVXVNNI__)
#define DOT_BYTES "%{vex%} vpdpbusd"
#elif VECTOR_FLOATS == 16 && defined(__AVX512BW__)
#define DOT_PAIRS 512
#elif VECTOR_FLOATS == 8 && defined(__AVX2__)
#define DOT_PAIRS 256
#endif

#if defined(DOT_PAIRS)
// Sums of two products are cut off at 16 bits: 2 * 255 * 64 still fits.
constexpr int SIGNED_LIMIT = 63;
#else
constexpr int SIGNED_LIMIT = 127;
#endif

// Whether the processor has an instruction for them, so that they are faster than products of floats.
#if defined(DOT_BYTES) || defined(DOT_PAIRS)
constexpr bool HAS_DOT_OF_BYTES = true;
#else
constexpr bool HAS_DOT_OF_BYTES = false;
#endif

// sum += the dot product of the four bytes of every lane, unsigned, with those of `right`, signed and at most
// SIGNED_LIMIT.
ALWAYS_INLINE void add_product(Ints& sum, Ints left, int32_t right) {
  const Ints others = broadcast(right);
#if defined(DOT_BYTES)
  // As an intrinsic the compiler copies every sum before it is added to.
  asm(DOT_BYTES " %2, %1, %0" : "+v"(sum) : "v"(left), "v"(others));
#elif defined(DOT_PAIRS) && DOT_PAIRS == 512
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)left, (__m512i)others);
  sum += (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(DOT_PAIRS)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)left, (__m256i)others);
  sum += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
#pragma GCC unroll 4
  for (int byte = 0; byte < 4; byte++) sum += ((left >> 8 * byte) & 255) * ((others << (24 - 8 * byte)) >> 24);
#endif
}

ALWAYS_INLINE void add_product(Floats& sum, Floats left, float right) { sum += left * broadcast(right); }

}  // namespace adaptive
