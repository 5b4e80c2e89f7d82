// What the CUDA families share: element types, loads, states that are reduced over a block, the tile loop over pairs of rows.
// The path is exact float32: differences are formed before they are squared or weighed, so there is no Gram product that
// cancels and nothing to centre. No atomics; what is added to what depends on sizes alone. Row numbers are 64-bit.
// With IMBDIFF_EMULATE a plain C++ compiler builds the same source for the CPU (emulate.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef IMBDIFF_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#endif

namespace imbdiff {

constexpr int kThreads = 256, kWarps = kThreads / 32;
#ifndef IMBDIFF_FILL
#define IMBDIFF_FILL 528
#endif
constexpr int64_t kFill = IMBDIFF_FILL;  // blocks that fill a GPU: four for each of an H200's multiprocessors

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A row (or a set of them) cut into `parts` spans, a function of sizes only. Spans are multiples of `grain`.
struct Split {
  int64_t parts, span;
  static Split of(int64_t length, int64_t wanted, int64_t least, int64_t grain) {
    int64_t parts = ceil_div(length, least);
    parts = parts < wanted ? parts : wanted;
    const int64_t span = ceil_div(ceil_div(length, parts < 1 ? 1 : parts), grain) * grain;
    return {length > 0 ? ceil_div(length, span) : 1, span};
  }
};

// Of row operations: more blocks than fit at once, so that the last wave costs little. grain: what a block loads at once.
inline Split row_split(int64_t B, int64_t D, int64_t grain) { return Split::of(D, ceil_div(16 * kFill, B), 4096, grain); }

// f with `count` as a constant, one of least .. most.
template <int least, int most, class F> void by_count(int64_t count, const F& f) {
  if (count == least) return f(std::integral_constant<int, least>{});
  if constexpr (least < most) by_count<least + 1, most>(count, f);
}

template <class T> struct Rows {  // any distance between rows, dense in a row
  const T* data;
  int64_t stride;
  __device__ const T* row(int64_t i) const { return data + i * stride; }
};

__device__ inline float up(float v) { return v; }
__device__ inline float up(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float up(__half v) { return __half2float(v); }
__device__ inline void down(float v, float& to) { to = v; }
__device__ inline void down(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }
__device__ inline void down(float v, __half& to) { to = __float2half_rn(v); }

template <class T, int V> struct alignas(V * sizeof(T)) Pack { T v[V]; };
template <class T, int V> __device__ inline bool whole(const T* p, int64_t left) {
  return left >= V && reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T, V>) == 0;
}

// p[0..V) in float32, zero from `left` on; one load where the address allows it.
template <int V, class T> __device__ inline void load(const T* p, int64_t left, float (&out)[V]) {
  if (whole<T, V>(p, left)) {
    const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(p);
#pragma unroll
    for (int e = 0; e < V; ++e) out[e] = up(pack.v[e]);
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) out[e] = e < left ? up(p[e]) : 0.f;
  }
}

template <int V, class T> __device__ inline void store(T* p, int64_t left, const float (&in)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int e = 0; e < V; ++e) down(in[e], pack.v[e]);
  if (whole<T, V>(p, left)) {
    *reinterpret_cast<Pack<T, V>*>(p) = pack;
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e)
      if (e < left) p[e] = pack.v[e];
  }
}

// A row that is multiplied when it is read; none where there are no data. A plain pointer is a row, too.
template <class T> struct Scaled {
  const T* data;
  float factor;
};

// Columns d .. d + V of a row that ends at `end`.
template <int V, class T> __device__ inline void load_at(const T* row, int64_t d, int64_t end, float (&out)[V]) {
  load(row + d, row ? end - d : 0, out);
}
template <int V, class T> __device__ inline void load_at(const Scaled<T>& row, int64_t d, int64_t end, float (&out)[V]) {
  load_at(row.data, d, end, out);
#pragma unroll
  for (int e = 0; e < V; ++e) out[e] *= row.factor;
}

// States. A state can be merged with another and sent through a shuffle.
template <int N, class V = float> struct Sum {
  V v[N];
  __device__ void merge(const Sum& other) {
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] += other.v[n];
  }
  __device__ Sum shuffled(int mask) const {
    Sum other;
#pragma unroll
    for (int n = 0; n < N; ++n) other.v[n] = __shfl_xor_sync(~0u, v[n], mask);
    return other;
  }
};

struct LogSumExp {  // sum = sum of exp(value - top); a NaN is in the sum though the maximum ignores it
  float top, sum;
  __device__ static LogSumExp none() { return {-INFINITY, 0.f}; }
  __device__ static float shift(float top) { return top == -INFINITY ? 0.f : top; }
  template <int N> __device__ void add(const float (&values)[N]) {
    float higher = top;
#pragma unroll
    for (int n = 0; n < N; ++n) higher = fmaxf(higher, values[n]);
    const float s = shift(higher);
    sum *= expf(top - s);
#pragma unroll
    for (int n = 0; n < N; ++n) sum += expf(values[n] - s);
    top = higher;
  }
  __device__ void merge(const LogSumExp& other) {
    const float higher = fmaxf(top, other.top), s = shift(higher);
    sum = sum * expf(top - s) + other.sum * expf(other.top - s);
    top = higher;
  }
  __device__ LogSumExp shuffled(int mask) const {
    return {__shfl_xor_sync(~0u, top, mask), __shfl_xor_sync(~0u, sum, mask)};
  }
  __device__ float value() const { return shift(top) + logf(sum); }
};

