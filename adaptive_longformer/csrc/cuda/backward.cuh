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

// A column of the transposed lists of smaller blocks, and the slots that its readers are split into.
struct SmallColumn {
  int list, block, first_slot, end_slot;
  long long head_row;

  DEVICE SmallColumn(const Arguments& arguments, int batch, int head, int block) : block(block) {
    list = batch * arguments.small_batch_stride + head * arguments.small_head_stride;
    head_row = (long long)batch * arguments.heads + head;
    const long long first = (long long)list * (num_columns(arguments) + 1);
    first_slot = arguments.slot_starts[first + block];
    end_slot = arguments.slot_starts[first + block + 1];
  }
  static DEVICE int num_columns(const Arguments& arguments) {
    return (arguments.length + arguments.small_key_block - 1) / arguments.small_key_block;
  }
  // Where the sums of one of its keys are, in rows of small_keys and small_values.
  DEVICE long long row(const Arguments& arguments, int slot, int key) const {
    return (head_row * arguments.small_slots + slot) * arguments.small_key_block + key;
  }
};

// Shared memory of grad_keys_kernel: a block of keys and of values, two stages of 64 queries and output gradients with
// their row_lse and row_delta, the steps.
constexpr int QUERY_PART = 64;

template <int D>
constexpr int grad_keys_shared_memory() {
  return (2 * KEY_BLOCK + 4 * QUERY_PART) * D * (int)sizeof(Half) + 4 * QUERY_PART * (int)sizeof(float) +
         STEP_ROOM * (int)sizeof(Step);
}

// What a thread block of grad_keys_kernel adds up: a block of keys, and candidates of the queries that may read it.
struct Item {
  int block, list_row = 0, first = 0, end, slot = -1;

  // Of transposed lists.
  template <int PARTS>
  DEVICE void set_listed(const Arguments& arguments, int index) {
    const int column = arguments.item_column[index];
    block = column < 0 ? -1 : column % arguments.num_blocks;
    list_row = column / arguments.num_blocks;
    first = arguments.item_first[index] * PARTS;
    end = arguments.item_last[index] * PARTS;
    slot = arguments.item_slot[index];
  }
  // Where blocks are smaller: the tiles whose window touches a block, or a part of all tiles for a block of packed keys.
  DEVICE void set_tiles(const Arguments& arguments, int index) {
    const int packed = index - arguments.num_sequence_blocks, parts = arguments.packed_parts;
    end = arguments.num_query_blocks;
    if (packed < 0) {
      block = index;
      const int first_key = block * KEY_BLOCK, right = arguments.is_causal ? 0 : arguments.right;
      first = first_key > right ? (first_key - right) / QUERY_PART : 0;
      const int behind = (first_key + KEY_BLOCK - 1 + arguments.left) / QUERY_PART + 1;
      end = !arguments.has_window ? first : behind < end ? behind : end;
    } else {
      block = arguments.num_sequence_blocks + packed / parts;
      const int share = (end + parts - 1) / parts;
      first = packed % parts * share;
      end = first + share < end ? first + share : end;
      if (parts > 1) slot = packed;
    }
  }
};

// Adds to a row half of the gradients of keys and values what the lists of smaller blocks give for the key at a position.
template <int D>
DEVICE void add_small(float (&key_sum)[D / 8][4], float (&value_sum)[D / 8][4], const Arguments& arguments,
                      const Place& place, int position, int h, int lane) {
  const SmallColumn column(arguments, place.batch, place.head, position / arguments.small_key_block);
  for (int slot = column.first_slot; slot < column.end_slot; slot++) {
    const long long row = column.row(arguments, slot, position % arguments.small_key_block) * D;
    UNROLL for (int n = 0; n < D / 8; n++) {
      UNROLL for (int side = 0; side < 2; side++) {
        const long long i = row + fragment_column(lane, n, side);
        key_sum[n][2 * h + side] += arguments.small_keys[i];
        value_sum[n][2 * h + side] += arguments.small_values[i];
      }
    }
  }
}

