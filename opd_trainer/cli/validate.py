"""What a configuration as a whole must satisfy. One rule = one pure function; all problems are reported together.

A rule sees the configuration and what the user named (the demo's own settings do not count as named). Rules of
`ALWAYS` hold for every task that runs a model, those of `TRAINING` for task=train, those of `CONVERTING` for
task=convert.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from opd_trainer.cli.named import Named
from opd_trainer.cluster.config import InProcessCluster, RayCluster
from opd_trainer.config import Config
from opd_trainer.data.config import DataConfig, MixtureData
from opd_trainer.errors import CheckpointError, Problem
from opd_trainer.estimator.none import NoEstimator
from opd_trainer.estimator.problems import estimator_problems
from opd_trainer.loss.config import KlApply, KlEstimator
from opd_trainer.loss.problems import loss_problems, policy_loss_problems, reference_problems
from opd_trainer.megatron.build import architecture_problems
from opd_trainer.megatron.layout import layout_problems, model_parallel_size
from opd_trainer.megatron.source import architecture_of
from opd_trainer.model.config import Family
from opd_trainer.model.folder import inspect
from opd_trainer.opd.config import OpdType, ScheduleKind
from opd_trainer.opd.problems import opd_problems
from opd_trainer.reward.config import CompositeReward, CustomReward, RemoteReward
from opd_trainer.task.config import ConvertTask, SftTask, TrainTask
from opd_trainer.teacher.config import (
    DedicatedTeacher,
    ServerTeacher,
    SglangManagedTeacher,
    SwapTeacher,
    TeacherConfig,
)

Rule = Callable[[Config, Named], Iterator[Problem]]
DEMO_PREFIX = "demo:"


def teachers(config: Config) -> Iterator[tuple[str, TeacherConfig]]:
    """Every teacher with its dotted key."""
    yield "teacher", config.teacher
    for name, teacher in config.teachers.items():
        yield f"teachers.{name}", teacher


def is_server(teacher: TeacherConfig) -> bool:
    """Whether the teacher is reached over HTTP."""
    return isinstance(teacher, ServerTeacher)


def opd_type_is_chosen(config: Config, named: Named) -> Iterator[Problem]:
    """OPD is on, but nobody said where the teacher's log-probs come from."""
    unnamed = named.use_opd and not {"opd", "opd.type"} & named.keys
    if config.opd.type is None or unnamed:
        yield Problem(
            "opd.type",
            "not chosen while OPD is on",
            "the teacher's log-probs can come from a Megatron model or from an SGLang server",
            "Set opd=megatron (with teacher.load=DIR), opd=sglang (with teacher.url=URL), or opd=off",
        )


def megatron_teacher_has_weights(config: Config, named: Named) -> Iterator[Problem]:
    """opd=megatron without teacher.load."""
    if config.opd.type is not OpdType.megatron:
        return
    for key, teacher in teachers(config):
        if not is_server(teacher) and teacher.load is None:
            yield Problem(
                f"{key}.load",
                "null with opd=megatron",
                "the teacher is a Megatron model and has no weights to load",
                f"Set {key}.load=DIR (a Hugging Face folder or a torch_dist checkpoint), "
                "or opd=sglang with teacher=sglang_external and teacher.url=URL",
            )


def server_teacher_loads_nothing(config: Config, named: Named) -> Iterator[Problem]:
    """opd=sglang with teacher.load set."""
    if config.opd.type is not OpdType.sglang:
        return
    for key, teacher in teachers(config):
        managed = isinstance(teacher, SglangManagedTeacher)
        if teacher.load is not None and f"{key}.load" in named and not managed:
            choose = "teacher=" if key == "teacher" else f"+teacher@{key}="
            yield Problem(
                f"{key}.load",
                f"{teacher.load!r} with opd=sglang",
                "the server has loaded its own weights, this path would never be read",
                f"Drop {key}.load, set opd=megatron to load it here, or {choose}sglang_managed to serve it",
            )


def unused_teacher(config: Config, named: Named) -> Iterator[Problem]:
    """A teacher is named, but OPD is off."""
    if config.opd.type is not OpdType.off:
        return
    for key, teacher in teachers(config):
        for name in ("load", "url"):
            value = getattr(teacher, name)
            if value is not None and f"{key}.{name}" in named:
                yield Problem(
                    f"{key}.{name}",
                    f"{value!r} with opd=off",
                    "the teacher would never be asked",
                    f"Set opd={'megatron' if name == 'load' else 'sglang'}, or drop {key}.{name}",
                )


