// The exact stage of the selection, selection/exact.py in C++: every query that votes for a query block meets every key
// of the block's candidates. One pass over the keys writes no scores, only sums of exp(score - reference) per query and
// key block; masses follow from them. Lanes are queries, so that a key block of any size costs what its keys cost.
#include <algorithm>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "products.h"
#include "threads.h"

namespace adaptive {
namespace {

constexpr int MAX_VECTORS = WIDTH == 16 ? 4 : 2;
// So few query blocks with places that the keys of these are packed and no others.
constexpr int FEW_UNITS = 4;
// A sum above this asks for another reference; what it then is stays finite for any number of keys.
constexpr float SUM_LIMIT = 0x1p64f, POWER_LIMIT = 100.0f, POWER_SUM = 0x1p100f;

// 2**x, relative error 1e-4; at least SUM_LIMIT where x is large, 0 where it is small.
ALWAYS_INLINE Floats exp2_roughly(Floats x) {
#if VECTOR_FLOATS == 16 && defined(__AVX512DQ__)
  const Floats fraction = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
#else
  // Adding 1.5 * 2**23 rounds to a whole number and leaves it in the low bits.
  x = maximum(x > POWER_LIMIT ? broadcast(POWER_LIMIT) : x, broadcast(-126.0f));
  const Floats magic = broadcast(12582912.0f), shifted = (x - 0.5f) + magic;
  const Floats fraction = x - (shifted - magic);
#endif
  // Minimax polynomial on [0, 1].
  Floats result = broadcast(7.802452e-02f);
  result = result * fraction + 2.2606716e-01f;
  result = result * fraction + 6.9583354e-01f;
  result = result * fraction + 9.9992522e-01f;
#if VECTOR_FLOATS == 16 && defined(__AVX512DQ__)
  return (Floats)_mm512_scalef_ps((__m512)result, (__m512)x);
#else
  const Words exponent = ((Words)shifted - 0x4B400000u) << 23;
  return zero_unless(x > -126.0f, (Floats)((Words)result + exponent));
#endif
}

ALWAYS_INLINE Floats power(Floats x, int32_t) { return exp2_roughly(x); }
ALWAYS_INLINE Floats power(Floats x, float) {
  return exp2_approximately(x > POWER_LIMIT ? broadcast(POWER_LIMIT) : x);
}

// `mix` of patterns/mixing.py.
ALWAYS_INLINE uint32_t mix(uint32_t word) {
  word = (word ^ (word >> 16)) * 0x7FEB352Du;
  word = (word ^ (word >> 15)) * 0x846CA68Bu;
  return word ^ (word >> 16);
}

ALWAYS_INLINE bool any_above(Floats value, float limit) {
#if VECTOR_FLOATS == 16 && defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)value, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#elif VECTOR_FLOATS == 8 && defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(value > limit)) != 0;
#else
  return horizontal_maximum(value) > limit;
#endif
}

// Writes `first` plus the numbers of the lanes where a mask is -1, and room for all WIDTH; where the next one goes.
ALWAYS_INLINE int32_t* append_lanes(int32_t* next, Ints mask, int64_t first) {
#if VECTOR_FLOATS == 16 && defined(__AVX512F__)
  Ints numbers;
  for (int lane = 0; lane < WIDTH; lane++) numbers[lane] = lane;
  const __mmask16 lanes = _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
  store(next, (Ints)_mm512_maskz_compress_epi32(lanes, (__m512i)(numbers + broadcast((int32_t)first))));
  return next + __builtin_popcount(lanes);
#else
  for (int lane = 0; lane < WIDTH; lane++) {
    *next = (int32_t)first + lane;
    next -= mask[lane];
  }
  return next;
#endif
}

// Lane i of the result is the sum of the lanes of values[i], which it overwrites: in every step half of the vectors, each
// with sums of two in its lanes by one bit of the lane's number.
template <int STEP = WIDTH / 2>
ALWAYS_INLINE Floats sums_of_lanes(Floats (&values)[WIDTH]) {
  Ints straight, crossed;
  for (int lane = 0; lane < WIDTH; lane++) {
    straight[lane] = lane & STEP ? lane + WIDTH : lane;
    crossed[lane] = lane & STEP ? (lane ^ STEP) + WIDTH : lane ^ STEP;
  }
#pragma GCC unroll 8
  for (int i = 0; i < STEP; i++)
    values[i] = __builtin_shuffle(values[i], values[i + STEP], straight) +
                __builtin_shuffle(values[i], values[i + STEP], crossed);
  if constexpr (STEP > 1)
    return sums_of_lanes<STEP / 2>(values);
  else
    return values[0];
}

// Query blocks that meet the same keys, and what one thread sums up for them. Vectors of queries lie one after the
// other; a query block begins with a vector of its own.
template <typename Word>
struct Unit {
  std::vector<int32_t> entries;  // of the candidates, and then of global tokens
  int64_t num_blocks;            // how many of the first kind
  bool has_places;               // whether the candidates are those of places
  std::vector<std::pair<int32_t, float>> places;  // with their weights, ascending
  std::vector<int32_t> row_of;   // the query block that a vector belongs to
  Buffer<Word> query;            // groups of up to MAX_VECTORS vectors, each [depth, vectors, WIDTH]
  Buffer<float> scale, voter, reference, total;  // [vectors, WIDTH]
  Buffer<float> sums;    // [vectors, entries, WIDTH], and WIDTH entries behind
  Buffer<float> shares, priorities;  // [entries]
  std::vector<int32_t> kept;     // what a query block reads of the entries, by their places
  std::vector<uint64_t> order;   // what sorts the chosen ones of them by rank, those of equal rank by place
  std::vector<uint8_t> is_valid;          // whether all queries that vote for a query block are finite
};

// Where products are added up.
template <typename Word>
struct InRegisters {
  using Element = Word;
  template <int VECTORS>
  using Products = RegisterProducts<Word, VECTORS>;
  struct Sizes {
    explicit Sizes(int64_t) {}
  };
  static constexpr int QUERY_ZERO = 128;  // what is added to the bytes of queries
  static constexpr int MOST_WORDS = 1;    // longer rows of words are multiples of it
};

#if HAS_TILES
struct InTiles {
  using Element = int32_t;
  template <int VECTORS>
  using Products = TileProducts<VECTORS>;
  using Sizes = TileSizes;
  static constexpr int QUERY_ZERO = 0;
  static constexpr int MOST_WORDS = TileSizes::SIDE;
};
#endif

template <typename Site>
class Selection {
 public:
  using Word = typename Site::Element;
  template <int VECTORS>
  using Products = typename Site::template Products<VECTORS>;
  static constexpr bool IS_BYTES = std::is_same<Word, int32_t>::value;

