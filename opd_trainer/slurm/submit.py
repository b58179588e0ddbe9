"""Puts runs into SLURM's queue, and waits for them."""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_trainer.cluster.config import SlurmCluster
from opd_trainer.config import Config
from opd_trainer.errors import JobFailed, PreflightError
from opd_trainer.slurm.code import code_lines, freeze_code
from opd_trainer.slurm.config import SlurmQueue
from opd_trainer.slurm.job import RunInJob
from opd_trainer.slurm.queue import (
    MAY_RETURN,
    ON_ITS_WAY,
    UNREACHABLE,
    Ended,
    Outcome,
    State,
    Submitted,
    cpus_of_nodes,
    ended,
    states,
)

SOONEST_POLL_S, LATEST_POLL_S = 0.5, 15.0
RETURN_S = 10.0
"""How long after it has ended SLURM may take to put a job back into the queue."""
OUTAGE_S = 1800.0
"""How long SLURM may not answer before the wait for a job ends: its controller may be started anew."""
FOLDER = "slurm"
"""Below the directory of a run, or of a sweep: logs, scripts and the code of jobs."""


@dataclass(frozen=True, slots=True)
class ToRun:
    """A run that is to be submitted.

    Attributes:
        config: its configuration.
        directory: its run directory, absolute.
    """

    config: Config
    directory: Path

    @property
    def cluster(self) -> SlurmCluster:
        """What it asks of SLURM."""
        assert isinstance(self.config.cluster, SlurmCluster), "checked with the configuration"
        return self.config.cluster


def submit(runs: Sequence[ToRun], queue: SlurmQueue, folder: Path) -> list[Submitted]:
    """Submits runs; those that want the same nodes become one array.

    Args:
        runs: what to submit.
        queue: of the site.
        folder: for scripts, logs and code; on a file system that all nodes see.

    Raises:
        PreflightError: SLURM is not here, or does not take the job.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    for run in runs:
        _check_nodes(run.cluster, queue)
    lines = [*queue.setup, *code_lines(freeze_code(folder))]
    submitted: dict[int, Submitted] = {}
    for shape in dict.fromkeys(shape_of(run.cluster) for run in runs):
        chosen = [number for number, run in enumerate(runs) if shape_of(run.cluster) == shape]
        try:
            executor = submitit.SlurmExecutor(folder=folder / "%j", max_num_timeout=queue.max_num_timeout)
            executor.update_parameters(**parameters(runs[chosen[0]], queue, lines, folder))
            jobs = executor.submit_array([RunInJob(runs[number].config, runs[number].directory) for number in chosen])
        except FailedJobError as error:
            asked = ", ".join(f"{name}={value}" for name, value in zip(SHAPE, shape, strict=True) if value is not None)
            raise PreflightError(f"SLURM does not take the job: {error}\nIt was asked for {asked}.") from error
        except RuntimeError as error:
            raise PreflightError(f"cluster=slurm: {error} Run it where sbatch works, a login node.") from error
        for number, job in zip(chosen, jobs, strict=True):
            paths = job.paths
            submitted[number] = Submitted(job.job_id, runs[number].directory, paths.stdout, paths.result_pickle)
    return [submitted[number] for number in range(len(runs))]


def _check_nodes(cluster: SlurmCluster, queue: SlurmQueue) -> None:
    """SLURM takes a job that wants more than there is, and lets it wait for ever."""
    cpus = cpus_of_nodes(queue.partition)
    large = [count for count in cpus if count >= (cluster.cpus_per_node or 0)]
    if cpus and len(large) < cluster.nodes:
        partition = "the default partition" if queue.partition is None else f"the partition {queue.partition}"
        each = "" if cluster.cpus_per_node is None else f" of {cluster.cpus_per_node} CPUs"
        raise PreflightError(
            f"cluster.nodes={cluster.nodes}: {partition} has {len(cpus)} nodes, the largest with {max(cpus)} CPUs, and "
            f"{len(large)} that will do: the job would wait for ever for {cluster.nodes} nodes{each}. Set "
            "cluster.nodes or cluster.cpus_per_node lower, or another hydra.launcher.partition."
        )


SHAPE = ("cluster.nodes", "cluster.gpus_per_node", "cluster.cpus_per_node", "cluster.max_restarts")


def shape_of(cluster: SlurmCluster) -> tuple[int | None, ...]:
    """What an array has in common; the values of SHAPE."""
    return cluster.nodes, cluster.gpus_per_node, cluster.cpus_per_node, cluster.max_restarts


def back_into_the_queue(folder: Path, max_restarts: int) -> list[str]:
    """Lines of shell that end a job's script: tasks that were killed, rather than failed, left no result."""
    result = f'{shlex.quote(str(folder))}/"$id/${{id}}_0_result.pkl"'
    return [
        "status=$?",
        'id="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"',
        'id="${id:-$SLURM_JOB_ID}"',
        f'if [ $status -ne 0 ] && [ ! -e {result} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ]; then',
        '    echo "Tasks were killed, or a node is lost: the job goes back into the queue."',
        '    scontrol requeue "$SLURM_JOB_ID" && sleep 60',
        "fi",
        "exit $status",
    ]