// The state of all threads of the block, in every thread; once in a kernel.
template <class S> __device__ S block_reduce(S state, S* shared) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) state.merge(state.shuffled(mask));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = state;
  __syncthreads();
  state = shared[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) state.merge(shared[w]);
  return state;
}

// The tile loop. A block of 256 threads owns 64 x 64 pairs, a thread 4 x 4 of them; fetching, a thread owns a quarter of a row.
constexpr int kTile = 64, kDepth = 16, kPitch = kTile + 4;
struct alignas(16) Shared { float v[kTile][kPitch]; };
using Pairs = float[4][4];

struct Place {  // of this thread in a tile
  int thread = threadIdx.x;
  int row = thread / 16 * 4, column = thread % 16 * 4;
  int fetch_row = thread / 4, fetch_column = thread % 4 * 4;
};

__device__ inline Pack<float, 4> four(const float* p) { return *reinterpret_cast<const Pack<float, 4>*>(p); }

struct SquaredDifference {
  __device__ static float step(float a, float b, float sum) { return fmaf(a - b, a - b, sum); }
};

// pairs = Score over the columns [begin, end) of 64 rows and 64 others; a and b are the rows that this thread fetches, or none.
template <class Score, class Row>
__device__ inline void score_tile(const Row& a, const Row& b, int64_t begin, int64_t end, Shared& pool, Pairs& pairs) {
  const Place at;
  float next_a[4], next_b[4];
  const auto fetch = [&](int64_t d) {
    load_at(a, d + at.fetch_column, end, next_a);
    load_at(b, d + at.fetch_column, end, next_b);
  };
#pragma unroll
  for (int n = 0; n < 16; ++n) pairs[n / 4][n % 4] = 0.f;
  fetch(begin);
  int side = 0;  // one half of the pool is read while the other is written
  for (int64_t d = begin; d < end; d += kDepth, side ^= 1) {
    float(*A)[kPitch] = pool.v + side * 2 * kDepth, (*B)[kPitch] = A + kDepth;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      A[at.fetch_column + e][at.fetch_row] = next_a[e];
      B[at.fetch_column + e][at.fetch_row] = next_b[e];
    }
    __syncthreads();
    if (d + kDepth < end) fetch(d + kDepth);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const auto u = four(&A[k][at.row]), v = four(&B[k][at.column]);
#pragma unroll
      for (int n = 0; n < 16; ++n) pairs[n / 4][n % 4] = Score::step(u.v[n / 4], v.v[n % 4], pairs[n / 4][n % 4]);
    }
  }
  __syncthreads();
}

// out[i, d] += sum_j weights[j][i] (x[i, d] - y[j, d]), 64 columns from d on; y is the row that this thread fetches, or none.
template <class Row>
__device__ inline void apply_tile(const Row& y, int64_t d, int64_t D, const Shared& weights, Shared& pool, const Pairs& x,
                                  Pairs& out) {
  const Place at;
#pragma unroll
  for (int q = 0; q < kTile; q += 16) {
    float values[4];
    load_at(y, d + q + at.fetch_column, D, values);
    store(&pool.v[at.fetch_row][q + at.fetch_column], 4, values);
  }
  __syncthreads();
#pragma unroll 8
  for (int j = 0; j < kTile; ++j) {
    const auto w = four(&weights.v[j][at.row]), v = four(&pool.v[j][at.column]);
#pragma unroll
    for (int n = 0; n < 16; ++n)
      out[n / 4][n % 4] = fmaf(w.v[n / 4], x[n / 4][n % 4] - v.v[n % 4], out[n / 4][n % 4]);
  }
  __syncthreads();
}

#ifndef IMBDIFF_EMULATE
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream, A... args) {
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "imbdiff: ", blocks, " blocks are more than a grid holds");
  kernel<<<dim3(static_cast<unsigned>(blocks)), threads, 0, stream>>>(args...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "imbdiff: launch failed: ", cudaGetErrorString(error));
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
inline Tensor floats(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}
inline const float* in(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline float* out(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
template <class T> Rows<T> rows(const Tensor& t) { return {static_cast<const T*>(t.const_data_ptr()), t.stride(0)}; }

// f with a value of the rows' element type.
template <class F> void by_dtype(const Tensor& rows, const F& f) {
  switch (rows.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    case ScalarType::Half: return f(__half{});
    default: STD_TORCH_CHECK(false, "imbdiff: CUDA rows must be float32, bfloat16 or float16");
  }
}
#endif

}  // namespace imbdiff
