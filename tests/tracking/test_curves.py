from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from opd_trainer.tracking.curves import CurvesSink, draw, series
from opd_trainer.tracking.files import RunFiles
from opd_trainer.tracking.summary import Evaluated, Results
from opd_trainer.tracking.tracker import Tracker

RESULTS = Results(
    evaluation={
        Evaluated.teacher: {"heldout": 0.96},
        Evaluated.before: {"heldout": 0.5},
        Evaluated.after: {"heldout": 0.9},
    },
    reverse_kl={Evaluated.before: 0.5, Evaluated.after: 0.02},
)


def rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "rollout/reward": step / count,
            "opd/reverse_kl": 0.5 / (step + 1),
            "rollout/response_length/mean": 20.0,
            "rollout/entropy": 0.2,
            "perf/rollout_time": 1.0,
            "perf/train_time": 2.0,
            "perf/step_time": 4.0,
            **changes,
        }
        for step in range(count)
    ]


def panel(figure: Figure, title: str) -> Any:
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


def test_unknown_values_are_left_out() -> None:
    data = series([{"step": 0, "x": 1.0}, {"step": 1, "x": None}, {"step": 2}, {"step": 3, "x": 2.0}], "x", 1)
    assert data.x.tolist() == [1, 4]
    assert data.y.tolist() == [1.0, 2.0]


def test_smoothing_keeps_a_straight_line_in_its_middle() -> None:
    data = series([{"step": i, "x": float(i)} for i in range(60)], "x", 0)
    np.testing.assert_allclose(data.smoothed().y[3:-3], data.y[3:-3])


def test_accuracy_goes_from_before_to_after_beside_the_teacher() -> None:
    lines = rows(4)
    lines[1]["eval/heldout/pass@1"] = 0.7
    axes = panel(draw(lines, RESULTS, "t"), "Held-out accuracy")
    student, teacher = axes.get_lines()
    assert student.get_xydata().tolist() == [[0, 0.5], [2, 0.7], [4, 0.9]]
    assert set(teacher.get_ydata()) == {0.96}


def test_the_surprise_at_reference_responses_has_a_panel_where_it_was_measured() -> None:
    results = Results(reference_nll={Evaluated.before: {"gsm8k": 2.5}, Evaluated.teacher: {"gsm8k": 1.5}})
    lines = rows(4, **{"rollout/reward": 0.0})
    lines[3]["eval/gsm8k/reference_nll"] = 2.0
    figure = draw(lines, results, "t")
    assert "Reward" not in titles(figure), "0 in every step"
    student, teacher = panel(figure, "Surprise at reference responses").get_lines()
    assert student.get_xydata().tolist() == [[0, 2.5], [4, 2.0]]
    assert set(teacher.get_ydata()) == {1.5}


@pytest.mark.parametrize(("lowest", "scale"), [(0.1, "log"), (0.0, "linear"), (-0.01, "linear")])
def test_a_reverse_kl_at_or_below_zero_stays_visible(lowest: float, scale: str) -> None:
    lines = rows(3)
    lines[2]["opd/reverse_kl"] = lowest
    axes = panel(draw(lines, RESULTS, "t"), "Reverse KL to the teacher")
    assert axes.get_yscale() == scale
    assert axes.get_lines()[0].get_ydata().min() == lowest


def test_step_time_is_stacked_up_to_the_whole() -> None:
    axes = panel(draw(rows(5), RESULTS, "t"), "Step time")
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches]
    assert max(tops) == 4.0
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "rollout 1.00 s",
        "update 2.00 s",
        "other 1.00 s",
    ]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]


def test_a_panel_for_everything_that_was_measured() -> None:
    everything = [
        "Reward",
        "Held-out accuracy",
        "Reverse KL to the teacher",
        "Response length",
        "Entropy of the student",
        "Step time",
    ]
    assert titles(draw(rows(3, **{"train/loss": 0.1}), RESULTS, "t")) == everything
    without_teacher = draw(rows(3, **{"train/loss": 0.1, "opd/reverse_kl": None}), Results(), "t")
    assert titles(without_teacher) == ["Reward", "Response length", "Entropy of the student", "Step time", "Loss"]


def test_a_critic_has_a_panel_of_its_own() -> None:
    figure = draw(rows(3, **{"train/explained_variance": 0.4, "train/value_loss": 0.2}), Results(), "t")
    assert "Critic" in titles(figure)
    axes = panel(figure, "Critic")
    assert axes.get_lines()[0].get_ydata().tolist() == [0.4] * 3
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["explained variance", "value loss"]
    losses: Any
    (losses,) = [other for other in figure.axes if other is not axes and other.bbox.bounds == axes.bbox.bounds]
    assert losses.get_lines()[0].get_ydata().tolist() == [0.2] * 3


def test_supervised_steps_show_what_they_have() -> None:
    lines = [{"step": step, "train/loss": 1.0, "train/entropy": 0.5, "eval/heldout/pass@1": 0.1} for step in range(3)]
    figure = draw(lines, Results(), "t")
    assert titles(figure) == ["Held-out accuracy", "Entropy of the student", "Loss"]
    assert panel(figure, "Entropy of the student").get_lines()[0].get_ydata().tolist() == [0.5, 0.5, 0.5]


def test_a_run_without_a_single_step_can_be_drawn() -> None:
    assert titles(draw([], RESULTS, "t")) == ["Held-out accuracy", "Reverse KL to the teacher"]
    assert titles(draw([], Results(), "t")) == []


def tracker_for(directory: Path, every: int) -> Tracker:
    sinks = [RunFiles(directory, 0), CurvesSink(directory, every, "t")]
    return Tracker(sinks, config_hash="", git=None, versions={})


def test_the_picture_is_drawn_every_so_often_and_when_the_run_fails(tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    seen = []

    def crash() -> None:
        with tracker_for(tmp_path, every=2) as tracker:
            for step in range(3):
                with tracker.step(step) as log:
                    log.add({"rollout/reward": 1.0})
                seen.append(picture.stat().st_mtime_ns if picture.exists() else None)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        crash()
    assert seen[0] is None
    assert seen[1] == seen[2] is not None
    assert picture.stat().st_mtime_ns > seen[2]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_when_nothing_happened(tmp_path: Path) -> None:
    with tracker_for(tmp_path, every=1):
        pass
    assert not (tmp_path / "curves.png").exists()
