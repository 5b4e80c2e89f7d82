// Which instruction set to run, and what code compiled for several of them may share: plain structs and non-template functions.
// Templates of std:: or torch:: inside a target region would be dangerous: the linker could keep their AVX-512 copy for everybody.
#pragma once

#include <immintrin.h>
#include <sched.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <utility>

namespace imbdiff {

enum class Isa { generic, avx2, avx512 };

// What the machine has, lowered on request by the variable that lowers torch's own kernels.
inline Isa isa() {
  static const Isa found = [] {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view cap = wish ? wish : "";
    return cap == "default" || !avx2 ? Isa::generic : cap == "avx2" || !avx512 ? Isa::avx2 : Isa::avx512;
  }();
  return found;
}

inline bool has_bf16_dot() { return isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16"); }

// Runs f(context, i) for i in 0..count-1 on torch's threads. Tasks start in order; whoever is free takes the next.
inline void for_each_task(int64_t count, void (*f)(void*, int64_t), void* context) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(count, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) f(context, i);
  });
}

struct Scratch {
  explicit Scratch(int64_t bytes) : data(std::aligned_alloc(64, (bytes / 64 + 1) * 64)) {
    STD_TORCH_CHECK(data != nullptr, "imbdiff: no memory for ", bytes, " bytes of scratch");
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data); }
  void* data;
};

struct Half { uint16_t bits; };   // float16
struct Brain { uint16_t bits; };  // bfloat16

}  // namespace imbdiff
