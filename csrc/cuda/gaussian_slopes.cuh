// gaussian: gradients. A block owns 64 rows and 32 dimensions of one set and walks over the other set.
#pragma once
#include "gaussian_values.cuh"

namespace imbdiff::gaussian {

// Beside mean and log-variance.
template <int kKind> __device__ inline float slope_aid(float l) { return kKind == kBhattacharyya ? expf(l) : expf(-l); }

template <int kKind>
__device__ inline void slopes(float d, float x, float of_p, float of_q, float g, Slope<float>& p, Slope<float>& q) {
  if constexpr (kKind == kBhattacharyya) {
    const float wider = fabsf(x) < .5f ? of_q * growth(x) : of_p - of_q;
    bhattacharyya_slopes(d, of_p, of_q, wider, g, p, q);
  } else pair_slopes<kKind>(d, growth(x), kKind == kJeffreys ? growth(-x) : 0.f, of_p, of_q, g, p, q);
}

struct Gradient {  // of one set, dense; null where none is wanted
  void *mean, *logvar;
  Element type;
  bool any() const { return mean || logvar; }
};

constexpr int kWide = 32, kOthers = 32;  // dimensions of a block; rows of the other set in a stage
struct alignas(16) Others { float weight[kOthers][kPitch], v[3][kOthers][kWide + 4]; };

// weights: the gradient of the divergences of r, [L, rows, columns]; partial, for a shared log-variance: [ceil(D / 32), L, count].
template <int kKind, bool kOfP>
__global__ void __launch_bounds__(kThreads, 2) slopes_kernel(Problem p, Rectangle r, const float* weights, Gradient to,
                                                             float* partial) {
  __shared__ Others pool;
  const Side &own = kOfP ? p.p : p.q, &other = kOfP ? p.q : p.p;
  const int thread = threadIdx.x, row = thread / 16 * 4, column = thread % 16 * 2;
  const int64_t first = kOfP ? r.row : r.column, count = kOfP ? r.rows : r.columns;
  const int64_t first_other = kOfP ? r.column : r.row, others = kOfP ? r.columns : r.rows;
  const int64_t tiles = ceil_div(count, kTile), chunk = blockIdx.x / (p.L * tiles), d0 = chunk * kWide;
  const int64_t b = blockIdx.x / tiles % p.L, o0 = blockIdx.x % tiles * kTile;
  weights += b * r.rows * r.columns;

  float mean[4][2], logvar[4][2], helper[4][2];
  Slope<float> sum[4][2]{};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    own.load(b, o0 + row + n < count ? first + o0 + row + n : own.count, d0 + column, p.D, mean[n], logvar[n]);
#pragma unroll
    for (int e = 0; e < 2; ++e) helper[n][e] = slope_aid<kKind>(logvar[n][e]);
  }
  for (int64_t at = 0; at < others; at += kOthers) {
    bool any = false;
#pragma unroll 2  // of registers there are few here
    for (int n = 0; n < kTile * kOthers / kThreads; ++n) {  // consecutive threads along the matrix's rows
      const int cell = thread + n * kThreads, o = kOfP ? cell / kOthers : cell % kTile, s = kOfP ? cell % kOthers : cell / kTile;
      const bool inside = o0 + o < count && at + s < others;
      const int64_t i = kOfP ? o0 + o : at + s, j = kOfP ? at + s : o0 + o;
      const float w = inside ? weights[i * r.columns + j] : 0.f;
      pool.weight[s][o] = w;
      any |= w != 0;
    }
    if (!__syncthreads_or(any)) continue;
    {
      const int s = thread / 8, d = thread % 8 * 4;
      float m[4], l[4];
      other.load(b, at + s < others ? first_other + at + s : other.count, d0 + d, p.D, m, l);
      store(&pool.v[0][s][d], 4, m);
      store(&pool.v[1][s][d], 4, l);
#pragma unroll
      for (int e = 0; e < 4; ++e) pool.v[2][s][d + e] = slope_aid<kKind>(l[e]);
    }
    __syncthreads();
#pragma unroll 1
    for (int s = 0; s < kOthers; ++s) {
      const auto w = four(&pool.weight[s][row]);
      float m[2], l[2], h[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) m[e] = pool.v[0][s][column + e], l[e] = pool.v[1][s][column + e], h[e] = pool.v[2][s][column + e];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (w.v[n] == 0) continue;  // what is not wanted may be infinite
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          Slope<float> unused{};
          if constexpr (kOfP) slopes<kKind>(mean[n][e] - m[e], logvar[n][e] - l[e], helper[n][e], h[e], w.v[n], sum[n][e], unused);
          else slopes<kKind>(m[e] - mean[n][e], l[e] - logvar[n][e], h[e], helper[n][e], w.v[n], unused, sum[n][e]);
        }
      }
    }
    __syncthreads();
  }
  const int64_t d = d0 + column;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int64_t i = first + o0 + row + n;
    const bool inside = o0 + row + n < count;
    float of_mean[2], of_logvar[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      of_mean[e] = sum[n][e].mean * (kKind == kBhattacharyya ? .5f : 1.f);
      of_logvar[e] = sum[n][e].logvar * (kKind == kBhattacharyya ? .25f : 1.f);
    }
    if (inside && to.mean) store(to.type, to.mean, (b * own.count + i) * p.D + d, p.D - d, of_mean);
    if (inside && to.logvar && !own.shared) store(to.type, to.logvar, (b * own.count + i) * p.D + d, p.D - d, of_logvar);
    if (!own.shared) continue;
    float line = (d < p.D ? of_logvar[0] : 0.f) + (d + 1 < p.D ? of_logvar[1] : 0.f);
#pragma unroll
    for (int mask = 8; mask > 0; mask /= 2) line += __shfl_xor_sync(~0u, line, mask);
    if (inside && to.logvar && column == 0) partial[(chunk * p.L + b) * own.count + i] = line;
  }
}

__global__ void __launch_bounds__(kThreads) sum_chunks_kernel(const float* partial, int64_t chunks, int64_t count, float* grad) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  double sum = 0;  // of many that may all be alike, which rounds to one side
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * count + i];
  grad[i] = static_cast<float>(sum);
}

}  // namespace imbdiff::gaussian
