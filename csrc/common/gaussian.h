// gaussian: divergences of diagonal Gaussians P = N(m, e^l), Q = N(n, e^k) as products of what P has and what Q has. No guard:
// included once per compiler and instruction set; V is a scalar (host, device) or a vector of the same arithmetic.
//
//     2 KL = sum_d [ (e^l + m^2) e^-k - 2m (n e^-k) ] + sum_d [ -l - 1 ] + sum_d [ k + n^2 e^-k ]
//     2 J  = sum_d [ (e^l + m^2) e^-k - 2m (n e^-k) + e^-l (e^k + n^2) - 2m e^-l n ]
//          + sum_d [ m^2 e^-l - 2 ] + sum_d [ n^2 e^-k ]
//
// With G the gradient of the matrix, G @ right and G^T @ left are all that its derivatives need.
#include "host_device.h"

constexpr int kKl = 0, kJeffreys = 1, kBhattacharyya = 2;
constexpr int operands(int kind) { return kind == kJeffreys ? 4 : 2; }

// What a Gaussian adds to its whole row or column, and the size of what cancels there.
template <class V> struct Own {
  V term, size;
};

template <class V> HOST_DEVICE V magnitude(V v) { return v < V{} ? -v : v; }

template <int kKind, class V, class Exp> HOST_DEVICE Own<V> left(V m, V l, V* a, const Exp& exp) {
  a[0] = exp(l) + m * m;
  a[1] = -2 * m;
  if constexpr (kKind == kKl) return {-1 - l, 1 + magnitude(l)};
  const V precision = exp(-l), square = m * m * precision;
  a[2] = precision;
  a[3] = -2 * m * precision;
  return {square - 2, 3 * square + 2};
}

template <int kKind, class V, class Exp> HOST_DEVICE Own<V> right(V n, V k, V* b, const Exp& exp) {
  const V precision = exp(-k), square = n * n * precision;
  b[0] = precision;
  b[1] = n * precision;
  if constexpr (kKind == kKl) return {k + square, 3 * square + magnitude(k)};
  b[2] = exp(k) + n * n;
  b[3] = n;
  return {square, 3 * square};
}

template <class V> struct Slope {
  V mean, logvar;
};

// From h = G @ right and mass = sum_j G_ij: of sum_ij G_ij D_ij for P_i, of variance e^l and precision e^-l (for Jeffreys).
template <int kKind, class V, class A> HOST_DEVICE Slope<V> left_slope(V m, V variance, V precision, const V* h, A mass) {
  if constexpr (kKind == kBhattacharyya) return {h[0] / 2, h[1] / 4};
  V of_m = m * h[0] - h[1], of_l = variance * h[0];
  if constexpr (kKind == kKl) return {of_m, (of_l - mass) / 2};
  const V pulled = m * mass - h[3];
  return {of_m + precision * pulled, (of_l - precision * (h[2] - m * h[3] + m * pulled)) / 2};
}

// From g = G^T @ left and mass = sum_i G_ij: the same for Q_j, of precision e^-k and variance e^k (for Jeffreys).
template <int kKind, class V, class A> HOST_DEVICE Slope<V> right_slope(V n, V variance, V precision, const V* g, A mass) {
  if constexpr (kKind == kBhattacharyya) return {g[0] / 2, g[1] / 4};
  const V of_n = precision * (g[1] / 2 + n * mass), of_k = -precision * (g[0] + n * (g[1] + n * mass));
  if constexpr (kKind == kKl) return {of_n, (of_k + mass) / 2};
  return {of_n + n * g[2] + g[3] / 2, (of_k + variance * g[2]) / 2};
}

// One dimension of a pair from its differences: d = m - n, x = l - k, growth = e^x - 1, back = e^-x - 1, with the precisions e^-l
// of P and e^-k of Q. Derivatives of KL or Jeffreys times the gradient, for P and for Q.
template <int kKind, class V>
HOST_DEVICE void pair_slopes(V d, V growth, V back, V of_l, V of_k, V gradient, Slope<V>& of_p, Slope<V>& of_q) {
  V pull = gradient * d * of_k, tilt = gradient * growth, square_p{}, square_q = pull * d;
  if constexpr (kKind == kJeffreys) square_p = gradient * d * d * of_l, pull += gradient * d * of_l, tilt -= gradient * back;
  of_p.mean += pull;
  of_q.mean -= pull;
  of_p.logvar += (tilt - square_p) / 2;
  of_q.logvar -= (tilt + square_q) / 2;
}

// One dimension of the Bhattacharyya distance: twice its derivative for the mean and four times that for the log-variance, of P
// and of Q; v = e^l, w = e^k, wider = v - w, d = m - n.
template <class V> HOST_DEVICE void bhattacharyya_slopes(V d, V v, V w, V wider, V gradient, Slope<V>& of_p, Slope<V>& of_q) {
  const V inverse = 1 / (v + w), t = d * inverse, pull = gradient * t, square = pull * t, tilt = gradient * wider * inverse;
  of_p.mean += pull;
  of_p.logvar += tilt - square * v;
  of_q.mean -= pull;
  of_q.logvar -= tilt + square * w;
}

// f(d) = max(0, margin - d) or 1 / (1 + d) and its derivative. NaN stays NaN.
template <class V> struct Push {
  V value, slope;
};
template <class V, class A> HOST_DEVICE Push<V> push(V d, A margin, bool hinge) {
  if (!hinge) {
    const V f = 1 / (1 + d);
    return {f, -f * f};
  }
  const V short_by = margin - d;
  return {short_by <= 0 ? V{} : short_by, short_by <= 0 ? V{} : V{} - 1};
}
