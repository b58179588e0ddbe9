"""Weights to servers, three ways: shared memory on the same machine, a process group, a folder on a shared disk.

Around the transfer the server is paused and its prefix cache flushed. Newer SGLang wants the transfer between
/begin_weight_update and /end_weight_update; older versions answer 404 there and want nothing.
"""

import asyncio
import itertools
import json
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from opd_trainer.cluster.rendezvous import free_port
from opd_trainer.errors import UserError, WorkerError
from opd_trainer.sglang import process_group
from opd_trainer.sglang.client import SglangClient
from opd_trainer.sglang.endpoints import Endpoint
from opd_trainer.sglang.failure import RequestFailed
from opd_trainer.sglang.shared_memory import handles

Bucket = Sequence[tuple[str, Tensor]]
GROUP = "opd_trainer_weights"


class WeightSync(Protocol):
    """A way for weights to reach servers. Buckets are CPU copies that belong to the receiver."""

    async def push(self, endpoint: Endpoint, bucket: Bucket, version: int) -> None:
        """Sends some tensors; the server is paused."""
        ...

    async def finish(self, endpoint: Endpoint, version: int) -> None:
        """All buckets of the version were pushed."""
        ...

    async def forget(self, endpoint: Endpoint) -> None:
        """The server is a new process, or is not needed any more."""
        ...


class TensorSync:
    """Through shared memory; the servers are on this machine.

    Args:
        client: reaches the servers.
        timeout_s: of each call.
    """

    def __init__(self, client: SglangClient, timeout_s: float) -> None:
        self._client, self._timeout_s = client, timeout_s

    async def push(self, endpoint: Endpoint, bucket: Bucket, version: int) -> None:
        """Hands the tensors over; returns when the server has copied them."""
        size = await tensor_parallel(self._client, endpoint)
        body = {
            "serialized_named_tensors": [handles(bucket) for _ in range(size)],
            "flush_cache": False,
            "weight_version": str(version),
        }
        await self._client.ask(endpoint, "/update_weights_from_tensor", body, self._timeout_s)

    async def finish(self, endpoint: Endpoint, version: int) -> None:
        """Nothing is left to do."""

    async def forget(self, endpoint: Endpoint) -> None:
        """Nothing is kept."""


class DistributedSync:
    """Through a process group with each server: gloo for CPU servers, NCCL for GPUs.

    Args:
        client: reaches the servers.
        timeout_s: of each call.
        backend: gloo or nccl.
        address: ours, as the servers reach it.
    """

    def __init__(self, client: SglangClient, timeout_s: float, backend: str, address: str) -> None:
        self._client, self._timeout_s = client, timeout_s
        self._backend, self._address = backend, address
        self._groups: dict[str, tuple[str, Any]] = {}
        self._serial = itertools.count()

    async def push(self, endpoint: Endpoint, bucket: Bucket, version: int) -> None:
        """Broadcasts the tensors one by one."""
        name, group = self._groups.get(endpoint.url) or await self._join(endpoint)
        device = "cuda" if self._backend == "nccl" else "cpu"
        tensors = [tensor.to(device).contiguous() for _, tensor in bucket]
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [process_group.dtype_name(tensor.dtype) for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
            "group_name": name,
            "flush_cache": False,
            "weight_version": str(version),
        }
        await _both(
            self._client.ask(endpoint, "/update_weights_from_distributed", body, self._timeout_s),
            asyncio.to_thread(process_group.broadcast, group, tensors),
            self._timeout_s,
        )

    async def finish(self, endpoint: Endpoint, version: int) -> None:
        """Nothing is left to do."""

    async def forget(self, endpoint: Endpoint) -> None:
        """Leaves the group."""
        joined = self._groups.pop(endpoint.url, None)
        if joined is not None:
            process_group.leave(joined[1])

    async def _join(self, endpoint: Endpoint) -> tuple[str, Any]:
        # Never used twice: a server may still hold the group of an attempt that failed.
        name = f"{GROUP}_{os.getpid()}_{next(self._serial)}"
        size, port = 1 + await tensor_parallel(self._client, endpoint), free_port(self._address)
        body = {
            "master_address": self._address,
            "master_port": port,
            "rank_offset": 1,
            "world_size": size,
            "group_name": name,
            "backend": self._backend,
        }
        _, group = await _both(
            self._client.ask(endpoint, "/init_weights_update_group", body, self._timeout_s),
            asyncio.to_thread(
                process_group.join,
                self._backend,
                self._address,
                port,
                rank=0,
                size=size,
                name=name,
                timeout_s=self._timeout_s,
            ),
            self._timeout_s,
        )
        self._groups[endpoint.url] = name, group
        return name, group


