"""An endless, resumable stream of prompts: each epoch in an order of its own, several datasets in fixed proportions."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from opd_trainer.data.prompts import PromptSet
from opd_trainer.errors import DataError
from opd_trainer.types import Prompt

STEPS_AHEAD = 100
"""Steps that are looked at beforehand: how many prompts a dataset gives differs by one or two from step to step."""


@dataclass(slots=True)
class Cursor:
    """A place in one dataset.

    Attributes:
        epoch: times the dataset was begun, from 0.
        position: prompts of the epoch already given.
        given: prompts given in all epochs.
    """

    prompts: PromptSet
    epoch: int = 0
    position: int = 0
    given: int = 0
    order: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shuffle()

    def shuffle(self) -> None:
        """The order of the epoch, a function of (shuffle seed, epoch) alone."""
        self.order = list(range(len(self.prompts.prompts)))
        random.Random(f"{self.prompts.shuffle_seed}:{self.epoch}").shuffle(self.order)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts, all different: an epoch's rest that is too short is passed over."""
        if count > len(self.order):
            raise DataError(
                f"{self.prompts.name}: a step takes {count} different prompts, but there are only {len(self.order)}. "
                "Take fewer prompts in a step"
            )
        if self.position + count > len(self.order):
            self.epoch, self.position = self.epoch + 1, 0
            self.shuffle()
        chosen = self.order[self.position : self.position + count]
        self.position += count
        self.given += count
        return [self.prompts.prompts[index] for index in chosen]


class PromptStream:
    """Prompts for one step after another.

    Datasets take turns so that after any number of prompts each has given its share to within one prompt; nothing is
    drawn at random but the order of an epoch.
    """

    def __init__(self, sets: Sequence[PromptSet]) -> None:
        self._cursors = [Cursor(prompts) for prompts in sets]
        self._shares = [prompts.weight / sum(p.weight for p in sets) for prompts in sets]

    @classmethod
    def of(cls, prompts: Sequence[Prompt], shuffle_seed: int = 0) -> Self:
        """A stream over one list of prompts."""
        return cls([PromptSet("train", prompts, shuffle_seed=shuffle_seed)])

    def check(self, count: int, option: str) -> None:
        """Refuses steps that are larger than a dataset, before the first of them.

        Args:
            count: prompts of a step.
            option: dotted key of the setting that says so.

        Raises:
            DataError: a dataset has fewer prompts than its part of one step.
        """
        given = [0] * len(self._cursors)
        steps = [self._turns(count, given) for _ in range(STEPS_AHEAD)]
        for index, cursor in enumerate(self._cursors):
            asked, there = max(turns.count(index) for turns in steps), len(cursor.order)
            if asked > there:
                raise DataError(
                    f"{cursor.prompts.name}: a step of {option}={count} takes up to {asked} different prompts of it, "
                    f"but there are only {there}. Lower {option}"
                )

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts, all different.

        Raises:
            DataError: a dataset has fewer prompts than its part of one step.
        """
        turns = self._turns(count, [cursor.given for cursor in self._cursors])
        taken = [iter(cursor.take(turns.count(index))) for index, cursor in enumerate(self._cursors)]
        return [next(taken[index]) for index in turns]

    def _turns(self, count: int, given: list[int]) -> list[int]:
        """Which dataset gives each of the next `count` prompts; `given` is what each has given, and goes on."""
        turns: list[int] = []
        for _ in range(count):
            total = sum(given) + 1
            behind = [share * total - have for share, have in zip(self._shares, given, strict=True)]
            turn = behind.index(max(behind))
            given[turn] += 1
            turns.append(turn)
        return turns

    def state_dict(self) -> dict[str, Any]:
        """The place in every dataset, plain numbers and text."""
        return {
            cursor.prompts.name: {
                "epoch": cursor.epoch,
                "position": cursor.position,
                "given": cursor.given,
                "fingerprint": fingerprint(cursor.prompts),
            }
            for cursor in self._cursors
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a place that `state_dict` told.

        Raises:
            DataError: the datasets are not those of the checkpoint, so that the place means nothing.
        """
        names = [cursor.prompts.name for cursor in self._cursors]
        if set(state) != set(names):
            raise DataError(f"the checkpoint was at a place in {', '.join(state)}, but the data are {', '.join(names)}")
        for cursor in self._cursors:
            place = state[cursor.prompts.name]
            if place["fingerprint"] != fingerprint(cursor.prompts):
                raise DataError(
                    f"{cursor.prompts.name}: its prompts or data.shuffle_seed changed since the checkpoint, so the run "
                    "cannot go on where it was. Restore them, or start anew with resume=never"
                )
            cursor.epoch, cursor.position, cursor.given = place["epoch"], place["position"], place["given"]
            cursor.shuffle()


def fingerprint(prompts: PromptSet) -> str:
    """Changes with the prompts, their order and the shuffle seed."""
    digest = hashlib.blake2b(str(prompts.shuffle_seed).encode(), digest_size=8)
    for prompt in prompts.prompts:
        digest.update(prompt.id.encode() + b"\n")
    return digest.hexdigest()
