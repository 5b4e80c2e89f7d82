// contrast on the GPU, op negative_distance: both plans of the pairwise engine in exact float32.
//   streaming : tile by tile with a running log-sum-exp; the backward pass recomputes the tiles; nothing N x N is stored.
//   split     : few rows of enormous width. Each part of the width sums its own N x (N + M) distances, reduced in order into E.
#include "engine.cuh"

namespace imbdiff::contrast {
#include "../common/contrast.h"

template <class T> struct Problem {
  Rows<T> x, negatives;
  int64_t N, M, D;
  float scale;
  bool include_self, per_row;

  __host__ __device__ int64_t columns() const { return N + M; }
  __host__ __device__ int64_t row_tiles() const { return ceil_div(N, kTile); }
  __host__ __device__ int64_t column_tiles() const { return ceil_div(columns(), kTile); }
  __device__ const T* x_row(int64_t i) const { return i < N ? x.row(i) : nullptr; }
  __device__ const T* y_row(int64_t j) const { return j < N ? x.row(j) : j < columns() ? negatives.row(j - N) : nullptr; }
  // The diagonal of a difference is 0 and needs no mask, but without the self term its exponential may overflow.
  __device__ bool counts(int64_t i, int64_t j) const { return i < N && j < columns() && (include_self || i != j); }

  int64_t terms() const { return columns() - (include_self ? 0 : 1); }
  bool empty() const { return N == 0 || terms() == 0; }
  // Streaming: parts of the columns; more of them cost the backward pass N x D floats each.
  Split column_split(int64_t most) const {
    const int64_t wanted = ceil_div(kFill, row_tiles());
    return Split::of(columns(), wanted < most ? wanted : most, kTile, kTile);
  }
  // Split: parts of the width.
  Split width_split() const { return Split::of(D, ceil_div(kFill, row_tiles() * column_tiles()), 512, kDepth); }
};

struct Exp {
  HOST_DEVICE float operator()(float v) const { return expf(v); }
};

// dloss/dE times -2 scale grad: the weights of x_i - y_j.
struct Pull {
  const float *grad, *lse, *weight, *log_z;
  int64_t N;
  float scale;
  bool per_row;
  __device__ Weight<float> of(int64_t i) const {
    if (i >= N) return {0.f, 0.f};  // a negative brings nothing
    const float factor = per_row ? (weight ? weight[i] : 1.f) / static_cast<float>(N) : 1.f;
    return row_weight(per_row, false, per_row ? 0.f : *log_z, lse[i], factor, Exp{});
  }
  __device__ float operator()(float e, int64_t i, int64_t j) const {
    const Weight<float> own = of(i), other = of(j);
    const float rate = -2.f * scale * *grad;
    return rate * (j < N ? pull<false>(e, own, other.shift, other.factor, Exp{}) : Exp{}(-e - own.shift) * own.factor);
  }
};

template <class T>
__device__ inline void distances(const Problem<T>& p, int64_t i0, int64_t j0, int64_t begin, int64_t end, Shared& pool,
                                 Pairs& pairs) {
  const int row = Place{}.fetch_row;
  score_tile<SquaredDifference>(p.x_row(i0 + row), p.y_row(j0 + row), begin, end, pool, pairs);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) streaming_kernel(Problem<T> p, Split split, LogSumExp* partial) {
  __shared__ Shared pool;
  const Place at;
  const int64_t i0 = blockIdx.x % p.row_tiles() * kTile, part = blockIdx.x / p.row_tiles(), begin = part * split.span;
  LogSumExp states[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) states[r] = LogSumExp::none();
  for (int64_t j0 = begin; j0 < begin + split.span && j0 < p.columns(); j0 += kTile) {
    Pairs pairs;
    distances(p, i0, j0, 0, p.D, pool, pairs);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float values[4];
#pragma unroll
      for (int c = 0; c < 4; ++c)
        values[c] = p.counts(i0 + at.row + r, j0 + at.column + c) ? -p.scale * pairs[r][c] : -INFINITY;
      states[r].add(values);
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int mask = 8; mask > 0; mask /= 2) states[r].merge(states[r].shuffled(mask));
    const int64_t i = i0 + at.row + r;
    if (at.column == 0 && i < p.N) partial[part * p.N + i] = states[r];
  }
}

__global__ void __launch_bounds__(kThreads) merge_kernel(const LogSumExp* partial, int64_t parts, int64_t N, float* lse) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= N) return;
  LogSumExp state = partial[i];
  for (int64_t part = 1; part < parts; ++part) state.merge(partial[part * N + i]);
  lse[i] = state.value();
}

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

// A block for each row: E and its log-sum-exp.
template <class T>
__global__ void __launch_bounds__(kThreads) reduce_kernel(Problem<T> p, const float* partial, int64_t parts, float* E,
                                                          float* lse) {
  __shared__ LogSumExp shared[kWarps];
  const int64_t i = blockIdx.x;
  LogSumExp state = LogSumExp::none();
  for (int64_t j = threadIdx.x; j < p.columns(); j += kThreads) {
    const bool mirrored = j / kTile < i / kTile;
    const float* at = partial + (mirrored ? j * p.columns() + i : i * p.columns() + j);
    float sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += at[part * p.N * p.columns()];
    E[i * p.columns() + j] = p.scale * sum;
    if (p.counts(i, j)) {
      const float value[1] = {-p.scale * sum};
      state.add(value);
    }
  }
  state = block_reduce(state, shared);
  if (threadIdx.x == 0) lse[i] = state.value();
}

