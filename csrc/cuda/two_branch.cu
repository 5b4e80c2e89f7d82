// two_branch on the GPU: one pass forward, one pass backward, 16-byte loads, rows cut into parts when there are few of them.
#include "../common/two_branch.h"
#include "engine.cuh"

namespace imbdiff::two_branch {

constexpr int kMost = 4;  // others

template <class T> struct Inputs {
  Rows<T> own, target, others[kMost];
  int64_t B, D;
};
struct Small {
  const float *weight, *scales;
  float margin[kMost];  // 0 for a pull
};
struct Outputs { float *base, *terms, *distance; };
template <class T> struct Gradients { T *own, *others[kMost]; };

template <class T> Split split(int64_t B, int64_t D) { return row_split(B, D, kThreads * (16 / sizeof(T))); }
template <class T> int64_t workspace(int64_t B, int64_t D, int K) {
  const int64_t parts = B > 0 ? split<T>(B, D).parts : 1;
  return parts > 1 ? parts * (1 + K) * B : 0;
}

template <int K> __device__ void finish(const Sum<1 + K>& sums, int64_t i, int64_t B, int64_t D, Small small, Outputs out) {
  const int thread = threadIdx.x;  // k + 1
  if (thread > K) return;
  float sum = 0, margin = 0;  // chosen, not indexed: registers have no addresses
#pragma unroll
  for (int k = 0; k <= K; ++k) {
    sum = thread == k ? sums.v[k] : sum;
    if (k > 0) margin = thread == k ? small.margin[k - 1] : margin;
  }
  const float mean = sum / static_cast<float>(D);
  if (thread == 0) {
    out.base[i] = mean;
    return;
  }
  const int k = thread - 1;
  const int64_t at = k * B + i;
  out.distance[at] = mean;
  out.terms[at] = small.scales[3 * k + 2] * small.weight[at] * penalty(margin, mean);
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads) forward_kernel(Inputs<T> x, Split split, Small small, Outputs out, float* partial) {
  constexpr int V = 16 / sizeof(T);
  __shared__ Sum<1 + K> shared[kWarps];
  const int64_t i = blockIdx.x / split.parts, part = blockIdx.x % split.parts;
  const int64_t begin = part * split.span, end = begin + split.span < x.D ? begin + split.span : x.D;
  Sum<1 + K> sums{};
  for (int64_t d = begin + threadIdx.x * V; d < end; d += kThreads * V) {
    float own[V], other[1 + K][V];
    load(x.own.row(i) + d, end - d, own);
    load(x.target.row(i) + d, end - d, other[0]);
#pragma unroll
    for (int k = 0; k < K; ++k) load(x.others[k].row(i) + d, end - d, other[1 + k]);
#pragma unroll
    for (int k = 0; k <= K; ++k)
#pragma unroll
      for (int e = 0; e < V; ++e) sums.v[k] = SquaredDifference::step(own[e], other[k][e], sums.v[k]);
  }
  sums = block_reduce(sums, shared);
  if (split.parts == 1) {
    finish<K>(sums, i, x.B, x.D, small, out);
  } else if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k <= K; ++k) partial[(part * (1 + K) + k) * x.B + i] = sums.v[k];
  }
}

// A warp for each sample.
template <int K>
__global__ void __launch_bounds__(32) finish_kernel(const float* partial, int64_t parts, int64_t B, int64_t D, Small small,
                                                    Outputs out) {
  __shared__ Sum<1 + K> shared[1];
  const int64_t i = blockIdx.x;
  Sum<1 + K> sums{};
  for (int64_t part = threadIdx.x; part < parts; part += 32)
#pragma unroll
    for (int k = 0; k <= K; ++k) sums.v[k] += partial[(part * (1 + K) + k) * B + i];
  finish<K>(block_reduce(sums, shared), i, B, D, small, out);
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads) backward_kernel(Inputs<T> x, Split split, Small small, const float* grad_base,
                                                            const float* grad_terms, const float* distance,
                                                            Gradients<T> grads) {
  constexpr int V = 16 / sizeof(T);
  const int64_t i = blockIdx.x / split.parts, begin = blockIdx.x % split.parts * split.span;
  const int64_t end = begin + split.span < x.D ? begin + split.span : x.D;
  const float twice_mean = 2.f / static_cast<float>(x.D), base = grad_base[i] * twice_mean;
  float pull[1 + K], push[1 + K];  // one more than needed: no arrays of length 0
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t at = k * x.B + i;
    const float c = grad_terms[at] * small.weight[at] * slope(small.margin[k], distance[at]) * twice_mean;
    pull[k] = small.scales[3 * k] * c;
    push[k] = -small.scales[3 * k + 1] * c;
  }
  for (int64_t d = begin + threadIdx.x * V; d < end; d += kThreads * V) {
    float own[V], other[V], grad[V];
    load(x.own.row(i) + d, end - d, own);
    if (grads.own) {
      load(x.target.row(i) + d, end - d, other);
#pragma unroll
      for (int e = 0; e < V; ++e) grad[e] = base * (own[e] - other[e]);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!grads.own && !grads.others[k]) continue;
      load(x.others[k].row(i) + d, end - d, other);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float difference = own[e] - other[e];
        if (grads.own) grad[e] = fmaf(pull[k], difference, grad[e]);
        other[e] = push[k] * difference;
      }
      if (grads.others[k]) store(grads.others[k] + i * x.D + d, end - d, other);
    }
    if (grads.own) store(grads.own + i * x.D + d, end - d, grad);
  }
}

