// product on the GPU: one pass forward, one pass backward, rows cut into parts when there are few of them.
#include "engine.cuh"

#define UNROLL _Pragma("unroll")

namespace imbdiff::product {
#include "../common/product.h"

constexpr int kMost = 4, kVector = 4;  // factors; elements that a thread loads at once

template <class T> struct Inputs {
  Rows<T> means[kMost], logvars[kMost];
  Rows<float> shared[kMost];  // where a log-variance is one number a row; its logvars are null
  const float* exponents;     // [K, B]
  int64_t B, D;
};
struct Outputs { float *log_precision, *log_normalizer; };
// Null where not needed.
struct Numbers { float* of[kMost]; };
template <class T> struct Gradients {
  T *means[kMost], *logvars[kMost];
  Numbers shared;
};
template <class T> struct Upstream { const T* mean; const float *log_precision, *log_normalizer; };

struct Exp {
  HOST_DEVICE float operator()(float v) const { return expf(v); }
};

inline Split split(int64_t B, int64_t D) { return row_split(B, D, kThreads * kVector); }
inline int64_t workspace(int64_t B, int64_t D, int64_t sums) {
  const int64_t parts = B > 0 ? split(B, D).parts : 1;
  return parts > 1 ? parts * sums * B : 0;
}

// A row's part, and where this block stands in it.
struct Part {
  __device__ Part(const Split& split, int64_t D)
      : i(blockIdx.x / split.parts), part(blockIdx.x % split.parts), begin(part * split.span),
        end(begin + split.span < D ? begin + split.span : D) {}
  int64_t i, part, begin, end;
};

// All factors of a row: a thread's elements of them, then position by position what the mixture is made of.
template <class T, int K> struct Factors {
  float exponent[K], log_exponent[K], m[K][kVector], l[K][kVector], log_lam[K], part[K], apart[K];
  __device__ Factors(const Inputs<T>& x, int64_t i) {
#pragma unroll
    for (int k = 0; k < K; ++k) exponent[k] = x.exponents[k * x.B + i], log_exponent[k] = logf(exponent[k]);
  }
  __device__ void load_at(const Inputs<T>& x, int64_t i, int64_t d, int64_t end) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      load(x.means[k].row(i) + d, end - d, m[k]);
      if (x.logvars[k].data) {
        load(x.logvars[k].row(i) + d, end - d, l[k]);
      } else {
#pragma unroll
        for (int e = 0; e < kVector; ++e) l[k][e] = *x.shared[k].row(i);
      }
    }
  }
  __device__ Mixture<float> mix_at(int e) {
#pragma unroll
    for (int k = 0; k < K; ++k) log_lam[k] = log_exponent[k] - l[k][e], apart[k] = m[k][e];
    return mix<K>(log_lam, part, apart, K, Exp{});
  }
};

// ln Z from sum_d [ sum_k a_k l_k + ln Lam + sum_k lam_k (m_k - mean)^2 ].
__device__ inline float normalizer(const float* exponents, int64_t K, int64_t B, int64_t D, int64_t i, float sum) {
  constexpr float log_two_pi = 1.8378770664093454836f;
  float total = -1;
  for (int64_t k = 0; k < K; ++k) total += exponents[k * B + i];
  return -(total * (static_cast<float>(D) * log_two_pi) + sum) / 2;
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads) forward_kernel(Inputs<T> x, Split split, T* mean, Outputs out, float* partial) {
  __shared__ Sum<1> shared[kWarps];
  const Part at(split, x.D);
  Factors<T, K> f(x, at.i);
  Sum<1> sum{};
  for (int64_t d = at.begin + threadIdx.x * kVector; d < at.end; d += kThreads * kVector) {
    f.load_at(x, at.i, d, at.end);
    float means[kVector], logs[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const Mixture<float> mixture = f.mix_at(e);
      const float root = expf(mixture.top / 2);
      means[e] = mixture.mean;
      logs[e] = mixture.top + logf(mixture.sum);
      float term = logs[e];
#pragma unroll
      for (int k = 0; k < K; ++k) term += f.exponent[k] * f.l[k][e] + squared(root, f.part[k], f.apart[k]);
      if (d + e < at.end) sum.v[0] += term;
    }
    store(mean + at.i * x.D + d, at.end - d, means);
    store(out.log_precision + at.i * x.D + d, at.end - d, logs);
  }
  sum = block_reduce(sum, shared);
  if (threadIdx.x != 0) return;
  if (split.parts == 1) out.log_normalizer[at.i] = normalizer(x.exponents, K, x.B, x.D, at.i, sum.v[0]);
  else partial[at.part * x.B + at.i] = sum.v[0];
}

