"""Tiny random transformers models, requests, and the engine's parts over them."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from opd_trainer.rollout.config import EmbeddedRollout
from opd_trainer.rollout.embedded.worker import EmbeddedSpec, EmbeddedWorker
from opd_trainer.types import Prompt, Request, Sample, Sampling, WeightStream

VOCAB_SIZE = 37
EOS = 1
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "llama_tied_biased": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama3_rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2_tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
    "qwen3_tied_yarn": Qwen3Config(**SIZES, tie_word_embeddings=True, rope_parameters=YARN),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True),
    "qwen3_moe_unnormalized": Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=False),
}


class Words:
    """A tokenizer whose tokens are their numbers; EOS is special."""

    def batch_decode(self, responses: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(t) for t in tokens if not (skip_special_tokens and t == EOS)) for tokens in responses]


def random_model(config: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """Every parameter is drawn, also norms and biases, so that none can hide."""
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + scale * noise if parameter.dim() == 1 else scale * noise)
    return model.eval()


def tensors(model: Any) -> list[tuple[str, Tensor]]:
    """Under the names of files, where experts are apart."""
    found: list[tuple[str, Tensor]] = []
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if not path.endswith(".experts"):
            found.append((name, parameter.detach()))
            continue
        projections = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        for index, expert in enumerate(parameter.detach()):
            parts = zip(projections, expert.chunk(len(projections)), strict=True)
            found += [(f"{path}.{index}.{projection}.weight", part) for projection, part in parts]
    return found


def stream(named: Sequence[tuple[str, Tensor]], version: int, bucket: int = 5) -> WeightStream:
    async def buckets() -> AsyncIterator[list[tuple[str, Tensor]]]:
        for first in range(0, len(named), bucket):
            yield list(named[first : first + bucket])

    return WeightStream(version, buckets())


def spec(config: Any, **sizes: Any) -> EmbeddedSpec:
    return EmbeddedSpec(config, Words(), (EOS,), EmbeddedRollout(**sizes))


def loaded_worker(model: Any, version: int = 1, **sizes: Any) -> EmbeddedWorker:
    worker = EmbeddedWorker(spec(model.config, **sizes))
    worker.start()
    worker.load_bucket(tensors(model))
    worker.commit(version)
    return worker


def requests(prompts: int = 6, siblings: int = 2, seed: int = 0, longest: int = 11) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(prompts):
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        tokens = torch.randint(2, VOCAB_SIZE, (length,), generator=generator)
        prompt = Prompt(id=f"p{number}", tokens=tokens, text="")
        made += [Request(prompt=prompt, index=i, seed=1000 * number + i) for i in range(siblings)]
    return made


def sampling(**changes: Any) -> Sampling:
    settings: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_response_tokens": 20,
        "stop_token_ids": (),
    }
    return Sampling(**(settings | changes))


def finish(worker: EmbeddedWorker, asked: Sequence[Request], how: Sampling) -> list[Sample]:
    worker.begin(asked, how)
    return worker.poll(1e9).samples


def by_request(samples: Sequence[Sample]) -> dict[tuple[str, int], Sample]:
    return {(sample.prompt.id, sample.index): sample for sample in samples}


def reference_log_probs(model: Any, sample: Sample, temperature: float = 1.0) -> Tensor:
    """What transformers says of a sample's tokens, in one pass over the whole sequence."""
    tokens = torch.cat([sample.prompt.tokens, sample.response])
    with torch.no_grad():
        log_probs = (model(tokens[None]).logits[0].float() / temperature).log_softmax(-1)
    before = len(sample.prompt.tokens) - 1
    return log_probs[before:-1].gather(-1, sample.response[:, None]).squeeze(-1)
