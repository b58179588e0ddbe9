"""Which sequences share a micro-batch, and which data-parallel rank computes it.

N = sequences, T = tokens of all sequences. First-fit decreasing decides how many micro-batches a budget needs; the
sequences are then spread over that many so that every rank has about the same work. Sequences are never cut. Everything
is a function of the lengths alone, so that a resumed run packs as the uninterrupted one did.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_trainer import jagged

CROSSOVER_TOKENS = 16384
"""Length at which causal attention costs about as much as the matrices of a layer: 12 * hidden size, for a width of
1365. Only the balance between ranks depends on it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The micro-batches of one optimizer step.

    Attributes:
        ranks: for each data-parallel rank its micro-batches, each a tuple of sequence indices. Every rank has the same
            number of them, at least one; an empty one computes nothing and takes part in the collectives.
        lengths: tokens of each sequence.
    """

    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    lengths: tuple[int, ...]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of each data-parallel rank."""
        return len(self.ranks[0])

    @property
    def efficiency(self) -> float:
        """Real tokens / tokens that all ranks could have computed while the fullest one works; 1 for a single rank."""
        tokens = [sum(self.lengths[i] for micro_batch in rank for i in micro_batch) for rank in self.ranks]
        return sum(tokens) / (len(tokens) * max(tokens)) if max(tokens) else 1.0


@dataclass(slots=True)
class _Bin:
    """A micro-batch in the making."""

    sequences: list[int]
    tokens: int
    cost: int

    def add(self, index: int, length: int) -> None:
        self.sequences.append(index)
        self.tokens += length
        self.cost += cost(length)


def cost(length: int) -> int:
    """Work of one sequence: linear in its tokens for the matrices, quadratic for causal attention."""
    return length * (CROSSOVER_TOKENS + length)


def _first_fit(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[_Bin]:
    bins: list[_Bin] = []
    for index in order:
        target = next((b for b in bins if b.tokens + lengths[index] <= max_tokens), None)
        if target is None:
            target = _Bin([], 0, 0)
            bins.append(target)
        target.add(index, lengths[index])
    return bins


def _level(order: Sequence[int], lengths: Sequence[int], max_tokens: int, count: int) -> list[_Bin] | None:
    """Each sequence into the cheapest of `count` bins that has room; None when some sequence finds none."""
    heap = [(0, number) for number in range(count)]
    bins = [_Bin([], 0, 0) for _ in range(count)]
    for index in order:
        full = []
        while heap:
            entry = heapq.heappop(heap)
            target = bins[entry[1]]
            if not target.sequences or target.tokens + lengths[index] <= max_tokens:
                target.add(index, lengths[index])
                full.append((target.cost, entry[1]))
                break
            full.append(entry)
        else:
            return None
        for entry in full:
            heapq.heappush(heap, entry)
    return bins


def plan(lengths: Sequence[int], dp_size: int, max_tokens: int) -> Plan:
    """Packs sequences into micro-batches of at most `max_tokens` tokens and spreads them over the ranks.

    Args:
        lengths: tokens of each sequence.
        dp_size: data-parallel ranks.
        max_tokens: budget of a micro-batch; a longer sequence gets a micro-batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    first_fit = _first_fit(order, lengths, max_tokens)
    per_rank = max(1, -(-len(first_fit) // dp_size))
    count = per_rank * dp_size
    # Levelling may fail where first-fit succeeds, because it fills all bins alike; first-fit's bins are always valid.
    bins = _level(order, lengths, max_tokens, count) or first_fit
    bins += [_Bin([], 0, 0) for _ in range(count - len(bins))]
    ranks: list[list[_Bin]] = [[] for _ in range(dp_size)]
    for candidate in sorted(bins, key=lambda b: -b.cost):
        open_ranks = [rank for rank in ranks if len(rank) < per_rank]
        min(open_ranks, key=lambda rank: sum(b.cost for b in rank)).append(candidate)
    return Plan(
        tuple(tuple(tuple(sorted(b.sequences)) for b in rank) for rank in ranks),
        tuple(lengths),
    )


def merge(plan: Plan, results: Sequence[Sequence[Tensor]]) -> Tensor:
    """Per-token results of the ranks, in the token order of the batch that was planned.

    Args:
        plan: what was computed where.
        results: for each data-parallel rank and micro-batch the values of its tokens, in the order of its sequences.

    Returns:
        [T, ...], of the results' dtype.
    """
    lengths = torch.tensor(plan.lengths, dtype=torch.int64)
    pieces = [values for rank in results for values in rank]
    order = [index for rank in plan.ranks for micro_batch in rank for index in micro_batch]
    flat = torch.cat(pieces)
    merged = torch.empty_like(flat)
    merged[jagged.token_index(lengths, torch.tensor(order, dtype=torch.int64))] = flat
    return merged
