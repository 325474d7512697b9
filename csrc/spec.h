// Mirror of fastgrpo/spec.py: the codes of an objective's choices and the layout of its parameters and metrics. Python is
// the original; tests/cpu/test_spec.py compares the two, name by name.
#pragma once

#include <cstdint>

namespace fastgrpo {

enum class Level : int64_t { kToken, kSeqMean, kSeqSum };
enum class PoolGrad : int64_t { kShared, kLocal };
enum class Surrogate : int64_t { kRatio, kLogp, kCustom };
enum class Shape : int64_t { kHard, kSigmoid, kGamma };
enum class Estimator : int64_t { kNone, kK1, kK2, kK3, kAbs };
enum class KLGrad : int64_t { kPath, kK2, kRatio, kRatioDetached };
enum class KLTarget : int64_t { kRef, kOld };
enum class Stat : int64_t { kRatio, kK1, kK2, kK3, kTv, kBinaryKl, kEntropy };
enum class Between : int64_t { kThetaOld, kThetaRollout };
enum class Pool : int64_t { kToken, kSeqSum, kSeqMean, kSeqMax };
enum class When : int64_t { kAlways, kPositive, kNegative };
enum class Scope : int64_t { kPolicy, kPolicyAndKl };

inline constexpr int kSpecHead = 8;
inline constexpr int kSpecGate = 5;
inline constexpr int kMaxGates = 4;

namespace param {
enum : int {
  kPosLow,
  kPosHigh,
  kNegLow,
  kNegHigh,
  kDClamp,
  kLogLow,
  kLogHigh,
  kPoolLow,
  kPoolHigh,
  kShapePosA,
  kShapePosB,
  kShapeNegA,
  kShapeNegB,
  kBeta,
  kKlClampIn,
  kKlClampOut,
  kKlRatioCap,
  kUser0,
  kUser1,
  kUser2,
  kUser3,
  kUser4,
  kUser5,
  kUser6,
  kUser7,
  kGates,  // then (low, high) of each gate
};
}  // namespace param
inline constexpr int kNumParams = param::kGates + 2 * kMaxGates;

namespace metric {
enum : int {
  kPolicyLoss,
  kKl,
  kRatio,
  kCoefficient,
  kLogRatio,
  kClipLow,
  kClipHigh,
  kClipRegion,
  kClipDual,
  kGateClosed,
  kClampLogRatio,
  kClampKl,
  kEntropy,
  kLogprob,
  kFault,
  kActive,
  kCount,
};
}  // namespace metric
inline constexpr int kNumMetrics = metric::kCount;

}  // namespace fastgrpo
