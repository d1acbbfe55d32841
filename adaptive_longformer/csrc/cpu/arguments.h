// The C interface between attention/backends/cpp.py and the kernel: plain structs, no header of torch.
#pragma once

#include <cstdint>

namespace adaptive {

enum ElementType : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// Bits of an entry's flags; adaptive_longformer/patterns/block_layout.py explains them.
enum EntryFlag : int32_t { WINDOW = 2 };

enum Status : int32_t { DONE = 0, OUT_OF_MEMORY = 1, BAD_LISTS = 2 };

// A tensor [batch, heads, length, head_dim] whose last dimension is contiguous; strides in elements.
struct RowTensor {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// Field by field the `_Arguments` of attention/backends/cpp.py. Pointers may be null where a comment says so.
struct Arguments {
  int64_t batch, heads, length, head_dim;
  int64_t element_type;
  int64_t query_block_size, key_block_size;
  int64_t is_causal;
  // The window: keys from query - left to query + right. Without one no entry is WINDOW.
  int64_t has_window, left, right;
  double scale;
  double dropout_p;
  int64_t dropout_threshold;
  int64_t num_threads;

  RowTensor query, key, value;

  // Lists [batch or 1, heads or 1, num_query_blocks, max_entries]; strides in rows of entries, 0 where shared.
  const int32_t* key_blocks;
  const int32_t* counts;
  const int32_t* flags;
  int64_t list_batch_stride, list_head_stride, num_query_blocks, max_entries;
  // As key_blocks, with its own strides; null: none.
  const float* entry_bias;
  int64_t bias_batch_stride, bias_head_stride;

  // [batch, length]: keys that the lists show, neither padding nor global; null: all.
  const uint8_t* is_listed;
  // [batch, length]: padding, whose rows may hold anything; null: none.
  const uint8_t* is_padding;
  // [batch, num_global]: keys that every query sees, filled up with `length`.
  const int64_t* global_positions;
  int64_t num_global;

  // Dropout words [batch, heads, length] and [length]; unused with dropout_p = 0.
  const int32_t* row_words;
  const int32_t* column_words;

  // The adaptive span, or null: its length per head, and the logarithm of its weight and that one's derivative by the
  // length, [heads, span_columns] over the offset key - query, which is 0 in column span_center.
  const float* span_length;
  const float* span_log_weight;
  const float* span_slope;
  int64_t span_columns, span_center;

  // Results of the forward pass, inputs of the backward pass.
  RowTensor output;
  float* lse;  // [batch, heads, length]

  // The backward pass only.
  RowTensor grad_output;
  const float* grad_lse;  // [batch, heads, length]
  RowTensor grad_query, grad_key, grad_value;
  float* grad_entry_bias;  // [batch, heads, num_query_blocks, max_entries], zeroed by the caller; null: not wanted
  float* grad_span;        // [batch, heads, num_query_blocks]; null: not wanted
};

}  // namespace adaptive

extern "C" {
// Both return a Status.
int32_t adaptive_attention_forward(const adaptive::Arguments* arguments);
int32_t adaptive_attention_backward(const adaptive::Arguments* arguments);
// sizeof(Arguments): the binding compares it with its own.
int64_t adaptive_attention_arguments_size();
}
