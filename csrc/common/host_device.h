// How a function is marked that host and device share. Macros alone, so a file that is included in a namespace may include it.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif
