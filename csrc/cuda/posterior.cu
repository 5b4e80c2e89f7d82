// posterior on the GPU: which row of a bank produced x_t. Logits in double, so that a draw is the float64 reference's also where
// two rows of the bank are nearly alike and little noise tells them apart.
#include "exact.cuh"

namespace imbdiff::posterior {

constexpr int64_t kAtOnce = 256;  // rows of x: their logits take 2 KB a row of the bank

enum Gate { full, t2h, h2t };

struct Draw {
  Cloud x, bank;
  int64_t D;
  const float *signal, *sigma, *log_prior;  // log_prior, of the bank's rows: null for a uniform one
  const double* u;
  const int64_t* own;
  const double *counts_x, *counts_bank;
  int gate;
};

// sums [parts, count, N]: s x_i . b_j - s^2 |b_j|^2 / 2 over s, of `count` rows of x from `first` on.
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(Draw p, int64_t first, int64_t count, Split split, double* sums) {
  __shared__ Doubles pool;
  const Place at;
  const int64_t down = ceil_div(count, kTile), across = ceil_div(p.bank.count, kTile), part = blockIdx.x / (down * across);
  const int64_t i = blockIdx.x % down * kTile + at.row, j = blockIdx.x / down % across * kTile + at.column;
  const int64_t begin = part * split.span, end = begin + split.span < p.D ? begin + split.span : p.D;
  double half[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) half[n] = i + n < count ? p.signal[first + i + n] / 2. : 0.;
  Sums pairs;
  sum_tile(p.x, first + i - at.row, p.bank, j - at.column, begin, end, pool, pairs,
           [&](int n, double x, double b, double sum) { return fma(b, fma(-half[n], b, x), sum); });
#pragma unroll
  for (int n = 0; n < 16; ++n)
    if (i + n / 4 < count && j + n % 4 < p.bank.count)
      sums[(part * count + i + n / 4) * p.bank.count + j + n % 4] = pairs[n / 4][n % 4];
}

struct Largest {
  double value;
  __device__ void merge(const Largest& other) { value = fmax(value, other.value); }
  __device__ Largest shuffled(int mask) const { return {__shfl_xor_sync(~0u, value, mask)}; }
};

// A block for each row of x, a warp for each stretch of the bank. The first row of the bank up to which the weights are more than u
// of all; the last row where they are not numbers.
__global__ void __launch_bounds__(kThreads) draw_kernel(Draw p, int64_t first, int64_t parts, double* sums, int64_t* drawn) {
  __shared__ Largest tops[kWarps];
  __shared__ double stretches[kWarps];
  const int64_t N = p.bank.count, count = gridDim.x, i = first + blockIdx.x, span = ceil_div(N, kThreads) * 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t begin = warp * span, end = begin + span < N ? begin + span : N;
  double* const logits = sums + blockIdx.x * N;  // over the first part, each lane its own
  const double sigma = p.sigma[i], rate = p.signal[i] / (sigma * sigma);
  Largest top{-INFINITY};
  for (int64_t j = begin + lane; j < end; j += 32) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += logits[part * count * N + j];
    logits[j] = rate * sum + (p.log_prior ? p.log_prior[j] : 0.f);
    top.merge({logits[j]});
  }
  top = block_reduce(top, tops);
  const auto weight = [&](int64_t j) { return j < end ? exp(logits[j] - top.value) : 0.; };
  Sum<1, double> sum{};
  for (int64_t j = begin + lane; j < end; j += 32) sum.v[0] += weight(j);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum.merge(sum.shuffled(mask));
  if (lane == 0) stretches[warp] = sum.v[0];
  __syncthreads();
  double all = 0, before = 0;
  for (const double stretch : stretches) all += stretch;
  const double target = p.u[i] * all;
  int where = 0;
  while (where < kWarps - 1 && !(before + stretches[where] > target)) before += stretches[where++];
  if (warp != where) return;
  int64_t found = N - 1;
  for (int64_t j0 = begin; j0 < end; j0 += 32) {
    const double own = weight(j0 + lane);
    double upto = own;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const double earlier = __shfl_up_sync(~0u, upto, by);
      if (lane >= by) upto += earlier;
    }
    // The stretch's sum is rounded otherwise than these: if no row takes it beyond the target, the last one with a weight does.
    const bool counts = own > 0 && target >= 0;
    const unsigned some = __ballot_sync(~0u, counts), beyond = __ballot_sync(~0u, counts && before + upto > target);
    if (some) found = j0 + 31 - __clz(some);
    if (beyond) {
      found = j0 + __ffs(beyond) - 1;
      break;
    }
    before += __shfl_sync(~0u, upto, 31);
  }
  if (lane > 0) return;
  const auto passes = [&](double theirs, double mine) { return p.gate == t2h ? theirs >= mine : theirs <= mine; };
  drawn[i] = p.gate == full || passes(p.counts_bank[found], p.counts_x[i]) ? found : p.own[i];
}

inline int64_t tiles(int64_t count, int64_t N) { return ceil_div(count, kTile) * ceil_div(N, kTile); }
inline int64_t at_once(int64_t B) { return B < kAtOnce ? B : kAtOnce; }
// The same for all rows of x: what is added to what does not depend on which are drawn together.
inline Split width_split(int64_t B, int64_t N, int64_t D) {
  const int64_t count = tiles(at_once(B), N);
  return Split::of(D, count ? ceil_div(kFill, count) : 1, kTile, kSlab);
}
inline int64_t workspace(int64_t B, int64_t N, int64_t D) { return width_split(B, N, D).parts * at_once(B) * N; }  // doubles

inline void draw(const Draw& p, int64_t* drawn, double* scratch, cudaStream_t stream) {
  const int64_t B = p.x.count, N = p.bank.count;
  const Split s = width_split(B, N, p.D);
  for (int64_t first = 0; first < B; first += kAtOnce) {
    const int64_t count = at_once(B - first);
    launch(sums_kernel, tiles(count, N) * s.parts, kThreads, stream, p, first, count, s, scratch);
    launch(draw_kernel, count, kThreads, stream, p, first, s.parts, scratch, drawn);
  }
}

#ifndef IMBDIFF_EMULATE
Tensor posterior_draw(const Tensor& x, const Tensor& bank, const Tensor& signal, const Tensor& sigma, const Tensor& u,
                      const Tensor& own, const Tensor& counts_x, const Tensor& counts_bank, const Tensor& log_prior, int64_t gate) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto numbers = [](const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); };
  const Tensor drawn = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Long);
  const Tensor scratch = doubles(x, {workspace(x.size(0), bank.size(0), x.size(1))});
  const Draw p{cloud(x), cloud(bank), x.size(1), in(signal), in(sigma), log_prior.numel() ? in(log_prior) : nullptr, numbers(u),
               static_cast<const int64_t*>(own.const_data_ptr()), numbers(counts_x), numbers(counts_bank), static_cast<int>(gate)};
  draw(p, static_cast<int64_t*>(drawn.mutable_data_ptr()), out_double(scratch), current_stream(x));
  return drawn;
}
#endif

}  // namespace imbdiff::posterior

#ifndef IMBDIFF_EMULATE
STABLE_TORCH_LIBRARY_IMPL(imbdiff, CUDA, m) { m.impl("posterior_draw_cuda", TORCH_BOX(&imbdiff::posterior::posterior_draw)); }
#endif
