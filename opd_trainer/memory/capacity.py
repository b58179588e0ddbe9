"""How much memory there is."""

from dataclasses import dataclass

import psutil
import torch


@dataclass(frozen=True, slots=True)
class Capacity:
    """Memory that a run may use.

    Attributes:
        device: bytes of each GPU; None without one.
        host: bytes of host memory; None where nothing is known of it.
        source: where the numbers are from, for people.
    """

    device: int | None
    host: int | None
    source: str

    @property
    def gpu(self) -> bool:
        """Whether devices have memory of their own."""
        return self.device is not None


def measured() -> Capacity:
    """What is free on this machine now."""
    host = psutil.virtual_memory().available
    if not torch.cuda.is_available():
        return Capacity(None, host, "available now, on the CPU")
    free, _ = torch.cuda.mem_get_info()
    return Capacity(free, host, f"free now on {torch.cuda.get_device_name()}")


def stated(device_gib: float | None, host_gib: float | None) -> Capacity:
    """Of another machine; with `device_gib` it has GPUs, otherwise it has not.

    Args:
        device_gib: memory of a GPU, GiB.
        host_gib: memory of the host, GiB.
    """
    device, host = (None if gib is None else int(gib * 2**30) for gib in (device_gib, host_gib))
    return Capacity(device, host, "as stated")
