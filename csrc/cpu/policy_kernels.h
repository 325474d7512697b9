// The policy loss of one sequence, and KL estimates: the arithmetic to the right of the log-probability. Everything is
// computed in double from the stored numbers, so a decision at a clip bound falls as it does in exact arithmetic.
#pragma once

#include <cstdint>

#include "../spec.h"

namespace fastgrpo {

struct GateSpec {
  Stat stat;
  Between between;
  Pool pool;
  When when;
  Scope scope;
  double low, high;
};

struct KLSpec {
  Estimator estimator;
  KLGrad gradient;
  double clamp_in, clamp_out, ratio_cap;
};

struct PolicySpec {
  Level level;
  PoolGrad pool_grad;
  Surrogate surrogate;
  Shape shape;
  KLTarget kl_target;
  KLSpec kl;
  int num_gates;
  GateSpec gates[kMaxGates];
  double params[kNumParams];
  bool has_totals;  // a statistic of the whole sequence enters: a pooled log-ratio or gate
};

// Flat per-token arrays of float or double; absent ones are nullptr.
template <class S>
struct PolicyTokens {
  const S* logprob;
  const S* advantage;
  const bool* mask;
  const S* weight;
  const S* old;
  const S* ref;
  const S* rollout;
  const S* log_weight;
  const S* token_weight;
  const S* kl_weight;
  const S* entropy;
  const S* entropy_weight;
  S* token_loss;  // written
  S* dlogprob;    // written
};

// Sums over the live tokens of a sequence. Flags (0 or 1) have no extremes of their own: they follow from sum and count.
struct PolicySums {
  double loss, count;
  double sum[kNumMetrics], min[kNumMetrics], max[kNumMetrics];
};

template <class S>
struct PolicyKernels {
  // Tokens [begin, end) are one sequence. `scratch` holds end - begin numbers; `sums` may be nullptr. A token's results
  // depend on its sequence alone, and sums on the token's place in it, so padding at the end changes no bit.
  void (*sequence)(
      const PolicySpec& spec, const PolicyTokens<S>& tokens, int64_t begin, int64_t end, double* scratch,
      PolicySums* sums);
  // value and derivative by logprob of n tokens; old may be nullptr (ratio 1).
  void (*kl)(
      const KLSpec& spec, const S* logprob, const S* ref, const S* old, int64_t n, S* value, S* derivative);
};

// The version for cpu_isa(); S is float or double.
template <class S>
const PolicyKernels<S>& policy_kernels();

}  // namespace fastgrpo
