// Block-sparse attention, forward: one task per bundle of query blocks, online softmax in base 2, all sums in float32.
#include "bundle.h"
#include "matmul.h"
#include "threads.h"

namespace adaptive {
namespace {

// What one thread needs for one bundle; kept between calls.
struct Scratch {
  Bundle bundle;
  Buffer<float> query, query_transposed, scores, sum;
  Buffer<float> maximum, total, decay;
  Buffer<int32_t> row_words;

  void reserve(const Problem& problem) {
    const int64_t lanes = Bundle::most_lanes(problem);
    for (Buffer<float>* rows : {&query, &query_transposed, &sum}) rows->reserve(lanes * problem.padded_dim);
    scores.reserve(Bundle::most_scores(problem));
    for (Buffer<float>* column : {&maximum, &total, &decay}) column->reserve(lanes);
    row_words.reserve(lanes);
  }
};

// Turns the scores of a tile into weights relative to the running maximum of the query, which may rise: then what was
// summed is scaled. One member after the other.
template <bool HAS_DROPOUT>
void softmax(const Problem& problem, const Tile& tile, Scratch& scratch) {
  const Bundle& bundle = scratch.bundle;
  const int key_block = problem.key_block, stride = tile.lanes;
  Ints has_risen = {};
  float bias[MAX_TILE_ENTRIES];
  for (int i = 0, member = -1; i < tile.lanes; i += WIDTH) {
    if (i == bundle.first_lane(member + 1)) {
      member++;
      for (int part = 0; part < tile.count; part++) bias[part] = bundle.bias(*tile.entries[part], member);
    }
    const int lane = tile.first_lane + i;
    const Floats old_peak = load<Floats>(scratch.maximum.data() + lane);
    Floats peak = old_peak;
    const float* scores = scratch.scores.data() + i;
    for (int part = 0; part < tile.count; part++) {
      Floats first = load<Floats>(scores), second = first;
      int key = 0;
      for (; key + 2 <= key_block; key += 2, scores += 2 * stride) {
        first = maximum(first, load<Floats>(scores));
        second = maximum(second, load<Floats>(scores + stride));
      }
      for (; key < key_block; key++, scores += stride) first = maximum(first, load<Floats>(scores));
      peak = maximum(peak, maximum(first, second) + bias[part]);
    }
    const Floats safe_peak = peak == -INFINITE ? Floats{} : peak;
    const Ints row_words = HAS_DROPOUT ? load<Ints>(scratch.row_words.data() + lane) : Ints{};
    Floats total = {};
    float* weights = scratch.scores.data() + i;
    for (int part = 0; part < tile.count; part++) {
      const Floats shift = safe_peak - bias[part];
      const int32_t* key_words = problem.key_words(bundle.batch, tile.entries[part]->block);
      for (int key = 0; key < key_block; key++, weights += stride) {
        Floats weight = exp2_approximately(load<Floats>(weights) - shift);
        total += weight;
        if (HAS_DROPOUT) weight = zero_unless(problem.kept(key_words[key], row_words), weight);
        store(weights, weight);
      }
    }
    const Floats decay = exp2_approximately(old_peak - safe_peak);
    store(scratch.maximum.data() + lane, peak);
    store(scratch.decay.data() + lane, decay);
    store(scratch.total.data() + lane, load<Floats>(scratch.total.data() + lane) * decay + total);
    has_risen |= decay != 1.0f;
  }
  if (!any(has_risen)) return;
  for (int lane = tile.first_lane; lane < tile.first_lane + tile.lanes; lane++) {
    const float decay = scratch.decay.data()[lane];
    if (decay == 1.0f) continue;
    float* sum = scratch.sum.data() + (int64_t)lane * problem.padded_dim;
    for (int j = 0; j < problem.padded_dim; j += WIDTH) store(sum + j, load<Floats>(sum + j) * decay);
  }
}

void attend(const Problem& problem, const float* keys, const float* values, Scratch& scratch) {
  const Arguments& arguments = problem.arguments;
  const Bundle& bundle = scratch.bundle;
  const int width = problem.padded_dim;
  const int64_t block_size = (int64_t)problem.key_block * width;
  const bool has_dropout = arguments.dropout_p > 0;
  bundle.pack_rows(arguments.query, (float)arguments.scale * LOG2_E, scratch.query.data());
  bundle.transpose_rows(scratch.query.data(), scratch.query_transposed.data());
  std::fill_n(scratch.sum.data(), (int64_t)bundle.lanes * width, 0.0f);
  std::fill_n(scratch.maximum.data(), bundle.lanes, -INFINITE);
  std::fill_n(scratch.total.data(), bundle.lanes, 0.0f);
  if (has_dropout) bundle.load_row_words(scratch.row_words.data());
  const float* tile_values[MAX_TILE_ENTRIES];
  Tile tile;
  for (int index = 0; bundle.next_tile(index, tile);) {
    const float* const queries = scratch.query_transposed.data() + tile.first_lane;
    for (int part = 0; part < tile.count; part++) {
      const Entry& entry = *tile.entries[part];
      const float* next = keys + tile.entries[part + 1]->block * block_size;
      float* scores = scratch.scores.data() + (int64_t)part * problem.key_block * tile.lanes;
      tile_values[part] = values + entry.block * block_size;
      multiply<false, false, true>(keys + entry.block * block_size, width,
                                   {&queries, 1, problem.head_dim, bundle.lanes}, scores, tile.lanes,
                                   problem.key_block, tile.lanes, {next, next + block_size, tile_values[part]});
      if (entry.is_masked || entry.has_span) bundle.mask(scores, tile, entry);
    }
    if (has_dropout)
      softmax<true>(problem, tile, scratch);
    else
      softmax<false>(problem, tile, scratch);
    const float* next = values + tile.entries[tile.count]->block * block_size;
    multiply<true, true>(scratch.scores.data(), tile.lanes, {tile_values, tile.count, problem.key_block, width},
                         scratch.sum.data() + (int64_t)tile.first_lane * width, width, tile.lanes, width,
                         {next, next + block_size, next});
  }
  bundle.store_rows(arguments.output, scratch.sum.data(), [&](int lane) {
    const float total = scratch.total.data()[lane];
    return total == 0.0f ? 0.0f : 1.0f / (total * (float)(1.0 - arguments.dropout_p));
  });
  bundle.each_query([&](int lane, int row) {
    const float total = scratch.total.data()[lane];
    arguments.lse[bundle.row(0) + row] =
        total == 0.0f ? -INFINITE : scratch.maximum.data()[lane] * LN_2 + std::log(total);
  });
}

void forward(const Arguments& arguments) {
  const Problem problem(arguments);
  const int64_t num_heads = arguments.batch * arguments.heads, num_threads = arguments.num_threads;
  const int64_t block_size = (int64_t)problem.key_block * problem.padded_dim;
  const int64_t num_bundles = Bundle::count(problem), packed_size = problem.num_blocks * block_size;
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
    parallel_tasks(members * num_bundles, num_threads, [&](int64_t task) {
      static thread_local Scratch scratch;
      scratch.reserve(problem);
      const int64_t member = task / num_bundles, head = first + member;
      scratch.bundle.assign(problem, head / arguments.heads, head % arguments.heads, task % num_bundles);
      attend(problem, keys.data() + member * packed_size, values.data() + member * packed_size, scratch);
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
