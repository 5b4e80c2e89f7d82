// contrast on the GPU, plan split-K: few rows of enormous width. Each part of the width sums its own N x (N + M) distances,
// reduced in order into E, which is kept.
#pragma once

#include "contrast_pairs.cuh"

namespace imbdiff::contrast {

// The squared distance is symmetric bit by bit, so tiles below the diagonal are left out.
template <class T> __global__ void __launch_bounds__(kThreads, 2) split_kernel(Problem<T> p, Split split, float* partial) {
  __shared__ Shared pool;
  const Place at;
  const int64_t tiles = p.row_tiles() * p.column_tiles(), tile = blockIdx.x % tiles, part = blockIdx.x / tiles;
  const int64_t i0 = tile / p.column_tiles() * kTile, j0 = tile % p.column_tiles() * kTile;
  if (j0 < i0) return;
  const int64_t begin = part * split.span, end = begin + split.span < p.D ? begin + split.span : p.D;
  Pairs pairs;
  distances(p, i0, j0, begin, end, pool, pairs);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t i = i0 + at.row + r, j = j0 + at.column;
    if (i < p.N) store(partial + (part * p.N + i) * p.columns() + j, p.columns() - j, pairs[r]);
  }
}

// A block for each row: E and its state.
__global__ void __launch_bounds__(kThreads) reduce_kernel(Facts p, const float* partial, int64_t parts, float* E, float* lse,
                                                          float* sums) {
  __shared__ State shared[kWarps];
  const int64_t i = blockIdx.x;
  State state = State::none();
  for (int64_t j = threadIdx.x; j < p.columns(); j += kThreads) {
    const bool mirrored = j / kTile < i / kTile;
    const float* at = partial + (mirrored ? j * p.columns() + i : i * p.columns() + j);
    float sum[1] = {0};
    for (int64_t part = 0; part < parts; ++part) sum[0] += at[part * p.N * p.columns()];
    E[i * p.columns() + j] = p.energy(sum[0], i, j);
    state.add(p, sum, i, j);
  }
  state = block_reduce(state, shared);
  if (threadIdx.x == 0) state.write(p, i, lse, sums);
}

// A block for each row.
__global__ void __launch_bounds__(kThreads) weights_kernel(Facts p, Pull pull, const float* E, float* weights, float* mass) {
  __shared__ Sum<1> shared[kWarps];
  const int64_t i = blockIdx.x;
  Sum<1> sum{};
  for (int64_t j = threadIdx.x; j < p.columns(); j += kThreads) {
    const int64_t at = i * p.columns() + j;
    const float w = p.counts(i, j) ? pull(p, E[at], i, j) : 0.f;
    weights[at] = w;
    sum.v[0] += w * p.cos(E[at]);
  }
  sum = block_reduce(sum, shared);
  if (threadIdx.x == 0) mass[i] = sum.v[0];
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) apply_kernel(Problem<T> p, const float* S, const float* mass, T* grad) {
  __shared__ Shared pool, weights;
  const Place at;
  const int64_t i0 = blockIdx.x % p.row_tiles() * kTile, d0 = blockIdx.x / p.row_tiles() * kTile, d = d0 + at.column;
  Pairs x, out{};
#pragma unroll
  for (int r = 0; r < 4; ++r) load_at(p.origin(i0 + at.row + r), d, p.D, x[r]);
  for (int64_t j0 = 0; j0 < p.columns(); j0 += kTile) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t i = i0 + at.row + r, j = j0 + at.column;
      float row[4];
      load(S + i * p.columns() + j, i < p.N ? p.columns() - j : 0, row);
#pragma unroll
      for (int c = 0; c < 4; ++c) weights.v[at.column + c][at.row + r] = row[c];
    }
    apply_tile(p.y_row(j0 + at.fetch_row), d0, p.D, weights, pool, x, out);
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t i = i0 + at.row + r;
    if (i >= p.N) continue;
    if (p.cosine()) load_at(p.x_row(i), d, p.D, x[r]);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (p.cosine()) out[r][e] = turned(out[r][e], mass[i], x[r][e], p.inverse(i));
    store(grad + i * p.D + d, p.D - d, out[r]);
  }
}

}  // namespace imbdiff::contrast
