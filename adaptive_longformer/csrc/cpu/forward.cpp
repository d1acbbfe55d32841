// Block-sparse attention, forward: one task per query block, online softmax in base 2, all sums in float32.
#include "matmul.h"
#include "problem.h"
#include "threads.h"

namespace adaptive {
namespace {

// What one thread needs for one query block; kept between calls.
struct Scratch {
  Buffer<float> query, query_transposed, scores, sum;
  Buffer<float> maximum, total, decay;
  Buffer<int32_t> row_words;

  explicit Scratch(const Problem& problem) { reserve(problem); }
  void reserve(const Problem& problem) {
    query.reserve((int64_t)problem.query_block * problem.padded_dim);
    query_transposed.reserve((int64_t)problem.head_dim * problem.lanes);
    sum.reserve((int64_t)problem.query_block * problem.padded_dim);
    scores.reserve((int64_t)problem.tile_entries * problem.key_block * problem.lanes);
    for (Buffer<float>* column : {&maximum, &total, &decay}) column->reserve(problem.lanes);
    row_words.reserve(problem.lanes);
  }
};

// Turns the scores of a tile into weights relative to the running maximum of the query, which may rise: then what was
// summed is scaled.
template <bool HAS_DROPOUT>
void softmax(const Problem& problem, const QueryBlock& query, const Tile& tile, Scratch& scratch) {
  const int lanes = problem.lanes, key_block = problem.key_block;
  Ints has_risen = {};
  for (int i = 0; i < round_up(query.rows, WIDTH); i += WIDTH) {
    const Floats old_peak = load<Floats>(scratch.maximum.data() + i);
    Floats peak = old_peak;
    const float* scores = scratch.scores.data() + i;
    for (int part = 0; part < tile.count; part++) {
      Floats first = load<Floats>(scores), second = first;
      int key = 0;
      for (; key + 2 <= key_block; key += 2, scores += 2 * lanes) {
        first = maximum(first, load<Floats>(scores));
        second = maximum(second, load<Floats>(scores + lanes));
      }
      for (; key < key_block; key++, scores += lanes) first = maximum(first, load<Floats>(scores));
      peak = maximum(peak, maximum(first, second) + tile.entries[part].bias);
    }
    const Floats safe_peak = peak == -INFINITE ? Floats{} : peak;
    const Ints row_words = HAS_DROPOUT ? load<Ints>(scratch.row_words.data() + i) : Ints{};
    Floats total = {};
    float* weights = scratch.scores.data() + i;
    for (int part = 0; part < tile.count; part++) {
      const Floats shift = safe_peak - tile.entries[part].bias;
      const int32_t* key_words = problem.key_words(query, tile.entries[part]);
      for (int key = 0; key < key_block; key++, weights += lanes) {
        Floats weight = exp2_approximately(load<Floats>(weights) - shift);
        total += weight;
        if (HAS_DROPOUT) weight = zero_unless(problem.kept(key_words[key], row_words), weight);
        store(weights, weight);
      }
    }
    const Floats decay = exp2_approximately(old_peak - safe_peak);
    store(scratch.maximum.data() + i, peak);
    store(scratch.decay.data() + i, decay);
    store(scratch.total.data() + i, load<Floats>(scratch.total.data() + i) * decay + total);
    has_risen |= decay != 1.0f;
  }
  if (!any(has_risen)) return;
  for (int i = 0; i < query.rows; i++) {
    const float decay = scratch.decay.data()[i];
    if (decay == 1.0f) continue;
    float* sum = scratch.sum.data() + (int64_t)i * problem.padded_dim;
    for (int j = 0; j < problem.padded_dim; j += WIDTH) store(sum + j, load<Floats>(sum + j) * decay);
  }
}

void attend(const Problem& problem, const QueryBlock& query, const float* keys, const float* values, Scratch& scratch) {
  const Arguments& arguments = problem.arguments;
  const int lanes = problem.lanes, width = problem.padded_dim, used_lanes = round_up(query.rows, WIDTH);
  const int64_t part_size = (int64_t)problem.key_block * lanes, block_size = (int64_t)problem.key_block * width;
  problem.pack_rows(arguments.query, query, (float)arguments.scale * LOG2_E, scratch.query.data());
  problem.transpose_rows(scratch.query.data(), query, scratch.query_transposed.data());
  std::fill_n(scratch.sum.data(), (int64_t)query.rows * width, 0.0f);
  std::fill_n(scratch.maximum.data(), lanes, -INFINITE);
  std::fill_n(scratch.total.data(), lanes, 0.0f);
  if (arguments.dropout_p > 0) problem.load_row_words(query, scratch.row_words.data());
  const float* const queries = scratch.query_transposed.data();
  const float* tile_values[MAX_TILE_ENTRIES];
  Tile tile;
  for (int index = 0; problem.next_tile(query, index, tile);) {
    for (int part = 0; part < tile.count; part++) {
      const Entry& entry = tile.entries[part];
      float* scores = scratch.scores.data() + part * part_size;
      multiply<false, false>(keys + entry.block * block_size, width, {&queries, 1, problem.head_dim, lanes}, scores,
                             lanes, problem.key_block, used_lanes);
      if (entry.is_masked || entry.has_span) problem.mask(scores, query, entry);
      tile_values[part] = values + entry.block * block_size;
    }
    if (arguments.dropout_p > 0)
      softmax<true>(problem, query, tile, scratch);
    else
      softmax<false>(problem, query, tile, scratch);
    multiply<true, true>(scratch.scores.data(), lanes, {tile_values, tile.count, problem.key_block, width},
                         scratch.sum.data(), width, query.rows, width);
  }
  for (int i = 0; i < query.rows; i++) {
    const float total = scratch.total.data()[i];
    const float factor = total == 0.0f ? 0.0f : 1.0f / (total * (float)(1.0 - arguments.dropout_p));
    store_row(arguments.output, row_offset(arguments.output, query.batch, query.head, query.start + i),
              scratch.sum.data() + (int64_t)i * width, problem.head_dim, factor, arguments.element_type);
    arguments.lse[problem.row(query) + i] =
        total == 0.0f ? -INFINITE : scratch.maximum.data()[i] * LN_2 + std::log(total);
  }
}

void forward(const Arguments& arguments) {
  const Problem problem(arguments);
  const int64_t num_heads = arguments.batch * arguments.heads, num_threads = arguments.num_threads;
  const int64_t block_size = (int64_t)problem.key_block * problem.padded_dim;
  const int64_t packed_size = problem.num_blocks * block_size;
  // As many heads at a time as there are threads: bounds the memory of the packed keys.
  const int64_t group = std::min(num_heads, num_threads);
  const Buffer<float> keys(group * packed_size), values(group * packed_size);
  for (int64_t first = 0; first < num_heads; first += group) {
    const int64_t members = std::min(group, num_heads - first);
    parallel_tasks(members * problem.num_blocks, num_threads, [&](int64_t task) {
      const int64_t head = first + task / problem.num_blocks;
      const int block = (int)(task % problem.num_blocks);
      for (const auto& [source, packed] : {std::pair(&arguments.key, &keys), std::pair(&arguments.value, &values)})
        problem.pack_block(*source, head / arguments.heads, head % arguments.heads, block,
                           packed->data() + task * block_size);
    });
    parallel_tasks(members * arguments.num_query_blocks, num_threads, [&](int64_t task) {
      static thread_local Scratch scratch(problem);
      scratch.reserve(problem);
      const int64_t member = task / arguments.num_query_blocks, head = first + member;
      attend(problem,
             problem.query_block_at(head / arguments.heads, head % arguments.heads, task % arguments.num_query_blocks),
             keys.data() + member * packed_size, values.data() + member * packed_size, scratch);
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
