// Neighbouring query blocks that are computed together, what their lists ask for, and the mask of a tile.
#pragma once

#include <vector>

#include "problem.h"

namespace adaptive {

// Query blocks are bundled up to so many queries.
constexpr int BUNDLE_QUERIES = 64;
// Query blocks of at least 8 queries.
constexpr int MAX_MEMBERS = BUNDLE_QUERIES / 8;
// About as many scores as a tile has, unless one entry has more: 16 KiB, half of a first-level cache.
constexpr int TILE_SCORES = 4096;
constexpr int MAX_TILE_ENTRIES = 32;

// What consecutive members of a bundle, whose lists all have it, ask of one key block.
struct Entry {
  int block;
  bool is_window;
  // Whether the mask hides anything, and whether the adaptive span weakens anything.
  bool is_masked, has_span;
  int first_member, num_members;
  // Offsets key - query that are visible: from low to high, or all others with invert = -1; never above limit.
  int32_t low, high, invert, limit;
  // By member from first_member on, where its list has the entry; NO_PLACE for packed global keys.
  int32_t places[MAX_MEMBERS];
};

constexpr int32_t NO_PLACE = -1;

// Entries of the same members: their keys are the rows of one tile of scores, and its columns, the lanes of its
// vectors, are the queries. So key blocks of any size fill all lanes, and nothing is copied together.
struct Tile {
  // Behind the last one the entry that comes next, if any, else the last one again.
  const Entry* entries[MAX_TILE_ENTRIES + 1];
  int count;
  int first_member, num_members;
  int first_lane, lanes;
};

// One per thread, assigned to one bundle after the other. A query block starts at a whole vector of lanes; lanes behind
// its last query are dead: they compute on zeros, and nothing that they give is used.
class Bundle {
 public:
  const Problem* problem = nullptr;
  int64_t batch, head, first_block;
  int num_members, lanes;

  static int member_lanes(const Problem& problem) { return round_up(problem.query_block, WIDTH); }
  // Under causality a query block is alone: its tiles follow from the lists of all members, and those of later query
  // blocks may depend on later tokens, of which no earlier one may feel so much as another order of a sum.
  static int most_members(const Problem& problem) {
    if (problem.arguments.is_causal) return 1;
    return std::clamp(BUNDLE_QUERIES / member_lanes(problem), 1, MAX_MEMBERS);
  }
  static int most_lanes(const Problem& problem) { return most_members(problem) * member_lanes(problem); }
  static int64_t most_scores(const Problem& problem) {
    return std::max<int64_t>(TILE_SCORES, (int64_t)most_lanes(problem) * problem.key_block);
  }
  static int64_t count(const Problem& problem) {
    const int members = most_members(problem);
    return (problem.arguments.num_query_blocks + members - 1) / members;
  }

  void assign(const Problem& of, int64_t of_batch, int64_t of_head, int64_t index) {
    problem = &of, batch = of_batch, head = of_head;
    const int most = most_members(of);
    first_block = index * most;
    num_members = (int)std::min<int64_t>(most, of.arguments.num_query_blocks - first_block);
    lanes = first_lane(num_members - 1) + round_up(rows(num_members - 1), WIDTH);
    collect();
    sort();
  }

  int start(int member) const { return (int)(first_block + member) * problem->query_block; }
  int rows(int member) const {
    return std::min(problem->query_block, (int)problem->arguments.length - start(member));
  }
  int first_lane(int member) const { return member * member_lanes(*problem); }
  // Row of all queries [batch, heads, length].
  int64_t row(int member) const {
    return (batch * problem->arguments.heads + head) * problem->arguments.length + start(member);
  }
  // Row of an array [batch, heads, num_query_blocks].
  int64_t list(int member) const {
    return (batch * problem->arguments.heads + head) * problem->arguments.num_query_blocks + first_block + member;
  }

  // Calls run(lane, row) for every lane that is a query; row counts from the bundle's first query.
  template <typename Run>
  void each_query(const Run& run) const {
    for (int member = 0; member < num_members; member++)
      for (int i = 0; i < rows(member); i++) run(first_lane(member) + i, member * problem->query_block + i);
  }

