// Forward pass. A thread block computes one query block of one head: the queries stay in registers, keys and values
// stream through two stages of shared memory, softmax runs online in base 2; sums are float32.
#pragma once

#include "tile.cuh"

namespace adaptive {

// Bytes of shared memory: the query tile, two stages of keys and values, the steps.
template <int D, int QUERY_BLOCK>
constexpr int forward_shared_memory() {
  return (QUERY_BLOCK + 4 * KEY_BLOCK) * D * (int)sizeof(Half) + STEP_ROOM * (int)sizeof(Step);
}

template <int TYPE, int D, int QUERY_BLOCK>
KERNEL(QUERY_BLOCK * 2, (D <= 32 ? 16 : D <= 64 ? 12 : 8) * 16 / QUERY_BLOCK) forward_kernel(const Arguments arguments) {
  constexpr int THREADS = QUERY_BLOCK * 2;
  SHARED_MEMORY(shared);
  Half* query_tile = (Half*)shared;
  Half* key_tiles = query_tile + QUERY_BLOCK * D;
  Half* value_tiles = key_tiles + 2 * KEY_BLOCK * D;
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  const Place place(arguments, arguments.order[blockIdx.x], blockIdx.y, blockIdx.z);
  const int first_query = place.query_block * QUERY_BLOCK;
  Steps<false> steps{(Step*)(value_tiles + 2 * KEY_BLOCK * D), nullptr, 0};
  const long long first_row = ((long long)place.batch * arguments.heads + place.head) * arguments.length;

  const auto count = [&] { return arguments.counts[place.list]; };
  const auto find_step = [&](int candidate, Step& step) {
    return step.set_listed(arguments, place, first_query, QUERY_BLOCK, candidate);
  };
  const auto load_step = [&](int index) {
    const int stage = index % 2;
    load_keys_and_values<D, THREADS>(key_tiles + stage * KEY_BLOCK * D, value_tiles + stage * KEY_BLOCK * D, arguments,
                                     place, steps[index].keys(arguments, place.batch));
  };

  load_queries<D, QUERY_BLOCK, THREADS>(query_tile, arguments, place, first_query);
  steps.look_ahead(0, count, find_step);
  synchronize_block();
  if (steps.found > 0) load_step(0);
  commit_copies();

  int query[2], row_word[2];
  float row_max[2], row_total[2];
  UNROLL for (int h = 0; h < 2; h++) {
    query[h] = first_query + warp * 16 + fragment_row(lane, 2 * h);
    row_word[h] = arguments.has_dropout && query[h] < arguments.length ? arguments.row_words[first_row + query[h]] : 0;
    row_max[h] = -infinity();
    row_total[h] = 0.0f;
  }
  float sum[D / 8][4];
  set_zero(sum);
  Word query_parts[D / 16][4];
  const float scale = arguments.scale * LOG2_E;

  for (int index = 0; index < steps.found; index++) {
    if (index + 1 < steps.found) load_step(index + 1);
    commit_copies();
    wait_for_copies<1>();
    synchronize_block();
    steps.look_ahead(index, count, find_step);
    if (index == 0)
      UNROLL for (int k = 0; k < D / 16; k++)
        load_matrices(query_parts[k], query_tile + swizzled<D>(warp * 16 + lane % 16, k * 2 + lane / 16));

    const int stage = index % 2;
    const Half* key_tile = key_tiles + stage * KEY_BLOCK * D;
    float scores[KEY_BLOCK / 8][4];
    set_zero(scores);
    UNROLL for (int k = 0; k < D / 16; k++) {
      UNROLL for (int n = 0; n < KEY_BLOCK / 16; n++) {
        Word key_part[4];
        load_matrices(key_part, key_tile + swizzled<D>(n * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        multiply_accumulate<TYPE>(scores[n * 2], query_parts[k], key_part);
        multiply_accumulate<TYPE>(scores[n * 2 + 1], query_parts[k], key_part + 2);
      }
    }

    const Step& step = steps[index];
    const KeyBlock keys = step.keys(arguments, place.batch);
    if (step.is(Step::SPANNED)) {
      const float unscale = 1.0f / scale;
      UNROLL for (int n = 0; n < KEY_BLOCK / 8; n++)
        UNROLL for (int j = 0; j < 4; j++)
          scores[n][j] += span_log2(span_weight(arguments, place.head,
                                                keys.first + fragment_column(lane, n, j) - query[j / 2])) *
                          unscale;
    }
    if (step.is(Step::MASKED)) {
      const Bits visible[2] = {step.visible_keys(arguments, keys, query[0]),
                               step.visible_keys(arguments, keys, query[1])};
      hide(scores, visible, 0, lane);
    }
    UNROLL for (int h = 0; h < 2; h++) {
      float new_max = -infinity();
      UNROLL for (int n = 0; n < KEY_BLOCK / 8; n++)
        new_max = fmaxf(new_max, fmaxf(scores[n][2 * h], scores[n][2 * h + 1]));
      new_max = fmaxf(new_max, shuffle_xor(new_max, 1));
      new_max = fmaxf(new_max, shuffle_xor(new_max, 2));
      // The scale is positive: the largest product is the largest score.
      new_max = fmaxf(row_max[h], new_max * scale + step.bias);
      const float shift = new_max == -infinity() ? 0.0f : new_max;
      const float decay = power_of_two(row_max[h] - shift), offset = step.bias - shift;
      row_max[h] = new_max;
      row_total[h] *= decay;
      UNROLL for (int i = 0; i < D / 8; i++) {
        sum[i][2 * h] *= decay;
        sum[i][2 * h + 1] *= decay;
      }
      UNROLL for (int n = 0; n < KEY_BLOCK / 8; n++) {
        UNROLL for (int j = 2 * h; j < 2 * h + 2; j++) {
          scores[n][j] = power_of_two(scores[n][j] * scale + offset);
          row_total[h] += scores[n][j];
        }
      }
    }
    if (arguments.has_dropout) {
      UNROLL for (int n = 0; n < KEY_BLOCK / 8; n++) {
        UNROLL for (int side = 0; side < 2; side++) {
          const int column = fragment_column(lane, n, side);
          const int column_word = keys.is_open(column) ? arguments.column_words[keys.position(column)] : 0;
          UNROLL for (int h = 0; h < 2; h++)
            if (!is_kept(arguments, row_word[h], column_word)) scores[n][2 * h + side] = 0.0f;
        }
      }
    }
    multiply_registers<TYPE, D, KEY_BLOCK>(sum, scores, value_tiles + stage * KEY_BLOCK * D, lane);
    synchronize_block();
  }
  // Where there was no step, the first copies may still be under way.
  wait_for_copies<0>();

  UNROLL for (int h = 0; h < 2; h++) {
    float total = row_total[h];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    if (query[h] >= arguments.length) continue;
    const float factor = total == 0.0f ? 0.0f : arguments.keep_factor / total;
    store_row_half<TYPE, D>((Half*)row_at(arguments.output, place.batch, place.head, query[h]), sum, h, factor, lane);
    if (lane % 4 == 0)
      arguments.lse[first_row + query[h]] = total == 0.0f ? -infinity() : row_max[h] * LN_2 + logf(total);
  }
}

}  // namespace adaptive
