#include "contrast.cu"

#include "driver.h"

namespace {
using namespace imbdiff;

template <class T>
contrast::Problem<T> problem(int64_t N, int64_t M, int64_t D, void* x, int64_t x_stride, void* y, int64_t y_stride, double scale,
                             int include_self, int per_row) {
  return {{static_cast<const T*>(x), x_stride}, {static_cast<const T*>(y), y_stride}, N, M, D, static_cast<float>(scale),
          include_self != 0, per_row != 0};
}
}  // namespace

extern "C" {
void contrast_scratch(int64_t N, int64_t M, int64_t D, int split_k, int64_t* sizes) {
  const auto p = problem<float>(N, M, D, nullptr, D, nullptr, D, 1, 1, 0);
  sizes[0] = contrast::workspace(p, split_k), sizes[1] = contrast::workspace_bwd(p, split_k);
}

// outputs: loss, lse, saved.
void contrast_forward(int dtype, int64_t N, int64_t M, int64_t D, void* x, int64_t x_stride, void* y, int64_t y_stride, double scale,
                      int include_self, int per_row, int split_k, const float* weight, float** outputs, float* scratch) {
  typed(dtype, [&](auto t) {
    const auto p = problem<decltype(t)>(N, M, D, x, x_stride, y, y_stride, scale, include_self, per_row);
    contrast::forward(p, split_k, weight, outputs[0], outputs[1], outputs[2], scratch, nullptr);
  });
}

// small: grad, lse, saved.
void contrast_backward(int dtype, int64_t N, int64_t M, int64_t D, void* x, int64_t x_stride, void* y, int64_t y_stride, double scale,
                       int include_self, int per_row, int split_k, const float* weight, const float** small, void* grad_x,
                       float* scratch) {
  typed(dtype, [&](auto t) {
    using T = decltype(t);
    const auto p = problem<T>(N, M, D, x, x_stride, y, y_stride, scale, include_self, per_row);
    contrast::backward(p, split_k, small[0], weight, small[1], small[2], static_cast<T*>(grad_x), scratch, nullptr);
  });
}
}

#ifdef RACES
const Race contrast_race([] {
  const int64_t N = 40, M = 216, D = 66;  // two tiles in each of two parts
  auto data = numbers((N + M) * D);
  std::vector<float> small(1, .5f), outputs(1 << 15), scratch(1 << 20);
  for (int split_k = 0; split_k < 2; ++split_k) {
    float* out[] = {outputs.data(), outputs.data() + 1, outputs.data() + 100};
    const float* in[] = {small.data(), outputs.data() + 1, outputs.data() + 100};
    contrast_forward(0, N, M, D, data.data(), D, data.data() + N * D, D, .01, 1, 0, split_k, nullptr, out, scratch.data());
    contrast_backward(0, N, M, D, data.data(), D, data.data() + N * D, D, .01, 1, 0, split_k, nullptr, in, outputs.data() + 20000,
                      scratch.data());
  }
});
#endif
