// contrast on the GPU: the losses of a batch's rows with each other, on the pairwise engine.
#include "contrast.cuh"

#ifndef IMBDIFF_EMULATE
namespace imbdiff::contrast {

Facts facts(Loss loss, const Tensor& x, int64_t negatives, double scale) {
  return {loss, x.size(0), negatives, x.size(1), static_cast<float>(scale)};
}
Facts distance_facts(const Tensor& x, const Tensor& negatives, double scale, bool include_self, bool per_row) {
  Facts f = facts(Loss::distance, x, negatives.size(0), scale);
  f.include_self = include_self, f.per_row = per_row;
  return f;
}
Facts hinge_facts(const Tensor& x, double margin, double scale) {
  Facts f = facts(Loss::hinge, x, 0, scale);
  f.margin = static_cast<float>(margin);
  return f;
}
Facts cosine_facts(const Tensor& x, const Tensor& negatives, double tau, bool include_self) {
  Facts f = facts(Loss::cosine, x, negatives.size(0), .5 / tau);
  f.include_self = include_self;
  return f;
}
Facts supcon_facts(const Tensor& x, const Tensor& labels, double tau) {
  Facts f = facts(Loss::supcon, x, 0, .5 / tau);
  f.labels = rows<int64_t>(labels);
  return f;
}

const float* given(const Tensor* t) { return t && t->numel() > 0 ? in(*t) : nullptr; }

std::tuple<Tensor, Tensor, Tensor> run_forward(const Facts& f, const Tensor& x, const Tensor& negatives, const Tensor* weight,
                                               bool split_k) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor loss = floats(x, {}), lse = floats(x, {f.N});
  Tensor saved = split_k && !f.empty() ? floats(x, {f.N + f.cosine(), f.columns()}) : floats(x, {0});
  if (f.empty()) {
    loss = torch::stable::zero_(loss), lse = torch::stable::zero_(lse);
    return {loss, lse, saved};
  }
  const Tensor scratch = floats(x, {workspace(f, split_k, false)});
  by_dtype(x, [&](auto element) {
    using T = decltype(element);
    forward<T>({f, rows<T>(x), rows<T>(negatives)}, split_k, given(weight), {out(loss), out(lse), out(saved)}, out(scratch),
               current_stream(x));
  });
  return {loss, lse, saved};
}

Tensor run_backward(const Facts& f, const Tensor& grad, const Tensor& x, const Tensor& negatives, const Tensor* weight,
                    const Tensor* lse, const Tensor& saved, bool split_k) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor grad_x = torch::stable::new_empty(x, {f.N, f.D});
  if (f.empty() || f.D == 0) return torch::stable::zero_(grad_x);
  const Tensor scratch = floats(x, {workspace(f, split_k, true)});
  by_dtype(x, [&](auto element) {
    using T = decltype(element);
    backward<T>({f, rows<T>(x), rows<T>(negatives)}, split_k, {in(grad), given(weight), given(lse), in(saved)},
                static_cast<T*>(grad_x.mutable_data_ptr()), out(scratch), current_stream(x));
  });
  return grad_x;
}

std::tuple<Tensor, Tensor, Tensor> negative_distance(const Tensor& x, const Tensor& negatives, const Tensor& weight,
                                                     double scale, bool include_self, bool per_row, bool split_k) {
  return run_forward(distance_facts(x, negatives, scale, include_self, per_row), x, negatives, &weight, split_k);
}
Tensor negative_distance_bwd(const Tensor& grad, const Tensor& x, const Tensor& negatives, const Tensor& weight,
                             const Tensor& lse, const Tensor& saved, double scale, bool include_self, bool per_row,
                             bool split_k) {
  const Facts f = distance_facts(x, negatives, scale, include_self, per_row);
  return run_backward(f, grad, x, negatives, &weight, &lse, saved, split_k);
}

std::tuple<Tensor, Tensor> distance_hinge(const Tensor& x, double margin, double scale, bool split_k) {
  const auto [loss, lse, saved] = run_forward(hinge_facts(x, margin, scale), x, x, nullptr, split_k);
  return {loss, saved};
}
Tensor distance_hinge_bwd(const Tensor& grad, const Tensor& x, const Tensor& saved, double margin, double scale, bool split_k) {
  return run_backward(hinge_facts(x, margin, scale), grad, x, x, nullptr, nullptr, saved, split_k);
}

std::tuple<Tensor, Tensor, Tensor> cosine_contrastive(const Tensor& x, const Tensor& negatives, const Tensor& weight, double tau,
                                                      bool include_self, bool split_k) {
  return run_forward(cosine_facts(x, negatives, tau, include_self), x, negatives, &weight, split_k);
}
Tensor cosine_contrastive_bwd(const Tensor& grad, const Tensor& x, const Tensor& negatives, const Tensor& weight,
                              const Tensor& lse, const Tensor& saved, double tau, bool include_self, bool split_k) {
  return run_backward(cosine_facts(x, negatives, tau, include_self), grad, x, negatives, &weight, &lse, saved, split_k);
}

std::tuple<Tensor, Tensor, Tensor> supcon(const Tensor& x, const Tensor& labels, const Tensor& weight, double tau, bool split_k) {
  return run_forward(supcon_facts(x, labels, tau), x, x, &weight, split_k);
}
Tensor supcon_bwd(const Tensor& grad, const Tensor& x, const Tensor& labels, const Tensor& weight, const Tensor& lse,
                  const Tensor& saved, double tau, bool split_k) {
  return run_backward(supcon_facts(x, labels, tau), grad, x, x, &weight, &lse, saved, split_k);
}

}  // namespace imbdiff::contrast

STABLE_TORCH_LIBRARY_IMPL(imbdiff, CUDA, m) {
  m.impl("negative_distance_cuda", TORCH_BOX(&imbdiff::contrast::negative_distance));
  m.impl("negative_distance_bwd_cuda", TORCH_BOX(&imbdiff::contrast::negative_distance_bwd));
  m.impl("distance_hinge_cuda", TORCH_BOX(&imbdiff::contrast::distance_hinge));
  m.impl("distance_hinge_bwd_cuda", TORCH_BOX(&imbdiff::contrast::distance_hinge_bwd));
  m.impl("cosine_contrastive_cuda", TORCH_BOX(&imbdiff::contrast::cosine_contrastive));
  m.impl("cosine_contrastive_bwd_cuda", TORCH_BOX(&imbdiff::contrast::cosine_contrastive_bwd));
  m.impl("supcon_cuda", TORCH_BOX(&imbdiff::contrast::supcon));
  m.impl("supcon_bwd_cuda", TORCH_BOX(&imbdiff::contrast::supcon_bwd));
}
#endif
