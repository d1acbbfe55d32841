// Scores of keys and vectors of queries, many at a time: in registers, or in the tiles of AMX.
#pragma once

#include "packed_keys.h"

#if VECTOR_FLOATS == 16 && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

namespace adaptive {

// Keys that meet the vectors of queries at a time: as many sums as registers hold.
constexpr int MAX_SUMS = WIDTH == 16 ? 16 : 8;

// Products of words: floats, or four bytes each, those of queries unsigned.
template <typename Word, int VECTORS>
class RegisterProducts {
 public:
  static constexpr bool IS_BYTES = std::is_same<Word, int32_t>::value;
  static constexpr int KEYS = MAX_SUMS / VECTORS;
  using Vector = typename std::conditional<IS_BYTES, Ints, Floats>::type;
  static constexpr int64_t USUAL_DEPTH = IS_BYTES ? 16 : 64;  // heads of 64

  // `query` holds words [depth, VECTORS, WIDTH], `query_scale` the scales [VECTORS, WIDTH] of bytes.
  RegisterProducts(const Keys<Word>& keys, const Word* query, const float* query_scale)
      : keys_(keys), query_(query), query_scale_(query_scale) {}

  // Calls visit(key, vector, score in base 2) for the keys from `first` to `last`; nothing is prepared.
  template <typename Visit>
  ALWAYS_INLINE void meet(int64_t first, int64_t last, int64_t /* next */, const Visit& visit) const {
    for (; first + KEYS <= last; first += KEYS) meet_some<KEYS>(first, visit);
    if constexpr (KEYS > 4)
      for (; first + 4 <= last; first += 4) meet_some<4>(first, visit);
    for (; first < last; first++) meet_some<1>(first, visit);
  }

 private:
  const Keys<Word>& keys_;
  const Word* query_;
  const float* query_scale_;

  template <int COUNT, typename Visit>
  ALWAYS_INLINE void meet_some(int64_t first, const Visit& visit) const {
    alignas(64) Vector sums[COUNT * VECTORS];
    multiply<COUNT>(first, sums);
#pragma GCC unroll 16
    for (int sum = 0; sum < COUNT * VECTORS; sum++) {
      const int64_t key = first + sum / VECTORS;
      const int vector = sum % VECTORS;
      Floats score = __builtin_convertvector(sums[sum], Floats);
      if constexpr (IS_BYTES) score = score * keys_.scale[key] * load<Floats>(query_scale_ + vector * WIDTH);
      visit(key, vector, score);
    }
  }

  // A function of its own: inside a large one the compiler keeps the sums in memory.
  template <int COUNT>
  __attribute__((noinline)) void multiply(int64_t first, Vector* result) const {
    // Rows a constant apart need one address.
    if (keys_.depth == USUAL_DEPTH)
      add_up<COUNT>(first, std::integral_constant<int64_t, USUAL_DEPTH>(), result);
    else
      add_up<COUNT>(first, keys_.depth, result);
  }

  template <int COUNT, typename Depth>
  ALWAYS_INLINE void add_up(int64_t first, Depth depth, Vector* result) const {
    const Word* words = keys_.words.data() + first * depth;
    Vector sums[COUNT][VECTORS];
#pragma GCC unroll 16
    for (int key = 0; key < COUNT; key++)
#pragma GCC unroll 4
      for (int vector = 0; vector < VECTORS; vector++) {
        sums[key][vector] = Vector{};
        if constexpr (IS_BYTES) sums[key][vector] += keys_.start[first + key];
      }
    for (int64_t i = 0; i < depth; i++) {
      Vector left[VECTORS];
#pragma GCC unroll 4
      for (int vector = 0; vector < VECTORS; vector++) left[vector] = load<Vector>(query_ + (i * VECTORS + vector) * WIDTH);
#pragma GCC unroll 16
      for (int key = 0; key < COUNT; key++)
#pragma GCC unroll 4
        for (int vector = 0; vector < VECTORS; vector++)
          add_product(sums[key][vector], left[vector], words[key * depth + i]);
    }
#pragma GCC unroll 16
    for (int key = 0; key < COUNT; key++)
#pragma GCC unroll 4
      for (int vector = 0; vector < VECTORS; vector++) result[key * VECTORS + vector] = sums[key][vector];
  }
};

#if HAS_TILES
// Whether the system lets this process use tiles, which it must be asked.
inline bool may_use_tiles() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool is_granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return is_granted;
}