// Adds to the gradients of 16 keys, from column first_key of their block on, what COLUMNS queries give, from `start` on
// behind first_query. Takes the products keys x queries and values x output gradients, and the queries' row_lse and
// row_delta.
template <int TYPE, int D, int COLUMNS, int WIDTH>
DEVICE void add_gradients(float (&key_sum)[D / 8][4], float (&value_sum)[D / 8][4], float (&weights)[COLUMNS / 8][4],
                          float (&grads)[COLUMNS / 8][4], const Arguments& arguments, const Place& place,
                          const KeyBlock<WIDTH>& keys, const Step& step, int first_query, int start, int first_key,
                          const float* rows, const Half* query_tile, const Half* grad_tile, int lane) {
  // The thread's keys are those of its rows; computed where they are needed, since registers are scarce.
  const auto column = [&](int h) { return first_key + fragment_row(lane, 2 * h); };
  const auto position = [&](int h) { return keys.is_open(column(h)) ? keys.position(column(h)) : 0; };
  const float scale = arguments.scale * LOG2_E;
  if (step.is(Step::SPANNED)) {
    const float unscale = 1.0f / scale;
    UNROLL for (int n = 0; n < COLUMNS / 8; n++)
      UNROLL for (int j = 0; j < 4; j++)
        weights[n][j] += span_log2(span_weight(arguments, place.head,
                                               position(j / 2) - (first_query + start + fragment_column(lane, n, j)))) *
                         unscale;
  }
  if (step.is(Step::MASKED)) {
    Bits visible[2];
    UNROLL for (int h = 0; h < 2; h++)
      visible[h] = keys.is_open(column(h)) ? step.visible_queries(arguments, position(h), first_query) : 0;
    hide<COLUMNS / 8>(weights, visible, start, lane);
  }
  UNROLL for (int n = 0; n < COLUMNS / 8; n++)
    UNROLL for (int j = 0; j < 4; j++)
      weights[n][j] = power_of_two(weights[n][j] * scale + (step.bias - rows[fragment_column(lane, n, j)]));
  if (!arguments.has_dropout) {
    UNROLL for (int n = 0; n < COLUMNS / 8; n++)
      UNROLL for (int j = 0; j < 4; j++)
        grads[n][j] = weights[n][j] * (grads[n][j] - rows[QUERY_PART + fragment_column(lane, n, j)]);
  } else {
    const int column_word[2] = {arguments.column_words[position(0)], arguments.column_words[position(1)]};
    const long long head_row = (long long)place.batch * arguments.heads + place.head;
    UNROLL for (int n = 0; n < COLUMNS / 8; n++) {
      UNROLL for (int side = 0; side < 2; side++) {
        const int row = fragment_column(lane, n, side), query = first_query + start + row;
        // Rows behind the end have no word, and no weight either.
        const int row_word = query < arguments.length ? arguments.row_words[head_row * arguments.length + query] : 0;
        UNROLL for (int h = 0; h < 2; h++) {
          const int j = 2 * h + side;
          const float factor = is_kept(arguments, row_word, column_word[h]) ? arguments.keep_factor : 0.0f;
          grads[n][j] = weights[n][j] * (grads[n][j] * factor - rows[QUERY_PART + row]);
          weights[n][j] *= factor;
        }
      }
    }
  }
  multiply_registers<TYPE, D, COLUMNS>(value_sum, weights, grad_tile, lane);
  multiply_registers<TYPE, D, COLUMNS>(key_sum, grads, query_tile, lane);
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
  const bool is_listed = arguments.small_query_block == 0;
  Item item;
  if (is_listed)
    item.set_listed<PARTS>(arguments, blockIdx.x);
  else
    item.set_tiles(arguments, blockIdx.x);
  if (item.block < 0) return;
  const int padded_length = arguments.num_query_blocks * QUERY_BLOCK;
  // Any list of the row gives batch and head.
  const Place row_place(arguments, item.list_row * arguments.num_query_blocks, blockIdx.y, blockIdx.z);
  const KeyBlock<KEY_BLOCK> keys(arguments, row_place.batch, item.block);
  const long long head_row = (long long)row_place.batch * arguments.heads + row_place.head;
  const float* row_lse = arguments.row_lse + head_row * padded_length;
  const float* row_delta = arguments.row_delta + head_row * padded_length;
  const Bits* row_used = arguments.row_used + head_row * (padded_length / QUERY_PART);

  load_keys_and_values<D, 128>(key_tile, value_tile, arguments, row_place, keys);
  commit_copies();

  // A candidate for every part of the queries of every entry.
  Steps<1> steps{(Step*)(row_values + 4 * QUERY_PART), nullptr, nullptr, item.first};
  const auto end = [&] { return item.end; };
  const auto find_step = [&](int candidate, Step& step) {
    int query_block = candidate, entry = 0, flags = item.block < arguments.num_sequence_blocks ? WINDOW : GLOBAL_PACK;
    if (is_listed) {
      query_block = arguments.transposed_query_blocks[candidate / PARTS];
      entry = arguments.transposed_entries[candidate / PARTS];
      flags = arguments.flags[entry];
    }
    const int part = query_block * PARTS + candidate % PARTS, first_query = part * QUERY_PART;
    const bool is_visible = step.set(arguments, row_place.head, first_query, QUERY_PART, flags, keys, part);
    if (step.is(Step::BIASED) && arguments.entry_bias != nullptr)
      step.bias = entry_bias(arguments, row_place.batch, row_place.head, query_block, arguments.max_entries,
                             entry % arguments.max_entries);
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
      add_gradients<TYPE, D, CHUNK>(key_sum, value_sum, weights, grads, arguments, row_place, keys, step, first_query,
                                    start, warp * 16, rows, query_tile, grad_tile, lane);
    }
    synchronize_block();
  }
  // Where there was no step, the first copies may still be under way.
  wait_for_copies<0>();

  const int slot = item.slot;
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
      if (arguments.small_keys != nullptr && keys.positions == nullptr)
        add_small<D>(key_sum, value_sum, arguments, row_place, position, h, lane);
      store_row_half<TYPE, D>((Half*)row_at(arguments.grad_key, row_place.batch, row_place.head, position), key_sum,
                              h, arguments.scale, lane);
      store_row_half<TYPE, D>((Half*)row_at(arguments.grad_value, row_place.batch, row_place.head, position),
                              value_sum, h, 1.0f, lane);
    }
  }
}

