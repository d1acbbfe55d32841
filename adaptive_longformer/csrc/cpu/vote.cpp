// The vote that selects blocks: what selection/vote.py computes from scores in several passes over memory, in one.
#include "problem.h"
#include "threads.h"

namespace adaptive {
namespace {

// Field by field the `_VoteArguments` of selection/compiled_vote.py. All arrays are contiguous float32.
struct VoteArguments {
  int64_t heads, rows, votes, candidates, fan_out;
  int64_t bias_head_stride;  // in rows; 0 if all heads share the bias
  int64_t num_threads;
  float* scores;              // [heads, rows, votes, fan_out * candidates]; becomes exp(score + bias - peak)
  const float* bias;          // [heads or 1, rows, fan_out * candidates]
  const float* log_covered;   // [heads, rows, votes]
  const float* log_dropped;   // [heads, rows, votes]
  const float* voter_weight;  // [rows, votes]
  float* share;               // [heads, rows, candidates]
  float* covered;             // [heads, rows]
  float* peak;                // [heads, rows, votes]
  float* others;              // [heads, rows, votes]
};

void vote_row(const VoteArguments& arguments, int64_t head, int64_t row) {
  static thread_local Buffer<float> sums;
  const int64_t columns = arguments.candidates * arguments.fan_out, index = head * arguments.rows + row;
  const int64_t whole = columns / WIDTH * WIDTH;
  const float* bias = arguments.bias + (head * arguments.bias_head_stride + row) * columns;
  sums.reserve(columns);
  float* sum = sums.data();
  std::fill_n(sum, columns, 0.0f);
  float covered = 0.0f;
  for (int64_t vote = 0; vote < arguments.votes; vote++) {
    const int64_t place = index * arguments.votes + vote;
    float* scores = arguments.scores + place * columns;
    const float log_covered = arguments.log_covered[place], log_dropped = arguments.log_dropped[place];

    Floats maxima = broadcast(-INFINITE);
    float peak = std::max({log_covered, log_dropped, std::numeric_limits<float>::lowest()});
    for (int64_t j = 0; j < whole; j += WIDTH) {
      const Floats score = load<Floats>(scores + j) + load<Floats>(bias + j);
      store(scores + j, score);
      maxima = maximum(score, maxima);
    }
    for (int64_t j = whole; j < columns; j++) peak = std::max(peak, scores[j] += bias[j]);
    peak = std::max(peak, horizontal_maximum(maxima));

    Floats totals = {};
    for (int64_t j = 0; j < whole; j += WIDTH) {
      const Floats weight = exp2_approximately((load<Floats>(scores + j) - peak) * LOG2_E);
      store(scores + j, weight);
      totals += weight;
    }
    float others = horizontal_sum(totals);
    for (int64_t j = whole; j < columns; j++) others += scores[j] = std::exp(scores[j] - peak);
    others += std::exp(log_dropped - peak);
    const float of_covered = std::exp(log_covered - peak);
    const float total = std::max(others + of_covered, std::numeric_limits<float>::min());
    const float factor = arguments.voter_weight[row * arguments.votes + vote] / total;

    for (int64_t j = 0; j < whole; j += WIDTH)
      store(sum + j, load<Floats>(sum + j) + load<Floats>(scores + j) * factor);
    for (int64_t j = whole; j < columns; j++) sum[j] += scores[j] * factor;
    covered += factor * of_covered;
    arguments.peak[place] = peak;
    arguments.others[place] = others;
  }
  float* share = arguments.share + index * arguments.candidates;
  for (int64_t candidate = 0; candidate < arguments.candidates; candidate++) {
    share[candidate] = 0.0f;
    for (int64_t child = 0; child < arguments.fan_out; child++)
      share[candidate] += sum[candidate * arguments.fan_out + child];
  }
  arguments.covered[index] = covered;
}

}  // namespace
}  // namespace adaptive

extern "C" int32_t adaptive_vote(const adaptive::VoteArguments* arguments) {
  try {
    adaptive::parallel_tasks(arguments->heads * arguments->rows, arguments->num_threads, [&](int64_t task) {
      adaptive::vote_row(*arguments, task / arguments->rows, task % arguments->rows);
    });
  } catch (const std::bad_alloc&) {
    return adaptive::OUT_OF_MEMORY;
  }
  return adaptive::DONE;
}

extern "C" int64_t adaptive_vote_arguments_size() { return sizeof(adaptive::VoteArguments); }
