"""A run saved in one parallel layout goes on in another one."""

import pickle
from pathlib import Path

import pytest
import torch

from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.model.config import Dtype, Family, ModelConfig
from tests.gloo import run_gloo
from tests.megatron import parity, training
from tests.megatron.parity import Layout
from tests.megatron.training import WeightedNll, weights

pytestmark = [
    # The sharded optimizer of Megatron-core 0.16 on torch 2.13.
    pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

MOE = Family.qwen3_moe
SHARDED = {"distributed_optimizer": True}
LAYOUTS = (
    Layout("tp 2", 2, {"tensor_parallel": 2, "sequence_parallel": True}),
    Layout("pp 2", 2, {"pipeline_parallel": 2, "pipeline_layers": [1, 2]}),
    Layout("dp 2, sharded Adam", 2, SHARDED),
    Layout("moe ep 2", 2, {"expert_parallel": 2}, MOE),
    Layout("moe ep 2, sharded Adam", 2, {"expert_parallel": 2, **SHARDED}, MOE),
)
# With this epsilon Adam does not turn the rounding noise of small gradients into steps.
ADAM = {"lr": 0.03, "eps": 1e-2, "weight_decay": 0.01, "warmup_steps": 3, "schedule": "cosine", "clip_grad": 1.0}


def spec(folder: Path, layout: Layout, **changes):
    return training.spec(folder / layout.family / "student", **{**ADAM, **layout.settings, **changes})


def steps(worker, numbers):
    """Updates on batches of their own, the same ones in any layout."""
    place = worker.place()
    for number in numbers:
        batch = training.batch(seed=number)
        worker.update([batch.take(list(range(place.dp_rank, 6, place.dp_size)))], WeightedNll())


def train_and_save(worker, folder):
    folder.mkdir(exist_ok=True)
    steps(worker, range(3))
    worker.save(folder)
    steps(worker, range(3, 6))
    return weights(worker)


def resume(worker, folder):
    worker.restore(folder)
    steps(worker, range(3, 6))
    return weights(worker)


def run(rank: int, world_size: int, rendezvous: str, folder: Path, saved: Path) -> bytes:
    """In each layout: a run that saves, and another one that goes on with a run saved by one process."""
    outcomes = []
    for number, layout in enumerate(LAYOUTS):
        places = train_and_save, saved / layout.name
        pair = []
        for kind, (act, place) in enumerate((places, (resume, saved / f"{layout.name} alone"))):
            worker = MegatronWorker(spec(folder, layout), rank, world_size, f"{rendezvous}{number}.{kind}")
            worker.start()
            try:
                pair.append(act(worker, place))
            finally:
                worker.close()
        outcomes.append(pair)
    return pickle.dumps(outcomes)


def alone(folder, layout, act, place, **changes):
    kept = {key: value for key, value in layout.settings.items() if key == "distributed_optimizer"}
    with training.started(spec(folder, Layout(layout.name, 1, kept, layout.family), **changes)) as worker:
        return act(worker, place)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By layout: the weights after a run in it, after one that was resumed in it, and after one of a single process."""
    folder, saved = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("checkpoints")
    for family in (Family.qwen3, MOE):
        parity.write_models(folder / family, family)
    expected = [alone(folder, layout, train_and_save, saved / f"{layout.name} alone") for layout in LAYOUTS]
    ranks = [pickle.loads(result) for result in run_gloo(run, 2, folder, saved)]
    found = dict(zip([layout.name for layout in LAYOUTS], zip(ranks[0], expected, strict=True), strict=True))
    return folder, saved, found


def assert_equal(ours, theirs, what=""):
    assert ours.keys() == theirs.keys()
    largest = max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items())
    print(f"\n{what}: weights differ by {largest:.1e} at most after three more steps")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_saved_in_a_layout_and_resumed_by_one_process(runs, layout):
    folder, saved, found = runs
    (trained, _), _ = found[layout.name]
    assert_equal(alone(folder, layout, resume, saved / layout.name), trained, f"{layout.name} -> one process")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_saved_by_one_process_and_resumed_in_a_layout(runs, layout):
    (_, resumed), expected = runs[2][layout.name]
    assert_equal(resumed, expected, f"one process -> {layout.name}")


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("sharded", [True, False])
def test_plain_adam_goes_on_as_sharded_adam_and_back(runs, tmp_path, dtype, sharded):
    folder = runs[0]
    model = ModelConfig(load=str(folder / Family.qwen3 / "student"), dtype=dtype)
    before, after = (Layout("one", 1, {"distributed_optimizer": flag}) for flag in (sharded, not sharded))
    with training.started(spec(folder, before, model=model)) as worker:
        expected = train_and_save(worker, tmp_path / "saved")
    with training.started(spec(folder, after, model=model)) as worker:
        found = resume(worker, tmp_path / "saved")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6 if dtype is Dtype.float32 else 1e-3, rtol=1e-5)


def test_an_optimizer_without_its_moments_would_be_noticed(runs):
    folder, saved, found = runs
    layout = LAYOUTS[0]

    def start_anew(worker, _):
        worker._optimizer.num_steps = 3
        steps(worker, range(3, 6))
        return weights(worker)

    model = ModelConfig(load=str(saved / layout.name))
    without = alone(folder, layout, start_anew, saved, model=model)
    with pytest.raises(AssertionError):
        assert_equal(without, found[layout.name][0][0])
