// The products of a language-model head in bfloat16 with float32 sums that are never rounded on the way: logits, and the
// gradients of hidden states and weight from the gradient of the logits.
//
// Each operand is packed once; the smaller one as a whole, the other panel by panel. Every element of a result is summed
// in an order that depends on the length of the sum alone: results of a row do not depend on the rows around it, on the
// number of threads or on the position in a batch.
#include "head_tile.h"
#include "tensors.h"

#include "../host/cpu_capability.h"

#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)

namespace fastgrpo::head {
namespace {

// Memory for packed operands, at cache lines.
class Packed {
 public:
  explicit Packed(int64_t count) : data_(static_cast<uint32_t*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64))) {
    STD_TORCH_CHECK(data_ != nullptr, "out of memory for ", count * 4, " bytes of packed operands");
  }
  uint32_t* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(uint32_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint32_t, Free> data_;
};

int64_t blocks(int64_t k) { return (k + kBlock - 1) / kBlock; }
int64_t block_size(int64_t k, int64_t block) { return std::min(kBlock, k - block * kBlock); }

struct Matrix {
  int64_t rows, cols, stride;
};

Matrix check(const Tensor& tensor, const char* name, bool may_be_float, bool may_be_half = true) {
  check_rows(tensor, name);
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      (may_be_half && dtype == ScalarType::BFloat16) || (may_be_float && dtype == ScalarType::Float), name,
      " has the wrong dtype (code ", static_cast<int>(dtype), ")");
  return {tensor.size(0), tensor.size(1), tensor.stride(0)};
}

template <class T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Results that no cache could hold until they are read are written past it.
template <class T>
Store how_to_store(int64_t rows, int64_t cols) {
  constexpr int64_t kCacheBytes = 32 << 20;
  return rows * cols * static_cast<int64_t>(sizeof(T)) > kCacheBytes ? Store::kStream : Store::kReplace;
}

// A bfloat16 gradient has no rest.
template <class D>
int64_t num_terms(bool split) {
  return split && std::is_same_v<D, float> ? 2 : 1;
}

void check_machine() {
  STD_TORCH_CHECK(cpu_isa() == CpuIsa::kAvx512Bf16, "this CPU (or FASTGRPO_CPU_ISA) lacks avx512_bf16");
}

// What the rounding of dlogits took from the column of each row's token: added back where the sums are made.
struct Residual {
  const float* value;  // nullptr: none
  const int64_t* token;

  Residual(const Tensor& residual, const Tensor& token_ids, int64_t rows)
      : value(flat<float>(residual, "residual", rows, true)),
        token(value == nullptr ? nullptr : flat<int64_t>(token_ids, "token_ids", rows)) {}
};

