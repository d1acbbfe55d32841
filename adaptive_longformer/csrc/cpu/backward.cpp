// Block-sparse attention, backward: the five matrix products of a tile run once, from the forward lists. One task walks
// all query blocks of a head (or of a segment, when there are fewer heads than threads) and adds up its own gradients of
// keys and values, so that nothing is shared and every sum has a fixed order.
#include "matmul.h"
#include "problem.h"
#include "threads.h"

namespace adaptive {
namespace {

// The packed keys and values of one head, and where their gradients are summed.
struct PackedHead {
  const float *keys, *values;
  float *grad_keys, *grad_values;
};

// What one thread needs for one query block; kept between calls.
struct Scratch {
  Buffer<float> query, query_transposed, grad_output, grad_output_transposed, grad_query, weights, grad_scores;
  Buffer<float> lse, delta;
  Buffer<int32_t> row_words;

  explicit Scratch(const Problem& problem) { reserve(problem); }
  void reserve(const Problem& problem) {
    for (Buffer<float>* rows : {&query, &grad_output, &grad_query})
      rows->reserve((int64_t)problem.query_block * problem.padded_dim);
    for (Buffer<float>* rows : {&query_transposed, &grad_output_transposed})
      rows->reserve((int64_t)problem.head_dim * problem.lanes);
    for (Buffer<float>* tile : {&weights, &grad_scores})
      tile->reserve((int64_t)problem.tile_entries * problem.key_block * problem.lanes);
    for (Buffer<float>* column : {&lse, &delta}) column->reserve(problem.lanes);
    row_words.reserve(problem.lanes);
  }
};

// Reads the query block: scaled queries, output gradients, LSE in base 2, and delta = sum(grad_output * output) - grad_lse.
void load_query_block(const Problem& problem, const QueryBlock& query, Scratch& scratch) {
  const Arguments& arguments = problem.arguments;
  const int width = problem.padded_dim;
  problem.pack_rows(arguments.query, query, (float)arguments.scale * LOG2_E, scratch.query.data());
  problem.pack_rows(arguments.grad_output, query, 1.0f, scratch.grad_output.data());
  problem.pack_rows(arguments.output, query, 1.0f, scratch.grad_query.data());
  // Where nothing is seen, garbage stands in a padded slot or no query is: all weights are zero.
  std::fill_n(scratch.lse.data(), problem.lanes, INFINITE);
  std::fill_n(scratch.delta.data(), problem.lanes, 0.0f);
  for (int i = 0; i < query.rows; i++) {
    float* query_row = scratch.query.data() + (int64_t)i * width;
    float* grad_row = scratch.grad_output.data() + (int64_t)i * width;
    float* output_row = scratch.grad_query.data() + (int64_t)i * width;
    const float lse = arguments.lse[problem.row(query) + i];
    const bool is_padding =
        arguments.is_padding != nullptr && arguments.is_padding[query.batch * arguments.length + query.start + i];
    if (lse == -INFINITE || (is_padding && lse != lse)) {
      std::fill_n(query_row, width, 0.0f);
      std::fill_n(grad_row, width, 0.0f);
      continue;
    }
    Floats sum = {};
    for (int j = 0; j < width; j += WIDTH) sum += load<Floats>(grad_row + j) * load<Floats>(output_row + j);
    scratch.lse.data()[i] = lse * LOG2_E;
    scratch.delta.data()[i] = horizontal_sum(sum) - arguments.grad_lse[problem.row(query) + i];
  }
  problem.transpose_rows(scratch.query.data(), query, scratch.query_transposed.data());
  problem.transpose_rows(scratch.grad_output.data(), query, scratch.grad_output_transposed.data());
  std::fill_n(scratch.grad_query.data(), (int64_t)query.rows * width, 0.0f);
  if (arguments.dropout_p > 0) problem.load_row_words(query, scratch.row_words.data());
}

// Turns the scores of an entry into weights (with dropout) and gradients of weights into gradients of scores, in place.
// Returns the sums of the latter: plain, and times the slope of the adaptive span.
template <bool HAS_DROPOUT>
std::pair<float, float> differentiate_entry(const Problem& problem, const QueryBlock& query, const Entry& entry,
                                            float* weights, float* grad_scores, const Scratch& scratch) {
  const int lanes = problem.lanes;
  const int32_t* key_words = problem.key_words(query, entry);
  const float keep_factor = (float)(1.0 / (1.0 - problem.arguments.dropout_p));
  const bool wants_span = entry.has_span && problem.arguments.grad_span != nullptr;
  if (entry.is_masked || entry.has_span) problem.mask(weights, query, entry);
  Floats total = {}, span_total = {};
  for (int i = 0; i < round_up(query.rows, WIDTH); i += WIDTH) {
    const Floats shift = load<Floats>(scratch.lse.data() + i) - entry.bias;
    const Floats delta = load<Floats>(scratch.delta.data() + i);
    const Ints row_words = HAS_DROPOUT ? load<Ints>(scratch.row_words.data() + i) : Ints{};
    for (int key = 0; key < problem.key_block; key++) {
      float* weight_row = weights + (int64_t)key * lanes + i;
      float* grad_row = grad_scores + (int64_t)key * lanes + i;
      const Floats weight = exp2_approximately(load<Floats>(weight_row) - shift);
      Floats applied = weight, grad = load<Floats>(grad_row);
      if (HAS_DROPOUT) {
        const Ints kept = problem.kept(key_words[key], row_words);
        applied = zero_unless(kept, weight) * keep_factor;
        grad = zero_unless(kept, grad) * keep_factor;
      }
      grad = weight * (grad - delta);
      total += grad;
      if (wants_span) span_total += grad * load<Floats>(problem.span_slope_row(query, entry, key) + i);
      store(weight_row, applied);
      store(grad_row, grad);
    }
  }
  return {horizontal_sum(total), horizontal_sum(span_total)};
}

// Adds the gradients of one query block; writes its own.
void differentiate(const Problem& problem, const QueryBlock& query, const PackedHead& packed, Scratch& scratch) {
  const Arguments& arguments = problem.arguments;
  const int lanes = problem.lanes, width = problem.padded_dim, key_block = problem.key_block;
  const int used_lanes = round_up(query.rows, WIDTH);
  const int64_t block_size = (int64_t)key_block * width, part_size = (int64_t)key_block * lanes;
  const int64_t list = (query.batch * arguments.heads + query.head) * arguments.num_query_blocks + query.index;
  load_query_block(problem, query, scratch);
  const float *const queries = scratch.query.data(), *const grad_outputs = scratch.grad_output.data();
  const float *const queries_transposed = scratch.query_transposed.data(),
                     *const grad_outputs_transposed = scratch.grad_output_transposed.data();
  float grad_span = 0.0f;
  const float* tile_keys[MAX_TILE_ENTRIES];
  Tile tile;
  for (int index = 0; problem.next_tile(query, index, tile);) {
    for (int part = 0; part < tile.count; part++) {
      const Entry& entry = tile.entries[part];
      const int64_t block = entry.block * block_size;
      float* weights = scratch.weights.data() + part * part_size;
      float* grad_scores = scratch.grad_scores.data() + part * part_size;
      tile_keys[part] = packed.keys + block;
      multiply<false, false>(packed.keys + block, width, {&queries_transposed, 1, problem.head_dim, lanes}, weights,
                             lanes, key_block, used_lanes);
      multiply<false, false>(packed.values + block, width, {&grad_outputs_transposed, 1, problem.head_dim, lanes},
                             grad_scores, lanes, key_block, used_lanes);
      const auto [grad_bias, grad_entry_span] =
          arguments.dropout_p > 0 ? differentiate_entry<true>(problem, query, entry, weights, grad_scores, scratch)
                                  : differentiate_entry<false>(problem, query, entry, weights, grad_scores, scratch);
      if (entry.place >= 0 && arguments.grad_entry_bias != nullptr)
        arguments.grad_entry_bias[list * arguments.max_entries + entry.place] = grad_bias;
      grad_span += grad_entry_span;
      multiply<false, true>(weights, lanes, {&grad_outputs, 1, query.rows, width}, packed.grad_values + block, width,
                            key_block, width);
      multiply<false, true>(grad_scores, lanes, {&queries, 1, query.rows, width}, packed.grad_keys + block, width,
                            key_block, width);
    }
    multiply<true, true>(scratch.grad_scores.data(), lanes, {tile_keys, tile.count, key_block, width},
                         scratch.grad_query.data(), width, query.rows, width);
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
  const int64_t block_size = (int64_t)problem.key_block * problem.padded_dim;
  const int64_t packed_size = problem.num_blocks * block_size;
  // Segments cost memory and an addition each: only where heads alone leave threads idle.
  int64_t num_segments = 1;
  if (num_heads % num_threads != 0 && num_heads < 4 * num_threads)
    num_segments = std::min(arguments.num_query_blocks, (2 * num_threads + num_heads - 1) / num_heads);
  const int64_t group = std::min(num_heads, num_threads);
  const Buffer<float> keys(group * packed_size), values(group * packed_size),
      grad_keys(group * num_segments * packed_size), grad_values(group * num_segments * packed_size);
  for (int64_t first = 0; first < num_heads; first += group) {
    const int64_t members = std::min(group, num_heads - first);
    parallel_tasks(members * problem.num_blocks, num_threads, [&](int64_t task) {
      const int64_t head = first + task / problem.num_blocks;
      const int block = (int)(task % problem.num_blocks);
      for (const auto& [source, packed] : {std::pair(&arguments.key, &keys), std::pair(&arguments.value, &values)})
        problem.pack_block(*source, head / arguments.heads, head % arguments.heads, block,
                           packed->data() + task * block_size);
    });
    parallel_tasks(members * num_segments, num_threads, [&](int64_t task) {
      static thread_local Scratch scratch(problem);
      scratch.reserve(problem);
      const int64_t member = task / num_segments, segment = task % num_segments, head = first + member;
      const PackedHead packed = {keys.data() + member * packed_size, values.data() + member * packed_size,
                                 grad_keys.data() + task * packed_size, grad_values.data() + task * packed_size};
      std::fill_n(packed.grad_keys, packed_size, 0.0f);
      std::fill_n(packed.grad_values, packed_size, 0.0f);
      const int64_t end = (segment + 1) * arguments.num_query_blocks / num_segments;
      for (int64_t index = segment * arguments.num_query_blocks / num_segments; index < end; index++)
        differentiate(problem, problem.query_block_at(head / arguments.heads, head % arguments.heads, index), packed,
                      scratch);
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