class DiskSync:
    """Through a folder that the servers can read.

    Args:
        client: reaches the servers.
        timeout_s: of each call.
        folder: where versions are written, one at a time.
        model: Hugging Face folder with config.json and tokenizer.
    """

    def __init__(self, client: SglangClient, timeout_s: float, folder: Path, model: Path) -> None:
        self._client, self._timeout_s = client, timeout_s
        self._folder, self._model = folder.absolute(), model
        self._written: dict[str, str] = {}
        self._version: int | None = None
        self._lock = asyncio.Lock()

    async def push(self, endpoint: Endpoint, bucket: Bucket, version: int) -> None:
        """Writes the tensors, once for all servers."""
        async with self._lock:
            await self._write(bucket, version)

    async def _write(self, bucket: Bucket, version: int) -> None:
        from safetensors.torch import save_file

        if version != self._version:
            self._begin(version)
        if all(name in self._written for name, _ in bucket):
            return
        file = f"model-{len(set(self._written.values())) + 1:05d}.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in bucket}
        await asyncio.to_thread(save_file, tensors, self._path(version) / file, {"format": "pt"})
        self._written.update(dict.fromkeys(tensors, file))

    async def finish(self, endpoint: Endpoint, version: int) -> None:
        """Lets the server read the folder."""
        path = self._path(version)
        index = {"metadata": {}, "weight_map": self._written}
        (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        # A server that started without weights would take none from a folder either, unless told.
        body = {"model_path": str(path), "load_format": "auto", "weight_version": str(version), "flush_cache": True}
        await self._client.ask(endpoint, "/update_weights_from_disk", body, self._timeout_s)

    async def forget(self, endpoint: Endpoint) -> None:
        """Nothing is kept for one server."""

    def _begin(self, version: int) -> None:
        if self._version is not None:
            shutil.rmtree(self._path(self._version), ignore_errors=True)
        path = self._path(version)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        for file in self._model.iterdir():
            if (
                file.is_file()
                and file.suffix in (".json", ".txt", ".model", ".jinja")
                and "safetensors" not in file.name
            ):
                shutil.copy(file, path / file.name)
        self._written, self._version = {}, version

    def _path(self, version: int) -> Path:
        return self._folder / f"version-{version}"


async def update(
    client: SglangClient,
    sync: WeightSync,
    endpoint: Endpoint,
    buckets: Sequence[Bucket],
    *,
    version: int,
    timeout_s: float,
) -> None:
    """Gives a whole version to one server: pause, transfer, flush, resume.

    Raises:
        WorkerError: the server refused, hung or died; its weights are then a mixture.
    """
    ask = client.ask
    try:
        await ask(endpoint, "/pause_generation", {"mode": "retract"}, timeout_s)
        # A disk update is one call and opens no session.
        session = not isinstance(sync, DiskSync) and await has_sessions(client, endpoint, timeout_s)
        for bucket in buckets:
            await sync.push(endpoint, bucket, version)
        await sync.finish(endpoint, version)
        if session:
            await ask(endpoint, "/end_weight_update", {}, timeout_s)
        await ask(endpoint, "/flush_cache", {}, timeout_s)
        await ask(endpoint, "/continue_generation", {}, timeout_s)
    except (RequestFailed, TimeoutError, RuntimeError) as error:
        await sync.forget(endpoint)
        raise WorkerError(f"{endpoint.url} did not take the weights of version {version}: {error}") from error


async def has_sessions(client: SglangClient, endpoint: Endpoint, timeout_s: float) -> bool:
    """Opens a weight-update session where the server knows them; False on an older SGLang."""
    try:
        await client.ask(endpoint, "/begin_weight_update", {}, timeout_s)
    except RequestFailed as error:
        if "answered 404" in error.detail:
            return False
        if "already open" not in error.detail:
            raise
        # Of a transfer that broke off.
        await client.ask(endpoint, "/end_weight_update", {}, timeout_s)
        await client.ask(endpoint, "/begin_weight_update", {}, timeout_s)
    return True


async def tensor_parallel(client: SglangClient, endpoint: Endpoint) -> int:
    """GPUs of one server."""
    return int((await client.info(endpoint, "/server_info"))["tp_size"])


def own_address(host: str) -> str:
    """Our address as the server at `host` sees it.

    Raises:
        UserError: there is no way to `host` from here.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError as error:
            raise UserError(
                f"rollout: no way leads to the server at {host!r} ({error}). Set rollout.urls, or rollout.launch.host, "
                "to a name or an IPv4 address that this machine reaches"
            ) from error
        return probe.getsockname()[0]


async def _both(answer: Any, work: Any, timeout_s: float) -> tuple[Any, Any]:
    """Waits for a server's answer and for our side of the same exchange; the first failure ends the wait."""
    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(work)]
    try:
        first, second = await asyncio.wait_for(asyncio.gather(*tasks), timeout_s + 5.0)
        return first, second
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
