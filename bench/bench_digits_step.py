"""One training step of the digits demo with CBDM: with the compiled operations, and with their references."""

from dataclasses import replace

import pytest

from imbdiff import ops
from imbdiff.commands.demo import REMEDY
from imbdiff.data import DataOrder, load_training_data
from imbdiff.train.batch import BatchSource
from imbdiff.train.build import build_objective
from imbdiff.train.config import PRESETS
from imbdiff.train.loop import backward
from imbdiff.train.state import TrainState

from .harness import MAIN, Case

pytest.importorskip("sklearn", reason="the digits are scikit-learn's: pip install 'imbdiff[demo]'")


def case():
    config = replace(PRESETS["digits"][1], methods=("cbdm",), cbdm=REMEDY)
    data = load_training_data(config.data)
    objective = build_objective(config, data.train.shape, data.train.num_classes).train()
    source = BatchSource(
        images=data.train,
        order=DataOrder(data.train.labels, data.counts, config.seed, config.data.prior_exponent),
        path=objective.path,
        counts=data.counts,
        seed=config.seed,
        drop_prob=config.diffusion.drop_prob,
        drop_scope=config.diffusion.drop_scope,
        flip=config.flip,
    )
    state = TrainState(config, objective)

    def step(backend):
        def run():
            with ops.use(backend):
                backward(config, state, source)
            gradients = [p.grad for p in objective.parameters() if p.grad is not None]
            state.optimizer.zero_grad(set_to_none=True)
            return gradients

        return run

    pixels = config.batch_size * data.train.images[0].numel()
    return Case(
        op="digits_step",
        shape=f"{config.batch_size}x{data.train.images[0].numel()}",
        dtype="float32",
        modes={MAIN: {"imbdiff": step("auto"), "reference": step("reference")}},
        bytes_moved={MAIN: 32 * pixels},
        flops={MAIN: 14 * pixels},
    )


def test_digits_step(compare):
    compare(case)
