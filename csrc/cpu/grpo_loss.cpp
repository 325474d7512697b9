// grpo_loss for CPU tensors: logits to loss and gradient of the logits. Where a token's coefficient depends on its own row
// alone, the gradient is written while the row is still in the second-level cache, and the logits are read from memory
// once; otherwise all rows are scored, then the coefficients computed, then the gradients written.
#include "policy_args.h"
#include "token_rows.h"

#include <tuple>

namespace fastgrpo {
namespace {

using LossResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct RowTensors {
  const Tensor &logits, &token_ids, &temperature, &logit_params;
};

template <class T>
LossResult run(
    const RowTensors& row_in, const PolicyTensors& policy_in, const Tensor& cu_seqlens, const PolicySpec& spec,
    const Tensor& grad_scale, bool with_entropy, const Tensor& dlogits) {
  const TokenRows<T> rows(row_in.logits, row_in.token_ids, row_in.temperature, row_in.logit_params);
  using Acc = typename TokenRows<T>::Acc;
  const int64_t n = rows.logits.count;
  const bool with_gradient = dlogits.numel() != 0;
  const Rows<T> out = with_gradient ? gradient_rows<T>(dlogits, row_in.logits) : Rows<T>{nullptr, 0, 0, 0};
  const Acc* scale_in = flat<Acc>(grad_scale, "grad_scale", 1, /*may_be_absent=*/true);
  const Acc scale = scale_in ? *scale_in : Acc(1);

  const Tensor& like = row_in.logits;
  const Tensor loss = torch::stable::new_empty(like, {}, dtype_of<Acc>());
  const Tensor token_loss = new_flat<Acc>(like, n), logprob = new_flat<Acc>(like, n);
  const Tensor entropy = new_flat<Acc>(like, with_entropy ? n : 0), dlogprob = new_flat<Acc>(like, n);
  const Tensor metrics = torch::stable::new_empty(like, {kNumMetrics, 4}, ScalarType::Double);
  std::vector<Acc> lse(static_cast<size_t>(n));
  Acc* const logprob_out = data_of<Acc>(logprob);
  Acc* const entropy_out = with_entropy ? data_of<Acc>(entropy) : nullptr;
  const PolicyTokens<Acc> tokens = policy_tokens<Acc>(policy_in, logprob_out, entropy_out, token_loss, dlogprob, n);

  const auto score = [&](int64_t row) {
    TokenStats stats{0, 0, 0};
    if (tokens.mask[row]) {
      stats = score_row(rows, row, with_entropy);
    }
    logprob_out[row] = static_cast<Acc>(stats.logprob);
    lse[row] = static_cast<Acc>(stats.lse);
    if (with_entropy) {
      entropy_out[row] = static_cast<Acc>(stats.entropy);
    }
  };
  const auto differentiate = [&](int64_t row) {
    const Acc bonus = tokens.entropy_weight && tokens.mask[row] ? tokens.entropy_weight[row] : Acc(0);
    const TokenGrad grad{
        logprob_out[row], with_entropy ? entropy_out[row] : Acc(0), lse[row], tokens.dlogprob[row] * scale,
        -bonus * scale};
    write_row_gradient(rows, row, grad, out[row]);
  };
  const auto each_row = [&](auto work) {
    torch::stable::parallel_for(0, n, row_grain(rows.logits.width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        work(row);
      }
    });
  };

  if (with_gradient && !spec.has_totals) {
    each_row([&](int64_t row) {
      score(row);
      policy_kernels<Acc>().sequence(spec, tokens, row, row + 1, nullptr, nullptr);
      differentiate(row);
    });
  } else {
    each_row(score);
  }
  // Sums, and every coefficient once more: both together cost less than a hundredth of the rows.
  policy_all(spec, tokens, cu_seqlens, n, data_of<Acc>(loss), data_of<double>(metrics));
  if (with_gradient && spec.has_totals) {
    each_row(differentiate);
  }
  return {loss, token_loss, logprob, entropy, dlogprob, metrics};
}

LossResult grpo_loss(
    Tensor logits, Tensor token_ids, Tensor temperature, Tensor logit_params, Tensor advantage, Tensor mask,
    Tensor weight, Tensor old, Tensor ref, Tensor rollout, Tensor log_weight, Tensor token_weight, Tensor kl_weight,
    Tensor entropy_weight, Tensor cu_seqlens, Tensor params, Tensor grad_scale, std::vector<int64_t> spec,
    std::string surrogate, bool with_entropy, Tensor dlogits) {
  check_rows(logits, "logits");
  const PolicySpec objective = parse_spec(spec, params, surrogate);
  const RowTensors row_in{logits, token_ids, temperature, logit_params};
  const PolicyTensors policy_in{
      advantage, mask, weight, old, ref, rollout, log_weight, token_weight, kl_weight, entropy_weight};
  return dispatch_float(logits.scalar_type(), "logits", [&](auto zero) {
    return run<decltype(zero)>(row_in, policy_in, cu_seqlens, objective, grad_scale, with_entropy, dlogits);
  });
}

}  // namespace
}  // namespace fastgrpo

STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CPU, m) { m.impl("grpo_loss", TORCH_BOX(&fastgrpo::grpo_loss)); }
