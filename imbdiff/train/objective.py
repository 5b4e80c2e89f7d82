"""One training loss: the base, and what the methods add to it, from two forwards of the network at most.

All branches with gradient are one stacked forward together with the own branch; those without are a second one under
`no_grad`. The base loss and every elementwise comparison are one call of `ops.two_branch_loss`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from imbdiff import ops
from imbdiff.diffusion import Path
from imbdiff.errors import InputError
from imbdiff.methods import Batch, Branch, Method, Pair, Scalar
from imbdiff.models.types import Cond, Out


class Objective(nn.Module):
    """Network and methods under one root, so that optimizer, averages and checkpoints see both.

    `forward(batch)` returns the loss by term, {"base": ..., "method/term": ...}; the loss to minimise is their sum.
    A method of weight 0 is left out altogether: what remains is, bit for bit, the run without it.
    """

    def __init__(
        self, net: nn.Module, path: Path, methods: Mapping[str, Method], provides: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self.net, self.path = net, path
        self.methods = nn.ModuleDict({name: m for name, m in methods.items() if m.weight != 0})
        offered = provides | getattr(net, "provides", frozenset())
        for name, method in self._active():
            wanted = method.requires | {f"tap:{tap}" for tap in method.own_taps}
            if missing := sorted(wanted - offered):
                raise InputError(
                    f"method {name} needs {', '.join(missing)}, which neither the network nor the data provides "
                    f"(they provide {', '.join(sorted(offered)) or 'nothing of the kind'})"
                )

    def _active(self) -> list[tuple[str, Method]]:
        return [(name, m) for name, m in self.methods.items() if isinstance(m, Method)]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        wanted = {(name, b): branch for name, m in self._active() for b, branch in m.branches(batch).items()}
        slots = _merge_shared(wanted)
        own_taps = {tap for _, m in self._active() for tap in m.own_taps}
        own = Branch(cond=batch.cond.where(~batch.dropped, batch.null), taps=tuple(own_taps))
        out = self._evaluate(batch, {"own": own} | {s: b for s, b in slots.items() if b.grad}, own.cond)
        with torch.no_grad():
            out |= self._evaluate(batch, {s: b for s, b in slots.items() if not b.grad}, own.cond)

        pairs: dict[str, tuple[Pair, Tensor, float]] = {}
        scalars: dict[str, Tensor] = {}
        for name, method in self._active():
            mine = {
                b: out[_slot(key, branch)] if branch.grad else _detached(out[_slot(key, branch)])
                for key, branch in wanted.items()
                for b in [key[1]]
                if key[0] == name
            }
            for term in method.terms(batch, out["own"], mine):
                if isinstance(term, Scalar):
                    scalars[f"{name}/{term.name}"] = method.weight * term.value
                else:
                    pairs[f"{name}/{term.name}"] = (term, mine[term.other].pred, method.weight)
        return self._compare(batch, out["own"].pred, pairs) | scalars

    def _evaluate(
        self, batch: Batch, branches: Mapping[Hashable, Branch], own_cond: Cond | None
    ) -> dict[Hashable, Out]:
        """The branches stacked along the batch, in one forward of the network."""
        if not branches:
            return {}
        B, K = len(batch.t), len(branches)
        first, *rest = [branch.cond or own_cond for branch in branches.values()]
        assert first is not None
        gate = None
        if not all(branch.expert for branch in branches.values()):
            gate = torch.tensor([float(b.expert) for b in branches.values()], device=batch.t.device).repeat_interleave(
                B
            )
        taps = sorted({tap for branch in branches.values() for tap in branch.taps})
        x_t, t = batch.x_t.repeat(K, *[1] * (batch.x_t.ndim - 1)), batch.t.repeat(K)
        out = self.net(x_t, t, first.cat(rest), gate, taps)
        feats = {tap: f.chunk(K) for tap, f in out.feats.items()}
        preds = out.pred.chunk(K)
        return {s: Out(preds[i], {tap: f[i] for tap, f in feats.items()}) for i, s in enumerate(branches)}

    def _compare(self, batch: Batch, own: Tensor, pairs: Mapping[str, tuple[Pair, Tensor, float]]) -> dict[str, Tensor]:
        """Base and pairs as one fused operation; means over samples."""
        others = [other for _, other, _ in pairs.values()]
        weight = scales = margin = None
        if pairs:
            weight = torch.stack([factor * pair.weight for pair, _, factor in pairs.values()])
            scales = torch.tensor([[p.g_own, p.g_other, p.value] for p, _, _ in pairs.values()], device=own.device)
            margin = [pair.margin for pair, _, _ in pairs.values()]
        base, terms = ops.two_branch_loss(own, self._target(batch).to(own.dtype), others, weight, scales, margin)
        for w in (m.base_weight(batch) for _, m in self._active()):
            base = base if w is None else base * w
        return {"base": base.mean(), **dict(zip(pairs, terms.mean(1).unbind(), strict=True))}

    def _target(self, batch: Batch) -> Tensor:
        target = self.path.target(batch.x0, batch.eps)
        named = {name: x0 for name, m in self._active() if (x0 := m.x0_target(batch)) is not None}
        if len(named) > 1:
            raise InputError(f"only one method may replace the regression target, got {', '.join(named)}; drop one")
        for x0 in named.values():
            target = self.path.retarget(target, batch.x0, x0, batch.signal, batch.sigma)
        return target


def _slot(key: tuple[str, str], branch: Branch) -> Hashable:
    return branch.share or key


def _merge_shared(wanted: Mapping[tuple[str, str], Branch]) -> dict[Hashable, Branch]:
    """Branches of one `share` key are evaluated once: with gradient if any wants it, with all their taps."""
    slots: dict[Hashable, Branch] = {}
    for key, branch in wanted.items():
        slot = _slot(key, branch)
        if (old := slots.get(slot)) is not None:
            branch = replace(old, grad=old.grad or branch.grad, taps=_union(old.taps, branch.taps))
        slots[slot] = branch
    return slots


def _union(*names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in names for name in group))


def _detached(out: Out) -> Out:
    return Out(out.pred.detach(), {tap: f.detach() for tap, f in out.feats.items()})
