"""Parallel layouts against workers and models."""

import contextlib
from collections.abc import Iterator

from opd_trainer.cli.named import Named
from opd_trainer.cli.rules.common import DEMO_PREFIX, Rule
from opd_trainer.cluster.config import InProcessCluster, RayCluster
from opd_trainer.config import Config
from opd_trainer.errors import CheckpointError, Problem
from opd_trainer.megatron.build import architecture_problems
from opd_trainer.megatron.layout import layout_problems, model_parallel_size
from opd_trainer.megatron.source import architecture_of
from opd_trainer.model.config import Family


def layout_fits_cluster(config: Config, named: Named) -> Iterator[Problem]:
    """The ranks of a replica must divide the workers, and the sizes must not contradict each other."""
    layout = config.megatron
    sizes = (layout.tensor_parallel, layout.pipeline_parallel, layout.context_parallel, layout.expert_parallel)
    if min(sizes) < 1:
        return
    needed = max(model_parallel_size(layout), layout.pipeline_parallel * layout.expert_parallel)
    if isinstance(config.cluster, InProcessCluster) and needed > 1:
        yield Problem(
            "cluster",
            f"inprocess with a parallel layout of {needed} ranks",
            "one process is one rank",
            f"Set cluster=ray cluster.num_workers={needed}",
        )
    else:
        yield from layout_problems(layout, config.cluster.num_workers if isinstance(config.cluster, RayCluster) else 1)


def layout_fits_model(config: Config, named: Named) -> Iterator[Problem]:
    """The student can be cut into the layout."""
    model = config.model
    if model.load is not None and model.load.startswith(DEMO_PREFIX):
        return
    # What cannot be read is told by `checkpoints_exist` or, with all its details, when it is loaded.
    with contextlib.suppress(CheckpointError):
        yield from architecture_problems(architecture_of(model, vocab_size=1), config.megatron, trainable=True)


def experts_have_a_family(config: Config, named: Named) -> Iterator[Problem]:
    """Experts are described for a model that has none."""
    architecture = config.model.architecture
    keys = sorted(key for key in named.keys if key.startswith("model.architecture.experts."))
    if keys and architecture.family is not Family.qwen3_moe:
        yield Problem(
            keys[0],
            f"set with the family {architecture.family}",
            "its layers are dense, so that this would never be read",
            f"Set model.architecture.family=qwen3_moe, or drop {keys[0]}",
        )


ALWAYS: tuple[Rule, ...] = (layout_fits_cluster, layout_fits_model, experts_have_a_family)
CONVERTING: tuple[Rule, ...] = (layout_fits_cluster,)