  // Collects the next entries of the same members, from `index` on, which moves behind them; false at the end.
  bool next_tile(int& index, Tile& tile) const {
    const int end = (int)order_.size();
    if (index == end) return false;
    const Entry& first = entries_[order_[index]];
    tile.first_member = first.first_member, tile.num_members = first.num_members;
    tile.first_lane = first_lane(first.first_member);
    tile.lanes = std::min(lanes, first_lane(first.first_member + first.num_members)) - tile.first_lane;
    const int most = std::clamp(TILE_SCORES / (tile.lanes * problem->key_block), 1, MAX_TILE_ENTRIES);
    for (tile.count = 0; index < end && tile.count < most; index++) {
      const Entry& entry = entries_[order_[index]];
      if (members_key(entry) != members_key(first)) break;
      tile.entries[tile.count++] = &entry;
    }
    tile.entries[tile.count] = &entries_[order_[std::min(index, end - 1)]];
    return true;
  }

  // What is added to all scores of an entry and a member of its tile, in base 2.
  float bias(const Entry& entry, int member) const {
    const Arguments& arguments = problem->arguments;
    const int32_t place = entry.places[member];
    if (entry.is_window || place == NO_PLACE || arguments.entry_bias == nullptr) return 0.0f;
    const int64_t row = batch * arguments.bias_batch_stride + head * arguments.bias_head_stride + first_block +
                        entry.first_member + member;
    return LOG2_E * arguments.entry_bias[row * arguments.max_entries + place];
  }

  // Hides what the queries of a tile may not see of an entry's scores (in base 2), and adds the adaptive span.
  void mask(float* scores, const Tile& tile, const Entry& entry) const {
    const int32_t* key_position = problem->key_positions(batch, entry.block);
    for (int key = 0; key < problem->key_block; key++) {
      float* row = scores + (int64_t)key * tile.lanes;
      if (key_position[key] == HIDDEN) {
        std::fill_n(row, tile.lanes, -INFINITE);
        continue;
      }
      for (int i = 0; i < tile.lanes; i += WIDTH) {
        const int query = position(tile.first_lane + i);
        const Ints offset = key_position[key] - query - lane_numbers();
        const Ints in_range = ((offset >= entry.low) & (offset <= entry.high)) ^ entry.invert;
        const Ints visible = in_range & (offset <= entry.limit);
        Floats score = load<Floats>(row + i);
        if (entry.has_span) score += load<Floats>(problem->span_log_weight(head, key_position[key], query));
        store(row + i, visible ? score : broadcast(-INFINITE));
      }
    }
  }

  // The position of the query in a lane, the first of its vector.
  int position(int lane) const {
    const int size = member_lanes(*problem);
    return start(lane / size) + lane % size;
  }

  // Rows of the bundle's queries, times a factor, into [lanes, padded_dim], with zeros in dead lanes.
  void pack_rows(const RowTensor& source, float factor, float* packed) const {
    const Problem& of = *problem;
    std::fill_n(packed, (int64_t)lanes * of.padded_dim, 0.0f);
    each_query([&](int lane, int row) {
      float* target = packed + (int64_t)lane * of.padded_dim;
      load_row(target, source, row_offset(source, batch, head, start(0) + row), of.head_dim, of.arguments.element_type);
      for (int j = 0; j < of.head_dim; j++) target[j] *= factor;
    });
  }

  // Packed rows [lanes, padded_dim] as [head_dim, lanes].
  void transpose_rows(const float* packed, float* transposed) const {
    for (int j = 0; j < problem->head_dim; j++)
      for (int i = 0; i < lanes; i++) transposed[(int64_t)j * lanes + i] = packed[(int64_t)i * problem->padded_dim + j];
  }

  // Writes rows [lanes, padded_dim] of the bundle's queries, each times a factor.
  template <typename Factor>
  void store_rows(const RowTensor& target, const float* packed, const Factor& factor) const {
    each_query([&](int lane, int row) {
      store_row(target, row_offset(target, batch, head, start(0) + row), packed + (int64_t)lane * problem->padded_dim,
                problem->head_dim, factor(lane), problem->arguments.element_type);
    });
  }

  // The dropout words of the queries, by lane.
  void load_row_words(int32_t* row_words) const {
    std::fill_n(row_words, lanes, 0);
    each_query([&](int lane, int query) { row_words[lane] = problem->arguments.row_words[row(0) + query]; });
  }

 private:
  struct Offsets {
    int lowest, highest;
  };

  std::vector<Entry> entries_;
  std::vector<int32_t> order_;
  // By key block and kind of entry the last entry that was made, or NONE.
  std::vector<int32_t> latest_;
  static constexpr int32_t NONE = -1;

  static Ints lane_numbers() {
    Ints lane;
    for (int i = 0; i < WIDTH; i++) lane[i] = i;
    return lane;
  }

