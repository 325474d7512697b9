// The arithmetic of group_advantage, once for CPU and CUDA. fastgrpo/reference/group_advantage.py is the specification.
//
// A `Team` is the set of threads that share one group (or the whole batch): one thread on the CPU, a part of a warp or a
// block on CUDA. It has lane(), width(), and sum/min/max over its threads, which return the same bits to each of them.
// A thread visits positions lane, lane + width, ... and writes only the rows it visits, in every pass, so no pass needs
// to wait for another. Every branch around a reduction depends on reduced values only: the team stays together.

#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTGRPO_HD __host__ __device__ inline
#else
#define FASTGRPO_HD inline
#endif

namespace fastgrpo {

enum class Baseline : int64_t { kMean, kLeaveOneOut, kLengthWeighted, kSecondBest, kBatch, kNone };
enum class Scale : int64_t { kGroup, kBatch, kMean, kNone };
enum class Combine : int64_t { kSum, kNormalizeThenSum };
enum class Singleton : int64_t { kZero, kRaw };

constexpr int64_t kAdvantageCounts = 4;  // active rows, excluded rows, NaN cells, rows of faulty groups
constexpr int64_t kAdvantageBatch = 4;   // rows, smallest score, mean of (score - smallest), standard deviation

struct AdvantageRule {
  Baseline baseline;
  Scale scale;
  Combine combine;
  Singleton singleton;
  double eps, ddof, tie;

  FASTGRPO_HD bool needs_batch() const {
    return baseline == Baseline::kBatch || scale == Scale::kBatch || combine == Combine::kNormalizeThenSum;
  }
};

// Pointers that may be null: weight (all 1), length, order (rows in order), offsets (groups of group_size).
template <typename T>
struct AdvantageInput {
  const T* reward;  // [rows, columns]
  const T* weight;  // [columns]
  const T* length;  // [rows]
  const int64_t* order;
  const int64_t* offsets;
  int64_t rows, columns, groups, group_size;

  FASTGRPO_HD double column_weight(int64_t k) const { return weight ? static_cast<double>(weight[k]) : 1.0; }
};

FASTGRPO_HD bool is_nan(double x) { return x != x; }
FASTGRPO_HD bool is_infinite(double x) { return fabs(x) > 1.7976931348623157e308; }
FASTGRPO_HD bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }
FASTGRPO_HD double infinity() { return HUGE_VAL; }
FASTGRPO_HD double not_a_number() { return nan(""); }

// Positions [begin, end) of one group and the rows they stand for. Both are clamped: bad ids must not become addresses.
struct Members {
  const int64_t* order;
  int64_t rows, begin, end;

  FASTGRPO_HD int64_t row(int64_t position) const {
    const int64_t row = order ? order[position] : position;
    return row < 0 ? 0 : row >= rows ? rows - 1 : row;
  }
};

template <typename T>
FASTGRPO_HD Members members(const AdvantageInput<T>& in, int64_t group) {
  int64_t begin = in.offsets ? in.offsets[group] : group * in.group_size;
  int64_t end = in.offsets ? in.offsets[group + 1] : begin + in.group_size;
  begin = begin < 0 ? 0 : begin;
  end = end > in.rows ? in.rows : end;
  return {in.order, in.rows, begin, end};
}

struct ScoreOf {
  const double* score;
  FASTGRPO_HD double operator()(int64_t row) const { return score[row]; }
};

template <typename T>
struct ColumnOf {
  const T* reward;
  int64_t columns, k;
  FASTGRPO_HD double operator()(int64_t row) const { return static_cast<double>(reward[row * columns + k]); }
};

struct Moments {
  double n, low, high, mean, std;  // mean of x - low
  bool degenerate;

  FASTGRPO_HD double centred(double x) const { return x - low - mean; }
};

// Two passes after a shift by the smallest value. Values that are not finite are not members.
template <class Team, class Value>
FASTGRPO_HD Moments moments(const Team& team, const Members& set, const Value& value, double ddof, double tie) {
  double n = 0, low = infinity(), high = -infinity();
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const double x = value(set.row(p));
    if (is_finite(x)) {
      n += 1;
      low = fmin(low, x);
      high = fmax(high, x);
    }
  }
  Moments m{team.sum(n), team.min(low), team.max(high), 0, 0, true};
  if (m.n == 0) return m;
  double sum = 0, squares = 0;
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const double x = value(set.row(p));
    if (is_finite(x)) sum += x - m.low;
  }
  m.mean = team.sum(sum) / m.n;
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const double x = value(set.row(p));
    if (is_finite(x)) squares += m.centred(x) * m.centred(x);
  }
  squares = team.sum(squares);
  m.std = m.n > ddof ? sqrt(squares / (m.n - ddof)) : 0.0;
  m.degenerate = !(m.high - m.low > tie * fmax(fabs(m.low), fabs(m.high)));
  return m;
}

