// contrast on the CPU: score and state of the negative distance for the pairwise engine.
#ifndef IMBDIFF_REGION
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <tuple>

#include "isa.h"

namespace imbdiff::contrast {
struct Problem {
  const void *x, *y;
  int64_t rows, negatives, width, x_stride, y_stride;
  double scale;
  bool include_self, per_row;
  // Few and enormous rows: split-K, whose E [N, N + M] is worth keeping.
  bool split_k() const { return rows <= 1024 && rows + negatives <= 4096 && width >= 1024; }
  int64_t terms() const { return rows + negatives - (include_self ? 0 : 1); }
};
}  // namespace imbdiff::contrast

// Each region compiles the second half of this file for one instruction set.
#define IMBDIFF_REGION
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
namespace imbdiff::contrast::generic {
constexpr int kBytes = 16, kTall = 4;
#include "contrast.cpp"
}  // namespace imbdiff::contrast::generic
#pragma GCC target("avx2,fma,f16c")
namespace imbdiff::contrast::avx2 {
constexpr int kBytes = 32, kTall = 4;
#include "contrast.cpp"
}  // namespace imbdiff::contrast::avx2
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
namespace imbdiff::contrast::avx512 {
constexpr int kBytes = 64, kTall = 8;
#include "contrast.cpp"
}  // namespace imbdiff::contrast::avx512
#pragma GCC target("avx512bf16")
#define IMBDIFF_BF16
namespace imbdiff::contrast::avx512_bf16 {
constexpr int kBytes = 64, kTall = 8;
#include "contrast.cpp"
}  // namespace imbdiff::contrast::avx512_bf16
#pragma GCC pop_options

namespace imbdiff::contrast {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Problem problem(const Tensor& x, const Tensor& y, double scale, bool include_self, bool per_row) {
  return {x.const_data_ptr(), y.const_data_ptr(), x.size(0),    y.size(0), x.size(1),
          x.stride(0),        y.stride(0),        scale, include_self, per_row};
}

template <class Acc> double loss_of(const Problem& p, const Acc* lse, const Acc* weight) {
  double sum = 0, largest = -std::numeric_limits<double>::infinity();
  const double log_c = std::log(static_cast<double>(p.terms()));
  if (p.per_row) {
    for (int64_t i = 0; i < p.rows; ++i) sum += (weight ? weight[i] : 1.) * (lse[i] - log_c);
    return sum / p.rows;
  }
  for (int64_t i = 0; i < p.rows; ++i) largest = std::max<double>(largest, lse[i]);
  if (std::isinf(largest)) largest = 0;
  for (int64_t i = 0; i < p.rows; ++i) sum += std::exp(lse[i] - largest);
  return largest + std::log(sum) - log_c - std::log(static_cast<double>(p.rows));
}

// f for the element type of x: bfloat16 has a region of its own where the machine multiplies pairs of it.
#define BY_DTYPE(x, f)                                                                                         \
  switch (x.scalar_type()) {                                                                                   \
    case ScalarType::Float: IMBDIFF_BY_ISA(f<float>)(ARGS); break;                                             \
    case ScalarType::Double: IMBDIFF_BY_ISA(f<double>)(ARGS); break;                                           \
    case ScalarType::Half: IMBDIFF_BY_ISA(f<Half>)(ARGS); break;                                               \
    case ScalarType::BFloat16: (has_bf16_dot() ? &avx512_bf16::f<Brain> : IMBDIFF_BY_ISA(f<Brain>))(ARGS); break; \
    default: throw std::runtime_error("negative_distance: rows must be float32, float64, bfloat16 or float16"); \
  }

std::tuple<Tensor, Tensor, Tensor> negative_distance(const Tensor& x, const Tensor& negatives, const Tensor& weight, double scale,
                                                     bool include_self, bool per_row) {
  const Problem p = problem(x, negatives, scale, include_self, per_row);
  Tensor loss = torch::stable::new_zeros(weight, {}), lse = torch::stable::new_zeros(weight, {p.rows});
  const bool empty = p.rows == 0 || p.terms() == 0;
  Tensor saved = !empty && p.split_k() ? torch::stable::new_empty(weight, {p.rows, p.rows + p.negatives})
                                       : torch::stable::new_empty(weight, {0});
  if (empty) return {loss, lse, saved};
#define ARGS p, lse.mutable_data_ptr(), saved.mutable_data_ptr()
  BY_DTYPE(x, forward)
#undef ARGS
  const auto finish = [&](auto acc) {
    using Acc = decltype(acc);
    const auto* w = weight.numel() ? static_cast<const Acc*>(weight.const_data_ptr()) : nullptr;
    *static_cast<Acc*>(loss.mutable_data_ptr()) = static_cast<Acc>(loss_of(p, static_cast<const Acc*>(lse.const_data_ptr()), w));
  };
  x.scalar_type() == ScalarType::Double ? finish(double{}) : finish(float{});
  return {loss, lse, saved};
}

Tensor negative_distance_bwd(const Tensor& grad, const Tensor& x, const Tensor& negatives, const Tensor& weight, const Tensor& lse,
                             const Tensor& saved, double scale, bool include_self, bool per_row) {
  const Problem p = problem(x, negatives, scale, include_self, per_row);
  if (p.rows == 0 || p.terms() == 0) return torch::stable::new_zeros(x, {p.rows, p.width});
  Tensor out = torch::stable::new_empty(x, {p.rows, p.width});
  const void* w = weight.numel() ? weight.const_data_ptr() : nullptr;
#define ARGS p, grad.const_data_ptr(), w, lse.const_data_ptr(), saved.const_data_ptr(), out.mutable_data_ptr()
  BY_DTYPE(x, backward)
#undef ARGS
  return out;
}
}  // namespace imbdiff::contrast