  explicit Selection(const SelectArguments& arguments)
      : call(arguments),
        depth(words_per_row(call)),
        row_vectors((int)((call.query_block_size + WIDTH - 1) / WIDTH)),
        unit_rows(call.places != nullptr ? 1 : std::max(1, MAX_VECTORS / row_vectors)) {}

  void run() {
    std::vector<Entries> entries;
    for (int64_t batch = 0; batch < call.batch; batch++) entries.emplace_back(call, batch);
    const int64_t units = (call.num_rows + unit_rows - 1) / unit_rows, shared = call.heads / call.key_heads;
    // As many key heads at a time as there are threads bounds the memory of their keys.
    const int64_t num_key_heads = call.batch * call.key_heads, group = std::min(num_key_heads, call.num_threads);
    for (int64_t first = 0; first < num_key_heads; first += group) {
      const int64_t members = std::min(group, num_key_heads - first);
      std::vector<std::unique_ptr<Keys<Word>>> keys(members);
      parallel_tasks(members, call.num_threads, [&](int64_t task) {
        const int64_t batch = (first + task) / call.key_heads, key_head = (first + task) % call.key_heads;
        const std::vector<uint8_t> is_wanted = wanted_entries(entries[batch], batch, key_head, (int)units);
        keys[task] = std::make_unique<Keys<Word>>(call, entries[batch], is_wanted, batch, key_head, depth);
      });
      parallel_tasks<Unit<Word>>(members * shared * units, call.num_threads, [&](int64_t task, Unit<Word>& unit) {
        const int64_t member = task / (shared * units), key_head = (first + member) % call.key_heads;
        const int64_t batch = (first + member) / call.key_heads, head = key_head * shared + task / units % shared;
        choose(entries[batch], *keys[member], batch, head, (int)(task % units * unit_rows), unit);
      });
    }
  }

 private:
  const SelectArguments& call;
  const int64_t depth;
  const int row_vectors, unit_rows;

