// segment_scan(x, decay, cu_seqlens, reverse) for CPU tensors: one pass over each sequence, in float64.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTokensPerTask = 16384;

template <typename T>
void scan(const Tensor& x, const Tensor& decay, const Tensor& cu_seqlens, const Tensor& y, bool reverse) {
  const T* in = static_cast<const T*>(x.const_data_ptr());
  const T* factor = static_cast<const T*>(decay.const_data_ptr());
  const int32_t* ends = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  T* out = static_cast<T*>(y.mutable_data_ptr());
  const int64_t tokens = x.numel(), sequences = cu_seqlens.numel() - 1;
  const int64_t first = std::clamp<int64_t>(ends[0], 0, tokens), last = std::clamp<int64_t>(ends[sequences], 0, tokens);
  std::fill(out, out + first, T(0));
  std::fill(out + last, out + tokens, T(0));
  const int64_t grain = sequences ? kTokensPerTask / (tokens / sequences + 1) + 1 : 1;
  torch::stable::parallel_for(0, sequences, grain, [=](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s) {
      const int64_t begin = std::clamp<int64_t>(ends[s], 0, tokens), end = std::clamp<int64_t>(ends[s + 1], 0, tokens);
      double carry = 0;
      for (int64_t i = 0; i < end - begin; ++i) {
        const int64_t t = reverse ? end - 1 - i : begin + i;
        const double a = static_cast<double>(factor[t]);
        carry = i == 0 || a == 0 ? static_cast<double>(in[t]) : static_cast<double>(in[t]) + a * carry;
        out[t] = static_cast<T>(carry);
      }
    }
  });
}

Tensor segment_scan(Tensor x, Tensor decay, Tensor cu_seqlens, bool reverse) {
  STD_TORCH_CHECK(x.is_contiguous() && decay.is_contiguous() && cu_seqlens.is_contiguous(), "inputs must be contiguous");
  STD_TORCH_CHECK(decay.numel() == x.numel() && decay.scalar_type() == x.scalar_type(), "decay must be like x");
  STD_TORCH_CHECK(
      cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.numel() > 0, "cu_seqlens must be int32 [B + 1]");
  const Tensor y = torch::stable::empty_like(x);
  if (x.scalar_type() == ScalarType::Double) {
    scan<double>(x, decay, cu_seqlens, y, reverse);
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be float32 or float64");
    scan<float>(x, decay, cu_seqlens, y, reverse);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CPU, m) {
  m.impl("segment_scan", TORCH_BOX(&segment_scan));
}