// Shared memory of grad_small_keys_kernel: a piece of keys and of values, two stages of four pieces of queries and output
// gradients with their row_lse and row_delta, the steps.
template <int D>
constexpr int grad_small_keys_shared_memory() {
  return (2 * PIECE + 4 * QUERY_PART) * D * (int)sizeof(Half) + 4 * QUERY_PART * (int)sizeof(float) +
         STEP_ROOM * (int)sizeof(Step);
}

// A thread block adds up a slot for a piece of its keys. Each warp has a piece of the queries that read it; their sums are
// added in the end.
template <int TYPE, int D>
KERNEL(128, D <= 32 ? 3 : 2) grad_small_keys_kernel(const Arguments arguments) {
  constexpr int WARPS = 4;
  SHARED_MEMORY(shared);
  Half* key_tile = (Half*)shared;
  Half* value_tile = key_tile + PIECE * D;
  Half* query_tiles = value_tile + PIECE * D;
  Half* grad_tiles = query_tiles + 2 * QUERY_PART * D;
  float* row_values = (float*)(grad_tiles + 2 * QUERY_PART * D);
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  const int of_column = arguments.small_key_block / PIECE, of_reader = arguments.small_query_block / PIECE;
  const int slot = (int)blockIdx.x / of_column, piece = (int)blockIdx.x % of_column;
  const Place place(arguments, 0, blockIdx.y, blockIdx.z);
  const int num_columns = SmallColumn::num_columns(arguments);
  const int list = place.batch * arguments.small_batch_stride + place.head * arguments.small_head_stride;
  const long long first_column = (long long)list * (num_columns + 1);
  if (slot >= arguments.slot_starts[first_column + num_columns]) return;
  const SmallColumn column(arguments, place.batch, place.head,
                           arguments.slot_columns[(long long)list * arguments.small_slots + slot]);
  const KeyBlock<PIECE> keys(arguments, place.batch, column.block * of_column + piece);
  const int padded_length = arguments.num_query_blocks * arguments.query_block_size;
  const float* row_lse = arguments.row_lse + column.head_row * padded_length;
  const float* row_delta = arguments.row_delta + column.head_row * padded_length;
  const unsigned short* row_used = (const unsigned short*)arguments.row_used + column.head_row * (padded_length / PIECE);

  load_pieces<D, 128, PIECE>(key_tile, value_tile, arguments, place, [&](int) { return keys; });
  commit_copies();

  // A candidate for every piece of every reader.
  const int first =
      arguments.reader_starts[first_column + column.block] + (slot - column.first_slot) * arguments.slot_readers;
  Steps<WARPS> steps{(Step*)(row_values + 4 * QUERY_PART), nullptr, nullptr, first * of_reader};
  const auto end = [&] {
    const int last = arguments.reader_starts[first_column + column.block + 1];
    return (last < first + arguments.slot_readers ? last : first + arguments.slot_readers) * of_reader;
  };
  const auto find_step = [&](int candidate, Step& step) {
    const int num_query_blocks = (arguments.length + arguments.small_query_block - 1) / arguments.small_query_block;
    const int entry = arguments.reader_entries[(long long)list * num_query_blocks * arguments.small_width +
                                               candidate / of_reader];
    const int query_block = entry / arguments.small_width;
    const int part = query_block * of_reader + candidate % of_reader;
    if (part * PIECE >= arguments.length) return false;
    const bool is_visible = step.set(arguments, place.head, part * PIECE, PIECE, 0, keys, part);
    if (arguments.entry_bias != nullptr)
      step.bias = entry_bias(arguments, place.batch, place.head, query_block, arguments.small_width,
                             entry % arguments.small_width);
    step.open = row_used[part];
    return is_visible && step.open != 0;
  };
  const auto load_tile = [&](int index) {
    const Share<D, 128> share;
    Half* query_tile = query_tiles + index % 2 * QUERY_PART * D;
    Half* grad_tile = grad_tiles + index % 2 * QUERY_PART * D;
    NO_UNROLL for (int i = 0; i < QUERY_PART / share.STEP; i++) {
      const int row = share.row + i * share.STEP;
      const Step& step = steps[index * WARPS + row / PIECE];
      const int query = step.tile() * PIECE + row % PIECE;
      const bool is_used = step.open >> row % PIECE & 1;
      share.start(query_tile, i, row_at(arguments.query, place.batch, place.head, query) + share.element, is_used);
      share.start(grad_tile, i, row_at(arguments.grad_output, place.batch, place.head, query) + share.element, is_used);
    }
    float* rows = row_values + index % 2 * 2 * QUERY_PART;
    const int i = (int)threadIdx.x % (QUERY_PART / 4) * 4;
    const int source = steps[index * WARPS + i / PIECE].tile() * PIECE + i % PIECE;
    if (threadIdx.x < QUERY_PART / 4)
      copy_async(rows + i, row_lse + source, true);
    else if (threadIdx.x < QUERY_PART / 2)
      copy_async(rows + QUERY_PART + i, row_delta + source, true);
  };

  steps.look_ahead(0, end, find_step);
  synchronize_block();
  if (steps.found > 0) load_tile(0);
  commit_copies();

  float key_sum[D / 8][4], value_sum[D / 8][4];
  set_zero(key_sum);
  set_zero(value_sum);
  for (int index = 0; index * WARPS < steps.found; index++) {
    if ((index + 1) * WARPS < steps.found) load_tile(index + 1);
    commit_copies();
    wait_for_copies<1>();
    synchronize_block();
    steps.look_ahead(index * WARPS, end, find_step);
    const Step& step = steps[index * WARPS + warp];
    if (step.open != 0) {
      const int stage = index % 2, first_query = step.tile() * PIECE;
      const Half* query_tile = query_tiles + (stage * QUERY_PART + warp * PIECE) * D;
      const Half* grad_tile = grad_tiles + (stage * QUERY_PART + warp * PIECE) * D;
      const float* rows = row_values + stage * 2 * QUERY_PART + warp * PIECE;
      float weights[PIECE / 8][4], grads[PIECE / 8][4];
      set_zero(weights);
      set_zero(grads);
      multiply_transposed<TYPE, D, PIECE>(weights, key_tile, query_tile, grads, value_tile, grad_tile, 0, lane);
      add_gradients<TYPE, D, PIECE>(key_sum, value_sum, weights, grads, arguments, place, keys, step, first_query, 0, 0,
                                    rows, query_tile, grad_tile, lane);
    }
    synchronize_block();
  }
  // Where there was no step, the first copies may still be under way.
  wait_for_copies<0>();
  synchronize_block();

  // The tiles are not needed any more.
  float* sums = (float*)shared;  // [keys and values, WARPS, PIECE, D]
  UNROLL for (int n = 0; n < D / 8; n++) {
    UNROLL for (int j = 0; j < 4; j++) {
      const int i = (warp * PIECE + fragment_row(lane, j)) * D + fragment_column(lane, n, j);
      sums[i] = key_sum[n][j];
      sums[WARPS * PIECE * D + i] = value_sum[n][j];
    }
  }
  synchronize_block();
  const long long target = column.row(arguments, slot, piece * PIECE) * D;
  for (int i = (int)threadIdx.x; i < 2 * PIECE * D; i += 128) {
    const float* own = sums + i / (PIECE * D) * WARPS * PIECE * D + i % (PIECE * D);
    float total = 0.0f;
    for (int other = 0; other < WARPS; other++) total += own[other * PIECE * D];
    (i < PIECE * D ? arguments.small_keys : arguments.small_values)[target + i % (PIECE * D)] = total;
  }
}

