import torch

from opd_trainer.types import Scores
from tests.laws.options import batch_of


def test_scored_fields_are_log_probs_except_values() -> None:
    batch = batch_of([[1, 1], [1]], values=None, old=None)
    drawn = torch.rand(batch.num_tokens)
    assert batch.scored("values", drawn).values is drawn
    old = batch.scored("old", drawn).old
    assert old == Scores(log_probs=drawn, temperature=batch.rollout.temperature, model="old")
