"""Samples as text, for a checkpoint: what a later step learns from, exactly, without what only rewards looked at."""

import base64
import dataclasses
import io
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opd_trainer.types import Finish, Prompt, Sample, ScoreStatus, TopK


def pack(samples: Sequence[Sample]) -> str:
    """Every bit of the samples, except the metadata of their prompts; about 8 bytes a response token."""
    buffer = io.BytesIO()
    torch.save([_plain(sample) for sample in samples], buffer)
    return base64.b64encode(zlib.compress(buffer.getvalue(), level=1)).decode("ascii")


def unpack(text: str) -> list[Sample]:
    """The inverse of `pack`."""
    buffer = io.BytesIO(zlib.decompress(base64.b64decode(text)))
    return [_sample(state) for state in torch.load(buffer, weights_only=True)]


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, and tensors without the storage that they are a view of."""
    if dataclasses.is_dataclass(value):
        names = [entry.name for entry in dataclasses.fields(value) if entry.name != "metadata"]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Finish | ScoreStatus):
        return value.value
    return {str(key): float(part) for key, part in value.items()} if isinstance(value, dict) else value


def _sample(state: dict[str, Any]) -> Sample:
    candidates = {name: TopK(**state[name]) if state[name] else None for name in ("topk", "teacher_topk")}
    return Sample(
        **{
            **state,
            **candidates,
            "prompt": Prompt(**state["prompt"]),
            "finish": Finish(state["finish"]),
            "teacher_status": ScoreStatus(state["teacher_status"]),
        }
    )
