// The row kernels, compiled once per instruction set and chosen when the first row is seen. Every #include stands before the
// first target pragma: code of a header compiled under it could be merged into, and crash, the baseline.
#include "row_kernels.h"

#include "../host/cpu_capability.h"

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastgrpo {
namespace {
constexpr double kLog2E = 1.4426950408889634;
}
}  // namespace fastgrpo

#define FASTGRPO_VEC_BYTES 16
namespace fastgrpo::baseline {
namespace {
#include "vec.inc"
#include "row_stats.inc"
#include "row_grad.inc"
}  // namespace
}  // namespace fastgrpo::baseline

#if defined(__x86_64__)
#undef FASTGRPO_VEC_BYTES
#define FASTGRPO_VEC_BYTES 32
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace fastgrpo::avx2 {
namespace {
#include "vec.inc"
#include "row_stats.inc"
#include "row_grad.inc"
}  // namespace
}  // namespace fastgrpo::avx2
#pragma GCC pop_options

#undef FASTGRPO_VEC_BYTES
#define FASTGRPO_VEC_BYTES 64
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace fastgrpo::avx512 {
namespace {
#include "vec.inc"
#include "row_stats.inc"
#include "row_grad.inc"
}  // namespace
}  // namespace fastgrpo::avx512
#pragma GCC pop_options

#define FASTGRPO_VEC_BF16 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
namespace fastgrpo::avx512_bf16 {
namespace {
#include "vec.inc"
#include "row_stats.inc"
#include "row_grad.inc"
}  // namespace
}  // namespace fastgrpo::avx512_bf16
#pragma GCC pop_options
#endif

namespace fastgrpo {

template <class T>
const RowKernels<T>& row_kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case CpuIsa::kAvx512Bf16:
      if constexpr (std::is_same_v<T, BFloat16>) {
        return avx512_bf16::kRowKernels<T>;
      }
      [[fallthrough]];
    case CpuIsa::kAvx512:
      return avx512::kRowKernels<T>;
    case CpuIsa::kAvx2:
      return avx2::kRowKernels<T>;
    case CpuIsa::kBaseline:
      break;
  }
#endif
  return baseline::kRowKernels<T>;
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();
template const RowKernels<BFloat16>& row_kernels<BFloat16>();
template const RowKernels<Half>& row_kernels<Half>();

}  // namespace fastgrpo
