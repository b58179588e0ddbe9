"""`task=serve_teacher` and `task=serve`: SGLang servers of a model, until somebody stops them."""

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd_trainer.config import Config
from opd_trainer.model.folder import inspect
from opd_trainer.rollout.config import SglangRollout
from opd_trainer.sglang.command import Purpose
from opd_trainer.sglang.config import LaunchConfig
from opd_trainer.sglang.fleet import Fleet
from opd_trainer.teacher.config import SglangManagedTeacher

WATCH_S = 2.0
"""Between two looks at the servers."""
ANYWHERE = "0.0.0.0"


async def serve_teacher(config: Config, output_dir: Path) -> None:
    """Serves `teacher.load` until SIGINT or SIGTERM, and tells how a run uses it.

    Raises:
        WorkerError: a server did not come up, or died too often.
    """
    assert isinstance(config.teacher, SglangManagedTeacher), "checked with the configuration"
    model, launch = _folder(config.teacher.load, config.teacher.ckpt_step), config.teacher.launch
    fleet = Fleet.launch("teacher", model, launch, output_dir / "servers")
    urls = ",".join(_urls(fleet, launch))
    told = f"opd=sglang teacher=sglang_external {_quoted('teacher.url', urls)}"
    await _serve(fleet, f"{model} teaches runs with\n    {told}", output_dir)


async def serve(config: Config, output_dir: Path) -> None:
    """Serves `model.load` until SIGINT or SIGTERM, with its tokenizer, so that it takes text as well as token ids.

    Raises:
        WorkerError: a server did not come up, or died too often.
    """
    assert isinstance(config.rollout, SglangRollout), "checked with the configuration"
    model, launch = _folder(config.model.load, config.model.ckpt_step), config.rollout.launch
    fleet = Fleet.launch("model", model, launch, output_dir / "servers", Purpose(text=True))
    urls = _urls(fleet, launch)
    told = "\n".join(f"    curl {url}/generate -H 'Content-Type: application/json' -d '{EXAMPLE}'" for url in urls)
    await _serve(fleet, f"{model} answers\n{told}", output_dir)


EXAMPLE = '{"text": "...", "sampling_params": {"max_new_tokens": 64}}'


async def _serve(fleet: Fleet, told: str, output_dir: Path) -> None:
    """Runs the servers, starts those again that die, and ends them on a signal."""
    with _stopped() as stopped:
        try:
            starting = asyncio.ensure_future(fleet.start())
            waiting = asyncio.ensure_future(stopped.wait())
            await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return
            await starting
            print(f"{told}\nlogs: {output_dir / 'servers'}; Ctrl-C stops", flush=True)
            while not stopped.is_set():
                await asyncio.wait({waiting}, timeout=WATCH_S)
                for url in () if stopped.is_set() else fleet.urls:
                    if await fleet.ensure(url):
                        print(f"{url} had died and was started again", flush=True)
            print("stopping", flush=True)
        finally:
            await fleet.close()


@contextmanager
def _stopped() -> Iterator[asyncio.Event]:
    """An event that SIGINT and SIGTERM set, inside."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, event.set)
    try:
        yield event
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _folder(load: str | None, ckpt_step: int | None) -> str:
    """The Hugging Face folder behind a path."""
    assert load is not None, "checked with the configuration"
    return str(inspect(load, ckpt_step).path)


def _urls(fleet: Fleet, launch: LaunchConfig) -> list[str]:
    """Where others reach the servers: by this machine's name where they listen on every address."""
    if launch.host != ANYWHERE:
        return list(fleet.urls)
    return [url.replace(launch.host, socket.gethostname()) for url in fleet.urls]


def _quoted(key: str, value: str) -> str:
    """An override; a comma would be a sweep."""
    return f"'{key}=\"{value}\"'" if "," in value else f"{key}={value}"
