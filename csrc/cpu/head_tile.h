// The inner part of a language-model head's products: bfloat16 operands repacked into tiles, and one tile multiplied.
//
// AVX512-BF16 multiplies pairs: a 32-bit lane holds two neighbours along the summed dimension, and one instruction adds
// 16 dot products of pairs to 16 floats. So both operands are packed as pairs: `a` six rows wide (broadcast), `b` 64
// columns wide (four registers), and 6 x 64 sums stay in 24 registers. torch has no such product: its bfloat16 result is
// rounded. Every function here needs CpuIsa::kAvx512Bf16.
#pragma once

#include <cstdint>

#include <torch/headeronly/util/BFloat16.h>

namespace fastgrpo::head {

using torch::headeronly::BFloat16;

constexpr int kRows = 6;  // of a tile
constexpr int kCols = 64;
constexpr int kSlab = 16;  // tiles that are packed together where the summed dimension is strided
constexpr int64_t kBlock = 512;  // length of the summed dimension that is multiplied at a time: 64 KB of `b`

constexpr int64_t pairs(int64_t k) { return (k + 1) / 2; }
constexpr int64_t tiles(int64_t rows) { return (rows + kRows - 1) / kRows; }
constexpr int64_t panels(int64_t cols) { return (cols + kCols - 1) / kCols; }

// Which bfloat16 stands for a float: its rounding, or the rounding of what that leaves.
enum class Part { kRounded, kRest };

// a: up to 6 rows of k numbers each, `stride` apart; out [pairs(k)][6], zeros where there is nothing.
void pack_rows(const BFloat16* a, int64_t stride, int64_t rows, int64_t k, Part part, uint32_t* out);
void pack_rows(const float* a, int64_t stride, int64_t rows, int64_t k, Part part, uint32_t* out);

// a transposed: k rows of up to 6 * 16 numbers; out [tile][pairs(k)][6].
void pack_rows_transposed(const BFloat16* a, int64_t stride, int64_t rows, int64_t k, Part part, uint32_t* out);
void pack_rows_transposed(const float* a, int64_t stride, int64_t rows, int64_t k, Part part, uint32_t* out);

// b: k rows of up to 64 numbers; out [pairs(k)][64].
void pack_cols(const BFloat16* b, int64_t stride, int64_t cols, int64_t k, uint32_t* out);

// b transposed: up to 64 rows of k numbers; out [pairs(k)][64].
void pack_cols_transposed(const BFloat16* b, int64_t stride, int64_t cols, int64_t k, uint32_t* out);

// c [6][64], rows `stride` apart, = or += a tile times a panel.
void multiply(int64_t pairs, const uint32_t* a, const uint32_t* b, float* c, int64_t stride, bool accumulate);

// c += factor * x.
void add_scaled(float* c, float factor, const BFloat16* x, int64_t n);

// How a sum becomes part of a result: it replaces it, past the caches where nothing reads it soon, or is added to it.
enum class Store { kReplace, kStream, kAdd };

// out = c, rounded if need be; += c.
void store(BFloat16* out, const float* c, int64_t n, Store how);
void store(float* out, const float* c, int64_t n, Store how);

// Orders streamed results before everything that follows.
void finish_stores();

// Asks for memory that will be packed while other tiles are multiplied: packing it then does not wait.
void prefetch(const void* begin, int64_t bytes);

}  // namespace fastgrpo::head
