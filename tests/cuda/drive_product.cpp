#include "product.cu"

#include "driver.h"

namespace {
using namespace imbdiff;

// rows: means, log-variances; one with stride -1 is one number a row.
template <class T>
product::Inputs<T> inputs(int64_t B, int64_t D, int K, void** rows, const int64_t* strides, const float* exponents) {
  product::Inputs<T> x{{}, {}, {}, exponents, B, D};
  for (int k = 0; k < K; ++k) {
    x.means[k] = {static_cast<const T*>(rows[k]), strides[k]};
    if (strides[K + k] < 0) x.shared[k] = {static_cast<const float*>(rows[K + k]), 1};
    else x.logvars[k] = {static_cast<const T*>(rows[K + k]), strides[K + k]};
  }
  return x;
}
}  // namespace

extern "C" {
int64_t product_scratch(int64_t B, int64_t D, int64_t sums) { return product::workspace(B, D, sums); }

// outputs: mean, log-precision, log-normalizer.
void product_forward(int dtype, int64_t B, int64_t D, int K, void** rows, const int64_t* strides, const float* exponents,
                     void** outputs, float* scratch) {
  typed(dtype, [&](auto t) {
    using T = decltype(t);
    product::forward<T>(inputs<T>(B, D, K, rows, strides, exponents), K, static_cast<T*>(outputs[0]),
                        {static_cast<float*>(outputs[1]), static_cast<float*>(outputs[2])}, scratch, nullptr);
  });
}

// upstream: gradients of the outputs; grads: of the rows, null where not needed.
void product_backward(int dtype, int64_t B, int64_t D, int K, void** rows, const int64_t* strides, const float* exponents,
                      void** upstream, void** grads, float* scratch) {
  typed(dtype, [&](auto t) {
    using T = decltype(t);
    product::Gradients<T> g{};
    for (int k = 0; k < K; ++k) {
      g.means[k] = static_cast<T*>(grads[k]);
      if (strides[K + k] < 0) g.shared.of[k] = static_cast<float*>(grads[K + k]);
      else g.logvars[k] = static_cast<T*>(grads[K + k]);
    }
    product::backward<T>(inputs<T>(B, D, K, rows, strides, exponents), K,
                         {static_cast<const T*>(upstream[0]), static_cast<const float*>(upstream[1]),
                          static_cast<const float*>(upstream[2])},
                         g, scratch, nullptr);
  });
}
}

#ifdef RACES
const Race product_race([] {
  const int64_t B = 2, D = 5000;  // in two parts
  auto data = numbers(4 * B * D);
  std::vector<float> mean(B * D), log_precision(B * D), small(64, .5f), gradients(2 * B * D), scratch(1 << 16);
  void* rows[] = {data.data(), data.data() + B * D, data.data() + 2 * B * D, small.data()};
  const int64_t strides[] = {D, D, D, -1};
  void* out[] = {mean.data(), log_precision.data(), small.data() + 8};
  void* grads[] = {gradients.data(), nullptr, gradients.data() + B * D, small.data() + 16};
  product_forward(0, B, D, 2, rows, strides, small.data() + 32, out, scratch.data());
  product_backward(0, B, D, 2, rows, strides, small.data() + 32, out, grads, scratch.data());
});
#endif
