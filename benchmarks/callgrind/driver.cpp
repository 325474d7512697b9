// The CPU kernels without PyTorch and without Python, for callgrind: each measured function runs one kernel over inputs
// that are the same in every run. Linked with the object files of the library itself (benchmarks/callgrind_gate.py).
#include "../../csrc/cpu/policy_kernels.h"
#include "../../csrc/cpu/row_kernels.h"
#include "../../csrc/host/cpu_capability.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#define MEASURED extern "C" __attribute__((noinline)) void

namespace {

using namespace fastgrpo;

constexpr int64_t kColumns = 32003;  // whole blocks and a tail
constexpr int64_t kRows = 2;
constexpr int64_t kTokens = 4096;
constexpr int64_t kLength = 256;  // tokens per sequence

// A linear congruential generator: the same numbers with every standard library.
double uniform() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 11) * 0x1p-53;
}

template <class T>
std::vector<T> logits() {
  std::vector<T> z(kRows * kColumns);
  for (T& value : z) {
    value = static_cast<T>(static_cast<float>(12.0 * uniform() - 6.0));
  }
  return z;
}

template <class T>
double run_stats(const std::vector<T>& z, double cap, bool moment) {
  double total = 0;
  for (int64_t row = 0; row < kRows; ++row) {
    RowStats stats{-std::numeric_limits<double>::infinity(), 0, 0};
    row_kernels<T>().add_stats(z.data() + row * kColumns, kColumns, {cap > 0 ? 1 / cap : 1.0, cap}, moment, &stats);
    total += stats.sum;
  }
  return total;
}

template <class T>
void run_grad(const std::vector<T>& z, std::vector<T>& out, double slope) {
  const RowGrad grad{6.0, -12.0, 0.5, slope};
  for (int64_t row = 0; row < kRows; ++row) {
    row_kernels<T>().write_grad(z.data() + row * kColumns, out.data() + row * kColumns, kColumns, {1.0, 0.0}, grad);
  }
}

// GRPO with clip 0.2 and k3 KL, on the level of tokens or of sequences (see fastgrpo/encoding.py).
PolicySpec objective(Level level) {
  const double inf = std::numeric_limits<double>::infinity();
  PolicySpec spec{};
  spec.level = level;
  spec.kl = {Estimator::kK3, KLGrad::kPath, 20.0, inf, 10.0};
  spec.has_totals = level != Level::kToken;
  for (const int low : {param::kPosLow, param::kLogLow, param::kPoolLow}) {
    spec.params[low] = -inf;
  }
  for (const int high : {param::kNegHigh, param::kLogHigh, param::kPoolHigh, param::kKlClampOut}) {
    spec.params[high] = inf;
  }
  spec.params[param::kPosHigh] = 1.2;
  spec.params[param::kNegLow] = 0.8;
  spec.params[param::kDClamp] = 20.0;
  spec.params[param::kBeta] = 0.04;
  spec.params[param::kKlClampIn] = 20.0;
  spec.params[param::kKlRatioCap] = 10.0;
  return spec;
}

struct Tokens {
  std::vector<float> logprob, old, ref, advantage, weight, loss, slope;
  std::vector<char> mask;

  Tokens() {
    for (int64_t i = 0; i < kTokens; ++i) {
      const float x = static_cast<float>(-4.0 * uniform());
      logprob.push_back(x);
      old.push_back(x + static_cast<float>(0.4 * uniform() - 0.2));
      ref.push_back(x + static_cast<float>(0.4 * uniform() - 0.2));
      advantage.push_back(i / kLength % 2 ? 0.7f : -0.4f);
      weight.push_back(1.0f / kTokens);
      mask.push_back(i % kLength < kLength - 16);
    }
    loss.resize(kTokens);
    slope.resize(kTokens);
  }

  PolicyTokens<float> arrays() {
    PolicyTokens<float> out{};
    out.logprob = logprob.data(), out.old = old.data(), out.ref = ref.data();
    out.advantage = advantage.data(), out.weight = weight.data();
    out.mask = reinterpret_cast<const bool*>(mask.data());
    out.token_loss = loss.data(), out.dlogprob = slope.data();
    return out;
  }
};

std::vector<float> z32;
std::vector<BFloat16> z16;
std::vector<float> out32;
std::vector<BFloat16> out16;
Tokens* tokens;
double sink = 0;

void run_policy(Level level) {
  const PolicySpec spec = objective(level);
  const PolicyTokens<float> arrays = tokens->arrays();
  std::vector<double> scratch(kLength);
  for (int64_t begin = 0; begin < kTokens; begin += kLength) {
    PolicySums sums{};
    policy_kernels<float>().sequence(spec, arrays, begin, begin + kLength, scratch.data(), &sums);
    sink += sums.loss;
  }
}

}  // namespace

MEASURED measured_stats_float32() { sink += run_stats(z32, 0.0, false); }
MEASURED measured_stats_entropy_float32() { sink += run_stats(z32, 0.0, true); }
MEASURED measured_stats_softcap_float32() { sink += run_stats(z32, 1.0 / 30, true); }
MEASURED measured_stats_bfloat16() { sink += run_stats(z16, 0.0, false); }
MEASURED measured_stats_entropy_bfloat16() { sink += run_stats(z16, 0.0, true); }
MEASURED measured_grad_float32() { run_grad(z32, out32, 0.0); }
MEASURED measured_grad_entropy_float32() { run_grad(z32, out32, 0.1); }
MEASURED measured_grad_bfloat16() { run_grad(z16, out16, 0.0); }
MEASURED measured_policy_token() { run_policy(Level::kToken); }
MEASURED measured_policy_sequence() { run_policy(Level::kSeqMean); }

int main() {
  tokens = new Tokens();
  z32 = logits<float>();
  z16 = logits<BFloat16>();
  out32.resize(z32.size());
  out16.resize(z16.size());
  measured_stats_float32();
  measured_stats_entropy_float32();
  measured_stats_softcap_float32();
  measured_stats_bfloat16();
  measured_stats_entropy_bfloat16();
  measured_grad_float32();
  measured_grad_entropy_float32();
  measured_grad_bfloat16();
  measured_policy_token();
  measured_policy_sequence();
  for (const float value : out32) {
    sink += value;
  }
  for (const BFloat16 value : out16) {
    sink += static_cast<float>(value);
  }
  std::printf("%s %d\n", name_of(cpu_isa()), std::isfinite(sink));
  return std::isfinite(sink) ? 0 : 1;
}
