// Tiles of a head's products for AVX512-BF16; see head_tile.h.
#include "head_tile.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

// GCC 12 takes the deliberately undefined register inside some intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")

namespace fastgrpo::head {
namespace {

// Up to 32 bfloat16 numbers; the rest of the register is 0.
inline __m512i load_halves(const BFloat16* p, int64_t n, Part) {
  const __mmask32 mask = n >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << n) - 1);
  return _mm512_maskz_loadu_epi16(mask, p);
}

inline __m512 load_floats(const float* p, int64_t n) {
  const __mmask16 mask = n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
  return _mm512_maskz_loadu_ps(mask, p);
}

inline __m512 widen(__m256bh half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16));
}

inline __m256bh convert(__m512 x, Part part) {
  const __m256bh rounded = _mm512_cvtneps_pbh(x);
  return part == Part::kRounded ? rounded : _mm512_cvtneps_pbh(_mm512_sub_ps(x, widen(rounded)));
}

inline __m512i load_halves(const float* p, int64_t n, Part part) {
  const __m256i low = (__m256i)convert(load_floats(p, n), part);
  const __m256i high = (__m256i)convert(load_floats(p + 16, n - 16), part);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Rows of 16 lanes, exchanged with columns in place.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int h = 0; h < 2; ++h) {
      r[4 * i + 2 * h] = _mm512_unpacklo_epi64(t[4 * i + h], t[4 * i + 2 + h]);
      r[4 * i + 2 * h + 1] = _mm512_unpackhi_epi64(t[4 * i + h], t[4 * i + 2 + h]);
    }
  }
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      t[8 * half + i] = _mm512_shuffle_i32x4(r[8 * half + i], r[8 * half + 4 + i], 0x88);
      t[8 * half + 4 + i] = _mm512_shuffle_i32x4(r[8 * half + i], r[8 * half + 4 + i], 0xdd);
    }
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Two rows of 32 halves become two registers of 16 pairs.
struct Interleaved {
  __m512i low, high;
};

inline Interleaved interleave(__m512i even, __m512i odd) {
  alignas(64) static const uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  return {_mm512_permutex2var_epi16(even, low, odd), _mm512_permutex2var_epi16(even, high, odd)};
}

// Six registers of 16 pairs become 16 groups of six: register q of the result takes lane (16 q + l) / 6 of row
// (16 q + l) % 6.
struct Zip {
  alignas(64) uint32_t lane[kRows][16];
  __mmask16 from_row[kRows][kRows];

  constexpr Zip() : lane(), from_row() {
    for (int q = 0; q < kRows; ++q) {
      for (int l = 0; l < 16; ++l) {
        lane[q][l] = (16 * q + l) / kRows;
        from_row[q][(16 * q + l) % kRows] |= static_cast<__mmask16>(1u << l);
      }
    }
  }
};
constexpr Zip kZip;

template <class T>
void pack_rows_of(const T* a, int64_t stride, int64_t rows, int64_t k, Part part, uint32_t* out) {
  __m512i row[kRows];
  for (int i = 0; i < kRows; ++i) {
    row[i] = _mm512_setzero_si512();
  }
  for (int64_t at = 0; at < k; at += 32) {
    for (int64_t i = 0; i < rows; ++i) {
      row[i] = load_halves(a + i * stride + at, k - at, part);
    }
    int64_t left = kRows * pairs(k - at);
    for (int q = 0; q < kRows && left > 0; ++q, left -= 16, out += 16) {
      const __m512i lane = _mm512_load_si512(kZip.lane[q]);
      __m512i zipped = _mm512_permutexvar_epi32(lane, row[0]);
      for (int i = 1; i < kRows; ++i) {
        zipped = _mm512_mask_permutexvar_epi32(zipped, kZip.from_row[q][i], lane, row[i]);
      }
      _mm512_mask_storeu_epi32(out, left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1), zipped);
    }
  }
}

template <class T>
void pack_rows_transposed_of(const T* a, int64_t stride, int64_t rows, int64_t k, Part part, uint32_t* out) {
  alignas(64) uint32_t staged[kSlab * kRows];
  const int64_t count = tiles(rows);
  for (int64_t p = 0; p < pairs(k); ++p) {
    const T* even = a + 2 * p * stride;
    for (int64_t at = 0; at < kSlab * kRows; at += 32) {
      const int64_t left = std::max<int64_t>(rows - at, 0);
      const __m512i odd = 2 * p + 1 < k ? load_halves(even + stride + at, left, part) : _mm512_setzero_si512();
      const Interleaved both = interleave(load_halves(even + at, left, part), odd);
      _mm512_store_si512(staged + at, both.low);
      _mm512_store_si512(staged + at + 16, both.high);
    }
    for (int64_t t = 0; t < count; ++t) {
      std::memcpy(out + (t * pairs(k) + p) * kRows, staged + t * kRows, kRows * sizeof(uint32_t));
    }
  }
}

}  // namespace

