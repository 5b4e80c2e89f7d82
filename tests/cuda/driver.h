// What the drivers of the families share: each builds a family's CUDA kernels for the CPU (emulate.h) behind a C interface
// for ctypes. With RACES the drivers are the parts of one program for ThreadSanitizer, see races.cpp.
#pragma once

#include "engine.cuh"

#include <vector>

template <class F> void typed(int dtype, const F& f) {
  dtype == 0 ? f(float{}) : dtype == 1 ? f(__nv_bfloat16{}) : f(__half{});
}

#ifdef RACES
inline std::vector<void (*)()> races;  // of each driver in turn: runs every kernel of its family
struct Race {
  explicit Race(void (*run)()) { races.push_back(run); }
};

inline std::vector<float> numbers(size_t count) {  // from 0 to 1, all kinds of them
  std::vector<float> data(count);
  for (size_t n = 0; n < count; ++n) data[n] = static_cast<float>(n * 7919 % 1000) / 1000;
  return data;
}
#endif
