// One row of logits and one sampled token: log-probability, entropy and gradient, built on the row kernels. Shared by
// token_logprob.cpp and grpo_loss.cpp. Per-row arithmetic is in double, whatever the dtype of the logits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "row_kernels.h"
#include "tensors.h"

namespace fastgrpo {

inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// How logits of dtype T become x; see RowMap. `unit` is what lse counts in: logits, or soft-capped logits.
template <class T>
struct TokenRows {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

  Rows<const T> logits;
  const int64_t* token_ids;
  const Acc* temperature;
  bool temperature_per_row;
  double scale = 1;
  double softcap = 0;  // 0: none
  const RowKernels<T>& kernels = row_kernels<T>();

  TokenRows(const Tensor& z, const Tensor& ids, const Tensor& temperatures, const Tensor& params)
      : logits(const_rows<T>(z)), token_ids(flat<int64_t>(ids, "token_ids", logits.count)) {
    temperature_per_row = temperatures.numel() != 1;
    temperature = flat<Acc>(temperatures, "temperature", temperature_per_row ? logits.count : 1);
    const int64_t count = params.numel();
    STD_TORCH_CHECK(count <= 2, "logit_params must have 0, 1 or 2 elements, got ", count);
    const Acc* values = flat<Acc>(params, "logit_params", count, /*may_be_absent=*/true);
    scale = count >= 1 ? values[0] : 1.0;
    softcap = count == 2 ? values[1] : 0.0;
  }

  RowMap map(int64_t row) const {
    const double t = temperature[temperature_per_row ? row : 0];
    return softcap == 0 ? RowMap{scale / t, 0} : RowMap{softcap / t, scale / softcap};
  }

  double unit() const { return softcap == 0 ? 1 : softcap; }

  bool token_is_valid(int64_t row) const { return token_ids[row] >= 0 && token_ids[row] < logits.width; }

  // v of one logit; see RowMap.
  static double value(T z, const RowMap& map) {
    const double v = static_cast<double>(z);
    return map.cap == 0 ? v : std::tanh(v * map.cap);
  }
};

struct TokenStats {
  double logprob, entropy, lse;
};

inline double softplus(double x) { return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

// From the sums over the other columns to the token's numbers. Leaving the token out of `others` is what keeps the digits
// of a confident one: logprob = -log(1 + sum of the others / its own exponential).
inline TokenStats token_stats(RowStats others, double v_token, const RowMap& map) {
  if (std::isnan(others.sum) || std::isnan(v_token) || v_token == kInf) {
    return {kNaN, kNaN, kNaN};
  }
  if (others.max == -kInf) {  // no other column has any probability
    return v_token == -kInf ? TokenStats{kNaN, kNaN, kNaN} : TokenStats{0, 0, v_token};
  }
  const double log_sum = std::log(others.sum);
  if (v_token == -kInf) {
    return {-kInf, log_sum - kLn2 * (others.moment / others.sum), others.max + log_sum / map.scale};
  }
  const double logprob = 0.0 - softplus((others.max - v_token) * map.scale + log_sum);
  const double y = (v_token - others.max) * map.scale * kLog2E;
  double sum, moment;
  if (y > 0) {  // the token is the new maximum
    const double factor = std::exp2(-y);
    sum = others.sum * factor + 1;
    moment = factor == 0 ? 0 : factor * (others.moment - others.sum * y);
    others.max = v_token;
  } else {
    const double e = std::exp2(y);
    sum = others.sum + e;
    moment = others.moment + (e == 0 ? 0 : e * y);
  }
  const double log_total = std::log(sum);
  return {logprob, log_total - kLn2 * (moment / sum), others.max + log_total / map.scale};
}

template <class T>
TokenStats score_row(const TokenRows<T>& rows, int64_t row, bool with_entropy) {
  if (!rows.token_is_valid(row)) {
    return {kNaN, kNaN, kNaN};
  }
  const T* z = rows.logits[row];
  const int64_t token = rows.token_ids[row];
  const RowMap map = rows.map(row);
  RowStats others{-kInf, 0, 0};
  rows.kernels.add_stats(z, token, map, with_entropy, &others);
  rows.kernels.add_stats(z + token + 1, rows.logits.width - token - 1, map, with_entropy, &others);
  TokenStats stats = token_stats(others, TokenRows<T>::value(z[token], map), map);
  stats.lse *= rows.unit();
  return stats;
}

// What a row's gradient is made from: results of score_row as stored, and the upstream gradients.
struct TokenGrad {
  double logprob, entropy, lse, dlogprob, dentropy;
};

template <class T>
void fill_row(T* out, int64_t n, double value) {
  if (value == 0) {
    std::memset(out, 0, static_cast<size_t>(n) * sizeof(T));
  } else {
    std::fill(out, out + n, static_cast<T>(static_cast<float>(value)));
  }
}

// dx_j = dlogprob * (1[j = token] - p_j) - dentropy * p_j * (log p_j + entropy), dz_j = dx_j * dx_j/dz_j. Without an
// upstream gradient the logits are not read. `out` may be the row of logits itself.
template <class T>
void write_row_gradient(const TokenRows<T>& rows, int64_t row, TokenGrad g, T* out) {
  const int64_t width = rows.logits.width;
  if (g.logprob == -kInf) {
    g.dlogprob = 0;
  }
  if (g.dlogprob == 0 && g.dentropy == 0) {
    return fill_row(out, width, 0);
  }
  if (std::isnan(g.logprob + g.dlogprob + g.dentropy) || !rows.token_is_valid(row)) {
    return fill_row(out, width, kNaN);
  }
  const T* z = rows.logits[row];
  const int64_t token = rows.token_ids[row];
  const RowMap map = rows.map(row);
  const double v_token = TokenRows<T>::value(z[token], map);
  // log p is measured from the token or from lse, whichever rounds less: at v = 1e37 lse has lost the log of the sum.
  const double v_lse = g.lse / rows.unit();
  const bool from_token = std::fabs(g.logprob) < std::fabs(v_lse * map.scale);
  const double dx_dz = map.cap == 0 ? map.scale : map.scale * map.cap;
  const RowGrad grad{
      from_token ? v_token : v_lse,
      from_token ? g.logprob * kLog2E : 0.0,
      -(g.dlogprob + g.dentropy * g.entropy) * dx_dz,
      -(g.dentropy * kLn2) * dx_dz,
  };
  rows.kernels.write_grad(z, out, width, map, grad);
  if (g.logprob != -kInf) {
    const double p = std::exp(g.logprob);
    double dx = -g.dlogprob * std::expm1(g.logprob);
    if (p != 0) {
      dx -= g.dentropy * p * (g.logprob + g.entropy);
    }
    const double slope = map.cap == 0 ? dx_dz : dx_dz * (1 - v_token * v_token);
    out[token] = static_cast<T>(static_cast<typename TokenRows<T>::Acc>(dx * slope));
  }
}

}  // namespace fastgrpo
