import pytest
import torch

from opd_trainer.errors import ShapeMismatch
from opd_trainer.rollout.embedded.shape import DecoderShape
from opd_trainer.rollout.embedded.weights import DecoderWeights
from tests.rollout.models import CONFIGS, random_model, tensors


def empty(name: str = "qwen3") -> DecoderWeights:
    weights = DecoderWeights(DecoderShape.from_config(CONFIGS[name]), torch.float32, torch.device("cpu"))
    weights.begin()
    return weights


@pytest.mark.parametrize("name", CONFIGS)
def test_the_names_are_those_of_transformers(name: str):
    assert empty(name).names == {name for name, _ in tensors(random_model(CONFIGS[name]))}


def test_missing_tensors_are_named():
    weights = empty()
    named = tensors(random_model(CONFIGS["qwen3"]))
    weights.fill(named[:-2])
    with pytest.raises(ShapeMismatch, match="2 tensors did not come") as error:
        weights.finish()
    assert all(name in str(error.value) for name, _ in named[-2:])


def test_a_long_list_of_missing_tensors_is_cut():
    with pytest.raises(ShapeMismatch, match="and 17 more"):
        empty().finish()


def test_an_unknown_tensor_is_refused():
    with pytest.raises(ShapeMismatch, match=r"model\.extra\.weight is unknown"):
        empty().fill([("model.extra.weight", torch.zeros(1))])


def test_a_tensor_that_comes_twice_is_refused():
    named = tensors(random_model(CONFIGS["qwen3"]))[:1]
    weights = empty()
    weights.fill(named)
    with pytest.raises(ShapeMismatch, match="came twice"):
        weights.fill(named)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ShapeMismatch, match=r"\(3, 32\).*\(32, 32\)"):
        empty().fill([("model.layers.0.self_attn.q_proj.weight", torch.zeros(3, 32))])
