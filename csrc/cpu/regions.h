// Compiles IMBDIFF_FAMILY.inc once per instruction set, into imbdiff::<family>::generic, avx2, avx512 and, where the family
// asks for it by IMBDIFF_BF16_REGION, avx512_bf16. A family's .cpp writes `#define IMBDIFF_FAMILY <family>` and includes this.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <type_traits>

#include "isa.h"

#define IMBDIFF_QUOTED(text) #text
#define IMBDIFF_FILE(name) IMBDIFF_QUOTED(name.inc)

#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
// A macro, because g++ 12 does not redefine __AVX2__ and its like within a file.
#define IMBDIFF_BYTES 16
namespace imbdiff::IMBDIFF_FAMILY::generic {
#include IMBDIFF_FILE(IMBDIFF_FAMILY)
}
#undef IMBDIFF_BYTES
#pragma GCC target("avx2,fma,f16c")
#define IMBDIFF_BYTES 32
namespace imbdiff::IMBDIFF_FAMILY::avx2 {
#include IMBDIFF_FILE(IMBDIFF_FAMILY)
}
#undef IMBDIFF_BYTES
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#define IMBDIFF_BYTES 64
namespace imbdiff::IMBDIFF_FAMILY::avx512 {
#include IMBDIFF_FILE(IMBDIFF_FAMILY)
}
#ifdef IMBDIFF_BF16_REGION
#pragma GCC target("avx512bf16")
#define IMBDIFF_BF16
namespace imbdiff::IMBDIFF_FAMILY::avx512_bf16 {
#include IMBDIFF_FILE(IMBDIFF_FAMILY)
}
#endif
#pragma GCC pop_options

namespace imbdiff {
// f with a value of the tensor's element type.
template <class F> void by_dtype(const char* op, const torch::stable::Tensor& rows, const F& f) {
  switch (rows.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return f(float{});
    case torch::headeronly::ScalarType::Double: return f(double{});
    case torch::headeronly::ScalarType::BFloat16: return f(Brain{});
    case torch::headeronly::ScalarType::Half: return f(Half{});
    default: STD_TORCH_CHECK(false, op, ": rows must be float32, float64, bfloat16 or float16");
  }
}
}  // namespace imbdiff

// The copy of a function for this machine; the second form for element type In, of a family with a bf16 region.
#define IMBDIFF_BY_ISA(...) \
  (isa() == Isa::avx512 ? &avx512::__VA_ARGS__ : isa() == Isa::avx2 ? &avx2::__VA_ARGS__ : &generic::__VA_ARGS__)
#define IMBDIFF_BY_ISA_OF(In, f) \
  (std::is_same_v<In, Brain> && has_bf16_dot() ? &avx512_bf16::f<Brain> : IMBDIFF_BY_ISA(f<In>))