__global__ void __launch_bounds__(kThreads) normalizer_kernel(const float* partial, int64_t parts, const float* exponents,
                                                              int64_t K, int64_t B, int64_t D, float* log_normalizer) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= B) return;
  float sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += partial[part * B + i];
  log_normalizer[i] = normalizer(exponents, K, B, D, i, sum);
}

// With u, v, c the gradients of mean, ln Lam and ln Z, and w_k = lam_k / Lam:
//     grad m_k = w_k u - c lam_k (m_k - mean)
//     grad l_k = -w_k ((m_k - mean) u + v) + c/2 [ w_k - a_k + lam_k (m_k - mean)^2 ]
template <class T, int K>
__global__ void __launch_bounds__(kThreads) backward_kernel(Inputs<T> x, Split split, Upstream<T> upstream, Gradients<T> grads,
                                                            float* partial) {
  __shared__ Sum<K> shared[kWarps];
  const Part at(split, x.D);
  const float c = upstream.log_normalizer[at.i];
  Factors<T, K> f(x, at.i);
  Sum<K> sums{};
  for (int64_t d = at.begin + threadIdx.x * kVector; d < at.end; d += kThreads * kVector) {
    const int64_t place = at.i * x.D + d, left = at.end - d;
    float u[kVector], v[kVector];
    f.load_at(x, at.i, d, at.end);
    load(upstream.mean + place, left, u);
    load(upstream.log_precision + place, left, v);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const Mixture<float> mixture = f.mix_at(e);
      // Without a gradient for ln Z the quadratic term is not needed, and if it overflows that must not show.
      const float root = c == 0 ? 0.f : expf(mixture.top / 2), whole = 1 / mixture.sum;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const float w = f.part[k] * whole;
        f.m[k][e] = w * u[e] - c * pulled(root, f.part[k], f.apart[k]);
        f.l[k][e] = c / 2 * (w - f.exponent[k] + squared(root, f.part[k], f.apart[k])) - w * (f.apart[k] * u[e] + v[e]);
        if (d + e < at.end) sums.v[k] += f.l[k][e];
      }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (grads.means[k]) store(grads.means[k] + place, left, f.m[k]);
      if (grads.logvars[k]) store(grads.logvars[k] + place, left, f.l[k]);
    }
  }
  sums = block_reduce(sums, shared);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!grads.shared.of[k]) continue;
    if (split.parts == 1) grads.shared.of[k][at.i] = sums.v[k];
    else partial[(at.part * K + k) * x.B + at.i] = sums.v[k];
  }
}

__global__ void __launch_bounds__(kThreads) shared_kernel(const float* partial, int64_t parts, int64_t K, int64_t B, Numbers to) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= B) return;
#pragma unroll
  for (int k = 0; k < kMost; ++k) {
    if (!to.of[k]) continue;
    float sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += partial[(part * K + k) * B + i];
    to.of[k][i] = sum;
  }
}

template <class T>
void forward(const Inputs<T>& x, int64_t K, T* mean, Outputs out, float* partial, cudaStream_t stream) {
  if (x.B == 0) return;
  const Split s = split(x.B, x.D);
  by_count<1, kMost>(K, [&](auto count) {
    launch(forward_kernel<T, count()>, x.B * s.parts, kThreads, stream, x, s, mean, out, partial);
    if (s.parts > 1)
      launch(normalizer_kernel, ceil_div(x.B, kThreads), kThreads, stream, partial, s.parts, x.exponents, K, x.B, x.D,
             out.log_normalizer);
  });
}

template <class T>
void backward(const Inputs<T>& x, int64_t K, const Upstream<T>& upstream, const Gradients<T>& grads, float* partial,
              cudaStream_t stream) {
  if (x.B == 0) return;
  const Split s = split(x.B, x.D);
  by_count<1, kMost>(K, [&](auto count) {
    launch(backward_kernel<T, count()>, x.B * s.parts, kThreads, stream, x, s, upstream, grads, partial);
    if (s.parts > 1)
      launch(shared_kernel, ceil_div(x.B, kThreads), kThreads, stream, partial, s.parts, K, x.B, grads.shared);
  });
}

