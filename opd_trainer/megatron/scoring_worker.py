"""A Megatron worker that only scores: one shard of a dedicated teacher.

A plain class, like the training worker: every method is collective.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from opd_trainer.errors import OpdError
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.frozen import ResidentModel, load_resident
from opd_trainer.megatron.micro_batch import Scoring, prepare
from opd_trainer.megatron.outbox import Outbox
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.megatron.spec import Place, place_of
from opd_trainer.model.config import ModelConfig
from opd_trainer.types import TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSpec:
    """What the workers of one frozen model are told; picklable.

    Attributes:
        model: that scores.
        megatron: its own parallel layout.
        scoring: how log-probs are computed.
        seed: of the run.
    """

    model: ModelConfig
    megatron: MegatronConfig
    scoring: Scoring
    seed: int

    def make_worker(self, rank: int, world_size: int, rendezvous: str) -> "ScoringWorker":
        """The worker of `rank`."""
        return ScoringWorker(self, rank, world_size, rendezvous)


class ScoringWorker:
    """See the module.

    Args:
        spec: what to build.
        rank: of this worker.
        world_size: number of workers.
        rendezvous: where they meet (a torch.distributed init method).
    """

    def __init__(self, spec: ScoringSpec, rank: int, world_size: int, rendezvous: str) -> None:
        self._spec = spec
        self._runtime = MegatronRuntime(rank, world_size, rendezvous, spec.megatron, spec.seed)
        self._model: ResidentModel | None = None
        self._outbox = Outbox()

    def start(self) -> None:
        """Joins the other workers and loads the model.

        Raises:
            UserError: it cannot be loaded.
        """
        self._runtime.start()
        self._model = load_resident(self._runtime, self._spec.model, self._spec.scoring)

    def close(self) -> None:
        """Frees the model and tears down the process groups and patches. Safe to call twice, or before `start`."""
        self._model, self._outbox = None, Outbox()
        self._runtime.close()

    def place(self) -> Place:
        """Where this worker is."""
        return place_of(self._runtime)

    def score(self, micro_batches: Sequence[TokenBatch]) -> list[Tensor]:
        """Log-probs f32[T] of each micro-batch of this data-parallel rank, NaN where the mask is False."""
        model = self._started()
        return [model.score(prepare(batch, self._runtime)).cpu() for batch in micro_batches]

    def start_export(self, bucket_bytes: int, _model: str) -> None:
        """Begins to hand out the weights; see `Outbox`."""
        self._outbox.fill(self._started().export(), bucket_bytes)

    def next_bucket(self) -> list[tuple[str, Tensor]] | None:
        """The next (Hugging Face name, full tensor on the CPU) pairs; None at the end. Only rank 0 has tensors."""
        return self._outbox.next(keep=self._runtime.rank == 0)

    def _started(self) -> ResidentModel:
        if self._model is None:
            raise OpdError("the scoring worker is not started, or is closed")
        return self._model
