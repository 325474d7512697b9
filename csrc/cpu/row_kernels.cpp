// The row kernels, compiled once per instruction set and chosen when the first row is seen.
#include "row_kernels.h"

#include "../host/cpu_capability.h"

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTGRPO_KERNELS "row_kernels.inc"
#include "each_isa.inc"

#if defined(__x86_64__)
// AVX-512 once more for bfloat16, whose rounding to a store is 5 instructions fewer with the conversion of avx512_bf16.
#define FASTGRPO_VEC_BF16 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
namespace fastgrpo::avx512_bf16 {
namespace {
#include FASTGRPO_KERNELS
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