  static int64_t words_per_row(const SelectArguments& call) {
    const int64_t words = IS_BYTES ? (call.head_dim + 3) / 4 : call.head_dim;
    return words > Site::MOST_WORDS ? round_up((int)words, Site::MOST_WORDS) : words;
  }

  // What any query block meets. Many together meet nearly everything; in cached decoding there is one.
  std::vector<uint8_t> wanted_entries(const Entries& entries, int64_t batch, int64_t key_head, int units) const {
    const std::vector<uint8_t> every(entries.count(), 1);
    if (call.places == nullptr || units > FEW_UNITS) return every;
    std::vector<uint8_t> is_wanted(entries.count());
    Unit<Word> unit;
    const int64_t shared = call.heads / call.key_heads;
    for (int64_t head = key_head * shared; head < (key_head + 1) * shared; head++)
      for (int row = 0; row < call.num_rows; row++) {
        list_entries(entries, every, batch, head, row, 1, unit);
        for (const int32_t entry : unit.entries) is_wanted[entry] = 1;
      }
    return is_wanted;
  }

  void choose(const Entries& entries, const Keys<Word>& keys, int64_t batch, int64_t head, int first_row,
              Unit<Word>& unit) const {
    const int rows = std::min(unit_rows, (int)call.num_rows - first_row);
    list_entries(entries, keys.is_open, batch, head, first_row, rows, unit);
    if (unit.entries.empty()) return;
    load_queries(batch, head, first_row, rows, unit);
    const typename Site::Sizes sizes(depth);
    const int vectors = rows * row_vectors;
    int vector = 0;
    while (vector < vectors) {
      const int count = group_size(vectors - vector);
      if (count == 4)
        scan<std::min(4, MAX_VECTORS)>(entries, keys, vector, unit);
      else if (count == 2)
        scan<2>(entries, keys, vector, unit);
      else
        scan<1>(entries, keys, vector, unit);
      vector += count;
    }
    for (int row = 0; row < rows; row++)
      if (unit.is_valid[row]) finish_row(entries, batch, head, first_row, row, unit);
  }

  static int group_size(int vectors) { return MAX_VECTORS == 4 && vectors >= 4 ? 4 : vectors >= 2 ? 2 : 1; }

  // The candidates and global tokens that any of the query blocks may see, ascending. With places it is one query block.
  void list_entries(const Entries& entries, const std::vector<uint8_t>& is_open, int64_t batch, int64_t head,
                    int first_row, int rows, Unit<Word>& unit) const {
    const int64_t last_row = call.first_row + first_row + rows - 1;
    const auto add = [&](int64_t first, int64_t last) {
      for (int64_t entry = first; entry < last; entry++)
        if (is_open[entry] && entries.visible_from[entry] <= last_row) unit.entries.push_back((int32_t)entry);
    };
    const int64_t number = (batch * call.heads + head) * call.num_rows + first_row;
    unit.entries.clear(), unit.places.clear();
    unit.has_places = call.places != nullptr && call.place_counts[number] >= 0;
    if (!unit.has_places) {
      add(0, entries.num_blocks);
    } else {
      int64_t near, near_end;
      covered(entries, last_row, near, near_end);
      near_end = std::min<int64_t>(near_end + 1, entries.num_blocks);
      // Under causality no place that the query block begins in was a choice.
      if (call.is_causal)
        near = std::min(near, last_row * call.query_block_size / (call.block_size * call.blocks_per_place) *
                                  call.blocks_per_place);
      near = std::min(near, near_end);
      for (int64_t i = number * call.max_places; i < number * call.max_places + call.place_counts[number]; i++)
        unit.places.emplace_back(call.places[i], call.place_weights == nullptr ? 1.0f : call.place_weights[i]);
      if (!std::is_sorted(unit.places.begin(), unit.places.end())) std::sort(unit.places.begin(), unit.places.end());
      bool has_near = false;
      for (const auto& [place, weight] : unit.places) {
        const int64_t first = place * call.blocks_per_place;
        const int64_t last = std::min<int64_t>(first + call.blocks_per_place, entries.num_blocks);
        add(first, std::min(last, near));
        if (last > near && !has_near) add(near, near_end);
        has_near |= last > near;
        add(std::max(first, near_end), last);
      }
      if (!has_near) add(near, near_end);
    }
    unit.num_blocks = (int64_t)unit.entries.size();
    add(entries.num_blocks, entries.count());
  }