void pack_rows(const BFloat16* a, int64_t stride, int64_t rows, int64_t k, Part part, uint32_t* out) {
  pack_rows_of(a, stride, rows, k, part, out);
}

void pack_rows(const float* a, int64_t stride, int64_t rows, int64_t k, Part part, uint32_t* out) {
  pack_rows_of(a, stride, rows, k, part, out);
}

void pack_rows_transposed(const BFloat16* a, int64_t stride, int64_t rows, int64_t k, Part part, uint32_t* out) {
  pack_rows_transposed_of(a, stride, rows, k, part, out);
}

void pack_rows_transposed(const float* a, int64_t stride, int64_t rows, int64_t k, Part part, uint32_t* out) {
  pack_rows_transposed_of(a, stride, rows, k, part, out);
}

void pack_cols(const BFloat16* b, int64_t stride, int64_t cols, int64_t k, uint32_t* out) {
  for (int64_t p = 0; p < pairs(k); ++p) {
    const BFloat16* even = b + 2 * p * stride;
    for (int64_t at = 0; at < kCols; at += 32) {
      const int64_t left = std::max<int64_t>(cols - at, 0);
      const __m512i odd =
          2 * p + 1 < k ? load_halves(even + stride + at, left, Part::kRounded) : _mm512_setzero_si512();
      const Interleaved both = interleave(load_halves(even + at, left, Part::kRounded), odd);
      _mm512_storeu_si512(out + p * kCols + at, both.low);
      _mm512_storeu_si512(out + p * kCols + at + 16, both.high);
    }
  }
}

void pack_cols_transposed(const BFloat16* b, int64_t stride, int64_t cols, int64_t k, uint32_t* out) {
  for (int64_t j = 0; j < kCols; j += 16) {
    for (int64_t at = 0; at < k; at += 32) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) {
        r[i] = j + i < cols ? load_halves(b + (j + i) * stride + at, k - at, Part::kRounded) : _mm512_setzero_si512();
      }
      transpose(r);
      const int64_t count = std::min<int64_t>(16, pairs(k - at));
      for (int64_t p = 0; p < count; ++p) {
        _mm512_storeu_si512(out + (at / 2 + p) * kCols + j, r[p]);
      }
    }
  }
}

void multiply(int64_t pairs, const uint32_t* a, const uint32_t* b, float* c, int64_t stride, bool accumulate) {
  __m512 sum[kRows][4];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < 4; ++j) {
      sum[i][j] = accumulate ? _mm512_loadu_ps(c + i * stride + 16 * j) : _mm512_setzero_ps();
    }
  }
  for (int64_t p = 0; p < pairs; ++p, a += kRows, b += kCols) {
    __m512bh col[4];
    for (int j = 0; j < 4; ++j) {
      col[j] = (__m512bh)_mm512_loadu_si512(b + 16 * j);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        sum[i][j] = _mm512_dpbf16_ps(sum[i][j], row, col[j]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < 4; ++j) {
      _mm512_storeu_ps(c + i * stride + 16 * j, sum[i][j]);
    }
  }
}

void add_scaled(float* c, float factor, const BFloat16* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    c[i] += factor * static_cast<float>(x[i]);
  }
}

// Streaming writes whole cache lines.
template <class T>
inline bool is_streamed(const T* out, int64_t n, Store how) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return how == Store::kStream && n % kLine == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

void store(BFloat16* out, const float* c, int64_t n, Store how) {
  if (is_streamed(out, n, how)) {
    for (int64_t i = 0; i < n; i += 32) {
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(c + i + 16), _mm512_loadu_ps(c + i));
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), (__m512i)both);
    }
    return;
  }
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, c + i));
    _mm256_mask_storeu_epi16(out + i, mask, (__m256i)half);
  }
}

void store(float* out, const float* c, int64_t n, Store how) {
  if (is_streamed(out, n, how)) {
    for (int64_t i = 0; i < n; i += 16) {
      _mm512_stream_ps(out + i, _mm512_loadu_ps(c + i));
    }
  } else if (how == Store::kAdd) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] += c[i];
    }
  } else {
    std::memcpy(out, c, static_cast<size_t>(n) * sizeof(float));
  }
}

void finish_stores() { _mm_sfence(); }

void prefetch(const void* begin, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    _mm_prefetch(static_cast<const char*>(begin) + at, _MM_HINT_T1);
  }
}

}  // namespace fastgrpo::head

#pragma GCC pop_options
#endif
