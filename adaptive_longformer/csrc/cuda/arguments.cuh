// What every kernel gets, by value. Field by field the `_Arguments` of attention/backends/cuda.py.
#pragma once

#include "device.cuh"

namespace adaptive {

// Keys of a tile, which are a block of the lists of `key_blocks`; and the rows of a piece, which blocks of smaller lists
// are made of.
constexpr int KEY_BLOCK = 64, PIECE = 16;
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.693147180559945309f;
constexpr float MIN_SPAN_WEIGHT = 1e-6f;

// Bits of an entry's flags; adaptive_longformer/patterns/block_layout.py explains them.
enum EntryFlag { WINDOW = 2, GLOBAL_PACK = 16 };

// A tensor [batch, heads, length, head_dim] whose last dimension is contiguous; strides in elements.
struct RowTensor {
  Half* data;
  long long batch_stride, head_stride, row_stride;
};

// Pointers may be null where a comment says so.
struct Arguments {
  int element_type, head_dim, query_block_size;
  int batch, heads, length;
  int num_query_blocks, max_entries;
  // Key blocks of the sequence, and all: with the blocks of packed global keys behind them.
  int num_sequence_blocks, num_blocks;
  // Shape of the lists: batch or 1, heads or 1.
  int list_batches, list_heads;
  int is_causal, has_window, left, right;
  int has_dropout, dropout_threshold;
  float scale, keep_factor, span_ramp;
  // Items and partial sums of the gradients of keys and values.
  int num_items, num_slots;
  // Smaller blocks, of whole pieces: tokens of their query blocks and key blocks, or 0; entries of a list; tiles of queries
  // that share items, and room for those of each; at most so many slots, and readers of a slot; parts of the queries of a
  // block of packed keys. The list of a batch row and head is at batch * small_batch_stride + head * small_head_stride.
  int small_query_block, small_key_block, small_width;
  int small_tiles, small_room, small_slots, slot_readers, packed_parts;
  int small_batch_stride, small_head_stride;

  RowTensor query, key, value;
  // [list_batches, list_heads, num_query_blocks, max_entries]; flags GLOBAL_PACK: the id is of a block of packed keys. Where
  // blocks are smaller, there are no such lists: queries and keys are in tiles of 64, and read the window and packed keys.
  const int* key_blocks;
  const int* counts;
  const int* flags;
  // All lists in the order of their blocks of threads: nothing but the running time depends on it. Null: as they are.
  const int* order;
  // `TileLists` of attention/kernels/triton_lists.py, which say what smaller blocks read beside window and packed keys.
  // Entries are null where there is no bias; all are null where no list has an entry.
  const int* small_items;
  const int* small_entries;
  const int* small_counts;
  // Lists of a bias per entry, strides in lists, 0 where shared; null: none. Where blocks are smaller, of their lists.
  const float* entry_bias;
  long long bias_batch_stride, bias_head_stride;
  // [batch, num_blocks]: which keys of a block the lists show, neither padding nor (in the sequence) global.
  const Bits* open_keys;
  // [batch, (num_blocks - num_sequence_blocks) * KEY_BLOCK]: positions of the packed keys.
  const int* global_positions;
  // [batch, length] of bytes: padding, whose rows may hold anything; null: none.
  const unsigned char* is_padding;
  const int* row_words;     // dropout words [batch, heads, length]
  const int* column_words;  // dropout words [length]
  const float* span_length; // [heads]; null: no adaptive span

  RowTensor output;
  float* lse;  // [batch, heads, length]

  // Backward only.
  RowTensor grad_output;
  const float* grad_lse;  // [batch, heads, length]
  // [batch, heads, num_query_blocks * query_block_size]: LSE in base 2, or +inf for a row without weights; and
  // sum(grad_output * output) - grad_lse. Written by row_sums, read by the others.
  float* row_lse;
  float* row_delta;
  // [batch, heads, num_query_blocks * query_block_size / 64]: a bit for each of 64 rows, whether it has weights. As they.
  Bits* row_used;
  RowTensor grad_query, grad_key, grad_value;
  // [batch, heads, num_query_blocks, max_entries], zeroed by the caller; null: not wanted. Of smaller blocks a sum for
  // every two pieces: [batch, heads, pieces of the query blocks, small_width, pieces of a key block].
  float* grad_entry_bias;
  float* grad_span;        // [batch, heads, num_query_blocks]; null: not wanted
  // The transposed lists: per entry its query block and its index among all entries.
  const int* transposed_query_blocks;
  const int* transposed_entries;
  // Items [num_items]: a column (list row * num_blocks + block) or -1, its entries [first, last), and the slot of its
  // partial sums, or -1 if the item is the whole column.
  const int* item_column;
  const int* item_first;
  const int* item_last;
  const int* item_slot;
  // Per column: its first slot and its number of slots, 0 if the column is one item.
  const int* column_first_slot;
  const int* column_slots;
  // Partial sums [batch / list_batches, heads / list_heads, num_slots, KEY_BLOCK, head_dim].
  float* partial_keys;
  float* partial_values;
  // `Readers` of attention/kernels/triton_lists.py: the lists of smaller blocks transposed.
  const int* reader_starts;
  const int* reader_entries;
  const int* slot_starts;
  const int* slot_columns;
  // What their slots add up to: [batch, heads, small_slots, small_key_block, head_dim].
  float* small_keys;
  float* small_values;
};

}  // namespace adaptive
