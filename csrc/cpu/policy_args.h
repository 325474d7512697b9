// The arguments that policy_loss and grpo_loss have in common: the objective (spec, params) and the per-token tensors.
#pragma once

#include "policy_kernels.h"
#include "tensors.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace fastgrpo {

template <class Code>
Code code_at(const std::vector<int64_t>& spec, size_t i, Code last, const char* name) {
  STD_TORCH_CHECK(
      spec[i] >= 0 && spec[i] <= static_cast<int64_t>(last), "spec[", i, "] (", name, ") must be in 0..",
      static_cast<int64_t>(last), ", got ", spec[i]);
  return static_cast<Code>(spec[i]);
}

inline PolicySpec parse_spec(const std::vector<int64_t>& spec, const Tensor& params, const std::string& surrogate) {
  STD_TORCH_CHECK(spec.size() >= kSpecHead, "spec must have at least ", kSpecHead, " entries, got ", spec.size());
  PolicySpec out{};
  out.surrogate = code_at(spec, 2, Surrogate::kCustom, "surrogate");
  STD_TORCH_CHECK(
      out.surrogate != Surrogate::kCustom, "the registered surrogate '", surrogate,
      "' has no compiled CPU kernel: its torch expression runs through fastgrpo.reference.policy_loss");
  out.level = code_at(spec, 0, Level::kSeqSum, "level");
  out.pool_grad = code_at(spec, 1, PoolGrad::kLocal, "pool_grad");
  out.shape = code_at(spec, 3, Shape::kGamma, "shape");
  out.kl.estimator = code_at(spec, 4, Estimator::kAbs, "estimator");
  out.kl.gradient = code_at(spec, 5, KLGrad::kRatioDetached, "kl_grad");
  out.kl_target = code_at(spec, 6, KLTarget::kOld, "kl_target");
  const int64_t gates = spec[kSpecHead - 1];
  STD_TORCH_CHECK(gates >= 0 && gates <= kMaxGates, "spec must name 0..", kMaxGates, " gates, got ", gates);
  STD_TORCH_CHECK(
      spec.size() == static_cast<size_t>(kSpecHead + kSpecGate * gates), "spec must have ",
      kSpecHead + kSpecGate * gates, " entries for ", gates, " gates, got ", spec.size());
  dispatch_float(params.scalar_type(), "params", [&](auto zero) {
    using S = decltype(zero);
    if constexpr (std::is_same_v<S, float> || std::is_same_v<S, double>) {
      const S* values = flat<S>(params, "params", kNumParams);
      std::copy(values, values + kNumParams, out.params);
    } else {
      STD_TORCH_CHECK(false, "params must be float32 or float64");
    }
  });
  out.kl.clamp_in = out.params[param::kKlClampIn];
  out.kl.clamp_out = out.params[param::kKlClampOut];
  out.kl.ratio_cap = out.params[param::kKlRatioCap];
  out.num_gates = static_cast<int>(gates);
  out.has_totals = out.level != Level::kToken;
  for (int g = 0; g < out.num_gates; ++g) {
    const size_t at = kSpecHead + kSpecGate * g;
    const double* bounds = out.params + param::kGates + 2 * g;
    out.gates[g] = {
        code_at(spec, at, Stat::kEntropy, "stat"),
        code_at(spec, at + 1, Between::kThetaRollout, "between"),
        code_at(spec, at + 2, Pool::kSeqMax, "pool"),
        code_at(spec, at + 3, When::kNegative, "when"),
        code_at(spec, at + 4, Scope::kPolicyAndKl, "scope"),
        bounds[0],
        bounds[1],
    };
    out.has_totals |= out.gates[g].pool != Pool::kToken;
  }
  return out;
}

// Everything per token but logprob and entropy, which grpo_loss computes.
struct PolicyTensors {
  const Tensor &advantage, &mask, &weight, &old, &ref, &rollout, &log_weight, &token_weight, &kl_weight, &entropy_weight;
};

