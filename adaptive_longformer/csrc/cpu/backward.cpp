// Block-sparse attention, backward: the five matrix products of a tile run once, from the forward lists. One task walks
// all bundles of query blocks of a head (or of a segment, when there are few heads) and adds up its own
// gradients of keys and values, so that nothing is shared and every sum has a fixed order.
#include "bundle.h"
#include "matmul.h"
#include "threads.h"

namespace adaptive {
namespace {

// So many threads find work in one head.
constexpr int64_t MOST_SHARED = 16;

// The packed keys and values of one head, and where their gradients are summed.
struct PackedHead {
  const float *keys, *values;
  float *grad_keys, *grad_values;
};

// What one thread needs for one bundle; kept between calls.
struct Scratch {
  Bundle bundle;
  Buffer<float> query, query_transposed, grad_output, grad_output_transposed, grad_query, weights, grad_scores;
  Buffer<float> lse, delta;
  Buffer<int32_t> row_words;

  void reserve(const Problem& problem) {
    const int64_t lanes = Bundle::most_lanes(problem);
    for (Buffer<float>* rows : {&query, &query_transposed, &grad_output, &grad_output_transposed, &grad_query})
      rows->reserve(lanes * problem.padded_dim);
    for (Buffer<float>* tile : {&weights, &grad_scores}) tile->reserve(Bundle::most_scores(problem));
    for (Buffer<float>* column : {&lse, &delta}) column->reserve(lanes);
    row_words.reserve(lanes);
  }
};

// Reads the bundle: scaled queries, output gradients, LSE in base 2, and delta = sum(grad_output * output) - grad_lse.
void load_queries(const Problem& problem, Scratch& scratch) {
  const Arguments& arguments = problem.arguments;
  const Bundle& bundle = scratch.bundle;
  const int width = problem.padded_dim;
  bundle.pack_rows(arguments.query, (float)arguments.scale * LOG2_E, scratch.query.data());
  bundle.pack_rows(arguments.grad_output, 1.0f, scratch.grad_output.data());
  bundle.pack_rows(arguments.output, 1.0f, scratch.grad_query.data());
  // All weights of a dead lane are zero.
  std::fill_n(scratch.lse.data(), bundle.lanes, INFINITE);
  std::fill_n(scratch.delta.data(), bundle.lanes, 0.0f);
  bundle.each_query([&](int lane, int row) {
    float* query_row = scratch.query.data() + (int64_t)lane * width;
    float* grad_row = scratch.grad_output.data() + (int64_t)lane * width;
    float* output_row = scratch.grad_query.data() + (int64_t)lane * width;
    const float lse = arguments.lse[bundle.row(0) + row];
    const bool is_padding = arguments.is_padding != nullptr &&
                            arguments.is_padding[bundle.batch * arguments.length + bundle.start(0) + row];
    // So are those of a row that sees nothing, or of garbage in a padded slot.
    if (lse == -INFINITE || (is_padding && lse != lse)) {
      std::fill_n(query_row, width, 0.0f);
      std::fill_n(grad_row, width, 0.0f);
      return;
    }
    Floats sum = {};
    for (int j = 0; j < width; j += WIDTH) sum += load<Floats>(grad_row + j) * load<Floats>(output_row + j);
    scratch.lse.data()[lane] = lse * LOG2_E;
    scratch.delta.data()[lane] = horizontal_sum(sum) - arguments.grad_lse[bundle.row(0) + row];
  });
  bundle.transpose_rows(scratch.query.data(), scratch.query_transposed.data());
  bundle.transpose_rows(scratch.grad_output.data(), scratch.grad_output_transposed.data());
  std::fill_n(scratch.grad_query.data(), (int64_t)bundle.lanes * width, 0.0f);
  if (arguments.dropout_p > 0) bundle.load_row_words(scratch.row_words.data());
}

// Turns the scores of an entry into weights (with dropout) and gradients of weights into gradients of scores, in place.
// Writes the gradients of the members' biases and adds those of their spans.
template <bool HAS_DROPOUT>
void differentiate_entry(const Problem& problem, const Tile& tile, const Entry& entry, float* weights,
                         float* grad_scores, float* grad_spans, const Scratch& scratch) {
  const Arguments& arguments = problem.arguments;
  const Bundle& bundle = scratch.bundle;
  const int32_t* key_positions = problem.key_positions(bundle.batch, entry.block);
  const int32_t* key_words = problem.key_words(bundle.batch, entry.block);
  const float keep_factor = (float)(1.0 / (1.0 - arguments.dropout_p));
  const bool wants_span = entry.has_span && arguments.grad_span != nullptr;
  const bool wants_bias = !entry.is_window && arguments.grad_entry_bias != nullptr;
  for (int member = 0; member < entry.num_members; member++) {
    const float bias = bundle.bias(entry, member);
    Floats total = {}, span_total = {};
    for (int i = bundle.first_lane(member); i < std::min(bundle.first_lane(member + 1), tile.lanes); i += WIDTH) {
      const int lane = tile.first_lane + i, query = bundle.position(lane);
      const Floats shift = load<Floats>(scratch.lse.data() + lane) - bias;
      const Floats delta = load<Floats>(scratch.delta.data() + lane);
      const Ints row_words = HAS_DROPOUT ? load<Ints>(scratch.row_words.data() + lane) : Ints{};
      for (int key = 0; key < problem.key_block; key++) {
        float* weight_row = weights + (int64_t)key * tile.lanes + i;
        float* grad_row = grad_scores + (int64_t)key * tile.lanes + i;
        const Floats weight = exp2_approximately(load<Floats>(weight_row) - shift);
        Floats applied = weight, grad = load<Floats>(grad_row);
        if (HAS_DROPOUT) {
          const Ints kept = problem.kept(key_words[key], row_words);
          applied = zero_unless(kept, weight) * keep_factor;
          grad = zero_unless(kept, grad) * keep_factor;
        }
        grad = weight * (grad - delta);
        total += grad;
        if (wants_span && key_positions[key] != HIDDEN)
          span_total += grad * load<Floats>(problem.span_slope(bundle.head, key_positions[key], query));
        store(weight_row, applied);
        store(grad_row, grad);
      }
    }
    if (wants_bias && entry.places[member] != NO_PLACE)
      arguments.grad_entry_bias[bundle.list(entry.first_member + member) * arguments.max_entries +
                                entry.places[member]] = horizontal_sum(total);
    if (wants_span) grad_spans[entry.first_member + member] += horizontal_sum(span_total);
  }
}

// Adds the gradients of one bundle; writes its own.
void differentiate(const Problem& problem, const PackedHead& packed, Scratch& scratch) {
  const Arguments& arguments = problem.arguments;
  const Bundle& bundle = scratch.bundle;
  const int width = problem.padded_dim, key_block = problem.key_block;
  const int64_t block_size = (int64_t)key_block * width;
  load_queries(problem, scratch);
  float grad_spans[MAX_MEMBERS] = {};
  const float* tile_keys[MAX_TILE_ENTRIES];
  Tile tile;
  for (int index = 0; bundle.next_tile(index, tile);) {
    const int lanes = tile.lanes;
    const int64_t first_row = (int64_t)tile.first_lane * width;
    const float* const queries = scratch.query.data() + first_row;
    const float* const grad_outputs = scratch.grad_output.data() + first_row;
    const float* const queries_transposed = scratch.query_transposed.data() + tile.first_lane;
    const float* const grad_outputs_transposed = scratch.grad_output_transposed.data() + tile.first_lane;
    for (int part = 0; part < tile.count; part++) {
      const Entry& entry = *tile.entries[part];
      const int64_t block = entry.block * block_size, next = tile.entries[part + 1]->block * block_size;
      const auto next_of = [&](const float* blocks) {
        return Fetch{blocks + next, blocks + next + block_size, blocks + next};
      };
      float* weights = scratch.weights.data() + (int64_t)part * key_block * lanes;
      float* grad_scores = scratch.grad_scores.data() + (int64_t)part * key_block * lanes;
      tile_keys[part] = packed.keys + block;
      multiply<false, false>(packed.keys + block, width, {&queries_transposed, 1, problem.head_dim, bundle.lanes},
                             weights, lanes, key_block, lanes, next_of(packed.keys));
      multiply<false, false>(packed.values + block, width,
                             {&grad_outputs_transposed, 1, problem.head_dim, bundle.lanes}, grad_scores, lanes,
                             key_block, lanes, next_of(packed.values));
      if (entry.is_masked || entry.has_span) bundle.mask(weights, tile, entry);
      if (arguments.dropout_p > 0)
        differentiate_entry<true>(problem, tile, entry, weights, grad_scores, grad_spans, scratch);
      else
        differentiate_entry<false>(problem, tile, entry, weights, grad_scores, grad_spans, scratch);
      multiply<false, true>(weights, lanes, {&grad_outputs, 1, lanes, width}, packed.grad_values + block, width,
                            key_block, width, next_of(packed.grad_values));
      multiply<false, true>(grad_scores, lanes, {&queries, 1, lanes, width}, packed.grad_keys + block, width, key_block,
                            width, next_of(packed.grad_keys));
    }
    multiply<true, true>(scratch.grad_scores.data(), lanes, {tile_keys, tile.count, key_block, width},
                         scratch.grad_query.data() + first_row, width, lanes, width, {queries, queries, queries});
  }
  bundle.store_rows(arguments.grad_query, scratch.grad_query.data(), [&](int) { return (float)arguments.scale; });
  if (arguments.grad_span != nullptr)
    for (int member = 0; member < bundle.num_members; member++)
      arguments.grad_span[bundle.list(member)] = grad_spans[member];
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
    if (position >= 0 && position < arguments.length)
      store_row(target, row_offset(target, batch, head, position), first + (int64_t)column * problem.padded_dim,
                problem.head_dim, factor, arguments.element_type);
  }
}

void backward(const Arguments& arguments) {
  const Problem problem(arguments);
  const int64_t num_heads = arguments.batch * arguments.heads, num_threads = arguments.num_threads;
  const int64_t block_size = (int64_t)problem.key_block * problem.padded_dim;
  const int64_t num_bundles = Bundle::count(problem), packed_size = problem.num_blocks * block_size;
  // Segments cost memory and an addition each: only where heads alone would leave threads idle, and however many there
  // are, so that sums do not depend on their number.
  const int64_t num_segments =
      std::clamp<int64_t>((MOST_SHARED + num_heads - 1) / num_heads, 1, std::max<int64_t>(num_bundles / 4, 1));
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
      static thread_local Scratch scratch;
      scratch.reserve(problem);
      const int64_t member = task / num_segments, segment = task % num_segments, head = first + member;
      const PackedHead packed = {keys.data() + member * packed_size, values.data() + member * packed_size,
                                 grad_keys.data() + task * packed_size, grad_values.data() + task * packed_size};
      std::fill_n(packed.grad_keys, packed_size, 0.0f);
      std::fill_n(packed.grad_values, packed_size, 0.0f);
      const int64_t end = (segment + 1) * num_bundles / num_segments;
      for (int64_t index = segment * num_bundles / num_segments; index < end; index++) {
        scratch.bundle.assign(problem, head / arguments.heads, head % arguments.heads, index);
        differentiate(problem, packed, scratch);
      }
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
