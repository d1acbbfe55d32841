// Tiles in shared memory, products of tiles, and which pairs of a tile are visible.
#pragma once

#include "arguments.cuh"

namespace adaptive {

// Where chunk (8 elements, 16 bytes) of a row lies in a tile: chunks are permuted so that the 8 rows that one ldmatrix
// reads lie in different banks. Rows of 32 and 96 elements start half a bank line apart and need only 2 bits.
template <int D>
DEVICE int swizzled(int row, int chunk) {
  return row * D + ((D % 64 == 0 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3)) << 3);
}

DEVICE const Half* row_at(const RowTensor& tensor, int batch, int head, int position) {
  // A row's stride fits into 32 bits, which make one instruction of the product: attention/backends/cuda.py sees to it.
  return tensor.data + batch * tensor.batch_stride + head * tensor.head_stride +
         (long long)position * (int)tensor.row_stride;
}

// Which list a block of threads works on.
struct Place {
  int batch, head, query_block;
  long long list;  // row of key_blocks, counts and flags

  // The list of a block of threads.
  static DEVICE Place of(const Arguments& arguments, int index, int batch_repeat, int head_repeat) {
    return Place(arguments, arguments.order != nullptr ? arguments.order[index] : index, batch_repeat, head_repeat);
  }
  DEVICE Place(const Arguments& arguments, int list_index, int batch_repeat, int head_repeat) {
    const int list_row = list_index / arguments.num_query_blocks;
    query_block = list_index % arguments.num_query_blocks;
    batch = arguments.list_batches > 1 ? list_row / arguments.list_heads : batch_repeat;
    head = arguments.list_heads > 1 ? list_row % arguments.list_heads : head_repeat;
    list = list_index;
  }
};

// WIDTH keys, a block or a piece of one: of the sequence, or packed global keys.
template <int WIDTH>
struct KeyBlock {
  Bits open;
  int first;
  const int* positions;  // null for a block of the sequence

  DEVICE KeyBlock(const Arguments& arguments, int batch, int block)
      : KeyBlock(arguments, batch, block, open_keys(arguments, batch, block)) {}
  DEVICE KeyBlock(const Arguments& arguments, int batch, int block, Bits open) : open(open) {
    first = block * WIDTH;
    positions = nullptr;
    const int packed = first - arguments.num_sequence_blocks * KEY_BLOCK;
    if (packed >= 0)
      positions = arguments.global_positions +
                  (long long)batch * (arguments.num_blocks - arguments.num_sequence_blocks) * KEY_BLOCK + packed;
  }
  DEVICE bool is_open(int column) const { return open >> column & 1; }
  // Only for open columns.
  DEVICE int position(int column) const { return positions == nullptr ? first + column : positions[column]; }
  static DEVICE Bits all() { return ~(Bits)0 >> (64 - WIDTH); }

 private:
  static DEVICE Bits open_keys(const Arguments& arguments, int batch, int block) {
    constexpr int SHARE = KEY_BLOCK / WIDTH;
    const Bits open = arguments.open_keys[(long long)batch * arguments.num_blocks + block / SHARE];
    return open >> block % SHARE * WIDTH & all();
  }
};

// Bits from first to last, clipped to 0 to 63.
DEVICE Bits interval(int first, int last) {
  if (last < 0 || first > 63) return 0;
  const Bits from = first <= 0 ? ~(Bits)0 : ~(Bits)0 << first;
  const Bits to = last >= 63 ? ~(Bits)0 : ~(~(Bits)0 << (last + 1));
  return from & to;
}

// The bias of an entry of the list of a query block, in base 2.
DEVICE float entry_bias(const Arguments& arguments, int batch, int head, int query_block, int width, int entry) {
  const long long lists = batch * arguments.bias_batch_stride + head * arguments.bias_head_stride;
  return LOG2_E * arguments.entry_bias[(lists + query_block) * width + entry];
}

