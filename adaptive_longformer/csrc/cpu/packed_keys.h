// What the exact stage of the selection is asked, and the keys that its queries meet, packed by what they belong to.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "bytes.h"
#include "problem.h"

namespace adaptive {

// Field by field the `_SelectArguments` of selection/compiled_select.py. Pointers may be null where a comment says so.
struct SelectArguments {
  int64_t batch, heads, key_heads, query_length, length, head_dim;
  int64_t element_type;
  int64_t uses_bytes;  // dot products of bytes with a scale per token instead of floats
  // In tokens. A key stands for `tokens_per_key` of them, which divides block_size; there are num_keys, in which those
  // of global tokens may follow those of the sequence.
  int64_t query_block_size, block_size, tokens_per_key, num_keys;
  int64_t num_selected;
  int64_t num_rows, first_row;  // query blocks of the result, and those of the sequence before them
  int64_t is_causal, left, right;
  double scale;
  int64_t num_threads;

  RowTensor query, key;
  const uint8_t* is_voter;  // [batch, length]: the tokens that vote; null: all
  const float* counts_of_keys;  // [batch, num_keys], what a key counts; 0: it is in no block; null: 1
  const int64_t* ends;  // [batch], one more than the last token that is not padding
  // [batch, num_global], ascending, filled up with `length`, and the key of each.
  const int64_t* global_positions;
  const int64_t* global_keys;
  int64_t num_global;

  // Places, of `blocks_per_place` blocks each, whose blocks a query block has as candidates beside those near it, in any
  // order: [batch, heads, num_rows, max_places] and [batch, heads, num_rows]. A count below 0, or null: all blocks are
  // candidates, and nothing is in no place.
  const int32_t* places;
  const int32_t* place_counts;
  int64_t max_places, blocks_per_place;
  const float* log_rest;         // [batch, heads, query_length], logarithm of what is in no place; null without places
  const float* place_weights;    // as places, what the mass of their blocks counts; null: 1
  const int32_t* shared_blocks;  // [batch, heads, num_shared], read by every query block; -1: none
  int64_t num_shared;
  int64_t sampling_seed;  // below 0: the largest masses are chosen, and no threshold is written

  int32_t* key_blocks;  // [batch, heads, num_rows, num_selected], zeroed by the caller
  int32_t* counts;      // [batch, heads, num_rows], zeroed
  float* mass;          // as key_blocks, zeroed
  float* covered;       // as counts, zeroed
  float* share;         // [batch, heads, num_rows, blocks], zeroed; null: not wanted
  // [batch, heads, query_length], the logarithm of what a query leaves neither chosen nor covered, of queries that vote;
  // null: not wanted.
  float* log_dropped;
  float* threshold;  // as counts, zeroed
};

// The keys of one batch row by what they belong to: the members of block 0, 1, ..., then those of global tokens in groups
// that the same query blocks may see.
struct Entries {
  int end, num_blocks;
  std::vector<int32_t> keys;          // of entry 0, 1, ...
  std::vector<int32_t> first;         // where an entry begins in `keys`; one more than there are entries
  std::vector<int32_t> visible_from;  // the first query block that may see an entry

  int count() const { return (int)visible_from.size(); }

  Entries(const SelectArguments& call, int64_t batch)
      : end((int)(call.is_causal ? call.length : call.ends[batch])),
        num_blocks((int)((end + call.block_size - 1) / call.block_size)) {
    const float* counts = call.counts_of_keys == nullptr ? nullptr : call.counts_of_keys + batch * call.num_keys;
    const int64_t num_keys = (end + call.tokens_per_key - 1) / call.tokens_per_key;
    const int64_t per_block = call.block_size / call.tokens_per_key;
    for (int64_t block = 0; block < num_blocks; block++) {
      begin(call.is_causal ? ((block + 1) * call.block_size + call.query_block_size - 1) / call.query_block_size : 0);
      for (int64_t key = block * per_block; key < std::min((block + 1) * per_block, num_keys); key++)
        if (counts == nullptr || counts[key] > 0.0f) keys.push_back((int32_t)key);
    }
    int64_t group = -1;
    for (int64_t i = batch * call.num_global; i < (batch + 1) * call.num_global; i++) {
      if (call.global_positions[i] >= call.length) continue;
      const int64_t from = call.is_causal ? call.global_positions[i] / call.query_block_size + 1 : 0;
      if (from != group) begin(group = from);
      keys.push_back((int32_t)call.global_keys[i]);
    }
    first.push_back((int32_t)keys.size());
  }

