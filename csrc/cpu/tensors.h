// Reading the tensors of an op: shape, dtype and layout checks that name the argument, and raw pointers. The callers in
// Python have validated values; what is checked here is what would otherwise read or write outside a tensor.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "row_kernels.h"

namespace fastgrpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f with a value of the C++ type of `dtype`; anything but the four float types is refused by name.
template <class F>
auto dispatch_float(ScalarType dtype, const char* name, F f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(
          dtype == ScalarType::Float, name, " must be float16, bfloat16, float32 or float64, got dtype code ",
          static_cast<int>(dtype));
      return f(float{});
  }
}

template <class T>
constexpr ScalarType dtype_of() {
  if constexpr (std::is_same_v<T, double>) {
    return ScalarType::Double;
  } else if constexpr (std::is_same_v<T, float>) {
    return ScalarType::Float;
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return ScalarType::Long;
  } else if constexpr (std::is_same_v<T, int32_t>) {
    return ScalarType::Int;
  } else {
    static_assert(std::is_same_v<T, bool>);
    return ScalarType::Bool;
  }
}

// A flat tensor of n elements; nullptr where it is absent (no elements) and may be.
template <class T>
const T* flat(const Tensor& tensor, const char* name, int64_t n, bool may_be_absent = false) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor");
  const int64_t numel = tensor.numel();
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype_of<T>() || (may_be_absent && numel == 0), name, " has the wrong dtype (code ",
      static_cast<int>(tensor.scalar_type()), ", expected ", static_cast<int>(dtype_of<T>()), ")");
  if (may_be_absent && numel == 0) {
    return nullptr;
  }
  STD_TORCH_CHECK(numel == n, name, " must have ", n, " elements, got ", numel);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return static_cast<const T*>(tensor.const_data_ptr());
}

// The rows of a [N, V] matrix whose last dimension is contiguous; the row stride is free.
template <class T>
struct Rows {
  T* data;
  int64_t count, width, stride;

  T* operator[](int64_t row) const { return data + row * stride; }
};

inline void check_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have shape [N, V], got ", tensor.dim(), " dimensions");
  STD_TORCH_CHECK(tensor.size(1) >= 1, name, " must have at least one column");
  STD_TORCH_CHECK(tensor.size(1) == 1 || tensor.stride(1) == 1, name, " must be contiguous in its last dimension");
}

template <class T>
Rows<const T> const_rows(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

// The gradient's rows: same shape and dtype as the logits, rows that do not overlap.
template <class T>
Rows<T> gradient_rows(const Tensor& dlogits, const Tensor& logits) {
  check_rows(dlogits, "dlogits");
  STD_TORCH_CHECK(dlogits.scalar_type() == logits.scalar_type(), "dlogits must have the dtype of logits");
  STD_TORCH_CHECK(
      dlogits.size(0) == logits.size(0) && dlogits.size(1) == logits.size(1), "dlogits must have the shape of logits, [",
      logits.size(0), ", ", logits.size(1), "], got [", dlogits.size(0), ", ", dlogits.size(1), "]");
  STD_TORCH_CHECK(
      dlogits.size(0) <= 1 || dlogits.stride(0) >= dlogits.size(1), "the rows of dlogits must not overlap");
  return {static_cast<T*>(dlogits.mutable_data_ptr()), dlogits.size(0), dlogits.size(1), dlogits.stride(0)};
}

template <class T>
Tensor new_flat(const Tensor& like, int64_t n) {
  return torch::stable::new_empty(like, {n}, dtype_of<T>());
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Rows per task: below about 32,768 elements a second thread costs more than it saves.
inline int64_t row_grain(int64_t width) { return std::max<int64_t>(1, 32768 / width); }

}  // namespace fastgrpo
