// Backward of group_advantage with respect to the reward, for CPU and CUDA (see advantage_math.h for teams).
//
// With v = upstream / divisor: the baseline turns v into its adjoint, and a divisor that depends on the scores takes
// off (sum upstream * advantage) / divisor * d divisor / d score. Degenerate groups get exactly 0.

#pragma once

#include "advantage_math.h"

namespace fastgrpo {

template <typename T>
struct AdvantageUpstream {
  const T* dadvantage;
  const T* advantage;
  const double* score;
  const double* batch;   // [kAdvantageBatch]
  const double* totals;  // [2] sums over the batch of upstream * advantage and of upstream
};

// totals of AdvantageUpstream. Rows without a finite score take no part; rows that are fixed at 0 add 0 to the first
// sum, and the second one is used only by kBatch, which fixes no row unless it fixes all.
template <class Team, typename T>
FASTGRPO_HD void batch_totals(
    const Team& team, const T* dadvantage, const T* advantage, const double* score, int64_t rows, double* totals) {
  double projection = 0, sum = 0;
  for (int64_t row = team.lane(); row < rows; row += team.width()) {
    if (!is_finite(score[row])) continue;
    const double u = static_cast<double>(dadvantage[row]);
    const double a = static_cast<double>(advantage[row]);
    projection += a != 0 ? u * a : 0.0;
    sum += u;
  }
  projection = team.sum(projection);
  sum = team.sum(sum);
  if (team.lane() != 0) return;
  totals[0] = projection;
  totals[1] = sum;
}

// Sums over one group that the adjoints need.
struct GroupSums {
  double v, projection, best_v;  // sum v, sum upstream * advantage, v of the best row
};

template <class Team, typename T>
FASTGRPO_HD GroupSums group_sums(
    const Team& team, const Members& set, const Treatment& t, const AdvantageUpstream<T>& up) {
  double v = 0, projection = 0, best_v = 0;
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const int64_t row = set.row(p);
    if (!is_finite(up.score[row])) continue;
    const double u = static_cast<double>(up.dadvantage[row]);
    v += u / t.divisor;
    projection += u * static_cast<double>(up.advantage[row]);
    best_v += p == t.best ? u / t.divisor : 0.0;
  }
  return {team.sum(v), team.sum(projection), team.sum(best_v)};
}

template <typename T>
FASTGRPO_HD double score_gradient(
    const Treatment& t, const GroupSums& sums, const AdvantageUpstream<T>& up, double ddof, double share, int64_t p,
    int64_t row) {
  const double x = up.score[row];
  double d = static_cast<double>(up.dadvantage[row]) / t.divisor;
  switch (t.baseline) {
    case Baseline::kMean:
      d -= sums.v / t.m.n;
      break;
    case Baseline::kLeaveOneOut:
      d = (d - sums.v / t.m.n) * (t.m.n / (t.m.n - 1));
      break;
    case Baseline::kLengthWeighted:
      d -= share * sums.v;
      break;
    case Baseline::kSecondBest:
      d = p == t.best ? sums.best_v : p == t.second ? -sums.best_v : 0.0;
      break;
    case Baseline::kBatch:
      d -= up.totals[1] / t.divisor / up.batch[0];
      break;
    default:
      break;
  }
  if (t.scale == Scale::kGroup && t.m.std > 0) {
    d -= sums.projection / t.divisor * t.m.centred(x) / ((t.m.n - ddof) * t.m.std);
  } else if (t.scale == Scale::kMean) {
    d -= sums.projection / t.divisor / t.m.n;
  } else if (t.scale == Scale::kBatch) {
    d -= up.totals[0] / t.divisor * (x - up.batch[1] - up.batch[2]) / ((up.batch[0] - ddof) * up.batch[3]);
  }
  return d;
}

// Gradient of one column of z-scores, given the gradient `dscore` of the scores: writes dreward[:, k] of the group.
template <class Team, typename T>
FASTGRPO_HD void column_gradient(
    const Team& team, const AdvantageInput<T>& in, const AdvantageRule& rule, const Members& set, int64_t k,
    const double* score, const double* dscore, T* dreward) {
  const ColumnOf<T> column{in.reward, in.columns, k};
  const double w = in.column_weight(k);
  const Moments m = moments(team, set, column, rule.ddof, rule.tie);
  const double divisor = m.std + rule.eps;
  double sum = 0, projection = 0;
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const int64_t row = set.row(p);
    const double r = column(row);
    if (!is_finite(r)) continue;
    sum += w * dscore[row];
    projection += w * dscore[row] * m.centred(r);
  }
  sum = team.sum(sum);
  projection = team.sum(projection) / divisor;
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const int64_t row = set.row(p);
    const double r = column(row);
    const double along = m.std > 0 ? m.centred(r) / ((m.n - rule.ddof) * m.std) : 0.0;
    double d = m.degenerate ? 0.0 : (w * dscore[row] - sum / m.n - projection * along) / divisor;
    d = is_infinite(score[row]) ? not_a_number() : d;
    dreward[row * in.columns + k] = static_cast<T>(is_nan(r) ? 0.0 : d);
  }
}

// Writes dreward [rows, columns] of one group; dscore [rows] is workspace.
template <class Team, typename T>
FASTGRPO_HD void group_gradient(
    const Team& team, const AdvantageInput<T>& in, const AdvantageRule& rule, int64_t group,
    const AdvantageUpstream<T>& up, double* dscore, T* dreward) {
  const Members set = members(in, group);
  const Treatment t = treat(team, in, rule, set, up.score, up.batch);
  const GroupSums sums = t.zero ? GroupSums{0, 0, 0} : group_sums(team, set, t, up);
  for (int64_t p = set.begin + team.lane(); p < set.end; p += team.width()) {
    const int64_t row = set.row(p);
    const double x = up.score[row];
    double share = 0;
    if (t.baseline == Baseline::kLengthWeighted) {
      share = t.total_length > 0 ? static_cast<double>(in.length[row]) / t.total_length : 1.0 / t.m.n;
    }
    const double d = t.zero || is_nan(x) ? 0.0 : score_gradient(t, sums, up, rule.ddof, share, p, row);
    dscore[row] = is_infinite(x) ? not_a_number() : d;
    if (rule.combine != Combine::kSum) continue;
    for (int64_t k = 0; k < in.columns; ++k) {
      const bool missing = is_nan(static_cast<double>(in.reward[row * in.columns + k]));
      dreward[row * in.columns + k] = static_cast<T>(missing ? 0.0 : in.column_weight(k) * dscore[row]);
    }
  }
  if (rule.combine == Combine::kSum) return;
  for (int64_t k = 0; k < in.columns; ++k) column_gradient(team, in, rule, set, k, up.score, dscore, dreward);
}

}  // namespace fastgrpo
