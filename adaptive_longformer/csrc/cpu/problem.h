// What the forward and the backward pass share: packed keys, the entries of a list, the mask of a tile.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <limits>
#include <new>

#include "arguments.h"
#include "rows.h"
#include "vectors.h"

namespace adaptive {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.693147180559945309f;
// About as many scores as a tile has, unless one entry has more: 16 KiB, half of a first-level cache.
constexpr int TILE_SCORES = 4096;

// Uninitialised memory for vectors.
template <typename Element>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { reserve(count); }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Makes room for count elements; what was in it is lost when it grows.
  void reserve(int64_t count) {
    if (count <= capacity_) return;
    std::free(data_);
    capacity_ = 0;
    data_ = (Element*)std::aligned_alloc(64, (count * sizeof(Element) + 63) / 64 * 64);
    if (data_ == nullptr) throw std::bad_alloc();
    capacity_ = count;
  }
  Element* data() const { return data_; }

 private:
  Element* data_ = nullptr;
  int64_t capacity_ = 0;
};

// One query block of one head.
struct QueryBlock {
  int64_t batch, head, index;
  int start, rows;
};

// What one entry of a list asks for.
struct Entry {
  int block;
  bool is_skipped;
  // Whether the mask below hides anything, and whether the adaptive span weakens anything.
  bool is_masked, has_span;
  // Its place in the list; -1 for packed global keys and entries of the window, which have no bias.
  int place;
  float bias;
  // Offsets key - query that are visible: from low to high, or all others with invert = -1; never above limit.
  int32_t low, high, invert, limit;
};

constexpr int MAX_TILE_ENTRIES = 32;

// Entries of a list that are computed together: their keys are the rows of one tile of scores, and its columns, the
// lanes of its vectors, are the queries. So blocks of any number of keys fill all lanes without being copied together.
struct Tile {
  Entry entries[MAX_TILE_ENTRIES];
  int count;
};

// Whether all counts and ids of key blocks are in range, so that nothing outside the tensors is read.
inline bool lists_are_valid(const Arguments& arguments) {
  const int64_t num_key_blocks = (arguments.length + arguments.key_block_size - 1) / arguments.key_block_size;
  const int64_t batches = arguments.list_batch_stride == 0 ? 1 : arguments.batch;
  const int64_t heads = arguments.list_head_stride == 0 ? 1 : arguments.heads;
  for (int64_t row = 0; row < batches * heads * arguments.num_query_blocks; row++) {
    if (arguments.counts[row] < 0 || arguments.counts[row] > arguments.max_entries) return false;
    for (int entry = 0; entry < arguments.counts[row]; entry++) {
      const int32_t block = arguments.key_blocks[row * arguments.max_entries + entry];
      if (block < 0 || block >= num_key_blocks) return false;
    }
  }
  return true;
}

class Problem {
 public:
  const Arguments& arguments;
  const int head_dim, padded_dim, key_block, query_block, lanes;
  // Entries that one tile may have.
  const int tile_entries;
  // Blocks of the sequence, then blocks of packed global keys.
  const int num_sequence_blocks, num_blocks;

  explicit Problem(const Arguments& call)
      : arguments(call),
        head_dim((int)call.head_dim),
        padded_dim(round_up(head_dim, WIDTH)),
        key_block((int)call.key_block_size),
        query_block((int)call.query_block_size),
        lanes(round_up(query_block, WIDTH)),
        tile_entries(std::clamp(TILE_SCORES / (lanes * key_block), 1, MAX_TILE_ENTRIES)),
        num_sequence_blocks((int)((call.length + key_block - 1) / key_block)),
        num_blocks(num_sequence_blocks + (int)((call.num_global + key_block - 1) / key_block)),
        key_position_(call.batch * num_blocks * key_block),
        key_word_(call.batch * num_blocks * key_block),
        num_open_(call.batch * num_blocks) {
    for (int64_t batch = 0; batch < call.batch; batch++)
      for (int block = 0; block < num_blocks; block++) describe_keys(batch, block);
    if (call.span_length != nullptr) {
      reverse_span(call.span_log_weight, LOG2_E, span_log_weight_);
      reverse_span(call.span_slope, 1.0f, span_slope_);
    }
  }

  QueryBlock query_block_at(int64_t batch, int64_t head, int64_t index) const {
    const int start = (int)index * query_block;
    return {batch, head, index, start, std::min(query_block, (int)arguments.length - start)};
  }

  int64_t row(const QueryBlock& query) const {
    return (query.batch * arguments.heads + query.head) * arguments.length + query.start;
  }

