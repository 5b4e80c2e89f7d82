// neighbours on the CPU: radii of rows' neighbourhoods, and who lies in whose. Products screen, differences decide.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>

#include "isa.h"

namespace imbdiff::neighbours {
struct Set {
  const void* data;
  int64_t count, stride, width;
};

// A row that may be the k-th nearest: its squared distance lies in low .. high.
struct Near {
  double low, high;
  int64_t row;
};
}  // namespace imbdiff::neighbours

#define IMBDIFF_FAMILY neighbours
#include "regions.h"

namespace imbdiff::neighbours {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Set set(const Tensor& x) { return {x.const_data_ptr(), x.size(0), x.stride(0), x.size(1)}; }

Tensor knn_radius(const Tensor& x, int64_t k, bool squared) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::new_empty(x, {x.size(0)}, wide ? ScalarType::Double : ScalarType::Float);
  STD_TORCH_CHECK(k >= 1 && k < x.size(0), "knn_radius: k must lie in 1..N-1, got ", k, " for N = ", x.size(0));
  by_dtype("knn_radius", x, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA(radius<decltype(element)>);
    run(set(x), k, squared, out.mutable_data_ptr());
  });
  return out;
}

std::tuple<Tensor, Tensor> ball_count(const Tensor& points, const Tensor& centers, const Tensor& squared_radii) {
  const auto zeros = [&](const Tensor& x) {
    Tensor counts = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Long);
    return torch::stable::zero_(counts);
  };
  Tensor balls = zeros(points), inhabitants = zeros(centers);
  if (points.size(0) == 0 || centers.size(0) == 0) return {balls, inhabitants};
  by_dtype("ball_count", points, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA(count<decltype(element)>);
    run(set(points), set(centers), squared_radii.const_data_ptr(), static_cast<int64_t*>(balls.mutable_data_ptr()),
        static_cast<int64_t*>(inhabitants.mutable_data_ptr()));
  });
  return {balls, inhabitants};
}
}  // namespace imbdiff::neighbours

STABLE_TORCH_LIBRARY_IMPL(imbdiff, CPU, m) {
  m.impl("knn_radius_cpu", TORCH_BOX(&imbdiff::neighbours::knn_radius));
  m.impl("ball_count_cpu", TORCH_BOX(&imbdiff::neighbours::ball_count));
}
