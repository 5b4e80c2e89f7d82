// gaussian on the GPU: every pair from its differences, so that nothing cancels and no pair has to be looked at twice.
// The loss keeps no matrix: its backward pass makes strips of it, of bounded size.
#include "gaussian_slopes.cuh"

namespace imbdiff::gaussian {

template <class F> void by_kind(int64_t kind, const F& f) {
  if (kind == kKl) f(std::integral_constant<int, kKl>{});
  else if (kind == kJeffreys) f(std::integral_constant<int, kJeffreys>{});
  else f(std::integral_constant<int, kBhattacharyya>{});
}

inline Rectangle whole(const Problem& p) { return {0, p.p.count, 0, p.q.count}; }
inline int64_t tiles(const Problem& p, const Rectangle& r) { return p.L * r.down() * r.across(); }
inline Split width_split(const Problem& p) {
  const int64_t count = tiles(p, whole(p));
  return Split::of(p.D, count ? ceil_div(kFill, count) : 1, kFlush, kStage);
}
// Floats that values need beside their result.
inline int64_t workspace(const Problem& p) {
  const Split s = width_split(p);
  return s.parts > 1 ? s.parts * tiles(p, whole(p)) * kTile * kTile : 0;
}

inline void values(const Problem& p, const Rectangle& r, int64_t kind, const Use& use, float* scratch, cudaStream_t stream) {
  const Split s = width_split(p);
  const int64_t count = tiles(p, r);
  if (count == 0) return;
  by_kind(kind, [&](auto k) { launch(values_kernel<k()>, count * s.parts, kThreads, stream, p, r, s, use, scratch); });
  if (s.parts > 1) launch(gather_kernel, count, kThreads, stream, p, r, s.parts, use, scratch);
}

struct Gradients {
  Gradient p, q;
  bool any() const { return p.any() || q.any(); }
};
inline int64_t chunks(const Problem& p) { return ceil_div(p.D, kWide); }
inline int64_t sums_of_chunks(const Problem& p, const Side& x) { return x.shared ? chunks(p) * p.L * x.count : 0; }
// Floats that slopes need: sums of shared log-variances.
inline int64_t workspace_slopes(const Problem& p) { return sums_of_chunks(p, p.p) + sums_of_chunks(p, p.q); }

template <bool kOfP>
void slopes_of(const Problem& p, const Rectangle& r, int64_t kind, const float* weights, const Gradient& to, float* sums,
               cudaStream_t stream) {
  const int64_t blocks = chunks(p) * p.L * (kOfP ? r.down() : r.across());
  if (!to.any() || blocks == 0) return;
  float* const partial = kOfP ? sums : sums + sums_of_chunks(p, p.p);
  by_kind(kind, [&](auto k) { launch(slopes_kernel<k(), kOfP>, blocks, kThreads, stream, p, r, weights, to, partial); });
}
inline void finish_slopes(const Problem& p, const Gradients& to, const float* sums, cudaStream_t stream) {
  const auto add = [&](const Side& x, const Gradient& of, const float* partial) {
    const int64_t count = p.L * x.count;
    if (!x.shared || !of.logvar || count == 0) return;
    float* const grad = static_cast<float*>(of.logvar);
    launch(sum_chunks_kernel, ceil_div(count, kThreads), kThreads, stream, partial, chunks(p), count, grad);
  };
  add(p.p, to.p, sums);
  add(p.q, to.q, sums + sums_of_chunks(p, p.p));
}

inline void divergence_backward(const Problem& p, int64_t kind, const float* grad, const Gradients& to, float* scratch,
                                cudaStream_t stream) {
  slopes_of<true>(p, whole(p), kind, grad, to.p, scratch, stream);
  slopes_of<false>(p, whole(p), kind, grad, to.q, scratch, stream);
  finish_slopes(p, to, scratch, stream);
}

// f(rectangle, of p, of q): the whole matrix for both gradients or, where that is large, strips of rows and of columns.
template <class F> void for_each_strip(const Problem& p, const Gradients& to, const F& f) {
  constexpr int64_t kMost = 4 * kFill;  // tiles
  const Rectangle all = whole(p);
  if (!to.any() || tiles(p, all) <= kMost) return f(all, to.p.any(), to.q.any());
  const auto cut = [&](int64_t size, int64_t tiles_of_line, const auto& strip) {
    const int64_t most = (tiles_of_line < kMost ? kMost / tiles_of_line : 1) * kTile;
    for (int64_t at = 0; at < size; at += most) strip(at, most < size - at ? most : size - at);
  };
  if (to.p.any())
    cut(all.rows, all.across(), [&](int64_t at, int64_t rows) { f(Rectangle{at, rows, 0, all.columns}, true, false); });
  if (to.q.any())
    cut(all.columns, all.down(), [&](int64_t at, int64_t columns) { f(Rectangle{0, all.rows, at, columns}, false, true); });
}

struct Room {  // floats of scratch of the loss: slopes of a strip's pairs, sums of tiles, values in parts, sums of chunks
  int64_t pairs, sums, values, slopes;
  Room(const Problem& p, const Gradients& to)
      : pairs(0), sums(2 * tiles(p, whole(p))), values(workspace(p)), slopes(workspace_slopes(p)) {
    if (to.any()) for_each_strip(p, to, [&](const Rectangle& r, bool, bool) {
      pairs = r.rows * r.columns > pairs ? r.rows * r.columns : pairs;
    });
  }
  int64_t all() const { return pairs + sums + values + slopes; }
};

// to: the derivatives of loss * normalizer.
inline void overlap(const Problem& p, int64_t kind, const Choice& choice, bool mean, float* loss, float* normalizer,
                    const Gradients& to, float* scratch, cudaStream_t stream) {
  const Room room(p, to);
  const int64_t count = tiles(p, whole(p));
  float *const sums = scratch + room.pairs, *const parts = sums + room.sums, *const slopes = parts + room.values;
  int64_t counted = 0;  // strips of columns come after those of rows, with pairs that are in the sums already
  for_each_strip(p, to, [&](const Rectangle& r, bool of_p, bool of_q) {
    const Use use{to.any() ? scratch : nullptr, counted < count ? sums + 2 * counted : nullptr, true, choice};
    values(p, r, kind, use, parts, stream);
    counted += tiles(p, r);
    if (of_p) slopes_of<true>(p, r, kind, scratch, to.p, slopes, stream);
    if (of_q) slopes_of<false>(p, r, kind, scratch, to.q, slopes, stream);
  });
  finish_slopes(p, to, slopes, stream);
  launch(loss_kernel, 1, kThreads, stream, sums, count, mean, loss, normalizer);
}

#ifndef IMBDIFF_EMULATE
// [L, N, D], or [N, D] as a batch of one.
inline Side side(const Tensor& mean, const Tensor& logvar) {
  const int64_t rank = mean.dim();
  const bool shared = logvar.size(rank - 1) == 1;
  STD_TORCH_CHECK(logvar.scalar_type() == (shared ? ScalarType::Float : mean.scalar_type()),
                  "gaussian: log-variances must have the means' type, or float32 if shared");
  const auto batch = [&](const Tensor& x) { return rank == 3 ? x.stride(0) : 0; };
  return {{mean.const_data_ptr(), mean.stride(rank - 2), element(mean)},
          {logvar.const_data_ptr(), logvar.stride(rank - 2), element(logvar)},
          mean.size(rank - 2), batch(mean), batch(logvar), shared};
}
inline Problem problem(const Tensor& mean_p, const Tensor& logvar_p, const Tensor& mean_q, const Tensor& logvar_q) {
  const int64_t rank = mean_p.dim();
  return {side(mean_p, logvar_p), side(mean_q, logvar_q), rank == 3 ? mean_p.size(0) : 1, mean_p.size(rank - 1)};
}

// The tensors that gradients are written to; empty where none is wanted.
struct Four {
  Tensor tensors[4];
  Gradients to;
  Four(const Tensor (&x)[4], const std::vector<bool>& needs, bool in_float) {
    void* at[4];
    for (int k = 0; k < 4; ++k) {
      std::vector<int64_t> sizes{0};
      if (needs[k]) sizes.clear();
      for (int64_t d = 0; needs[k] && d < x[k].dim(); ++d) sizes.push_back(x[k].size(d));
      tensors[k] = torch::stable::new_empty(x[k], sizes, in_float ? ScalarType::Float : x[k].scalar_type());
      at[k] = needs[k] ? tensors[k].mutable_data_ptr() : nullptr;
    }
    const Element type = in_float ? Element::kFloat : element(x[0]);
    to = {{at[0], at[1], type}, {at[2], at[3], type}};
  }
};

std::tuple<Tensor, Tensor> gaussian_divergence(const Tensor& mean_p, const Tensor& logvar_p, const Tensor& mean_q,
                                               const Tensor& logvar_q, int64_t kind) {
  const torch::stable::accelerator::DeviceGuard guard(mean_p.get_device_index());
  const Problem p = problem(mean_p, logvar_p, mean_q, logvar_q);
  const Tensor matrix = floats(mean_p, {p.L, p.p.count, p.q.count}), scratch = floats(mean_p, {workspace(p)});
  values(p, whole(p), kind, {out(matrix), nullptr, false, {}}, out(scratch), current_stream(mean_p));
  return {matrix, floats(mean_p, {0})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_divergence_bwd(const Tensor& grad, const Tensor& mean_p, const Tensor& logvar_p,
                                                                   const Tensor& mean_q, const Tensor& logvar_q, int64_t kind,
                                                                   const Tensor&, const Tensor&, const std::vector<bool>& needs) {
  const torch::stable::accelerator::DeviceGuard guard(mean_p.get_device_index());
  const Problem p = problem(mean_p, logvar_p, mean_q, logvar_q);
  const Four gradients({mean_p, logvar_p, mean_q, logvar_q}, needs, false);
  const auto& [of_mean_p, of_logvar_p, of_mean_q, of_logvar_q] = gradients.tensors;
  const Tensor scratch = floats(mean_p, {workspace_slopes(p)});
  divergence_backward(p, kind, in(grad), gradients.to, out(scratch), current_stream(mean_p));
  return {of_mean_p, of_logvar_p, of_mean_q, of_logvar_q};
}

inline Choice choice_of(const Tensor& labels_p, const Tensor& labels_q, const Tensor& mask, const Tensor& weight, int64_t form,
                        double margin, double scale, int64_t pairs, bool same_set) {
  return {static_cast<const int64_t*>(labels_p.const_data_ptr()),
          static_cast<const int64_t*>(labels_q.const_data_ptr()),
          mask.numel() ? static_cast<const bool*>(mask.const_data_ptr()) : nullptr,
          weight.numel() ? in(weight) : nullptr,
          static_cast<int>(form),
          static_cast<int>(pairs),
          static_cast<float>(margin),
          static_cast<float>(scale),
          same_set};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_overlap(
    const Tensor& mean_p, const Tensor& logvar_p, const Tensor& mean_q, const Tensor& logvar_q, const Tensor& labels_p,
    const Tensor& labels_q, const Tensor& mask, const Tensor& weight, int64_t kind, int64_t form, double margin, double scale,
    int64_t pairs, bool mean, bool same_set, const std::vector<bool>& needs) {
  const torch::stable::accelerator::DeviceGuard guard(mean_p.get_device_index());
  const Problem p = problem(mean_p, logvar_p, mean_q, logvar_q);
  const Four slopes({mean_p, logvar_p, mean_q, logvar_q}, needs, true);
  const auto& [of_mean_p, of_logvar_p, of_mean_q, of_logvar_q] = slopes.tensors;
  const Tensor loss = floats(mean_p, {}), normalizer = floats(mean_p, {}), scratch = floats(mean_p, {Room(p, slopes.to).all()});
  overlap(p, kind, choice_of(labels_p, labels_q, mask, weight, form, margin, scale, pairs, same_set), mean, out(loss),
          out(normalizer), slopes.to, out(scratch), current_stream(mean_p));
  return {loss, normalizer, of_mean_p, of_logvar_p, of_mean_q, of_logvar_q};
}
#endif

}  // namespace imbdiff::gaussian

#ifndef IMBDIFF_EMULATE
STABLE_TORCH_LIBRARY_IMPL(imbdiff, CUDA, m) {
  m.impl("gaussian_divergence_cuda", TORCH_BOX(&imbdiff::gaussian::gaussian_divergence));
  m.impl("gaussian_divergence_bwd_cuda", TORCH_BOX(&imbdiff::gaussian::gaussian_divergence_bwd));
  m.impl("gaussian_overlap_cuda", TORCH_BOX(&imbdiff::gaussian::gaussian_overlap));
}
#endif