// logits [n, V] = hidden [n, H] @ weight [V, H].T
void head_logits(Tensor hidden, Tensor weight, Tensor logits) {
  check_machine();
  const Matrix h = check(hidden, "hidden", false), w = check(weight, "weight", false);
  const Matrix out = check(logits, "logits", true, false);
  STD_TORCH_CHECK(
      h.cols == w.cols && out.rows == h.rows && out.cols == w.rows, "logits must be [n, V] for hidden [n, H], weight [V, H]");
  const auto* hidden_data = const_data<BFloat16>(hidden);
  const auto* weight_data = const_data<BFloat16>(weight);
  auto* logits_data = data_of<float>(logits);
  const int64_t k = h.cols, row_tiles = tiles(h.rows), num_blocks = blocks(k);
  const Store how = how_to_store<float>(h.rows, w.rows);
  const Packed a(row_tiles * kRows * num_blocks * (kBlock / 2));
  const auto tile = [&](int64_t block, int64_t t) {
    return a.get() + (block * (kBlock / 2) * row_tiles + t * pairs(block_size(k, block))) * kRows;
  };
  torch::stable::parallel_for(0, row_tiles, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t block = 0; block < num_blocks; ++block) {
        const BFloat16* from = hidden_data + t * kRows * h.stride + block * kBlock;
        const int64_t rows = std::min<int64_t>(kRows, h.rows - t * kRows);
        pack_rows(from, h.stride, rows, block_size(k, block), Part::kRounded, tile(block, t));
      }
    }
  });
  torch::stable::parallel_for(0, panels(w.rows), 4, [&](int64_t begin, int64_t end) {
    const Packed b(num_blocks * (kBlock / 2) * kCols);
    alignas(64) float sum[kRows * kCols];
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kCols, cols = std::min<int64_t>(kCols, w.rows - first);
      for (int64_t block = 0; block < num_blocks; ++block) {
        const BFloat16* from = weight_data + first * w.stride + block * kBlock;
        pack_cols_transposed(from, w.stride, cols, block_size(k, block), b.get() + block * (kBlock / 2) * kCols);
      }
      const int64_t next_rows = std::clamp<int64_t>(w.rows - first - kCols, 0, kCols);
      for (int64_t t = 0; t < row_tiles; ++t) {
        for (int64_t r = next_rows * t / row_tiles; r < next_rows * (t + 1) / row_tiles; ++r) {
          prefetch(weight_data + (first + kCols + r) * w.stride, k * sizeof(BFloat16));
        }
        for (int64_t block = 0; block < num_blocks; ++block) {
          const uint32_t* b_block = b.get() + block * (kBlock / 2) * kCols;
          multiply(pairs(block_size(k, block)), tile(block, t), b_block, sum, kCols, block > 0);
        }
        for (int64_t i = t * kRows; i < std::min(h.rows, (t + 1) * kRows); ++i) {
          store(logits_data + i * out.stride + first, sum + (i - t * kRows) * kCols, cols, how);
        }
      }
    }
    finish_stores();
  });
}

// Parts of the vocabulary that are summed apart, then together: work for threads, and the same bits for any number of them.
constexpr int64_t kParts = 8;

// sum [tiles(n) * 6, width] = dlogits [n, from:to] @ weight [from:to].
template <class D>
void add_part(
    const D* dlogits, const Matrix& d, const BFloat16* weight, const Matrix& w, int64_t from, int64_t to, bool split,
    float* sum) {
  const int64_t row_tiles = tiles(d.rows), col_panels = panels(w.cols), width = col_panels * kCols;
  const int64_t terms = num_terms<D>(split);
  const Packed a(terms * row_tiles * kRows * (kBlock / 2)), b((kBlock / 2) * kCols);
  for (int64_t start = from; start < to; start += kBlock) {
    const int64_t k = std::min(kBlock, to - start), count = pairs(k);
    for (int64_t t = 0; t < terms * row_tiles; ++t) {
      const int64_t first = t % row_tiles * kRows, rows = std::min<int64_t>(kRows, d.rows - first);
      const Part part = t < row_tiles ? Part::kRounded : Part::kRest;
      pack_rows(dlogits + first * d.stride + start, d.stride, rows, k, part, a.get() + t * count * kRows);
    }
    for (int64_t panel = 0; panel < col_panels; ++panel) {
      const int64_t first = panel * kCols, cols = std::min<int64_t>(kCols, w.cols - first);
      pack_cols(weight + start * w.stride + first, w.stride, cols, k, b.get());
      const bool last = panel + 1 == col_panels;
      const BFloat16* next = weight + (last ? (start + kBlock) * w.stride : start * w.stride + first + kCols);
      const int64_t next_k = last ? std::clamp<int64_t>(to - start - kBlock, 0, kBlock) : k;
      for (int64_t t = 0; t < terms * row_tiles; ++t) {
        for (int64_t i = next_k * t / (terms * row_tiles); i < next_k * (t + 1) / (terms * row_tiles); ++i) {
          prefetch(next + i * w.stride, kCols * sizeof(BFloat16));
        }
        float* tile = sum + t % row_tiles * kRows * width + first;
        multiply(count, a.get() + t * count * kRows, b.get(), tile, width, start > from || t >= row_tiles);
      }
    }
  }
}

