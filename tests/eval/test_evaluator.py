import asyncio
import contextlib
import dataclasses
import json
import math

import pytest
import torch

from opd_trainer.data.prompts import PromptSet
from opd_trainer.errors import DataError
from opd_trainer.eval.config import EvalConfig
from opd_trainer.eval.evaluator import Evaluator, doublings
from opd_trainer.eval.problems import eval_problems
from opd_trainer.metrics import Metrics
from opd_trainer.reward.config import CompositeReward, CustomReward, ExactReward, LengthReward, NoReward, Per
from opd_trainer.reward.pool import RewardPool
from opd_trainer.types import Finish, Prompt, Sample, Sampling

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_response_tokens=8, stop_token_ids=(1,))
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0)


class ScriptedEngine:
    """Answers by a function of the request, in reverse order, and remembers the requests."""

    def __init__(self, answer):
        self.answer, self.seeds = answer, []

    async def start(self): ...

    async def load(self, weights): ...

    async def close(self): ...

    def asleep(self):
        return contextlib.nullcontext()

    def metrics(self):
        return Metrics()

    async def generate(self, requests, sampling):
        self.seeds.append([request.seed for request in requests])
        for request in reversed(requests):
            text, finish = self.answer(request)
            yield Sample(
                prompt=request.prompt,
                index=request.index,
                response=torch.zeros(len(text), dtype=torch.int64),
                log_probs=torch.zeros(len(text)),
                finish=finish,
                version=3,
                text=text,
            )


def prompt_set(name, labels):
    prompts = [
        Prompt(id=f"{name}:{i}", tokens=torch.tensor([1]), text=f"q{i}", answer=label, dataset=name)
        for i, label in enumerate(labels)
    ]
    return PromptSet(name, prompts)


def evaluate(sets, answer, *, reward=None, sampling=GREEDY, runs=1, **settings):
    engine = ScriptedEngine(answer)

    async def main():
        pool = RewardPool(reward or ExactReward(), 99)
        evaluator = Evaluator(EvalConfig(**settings), sets, pool, sampling, seed=5)
        try:
            return evaluator, [await evaluator.run(engine) for _ in range(runs)], pool.metrics().values()
        finally:
            await pool.close()

    return (*asyncio.run(main()), engine)


def test_pass_at_1_by_dataset_with_lengths_and_truncation():
    sets = [prompt_set("a", ["0", "1", "2", "3"]), prompt_set("b", ["0"])]

    def answer(request):
        # Right on even questions; the one on question 3 ran out of space.
        number = int(request.prompt.text[1:])
        return (f"#### {number + number % 2}", Finish.length if number == 3 else Finish.stop)

    evaluator, (report,), _, _ = evaluate(sets, answer)
    values = report.metrics.values()
    assert values["eval/a/pass@1"] == 0.5
    assert values["eval/a/pass@1_se"] == pytest.approx(math.sqrt(1 / 12))
    assert values["eval/a/truncated_ratio"] == 0.25
    assert values["eval/a/response_length"] == 6
    assert values["eval/a/failed_fraction"] == 0
    assert values["eval/b/pass@1"] == 1
    assert "eval/b/pass@1_se" not in values
    assert evaluator.accuracy(values) == {"a": 0.5, "b": 1.0}
    assert evaluator.standard_errors(values) == {"a": pytest.approx(math.sqrt(1 / 12))}
    assert [record.prompt_id for record in report.records] == ["a:0", "a:1", "a:2", "a:3", "b:0"]
    first = json.loads(json.dumps(dataclasses.asdict(report.records[1])))
    assert first == {
        "dataset": "a", "prompt_id": "a:1", "index": 0, "prompt": "q1", "response": "#### 2", "answer": "1",
        "correct": False, "reward": 0.0, "reward_parts": {"reward": 0.0}, "finish": "stop",
        "num_tokens": 6, "version": 3,
    }  # fmt: skip


def test_without_a_reward_there_is_no_accuracy():
    evaluator, (report,), _, _ = evaluate(
        [prompt_set("a", ["0", "1"])], lambda _: ("x", Finish.stop), reward=NoReward()
    )
    values = report.metrics.values()
    assert set(values) == {"eval/a/truncated_ratio", "eval/a/response_length"}
    assert evaluator.accuracy(values) == evaluator.standard_errors(values) == {}
    assert [(record.correct, record.reward) for record in report.records] == [(None, None)] * 2


