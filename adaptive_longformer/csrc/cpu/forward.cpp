// Block-sparse attention, forward: one task per query block, online softmax in base 2, all sums in float32.
#include "matmul.h"
#include "problem.h"
#include "threads.h"

namespace adaptive {
namespace {

// What one thread needs for one query block; kept between calls.
struct Scratch {
  Buffer<float> query, scores, sum;
  Buffer<float> row_max, row_total;

  explicit Scratch(const Problem& problem) { reserve(problem); }
  void reserve(const Problem& problem) {
    query.reserve((int64_t)problem.query_block * problem.padded_dim);
    sum.reserve((int64_t)problem.query_block * problem.padded_dim);
    scores.reserve((int64_t)problem.query_block * problem.padded_key_block);
    row_max.reserve(problem.query_block);
    row_total.reserve(problem.query_block);
  }
};

// Turns scores into weights relative to the running maximum of the row, which may rise: then what was summed is scaled.
template <bool HAS_DROPOUT>
void softmax_rows(const Problem& problem, const QueryBlock& query, const Tile& tile, Scratch& scratch) {
  const int columns = problem.padded_key_block;
  const int32_t* column_words = problem.column_words(query, tile);
  for (int i = 0; i < query.rows; i++) {
    float* scores = scratch.scores.data() + (int64_t)i * columns;
    if (tile.is_masked || tile.has_span) problem.mask_row(scores, query, tile, query.start + i);
    Floats maxima = load<Floats>(scores);
    for (int j = WIDTH; j < columns; j += WIDTH) maxima = maximum(maxima, load<Floats>(scores + j));
    float& row_max = scratch.row_max.data()[i];
    const float old_max = row_max;
    row_max = std::max(old_max, horizontal_maximum(maxima) + tile.bias);
    const float safe_max = row_max == -INFINITE ? 0.0f : row_max;
    const float shift = safe_max - tile.bias;
    const int32_t row_word = HAS_DROPOUT ? problem.arguments.row_words[problem.row(query) + i] : 0;
    Floats total = {};
    for (int j = 0; j < columns; j += WIDTH) {
      Floats weight = exp2_approximately(load<Floats>(scores + j) - shift);
      total += weight;
      if (HAS_DROPOUT) weight = zero_unless(problem.kept(column_words, j, row_word), weight);
      store(scores + j, weight);
    }
    const float decay = std::exp2(old_max - safe_max);
    scratch.row_total.data()[i] = scratch.row_total.data()[i] * decay + horizontal_sum(total);
    if (decay != 1.0f) {
      float* sum = scratch.sum.data() + (int64_t)i * problem.padded_dim;
      for (int j = 0; j < problem.padded_dim; j += WIDTH) store(sum + j, load<Floats>(sum + j) * decay);
    }
  }
}

void attend(const Problem& problem, const QueryBlock& query, const float* keys_transposed, const float* values,
            Scratch& scratch) {
  const Arguments& arguments = problem.arguments;
  const int columns = problem.padded_key_block, width = problem.padded_dim;
  problem.pack_rows(arguments.query, query, (float)arguments.scale * LOG2_E, scratch.query.data());
  std::fill_n(scratch.sum.data(), (int64_t)query.rows * width, 0.0f);
  std::fill_n(scratch.row_max.data(), query.rows, -INFINITE);
  std::fill_n(scratch.row_total.data(), query.rows, 0.0f);
  const int num_tiles = problem.num_tiles(query);
  for (int index = 0; index < num_tiles; index++) {
    const Tile tile = problem.tile(query, index);
    if (tile.is_skipped) continue;
    multiply<false, false>(scratch.query.data(), width,
                           keys_transposed + (int64_t)tile.block * problem.head_dim * columns, columns,
                           scratch.scores.data(), columns, query.rows, columns, problem.head_dim);
    if (arguments.dropout_p > 0)
      softmax_rows<true>(problem, query, tile, scratch);
    else
      softmax_rows<false>(problem, query, tile, scratch);
    multiply<false, true>(scratch.scores.data(), columns, values + (int64_t)tile.block * problem.key_block * width,
                          width, scratch.sum.data(), width, query.rows, width, problem.key_block);
  }
  for (int i = 0; i < query.rows; i++) {
    const float total = scratch.row_total.data()[i];
    const float factor = total == 0.0f ? 0.0f : 1.0f / (total * (float)(1.0 - arguments.dropout_p));
    store_row(arguments.output, row_offset(arguments.output, query.batch, query.head, query.start + i),
              scratch.sum.data() + (int64_t)i * width, problem.head_dim, factor, arguments.element_type);
    arguments.lse[problem.row(query) + i] =
        total == 0.0f ? -INFINITE : scratch.row_max.data()[i] * LN_2 + std::log(total);
  }
}

void forward(const Arguments& arguments) {
  const Problem problem(arguments);
  const int64_t num_heads = arguments.batch * arguments.heads, num_threads = arguments.num_threads;
  const int64_t transposed_size = (int64_t)problem.num_blocks * problem.head_dim * problem.padded_key_block;
  const int64_t packed_size = (int64_t)problem.num_blocks * problem.key_block * problem.padded_dim;
  // As many heads at a time as there are threads: bounds the memory of the packed keys.
  const int64_t group = std::min(num_heads, num_threads);
  const Buffer<float> keys_transposed(group * transposed_size), values(group * packed_size);
  for (int64_t first = 0; first < num_heads; first += group) {
    const int64_t members = std::min(group, num_heads - first);
    parallel_tasks(members * problem.num_blocks, num_threads, [&](int64_t task) {
      const int64_t member = task / problem.num_blocks, head = first + member;
      const int block = (int)(task % problem.num_blocks);
      problem.pack_block(arguments.key, head / arguments.heads, head % arguments.heads, block, nullptr,
                         keys_transposed.data() + member * transposed_size +
                             (int64_t)block * problem.head_dim * problem.padded_key_block);
      problem.pack_block(
          arguments.value, head / arguments.heads, head % arguments.heads, block,
          values.data() + member * packed_size + (int64_t)block * problem.key_block * problem.padded_dim, nullptr);
    });
    parallel_tasks(members * arguments.num_query_blocks, num_threads, [&](int64_t task) {
      static thread_local Scratch scratch(problem);
      scratch.reserve(problem);
      const int64_t member = task / arguments.num_query_blocks, head = first + member;
      attend(problem,
             problem.query_block_at(head / arguments.heads, head % arguments.heads, task % arguments.num_query_blocks),
             keys_transposed.data() + member * transposed_size, values.data() + member * packed_size, scratch);
    });
  }
}

}  // namespace
}  // namespace adaptive

extern "C" int32_t adaptive_attention_forward(const adaptive::Arguments* arguments) {
  if (!adaptive::lists_are_valid(*arguments)) return adaptive::BAD_LISTS;
  try {
    adaptive::forward(*arguments);
  } catch (const std::bad_alloc&) {
    return adaptive::OUT_OF_MEMORY;
  }
  return adaptive::DONE;
}

extern "C" int64_t adaptive_attention_arguments_size() { return sizeof(adaptive::Arguments); }
