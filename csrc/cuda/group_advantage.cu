// group_advantage for CUDA tensors, the arithmetic of csrc/advantage_math.h in float64.
//
// Grid: 8 or 32 neighbouring lanes per group, 256 threads per block, groups along axis 0. Every pass of a group reads its
// rows again (they stay in L1); rewards are read twice, 8 bytes of score per row are the only workspace. What needs the
// whole batch (its statistics, counts, the list of active rows) is one block of 1024 threads after it. Launches: 2, or 4
// with batch statistics; backward 1 or 2. Sums run in a fixed order, without atomics: repeatable bit by bit.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "../advantage_grad.h"
#include "../advantage_math.h"
#include "../group_advantage_args.h"

namespace {

using namespace fastgrpo;

constexpr int kThreads = 256;
constexpr int kBlock = 1024;

#ifdef __CUDA_ARCH__
#define FASTGRPO_DEVICE_RETURN(expression) return expression
#else
#define FASTGRPO_DEVICE_RETURN(expression) return 0
#endif

enum class Reduction { kSum, kMin, kMax };

template <Reduction R>
__device__ double join(double a, double b) {
  return R == Reduction::kSum ? a + b : R == Reduction::kMin ? fmin(a, b) : fmax(a, b);
}

// Butterfly over Width neighbouring lanes: a + b = b + a, so all of them get the same bits. `mask` names these lanes
// only: the teams of one warp may be at different places.
template <Reduction R, int Width>
__device__ double reduce_lanes(unsigned mask, double x) {
#pragma unroll
  for (int offset = Width / 2; offset > 0; offset /= 2) x = join<R>(x, __shfl_xor_sync(mask, x, offset, Width));
  return x;
}

template <int Width>
struct Lanes {
  int index;
  unsigned mask;

  __device__ Lanes() : index(threadIdx.x % Width), mask(0xffffffffu) {
    if (Width < 32) mask = ((1u << (Width % 32)) - 1) << (threadIdx.x % 32 / Width * Width);
  }
  FASTGRPO_HD int64_t lane() const { return index; }
  FASTGRPO_HD int64_t width() const { return Width; }
  FASTGRPO_HD double sum(double x) const { FASTGRPO_DEVICE_RETURN((reduce_lanes<Reduction::kSum, Width>(mask, x))); }
  FASTGRPO_HD double min(double x) const { FASTGRPO_DEVICE_RETURN((reduce_lanes<Reduction::kMin, Width>(mask, x))); }
  FASTGRPO_HD double max(double x) const { FASTGRPO_DEVICE_RETURN((reduce_lanes<Reduction::kMax, Width>(mask, x))); }
};

// The whole block as a team: warps leave their results in shared memory, every warp reduces them again.
struct Block {
  double* slots;  // [32] shared