  // The queries that vote: those of the query block, under causality those of the one before.
  void load_queries(int64_t batch, int64_t head, int first_row, int rows, Unit<Word>& unit) const {
    const int vectors = rows * row_vectors;
    unit.query.reserve(vectors * depth * WIDTH);
    unit.scale.reserve(vectors * WIDTH), unit.voter.reserve(vectors * WIDTH), unit.reference.reserve(vectors * WIDTH);
    unit.total.reserve(vectors * WIDTH);
    unit.shares.reserve(unit.entries.size() + WIDTH);
    if (call.sampling_seed >= 0) unit.priorities.reserve(unit.entries.size() + WIDTH);
    const int64_t num_sums = ((int64_t)vectors * unit.entries.size() + WIDTH) * WIDTH;
    unit.sums.reserve(num_sums);
    unit.row_of.assign(vectors, 0);
    unit.is_valid.assign(rows, true);
    std::fill_n(unit.query.data(), vectors * depth * WIDTH, Word());
    std::fill_n(unit.scale.data(), vectors * WIDTH, 0.0f);
    std::fill_n(unit.voter.data(), vectors * WIDTH, 0.0f);
    std::fill_n(unit.reference.data(), vectors * WIDTH, 0.0f);
    RowPacker packer(call);
    for (int vector = 0, in_group = 0, group = group_size(vectors); vector < vectors; vector++, in_group++) {
      if (in_group == group) in_group = 0, group = group_size(vectors - vector);
      const int row = vector / row_vectors;
      unit.row_of[vector] = (int)call.first_row + first_row + row;
      Word* words = unit.query.data() + (vector - in_group) * depth * WIDTH + in_group * WIDTH;
      for (int lane = 0; lane < WIDTH; lane++) {
        const int64_t in_block = (int64_t)(vector % row_vectors) * WIDTH + lane;
        const int64_t index = (first_row + row - call.is_causal) * call.query_block_size + in_block;
        const int64_t token = call.length - call.query_length + index;
        if (in_block >= call.query_block_size || index < 0 || index >= call.query_length) continue;
        if (call.is_voter != nullptr && !call.is_voter[batch * call.length + token]) continue;
        if (!packer.load(call.query, batch, head, index)) unit.is_valid[row] = false;
        const float factor = (float)call.scale * LOG2_E;
        if constexpr (IS_BYTES) {
          int32_t sum;
          unit.scale.data()[vector * WIDTH + lane] =
              packer.store_bytes(words + lane, (int64_t)group * WIDTH, 127, Site::QUERY_ZERO, sum) * factor;
        } else {
          for (int64_t i = 0; i < depth; i++) words[i * group * WIDTH + lane] = packer.row.data()[i] * factor;
        }
        unit.voter.data()[vector * WIDTH + lane] = 1.0f;
      }
    }
  }

  // Sums of a group of vectors over several entries of one key each, from entry i on; how many there were, 0 if these are
  // no such entries in a row, or a query needs another reference.
  template <int VECTORS>
  ALWAYS_INLINE int meet_single_keys(const Entries& entries, const Keys<Word>& keys, int vector, int64_t i,
                                     Products<VECTORS>& products, Unit<Word>& unit) const {
    const int64_t num_entries = (int64_t)unit.entries.size(), stride = num_entries * WIDTH;
    const int entry = unit.entries[i], first = entries.first[entry];
    int count = (int)std::min<int64_t>(Products<VECTORS>::KEYS, num_entries - i);
    while (count > 0 && (unit.entries[i + count - 1] != entry + count - 1 || entries.first[entry + count] != first + count))
      count--;
    if (count <= 1) return 0;
    Floats reference[VECTORS], largest = {};
    for (int v = 0; v < VECTORS; v++) reference[v] = load<Floats>(unit.reference.data() + (vector + v) * WIDTH);
    float* sums = unit.sums.data() + vector * stride + i * WIDTH;
    products.meet(first, first + count, first_key(entries, unit, i + count), [&](int64_t key, int v, Floats score) {
      const Floats mass = power(score - reference[v], Word()) * keys.count[key];
      largest = maximum(largest, mass);
      store(sums + v * stride + (key - first) * WIDTH, mass);
    });
    return any_above(largest, SUM_LIMIT) ? 0 : count;
  }

