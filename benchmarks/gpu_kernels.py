"""Log-probs against the bandwidth of the card, and tokens per second of the embedded engine."""

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import Qwen3Config

from benchmarks.gpu_card import Card
from opd_trainer.megatron import log_probs as own
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.log_probs import token_log_probs
from opd_trainer.rollout.config import EmbeddedRollout
from opd_trainer.rollout.embedded.worker import EmbeddedSpec, EmbeddedWorker
from opd_trainer.types import Prompt, Request, Sampling

VOCAB_SIZE = 151_936


def log_probs(card: Card, copy_bytes_per_s: float) -> list[dict[str, Any]]:
    """Ours, ours as on a CPU, and log-softmax in fp32. The floor reads the logits once, with the gradient twice, and
    writes the gradient once."""
    tokens, vocab_size = (64, 997) if card.tiny else (4096, VOCAB_SIZE)
    chunk = MegatronConfig().log_prob_chunk_tokens
    targets = torch.randint(0, vocab_size, (tokens,), device=card.device)
    logits = torch.empty(tokens, vocab_size, dtype=torch.bfloat16, device=card.device).uniform_(-4, 4)

    def ours(wanted: Tensor) -> Tensor:
        return token_log_probs(wanted, targets, temperature=1.0, vocab_size=vocab_size, chunk_tokens=chunk)[0]

    def naive(wanted: Tensor) -> Tensor:
        return wanted.float().log_softmax(1).gather(1, targets[:, None])[:, 0]

    exact = naive(logits)
    found = [
        _timed(card, name, way, logits, exact, copy_bytes_per_s)
        for name, way in (("log_softmax", naive), ("ours", ours))
    ]
    with patch.object(own, "_has_kernel", lambda _: False):
        found.append(_timed(card, f"chunks of {chunk}", ours, logits, exact, copy_bytes_per_s))
    del logits, exact
    card.forget()
    return found


def _timed(
    card: Card, name: str, way: Callable[[Tensor], Tensor], logits: Tensor, exact: Tensor, copy_bytes_per_s: float
) -> dict[str, Any]:
    def forward() -> Tensor:
        with torch.no_grad():
            return way(logits)

    def both() -> None:
        leaf = logits.detach().requires_grad_()
        way(leaf).sum().backward()

    row: dict[str, Any] = {"way": name, "error": float((forward() - exact).abs().max())}
    for kind, run, passes in (("forward", forward, 1), ("both", both, 3)):
        seconds = card.seconds(run)
        row |= {f"{kind}_ms": 1e3 * seconds, f"{kind}_peak_gib": card.peak_bytes(run) / 2**30}
        row[f"{kind}_to_floor"] = seconds / (passes * logits.nbytes / copy_bytes_per_s)
    return row


class Numbers:
    """A tokenizer whose tokens are their numbers."""

    def batch_decode(self, responses: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, tokens)) for tokens in responses]


def engine(card: Card, rollout: EmbeddedRollout) -> EmbeddedWorker:
    """The embedded engine with random weights in the shape of Qwen3-0.6B."""
    sizes = (97, 64, 2, 4, 96, 2, 16) if card.tiny else (VOCAB_SIZE, 1024, 28, 16, 3072, 8, 128)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    names = (*names, "num_key_value_heads", "head_dim")
    shape: dict[str, Any] = dict(zip(names, sizes, strict=True))
    config = Qwen3Config(**shape, max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=None)
    dtype = torch.bfloat16 if card.gpu else torch.float32
    worker = EmbeddedWorker(EmbeddedSpec(config, Numbers(), (), rollout, dtype, str(card.device)))
    worker.start()
    weights: Any = worker._weights
    for name in sorted(weights.names):
        size = weights._slots[name].size
        drawn = torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size, device=card.device)
        if name == min(weights.names):
            worker.load_bucket([])
        worker.load_bucket([(name, drawn)])
    worker.commit(0)
    return worker


def rollouts(card: Card, batch: int, *, graphs: bool) -> dict[str, Any]:
    """One batch of responses of a fixed length; the second time, when every size has been captured."""
    prompt, response = (4, 12) if card.tiny else (128, 256)
    worker = engine(card, EmbeddedRollout(batch_size=batch, cuda_graphs=graphs, kv_cache_bytes=32 << 30))
    tokens = torch.randint(2, 90, (batch, prompt))
    asked = [Request(prompt=Prompt(id=str(i), tokens=tokens[i], text=""), index=0, seed=i) for i in range(batch)]
    how = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=response, stop_token_ids=())
    taken, drawn = [], []
    for _ in range(2 if graphs or card.tiny else 1):
        card.wait()
        began = time.perf_counter()
        worker.begin(asked, how)
        drawn = worker.poll(1e9).samples
        taken.append(time.perf_counter() - began)
    worker.close()
    card.forget()
    count = sum(len(sample.response) for sample in drawn)
    return {"batch": batch, "graphs": graphs, "tokens": count, "first_s": taken[0], "tokens_per_s": count / taken[-1]}
