// gaussian on the CPU: divergences of all pairs as a product of matrices (KL, Jeffreys) or element by element (Bhattacharyya),
// the loss on selected pairs, and the gradients of both.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <tuple>
#include <vector>

#include "isa.h"

namespace imbdiff::gaussian {
struct Set {  // Gaussians: [count, width] means, log-variances alike or [count, 1]
  const void *mean, *logvar;
  int64_t count, width, mean_stride, logvar_stride;
  bool shared;
};
struct Problem {
  Set p, q;
  int64_t kind;
};

// Which pairs count, and for what. Numbers as in the schema.
constexpr int64_t kAll = 0, kDifferent = 1, kSame = 2, kHinge = 0;
struct Choice {
  const int64_t *labels_p = nullptr, *labels_q = nullptr;
  const bool* mask = nullptr;  // [N, M]
  const void* weight = nullptr;
  int64_t form = kHinge, pairs = kAll;
  double margin = 0, scale = 1;
  bool same_set = false;
  bool any() const { return mask || pairs != kAll || same_set; }
};

// Pairs of a tile whose gradient is taken from their differences, as their value was: the products would cancel there.
struct Near {
  int64_t row, column;
  double slope;
};
class Nears {
 public:
  Nears() = default;
  Nears(const Nears&) = delete;
  ~Nears() { std::free(data); }
  void add(Near pair) {
    if (count == room) {
      room = room ? 2 * room : 16;
      data = static_cast<Near*>(std::realloc(data, room * sizeof(Near)));
      STD_TORCH_CHECK(data != nullptr, "gaussian_overlap: no memory for ", room, " close pairs of a tile");
    }
    data[count++] = pair;
  }
  const Near* begin() const { return data; }
  const Near* end() const { return data + count; }

 private:
  Near* data = nullptr;
  int64_t count = 0, room = 0;
};
struct NearTiles {
  explicit NearTiles(int64_t tiles) : of(new Nears[tiles]) {}
  NearTiles(const NearTiles&) = delete;
  ~NearTiles() { delete[] of; }
  Nears* of;
};

struct Outputs {  // null where no gradient is wanted
  void *mean_p, *logvar_p, *mean_q, *logvar_q;
};
}  // namespace imbdiff::gaussian

#define IMBDIFF_FAMILY gaussian
#include "regions.h"

namespace imbdiff::gaussian {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One of a batch [L, N, D], or all of [N, D].
Set set_of(const char* op, const Tensor& mean, const Tensor& logvar, int64_t b) {
  const int64_t rank = mean.dim(), element = mean.element_size(), spread = logvar.element_size();
  const ScalarType type = mean.scalar_type();
  const bool shared = logvar.size(rank - 1) == 1;
  const ScalarType wanted = !shared ? type : type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(logvar.scalar_type() == wanted, op,
                  ": log-variances must have the means' type, or the accumulator's if shared");
  const auto at = [&](const Tensor& x, int64_t size) {
    return static_cast<const char*>(x.const_data_ptr()) + (rank == 3 ? b * x.stride(0) * size : 0);
  };
  return {at(mean, element), at(logvar, spread), mean.size(rank - 2), mean.size(rank - 1), mean.stride(rank - 2),
          logvar.stride(rank - 2), shared};
}

std::tuple<Tensor, Tensor> gaussian_divergence(const Tensor& mean_p, const Tensor& logvar_p, const Tensor& mean_q,
                                               const Tensor& logvar_q, int64_t kind) {
  const char* const op = "gaussian_divergence";
  const int64_t L = mean_p.size(0), N = mean_p.size(1), M = mean_q.size(1);
  const ScalarType acc = mean_p.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_empty(mean_p, {L, N, M}, acc), sizes = torch::stable::new_empty(mean_p, {L, N + M}, acc);
  if (N == 0 || M == 0) return {out, sizes};
  by_dtype(op, mean_p, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA(divergence<decltype(element)>);
    for (int64_t b = 0; b < L; ++b)
      run({set_of(op, mean_p, logvar_p, b), set_of(op, mean_q, logvar_q, b), kind},
          static_cast<char*>(out.mutable_data_ptr()) + b * N * M * out.element_size(),
          static_cast<char*>(sizes.mutable_data_ptr()) + b * (N + M) * sizes.element_size());
  });
  return {out, sizes};
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Gradients {
  Tensor tensors[4];
  std::vector<bool> needs;

  Gradients(const Tensor& mean_p, const Tensor& logvar_p, const Tensor& mean_q, const Tensor& logvar_q,
            const std::vector<bool>& wanted, std::optional<ScalarType> type = std::nullopt)
      : Gradients({mean_p, logvar_p, mean_q, logvar_q}, wanted, type, mean_p.numel() && mean_q.numel()) {}
  Gradients(const std::vector<Tensor>& x, const std::vector<bool>& wanted, std::optional<ScalarType> type, bool some)
      : tensors{make(x[0], wanted[0], type, some), make(x[1], wanted[1], type, some), make(x[2], wanted[2], type, some),
                make(x[3], wanted[3], type, some)},
        needs(wanted) {}
  static Tensor make(const Tensor& x, bool need, std::optional<ScalarType> type, bool some) {
    if (!need) return torch::stable::new_empty(x, {0}, type);
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d < x.dim(); ++d) sizes.push_back(x.size(d));
    return some ? torch::stable::new_empty(x, sizes, type) : torch::stable::new_zeros(x, sizes, type);  // zeros: none to compute
  }
  Outputs at(int64_t b) {
    void* to[4];
    for (int k = 0; k < 4; ++k) {
      const Tensor& x = tensors[k];
      const int64_t size = needs[k] && x.dim() == 3 ? x.size(1) * x.size(2) * x.element_size() : 0;
      to[k] = needs[k] ? static_cast<char*>(tensors[k].mutable_data_ptr()) + b * size : nullptr;
    }
    return {to[0], to[1], to[2], to[3]};
  }
  Four all() const { return {tensors[0], tensors[1], tensors[2], tensors[3]}; }
};