// Sets the sizes of a thread's tiles for rows of so many words, and gives them up: 0 to 3 hold sums, 6 keys, 7 queries.
class TileSizes {
 public:
  static constexpr int SIDE = 16;  // rows, and words of a row, at most

  explicit TileSizes(int64_t depth) {
    const int words = (int)std::min<int64_t>(depth, SIDE);
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {};
      uint8_t rows[16] = {};
    } sizes;
    for (int tile = 0; tile < 8; tile++) sizes.bytes_per_row[tile] = 4 * SIDE, sizes.rows[tile] = SIDE;
    sizes.bytes_per_row[6] = (uint16_t)(4 * words);
    sizes.rows[7] = (uint8_t)words;
    // The compiler does not know that tiles are loaded from memory.
    asm volatile("" ::: "memory");
    _tile_loadconfig(&sizes);
  }
  ~TileSizes() { _tile_release(); }
  TileSizes(const TileSizes&) = delete;
  TileSizes& operator=(const TileSizes&) = delete;
};

// Products of bytes, those of queries signed too: 16 keys by the 16 queries of a vector at a time.
template <int VECTORS>
class TileProducts {
  static_assert(VECTORS == 1 || VECTORS == 2 || VECTORS == 4);

 public:
  static constexpr int KEYS = TileSizes::SIDE;

  TileProducts(const Keys<int32_t>& keys, const int32_t* query, const float* query_scale)
      : keys_(keys), query_(query), query_scale_(query_scale) {}

  // Calls visit(key, vector, score in base 2) for the keys from `first` to `last`. Those from `next` on, of which the
  // next call should be, are multiplied while the last ones are visited.
  template <typename Visit>
  ALWAYS_INLINE void meet(int64_t first, int64_t last, int64_t next, const Visit& visit) {
    for (; first < last; first += KEYS) {
      if (first_[current_] != first) multiply(first);
      const int32_t* sums = sums_[current_];
      current_ ^= 1;
      multiply(first + KEYS < last ? first + KEYS : next);
      const int count = (int)std::min<int64_t>(KEYS, last - first);
      for (int key = 0; key < count; key++)
#pragma GCC unroll 4
        for (int vector = 0; vector < VECTORS; vector++)
          visit(first + key, vector,
                __builtin_convertvector(load<Ints>(sums + (key * VECTORS + vector) * WIDTH), Floats) *
                    keys_.scale[first + key] * load<Floats>(query_scale_ + vector * WIDTH));
    }
  }

 private:
  const Keys<int32_t>& keys_;
  const int32_t* query_;
  const float* query_scale_;
  int current_ = 0;
  int64_t first_[2] = {-1, -1};  // of the keys of `sums_`
  alignas(64) int32_t sums_[2][KEYS * VECTORS * WIDTH];

  // Macros that take the numbers of tiles want them as digits.
  ALWAYS_INLINE void multiply(int64_t first) {
    first_[current_] = first;
    int32_t* sums = sums_[current_];
    constexpr int64_t STRIDE = VECTORS * WIDTH * 4;
    _tile_zero(0);
    if constexpr (VECTORS > 1) _tile_zero(1);
    if constexpr (VECTORS > 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t word = 0; word < keys_.depth; word += TileSizes::SIDE) {
      const int32_t* query = query_ + word * VECTORS * WIDTH;
      _tile_loadd(6, keys_.words.data() + first * keys_.depth + word, keys_.depth * 4);
      _tile_loadd(7, query, STRIDE);
      _tile_dpbssd(0, 6, 7);
      if constexpr (VECTORS > 1) {
        _tile_loadd(7, query + WIDTH, STRIDE);
        _tile_dpbssd(1, 6, 7);
      }
      if constexpr (VECTORS > 2) {
        _tile_loadd(7, query + 2 * WIDTH, STRIDE);
        _tile_dpbssd(2, 6, 7);
        _tile_loadd(7, query + 3 * WIDTH, STRIDE);
        _tile_dpbssd(3, 6, 7);
      }
    }
    _tile_stored(0, sums, STRIDE);
    if constexpr (VECTORS > 1) _tile_stored(1, sums + WIDTH, STRIDE);
    if constexpr (VECTORS > 2) {
      _tile_stored(2, sums + 2 * WIDTH, STRIDE);
      _tile_stored(3, sums + 3 * WIDTH, STRIDE);
    }
  }
};
#endif

}  // namespace adaptive
