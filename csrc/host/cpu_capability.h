// The instruction set that CPU kernels run on: found by cpuid once, lowered by FASTGRPO_CPU_ISA. No torch, no Python:
// csrc/cpu and the `_host` module include the same answer. fastgrpo/host.py has the Python twin.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastgrpo {

enum class CpuIsa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

inline constexpr const char* kCpuIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

inline const char* name_of(CpuIsa isa) { return kCpuIsaNames[static_cast<int>(isa)]; }

// What the processor has and the operating system saves (__builtin_cpu_supports asks for both).
inline CpuIsa detect_cpu_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c)) {
    return CpuIsa::kBaseline;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))) {
    return CpuIsa::kAvx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? CpuIsa::kAvx512Bf16 : CpuIsa::kAvx512;
#else
  return CpuIsa::kBaseline;
#endif
}

// `wanted` (nullptr or empty: no wish) may lower what was found. Asking for more than there is would end in SIGILL.
inline CpuIsa choose_cpu_isa(CpuIsa found, const char* wanted) {
  if (wanted == nullptr || *wanted == '\0') {
    return found;
  }
  for (int i = 0; i < 4; ++i) {
    if (std::string(wanted) == kCpuIsaNames[i]) {
      if (i > static_cast<int>(found)) {
        throw std::invalid_argument("FASTGRPO_CPU_ISA=" + std::string(wanted) + " but this CPU has only " +
                                    name_of(found));
      }
      return static_cast<CpuIsa>(i);
    }
  }
  throw std::invalid_argument("FASTGRPO_CPU_ISA must be baseline, avx2, avx512 or avx512_bf16, got '" +
                              std::string(wanted) + "'");
}

// Read once: the kernels of one process all run on the same instruction set.
inline CpuIsa cpu_isa() {
  static const CpuIsa isa = choose_cpu_isa(detect_cpu_isa(), std::getenv("FASTGRPO_CPU_ISA"));
  return isa;
}

}  // namespace fastgrpo
