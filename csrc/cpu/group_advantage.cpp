// group_advantage for CPU tensors: one thread per group, the arithmetic of csrc/advantage_math.h.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../advantage_grad.h"
#include "../advantage_math.h"
#include "../group_advantage_args.h"

namespace {

using namespace fastgrpo;

struct OneThread {
  int64_t lane() const { return 0; }
  int64_t width() const { return 1; }
  double sum(double x) const { return x; }
  double min(double x) const { return x; }
  double max(double x) const { return x; }
};

constexpr int64_t kRowsPerTask = 4096;  // below it a second thread costs more than it saves

template <typename T, class Body>
void for_each_group(const AdvantageInput<T>& in, const Body& body) {
  const int64_t rows_per_group = in.groups ? in.rows / in.groups + 1 : 1;
  torch::stable::parallel_for(0, in.groups, kRowsPerTask / rows_per_group + 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) body(group);
  });
}

template <typename T>
int64_t list_active(const T* advantage, int64_t rows, int64_t* active_index) {
  int64_t active = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (advantage[row] != 0) active_index[active++] = row;
  }
  for (int64_t i = active; i < rows; ++i) active_index[i] = -1;
  return active;
}

template <typename T>
void forward(const AdvantageInput<T>& in, const AdvantageRule& rule, const AdvantageTensors& out) {
  const OneThread team;
  double* score = mutable_pointer<double>(out.score);
  double* batch = mutable_pointer<double>(out.batch);
  int64_t* counts = mutable_pointer<int64_t>(out.counts);
  const AdvantageOutput<T> pointers = out.pointers<T>();
  std::fill_n(batch, kAdvantageBatch, 0.0);
  for_each_group(in, [&](int64_t group) {
    combine_rewards(team, in, rule, group, score);
    if (!rule.needs_batch()) assign_advantage(team, in, rule, group, score, batch, pointers);
  });
  if (rule.needs_batch()) {
    batch_statistics(team, score, in.rows, rule.ddof, batch);
    for_each_group(in, [&](int64_t group) { assign_advantage(team, in, rule, group, score, batch, pointers); });
  }
  count_rows(team, in, score, counts);
  counts[0] = list_active(pointers.advantage, in.rows, mutable_pointer<int64_t>(out.active_index));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_advantage_fwd(
    Tensor reward, Tensor weight, Tensor length, Tensor order, Tensor offsets, Tensor params, int64_t group_size,
    std::vector<int64_t> spec) {
  const AdvantageRule rule = advantage_rule(params, spec);
  const AdvantageTensors out(reward);
  if (reward.scalar_type() == ScalarType::Double) {
    forward(advantage_input<double>(reward, weight, length, order, offsets, group_size, rule), rule, out);
  } else {
    STD_TORCH_CHECK(reward.scalar_type() == ScalarType::Float, "reward must be float32 or float64");
    forward(advantage_input<float>(reward, weight, length, order, offsets, group_size, rule), rule, out);
  }
  return out.all();
}

template <typename T>
void backward(
    const AdvantageInput<T>& in, const AdvantageRule& rule, const Tensor& dadvantage, const Tensor& advantage,
    const Tensor& score, const Tensor& batch, const Tensor& dscore, const Tensor& dreward) {
  const OneThread team;
  double totals[2] = {0, 0};
  const AdvantageUpstream<T> up{
      pointer_or_null<T>(dadvantage), pointer_or_null<T>(advantage), pointer_or_null<double>(score),
      pointer_or_null<double>(batch), totals};
  if (rule.needs_batch()) batch_totals(team, up.dadvantage, up.advantage, up.score, in.rows, totals);
  double* workspace = mutable_pointer<double>(dscore);
  T* result = mutable_pointer<T>(dreward);
  for_each_group(in, [&](int64_t group) { group_gradient(team, in, rule, group, up, workspace, result); });
}

Tensor group_advantage_bwd(
    Tensor dadvantage, Tensor advantage, Tensor score, Tensor batch, Tensor reward, Tensor weight, Tensor length,
    Tensor order, Tensor offsets, Tensor params, int64_t group_size, std::vector<int64_t> spec) {
  const AdvantageRule rule = advantage_rule(params, spec);
  check_saved(dadvantage, advantage, score, batch, reward);
  const Tensor dscore = torch::stable::empty_like(score);
  const Tensor dreward = torch::stable::empty_like(reward);
  if (reward.scalar_type() == ScalarType::Double) {
    const auto in = advantage_input<double>(reward, weight, length, order, offsets, group_size, rule);
    backward(in, rule, dadvantage, advantage, score, batch, dscore, dreward);
  } else {
    STD_TORCH_CHECK(reward.scalar_type() == ScalarType::Float, "reward must be float32 or float64");
    const auto in = advantage_input<float>(reward, weight, length, order, offsets, group_size, rule);
    backward(in, rule, dadvantage, advantage, score, batch, dscore, dreward);
  }
  return dreward;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CPU, m) {
  m.impl("group_advantage_fwd", TORCH_BOX(&group_advantage_fwd));
  m.impl("group_advantage_bwd", TORCH_BOX(&group_advantage_bwd));
}
