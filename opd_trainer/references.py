"""Rows that come with a response: what supervised fine-tuning learns, and what a model's likelihood is measured on.

N = rows, T = their tokens (prompt, response and end-of-sequence) laid end to end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_trainer import jagged
from opd_trainer.errors import DataError
from opd_trainer.types import Prompt, Scores, TokenBatch

Encode = Callable[[str], list[int]]
"""Text -> token ids without special tokens."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A prompt and the response to it.

    Attributes:
        prompt: of any dataset.
        response: i64[R] token ids, the end-of-sequence token included.
    """

    prompt: Prompt
    response: Tensor


@dataclass(frozen=True, slots=True)
class Referee:
    """Finds the response of a row.

    Attributes:
        encode: of the student's tokenizer.
        eos_token_id: that ends every response.
        key: column with the response.
        option: that names the column, for messages.
        is_label: whether the column is the one with the label, which a prompt keeps as its answer.
    """

    encode: Encode
    eos_token_id: int
    key: str
    option: str
    is_label: bool = False

    def __call__(self, prompt: Prompt) -> Reference:
        """The row with its response.

        Raises:
            DataError: it has no text in that column.
        """
        response = prompt.answer if self.is_label else prompt.metadata.get(self.key)
        if not isinstance(response, str):
            raise DataError(
                f"row {prompt.id} has no text in column {self.key!r}, where its response is looked for. "
                f"Set {self.option} to the column that holds it"
            )
        return Reference(prompt, torch.tensor([*self.encode(response), self.eos_token_id]))


def reference_batch(references: Sequence[Reference], version: int = 0) -> TokenBatch:
    """Rows laid end to end, with every token of the responses unmasked.

    Args:
        references: at least one.
        version: to write down as that of the policy.
    """
    lengths = torch.tensor([len(one.prompt.tokens) + len(one.response) for one in references])
    parts = [part for one in references for part in (one.prompt.tokens, one.response)]
    count, num_tokens = len(references), int(lengths.sum())
    return TokenBatch(
        tokens=torch.cat(parts),
        seq=jagged.seq_from_lengths(lengths),
        mask=torch.cat([torch.full((len(part),), number % 2 == 1) for number, part in enumerate(parts)]),
        group=torch.arange(count),
        reward=torch.full((count,), torch.nan),
        truncated=torch.zeros(count, dtype=torch.bool),
        teacher_name=tuple(one.prompt.teacher for one in references),
        rollout=Scores(log_probs=torch.full((num_tokens,), torch.nan), temperature=1.0, model="none"),
        version=torch.full((count,), version),
    )
