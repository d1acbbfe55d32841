// Backward pass without atomic operations, so that every sum has a fixed order: row_sums, then the gradients of keys and
// values over the transposed lists, the sum of their parts where a column was split, and the gradient of queries (with
// those of the entry bias and of the adaptive span) over the forward lists.
#pragma once

#include "tile.cuh"

namespace adaptive {

// Columns of scores that are in registers at a time: as many as leave room for the sums.
template <int D>
constexpr int CHUNK_COLUMNS = D <= 64 ? 32 : 16;

// A warp has 16 query rows, a thread block 64: row_lse, row_delta and row_used, also for the rows behind the end of the
// sequence.
constexpr int ROW_SUM_WARPS = 4, ROW_SUM_ROWS = 16;

template <int TYPE>
KERNEL(ROW_SUM_WARPS * 32, 1) row_sums_kernel(const Arguments arguments) {
  const int lane = (int)threadIdx.x % 32, warp = (int)blockIdx.x * ROW_SUM_WARPS + (int)threadIdx.x / 32;
  const int batch = blockIdx.z, head = blockIdx.y;
  const long long head_row = (long long)batch * arguments.heads + head;
  const long long first_target = head_row * arguments.num_query_blocks * arguments.query_block_size + warp * ROW_SUM_ROWS;
  Word used = 0;
  UNROLL_BY(4) for (int i = 0; i < ROW_SUM_ROWS; i++) {
    const int query = warp * ROW_SUM_ROWS + i;
    float lse = -infinity(), delta = 0.0f;
    if (query < arguments.length) {
      const long long row = head_row * arguments.length + query;
      lse = arguments.lse[row];
      const Half* output = row_at(arguments.output, batch, head, query);
      const Half* grad = row_at(arguments.grad_output, batch, head, query);
      for (int k = lane; k < arguments.head_dim; k += 32) delta += unpack<TYPE>(output[k]) * unpack<TYPE>(grad[k]);
      UNROLL for (int distance = 16; distance > 0; distance /= 2) delta += shuffle_xor(delta, distance);
      delta -= arguments.grad_lse[row];
      // Garbage in a padded slot has no weights, as a row that sees nothing.
      const bool is_padding =
          arguments.is_padding != nullptr && arguments.is_padding[(long long)batch * arguments.length + query];
      if (is_padding && lse != lse) lse = -infinity();
    }
    const bool is_empty = lse == -infinity();
    used |= (Word)!is_empty << i;
    if (lane == 0) {
      arguments.row_lse[first_target + i] = is_empty ? infinity() : lse * LOG2_E;
      arguments.row_delta[first_target + i] = is_empty ? 0.0f : delta;
    }
  }
  if (lane == 0) ((unsigned short*)arguments.row_used)[first_target / ROW_SUM_ROWS] = (unsigned short)used;
}

// Shared memory of grad_keys_kernel: a block of keys and of values, two stages of 64 queries and output gradients with
// their row_lse and row_delta, the steps.
constexpr int QUERY_PART = 64;

template <int D>
constexpr int grad_keys_shared_memory() {
  return (2 * KEY_BLOCK + 4 * QUERY_PART) * D * (int)sizeof(Half) + 4 * QUERY_PART * (int)sizeof(float) +
         STEP_ROOM * (int)sizeof(Step);
}

// A thread block adds up one item: a block of keys, and up to a fixed number of the entries that read it. Scores are
// computed as keys x queries, so that weights and gradients of scores are in place for the second product.
template <int TYPE, int D, int QUERY_BLOCK>
KERNEL(128, D <= 32 ? 3 : 2) grad_keys_kernel(const Arguments arguments) {
  constexpr int CHUNK = CHUNK_COLUMNS<D>, PARTS = QUERY_BLOCK / QUERY_PART;
  SHARED_MEMORY(shared);
  Half* key_tile = (Half*)shared;
  Half* value_tile = key_tile + KEY_BLOCK * D;
  Half* query_tiles = value_tile + KEY_BLOCK * D;
  Half* grad_tiles = query_tiles + 2 * QUERY_PART * D;
  float* row_values = (float*)(grad_tiles + 2 * QUERY_PART * D);
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  const int item = blockIdx.x, column_of_item = arguments.item_column[item];
  if (column_of_item < 0) return;
  const int block = column_of_item % arguments.num_blocks, list_row = column_of_item / arguments.num_blocks;
  const int padded_length = arguments.num_query_blocks * QUERY_BLOCK;
  // Any list of the row gives batch and head.
  const Place row_place(arguments, list_row * arguments.num_query_blocks, blockIdx.y, blockIdx.z);
  const KeyBlock keys(arguments, row_place.batch, block);
  const long long head_row = (long long)row_place.batch * arguments.heads + row_place.head;
  const float* row_lse = arguments.row_lse + head_row * padded_length;
  const float* row_delta = arguments.row_delta + head_row * padded_length;
  const Bits* row_used = arguments.row_used + head_row * (padded_length / QUERY_PART);

  load_keys_and_values<D, 128>(key_tile, value_tile, arguments, row_place, keys);
  commit_copies();

  // A candidate for every part of the queries of every entry.
  Steps<false> steps{(Step*)(row_values + 4 * QUERY_PART), nullptr, arguments.item_first[item] * PARTS};
  const auto end = [&] { return arguments.item_last[item] * PARTS; };
  const auto find_step = [&](int candidate, Step& step) {
    const int query_block = arguments.transposed_query_blocks[candidate / PARTS];
    const int part = query_block * PARTS + candidate % PARTS, first_query = part * QUERY_PART;
    const Place place = row_place.with_query_block(query_block);
    const bool is_visible = step.set(arguments, place, first_query, QUERY_PART,
                                     arguments.transposed_entries[candidate / PARTS], keys, part);
    step.open = row_used[part];
    return is_visible && step.open != 0;
  };
  const auto load_step = [&](int index) {
    const int stage = index % 2, first_query = steps[index].tile() * QUERY_PART;
    load_queries_and_grads<D, QUERY_PART, 128>(query_tiles + stage * QUERY_PART * D, grad_tiles + stage * QUERY_PART * D,
                                               arguments, row_place, first_query, &steps[index].open);
    float* rows = row_values + stage * 2 * QUERY_PART;
    const int i = (int)threadIdx.x % (QUERY_PART / 4) * 4;
    if (threadIdx.x < QUERY_PART / 4)
      copy_async(rows + i, row_lse + first_query + i, true);
    else if (threadIdx.x < QUERY_PART / 2)
      copy_async(rows + QUERY_PART + i, row_delta + first_query + i, true);
  };

  steps.look_ahead(0, end, find_step);
  synchronize_block();
  if (steps.found > 0) load_step(0);
  commit_copies();

  float key_sum[D / 8][4], value_sum[D / 8][4];
  set_zero(key_sum);
  set_zero(value_sum);
  // The thread's keys are those of its rows; computed where they are needed, since registers are scarce.
  const auto key_column = [&](int h) { return warp * 16 + fragment_row(lane, 2 * h); };
  const auto key_position = [&](int h) { return keys.is_open(key_column(h)) ? keys.position(key_column(h)) : 0; };

  for (int index = 0; index < steps.found; index++) {
    if (index + 1 < steps.found) load_step(index + 1);
    commit_copies();
    wait_for_copies<1>();
    synchronize_block();
    steps.look_ahead(index, end, find_step);
    const Step& step = steps[index];
    const int stage = index % 2, first_query = step.tile() * QUERY_PART;
    NO_UNROLL for (int start = 0; start < QUERY_PART; start += CHUNK) {
      const Half* query_tile = query_tiles + (stage * QUERY_PART + start) * D;
      const Half* grad_tile = grad_tiles + (stage * QUERY_PART + start) * D;
      const float* rows = row_values + stage * 2 * QUERY_PART + start;
      float weights[CHUNK / 8][4], grads[CHUNK / 8][4];
      set_zero(weights);
      set_zero(grads);
      multiply_transposed<TYPE, D, CHUNK>(weights, key_tile, query_tile, grads, value_tile, grad_tile, warp * 16, lane);
      const float scale = arguments.scale * LOG2_E;
      if (step.is(Step::SPANNED)) {
        const float unscale = 1.0f / scale;
        UNROLL for (int n = 0; n < CHUNK / 8; n++)
          UNROLL for (int j = 0; j < 4; j++)
            weights[n][j] +=
                span_log2(span_weight(arguments, row_place.head,
                                      key_position(j / 2) - (first_query + start + fragment_column(lane, n, j)))) *
                unscale;
      }
      if (step.is(Step::MASKED)) {
        Bits visible[2];
        UNROLL for (int h = 0; h < 2; h++)
          visible[h] =
              keys.is_open(key_column(h)) ? step.visible_queries(arguments, key_position(h), first_query) : 0;
        hide(weights, visible, start, lane);
      }
      UNROLL for (int n = 0; n < CHUNK / 8; n++)
        UNROLL for (int j = 0; j < 4; j++)
          weights[n][j] = power_of_two(weights[n][j] * scale + (step.bias - rows[fragment_column(lane, n, j)]));
      if (!arguments.has_dropout) {
        UNROLL for (int n = 0; n < CHUNK / 8; n++)
          UNROLL for (int j = 0; j < 4; j++)
            grads[n][j] = weights[n][j] * (grads[n][j] - rows[QUERY_PART + fragment_column(lane, n, j)]);
      } else {
        const int column_word[2] = {arguments.column_words[key_position(0)], arguments.column_words[key_position(1)]};
        UNROLL for (int n = 0; n < CHUNK / 8; n++) {
          UNROLL for (int side = 0; side < 2; side++) {
            const int row = fragment_column(lane, n, side), query = first_query + start + row;
            // Rows behind the end have no word, and no weight either.
            const int row_word =
                query < arguments.length ? arguments.row_words[head_row * arguments.length + query] : 0;
            UNROLL for (int h = 0; h < 2; h++) {
              const int j = 2 * h + side;
              const float factor = is_kept(arguments, row_word, column_word[h]) ? arguments.keep_factor : 0.0f;
              grads[n][j] = weights[n][j] * (grads[n][j] * factor - rows[QUERY_PART + row]);
              weights[n][j] *= factor;
            }
          }
        }
      }
      multiply_registers<TYPE, D, CHUNK>(value_sum, weights, grad_tile, lane);
      multiply_registers<TYPE, D, CHUNK>(key_sum, grads, query_tile, lane);
    }
    synchronize_block();
  }
  // Where there was no step, the first copies may still be under way.
  wait_for_copies<0>();

  const int slot = arguments.item_slot[item];
  UNROLL for (int h = 0; h < 2; h++) {
    const int column = key_column(h), position = key_position(h);
    if (slot >= 0) {
      const long long part =
          ((((long long)blockIdx.y * gridDim.z + blockIdx.z) * arguments.num_slots + slot) * KEY_BLOCK + column) * D;
      UNROLL for (int n = 0; n < D / 8; n++) {
        UNROLL for (int side = 0; side < 2; side++) {
          const int i = fragment_column(lane, n, side);
          arguments.partial_keys[part + i] = key_sum[n][2 * h + side];
          arguments.partial_values[part + i] = value_sum[n][2 * h + side];
        }
      }
    } else if (keys.is_open(column)) {
      store_row_half<TYPE, D>((Half*)row_at(arguments.grad_key, row_place.batch, row_place.head, position), key_sum,
                              h, arguments.scale, lane);
      store_row_half<TYPE, D>((Half*)row_at(arguments.grad_value, row_place.batch, row_place.head, position),
                              value_sum, h, 1.0f, lane);
    }
  }
}

// Adds the parts of a column that was split, in their order.
template <int TYPE>
KERNEL(128, 1) add_parts_kernel(const Arguments arguments) {
  const int column_of_lists = blockIdx.x, slots = arguments.column_slots[column_of_lists];
  if (slots == 0) return;
  const Place place(arguments, column_of_lists / arguments.num_blocks * arguments.num_query_blocks, blockIdx.y,
                    blockIdx.z);
  const KeyBlock keys(arguments, place.batch, column_of_lists % arguments.num_blocks);
  const int size = KEY_BLOCK * arguments.head_dim;
  const long long first =
      (((long long)blockIdx.y * gridDim.z + blockIdx.z) * arguments.num_slots +
       arguments.column_first_slot[column_of_lists]) *
      size;
  for (int i = (int)threadIdx.x * 2; i < size; i += 128 * 2) {
    const int column = i / arguments.head_dim, element = i % arguments.head_dim;
    if (!keys.is_open(column)) continue;
    float key_sum[2] = {0.0f, 0.0f}, value_sum[2] = {0.0f, 0.0f};
    for (int slot = 0; slot < slots; slot++) {
      UNROLL for (int side = 0; side < 2; side++) {
        key_sum[side] += arguments.partial_keys[first + (long long)slot * size + i + side];
        value_sum[side] += arguments.partial_values[first + (long long)slot * size + i + side];
      }
    }
    const int position = keys.position(column);
    *(Word*)(row_at(arguments.grad_key, place.batch, place.head, position) + element) =
        pack<TYPE>(key_sum[0] * arguments.scale, key_sum[1] * arguments.scale);
    *(Word*)(row_at(arguments.grad_value, place.batch, place.head, position) + element) =
        pack<TYPE>(value_sum[0], value_sum[1]);
  }
}

// Shared memory of grad_queries_kernel: queries and output gradients, two stages of keys and values, the steps and their
// entries, one sum per warp.
template <int D, int QUERY_BLOCK>
constexpr int grad_queries_shared_memory() {
  return (2 * QUERY_BLOCK + 4 * KEY_BLOCK) * D * (int)sizeof(Half) +
         STEP_ROOM * (int)(sizeof(Step) + sizeof(int)) + QUERY_BLOCK / 16 * (int)sizeof(float);
}

// A thread block computes the gradient of one query block, and the entries' sums of gradients of scores.
template <int TYPE, int D, int QUERY_BLOCK>
KERNEL(QUERY_BLOCK * 2, (D <= 64 ? 12 : 8) * 16 / QUERY_BLOCK) grad_queries_kernel(const Arguments arguments) {
  constexpr int THREADS = QUERY_BLOCK * 2, WARPS = QUERY_BLOCK / 16, CHUNK = CHUNK_COLUMNS<D>;
  SHARED_MEMORY(shared);
  Half* query_tile = (Half*)shared;
  Half* grad_tile = query_tile + QUERY_BLOCK * D;
  Half* key_tiles = grad_tile + QUERY_BLOCK * D;
  Half* value_tiles = key_tiles + 2 * KEY_BLOCK * D;
  Step* ring = (Step*)(value_tiles + 2 * KEY_BLOCK * D);
  int* entries = (int*)(ring + STEP_ROOM);
  float* warp_sums = (float*)(entries + STEP_ROOM);
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  const Place place(arguments, arguments.order[blockIdx.x], blockIdx.y, blockIdx.z);
  const int first_query = place.query_block * QUERY_BLOCK;
  Steps<true> steps{ring, entries, 0};
  const int head_row = place.batch * arguments.heads + place.head;
  const long long first_padded_row = (long long)head_row * arguments.num_query_blocks * QUERY_BLOCK + first_query;
  const auto own_list = [&] { return (long long)head_row * arguments.num_query_blocks + place.query_block; };

  const auto count = [&] { return arguments.counts[place.list]; };
  const auto find_step = [&](int candidate, Step& step) {
    return step.set_listed(arguments, place, first_query, QUERY_BLOCK, candidate);
  };
  const auto load_step = [&](int index) {
    const int stage = index % 2;
    load_keys_and_values<D, THREADS>(key_tiles + stage * KEY_BLOCK * D, value_tiles + stage * KEY_BLOCK * D, arguments,
                                     place, steps[index].keys(arguments, place.batch));
  };

  const float* block_lse = arguments.row_lse + first_padded_row;
  load_queries_and_grads<D, QUERY_BLOCK, THREADS>(query_tile, grad_tile, arguments, place, first_query,
                                                  arguments.row_used + first_padded_row / 64);
  steps.look_ahead(0, count, find_step);
  synchronize_block();
  if (steps.found > 0) load_step(0);
  commit_copies();

  // Computed where they are needed, as the keys of grad_keys_kernel.
  const auto query = [&](int h) { return first_query + warp * 16 + fragment_row(lane, 2 * h); };
  const auto row_word_of = [&](int h) {
    return query(h) < arguments.length ? arguments.row_words[(long long)head_row * arguments.length + query(h)] : 0;
  };
  float lse[2], delta[2];
  UNROLL for (int h = 0; h < 2; h++) {
    const int row = warp * 16 + fragment_row(lane, 2 * h);
    lse[h] = block_lse[row];
    delta[h] = arguments.row_delta[first_padded_row + row];
  }
  float sum[D / 8][4];
  set_zero(sum);
  float span_sum = 0.0f;

  for (int index = 0; index < steps.found; index++) {
    if (index + 1 < steps.found) load_step(index + 1);
    commit_copies();
    wait_for_copies<1>();
    synchronize_block();
    steps.look_ahead(index, count, find_step);
    const Step& step = steps[index];
    const KeyBlock keys = step.keys(arguments, place.batch);
    const int stage = index % 2;
    float entry_sum = 0.0f;
    NO_UNROLL for (int start = 0; start < KEY_BLOCK; start += CHUNK) {
      const Half* key_tile = key_tiles + (stage * KEY_BLOCK + start) * D;
      const Half* value_tile = value_tiles + (stage * KEY_BLOCK + start) * D;
      float scores[CHUNK / 8][4], grads[CHUNK / 8][4];
      set_zero(scores);
      set_zero(grads);
      multiply_transposed<TYPE, D, CHUNK>(scores, query_tile, key_tile, grads, grad_tile, value_tile, warp * 16, lane);
      const float scale = arguments.scale * LOG2_E;
      if (step.is(Step::SPANNED)) {
        const float unscale = 1.0f / scale;
        UNROLL for (int n = 0; n < CHUNK / 8; n++)
          UNROLL for (int j = 0; j < 4; j++)
            scores[n][j] += span_log2(span_weight(arguments, place.head,
                                                  keys.first + start + fragment_column(lane, n, j) - query(j / 2))) *
                            unscale;
      }
      if (step.is(Step::MASKED)) {
        const Bits visible[2] = {step.visible_keys(arguments, keys, query(0)),
                                 step.visible_keys(arguments, keys, query(1))};
        hide(scores, visible, start, lane);
      }
      if (arguments.has_dropout) {
        const int row_word[2] = {row_word_of(0), row_word_of(1)};
        UNROLL for (int n = 0; n < CHUNK / 8; n++) {
          UNROLL for (int side = 0; side < 2; side++) {
            const int column = start + fragment_column(lane, n, side);
            const int column_word = keys.is_open(column) ? arguments.column_words[keys.position(column)] : 0;
            UNROLL for (int h = 0; h < 2; h++)
              grads[n][2 * h + side] *= is_kept(arguments, row_word[h], column_word) ? arguments.keep_factor : 0.0f;
          }
        }
      }
      UNROLL for (int n = 0; n < CHUNK / 8; n++) {
        UNROLL for (int j = 0; j < 4; j++) {
          grads[n][j] = power_of_two(scores[n][j] * scale + (step.bias - lse[j / 2])) * (grads[n][j] - delta[j / 2]);
          entry_sum += grads[n][j];
        }
      }
      if (step.is(Step::SPANNED)) {
        UNROLL for (int n = 0; n < CHUNK / 8; n++)
          UNROLL for (int j = 0; j < 4; j++)
            span_sum += grads[n][j] * span_slope(arguments, span_weight(arguments, place.head,
                                                                        keys.first + start +
                                                                            fragment_column(lane, n, j) -
                                                                            query(j / 2)));
      }
      multiply_registers<TYPE, D, CHUNK>(sum, grads, key_tile, lane);
    }
    if (arguments.grad_entry_bias != nullptr) {
      UNROLL for (int distance = 16; distance > 0; distance /= 2) entry_sum += shuffle_xor(entry_sum, distance);
      if (lane == 0) warp_sums[warp] = entry_sum;
    }
    synchronize_block();
    if (arguments.grad_entry_bias != nullptr && threadIdx.x == 0 && step.is(Step::BIASED)) {
      float total = 0.0f;
      for (int i = 0; i < WARPS; i++) total += warp_sums[i];
      arguments.grad_entry_bias[own_list() * arguments.max_entries + entries[index % STEP_ROOM]] = total;
    }
  }
  // Where there was no step, the first copies may still be under way.
  wait_for_copies<0>();

  UNROLL for (int h = 0; h < 2; h++)
    if (query(h) < arguments.length)
      store_row_half<TYPE, D>((Half*)row_at(arguments.grad_query, place.batch, place.head, query(h)), sum, h,
                              arguments.scale, lane);
  if (arguments.grad_span == nullptr) return;
  UNROLL for (int distance = 16; distance > 0; distance /= 2) span_sum += shuffle_xor(span_sum, distance);
  // The sums of the last entry may still be read.
  synchronize_block();
  if (lane == 0) warp_sums[warp] = span_sum;
  synchronize_block();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int i = 0; i < WARPS; i++) total += warp_sums[i];
  arguments.grad_span[own_list()] = total;
}

}  // namespace adaptive