def server_is_known(config: Config, named: Named) -> Iterator[Problem]:
    """opd=sglang without teacher.url, or a managed server without weights or with somebody else's URL."""
    if config.opd.type is not OpdType.sglang:
        return
    for key, teacher in teachers(config):
        if isinstance(teacher, SglangManagedTeacher):
            if teacher.load is None:
                yield Problem(
                    f"{key}.load",
                    "null with a managed server",
                    "the server that we launch has no weights to serve",
                    f"Set {key}.load=DIR, a Hugging Face folder",
                )
            if teacher.url is not None:
                yield Problem(
                    f"{key}.url",
                    f"{teacher.url!r} with a managed server",
                    "the server that we launch has an address of its own",
                    f"Drop {key}.url, or choose sglang_external",
                )
        elif teacher.url is None:
            yield Problem(
                f"{key}.url",
                "null with opd=sglang",
                "there is no server to ask",
                f"Set {key}.url=http://HOST:PORT",
            )


def placement_fits_type(config: Config, named: Named) -> Iterator[Problem]:
    """The teacher's placement and opd.type contradict each other."""
    for key, teacher in teachers(config):
        choose = "teacher=" if key == "teacher" else f"+teacher@{key}="
        if config.opd.type is OpdType.megatron and is_server(teacher):
            yield Problem(
                key,
                "a server with opd=megatron",
                "opd=megatron asks a Megatron model",
                f"Set {choose}resident with {key}.load=DIR, or opd=sglang",
            )
        if config.opd.type is OpdType.sglang and not is_server(teacher):
            yield Problem(
                key,
                "a Megatron model with opd=sglang",
                "opd=sglang asks a server",
                f"Set {choose}sglang_external with {key}.url=URL, or opd=megatron",
            )
        if config.opd.type is OpdType.megatron and teacher.url is not None and f"{key}.url" in named:
            yield Problem(
                f"{key}.url",
                f"{teacher.url!r} with opd=megatron",
                "a Megatron teacher has no server",
                f"Drop {key}.url, or set opd=sglang {choose}sglang_external",
            )


def swapped_teacher_is_the_students_shape(config: Config, named: Named) -> Iterator[Problem]:
    """A teacher in the student's module with model settings of its own."""
    for key, teacher in teachers(config):
        if isinstance(teacher, SwapTeacher) and teacher.model is not None:
            choose = "teacher=" if key == "teacher" else f"+teacher@{key}="
            yield Problem(
                f"{key}.model",
                "set with swap",
                "the student's own module computes it, with the student's settings",
                f"Drop {key}.model, or set {choose}offload, which gives the teacher a module of its own",
            )


def dedicated_teacher_has_workers(config: Config, named: Named) -> Iterator[Problem]:
    """A dedicated teacher where there are no worker groups, or workers that its layout does not divide."""
    for key, teacher in teachers(config):
        if not isinstance(teacher, DedicatedTeacher) or config.opd.type is not OpdType.megatron:
            continue
        if not isinstance(config.cluster, RayCluster):
            choose = "teacher=" if key == "teacher" else f"+teacher@{key}="
            yield Problem(
                key,
                "dedicated with cluster=inprocess",
                "it has workers of its own, and one process holds one set of Megatron's process groups",
                f"Set cluster=ray, or {choose}offload, which needs no more device memory between uses either",
            )
        share = teacher.tensor_parallel * teacher.pipeline_parallel * teacher.context_parallel
        if min(teacher.num_workers, share) < 1 or teacher.num_workers % share:
            yield Problem(
                f"{key}.num_workers",
                f"{teacher.num_workers} with {key}.tensor_parallel x pipeline_parallel x context_parallel = {share}",
                "the ranks of one model must divide its workers",
                f"Set {key}.num_workers to a multiple of {max(1, share)}",
            )
        if teacher.pack and teacher.max_tokens_per_device < 1:
            yield Problem(
                f"{key}.max_tokens_per_device",
                str(teacher.max_tokens_per_device),
                "no token would fit into a micro-batch",
                f"Set {key}.max_tokens_per_device=8192",
            )


def teachers_score_at_the_same_time(config: Config, named: Named) -> Iterator[Problem]:
    """Some teachers are dedicated and others live in the student's workers."""
    if config.opd.type is not OpdType.megatron:
        return
    dedicated = {key: isinstance(teacher, DedicatedTeacher) for key, teacher in teachers(config)}
    if len(set(dedicated.values())) > 1:
        apart = ", ".join(key for key, is_dedicated in dedicated.items() if is_dedicated)
        yield Problem(
            "teachers",
            f"{apart} dedicated and the others not",
            "dedicated teachers score before the update and the others inside of it: which tokens count in the term "
            "would not be known when the loss weights are fixed",
            "Make all of them dedicated, or none",
        )


