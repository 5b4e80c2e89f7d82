// two_branch on the CPU: one pass forward, one pass backward, rows cut into parts that depend on D alone.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/two_branch.h"
#include "isa.h"

namespace imbdiff::two_branch {
constexpr int64_t kPart = 1 << 14;  // elements of a row in one task

// own, target and the others. A stride may be larger than the width (a channel slice) or 0 (an expanded row).
struct Problem {
  int64_t rows, width, others, parts;
  const void* const* data;
  const int64_t* stride;

  int64_t row(int64_t task) const { return task / parts; }
  int64_t begin(int64_t task) const { return task % parts * kPart; }
  int64_t length(int64_t task) const { return width - begin(task) < kPart ? width - begin(task) : kPart; }
};

// Factors of the differences: of own - target [rows]; of own - other_k, for own and for other_k [others, rows].
template <class A> struct Pulls {
  const A *base, *pull, *push;
};
}  // namespace imbdiff::two_branch

#define IMBDIFF_FAMILY two_branch
#include "regions.h"

namespace imbdiff::two_branch {
using generic::Acc;
using torch::stable::Tensor;

struct Rows {
  std::vector<const void*> data;
  std::vector<int64_t> stride;
  Problem problem;

  Rows(const Tensor& own, const Tensor& target, const std::vector<Tensor>& others) {
    add(own);
    add(target);
    for (const Tensor& other : others) add(other);
    const int64_t D = own.size(1);
    problem = {own.size(0), D, static_cast<int64_t>(others.size()), (D + kPart - 1) / kPart, data.data(), stride.data()};
  }
  void add(const Tensor& rows) {
    data.push_back(rows.const_data_ptr());
    stride.push_back(rows.stride(0));
  }

  // f(first, last) on every range of tasks, in parallel. A range has work enough to be worth another thread.
  template <class F> void for_each_range(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, kPart / std::max<int64_t>(1, std::min(problem.width, kPart)));
    torch::stable::parallel_for(0, problem.rows * problem.parts, grain, f);
  }
};

template <class T>
void forward(const Rows& rows, const Acc<T>* weight, const Acc<T>* scales, const std::vector<double>& margin, Acc<T>* base,
             Acc<T>* terms, Acc<T>* distance) {
  const Problem& p = rows.problem;
  const auto run = IMBDIFF_BY_ISA(forward<T>);
  const int64_t B = p.rows, K = p.others;
  std::vector<double> sums(B * p.parts * (1 + K));
  rows.for_each_range([&](int64_t first, int64_t last) { run(p, first, last, sums.data()); });
  for (int64_t i = 0; i < B; ++i)
    for (int64_t k = 0; k <= K; ++k) {
      double sum = 0;
      for (int64_t part = 0; part < p.parts; ++part) sum += sums[(i * p.parts + part) * (1 + K) + k];
      const Acc<T> d = static_cast<Acc<T>>(sum / static_cast<double>(p.width));
      if (k == 0) {
        base[i] = d;
        continue;
      }
      const int64_t at = (k - 1) * B + i;
      distance[at] = d;
      terms[at] = scales[(k - 1) * 3 + 2] * weight[at] * penalty(static_cast<Acc<T>>(margin[k - 1]), d);
    }
}

template <class T>
void backward(const Rows& rows, const Acc<T>* grad_base, const Acc<T>* grad_terms, const Acc<T>* weight, const Acc<T>* scales,
              const std::vector<double>& margin, const Acc<T>* distance, T* const* grads) {
  const Problem& p = rows.problem;
  const auto run = IMBDIFF_BY_ISA(backward<T>);
  const int64_t B = p.rows, K = p.others;
  const Acc<T> twice_mean = Acc<T>(2) / static_cast<Acc<T>>(p.width);
  std::vector<Acc<T>> factors((1 + 2 * K) * B);
  Acc<T> *const base = factors.data(), *const pull = base + B, *const push = pull + K * B;
  for (int64_t i = 0; i < B; ++i) base[i] = grad_base[i] * twice_mean;
  for (int64_t k = 0; k < K; ++k)
    for (int64_t at = k * B; at < (k + 1) * B; ++at) {
      const Acc<T> c = grad_terms[at] * weight[at] * slope(static_cast<Acc<T>>(margin[k]), distance[at]) * twice_mean;
      pull[at] = scales[k * 3] * c;
      push[at] = scales[k * 3 + 1] * c;
    }
  rows.for_each_range([&](int64_t first, int64_t last) { run(p, first, last, {base, pull, push}, grads); });
}

std::tuple<Tensor, Tensor, Tensor> two_branch(const Tensor& own, const Tensor& target, const std::vector<Tensor>& others,
                                              const Tensor& weight, const Tensor& scales, const std::vector<double>& margin) {
  const int64_t B = own.size(0), K = others.size();
  Tensor base = torch::stable::new_empty(weight, {B});
  Tensor terms = torch::stable::new_empty(weight, {K, B}), distance = torch::stable::new_empty(weight, {K, B});
  by_dtype("two_branch", own, [&](auto element) {
    using T = decltype(element);
    const auto in = [](const Tensor& t) { return static_cast<const Acc<T>*>(t.const_data_ptr()); };
    const auto out = [](const Tensor& t) { return static_cast<Acc<T>*>(t.mutable_data_ptr()); };
    forward<T>(Rows(own, target, others), in(weight), in(scales), margin, out(base), out(terms), out(distance));
  });
  return {base, terms, distance};
}

std::tuple<Tensor, std::vector<Tensor>> two_branch_bwd(
    const Tensor& grad_base, const Tensor& grad_terms, const Tensor& own, const Tensor& target,
    const std::vector<Tensor>& others, const Tensor& weight, const Tensor& scales, const std::vector<double>& margin,
    const Tensor& distance, const std::vector<bool>& needs) {
  const int64_t B = own.size(0), D = own.size(1), K = others.size();
  const auto make = [&](bool need) {
    return need ? torch::stable::new_empty(own, {B, D}) : torch::stable::new_empty(own, {0});
  };
  Tensor grad_own = make(needs[0]);
  std::vector<Tensor> grads;
  for (int64_t k = 0; k < K; ++k) grads.push_back(make(needs[1 + k]));
  by_dtype("two_branch", own, [&](auto element) {
    using T = decltype(element);
    const auto in = [](const Tensor& t) { return static_cast<const Acc<T>*>(t.const_data_ptr()); };
    const auto to = [&](int64_t k) -> T* {
      return needs[k] ? static_cast<T*>((k ? grads[k - 1] : grad_own).mutable_data_ptr()) : nullptr;
    };
    std::vector<T*> out;
    for (int64_t k = 0; k <= K; ++k) out.push_back(to(k));
    backward<T>(Rows(own, target, others), in(grad_base), in(grad_terms), in(weight), in(scales), margin, in(distance),
                out.data());
  });
  return {grad_own, grads};
}
}  // namespace imbdiff::two_branch

STABLE_TORCH_LIBRARY_IMPL(imbdiff, CPU, m) {
  m.impl("two_branch_cpu", TORCH_BOX(&imbdiff::two_branch::two_branch));
  m.impl("two_branch_bwd_cpu", TORCH_BOX(&imbdiff::two_branch::two_branch_bwd));
}
