// Scalar maths of two_branch, for host and device: one formula, two compilers.
#pragma once

#include "host_device.h"

namespace imbdiff::two_branch {

// f(d) of a comparison: d itself for a pull (margin 0), else max(0, margin - d). NaN stays NaN.
template <class A> HOST_DEVICE A penalty(A margin, A d) {
  const A short_by = margin - d;
  return margin == 0 ? d : short_by < 0 ? A(0) : short_by;
}

// df/dd; the push stops where the margin is reached. A NaN distance pushes, so that the NaN is passed on.
template <class A> HOST_DEVICE A slope(A margin, A d) {
  return margin == 0 ? A(1) : margin - d <= 0 ? A(0) : A(-1);
}

}  // namespace imbdiff::two_branch
