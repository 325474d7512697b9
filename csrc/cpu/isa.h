// Which of the three compiled versions of a row kernel this process runs.
#pragma once

#include <cstdlib>
#include <string>

#include <torch/headeronly/util/Exception.h>

namespace fastgrpo {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
          __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return isa_supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::kBaseline;
}

// FASTGRPO_CPU_ISA lowers the choice; asking for more than the processor has is an error, not a crash in a kernel.
inline Isa choose_isa() {
  const char* wish = std::getenv("FASTGRPO_CPU_ISA");
  if (wish == nullptr || *wish == '\0') {
    for (Isa isa : {Isa::kAvx512, Isa::kAvx2}) {
      if (isa_supported(isa)) {
        return isa;
      }
    }
    return Isa::kBaseline;
  }
  const std::string name(wish);
  STD_TORCH_CHECK(
      name == "baseline" || name == "avx2" || name == "avx512",
      "FASTGRPO_CPU_ISA must be baseline, avx2 or avx512, got ",
      name);
  const Isa isa = name == "avx512" ? Isa::kAvx512 : name == "avx2" ? Isa::kAvx2 : Isa::kBaseline;
  STD_TORCH_CHECK(isa_supported(isa), "FASTGRPO_CPU_ISA=", name, ": this processor lacks it");
  return isa;
}

inline Isa current_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

} // namespace fastgrpo
