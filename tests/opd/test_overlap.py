import math

import pytest
import torch

from opd_trainer.metrics import Metrics
from opd_trainer.opd.overlap import overlap, overlap_metrics
from opd_trainer.types import TopK


def topk(ids: list[list[int]], probs: list[list[float]]) -> TopK:
    return TopK(ids=torch.tensor(ids), log_probs=torch.tensor(probs).log())


def measured(student: TopK, teacher: TopK) -> Metrics:
    return overlap_metrics(overlap(student.ids, teacher))


def test_by_hand() -> None:
    student = topk([[1, 2], [3, 4]], [[0.6, 0.3], [0.5, 0.4]])
    teacher = topk([[2, 1], [9, 3]], [[0.7, 0.2], [0.8, 0.1]])
    values = measured(student, teacher).values()
    assert values["opd/overlap_ratio"] == pytest.approx(3 / 4)
    assert values["opd/teacher_mass_on_student_topk"] == pytest.approx((0.9 + 0.1) / 2)
    assert values["opd/agreement_at_1"] == 0.0


def test_equal_and_disjoint() -> None:
    one = topk([[5, 6, 7]], [[0.5, 0.3, 0.1]])
    same = measured(one, one).values()
    assert same["opd/overlap_ratio"] == same["opd/agreement_at_1"] == 1.0
    assert same["opd/teacher_mass_on_student_topk"] == pytest.approx(0.9)
    other = measured(one, topk([[1, 2, 3]], [[0.5, 0.3, 0.1]])).values()
    assert set(other.values()) == {0.0}


def test_samples_weigh_as_many_positions_as_they_have() -> None:
    long = measured(topk([[1]] * 3, [[0.5]] * 3), topk([[1]] * 3, [[0.5]] * 3))
    short = measured(topk([[1]], [[0.5]]), topk([[2]], [[0.5]]))
    assert long.update(short).values()["opd/overlap_ratio"] == 0.75


def test_no_position() -> None:
    empty = TopK(ids=torch.empty(0, 4, dtype=torch.int64), log_probs=torch.empty(0, 4))
    assert measured(empty, empty).values() == {}


def test_the_mass_is_a_lower_bound_of_the_true_one() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(50, 30, generator=generator), torch.randn(50, 30, generator=generator)
    s_values, s_ids = s.log_softmax(-1).topk(5)
    t_values, t_ids = t.log_softmax(-1).topk(5)
    truth = float(t.softmax(-1).gather(1, s_ids).sum(-1).mean())
    student, teacher = TopK(ids=s_ids, log_probs=s_values), TopK(ids=t_ids, log_probs=t_values)
    found = measured(student, teacher).values()["opd/teacher_mass_on_student_topk"]
    assert 0 < found <= truth
    assert not math.isclose(found, truth)


def test_unknown_positions_do_not_count() -> None:
    known = overlap(torch.tensor([[1, 2]]), topk([[1, 3]], [[0.6, 0.3]]))
    values = overlap_metrics(torch.cat([known, torch.full((3, 3), torch.nan)])).values()
    assert values["opd/overlap_ratio"] == 0.5
    assert values["opd/teacher_mass_on_student_topk"] == pytest.approx(0.6)
