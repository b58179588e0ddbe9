import dataclasses
from pathlib import Path
from typing import Any

import pytest

from opd_trainer.build.vocabulary import vocabulary_of
from opd_trainer.cli.composition import Composer
from opd_trainer.cluster.config import InProcessCluster, Layout, RayCluster
from opd_trainer.config import Config
from opd_trainer.errors import PreflightError
from opd_trainer.megatron.config import MegatronConfig, Placement, Recompute
from opd_trainer.megatron.memory import local_size, optimizer_bytes
from opd_trainer.memory.capacity import Capacity, stated
from opd_trainer.memory.fit import changes, cheapest, refuse, shortages
from opd_trainer.memory.job import Apart, Engine, Frozen, Job, Part, job_of
from opd_trainer.memory.plan import Phase, Plan, micro_batch_tokens, plan
from opd_trainer.memory.report import print_plan, short
from opd_trainer.memory.start import device_share
from opd_trainer.model.config import Dtype, Family
from opd_trainer.rollout.config import EmbeddedRollout
from tests.commands import planned
from tests.megatron import models
from tests.runs import runs

GIB = 2**30
BIG = models.tiny(
    Family.qwen3,
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=151936,
    tie_embeddings=False,
)
"""Qwen3-8B."""
STUDENT = Part(architecture=BIG, dtype=Dtype.bfloat16)


def job(placement: Placement = Placement.resident, **changes) -> Job:
    teacher = Frozen(architecture=BIG, dtype=Dtype.bfloat16, name="teacher", key="teacher", placement=placement)
    values = {
        "student": STUDENT,
        "trains": True,
        "critic": None,
        "frozen": (teacher,),
        "apart": (),
        "judged": None,
        "engine": None,
        "layout": MegatronConfig(),
        "workers": 1,
        "longest": 2048,
        "step_tokens": 128 * 2048,
        "held_tokens": 0,
        "bucket_bytes": 2**28,
        "shares_process": True,
        "saves_behind": False,
    }
    return Job(**values | changes)


def item(planned: Plan, name: str):
    (found,) = (item for item in planned.sites[0].items if item.name == name)
    return found


def test_an_8b_student_with_its_teacher():
    """8.19e9 parameters: 16.4 GB of weights, 32.8 GB of fp32 gradients, 98.3 GB for Adam and main parameters."""
    planned = plan(job(), gpu=True)
    parameters = 8_190_735_360
    assert item(planned, "student: weights").device == 2 * parameters
    assert item(planned, "student: gradients").device == 4 * parameters
    assert item(planned, "student: optimizer, main parameters").device == 12 * parameters
    assert item(planned, "teacher: weights").device == 2 * parameters
    assert planned.sites[0].fullest is Phase.update


def test_placements_move_the_teacher():
    weights = local_size(BIG, MegatronConfig()).total * 2
    resident, offload, swap = (plan(job(placement), gpu=True).sites[0] for placement in Placement)
    assert resident.device(Phase.update) - offload.device(Phase.update) == weights
    assert offload.host(Phase.update) == swap.host(Phase.update) == weights
    assert resident.host(Phase.update) == 0
    assert offload.device(Phase.score) == resident.device(Phase.score)
    assert swap.device(Phase.score) < offload.device(Phase.score)


def test_distributions_that_are_compared_are_counted():
    """A resident teacher keeps the hidden states of all responses of a rank, 4096 numbers of two bytes for a token."""
    name, tokens = "teacher: hidden states of its distributions", 128 * 1024
    alone = plan(job(held_tokens=tokens), gpu=True)
    assert item(alone, name).device == tokens * 4096 * 2
    assert item(alone, name).phases == {Phase.update}
    shared = MegatronConfig(tensor_parallel=2, context_parallel=2)
    split = plan(job(held_tokens=tokens, layout=shared, workers=8), gpu=True)
    assert item(split, name).device == tokens * 4096 * 2 // 4
    assert name not in [each.name for each in plan(job(), gpu=True).sites[0].items]


def test_without_a_gpu_all_processes_share_the_host():
    one = plan(job(), gpu=False)
    assert one.host(Phase.update) == one.sites[0].device(Phase.update)
    two = plan(job(workers=2), gpu=False)
    assert two.host(Phase.update) == 2 * two.sites[0].device(Phase.update)


def test_micro_batches_are_no_larger_than_what_there_is():
    layout = MegatronConfig(max_tokens_per_device=8192)
    assert micro_batch_tokens(layout, longest=512, step_tokens=100_000, workers=1) == 8192
    assert micro_batch_tokens(layout, longest=10_000, step_tokens=100_000, workers=1) == 10_000
    assert micro_batch_tokens(layout, longest=512, step_tokens=1_000, workers=1) == 1_000
    assert micro_batch_tokens(layout, longest=512, step_tokens=2_000, workers=2) == 1_000
    shared = MegatronConfig(max_tokens_per_device=8192, context_parallel=2)
    assert micro_batch_tokens(shared, longest=20_000, step_tokens=10**6, workers=2) == 10_000


