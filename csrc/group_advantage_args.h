// Unpacks the arguments of the group_advantage ops: what a wrong call could corrupt is checked here, the rest in Python.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "advantage_math.h"

namespace fastgrpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
const T* pointer_or_null(const Tensor& tensor) {
  return tensor.numel() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}

template <typename T>
T* mutable_pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline void check_tensor(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel, const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.numel() == numel, name, " must have ", numel, " elements, got ", tensor.numel());
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.is_cpu() == like.is_cpu(), name, " must be on the device of reward");
}

inline int64_t given_or_zero(const Tensor& tensor, int64_t numel) { return tensor.numel() ? numel : 0; }

inline AdvantageRule advantage_rule(const Tensor& params, const std::vector<int64_t>& spec) {
  STD_TORCH_CHECK(
      params.is_cpu() && params.scalar_type() == ScalarType::Double && params.numel() == 3 && params.is_contiguous(),
      "params must be 3 float64 values on the CPU");
  STD_TORCH_CHECK(spec.size() == 4, "spec must have 4 entries, got ", spec.size());
  const double* p = static_cast<const double*>(params.const_data_ptr());
  return {
      static_cast<Baseline>(spec[0]), static_cast<Scale>(spec[1]), static_cast<Combine>(spec[2]),
      static_cast<Singleton>(spec[3]), p[0], p[1], p[2]};
}

template <typename T>
AdvantageInput<T> advantage_input(
    const Tensor& reward, const Tensor& weight, const Tensor& length, const Tensor& order, const Tensor& offsets,
    int64_t group_size, const AdvantageRule& rule) {
  const ScalarType dtype = reward.scalar_type();
  STD_TORCH_CHECK(reward.dim() == 2 && reward.is_contiguous(), "reward must be contiguous [B, K]");
  const int64_t rows = reward.size(0), columns = reward.size(1);
  check_tensor(weight, "weight", dtype, given_or_zero(weight, columns), reward);
  check_tensor(length, "length", dtype, rule.baseline == Baseline::kLengthWeighted ? rows : 0, reward);
  check_tensor(order, "order", ScalarType::Long, given_or_zero(order, rows), reward);
  check_tensor(offsets, "offsets", ScalarType::Long, offsets.numel(), reward);
  STD_TORCH_CHECK(offsets.numel() > 0 || group_size > 0, "group_size must be >= 1, got ", group_size);
  STD_TORCH_CHECK(
      offsets.numel() > 0 || rows % group_size == 0, rows, " rows are not divisible by group_size=", group_size);
  const int64_t groups = offsets.numel() ? offsets.numel() - 1 : rows / group_size;
  return {
      static_cast<const T*>(reward.const_data_ptr()), pointer_or_null<T>(weight), pointer_or_null<T>(length),
      pointer_or_null<int64_t>(order), pointer_or_null<int64_t>(offsets), rows, columns, groups, group_size};
}

struct AdvantageTensors {
  Tensor advantage, mean, std, is_degenerate, active_index, counts, score, batch;

  explicit AdvantageTensors(const Tensor& reward) {
    const int64_t rows = reward.size(0);
    advantage = torch::stable::new_empty(reward, {rows});
    mean = torch::stable::new_empty(reward, {rows});
    std = torch::stable::new_empty(reward, {rows});
    is_degenerate = torch::stable::new_empty(reward, {rows}, ScalarType::Bool);
    active_index = torch::stable::new_empty(reward, {rows}, ScalarType::Long);
    counts = torch::stable::new_empty(reward, {kAdvantageCounts}, ScalarType::Long);
    score = torch::stable::new_empty(reward, {rows}, ScalarType::Double);
    batch = torch::stable::new_empty(reward, {kAdvantageBatch}, ScalarType::Double);
  }

  template <typename T>
  AdvantageOutput<T> pointers() const {
    return {
        mutable_pointer<T>(advantage), mutable_pointer<T>(mean), mutable_pointer<T>(std),
        mutable_pointer<bool>(is_degenerate)};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> all() const {
    return {advantage, mean, std, is_degenerate, active_index, counts, score, batch};
  }
};

inline void check_saved(
    const Tensor& dadvantage, const Tensor& advantage, const Tensor& score, const Tensor& batch, const Tensor& reward) {
  const int64_t rows = reward.size(0);
  check_tensor(dadvantage, "dadvantage", reward.scalar_type(), rows, reward);
  check_tensor(advantage, "advantage", reward.scalar_type(), rows, reward);
  check_tensor(score, "score", ScalarType::Double, rows, reward);
  check_tensor(batch, "batch", ScalarType::Double, kAdvantageBatch, reward);
}

}  // namespace fastgrpo
