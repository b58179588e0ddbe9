"""The models behind the fake server: true log-probs of a real, small model, or of a table where speed counts.

L = tokens of a sequence, V = vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class FakeModel(Protocol):
    """A language model in a few lines."""

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def max_length(self) -> int:
        """Context length, tokens."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a response."""
        ...

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """f32[L, V]: row t scores the token after tokens[: t + 1]."""
        ...

    def load(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Overwrites parameters by name.

        Raises:
            KeyError: there is no such parameter.
        """
        ...


class TableModel:
    """The next token depends on the last one alone, through a random table "table" [V, V].

    Args:
        vocab_size: V.
        seed: of the table.
        max_length: context length, tokens.
        eos_token_ids: tokens that end a response.
    """

    def __init__(
        self, vocab_size: int, seed: int = 0, max_length: int = 4096, eos_token_ids: Sequence[int] = (1,)
    ) -> None:
        self.vocab_size, self.max_length, self.eos_token_ids = vocab_size, max_length, frozenset(eos_token_ids)
        self.table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed))

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """See `FakeModel`."""
        return self.table[torch.tensor(tokens)]

    def load(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """See `FakeModel`."""
        _copy({"table": self.table}, named)


class TransformersModel:
    """A Hugging Face folder, run by transformers in fp32 on CPU.

    Args:
        folder: the folder.
        dummy: take its shape alone, with random weights.
    """

    def __init__(self, folder: Path, *, dummy: bool = False) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        if dummy:
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model = model.eval()
        self.vocab_size: int = model.config.vocab_size
        self.max_length: int = model.config.max_position_embeddings
        ends = model.generation_config.eos_token_id
        self.eos_token_ids = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """See `FakeModel`."""
        with torch.no_grad():
            return self._model(torch.tensor([list(tokens)])).logits[0].float()

    def load(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """See `FakeModel`."""
        _copy(self._model.state_dict(), named)


def open_model(path: str, *, dummy: bool = False) -> FakeModel:
    """A Hugging Face folder, with random weights if `dummy`, or `table:<vocabulary>:<seed>`."""
    if path.startswith("table:"):
        _, vocab_size, seed = path.split(":")
        return TableModel(int(vocab_size), int(seed))
    return TransformersModel(Path(path), dummy=dummy)


def _copy(parameters: Mapping[str, Tensor], named: Sequence[tuple[str, Tensor]]) -> None:
    with torch.no_grad():
        for name, tensor in named:
            parameters[name].copy_(tensor)