// What a kernel does with one entry of a list, or with a part of its queries: the same in all threads.
struct alignas(16) Step {
  // Some pairs are hidden; pairs have a span; only those inside, or outside, of the window are visible; a bias of its own.
  enum Flag { MASKED = 1, SPANNED = 2, INSIDE = 4, OUTSIDE = 8, BIASED = 16 };

  // The keys that can be seen at all, or the queries that have weights. Of a piece of keys the bits from GROUPS on say
  // which of the query blocks of a tile see it.
  Bits open;
  Word tile_and_flags;
  float bias;  // in base 2
  static constexpr int GROUPS = 32;

  // Which block of keys, or part of the queries, the kernel has to load.
  DEVICE int tile() const { return (int)(tile_and_flags >> 5); }
  DEVICE bool is(int flag) const { return tile_and_flags & flag; }
  DEVICE bool is_of_group(int group) const { return open >> (GROUPS + group) & 1; }

  // A step without anything to see.
  DEVICE void clear() {
    open = 0;
    tile_and_flags = MASKED;
    bias = 0.0f;
  }

  // Makes the step of an entry with these flags, whose bias is still 0. False: it has no visible pair.
  template <int WIDTH>
  DEVICE bool set(const Arguments& arguments, int head, int first_query, int num_queries, int entry_flags,
                  const KeyBlock<WIDTH>& keys, int tile) {
    int flags = keys.open != keys.all() ? MASKED : 0;
    bool is_visible = keys.open != 0;
    open = keys.open;
    bias = 0.0f;
    if (entry_flags & GLOBAL_PACK) {
      flags |= arguments.is_causal ? MASKED : 0;
    } else {
      const bool is_window = entry_flags & WINDOW;
      const int last_query = min_of(first_query + num_queries, arguments.length) - 1;
      const int last_key = min_of(keys.first + WIDTH, arguments.length) - 1;
      // The offsets key - query of the tile.
      const int lowest = keys.first - last_query, highest = last_key - first_query;
      if (arguments.is_causal) {
        is_visible &= lowest <= 0;
        flags |= highest > 0 ? MASKED : 0;
      }
      if (arguments.has_window) {
        const int left = -arguments.left, right = arguments.right;
        const bool touches = highest >= left && lowest <= right, is_inside = lowest >= left && highest <= right;
        is_visible &= is_window ? touches : !is_inside;
        if (is_window ? !is_inside : touches) flags |= MASKED | (is_window ? INSIDE : OUTSIDE);
      }
      if (is_window && arguments.span_length != nullptr) {
        const float length = arguments.span_length[head];
        if (!((float)(-lowest > highest ? -lowest : highest) < length)) flags |= SPANNED;
        // Behind the ramp there is no weight.
        if ((float)(lowest > -highest ? lowest : -highest) >= length + arguments.span_ramp) is_visible = false;
      }
      if (!is_window) flags |= BIASED;
    }
    tile_and_flags = (Word)tile << 5 | (Word)flags;
    return is_visible;
  }

  // Makes the step of a query block and an entry of its list.
  DEVICE bool set_listed(const Arguments& arguments, const Place& place, int first_query, int num_queries, int candidate) {
    const long long entry = place.list * arguments.max_entries + candidate;
    const int block = arguments.key_blocks[entry];
    const bool is_visible = set(arguments, place.head, first_query, num_queries, arguments.flags[entry],
                                KeyBlock<KEY_BLOCK>(arguments, place.batch, block), block);
    if (is(BIASED) && arguments.entry_bias != nullptr)
      bias = entry_bias(arguments, place.batch, place.head, place.query_block, arguments.max_entries, candidate);
    return is_visible;
  }
  template <int WIDTH>
  DEVICE KeyBlock<WIDTH> keys(const Arguments& arguments, int batch) const {
    return KeyBlock<WIDTH>(arguments, batch, tile(), open & KeyBlock<WIDTH>::all());
  }