 private:
  void begin(int64_t from) {
    first.push_back((int32_t)keys.size());
    visible_from.push_back((int32_t)from);
  }
};

// A row of a tensor as four-byte words: floats, or bytes of a scale of their own.
struct RowPacker {
  const SelectArguments& call;
  const int64_t width;
  Buffer<float> row;  // [width], zeros at the end
  Buffer<int8_t> bytes;

  explicit RowPacker(const SelectArguments& arguments)
      : call(arguments), width(round_up((int)call.head_dim, WIDTH)), row(width), bytes(width) {
    std::fill_n(row.data(), width, 0.0f);
  }

  // Loads a row; false if it holds NaN or an infinity.
  bool load(const RowTensor& tensor, int64_t batch, int64_t head, int64_t position) {
    load_row(row.data(), tensor, row_offset(tensor, batch, head, position), (int)call.head_dim, call.element_type);
    Floats nothing = {};  // becomes NaN at the first element that is not finite
    for (int64_t i = 0; i < width; i += WIDTH) nothing += adaptive::load<Floats>(row.data() + i) * 0.0f;
    return horizontal_sum(nothing) == 0.0f;
  }

  // Stores the row as bytes of at most `limit`, with `zero` added, words `stride` apart. Returns their scale and sets the
  // sum of the bytes without `zero`.
  float store_bytes(int32_t* words, int64_t stride, int limit, int zero, int32_t& sum) {
    Floats largest = {};
    for (int64_t i = 0; i < width; i += WIDTH) {
      const Floats element = adaptive::load<Floats>(row.data() + i);
      largest = maximum(maximum(element, -element), largest);
    }
    const float size = horizontal_maximum(largest);
    const float factor = size > 0.0f ? (float)limit / size : 0.0f;
    Ints sums = {};
    for (int64_t i = 0; i < width; i += WIDTH) {
      // Adding 1.5 * 2**23 rounds to a whole number and leaves it in the low bits.
      const Floats rounded = adaptive::load<Floats>(row.data() + i) * factor + 12582912.0f;
      const Ints whole = (Ints)rounded - 0x4B400000;
      sums += whole;
      store(bytes.data() + i, __builtin_convertvector(whole + zero, Bytes));
    }
    sum = 0;
    for (int lane = 0; lane < WIDTH; lane++) sum += sums[lane];
    for (int64_t i = 0; i < call.head_dim; i += 4) std::memcpy(&words[i / 4 * stride], bytes.data() + i, 4);
    return size / (float)limit;
  }
};

// Keys behind the last one that may be read; they count nowhere.
constexpr int EXTRA_KEYS = 16;

// The keys of one key head, entry by entry: words [keys, depth] and what belongs to each.
template <typename Word>
struct Keys {
  int64_t depth;
  std::vector<Word> words;
  std::vector<float> scale;
  std::vector<int32_t> start;  // what a sum of products begins with where the queries' bytes are 128 too large
  std::vector<float> count;    // of tokens that a key stands for
  std::vector<uint8_t> is_open;  // whether an entry is wanted and has keys, and only finite ones

  Keys(const SelectArguments& call, const Entries& entries, const std::vector<uint8_t>& is_wanted, int64_t batch,
       int64_t key_head, int64_t words_per_row)
      : depth(words_per_row), count(entries.keys.size(), 1.0f), is_open(entries.count()) {
    constexpr bool IS_BYTES = std::is_same<Word, int32_t>::value;
    words.resize((count.size() + EXTRA_KEYS) * depth);
    if (IS_BYTES) scale.resize(count.size()), start.resize(count.size());
    RowPacker packer(call);
    for (int entry = 0; entry < entries.count(); entry++) {
      is_open[entry] = is_wanted[entry] && entries.first[entry] < entries.first[entry + 1];
      if (!is_open[entry]) continue;
      for (int index = entries.first[entry]; index < entries.first[entry + 1]; index++) {
        const int32_t key = entries.keys[index];
        if (!packer.load(call.key, batch, key_head, key)) is_open[entry] = false;
        if constexpr (IS_BYTES) {
          int32_t sum;
          scale[index] = packer.store_bytes(&words[index * depth], 1, SIGNED_LIMIT, 0, sum);
          start[index] = -128 * sum;
        } else {
          std::copy_n(packer.row.data(), depth, &words[index * depth]);
        }
        if (entry < entries.num_blocks && call.counts_of_keys != nullptr)
          count[index] = call.counts_of_keys[batch * call.num_keys + key];
      }
    }
  }
};

}  // namespace adaptive