// Adds the parts of a column that was split, in their order.
template <int TYPE>
KERNEL(128, 1) add_parts_kernel(const Arguments arguments) {
  const int column_of_lists = blockIdx.x;
  int first_slot, slots;
  if (arguments.small_query_block == 0) {
    first_slot = arguments.column_first_slot[column_of_lists];
    slots = arguments.column_slots[column_of_lists];
  } else {
    slots = column_of_lists < arguments.num_sequence_blocks ? 0 : arguments.packed_parts;
    first_slot = (column_of_lists - arguments.num_sequence_blocks) * slots;
  }
  if (slots == 0) return;
  const Place place(arguments, column_of_lists / arguments.num_blocks * arguments.num_query_blocks, blockIdx.y,
                    blockIdx.z);
  const KeyBlock<KEY_BLOCK> keys(arguments, place.batch, column_of_lists % arguments.num_blocks);
  const int size = KEY_BLOCK * arguments.head_dim;
  const long long first =
      (((long long)blockIdx.y * gridDim.z + blockIdx.z) * arguments.num_slots + first_slot) * size;
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
// candidates, one sum per warp.
template <int D, int QUERY_BLOCK, int WIDTH>
constexpr int grad_queries_shared_memory() {
  return (2 * QUERY_BLOCK + 4 * KEY_BLOCK) * D * (int)sizeof(Half) + steps_shared_memory<QUERY_BLOCK, WIDTH>() +
         STEP_ROOM * (int)sizeof(int) + QUERY_BLOCK / 16 * (int)sizeof(float);
}

// A thread block computes the gradient of one query block, and the entries' sums of gradients of scores.
template <int TYPE, int D, int QUERY_BLOCK, int WIDTH>
KERNEL(QUERY_BLOCK * 2, (D <= 64 ? 12 : 8) * 16 / QUERY_BLOCK) grad_queries_kernel(const Arguments arguments) {
  constexpr int THREADS = QUERY_BLOCK * 2, WARPS = QUERY_BLOCK / 16, CHUNK = CHUNK_COLUMNS<D>;
  constexpr int OF_TILE = KEY_BLOCK / WIDTH, OF_CHUNK = CHUNK < WIDTH ? 1 : CHUNK / WIDTH, FRAGMENTS = CHUNK / OF_CHUNK / 8;
  SHARED_MEMORY(shared);
  Half* query_tile = (Half*)shared;
  Half* grad_tile = query_tile + QUERY_BLOCK * D;
  Half* key_tiles = grad_tile + QUERY_BLOCK * D;
  Half* value_tiles = key_tiles + 2 * KEY_BLOCK * D;
  Step* ring = (Step*)(value_tiles + 2 * KEY_BLOCK * D);
  int* candidates = (int*)(ring + STEP_ROOM);
  float* warp_sums = (float*)(candidates + STEP_ROOM);
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  const Place place = Place::of(arguments, blockIdx.x, blockIdx.y, blockIdx.z);
  const int first_query = place.query_block * QUERY_BLOCK;
  float* biases = WIDTH < KEY_BLOCK ? warp_sums + WARPS + warp * STEP_ROOM : nullptr;
  Steps<OF_TILE> steps{ring, candidates, biases, 0};
  const Pieces pieces{arguments, place, first_query};
  const int head_row = place.batch * arguments.heads + place.head;
  const long long first_padded_row = (long long)head_row * arguments.num_query_blocks * QUERY_BLOCK + first_query;
  const auto own_list = [&] { return (long long)head_row * arguments.num_query_blocks + place.query_block; };

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

  const float* block_lse = arguments.row_lse + first_padded_row;
  load_queries_and_grads<D, QUERY_BLOCK, THREADS>(query_tile, grad_tile, arguments, place, first_query,
                                                  arguments.row_used + first_padded_row / 64);
  steps.look_ahead(0, count, find_step);
  synchronize_block();
  if (steps.found > 0) load_tile(0);
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

  for (int index = 0; index * OF_TILE < steps.found; index++) {
    if ((index + 1) * OF_TILE < steps.found) load_tile(index + 1);
    commit_copies();
    wait_for_copies<1>();
    synchronize_block();
    steps.look_ahead(index * OF_TILE, count, find_step);
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
      UNROLL for (int part = 0; part < OF_CHUNK; part++) {
        const int number = index * OF_TILE + start / WIDTH + part, first_column = start % WIDTH;
        const Step& step = steps[number];
        const auto keys = step.keys<WIDTH>(arguments, place.batch);
        float (*own)[4] = scores + part * FRAGMENTS;
        float (*own_grads)[4] = grads + part * FRAGMENTS;
        const auto offset = [&](int n, int j) {
          return keys.first + first_column + fragment_column(lane, n, j) - query(j / 2);
        };
        if (step.is(Step::SPANNED)) {
          const float unscale = 1.0f / scale;
          UNROLL for (int n = 0; n < FRAGMENTS; n++)
            UNROLL for (int j = 0; j < 4; j++)
              own[n][j] += span_log2(span_weight(arguments, place.head, offset(n, j))) * unscale;
        }
        if (step.is(Step::MASKED)) {
          const bool is_seen = WIDTH == KEY_BLOCK || step.is_of_group(pieces.group(warp));
          Bits visible[2];
          UNROLL for (int h = 0; h < 2; h++) visible[h] = is_seen ? step.visible_keys(arguments, keys, query(h)) : 0;
          hide<FRAGMENTS>(own, visible, first_column, lane);
        }
        if (arguments.has_dropout) {
          const int row_word[2] = {row_word_of(0), row_word_of(1)};
          UNROLL for (int n = 0; n < FRAGMENTS; n++) {
            UNROLL for (int side = 0; side < 2; side++) {
              const int column = first_column + fragment_column(lane, n, side);
              const int column_word = keys.is_open(column) ? arguments.column_words[keys.position(column)] : 0;
              UNROLL for (int h = 0; h < 2; h++)
                own_grads[n][2 * h + side] *= is_kept(arguments, row_word[h], column_word) ? arguments.keep_factor : 0.0f;
            }
          }
        }
        const float bias = steps.bias(number);
        UNROLL for (int n = 0; n < FRAGMENTS; n++) {
          UNROLL for (int j = 0; j < 4; j++) {
            own_grads[n][j] = power_of_two(own[n][j] * scale + (bias - lse[j / 2])) * (own_grads[n][j] - delta[j / 2]);
            entry_sum += own_grads[n][j];
          }
        }
        if (step.is(Step::SPANNED)) {
          UNROLL for (int n = 0; n < FRAGMENTS; n++)
            UNROLL for (int j = 0; j < 4; j++)
              span_sum += own_grads[n][j] * span_slope(arguments, span_weight(arguments, place.head, offset(n, j)));
        }
        if (WIDTH == KEY_BLOCK || arguments.grad_entry_bias == nullptr) continue;
        // A warp's rows are of one query block, so that the sum is of two pieces.
        if (step.is(Step::BIASED) && step.is_of_group(pieces.group(warp))) {
          const float total = warp_sum(entry_sum);
          const int candidate = steps.candidate(number);
          if (lane == 0) arguments.grad_entry_bias[pieces.grad_bias_index(candidate, warp)] = total;
        }
        entry_sum = 0.0f;
      }
      multiply_registers<TYPE, D, CHUNK>(sum, grads, key_tile, lane);
    }
    const bool wants_sums = WIDTH == KEY_BLOCK && arguments.grad_entry_bias != nullptr;
    if (wants_sums) {
      entry_sum = warp_sum(entry_sum);
      if (lane == 0) warp_sums[warp] = entry_sum;
    }
    synchronize_block();
    if (wants_sums && threadIdx.x == 0 && steps[index].is(Step::BIASED)) {
      float total = 0.0f;
      for (int i = 0; i < WARPS; i++) total += warp_sums[i];
      arguments.grad_entry_bias[own_list() * arguments.max_entries + steps.candidate(index)] = total;
    }
  }
  // Where there was no step, the first copies may still be under way.
  wait_for_copies<0>();

  UNROLL for (int h = 0; h < 2; h++)
    if (query(h) < arguments.length)
      store_row_half<TYPE, D>((Half*)row_at(arguments.grad_query, place.batch, place.head, query(h)), sum, h,
                              arguments.scale, lane);
  if (arguments.grad_span == nullptr) return;
  span_sum = warp_sum(span_sum);
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