Four gaussian_divergence_bwd(const Tensor& grad, const Tensor& mean_p, const Tensor& logvar_p, const Tensor& mean_q,
                             const Tensor& logvar_q, int64_t kind, const Tensor& out, const Tensor& sizes,
                             const std::vector<bool>& needs) {
  const char* const op = "gaussian_divergence";
  const int64_t L = mean_p.size(0), N = mean_p.size(1), M = mean_q.size(1);
  Gradients gradients(mean_p, logvar_p, mean_q, logvar_q, needs);
  if (N == 0 || M == 0) return gradients.all();
  by_dtype(op, mean_p, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA(divergence_bwd<decltype(element)>);
    const auto one = [](const Tensor& x, int64_t b) {
      return static_cast<const char*>(x.const_data_ptr()) + b * x.stride(0) * x.element_size();
    };
    for (int64_t b = 0; b < L; ++b)
      run({set_of(op, mean_p, logvar_p, b), set_of(op, mean_q, logvar_q, b), kind}, one(grad, b), one(out, b), one(sizes, b),
          gradients.at(b));
  });
  return gradients.all();
}

Choice choice_of(const Tensor& labels_p, const Tensor& labels_q, const Tensor& mask, const Tensor& weight, int64_t form,
                 double margin, double scale, int64_t pairs, bool same_set) {
  Choice c;
  c.labels_p = static_cast<const int64_t*>(labels_p.const_data_ptr());
  c.labels_q = static_cast<const int64_t*>(labels_q.const_data_ptr());
  c.mask = mask.numel() ? static_cast<const bool*>(mask.const_data_ptr()) : nullptr;
  c.weight = weight.numel() ? weight.const_data_ptr() : nullptr;
  c.form = form, c.pairs = pairs, c.margin = margin, c.scale = scale, c.same_set = same_set;
  return c;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_overlap(
    const Tensor& mean_p, const Tensor& logvar_p, const Tensor& mean_q, const Tensor& logvar_q, const Tensor& labels_p,
    const Tensor& labels_q, const Tensor& mask, const Tensor& weight, int64_t kind, int64_t form, double margin, double scale,
    int64_t pairs, bool mean, bool same_set, const std::vector<bool>& needs) {
  const char* const op = "gaussian_overlap";
  Gradients slopes(mean_p, logvar_p, mean_q, logvar_q, needs, weight.scalar_type());
  Tensor loss = torch::stable::new_empty(weight, {}), normalizer = torch::stable::new_empty(weight, {});
  double sum = 0;
  int64_t number = 0;
  if (mean_p.size(0) && mean_q.size(0)) by_dtype(op, mean_p, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA(overlap<decltype(element)>);
    run({set_of(op, mean_p, logvar_p, 0), set_of(op, mean_q, logvar_q, 0), kind},
        choice_of(labels_p, labels_q, mask, weight, form, margin, scale, pairs, same_set), &sum, &number,
        slopes.at(0));
  });
  const double over = mean ? static_cast<double>(std::max<int64_t>(number, 1)) : 1;
  const auto set = [&](auto acc) {
    using A = decltype(acc);
    *static_cast<A*>(loss.mutable_data_ptr()) = static_cast<A>(sum / over);
    *static_cast<A*>(normalizer.mutable_data_ptr()) = static_cast<A>(over);
  };
  weight.scalar_type() == ScalarType::Double ? set(double{}) : set(float{});
  return {loss, normalizer, slopes.tensors[0], slopes.tensors[1], slopes.tensors[2], slopes.tensors[3]};
}
}  // namespace imbdiff::gaussian

STABLE_TORCH_LIBRARY_IMPL(imbdiff, CPU, m) {
  m.impl("gaussian_divergence_cpu", TORCH_BOX(&imbdiff::gaussian::gaussian_divergence));
  m.impl("gaussian_divergence_bwd_cpu", TORCH_BOX(&imbdiff::gaussian::gaussian_divergence_bwd));
  m.impl("gaussian_overlap_cpu", TORCH_BOX(&imbdiff::gaussian::gaussian_overlap));
}
