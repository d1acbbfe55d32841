// Small matrix products on packed float32 tiles: a register tile of 6 rows by two vectors (6x16 with AVX2).
#pragma once

#include "vectors.h"

namespace adaptive {

// c[ROWS x PANEL] = (ACCUMULATE ? c : 0) + a[ROWS x depth] b[depth x PANEL], row-major. With TRANSPOSED a is stored as
// [depth x ROWS].
template <int ROWS, bool TRANSPOSED, bool ACCUMULATE>
ALWAYS_INLINE void multiply_panel(const float* a, int a_stride, const float* b, int b_stride, float* c, int c_stride,
                                  int depth) {
  Floats left[ROWS], right[ROWS];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; i++) {
    left[i] = ACCUMULATE ? load<Floats>(c + i * c_stride) : Floats{};
    right[i] = ACCUMULATE ? load<Floats>(c + i * c_stride + WIDTH) : Floats{};
  }
  for (int k = 0; k < depth; k++) {
    const Floats b_left = load<Floats>(b + k * b_stride), b_right = load<Floats>(b + k * b_stride + WIDTH);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
      const Floats factor = broadcast(TRANSPOSED ? a[k * a_stride + i] : a[i * a_stride + k]);
      left[i] += factor * b_left;
      right[i] += factor * b_right;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; i++) {
    store(c + i * c_stride, left[i]);
    store(c + i * c_stride + WIDTH, right[i]);
  }
}

// c[rows x columns] = (ACCUMULATE ? c : 0) + a b, with columns a multiple of PANEL; a as in multiply_panel.
template <bool TRANSPOSED, bool ACCUMULATE>
void multiply(const float* a, int a_stride, const float* b, int b_stride, float* c, int c_stride, int rows, int columns,
              int depth) {
  for (int column = 0; column < columns; column += PANEL) {
    int row = 0;
    const auto run = [&](auto count) {
      constexpr int ROWS = decltype(count)::value;
      multiply_panel<ROWS, TRANSPOSED, ACCUMULATE>(a + (int64_t)row * (TRANSPOSED ? 1 : a_stride), a_stride, b + column,
                                                   b_stride, c + (int64_t)row * c_stride + column, c_stride, depth);
      row += ROWS;
    };
    while (row + 6 <= rows) run(std::integral_constant<int, 6>());
    if (row + 4 <= rows) run(std::integral_constant<int, 4>());
    if (row + 2 <= rows) run(std::integral_constant<int, 2>());
    if (row + 1 <= rows) run(std::integral_constant<int, 1>());
  }
}

}  // namespace adaptive