// Scores of one group: NaN = left out, infinite = the group has an infinite reward.
template <class Team, typename T>
FASTGRPO_HD void combine_rewards(
    const Team& team, const AdvantageInput<T>& in, const AdvantageRule& rule, int64_t group, double* score) {
  const Members set = members(in, group);
  const bool sum = rule.combine == Combine::kSum;
  double fault = 0;
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const int64_t row = set.row(p);
    double total = 0;
    bool scored = false, infinite = false;
    for (int64_t k = 0; k < in.columns; ++k) {
      const double r = static_cast<double>(in.reward[row * in.columns + k]);
      if (is_nan(r)) continue;
      scored = true;
      infinite = infinite || is_infinite(r);
      if (sum) total += in.column_weight(k) * r;
    }
    fault = infinite ? 1.0 : fault;
    score[row] = !scored ? not_a_number() : infinite ? infinity() : total;
  }
  if (!sum) {
    for (int64_t k = 0; k < in.columns; ++k) {
      const ColumnOf<T> column{in.reward, in.columns, k};
      const Moments m = moments(team, set, column, rule.ddof, rule.tie);
      const double w = in.column_weight(k);
      for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
        const int64_t row = set.row(p);
        const double r = column(row);
        if (is_finite(r) && !m.degenerate) score[row] += w * (m.centred(r) / (m.std + rule.eps));
      }
    }
  }
  if (team.max(fault) == 0) return;
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const int64_t row = set.row(p);
    if (!is_nan(score[row])) score[row] = infinity();
  }
}

// What one group does to its rows: advantage = numerator / divisor, or exactly 0.
struct Treatment {
  Moments m;
  Baseline baseline;
  Scale scale;
  double divisor;
  double shift;         // kLengthWeighted: weighted mean of score - low
  double total_length;  // 0: equal weights
  double lead;          // kSecondBest: largest score - second largest, and where they stand
  int64_t best, second;
  bool zero, raw;
};

template <class Team, typename T>
FASTGRPO_HD void weigh_lengths(
    const Team& team, const AdvantageInput<T>& in, const Members& set, const double* score, Treatment& t) {
  double total = 0, moment = 0;
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const int64_t row = set.row(p);
    if (!is_finite(score[row])) continue;
    total += static_cast<double>(in.length[row]);
    moment += static_cast<double>(in.length[row]) * (score[row] - t.m.low);
  }
  t.total_length = team.sum(total);
  moment = team.sum(moment);
  t.shift = t.total_length > 0 ? moment / t.total_length : t.m.mean;
}

// First position in the group whose score is the largest, and first other one with the second largest.
template <class Team>
FASTGRPO_HD void find_leaders(const Team& team, const Members& set, const double* score, Treatment& t) {
  double best = infinity(), runner_up = -infinity(), second = infinity();
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const double x = score[set.row(p)];
    if (is_finite(x) && x == t.m.high) best = fmin(best, static_cast<double>(p));
  }
  best = team.min(best);
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const double x = score[set.row(p)];
    if (is_finite(x) && static_cast<double>(p) != best) runner_up = fmax(runner_up, x);
  }
  runner_up = team.max(runner_up);
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const double x = score[set.row(p)];
    if (is_finite(x) && static_cast<double>(p) != best && x == runner_up) second = fmin(second, static_cast<double>(p));
  }
  second = team.min(second);
  t.best = is_finite(best) ? static_cast<int64_t>(best) : -1;
  t.second = is_finite(second) ? static_cast<int64_t>(second) : -1;
  t.lead = t.m.high - runner_up;
}

