import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_trainer.data.prompts import PromptSet
from opd_trainer.data.stream import PromptStream
from opd_trainer.errors import DataError
from opd_trainer.types import Prompt


def prompts(count, name="train"):
    return [Prompt(id=f"{name}:{i}", tokens=torch.tensor([i]), text=str(i), dataset=name) for i in range(count)]


def ids(chosen):
    return [prompt.id for prompt in chosen]


def test_an_epoch_gives_every_prompt_once_and_epochs_differ():
    stream = PromptStream.of(prompts(12))
    epochs = [[p for _ in range(3) for p in ids(stream.next(4))] for _ in range(3)]
    assert all(sorted(epoch) == sorted(ids(prompts(12))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


def test_order_is_keyed_by_seed_and_epoch():
    first, again, other = (PromptStream.of(prompts(50), seed) for seed in (3, 3, 4))
    assert ids(first.next(50)) == ids(again.next(50)) != ids(other.next(50))
    # How an epoch is cut into steps does not change its order.
    fine = PromptStream.of(prompts(50), 3)
    assert [i for _ in range(10) for i in ids(fine.next(5))] == ids(PromptStream.of(prompts(50), 3).next(50))


def test_a_step_never_holds_a_prompt_twice():
    stream = PromptStream.of(prompts(10))
    for _ in range(20):
        assert len(set(ids(stream.next(7)))) == 7


def test_too_few_prompts():
    with pytest.raises(DataError, match=r"takes 4 different prompts.*only 3"):
        PromptStream.of(prompts(3)).next(4)


def test_too_few_prompts_are_told_before_the_first_step():
    sets = [PromptSet("a", prompts(9, "a"), weight=3.0), PromptSet("b", prompts(2, "b"))]
    PromptStream(sets).check(8, "rollout.prompts_per_step")
    with pytest.raises(
        DataError, match=r"b: a step of task\.batch_size=12 takes up to 3 .*only 2. Lower task\.batch_size"
    ):
        PromptStream(sets).check(12, "task.batch_size")
    # With weights 2 and 1 a step of four takes one or two prompts of the second dataset: one in the first step.
    uneven = PromptStream([PromptSet("a", prompts(9, "a"), weight=2.0), PromptSet("b", prompts(1, "b"))])
    with pytest.raises(DataError, match="b: a step of x=4 takes up to 2 "):
        uneven.check(4, "x")
    assert uneven.next(4), "looking ahead moves nothing"


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(8, 20), min_size=1, max_size=3),
    before=st.lists(st.integers(1, 8), max_size=12),
    after=st.lists(st.integers(1, 8), min_size=1, max_size=6),
)
def test_resume_is_exact(sizes, before, after):
    def new():
        sets = [PromptSet(f"d{i}", prompts(n, f"d{i}"), weight=1.0 + i, shuffle_seed=i) for i, n in enumerate(sizes)]
        return PromptStream(sets)

    stream = new()
    for count in before:
        stream.next(count)
    # Through JSON, as a checkpoint would.
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = new()
    resumed.load_state_dict(state)
    for count in after:
        assert ids(stream.next(count)) == ids(resumed.next(count))


def test_weights_are_kept_at_every_moment():
    weights = {"a": 5.0, "b": 2.0, "c": 1.0}
    stream = PromptStream([PromptSet(name, prompts(40, name), weight=w) for name, w in weights.items()])
    counts = dict.fromkeys(weights, 0)
    for step in range(1, 60):
        for prompt in stream.next(3):
            counts[prompt.dataset] += 1
        for name, weight in weights.items():
            assert abs(counts[name] - 3 * step * weight / 8) <= 1


@pytest.mark.parametrize("change", ["prompts", "seed", "name"])
def test_resume_on_other_data_is_refused(change):
    state = PromptStream([PromptSet("a", prompts(5))]).state_dict()
    changed = {
        "prompts": PromptSet("a", prompts(6)),
        "seed": PromptSet("a", prompts(5), shuffle_seed=1),
        "name": PromptSet("b", prompts(5)),
    }[change]
    with pytest.raises(DataError, match="checkpoint"):
        PromptStream([changed]).load_state_dict(state)