def algorithm(config: Config, named: Named) -> Iterator[Problem]:
    """What the algorithms themselves know to be zero or wrong."""
    estimator, opd = config.estimator, config.opd
    yield from opd_problems(opd, estimator_whitens=estimator.whiten, estimator_has_returns=estimator.has_returns)
    yield from estimator_problems(estimator, config.reference)
    yield from policy_loss_problems(estimator.loss)
    yield from reference_problems(config.reference)
    yield from loss_problems(config.loss)


def server_temperature(config: Config, named: Named) -> Iterator[Problem]:
    """SGLang gives log-probs of temperature 1, whatever the student samples at."""
    if config.opd.type is OpdType.sglang and config.rollout.temperature != 1.0:
        yield Problem(
            "rollout.temperature",
            f"{config.rollout.temperature} with opd=sglang",
            "the server gives log-probs of temperature 1: the difference to the student's would mean nothing",
            "Set rollout.temperature=1.0, or opd=megatron, where both sides are computed at the same temperature",
        )


def group_needs_siblings(config: Config, named: Named) -> Iterator[Problem]:
    """A group estimator with one sample per prompt has advantage 0; without OPD nothing is learned."""
    alone = "group" in config.estimator.needs and config.rollout.samples_per_prompt == 1
    if alone and config.opd.type is OpdType.off:
        yield Problem(
            "rollout.samples_per_prompt",
            "1 with a group-relative estimator and opd=off",
            "the advantage of a response relative to itself is 0, so nothing would be learned",
            "Set rollout.samples_per_prompt=4, estimator=reinforce_plus_plus, or opd=megatron",
        )


def rewardless(config: Config) -> str | None:
    """What keeps the task reward from the student, as the user would type it; None where it arrives."""
    if config.opd.only_reward:
        return "opd.only_reward=true"
    return "estimator=none" if isinstance(config.estimator, NoEstimator) else None


def unused_critic(config: Config, named: Named) -> Iterator[Problem]:
    """A critic is configured, but the estimator needs no values."""
    if config.estimator.critic_loss is None and "critic" in named:
        yield Problem(
            "critic",
            "set with an estimator that needs no values",
            "there would be no critic",
            "Set estimator=ppo, or drop critic.*",
        )


def someone_teaches(config: Config, named: Named) -> Iterator[Problem]:
    """Neither a task reward nor a teacher reaches the student."""
    cause, opd = rewardless(config), config.opd
    if cause is None or opd.type is None:
        return
    if opd.type is OpdType.off:
        yield Problem(
            cause.partition("=")[0],
            f"{cause} with opd=off",
            "without a task reward and without a teacher nothing would be learned",
            "Set opd=megatron with teacher.load=DIR, or estimator=grpo opd.only_reward=false",
        )
    elif opd.kl_coef == 0 and opd.schedule.kind is ScheduleKind.constant:
        yield Problem(
            "opd.kl_coef",
            f"0 with {cause}",
            "neither the task reward nor the teacher would reach the student",
            "Set opd.kl_coef=1.0, or estimator=grpo opd.only_reward=false",
        )


def zero_gradient_penalty(config: Config, named: Named) -> Iterator[Problem]:
    """k1 as a loss has gradient zero in expectation."""
    reference = config.reference
    k1 = reference.chosen_estimator is KlEstimator.k1
    if reference.used and k1 and reference.apply is KlApply.loss:
        yield Problem(
            "reference.estimator",
            "k1 with reference.apply=loss",
            "the expected gradient of log p_student under the student is zero: the penalty would do nothing",
            "Set reference.estimator=k2 (reverse KL), or reference.apply=reward",
        )


def temperature_is_positive(config: Config, named: Named) -> Iterator[Problem]:
    """Log-probs are those of logits / temperature."""
    if config.rollout.temperature <= 0:
        yield Problem(
            "rollout.temperature",
            str(config.rollout.temperature),
            "training divides logits by it, and greedy responses teach nothing about probabilities",
            "Set rollout.temperature=1.0 (eval.temperature=0 is greedy evaluation)",
        )


def files(key: str, data: DataConfig) -> Iterator[tuple[str, DataConfig]]:
    """The datasets that have a file of their own."""
    if isinstance(data, MixtureData):
        for name, part in data.datasets.items():
            yield from files(f"{key}.datasets.{name}", part)
    else:
        yield key, data