  // The first key of entry i; any other where there is no such entry.
  static int64_t first_key(const Entries& entries, const Unit<Word>& unit, int64_t i) {
    return i < (int64_t)unit.entries.size() ? entries.first[unit.entries[i]] : 0;
  }

  // Sums of a group of vectors over all entries. A function of its own, as `multiply` of products.h.
  template <int VECTORS>
  __attribute__((noinline)) void scan(const Entries& entries, const Keys<Word>& keys, int vector,
                                      Unit<Word>& unit) const {
    const int64_t num_entries = (int64_t)unit.entries.size(), stride = num_entries * WIDTH;
    Products<VECTORS> products(keys, unit.query.data() + vector * depth * WIDTH, unit.scale.data() + vector * WIDTH);
    float* sums = unit.sums.data() + vector * stride;
    raise<VECTORS>(entries, vector, 0, products, unit);
    for (int64_t i = 0; i < num_entries; i++) {
      const int entry = unit.entries[i];
      const int first = entries.first[entry], last = entries.first[entry + 1];
      if (last == first + 1)
        if (const int count = meet_single_keys<VECTORS>(entries, keys, vector, i, products, unit)) {
          i += count - 1;
          continue;
        }
      for (bool is_again = false;; is_again = true) {
        Floats reference[VECTORS], sum[VECTORS] = {};
        for (int v = 0; v < VECTORS; v++) reference[v] = load<Floats>(unit.reference.data() + (vector + v) * WIDTH);
        products.meet(first, last, first_key(entries, unit, i + 1), [&](int64_t key, int v, Floats score) {
          const Floats mass = power(score - reference[v], Word());
          sum[v] += mass * keys.count[key];
        });
        Floats largest = sum[0];
        for (int v = 1; v < VECTORS; v++) largest = maximum(largest, sum[v]);
        for (int v = 0; v < VECTORS; v++) {
          // Scores that are huge differ from their rounded maximum by more than a little.
          if (is_again) sum[v] = sum[v] > POWER_SUM ? broadcast(POWER_SUM) : sum[v];
          store(sums + v * stride + i * WIDTH, sum[v]);
        }
        if (is_again || !any_above(largest, SUM_LIMIT)) break;
        raise<VECTORS>(entries, vector, i, products, unit);
      }
    }
  }

  // Lets queries whose sum of entry i is too large, and all of them at the first, refer to their largest score of it.
  // A whole number, so that what was summed up before is scaled without rounding. It depends on no other query, nor on
  // keys that the query block may not see.
  template <int VECTORS>
  __attribute__((noinline)) void raise(const Entries& entries, int vector, int64_t i, Products<VECTORS>& products,
                                       Unit<Word>& unit) const {
    const int entry = unit.entries[i];
    const int64_t num_entries = (int64_t)unit.entries.size();
    Floats maxima[VECTORS];
    for (Floats& maximum : maxima) maximum = broadcast(-INFINITE);
    const int64_t first = entries.first[entry];
    products.meet(first, entries.first[entry + 1], first,
                  [&](int64_t, int v, Floats score) { maxima[v] = maximum(score, maxima[v]); });
    for (int v = 0; v < VECTORS; v++) {
      if (entries.visible_from[entry] > unit.row_of[vector + v]) continue;
      for (int lane = 0; lane < WIDTH; lane++) {
        const int64_t row = (int64_t)(vector + v) * num_entries;
        float* sums = unit.sums.data() + row * WIDTH + lane;
        float& reference = unit.reference.data()[(vector + v) * WIDTH + lane];
        if (i > 0 && !(sums[i * WIDTH] > SUM_LIMIT)) continue;
        const float raised = std::ceil(std::min(maxima[v][lane], std::numeric_limits<float>::max()));
        if (i > 0) {
          const float factor = std::exp2(reference - raised);
          for (int64_t before = 0; before < i; before++) sums[before * WIDTH] *= factor;
        }
        reference = raised;
      }
    }
  }

