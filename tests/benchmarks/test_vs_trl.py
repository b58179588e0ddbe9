import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.held_out_kl import response_mask, summarize, token_kl
from benchmarks.process_memory import watch
from benchmarks.vs_trl import PEER, Side, drawn_order, kept, messages, nearest, our_step, peer_step, table


def side(step_s: float, peak_gib: float) -> Side:
    cold = {"step_s": 10 * step_s, "generation_s": 1.0, "teacher_s": 1.0, "update_s": 1.0, "tokens": 8.0}
    warm = {"step_s": step_s, "generation_s": 0.5, "teacher_s": 0.25, "update_s": step_s - 0.75, "tokens": 4.0}
    return Side([cold, warm, warm], peak_gib, {3: "student"}, {})


def test_phases_of_both_sides_add_up_to_their_steps() -> None:
    row = {"perf/step_time": 4.0, "perf/rollout_time": 1.0, "perf/teacher_time": 0.5, "perf/train_time": 2.0}
    ours = our_step({**row, "perf/sync_time": 0.25, "perf/tokens_per_s": 128.0})
    assert ours == {
        "step_s": 4.0,
        "generation_s": 1.0,
        "teacher_s": 0.5,
        "update_s": 2.5,
        "sync_s": 0.25,
        "tokens": 512,
    }
    theirs = peer_step({"step_s": 4.0, "generation_s": 1.0, "teacher_s": 0.5, "backward_s": 2.0})
    assert theirs["update_s"] == 2.5


def test_the_table_compares_medians_without_the_first_step() -> None:
    text = table({"ours": side(2.0, 3.0), PEER: side(5.0, 4.0)}, {"start": {"reverse_kl": 1.5, "standard_error": 0.1}})
    assert "| ours | 2.00 | 0.50 | 0.25 | 1.25 | 3.00 | 2.50 | 75% |" in text
    assert "| trl | 5.00 | 0.50 | 0.25 | 4.25 | 4.00 | 1.00 | 100% |" in text
    assert text.endswith("start: reverse KL 1.500 +- 0.100")


def test_a_side_is_run_once(tmp_path: Path) -> None:
    made = kept(tmp_path / "x.json", lambda: side(2.0, 3.0))
    assert made == side(2.0, 3.0) == kept(tmp_path / "x.json", pytest.fail)


def test_equal_time_is_the_nearest_step_of_the_peer() -> None:
    peer = side(2.0, 3.0)
    assert peer.seconds == [20.0, 22.0, 24.0]
    assert [nearest(peer, seconds) for seconds in (1.0, 21.2, 30.0)] == [1, 2, 3]
    assert nearest(peer, 60.0) is None


def test_prompts_are_chat_messages_whatever_their_column() -> None:
    chat = [{"role": "user", "content": "1+1"}]
    assert (
        messages({"question": "1+1", "answer": "2"})
        == messages({"prompt": "1+1"})
        == messages({"prompt": chat})
        == chat
    )


def test_the_peer_gets_rows_in_our_order() -> None:
    order = drawn_order(32, 0)
    assert sorted(order) == list(range(32)) != order
    assert order == drawn_order(32, 0) != drawn_order(32, 1)


def test_the_held_out_measure_is_the_kl_of_softmaxes() -> None:
    student, teacher = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert token_kl(student + 3, teacher - 2).tolist() == pytest.approx([expected])


def test_a_response_ends_with_its_first_eos() -> None:
    tokens = torch.tensor([[5, 1, 1, 1], [5, 6, 7, 8], [1, 5, 5, 2]])
    assert response_mask(tokens, [1, 2]).tolist() == [[True, True, False, False], [True] * 4, [True] + [False] * 3]


def test_tokens_weigh_the_same_and_masked_ones_nothing() -> None:
    kl = torch.tensor([[1.0, 1.0], [4.0, float("nan")]])
    found = summarize(kl, torch.tensor([[True, True], [True, False]]))
    assert (found.reverse_kl, found.tokens) == (2.0, 3)
    # Residuals of the responses from the mean: 2 - 2 * 2 and 4 - 2.
    assert found.standard_error == pytest.approx(math.sqrt(2 * (4 + 4)) / 3)


def test_memory_is_that_of_a_command_and_its_children(tmp_path: Path) -> None:
    child = "x = bytearray(200 << 20); x[::4096] = bytes(len(x[::4096])); import time; time.sleep(3)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {json.dumps(child)}])"
    assert 0.19 < watch([sys.executable, "-c", parent], tmp_path / "log").peak_gib < 0.5
    with pytest.raises(SystemExit, match="exit code 3"):
        watch([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")
