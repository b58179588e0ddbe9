"""What every test relies on: shapes are checked while tests run, nothing is fetched, one thread per process."""

import gc
import logging
import os
from collections.abc import Iterator
from typing import Any

# Read when transformers and datasets are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

PURE = ("divergence", "estimator", "jagged", "loss", "objective", "opd", "types")

# Annotations such as Float[Tensor, " T"] are executed under test and cost nothing in production.
install_import_hook([f"opd_trainer.{name}" for name in PURE], "beartype.beartype")

# Test processes share few cores, and one thread makes sums reproducible.
torch.set_num_threads(1)

# The same examples every time, and no limit on their time: neither chance nor a busy machine fails a test.
settings.load_profile("ci")


@pytest.fixture(scope="session")
def compose() -> Any:
    """One composer of conf/ for all tests; it remembers what it has composed, and outlives Hydra's global state."""
    # Not before the hook above.
    from opd_trainer.cli.composition import Source, composer
    from tests.commands import CONF

    with composer(Source(CONF)) as found:
        return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs come first: short tests then fill all cores to the end."""
    items.sort(key=lambda item: "runs" not in item.path.parts)


def pytest_collection_finish() -> None:
    """Closing a runtime collects garbage; what was imported until here is none, and takes most of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Hydra points the log of a job at its file and at the output of its test, which is closed after it."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in set(root.handlers).difference(handlers):
        root.removeHandler(handler)
        handler.close()
