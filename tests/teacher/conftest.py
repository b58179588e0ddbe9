"""Models that the tests of placements share, and what each thinks of their batch."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from opd_trainer.model.config import Family
from tests.megatron import training
from tests.teacher.placements import TEMPERATURE, batch_of


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Student, a teacher of its shape, and teachers of other shapes; all with the demo's tokenizer."""

    def write(name: str, seed: int, **changes: Any) -> Path:
        return training.write_model(tmp_path_factory.mktemp(name), seed=seed, **changes)

    return {
        "student": write("student", 0),
        "teacher": write("teacher", 1),
        "other": write("other", 2, family=Family.llama, hidden_size=48, num_layers=3, tie_embeddings=False),
        "turned": write("turned", 3, rope_theta=500.0),
    }


@pytest.fixture(scope="session")
def expected(folders: dict[str, Path]) -> dict[str, Tensor]:
    """What each model thinks of the batch as a student, alone in its worker."""
    batch = batch_of()
    found = {}
    for name, folder in folders.items():
        with training.started(training.spec(folder, temperature=TEMPERATURE)) as worker:
            found[name] = worker.score([batch], "student")[0][batch.mask]
    return found
