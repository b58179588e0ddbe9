"""A reward from a function of the user's: sync or async, for one sample or for all samples of a prompt."""

import asyncio
import importlib
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd_trainer.errors import ConfigError, Problem, WorkerError
from opd_trainer.reward.config import CustomReward, Per
from opd_trainer.reward.parts import parts_of
from opd_trainer.types import Sample


def load_function(path: str, at: str = "reward") -> Callable[..., Any]:
    """The function that ``package.module:function`` names.

    Args:
        path: the name.
        at: dotted key of the reward that it is of, for messages.

    Raises:
        ConfigError: there is none.
    """
    module_name, _, name = path.partition(":")
    key, what = f"{at}.path", repr(path) if path else "empty"
    fix = f"Set {key}=package.module:function; the package must be importable (installed, or on PYTHONPATH)"
    if not module_name or not name:
        raise ConfigError([Problem(key, what, "it is not of the form package.module:function", fix)])
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError([Problem(key, what, str(error), fix)]) from error
    if not callable(function):
        raise ConfigError([Problem(key, what, "it cannot be called", fix)])
    return function


async def in_thread(function: Callable[..., Any], argument: Any) -> Any:
    """Calls a sync function in a daemon thread, so that one that hangs does not keep the run from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def work() -> None:
        value, error = None, None
        try:
            value = function(argument)
        except BaseException as raised:
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=work, name="custom-reward", daemon=True).start()
    return await future


@dataclass(slots=True)
class Group:
    """Samples of one prompt on their way to a function that wants them together."""

    samples: list[Sample] = field(default_factory=list)
    result: "asyncio.Future[dict[int, dict[str, float]]]" = field(default_factory=asyncio.Future)


class Custom:
    """See `CustomReward`."""

    def __init__(self, config: CustomReward) -> None:
        self._config = config
        self._function = load_function(config.path)
        self._slots = asyncio.Semaphore(config.max_threads)
        self._groups: dict[str, Group] = {}

    async def __call__(self, sample: Sample, group_size: int) -> dict[str, float]:
        """What the function says of the sample; per group, once its last sibling has arrived.

        Raises:
            TimeoutError: the function took longer than `timeout_s`.
            WorkerError: it returned something else than rewards. Whatever it raises passes through.
        """
        if self._config.per is Per.sample:
            return parts_of(await self._call(sample), self._config.path)
        group = self._groups.setdefault(sample.prompt.id, Group())
        group.samples.append(sample)
        if len(group.samples) == group_size:
            del self._groups[sample.prompt.id]
            await self._score(group)
        # One sibling that gives up must not take the others' result with it.
        return (await asyncio.shield(group.result))[sample.index]

    async def _score(self, group: Group) -> None:
        samples = sorted(group.samples, key=lambda sample: sample.index)
        try:
            values = await self._call(samples)
            if not isinstance(values, Sequence) or len(values) != len(samples):
                raise WorkerError(f"{self._config.path} did not return a list of {len(samples)} rewards for a group")
            parts = [parts_of(value, self._config.path) for value in values]
        except Exception as error:
            group.result.set_exception(error)
        else:
            group.result.set_result({s.index: part for s, part in zip(samples, parts, strict=True)})

    async def _call(self, argument: Sample | list[Sample]) -> Any:
        async with self._slots:
            try:
                return await asyncio.wait_for(self._answer(argument), self._config.timeout_s)
            except TimeoutError as error:
                limit = f"reward.timeout_s={self._config.timeout_s:g}"
                raise TimeoutError(f"{self._config.path} took longer than {limit}") from error

    async def _answer(self, argument: Sample | list[Sample]) -> Any:
        if inspect.iscoroutinefunction(self._function):
            return await self._function(argument)
        # What is not declared as async may still answer with something to wait for: an object with an async __call__.
        value = await in_thread(self._function, argument)
        return await value if inspect.isawaitable(value) else value

    async def close(self) -> None:
        """Holds nothing that needs closing."""
