// contrast on the GPU, what is known of rows alone: lengths, numbers of positives; and what is made of all rows' states.
#pragma once

#include "contrast_pairs.cuh"

namespace imbdiff::contrast {

constexpr float kShrunk = 0x1p-90f;  // times any float, its square does not overflow

// Squared norms, and those of shrunk rows for where the former overflow: two rows of N + M for each part.
template <class T> __global__ void __launch_bounds__(kThreads) norms_kernel(Problem<T> p, Split split, float* partial) {
  __shared__ Sum<2> shared[kWarps];
  const int64_t j = blockIdx.x % p.columns(), part = blockIdx.x / p.columns();
  const int64_t begin = part * split.span, end = begin + split.span < p.D ? begin + split.span : p.D;
  Sum<2> sum{};
  for (int64_t d = begin + threadIdx.x * 4; d < end; d += kThreads * 4) {
    float values[4];
    load(p.data(j) + d, end - d, values);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float shrunk = kShrunk * values[e];
      sum.v[0] = fmaf(values[e], values[e], sum.v[0]);
      sum.v[1] = fmaf(shrunk, shrunk, sum.v[1]);
    }
  }
  sum = block_reduce(sum, shared);
  if (threadIdx.x == 0)
    for (int k = 0; k < 2; ++k) partial[(2 * part + k) * p.columns() + j] = sum.v[k];
}

__global__ void __launch_bounds__(kThreads) lengths_kernel(const float* partial, int64_t parts, int64_t rows, float* lengths) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= rows) return;
  float sum[2] = {};
  for (int64_t part = 0; part < parts; ++part)
    for (int k = 0; k < 2; ++k) sum[k] += partial[(2 * part + k) * rows + j];
  const float length = sum[0] == INFINITY ? sqrtf(sum[1]) / kShrunk : sqrtf(sum[0]);
  lengths[j] = length <= kSmallestNorm ? 0.f : length;
}

// A block for each row: how many others have its label.
__global__ void __launch_bounds__(kThreads) positives_kernel(Facts p, float* positives) {
  __shared__ Sum<1> shared[kWarps];
  const int64_t i = blockIdx.x, label = *p.labels.row(i);
  Sum<1> count{};
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < p.N; j += kThreads) count.v[0] += i != j && *p.labels.row(j) == label;
  count = block_reduce(count, shared);
  if (threadIdx.x == 0) positives[i] = count.v[0];
}

// One block. The loss, or what the backward pass needs of all rows: log sum_i exp(lse_i) where they share it, else how many count.
__global__ void __launch_bounds__(kThreads) total_kernel(Facts p, Statistics of, float shift, bool loss, float* total) {
  __shared__ LogSumExp states[kWarps];
  __shared__ Sum<2> sums[kWarps];
  LogSumExp state = LogSumExp::none();
  Sum<2> sum{};
  for (int64_t i = threadIdx.x; i < p.N; i += kThreads) {
    if (of.positives && of.positives[i] == 0) continue;
    sum.v[1] += 1;
    const float lse[1] = {of.lse[i]}, weight = of.weight ? of.weight[i] : 1.f;
    if (!p.per_row) state.add(lse);
    else if (loss)
      sum.v[0] += p.loss == Loss::hinge ? of.sums[i]
                                        : weight * (of.positives ? lse[0] + of.sums[i] / of.positives[i] : lse[0] - shift);
  }
  if (p.per_row) sum = block_reduce(sum, sums);
  else state = block_reduce(state, states);
  if (threadIdx.x != 0) return;
  if (!p.per_row) *total = state.value() - shift;
  else if (loss) *total = sum.v[0] / (p.loss == Loss::hinge ? p.pairs() : fmaxf(sum.v[1], 1.f));
  else *total = sum.v[1];
}

}  // namespace imbdiff::contrast
