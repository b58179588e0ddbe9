"""What happens to a sample that its teacher could not score, and how many may fail."""

from collections import Counter
from dataclasses import dataclass, field

import torch

from opd_trainer.errors import TeacherError
from opd_trainer.metrics import Metrics
from opd_trainer.sglang.failure import RequestFailed
from opd_trainer.teacher.config import OnFailure
from opd_trainer.types import Sample, ScoreStatus


def settle(sample: Sample, failure: RequestFailed, policy: OnFailure, key: str) -> Sample:
    """The sample with its status, and with log-probs according to the policy; `key` is that of the teacher's settings.

    mask: unknown. fallback_rollout: the engine's own log-probs and candidates, so that the reverse KL is about 0.

    Raises:
        TeacherError: the policy is abort.
    """
    if policy is OnFailure.abort:
        raise TeacherError(
            f"the teacher did not score sample {sample.index} of prompt {sample.prompt.id} ({failure}), and "
            f"{key}.on_failure=abort. Set {key}.on_failure=mask to go on without its OPD term"
        )
    if policy is OnFailure.fallback_rollout:
        return sample.replace(
            teacher_log_probs=sample.log_probs, teacher_topk=sample.topk, teacher_status=failure.status
        )
    unknown = torch.full((len(sample.response),), float("nan"))
    return sample.replace(teacher_log_probs=unknown, teacher_topk=None, teacher_status=failure.status)


@dataclass(slots=True)
class Tally:
    """Outcomes since the last `close`.

    Attributes:
        counts: by status.
        last: the latest failure, for the message.
    """

    counts: Counter[ScoreStatus] = field(default_factory=Counter)
    last: str = ""

    def add(self, status: ScoreStatus, detail: str = "") -> None:
        """Counts one outcome."""
        self.counts[status] += 1
        if status is not ScoreStatus.ok:
            self.last = detail

    def close(self, max_failed_fraction: float, key: str) -> Metrics:
        """teacher/failed_fraction and teacher/status/<status> (counts) of a step; counting starts anew.

        Args:
            max_failed_fraction: how many may fail.
            key: of the teacher's settings, for the message.

        Raises:
            TeacherError: more failed than allowed.
        """
        total = self.counts.total()
        metrics = Metrics()
        if not total:
            return metrics
        failed = total - self.counts[ScoreStatus.ok]
        metrics.put("teacher/failed_fraction", failed / total)
        for status in ScoreStatus:
            if self.counts[status]:
                metrics.put(f"teacher/status/{status}", self.counts[status])
        by_status = ", ".join(f"{count} {status}" for status, count in self.counts.most_common())
        last = self.last
        slow = self.counts[ScoreStatus.timeout] * 2 > failed
        self.counts.clear()
        if failed > max_failed_fraction * total:
            repair = (
                f"Give it more time ({key}.timeout_s), fewer requests at once ({key}.concurrency), or more servers"
                if slow
                else "Look after the server, or raise the limit"
            )
            raise TeacherError(
                f"the teacher failed on {failed} of {total} samples ({by_status}; last: {last}): more than "
                f"{key}.max_failed_fraction={max_failed_fraction:g} allows. {repair}"
            )
        return metrics