  // The masses of a query block, and its choice.
  void finish_row(const Entries& entries, int64_t batch, int64_t head, int first_row, int row, Unit<Word>& unit) const {
    const int64_t number = call.first_row + first_row + row;
    const int64_t result = (batch * call.heads + head) * call.num_rows + first_row + row;
    const int first_vector = row * row_vectors;
    // Of blocks and of global tokens the query block sees the first ones.
    const auto is_hidden = [&](int64_t value, int32_t entry) { return value < entries.visible_from[entry]; };
    const auto begin = unit.entries.begin(), globals = begin + unit.num_blocks;
    const int64_t blocks = std::upper_bound(begin, globals, number, is_hidden) - begin;
    const int64_t end = std::upper_bound(globals, unit.entries.end(), number, is_hidden) - begin;
    if (!weigh_voters(batch, head, first_row, row, blocks, end, unit)) return;
    store_means(unit.sums.data(), first_vector, 0, blocks, unit, unit.shares.data());
    store_means(unit.sums.data(), first_vector, unit.num_blocks, end, unit, unit.shares.data());
    float* shares = unit.shares.data();
    if (call.share != nullptr)
      for (int64_t i = 0; i < blocks; i++)
        call.share[result * ((call.length + call.block_size - 1) / call.block_size) + unit.entries[i]] = shares[i];

    unit.kept.clear();
    const auto keep = [&](int64_t i) { unit.kept.push_back((int32_t)i); };
    const auto cover = [&](int64_t i) {
      call.covered[result] += shares[i];
      shares[i] = 0.0f;
      keep(i);
    };
    int64_t first_covered, last_covered;
    covered(entries, number, first_covered, last_covered);
    const auto last = begin + blocks;
    for (auto place = std::lower_bound(begin, last, first_covered); place < last && *place <= last_covered; place++)
      cover(place - begin);
    const int32_t* shared = call.shared_blocks + (batch * call.heads + head) * call.num_shared;
    for (int64_t i = 0; i < call.num_shared; i++) {
      const auto place = std::lower_bound(begin, last, shared[i]);
      if (place < last && *place == shared[i] && (*place < first_covered || *place > last_covered)) cover(place - begin);
    }
    for (int64_t i = unit.num_blocks; i < end; i++) cover(i);

    if (call.place_weights != nullptr) weigh_places(blocks, unit);
    const int64_t num_covered = (int64_t)unit.kept.size();
    float* const ranks = call.sampling_seed < 0 ? shares : priorities(head, number, blocks, unit);
    const int32_t least = least_chosen(ranks, blocks);
    unit.kept.resize(num_covered + blocks + WIDTH);
    int32_t* next = unit.kept.data() + num_covered;
    int32_t* const limit = next + call.num_selected;
    for (int64_t i = 0; i < blocks; i += WIDTH) next = append_lanes(next, load<Ints>(ranks + i) > broadcast(least), i);
    // Of those that are as good as the last one the first ones.
    for (int64_t i = 0; i < blocks && next < limit; i++)
      if (bits_of(ranks[i]) == least) *next++ = (int32_t)i;
    unit.kept.resize(next - unit.kept.data());
    const auto chosen = unit.kept.begin() + num_covered;
    // A finer stage asks for what is dropped, and not for the order.
    if (call.log_dropped == nullptr) {
      unit.order.clear();
      for (auto place = chosen; place < unit.kept.end(); place++)
        unit.order.push_back((uint64_t)~(uint32_t)bits_of(ranks[*place]) << 32 | (uint32_t)*place);
      std::sort(unit.order.begin(), unit.order.end());
      std::copy(unit.order.begin(), unit.order.end(), chosen);  // the lower half of each
    }
    const int64_t count = call.counts[result] = (int32_t)(unit.kept.end() - chosen);
    for (int64_t place = 0; place < count; place++) {
      call.key_blocks[result * call.num_selected + place] = unit.entries[chosen[place]];
      call.mass[result * call.num_selected + place] = shares[chosen[place]];
    }
    if (call.log_dropped != nullptr) store_dropped(batch, head, first_row, row, unit);
    if (call.sampling_seed < 0) return;
    for (auto place = chosen; place < unit.kept.end(); place++) ranks[*place] = 0.0f;
    call.threshold[result] = *std::max_element(ranks, ranks + blocks + 1);  // the last one is 0
  }

  // Multiplies the masses of blocks by the weights of the places that they are in.
  void weigh_places(int64_t blocks, Unit<Word>& unit) const {
    auto place = unit.places.begin();
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t number = unit.entries[i] / call.blocks_per_place;
      while (place < unit.places.end() && place->first < number) place++;
      if (place < unit.places.end() && place->first == number) unit.shares.data()[i] *= place->second;
    }
  }

