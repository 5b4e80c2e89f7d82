#include "neighbours.cu"

#include "driver.h"

namespace {
using namespace imbdiff;

Cloud cloud(int dtype, int64_t count, const void* rows, int64_t stride) {
  return {{rows, stride, static_cast<Element>(dtype)}, count};
}
}  // namespace

extern "C" {
int64_t neighbours_scratch(int64_t N, int k) { return neighbours::workspace(N, k); }

void neighbours_radius(int dtype, int64_t N, int64_t D, const void* x, int64_t stride, int k, int squared, float* radius,
                       double* scratch) {
  neighbours::radius(cloud(dtype, N, x, stride), D, k, squared != 0, radius, scratch, nullptr);
}

void neighbours_count(int dtype, int64_t N, int64_t M, int64_t D, const void* x, int64_t x_stride, const void* y, int64_t y_stride,
                      const float* squared_radii, unsigned long long* balls, unsigned long long* inhabitants) {
  neighbours::count(cloud(dtype, N, x, x_stride), cloud(dtype, M, y, y_stride), D, squared_radii, balls, inhabitants, nullptr);
}
}

#ifdef RACES
const Race neighbours_race([] {
  const int64_t N = 130, D = 24;  // an odd number of slabs; two tiles in a part
  auto data = numbers(N * D);
  std::vector<float> radii(N, 1.f);
  std::vector<double> scratch(neighbours_scratch(N, 3));
  std::vector<unsigned long long> balls(N), inhabitants(N);
  neighbours_radius(0, N, D, data.data(), D, 3, 1, radii.data(), scratch.data());
  neighbours_count(0, N, N, D, data.data(), D, data.data(), D, radii.data(), balls.data(), inhabitants.data());
});
#endif
