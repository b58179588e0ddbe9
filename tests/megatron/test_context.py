import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from opd_trainer import jagged
from opd_trainer.megatron.attention import Keys, Packed, attention_input, padded_attention
from opd_trainer.megatron.context import owners, share, tokens_per_rank

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)
RANKS = st.integers(1, 5)


def shares(lengths, ranks, spare=0):
    lengths = torch.tensor(lengths)
    size = tokens_per_rank(lengths, ranks) + spare
    return [share(lengths, rank, ranks, size) for rank in range(ranks)]


@given(LENGTHS, RANKS, st.integers(0, 3))
def test_every_token_belongs_to_one_rank(lengths, ranks, spare):
    parts = shares(lengths, ranks, spare)
    assert sorted(torch.cat([part.tokens for part in parts]).tolist()) == list(range(sum(lengths)))
    for part in parts:
        assert torch.equal(part.mine.nonzero().squeeze(1), part.tokens)
        assert torch.equal(part.row[part.tokens], torch.arange(len(part.tokens)))
        assert len(part.tokens) <= part.size == parts[0].size
        assert int(part.cu_seqlens[-1]) == part.size


@given(LENGTHS, RANKS, st.integers(0, 3))
def test_every_token_sees_its_sequence_up_to_itself(lengths, ranks, spare):
    """In terms of (sequence, position), from the rows of all ranks laid end to end."""
    parts = shares(lengths, ranks, spare)
    seq, positions = jagged.seq_from_lengths(torch.tensor(lengths)), jagged.positions(torch.tensor(lengths))
    everywhere = torch.full((ranks * parts[0].size,), -1)
    for rank, part in enumerate(parts):
        everywhere[rank * part.size + torch.arange(len(part.tokens))] = part.tokens
    for part in parts:
        bounds, key_bounds = part.cu_seqlens.tolist(), part.cu_keys.tolist()
        for stretch, (first, last) in enumerate(itertools.pairwise(bounds)):
            keys = everywhere[part.keys[key_bounds[stretch] : key_bounds[stretch + 1]]]
            for row in range(first, min(last, len(part.tokens))):
                token = part.tokens[row]
                # A causal mask that ends queries and keys together.
                seen = keys[: len(keys) - (last - 1 - row)]
                assert bool((seq[seen] == seq[token]).all())
                assert positions[seen].tolist() == list(range(int(positions[token]) + 1))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_have_about_the_same_work(ranks):
    lengths = torch.tensor([1000, 3000, 777])
    _, owner = owners(lengths, ranks)
    positions = jagged.positions(lengths)
    tokens = owner.bincount(minlength=ranks)
    work = torch.zeros(ranks, dtype=torch.int64).index_add(0, owner, positions + 1)
    assert int(tokens.max() - tokens.min()) <= 2 * len(lengths)
    assert float(work.max() / work.min()) < 1.02


def test_one_rank_has_whole_sequences():
    (part,) = shares([3, 0, 2], 1, spare=2)
    assert part.tokens.tolist() == [0, 1, 2, 3, 4]
    assert part.cu_seqlens.tolist() == [0, 3, 5, 7]


@pytest.mark.parametrize("ranks", [2, 3])
def test_attention_of_all_ranks_equals_attention_one_by_one_with_gradients(ranks):
    lengths = [5, 1, 17, 8, 40, 2]
    parts = shares(lengths, ranks, spare=2)
    torch.manual_seed(0)
    total, size = sum(lengths), parts[0].size
    inputs = [torch.randn(total, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    weight = torch.randn(total, 4, 8)
    expected = torch.cat(
        [
            functional.scaled_dot_product_attention(
                *(tensor.transpose(0, 1)[None] for tensor in part), is_causal=True, enable_gqa=True
            )[0].transpose(0, 1)
            for part in zip(*(tensor.split(lengths) for tensor in inputs), strict=True)
        ]
    )
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)

    def local(tensor, part):
        return torch.cat([tensor[part.tokens], tensor.new_ones(size - len(part.tokens), *tensor.shape[1:])])

    actual = torch.zeros_like(expected)
    everywhere = [torch.cat([local(tensor, part) for part in parts]) for tensor in inputs[1:]]
    for part in parts:
        packed = Packed(
            tokens=torch.zeros(size, dtype=torch.int64),
            position_ids=torch.zeros(size, dtype=torch.int64),
            cu_seqlens=part.cu_seqlens,
            max_length=int(part.cu_seqlens.diff().max()),
            select=torch.zeros(0, dtype=torch.int64),
            keys=Keys(None, part.keys, part.cu_keys, int(part.cu_keys.diff().max())),  # pyright: ignore[reportArgumentType]
        )
        plan = attention_input(packed, torch.float32, torch.zeros(size, 4))
        assert plan.query_slots is not None
        assert plan.key_slots is not None
        out = padded_attention(
            local(inputs[0], part),
            *(tensor[part.keys] for tensor in everywhere),
            blocks=plan.blocks,
            query_slots=plan.query_slots,
            key_slots=plan.key_slots,
            scale=None,
        )
        assert bool(out.isfinite().all())
        actual = actual.index_copy(0, part.tokens, out[: len(part.tokens)])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad((actual * weight).sum(), inputs)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
