// Small matrix products on packed float32 tiles, in register tiles of up to two vectors by MAX_ROWS rows.
#pragma once

#include "vectors.h"

namespace adaptive {

// Two vectors per row and MAX_ROWS rows leave room for the operands: 32 registers with AVX-512 and NEON, else 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MAX_ROWS = 8;
#else
constexpr int MAX_ROWS = 6;
#endif

// The right factor of a product: rows of equal stride in pieces of `piece_depth` rows each, anywhere in memory.
struct Pieces {
  const float* const* first_rows;
  int count, piece_depth, stride;
};

// Memory that is read next, from `next` to `end` and as much from `also` on: with every step of a product a line of
// LINE floats, until all are on their way.
struct Fetch {
  const float *next, *end, *also;
};

constexpr int LINE = 16;

// c[ROWS x VECTORS * WIDTH] = (ACCUMULATE ? c : 0) + a[ROWS x depth] b[depth x VECTORS * WIDTH], row-major, b from a
// column on. With TRANSPOSED a is stored as [depth x ROWS].
template <int ROWS, int VECTORS, bool TRANSPOSED, bool ACCUMULATE, bool FETCHES_BOTH>
ALWAYS_INLINE void multiply_rows(const float* a, int a_stride, const Pieces& b, int column, float* c, int c_stride,
                                 Fetch& fetch) {
  const float *line = fetch.next, *other_line = fetch.also;
  const int64_t step = line < fetch.end ? LINE : 0;
  Floats sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; j++)
      sum[i][j] = ACCUMULATE ? load<Floats>(c + i * c_stride + j * WIDTH) : Floats{};
  for (int piece = 0; piece < b.count; piece++) {
    const float* b_row = b.first_rows[piece] + column;
    for (int k = 0; k < b.piece_depth; k++) {
      __builtin_prefetch(line, 0, 2);
      if (FETCHES_BOTH) __builtin_prefetch(other_line, 0, 2);
      line += step, other_line += step;
      Floats right[VECTORS];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; j++) right[j] = load<Floats>(b_row + j * WIDTH);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        const Floats left = broadcast(TRANSPOSED ? a[i] : a[i * a_stride]);
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; j++) sum[i][j] += left * right[j];
      }
      a += TRANSPOSED ? a_stride : 1;
      b_row += b.stride;
    }
  }
  fetch.next = line, fetch.also = other_line;
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; j++) store(c + i * c_stride + j * WIDTH, sum[i][j]);
}

// c[rows x columns] = (ACCUMULATE ? c : 0) + a b, with columns a multiple of WIDTH; a as in multiply_rows. FETCHES_BOTH
// says whether the second range of `fetch` counts.
template <bool TRANSPOSED, bool ACCUMULATE, bool FETCHES_BOTH = false>
void multiply(const float* a, int a_stride, const Pieces& b, float* c, int c_stride, int rows, int columns,
              Fetch fetch) {
  int column = 0;
  const auto panel = [&](auto vectors) {
    constexpr int VECTORS = decltype(vectors)::value;
    int row = 0;
    const auto run = [&](auto count) {
      constexpr int ROWS = decltype(count)::value;
      const float* a_row = a + (int64_t)row * (TRANSPOSED ? 1 : a_stride);
      float* c_row = c + (int64_t)row * c_stride + column;
      multiply_rows<ROWS, VECTORS, TRANSPOSED, ACCUMULATE, FETCHES_BOTH>(a_row, a_stride, b, column, c_row, c_stride,
                                                                         fetch);
      row += ROWS;
    };
    constexpr int MOST = MAX_ROWS * 2 / VECTORS;
    while (row + MOST <= rows) run(std::integral_constant<int, MOST>());
    if (MOST > 8 && row + 8 <= rows) run(std::integral_constant<int, 8>());
    if (row + 4 <= rows) run(std::integral_constant<int, 4>());
    if (row + 2 <= rows) run(std::integral_constant<int, 2>());
    if (row + 1 <= rows) run(std::integral_constant<int, 1>());
    column += VECTORS * WIDTH;
  };
  while (column + 2 * WIDTH <= columns) panel(std::integral_constant<int, 2>());
  if (column < columns) panel(std::integral_constant<int, 1>());
}

}  // namespace adaptive