STABLE_TORCH_LIBRARY_IMPL(imbdiff, CPU, m) {
  m.impl("negative_distance_cpu", TORCH_BOX(&imbdiff::contrast::negative_distance));
  m.impl("negative_distance_bwd_cpu", TORCH_BOX(&imbdiff::contrast::negative_distance_bwd));
}

#else
#include "engine.inc"
#include "../common/contrast.h"

template <class In> struct PackOf { using type = Plain<Acc<In>>; };
#ifdef IMBDIFF_BF16
template <> struct PackOf<Brain> { using type = Pair; };
#endif

template <class A> static void score(A* tile, int64_t rows, int64_t columns, const A* norm_i, const A* norm_j, A twice, bool self,
                                     A diagonal) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += kLanes<A>)
      store(tile + r * kBlock + c, energy(Vec<A>{} + norm_i[r], load(norm_j + c), twice * load(tile + r * kBlock + c)));
  for (int64_t r = 0; self && r < rows; ++r) tile[r * kBlock + r] = diagonal;
}

template <class A> struct Lse {  // running state of rows, see Partial
  A *low, *sum;
  Lse at(int64_t i) const { return {low + i, sum + i}; }
};

// Takes a tile of energies into the states of its rows and, where given, of its columns.
template <bool kAnchored, class A> static void take(const A* tile, int64_t rows, int64_t columns, Lse<A> of_i, Lse<A> of_j, bool both) {
  using V = Vec<A>;
  constexpr int64_t W = kLanes<A>;
  const auto lesser = [](auto a, auto b) { return b < a ? b : a; };
  const auto plus = [](A a, A b) { return a + b; };
  for (int64_t r = 0; r < rows; ++r, tile += kBlock) {
    V low{}, sum{};
    if constexpr (!kAnchored) {
      low += of_i.low[r];
      for (int64_t c = 0; c < columns; c += W) low = lesser(low, load(tile + c));
      const A least_e = across<A>(low, lesser);
      of_i.sum[r] *= Exp()(least_e - of_i.low[r]);
      of_i.low[r] = least_e;
      low = V{} + least_e;
    }
    for (int64_t c = 0; c < columns; c += W) {
      const V e = load(tile + c), term = Exp()(low - e);
      sum += term;
      if (kAnchored && both) store(of_j.sum + c, load(of_j.sum + c) + term);
    }
    of_i.sum[r] += across<A>(sum, plus);
  }
  if constexpr (!kAnchored) {
    tile -= rows * kBlock;
    for (int64_t c = 0; both && c < columns; c += W) {
      V low = load(of_j.low + c), sum{};
      for (int64_t r = 0; r < rows; ++r) low = lesser(low, load(tile + r * kBlock + c));
      for (int64_t r = 0; r < rows; ++r) sum += Exp()(low - load(tile + r * kBlock + c));
      store(of_j.sum + c, load(of_j.sum + c) * Exp()(low - load(of_j.low + c)) + sum);
      store(of_j.low + c, low);
    }
  }
}

