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
#include <vector>

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

// Runs f(context, i) for i in 0..count-1 on torch's threads. Each begins with its share of them, then helps the others with theirs:
// so a core finds much of what it wrote in the call before in its own caches. Not all cores share one. `in_order`: one share for
// all, so that a task may wait for those before it, which others have begun.
inline void for_each_task(int64_t count, bool in_order, void (*f)(void*, int64_t), void* context) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads()), parts = in_order ? 1 : workers;
  std::vector<Share> shares(parts);
  for (int64_t p = 0; p < parts; ++p) shares[p].next = p * count / parts, shares[p].end = (p + 1) * count / parts;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t p = 0; p < parts; ++p) {
      Share& share = shares[(worker + p) % parts];
      for (int64_t i; (i = share.next.fetch_add(1)) < share.end;) f(context, i);
    }
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