def test_an_engine_of_its_own_is_a_site_of_its_own():
    rollout = EmbeddedRollout(batch_size=4, max_prompt_tokens=100, max_response_tokens=100)
    engine = Engine(workers=2, slot_bytes=1000, rollout=rollout, rows=4)
    apart = Apart(**as_dict(STUDENT), name="teacher", layout=MegatronConfig(max_tokens_per_device=1), workers=1)
    planned = plan(job(engine=engine, longest=200, shares_process=False, frozen=(), apart=(apart,)), gpu=True)
    assert [(site.name, site.processes) for site in planned.sites] == [("training", 1), ("rollout", 2), ("teacher", 1)]
    (cache,) = (item for item in planned.sites[1].items if "KV" in item.name)
    assert cache.device == 4 * 200 * 1000
    inside = plan(job(engine=dataclasses.replace(engine, workers=0), longest=200), gpu=True)
    assert [item.device for item in inside.sites[0].items if "KV" in item.name] == [4 * 200 * 1000]


def test_an_engine_on_a_cpu_keeps_a_tied_head_twice_in_bfloat16():
    engine = Engine(workers=0, slot_bytes=1000, rollout=EmbeddedRollout(), rows=4)

    def weights(*, gpu: bool, **changes: Any) -> int:
        student = dataclasses.replace(STUDENT, **changes)
        items = plan(job(engine=engine, student=student), gpu=gpu).sites[0].items
        return next(item.device for item in items if item.name == "engine: weights")

    tied = dataclasses.replace(STUDENT.architecture, tie_embeddings=True)
    head = tied.vocab_size * tied.hidden_size * 2
    changes = {"architecture": tied, "dtype": Dtype.bfloat16}
    assert weights(gpu=False, **changes) == weights(gpu=True, **changes) + head
    single = {**changes, "dtype": Dtype.float32}
    assert weights(gpu=False, **single) == weights(gpu=True, **single)
    untied = {**changes, "architecture": dataclasses.replace(tied, tie_embeddings=False)}
    assert weights(gpu=False, **untied) == weights(gpu=True, **untied) == weights(gpu=False, **changes)


def as_dict(part: Part) -> dict:
    return {"architecture": part.architecture, "dtype": part.dtype}


def test_a_plan_that_does_not_fit_is_refused_with_the_cheapest_change():
    small = job(layout=MegatronConfig(max_tokens_per_device=32768), workers=8)
    peak = plan(small, gpu=True).sites[0].device(Phase.update)
    assert shortages(plan(small, gpu=True), Capacity(peak, None, "")) == []
    refuse(small, Capacity(peak, None, ""))
    with pytest.raises(PreflightError, match=r"during update.*megatron\.distributed_optimizer=true"):
        refuse(small, Capacity(peak - 1, None, ""))


def test_each_change_really_fits():
    one = job(layout=MegatronConfig(max_tokens_per_device=2048))
    room = Capacity(plan(one, gpu=True).sites[0].device(Phase.update) - GIB, None, "")
    (change,) = cheapest(one, room)
    assert change.override == "teacher=offload"
    assert not shortages(plan(change.job, gpu=True), room)
    bare = job(frozen=(), longest=16384)
    room = Capacity(plan(bare, gpu=True).sites[0].device(Phase.update) - 8 * GIB, None, "")
    (change,) = cheapest(bare, room)
    assert change.override == "megatron.recompute=selective"
    assert change.job.layout.recompute is Recompute.selective


def test_an_8b_job_on_80_gib_is_sent_to_more_gpus():
    found = cheapest(job(), stated(80, None))
    assert "megatron.tensor_parallel" in " ".join(change.override for change in found)
    assert not shortages(plan(found[-1].job, gpu=True), stated(80, None))


def test_a_save_in_the_background_holds_a_copy_all_the_time():
    behind = plan(job(saves_behind=True), gpu=True)
    copied = item(behind, "copy that is written")
    kept = (item(behind, f"student: {what}").device for what in ("weights", "optimizer, main parameters"))
    assert copied.host == sum(kept)
    assert Phase.update in copied.phases
    room = Capacity(1000 * GIB, plan(job(), gpu=True).host(Phase.save), "")
    (change,) = cheapest(job(saves_behind=True), room)
    assert change.override == "checkpoint.async_save=false"


def test_nothing_helps_a_machine_that_is_far_too_small():
    with pytest.raises(PreflightError, match="use a smaller model or a larger machine"):
        refuse(job(), Capacity(None, GIB, "available"))