  static int members_key(const Entry& entry) { return entry.first_member * (MAX_MEMBERS + 1) + entry.num_members; }

  int64_t list_row(int member) const {
    const Arguments& arguments = problem->arguments;
    return batch * arguments.list_batch_stride + head * arguments.list_head_stride + first_block + member;
  }

  // The offsets key - query between a key block and members.
  Offsets offsets(int block, int first_member, int count) const {
    const int first_key = block * problem->key_block;
    const int last_key = std::min(first_key + problem->key_block, (int)problem->arguments.length) - 1;
    const int last = first_member + count - 1;
    return {first_key - (start(last) + rows(last) - 1), last_key - start(first_member)};
  }

  // Whether an entry of a member's list hides everything.
  bool is_hidden(int block, bool is_window, int member) const {
    const Arguments& arguments = problem->arguments;
    const auto [lowest, highest] = offsets(block, member, 1);
    if (problem->num_open(batch, block) == 0 || (arguments.is_causal && lowest > 0)) return true;
    if (!arguments.has_window) return false;
    const int left = (int)-arguments.left, right = (int)arguments.right;
    return is_window ? highest < left || lowest > right : lowest >= left && highest <= right;
  }

  void collect() {
    const Arguments& arguments = problem->arguments;
    entries_.clear();
    if ((int64_t)latest_.size() < 2 * (int64_t)problem->num_blocks) latest_.resize(2 * problem->num_blocks, NONE);
    for (int member = 0; member < num_members; member++) {
      const int64_t first = list_row(member) * arguments.max_entries;
      for (int place = 0; place < arguments.counts[list_row(member)]; place++) {
        const int block = arguments.key_blocks[first + place];
        const bool is_window = arguments.flags[first + place] & WINDOW;
        if (is_hidden(block, is_window, member)) continue;
        int32_t& latest = latest_[2 * block + is_window];
        if (latest == NONE || entries_[latest].first_member + entries_[latest].num_members != member) {
          latest = (int32_t)entries_.size();
          entries_.push_back({});
          entries_.back().block = block, entries_.back().is_window = is_window;
          entries_.back().first_member = member;
        }
        Entry& entry = entries_[latest];
        entry.places[entry.num_members++] = place;
      }
    }
    for (const Entry& entry : entries_) latest_[2 * entry.block + entry.is_window] = NONE;
    for (Entry& entry : entries_) describe(entry);
    for (int block = problem->num_sequence_blocks; block < problem->num_blocks; block++) {
      if (problem->num_open(batch, block) == 0) continue;
      Entry entry = {};
      entry.block = block, entry.num_members = num_members;
      entry.low = INT_MIN, entry.high = INT_MAX, entry.limit = arguments.is_causal ? 0 : INT_MAX;
      entry.is_masked = arguments.is_causal || problem->num_open(batch, block) < problem->key_block;
      std::fill_n(entry.places, MAX_MEMBERS, NO_PLACE);
      entries_.push_back(entry);
    }
  }

  void describe(Entry& entry) const {
    const Arguments& arguments = problem->arguments;
    const auto [lowest, highest] = offsets(entry.block, entry.first_member, entry.num_members);
    entry.low = INT_MIN, entry.high = INT_MAX, entry.limit = arguments.is_causal ? 0 : INT_MAX;
    entry.is_masked = problem->num_open(batch, entry.block) < problem->key_block;
    entry.is_masked |= arguments.is_causal && highest > 0;
    if (arguments.has_window) {
      const int left = (int)-arguments.left, right = (int)arguments.right;
      const bool touches = highest >= left && lowest <= right, is_inside = lowest >= left && highest <= right;
      if (entry.is_window ? !is_inside : touches) {
        entry.is_masked = true;
        entry.low = left, entry.high = right, entry.invert = entry.is_window ? 0 : -1;
      }
    }
    // At the length itself the weight is still 1, but its slope is not 0. A length may be NaN.
    if (entry.is_window && arguments.span_length != nullptr)
      entry.has_span = !((float)std::max(-lowest, highest) < arguments.span_length[head]);
  }

  // Entries of the same members one after the other, in the order of the lists.
  void sort() {
    int next[MAX_MEMBERS * (MAX_MEMBERS + 1) + 1] = {};
    for (const Entry& entry : entries_) next[members_key(entry) + 1]++;
    for (int& count : next) count += &count == next ? 0 : (&count)[-1];
    order_.resize(entries_.size());
    for (int i = 0; i < (int)entries_.size(); i++) order_[next[members_key(entries_[i])]++] = i;
  }
};

}  // namespace adaptive
