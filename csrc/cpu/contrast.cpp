// contrast on the CPU: the losses of a batch's rows with each other, on the pairwise engine.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "isa.h"

namespace imbdiff::contrast {
enum class Loss { distance, hinge, cosine, supcon };
constexpr double kSmallestNorm = 1e-12;  // rows up to there have no direction

struct Problem {
  Loss loss;
  const void *x, *y;
  int64_t rows, negatives, width, x_stride, y_stride;
  double scale;  // of squared distances; of those of unit rows, 1 / (2 tau), for cosines
  bool split_k;  // the plan: its E [N, N + M] is kept
  bool include_self = false, per_row = true;
  double margin = 0, anchors = 1;                     // of hinge; the rows that a mean is over
  const double *labels = nullptr, *positives = nullptr;  // [N] of supcon: labels counted from 0, number of positives
  bool cosine() const { return loss == Loss::cosine || loss == Loss::supcon; }
  int64_t terms() const { return rows + negatives - (include_self ? 0 : 1); }
};
}  // namespace imbdiff::contrast

#define IMBDIFF_FAMILY contrast
#define IMBDIFF_BF16_REGION
#include "regions.h"

namespace imbdiff::contrast {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Problem problem(Loss loss, const Tensor& x, const Tensor& y, double scale, bool split_k) {
  return {loss,        x.const_data_ptr(), y.const_data_ptr(), x.size(0), y.size(0), x.size(1),
          x.stride(0), y.stride(0),        scale,              split_k};
}
Problem alone(Loss loss, const Tensor& x, double scale, bool split_k) {
  Problem p = problem(loss, x, x, scale, split_k);
  p.negatives = 0;
  return p;
}
ScalarType accumulator(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// One element of a tensor in the accumulator's type.
double at(const Tensor& t, int64_t i) {
  return t.scalar_type() == ScalarType::Double ? static_cast<const double*>(t.const_data_ptr())[i]
                                               : static_cast<const float*>(t.const_data_ptr())[i];
}
Tensor scalar(const Tensor& x, double value) {
  Tensor out = torch::stable::new_empty(x, {}, accumulator(x));
  if (accumulator(x) == ScalarType::Double) *static_cast<double*>(out.mutable_data_ptr()) = value;
  else *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(value);
  return out;
}

struct Result {
  Tensor lse, saved;
  std::vector<double> sums;
};

// Row sums, and what is kept: the matrix, of cosines with rows of lengths and of roots. Nothing is computed where `empty`.
Result run_forward(const char* op, const Problem& p, const Tensor& x, bool empty, bool with_lse = true) {
  const bool keeps = !empty && p.split_k;
  const ScalarType acc = accumulator(x);
  Result r{torch::stable::new_zeros(x, {with_lse ? p.rows : 0}, acc),
           keeps ? torch::stable::new_empty(x, {p.rows + 2 * p.cosine(), p.rows + p.negatives}, acc)
                 : torch::stable::new_empty(x, {0}, acc),
           std::vector<double>(p.rows)};
  if (!empty) by_dtype(op, x, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA_OF(decltype(element), forward);
    run(p, with_lse ? r.lse.mutable_data_ptr() : nullptr, r.saved.mutable_data_ptr(), r.sums.data());
  });
  return r;
}

Tensor run_backward(const char* op, const Problem& p, const Tensor& grad, const Tensor& x, const Tensor* weight, const Tensor* lse,
                    const Tensor& saved, bool empty) {
  if (empty) return torch::stable::new_zeros(x, {p.rows, p.width});
  Tensor out = torch::stable::new_empty(x, {p.rows, p.width});
  const void* w = weight && weight->numel() ? weight->const_data_ptr() : nullptr;
  by_dtype(op, x, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA_OF(decltype(element), backward);
    run(p, grad.const_data_ptr(), w, lse ? lse->const_data_ptr() : nullptr, saved.const_data_ptr(), out.mutable_data_ptr());
  });
  return out;
}

// ---- negative_distance -------------------------------------------------------------------------------------------------------

