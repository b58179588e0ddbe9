"""Writes docs/refusals.md: command lines that are refused before anything starts, each with the message it gets.

python -m opd_trainer.cli.refusals
"""

import contextlib
import json
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from opd_trainer.cli.aliases import expand
from opd_trainer.cli.composition import Composer, Source, composer
from opd_trainer.cli.plan import plan, read
from opd_trainer.errors import ConfigError, Problem

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "refusals.md"
HEAD = """# What is refused, and what it says

Every command line below ends with exit code 2 before a model is loaded, a server is asked or a file is written; all its
problems are told at once, each with the override that repairs it. Without `experiment=null` a command line changes the
demo. MODEL is a Hugging Face folder, DIST a torch_dist checkpoint, EMPTY a folder without a model, and RUN the
directory of a run that was started.

Written by `python -m opd_trainer.cli.refusals`, which asks the very check that `launch.py` asks; a test holds that
every rule about combinations appears.
"""

OWN = "experiment=null model.load=MODEL data.path=x.jsonl"
SERVER = "opd=sglang teacher=sglang_external teacher.url=http://host:30000"

MODEL = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
}
"""The config.json in MODEL."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "Nothing would be learned": (
        "opd=off estimator=none",
        "opd=off opd.only_reward=true",
        "opd=off reward=none",
        "opd=off rollout.samples_per_prompt=1",
        "rollout.samples_per_prompt=1 opd.kl_coef=0",
        "estimator=none opd.kl_coef=0",
        "estimator=none reference.kl_coef=0.1 reference.apply=reward",
        "loss.updates_per_rollout=0",
        "loss.updates_per_rollout=300",
    ),
    "Known to be zero or wrong": (
        "reference.kl_coef=0.1 reference.estimator=k1",
        "reference.kl_coef=0.1 reference.apply=reward reference.estimator=k3",
        f"{SERVER} rollout.temperature=0.7",
        "rollout.temperature=0",
        "opd.apply=before_normalization",
        "opd.in_returns=true",
        "estimator=reinforce_plus_plus opd.in_returns=true",
        "opd.clip=0",
        "opd.trust_alpha=0",
        "opd.weights.kind=first_fraction opd.weights.fraction=0",
        "opd.weights.kind=importance opd.weights.gamma=-1",
        "opd.log_prob_top_k=-1",
        "opd.schedule.kind=target_kl opd.schedule.target=0",
        "opd.schedule.kind=linear opd.schedule.final=-1",
        "opd.divergence.kind=jsd opd.divergence.beta=1.5",
        "opd.divergence.kind=topk_reverse_kl opd.divergence.top_k=0",
        "opd.divergence.kind=reverse_kl opd.clip=5 opd.student_log_prob=old",
        "opd.divergence.kind=reverse_kl opd.weights.kind=importance",
        "opd.divergence.kind=reverse_kl teacher=offload",
        "opd.log_prob_top_k=8 teacher=dedicated cluster=ray",
        "opd.log_prob_top_k=8 opd.student_log_prob=old",
        "estimator.aggregation_tokens=100",
        "estimator=ppo estimator.gamma=1.5",
        "estimator=ppo estimator.value_loss.clip=0",
        "critic.load=MODEL",
        "estimator.loss.eps_low=2",
        "estimator.loss.dual_clip=1",
        "estimator=sapo estimator.loss.tau_pos=0",
        "loss.correction=tis loss.correction_low=3",
        "loss.correction=icepop loss.correction_low=2 loss.correction_high=3",
    ),
    "Settings that nothing would look at": (
        "opd.schedule.final=0.1",
        "opd.schedule.target=0.1",
        "opd.weights.fraction=0.5",
        "opd.divergence.beta=0.3",
        "loss.correction_high=5",
        "reference.load=MODEL",
        "rollout.filter.max_rounds=2",
        "estimator=ppo critic.optimizer.min_lr=1e-6",
        "eval.top_p=0.9",
    ),
    "Filters": (
        "estimator=none rollout.filter.zero_std=drop",
        "rollout.samples_per_prompt=1 rollout.filter.zero_std=replace",
        "reward=none rollout.filter.zero_std=drop",
        "rollout.filter.zero_std=replace rollout.filter.max_rounds=1",
    ),
    "Teachers": (
        OWN,
        "use_opd=true",
        f"{OWN} opd=megatron",
        f"{SERVER} teacher.load=MODEL",
        "opd=off teacher.load=MODEL",
        "opd=sglang",
        f"{OWN} opd=sglang teacher=sglang_managed teacher.url=http://host:30000",
        "opd=megatron teacher=sglang_external teacher.url=http://host:30000",
        "teacher=swap +model@teacher.model=base",
        "teacher=dedicated",
        "teacher=dedicated cluster=ray teacher.tensor_parallel=2",
        "teacher=dedicated cluster=ray teacher.pack=true teacher.max_tokens_per_device=0",
        "+teacher@teachers.maths=dedicated teachers.maths.load=demo:teacher cluster=ray",
        "+teacher@teachers.default=resident teachers.default.load=MODEL",
    ),
    "Grading": (
        "eval.samples_per_prompt=4",
        "reward.scale=0.4",
        "reward.scale=-1",
        "eval.correct_part=correct",
        "reward=composite +reward@reward.parts.right=exact eval.correct_part=wrong",
        "data.label_key=null",
        "task=sft task.stop_accuracy=0.9 reward=none",
        "task=sft task.stop_accuracy=0.9 eval.every=0",
    ),
    "Data, rewards, checkpoints": (
        "data.path=null",
        "data=mixture data.path=null",
        "eval.datasets.heldout.path=null",
        "+data@eval.datasets.both=mixture",
        "data.path=no/such/file.jsonl eval.datasets.math.path=nor/this.jsonl",
        "data=mixture data.datasets.one.path=x.jsonl data.datasets.one.weight=0",
        "data.offset=-1 data.n_rows=0",
        "\"data.prompt_template='Think first.'\"",
        "+data.chat_template_kwargs.tokenize=true",
        "model.load=null",
        "demo=null data.path=x.jsonl model.load=MODEL opd=off",
        "teacher.load=EMPTY",
        "model.load=no/such/folder",
        "model.load=demo:techer",
        "reward=custom",
        "reward=custom reward.path=math:no_such_function",
        "reward=remote",
        "reward=composite",
        "reward=composite +reward@reward.parts.reward=exact",
        "reward=length reward.free_tokens=100 reward.max_tokens=50",
        "reward=length reward.free_tokens=-1",
        "reward=format \"reward.pattern='('\"",
        "\"reward.mark=''\"",
        "reward=math reward.num_workers=0",
        "reward.timeout_s=0",
        "experiment=null task=convert",
        "experiment=null task=convert task.source=MODEL task.target=EMPTY model.load=MODEL",
        "experiment=null task=summarize",
        "experiment=null task=summarize task.sweep_dir=EMPTY",
    ),
    "Servers of ours": (
        "task=serve_teacher",
        "task=serve_teacher teacher=sglang_managed teacher.load=null",
        "task=serve_teacher teacher=sglang_managed teacher.load=EMPTY",
        "task=serve_teacher teacher=sglang_managed teacher.load=DIST",
        "task=serve",
        "task=serve rollout=sglang rollout.urls=[http://host:30000]",
        "rollout=sglang rollout.launch.servers=0",
        "rollout=sglang rollout.launch.hang_after_s=0",
        "rollout=sglang rollout.release_memory=true rollout.mode=one_step_off",
        "rollout=sglang rollout.max_parity_gap=0",
        "rollout=sglang rollout.launch.servers=2 rollout.launch.devices=['0']",
    ),
    "Rollouts of older weights": (
        "rollout.mode=one_step_off opd.student_log_prob=rollout",
        "rollout.mode=one_step_off loss.correction_high=0.5",
        "rollout.mode=one_step_off steps=1",
    ),
    "Parallel layouts": (
        "megatron.tensor_parallel=2",
        "cluster=ray megatron.tensor_parallel=3",
        f"{OWN} opd=off cluster=ray cluster.num_workers=8 megatron.tensor_parallel=8",
        "cluster=ray megatron.sequence_parallel=true",
        "model.architecture.experts.count=4",
    ),
    "Clusters": (
        "cluster=ray cluster.gpus_per_worker=1.5",
        "cluster=slurm cluster.address=head:6379 cluster.num_cpus=4",
        "cluster=slurm cluster.gpus_per_node=8 rollout=sglang",
        "cluster=ray cluster.layout=disaggregated rollout=sglang",
        "cluster=ray cluster.num_workers=0",
    ),
    "Numbers out of range": (
        "steps=-1 rollout.prompts_per_step=0 checkpoint.keep=0",
        "task=sft task.batch_size=0",
        "rollout.top_p=0",
        "opd.clip=nan",
    ),
    "Command lines": (
        "opd.kl_coeff=0.5",
        "opd=megatrom",
        "opd.kl_coef=strong",
        "opd.kl_coef=0.5,1.0",
        "use_opd=false opd_type=megatron",
        "teacher.model={dtype:bfloat16}",
        "output_dir=RUN",
        "output_dir=x.jsonl",
    ),
}
"""Command lines by topic. A new rule gets an example here; `tests/cli/test_refusals.py` says which rule has none."""


@contextlib.contextmanager
def scene() -> Iterator[None]:
    """A working directory with what the examples name."""
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        for folder in ("MODEL", "DIST", "EMPTY", "RUN"):
            Path(folder).mkdir()
        Path("MODEL/config.json").write_text(json.dumps(MODEL))
        Path("DIST/.metadata").write_text("")
        Path("EMPTY/notes.txt").write_text("no model")
        Path("x.jsonl").write_text("")
        record = {"config_hash": "another", "resume_hash": "another", "status": "running"}
        Path("RUN/run.json").write_text(json.dumps(record))
        yield


def refused(compose: Composer, example: str) -> list[Problem]:
    """The problems of a command line; none when it is accepted."""
    expanded = expand(shlex.split(example))
    try:
        plan(compose, read(expanded.argv, compose.source.directory), expanded)
    except ConfigError as error:
        return error.problems
    return []


def all_refused(compose: Composer) -> dict[str, list[Problem]]:
    """The problems of every example."""
    with scene():
        return {example: refused(compose, example) for examples in EXAMPLES.values() for example in examples}


def render(found: Mapping[str, Sequence[Problem]]) -> str:
    """The text of docs/refusals.md from what `all_refused` found."""
    lines = [HEAD]
    for topic, examples in EXAMPLES.items():
        lines += [f"## {topic}", ""]
        for example in examples:
            lines += [f"`{example}`", "", *(f"> {problem}\n" for problem in found[example])]
    return "\n".join(lines).rstrip("\n") + "\n"


def main() -> None:
    """Writes it."""
    with composer(Source(ROOT / "conf")) as compose:
        DOCUMENT.write_text(render(all_refused(compose)))


if __name__ == "__main__":
    main()
