import asyncio
import time
from typing import Any

import pytest

from opd_trainer.errors import WorkerError
from opd_trainer.reward.sandbox import Sandbox

ENDLESS = {"response": "a" * 40 + "b", "pattern": "(a+)+"}
FINE = {"response": "a", "pattern": "a"}


def run(coroutine_function, task="match", timeout_s: Any = 2.0):
    async def main():
        sandbox = Sandbox(task, 1, timeout_s)
        try:
            return await coroutine_function(sandbox)
        finally:
            await sandbox.close()

    return asyncio.run(main())


def test_hostile_mathematics_ends_in_time_and_the_next_question_is_answered():
    # Arithmetic in one C call, which no Python signal handler could interrupt.
    hostile = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{((99999999)!)!}"]

    async def questions(sandbox):
        assert await sandbox.ask(response=r"\boxed{\frac{1}{2}}", label="0.5") == 1.0
        for response in hostile:
            started = time.monotonic()
            with pytest.raises((TimeoutError, WorkerError)):
                await sandbox.ask(response=response, label="x+1")
            assert time.monotonic() - started < 60
        return await sandbox.ask(response=r"\boxed{2}", label="3")

    assert run(questions, task="math", timeout_s=3.0) == 0.0


def test_an_endless_match_is_a_timeout_and_waiting_for_a_worker_is_not_counted():
    async def questions(sandbox):
        return await asyncio.gather(sandbox.ask(**ENDLESS), sandbox.ask(**FINE), return_exceptions=True)

    first, second = run(questions)
    assert isinstance(first, TimeoutError)
    assert "longer than 2 s" in str(first)
    assert second == 1.0


def test_an_exception_inside_is_told_and_a_cancelled_question_leaves_no_stale_answer():
    async def questions(sandbox):
        with pytest.raises(WorkerError, match="error"):
            await sandbox.ask(response="a", pattern="(")
        late = asyncio.create_task(sandbox.ask(response="b", pattern="a"))
        await asyncio.sleep(0)
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        return [await sandbox.ask(**FINE) for _ in range(2)]

    assert run(questions) == [1.0, 1.0]


def test_a_process_that_died_while_nobody_asked_is_replaced():
    async def questions(sandbox):
        await sandbox.ask(**FINE)
        [process] = sandbox._running
        process.kill()
        await process.wait()
        return await sandbox.ask(**FINE)

    assert run(questions) == 1.0


def test_processes_are_gone_after_close():
    async def questions(sandbox):
        await sandbox.ask(**FINE)
        processes = list(sandbox._running)
        await sandbox.close()
        await sandbox.close()
        return [process.returncode for process in processes]

    codes = run(questions)
    assert len(codes) == 1
    assert codes[0] is not None


def test_a_program_that_does_not_start():
    async def question(sandbox):
        with pytest.raises(WorkerError, match="did not start"):
            await sandbox.ask(**FINE)

    run(question, timeout_s="not a number")
