"""Reverse KL of a student to a teacher on held-out prompts, by transformers alone: the same measure for any trainer.

The student answers every prompt once, at temperature 1 with a fixed seed; at each of its tokens KL(student || teacher)
is taken over the whole vocabulary, in float32, and averaged over all tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

SEED = 0


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The result.

    Attributes:
        reverse_kl: mean over tokens, nats.
        standard_error: of the mean over responses.
        tokens: how many.
    """

    reverse_kl: float
    standard_error: float
    tokens: int


def token_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) [..., T] of logits [..., T, V]."""
    own, theirs = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return (own.exp() * (own - theirs)).sum(-1)


def response_mask(tokens: Tensor, eos: Sequence[int]) -> Tensor:
    """[N, R], the tokens of each response up to its first end-of-sequence token, that one included."""
    ended = torch.isin(tokens, torch.tensor(list(eos))).long()
    return ended.cumsum(-1) - ended == 0


def summarize(kl: Tensor, mask: Tensor) -> HeldOut:
    """Mean over unmasked tokens, and its standard error from the spread between responses (a ratio estimate)."""
    kl, count = kl.where(mask, 0.0).double(), mask.sum(-1).double()
    mean = kl.sum() / count.sum()
    residual = kl.sum(-1) - mean * count
    spread = residual.square().sum() * len(kl) / max(1, len(kl) - 1)
    return HeldOut(float(mean), float(spread.sqrt() / count.sum()), int(count.sum()))


@torch.inference_mode()
def held_out_kl(student: Path, teacher: Path, prompts: Sequence[Any], response_tokens: int, batch: int = 16) -> HeldOut:
    """Measures a Hugging Face folder; `prompts` are lists of chat messages.

    Args:
        student: its weights; the tokenizer is the teacher's.
        teacher: the other model.
        prompts: chat messages.
        response_tokens: longest response.
        batch: prompts at once.
    """
    tokenizer = AutoTokenizer.from_pretrained(teacher, padding_side="left")
    own: Any = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    theirs: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    stop = own.generation_config.eos_token_id
    eos = stop if isinstance(stop, list) else [stop]
    kls, masks = [], []
    torch.manual_seed(SEED)
    for start in range(0, len(prompts), batch):
        inputs = tokenizer.apply_chat_template(
            list(prompts[start : start + batch]),
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        width = inputs["input_ids"].shape[1]
        tokens = own.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=response_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        mask = response_mask(tokens[:, width:], eos)
        seen = torch.cat([inputs["attention_mask"], mask.long()], 1)
        options = {
            "attention_mask": seen,
            "position_ids": (seen.cumsum(-1) - 1).clamp_min(0),
            "logits_to_keep": mask.shape[1] + 1,
        }
        logits = [model(tokens, **options).logits[:, :-1] for model in (own, theirs)]
        short = response_tokens - mask.shape[1]
        kls.append(torch.nn.functional.pad(token_kl(*logits), (0, short)))
        masks.append(torch.nn.functional.pad(mask, (0, short)))
    return summarize(torch.cat(kls), torch.cat(masks))