  int64_t list_row(const QueryBlock& query) const {
    return query.batch * arguments.list_batch_stride + query.head * arguments.list_head_stride + query.index;
  }

  // Entries of a list and, after them, of the packed global keys.
  int num_entries(const QueryBlock& query) const {
    return arguments.counts[list_row(query)] + num_blocks - num_sequence_blocks;
  }

  // Collects the next entries that are not skipped, from `index` on, which moves behind them; false at the end.
  bool next_tile(const QueryBlock& query, int& index, Tile& tile) const {
    const int end = num_entries(query);
    for (tile.count = 0; index < end && tile.count < tile_entries; index++) {
      tile.entries[tile.count] = entry(query, index);
      tile.count += !tile.entries[tile.count].is_skipped;
    }
    return tile.count > 0;
  }

  // Hides what the queries may not see of an entry's scores (in base 2), and adds the adaptive span.
  void mask(float* scores, const QueryBlock& query, const Entry& entry) const {
    Ints lane;
    for (int i = 0; i < WIDTH; i++) lane[i] = i;
    const int32_t* position = key_position_.data() + keys(query, entry);
    for (int key = 0; key < key_block; key++) {
      float* row = scores + (int64_t)key * lanes;
      if (position[key] == HIDDEN) {
        std::fill_n(row, lanes, -INFINITE);
        continue;
      }
      const float* span = entry.has_span ? span_row(span_log_weight_, query, entry, key) : nullptr;
      for (int i = 0; i < lanes; i += WIDTH) {
        const Ints offset = position[key] - query.start - i - lane;
        const Ints visible = (((offset >= entry.low) & (offset <= entry.high)) ^ entry.invert) & (offset <= entry.limit);
        Floats score = load<Floats>(row + i);
        if (span != nullptr) score += load<Floats>(span + i);
        store(row + i, visible ? score : broadcast(-INFINITE));
      }
    }
  }

  // The slope of the adaptive span between a key of an entry and the queries of the block.
  const float* span_slope_row(const QueryBlock& query, const Entry& entry, int key) const {
    return span_row(span_slope_, query, entry, key);
  }

  // -1 where dropout keeps a weight and 0 where it drops it.
  ALWAYS_INLINE Ints kept(int32_t key_word, Ints row_words) const {
    Words word = (Words)(row_words ^ key_word);
    word *= 0x7FEB352Du;
    word ^= (Words)((Ints)word >> 15);
    word *= 0x846CA68Bu;
    return ((Ints)word >> 1) >= (int32_t)arguments.dropout_threshold;
  }

  // The dropout words of a query block, one per lane.
  void load_row_words(const QueryBlock& query, int32_t* row_words) const {
    std::copy_n(arguments.row_words + row(query), query.rows, row_words);
    std::fill_n(row_words + query.rows, lanes - query.rows, 0);
  }

  const int32_t* key_words(const QueryBlock& query, const Entry& entry) const {
    return key_word_.data() + keys(query, entry);
  }

  // Packs the keys or values of one block into [key_block, padded_dim]. Rows that no list may show become zeros.
  void pack_block(const RowTensor& source, int64_t batch, int64_t head, int block, float* packed) const {
    const int32_t* position = key_position_.data() + (batch * num_blocks + block) * key_block;
    for (int key = 0; key < key_block; key++) {
      float* row = packed + (int64_t)key * padded_dim;
      const int count = position[key] == HIDDEN ? 0 : head_dim;
      if (count > 0)
        load_row(row, source, row_offset(source, batch, head, position[key]), count, arguments.element_type);
      std::fill_n(row + count, padded_dim - count, 0.0f);
    }
  }

  // Rows [rows, padded_dim] of a query block as [head_dim, lanes], with zeros beyond the rows.
  void transpose_rows(const float* packed, const QueryBlock& query, float* transposed) const {
    for (int j = 0; j < head_dim; j++) {
      float* row = transposed + (int64_t)j * lanes;
      for (int i = 0; i < query.rows; i++) row[i] = packed[(int64_t)i * padded_dim + j];
      for (int i = query.rows; i < lanes; i++) row[i] = 0.0f;
    }
  }

  // Rows of a query block, times a factor, into [query_block, padded_dim].
  void pack_rows(const RowTensor& source, const QueryBlock& query, float factor, float* packed) const {
    for (int i = 0; i < query.rows; i++) {
      float* row = packed + (int64_t)i * padded_dim;
      load_row(row, source, row_offset(source, query.batch, query.head, query.start + i), head_dim,
               arguments.element_type);
      for (int j = 0; j < head_dim; j++) row[j] *= factor;
      for (int j = head_dim; j < padded_dim; j++) row[j] = 0.0f;
    }
  }

