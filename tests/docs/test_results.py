"""Pages of results and the figures of the README are what the kept runs give."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import divergences, estimators, results, sglang_demo, smollm2, sweep
from benchmarks.demo_runs import RAW, Run
from benchmarks.pages import DATASET, Page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
PAGES = (results.PAGE, divergences.PAGE, estimators.PAGE, sglang_demo.PAGE)
LARGEST = 4 * 2**20
"""Bytes of docs/results: everybody who clones gets them."""


def test_runs_are_kept_of_all_pages() -> None:
    pages = {*(page.name for page in PAGES), *sweep.SWEEPS, smollm2.NAME}
    assert {folder.name for folder in RAW.iterdir()} == pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_made_from_its_runs(page: Page) -> None:
    """Anew with `--redraw`."""
    runs = page.kept()
    assert (RESULTS / f"{page.name}.md").read_text(encoding="utf-8") == page.text(runs)
    assert (RESULTS / f"{page.name}.png").is_file()
    assert page.figure(runs).axes


def test_the_page_of_a_real_pair_is_made_from_its_runs() -> None:
    runs = smollm2.kept()
    assert (RESULTS / f"{smollm2.NAME}.md").read_text(encoding="utf-8") == smollm2.text(runs)
    kl = runs[0].summary["reverse_kl"]
    assert f"falls from {kl['first']:.2f} to {kl['last']:.2f}" in README


@pytest.mark.parametrize("name", sweep.SWEEPS)
def test_the_page_of_a_sweep_is_made_from_its_trials(name: str) -> None:
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == sweep.SWEEPS[name].text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_runs_are_whole_and_agree_with_their_summaries(page: Page) -> None:
    for run in page.kept():
        assert f"seed={run.seed}" in run.origin["command"].split(), run.name
        assert set(run.variant.overrides) <= set(run.origin["command"].split()), run.name
        assert [row["step"] for row in run.rows] == list(range(run.summary["steps"])), run.name
        assert run.rows[-1]["eval/heldout/pass@1"] == run.summary["evaluation"]["after"][DATASET], run.name
        assert run.rows[-1].get("eval/reverse_kl") == run.summary["reverse_kl"]["last"], run.name
        assert re.fullmatch("[0-9a-f]{16}", run.summary["config_hash"]), run.name


def test_one_configuration_has_one_result() -> None:
    """Runs of one configuration and one code are bit for bit the same, whichever page they are for."""
    seen: dict[tuple[str, str], float] = {}
    for page in PAGES:
        for run in page.kept():
            if run.variant is not sglang_demo.VARIANT:
                key = (run.summary["config_hash"], json.dumps(run.origin["code"]))
                after = run.summary["evaluation"]["after"][DATASET]
                assert seen.setdefault(key, after) == after, run.name


def test_results_are_small() -> None:
    assert sum(file.stat().st_size for file in RESULTS.rglob("*") if file.is_file()) < LARGEST


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_kept_that_the_page_does_not_use(page: Page) -> None:
    assert {folder.name for folder in (RAW / page.name).iterdir()} == {run.name for run in page.kept()}


# The README.

README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def kept(page: Page, variant: str) -> list[Run]:
    return [run for run in page.kept() if run.variant.name == variant]


def after(runs: list[Run]) -> list[float]:
    return [run.summary["evaluation"]["after"][DATASET] for run in runs]


def enumerated(values: list[float]) -> str:
    first, second, third = (f"{100 * value:.1f}" for value in values)
    return f"{first}, {second} and {third} %"


def test_the_readme_shows_what_the_demo_prints() -> None:
    run = kept(results.PAGE, "opd")[0]
    scores = {who: found[DATASET] for who, found in run.summary["evaluation"].items()}
    kl = run.summary["reverse_kl"]
    assert (
        f"teacher {scores['teacher']:.1%} pass@1 on held-out problems "
        f"student before {scores['before']:.1%} "
        f"student after {scores['after']:.1%} {scores['after'] / scores['teacher']:.1%} of the teacher's "
        f"reverse KL first {kl['first']:.3g} nats per token, held-out prompts "
        f"reverse KL last {kl['last']:.3g} {kl['first'] / kl['last']:.1f} times lower"
    ) in README


def test_the_readme_tells_of_the_seeds() -> None:
    runs = {variant.name: kept(results.PAGE, variant.name) for variant in results.VARIANTS}
    teacher = runs["opd"][0].summary["evaluation"]["teacher"][DATASET]
    told = {name: enumerated(after(mine)) for name, mine in runs.items() if name in ("opd", "distillation", "grpo")}
    assert (
        f"With seeds 0, 1, 2 the student ends at {told['opd']} (the teacher has {100 * teacher:.1f} %); "
        f"with distillation alone at {told['distillation']}; with GRPO alone, at a tenth of the learning rate, "
        f"at {told['grpo']}. At the demo's own learning rate GRPO alone falls to 0 %"
    ) in README
    assert after(runs["grpo_fast"]) == [0, 0, 0]


def test_the_readme_tells_of_the_divergence() -> None:
    run = next(run for run in divergences.PAGE.kept() if "opd.divergence.kind=reverse_kl" in run.variant.overrides)
    kl, score = run.summary["reverse_kl"], run.summary["evaluation"]["after"][DATASET]
    times = f"{kl['first'] / kl['last']:.0f} times lower"
    assert f"ends at {100 * score:.1f} %, with a reverse KL {times}" in README


def test_the_readme_tells_of_servers() -> None:
    served, without = (f"{100 * score:.1f} %" for score in after([*sglang_demo.PAGE.kept(), sglang_demo.beside()]))
    assert f"With real servers for both the demo ends at {served}, without at {without}" in README


def test_engine_and_trainer_agree_as_the_readme_says() -> None:
    assert "in float32 on a CPU it is below 1e-6 in the demo" in README
    assert max(row["train/rollout_log_prob_diff"] for run in kept(results.PAGE, "opd") for row in run.rows) < 1e-6
