"""How a request to a server fails."""

from opd_trainer.errors import OpdError
from opd_trainer.types import ScoreStatus


class RequestFailed(OpdError):
    """A request that a server did not answer as it should have.

    Attributes:
        status: what kind of failure it is.
        detail: for people.
        transient: whether another attempt may succeed.
    """

    def __init__(self, status: ScoreStatus, detail: str, *, transient: bool = False) -> None:
        super().__init__(status, detail)
        self.status, self.detail, self.transient = status, detail, transient

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}"
