// segment_scan(x, decay, cu_seqlens, reverse) for CUDA tensors.
//
// Grid: one warp per sequence. 32 tokens at a time, counted from the start of the sequence, so that padding behind it
// changes no bit: each lane holds the map y -> x + a * y of its token, five shuffles compose the maps from here to the
// end of the 32, and the value carried over from the neighbouring 32 goes in last. Reads 8 and writes 4 bytes per token
// (float32), sums in float64. The next 32 tokens are loaded before the current ones are composed.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 128;
constexpr unsigned kWarp = 0xffffffffu;

struct Map {
  double a, x;  // y -> x + a * y; a = 0 cuts, so that a NaN behind it is not seen

  __device__ double operator()(double y) const { return a == 0 ? x : x + a * y; }
  __device__ Map after(const Map& inner) const { return {a == 0 ? 0 : a * inner.a, (*this)(inner.x)}; }
};

// `first` is where the recurrence starts: its decay is not read, the sequence has nothing behind it.
template <typename T>
__device__ Map load(const T* x, const T* decay, int64_t token, int64_t first, bool inside) {
  if (!inside) return {1, 0};
  return {token == first ? 0 : static_cast<double>(decay[token]), static_cast<double>(x[token])};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) scan_kernel(
    const T* x, const T* decay, const int32_t* cu_seqlens, T* y, int64_t tokens, int64_t sequences, bool reverse) {
  const int lane = threadIdx.x % 32;
  const int64_t sequence = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (sequence >= sequences) return;
  const int64_t begin = max(static_cast<int64_t>(cu_seqlens[sequence]), int64_t{0});
  const int64_t end = min(static_cast<int64_t>(cu_seqlens[sequence + 1]), tokens);
  const int64_t chunks = end > begin ? (end - begin + 31) / 32 : 0;
  const int64_t direction = reverse ? -1 : 1;
  const int64_t first = reverse ? end - 1 : begin;
  int64_t token = begin + (reverse ? (chunks - 1) * 32 : 0) + lane;
  double carry = 0;
  Map next = load(x, decay, token, first, chunks > 0 && token < end);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    Map map = next;
    const int64_t here = token;
    token += direction * 32;
    next = load(x, decay, token, first, token >= begin && token < end);
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      Map other;
      other.a = reverse ? __shfl_down_sync(kWarp, map.a, offset) : __shfl_up_sync(kWarp, map.a, offset);
      other.x = reverse ? __shfl_down_sync(kWarp, map.x, offset) : __shfl_up_sync(kWarp, map.x, offset);
      if (reverse ? lane + offset < 32 : lane >= offset) map = map.after(other);
    }
    const double value = map(carry);
    if (here < end) y[here] = static_cast<T>(value);
    carry = __shfl_sync(kWarp, value, reverse ? 0 : 31);
  }
}

// Tokens before the first and behind the last sequence.
template <typename T>
__global__ void __launch_bounds__(kThreads) clear_kernel(
    const int32_t* cu_seqlens, T* y, int64_t tokens, int64_t sequences) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token < tokens && (token < cu_seqlens[0] || token >= cu_seqlens[sequences])) y[token] = 0;
}

template <typename T>
void scan(const Tensor& x, const Tensor& decay, const Tensor& cu_seqlens, const Tensor& y, bool reverse) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const int64_t tokens = x.numel(), sequences = cu_seqlens.numel() - 1;
  const int32_t* ends = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  T* out = static_cast<T*>(y.mutable_data_ptr());
  clear_kernel<T><<<(tokens + kThreads - 1) / kThreads, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      ends, out, tokens, sequences);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (sequences == 0) return;
  scan_kernel<T><<<(sequences * 32 + kThreads - 1) / kThreads, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const T*>(x.const_data_ptr()), static_cast<const T*>(decay.const_data_ptr()), ends, out, tokens,
      sequences, reverse);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor segment_scan(Tensor x, Tensor decay, Tensor cu_seqlens, bool reverse) {
  STD_TORCH_CHECK(x.is_contiguous() && decay.is_contiguous() && cu_seqlens.is_contiguous(), "inputs must be contiguous");
  STD_TORCH_CHECK(decay.numel() == x.numel() && decay.scalar_type() == x.scalar_type(), "decay must be like x");
  STD_TORCH_CHECK(decay.is_cuda() && cu_seqlens.is_cuda(), "decay and cu_seqlens must be on the device of x");
  STD_TORCH_CHECK(
      cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.numel() > 0, "cu_seqlens must be int32 [B + 1]");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  if (x.scalar_type() == ScalarType::Double) {
    scan<double>(x, decay, cu_seqlens, y, reverse);
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be float32 or float64");
    scan<float>(x, decay, cu_seqlens, y, reverse);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CUDA, m) {
  m.impl("segment_scan", TORCH_BOX(&segment_scan));
}
