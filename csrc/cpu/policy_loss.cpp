// policy_loss for CPU tensors: log-probs to loss, its derivative and metric sums. One task per run of sequences.
#include "policy_args.h"

#include <tuple>

namespace fastgrpo {
namespace {

using PolicyResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

PolicyResult policy_loss(
    Tensor logprob, Tensor advantage, Tensor mask, Tensor weight, Tensor old, Tensor ref, Tensor rollout,
    Tensor log_weight, Tensor token_weight, Tensor kl_weight, Tensor entropy, Tensor entropy_weight, Tensor cu_seqlens,
    Tensor params, std::vector<int64_t> spec, std::string surrogate) {
  const PolicySpec objective = parse_spec(spec, params, surrogate);
  const PolicyTensors in{
      advantage, mask, weight, old, ref, rollout, log_weight, token_weight, kl_weight, entropy_weight};
  return dispatch_float(logprob.scalar_type(), "logprob", [&](auto zero) -> PolicyResult {
    using S = decltype(zero);
    if constexpr (std::is_same_v<S, float> || std::is_same_v<S, double>) {
      const int64_t n = logprob.numel();
      const S* logprob_in = flat<S>(logprob, "logprob", n);
      const S* entropy_in = flat<S>(entropy, "entropy", n, /*may_be_absent=*/true);
      const Tensor loss = torch::stable::new_empty(logprob, {}, dtype_of<S>());
      const Tensor token_loss = new_flat<S>(logprob, n), dlogprob = new_flat<S>(logprob, n);
      const Tensor metrics = torch::stable::new_empty(logprob, {kNumMetrics, 4}, ScalarType::Double);
      const auto tokens = policy_tokens(in, logprob_in, entropy_in, token_loss, dlogprob, n);
      policy_all(objective, tokens, cu_seqlens, n, data_of<S>(loss), data_of<double>(metrics));
      return {loss, token_loss, dlogprob, metrics};
    }
    STD_TORCH_CHECK(false, "logprob must be float32 or float64");
  });
}

}  // namespace
}  // namespace fastgrpo

STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CPU, m) { m.impl("policy_loss", TORCH_BOX(&fastgrpo::policy_loss)); }
