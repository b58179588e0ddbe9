"""The program inside a sandbox: one JSON question per line on stdin, one JSON answer per line on stdout.

Its arguments are the task and the time limit in seconds. Questions: ``{"response": ..., "label": ...}`` for the task
``math``, ``{"response": ..., "pattern": ...}`` for ``match``. Answers: ``{"value": 0 or 1}`` or ``{"error": ...}``.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from typing import Any

MEMORY_BYTES = 4 * 2**30


def grade_math(response: str, label: str) -> float:
    """1 when the final answer means the same as the label; 0 when it does not or there is none."""
    from opd_trainer.reward.equality import answer_in, same_answer

    answer = answer_in(response)
    return float(answer is not None and same_answer(answer, label))


def match(response: str, pattern: str) -> float:
    """1 when the whole response matches."""
    return float(re.fullmatch(pattern, response, re.DOTALL) is not None)


TASKS = {"math": grade_math, "match": match}


def answer(task: str, limit: float, question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question.

    The kernel ends this process when the time is over: a handler in Python could not interrupt the arithmetic of a huge
    integer, and would not run at all once the trainer is gone.
    """
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return {"value": TASKS[task](**question)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    """Answers until stdin ends."""
    # Libraries that print must not speak for us.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    task, limit = sys.argv[1], float(sys.argv[2])
    if task == "math":
        # Everything is imported, and compiled, before the clock of the first question starts.
        grade_math(r"\boxed{\frac{x}{3}}", "x/3")

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(task, limit, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
