// scale_gradient_(grad, scale): grad *= scale[0], for CPU tensors. No write if the factor is exactly 1, which is what
// `loss.backward()` brings: then a stored gradient costs nothing to hand out.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;  // elements per task: below it a second thread costs more than it saves

template <typename scalar_t, typename acc_t>
void scale(const Tensor& grad, acc_t factor) {
  auto* data = static_cast<scalar_t*>(grad.mutable_data_ptr());
  torch::stable::parallel_for(0, grad.numel(), kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      data[i] = static_cast<scalar_t>(static_cast<acc_t>(data[i]) * factor);
    }
  });
}

double read_factor(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.numel() == 1, "scale must have 1 element, got ", tensor.numel());
  if (tensor.scalar_type() == ScalarType::Double) {
    return *static_cast<const double*>(tensor.const_data_ptr());
  }
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "scale must be float32 or float64");
  return *static_cast<const float*>(tensor.const_data_ptr());
}

void scale_gradient_(Tensor grad, Tensor factor) {
  STD_TORCH_CHECK(grad.is_contiguous(), "grad must be contiguous");
  const double value = read_factor(factor);
  if (value == 1.0 || grad.numel() == 0) {
    return;
  }
  switch (grad.scalar_type()) {
    case ScalarType::Double:
      return scale<double>(grad, value);
    case ScalarType::Float:
      return scale<float>(grad, static_cast<float>(value));
    case ScalarType::Half:
      return scale<torch::headeronly::Half>(grad, static_cast<float>(value));
    case ScalarType::BFloat16:
      return scale<torch::headeronly::BFloat16>(grad, static_cast<float>(value));
    default:
      STD_TORCH_CHECK(false, "grad must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CPU, m) {
  m.impl("scale_gradient_", TORCH_BOX(&scale_gradient_));
}
