// Runs CUDA kernels on the CPU, for tests: the CUDA threads of a block are threads of the CPU, blocks come one after another.
// Barriers and shuffles are real, so ThreadSanitizer sees a missing __syncthreads. `omitted` leaves out one of them, by its
// number in the source, to prove that.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __syncthreads() ((void)(__COUNTER__ == emulate::omitted || (emulate::block->wait(), true)))

namespace emulate {
struct Barrier {
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier); }
  void wait() { pthread_barrier_wait(&barrier); }
  pthread_barrier_t barrier;
};
struct Warp {
  Barrier barrier{32};
  double lanes[2][32];  // two sets in turn: nobody writes one that another lane may still read
};
struct Index { unsigned x; };
inline int omitted = -1;
inline Barrier* block;
inline thread_local Warp* warp;
inline thread_local int turn;
inline std::atomic<int> votes[3];
inline thread_local unsigned vote;
}  // namespace emulate

inline emulate::Index blockDim, gridDim;
inline thread_local emulate::Index threadIdx, blockIdx;

namespace emulate {
template <class V> const double* exchange(V value) {
  double* lanes = warp->lanes[turn ^= 1];
  lanes[threadIdx.x % 32] = static_cast<double>(value);
  warp->barrier.wait();
  return lanes;
}
}  // namespace emulate

template <class V> V __shfl_xor_sync(unsigned, V value, int mask) {
  return static_cast<V>(emulate::exchange(value)[threadIdx.x % 32 ^ mask]);
}
template <class V> V __shfl_sync(unsigned, V value, int lane) { return static_cast<V>(emulate::exchange(value)[lane]); }
template <class V> V __shfl_up_sync(unsigned, V value, unsigned by) {
  const double* lanes = emulate::exchange(value);
  return threadIdx.x % 32 < by ? value : static_cast<V>(lanes[threadIdx.x % 32 - by]);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const double* lanes = emulate::exchange(value);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(lanes[lane] != 0) << lane;
  return bits;
}
inline void atomicAdd(unsigned long long* to, unsigned long long value) {
  std::atomic_ref(*to).fetch_add(value, std::memory_order_relaxed);  // no barrier
}

// Three words in turn: what is cleared here was read before this barrier and is written after the next.
inline int __syncthreads_or(int value) {
  const int at = emulate::vote++ % 3;
  if (value) emulate::votes[at] = 1;
  emulate::block->wait();
  emulate::votes[(at + 2) % 3] = 0;
  return emulate::votes[at];
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return __builtin_clz(bits); }
inline float __fdividef(float a, float b) { return a / b; }

struct __nv_bfloat16 { uint16_t bits; };
struct __half { _Float16 value; };
inline float __half2float(__half h) { return h.value; }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }
inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t bits = uint32_t(b.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return {static_cast<uint16_t>(f != f ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

using cudaStream_t = void*;

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t, A... args) {
  emulate::Barrier all(threads);
  emulate::block = &all;
  blockDim.x = threads, gridDim.x = blocks;
  for (auto& vote : emulate::votes) vote = 0;
  const auto warps = std::make_unique<emulate::Warp[]>(threads / 32);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      threadIdx.x = t, emulate::warp = &warps[t / 32];
      for (int64_t b = 0; b < blocks; ++b) {
        blockIdx.x = b;
        kernel(args...);
        all.wait();
      }
    });
  for (std::thread& thread : pool) thread.join();
}
