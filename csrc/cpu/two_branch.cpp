// two_branch on the CPU: one pass forward, one pass backward, rows cut into parts that depend on D alone.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/two_branch.h"
#include "isa.h"

namespace imbdiff::two_branch {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T> struct Row {
  const T* own;
  const T* target;
  const T* const* others;
  int64_t K;
};

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "two_branch.inc"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "two_branch.inc"
}
#pragma GCC pop_options
namespace generic {
#include "two_branch.inc"
}
using generic::Acc;

constexpr int64_t kPart = 1 << 14;  // elements of a row in one task

// The rows of all inputs: stride(0) may be larger than D (a channel slice) or 0 (an expanded row).
template <class T> struct Rows {
  int64_t B, D, K, parts;
  std::vector<const T*> base;
  std::vector<int64_t> stride;

  Rows(const Tensor& own, const Tensor& target, const std::vector<Tensor>& others)
      : B(own.size(0)), D(own.size(1)), K(others.size()), parts((D + kPart - 1) / kPart) {
    add(own);
    add(target);
    for (const Tensor& other : others) add(other);
  }
  void add(const Tensor& rows) {
    base.push_back(static_cast<const T*>(rows.const_data_ptr()));
    stride.push_back(rows.stride(0));
  }
  const T* row(int64_t which, int64_t i) const { return base[which] + i * stride[which]; }

  // f(i, part, begin, length, row): every part of every row, in parallel.
  template <class F> void for_each(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, kPart / std::max<int64_t>(1, std::min(D, kPart)));
    torch::stable::parallel_for(0, B * parts, grain, [&](int64_t first, int64_t last) {
      std::vector<const T*> others(K);
      for (int64_t task = first; task < last; ++task) {
        const int64_t i = task / parts, part = task % parts, begin = part * kPart;
        for (int64_t k = 0; k < K; ++k) others[k] = row(2 + k, i);
        f(i, part, begin, std::min(kPart, D - begin), Row<T>{row(0, i), row(1, i), others.data(), K});
      }
    });
  }
};

template <class T>
void forward(const Rows<T>& rows, const Acc<T>* weight, const Acc<T>* scales, const Acc<T>* margin, Acc<T>* base,
             Acc<T>* terms, Acc<T>* distance) {
  const auto kernel = IMBDIFF_BY_ISA(forward<T>);
  const int64_t B = rows.B, K = rows.K, parts = rows.parts;
  std::vector<double> sums(B * parts * (1 + K));
  rows.for_each([&](int64_t i, int64_t part, int64_t begin, int64_t n, const Row<T>& row) {
    kernel(row, begin, n, &sums[(i * parts + part) * (1 + K)]);
  });
  for (int64_t i = 0; i < B; ++i)
    for (int64_t k = 0; k <= K; ++k) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += sums[(i * parts + part) * (1 + K) + k];
      const Acc<T> d = static_cast<Acc<T>>(sum / static_cast<double>(rows.D));
      if (k == 0) {
        base[i] = d;
        continue;
      }
      const int64_t at = (k - 1) * B + i;
      distance[at] = d;
      terms[at] = scales[(k - 1) * 3 + 2] * weight[at] * penalty(margin[k - 1], d);
    }
}

template <class T>
void backward(const Rows<T>& rows, const Acc<T>* grad_base, const Acc<T>* grad_terms, const Acc<T>* weight,
              const Acc<T>* scales, const Acc<T>* margin, const Acc<T>* distance, T* grad_own,
              const std::vector<T*>& grad_others) {
  const auto kernel = IMBDIFF_BY_ISA(backward<T>);
  const int64_t B = rows.B, D = rows.D, K = rows.K;
  const Acc<T> twice_mean = Acc<T>(2) / static_cast<Acc<T>>(D);
  rows.for_each([&](int64_t i, int64_t, int64_t begin, int64_t n, const Row<T>& row) {
    std::vector<Acc<T>> pull(K), push(K);
    std::vector<T*> others(K);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t at = k * B + i;
      const Acc<T> c = grad_terms[at] * weight[at] * slope(margin[k], distance[at]) * twice_mean;
      pull[k] = scales[k * 3] * c;
      push[k] = scales[k * 3 + 1] * c;
      others[k] = grad_others[k] ? grad_others[k] + i * D : nullptr;
    }
    kernel(row, begin, n, grad_base[i] * twice_mean, pull.data(), push.data(), grad_own ? grad_own + i * D : nullptr,
           others.data());
  });
}

// f with a value of the tensor's element type.
template <class F> auto by_dtype(const Tensor& rows, const F& f) {
  switch (rows.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: throw std::runtime_error("two_branch: rows must be float32, float64, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor, Tensor> two_branch(const Tensor& own, const Tensor& target, const std::vector<Tensor>& others,
                                              const Tensor& weight, const Tensor& scales, const Tensor& margin) {
  const int64_t B = own.size(0), K = others.size();
  Tensor base = torch::stable::new_empty(weight, {B});
  Tensor terms = torch::stable::new_empty(weight, {K, B}), distance = torch::stable::new_empty(weight, {K, B});
  by_dtype(own, [&](auto element) {
    using T = decltype(element);
    const auto in = [](const Tensor& t) { return static_cast<const Acc<T>*>(t.const_data_ptr()); };
    const auto out = [](const Tensor& t) { return static_cast<Acc<T>*>(t.mutable_data_ptr()); };
    forward<T>(Rows<T>(own, target, others), in(weight), in(scales), in(margin), out(base), out(terms), out(distance));
  });
  return {base, terms, distance};
}

std::tuple<Tensor, std::vector<Tensor>> two_branch_bwd(
    const Tensor& grad_base, const Tensor& grad_terms, const Tensor& own, const Tensor& target,
    const std::vector<Tensor>& others, const Tensor& weight, const Tensor& scales, const Tensor& margin,
    const Tensor& distance, const std::vector<bool>& needs) {
  const int64_t B = own.size(0), D = own.size(1), K = others.size();
  const auto make = [&](bool need) {
    return need ? torch::stable::new_empty(own, {B, D}) : torch::stable::new_empty(own, {0});
  };
  Tensor grad_own = make(needs[0]);
  std::vector<Tensor> grads;
  for (int64_t k = 0; k < K; ++k) grads.push_back(make(needs[1 + k]));
  by_dtype(own, [&](auto element) {
    using T = decltype(element);
    const auto in = [](const Tensor& t) { return static_cast<const Acc<T>*>(t.const_data_ptr()); };
    std::vector<T*> to;
    for (int64_t k = 0; k < K; ++k) to.push_back(needs[1 + k] ? static_cast<T*>(grads[k].mutable_data_ptr()) : nullptr);
    backward<T>(Rows<T>(own, target, others), in(grad_base), in(grad_terms), in(weight), in(scales), in(margin),
                in(distance), needs[0] ? static_cast<T*>(grad_own.mutable_data_ptr()) : nullptr, to);
  });
  return {grad_own, grads};
}
}  // namespace imbdiff::two_branch

STABLE_TORCH_LIBRARY_IMPL(imbdiff, CPU, m) {
  m.impl("two_branch_cpu", TORCH_BOX(&imbdiff::two_branch::two_branch));
  m.impl("two_branch_bwd_cpu", TORCH_BOX(&imbdiff::two_branch::two_branch_bwd));
}
