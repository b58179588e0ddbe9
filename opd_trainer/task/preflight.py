"""`task=preflight`: everything about `task=train` that can be checked without starting it."""

from pathlib import Path

from opd_trainer.build.data import Prompts, load_data
from opd_trainer.build.placement import planned, server_devices
from opd_trainer.build.roster import teachers_of
from opd_trainer.build.teachers import build_server_teachers
from opd_trainer.build.vocabulary import Vocabulary, vocabulary_of
from opd_trainer.cluster.placement import describe
from opd_trainer.config import Config
from opd_trainer.memory.capacity import Capacity, measured, stated
from opd_trainer.memory.fit import refuse
from opd_trainer.memory.job import job_of
from opd_trainer.memory.plan import plan
from opd_trainer.memory.report import print_plan, short
from opd_trainer.memory.start import device_share
from opd_trainer.opd.config import OpdType
from opd_trainer.task.config import PreflightTask
from opd_trainer.teacher.config import SglangExternalTeacher
from opd_trainer.teacher.inline import checked_teacher


async def preflight(config: Config, output_dir: Path) -> None:
    """Reads data, tokenizers and shapes, asks servers that run already, and prints the memory plan.

    Raises:
        UserError: something would keep the run from starting, or its memory is not enough.
    """
    assert isinstance(config.task, PreflightTask)
    vocabulary, prompts = inputs_of(config)
    external = all(isinstance(teacher, SglangExternalTeacher) for teacher in teachers_of(config).values())
    if config.opd.type is not OpdType.megatron and external:
        for server in build_server_teachers(config, prompts, output_dir).values():
            try:
                await server.start()
                await server.preflight()
            finally:
                await server.close()
    job, capacity = job_of(config, vocabulary), capacity_of(config.task)
    planned = plan(job, gpu=capacity.gpu)
    print_plan(planned, capacity)
    print(short(planned, capacity))
    if config.task.check_memory:
        refuse(job, capacity, device_share=device_share(config))
    tell_placement(config)
    print(f"ready: {counted(prompts)}; models, teachers and layout fit")


def tell_placement(config: Config) -> None:
    """Prints who would sit where.

    Raises:
        PreflightError: there is too little of something.
    """
    placement = planned(config)
    if placement is not None:
        print("\n".join(describe(placement)))
    for name, devices in server_devices(config).items():
        print(f"  SGLang servers of {name}: GPUs {', '.join(map(str, devices))} of the controller's node")


def inputs_of(config: Config) -> tuple[Vocabulary, Prompts]:
    """Tokenizer and prompts, after a look at the shapes of Megatron teachers.

    Raises:
        UserError: something is missing or does not fit.
    """
    vocabulary = vocabulary_of(config.model)
    prompts = load_data(config, vocabulary)
    if config.opd.type is OpdType.megatron:
        for name, teacher in teachers_of(config).items():
            checked_teacher(name, teacher, config.model)
    return vocabulary, prompts


def check_inputs(config: Config) -> str:
    """The part of a preflight that needs neither a GPU nor a server; says what there is.

    Raises:
        UserError: something is missing or does not fit.
    """
    return counted(inputs_of(config)[1])


def counted(prompts: Prompts) -> str:
    """How many there are."""
    return "prompts " + ", ".join(f"{len(one.prompts)} of {one.name}" for one in (*prompts.training, *prompts.held_out))


def capacity_of(task: PreflightTask) -> Capacity:
    """Of the machine that is asked about."""
    if task.device_memory_gib is None and task.host_memory_gib is None:
        return measured()
    return stated(task.device_memory_gib, task.host_memory_gib)
