// posterior on the CPU: which row of a bank produced x_t, drawn or averaged.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include "isa.h"

namespace imbdiff::posterior {
constexpr int64_t kAtOnce = 192;  // rows of x, where not all have to be together: the memory of their weights and sums
struct Problem {
  const void *x, *grad, *bank, *signal, *sigma, *log_prior;  // small ones in the accumulator's type; no log_prior: uniform
  const int64_t* order;  // of the rows of x and what lies like them
  int64_t count, rows, width, x_stride, bank_stride;  // rows of x, rows of the bank
};
}  // namespace imbdiff::posterior

#define IMBDIFF_FAMILY posterior
#include "regions.h"

namespace imbdiff::posterior {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ScalarType accumulator(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }
int64_t padded(int64_t count) { return (count + generic::kAlign - 1) / generic::kAlign * generic::kAlign; }

// Rows from the least noisy to the noisiest. Those of little noise have few weights: side by side they are left out of products
// together.
std::vector<int64_t> by_noise(const Tensor& signal, const Tensor& sigma) {
  const auto at = [](const Tensor& t, int64_t i) {
    return t.element_size() == 8 ? static_cast<const double*>(t.const_data_ptr())[i] : static_cast<const float*>(t.const_data_ptr())[i];
  };
  std::vector<double> noise(signal.size(0));
  for (size_t i = 0; i < noise.size(); ++i) {
    const double given = at(sigma, i) / at(signal, i);
    noise[i] = std::isnan(given) ? HUGE_VAL : given;
  }
  std::vector<int64_t> order(noise.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return noise[a] < noise[b]; });
  return order;
}

struct Arguments {
  const Tensor &x, &bank, &signal, &sigma, &log_prior;
  const std::vector<int64_t> order = by_noise(signal, sigma);
  // f(problem, first) for all rows of x, so many at once.
  template <class F> void in_turn(int64_t at_once, const void* grad, const F& f) const {
    for (int64_t first = 0; first < x.size(0); first += at_once)
      f(Problem{x.const_data_ptr(), grad, bank.const_data_ptr(), signal.const_data_ptr(), sigma.const_data_ptr(),
                log_prior.numel() ? log_prior.const_data_ptr() : nullptr, &order[first], std::min(at_once, x.size(0) - first),
                bank.size(0), x.size(1), x.stride(0), bank.stride(0)}, first);
  }
};

std::tuple<Tensor, Tensor> posterior_mean(const Tensor& x, const Tensor& bank, const Tensor& signal, const Tensor& sigma,
                                          const Tensor& log_prior) {
  const int64_t B = x.size(0), blocks = (bank.size(0) + generic::kRows - 1) / generic::kRows;
  Tensor out = torch::stable::new_empty(x, {B, x.size(1)}), saved = torch::stable::new_empty(x, {blocks + 1, padded(B)}, accumulator(x));
  by_dtype("posterior_mean", x, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA(mean<decltype(element)>);
    Arguments{x, bank, signal, sigma, log_prior}.in_turn(kAtOnce, nullptr, [&](const Problem& p, int64_t first) {
      run(p, static_cast<char*>(saved.mutable_data_ptr()) + first * saved.element_size(), padded(B), out.mutable_data_ptr());
    });
  });
  return {out, saved};
}

std::tuple<Tensor, Tensor> posterior_mean_bwd(const Tensor& grad, const Tensor& x, const Tensor& bank, const Tensor& signal,
                                              const Tensor& sigma, const Tensor& log_prior, const Tensor& out, const Tensor& saved,
                                              std::vector<bool> needs) {
  // The gradient of the bank is a sum over all rows of x.
  const int64_t B = x.size(0), at_once = needs[1] ? std::max<int64_t>(B, 1) : kAtOnce;
  const auto like = [&](const Tensor& t, bool wanted) {
    if (!wanted) return torch::stable::new_empty(t, {0});
    return B ? torch::stable::new_empty(t, {t.size(0), t.size(1)}) : torch::stable::new_zeros(t, {t.size(0), t.size(1)});
  };
  Tensor grad_x = like(x, needs[0]), grad_bank = like(bank, needs[1]);
  by_dtype("posterior_mean", x, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA(mean_backward<decltype(element)>);
    Arguments{x, bank, signal, sigma, log_prior}.in_turn(at_once, grad.const_data_ptr(), [&](const Problem& p, int64_t first) {
      run(p, static_cast<const char*>(saved.const_data_ptr()) + first * saved.element_size(), padded(B), out.const_data_ptr(),
          needs[0] ? grad_x.mutable_data_ptr() : nullptr, needs[1] ? grad_bank.mutable_data_ptr() : nullptr);
    });
  });
  return {grad_x, grad_bank};
}

enum Gate { full, t2h, h2t };

Tensor posterior_draw(const Tensor& x, const Tensor& bank, const Tensor& signal, const Tensor& sigma, const Tensor& u, const Tensor& own,
                      const Tensor& counts_x, const Tensor& counts_bank, const Tensor& log_prior, int64_t gate) {
  Tensor drawn = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Long);
  int64_t* const index = static_cast<int64_t*>(drawn.mutable_data_ptr());
  const auto* uniform = static_cast<const double*>(u.const_data_ptr());
  by_dtype("posterior_draw", x, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA(draw<decltype(element)>);
    Arguments{x, bank, signal, sigma, log_prior}.in_turn(kAtOnce, nullptr, [&](const Problem& p, int64_t) { run(p, uniform, index); });
  });
  const auto *mine = static_cast<const double*>(counts_x.const_data_ptr()), *theirs = static_cast<const double*>(counts_bank.const_data_ptr());
  const auto* kept = static_cast<const int64_t*>(own.const_data_ptr());
  for (int64_t i = 0; gate != full && i < x.size(0); ++i) {
    const double other = theirs[index[i]];
    if (!(gate == t2h ? other >= mine[i] : other <= mine[i])) index[i] = kept[i];
  }
  return drawn;
}
}  // namespace imbdiff::posterior

STABLE_TORCH_LIBRARY_IMPL(imbdiff, CPU, m) {
  m.impl("posterior_mean_cpu", TORCH_BOX(&imbdiff::posterior::posterior_mean));
  m.impl("posterior_mean_bwd_cpu", TORCH_BOX(&imbdiff::posterior::posterior_mean_bwd));
  m.impl("posterior_draw_cpu", TORCH_BOX(&imbdiff::posterior::posterior_draw));
}
