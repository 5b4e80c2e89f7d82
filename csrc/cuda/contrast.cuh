// contrast on the GPU: the launches of a call, for every loss and both plans of the pairwise engine, in exact float32.
#pragma once

#include "contrast_rows.cuh"
#include "contrast_split_k.cuh"
#include "contrast_streaming.cuh"

namespace imbdiff::contrast {

constexpr int64_t kMostParts = 16;

// One allocation of floats, cut up; with base null its size alone.
struct Scratch {
  Scratch(const Facts& p, bool split_k, bool backward, float* base) {
    const auto take = [&](bool wanted, int64_t count) {
      float* const at = base ? base + size : nullptr;
      size += wanted ? ceil_div(count, 4) * 4 : 0;  // keeps what follows aligned
      return at;
    };
    const bool measures = p.cosine() && !(split_k && backward);
    norms = take(measures, 2 * p.norm_split().parts * p.columns());
    lengths = take(p.cosine() && !split_k, p.columns());
    sums = take(!backward, p.N);
    positives = take(p.labels.data, p.N);
    total = take(backward, 1);
    mass = take(backward, p.N * (split_k ? 1 : p.column_split(kMostParts).parts));
    rest = take(true, split_k ? p.N * p.columns() * (backward ? 1 : p.width_split().parts)
                      : backward ? tile_at(p, p.column_split(kMostParts).parts, 0, 0)
                                 : p.column_split(kFill).parts * p.N * int64_t(sizeof(State) / sizeof(float)));
  }
  int64_t size = 0;
  float *norms, *lengths, *sums, *positives, *total, *mass, *rest;
};
inline int64_t workspace(const Facts& p, bool split_k, bool backward) { return Scratch(p, split_k, backward, nullptr).size; }

template <class T> void measure(Problem<T>& p, float* norms, float* lengths, cudaStream_t stream) {
  const Split s = p.norm_split();
  launch(norms_kernel<T>, p.columns() * s.parts, kThreads, stream, p, s, norms);
  launch(lengths_kernel, ceil_div(p.columns(), kThreads), kThreads, stream, norms, s.parts, p.columns(), lengths);
  p.lengths = lengths;
}

inline const float* count_positives(const Facts& p, float* positives, cudaStream_t stream) {
  if (!p.labels.data) return nullptr;
  launch(positives_kernel, p.N, kThreads, stream, p, positives);
  return positives;
}

struct Outputs { float *loss, *lse, *saved; };  // saved: E, of cosines with the lengths below

template <class T>
void forward(Problem<T> p, bool split_k, const float* weight, Outputs out, float* scratch, cudaStream_t stream) {
  const Scratch s(p, split_k, false, scratch);
  if (p.cosine()) measure(p, s.norms, split_k ? out.saved + p.N * p.columns() : s.lengths, stream);
  if (split_k) {
    const Split parts = p.width_split();
    launch(split_kernel<T>, p.row_tiles() * p.column_tiles() * parts.parts, kThreads, stream, p, parts, s.rest);
    launch(reduce_kernel, p.N, kThreads, stream, p, s.rest, parts.parts, out.saved, out.lse, s.sums);
  } else {
    const Split parts = p.column_split(kFill);
    auto* states = reinterpret_cast<State*>(s.rest);
    launch(streaming_kernel<T>, p.row_tiles() * parts.parts, kThreads, stream, p, parts, states);
    launch(merge_kernel, ceil_div(p.N, kThreads), kThreads, stream, p, states, parts.parts, out.lse, s.sums);
  }
  const Statistics of{out.lse, s.sums, weight, count_positives(p, s.positives, stream)};
  launch(total_kernel, 1, kThreads, stream, p, of, p.shift(), true, out.loss);
}

struct Kept { const float *grad, *weight, *lse, *saved; };

template <class T> void backward(Problem<T> p, bool split_k, Kept kept, T* grad_x, float* scratch, cudaStream_t stream) {
  const Scratch s(p, split_k, true, scratch);
  if (p.cosine() && split_k) p.lengths = kept.saved + p.N * p.columns();
  else if (p.cosine()) measure(p, s.norms, s.lengths, stream);
  const Statistics of{kept.lse, nullptr, kept.weight, count_positives(p, s.positives, stream)};
  if (!p.per_row || of.positives) launch(total_kernel, 1, kThreads, stream, p, of, 0.f, false, s.total);
  const Pull pull{of, kept.grad, s.total};
  if (split_k) {
    launch(weights_kernel, p.N, kThreads, stream, p, pull, kept.saved, s.rest, s.mass);
    launch(apply_kernel<T>, p.row_tiles() * ceil_div(p.D, kTile), kThreads, stream, p, s.rest, s.mass, grad_x);
  } else {
    const Split parts = p.column_split(kMostParts);
    launch(streaming_bwd_kernel<T>, p.row_tiles() * parts.parts, kThreads, stream, p, parts, pull, s.rest, s.mass);
    launch(sum_parts_kernel<T>, ceil_div(p.N * p.D, kThreads), kThreads, stream, p, s.rest, s.mass, parts.parts,
           grad_x);
  }
}

}  // namespace imbdiff::contrast