  // Which of the keys the query at a position sees.
  template <int WIDTH>
  DEVICE Bits visible_keys(const Arguments& arguments, const KeyBlock<WIDTH>& keys, int query) const {
    Bits visible = keys.open;
    if (keys.positions == nullptr) {
      const int start = query - keys.first;
      visible &= in_window(start - arguments.left, start + arguments.right);
      if (arguments.is_causal) visible &= interval(0, start);
    } else if (arguments.is_causal) {
      // Packed keys have no window.
      for (int column = 0; column < WIDTH; column++)
        if (keys.is_open(column) && keys.position(column) > query) visible &= ~((Bits)1 << column);
    }
    return visible;
  }

  // Which of the 64 queries from first_query on see the key at a position.
  DEVICE Bits visible_queries(const Arguments& arguments, int position, int first_query) const {
    const int start = position - first_query;
    const Bits visible = in_window(start - arguments.right, start + arguments.left);
    return arguments.is_causal ? visible & interval(start, KEY_BLOCK - 1) : visible;
  }

 private:
  static DEVICE int min_of(int a, int b) { return a < b ? a : b; }

  DEVICE Bits in_window(int first, int last) const {
    if (!is(INSIDE | OUTSIDE)) return ~(Bits)0;
    return is(INSIDE) ? interval(first, last) : ~interval(first, last);
  }
};

// The pieces that 64 queries from first_query on read where blocks are smaller: those of packed keys, those that their
// window touches, then those of the items that their lists have together.
struct Pieces {
  static constexpr int OF_BLOCK = KEY_BLOCK / PIECE;
  const Arguments& arguments;
  const Place& place;
  int first_query;

  DEVICE int packed() const { return (arguments.num_blocks - arguments.num_sequence_blocks) * OF_BLOCK; }
  DEVICE int first_of_window() const {
    return first_query > arguments.left ? (first_query - arguments.left) / PIECE : 0;
  }
  // Pieces before those of items.
  DEVICE int others() const {
    if (!arguments.has_window) return packed();
    const int query = first_query + 64 < arguments.length ? first_query + 63 : arguments.length - 1;
    const int key = query + (arguments.is_causal ? 0 : arguments.right);
    const int last = (key < arguments.length ? key : arguments.length - 1) / PIECE;
    return packed() + last + 1 - first_of_window();
  }
  DEVICE int of_item() const { return arguments.small_key_block / PIECE; }
  DEVICE long long small_list() const {
    return place.batch * (long long)arguments.small_batch_stride + place.head * arguments.small_head_stride;
  }
  DEVICE long long small_tile() const {
    const int tile = first_query / (arguments.small_query_block > 64 ? arguments.small_query_block : 64);
    return small_list() * arguments.small_tiles + tile;
  }
  DEVICE int count() const {
    if (arguments.small_items == nullptr) return others();
    return others() + arguments.small_counts[small_tile() * 2 + 1] * of_item();
  }
  // Query blocks of a tile; which of them has the rows of a warp.
  DEVICE int groups() const { return arguments.small_query_block < 64 ? 64 / arguments.small_query_block : 1; }
  DEVICE int group(int warp) const { return warp * 16 / arguments.small_query_block; }

  // Which entry of the list of a warp's query block a candidate is of, if it is of one that the query block has.
  DEVICE int entry(int candidate, int warp) const {
    const int item = (candidate - others()) / of_item();
    return arguments.small_entries[(small_tile() * arguments.small_room + item) * groups() + group(warp)];
  }

  // Where the gradient of that entry's bias is, as far as it is of the candidate's keys and the warp's queries.
  DEVICE long long grad_bias_index(int candidate, int warp) const {
    const int of_query_block = arguments.small_query_block / PIECE;
    const int num_query_blocks = (arguments.length + arguments.small_query_block - 1) / arguments.small_query_block;
    const long long head_row = (long long)place.batch * arguments.heads + place.head;
    const long long row = head_row * num_query_blocks * of_query_block + first_query / PIECE + warp;
    const int piece = (candidate - others()) % of_item();
    return (row * arguments.small_width + entry(candidate, warp)) * of_item() + piece;
  }