Problem distance_problem(const Tensor& x, const Tensor& y, double scale, bool include_self, bool per_row, bool split_k) {
  Problem p = problem(Loss::distance, x, y, scale, split_k);
  p.include_self = include_self, p.per_row = per_row, p.anchors = static_cast<double>(p.rows);
  return p;
}

// (1/N) sum_i w_i (lse_i - shift)
double mean(const Problem& p, const Tensor& lse, const Tensor& weight, double shift) {
  double sum = 0;
  for (int64_t i = 0; i < p.rows; ++i) sum += (weight.numel() ? at(weight, i) : 1.) * (at(lse, i) - shift);
  return sum / p.rows;
}

double distance_loss(const Problem& p, const Tensor& lse, const Tensor& weight) {
  double sum = 0, largest = -std::numeric_limits<double>::infinity();
  const double log_c = std::log(static_cast<double>(p.terms()));
  if (p.per_row) return mean(p, lse, weight, log_c);
  for (int64_t i = 0; i < p.rows; ++i) largest = std::max(largest, at(lse, i));
  if (std::isinf(largest)) largest = 0;
  for (int64_t i = 0; i < p.rows; ++i) sum += std::exp(at(lse, i) - largest);
  return largest + std::log(sum) - log_c - std::log(static_cast<double>(p.rows));
}

std::tuple<Tensor, Tensor, Tensor> negative_distance(const Tensor& x, const Tensor& negatives, const Tensor& weight, double scale,
                                                     bool include_self, bool per_row, bool split_k) {
  const Problem p = distance_problem(x, negatives, scale, include_self, per_row, split_k);
  const bool empty = p.rows == 0 || p.terms() == 0;
  const Result r = run_forward("negative_distance", p, x, empty);
  return {scalar(x, empty ? 0 : distance_loss(p, r.lse, weight)), r.lse, r.saved};
}

Tensor negative_distance_bwd(const Tensor& grad, const Tensor& x, const Tensor& negatives, const Tensor& weight, const Tensor& lse,
                             const Tensor& saved, double scale, bool include_self, bool per_row, bool split_k) {
  const Problem p = distance_problem(x, negatives, scale, include_self, per_row, split_k);
  return run_backward("negative_distance", p, grad, x, &weight, &lse, saved, p.rows == 0 || p.terms() == 0);
}

// ---- distance_hinge ----------------------------------------------------------------------------------------------------------

Problem hinge_problem(const Tensor& x, double margin, double scale, bool split_k) {
  Problem p = alone(Loss::hinge, x, scale, split_k);
  p.margin = margin;
  return p;
}

std::tuple<Tensor, Tensor> distance_hinge(const Tensor& x, double margin, double scale, bool split_k) {
  const Problem p = hinge_problem(x, margin, scale, split_k);
  const Result r = run_forward("distance_hinge", p, x, p.rows < 2, false);
  double sum = 0;
  for (const double of_row : r.sums) sum += of_row;
  return {scalar(x, p.rows < 2 ? 0 : sum / p.rows / (p.rows - 1)), r.saved};
}

Tensor distance_hinge_bwd(const Tensor& grad, const Tensor& x, const Tensor& saved, double margin, double scale, bool split_k) {
  const Problem p = hinge_problem(x, margin, scale, split_k);
  return run_backward("distance_hinge", p, grad, x, nullptr, nullptr, saved, p.rows < 2);
}

// ---- cosine_contrastive ------------------------------------------------------------------------------------------------------

Problem cosine_problem(const Tensor& x, const Tensor& y, double tau, bool include_self, bool split_k) {
  Problem p = problem(Loss::cosine, x, y, 0.5 / tau, split_k);
  p.include_self = include_self, p.anchors = static_cast<double>(p.rows);
  return p;
}
bool no_pair(const Problem& p) { return p.rows == 0 || p.rows + p.negatives == 1; }

std::tuple<Tensor, Tensor, Tensor> cosine_contrastive(const Tensor& x, const Tensor& negatives, const Tensor& weight, double tau,
                                                      bool include_self, bool split_k) {
  const Problem p = cosine_problem(x, negatives, tau, include_self, split_k);
  const Result r = run_forward("cosine_contrastive", p, x, no_pair(p));
  const double shift = include_self || no_pair(p) ? 0 : std::log(static_cast<double>(p.terms())) - 1 / tau;
  return {scalar(x, no_pair(p) ? 0 : mean(p, r.lse, weight, shift)), r.lse, r.saved};
}

