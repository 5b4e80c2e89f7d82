#include "two_branch.cu"

#include "driver.h"

namespace {
using namespace imbdiff;

// From weight, scales and the margins.
two_branch::Small small_of(const float** small, int K) {
  two_branch::Small s{small[0], small[1], {}};
  for (int k = 0; k < K; ++k) s.margin[k] = small[2][k];
  return s;
}

// rows: own, target, others; strides likewise.
template <class T> two_branch::Inputs<T> inputs(int64_t B, int64_t D, int K, void** rows, const int64_t* strides) {
  const auto at = [&](int n) { return Rows<T>{static_cast<const T*>(rows[n]), strides[n]}; };
  two_branch::Inputs<T> x{at(0), at(1), {}, B, D};
  for (int k = 0; k < K; ++k) x.others[k] = at(2 + k);
  return x;
}
}  // namespace

extern "C" {
int64_t two_branch_scratch(int dtype, int64_t B, int64_t D, int K) {
  int64_t size = 0;
  typed(dtype, [&](auto t) { size = two_branch::workspace<decltype(t)>(B, D, K); });
  return size;
}

void two_branch_forward(int dtype, int64_t B, int64_t D, int K, void** rows, const int64_t* strides, const float** small, float** outputs,
                float* scratch) {
  typed(dtype, [&](auto t) {
    two_branch::forward<decltype(t)>(inputs<decltype(t)>(B, D, K, rows, strides), K, small_of(small, K),
                                     {outputs[0], outputs[1], outputs[2]}, scratch, nullptr);
  });
}

// small: weight, scales, margin, grad_base, grad_terms, distance; grads: own, others, null where not needed.
void two_branch_backward(int dtype, int64_t B, int64_t D, int K, void** rows, const int64_t* strides, const float** small, void** grads) {
  typed(dtype, [&](auto t) {
    using T = decltype(t);
    two_branch::Gradients<T> g{static_cast<T*>(grads[0]), {}};
    for (int k = 0; k < K; ++k) g.others[k] = static_cast<T*>(grads[1 + k]);
    two_branch::backward<T>(inputs<T>(B, D, K, rows, strides), K, small_of(small, K), small[3], small[4], small[5], g,
                            nullptr);
  });
}
}

#ifdef RACES
const Race two_branch_race([] {
  const int64_t B = 2, D = 5000;
  auto data = numbers(3 * B * D);
  std::vector<float> small(16, .5f), outputs(24), gradients(2 * B * D), scratch(1 << 16);
  void* rows[] = {data.data(), data.data() + B * D, data.data() + 2 * B * D};
  const int64_t strides[] = {D, D, D};
  const float* in[] = {small.data(), small.data(), small.data(), small.data(), small.data(), small.data()};
  float* out[] = {outputs.data(), outputs.data() + 8, outputs.data() + 16};
  void* grads[] = {gradients.data(), gradients.data() + B * D};
  two_branch_forward(0, B, D, 1, rows, strides, in, out, scratch.data());
  two_branch_backward(0, B, D, 1, rows, strides, in, grads);
});
#endif