  // Makes the step of a candidate, with the bias of the warp's query block.
  DEVICE bool find(int candidate, int warp, Step& step) const {
    const int small = candidate - others(), all_groups = (1 << groups()) - 1;
    int piece, flags = 0, seen_by = all_groups;
    if (candidate < packed()) {
      piece = arguments.num_sequence_blocks * OF_BLOCK + candidate;
      flags = GLOBAL_PACK;
    } else if (small < 0) {
      piece = first_of_window() + candidate - packed();
      flags = WINDOW;
    } else {
      const int item = arguments.small_items[small_tile() * arguments.small_room + small / of_item()];
      piece = item / 16 * of_item() + small % of_item();
      seen_by = item % 16;
    }
    const KeyBlock<PIECE> keys(arguments, place.batch, piece);
    const bool is_visible = step.set(arguments, place.head, first_query, 64, flags, keys, piece);
    step.open |= (Bits)seen_by << Step::GROUPS;
    if (seen_by != all_groups) step.tile_and_flags |= Step::MASKED;
    if (step.is(Step::BIASED) && arguments.entry_bias != nullptr && step.is_of_group(group(warp)))
      step.bias =
          entry_bias(arguments, place.batch, place.head, (first_query + warp * 16) / arguments.small_query_block,
                     arguments.small_width, entry(candidate, warp));
    return is_visible;
  }
};

// The steps of a thread block, in shared memory, between the one that is computed and those to come. Every warp finds
// them all, 32 candidates at a time, one for each lane; the first warp writes them. OF_TILE of them are computed at a time.
constexpr int STEP_ROOM = 64;

template <int OF_TILE>
struct Steps {
  Step* const ring;       // [STEP_ROOM]
  int* const candidates;  // [STEP_ROOM], of which candidate each step was made; null: not kept
  float* const biases;    // [STEP_ROOM], as this warp has found them; null: all find the same
  int next;               // the first candidate that no lane has looked at; negative: there is none
  int found = 0;          // whole tiles, once there is no candidate left

  // Looks for steps, until more are at hand than almost half the room or no candidate is left. No thread may still read a
  // step before `current`; all may read the new ones after the next barrier.
  template <typename End, typename Find>
  DEVICE void look_ahead(int current, const End& end_of_candidates, const Find& find) {
    while (next >= 0 && found - current <= STEP_ROOM / 2 - OF_TILE) {
      const int lane = thread_index() % 32, candidate = next + lane, end = end_of_candidates();
      Step step;
      const bool is_step = candidate < end && find(candidate, step);
      const Word lanes = ballot(is_step);
      if (is_step) put(step, found + count_bits(lanes & ((1u << lane) - 1)), candidate);
      found += count_bits(lanes);
      next = next + 32 < end ? next + 32 : -1;
      if (OF_TILE == 1 || next >= 0) continue;
      const int missing = (OF_TILE - found % OF_TILE) % OF_TILE;
      step.clear();
      if (lane < missing) put(step, found + lane, candidate);
      found += missing;
    }
  }
  DEVICE const Step& operator[](int index) const { return ring[index % STEP_ROOM]; }
  DEVICE float bias(int index) const {
    return biases != nullptr ? biases[index % STEP_ROOM] : ring[index % STEP_ROOM].bias;
  }
  DEVICE int candidate(int index) const { return candidates[index % STEP_ROOM]; }

 private:
  DEVICE void put(const Step& step, int index, int candidate) {
    const int place = index % STEP_ROOM;
    if (biases != nullptr) biases[place] = step.bias;
    if (thread_index() >= 32) return;
    ring[place] = step;
    if (candidates != nullptr) candidates[place] = candidate;
  }
};

