// What the forward and the backward pass share: packed keys, the columns of a block, the mask of a tile.
#pragma once

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
struct Tile {
  int block;
  bool is_skipped;
  // Whether the mask below hides anything, and whether the adaptive span weakens anything.
  bool is_masked, has_span;
  int entry;
  float bias;
  // Offsets key - query that are visible: from low to high, or all others with invert = -1; never above limit.
  int32_t low, high, invert, limit;
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
  const int head_dim, padded_dim, key_block, padded_key_block, query_block;
  // Blocks of the sequence, then blocks of packed global keys.
  const int num_sequence_blocks, num_blocks;

  explicit Problem(const Arguments& call)
      : arguments(call),
        head_dim((int)call.head_dim),
        padded_dim(round_up(head_dim, PANEL)),
        key_block((int)call.key_block_size),
        padded_key_block(round_up(key_block, PANEL)),
        query_block((int)call.query_block_size),
        num_sequence_blocks((int)((call.length + key_block - 1) / key_block)),
        num_blocks(num_sequence_blocks + (int)((call.num_global + key_block - 1) / key_block)),
        column_bias_(call.batch * num_blocks * padded_key_block),
        column_position_(call.batch * num_blocks * padded_key_block),
        column_word_(call.batch * num_blocks * padded_key_block),
        num_open_(call.batch * num_blocks) {
    for (int64_t batch = 0; batch < call.batch; batch++)
      for (int block = 0; block < num_blocks; block++) describe_columns(batch, block);
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

  // Tiles of a list: its entries, then the packed global keys.
  int num_tiles(const QueryBlock& query) const {
    return arguments.counts[list_row(query)] + num_blocks - num_sequence_blocks;
  }

  Tile tile(const QueryBlock& query, int index) const {
    const int count = arguments.counts[list_row(query)];
    Tile tile = {};
    tile.low = INT_MIN, tile.high = INT_MAX, tile.entry = -1;
    tile.limit = arguments.is_causal ? 0 : INT_MAX;
    bool is_masked = false;
    if (index >= count) {
      tile.block = num_sequence_blocks + index - count;
      is_masked = arguments.is_causal;
    } else {
      const int64_t entry = list_row(query) * arguments.max_entries + index;
      tile.block = arguments.key_blocks[entry];
      tile.entry = index;
      const bool is_window = arguments.flags[entry] & WINDOW;
      const int first_key = tile.block * key_block;
      const int last_key = std::min(first_key + key_block, (int)arguments.length) - 1;
      // The offsets key - query of the tile.
      const int lowest = first_key - (query.start + query.rows - 1), highest = last_key - query.start;
      if (arguments.is_causal) {
        tile.is_skipped = lowest > 0;
        is_masked = highest > 0;
      }
      if (arguments.has_window) {
        const int left = (int)-arguments.left, right = (int)arguments.right;
        const bool touches = highest >= left && lowest <= right, is_inside = lowest >= left && highest <= right;
        tile.is_skipped |= is_window ? !touches : is_inside;
        if (is_window ? !is_inside : touches) {
          is_masked = true;
          tile.low = left, tile.high = right, tile.invert = is_window ? 0 : -1;
        }
      }
      if (is_window && arguments.span_length != nullptr)
        tile.has_span = (float)std::max(-lowest, highest) > arguments.span_length[query.head];
      if (!is_window && arguments.entry_bias != nullptr)
        tile.bias = LOG2_E * arguments.entry_bias[(query.batch * arguments.bias_batch_stride +
                                                   query.head * arguments.bias_head_stride + query.index) *
                                                      arguments.max_entries +
                                                  index];
    }
    const int num_open = num_open_.data()[query.batch * num_blocks + tile.block];
    tile.is_skipped |= num_open == 0;
    tile.is_masked = is_masked || num_open < padded_key_block;
    return tile;
  }

  // Hides what the query at a position may not see of a tile's scores (in base 2), and adds the adaptive span.
  void mask_row(float* scores, const QueryBlock& query, const Tile& tile, int position) const {
    if (tile.has_span) {
      const float* span = span_row(arguments.span_log_weight, query, tile, position);
      for (int j = 0; j < padded_key_block; j += WIDTH)
        store(scores + j, load<Floats>(scores + j) + load<Floats>(span + j) * LOG2_E);
    }
    if (!tile.is_masked) return;
    const float* bias = column_bias_.data() + columns(query, tile);
    const int32_t* key_position = column_position_.data() + columns(query, tile);
    for (int j = 0; j < padded_key_block; j += WIDTH) {
      const Ints offset = load<Ints>(key_position + j) - position;
      const Ints visible = (((offset >= tile.low) & (offset <= tile.high)) ^ tile.invert) & (offset <= tile.limit);
      const Floats open = load<Floats>(scores + j) + load<Floats>(bias + j);
      store(scores + j, visible ? open : broadcast(-INFINITE));
    }
  }

  // A table over the offset key - query, from the tile's first column on.
  const float* span_row(const float* table, const QueryBlock& query, const Tile& tile, int position) const {
    return table + query.head * arguments.span_columns + arguments.span_center + tile.block * key_block - position;
  }

  // -1 where dropout keeps a weight and 0 where it drops it, for WIDTH columns from `column` on.
  ALWAYS_INLINE Ints kept(const int32_t* column_words, int column, int32_t row_word) const {
    Words word = (Words)(load<Ints>(column_words + column) ^ row_word);
    word *= 0x7FEB352Du;
    word ^= (Words)((Ints)word >> 15);
    word *= 0x846CA68Bu;
    return ((Ints)word >> 1) >= (int32_t)arguments.dropout_threshold;
  }

  const int32_t* column_words(const QueryBlock& query, const Tile& tile) const {
    return column_word_.data() + columns(query, tile);
  }

  // Packs the keys or values of one block, [key_block, padded_dim] into `packed` and [head_dim, padded_key_block] into
  // `transposed`, whichever is not null. Rows that no list may show become zeros.
  void pack_block(const RowTensor& source, int64_t batch, int64_t head, int block, float* packed,
                  float* transposed) const {
    const int64_t first = (batch * num_blocks + block) * padded_key_block;
    const float* bias = column_bias_.data() + first;
    const int32_t* position = column_position_.data() + first;
    for (int column = 0; column < padded_key_block; column++) {
      const bool is_open = bias[column] == 0.0f;
      float row[PANEL];
      for (int start = 0; start < padded_dim; start += PANEL) {
        const int count = std::min(PANEL, head_dim - start);
        for (float& element : row) element = 0.0f;
        if (is_open && count > 0)
          load_row(row, source, row_offset(source, batch, head, position[column]) + start, count,
                   arguments.element_type);
        if (packed != nullptr && column < key_block)
          std::memcpy(packed + (int64_t)column * padded_dim + start, row, sizeof(row));
        if (transposed != nullptr)
          for (int i = 0; i < count; i++) transposed[(int64_t)(start + i) * padded_key_block + column] = row[i];
      }
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
  // Per batch row and block, padded_key_block columns: 0, or -inf for what is hidden from all lists; position; dropout word.
  Buffer<float> column_bias_;
  Buffer<int32_t> column_position_, column_word_;
  Buffer<int> num_open_;

  int64_t columns(const QueryBlock& query, const Tile& tile) const {
    return (query.batch * num_blocks + tile.block) * padded_key_block;
  }

  void describe_columns(int64_t batch, int block) {
    const int64_t first = (batch * num_blocks + block) * padded_key_block;
    int open_columns = 0;
    for (int column = 0; column < padded_key_block; column++) {
      int64_t position = arguments.length;
      if (column < key_block && block < num_sequence_blocks) {
        position = (int64_t)block * key_block + column;
        if (position < arguments.length && arguments.is_listed != nullptr &&
            !arguments.is_listed[batch * arguments.length + position])
          position = arguments.length;
      } else if (column < key_block) {
        const int64_t slot = (int64_t)(block - num_sequence_blocks) * key_block + column;
        if (slot < arguments.num_global) position = arguments.global_positions[batch * arguments.num_global + slot];
      }
      const bool is_open = position < arguments.length;
      column_bias_.data()[first + column] = is_open ? 0.0f : -INFINITE;
      column_position_.data()[first + column] = is_open ? (int32_t)position : 0;
      column_word_.data()[first + column] =
          is_open && arguments.column_words != nullptr ? arguments.column_words[position] : 0;
      open_columns += is_open;
    }
    num_open_.data()[batch * num_blocks + block] = open_columns;
  }
};

}  // namespace adaptive
