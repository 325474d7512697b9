// The policy loss of a sequence and KL estimates, compiled once per instruction set.
#include "policy_kernels.h"

#include "../host/cpu_capability.h"
#include "row_kernels.h"

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTGRPO_KERNELS "policy_kernels.inc"
#include "each_isa.inc"

namespace fastgrpo {

template <class S>
const PolicyKernels<S>& policy_kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return avx512::kPolicyKernels<S>;
    case CpuIsa::kAvx2:
      return avx2::kPolicyKernels<S>;
    case CpuIsa::kBaseline:
      break;
  }
#endif
  return baseline::kPolicyKernels<S>;
}

template const PolicyKernels<float>& policy_kernels<float>();
template const PolicyKernels<double>& policy_kernels<double>();

}  // namespace fastgrpo