#ifndef IMBDIFF_EMULATE
// One number a row: in float32, as the public function gives it.
bool is_shared(const Tensor& logvar) { return logvar.size(1) == 1; }

template <class T>
Inputs<T> inputs(const std::vector<Tensor>& means, const std::vector<Tensor>& logvars, const Tensor& exponents) {
  STD_TORCH_CHECK(means.size() <= kMost, "product_of_gaussians: the CUDA kernels take at most 4 factors, got ", means.size());
  Inputs<T> x{{}, {}, {}, in(exponents), means[0].size(0), means[0].size(1)};
  for (size_t k = 0; k < means.size(); ++k) {
    x.means[k] = rows<T>(means[k]);
    if (is_shared(logvars[k])) {
      STD_TORCH_CHECK(logvars[k].scalar_type() == ScalarType::Float, "product_of_gaussians: logvars [B, 1] must be float32");
      x.shared[k] = rows<float>(logvars[k]);
    } else {
      x.logvars[k] = rows<T>(logvars[k]);
    }
  }
  return x;
}

std::tuple<Tensor, Tensor, Tensor> product_of_gaussians(const std::vector<Tensor>& means, const std::vector<Tensor>& logvars,
                                                        const Tensor& exponents) {
  const Tensor& first = means[0];
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  const int64_t B = first.size(0), D = first.size(1);
  Tensor mean = torch::stable::new_empty(first, {B, D}), log_precision = floats(first, {B, D});
  Tensor log_normalizer = floats(first, {B}), partial = floats(first, {workspace(B, D, 1)});
  by_dtype(first, [&](auto element) {
    using T = decltype(element);
    forward<T>(inputs<T>(means, logvars, exponents), means.size(), static_cast<T*>(mean.mutable_data_ptr()),
               {out(log_precision), out(log_normalizer)}, out(partial), current_stream(first));
  });
  return {mean, log_precision, log_normalizer};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> product_of_gaussians_bwd(
    const Tensor& grad_mean, const Tensor& grad_log_precision, const Tensor& grad_log_normalizer,
    const std::vector<Tensor>& means, const std::vector<Tensor>& logvars, const Tensor& exponents,
    const std::vector<bool>& needs) {
  const Tensor& first = means[0];
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  const int64_t K = means.size();
  const auto make = [](const Tensor& x, bool need) {
    return need ? torch::stable::new_empty(x, {x.size(0), x.size(1)}) : torch::stable::new_empty(x, {0});
  };
  std::vector<Tensor> of_means, of_logvars;
  for (int64_t k = 0; k < K; ++k) {
    of_means.push_back(make(means[k], needs[k]));
    of_logvars.push_back(make(logvars[k], needs[K + k]));
  }
  const Tensor partial = floats(first, {workspace(first.size(0), first.size(1), K)});
  by_dtype(first, [&](auto element) {
    using T = decltype(element);
    Gradients<T> grads{};
    for (int64_t k = 0; k < K; ++k) {
      if (needs[k]) grads.means[k] = static_cast<T*>(of_means[k].mutable_data_ptr());
      if (needs[K + k] && is_shared(logvars[k])) grads.shared.of[k] = out(of_logvars[k]);
      else if (needs[K + k]) grads.logvars[k] = static_cast<T*>(of_logvars[k].mutable_data_ptr());
    }
    backward<T>(inputs<T>(means, logvars, exponents), K,
                {static_cast<const T*>(grad_mean.const_data_ptr()), in(grad_log_precision), in(grad_log_normalizer)}, grads,
                out(partial), current_stream(first));
  });
  return {of_means, of_logvars};
}
#endif

}  // namespace imbdiff::product

#undef UNROLL

#ifndef IMBDIFF_EMULATE
STABLE_TORCH_LIBRARY_IMPL(imbdiff, CUDA, m) {
  m.impl("product_of_gaussians_cuda", TORCH_BOX(&imbdiff::product::product_of_gaussians));
  m.impl("product_of_gaussians_bwd_cuda", TORCH_BOX(&imbdiff::product::product_of_gaussians_bwd));
}
#endif