  template <Reduction R>
  __device__ double reduce(double x) const {
    x = reduce_lanes<R, 32>(0xffffffffu, x);
    __syncthreads();  // the slots of the previous reduction have been read
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
    __syncthreads();
    return reduce_lanes<R, 32>(0xffffffffu, slots[threadIdx.x % 32]);
  }
  FASTGRPO_HD int64_t lane() const { FASTGRPO_DEVICE_RETURN(threadIdx.x); }
  FASTGRPO_HD int64_t width() const { return kBlock; }
  FASTGRPO_HD double sum(double x) const { FASTGRPO_DEVICE_RETURN(reduce<Reduction::kSum>(x)); }
  FASTGRPO_HD double min(double x) const { FASTGRPO_DEVICE_RETURN(reduce<Reduction::kMin>(x)); }
  FASTGRPO_HD double max(double x) const { FASTGRPO_DEVICE_RETURN(reduce<Reduction::kMax>(x)); }
};

enum class Stage { kScore, kAdvantage, kBoth };

template <int Width>
__device__ int64_t my_group() {
  return (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / Width;
}

template <typename T, int Width>
__global__ void __launch_bounds__(kThreads, 1) group_kernel(
    AdvantageInput<T> in, AdvantageRule rule, Stage stage, double* score, const double* batch, AdvantageOutput<T> out) {
  const int64_t group = my_group<Width>();
  if (group >= in.groups) return;
  const Lanes<Width> team;
  if (stage != Stage::kAdvantage) combine_rewards(team, in, rule, group, score);
  if (stage != Stage::kScore) assign_advantage(team, in, rule, group, score, batch, out);
}

template <typename T, int Width>
__global__ void __launch_bounds__(kThreads, 1) gradient_kernel(
    AdvantageInput<T> in, AdvantageRule rule, AdvantageUpstream<T> up, double* dscore, T* dreward) {
  const int64_t group = my_group<Width>();
  if (group >= in.groups) return;
  group_gradient(Lanes<Width>(), in, rule, group, up, dscore, dreward);
}

__global__ void __launch_bounds__(kBlock) batch_kernel(const double* score, int64_t rows, double ddof, double* batch) {
  __shared__ double slots[32];
  batch_statistics(Block{slots}, score, rows, ddof, batch);
}

template <typename T>
__global__ void __launch_bounds__(kBlock) totals_kernel(
    const T* dadvantage, const T* advantage, const double* score, int64_t rows, double* totals) {
  __shared__ double slots[32];
  batch_totals(Block{slots}, dadvantage, advantage, score, rows, totals);
}

// Counts, and the rows with a non-zero advantage in ascending order: per 1024 rows a ballot per warp, and the sum of
// the ballots of the warps before.
template <typename T>
__global__ void __launch_bounds__(kBlock) list_kernel(
    AdvantageInput<T> in, const double* score, const T* advantage, int64_t* active_index, int64_t* counts,
    double* unused_batch) {
  if (unused_batch && threadIdx.x < kAdvantageBatch) unused_batch[threadIdx.x] = 0;
  __shared__ double slots[32];
  __shared__ int in_warp[kBlock / 32];
  count_rows(Block{slots}, in, score, counts);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t listed = 0;
  for (int64_t start = 0; start < in.rows; start += kBlock) {
    const int64_t row = start + threadIdx.x;
    const bool active = row < in.rows && advantage[row] != 0;
    const unsigned ballot = __ballot_sync(0xffffffffu, active);
    if (lane == 0) in_warp[warp] = __popc(ballot);
    __syncthreads();
    int before = 0, all = 0;
    for (int w = 0; w < kBlock / 32; ++w) {
      before += w < warp ? in_warp[w] : 0;
      all += in_warp[w];
    }
    if (active) active_index[listed + before + __popc(ballot & ((1u << lane) - 1))] = row;
    listed += all;
    __syncthreads();
  }
  for (int64_t i = listed + threadIdx.x; i < in.rows; i += kBlock) active_index[i] = -1;
  if (threadIdx.x == 0) counts[0] = listed;
}

// Current stream of the tensor's device, and that device made current while this object lives.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

unsigned grid(int64_t groups, int width) {
  const int64_t blocks = (groups * width + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "too many groups: ", groups);
  return static_cast<unsigned>(blocks);
}

template <typename T>
bool is_small(const AdvantageInput<T>& in) {
  return in.offsets == nullptr && in.group_size <= 8;
}

template <typename T>
void run_groups(
    const AdvantageInput<T>& in, const AdvantageRule& rule, Stage stage, const AdvantageTensors& out,
    cudaStream_t stream) {
  if (in.groups == 0) return;
  double* score = mutable_pointer<double>(out.score);
  const double* batch = mutable_pointer<double>(out.batch);
  if (is_small(in)) {
    group_kernel<T, 8><<<grid(in.groups, 8), kThreads, 0, stream>>>(in, rule, stage, score, batch, out.pointers<T>());
  } else {
    group_kernel<T, 32><<<grid(in.groups, 32), kThreads, 0, stream>>>(in, rule, stage, score, batch, out.pointers<T>());
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void forward(const AdvantageInput<T>& in, const AdvantageRule& rule, const AdvantageTensors& out, cudaStream_t stream) {
  const double* score = mutable_pointer<double>(out.score);
  double* batch = mutable_pointer<double>(out.batch);
  if (rule.needs_batch()) {
    run_groups(in, rule, Stage::kScore, out, stream);
    batch_kernel<<<1, kBlock, 0, stream>>>(score, in.rows, rule.ddof, batch);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    run_groups(in, rule, Stage::kAdvantage, out, stream);
  } else {
    run_groups(in, rule, Stage::kBoth, out, stream);
  }
  list_kernel<<<1, kBlock, 0, stream>>>(
      in, score, out.pointers<T>().advantage, mutable_pointer<int64_t>(out.active_index),
      mutable_pointer<int64_t>(out.counts), rule.needs_batch() ? nullptr : batch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_advantage_fwd(
    Tensor reward, Tensor weight, Tensor length, Tensor order, Tensor offsets, Tensor params, int64_t group_size,
    std::vector<int64_t> spec) {
  const AdvantageRule rule = advantage_rule(params, spec);
  const Launch launch(reward);
  const AdvantageTensors out(reward);
  if (reward.scalar_type() == ScalarType::Double) {
    const auto in = advantage_input<double>(reward, weight, length, order, offsets, group_size, rule);
    forward(in, rule, out, launch.stream());
  } else {
    STD_TORCH_CHECK(reward.scalar_type() == ScalarType::Float, "reward must be float32 or float64");
    const auto in = advantage_input<float>(reward, weight, length, order, offsets, group_size, rule);
    forward(in, rule, out, launch.stream());
  }
  return out.all();
}

template <typename T>
void backward(
    const AdvantageInput<T>& in, const AdvantageRule& rule, const AdvantageUpstream<T>& up, double* totals,
    const Tensor& dscore, const Tensor& dreward, cudaStream_t stream) {
  if (rule.needs_batch()) {
    totals_kernel<<<1, kBlock, 0, stream>>>(up.dadvantage, up.advantage, up.score, in.rows, totals);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  double* workspace = mutable_pointer<double>(dscore);
  T* result = mutable_pointer<T>(dreward);
  if (is_small(in)) {
    gradient_kernel<T, 8><<<grid(in.groups, 8), kThreads, 0, stream>>>(in, rule, up, workspace, result);
  } else {
    gradient_kernel<T, 32><<<grid(in.groups, 32), kThreads, 0, stream>>>(in, rule, up, workspace, result);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
AdvantageUpstream<T> upstream(
    const Tensor& dadvantage, const Tensor& advantage, const Tensor& score, const Tensor& batch,
    const Tensor& totals) {
  return {
      pointer_or_null<T>(dadvantage), pointer_or_null<T>(advantage), pointer_or_null<double>(score),
      pointer_or_null<double>(batch), pointer_or_null<double>(totals)};
}

Tensor group_advantage_bwd(
    Tensor dadvantage, Tensor advantage, Tensor score, Tensor batch, Tensor reward, Tensor weight, Tensor length,
    Tensor order, Tensor offsets, Tensor params, int64_t group_size, std::vector<int64_t> spec) {
  const AdvantageRule rule = advantage_rule(params, spec);
  check_saved(dadvantage, advantage, score, batch, reward);
  const Launch launch(reward);
  const Tensor dscore = torch::stable::empty_like(score);
  const Tensor dreward = torch::stable::empty_like(reward);
  const Tensor totals = torch::stable::new_empty(score, {2});
  double* sums = mutable_pointer<double>(totals);
  if (reward.scalar_type() == ScalarType::Double) {
    const auto in = advantage_input<double>(reward, weight, length, order, offsets, group_size, rule);
    const auto up = upstream<double>(dadvantage, advantage, score, batch, totals);
    if (in.rows) backward(in, rule, up, sums, dscore, dreward, launch.stream());
  } else {
    STD_TORCH_CHECK(reward.scalar_type() == ScalarType::Float, "reward must be float32 or float64");
    const auto in = advantage_input<float>(reward, weight, length, order, offsets, group_size, rule);
    const auto up = upstream<float>(dadvantage, advantage, score, batch, totals);
    if (in.rows) backward(in, rule, up, sums, dscore, dreward, launch.stream());
  }
  return dreward;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CUDA, m) {
  m.impl("group_advantage_fwd", TORCH_BOX(&group_advantage_fwd));
  m.impl("group_advantage_bwd", TORCH_BOX(&group_advantage_bwd));
}