def parameters(run: ToRun, queue: SlurmQueue, setup: Sequence[str], folder: Path) -> dict[str, Any]:
    """What submitit calls sbatch with; a null leaves SLURM's choice."""
    cluster = run.cluster
    lines = list(setup)
    if cluster.cpus_per_node is not None:
        # Since 22.05 srun does not take it from sbatch by itself.
        lines.append(f"export SRUN_CPUS_PER_TASK={cluster.cpus_per_node}")
    wanted = {
        "job_name": run.config.name,
        "nodes": cluster.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": cluster.gpus_per_node,
        "cpus_per_task": cluster.cpus_per_node,
        "time": queue.timeout_min,
        "mem": None if queue.mem_gb is None else f"{round(queue.mem_gb * 1024)}M",
        "partition": queue.partition,
        "account": queue.account,
        "qos": queue.qos,
        "constraint": queue.constraint,
        "nodelist": queue.nodelist,
        "exclude": queue.exclude,
        "exclusive": queue.exclusive or None,
        "comment": queue.comment,
        "setup": lines,
        "teardown": back_into_the_queue(folder, cluster.max_restarts),
        # One task that fails ends the others, and with them the job.
        "srun_args": ["--kill-on-bad-exit=1", *queue.srun_args],
        "additional_parameters": {"requeue": True, **queue.additional_parameters},
        "array_parallelism": queue.array_parallelism,
        "signal_delay_s": queue.signal_delay_s,
        "stderr_to_stdout": True,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def announce(jobs: Sequence[Submitted]) -> None:
    """Tells where to look."""
    for job in jobs:
        print(f"submitted job {job.id}: run directory {job.directory}, log {job.log}", flush=True)


def wait(jobs: Sequence[Submitted], sleep: Callable[[float], None] = time.sleep) -> list[Ended]:
    """Waits until all have ended, telling what happens to them; the order is that of `jobs`."""
    known: dict[str, State] = {}
    done: dict[str, Ended] = {}
    doubtful: dict[str, float] = {}
    pause = SOONEST_POLL_S
    while len(done) < len(jobs):
        left = [job for job in jobs if job.id not in done]
        for job_id, state in states([job.id for job in left]).items():
            if known.get(job_id) != state:
                known[job_id] = state
                pause = SOONEST_POLL_S
                print(f"job {job_id}: {state}", flush=True)
        for job in left:
            state = known[job.id].name
            if state in ON_ITS_WAY:
                doubtful.pop(job.id, None)
                continue
            patience = RETURN_S if state in MAY_RETURN else OUTAGE_S if state == UNREACHABLE else 0.0
            now = time.monotonic()
            if now >= doubtful.setdefault(job.id, now) + patience:
                done[job.id] = ended(job, state)
        if len(done) < len(jobs):
            sleep(pause)
            pause = min(pause * 1.5, LATEST_POLL_S)
    return [done[job.id] for job in jobs]


def follow(jobs: Sequence[Submitted]) -> list[Ended]:
    """Waits for jobs; an interruption from the keyboard leaves them in the queue, and says how to end them."""
    try:
        return wait(jobs)
    except KeyboardInterrupt:
        ids = shlex.join(dict.fromkeys(job.id.partition("_")[0] for job in jobs))
        print(f"\nno longer waiting; the jobs go on. To end them: scancel {ids}", flush=True)
        raise


def failure(end: Ended) -> JobFailed:
    """What to raise for a job that failed."""
    assert end.outcome is Outcome.failed
    return JobFailed(f"job {end.job.id} {end.state}: {end.job.directory}\n{end.said.rstrip()}\nlog: {end.job.log}")
