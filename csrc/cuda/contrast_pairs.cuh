// contrast on the GPU, what its losses make of squared differences: energies, states of rows, weights of the gradient.
#pragma once

#include "engine.cuh"

namespace imbdiff::contrast {
#include "../common/contrast.h"

enum class Loss { distance, hinge, cosine, supcon };
constexpr float kSmallestNorm = 1e-12f;  // rows up to there have no direction

struct Facts {
  Loss loss;
  int64_t N, M, D;
  float scale;  // of squared distances; of those of unit rows, 1 / (2 tau), for cosines
  bool include_self = false, per_row = true;
  float margin = 0;                // of hinge
  Rows<int64_t> labels = {};       // of supcon
  const float* lengths = nullptr;  // [N + M] of cosines; 0 of a row without a direction

  __host__ __device__ bool cosine() const { return loss == Loss::cosine || loss == Loss::supcon; }
  // Whether a row's own term is among those that are added up; a cosine's, 1 exactly, comes in at the end.
  __host__ __device__ bool self() const { return loss == Loss::distance && include_self; }
  __host__ __device__ int64_t columns() const { return N + M; }
  __host__ __device__ int64_t row_tiles() const { return ceil_div(N, kTile); }
  __host__ __device__ int64_t column_tiles() const { return ceil_div(columns(), kTile); }
  // The diagonal of a difference is 0 and needs no mask, but without the self term its exponential may overflow.
  __device__ bool counts(int64_t i, int64_t j) const { return i < N && j < columns() && (self() || i != j); }
  __device__ float inverse(int64_t j) const { return !lengths ? 1.f : lengths[j] == 0 ? 0.f : 1 / lengths[j]; }
  __device__ bool flat(int64_t i, int64_t j) const { return lengths && (lengths[i] == 0 || lengths[j] == 0); }
  __device__ bool positive(int64_t i, int64_t j) const {
    return labels.data && i != j && *labels.row(i) == *labels.row(j);
  }
  // Of a row without a direction the cosine is 0; NaN stays NaN.
  __device__ float energy(float squares, int64_t i, int64_t j) const {
    return scale * (flat(i, j) ? fmaf(0.f, squares, 2.f) : squares);
  }
  __device__ float cos(float e) const { return contrast::cosine(e, .5f / scale); }

