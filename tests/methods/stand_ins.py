"""Small stand-ins for methods still to come, so that the seam is proven for them: each uses another part of it."""

import torch
import torch.nn.functional as F
from torch import nn

from imbdiff.methods import Branch, Method, MethodConfig, Pair, Scalar
from imbdiff.models.types import LabelCond, Out


class Align(Method):
    """A shared null branch with features, as CCUA has."""

    requires = frozenset({"tap:mid"})

    def branches(self, batch):
        return {"null": Branch(batch.null, taps=("mid",), share="null")}

    def terms(self, batch, own, out):
        z = F.normalize(out["null"].feats["mid"].flatten(1), dim=1)
        ucl = (batch.noise * torch.logsumexp(z @ z.T / 0.1, 1)).mean()
        return [Pair("al", "null", batch.noise * ~batch.dropped), Scalar("ucl", ucl)]


class NullAgain(Method):
    """Asks for the same shared branch without gradient."""

    def branches(self, batch):
        return {"mine": Branch(batch.null, grad=False, share="null")}

    def terms(self, batch, own, out):
        assert not out["mine"].pred.requires_grad
        return [Pair("pull", "mine", torch.ones_like(batch.noise))]


class Capacity(Method):
    """The own condition without the network's gated capacity, as CM has."""

    requires = frozenset({"expert"})

    def branches(self, batch):
        return {"general": Branch(expert=False, share="general")}

    def terms(self, batch, own, out):
        return [Pair("con", "general", torch.ones_like(batch.noise))]


class Projector(Method):
    """Parameters of its own and own features, as CORAL has."""

    own_taps = ("mid",)

    def __init__(self, config: MethodConfig | None = None, width: int = 32) -> None:
        super().__init__(config)
        self.head = nn.Linear(width, 8)

    def terms(self, batch, own, out):
        v = F.normalize(self.head(own.feats["mid"].flatten(1)), dim=1)
        return [Scalar("sup", ((v @ v.T) * (batch.group[:, None] != batch.group)).mean())]


class Push(Method):
    """A hinge, as DiffROP has; and a fixed second label without gradient."""

    def branches(self, batch):
        return {"next": Branch(LabelCond((batch.group + 1) % len(batch.counts)), grad=False)}

    def terms(self, batch, own, out):
        return [Pair("push", "next", 1 - batch.noise, g_other=0.0, margin=0.3)]


class Reweight(Method):
    def base_weight(self, batch):
        return 1.0 / batch.counts[batch.group]


class ToyNet(nn.Module):
    """Two layers with low-rank capacity behind the gate; counts the rows that it was asked for."""

    provides = frozenset({"expert", "tap:mid"})

    def __init__(self, shape=(1, 4, 4), classes=3, width=32) -> None:
        super().__init__()
        d = shape[0] * shape[1] * shape[2]
        self.into, self.label = nn.Linear(d, width), nn.Embedding(classes + 1, width)
        self.down, self.up, self.out = nn.Linear(width, 4, bias=False), nn.Linear(4, d, bias=False), nn.Linear(width, d)
        self.rows: list[tuple[int, bool]] = []

    def forward(self, x_t, t, cond, gate=None, taps=()):
        self.rows.append((len(x_t), torch.is_grad_enabled()))
        h = F.silu(self.into(x_t.flatten(1)) + self.label(cond.ids) + t[:, None] / 1000)
        expert = self.up(self.down(h))
        expert = expert if gate is None else gate[:, None] * expert
        return Out((self.out(h) + expert).view_as(x_t), dict.fromkeys(taps, h))
