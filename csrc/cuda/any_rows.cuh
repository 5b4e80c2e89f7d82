// Rows whose element type is known at run time only. Where arithmetic outweighs loads by far, a switch at each load costs nothing
// and saves a kernel for each type.
#pragma once
#include "engine.cuh"

namespace imbdiff {

enum class Element : int { kFloat, kBfloat16, kHalf };

template <class F> __host__ __device__ inline void by_element(Element type, const F& f) {
  if (type == Element::kFloat) f(float{});
  else if (type == Element::kBfloat16) f(__nv_bfloat16{});
  else f(__half{});
}

struct AnyRows {
  const void* data;
  int64_t stride;
  Element type;
  // Columns d, d + 1, .. of row i; zeros from `left` on.
  template <int V> __device__ void load(int64_t i, int64_t d, int64_t left, float (&out)[V]) const {
    by_element(type, [&](auto element) {
      imbdiff::load(static_cast<const decltype(element)*>(data) + i * stride + d, left, out);
    });
  }
};

template <int V> __device__ inline void store(Element type, void* to, int64_t at, int64_t left, const float (&in)[V]) {
  by_element(type, [&](auto element) { store(static_cast<decltype(element)*>(to) + at, left, in); });
}

#ifndef IMBDIFF_EMULATE
inline Element element(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Element::kFloat;
    case ScalarType::BFloat16: return Element::kBfloat16;
    case ScalarType::Half: return Element::kHalf;
    default: STD_TORCH_CHECK(false, "imbdiff: CUDA rows must be float32, bfloat16 or float16");
  }
}
#endif

}  // namespace imbdiff