// Bytes of the steps, and of the biases that each warp has of steps of pieces.
template <int QUERY_BLOCK, int WIDTH>
constexpr int steps_shared_memory() {
  return STEP_ROOM * ((int)sizeof(Step) + (WIDTH < KEY_BLOCK ? QUERY_BLOCK / 16 * (int)sizeof(float) : 0));
}

// The weight of the adaptive span for a pair of the window.
DEVICE float span_weight(const Arguments& arguments, int head, int offset) {
  const float distance = (float)(offset < 0 ? -offset : offset);
  return (arguments.span_length[head] + arguments.span_ramp - distance) / arguments.span_ramp;
}

DEVICE float span_log2(float weight) {
  if (weight <= 0.0f) return -infinity();
  return log2f(weight < MIN_SPAN_WEIGHT ? MIN_SPAN_WEIGHT : weight > 1.0f ? 1.0f : weight);
}

// Derivative of the span's logarithm by its length.
DEVICE float span_slope(const Arguments& arguments, float weight) {
  return weight < MIN_SPAN_WEIGHT || weight > 1.0f ? 0.0f : 1.0f / (weight * arguments.span_ramp);
}

DEVICE bool is_kept(const Arguments& arguments, int row_word, int column_word) {
  Word word = (Word)(row_word ^ column_word);
  word *= 0x7FEB352Du;
  word ^= (Word)((int)word >> 15);
  word *= 0x846CA68Bu;
  return ((int)word >> 1) >= arguments.dropout_threshold;
}

// How the threads of a block share the copy of a tile: each has one chunk of a row, or of every row of a group of chunks,
// and every STEP-th row. All rows of a thread have the same permutation, so that its addresses differ by constants.
template <int D, int THREADS>
struct Share {
  static constexpr int CHUNKS = D % 64 == 0 ? 8 : 4, STEP = THREADS / CHUNKS;

  const int thread = thread_index(), row = thread / CHUNKS, element = thread % CHUNKS * 8;
  const int target = swizzled<D>(row, element / 8);

  // Starts copying (or, if it is not copied, sets to zeros) the chunks of row `row + step * STEP`.
  DEVICE void start(Half* tile, int step, const Half* source, bool is_copied) const {
    UNROLL for (int i = 0; i < D; i += CHUNKS * 8)
      copy_async(tile + target + step * STEP * D + i, source + i, is_copied);
  }
};

// Starts copying the keys and values of a block; hidden rows become zeros, since 0 * NaN is NaN.
template <int D, int THREADS>
DEVICE void load_keys_and_values(Half* key_tile, Half* value_tile, const Arguments& arguments, const Place& place,
                                 const KeyBlock<KEY_BLOCK>& keys) {
  const Share<D, THREADS> share;
  const Bits open = keys.open >> share.row;
  if (keys.positions == nullptr) {
    // Behind the end of the sequence nothing is read.
    const Half* key = row_at(arguments.key, place.batch, place.head, keys.first + share.row) + share.element;
    const Half* value = row_at(arguments.value, place.batch, place.head, keys.first + share.row) + share.element;
    UNROLL for (int step = 0; step < KEY_BLOCK / share.STEP; step++) {
      const bool is_open = open >> step * share.STEP & 1;
      share.start(key_tile, step, key, is_open);
      share.start(value_tile, step, value, is_open);
      key += share.STEP * (int)arguments.key.row_stride;
      value += share.STEP * (int)arguments.value.row_stride;
    }
  } else {
    NO_UNROLL for (int step = 0; step < KEY_BLOCK / share.STEP; step++) {
      const bool is_open = open >> step * share.STEP & 1;
      const int position = is_open ? keys.position(share.row + step * share.STEP) : 0;
      share.start(key_tile, step, row_at(arguments.key, place.batch, place.head, position) + share.element, is_open);
      share.start(value_tile, step, row_at(arguments.value, place.batch, place.head, position) + share.element, is_open);
    }
  }
}

