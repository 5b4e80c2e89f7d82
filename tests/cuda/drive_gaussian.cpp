#include "gaussian.cu"

#include "driver.h"

namespace {
using namespace imbdiff;

// sizes: L, N, M, D; rows, strides and those of the batch: of mean_p, logvar_p, mean_q, logvar_q.
gaussian::Problem problem(int dtype, const int64_t* sizes, void** rows, const int64_t* strides, const int64_t* batches,
                          const int* shared) {
  const auto side = [&](int n) -> gaussian::Side {
    const auto of_logvar = shared[n] ? Element::kFloat : static_cast<Element>(dtype);
    return {{rows[2 * n], strides[2 * n], static_cast<Element>(dtype)}, {rows[2 * n + 1], strides[2 * n + 1], of_logvar},
            sizes[1 + n], batches[2 * n], batches[2 * n + 1], shared[n] != 0};
  };
  return {side(0), side(1), sizes[0], sizes[3]};
}

// labels_p, labels_q, mask, weight; form, pairs, same_set; margin, scale.
gaussian::Choice choice(void** of, const int* how, const float* numbers) {
  return {static_cast<int64_t*>(of[0]), static_cast<int64_t*>(of[1]), static_cast<bool*>(of[2]), static_cast<float*>(of[3]),
          how[0], how[1], numbers[0], numbers[1], how[2] != 0};
}

gaussian::Gradients gradients(int dtype, void** grads) {
  const auto type = static_cast<Element>(dtype);
  return {{grads[0], grads[1], type}, {grads[2], grads[3], type}};
}
}  // namespace

extern "C" {
// Of the divergence, its backward pass, the loss.
void gaussian_scratch(int dtype, const int64_t* sizes, const int* shared, void** grads, int64_t* floats) {
  void* rows[4] = {};
  const int64_t strides[4] = {};
  const auto p = problem(dtype, sizes, rows, strides, strides, shared);
  floats[0] = gaussian::workspace(p), floats[1] = gaussian::workspace_slopes(p);
  floats[2] = gaussian::Room(p, gradients(dtype, grads)).all();
}

void gaussian_divergence(int dtype, const int64_t* sizes, void** rows, const int64_t* strides, const int64_t* batches,
                         const int* shared, int kind, float* matrix, float* scratch) {
  const auto p = problem(dtype, sizes, rows, strides, batches, shared);
  gaussian::values(p, gaussian::whole(p), kind, {matrix, nullptr, false, {}}, scratch, nullptr);
}

void gaussian_divergence_backward(int dtype, const int64_t* sizes, void** rows, const int64_t* strides, const int64_t* batches,
                                  const int* shared, int kind, const float* grad, void** grads, float* scratch) {
  const auto p = problem(dtype, sizes, rows, strides, batches, shared);
  gaussian::divergence_backward(p, kind, grad, gradients(dtype, grads), scratch, nullptr);
}

// outputs: loss, normalizer; slopes in float32.
void gaussian_overlap(int dtype, const int64_t* sizes, void** rows, const int64_t* strides, const int64_t* batches,
                      const int* shared, int kind, void** of, const int* how, const float* numbers, int mean, float** outputs,
                      void** slopes, float* scratch) {
  const auto p = problem(dtype, sizes, rows, strides, batches, shared);
  gaussian::overlap(p, kind, choice(of, how, numbers), mean != 0, outputs[0], outputs[1], gradients(0, slopes), scratch, nullptr);
}
}

#ifdef RACES
const Race gaussian_race([] {
  const int64_t sizes[] = {1, 40, 70, 520}, D = sizes[3], strides[] = {D, 1, D, D}, batches[4] = {};  // the width in parts
  const int shared[] = {1, 0}, how[] = {0, 0, 0};
  auto p = numbers(40 * D), q = numbers(70 * D), logvar_p = numbers(40), logvar_q = numbers(70 * D);
  std::vector<float> slopes[] = {p, logvar_p, q, logvar_q};
  void *rows[] = {p.data(), logvar_p.data(), q.data(), logvar_q.data()}, *of[4] = {};
  void* grads[] = {slopes[0].data(), slopes[1].data(), slopes[2].data(), slopes[3].data()};
  const float margin[] = {1e6f, 1.f};
  float loss, normalizer, *outputs[] = {&loss, &normalizer};
  int64_t floats[3];
  gaussian_scratch(0, sizes, shared, grads, floats);
  std::vector<float> scratch(floats[2]);
  gaussian_overlap(0, sizes, rows, strides, batches, shared, 0, of, how, margin, 1, outputs, grads, scratch.data());
});
#endif
