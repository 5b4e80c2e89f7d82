// contrast on the CPU: score and state of the negative distance for the pairwise engine.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "isa.h"

namespace imbdiff::contrast {
struct Problem {
  const void *x, *y;
  int64_t rows, negatives, width, x_stride, y_stride;
  double scale;
  bool include_self, per_row;
  bool split_k;  // the plan: its E [N, N + M] is kept
  int64_t terms() const { return rows + negatives - (include_self ? 0 : 1); }
};
}  // namespace imbdiff::contrast

#define IMBDIFF_FAMILY contrast
#define IMBDIFF_BF16_REGION
#include "regions.h"

namespace imbdiff::contrast {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Problem problem(const Tensor& x, const Tensor& y, double scale, bool include_self, bool per_row, bool split_k) {
  return {x.const_data_ptr(), y.const_data_ptr(), x.size(0),    y.size(0), x.size(1),
          x.stride(0),        y.stride(0),        scale, include_self, per_row, split_k};
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

std::tuple<Tensor, Tensor, Tensor> negative_distance(const Tensor& x, const Tensor& negatives, const Tensor& weight, double scale,
                                                     bool include_self, bool per_row, bool split_k) {
  const Problem p = problem(x, negatives, scale, include_self, per_row, split_k);
  Tensor loss = torch::stable::new_zeros(weight, {}), lse = torch::stable::new_zeros(weight, {p.rows});
  const bool empty = p.rows == 0 || p.terms() == 0;
  Tensor saved = !empty && p.split_k ? torch::stable::new_empty(weight, {p.rows, p.rows + p.negatives})
                                       : torch::stable::new_empty(weight, {0});
  if (empty) return {loss, lse, saved};
  by_dtype("negative_distance", x, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA_OF(decltype(element), forward);
    run(p, lse.mutable_data_ptr(), saved.mutable_data_ptr());
  });
  const auto finish = [&](auto acc) {
    using Acc = decltype(acc);
    const auto* w = weight.numel() ? static_cast<const Acc*>(weight.const_data_ptr()) : nullptr;
    *static_cast<Acc*>(loss.mutable_data_ptr()) = static_cast<Acc>(loss_of(p, static_cast<const Acc*>(lse.const_data_ptr()), w));
  };
  x.scalar_type() == ScalarType::Double ? finish(double{}) : finish(float{});
  return {loss, lse, saved};
}

Tensor negative_distance_bwd(const Tensor& grad, const Tensor& x, const Tensor& negatives, const Tensor& weight, const Tensor& lse,
                             const Tensor& saved, double scale, bool include_self, bool per_row, bool split_k) {
  const Problem p = problem(x, negatives, scale, include_self, per_row, split_k);
  if (p.rows == 0 || p.terms() == 0) return torch::stable::new_zeros(x, {p.rows, p.width});
  Tensor out = torch::stable::new_empty(x, {p.rows, p.width});
  const void* w = weight.numel() ? weight.const_data_ptr() : nullptr;
  by_dtype("negative_distance", x, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA_OF(decltype(element), backward);
    run(p, grad.const_data_ptr(), w, lse.const_data_ptr(), saved.const_data_ptr(), out.mutable_data_ptr());
  });
  return out;
}
}  // namespace imbdiff::contrast

STABLE_TORCH_LIBRARY_IMPL(imbdiff, CPU, m) {
  m.impl("negative_distance_cpu", TORCH_BOX(&imbdiff::contrast::negative_distance));
  m.impl("negative_distance_bwd_cpu", TORCH_BOX(&imbdiff::contrast::negative_distance_bwd));
}