  // Masses divided by chances, see selection/sampling.py.
  float* priorities(int64_t head, int64_t number, int64_t blocks, Unit<Word>& unit) const {
    const uint32_t word = mix(mix((uint32_t)head ^ mix((uint32_t)call.sampling_seed)) ^ (uint32_t)number);
    for (int64_t i = 0; i < blocks; i++) {
      const uint32_t drawn = (mix(word ^ mix((uint32_t)unit.entries[i])) >> 8) + 1;
      unit.priorities.data()[i] = unit.shares.data()[i] / ((float)drawn * 0x1p-24f);
    }
    unit.priorities.data()[blocks] = 0.0f;
    return unit.priorities.data();
  }

  static int32_t bits_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
  }

  // The bits of the least share that is chosen; 1, those of the least positive float, where all positive ones are.
  // Sets to 0 what is not positive, and what lies behind the last share up to the end of its vector.
  int32_t least_chosen(float* shares, int64_t blocks) const {
    int32_t least = 0;
    for (int64_t i = blocks; i % WIDTH != 0; i++) shares[i] = 0.0f;
    for (int64_t i = 0; i < blocks; i += WIDTH) {
      const Floats share = load<Floats>(shares + i);
      store(shares + i, zero_unless(share > 0.0f, share));  // not NaN
    }
    for (int bit = 30; bit >= 0 && blocks > call.num_selected; bit--) {
      const Ints raised = broadcast((least | 1 << bit) - 1);
      Ints below = {};
      for (int64_t i = 0; i < blocks; i += WIDTH) below += load<Ints>(shares + i) > raised;
      const int32_t count = -horizontal_sum(below);
      if (count >= call.num_selected) least |= 1 << bit;
      if (count == call.num_selected) break;
    }
    return std::max(least, 1);
  }

