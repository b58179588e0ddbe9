"""Ragged arithmetic on one flat axis: N sequences end to end in [T], with `seq[T]` naming the sequence of each token.

T = tokens of all sequences, N = sequences, G = groups. Masked entries may hold NaN: they are replaced before any
arithmetic, because 0 * NaN is NaN in a value and in a gradient.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def lengths_of(seq: Int64[Tensor, " T"], num_sequences: int) -> Int64[Tensor, " N"]:
    """Number of tokens of each sequence."""
    return torch.bincount(seq, minlength=num_sequences)


def seq_from_lengths(lengths: Int64[Tensor, " N"]) -> Int64[Tensor, " T"]:
    """The sequence index of every token, for sequences of the given lengths laid end to end."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def positions(lengths: Int64[Tensor, " N"]) -> Int64[Tensor, " T"]:
    """The position of every token inside its own sequence, starting at 0."""
    starts = torch.cumsum(lengths, 0) - lengths
    return torch.arange(int(lengths.sum()), device=lengths.device) - torch.repeat_interleave(starts, lengths)


def token_index(lengths: Int64[Tensor, " N"], sequences: Int64[Tensor, " M"]) -> Int64[Tensor, " S"]:
    """Indices into [T] of the tokens of `sequences`, in that order."""
    starts = torch.cumsum(lengths, 0) - lengths
    chosen = lengths[sequences]
    return positions(chosen) + torch.repeat_interleave(starts[sequences], chosen)


def sum_by(
    values: Float[Tensor, " T"], seq: Int64[Tensor, " T"], mask: Bool[Tensor, " T"], num_sequences: int
) -> Float[Tensor, " N"]:
    """Sum of the unmasked values of each sequence; 0 where a sequence has none."""
    clean = torch.where(mask, values, 0.0)
    return torch.zeros(num_sequences, dtype=values.dtype, device=values.device).index_add(0, seq, clean)


def count_by(seq: Int64[Tensor, " T"], mask: Bool[Tensor, " T"], num_sequences: int) -> Int64[Tensor, " N"]:
    """Number of unmasked tokens of each sequence."""
    return torch.zeros(num_sequences, dtype=torch.int64, device=seq.device).index_add(0, seq, mask.long())


def mean_by(
    values: Float[Tensor, " T"], seq: Int64[Tensor, " T"], mask: Bool[Tensor, " T"], num_sequences: int
) -> Float[Tensor, " N"]:
    """Mean of the unmasked values of each sequence; 0 where a sequence has none."""
    return sum_by(values, seq, mask, num_sequences) / count_by(seq, mask, num_sequences).clamp_min(1)


def whiten(values: Float[Tensor, " T"], mask: Bool[Tensor, " T"], epsilon: float = 1e-8) -> Float[Tensor, " T"]:
    """Masked whitening over the whole axis: (x - mean) / sqrt(var + epsilon), biased variance; 0 where masked."""
    count = mask.sum().clamp_min(1)
    clean = torch.where(mask, values, 0.0)
    mean = clean.sum() / count
    centred = torch.where(mask, clean - mean, 0.0)
    variance = centred.square().sum() / count
    return centred * torch.rsqrt(variance + epsilon)


def sum_before(
    values: Float[Tensor, " T"], seq: Int64[Tensor, " T"], mask: Bool[Tensor, " T"], num_sequences: int
) -> Float[Tensor, " T"]:
    """Sum of the unmasked values that come before each token in its own sequence; accumulated in float64."""
    clean = torch.where(mask, values, 0.0).double()
    before = torch.cumsum(clean, 0) - clean
    totals = torch.zeros(num_sequences, dtype=torch.float64, device=values.device).index_add(0, seq, clean)
    offsets = torch.cumsum(totals, 0) - totals
    return (before - offsets[seq]).to(values.dtype)


def rank_of(seq: Int64[Tensor, " T"], mask: Bool[Tensor, " T"], num_sequences: int) -> Int64[Tensor, " T"]:
    """How many unmasked tokens come before each token in its own sequence."""
    ones = mask.long()
    before = torch.cumsum(ones, 0) - ones
    counts = count_by(seq, mask, num_sequences)
    return before - (torch.cumsum(counts, 0) - counts)[seq]


def last_of(seq: Int64[Tensor, " T"], mask: Bool[Tensor, " T"], num_sequences: int) -> Bool[Tensor, " T"]:
    """The last unmasked token of each sequence."""
    return mask & (rank_of(seq, mask, num_sequences) == count_by(seq, mask, num_sequences)[seq] - 1)
