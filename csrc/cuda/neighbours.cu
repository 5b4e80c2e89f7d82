// neighbours on the GPU: distances in double and no screening, so the cost is the same whatever the data.
#include "exact.cuh"

namespace imbdiff::neighbours {

constexpr int kMost = 32;  // neighbours: a lane of a warp holds one

// list: the l-th smallest so far in lane l. Takes the candidates of all lanes that are among the k smallest; a NaN never is.
__device__ inline void take(double& list, double candidate, int k) {
  const int lane = threadIdx.x % 32;
  while (true) {
    const unsigned hits = __ballot_sync(~0u, candidate < __shfl_sync(~0u, list, k - 1));
    if (!hits) return;
    const int from = __ffs(hits) - 1;
    const double value = __shfl_sync(~0u, candidate, from), before = __shfl_up_sync(~0u, list, 1);
    if (value < list) list = lane > 0 && before > value ? before : value;
    if (lane == from) candidate = INFINITY;
  }
}

// partial [parts, N, k]: the k smallest squared distances of each row to others, in order. A warp keeps the lists of 8 rows.
__global__ void __launch_bounds__(kThreads, 2) nearest_kernel(Cloud x, int64_t D, int k, Split split, double* partial) {
  constexpr int kRows = kTile / kWarps;
  __shared__ Doubles pool;
  const Place at;
  const int64_t tiles = ceil_div(x.count, kTile), i0 = blockIdx.x % tiles * kTile, part = blockIdx.x / tiles;
  const int64_t begin = part * split.span, end = begin + split.span < x.count ? begin + split.span : x.count;
  const int lane = at.thread % 32, first = at.thread / 32 * kRows;
  double list[kRows];
#pragma unroll
  for (int n = 0; n < kRows; ++n) list[n] = INFINITY;
  for (int64_t j0 = begin; j0 < end; j0 += kTile) {
    Sums pairs;
    sum_tile(x, i0, x, j0, 0, D, pool, pairs, Apart{});
#pragma unroll
    for (int n = 0; n < 16; ++n) pool.tile[at.row + n / 4][at.column + n % 4] = pairs[n / 4][n % 4];
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kRows; ++n)
      for (int half = lane; half < kTile; half += 32) {
        const int64_t j = j0 + half;
        take(list[n], j < end && j != i0 + first + n ? pool.tile[first + n][half] : INFINITY, k);
      }
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
    const int64_t i = i0 + first + n;
    if (i < x.count && lane < k) partial[(part * x.count + i) * k + lane] = list[n];
  }
}

// A warp for each row.
__global__ void __launch_bounds__(kThreads) radius_kernel(const double* partial, int64_t parts, int64_t N, int k, bool squared,
                                                          float* radius) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (i >= N) return;
  double list = INFINITY;
  for (int64_t part = 0; part < parts; ++part) take(list, lane < k ? partial[(part * N + i) * k + lane] : INFINITY, k);
  // Distances of finite float32 rows are finite in double: an infinite one stands for NaN.
  if (lane == k - 1) radius[i] = static_cast<float>(list < INFINITY ? (squared ? list : sqrt(list)) : NAN);
}

// Whole numbers are added in whatever order.
__global__ void __launch_bounds__(kThreads, 2) count_kernel(Cloud points, Cloud centers, int64_t D, const float* squared_radii,
                                                            unsigned long long* balls, unsigned long long* inhabitants) {
  __shared__ Doubles pool;
  const Place at;
  const int64_t tiles = ceil_div(points.count, kTile);
  const int64_t i = blockIdx.x % tiles * kTile + at.row, j = blockIdx.x / tiles * kTile + at.column;
  Sums pairs;
  sum_tile(points, i - at.row, centers, j - at.column, 0, D, pool, pairs, Apart{});
  int of_row[4] = {}, of_column[4] = {};
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    const bool there = i + n / 4 < points.count && j + n % 4 < centers.count;
    const bool inside = there && static_cast<float>(pairs[n / 4][n % 4]) < squared_radii[j + n % 4];
    of_row[n / 4] += inside, of_column[n % 4] += inside;
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int mask = 8; mask > 0; mask /= 2) of_row[n] += __shfl_xor_sync(~0u, of_row[n], mask);
    of_column[n] += __shfl_xor_sync(~0u, of_column[n], 16);
    if (at.column == 0 && of_row[n]) atomicAdd(balls + i + n, static_cast<unsigned long long>(of_row[n]));
    if (at.thread % 32 < 16 && of_column[n]) atomicAdd(inhabitants + j + n, static_cast<unsigned long long>(of_column[n]));
  }
}

inline Split column_split(int64_t N) { return Split::of(N, ceil_div(kFill, ceil_div(N, kTile)), kTile, kTile); }
inline int64_t workspace(int64_t N, int k) { return N ? column_split(N).parts * N * k : 0; }  // doubles

inline void radius(const Cloud& x, int64_t D, int k, bool squared, float* to, double* scratch, cudaStream_t stream) {
  if (x.count == 0) return;
  const Split s = column_split(x.count);
  launch(nearest_kernel, ceil_div(x.count, kTile) * s.parts, kThreads, stream, x, D, k, s, scratch);
  launch(radius_kernel, ceil_div(x.count, kWarps), kThreads, stream, scratch, s.parts, x.count, k, squared, to);
}

// balls and inhabitants are zero.
inline void count(const Cloud& points, const Cloud& centers, int64_t D, const float* squared_radii, unsigned long long* balls,
                  unsigned long long* inhabitants, cudaStream_t stream) {
  const int64_t tiles = ceil_div(points.count, kTile) * ceil_div(centers.count, kTile);
  if (tiles) launch(count_kernel, tiles, kThreads, stream, points, centers, D, squared_radii, balls, inhabitants);
}

#ifndef IMBDIFF_EMULATE
Tensor knn_radius(const Tensor& x, int64_t k, bool squared) {
  STD_TORCH_CHECK(k <= kMost, "knn_radius: the CUDA kernels take k <= ", kMost, ", got ", k);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor to = floats(x, {x.size(0)}), scratch = doubles(x, {workspace(x.size(0), static_cast<int>(k))});
  radius(cloud(x), x.size(1), static_cast<int>(k), squared, out(to), out_double(scratch), current_stream(x));
  return to;
}

std::tuple<Tensor, Tensor> ball_count(const Tensor& points, const Tensor& centers, const Tensor& squared_radii) {
  const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
  const auto zeros = [](const Tensor& x) { return torch::stable::new_zeros(x, {x.size(0)}, ScalarType::Long); };
  const auto at = [](const Tensor& x) { return static_cast<unsigned long long*>(x.mutable_data_ptr()); };
  const Tensor balls = zeros(points), inhabitants = zeros(centers);
  count(cloud(points), cloud(centers), points.size(1), in(squared_radii), at(balls), at(inhabitants), current_stream(points));
  return {balls, inhabitants};
}
#endif

}  // namespace imbdiff::neighbours

#ifndef IMBDIFF_EMULATE
STABLE_TORCH_LIBRARY_IMPL(imbdiff, CUDA, m) {
  m.impl("knn_radius_cuda", TORCH_BOX(&imbdiff::neighbours::knn_radius));
  m.impl("ball_count_cuda", TORCH_BOX(&imbdiff::neighbours::ball_count));
}
#endif
