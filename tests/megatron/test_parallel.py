"""The same models and batch give the same update in every parallel layout."""

import pytest
import torch

from opd_trainer.megatron.config import Recompute
from opd_trainer.model.config import Family
from tests.megatron import parity
from tests.megatron.parity import LAYOUTS, difference, outcomes

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return outcomes(tmp_path_factory.mktemp("parity"), LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_equals_one_process(runs, layout):
    alone, found = runs[parity.alone(layout).name], runs[layout.name]
    assert difference(alone, found).largest < TOLERANCE
    assert found.grad_norm == pytest.approx(alone.grad_norm, rel=TOLERANCE)
    assert all(torch.equal(tensor, found.weights[name]) for name, tensor in alone.weights.items())
    assert found.flop == alone.flop


def test_the_update_depends_on_everything_that_is_compared(runs):
    """Otherwise layouts could agree because nothing happens."""
    for family in (Family.qwen3, Family.qwen3_moe):
        found = runs[family.value]
        scored = ~found.log_probs.isnan()
        assert int(scored.sum()) == sum(parity.RESPONSES)
        assert float((found.log_probs - found.teacher)[scored].abs().mean()) > 0.1
        assert all(float(tensor.abs().max()) > 1e-5 for tensor in found.gradient.values())


def test_recomputation_is_bit_exact(runs):
    for name, base in (
        ("recompute full", "qwen3"),
        ("recompute selective", "qwen3"),
        ("moe recompute full", "qwen3_moe"),
    ):
        assert difference(runs[base], runs[name]).largest == 0.0


def test_every_way_of_recomputing_is_compared():
    used = {layout.settings.get("recompute", Recompute.none) for layout in LAYOUTS}
    assert used == set(Recompute)
