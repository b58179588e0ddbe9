"""The servers of one model: ours, which are launched and started again, or somebody else's."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from opd_trainer.cluster.rendezvous import free_port
from opd_trainer.errors import UserError
from opd_trainer.sglang.command import Purpose, server_command, server_environment
from opd_trainer.sglang.config import LaunchConfig
from opd_trainer.sglang.endpoints import base_url
from opd_trainer.sglang.server import ManagedServer, ServerSpec


class Fleet:
    """Servers by URL.

    Args:
        urls: where they answer.
        servers: those of them that are our processes, by URL.
    """

    def __init__(self, urls: Sequence[str], servers: Sequence[ManagedServer] = ()) -> None:
        self.urls = tuple(base_url(url) for url in urls)
        self.servers = {server.spec.url: server for server in servers}

    @classmethod
    def launch(
        cls, name: str, model: str, config: LaunchConfig, log_dir: Path, purpose: Purpose | None = None
    ) -> "Fleet":
        """Servers of a Hugging Face folder; nothing runs before `start`.

        Args:
            name: "rollout" or "teacher"; for logs and messages.
            model: the folder.
            config: how.
            log_dir: where each server's output goes, as <name>-<number>.log.
            purpose: what they are for; None scores or generates with token ids.

        Raises:
            UserError: `config.host` is no address of this machine.
        """
        import torch

        gpu = torch.cuda.is_available()
        specs = []
        for number in range(config.servers):
            port = _free_port(config.host) if config.port is None else config.port + number
            devices = config.devices[number * config.tensor_parallel : (number + 1) * config.tensor_parallel]
            specs.append(
                ServerSpec(
                    name=f"{name} server {number}",
                    url=f"http://{config.host}:{port}",
                    command=tuple(server_command(model, port, config, purpose or Purpose(), gpu=gpu)),
                    environment=server_environment(devices, gpu=gpu),
                    log=log_dir / f"{name}-{number}.log",
                    start_timeout_s=config.start_timeout_s,
                    hang_after_s=config.hang_after_s,
                    max_restarts=config.max_restarts,
                )
            )
        return cls([spec.url for spec in specs], [ManagedServer(spec) for spec in specs])

    @property
    def num_restarts(self) -> int:
        """Of all servers together."""
        return sum(server.num_restarts for server in self.servers.values())

    async def start(self) -> None:
        """Launches ours and waits until all are healthy; on a failure none is left.

        Raises:
            WorkerError: one did not come up.
        """
        try:
            await asyncio.gather(*(server.start() for server in self.servers.values()))
        except BaseException:
            await self.close()
            raise

    async def ensure(self, url: str) -> bool:
        """Starts our server at `url` again if it died; True when it did.

        Raises:
            WorkerError: it died too often.
        """
        server = self.servers.get(url)
        return server is not None and await server.ensure()

    async def close(self) -> None:
        """Stops ours. Safe to call twice."""
        await asyncio.gather(*(server.close() for server in self.servers.values()))


def _free_port(host: str) -> int:
    try:
        return free_port(host)
    except OSError as error:
        raise UserError(
            f"launch.host={host}: nothing can listen there ({error}). Set it to a name or an IPv4 address of this "
            "machine: 127.0.0.1, or 0.0.0.0 for all that it has"
        ) from error
