import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from opd_trainer.megatron.attention import LONGEST_TO_SHORTEST, Rotation, attention_input, padded_attention, plan_blocks
from opd_trainer.megatron.compat import quiet, uncompiled
from opd_trainer.model.config import Family
from tests.megatron.models import build, pack, sequences, started, tiny

CPU = torch.device("cpu")


def plan(lengths):
    found = plan_blocks(torch.tensor(lengths), torch.tensor(lengths), CPU)
    starts = found.query_starts.tolist()
    assert starts == found.key_starts.tolist()
    slots = torch.cat([start + torch.arange(length) for start, length in zip(starts, lengths, strict=True)])
    return found.blocks, slots


def attend(query, key, value, blocks, slots, *, scale=None):
    return padded_attention(query, key, value, blocks=blocks, query_slots=slots, key_slots=slots, scale=scale)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_blocks_hold_every_token_once_and_little_padding(lengths):
    blocks, slots = plan(lengths)
    total = sum(block.count * block.length for block in blocks)
    assert sum(block.count for block in blocks) == sum(length > 0 for length in lengths)
    assert len(set(slots.tolist())) == sum(lengths)
    assert total <= LONGEST_TO_SHORTEST * sum(lengths)
    assert all(0 <= slot < total for slot in slots.tolist())


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_equals_attention_one_by_one_with_gradients(key_value_heads):
    lengths = [5, 1, 17, 8, 6, 40]
    blocks, slots = plan(lengths)
    assert len(blocks) > 1
    torch.manual_seed(0)
    total = sum(lengths)
    inputs = [torch.randn(total, heads, 8, requires_grad=True) for heads in (4, key_value_heads, key_value_heads)]
    weight = torch.randn(total, 4, 8)

    def one_by_one(q, k, v):
        parts = zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True)
        rows = [
            functional.scaled_dot_product_attention(
                *(tensor.transpose(0, 1)[None].double() for tensor in part), is_causal=True, enable_gqa=True
            )[0].transpose(0, 1)
            for part in parts
        ]
        return torch.cat(rows).float()

    query, key, value = inputs
    expected = one_by_one(query, key, value)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    actual = attend(query, key, value, blocks, slots)
    actual_grads = torch.autograd.grad((actual * weight).sum(), inputs)
    assert torch.allclose(actual, expected, atol=1e-5)
    for got, want in zip(actual_grads, expected_grads, strict=True):
        assert torch.allclose(got, want, atol=1e-4)


def test_scale_is_used():
    blocks, slots = plan([4])
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 2, 8)
    plain = attend(query * 0.5, key, value, blocks, slots, scale=8**-0.5)
    scaled = attend(query, key, value, blocks, slots, scale=0.5 * 8**-0.5)
    assert torch.allclose(plain, scaled, atol=1e-6)
    assert not torch.allclose(plain, attend(query, key, value, blocks, slots))


def test_the_rotation_is_megatrons():
    with quiet(), uncompiled():
        from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    heads, angles = torch.randn(7, 3, 8).bfloat16(), 5 * torch.randn(7, 4)
    both = torch.cat([angles, angles], dim=-1)[:, None, None, :]
    expected = _apply_rotary_pos_emb_bshd(heads.unsqueeze(1), both).squeeze(1)
    assert torch.equal(Rotation.by(angles, torch.bfloat16)(heads), expected)


def test_the_processor_takes_the_padded_way_in_any_dtype():
    packed = pack(sequences())
    for dtype in (torch.float32, torch.bfloat16):
        assert attention_input(packed, dtype, torch.zeros(len(packed.tokens), 4)).query_slots is not None


def test_packed_equals_one_by_one(tmp_path):
    rows = sequences((5, 9, 2, 30, 1))
    with started(tmp_path) as runtime:
        model = build(runtime, tiny(Family.qwen3), trainable=False)
        together = model.forward(pack(rows))
        alone = torch.cat([model.forward(pack([row])) for row in rows])
        shuffled = model.forward(pack(rows[::-1]))
    assert together.std() > 0.01
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(torch.cat(shuffled.split([len(row) for row in rows[::-1]])[::-1]), together, atol=1e-5)


def test_only_selected_positions_go_through_the_head(tmp_path):
    rows = sequences((5, 9))
    select = torch.tensor([0, 3, 12])
    with started(tmp_path) as runtime:
        model = build(runtime, tiny(Family.qwen3), trainable=False)
        seen = []
        model.modules[0].output_layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape))
        everything = model.forward(pack(rows))
        selected = model.forward(pack(rows, select))
        nothing = model.forward(pack(rows, select[:0]))
    assert torch.allclose(selected, everything[select], atol=1e-6)
    assert nothing.shape == (0, everything.shape[1])
    assert [shape[0] for shape in seen] == [14, 3, 0]
