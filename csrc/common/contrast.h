// contrast: E_ij = scale |x_i - y_j|^2, scores of the losses and the weights of their gradients. No guard: included
// once per compiler and instruction set; V is a scalar (host, device) or a vector of the same arithmetic.
#include "host_device.h"

// From scaled squared norms and the scaled product 2 scale x.y, never below 0. NaN compares false, hence passes.
template <class V> HOST_DEVICE V energy(V norm_i, V norm_j, V product) {
  const V e = norm_i + norm_j - product;
  return e < V{} ? V{} : e;
}

// The sum of exp(-E) over some columns, kept as sum * exp(-low) with low <= E where the smallest E is not known to be 0.
template <class A> struct Partial {
  A low, sum;
};

// log sum exp(-E)
template <class A, class Log> HOST_DEVICE A log_sum(Partial<A> p, const Log& log) { return log(p.sum) - p.low; }

// What a row brings into the gradient: P_ij = factor_i exp(-E_ij - shift_i).
template <class A> struct Weight {
  A shift, factor;
};

// S_ij = P_ij + P_ji. Rows that share their shift (global: log Z; with the self term: 0) need one exponential.
template <bool kShared, class V, class A, class Exp>
HOST_DEVICE V pull(V e, Weight<A> i, V shift_j, V factor_j, const Exp& exp) {
  if constexpr (kShared) return exp(-e - i.shift) * (factor_j + i.factor);
  else return exp(-e - i.shift) * i.factor + exp(-e - shift_j) * factor_j;
}

// global : every row has shift log Z, factor 1. per_row: P_ij = weight_i / N exp(-E_ij - lse_i), the shift moved into the
// factor where lse_i >= 0 is known (self term).
template <class A, class Exp>
HOST_DEVICE Weight<A> row_weight(bool per_row, bool anchored, A log_z, A lse, A weight_over_n, const Exp& exp) {
  if (!per_row) return {log_z, A(1)};
  return anchored ? Weight<A>{A(0), weight_over_n * exp(-lse)} : Weight<A>{lse, weight_over_n};
}

// distance_hinge: what an energy lacks to the margin. NaN passes.
template <class V, class A> HOST_DEVICE V shortfall(V e, A margin) {
  const V lack = margin - e;
  return lack < V{} ? V{} : lack;
}

// cosine_contrastive, supcon: E = (1 - cos) / tau, of unit rows |x_i - x_j|^2 / (2 tau); pairs that do not count lie at infinity.
template <class V, class A> HOST_DEVICE V cosine(V e, A tau) {
  const V c = A(1) - tau * e;
  return c < V{} - 1 ? V{} - 1 : c;
}
