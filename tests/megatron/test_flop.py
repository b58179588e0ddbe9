import dataclasses

import pytest
import torch

from opd_trainer.megatron.families.base import Architecture
from opd_trainer.megatron.families.experts import Experts
from opd_trainer.megatron.flop import PEAK_FLOP_PER_S, TRAINING, forward_flop, peak_flop_per_s
from opd_trainer.model.config import Family
from opd_trainer.teacher.config import ResidentTeacher
from opd_trainer.teacher.inline import inline_teacher
from tests.megatron import models, training
from tests.megatron.training import WeightedNll


def shape(family: Family = Family.llama, **changes) -> Architecture:
    """8 wide, 3 layers, 2 query heads and 1 key head of 6, feed-forward 16, 10 words."""
    sizes = {"hidden_size": 8, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "head_dim": 6}
    return models.tiny(family, **sizes, intermediate_size=16, vocab_size=10, **changes)


ATTENTION = 8 * 12 + 2 * 8 * 6 + 12 * 8
"""Weights of q, of k and v, of the output."""
NORMS = 2 * 8
TOKENS, POSITIONS = 5 + 2, 3
PAIRS = (1 + 2 + 3 + 4 + 5) + (1 + 2)
PRODUCTS = 2 * 3 * 2 * 6 * 2 * PAIRS
"""Of queries and keys, and of shares and values: 3 layers, 2 heads of 6, a multiplication and an addition."""


@pytest.mark.parametrize("tied", [True, False])
def test_hand_count_of_a_dense_model(tied):
    weights = 3 * (ATTENTION + 3 * 8 * 16 + NORMS) + 8
    expected = 2 * weights * TOKENS + 2 * 80 * POSITIONS + PRODUCTS
    assert forward_flop(shape(tie_embeddings=tied), TOKENS, PAIRS, POSITIONS) == expected
    values = shape(tie_embeddings=tied).with_value_head()
    assert forward_flop(values, TOKENS, PAIRS, POSITIONS) == expected - 2 * 72 * POSITIONS


def test_a_token_meets_its_own_experts_only():
    experts = Experts(count=4, per_token=3, intermediate_size=10, normalize=True)
    weights = 3 * (ATTENTION + 8 * 4 + 3 * (3 * 8 * 10) + NORMS + 2 * 6) + 8
    expected = 2 * weights * TOKENS + 2 * 80 * POSITIONS + PRODUCTS
    assert forward_flop(shape(Family.qwen3_moe, experts=experts), TOKENS, PAIRS, POSITIONS) == expected


def test_peaks_are_those_of_whole_gpus_in_bf16(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H200")
    assert peak_flop_per_s(gpu, torch.bfloat16) == 989e12
    assert peak_flop_per_s(gpu, torch.float32) is None
    assert peak_flop_per_s(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert peak_flop_per_s(gpu, torch.bfloat16) is None
    assert all(1e14 < peak < 1e16 for peak in PEAK_FLOP_PER_S.values())


def counted(architecture: Architecture, prompts, responses) -> int:
    lengths = [p + r for p, r in zip(prompts, responses, strict=True)]
    return forward_flop(architecture, sum(lengths), sum(n * (n + 1) // 2 for n in lengths), sum(responses))


def test_an_update_counts_what_student_and_teachers_computed(tmp_path):
    student = training.write_model(tmp_path / "student")
    teacher = training.write_model(tmp_path / "teacher", num_layers=1)
    plain = training.spec(student)
    settings = ResidentTeacher(load=str(teacher), model=plain.model)
    resident = inline_teacher("default", settings, plain.model, plain.megatron, 1.0)
    batch = training.batch((3, 2, 5), (6, 0, 9)).replace(teacher_name=("default", "default", "nobody"))
    whole, prompt_alone = batch.take([0, 2]), batch.take([1])
    with training.started(training.spec(student, teachers={"default": resident})) as worker:
        assert worker._student is not None
        ours = worker._student.model.architecture
        theirs = dataclasses.replace(ours, num_layers=1)
        own = TRAINING * counted(ours, (3, 5), (6, 9))
        # Nothing is wanted of the second micro-batch, and of the first the teacher is asked about one sequence.
        found = worker.update([whole, prompt_alone], WeightedNll())
        assert found.flop == own + counted(theirs, (3,), (6,))
        assert found.teacher is not None
        known = whole.replace(teacher=dataclasses.replace(whole.rollout, log_probs=found.teacher[0]))
        assert worker.update([known], WeightedNll()).flop == own
        assert found.peak_flop_per_s is None