def test_the_distributed_optimizer_is_counted():
    layout = MegatronConfig(distributed_optimizer=True)
    size = local_size(BIG, layout)
    planned = plan(job(layout=layout, workers=4), gpu=True)
    expected = optimizer_bytes(size, Dtype.bfloat16, layout, 4)
    assert item(planned, "student: optimizer, main parameters").device == expected == -(-size.total // 4) * 12


def test_the_report_names_what_is_largest(capsys):
    planned = plan(job(), gpu=True)
    line = short(planned, stated(80, None))
    assert "during update" in line
    assert "student: optimizer, main parameters 91.54 GiB" in line
    print_plan(planned, stated(80, None))
    assert "teacher: weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("layout", "gpus_per_worker", "share"),
    [
        (Layout.colocate, None, 0.5),
        (Layout.colocate, 0.5, 0.25),
        (Layout.colocate, 0.0, 0.5),
        (Layout.disaggregated, None, 1.0),
        (Layout.disaggregated, 0.5, 0.5),
        (Layout.disaggregated, 2.0, 1.0),
    ],
)
def test_processes_on_the_same_gpu_share_it(layout: Layout, gpus_per_worker: float | None, share: float):
    cluster = RayCluster(layout=layout, gpus_per_worker=gpus_per_worker)
    assert device_share(Config(cluster=cluster, rollout=EmbeddedRollout())) == share
    assert device_share(Config(cluster=InProcessCluster(), rollout=EmbeddedRollout())) == 1.0


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return runs.world(tmp_path_factory.mktemp("world"))


def test_a_teacher_on_workers_of_its_own_has_a_table_of_its_own(world: Path, tmp_path: Path, capsys):
    apart = ("teacher=dedicated", "cluster=ray", "cluster.num_workers=1")
    assert runs.launch(world, tmp_path, "task=preflight", *apart, *runs.distil(world)) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    titles = [line.removesuffix(", each") for line in lines if line.endswith(", each")]
    assert titles == ["1 x training", "1 x rollout", "1 x teacher", "1 x controller"]


def job_by(config: Config) -> Job:
    """Without the size of a cache's slot, which depends on the dtype by and large only."""
    found = job_of(config, vocabulary_of(config.model))
    return without_slots(found)


def without_slots(found: Job) -> Job:
    engine = None if found.engine is None else dataclasses.replace(found.engine, slot_bytes=0)
    return dataclasses.replace(found, engine=engine)


ALONE = ("reference.kl_coef=0.1", "checkpoint.async_save=true", "megatron.max_tokens_per_device=64")
TOGETHER = ("cluster=ray", "estimator=ppo", "teacher=swap", "rollout.batch_size=4")


@pytest.mark.parametrize("overrides", [ALONE, TOGETHER], ids=["one process", "ray"])
def test_a_change_is_what_the_command_line_makes_of_it(
    compose: Composer, world: Path, tmp_path: Path, overrides: tuple[str, ...]
):
    def composed(*given: str) -> Config:
        return planned(compose, runs.arguments(world, tmp_path, *given)).configs[0]

    given = (*runs.distil(world), *overrides)
    whole = job_of(config := composed(*given), vocabulary_of(config.model))
    offered = {change.override.partition("=")[0]: change for change in changes(whole, stated(80, None))}
    assert len(offered) >= 7
    for change in offered.values():
        changed = {override.partition("=")[0]: override for override in (*given, *change.override.split())}
        assert job_by(composed(*changed.values())) == without_slots(change.job), change.override


def test_preflight_runs_nothing_and_tells_the_plan(world: Path, tmp_path: Path, capsys):
    assert runs.launch(world, tmp_path, "task=preflight", *runs.distil(world)) == 0
    told = capsys.readouterr().out
    for part in ("student: gradients", "teacher: weights", "engine: KV cache", "ready: prompts 64 of train"):
        assert part in told
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_divergence_of_whole_distributions_is_in_the_plan(world: Path, tmp_path: Path, capsys):
    """Two responses for each of four prompts, twelve tokens, a width of 32, fp32."""
    overrides = ("opd.divergence.kind=reverse_kl", "teacher=resident")
    assert runs.launch(world, tmp_path, "task=preflight", *overrides, *runs.distil(world)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "hidden states of its distributions" in line]
    assert f"{4 * 2 * 12 * 32 * 4 / 2**20:.1f} MiB" in line


@pytest.mark.parametrize(
    ("memory", "where"),
    [("device_memory_gib", "each training process's GPU needs"), ("host_memory_gib", "the host needs")],
)
def test_preflight_of_another_machine_refuses(world: Path, tmp_path: Path, capsys, memory: str, where: str):
    assert runs.launch(world, tmp_path, "task=preflight", f"task.{memory}=0.0001", *runs.distil(world)) == 2
    told = capsys.readouterr()
    assert f"memory: {where}" in told.err
    assert ("GPU" in told.out + told.err) == (memory == "device_memory_gib")


def test_a_start_is_refused(world: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("opd_trainer.memory.start.measured", lambda: Capacity(None, 1000, "available"))
    assert runs.launch(world, tmp_path / "a", *runs.distil(world)) == 2
    assert "task.check_memory=false starts anyway" in capsys.readouterr().err
    anyway = ("task.check_memory=false", "tracking.console=true", "steps=1")
    assert runs.launch(world, tmp_path / "b", *runs.distil(world), *anyway) == 0
    assert "memory: 1 x training" in capsys.readouterr().out