// dhidden [n, H] = dlogits [n, V] @ weight [V, H].
template <class D, class Out>
void hidden_gradient(
    const Tensor& dlogits, const Tensor& weight, const Residual& residual, bool split, const Tensor& dhidden) {
  const Matrix d{dlogits.size(0), dlogits.size(1), dlogits.stride(0)};
  const Matrix w{weight.size(0), weight.size(1), weight.stride(0)};
  const auto* weight_data = const_data<BFloat16>(weight);
  auto* out = data_of<Out>(dhidden);
  const int64_t width = panels(w.cols) * kCols, size = tiles(d.rows) * kRows * width;
  const int64_t step = (blocks(d.cols) + kParts - 1) / kParts * kBlock;
  std::vector<float> total(size, 0.0f);
  const auto add = [&](const std::vector<float>& part) {
    for (int64_t i = 0; i < size; ++i) {
      total[i] += part[i];
    }
  };
  const auto part_into = [&](int64_t index, std::vector<float>& sum) {
    sum.resize(size);
    const int64_t from = index * step, to = std::min(d.cols, from + step);
    if (from < to) {
      add_part(const_data<D>(dlogits), d, weight_data, w, from, to, split, sum.data());
    }
  };
  const int64_t used = (d.cols + step - 1) / step;
  if (torch::stable::get_num_threads() == 1) {
    std::vector<float> sum;
    for (int64_t index = 0; index < used; ++index) {
      part_into(index, sum);
      add(sum);
    }
  } else {
    std::vector<std::vector<float>> sums(used);
    torch::stable::parallel_for(0, used, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        part_into(index, sums[index]);
      }
    });
    for (const auto& sum : sums) {
      add(sum);
    }
  }
  for (int64_t i = 0; i < d.rows; ++i) {
    float* row = total.data() + i * width;
    if (residual.value != nullptr) {
      const int64_t token = std::clamp<int64_t>(residual.token[i], 0, w.rows - 1);
      add_scaled(row, residual.value[i], weight_data + token * w.stride, w.cols);
    }
    store(out + i * dhidden.stride(0), row, w.cols, Store::kReplace);
  }
}

// Rows of a batch by their token, so that a tile of the weight's gradient finds the residuals that belong to it.
std::vector<int64_t> order_by_token(const Residual& residual, int64_t rows, int64_t vocabulary) {
  std::vector<int64_t> order(residual.value == nullptr ? 0 : rows);
  for (int64_t i = 0; i < static_cast<int64_t>(order.size()); ++i) {
    order[i] = i;
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
    return std::clamp<int64_t>(residual.token[x], 0, vocabulary - 1) <
        std::clamp<int64_t>(residual.token[y], 0, vocabulary - 1);
  });
  return order;
}

