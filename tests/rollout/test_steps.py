"""The steps that a GPU replays, on a CPU without graphs: they decode what the ordinary steps decode."""

import pytest
import torch

from opd_trainer.rollout.embedded import generation
from opd_trainer.rollout.embedded.steps import StaticSteps, rounded_rows
from opd_trainer.rollout.embedded.worker import EmbeddedWorker
from tests.rollout.models import CONFIGS, by_request, finish, loaded_worker, random_model, requests, sampling


def static(monkeypatch: pytest.MonkeyPatch, unseen: int) -> list[int]:
    """Makes workers decode as on a GPU; the list collects the tokens of each `run`."""
    ran: list[int] = []

    class Counted(StaticSteps):
        def run(self, count: int) -> None:
            ran.append(count)
            super().run(count)

    begin = EmbeddedWorker.begin

    def with_steps(worker: EmbeddedWorker, asked, how) -> None:
        build = generation.Generation

        def built(**given):
            steps = Counted(given["weights"], given["slots"], how, graphs=False)
            return build(**{**given, "steps": steps})

        with monkeypatch.context() as patch:
            patch.setattr("opd_trainer.rollout.embedded.worker.Generation", built)
            begin(worker, asked, how)

    monkeypatch.setattr(EmbeddedWorker, "begin", with_steps)
    monkeypatch.setattr(generation, "_UNSEEN_STEPS", unseen)
    return ran


@pytest.mark.parametrize("unseen", [1, 8])
@pytest.mark.parametrize("name", ["qwen3", "qwen2_tied", "llama3_rope"])
def test_they_decode_the_same_samples(name: str, unseen: int, monkeypatch: pytest.MonkeyPatch):
    model, asked = random_model(CONFIGS[name]), requests(prompts=9, siblings=3)
    how = sampling(max_response_tokens=60, log_prob_top_k=3)
    expected = by_request(finish(loaded_worker(model, batch_size=10), asked, how))
    ran = static(monkeypatch, unseen)
    found = by_request(finish(loaded_worker(model, batch_size=10), asked, how))
    assert ran
    assert max(ran) == unseen
    assert found.keys() == expected.keys()
    for key, sample in found.items():
        assert sample.response.tolist() == expected[key].response.tolist()
        assert sample.finish is expected[key].finish
        torch.testing.assert_close(sample.log_probs, expected[key].log_probs, atol=1e-5, rtol=0)
        assert sample.topk is not None
        assert len(sample.topk.ids) == len(sample.response)
    assert len({len(sample.response) for sample in expected.values()}) > 5, "rows must finish at different times"


def test_nothing_is_decoded_beyond_the_longest_response(monkeypatch: pytest.MonkeyPatch):
    ran = static(monkeypatch, 8)
    samples = finish(loaded_worker(random_model(CONFIGS["qwen3"])), requests(), sampling(max_response_tokens=6))
    assert max(ran) <= 5, "the first token is drawn with the prompt"
    assert max(len(sample.response) for sample in samples) == 6


def test_rows_are_rounded_to_few_sizes():
    assert [rounded_rows(count, 256) for count in (1, 8, 9, 64, 65, 100, 130, 193, 256)] == [
        8, 8, 16, 64, 80, 112, 160, 224, 256,
    ]  # fmt: skip
    assert rounded_rows(3, 5) == 5
    assert len({rounded_rows(count, 256) for count in range(1, 257)}) <= 24