  __device__ float pairs() const { return static_cast<float>(N * (N - 1)); }
  int64_t terms() const { return columns() - (self() ? 0 : 1); }
  bool empty() const { return N == 0 || terms() == 0; }
  // What is taken from a row's log-sum-exp, or where they are added up from that of all.
  float shift() const {
    if (cosine() && include_self) return 0.f;
    const double count = static_cast<double>(terms()) * (per_row ? 1. : static_cast<double>(N));
    return static_cast<float>(std::log(count) - (cosine() ? 2. * scale : 0.));
  }
  // Streaming: parts of the columns; more of them cost the backward pass N x D floats each.
  Split column_split(int64_t most) const {
    const int64_t wanted = ceil_div(kFill, row_tiles());
    return Split::of(columns(), wanted < most ? wanted : most, kTile, kTile);
  }
  // Split: parts of the width.
  Split width_split() const { return Split::of(D, ceil_div(kFill, row_tiles() * column_tiles()), 512, kDepth); }
  Split norm_split() const { return Split::of(D, ceil_div(kFill, columns()), 4096, kThreads * 4); }
};

template <class T> struct Problem : Facts {
  Rows<T> x, negatives;
  __device__ const T* data(int64_t j) const { return j < N ? x.row(j) : j < columns() ? negatives.row(j - N) : nullptr; }
  __device__ Scaled<T> x_row(int64_t i) const { return i < N ? Scaled<T>{x.row(i), inverse(i)} : Scaled<T>{nullptr, 0.f}; }
  // From what the others' rows are subtracted in the gradient.
  __device__ Scaled<T> origin(int64_t i) const { return cosine() ? Scaled<T>{nullptr, 0.f} : x_row(i); }
  __device__ Scaled<T> y_row(int64_t j) const { return j < columns() ? Scaled<T>{data(j), inverse(j)} : Scaled<T>{nullptr, 0.f}; }
};

struct Exp {
  HOST_DEVICE float operator()(float v) const { return expf(v); }
};

// What a row has met: the log-sum-exp of -E, and what hinge and supcon add up.
struct State {
  LogSumExp lse;
  float sum;
  __device__ static State none() { return {LogSumExp::none(), 0.f}; }
  template <int C> __device__ void add(const Facts& p, const float (&squares)[C], int64_t i, int64_t j) {
    float values[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      values[c] = -INFINITY;
      if (!p.counts(i, j + c)) continue;
      const float e = p.energy(squares[c], i, j + c), lack = shortfall(e, p.margin);
      values[c] = -e;
      if (p.loss == Loss::hinge) sum += lack * lack;
      else if (p.positive(i, j + c)) sum += e;
    }
    if (p.loss != Loss::hinge) lse.add(values);
  }
  __device__ void merge(const State& other) {
    lse.merge(other.lse);
    sum += other.sum;
  }
  __device__ State shuffled(int mask) const { return {lse.shuffled(mask), __shfl_xor_sync(~0u, sum, mask)}; }
  // With a cosine's own term, 1 exactly, the others keep their digits beside it.
  __device__ void write(const Facts& p, int64_t i, float* lse_out, float* sums) const {
    lse_out[i] = p.cosine() && p.include_self ? log1pf(expf(lse.top) * lse.sum) : lse.value();
    sums[i] = sum;
  }
};

// Of the rows of x, null where the loss has none: positives is their number.
struct Statistics { const float *lse, *sums, *weight, *positives; };

// dloss/dE times -2 scale grad: the weights of x_i - y_j.
struct Pull {
  Statistics of;
  const float *grad, *total;  // log sum_i exp(lse_i) where rows share it; the anchors of supcon

  __device__ Weight<float> row(const Facts& p, int64_t i) const {
    if (i >= p.N || (of.positives && of.positives[i] == 0)) return {0.f, 0.f};  // a negative brings nothing
    const float anchors = of.positives ? *total : static_cast<float>(p.N);
    const float factor = p.per_row ? (of.weight ? of.weight[i] : 1.f) / anchors : 1.f;
    return row_weight(p.per_row, false, p.per_row ? 0.f : *total, of.lse[i], factor, Exp{});
  }
  __device__ float operator()(const Facts& p, float e, int64_t i, int64_t j) const {
    const float rate = -2.f * p.scale * *grad;
    if (p.loss == Loss::hinge) return rate * 4 / p.pairs() * shortfall(e, p.margin);
    const Weight<float> own = row(p, i), other = row(p, j);
    float s = j < p.N ? pull<false>(e, own, other.shift, other.factor, Exp{}) : Exp{}(-e - own.shift) * own.factor;
    if (p.positive(i, j)) s -= own.factor / of.positives[i] + other.factor / of.positives[j];
    return rate * s;
  }
};

template <class T>
__device__ inline void distances(const Problem<T>& p, int64_t i0, int64_t j0, int64_t begin, int64_t end, Shared& pool,
                                 Pairs& pairs) {
  const int row = Place{}.fetch_row;
  score_tile<SquaredDifference>(p.x_row(i0 + row), p.y_row(j0 + row), begin, end, pool, pairs);
}

// Of cosines the gradient is sum_j S_ij (cos u_i - u_j) / |x_i|: the sum of S_ij (0 - u_j), and u_i times mass_i, that of S_ij cos.
__device__ inline float turned(float sum, float mass, float u, float inverse) { return inverse * fmaf(mass, u, sum); }

}  // namespace imbdiff::contrast