// Turns energies into S = P + P^T, adds its sums over rows and, where given, columns.
template <bool kShared, class P, class A>
static void weigh(A* tile, int64_t rows, int64_t columns, const A* shift_i, const A* factor_i, A* mass_i, const A* shift_j,
                  const A* factor_j, A* mass_j) {
  const auto plus = [](A a, A b) { return a + b; };
  for (int64_t r = 0; r < rows; ++r, tile += kBlock) {
    Vec<A> sum{};
    for (int64_t c = 0; c < columns; c += kLanes<A>) {
      const Vec<A> s = P::round(pull<kShared>(load(tile + c), Weight<A>{shift_i[r], factor_i[r]}, load(shift_j + c),
                                              load(factor_j + c), Exp()));
      store(tile + c, s);
      sum += s;
      if (mass_j) store(mass_j + c, load(mass_j + c) + s);
    }
    mass_i[r] += across<A>(sum, plus);
  }
}

template <class In> struct Setup {
  using A = Acc<In>;
  explicit Setup(const Problem& p)
      : x{static_cast<const In*>(p.x), p.rows, p.x_stride, p.width}, y{static_cast<const In*>(p.y), p.negatives, p.y_stride, p.width},
        block(p.rows < 512 ? 48 : p.rows < 3072 ? 96 : kBlock), padded(round_up(p.rows, block)),
        y_offset(round_up(p.rows, kLanes<A>)), ld(y_offset + round_up(p.negatives, kLanes<A>)),
        centre_memory((p.width + 1024) * sizeof(A)), centre(static_cast<A*>(centre_memory.data)) {
    constexpr int64_t kStrip = 256;
    if (!p.split_k()) parallel((p.width + kStrip - 1) / kStrip, [&](int64_t s) {
      column_means(x, s * kStrip, least(p.width, (s + 1) * kStrip), centre + s * kStrip);
    });
  }
  Rows<In> x, y;
  int64_t block, padded, y_offset, ld;
  Scratch centre_memory;
  A* centre;
};

// A row of E as the split-K plan keeps it [N + M], spread out so that x and y start at full vectors; the gaps are infinitely far.
template <class A> static void spread_row(const A* saved, int64_t n, int64_t m, int64_t offset, int64_t ld, A* row) {
  for (int64_t j = 0; j < ld; ++j) row[j] = j < n ? saved[j] : j >= offset && j < offset + m ? saved[n + j - offset] : A(__builtin_inf());
}

template <class In> void forward(const Problem& p, void* lse_out, void* saved_out) {
  using A = Acc<In>;
  using P = typename PackOf<In>::type;
  const Setup<In> s(p);
  const A twice = static_cast<A>(2 * p.scale), scale = static_cast<A>(p.scale), diagonal = p.include_self ? 0 : __builtin_inf();
  A *const lse = static_cast<A*>(lse_out), *const saved = static_cast<A*>(saved_out);
  const Scratch memory(2 * s.padded * sizeof(A));
  const Lse<A> state{static_cast<A*>(memory.data), static_cast<A*>(memory.data) + s.padded};
  for (int64_t i = 0; i < s.padded; ++i) state.low[i] = p.include_self ? 0 : A(sizeof(A) == 4 ? 3e38 : 1e308), state.sum[i] = 0;
  const auto take_tile = p.include_self ? &take<true, A> : &take<false, A>;
  if (p.split_k()) {
    const int64_t n = p.rows, m = p.negatives, width = n + m;
    split_k_gram<P>(s.x, s.y, [&](int64_t i, const double* norms, const double* products, int64_t offset) {
      for (int64_t j = i; j < n; ++j)
        saved[i * width + j] = saved[j * width + i] = i == j ? diagonal : static_cast<A>(p.scale * energy(norms[i], norms[j], 2 * products[j]));
      for (int64_t j = 0; j < m; ++j)
        saved[i * width + n + j] = static_cast<A>(p.scale * energy(norms[i], norms[offset + j], 2 * products[offset + j]));
    });
    parallel(n, [&](int64_t i) {
      const Scratch row_memory(s.ld * sizeof(A));
      A* const row = static_cast<A*>(row_memory.data);
      spread_row(saved + i * width, n, m, s.y_offset, s.ld, row);
      take_tile(row, 1, s.ld, state.at(i), state, false);
    });
  } else {
    const Packed<P, In> x(s.x, s.block, s.centre, scale, false), y(s.y, s.block, s.centre, scale, false);
    stream(x, y, [&](A* tile, const auto&, int64_t i, const auto& other, int64_t j) {
      const bool own = &other == &x;
      score(tile, x.size(i), other.size(j), x.norms(i), other.norms(j), twice, own && i == j, diagonal);
      take_tile(tile, x.size(i), other.size(j), state.at(i), state.at(own ? j : 0), own && i != j);
    });
  }
  for (int64_t i = 0; i < p.rows; ++i)
    lse[i] = log_sum(Partial<A>{state.low[i], state.sum[i]}, [](A v) { return static_cast<A>(__builtin_log(v)); });
}

