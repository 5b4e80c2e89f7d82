"""DiT against the released weights' table of keys, the paper's parameter counts and an independent forward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from imbdiff.models import DIT_SIZES, DiT, DiTConfig, LabelCond, Out, dit_config


def small(**overrides: object) -> DiT:
    """A 6x6 image of 9 tokens. The zeroed layers get values, so that everything is heard in the output."""
    fields = {"image_size": 6, "channels": 3, "num_classes": 5, "patch_size": 2, "hidden_size": 16}
    torch.manual_seed(0)
    net = DiT(DiTConfig(**{**fields, "depth": 3, "num_heads": 2, **overrides})).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return net


def inputs(B: int = 4) -> tuple[Tensor, Tensor, LabelCond]:
    torch.manual_seed(1)
    return torch.randn(B, 3, 6, 6).double(), torch.tensor([0.0, 17.0, 500.0, 999.0])[:B], LabelCond(torch.arange(B))


# ---------------------------------------------------------------- the released weights


@pytest.mark.parametrize(
    ("name", "image_size", "count"),
    [
        ("DiT-S/2", 32, 32_963_360),
        ("DiT-B/2", 32, 130_512_416),
        ("DiT-L/2", 32, 458_102_816),
        ("DiT-XL/2", 32, 675_129_632),
        ("DiT-XL/4", 32, 675_074_432),
        ("DiT-XL/8", 32, 675_683_072),
        ("DiT-XL/2", 64, 676_014_368),
    ],
)
def test_parameter_counts_are_the_released_ones(name: str, image_size: int, count: int) -> None:
    with torch.device("meta"):
        net = DiT(dit_config(name, image_size=image_size, channels=4, num_classes=1000, learn_sigma=True))
    assert sum(p.numel() for p in net.parameters()) == count
    assert {p.device.type for p in net.parameters()} == {"meta"}


def test_keys_and_shapes_of_xl2_are_the_released_ones() -> None:
    with torch.device("meta"):
        net = DiT(dit_config("DiT-XL/2", image_size=32, channels=4, num_classes=1000, learn_sigma=True))
    layers = {
        "x_embedder.proj": (1152, 4, 2, 2),
        "t_embedder.mlp.0": (1152, 256),
        "t_embedder.mlp.2": (1152, 1152),
        "final_layer.linear": (32, 1152),
        "final_layer.adaLN_modulation.1": (2304, 1152),
    }
    for i in range(28):
        layers |= {
            f"blocks.{i}.attn.qkv": (3456, 1152),
            f"blocks.{i}.attn.proj": (1152, 1152),
            f"blocks.{i}.mlp.fc1": (4608, 1152),
            f"blocks.{i}.mlp.fc2": (1152, 4608),
            f"blocks.{i}.adaLN_modulation.1": (6912, 1152),
        }
    expected = {f"{name}.weight": shape for name, shape in layers.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    expected |= {"pos_embed": (1, 256, 1152), "y_embedder.embedding_table.weight": (1001, 1152)}
    assert len(expected) == 292
    assert {name: tuple(v.shape) for name, v in net.state_dict().items()} == expected
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_sizes() -> None:
    assert {name for name in DIT_SIZES if name.startswith("DiT")} == {
        f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)
    }
    config = dit_config("tiny", image_size=8, channels=1, num_classes=10, depth=2)
    assert (config.hidden_size, config.depth, config.label_init_std) == (64, 2, 1.0)


# ---------------------------------------------------------------- the formulas


def paper_forward(w: Mapping[str, Tensor], config: DiTConfig, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The network written again from its table of weights: loops, plain softmax, no module. [B, out channels, S, S]."""
    p, D, heads = config.patch_size, config.hidden_size, config.num_heads
    g = config.image_size // p

    def linear(name: str, v: Tensor) -> Tensor:
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(v: Tensor) -> Tensor:
        return v / (1 + torch.exp(-v))

    def gelu(v: Tensor) -> Tensor:
        return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    def norm(v: Tensor) -> Tensor:
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()

    features = torch.zeros(len(t), 256, dtype=x.dtype)
    for i in range(128):
        features[:, i] = torch.cos(t * math.exp(-math.log(10000) * i / 128))
        features[:, 128 + i] = torch.sin(t * math.exp(-math.log(10000) * i / 128))
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", features)))
    c = silu(c + w["y_embedder.embedding_table.weight"][y])

    tokens = torch.zeros(len(x), g * g, D, dtype=x.dtype)
    for row in range(g):
        for column in range(g):
            patch = x[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
            embedded = torch.einsum("bchw,dchw->bd", patch, w["x_embedder.proj.weight"]) + w["x_embedder.proj.bias"]
            tokens[:, row * g + column] = embedded
            for i in range(D // 4):
                f = 10000 ** (-i / (D // 4))
                place = (math.sin(column * f), math.cos(column * f), math.sin(row * f), math.cos(row * f))
                for quarter, value in enumerate(place):
                    tokens[:, row * g + column, quarter * D // 4 + i] += value

    for n in range(config.depth):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            v[:, None] for v in linear(f"blocks.{n}.adaLN_modulation.1", c).split(D, 1)
        )
        q, k, v = linear(f"blocks.{n}.attn.qkv", norm(tokens) * (1 + scale_a) + shift_a).split(D, 2)
        mixed = torch.zeros_like(tokens)
        for h in range(heads):
            s = slice(h * D // heads, (h + 1) * D // heads)
            mixed[:, :, s] = (q[:, :, s] @ k[:, :, s].mT / math.sqrt(D // heads)).softmax(2) @ v[:, :, s]
        tokens = tokens + gate_a * linear(f"blocks.{n}.attn.proj", mixed)
        inner = gelu(linear(f"blocks.{n}.mlp.fc1", norm(tokens) * (1 + scale_m) + shift_m))
        tokens = tokens + gate_m * linear(f"blocks.{n}.mlp.fc2", inner)

    shift, scale = (v[:, None] for v in linear("final_layer.adaLN_modulation.1", c).split(D, 1))
    pixels = linear("final_layer.linear", norm(tokens) * (1 + scale) + shift)
    C = pixels.shape[2] // p**2
    out = torch.zeros(len(x), C, g * p, g * p, dtype=x.dtype)
    for row in range(g * p):
        for column in range(g * p):
            token, inside = row // p * g + column // p, (row % p) * p + column % p
            out[:, :, row, column] = pixels[:, token, inside * C : (inside + 1) * C]
    return out


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_forward_is_the_paper_written_again(learn_sigma: bool) -> None:
    net = small(learn_sigma=learn_sigma)
    x, _, cond = inputs()
    # The time features are float32: angles up to 100 are good to 4e-6.
    t = torch.tensor([0.0, 1.0, 17.0, 100.0])
    out = net(x, t, cond)
    expected = paper_forward(net.state_dict(), net.config, x, t.double(), cond.ids)
    torch.testing.assert_close(out.pred, expected[:, :3], rtol=1e-4, atol=1e-4)
    if learn_sigma:
        torch.testing.assert_close(out.variance, expected[:, 3:], rtol=1e-4, atol=1e-4)
    else:
        assert out.variance is None
    assert out.pred.std() > 0.1


def test_time_is_fed_as_it_is() -> None:
    """Times of the flow path, 0 .. 1, are not stretched."""
    net = small()
    x, _, cond = inputs()
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    expected = paper_forward(net.state_dict(), net.config, x, t.double(), cond.ids)
    torch.testing.assert_close(net(x, t, cond).pred, expected, rtol=1e-5, atol=1e-5)


def test_adaln_slots_are_shift_scale_gate_of_attention_then_of_the_mlp() -> None:
    """From the zero start, one slot at a time: a gate alone opens its own branch, shift and scale alone do nothing."""
    torch.manual_seed(0)
    net = DiT(DiTConfig(image_size=6, channels=3, num_classes=5, patch_size=2, hidden_size=16, depth=1, num_heads=2))
    x, t, cond = inputs()
    x = x.float()
    block = net.blocks[0]
    tokens = net.x_embedder(x) + net.pos_embed

    def feature(slots: Mapping[int, float]) -> Tensor:
        bias = torch.zeros(6, 16)
        for slot, value in slots.items():
            bias[slot] = value
        block.adaLN_modulation[1].bias.data = bias.flatten()
        return net(x, t, cond, taps=["mid"]).feats["mid"]

    for still in ({}, {0: 0.5}, {1: 0.5}, {3: 0.5}, {4: 0.5}):
        torch.testing.assert_close(feature(still), tokens)
    normed = block.norm1(tokens)
    torch.testing.assert_close(feature({2: 0.5}), tokens + 0.5 * block.attn(normed))
    torch.testing.assert_close(feature({0: 0.3, 1: 0.7, 2: 0.5}), tokens + 0.5 * block.attn(normed * 1.7 + 0.3))
    torch.testing.assert_close(feature({5: 0.5}), tokens + 0.5 * block.mlp(normed))
    torch.testing.assert_close(feature({3: 0.3, 4: 0.7, 5: 0.5}), tokens + 0.5 * block.mlp(normed * 1.7 + 0.3))


# ---------------------------------------------------------------- the start


def test_output_is_zero_at_the_start_and_tokens_pass_unchanged() -> None:
    torch.manual_seed(0)
    net = DiT(dit_config("tiny", image_size=6, channels=3, num_classes=5))
    x, t, cond = inputs()
    out = net(x.float(), t, cond, taps=["blocks.0", "blocks.3"])
    assert out.pred.abs().max() == 0
    torch.testing.assert_close(out.feats["blocks.0"], net.x_embedder(x.float()) + net.pos_embed)
    assert torch.equal(out.feats["blocks.0"], out.feats["blocks.3"])


def test_initial_scales_are_the_recipe() -> None:
    torch.manual_seed(0)
    net = DiT(dit_config("DiT-S/2", image_size=8, channels=4, num_classes=500, depth=1, label_init_std=0.5))
    weights = dict(net.named_parameters())
    assert weights["y_embedder.embedding_table.weight"].std().item() == pytest.approx(0.5, rel=0.02)
    assert weights["t_embedder.mlp.0.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["t_embedder.mlp.2.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    for name, fan_in, fan_out in (
        ("x_embedder.proj.weight", 16, 384),
        ("blocks.0.attn.qkv.weight", 384, 1152),
        ("blocks.0.mlp.fc1.weight", 384, 1536),
    ):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert weights[name].abs().max().item() == pytest.approx(bound, rel=0.01)
    assert all(p.abs().max() == 0 for name, p in weights.items() if name.endswith("bias"))


def test_same_seed_same_network() -> None:
    def made(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return DiT(dit_config("tiny", image_size=8, channels=1, num_classes=10)).state_dict()

    first, again, other = made(3), made(3), made(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_built_on_meta_then_filled_is_the_same_network() -> None:
    config = dit_config("tiny", image_size=8, channels=1, num_classes=10)
    with torch.device("meta"):
        net = DiT(config)
    net = net.to_empty(device="cpu")
    torch.manual_seed(3)
    net.reset_parameters()
    torch.manual_seed(3)
    plain = DiT(config)
    plain.reset_parameters()
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert torch.equal(net.pos_embed, plain.pos_embed)


def test_gradients_reach_every_trainable_parameter() -> None:
    net = small(learn_sigma=True)
    # Every row of the label table, the null label included.
    x, t = torch.randn(6, 3, 6, 6).double(), torch.linspace(0, 999, 6)
    out = net(x, t, LabelCond(torch.arange(6)))
    assert out.variance is not None
    (out.pred.square().mean() + out.variance.square().mean()).backward()
    for name, p in net.named_parameters():
        if name == "pos_embed":
            assert p.grad is None
        else:
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name
    assert (net.y_embedder.embedding_table.weight.grad.abs().amax(1) > 0).all()


# ---------------------------------------------------------------- the seam


def test_samples_do_not_see_each_other() -> None:
    net = small()
    x, t, cond = inputs()
    together = net(x, t, cond).pred
    for i in range(4):
        alone = net(x[i : i + 1], t[i : i + 1], cond.take(torch.tensor([i]))).pred
        torch.testing.assert_close(alone, together[i : i + 1])


def test_null_label_is_a_row_of_its_own() -> None:
    net = small()
    x, t, cond = inputs()
    assert net.null_label == 5
    null = LabelCond(torch.full_like(cond.ids, net.null_label))
    keep = torch.tensor([True, False, True, False])
    own, without, mixed = (net(x, t, c).pred for c in (cond, null, cond.where(keep, null)))
    assert (own - without).abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(mixed, torch.where(keep.view(-1, 1, 1, 1), own, without))


def test_taps_are_the_tokens_after_a_block() -> None:
    net = small()
    x, t, cond = inputs()
    names = ["mid", "blocks.0", "blocks.1", "blocks.2"]
    out = net(x, t, cond, taps=names)
    assert set(out.feats) == set(names)
    assert {tuple(f.shape) for f in out.feats.values()} == {(4, 9, 16)}
    assert torch.equal(out.feats["mid"], out.feats["blocks.0"])  # three blocks: after the first
    c = net.t_embedder(t) + net.y_embedder(cond.ids)
    torch.testing.assert_close(net.blocks[1](out.feats["blocks.0"], c), out.feats["blocks.1"])
    assert torch.equal(net(x, t, cond).pred, out.pred)
    assert dict(net(x, t, cond).feats) == {}
    assert net.provides == {"tap:mid", "tap:blocks.0", "tap:blocks.1", "tap:blocks.2"}
    with torch.device("meta"):
        assert DiT(dit_config("DiT-XL/8", image_size=8, channels=4, num_classes=1)).tap_names["mid"] == 13


def test_autocast_and_bfloat16_run() -> None:
    net = small().float()
    x, t, cond = inputs()
    wide = net(x.float(), t, cond).pred
    with torch.autocast("cpu", torch.bfloat16):
        narrow = net(x.float(), t, cond).pred
    assert (narrow.float() - wide).norm() / wide.norm() < 0.05
    assert (net.bfloat16()(x.bfloat16(), t, cond).pred.float() - wide).norm() / wide.norm() < 0.1


def test_misuse_says_what_was_expected() -> None:
    net = small()
    x, t, cond = inputs()
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 6, 6\], got \[4, 3, 8, 6\]"):
        net(torch.zeros(4, 3, 8, 6), t, cond)
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 6, 6\], got \[3, 6, 6\]"):
        net(x[0], t, cond)
    with pytest.raises(ValueError, match="expected 4 times and labels"):
        net(x, t[:1], cond)
    with pytest.raises(ValueError, match="expected 4 times and labels"):
        net(x, t, cond.take(torch.tensor([0])))
    with pytest.raises(TypeError, match="LabelCond, got Tensor"):
        net(x, t, cond.ids)
    with pytest.raises(ValueError, match=r"labels lie in 0\.\.4, or 5 for null, got 0\.\.6"):
        net(x, t, LabelCond(torch.tensor([0, 1, 2, 6])))
    with pytest.raises(ValueError, match="gate must be None"):
        net(x, t, cond, gate=torch.ones(4))
    with pytest.raises(ValueError, match=r"unknown tap 'end'; this network has blocks\.0, blocks\.1, blocks\.2, mid"):
        net(x, t, cond, taps=["end"])
    with pytest.raises(ValueError, match=r"model must be one of DiT-S/2, .*got 'DiT-H/2'"):
        dit_config("DiT-H/2", image_size=8, channels=1, num_classes=1)
    with pytest.raises(ValueError, match="patch_size must divide image_size 9, got 2"):
        dit_config("tiny", image_size=9, channels=1, num_classes=1)
    with pytest.raises(ValueError, match="num_heads must divide hidden_size 64, got 3"):
        dit_config("tiny", image_size=8, channels=1, num_classes=1, num_heads=3)
    with pytest.raises(ValueError, match="multiple of 4"):
        dit_config("tiny", image_size=8, channels=1, num_classes=1, hidden_size=18, num_heads=2)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        dit_config("tiny", image_size=8, channels=1, num_classes=0)


# ---------------------------------------------------------------- labels


def test_label_cond_rearranges() -> None:
    a, b = LabelCond(torch.tensor([1, 2, 3])), LabelCond(torch.tensor([7, 8, 9]))
    assert a.take(torch.tensor([2, 0])).ids.tolist() == [3, 1]
    assert a.where(torch.tensor([True, False, True]), b).ids.tolist() == [1, 8, 3]
    assert a.cat([b, a]).ids.tolist() == [1, 2, 3, 7, 8, 9, 1, 2, 3]
    assert a.cat([]).ids.tolist() == [1, 2, 3]
    assert len(a) == 3
    with pytest.raises(ValueError, match=r"int64 \[B\], got torch.float32 \[3\]"):
        LabelCond(torch.zeros(3))
    with pytest.raises(ValueError, match="3 other labels"):
        a.where(torch.tensor([True]), b)


def test_labels_are_drawn_by_their_probability() -> None:
    prob = torch.tensor([0.1, 0.6, 0.3])
    ids = LabelCond.sample(prob, (torch.arange(10_000) + 0.5) / 10_000).ids
    assert torch.bincount(ids).tolist() == [1000, 6000, 3000]
    assert torch.equal(LabelCond.sample(prob * 1234, torch.rand(5) * 0 + 0.5).ids, torch.ones(5).long())


def test_empty_classes_are_never_drawn() -> None:
    """Not at u = 0, not on the edges between classes, not at the last float below 1, and not through rounding."""
    prob = torch.tensor([0.0, 0.25, 0.0, 0.0, 0.5, 0.25, 0.0])
    edges = torch.tensor([0.0, 0.25, 0.75, 1 - 2.0**-24, 0.5])
    assert LabelCond.sample(prob, edges).ids.tolist() == [1, 4, 5, 5, 4]
    torch.manual_seed(0)
    for _ in range(50):
        prob = torch.rand(1000).double() * (torch.rand(1000) < 0.5)
        total = prob.cumsum(0) / prob.sum()
        u = torch.cat([total[total < 1], torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)])
        assert (prob[LabelCond.sample(prob, u).ids] > 0).all()


@pytest.mark.parametrize("prob", [[0.0, 0.0], [0.5, -0.5], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_bad_class_weights_are_refused(prob: list[float]) -> None:
    with pytest.raises(ValueError, match="finite, non-negative and not all 0"):
        LabelCond.sample(torch.tensor(prob), torch.zeros(1))


def test_out_keeps_what_it_is_given() -> None:
    out = Out(torch.zeros(1), {})
    assert out.variance is None