template <class Team, typename T>
FASTGRPO_HD Treatment treat(
    const Team& team, const AdvantageInput<T>& in, const AdvantageRule& rule, const Members& set, const double* score,
    const double* batch) {
  Treatment t{};
  t.m = moments(team, set, ScoreOf{score}, rule.ddof, rule.tie);
  const bool sum = rule.combine == Combine::kSum;  // else the group has had its turn, column by column
  t.baseline = sum ? rule.baseline : Baseline::kNone;
  t.scale = sum ? rule.scale : Scale::kBatch;
  const bool group_baseline = t.baseline != Baseline::kNone && t.baseline != Baseline::kBatch;
  const bool group_scale = t.scale == Scale::kGroup || t.scale == Scale::kMean;
  const bool relative = group_baseline || group_scale;
  t.raw = relative && rule.singleton == Singleton::kRaw && t.m.n == 1;
  t.baseline = t.raw && group_baseline ? Baseline::kNone : t.baseline;
  t.scale = t.raw && group_scale ? Scale::kNone : t.scale;
  t.divisor = t.scale == Scale::kGroup   ? t.m.std + rule.eps
              : t.scale == Scale::kBatch ? batch[3] + rule.eps
              : t.scale == Scale::kMean  ? t.m.low + t.m.mean
                                         : 1.0;
  t.zero = (relative && !t.raw && t.m.degenerate) || !(t.divisor > 0) || (t.scale == Scale::kBatch && batch[3] == 0);
  if (t.baseline == Baseline::kLengthWeighted) weigh_lengths(team, in, set, score, t);
  if (t.baseline == Baseline::kSecondBest) find_leaders(team, set, score, t);
  return t;
}

FASTGRPO_HD double numerator(const Treatment& t, int64_t position, double x, const double* batch) {
  switch (t.baseline) {
    case Baseline::kMean:
      return t.m.centred(x);
    case Baseline::kLeaveOneOut:
      return t.m.centred(x) * (t.m.n / (t.m.n - 1));
    case Baseline::kLengthWeighted:
      return x - t.m.low - t.shift;
    case Baseline::kSecondBest:
      return position == t.best ? t.lead : 0.0;
    case Baseline::kBatch:
      return x - batch[1] - batch[2];
    default:
      return x;
  }
}

template <typename T>
struct AdvantageOutput {
  T *advantage, *mean, *std;
  bool* is_degenerate;
};

template <class Team, typename T>
FASTGRPO_HD void assign_advantage(
    const Team& team, const AdvantageInput<T>& in, const AdvantageRule& rule, int64_t group, const double* score,
    const double* batch, const AdvantageOutput<T>& out) {
  const Members set = members(in, group);
  const Treatment t = treat(team, in, rule, set, score, batch);
  double fault = 0;
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const int64_t row = set.row(p);
    const double x = score[row];
    fault = is_infinite(x) ? 1.0 : fault;
    const double a = t.zero || is_nan(x) ? 0.0 : numerator(t, p, x, batch) / t.divisor;
    out.advantage[row] = static_cast<T>(is_infinite(x) ? not_a_number() : a);
  }
  const bool faulty = team.max(fault) > 0;
  const bool broken = faulty || t.m.n == 0;
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const int64_t row = set.row(p);
    out.mean[row] = static_cast<T>(broken ? not_a_number() : t.m.low + t.m.mean);
    out.std[row] = static_cast<T>(broken ? not_a_number() : t.m.std);
    out.is_degenerate[row] = t.m.degenerate && !faulty;
  }
}

// Statistics of all scores, for kBatch: batch[kAdvantageBatch].
template <class Team>
FASTGRPO_HD void batch_statistics(const Team& team, const double* score, int64_t rows, double ddof, double* batch) {
  const Moments m = moments(team, Members{nullptr, rows, 0, rows}, ScoreOf{score}, ddof, 0.0);
  if (team.lane() != 0) return;
  batch[0] = m.n;
  batch[1] = m.n > 0 ? m.low : 0.0;
  batch[2] = m.mean;
  batch[3] = m.std;
}

// counts[1..3]; counts[0] comes with the list of active rows.
template <class Team, typename T>
FASTGRPO_HD void count_rows(const Team& team, const AdvantageInput<T>& in, const double* score, int64_t* counts) {
  double excluded = 0, missing = 0, faulty = 0;
  for (int64_t row = team.lane(); row < in.rows; row += team.width()) {
    excluded += is_nan(score[row]) ? 1 : 0;
    faulty += is_infinite(score[row]) ? 1 : 0;
    for (int64_t k = 0; k < in.columns; ++k) missing += is_nan(in.reward[row * in.columns + k]) ? 1 : 0;
  }
  excluded = team.sum(excluded);
  missing = team.sum(missing);
  faulty = team.sum(faulty);
  if (team.lane() != 0) return;
  counts[1] = static_cast<int64_t>(excluded);
  counts[2] = static_cast<int64_t>(missing);
  counts[3] = static_cast<int64_t>(faulty);
}

}  // namespace fastgrpo
