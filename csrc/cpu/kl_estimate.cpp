// kl_estimate for CPU tensors: value and derivative of a KL estimator per token, the KL term of policy_loss by itself.
#include "policy_args.h"

#include <tuple>

namespace fastgrpo {
namespace {

using KLResult = std::tuple<Tensor, Tensor>;

KLResult kl_estimate(Tensor logprob, Tensor ref, Tensor old, Tensor params, int64_t estimator, int64_t gradient) {
  const std::vector<int64_t> codes{estimator, gradient};
  KLSpec spec{};
  spec.estimator = code_at(codes, 0, Estimator::kAbs, "estimator");
  spec.gradient = code_at(codes, 1, KLGrad::kRatioDetached, "gradient");
  STD_TORCH_CHECK(spec.estimator != Estimator::kNone, "estimator must name a KL estimator, got NONE");
  return dispatch_float(logprob.scalar_type(), "logprob", [&](auto zero) -> KLResult {
    using S = decltype(zero);
    if constexpr (std::is_same_v<S, float> || std::is_same_v<S, double>) {
      const int64_t n = logprob.numel();
      const S* logprob_in = flat<S>(logprob, "logprob", n);
      const S* ref_in = flat<S>(ref, "ref", n);
      const S* old_in = flat<S>(old, "old", n, /*may_be_absent=*/true);
      const S* bounds = flat<S>(params, "params", 3);
      spec.clamp_in = bounds[0], spec.clamp_out = bounds[1], spec.ratio_cap = bounds[2];
      const Tensor value = new_flat<S>(logprob, n), derivative = new_flat<S>(logprob, n);
      S* const value_out = data_of<S>(value);
      S* const derivative_out = data_of<S>(derivative);
      torch::stable::parallel_for(0, n, 16384, [&](int64_t begin, int64_t end) {
        policy_kernels<S>().kl(
            spec, logprob_in + begin, ref_in + begin, old_in ? old_in + begin : nullptr, end - begin,
            value_out + begin, derivative_out + begin);
      });
      return {value, derivative};
    }
    STD_TORCH_CHECK(false, "logprob must be float32 or float64");
  });
}

}  // namespace
}  // namespace fastgrpo

STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CPU, m) { m.impl("kl_estimate", TORCH_BOX(&fastgrpo::kl_estimate)); }
