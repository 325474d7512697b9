// token_logprob_fwd and token_logprob_bwd for CPU tensors: log-probability and entropy of sampled tokens, and their
// gradient with respect to the logits. Rows are independent, so no result depends on the number of threads.
#include "tensors.h"
#include "token_rows.h"

#include <tuple>

namespace fastgrpo {
namespace {

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& logits, const Tensor& token_ids, const Tensor& mask, const Tensor& temperature,
    const Tensor& logit_params, bool with_entropy) {
  const TokenRows<T> rows(logits, token_ids, temperature, logit_params);
  using Acc = typename TokenRows<T>::Acc;
  const int64_t count = rows.logits.count;
  const bool* live = flat<bool>(mask, "mask", count, /*may_be_absent=*/true);
  const Tensor logprob = new_flat<Acc>(logits, count), lse = new_flat<Acc>(logits, count);
  const Tensor entropy = new_flat<Acc>(logits, with_entropy ? count : 0);
  Acc* const logprob_out = data_of<Acc>(logprob);
  Acc* const lse_out = data_of<Acc>(lse);
  Acc* const entropy_out = data_of<Acc>(entropy);
  torch::stable::parallel_for(0, count, row_grain(rows.logits.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      TokenStats stats{0, 0, 0};
      if (live == nullptr || live[row]) {
        stats = score_row(rows, row, with_entropy);
      }
      logprob_out[row] = static_cast<Acc>(stats.logprob);
      lse_out[row] = static_cast<Acc>(stats.lse);
      if (with_entropy) {
        entropy_out[row] = static_cast<Acc>(stats.entropy);
      }
    }
  });
  return {logprob, entropy, lse};
}

template <class T>
void backward(
    const Tensor& logits, const Tensor& token_ids, const Tensor& temperature, const Tensor& logit_params,
    const Tensor& logprob, const Tensor& entropy, const Tensor& lse, const Tensor& dlogprob, const Tensor& dentropy,
    const Tensor& dlogits) {
  const TokenRows<T> rows(logits, token_ids, temperature, logit_params);
  using Acc = typename TokenRows<T>::Acc;
  const int64_t count = rows.logits.count;
  const Rows<T> out = gradient_rows<T>(dlogits, logits);
  const Acc* logprob_in = flat<Acc>(logprob, "logprob", count);
  const Acc* lse_in = flat<Acc>(lse, "lse", count);
  const Acc* entropy_in = flat<Acc>(entropy, "entropy", count, /*may_be_absent=*/true);
  const Acc* dlogprob_in = flat<Acc>(dlogprob, "dlogprob", count, /*may_be_absent=*/true);
  const Acc* dentropy_in = flat<Acc>(dentropy, "dentropy", count, /*may_be_absent=*/true);
  torch::stable::parallel_for(0, count, row_grain(rows.logits.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const TokenGrad grad{
          logprob_in[row], entropy_in ? entropy_in[row] : Acc(0), lse_in[row], dlogprob_in ? dlogprob_in[row] : Acc(0),
          dentropy_in ? dentropy_in[row] : Acc(0)};
      write_row_gradient(rows, row, grad, out[row]);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> token_logprob_fwd(
    Tensor logits, Tensor token_ids, Tensor mask, Tensor temperature, Tensor logit_params, bool with_entropy) {
  check_rows(logits, "logits");
  return dispatch_float(logits.scalar_type(), "logits", [&](auto zero) {
    return forward<decltype(zero)>(logits, token_ids, mask, temperature, logit_params, with_entropy);
  });
}

void token_logprob_bwd(
    Tensor logits, Tensor token_ids, Tensor temperature, Tensor logit_params, Tensor logprob, Tensor entropy, Tensor lse,
    Tensor dlogprob, Tensor dentropy, Tensor dlogits) {
  check_rows(logits, "logits");
  dispatch_float(logits.scalar_type(), "logits", [&](auto zero) {
    backward<decltype(zero)>(
        logits, token_ids, temperature, logit_params, logprob, entropy, lse, dlogprob, dentropy, dlogits);
  });
}

}  // namespace
}  // namespace fastgrpo

STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CPU, m) {
  m.impl("token_logprob_fwd", TORCH_BOX(&fastgrpo::token_logprob_fwd));
  m.impl("token_logprob_bwd", TORCH_BOX(&fastgrpo::token_logprob_bwd));
}
