#include "contrast.cu"

#include "driver.h"

namespace {
using namespace imbdiff;

struct Call {
  int dtype, loss, include_self, per_row, split_k;
  int64_t N, M, D, x_stride, y_stride;
  void *x, *y;
  double scale, margin;
  int64_t *labels, labels_stride;
  const float* weight;

  contrast::Facts facts() const {
    return {static_cast<contrast::Loss>(loss), N, M, D, static_cast<float>(scale), include_self != 0, per_row != 0,
            static_cast<float>(margin), {labels, labels_stride}};
  }
  template <class T> contrast::Problem<T> problem() const {
    return {facts(), {static_cast<const T*>(x), x_stride}, {static_cast<const T*>(y), y_stride}};
  }
};
}  // namespace

extern "C" {
int64_t contrast_scratch(const Call* call, int backward) { return contrast::workspace(call->facts(), call->split_k, backward); }

// outputs: loss, lse, saved.
void contrast_forward(const Call* call, float** outputs, float* scratch) {
  typed(call->dtype, [&](auto t) {
    contrast::forward(call->problem<decltype(t)>(), call->split_k, call->weight, {outputs[0], outputs[1], outputs[2]}, scratch,
                      nullptr);
  });
}

// small: grad, lse, saved.
void contrast_backward(const Call* call, const float** small, void* grad_x, float* scratch) {
  typed(call->dtype, [&](auto t) {
    using T = decltype(t);
    contrast::backward(call->problem<T>(), call->split_k, {small[0], call->weight, small[1], small[2]}, static_cast<T*>(grad_x),
                       scratch, nullptr);
  });
}
}

#ifdef RACES
const Race contrast_race([] {
  const int64_t N = 40, M = 216, D = 66;  // two tiles in each of two parts
  auto data = numbers((N + M) * D);
  std::vector<int64_t> labels(N, 1);
  std::vector<float> small(1, .5f), outputs(1 << 15), gradient(N * D), scratch(1 << 20);
  float* out[] = {outputs.data(), outputs.data() + 4, outputs.data() + 100};
  const float* in[] = {small.data(), outputs.data() + 4, outputs.data() + 100};
  for (const auto loss : {contrast::Loss::distance, contrast::Loss::cosine, contrast::Loss::supcon})
    for (int split_k = 0; split_k < 2; ++split_k) {
      const bool alone = loss == contrast::Loss::supcon;
      Call call{0, static_cast<int>(loss), 1, loss != contrast::Loss::distance, split_k, N, alone ? 0 : M, D, D, D,
                data.data(), data.data() + N * D, .01, 0, alone ? labels.data() : nullptr, 1, nullptr};
      contrast_forward(&call, out, scratch.data());
      contrast_backward(&call, in, gradient.data(), scratch.data());
    }
});
#endif