template <class In>
void backward(const Problem& p, const void* grad_in, const void* weight_in, const void* lse_in, const void* saved_in, void* out_in) {
  using A = Acc<In>;
  using P = typename PackOf<In>::type;
  const Setup<In> s(p);
  const A *const weight = static_cast<const A*>(weight_in), *const lse = static_cast<const A*>(lse_in);
  In* const out = static_cast<In*>(out_in);
  const A factor = static_cast<A>(*static_cast<const A*>(grad_in) * -2 * p.scale), twice = static_cast<A>(2 * p.scale);
  const int64_t length = s.padded + s.ld + kBlock;  // of x, then zeros for the negatives, which pull at nobody
  const Scratch memory(3 * length * sizeof(A));
  A *const shift = static_cast<A*>(memory.data), *const share = shift + length, *const mass = share + length;
  double sum = 0, largest = -1e308;
  for (int64_t i = 0; i < p.rows; ++i) largest = lse[i] > largest ? lse[i] : largest;
  for (int64_t i = 0; i < p.rows; ++i) sum += __builtin_exp(lse[i] - largest);
  const A log_z = static_cast<A>(largest + __builtin_log(sum));
  const bool shared = p.include_self || !p.per_row;
  for (int64_t i = 0; i < length; ++i) {
    Weight<A> w{shared && !p.per_row ? log_z : A(0), A(0)};
    if (i < p.rows) w = row_weight(p.per_row, p.include_self, log_z, lse[i], (weight ? weight[i] : A(1)) / p.rows, Exp());
    shift[i] = w.shift, share[i] = w.factor, mass[i] = 0;
  }
  const auto weigh_tile = shared ? &weigh<true, P, A> : &weigh<false, P, A>;
  const A far = __builtin_inf();
  if (p.split_k()) {
    constexpr int64_t G = P::kGroup;
    const int64_t n = p.rows, m = p.negatives, depth = s.ld / G;
    const Scratch panel_memory(round_up(n, kTall) * depth * sizeof(typename P::Element));
    auto* const panels = static_cast<typename P::Element*>(panel_memory.data);
    parallel((n + kTall - 1) / kTall, [&](int64_t group) {
      const Scratch row_memory((s.ld + kLanes<A>) * sizeof(A));
      A* const row = static_cast<A*>(row_memory.data);
      for (int64_t r = 0; r < kTall; ++r) {
        const int64_t i = least(group * kTall + r, n - 1);  // rows beyond the last repeat it, unread
        spread_row(static_cast<const A*>(saved_in) + i * (n + m), n, m, s.y_offset, s.ld, row);
        row[i] = far;
        A ignored = 0;
        weigh_tile(row, 1, s.ld, shift + i, share + i, group * kTall + r < n ? mass + i : &ignored, shift, share, nullptr);
        store(row + s.ld, Vec<A>{});
        for (int64_t j = 0; j < s.ld; j += kLanes<A> * G) {
          Vec<A> part[G];
          for (int64_t h = 0; h < G; ++h) part[h] = load(row + j + h * kLanes<A>);
          const auto packed = P::neighbours(part);
          for (int64_t l = 0; l < kLanes<A> && j / G + l < depth; ++l) panels[(group * depth + j / G + l) * kTall + r] = packed[l];
        }
      }
    });
    return split_k_spread<P>(s.x, s.y, panels, mass, factor, out);
  }
  const A scale = static_cast<A>(p.scale);
  const Packed<P, In> x(s.x, s.block, s.centre, scale, true), y(s.y, s.block, s.centre, scale, true);
  const Scratch grad_memory(s.padded * x.ld * sizeof(A));
  A* const grads = static_cast<A*>(grad_memory.data);
  for (int64_t k = 0; k < s.padded * x.ld; ++k) grads[k] = 0;
  stream(x, y, [&](A* tile, const auto&, int64_t i, const auto& other, int64_t j) {
    const bool own = &other == &x, both = own && i != j;
    const int64_t rows = round_up(x.size(i), kTall), at = own ? j : s.padded;
    score(tile, rows, other.size(j), x.norms(i), other.norms(j), twice, own && i == j, far);
    weigh_tile(tile, rows, other.size(j), shift + i, share + i, mass + i, shift + at, share + at, both ? mass + j : nullptr);
    spread(tile, x, i, grads + i * x.ld, other, j, both ? grads + j * x.ld : nullptr);
  });
  parallel(p.rows, [&](int64_t i) { finish_row<P>(s.x, i, 0, p.width, s.centre, factor, mass[i], grads + i * x.ld, out); });
}
#endif