// As above, the rows of ROWS / PIECE pieces; keys_of(i) are the keys of the i-th.
template <int D, int THREADS, int ROWS, typename KeysOf>
DEVICE void load_pieces(Half* key_tile, Half* value_tile, const Arguments& arguments, const Place& place,
                        const KeysOf& keys_of) {
  const Share<D, THREADS> share;
  NO_UNROLL for (int step = 0; step * share.STEP < ROWS; step++) {
    const int row = share.row + step * share.STEP;
    if (row >= ROWS) break;
    const KeyBlock<PIECE> keys = keys_of(row / PIECE);
    const bool is_open = keys.is_open(row % PIECE);
    const int position = is_open ? keys.position(row % PIECE) : 0;
    share.start(key_tile, step, row_at(arguments.key, place.batch, place.head, position) + share.element, is_open);
    share.start(value_tile, step, row_at(arguments.value, place.batch, place.head, position) + share.element, is_open);
  }
}

// Starts copying the keys and values of a tile of steps.
template <int D, int THREADS, int OF_TILE>
DEVICE void load_step_keys(Half* key_tile, Half* value_tile, const Arguments& arguments, const Place& place,
                           const Steps<OF_TILE>& steps, int index) {
  if constexpr (OF_TILE == 1)
    load_keys_and_values<D, THREADS>(key_tile, value_tile, arguments, place,
                                     steps[index].template keys<KEY_BLOCK>(arguments, place.batch));
  else
    load_pieces<D, THREADS, KEY_BLOCK>(key_tile, value_tile, arguments, place, [&](int piece) {
      return steps[index * OF_TILE + piece].template keys<PIECE>(arguments, place.batch);
    });
}

// Starts copying ROWS rows of queries; rows behind the end become zeros.
template <int D, int ROWS, int THREADS>
DEVICE void load_queries(Half* tile, const Arguments& arguments, const Place& place, int first_query) {
  const Share<D, THREADS> share;
  const Half* query = row_at(arguments.query, place.batch, place.head, first_query + share.row) + share.element;
  UNROLL for (int step = 0; step < ROWS / share.STEP; step++) {
    share.start(tile, step, query, first_query + share.row + step * share.STEP < arguments.length);
    query += share.STEP * (int)arguments.query.row_stride;
  }
}

// Starts copying ROWS rows of queries and of the output's gradients; those without weights become zeros, and so do all
// behind the end. `used` has a bit per row.
template <int D, int ROWS, int THREADS>
DEVICE void load_queries_and_grads(Half* query_tile, Half* grad_tile, const Arguments& arguments, const Place& place,
                                   int first_query, const Bits* used) {
  const Share<D, THREADS> share;
  const Half* query = row_at(arguments.query, place.batch, place.head, first_query + share.row) + share.element;
  const Half* grad = row_at(arguments.grad_output, place.batch, place.head, first_query + share.row) + share.element;
  UNROLL for (int step = 0; step < ROWS / share.STEP; step++) {
    const bool is_used = used[step * share.STEP / 64] >> (share.row + step * share.STEP % 64) & 1;
    share.start(query_tile, step, query, is_used);
    share.start(grad_tile, step, grad, is_used);
    query += share.STEP * (int)arguments.query.row_stride;
    grad += share.STEP * (int)arguments.grad_output.row_stride;
  }
}