// dweight [V, H] (+)= dlogits [n, V].T @ hidden [n, H]; the sum runs over the rows of the chunk.
template <class D, class Out>
void weight_gradient(
    const Tensor& dlogits, const Tensor& hidden, const Residual& residual, bool split, bool accumulate,
    const Tensor& dweight) {
  const Matrix d{dlogits.size(0), dlogits.size(1), dlogits.stride(0)};
  const Matrix h{hidden.size(0), hidden.size(1), hidden.stride(0)};
  const auto* dlogits_data = const_data<D>(dlogits);
  const auto* hidden_data = const_data<BFloat16>(hidden);
  auto* out = data_of<Out>(dweight);
  const int64_t out_stride = dweight.stride(0);
  const int64_t k = d.rows, num_blocks = blocks(k), col_panels = panels(h.cols);
  const int64_t terms = num_terms<D>(split);
  const Store how = accumulate ? Store::kAdd : how_to_store<Out>(d.cols, h.cols);
  const std::vector<int64_t> order = order_by_token(residual, k, d.cols);
  const Packed b(std::max<int64_t>(num_blocks, 1) * (kBlock / 2) * col_panels * kCols);
  const auto b_block = [&](int64_t block, int64_t panel) {
    return b.get() + (block * (kBlock / 2) * col_panels + panel * pairs(block_size(k, block))) * kCols;
  };
  torch::stable::parallel_for(0, col_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t block = 0; block < num_blocks; ++block) {
        const int64_t first = panel * kCols, cols = std::min<int64_t>(kCols, h.cols - first);
        const BFloat16* from = hidden_data + block * kBlock * h.stride + first;
        pack_cols(from, h.stride, cols, block_size(k, block), b_block(block, panel));
      }
    }
  });
  constexpr int64_t kSlabRows = kSlab * kRows;
  torch::stable::parallel_for(0, (d.cols + kSlabRows - 1) / kSlabRows, 1, [&](int64_t begin, int64_t end) {
    const int64_t term_size = std::max<int64_t>(num_blocks, 1) * (kBlock / 2) * kSlabRows;
    const Packed a(terms * term_size);
    alignas(64) float sum[kRows * kCols] = {};
    for (int64_t slab = begin; slab < end; ++slab) {
      const int64_t first = slab * kSlabRows, rows = std::min(kSlabRows, d.cols - first);
      const int64_t next_rows = std::clamp<int64_t>(d.cols - first - kSlabRows, 0, kSlabRows);
      for (int64_t block = 0; block < num_blocks; ++block) {
        for (int64_t term = 0; term < terms; ++term) {
          uint32_t* to = a.get() + term * term_size + block * (kBlock / 2) * kSlabRows;
          const Part part = term == 0 ? Part::kRounded : Part::kRest;
          pack_rows_transposed(
              dlogits_data + block * kBlock * d.stride + first, d.stride, rows, block_size(k, block), part, to);
        }
      }
      for (int64_t panel = 0; panel < col_panels; ++panel) {
        const int64_t col = panel * kCols, cols = std::min<int64_t>(kCols, h.cols - col);
        for (int64_t i = k * panel / col_panels; i < k * (panel + 1) / col_panels; ++i) {
          prefetch(dlogits_data + i * d.stride + first + kSlabRows, next_rows * sizeof(D));
        }
        for (int64_t t = 0; t < tiles(rows); ++t) {
          for (int64_t step = 0; step < terms * num_blocks; ++step) {
            const int64_t block = step % num_blocks, count = pairs(block_size(k, block));
            const uint32_t* a_tile = a.get() + step / num_blocks * term_size + block * (kBlock / 2) * kSlabRows;
            multiply(count, a_tile + t * count * kRows, b_block(block, panel), sum, kCols, step > 0);
          }
          const int64_t top = first + t * kRows, bottom = std::min(first + rows, top + kRows);
          const auto token_of = [&](int64_t i) { return std::clamp<int64_t>(residual.token[i], 0, d.cols - 1); };
          auto it = std::lower_bound(
              order.begin(), order.end(), top, [&](int64_t i, int64_t value) { return token_of(i) < value; });
          for (; it != order.end() && token_of(*it) < bottom; ++it) {
            float* row = sum + (token_of(*it) - top) * kCols;
            add_scaled(row, residual.value[*it], hidden_data + *it * h.stride + col, cols);
          }
          for (int64_t v = top; v < bottom; ++v) {
            store(out + v * out_stride + col, sum + (v - top) * kCols, cols, how);
          }
        }
      }
    }
    finish_stores();
  });
}

// Calls f with the C++ types of dlogits and of the result.
template <class F>
void dispatch(const Tensor& dlogits, const Tensor& out, F f) {
  const bool wide = dlogits.scalar_type() == ScalarType::Float, wide_out = out.scalar_type() == ScalarType::Float;
  if (wide) {
    wide_out ? f(float{}, float{}) : f(float{}, BFloat16{});
  } else {
    wide_out ? f(BFloat16{}, float{}) : f(BFloat16{}, BFloat16{});
  }
}