// One block. global: log sum_i exp(lse_i) - log_count; per_row: mean of w_i (lse_i - log_count).
__global__ void __launch_bounds__(kThreads) loss_kernel(const float* lse, const float* weight, int64_t N, float log_count,
                                                        bool per_row, float* loss) {
  __shared__ LogSumExp states[kWarps];
  __shared__ Sum<1> sums[kWarps];
  LogSumExp state = LogSumExp::none();
  Sum<1> sum{};
  for (int64_t i = threadIdx.x; i < N; i += kThreads) {
    const float value[1] = {lse[i]};
    if (per_row) sum.v[0] += (weight ? weight[i] : 1.f) * (value[0] - log_count);
    else state.add(value);
  }
  if (per_row) sum = block_reduce(sum, sums);
  else state = block_reduce(state, states);
  if (threadIdx.x == 0) *loss = per_row ? sum.v[0] / static_cast<float>(N) : state.value() - log_count;
}

// Sums of a part lie in whole 64 x 64 tiles: no guards, one address.
template <class T> __host__ __device__ int64_t tile_at(const Problem<T>& p, int64_t part, int64_t i0, int64_t d0) {
  return ((part * p.row_tiles() + i0 / kTile) * ceil_div(p.D, kTile) + d0 / kTile) * (kTile * kTile);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) streaming_bwd_kernel(Problem<T> p, Split split, Pull pull, float* partial) {
  __shared__ Shared pool, weights;
  const Place at;
  const int64_t i0 = blockIdx.x % p.row_tiles() * kTile, part = blockIdx.x / p.row_tiles(), begin = part * split.span;
  for (int64_t j0 = begin; j0 < begin + split.span && j0 < p.columns(); j0 += kTile) {
    Pairs pairs;
    distances(p, i0, j0, 0, p.D, pool, pairs);
#pragma unroll
    for (int n = 0; n < 16; ++n) weights.v[at.column + n % 4][at.row + n / 4] = p.scale * pairs[n / 4][n % 4];
#pragma unroll 1  // of registers there are few here
    for (int c = 0; c < 4; ++c) {
      float* e = &weights.v[at.column + c][at.row];
      const int64_t i = i0 + at.row, j = j0 + at.column + c;
#pragma unroll
      for (int r = 0; r < 4; ++r) e[r] = p.counts(i + r, j) ? pull(e[r], i + r, j) : 0.f;
    }
    const T* y = p.y_row(j0 + at.fetch_row);
    for (int64_t d0 = 0; d0 < p.D; d0 += kTile) {
      float* tile = partial + tile_at(p, part, i0, d0) + at.row * kTile + at.column;
      Pairs x, out{};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int64_t i = i0 + at.row + r, d = d0 + at.column;
        load(p.x_row(i) + d, i < p.N ? p.D - d : 0, x[r]);
        if (j0 > begin) load(tile + r * kTile, 4, out[r]);
      }
      apply_tile(y, d0, p.D, weights, pool, x, out);
#pragma unroll
      for (int r = 0; r < 4; ++r) store(tile + r * kTile, 4, out[r]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(Problem<T> p, const float* partial, int64_t parts, T* grad) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, i = at / p.D, d = at % p.D;
  if (i >= p.N) return;
  float sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += partial[tile_at(p, part, i, d) + i % kTile * kTile + d % kTile];
  down(sum, grad[at]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) weights_kernel(Problem<T> p, Pull pull, const float* E, float* weights) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.N * p.columns()) return;
  const int64_t i = at / p.columns(), j = at % p.columns();
  weights[at] = p.counts(i, j) ? pull(E[at], i, j) : 0.f;
}

template <class T> __global__ void __launch_bounds__(kThreads, 2) apply_kernel(Problem<T> p, const float* S, T* grad) {
  __shared__ Shared pool, weights;
  const Place at;
  const int64_t i0 = blockIdx.x % p.row_tiles() * kTile, d0 = blockIdx.x / p.row_tiles() * kTile, d = d0 + at.column;
  Pairs x, out{};
#pragma unroll
  for (int r = 0; r < 4; ++r) load(p.x_row(i0 + at.row + r) + d, i0 + at.row + r < p.N ? p.D - d : 0, x[r]);
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
    if (i < p.N) store(grad + i * p.D + d, p.D - d, out[r]);
  }
}

template <class S> const S* as_const(S* p) { return p; }  // launch takes arguments of exactly the kernel's types

// Floats of scratch.
constexpr int64_t kMostParts = 16;
template <class T> int64_t workspace(const Problem<T>& p, bool split_k) {
  return split_k ? p.width_split().parts * p.N * p.columns() : p.column_split(kFill).parts * p.N * 2;
}
template <class T> int64_t workspace_bwd(const Problem<T>& p, bool split_k) {
  return 4 + (split_k ? p.N * p.columns() : tile_at(p, p.column_split(kMostParts).parts, 0, 0));
}

