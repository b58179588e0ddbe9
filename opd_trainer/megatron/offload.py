"""Weights that are on the host between uses, and whose way to the device overlaps the computation that needs them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from opd_trainer.errors import OpdError
from opd_trainer.megatron.build import MegatronModel
from opd_trainer.megatron.host_weights import HostWeights


class OffloadedWeights:
    """The weights of a frozen model.

    They are copied in the order of the forward pass, on a stream of their own: a layer waits for its own weights only,
    while those behind it are still on their way. On the CPU the copies are plain ones.

    Args:
        model: frozen; from now on without weights outside of `on_device`.
    """

    def __init__(self, model: MegatronModel) -> None:
        self.host = HostWeights.of(model)
        self._device = model.runtime.device
        # Registered in the order in which a forward pass calls them.
        self._owners = [
            m for module in model.modules for m in module.modules() if any(True for _ in m.parameters(False))
        ]
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._arrived: dict[Any, Any] = {}
        self._is_on_device = True
        self._release()
        if self._stream is not None:
            for owner in self._owners:
                owner.register_forward_pre_hook(self._wait)

    def require_on_device(self) -> None:
        """Refuses to compute without weights.

        Raises:
            OpdError: they are on the host.
        """
        if not self._is_on_device:
            raise OpdError("the model's weights are on the host: it computes inside of `on_device` only")

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """The weights are on the device inside, or on their way to it; the memory is free again afterwards.

        Raises:
            OpdError: they are there already.
        """
        if self._is_on_device:
            raise OpdError("the model's weights are on the device already")
        try:
            self._fetch()
            yield
        finally:
            self._release()

    def _fetch(self) -> None:
        self._is_on_device = True
        for parameter, host in self.host.tensors.items():
            parameter.data = torch.empty_like(host, device=self._device, pin_memory=False)
        if self._stream is None:
            self._copy()
            return
        # The memory may have belonged to work that this stream has not finished yet.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._copy()

    def _copy(self) -> None:
        for owner in self._owners:
            for parameter in owner.parameters(recurse=False):
                parameter.data.copy_(self.host[parameter], non_blocking=True)
            if self._stream is not None:
                self._arrived[owner] = self._stream.record_event()

    def _wait(self, owner: Any, _arguments: Any) -> None:
        arrived = self._arrived.get(owner)
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)

    def _release(self) -> None:
        if self._stream is not None:
            # Nobody gets the memory while a copy into it is still under way.
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._arrived.clear()
        for parameter in self.host.tensors:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._device)
        self._is_on_device = False