// c[16 x COLUMNS] += a b^T and d[16 x COLUMNS] += e f^T: 16 rows of a and e from first_row on, COLUMNS rows of b and f,
// all of D elements. In one walk, so that either product has something to do while the other's operands are loaded.
template <int TYPE, int D, int COLUMNS>
DEVICE void multiply_transposed(float (&c)[COLUMNS / 8][4], const Half* a, const Half* b, float (&d)[COLUMNS / 8][4],
                                const Half* e, const Half* f, int first_row, int lane) {
  // All 8 steps of D = 128 at once would need more registers than there are.
  constexpr int STEPS = D == 128 ? 4 : D / 16;
  UNROLL_BY(STEPS) for (int k = 0; k < D / 16; k++) {
    const int left = swizzled<D>(first_row + lane % 16, k * 2 + lane / 16);
    Word a_part[4], e_part[4];
    load_matrices(a_part, a + left);
    load_matrices(e_part, e + left);
    UNROLL for (int n = 0; n < COLUMNS / 16; n++) {
      const int right = swizzled<D>(n * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2);
      Word b_part[4], f_part[4];
      load_matrices(b_part, b + right);
      load_matrices(f_part, f + right);
      multiply_accumulate<TYPE>(c[n * 2], a_part, b_part);
      multiply_accumulate<TYPE>(c[n * 2 + 1], a_part, b_part + 2);
      multiply_accumulate<TYPE>(d[n * 2], e_part, f_part);
      multiply_accumulate<TYPE>(d[n * 2 + 1], e_part, f_part + 2);
    }
  }
}

// c[16 x D] += a b: a [16 x DEPTH] in registers as multiply_transposed leaves it, b has DEPTH rows of D elements.
template <int TYPE, int D, int DEPTH>
DEVICE void multiply_registers(float (&c)[D / 8][4], const float (&a)[DEPTH / 8][4], const Half* b, int lane) {
  UNROLL for (int k = 0; k < DEPTH / 16; k++) {
    const Word a_part[4] = {pack<TYPE>(a[k * 2][0], a[k * 2][1]), pack<TYPE>(a[k * 2][2], a[k * 2][3]),
                            pack<TYPE>(a[k * 2 + 1][0], a[k * 2 + 1][1]),
                            pack<TYPE>(a[k * 2 + 1][2], a[k * 2 + 1][3])};
    UNROLL for (int n = 0; n < D / 16; n++) {
      Word b_part[4];
      load_matrices_transposed(b_part, b + swizzled<D>(k * 16 + lane % 16, n * 2 + lane / 16));
      multiply_accumulate<TYPE>(c[n * 2], a_part, b_part);
      multiply_accumulate<TYPE>(c[n * 2 + 1], a_part, b_part + 2);
    }
  }
}

// The sum over the lanes of a warp, in all of them.
DEVICE float warp_sum(float value) {
  UNROLL for (int distance = 16; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
  return value;
}

template <int COLUMNS>
DEVICE void set_zero(float (&c)[COLUMNS][4]) {
  UNROLL for (int n = 0; n < COLUMNS; n++) UNROLL for (int j = 0; j < 4; j++) c[n][j] = 0.0f;
}

// Sets the hidden pairs of FRAGMENTS fragments from `scores` on to -inf; visible[h] has a bit per column, from first_column
// on, for the rows of elements 2h and 2h + 1.
template <int FRAGMENTS>
DEVICE void hide(float (*scores)[4], const Bits (&visible)[2], int first_column, int lane) {
  UNROLL for (int h = 0; h < 2; h++) {
    const Bits own = visible[h] >> (first_column + lane % 4 * 2);
    UNROLL for (int n = 0; n < FRAGMENTS; n++)
      UNROLL for (int side = 0; side < 2; side++)
        if (!(own >> (n * 8 + side) & 1)) scores[n][2 * h + side] = -infinity();
  }
}

// Element j of fragment n of a 16-row result: its row (add 16 * warp) and its column.
DEVICE int fragment_row(int lane, int j) { return lane / 4 + j / 2 * 8; }
DEVICE int fragment_column(int lane, int n, int j) { return n * 8 + lane % 4 * 2 + j % 2; }

// Writes row half h (elements 2h and 2h + 1) of a 16 x D result.
template <int TYPE, int D>
DEVICE void store_row_half(Half* row, const float (&c)[D / 8][4], int h, float factor, int lane) {
  UNROLL for (int n = 0; n < D / 8; n++)
    *(Word*)(row + fragment_column(lane, n, 0)) = pack<TYPE>(c[n][2 * h] * factor, c[n][2 * h + 1] * factor);
}

}  // namespace adaptive
