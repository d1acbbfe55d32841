// Block-sparse attention, backward: the five matrix products of a tile run once, from the forward lists. One task walks
// all query blocks of a head (or of a segment, when there are fewer heads than threads) and adds up its own gradients of
// keys and values, so that nothing is shared and every sum has a fixed order.
#include "matmul.h"
#include "problem.h"
#include "threads.h"

namespace adaptive {
namespace {

// The packed keys and values of one head.
struct PackedHead {
  const float *keys, *keys_transposed, *values_transposed;
};

// What one thread needs for one query block; kept between calls.
struct Scratch {
  Buffer<float> query, grad_output, grad_query, weights, grad_scores, lse, delta;

  explicit Scratch(const Problem& problem) { reserve(problem); }
  void reserve(const Problem& problem) {
    for (Buffer<float>* tile : {&query, &grad_output, &grad_query})
      tile->reserve((int64_t)problem.query_block * problem.padded_dim);
    for (Buffer<float>* tile : {&weights, &grad_scores})
      tile->reserve((int64_t)problem.query_block * problem.padded_key_block);
    for (Buffer<float>* column : {&lse, &delta}) column->reserve(problem.query_block);
  }
};

// Reads the query block: scaled queries, output gradients, LSE in base 2, and delta = sum(grad_output * output) - grad_lse.
void load_query_block(const Problem& problem, const QueryBlock& query, Scratch& scratch) {
  const Arguments& arguments = problem.arguments;
  const int width = problem.padded_dim;
  problem.pack_rows(arguments.query, query, (float)arguments.scale * LOG2_E, scratch.query.data());
  problem.pack_rows(arguments.grad_output, query, 1.0f, scratch.grad_output.data());
  problem.pack_rows(arguments.output, query, 1.0f, scratch.grad_query.data());
  for (int i = 0; i < query.rows; i++) {
    float* query_row = scratch.query.data() + (int64_t)i * width;
    float* grad_row = scratch.grad_output.data() + (int64_t)i * width;
    float* output_row = scratch.grad_query.data() + (int64_t)i * width;
    const float lse = arguments.lse[problem.row(query) + i];
    const bool is_padding =
        arguments.is_padding != nullptr && arguments.is_padding[query.batch * arguments.length + query.start + i];
    // A row that sees nothing, or garbage in a padded slot: all its weights are zero.
    if (lse == -INFINITE || (is_padding && lse != lse)) {
      std::fill_n(query_row, width, 0.0f);
      std::fill_n(grad_row, width, 0.0f);
      scratch.lse.data()[i] = INFINITE;
      scratch.delta.data()[i] = 0.0f;
      continue;
    }
    Floats sum = {};
    for (int j = 0; j < width; j += WIDTH) sum += load<Floats>(grad_row + j) * load<Floats>(output_row + j);
    scratch.lse.data()[i] = lse * LOG2_E;
    scratch.delta.data()[i] = horizontal_sum(sum) - arguments.grad_lse[problem.row(query) + i];
  }
  std::fill_n(scratch.grad_query.data(), (int64_t)query.rows * width, 0.0f);
}

// Turns scores into weights (with dropout) and gradients of weights into gradients of scores, in place. Returns the sums
// of the latter: plain, and times the slope of the adaptive span.
template <bool HAS_DROPOUT>
std::pair<float, float> differentiate_rows(const Problem& problem, const QueryBlock& query, const Tile& tile,
                                           Scratch& scratch) {
  const int columns = problem.padded_key_block;
  const int32_t* column_words = problem.column_words(query, tile);
  const float keep_factor = (float)(1.0 / (1.0 - problem.arguments.dropout_p));
  const bool wants_span = tile.has_span && problem.arguments.grad_span != nullptr;
  Floats total = {}, span_total = {};
  for (int i = 0; i < query.rows; i++) {
    float* weights = scratch.weights.data() + (int64_t)i * columns;
    float* grad_scores = scratch.grad_scores.data() + (int64_t)i * columns;
    if (tile.is_masked || tile.has_span) problem.mask_row(weights, query, tile, query.start + i);
    const float shift = scratch.lse.data()[i] - tile.bias, delta = scratch.delta.data()[i];
    const int32_t row_word = HAS_DROPOUT ? problem.arguments.row_words[problem.row(query) + i] : 0;
    for (int j = 0; j < columns; j += WIDTH) {
      const Floats weight = exp2_approximately(load<Floats>(weights + j) - shift);
      Floats applied = weight, grad = load<Floats>(grad_scores + j);
      if (HAS_DROPOUT) {
        const Ints kept = problem.kept(column_words, j, row_word);
        applied = zero_unless(kept, weight) * keep_factor;
        grad = zero_unless(kept, grad) * keep_factor;
      }
      grad = weight * (grad - delta);
      total += grad;
      store(weights + j, applied);
      store(grad_scores + j, grad);
    }
    if (wants_span) {
      const float* slope = problem.span_row(problem.arguments.span_slope, query, tile, query.start + i);
      for (int j = 0; j < columns; j += WIDTH) span_total += load<Floats>(grad_scores + j) * load<Floats>(slope + j);
    }
  }
  return {horizontal_sum(total), horizontal_sum(span_total)};
}

// Adds the gradients of one query block; writes its own.
void differentiate(const Problem& problem, const QueryBlock& query, const PackedHead& packed, float* grad_keys,
                   float* grad_values, Scratch& scratch) {
  const Arguments& arguments = problem.arguments;
  const int columns = problem.padded_key_block, width = problem.padded_dim;
  const int64_t list = (query.batch * arguments.heads + query.head) * arguments.num_query_blocks + query.index;
  load_query_block(problem, query, scratch);
  float grad_span = 0.0f;
  const int num_tiles = problem.num_tiles(query);
  for (int index = 0; index < num_tiles; index++) {
    const Tile tile = problem.tile(query, index);
    if (tile.is_skipped) continue;
    const int64_t transposed = (int64_t)tile.block * problem.head_dim * columns;
    const int64_t row_major = (int64_t)tile.block * problem.key_block * width;
    multiply<false, false>(scratch.query.data(), width, packed.keys_transposed + transposed, columns,
                           scratch.weights.data(), columns, query.rows, columns, problem.head_dim);
    multiply<false, false>(scratch.grad_output.data(), width, packed.values_transposed + transposed, columns,
                           scratch.grad_scores.data(), columns, query.rows, columns, problem.head_dim);
    const auto [grad_bias, grad_tile_span] = arguments.dropout_p > 0
                                                 ? differentiate_rows<true>(problem, query, tile, scratch)
                                                 : differentiate_rows<false>(problem, query, tile, scratch);
    const bool is_window = tile.entry < 0 || arguments.flags[problem.list_row(query) * arguments.max_entries + index] & WINDOW;
    if (!is_window && arguments.grad_entry_bias != nullptr)
      arguments.grad_entry_bias[list * arguments.max_entries + index] = grad_bias;
    grad_span += grad_tile_span;
    multiply<true, true>(scratch.weights.data(), columns, scratch.grad_output.data(), width, grad_values + row_major,
                         width, problem.key_block, width, query.rows);
    multiply<true, true>(scratch.grad_scores.data(), columns, scratch.query.data(), width, grad_keys + row_major, width,
                         problem.key_block, width, query.rows);
    multiply<false, true>(scratch.grad_scores.data(), columns, packed.keys + row_major, width,
                          scratch.grad_query.data(), width, query.rows, width, problem.key_block);
  }
  for (int i = 0; i < query.rows; i++)
    store_row(arguments.grad_query, row_offset(arguments.grad_query, query.batch, query.head, query.start + i),
              scratch.grad_query.data() + (int64_t)i * width, problem.head_dim, (float)arguments.scale,
              arguments.element_type);
  if (arguments.grad_span != nullptr) arguments.grad_span[list] = grad_span;
}

// Adds the segments' gradients of one key block, in their order, and writes them where the keys came from.
void write_block(const Problem& problem, const RowTensor& target, int64_t batch, int64_t head, int block, float* grads,
                 int64_t segment_size, int64_t num_segments, float factor) {
  const Arguments& arguments = problem.arguments;
  float* first = grads + (int64_t)block * problem.key_block * problem.padded_dim;
  for (int64_t segment = 1; segment < num_segments; segment++) {
    const float* other = first + segment * segment_size;
    for (int i = 0; i < problem.key_block * problem.padded_dim; i++) first[i] += other[i];
  }
  for (int column = 0; column < problem.key_block; column++) {
    int64_t position = (int64_t)block * problem.key_block + column;
    if (block >= problem.num_sequence_blocks) {
      const int64_t slot = position - (int64_t)problem.num_sequence_blocks * problem.key_block;
      if (slot >= arguments.num_global) return;
      position = arguments.global_positions[batch * arguments.num_global + slot];
    }
    if (position < arguments.length)
      store_row(target, row_offset(target, batch, head, position), first + (int64_t)column * problem.padded_dim,
                problem.head_dim, factor, arguments.element_type);
  }
}

void backward(const Arguments& arguments) {
  const Problem problem(arguments);
  const int64_t num_heads = arguments.batch * arguments.heads, num_threads = arguments.num_threads;
  const int64_t transposed_size = (int64_t)problem.num_blocks * problem.head_dim * problem.padded_key_block;
  const int64_t packed_size = (int64_t)problem.num_blocks * problem.key_block * problem.padded_dim;
  // Segments cost memory and an addition each: only where heads alone leave threads idle.
  int64_t num_segments = 1;
  if (num_heads % num_threads != 0 && num_heads < 4 * num_threads)
    num_segments = std::min(arguments.num_query_blocks, (2 * num_threads + num_heads - 1) / num_heads);
  const int64_t group = std::min(num_heads, num_threads);
  const Buffer<float> keys(group * packed_size), keys_transposed(group * transposed_size),
      values_transposed(group * transposed_size), grad_keys(group * num_segments * packed_size),
      grad_values(group * num_segments * packed_size);
  for (int64_t first = 0; first < num_heads; first += group) {
    const int64_t members = std::min(group, num_heads - first);
    parallel_tasks(members * problem.num_blocks, num_threads, [&](int64_t task) {
      const int64_t member = task / problem.num_blocks, head = first + member;
      const int block = (int)(task % problem.num_blocks);
      const int64_t transposed =
          member * transposed_size + (int64_t)block * problem.head_dim * problem.padded_key_block;
      const int64_t packed = member * packed_size + (int64_t)block * problem.key_block * problem.padded_dim;
      problem.pack_block(arguments.key, head / arguments.heads, head % arguments.heads, block, keys.data() + packed,
                         keys_transposed.data() + transposed);
      problem.pack_block(arguments.value, head / arguments.heads, head % arguments.heads, block, nullptr,
                         values_transposed.data() + transposed);
    });
    parallel_tasks(members * num_segments, num_threads, [&](int64_t task) {
      static thread_local Scratch scratch(problem);
      scratch.reserve(problem);
      const int64_t member = task / num_segments, segment = task % num_segments, head = first + member;
      const PackedHead packed = {keys.data() + member * packed_size, keys_transposed.data() + member * transposed_size,
                                 values_transposed.data() + member * transposed_size};
      float* segment_grad_keys = grad_keys.data() + task * packed_size;
      float* segment_grad_values = grad_values.data() + task * packed_size;
      std::fill_n(segment_grad_keys, packed_size, 0.0f);
      std::fill_n(segment_grad_values, packed_size, 0.0f);
      const int64_t end = (segment + 1) * arguments.num_query_blocks / num_segments;
      for (int64_t index = segment * arguments.num_query_blocks / num_segments; index < end; index++)
        differentiate(problem, problem.query_block_at(head / arguments.heads, head % arguments.heads, index), packed,
                      segment_grad_keys, segment_grad_values, scratch);
    });
    // Sequence blocks first: the packed global keys then overwrite the zeros at their own positions.
    const auto write_blocks = [&](int first_block, int count) {
      parallel_tasks(members * count, num_threads, [&](int64_t task) {
        const int64_t member = task / count, head = first + member;
        const int block = first_block + (int)(task % count);
        const int64_t start = member * num_segments * packed_size;
        write_block(problem, arguments.grad_key, head / arguments.heads, head % arguments.heads, block,
                    grad_keys.data() + start, packed_size, num_segments, LN_2);
        write_block(problem, arguments.grad_value, head / arguments.heads, head % arguments.heads, block,
                    grad_values.data() + start, packed_size, num_segments, 1.0f);
      });
    };
    write_blocks(0, problem.num_sequence_blocks);
    write_blocks(problem.num_sequence_blocks, problem.num_blocks - problem.num_sequence_blocks);
  }
}

}  // namespace
}  // namespace adaptive

extern "C" int32_t adaptive_attention_backward(const adaptive::Arguments* arguments) {
  if (!adaptive::lists_are_valid(*arguments)) return adaptive::BAD_LISTS;
  try {
    adaptive::backward(*arguments);
  } catch (const std::bad_alloc&) {
    return adaptive::OUT_OF_MEMORY;
  }
  return adaptive::DONE;
}
