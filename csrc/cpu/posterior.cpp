// posterior on the CPU: which row of a bank produced x_t, drawn or averaged.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "isa.h"

namespace imbdiff::posterior {
struct Problem {
  const void *x, *bank, *signal, *sigma, *log_prior;  // small ones in the accumulator's type; no log_prior: uniform
  int64_t count, rows, width, x_stride, bank_stride;  // rows of x, rows of the bank
};
}  // namespace imbdiff::posterior

#define IMBDIFF_FAMILY posterior
#include "regions.h"

namespace imbdiff::posterior {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAtOnce = 192;  // rows of x, where not all have to be together: the memory of their weights

ScalarType accumulator(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }
int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }
// Weights are kept for the backward where they are small beside the bank; `_fake_mean` says the same.
bool keeps(const Tensor& x) { return 16 * x.size(0) <= x.size(1); }

struct Arguments {
  Tensor x, bank, signal, sigma, log_prior;
  int64_t row_bytes() const { return x.stride(0) * x.element_size(); }
  // The rows of x from `first` on.
  Problem problem(int64_t first, int64_t count) const {
    const auto from = [&](const Tensor& t, int64_t bytes) { return static_cast<const char*>(t.const_data_ptr()) + first * bytes; };
    const int64_t small = signal.element_size();
    return {from(x, row_bytes()), bank.const_data_ptr(), from(signal, small), from(sigma, small),
            log_prior.numel() ? log_prior.const_data_ptr() : nullptr, count, bank.size(0), x.size(1), x.stride(0), bank.stride(0)};
  }
  // f(problem, first) for all rows of x, so many at once.
  template <class F> void in_turn(int64_t at_once, const F& f) const {
    for (int64_t first = 0; first < x.size(0); first += at_once) f(problem(first, std::min(at_once, x.size(0) - first)), first);
  }
  int64_t weight_bytes(int64_t count) const { return (bank.size(0) + 1) * padded(count) * signal.element_size(); }
};

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
// Row order[i] as row i, or back: row i as row order[i].
Tensor ordered(const Tensor& t, const std::vector<int64_t>& order, bool back = false) {
  std::vector<int64_t> sizes(1, t.size(0));
  if (t.dim() == 2) sizes.push_back(t.size(1));
  Tensor out = torch::stable::new_empty(t, sizes);
  const int64_t size = t.element_size(), length = size * (t.dim() == 2 ? t.size(1) : 1);
  const char* const from = static_cast<const char*>(t.const_data_ptr());
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  for (size_t i = 0; i < order.size() && length; ++i)
    std::memcpy(to + (back ? order[i] : i) * length, from + (back ? i : order[i]) * t.stride(0) * size, length);
  return out;
}

char* row(Tensor& t, int64_t i) { return t.numel() ? static_cast<char*>(t.mutable_data_ptr()) + i * t.size(1) * t.element_size() : nullptr; }
const char* row(const Tensor& t, int64_t i) { return static_cast<const char*>(t.const_data_ptr()) + i * t.size(1) * t.element_size(); }

std::tuple<Tensor, Tensor> posterior_mean(const Tensor& x, const Tensor& bank, const Tensor& signal, const Tensor& sigma,
                                          const Tensor& log_prior) {
  const std::vector<int64_t> order = by_noise(signal, sigma);
  const Arguments given{ordered(x, order), bank, ordered(signal, order), ordered(sigma, order), log_prior};
  const int64_t B = x.size(0), at_once = keeps(x) ? std::max<int64_t>(B, 1) : kAtOnce;
  Tensor out = torch::stable::new_empty(x, {B, x.size(1)});
  Tensor saved = torch::stable::new_empty(x, {keeps(x) ? bank.size(0) + 1 : 0, padded(B)}, accumulator(x));
  const Scratch memory(keeps(x) ? 0 : given.weight_bytes(std::min(B, at_once)));
  by_dtype("posterior_mean", x, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA(mean<decltype(element)>);
    given.in_turn(at_once, [&](const Problem& p, int64_t first) {
      run(p, keeps(x) ? saved.mutable_data_ptr() : memory.data, row(out, first));
    });
  });
  return {ordered(out, order, true), saved};
}

std::tuple<Tensor, Tensor> posterior_mean_bwd(const Tensor& grad, const Tensor& x, const Tensor& bank, const Tensor& signal,
                                              const Tensor& sigma, const Tensor& log_prior, const Tensor& out, const Tensor& saved,
                                              std::vector<bool> needs) {
  const std::vector<int64_t> order = by_noise(signal, sigma);
  const Arguments given{ordered(x, order), bank, ordered(signal, order), ordered(sigma, order), log_prior};
  const Tensor slopes = ordered(grad, order), means = ordered(out, order);
  // The gradient of the bank is a sum over all rows of x.
  const int64_t B = x.size(0), at_once = keeps(x) || needs[1] ? std::max<int64_t>(B, 1) : kAtOnce;
  const auto like = [&](const Tensor& t, bool wanted) {
    if (!wanted) return torch::stable::new_empty(t, {0});
    return B ? torch::stable::new_empty(t, {t.size(0), t.size(1)}) : torch::stable::new_zeros(t, {t.size(0), t.size(1)});
  };
  Tensor grad_x = like(x, needs[0]), grad_bank = like(bank, needs[1]);
  const Scratch memory(keeps(x) ? 0 : given.weight_bytes(std::min(B, at_once)));
  by_dtype("posterior_mean", x, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA(mean_backward<decltype(element)>);
    given.in_turn(at_once, [&](const Problem& p, int64_t first) {
      run(p, row(slopes, first), row(means, first), keeps(x) ? const_cast<void*>(saved.const_data_ptr()) : memory.data, keeps(x),
          row(grad_x, first), row(grad_bank, 0));
    });
  });
  return {needs[0] ? ordered(grad_x, order, true) : grad_x, grad_bank};
}

enum Gate { full, t2h, h2t };

Tensor posterior_draw(const Tensor& x, const Tensor& bank, const Tensor& signal, const Tensor& sigma, const Tensor& u, const Tensor& own,
                      const Tensor& counts_x, const Tensor& counts_bank, const Tensor& log_prior, int64_t gate) {
  const Arguments given{x, bank, signal, sigma, log_prior};
  Tensor drawn = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Long);
  int64_t* const index = static_cast<int64_t*>(drawn.mutable_data_ptr());
  const auto* uniform = static_cast<const double*>(u.const_data_ptr());
  by_dtype("posterior_draw", x, [&](auto element) {
    const auto run = IMBDIFF_BY_ISA(draw<decltype(element)>);
    given.in_turn(kAtOnce, [&](const Problem& p, int64_t first) { run(p, uniform + first, index + first); });
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