template <class T>
void forward(const Inputs<T>& x, int K, Small small, Outputs out, float* partial, cudaStream_t stream) {
  if (x.B == 0) return;
  const Split s = split<T>(x.B, x.D);
  by_count<0, kMost>(K, [&](auto count) {
    launch(forward_kernel<T, count()>, x.B * s.parts, kThreads, stream, x, s, small, out, partial);
    if (s.parts > 1) launch(finish_kernel<count()>, x.B, 32, stream, partial, s.parts, x.B, x.D, small, out);
  });
}

template <class T>
void backward(const Inputs<T>& x, int K, Small small, const float* grad_base, const float* grad_terms, const float* distance,
              const Gradients<T>& grads, cudaStream_t stream) {
  if (x.B == 0 || x.D == 0) return;
  const Split s = split<T>(x.B, x.D);
  by_count<0, kMost>(K, [&](auto count) {
    launch(backward_kernel<T, count()>, x.B * s.parts, kThreads, stream, x, s, small, grad_base, grad_terms, distance, grads);
  });
}

#ifndef IMBDIFF_EMULATE
template <class T> Inputs<T> inputs(const Tensor& own, const Tensor& target, const std::vector<Tensor>& others) {
  STD_TORCH_CHECK(others.size() <= kMost, "two_branch: the CUDA kernels take at most 4 others, got ", others.size());
  Inputs<T> x{rows<T>(own), rows<T>(target), {}, own.size(0), own.size(1)};
  for (size_t k = 0; k < others.size(); ++k) x.others[k] = rows<T>(others[k]);
  return x;
}

Small small(const Tensor& weight, const Tensor& scales, const std::vector<double>& margin) {
  Small s{in(weight), in(scales), {}};
  for (size_t k = 0; k < margin.size() && k < kMost; ++k) s.margin[k] = static_cast<float>(margin[k]);
  return s;
}

std::tuple<Tensor, Tensor, Tensor> two_branch(const Tensor& own, const Tensor& target, const std::vector<Tensor>& others,
                                              const Tensor& weight, const Tensor& scales, const std::vector<double>& margin) {
  const torch::stable::accelerator::DeviceGuard guard(own.get_device_index());
  const int64_t B = own.size(0), K = others.size();
  Tensor base = floats(own, {B}), terms = floats(own, {K, B}), distance = floats(own, {K, B});
  by_dtype(own, [&](auto element) {
    using T = decltype(element);
    const Tensor partial = floats(own, {workspace<T>(B, own.size(1), K)});
    forward<T>(inputs<T>(own, target, others), K, small(weight, scales, margin), {out(base), out(terms), out(distance)},
               out(partial), current_stream(own));
  });
  return {base, terms, distance};
}

std::tuple<Tensor, std::vector<Tensor>> two_branch_bwd(
    const Tensor& grad_base, const Tensor& grad_terms, const Tensor& own, const Tensor& target,
    const std::vector<Tensor>& others, const Tensor& weight, const Tensor& scales, const std::vector<double>& margin,
    const Tensor& distance, const std::vector<bool>& needs) {
  const torch::stable::accelerator::DeviceGuard guard(own.get_device_index());
  const int64_t B = own.size(0), D = own.size(1), K = others.size();
  const auto make = [&](bool need) {
    return need ? torch::stable::new_empty(own, {B, D}) : torch::stable::new_empty(own, {0});
  };
  Tensor grad_own = make(needs[0]);
  std::vector<Tensor> grads;
  bool any = needs[0];
  for (int64_t k = 0; k < K; ++k) {
    grads.push_back(make(needs[1 + k]));
    any = any || needs[1 + k];
  }
  if (!any) return {grad_own, grads};
  by_dtype(own, [&](auto element) {
    using T = decltype(element);
    const auto to = [](const Tensor& t, bool need) { return need ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; };
    const Inputs<T> x = inputs<T>(own, target, others);
    Gradients<T> g{to(grad_own, needs[0]), {}};
    for (int64_t k = 0; k < K; ++k) g.others[k] = to(grads[k], needs[1 + k]);
    backward<T>(x, K, small(weight, scales, margin), in(grad_base), in(grad_terms), in(distance), g,
                current_stream(own));
  });
  return {grad_own, grads};
}
#endif

}  // namespace imbdiff::two_branch

#ifndef IMBDIFF_EMULATE
STABLE_TORCH_LIBRARY_IMPL(imbdiff, CUDA, m) {
  m.impl("two_branch_cuda", TORCH_BOX(&imbdiff::two_branch::two_branch));
  m.impl("two_branch_bwd_cuda", TORCH_BOX(&imbdiff::two_branch::two_branch_bwd));
}
#endif