  // Turns voters into what one unit of their sums adds to the mean; false if nobody votes.
  bool weigh_voters(int64_t batch, int64_t head, int first_row, int row, int64_t blocks, int64_t end,
                    Unit<Word>& unit) const {
    const int first_vector = row * row_vectors, last_vector = first_vector + row_vectors;
    const int64_t stride = (int64_t)unit.entries.size() * WIDTH;
    float num_voters = 0.0f;
    for (int i = first_vector * WIDTH; i < last_vector * WIDTH; i++) num_voters += unit.voter.data()[i];
    if (num_voters == 0.0f) return false;
    for (int vector = first_vector; vector < last_vector; vector++) {
      const float* sums = unit.sums.data() + vector * stride;
      Floats total = rest(batch, head, first_row, row, vector, unit);
      Floats parts[4] = {};  // additions that need not wait for each other
      for (int64_t i = 0; i + 4 <= blocks; i += 4)
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) parts[part] += load<Floats>(sums + (i + part) * WIDTH);
      for (int64_t i = blocks / 4 * 4; i < blocks; i++) total += load<Floats>(sums + i * WIDTH);
      for (int64_t i = unit.num_blocks; i < end; i++) total += load<Floats>(sums + i * WIDTH);
      total += (parts[0] + parts[1]) + (parts[2] + parts[3]);
      total = maximum(total, broadcast(std::numeric_limits<float>::min()));
      store(unit.total.data() + vector * WIDTH, total);
      float* voter = unit.voter.data() + vector * WIDTH;
      store(voter, zero_unless(load<Floats>(voter) > 0.0f, load<Floats>(voter) / (total * num_voters)));
    }
    return true;
  }

  // The means over the queries of a query block of their sums of entries.
  void store_means(const float* sums, int first_vector, int64_t first, int64_t end, const Unit<Word>& unit,
                   float* means) const {
    const int64_t stride = (int64_t)unit.entries.size() * WIDTH;
    for (int64_t i = first; i < end; i += WIDTH) {
      // What lies behind the last entry is read, as there is room for it, and dropped.
      Floats values[WIDTH] = {};
      for (int vector = first_vector; vector < first_vector + row_vectors; vector++) {
        const Floats voter = load<Floats>(unit.voter.data() + vector * WIDTH);
        const float* of_vector = sums + vector * stride + i * WIDTH;
#pragma GCC unroll 16
        for (int entry = 0; entry < WIDTH; entry++) values[entry] += load<Floats>(of_vector + entry * WIDTH) * voter;
      }
      float lanes[WIDTH];
      store(lanes, sums_of_lanes(values));
      std::copy_n(lanes, std::min<int64_t>(WIDTH, end - i), means + i);
    }
  }

  // The logarithms of what queries find, but not in the entries that are kept.
  void store_dropped(int64_t batch, int64_t head, int first_row, int row, const Unit<Word>& unit) const {
    const int64_t first = (first_row + row - call.is_causal) * call.query_block_size;
    float* log_dropped = call.log_dropped + (batch * call.heads + head) * call.query_length;
    for (int in_row = 0; in_row < row_vectors; in_row++) {
      const int64_t vector = (int64_t)row * row_vectors + in_row;
      const float* sums = unit.sums.data() + vector * (int64_t)unit.entries.size() * WIDTH;
      Floats kept = {};
      for (const int32_t i : unit.kept) kept += load<Floats>(sums + (int64_t)i * WIDTH);
      const Floats dropped = load<Floats>(unit.total.data() + vector * WIDTH) - kept;
      for (int lane = 0; lane < WIDTH; lane++)
        if (unit.voter.data()[vector * WIDTH + lane] > 0.0f && dropped[lane] > 0.0f)
          log_dropped[first + in_row * WIDTH + lane] =
              std::log(dropped[lane]) + unit.reference.data()[vector * WIDTH + lane] * LN_2;
    }
  }

  // What the queries of a vector find in no place, relative to their references.
  Floats rest(int64_t batch, int64_t head, int first_row, int row, int vector, const Unit<Word>& unit) const {
    float values[WIDTH] = {};
    if (unit.has_places)
      for (int lane = 0; lane < WIDTH; lane++) {
        if (unit.voter.data()[vector * WIDTH + lane] == 0.0f) continue;
        const int64_t index = (first_row + row - call.is_causal) * call.query_block_size +
                              (int64_t)(vector % row_vectors) * WIDTH + lane;
        const float log_rest = call.log_rest[(batch * call.heads + head) * call.query_length + index];
        const float power = log_rest * LOG2_E - unit.reference.data()[vector * WIDTH + lane];
        values[lane] = std::exp2(std::min(power, POWER_LIMIT));
      }
    return load<Floats>(values);
  }

  // The first and the last block that the window covers for all queries of a query block.
  void covered(const Entries& entries, int64_t row, int64_t& first, int64_t& last) const {
    const int64_t size = call.block_size, start = row * call.query_block_size;
    int64_t end = start + call.query_block_size - 1;
    if (call.is_causal) {
      last = start / size - 1;
    } else {
      end = std::min<int64_t>(end, entries.end - 1);
      const int64_t reach = start + call.right;
      last = reach >= entries.end - 1 ? entries.num_blocks - 1 : (reach + 1) / size - 1;
    }
    first = (std::max<int64_t>(end - call.left, 0) + size - 1) / size;
  }
};

bool places_are_valid(const SelectArguments& call) {
  if (call.places == nullptr) return true;
  const int64_t place_size = call.block_size * call.blocks_per_place;
  for (int64_t row = 0; row < call.batch * call.heads * call.num_rows; row++) {
    if (call.place_counts[row] > call.max_places) return false;
    for (int i = 0; i < call.place_counts[row]; i++) {
      const int32_t place = call.places[row * call.max_places + i];
      if (place < 0 || place * place_size >= call.length) return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace adaptive

extern "C" int32_t adaptive_select(const adaptive::SelectArguments* arguments) {
  if (!adaptive::places_are_valid(*arguments)) return adaptive::BAD_LISTS;
  try {
    if (!arguments->uses_bytes)
      adaptive::Selection<adaptive::InRegisters<float>>(*arguments).run();
#if HAS_TILES
    else if (adaptive::may_use_tiles())
      adaptive::Selection<adaptive::InTiles>(*arguments).run();
#endif
    else
      adaptive::Selection<adaptive::InRegisters<int32_t>>(*arguments).run();
  } catch (const std::bad_alloc&) {
    return adaptive::OUT_OF_MEMORY;
  }
  return adaptive::DONE;
}

extern "C" int64_t adaptive_select_arguments_size() { return sizeof(adaptive::SelectArguments); }

// The largest byte of a key, of those of a query 127; 0 where dot products of bytes are slower than those of floats.
extern "C" int32_t adaptive_select_has_bytes() { return adaptive::HAS_DOT_OF_BYTES ? adaptive::SIGNED_LIMIT : 0; }
