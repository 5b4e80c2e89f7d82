// product: a position's share of each factor and what comes of it. No guard: included once per compiler and instruction set;
// V is a scalar (host, device) or a vector of the same arithmetic.
#include "host_device.h"

// With lam_k = exp(log_lam_k) and the greatest of them e^top: part_k = lam_k e^-top, apart_k = m_k - mean. Precisions stay in
// logarithms and means relative to that of the most precise factor, which the mean is next to: nothing overflows, and neither a
// common offset nor a factor of little weight far away costs a digit of the differences that count.
template <class V> struct Mixture {
  V top, sum, mean;  // sum of the parts
};

// UNROLL is the includer's. Fills part; apart comes in as m_k and leaves as m_k - mean. Two factors need one exponential.
template <int kCount, class V, class Exp>
HOST_DEVICE Mixture<V> mix(const V* log_lam, V* part, V* apart, int64_t count, const Exp& exp) {
  if constexpr (kCount > 0) count = kCount;
  V top = log_lam[0], base = apart[0], sum{}, shift{};
  if constexpr (kCount == 2) {
    const V ahead = log_lam[1] - log_lam[0], less = exp(ahead > 0 ? -ahead : ahead);
    top = ahead > 0 ? log_lam[1] : top;
    base = ahead > 0 ? apart[1] : base;
    part[0] = ahead > 0 ? less : V{} + 1;
    part[1] = ahead > 0 ? V{} + 1 : less;
  } else {
    UNROLL for (int64_t k = 1; k < count; ++k) {
      base = log_lam[k] > top ? apart[k] : base;
      top = log_lam[k] > top ? log_lam[k] : top;
    }
    UNROLL for (int64_t k = 0; k < count; ++k) part[k] = exp(log_lam[k] - top);
  }
  UNROLL for (int64_t k = 0; k < count; ++k) apart[k] -= base, sum += part[k], shift += part[k] * apart[k];
  shift /= sum;
  UNROLL for (int64_t k = 0; k < count; ++k) apart[k] -= shift;
  return {top, sum, base + shift};
}

// lam_k apart_k^n for n = 1 and 2, root = e^(top/2). The part comes between its factors, so that they do not overflow before it.
template <class V> HOST_DEVICE V pulled(V root, V part, V apart) { return (root * part) * (root * apart); }
template <class V> HOST_DEVICE V squared(V root, V part, V apart) { return (root * apart * part) * (root * apart); }