def training_data(config: Config, named: Named) -> Iterator[Problem]:
    """There are prompts to train on."""
    if not isinstance(config.task, TrainTask | SftTask):
        return
    found = list(files("data", config.data))
    if not found:
        yield Problem(
            "data.datasets", "empty", "a mixture needs datasets to draw from", "Set data.datasets.NAME.path=FILE"
        )
    for key, data in found:
        if data.path is None:
            yield Problem(f"{key}.path", "null", "there are no prompts to train on", f"Set {key}.path=FILE")


def evaluation_data(config: Config, named: Named) -> Iterator[Problem]:
    """Every evaluation set has a file."""
    for name, dataset in config.eval.datasets.items():
        for key, data in files(f"eval.datasets.{name}", dataset):
            if data.path is None:
                yield Problem(f"{key}.path", "null", "there are no prompts to evaluate on", f"Set {key}.path=FILE")


def reward_is_complete(config: Config, named: Named) -> Iterator[Problem]:
    """Rewards that need to be told something."""
    pending = [("reward", config.reward)]
    for key, reward in pending:
        if isinstance(reward, CustomReward) and not reward.path:
            yield Problem(
                f"{key}.path", "empty", "there is no function to call", f"Set {key}.path=package.module:function"
            )
        if isinstance(reward, RemoteReward) and not reward.url:
            yield Problem(f"{key}.url", "empty", "there is no server to ask", f"Set {key}.url=http://HOST:PORT/PATH")
        if isinstance(reward, CompositeReward):
            pending += [(f"{key}.parts.{name}", part) for name, part in reward.parts.items()]
            if not reward.parts:
                yield Problem(
                    f"{key}.parts", "empty", "there is nothing to add up", f"Set +reward@{key}.parts.NAME=OPTION"
                )


def demo_paths(config: Config, named: Named) -> Iterator[Problem]:
    """`demo:` paths exist only where the demo's recipe is."""
    if config.demo is not None:
        return
    paths = {f"{key}.load": getattr(config, key).load for key in ("model", "reference", "critic")}
    paths |= {f"{key}.load": teacher.load for key, teacher in teachers(config)}
    if isinstance(config.task, ConvertTask):
        paths["task.source"] = config.task.source
    datasets = [
        ("data", config.data),
        *((f"eval.datasets.{name}", data) for name, data in config.eval.datasets.items()),
    ]
    paths |= {f"{key}.path": data.path for whole, dataset in datasets for key, data in files(whole, dataset)}
    for key, path in paths.items():
        if path is not None and path.startswith(DEMO_PREFIX):
            yield Problem(
                key, repr(path), "only the demo's experiment builds it", "Set experiment=arithmetic, or a path"
            )


def conversion(config: Config, named: Named) -> Iterator[Problem]:
    """A conversion needs a checkpoint to read, and a name for what it writes."""
    task = config.task
    if not isinstance(task, ConvertTask):
        return
    if task.source is None:
        yield Problem("task.source", "null", "there is nothing to convert", "Set task.source=DIR")
    else:
        yield from loadable("task.source", task.source, config.model.ckpt_step)
    if task.target is None:
        yield Problem("task.target", "null", "there is no place to write to", "Set task.target=DIR")
    elif Path(task.target).expanduser().exists():
        yield Problem("task.target", task.target, "it exists, and a conversion overwrites nothing", "Set a new folder")
    if config.model.load is not None and "model.load" in named:
        yield Problem("model.load", config.model.load, "a conversion reads task.source", "Set task.source instead")


def loadable(key: str, path: str | None, ckpt_step: int | None) -> Iterator[Problem]:
    """What keeps a model from being loaded from a path."""
    if path is None or path.startswith(DEMO_PREFIX):
        return
    try:
        inspect(path, ckpt_step)
    except CheckpointError as error:
        what, _, rest = str(error).removeprefix(f"{path}: ").partition(": ")
        why, _, fix = rest.rpartition(". ")
        yield Problem(key, f"{path}: {what}", why, fix)


def checkpoints_exist(config: Config, named: Named) -> Iterator[Problem]:
    """Every path that a model is to be loaded from holds a checkpoint."""
    loads: list[tuple[str, str | None, int | None]] = [("model", config.model.load, config.model.ckpt_step)]
    if isinstance(config.task, TrainTask):
        if config.opd.type is OpdType.megatron:
            loads += [(key, teacher.load, teacher.ckpt_step) for key, teacher in teachers(config)]
        if config.reference.used:
            loads.append(("reference", config.reference.load, None))
        if config.estimator.critic_loss is not None:
            loads.append(("critic", config.critic.load, None))
    for key, path, ckpt_step in loads:
        yield from loadable(f"{key}.load", path, ckpt_step)


