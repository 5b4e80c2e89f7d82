// contrast on the GPU, plan streaming: tile by tile with a running state; the backward pass recomputes the tiles; nothing N x N
// is stored.
#pragma once

#include "contrast_pairs.cuh"

namespace imbdiff::contrast {

template <class T>
__global__ void __launch_bounds__(kThreads, 2) streaming_kernel(Problem<T> p, Split split, State* partial) {
  __shared__ Shared pool;
  const Place at;
  const int64_t i0 = blockIdx.x % p.row_tiles() * kTile, part = blockIdx.x / p.row_tiles(), begin = part * split.span;
  State states[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) states[r] = State::none();
  for (int64_t j0 = begin; j0 < begin + split.span && j0 < p.columns(); j0 += kTile) {
    Pairs pairs;
    distances(p, i0, j0, 0, p.D, pool, pairs);
#pragma unroll
    for (int r = 0; r < 4; ++r) states[r].add(p, pairs[r], i0 + at.row + r, j0 + at.column);
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int mask = 8; mask > 0; mask /= 2) states[r].merge(states[r].shuffled(mask));
    const int64_t i = i0 + at.row + r;
    if (at.column == 0 && i < p.N) partial[part * p.N + i] = states[r];
  }
}

__global__ void __launch_bounds__(kThreads) merge_kernel(Facts p, const State* partial, int64_t parts, float* lse, float* sums) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.N) return;
  State state = partial[i];
  for (int64_t part = 1; part < parts; ++part) state.merge(partial[part * p.N + i]);
  state.write(p, i, lse, sums);
}

// Sums of a part lie in whole 64 x 64 tiles: no guards, one address.
__host__ __device__ inline int64_t tile_at(const Facts& p, int64_t part, int64_t i0, int64_t d0) {
  return ((part * p.row_tiles() + i0 / kTile) * ceil_div(p.D, kTile) + d0 / kTile) * (kTile * kTile);
}

// Sums of four rows over the 16 threads that share them.
__device__ inline void add_to_mass(const float (&sums)[4], bool first, int64_t N, int64_t i0, float* mass) {
  const Place at;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    float sum = sums[r];
#pragma unroll
    for (int mask = 8; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    const int64_t i = i0 + at.row + r;
    if (at.column == 0 && i < N) mass[i] = first ? sum : mass[i] + sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) streaming_bwd_kernel(Problem<T> p, Split split, Pull pull, float* partial,
                                                                    float* mass) {
  __shared__ Shared pool, weights;
  const Place at;
  const int64_t i0 = blockIdx.x % p.row_tiles() * kTile, part = blockIdx.x / p.row_tiles(), begin = part * split.span;
  for (int64_t j0 = begin; j0 < begin + split.span && j0 < p.columns(); j0 += kTile) {
    Pairs pairs;
    distances(p, i0, j0, 0, p.D, pool, pairs);
#pragma unroll
    for (int n = 0; n < 16; ++n) weights.v[at.column + n % 4][at.row + n / 4] = pairs[n / 4][n % 4];
    float sums[4] = {};
#pragma unroll 1  // of registers there are few here
    for (int c = 0; c < 4; ++c) {
      float* w = &weights.v[at.column + c][at.row];
      const int64_t i = i0 + at.row, j = j0 + at.column + c;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float e = p.counts(i + r, j) ? p.energy(w[r], i + r, j) : 0.f;
        w[r] = p.counts(i + r, j) ? pull(p, e, i + r, j) : 0.f;
        sums[r] += w[r] * p.cos(e);
      }
    }
    if (p.cosine()) add_to_mass(sums, j0 == begin, p.N, i0, mass + part * p.N);
    const Scaled<T> y = p.y_row(j0 + at.fetch_row);
    for (int64_t d0 = 0; d0 < p.D; d0 += kTile) {
      float* tile = partial + tile_at(p, part, i0, d0) + at.row * kTile + at.column;
      Pairs x, out{};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        load_at(p.origin(i0 + at.row + r), d0 + at.column, p.D, x[r]);
        if (j0 > begin) load(tile + r * kTile, 4, out[r]);
      }
      apply_tile(y, d0, p.D, weights, pool, x, out);
#pragma unroll
      for (int r = 0; r < 4; ++r) store(tile + r * kTile, 4, out[r]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(Problem<T> p, const float* partial, const float* mass, int64_t parts,
                                                             T* grad) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, i = at / p.D, d = at % p.D;
  if (i >= p.N) return;
  float sum = 0, own = 0;
  for (int64_t part = 0; part < parts; ++part) {
    sum += partial[tile_at(p, part, i, d) + i % kTile * kTile + d % kTile];
    if (p.cosine()) own += mass[part * p.N + i];
  }
  if (p.cosine()) sum = turned(sum, own, p.inverse(i) * up(p.x.row(i)[d]), p.inverse(i));
  down(sum, grad[at]);
}

}  // namespace imbdiff::contrast
