"""Parallel layouts: what is impossible, and which pipeline stage has which layers."""

from opd_trainer.errors import Problem
from opd_trainer.megatron.config import MegatronConfig


def model_parallel_size(settings: MegatronConfig) -> int:
    """Ranks that share one replica of the model."""
    return settings.tensor_parallel * settings.pipeline_parallel * settings.context_parallel


def layout_problems(settings: MegatronConfig, world_size: int) -> list[Problem]:
    """What makes a parallel layout impossible for so many processes."""
    return [*_size_problems(settings, world_size), *_combination_problems(settings)]


def _size_problems(settings: MegatronConfig, world_size: int) -> list[Problem]:
    problems = []
    share = model_parallel_size(settings)
    if world_size % share:
        sizes = f"{settings.tensor_parallel} x {settings.pipeline_parallel} x {settings.context_parallel}"
        what = f"tensor x pipeline x context parallel = {sizes}"
        why = f"it does not divide {world_size} workers"
        problems.append(Problem("megatron", what, why, f"Set cluster.num_workers to a multiple of {share}"))
    elif (world_size // settings.pipeline_parallel) % settings.expert_parallel:
        stage = world_size // settings.pipeline_parallel
        why = f"it does not divide the {stage} workers of a pipeline stage, which share the experts"
        fix = f"Set megatron.expert_parallel to a divisor of {stage}"
        problems.append(Problem("megatron.expert_parallel", str(settings.expert_parallel), why, fix))
    tokens = settings.tensor_parallel * settings.context_parallel
    if tokens % settings.expert_parallel and settings.expert_parallel % tokens:
        why = f"ranks that share a replica (tensor x context parallel = {tokens}) would wait for different replicas"
        fix = f"Set megatron.expert_parallel to a divisor or a multiple of {tokens}"
        problems.append(Problem("megatron.expert_parallel", str(settings.expert_parallel), why, fix))
    return problems


def _combination_problems(settings: MegatronConfig) -> list[Problem]:
    problems = []
    if settings.sequence_parallel and settings.tensor_parallel == 1:
        why = "it shards what tensor-parallel ranks would hold twice, and there is one of them"
        fix = "Set megatron.sequence_parallel=false, or megatron.tensor_parallel=2"
        problems.append(Problem("megatron.sequence_parallel", "true with tensor_parallel=1", why, fix))
    layers = settings.pipeline_layers
    if layers is not None and (len(layers) != settings.pipeline_parallel or min(layers, default=0) < 1):
        why = f"it needs one positive number for each of the {settings.pipeline_parallel} pipeline stages"
        fix = "Set megatron.pipeline_layers=null to spread the layers evenly"
        problems.append(Problem("megatron.pipeline_layers", str(list(layers)), why, fix))
    return problems


def stage_layers(num_layers: int, settings: MegatronConfig) -> tuple[int, ...]:
    """Layers of each pipeline stage of a model with `num_layers`.

    Those of `pipeline_layers` if they are as many in all; otherwise spread evenly. Where that does not work out the
    first stages have one more, because the last one has the output head.
    """
    wanted = settings.pipeline_layers
    if wanted is not None and sum(wanted) == num_layers:
        return tuple(wanted)
    stages = settings.pipeline_parallel
    return tuple(num_layers // stages + (stage < num_layers % stages) for stage in range(stages))
