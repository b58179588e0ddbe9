"""The table of estimators in the documentation is what the code is, and every option is under the laws."""

from opd_trainer.cli.algorithms import DOCUMENT, ROOT, options, table, with_table
from tests.laws.options import ESTIMATORS


def test_the_table_is_up_to_date() -> None:
    document = DOCUMENT.read_text()
    assert with_table(document, table(options(ROOT / "conf"))) == document, "run python -m opd_trainer.cli.algorithms"


def test_every_option_obeys_the_laws() -> None:
    under_law = list(ESTIMATORS.values())
    assert [name for name, estimator in options(ROOT / "conf").items() if estimator not in under_law] == []