def student_has_tokenizer(config: Config, named: Named) -> Iterator[Problem]:
    """Text needs a tokenizer, which comes from the model's folder."""
    if config.model.load is None and config.model.huggingface is None:
        yield Problem(
            "model.load",
            "null",
            "there are no weights and no tokenizer",
            "Set model.load=DIR, or model.huggingface=DIR to train from scratch with the tokenizer in there",
        )


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


def ranges(config: Config, named: Named) -> Iterator[Problem]:
    """Numbers that have a smallest sensible value."""
    rollout, layout = config.rollout, config.megatron
    at_least: list[tuple[str, float, float]] = [
        ("steps", config.steps, 0),
        ("checkpoint.every", config.checkpoint.every, 0),
        ("checkpoint.keep", config.checkpoint.keep, 1),
        ("rollout.prompts_per_step", rollout.prompts_per_step, 1),
        ("rollout.samples_per_prompt", rollout.samples_per_prompt, 1),
        ("rollout.max_prompt_tokens", rollout.max_prompt_tokens, 1),
        ("rollout.max_response_tokens", rollout.max_response_tokens, 1),
        ("rollout.top_k", rollout.top_k, 0),
        ("rollout.bucket_bytes", rollout.bucket_bytes, 1),
        ("megatron.tensor_parallel", layout.tensor_parallel, 1),
        ("megatron.pipeline_parallel", layout.pipeline_parallel, 1),
        ("megatron.context_parallel", layout.context_parallel, 1),
        ("megatron.expert_parallel", layout.expert_parallel, 1),
        ("megatron.max_tokens_per_device", layout.max_tokens_per_device, 1),
        ("megatron.log_prob_chunk_tokens", layout.log_prob_chunk_tokens, 1),
        *(
            (f"{owner}.optimizer.{name}", getattr(optimizer, name), 0)
            for owner, optimizer in (("megatron", layout.optimizer), ("critic", config.critic.optimizer))
            for name in ("lr", "weight_decay", "warmup_steps", "clip_grad")
        ),
        ("opd.kl_coef", config.opd.kl_coef, 0),
        ("reference.kl_coef", config.reference.kl_coef, 0),
        ("eval.every", config.eval.every, 0),
        ("eval.samples_per_prompt", config.eval.samples_per_prompt, 1),
        ("eval.temperature", config.eval.temperature, 0),
    ]
    for key, value, smallest in at_least:
        if not value >= smallest:
            yield Problem(
                key, str(value), f"the smallest value that makes sense is {smallest}", f"Set {key}={smallest} or more"
            )
    if not 0 < rollout.top_p <= 1:
        yield Problem(
            "rollout.top_p", str(rollout.top_p), "it is a probability mass in (0, 1]", "Set rollout.top_p=1.0"
        )


ALWAYS: tuple[Rule, ...] = (
    training_data,
    evaluation_data,
    reward_is_complete,
    demo_paths,
    checkpoints_exist,
    student_has_tokenizer,
    layout_fits_cluster,
    layout_fits_model,
    experts_have_a_family,
    ranges,
)
CONVERTING: tuple[Rule, ...] = (conversion, demo_paths, layout_fits_cluster, ranges)
TRAINING: tuple[Rule, ...] = (
    opd_type_is_chosen,
    megatron_teacher_has_weights,
    server_teacher_loads_nothing,
    unused_teacher,
    server_is_known,
    placement_fits_type,
    swapped_teacher_is_the_students_shape,
    dedicated_teacher_has_workers,
    teachers_score_at_the_same_time,
    algorithm,
    server_temperature,
    group_needs_siblings,
    unused_critic,
    someone_teaches,
    zero_gradient_penalty,
    temperature_is_positive,
)


def validate(config: Config, named: Named) -> list[Problem]:
    """Every problem that the rules find; what this version lacks is told only where nothing else is wrong."""
    if isinstance(config.task, ConvertTask):
        return [problem for rule in CONVERTING for problem in rule(config, named)]
    training = isinstance(config.task, TrainTask)
    rules = (*TRAINING, *ALWAYS) if training else ALWAYS
    return [problem for rule in rules for problem in rule(config, named)]
