// Vectors of float and int32 in GCC's vector extensions: AVX-512, AVX2, SSE and NEON from one source.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Floats per vector. May be defined on the command line to test another width: the compiler splits what is too wide.
#ifndef VECTOR_FLOATS
#if defined(__AVX512F__)
#define VECTOR_FLOATS 16
#elif defined(__AVX__)
#define VECTOR_FLOATS 8
#else
#define VECTOR_FLOATS 4
#endif
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace adaptive {

constexpr int WIDTH = VECTOR_FLOATS;

typedef float Floats __attribute__((vector_size(4 * VECTOR_FLOATS)));
typedef int32_t Ints __attribute__((vector_size(4 * VECTOR_FLOATS)));
typedef int8_t Bytes __attribute__((vector_size(VECTOR_FLOATS)));
typedef uint32_t Words __attribute__((vector_size(4 * VECTOR_FLOATS)));

inline int round_up(int count, int multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

template <typename Vector, typename Scalar>
ALWAYS_INLINE Vector load(const Scalar* source) {
  Vector result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}

template <typename Vector, typename Scalar>
ALWAYS_INLINE void store(Scalar* target, Vector value) {
  std::memcpy(target, &value, sizeof(value));
}

ALWAYS_INLINE Floats broadcast(float value) { return value - Floats{}; }
ALWAYS_INLINE Ints broadcast(int32_t value) { return value - Ints{}; }

ALWAYS_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// value where the mask is -1, 0 where it is 0.
ALWAYS_INLINE Floats zero_unless(Ints mask, Floats value) { return (Floats)((Ints)value & mask); }

// All lanes of Floats or Ints joined by a function of two, halves by halves.
template <int HALF = WIDTH / 2, typename Vector, typename Join>
ALWAYS_INLINE auto join_lanes(Vector value, const Join& join) {
  Ints crossed;
  for (int lane = 0; lane < WIDTH; lane++) crossed[lane] = lane ^ HALF;
  value = join(value, __builtin_shuffle(value, crossed));
  if constexpr (HALF > 1)
    return join_lanes<HALF / 2>(value, join);
  else
    return value[0];
}

template <typename Vector>
ALWAYS_INLINE auto horizontal_sum(Vector value) {
  return join_lanes(value, [](Vector a, Vector b) { return a + b; });
}

ALWAYS_INLINE float horizontal_maximum(Floats value) { return join_lanes(value, maximum); }

// Whether a mask is -1 anywhere.
ALWAYS_INLINE bool any(Ints mask) {
  int32_t joined = 0;
  for (int i = 0; i < WIDTH; i++) joined |= mask[i];
  return joined != 0;
}

// 2**x for x <= 126, relative error 1e-7; exactly 0 below -126 and at -inf, NaN stays NaN.
ALWAYS_INLINE Floats exp2_approximately(Floats x) {
  // Adding 1.5 * 2**23 rounds to the nearest whole number and leaves it in the low bits.
  const Floats magic = broadcast(12582912.0f);
  const Floats shifted = x + magic;
  const Floats fraction = x - (shifted - magic);
  // Minimax polynomial of relative error 2e-9 on [-0.5, 0.5].
  Floats result = broadcast(1.533757684e-04f);
  result = result * fraction + 1.339986036e-03f;
  result = result * fraction + 9.618519534e-03f;
  result = result * fraction + 5.550328998e-02f;
  result = result * fraction + 2.402264661e-01f;
  result = result * fraction + 6.931472056e-01f;
  result = result * fraction + 1.0f;
  const Words exponent = ((Words)shifted - 0x4B400000u) << 23;
  return zero_unless(~(Ints)(x < -126.0f), (Floats)((Words)result + exponent));
}

}  // namespace adaptive
