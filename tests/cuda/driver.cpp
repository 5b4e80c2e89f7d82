// The CUDA kernels, built for the CPU (emulate.h), behind a C interface for ctypes; with RACES, a program for ThreadSanitizer.
#include "contrast.cu"
#include "two_branch.cu"

#include <cstdlib>

template <class F> void typed(int dtype, const F& f) {
  dtype == 0 ? f(float{}) : dtype == 1 ? f(__nv_bfloat16{}) : f(__half{});
}

namespace {
using namespace imbdiff;

// rows: own, target, others; strides likewise.
template <class T> two_branch::Inputs<T> inputs(int64_t B, int64_t D, int K, void** rows, const int64_t* strides) {
  const auto at = [&](int n) { return Rows<T>{static_cast<const T*>(rows[n]), strides[n]}; };
  two_branch::Inputs<T> x{at(0), at(1), {}, B, D};
  for (int k = 0; k < K; ++k) x.others[k] = at(2 + k);
  return x;
}

template <class T>
contrast::Problem<T> problem(int64_t N, int64_t M, int64_t D, void* x, int64_t x_stride, void* y, int64_t y_stride, double scale,
                             int include_self, int per_row) {
  return {{static_cast<const T*>(x), x_stride}, {static_cast<const T*>(y), y_stride}, N, M, D, static_cast<float>(scale),
          include_self != 0, per_row != 0};
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
    two_branch::forward<decltype(t)>(inputs<decltype(t)>(B, D, K, rows, strides), K, {small[0], small[1], small[2]},
                                     {outputs[0], outputs[1], outputs[2]}, scratch, nullptr);
  });
}

// small: weight, scales, margin, grad_base, grad_terms, distance; grads: own, others, null where not needed.
void two_branch_backward(int dtype, int64_t B, int64_t D, int K, void** rows, const int64_t* strides, const float** small, void** grads) {
  typed(dtype, [&](auto t) {
    using T = decltype(t);
    two_branch::Gradients<T> g{static_cast<T*>(grads[0]), {}};
    for (int k = 0; k < K; ++k) g.others[k] = static_cast<T*>(grads[1 + k]);
    two_branch::backward<T>(inputs<T>(B, D, K, rows, strides), K, {small[0], small[1], small[2]}, small[3], small[4], small[5], g,
                            nullptr);
  });
}

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
// Runs every kernel once, without the n-th __syncthreads where n is given.
int main(int argc, char** argv) {
  if (argc > 1) emulate::omitted = std::atoi(argv[1]);
  std::vector<float> data(1 << 16), small(64, .5f), scratch(1 << 20), outputs(1 << 16);
  for (size_t n = 0; n < data.size(); ++n) data[n] = static_cast<float>(n * 7919 % 1000) / 1000;
  {
    const int64_t B = 2, D = 5000;
    void* rows[] = {data.data(), data.data() + 10000, data.data() + 20000};
    const int64_t strides[] = {D, D, D};
    const float* in[] = {small.data(), small.data(), small.data(), small.data(), small.data(), small.data()};
    float* out[] = {outputs.data(), outputs.data() + 8, outputs.data() + 16};
    void* grads[] = {outputs.data() + 100, outputs.data() + 20000};
    two_branch_forward(0, B, D, 1, rows, strides, in, out, scratch.data());
    two_branch_backward(0, B, D, 1, rows, strides, in, grads);
  }
  for (int split_k = 0; split_k < 2; ++split_k) {
    const int64_t N = 40, M = 216, D = 66;  // two tiles in each of two parts
    float* out[] = {outputs.data(), outputs.data() + 1, outputs.data() + 100};
    const float* in[] = {small.data(), outputs.data() + 1, outputs.data() + 100};
    contrast_forward(0, N, M, D, data.data(), D, data.data() + N * D, D, .01, 1, 0, split_k, nullptr, out, scratch.data());
    contrast_backward(0, N, M, D, data.data(), D, data.data() + N * D, D, .01, 1, 0, split_k, nullptr, in, outputs.data() + 10000,
                      scratch.data());
  }
}
#endif
