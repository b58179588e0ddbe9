import pytest
from transformers import GPT2Config, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from opd_trainer.errors import UserError
from opd_trainer.rollout.embedded.shape import DecoderShape
from tests.rollout.models import CONFIGS, EXPERTS, SIZES


def test_head_dim_defaults_to_an_even_share_of_the_hidden_size():
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    assert DecoderShape.from_config(Qwen2Config(**sizes)).head_dim == 8


@pytest.mark.parametrize(("name", "qkv", "output"), [("llama", False, False), ("qwen2", True, False)])
def test_biases_follow_the_family(name: str, qkv: bool, output: bool):
    shape = DecoderShape.from_config(CONFIGS[name])
    assert (shape.qkv_bias, shape.output_bias) == (qkv, output)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (GPT2Config(), "model_type 'gpt2'"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act 'gelu'"),
        (Qwen3MoeConfig(**SIZES, **EXPERTS, mlp_only_layers=[1]), "layers without experts"),
        (Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1), "sliding-window"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type 'dynamic'",
        ),
    ],
)
def test_what_it_cannot_decode_is_named_with_the_way_out(config: object, named: str):
    with pytest.raises(UserError, match=named) as error:
        DecoderShape.from_config(config)
    assert "rollout=sglang" in str(error.value)