def test_pass_at_k_and_mean():
    # Question 0 is answered rightly once in four, question 1 always.
    def answer(request):
        right = request.prompt.text == "q1" or request.index == 2
        return (f"#### {request.prompt.answer if right else 'x'}", Finish.stop)

    _, (report,), _, _ = evaluate([prompt_set("a", ["7", "8"])], answer, sampling=SAMPLED, samples_per_prompt=4)
    values = report.metrics.values()
    assert values["eval/a/pass@1"] == values["eval/a/mean@4"] == (0.25 + 1) / 2
    assert values["eval/a/pass@2"] == (0.5 + 1) / 2
    assert values["eval/a/pass@4"] == 1


def test_seeds_do_not_depend_on_the_evaluation():
    sets = [prompt_set("a", ["1", "2"])]
    _, reports, _, engine = evaluate(
        sets, lambda r: (f"#### {r.seed % 3}", Finish.stop), sampling=SAMPLED, samples_per_prompt=2, runs=2
    )
    assert engine.seeds[0] == engine.seeds[1]
    assert len(set(engine.seeds[0])) == 4
    assert reports[0].records == reports[1].records


def test_a_failed_grade_is_left_out_and_counted():
    def answer(request):
        return ("boom" if request.prompt.text == "q0" else "fine", Finish.stop)

    reward = CustomReward(path=f"{__name__}:grade")
    _, (report,), metrics, _ = evaluate([prompt_set("a", ["0", "1"])], answer, reward=reward)
    values = report.metrics.values()
    assert values["eval/a/pass@1"] == 1
    assert values["eval/a/failed_fraction"] == 0.5
    assert (report.records[0].correct, report.records[0].reward) == (None, None)
    assert report.records[0].reward_parts == {"failed_error": 1.0}
    # The training step that follows must not be blamed for it.
    assert metrics["rollout/reward_failed/error"] == 0


def grade(sample):
    if sample.text == "boom":
        raise RuntimeError("no grade")
    return 1.0


def rank(samples):
    return [float(sample.index == len(samples) - 1) for sample in samples]


def test_a_reward_per_group_gets_the_evaluations_number_of_siblings():
    reward = CustomReward(path=f"{__name__}:rank", per=Per.group)
    _, (report,), _, _ = evaluate(
        [prompt_set("a", ["0", "1"])],
        lambda r: ("x", Finish.stop),
        reward=reward,
        sampling=SAMPLED,
        samples_per_prompt=3,
    )
    assert [record.reward for record in report.records] == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize(("above", "right"), [(0.2, 1.0), (0.4, 0.0)])
def test_what_counts_as_correct_is_larger_than_a_bound(above, right):
    reward = ExactReward(scale=0.4)
    _, (report,), _, _ = evaluate(
        [prompt_set("a", ["1"])], lambda request: ("#### 1", Finish.stop), reward=reward, correct_above=above
    )
    assert report.metrics.values()["eval/a/pass@1"] == right


def test_correctness_can_be_one_part_of_the_reward():
    reward = CompositeReward(
        parts={"right": ExactReward(scale=2.0), "short": LengthReward(free_tokens=1, max_tokens=2, scale=4.0)}
    )
    sets = [prompt_set("a", ["1"])]
    answer = lambda request: ("#### 1", Finish.stop)  # noqa: E731
    assert evaluate(sets, answer, reward=reward)[1][0].metrics.values()["eval/a/pass@1"] == 0
    _, (report,), _, _ = evaluate(sets, answer, reward=reward, correct_part="right")
    assert report.metrics.values()["eval/a/pass@1"] == 1
    assert report.metrics.values()["eval/a/mean@1"] == -2
    with pytest.raises(DataError, match=r"eval\.correct_part=wrong.*right, short"):
        evaluate(sets, answer, reward=reward, correct_part="wrong")


def test_an_aborted_sample_counts_as_failed():
    _, (report,), _, _ = evaluate([prompt_set("a", ["1"])], lambda r: ("#### 1", Finish.abort))
    values = report.metrics.values()
    assert values["eval/a/failed_fraction"] == 1
    assert math.isnan(values["eval/a/pass@1"])


@pytest.mark.parametrize(("name", "value"), [("samples_per_prompt", 2), ("top_p", 0.9), ("top_k", 5)])
def test_what_greedy_decoding_would_ignore_is_refused(name, value):
    [problem] = eval_problems(EvalConfig(**{name: value}))
    assert problem.key == f"eval.{name}"
    assert "eval.temperature=0.6" in problem.fix
    assert eval_problems(EvalConfig(**{name: value}, temperature=1.0)) == eval_problems(EvalConfig()) == []


def test_doublings():
    assert [list(doublings(n)) for n in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8]]