template <class S>
PolicyTokens<S> policy_tokens(
    const PolicyTensors& in, const S* logprob, const S* entropy, const Tensor& token_loss, const Tensor& dlogprob,
    int64_t n) {
  return {
      logprob,
      flat<S>(in.advantage, "advantage", n),
      flat<bool>(in.mask, "mask", n),
      flat<S>(in.weight, "weight", n),
      flat<S>(in.old, "old", n, true),
      flat<S>(in.ref, "ref", n, true),
      flat<S>(in.rollout, "rollout", n, true),
      flat<S>(in.log_weight, "log_weight", n, true),
      flat<S>(in.token_weight, "token_weight", n, true),
      flat<S>(in.kl_weight, "kl_weight", n, true),
      entropy,
      flat<S>(in.entropy_weight, "entropy_weight", n, true),
      data_of<S>(token_loss),
      data_of<S>(dlogprob),
  };
}

inline bool is_flag(int k) {
  return (k >= metric::kClipLow && k <= metric::kClampKl) || k == metric::kFault || k == metric::kActive;
}

// metrics: [kNumMetrics, 4] of (sum, count, min, max). Returns the loss.
inline double reduce_sums(const std::vector<PolicySums>& sums, double* metrics) {
  double loss = 0, count = 0;
  for (const PolicySums& part : sums) {
    loss += part.loss, count += part.count;
  }
  const double inf = std::numeric_limits<double>::infinity();
  for (int k = 0; k < kNumMetrics; ++k) {
    double sum = 0, min = inf, max = -inf;
    for (const PolicySums& part : sums) {
      sum += part.sum[k];
      min = part.min[k] < min || std::isnan(part.min[k]) ? part.min[k] : min;
      max = part.max[k] > max || std::isnan(part.max[k]) ? part.max[k] : max;
    }
    if (is_flag(k) && count > 0) {
      min = sum == count ? 1 : 0, max = sum > 0 ? 1 : 0;
    }
    const double row[4] = {sum, count, min, max};
    std::copy(row, row + 4, metrics + 4 * k);
  }
  return loss;
}

// Loss and metrics of all sequences: partial sums per sequence, added in their order whatever the number of threads.
template <class S>
void policy_all(
    const PolicySpec& spec, const PolicyTokens<S>& tokens, const Tensor& cu_seqlens, int64_t n, S* loss,
    double* metrics) {
  const int64_t sequences = cu_seqlens.numel() - 1;
  STD_TORCH_CHECK(sequences >= 0, "cu_seqlens must have at least 1 element");
  const int32_t* ends = flat<int32_t>(cu_seqlens, "cu_seqlens", sequences + 1);
  STD_TORCH_CHECK(ends[0] == 0 && ends[sequences] == n, "cu_seqlens must run from 0 to ", n, " (the number of tokens)");
  for (int64_t b = 0; b < sequences; ++b) {
    STD_TORCH_CHECK(ends[b] <= ends[b + 1], "cu_seqlens must not decrease, but does after entry ", b);
  }
  std::vector<PolicySums> sums(static_cast<size_t>(sequences));
  const bool shared = spec.level != Level::kToken && spec.pool_grad == PoolGrad::kShared;
  std::vector<double> scratch(shared ? static_cast<size_t>(n) : 0);
  const auto& kernels = policy_kernels<S>();
  const int64_t grain = sequences == 0 ? 1 : std::max<int64_t>(1, 4096 * sequences / std::max<int64_t>(n, 1));
  torch::stable::parallel_for(0, sequences, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      kernels.sequence(spec, tokens, ends[b], ends[b + 1], shared ? scratch.data() + ends[b] : nullptr, &sums[b]);
    }
  });
  *loss = static_cast<S>(reduce_sums(sums, metrics));
}

}  // namespace fastgrpo
