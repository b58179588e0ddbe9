"""Weights on their way out of a worker, in buckets."""

from collections.abc import Iterator

from torch import Tensor

from opd_trainer.errors import OpdError


class Outbox:
    """Hands out the tensors of one model after the other; every rank has to exhaust it."""

    def __init__(self) -> None:
        self._buckets: Iterator[list[tuple[str, Tensor]]] | None = None

    def fill(self, tensors: Iterator[tuple[str, Tensor]], bucket_bytes: int) -> None:
        """Begins to hand out (Hugging Face name, full tensor), `bucket_bytes` or one tensor at a time."""
        self._buckets = _buckets(tensors, bucket_bytes)

    def next(self, *, keep: bool) -> list[tuple[str, Tensor]] | None:
        """The next bucket, on the CPU; None at the end.

        Tensors may share memory with the live weights: copy them before the next update.

        Args:
            keep: False gives an empty bucket: this rank only takes part in the gathering.

        Raises:
            OpdError: nothing is being handed out.
        """
        if self._buckets is None:
            raise OpdError("no weights are being handed out")
        bucket = next(self._buckets, None)
        if bucket is None:
            self._buckets = None
            return None
        return [(name, tensor.cpu()) for name, tensor in bucket] if keep else []


def _buckets(tensors: Iterator[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
