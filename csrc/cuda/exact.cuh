// Sums over the columns of two rows in double. Rounded to float32 a squared distance does not depend on the order of its sum, so
// ties are ties and a radius is equal to the distance that it was taken from.
#pragma once
#include "any_rows.cuh"

namespace imbdiff {

struct Cloud {  // rows [count, D]
  AnyRows rows;
  int64_t count;
};

constexpr int kSlab = 8;  // columns at a time
union alignas(32) Doubles {
  double slab[2][2][kSlab][kPitch];  // one half is read while the other is written
  double tile[kTile][kTile + 1];
};
using Sums = double[4][4];

struct Apart {  // |a_i - b_j|^2
  __device__ double operator()(int, double a, double b, double sum) const { return fma(a - b, a - b, sum); }
};

// pairs = sums of step(row of the thread's, a_id, b_jd, sum so far) over the columns [begin, end) of the tile at (i0, j0).
template <class Step>
__device__ inline void sum_tile(const Cloud& a, int64_t i0, const Cloud& b, int64_t j0, int64_t begin, int64_t end, Doubles& pool,
                                Sums& pairs, const Step& step) {
  const Place at;
  const int side = at.thread / 128, line = at.thread % 128 / 2, column = at.thread % 2 * 4;  // fetching
  const Cloud from = side ? b : a;
  const int64_t row = (side ? j0 : i0) + line;
  float next[4];
  const auto fetch = [&](int64_t d) { from.rows.load(row, d + column, row < from.count ? end - d - column : 0, next); };
#pragma unroll
  for (int n = 0; n < 16; ++n) pairs[n / 4][n % 4] = 0;
  fetch(begin);
  int half = 0;
  for (int64_t d = begin; d < end; d += kSlab, half ^= 1) {
    auto& slab = pool.slab[half];
#pragma unroll
    for (int e = 0; e < 4; ++e) slab[side][column + e][line] = next[e];
    __syncthreads();
    if (d + kSlab < end) fetch(d + kSlab);
#pragma unroll 1  // of registers there are few here
    for (int k = 0; k < kSlab; ++k) {
      const auto u = *reinterpret_cast<const Pack<double, 4>*>(&slab[0][k][at.row]);
      const auto v = *reinterpret_cast<const Pack<double, 4>*>(&slab[1][k][at.column]);
#pragma unroll
      for (int n = 0; n < 16; ++n) pairs[n / 4][n % 4] = step(n / 4, u.v[n / 4], v.v[n % 4], pairs[n / 4][n % 4]);
    }
  }
  __syncthreads();
}

#ifndef IMBDIFF_EMULATE
inline Cloud cloud(const Tensor& x) { return {{x.const_data_ptr(), x.stride(0), element(x)}, x.size(0)}; }
inline Tensor doubles(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Double);
}
inline double* out_double(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }
#endif

}  // namespace imbdiff
