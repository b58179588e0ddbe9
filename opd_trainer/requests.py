"""What is asked of an engine: requests whose randomness depends on what they are, never on when they are made."""

import hashlib
from collections.abc import Iterable, Sequence

from opd_trainer.types import Prompt, Request, Sample


def request_seed(*key: int | str) -> int:
    """A seed in [0, 2^63) that depends on `key` alone: run seed, step, prompt id, sibling."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def requests_for(prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, phase: int | str) -> list[Request]:
    """`samples_per_prompt` requests for each prompt, seeded by (seed, phase, prompt id, sibling)."""
    return [
        Request(prompt=prompt, index=index, seed=request_seed(seed, phase, prompt.id, index))
        for prompt in prompts
        for index in range(samples_per_prompt)
    ]


def in_order(samples: Iterable[Sample], requests: Sequence[Request]) -> list[Sample]:
    """Samples, which finish in any order, in that of their requests."""
    order = {(request.prompt.id, request.index): rank for rank, request in enumerate(requests)}
    return sorted(samples, key=lambda sample: order[sample.prompt.id, sample.index])