template <class T>
void forward(const Problem<T>& p, bool split_k, const float* weight, float* loss, float* lse, float* saved, float* scratch,
             cudaStream_t stream) {
  if (split_k) {
    const Split s = p.width_split();
    launch(split_kernel<T>, p.row_tiles() * p.column_tiles() * s.parts, kThreads, stream, p, s, scratch);
    launch(reduce_kernel<T>, p.N, kThreads, stream, p, as_const(scratch), s.parts, saved, lse);
  } else {
    const Split s = p.column_split(kFill);
    auto* states = reinterpret_cast<LogSumExp*>(scratch);
    launch(streaming_kernel<T>, p.row_tiles() * s.parts, kThreads, stream, p, s, states);
    launch(merge_kernel, ceil_div(p.N, kThreads), kThreads, stream, as_const(states), s.parts, p.N, lse);
  }
  const double count = static_cast<double>(p.terms()) * (p.per_row ? 1. : static_cast<double>(p.N));
  const float log_count = static_cast<float>(std::log(count));
  launch(loss_kernel, 1, kThreads, stream, as_const(lse), weight, p.N, log_count, p.per_row, loss);
}

template <class T>
void backward(const Problem<T>& p, bool split_k, const float* grad, const float* weight, const float* lse, const float* saved,
              T* grad_x, float* scratch, cudaStream_t stream) {
  float *log_z = scratch, *rest = scratch + 4;  // keeps the rest aligned
  launch(loss_kernel, 1, kThreads, stream, lse, weight, p.N, 0.f, false, log_z);
  const Pull pull{grad, lse, weight, log_z, p.N, p.scale, p.per_row};
  if (split_k) {
    launch(weights_kernel<T>, ceil_div(p.N * p.columns(), kThreads), kThreads, stream, p, pull, saved, rest);
    launch(apply_kernel<T>, p.row_tiles() * ceil_div(p.D, kTile), kThreads, stream, p, as_const(rest), grad_x);
  } else {
    const Split s = p.column_split(kMostParts);
    launch(streaming_bwd_kernel<T>, p.row_tiles() * s.parts, kThreads, stream, p, s, pull, rest);
    launch(sum_parts_kernel<T>, ceil_div(p.N * p.D, kThreads), kThreads, stream, p, as_const(rest), s.parts, grad_x);
  }
}

#ifndef IMBDIFF_EMULATE
template <class T>
Problem<T> problem(const Tensor& x, const Tensor& negatives, double scale, bool include_self, bool per_row) {
  return {rows<T>(x), rows<T>(negatives),        x.size(0),    negatives.size(0),
          x.size(1),  static_cast<float>(scale), include_self, per_row};
}
inline const float* given(const Tensor& weight) { return weight.numel() > 0 ? in(weight) : nullptr; }

std::tuple<Tensor, Tensor, Tensor> negative_distance(const Tensor& x, const Tensor& negatives, const Tensor& weight,
                                                     double scale, bool include_self, bool per_row,
                                                     bool split_k) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor loss, lse, saved;
  by_dtype(x, [&](auto element) {
    const auto p = problem<decltype(element)>(x, negatives, scale, include_self, per_row);
    loss = floats(x, {}), lse = floats(x, {p.N});
    saved = split_k && !p.empty() ? floats(x, {p.N, p.columns()}) : floats(x, {0});
    if (p.empty()) {
      loss = torch::stable::zero_(loss), lse = torch::stable::zero_(lse);
      return;
    }
    const Tensor scratch = floats(x, {workspace(p, split_k)});
    forward(p, split_k, given(weight), out(loss), out(lse), out(saved), out(scratch), current_stream(x));
  });
  return {loss, lse, saved};
}

Tensor negative_distance_bwd(const Tensor& grad, const Tensor& x, const Tensor& negatives, const Tensor& weight,
                             const Tensor& lse, const Tensor& saved, double scale, bool include_self, bool per_row,
                             bool split_k) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  by_dtype(x, [&](auto element) {
    using T = decltype(element);
    const auto p = problem<T>(x, negatives, scale, include_self, per_row);
    if (p.empty() || p.D == 0) {
      grad_x = torch::stable::zero_(grad_x);
      return;
    }
    const Tensor scratch = floats(x, {workspace_bwd(p, split_k)});
    backward(p, split_k, in(grad), given(weight), in(lse), in(saved), static_cast<T*>(grad_x.mutable_data_ptr()),
             out(scratch), current_stream(x));
  });
  return grad_x;
}
#endif

}  // namespace imbdiff::contrast

#ifndef IMBDIFF_EMULATE
STABLE_TORCH_LIBRARY_IMPL(imbdiff, CUDA, m) {
  m.impl("negative_distance_cuda", TORCH_BOX(&imbdiff::contrast::negative_distance));
  m.impl("negative_distance_bwd_cuda", TORCH_BOX(&imbdiff::contrast::negative_distance_bwd));
}
#endif
