// What all query blocks of a call share: the keys by blocks, packed, and the tables of the adaptive span.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <limits>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "arguments.h"
#include "rows.h"
#include "vectors.h"

namespace adaptive {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.693147180559945309f;

constexpr size_t HUGE_PAGE = 1 << 21;

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
    const size_t alignment = count * sizeof(Element) < HUGE_PAGE ? 64 : HUGE_PAGE;
    const size_t size = (count * sizeof(Element) + alignment - 1) / alignment * alignment;
    data_ = (Element*)std::aligned_alloc(alignment, size);
    if (data_ == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // Lists jump between blocks, each of which else has pages of its own to look up. Only a wish: it may be refused.
    if (alignment == HUGE_PAGE) madvise(data_, size, MADV_HUGEPAGE);
#endif
    capacity_ = count;
  }
  Element* data() const { return data_; }

 private:
  Element* data_ = nullptr;
  int64_t capacity_ = 0;
};

// The position of a key that no list may show.
constexpr int32_t HIDDEN = -1;

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
  const int head_dim, padded_dim, key_block, query_block;
  // Blocks of the sequence, then blocks of packed global keys.
  const int num_sequence_blocks, num_blocks;

  explicit Problem(const Arguments& call)
      : arguments(call),
        head_dim((int)call.head_dim),
        padded_dim(round_up(head_dim, WIDTH)),
        key_block((int)call.key_block_size),
        query_block((int)call.query_block_size),
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

  // Positions and dropout words of the keys of a block, and how many are not hidden.
  const int32_t* key_positions(int64_t batch, int block) const {
    return key_position_.data() + (batch * num_blocks + block) * key_block;
  }
  const int32_t* key_words(int64_t batch, int block) const {
    return key_word_.data() + (batch * num_blocks + block) * key_block;
  }
  int num_open(int64_t batch, int block) const { return num_open_.data()[batch * num_blocks + block]; }

  // The logarithm in base 2 of the adaptive span's weight, and its slope, between a key and the queries from one on.
  const float* span_log_weight(int64_t head, int key, int query) const {
    return span_row(span_log_weight_, head, key, query);
  }
  const float* span_slope(int64_t head, int key, int query) const { return span_row(span_slope_, head, key, query); }

  // -1 where dropout keeps a weight and 0 where it drops it.
  ALWAYS_INLINE Ints kept(int32_t key_word, Ints row_words) const {
    Words word = (Words)(row_words ^ key_word);
    word *= 0x7FEB352Du;
    word ^= (Words)((Ints)word >> 15);
    word *= 0x846CA68Bu;
    return ((Ints)word >> 1) >= (int32_t)arguments.dropout_threshold;
  }

  // Packs the keys or values of one block into [key_block, padded_dim]. Rows that no list may show become zeros.
  void pack_block(const RowTensor& source, int64_t batch, int64_t head, int block, float* packed) const {
    const int32_t* position = key_positions(batch, block);
    for (int key = 0; key < key_block; key++) {
      float* row = packed + (int64_t)key * padded_dim;
      const int count = position[key] == HIDDEN ? 0 : head_dim;
      if (count > 0)
        load_row(row, source, row_offset(source, batch, head, position[key]), count, arguments.element_type);
      std::fill_n(row + count, padded_dim - count, 0.0f);
    }
  }

 private:
  // Per batch row and block, key_block keys: position, or HIDDEN from all lists; dropout word.
  Buffer<int32_t> key_position_, key_word_;
  Buffer<int> num_open_;
  // The tables of the adaptive span over the offset query - key, so that queries in order find theirs in order.
  Buffer<float> span_log_weight_, span_slope_;

  void reverse_span(const float* table, float factor, Buffer<float>& reversed) const {
    const int64_t columns = arguments.span_columns;
    reversed.reserve(arguments.heads * columns);
    for (int64_t head = 0; head < arguments.heads; head++)
      for (int64_t i = 0; i < columns; i++)
        reversed.data()[head * columns + i] = factor * table[(head + 1) * columns - 1 - i];
  }

  const float* span_row(const Buffer<float>& reversed, int64_t head, int key, int query) const {
    const int64_t center = arguments.span_columns - 1 - arguments.span_center;
    return reversed.data() + head * arguments.span_columns + center + query - key;
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
      const bool is_open = position >= 0 && position < arguments.length;
      key_position_.data()[first + key] = is_open ? (int32_t)position : HIDDEN;
      key_word_.data()[first + key] =
          is_open && arguments.column_words != nullptr ? arguments.column_words[position] : 0;
      num_open += is_open;
    }
    num_open_.data()[batch * num_blocks + block] = num_open;
  }
};

}  // namespace adaptive
