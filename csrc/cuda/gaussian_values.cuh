// gaussian: values of pairs, and what is made of them. 64 x 64 pairs a block, every one from its differences, and parts of the
// width where there are few tiles; a tile without a selected pair is left out.
#pragma once
#include "any_rows.cuh"

namespace imbdiff::gaussian {
#include "../common/gaussian.h"

struct Side {  // [L, count, D] means, log-variances alike or, shared, [L, count, 1] in float32
  AnyRows mean, logvar;
  int64_t count, mean_batch, logvar_batch;
  bool shared;

  // Zeros beyond D and beyond the last row: dimensions in which two such elements differ by nothing.
  template <int V> __device__ void load(int64_t b, int64_t i, int64_t d, int64_t D, float (&m)[V], float (&l)[V]) const {
    const int64_t left = i < count ? D - d : 0;
    mean.load(i, b * mean_batch + d, left, m);
    if (!shared) return logvar.load(i, b * logvar_batch + d, left, l);
    const float one = left > 0 ? static_cast<const float*>(logvar.data)[b * logvar_batch + i * logvar.stride] : 0.f;
#pragma unroll
    for (int e = 0; e < V; ++e) l[e] = e < left ? one : 0.f;
  }
};
struct Problem {
  Side p, q;
  int64_t L, D;
};
struct Rectangle {  // of the matrix of pairs
  int64_t row, rows, column, columns;
  __host__ __device__ int64_t down() const { return ceil_div(rows, kTile); }
  __host__ __device__ int64_t across() const { return ceil_div(columns, kTile); }
};

// Which pairs count, and for what. Numbers as in the schema.
constexpr int kAll = 0, kSame = 2, kHinge = 0;
struct Choice {
  const int64_t *labels_p, *labels_q;
  const bool* mask;     // [N, M], or null: all
  const float* weight;  // [N], or null: ones
  int form, pairs;
  float margin, scale;
  bool same_set;
  __device__ bool operator()(int64_t i, int64_t j, int64_t M) const {
    return (!mask || mask[i * M + j]) && (pairs == kAll || (labels_p[i] == labels_q[j]) == (pairs == kSame)) &&
           !(same_set && i == j);
  }
};

// What becomes of the divergences of a rectangle: themselves or, of the selected, the slopes of the loss's sum; that sum and the
// number of the selected.
struct Use {
  float *matrix, *sums;  // [L, rows, columns]; [tiles, 2]; or null
  bool chosen;           // by `choice`; else all
  Choice choice;
};

// ---- one dimension of a pair ---------------------------------------------------------------------------------------------------

// (e^x - 1 - x) / x^2 near 0
__device__ inline float series(float x) {
  float sum = 1.f / 5040;
  sum = fmaf(sum, x, 1.f / 720), sum = fmaf(sum, x, 1.f / 120), sum = fmaf(sum, x, 1.f / 24);
  return fmaf(fmaf(sum, x, 1.f / 6), x, .5f);
}
__device__ inline float excess(float x) { return fabsf(x) < .5f ? x * x * series(x) : expf(x) - 1 - x; }  // e^x - 1 - x
__device__ inline float growth(float x) { return fabsf(x) < .5f ? fmaf(x * x, series(x), x) : expf(x) - 1; }

// 2 (cosh x - 1) = 4 sinh^2 (x / 2)
__device__ inline float bend(float x) {
  const float z = x * x, e = expf(x / 2), sinh = e - __fdividef(1.f, e);
  const float sum = fmaf(fmaf(fmaf(z, 1.f / 1814400, 1.f / 20160), z, 1.f / 360), z, 1.f / 12);
  return z < 1 ? fmaf(z * z, sum, z) : sinh * sinh;
}
__device__ inline float log_cosh(float x) {
  const float size = fabsf(x), z = x * x;
  float sum = fmaf(z, -691.f / 467775, 62.f / 14175);
  sum = fmaf(sum, z, -17.f / 1260), sum = fmaf(sum, z, 2.f / 45), sum = fmaf(sum, z, -1.f / 6);
  return size < .5f ? fmaf(z, sum, 1.f) * z / 2 : size + logf(.5f + .5f * expf(-2 * size));
}

// What a dimension of a Gaussian contributes beside mean and log-variance.
template <int kKind> __device__ inline float aid(float l) { return kKind == kBhattacharyya ? expf(l) : expf(l / -2); }

template <int kKind> __device__ inline float twice(float d, float x, float of_p, float of_q, float sum) {
  if constexpr (kKind == kBhattacharyya) return sum + log_cosh(x / 2) + __fdividef(d * d, 2 * (of_p + of_q));
  if constexpr (kKind == kJeffreys) sum = fmaf(d * of_p, d * of_p, sum);
  return fmaf(d * of_q, d * of_q, sum) + (kKind == kKl ? excess(x) : bend(x));
}

// ---- values --------------------------------------------------------------------------------------------------------------------

__device__ inline unsigned selected(const Problem& p, const Rectangle& r, const Use& use, int64_t i, int64_t j) {
  unsigned bits = 0;
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    const bool inside = i + n / 4 < r.row + r.rows && j + n % 4 < r.column + r.columns;
    bits |= unsigned(inside && (!use.chosen || use.choice(i + n / 4, j + n % 4, p.q.count))) << n;
  }
  return bits;
}

