#include "posterior.cu"

#include "driver.h"

namespace {
using namespace imbdiff;

// sizes: B, N, D; rows, strides: of x, bank; small: signal, sigma, log_prior; counts: of x, of the bank.
posterior::Draw arguments(int dtype, const int64_t* sizes, void** rows, const int64_t* strides, float** small, const double* u,
                          const int64_t* own, double** counts, int gate) {
  const auto cloud = [&](int n) -> Cloud { return {{rows[n], strides[n], static_cast<Element>(dtype)}, sizes[n]}; };
  return {cloud(0), cloud(1), sizes[2], small[0], small[1], small[2], u, own, counts[0], counts[1], gate};
}
}  // namespace

extern "C" {
int64_t posterior_scratch(const int64_t* sizes) { return posterior::workspace(sizes[0], sizes[1], sizes[2]); }

void posterior_draw(int dtype, const int64_t* sizes, void** rows, const int64_t* strides, float** small, const double* u,
                    const int64_t* own, double** counts, int gate, int64_t* drawn, double* scratch) {
  posterior::draw(arguments(dtype, sizes, rows, strides, small, u, own, counts, gate), drawn, scratch, nullptr);
}
}

#ifdef RACES
const Race posterior_race([] {
  const int64_t sizes[] = {5, 70, 150}, strides[] = {sizes[2], sizes[2]};  // the width in parts
  auto x = numbers(sizes[0] * sizes[2]), bank = numbers(sizes[1] * sizes[2]), ones = std::vector<float>(5, 1.f);
  std::vector<double> u(5, .5), scratch(posterior_scratch(sizes));
  std::vector<int64_t> drawn(5);
  void* rows[] = {x.data(), bank.data()};
  float* small[] = {ones.data(), ones.data(), nullptr};
  double* counts[2] = {};
  posterior_draw(0, sizes, rows, strides, small, u.data(), drawn.data(), counts, 0, drawn.data(), scratch.data());
});
#endif
