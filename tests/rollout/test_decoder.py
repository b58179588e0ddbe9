import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from opd_trainer.rollout.embedded import decoder
from opd_trainer.rollout.embedded.shape import DecoderShape
from opd_trainer.rollout.embedded.weights import DecoderWeights
from tests.rollout.models import CONFIGS, VOCAB_SIZE, random_model, tensors


def all_logits(model: torch.nn.Module, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    shape = DecoderShape.from_config(model.config)
    weights = DecoderWeights(shape, dtype, torch.device("cpu"))
    weights.begin()
    weights.fill(tensors(model))
    weights.finish()

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.unflatten(0, tokens.shape).transpose(1, 2) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)

    rotation = decoder.rotations(shape, tokens.shape[1], tokens.device).repeat(len(tokens), 1)
    hidden = decoder.forward(weights, tokens.flatten(), rotation, attend)
    return decoder.logits(weights, hidden).unflatten(0, tokens.shape)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name: str):
    model = random_model(CONFIGS[name])
    tokens = torch.randint(0, VOCAB_SIZE, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(all_logits(model, tokens, torch.float32), expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_stays_near_float32():
    model = random_model(CONFIGS["qwen3"], scale=0.1)
    tokens = torch.randint(0, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(1))
    exact, rounded = (all_logits(model, tokens, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.float32
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 0.03


def test_rms_norm_keeps_the_dtype_and_computes_in_float32():
    x = torch.tensor([[3e19, 4e19, 0.0, 0.0]], dtype=torch.bfloat16)
    normed = decoder.rms_norm(x.clamp(max=1e18), torch.ones(4, dtype=torch.bfloat16), 1e-6)
    assert normed.dtype == torch.bfloat16
    torch.testing.assert_close(normed.float().square().mean(), torch.tensor(1.0), atol=0.02, rtol=0)
