"""Who the teacher is, where it lives, and whether anybody teaches at all."""

from collections.abc import Iterator

from opd_trainer.build.roster import DEFAULT_TEACHER
from opd_trainer.cli.named import Named
from opd_trainer.cli.rules.common import Rule, is_server, teachers
from opd_trainer.cluster.config import RayCluster
from opd_trainer.config import Config
from opd_trainer.errors import Problem
from opd_trainer.opd.config import OpdType
from opd_trainer.teacher.config import (
    DedicatedTeacher,
    ResidentTeacher,
    SglangManagedTeacher,
    SwapTeacher,
)


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


def default_teacher_is_one(config: Config, named: Named) -> Iterator[Problem]:
    """A further teacher by the name that samples without a choice ask for."""
    if config.opd.on and DEFAULT_TEACHER in config.teachers:
        key = f"teachers.{DEFAULT_TEACHER}"
        yield Problem(
            key,
            "a second teacher of this name",
            "samples that name no other are scored by `teacher`, which would never be asked",
            f"Set teacher.load and teacher=PLACEMENT in place of {key}, or give this one another name",
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


def distributions_are_at_hand(config: Config, named: Named) -> Iterator[Problem]:
    """Whole distributions, or candidates, of a teacher that cannot give them where they are needed."""
    opd = config.opd
    if not opd.on:
        return
    for key, teacher in teachers(config):
        choose = "teacher=" if key == "teacher" else f"+teacher@{key}="
        placement = "a server" if is_server(teacher) else type(teacher).__name__.removesuffix("Teacher").lower()
        if opd.divergence.dense and not isinstance(teacher, ResidentTeacher):
            yield Problem(
                "opd.divergence.kind",
                f"{opd.divergence.kind} with {placement} as {key}",
                "it compares whole distributions while the student trains, so the teacher's weights must be there",
                f"Set opd=megatron {choose}resident, or opd.divergence.kind=sampled",
            )
        if opd.log_prob_top_k and isinstance(teacher, DedicatedTeacher):
            yield Problem(
                "opd.log_prob_top_k",
                f"{opd.log_prob_top_k} with dedicated as {key}",
                "its workers report the sampled tokens only",
                f"Set opd.log_prob_top_k=0, or {choose}resident",
            )
    if opd.log_prob_top_k and opd.type is OpdType.megatron and not opd.in_update:
        yield Problem(
            "opd.log_prob_top_k",
            f"{opd.log_prob_top_k} with a term that is not computed inside the update",
            "candidates of student and teacher are compared there",
            "Set opd.log_prob_top_k=0, or opd.apply=after_normalization opd.in_returns=false opd.student_log_prob=live",
        )


TRAINING: tuple[Rule, ...] = (
    opd_type_is_chosen,
    megatron_teacher_has_weights,
    server_teacher_loads_nothing,
    unused_teacher,
    server_is_known,
    placement_fits_type,
    swapped_teacher_is_the_students_shape,
    dedicated_teacher_has_workers,
    default_teacher_is_one,
    teachers_score_at_the_same_time,
    distributions_are_at_hand,
)
