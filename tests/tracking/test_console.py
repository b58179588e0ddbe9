import io
from pathlib import Path

import pytest
from rich.console import Console

from opd_trainer.tracking.console import ConsoleSink, change, result_table, step_line
from opd_trainer.tracking.sink import StepRecord
from opd_trainer.tracking.summary import Evaluated, Results, Summary


def record(step: int, **extra: float) -> StepRecord:
    values = {"rollout/reward": 0.5, "opd/reverse_kl": 0.0123456, "perf/step_time": 1.25, **extra}
    return StepRecord(step=step, values=values, samples=(), results=Results())


def summary(results: Results) -> Summary:
    wall_s = {"total": 10.0, "rollout": 6.0, "teacher": 0.0, "update": 4.0}
    return Summary(results=results, steps=3, wall_s=wall_s, config_hash="", git=None, versions={})


RESULTS = Results(
    evaluation={
        Evaluated.teacher: {"heldout": 0.96},
        Evaluated.before: {"heldout": 0.48},
        Evaluated.after: {"heldout": 0.9},
    },
    reverse_kl={Evaluated.before: 0.5, Evaluated.after: 0.02},
)


def printed(results: Results) -> str:
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as capture:
        console.print(result_table(summary(results)))
    return capture.get()


def test_a_step_line_has_what_was_measured_and_nothing_else() -> None:
    line = step_line(record(6, **{"eval/heldout/pass@1": 0.75}), total_steps=60)
    assert line.split() == [
        "step", "7/60", "reward", "0.500", "reverse", "KL", "0.0123", "time", "1.25", "s", "heldout/pass@1", "75.0%",
    ]  # fmt: skip


def test_the_table_compares_with_the_teacher_and_splits_the_time() -> None:
    text = printed(RESULTS)
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "96.0%" in rows["teacher"]
    assert "48.0%" in rows["student before"]
    assert "50.0% of the teacher's" in rows["student before"]
    assert "90.0%" in rows["student after"]
    assert "93.8% of the teacher's" in rows["student after"]
    assert "25.0 times lower" in rows["reverse KL last"]
    assert "60.0%" in rows["rollout"]
    assert "40.0%" in rows["update"]


def test_the_table_of_a_run_without_teacher_claims_nothing() -> None:
    text = printed(Results(evaluation={Evaluated.before: {"a": 0.5}, Evaluated.after: {"a": 0.6}}))
    assert "teacher" not in text
    assert "reverse KL" not in text


def test_the_table_has_the_likelihood_of_references() -> None:
    text = printed(Results(reference_nll={Evaluated.before: {"gsm8k": 2.65}, Evaluated.after: {"gsm8k": 1.5}}))
    rows = [line.split("│")[1:3] for line in text.splitlines() if "NLL" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["NLL student before", "2.65"],
        ["NLL student after", "1.5"],
    ]


@pytest.mark.parametrize("last", [0.0, -0.001, float("nan")])
def test_a_reverse_kl_at_its_floor_is_not_turned_into_a_ratio(last: float) -> None:
    text = printed(Results(reverse_kl={Evaluated.before: 0.5, Evaluated.after: last}))
    assert "times lower" not in text


def run(console: Console, every: int | None = None) -> None:
    path = Path("a folder/with a rather long name that no terminal has room for/" * 3) / "curves.png"
    sink = ConsoleSink(3, every=every, curves=path, title="demo [run]", console=console)
    sink.truncate_after(-1)
    sink.evaluated(Evaluated.before, RESULTS)
    for step in range(3):
        sink.write(record(step))
    sink.finish(summary(RESULTS))
    sink.close()
    sink.close()


def test_plain_unwrapped_lines_where_the_output_is_no_terminal() -> None:
    file = io.StringIO()
    run(Console(file=file, width=80))
    text = file.getvalue()
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].split() == ["student", "before", "heldout", "48.0%", "reverse", "KL", "0.5"]
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["1/3", "2/3", "3/3"]
    assert lines[-1].startswith("curves: a folder")
    assert lines[-1].endswith("curves.png")


def test_fewer_lines_on_request_but_always_the_last() -> None:
    file = io.StringIO()
    run(Console(file=file, width=80), every=2)
    assert [line.split()[1] for line in file.getvalue().splitlines() if line.startswith("step")] == ["2/3", "3/3"]


def test_about_a_hundred_lines_of_a_long_run_and_every_evaluation() -> None:
    file = io.StringIO()
    sink = ConsoleSink(900, every=None, curves=Path("c.png"), title="t", console=Console(file=file, width=80))
    for step in range(900):
        sink.write(record(step, **({"eval/heldout/pass@1": 0.5} if step == 333 else {})))
    lines = file.getvalue().splitlines()
    assert len(lines) == 101
    assert next(line for line in lines if "heldout" in line).startswith("step 334/900")


def test_a_bar_on_a_terminal() -> None:
    file = io.StringIO()
    run(Console(file=file, force_terminal=True, width=120))
    text = file.getvalue()
    assert "demo" in text
    assert "3/3" in text
    assert "left" in text


def test_a_resume_says_where_it_goes_on() -> None:
    file = io.StringIO()
    sink = ConsoleSink(8, every=1, curves=Path("c.png"), title="t", console=Console(file=file))
    sink.truncate_after(4)
    assert file.getvalue() == "resuming after step 5/8\n"


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        (0.412, 0.0313, "13.2 times lower"),
        (0.2, 0.3, "1.5 times higher"),
        (0.433, 0.439, "about the same"),
        (0.4, 0.0, ""),
        (0.4, float("nan"), ""),
        (-0.001, 0.3, ""),
    ],
)
def test_a_rise_is_not_told_as_a_fall(first: float, last: float, said: str) -> None:
    assert change(first, last) == said