void head_hidden_gradient(
    Tensor dlogits, Tensor weight, Tensor residual, Tensor token_ids, bool split, Tensor dhidden) {
  check_machine();
  const Matrix d = check(dlogits, "dlogits", true), w = check(weight, "weight", false);
  const Matrix out = check(dhidden, "dhidden", true);
  STD_TORCH_CHECK(
      d.cols == w.rows && out.rows == d.rows && out.cols == w.cols,
      "dhidden must be [n, H] for dlogits [n, V], weight [V, H]");
  const Residual left(residual, token_ids, d.rows);
  dispatch(dlogits, dhidden, [&](auto from, auto to) {
    hidden_gradient<decltype(from), decltype(to)>(dlogits, weight, left, split, dhidden);
  });
}

void head_weight_gradient(
    Tensor dlogits, Tensor hidden, Tensor residual, Tensor token_ids, bool split, bool accumulate, Tensor dweight) {
  check_machine();
  const Matrix d = check(dlogits, "dlogits", true), h = check(hidden, "hidden", false);
  const Matrix out = check(dweight, "dweight", true);
  STD_TORCH_CHECK(
      d.rows == h.rows && out.rows == d.cols && out.cols == h.cols,
      "dweight must be [V, H] for dlogits [n, V], hidden [n, H]");
  STD_TORCH_CHECK(!accumulate || dweight.scalar_type() == ScalarType::Float, "only a float32 dweight is added to");
  const Residual left(residual, token_ids, d.rows);
  dispatch(dlogits, dweight, [&](auto from, auto to) {
    weight_gradient<decltype(from), decltype(to)>(dlogits, hidden, left, split, accumulate, dweight);
  });
}

// narrow[i] = wide[index[i]] as bfloat16, rows in ascending order. The narrow rows may lie in the memory of the wide ones
// as long as no row is overwritten before it is read.
void narrow_rows(Tensor wide, Tensor index, Tensor narrow) {
  check_machine();
  const Matrix from = check(wide, "wide", true, false), to = check(narrow, "narrow", false);
  const int64_t* row = flat<int64_t>(index, "index", to.rows);
  STD_TORCH_CHECK(from.cols == to.cols, "wide and narrow must have the same number of columns");
  for (int64_t i = 0; i < to.rows; ++i) {
    STD_TORCH_CHECK(row[i] >= (i == 0 ? 0 : row[i - 1] + 1) && row[i] < from.rows, "index must rise within the rows of wide");
    const float* source = const_data<float>(wide) + row[i] * from.stride;
    auto* target = data_of<BFloat16>(narrow) + i * to.stride;
    const auto source_at = reinterpret_cast<uintptr_t>(source), target_at = reinterpret_cast<uintptr_t>(target);
    const uintptr_t source_bytes = from.cols * sizeof(float), target_bytes = to.cols * sizeof(BFloat16);
    const bool apart = target_at + target_bytes <= source_at || source_at + source_bytes <= target_at;
    STD_TORCH_CHECK(apart || target_at <= source_at, "narrow rows must not run ahead of the wide ones");
    const int64_t grain = apart ? 32768 : from.cols;  // from front to back: what is written has been read
    torch::stable::parallel_for(0, from.cols, grain, [&](int64_t begin, int64_t end) {
      store(target + begin, source + begin, end - begin, Store::kReplace);
    });
  }
}

}  // namespace
}  // namespace fastgrpo::head

STABLE_TORCH_LIBRARY_IMPL(fastgrpo_linear, CPU, m) {
  m.impl("head_logits", TORCH_BOX(&fastgrpo::head::head_logits));
  m.impl("head_hidden_gradient", TORCH_BOX(&fastgrpo::head::head_hidden_gradient));
  m.impl("head_weight_gradient", TORCH_BOX(&fastgrpo::head::head_weight_gradient));
  m.impl("narrow_rows", TORCH_BOX(&fastgrpo::head::narrow_rows));
}

#endif
