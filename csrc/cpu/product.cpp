// product on the CPU: one pass forward, one pass backward, rows cut into parts that depend on D alone.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <tuple>
#include <vector>

#include "isa.h"

namespace imbdiff::product {
constexpr int64_t kPart = 1 << 14;  // elements of a row in one task

// [rows, width]; a stride may be larger than the width or 0. Where a log-variance is one number a row, those numbers.
struct Rows {
  const void* data;
  int64_t stride;
  const double* shared;
};

struct Problem {
  int64_t rows, width, factors, parts;
  const Rows *means, *logvars;
  const void* exponents;  // [factors, rows]

  int64_t row(int64_t task) const { return task / parts; }
  int64_t begin(int64_t task) const { return task % parts * kPart; }
  int64_t length(int64_t task) const { return width - begin(task) < kPart ? width - begin(task) : kPart; }
};

// Where gradients of a factor go; null where none is wanted, or where it is a sum over the row.
struct Outputs {
  void *mean, *logvar;
};
}  // namespace imbdiff::product

#define IMBDIFF_FAMILY product
#include "regions.h"

namespace imbdiff::product {
using generic::Acc;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class A> constexpr ScalarType kType = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;  // of accumulators

// One number a row: in the accumulator's type as the public function gives it.
bool is_shared(const Tensor& logvar) { return logvar.size(1) == 1; }

template <class T> struct Call {
  std::vector<Rows> means, logvars;
  std::vector<std::vector<double>> shared;
  Problem problem;

  Call(const std::vector<Tensor>& m, const std::vector<Tensor>& l, const Tensor& exponents) : shared(m.size()) {
    const int64_t B = m[0].size(0), D = m[0].size(1), K = m.size();
    for (int64_t k = 0; k < K; ++k) {
      means.push_back({m[k].const_data_ptr(), m[k].stride(0), nullptr});
      if (is_shared(l[k])) {
        STD_TORCH_CHECK(l[k].scalar_type() == kType<Acc<T>>,
                        "product_of_gaussians: logvars [B, 1] must be in the accumulator's type");
        const auto* const numbers = static_cast<const Acc<T>*>(l[k].const_data_ptr());
        for (int64_t i = 0; i < B; ++i) shared[k].push_back(numbers[i * l[k].stride(0)]);
      }
      logvars.push_back({l[k].const_data_ptr(), l[k].stride(0), is_shared(l[k]) ? shared[k].data() : nullptr});
    }
    problem = {B, D, K, (D + kPart - 1) / kPart, means.data(), logvars.data(), exponents.const_data_ptr()};
  }
  int64_t tasks() const { return problem.rows * problem.parts; }

  // f(first, last) on every range of tasks, in parallel. A range has work enough to be worth another thread.
  template <class F> void for_each_range(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, kPart / (4 * std::max<int64_t>(1, std::min(problem.width, kPart))));
    torch::stable::parallel_for(0, tasks(), grain, f);
  }
};

std::tuple<Tensor, Tensor, Tensor> product_of_gaussians(const std::vector<Tensor>& means, const std::vector<Tensor>& logvars,
                                                        const Tensor& exponents) {
  const int64_t B = means[0].size(0), D = means[0].size(1), K = means.size();
  Tensor mean = torch::stable::new_empty(means[0], {B, D}), log_precision = torch::stable::new_empty(exponents, {B, D});
  Tensor log_normalizer = torch::stable::new_empty(exponents, {B});
  by_dtype("product_of_gaussians", means[0], [&](auto element) {
    using T = decltype(element);
    const Call<T> call(means, logvars, exponents);
    const auto run = IMBDIFF_BY_ISA(forward<T>);
    std::vector<double> sums(call.tasks());
    call.for_each_range([&](int64_t first, int64_t last) {
      run(call.problem, first, last, mean.mutable_data_ptr(), log_precision.mutable_data_ptr(), sums.data());
    });
    const auto* a = static_cast<const Acc<T>*>(exponents.const_data_ptr());
    auto* out = static_cast<Acc<T>*>(log_normalizer.mutable_data_ptr());
    for (int64_t i = 0; i < B; ++i) {
      double sum = -1, total = 0;
      for (int64_t k = 0; k < K; ++k) sum += a[k * B + i];
      for (int64_t part = 0; part < call.problem.parts; ++part) total += sums[i * call.problem.parts + part];
      out[i] = static_cast<Acc<T>>(-(sum * static_cast<double>(D) * std::log(2 * std::numbers::pi) + total) / 2);
    }
  });
  return {mean, log_precision, log_normalizer};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> product_of_gaussians_bwd(
    const Tensor& grad_mean, const Tensor& grad_log_precision, const Tensor& grad_log_normalizer,
    const std::vector<Tensor>& means, const std::vector<Tensor>& logvars, const Tensor& exponents,
    const std::vector<bool>& needs) {
  const int64_t B = means[0].size(0), K = means.size();
  std::vector<Tensor> of_means, of_logvars;
  std::vector<Outputs> outputs;
  const auto make = [](const Tensor& x, bool need) {
    return need ? torch::stable::new_empty(x, {x.size(0), x.size(1)}) : torch::stable::new_empty(x, {0});
  };
  for (int64_t k = 0; k < K; ++k) {
    of_means.push_back(make(means[k], needs[k]));
    of_logvars.push_back(make(logvars[k], needs[K + k]));
    outputs.push_back({needs[k] ? of_means[k].mutable_data_ptr() : nullptr,
                       needs[K + k] && !is_shared(logvars[k]) ? of_logvars[k].mutable_data_ptr() : nullptr});
  }
  by_dtype("product_of_gaussians", means[0], [&](auto element) {
    using T = decltype(element);
    const Call<T> call(means, logvars, exponents);
    const auto run = IMBDIFF_BY_ISA(backward<T>);
    std::vector<double> sums(call.tasks() * K);
    call.for_each_range([&](int64_t first, int64_t last) {
      run(call.problem, first, last, grad_mean.const_data_ptr(), grad_log_precision.const_data_ptr(),
          grad_log_normalizer.const_data_ptr(), outputs.data(), sums.data());
    });
    for (int64_t k = 0; k < K; ++k) {
      if (!needs[K + k] || !is_shared(logvars[k])) continue;
      auto* out = static_cast<Acc<T>*>(of_logvars[k].mutable_data_ptr());
      for (int64_t i = 0; i < B; ++i) {
        double total = 0;
        for (int64_t part = 0; part < call.problem.parts; ++part) total += sums[(i * call.problem.parts + part) * K + k];
        out[i] = static_cast<Acc<T>>(total);
      }
    }
  });
  return {of_means, of_logvars};
}
}  // namespace imbdiff::product

STABLE_TORCH_LIBRARY_IMPL(imbdiff, CPU, m) {
  m.impl("product_of_gaussians_cpu", TORCH_BOX(&imbdiff::product::product_of_gaussians));
  m.impl("product_of_gaussians_bwd_cpu", TORCH_BOX(&imbdiff::product::product_of_gaussians_bwd));
}
