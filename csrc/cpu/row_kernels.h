// The two passes over a row of logits that every op of the vocabulary side is made of.
//
// A row's logits z become x = v * scale, where v is z itself or tanh(z * cap) (soft-capped logits). Both kernels work in
// base 2 on y = (v - shift) * scale * log2(e) + base: one subtraction and one multiplication before the exponential, and
// the subtraction comes first, so a logit of 1e37 under a temperature of 1e-2 cannot overflow.
#pragma once

#include <cstdint>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace fastgrpo {

inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

struct RowMap {
  double scale; // x = v * scale
  double cap; // v = tanh(z * cap); 0: v = z
};

// Sums over the columns seen so far, relative to the largest v among them (-inf: no finite column yet).
struct RowStats {
  double max; // of v
  double sum; // of 2^y with shift = max; NaN as soon as a column is NaN or +inf
  double moment; // of y * 2^y, 0 where y is -inf
};

// out = p * (constant + slope * y) [* (1 - v^2) under a soft cap] with p = 2^y; exactly 0 where p is.
struct RowGrad {
  double shift;
  double base;
  double constant;
  double slope;
};

// T: float, double, BFloat16 or Half. Rows may be unaligned.
template <class T>
struct RowKernels {
  // Adds n columns to *stats; the moment only if asked for.
  void (*add_stats)(const T* z, int64_t n, const RowMap& map, bool with_moment, RowStats* stats);
  // Writes n columns; out may be z itself.
  void (*write_grad)(const T* z, T* out, int64_t n, const RowMap& map, const RowGrad& grad);
};

// The version for current_isa().
template <class T>
const RowKernels<T>& row_kernels();

} // namespace fastgrpo
