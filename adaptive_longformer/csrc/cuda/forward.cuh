// Forward pass. A thread block computes one query block of one head: the queries stay in registers, keys and values
// stream through two stages of shared memory, softmax runs online in base 2; sums are float32.
#pragma once

#include "tile.cuh"

namespace adaptive {

// Bytes of shared memory: the query tile, two stages of keys and values, the steps.
template <int D, int QUERY_BLOCK, int WIDTH>
constexpr int forward_shared_memory() {
  return (QUERY_BLOCK + 4 * KEY_BLOCK) * D * (int)sizeof(Half) + steps_shared_memory<QUERY_BLOCK, WIDTH>();
}

// Steps are of WIDTH keys: a whole tile, or one of its pieces.
template <int TYPE, int D, int QUERY_BLOCK, int WIDTH>
KERNEL(QUERY_BLOCK * 2, (D <= 32 && WIDTH == KEY_BLOCK ? 16 : D <= 64 ? 12 : 8) * 16 / QUERY_BLOCK) forward_kernel(const Arguments arguments) {
  constexpr int THREADS = QUERY_BLOCK * 2, OF_TILE = KEY_BLOCK / WIDTH, FRAGMENTS = WIDTH / 8;
  SHARED_MEMORY(shared);
  Half* query_tile = (Half*)shared;
  Half* key_tiles = query_tile + QUERY_BLOCK * D;
  Half* value_tiles = key_tiles + 2 * KEY_BLOCK * D;
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  const Place place = Place::of(arguments, blockIdx.x, blockIdx.y, blockIdx.z);
  const int first_query = place.query_block * QUERY_BLOCK;
  Step* ring = (Step*)(value_tiles + 2 * KEY_BLOCK * D);
  float* biases = WIDTH < KEY_BLOCK ? (float*)(ring + STEP_ROOM) + warp * STEP_ROOM : nullptr;
  Steps<OF_TILE> steps{ring, nullptr, biases, 0};
  const Pieces pieces{arguments, place, first_query};
  const long long first_row = ((long long)place.batch * arguments.heads + place.head) * arguments.length;

  const auto count = [&] { return WIDTH < KEY_BLOCK ? pieces.count() : arguments.counts[place.list]; };
  const auto find_step = [&](int candidate, Step& step) {
    if constexpr (WIDTH < KEY_BLOCK)
      return pieces.find(candidate, warp, step);
    else
      return step.set_listed(arguments, place, first_query, QUERY_BLOCK, candidate);
  };
  const auto load_tile = [&](int index) {
    load_step_keys<D, THREADS>(key_tiles + index % 2 * KEY_BLOCK * D, value_tiles + index % 2 * KEY_BLOCK * D, arguments,
                               place, steps, index);
  };

  load_queries<D, QUERY_BLOCK, THREADS>(query_tile, arguments, place, first_query);
  steps.look_ahead(0, count, find_step);
  synchronize_block();
  if (steps.found > 0) load_tile(0);
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

  for (int index = 0; index * OF_TILE < steps.found; index++) {
    if ((index + 1) * OF_TILE < steps.found) load_tile(index + 1);
    commit_copies();
    wait_for_copies<1>();
    synchronize_block();
    steps.look_ahead(index * OF_TILE, count, find_step);
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

    float largest[2] = {row_max[0], row_max[1]};
    UNROLL for (int part = 0; part < OF_TILE; part++) {
      const Step& step = steps[index * OF_TILE + part];
      const auto keys = step.keys<WIDTH>(arguments, place.batch);
      float (*own)[4] = scores + part * FRAGMENTS;
      if (step.is(Step::SPANNED)) {
        const float unscale = 1.0f / scale;
        UNROLL for (int n = 0; n < FRAGMENTS; n++)
          UNROLL for (int j = 0; j < 4; j++)
            own[n][j] += span_log2(span_weight(arguments, place.head,
                                               keys.first + fragment_column(lane, n, j) - query[j / 2])) *
                         unscale;
      }
      if (step.is(Step::MASKED)) {
        const bool is_seen = WIDTH == KEY_BLOCK || step.is_of_group(pieces.group(warp));
        Bits visible[2];
        UNROLL for (int h = 0; h < 2; h++) visible[h] = is_seen ? step.visible_keys(arguments, keys, query[h]) : 0;
        hide<FRAGMENTS>(own, visible, 0, lane);
      }
      const float bias = steps.bias(index * OF_TILE + part);
      UNROLL for (int h = 0; h < 2; h++) {
        float new_max = -infinity();
        UNROLL for (int n = 0; n < FRAGMENTS; n++) new_max = fmaxf(new_max, fmaxf(own[n][2 * h], own[n][2 * h + 1]));
        // The scale is positive: the largest product is the largest score.
        largest[h] = fmaxf(largest[h], new_max * scale + bias);
      }
    }
    UNROLL for (int h = 0; h < 2; h++) {
      largest[h] = fmaxf(largest[h], shuffle_xor(largest[h], 1));
      largest[h] = fmaxf(largest[h], shuffle_xor(largest[h], 2));
      const float shift = largest[h] == -infinity() ? 0.0f : largest[h];
      const float decay = power_of_two(row_max[h] - shift);
      row_max[h] = largest[h];
      row_total[h] *= decay;
      UNROLL for (int i = 0; i < D / 8; i++) {
        sum[i][2 * h] *= decay;
        sum[i][2 * h + 1] *= decay;
      }
      UNROLL for (int n = 0; n < KEY_BLOCK / 8; n++) {
        const float offset = steps.bias(index * OF_TILE + n / FRAGMENTS) - shift;
        UNROLL for (int j = 2 * h; j < 2 * h + 2; j++) {
          scores[n][j] = power_of_two(scores[n][j] * scale + offset);
          row_total[h] += scores[n][j];
        }
      }
    }
    if (arguments.has_dropout) {
      UNROLL for (int n = 0; n < KEY_BLOCK / 8; n++) {
        const auto keys = steps[index * OF_TILE + n / FRAGMENTS].template keys<WIDTH>(arguments, place.batch);
        UNROLL for (int side = 0; side < 2; side++) {
          const int column = fragment_column(lane, n % FRAGMENTS, side);
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
