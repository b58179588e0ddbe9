"""Tiny Hugging Face folders that real servers, the fake one and transformers all load."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_trainer.demo.arithmetic import VOCABULARY, save_tokenizer

VOCAB_SIZE = 64
EOS_ID = VOCABULARY.index("<eos>")


def save_tiny(folder: Path, seed: int, *, dtype: str = "float32", max_length: int = 512) -> Path:
    """A random Qwen3 with sharp enough logits to tell tokens apart, and the demo's tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        eos_token_id=EOS_ID,
        bos_token_id=None,
        pad_token_id=VOCABULARY.index("<pad>"),
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.15 * noise)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def log_probs(model: Any, tokens: list[int], temperature: float = 1.0) -> Tensor:
    """f32[len - 1, vocab]: row t is the distribution of token t + 1."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    return (logits / temperature).log_softmax(-1)


def sampled(model: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """f32[R] log-probs of `response` after `prompt`."""
    rows = log_probs(model, [*prompt, *response], temperature)[len(prompt) - 1 :]
    return rows.gather(1, torch.tensor(response)[:, None])[:, 0]