Tensor cosine_contrastive_bwd(const Tensor& grad, const Tensor& x, const Tensor& negatives, const Tensor& weight, const Tensor& lse,
                              const Tensor& saved, double tau, bool include_self, bool split_k) {
  const Problem p = cosine_problem(x, negatives, tau, include_self, split_k);
  return run_backward("cosine_contrastive", p, grad, x, &weight, &lse, saved, no_pair(p));
}

// ---- supcon ------------------------------------------------------------------------------------------------------------------

// Labels as numbers from 0, which every floating type tells apart, and how many other rows have the same.
struct Groups {
  explicit Groups(const Tensor& labels) : index(labels.size(0)), positives(labels.size(0)) {
    const auto* given = static_cast<const int64_t*>(labels.const_data_ptr());
    std::vector<int64_t> label(index.size()), sorted;
    for (size_t i = 0; i < label.size(); ++i) label[i] = given[i * labels.stride(0)];
    sorted = label;
    std::sort(sorted.begin(), sorted.end());
    for (size_t i = 0; i < label.size(); ++i) {
      const auto [first, last] = std::equal_range(sorted.begin(), sorted.end(), label[i]);
      index[i] = static_cast<double>(first - sorted.begin()), positives[i] = static_cast<double>(last - first - 1);
      anchors += positives[i] > 0;
    }
  }
  std::vector<double> index, positives;
  int64_t anchors = 0;
};

Problem supcon_problem(const Tensor& x, const Groups& groups, double tau, bool split_k) {
  Problem p = alone(Loss::supcon, x, 0.5 / tau, split_k);
  p.labels = groups.index.data(), p.positives = groups.positives.data();
  p.anchors = static_cast<double>(std::max<int64_t>(groups.anchors, 1));
  return p;
}

std::tuple<Tensor, Tensor, Tensor> supcon(const Tensor& x, const Tensor& labels, const Tensor& weight, double tau, bool split_k) {
  const Groups groups(labels);
  const Problem p = supcon_problem(x, groups, tau, split_k);
  const Result r = run_forward("supcon", p, x, no_pair(p));
  double sum = 0;
  for (int64_t i = 0; i < p.rows; ++i)
    if (p.positives[i] > 0) sum += (weight.numel() ? at(weight, i) : 1.) * (at(r.lse, i) + r.sums[i] / p.positives[i]);
  return {scalar(x, sum / p.anchors), r.lse, r.saved};
}

Tensor supcon_bwd(const Tensor& grad, const Tensor& x, const Tensor& labels, const Tensor& weight, const Tensor& lse,
                  const Tensor& saved, double tau, bool split_k) {
  const Groups groups(labels);
  const Problem p = supcon_problem(x, groups, tau, split_k);
  return run_backward("supcon", p, grad, x, &weight, &lse, saved, no_pair(p));
}
}  // namespace imbdiff::contrast

STABLE_TORCH_LIBRARY_IMPL(imbdiff, CPU, m) {
  m.impl("negative_distance_cpu", TORCH_BOX(&imbdiff::contrast::negative_distance));
  m.impl("negative_distance_bwd_cpu", TORCH_BOX(&imbdiff::contrast::negative_distance_bwd));
  m.impl("distance_hinge_cpu", TORCH_BOX(&imbdiff::contrast::distance_hinge));
  m.impl("distance_hinge_bwd_cpu", TORCH_BOX(&imbdiff::contrast::distance_hinge_bwd));
  m.impl("cosine_contrastive_cpu", TORCH_BOX(&imbdiff::contrast::cosine_contrastive));
  m.impl("cosine_contrastive_bwd_cpu", TORCH_BOX(&imbdiff::contrast::cosine_contrastive_bwd));
  m.impl("supcon_cpu", TORCH_BOX(&imbdiff::contrast::supcon));
  m.impl("supcon_bwd_cpu", TORCH_BOX(&imbdiff::contrast::supcon_bwd));
}
