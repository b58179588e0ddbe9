"""Whether servers compute what the trainer computes: asked once, after the first weight sync."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from opd_trainer.collation import collate
from opd_trainer.errors import WorkerError
from opd_trainer.protocols import Learner, RolloutEngine
from opd_trainer.requests import requests_for
from opd_trainer.types import Prompt, Sampling

NUM_PROMPTS = 4
RESPONSE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class ParityCheck:
    """Compares log-probs of a few short samples with the trainer's.

    Weights under a wrong name, transposed, of another shape of the model, or not taken at all are several nats off; the
    number formats of an engine and a trainer are hundredths of a nat apart.

    Attributes:
        prompts: of the training data.
        sampling: how training responses are drawn.
        seed: of the run.
        learner: has the weights that were sent.
        max_gap: largest mean |difference| of a token's log-prob, nats.
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    seed: int
    learner: Learner
    max_gap: float

    async def __call__(self, engine: RolloutEngine) -> float:
        """The mean |difference|, nats; call after the first `engine.load`.

        Raises:
            WorkerError: it is more than allowed.
        """
        length = min(RESPONSE_TOKENS, self.sampling.max_response_tokens)
        sampling = dataclasses.replace(self.sampling, max_response_tokens=length, log_prob_top_k=0)
        requests = requests_for(self.prompts[:NUM_PROMPTS], 1, self.seed, "parity")
        samples = [sample async for sample in engine.generate(requests, sampling)]
        batch = collate([sample for sample in samples if len(sample.response)], sampling.temperature)
        ours = await self.learner.score(batch, "student")
        gap = float((batch.rollout.log_probs - ours)[batch.mask].abs().mean())
        # NaN is more than allowed too.
        if not gap <= self.max_gap:
            raise WorkerError(
                f"rollout: after the first weight sync log-probs of the servers are {gap:.3g} nats per token off those "
                f"of the trainer, more than rollout.max_parity_gap={self.max_gap:g}: the servers run another model, or "
                "misread the weights. Compare config.json on both sides; null switches the check off"
            )
        print(f"rollout: log-probs of servers and trainer agree to {gap:.1e} nats per token", flush=True)
        return gap