// twice: the divergences of the thread's pairs, doubled. All threads of the block come here.
__device__ inline void finish(const Problem& p, const Rectangle& r, const Use& use, int64_t tile, int64_t b, int64_t i,
                              int64_t j, unsigned chosen, const Pairs& twice) {
  __shared__ Sum<2> shared[kWarps];
  const Choice& c = use.choice;
  Sum<2> sum{{0.f, static_cast<float>(__popc(chosen))}};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const bool inside = i + n < r.row + r.rows;
    const float weight = use.chosen && c.weight && inside ? c.weight[i + n] : 1.f;
    float row[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      row[k] = twice[n][k] / 2;
      if (!use.chosen) continue;
      const bool counts = chosen >> (4 * n + k) & 1;
      const Push<float> f = push(c.scale * row[k], c.margin, c.form == kHinge);
      sum.v[0] += counts ? weight * f.value : 0.f;
      row[k] = counts ? c.scale * weight * f.slope : 0.f;
    }
    if (use.matrix && inside)
      store(use.matrix + (b * r.rows + i + n - r.row) * r.columns + j - r.column, r.column + r.columns - j, row);
  }
  if (!use.sums) return;
  sum = block_reduce(sum, shared);
  if (threadIdx.x == 0) use.sums[2 * tile] = sum.v[0], use.sums[2 * tile + 1] = sum.v[1];
}

struct Corner {  // of this thread's pairs
  int64_t b, i, j;
  __device__ Corner(const Rectangle& r, int64_t tile)
      : b(tile / (r.down() * r.across())),
        i(r.row + tile / r.across() % r.down() * kTile),
        j(r.column + tile % r.across() * kTile) {}
};

constexpr int kStage = 8, kFlush = 128;  // dimensions in a stage; so many are summed before they are added to the rest
struct alignas(16) Stages { float v[2][3][2][kStage][kPitch]; };  // one half is read while the other is written

template <int kKind>
__global__ void __launch_bounds__(kThreads, 2) values_kernel(Problem p, Rectangle r, Split split, Use use, float* partial) {
  __shared__ Stages pool;
  const Place at;
  const int64_t tiles = p.L * r.down() * r.across(), tile = blockIdx.x % tiles, part = blockIdx.x / tiles;
  const Corner corner(r, tile);
  const int64_t i = corner.i + at.row, j = corner.j + at.column;
  const unsigned chosen = selected(p, r, use, i, j);
  Pairs total{};
  if (__syncthreads_or(chosen != 0)) {
    const int side = at.thread / 128, line = at.thread % 128 / 2, column = at.thread % 2 * 4;  // fetching
    const int64_t from = side ? corner.j + line : corner.i + line, begin = part * split.span;
    const int64_t end = begin + split.span < p.D ? begin + split.span : p.D;
    float mean[4], logvar[4];
    const auto fetch = [&](int64_t d) { (side ? p.q : p.p).load(corner.b, from, d + column, end, mean, logvar); };
    Pairs sum{};
    const auto flush = [&] {
#pragma unroll
      for (int n = 0; n < 16; ++n) total[n / 4][n % 4] += sum[n / 4][n % 4], sum[n / 4][n % 4] = 0.f;
    };
    fetch(begin);
    int half = 0;
    for (int64_t d = begin; d < end; d += kStage, half ^= 1) {
      auto& read = pool.v[half];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        read[0][side][column + e][line] = mean[e];
        read[1][side][column + e][line] = logvar[e];
        read[2][side][column + e][line] = aid<kKind>(logvar[e]);
      }
      __syncthreads();
      if (d + kStage < end) fetch(d + kStage);
#pragma unroll 2
      for (int k = 0; k < kStage; ++k) {
        const auto m = four(&read[0][0][k][at.row]), n = four(&read[0][1][k][at.column]);
        const auto l = four(&read[1][0][k][at.row]), s = four(&read[1][1][k][at.column]);
        const auto of_p = four(&read[2][0][k][at.row]), of_q = four(&read[2][1][k][at.column]);
#pragma unroll
        for (int c = 0; c < 16; ++c) {
          float& to = sum[c / 4][c % 4];
          to = twice<kKind>(m.v[c / 4] - n.v[c % 4], l.v[c / 4] - s.v[c % 4], of_p.v[c / 4], of_q.v[c % 4], to);
        }
      }
      if ((d - begin) % kFlush == kFlush - kStage) flush();
    }
    flush();
  }
  if (split.parts == 1) return finish(p, r, use, tile, corner.b, i, j, chosen, total);
#pragma unroll
  for (int n = 0; n < 4; ++n) store(partial + ((part * tiles + tile) * 4 + n) * kThreads * 4 + at.thread * 4, 4, total[n]);
}

__global__ void __launch_bounds__(kThreads) gather_kernel(Problem p, Rectangle r, int64_t parts, Use use, const float* partial) {
  const Place at;
  const int64_t tiles = p.L * r.down() * r.across(), tile = blockIdx.x;
  const Corner corner(r, tile);
  const int64_t i = corner.i + at.row, j = corner.j + at.column;
  Pairs total{};
  for (int64_t part = 0; part < parts; ++part)
#pragma unroll
    for (int n = 0; n < 16; ++n)
      total[n / 4][n % 4] += partial[((part * tiles + tile) * 4 + n / 4) * kThreads * 4 + at.thread * 4 + n % 4];
  finish(p, r, use, tile, corner.b, i, j, selected(p, r, use, i, j), total);
}

// One block: the loss and what it was divided by. The number of pairs is a whole number.
__global__ void __launch_bounds__(kThreads) loss_kernel(const float* sums, int64_t tiles, bool mean, float* loss,
                                                        float* normalizer) {
  __shared__ Sum<2, double> shared[kWarps];
  Sum<2, double> sum{};
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kThreads) sum.v[0] += sums[2 * tile], sum.v[1] += sums[2 * tile + 1];
  sum = block_reduce(sum, shared);
  if (threadIdx.x > 0) return;
  const double over = mean && sum.v[1] > 1 ? sum.v[1] : 1;
  *normalizer = static_cast<float>(over), *loss = static_cast<float>(sum.v[0] / over);
}

}  // namespace imbdiff::gaussian