 private:
  static constexpr int32_t HIDDEN = -1;

  // Per batch row and block, key_block keys: position, or HIDDEN from all lists; dropout word.
  Buffer<int32_t> key_position_, key_word_;
  Buffer<int> num_open_;
  // The tables of the adaptive span over the offset query - key, so that queries in order find theirs in order.
  Buffer<float> span_log_weight_, span_slope_;

  int64_t keys(const QueryBlock& query, const Entry& entry) const {
    return (query.batch * num_blocks + entry.block) * key_block;
  }

  void reverse_span(const float* table, float factor, Buffer<float>& reversed) const {
    const int64_t columns = arguments.span_columns;
    reversed.reserve(arguments.heads * columns);
    for (int64_t head = 0; head < arguments.heads; head++)
      for (int64_t i = 0; i < columns; i++)
        reversed.data()[head * columns + i] = factor * table[(head + 1) * columns - 1 - i];
  }

  const float* span_row(const Buffer<float>& reversed, const QueryBlock& query, const Entry& entry, int key) const {
    const int64_t center = arguments.span_columns - 1 - arguments.span_center;
    return reversed.data() + query.head * arguments.span_columns + center + query.start - entry.block * key_block - key;
  }

  // What the entry at a place of a list asks for, or with an index behind the list a block of packed global keys.
  Entry entry(const QueryBlock& query, int index) const {
    const int count = arguments.counts[list_row(query)];
    Entry entry = {};
    entry.low = INT_MIN, entry.high = INT_MAX, entry.place = -1;
    entry.limit = arguments.is_causal ? 0 : INT_MAX;
    if (index >= count) {
      entry.block = num_sequence_blocks + index - count;
      entry.is_masked = arguments.is_causal;
    } else {
      const int64_t place = list_row(query) * arguments.max_entries + index;
      entry.block = arguments.key_blocks[place];
      const bool is_window = arguments.flags[place] & WINDOW;
      const int first_key = entry.block * key_block;
      const int last_key = std::min(first_key + key_block, (int)arguments.length) - 1;
      // The offsets key - query of the entry.
      const int lowest = first_key - (query.start + query.rows - 1), highest = last_key - query.start;
      if (arguments.is_causal) {
        entry.is_skipped = lowest > 0;
        entry.is_masked = highest > 0;
      }
      if (arguments.has_window) {
        const int left = (int)-arguments.left, right = (int)arguments.right;
        const bool touches = highest >= left && lowest <= right, is_inside = lowest >= left && highest <= right;
        entry.is_skipped |= is_window ? !touches : is_inside;
        if (is_window ? !is_inside : touches) {
          entry.is_masked = true;
          entry.low = left, entry.high = right, entry.invert = is_window ? 0 : -1;
        }
      }
      if (is_window) {
        if (arguments.span_length != nullptr)
          entry.has_span = (float)std::max(-lowest, highest) > arguments.span_length[query.head];
      } else {
        entry.place = index;
        if (arguments.entry_bias != nullptr)
          entry.bias = LOG2_E * arguments.entry_bias[(query.batch * arguments.bias_batch_stride +
                                                      query.head * arguments.bias_head_stride + query.index) *
                                                         arguments.max_entries +
                                                     index];
      }
    }
    const int num_open = num_open_.data()[query.batch * num_blocks + entry.block];
    entry.is_skipped |= num_open == 0;
    entry.is_masked |= num_open < key_block;
    return entry;
  }

  void describe_keys(int64_t batch, int block) {
    const int64_t first = (batch * num_blocks + block) * key_block;
    int num_open = 0;
    for (int key = 0; key < key_block; key++) {
      int64_t position = arguments.length;
      if (block < num_sequence_blocks) {
        position = (int64_t)block * key_block + key;
        if (position < arguments.length && arguments.is_listed != nullptr &&
            !arguments.is_listed[batch * arguments.length + position])
          position = arguments.length;
      } else {
        const int64_t slot = (int64_t)(block - num_sequence_blocks) * key_block + key;
        if (slot < arguments.num_global) position = arguments.global_positions[batch * arguments.num_global + slot];
      }
      const bool is_open = position < arguments.length;
      key_position_.data()[first + key] = is_open ? (int32_t)position : HIDDEN;
      key_word_.data()[first + key] = is_open && arguments.column_words != nullptr ? arguments.column_words[position] : 0;
      num_open += is_open;
    }
    num_open_.data()[batch * num_blocks + block] = num_open;
  }
};

}  // namespace adaptive
