"""Whether a teacher behind servers can teach this student; asked once, before the first step.

Everything that is wrong is reported together. A probe is a prompt of the training data: its own tokens are scored.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_trainer.errors import CheckpointError, PreflightError, Problem
from opd_trainer.model.folder import language_setting
from opd_trainer.model.identity import ModelProfile, check_compatible, profile, remarks
from opd_trainer.sglang.client import SglangClient
from opd_trainer.sglang.endpoints import Endpoint
from opd_trainer.sglang.failure import RequestFailed
from opd_trainer.sglang.wire import read_scored, score_body
from opd_trainer.teacher.config import ServerTeacher

SAME = 0.2
"""Log-probs that differ from each other by less than this share of their mean, on average, are all about the same."""
CONTEXT_RESERVE = 6
"""SGLang's max_req_input_len is the context less this many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """What the teacher must fit.

    Attributes:
        profile: identity and vocabulary.
        probes: token ids of some prompts of the training data, each of at least two tokens.
        max_tokens: longest prompt plus longest response, tokens.
        temperature: that the student samples at.
    """

    profile: ModelProfile
    probes: Sequence[Sequence[int]]
    max_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What a preflight learned.

    Attributes:
        model_path: what the servers say they serve.
        max_length: context length, tokens; None where they do not say.
        mean_log_prob: of the probes' tokens, nats; NaN without probes.
        ignores_temperature: log-probs of given tokens are those of temperature 1, whatever is asked for.
        remarks: differences from the student that do not forbid distillation.
    """

    model_path: str
    max_length: int | None
    mean_log_prob: float
    ignores_temperature: bool
    remarks: tuple[str, ...] = ()


async def examine(client: SglangClient, config: ServerTeacher, student: Student | None, key: str) -> ServerFacts:
    """Asks every server.

    Args:
        client: reaches them.
        config: the teacher's settings.
        student: what the teacher must fit; None compares nothing.
        key: of the settings, for messages.

    Raises:
        PreflightError: all that is wrong, together.
    """
    endpoints = client.pool.endpoints
    answers = await asyncio.gather(*(_info(client, e) for e in endpoints), return_exceptions=True)
    problems = [
        Problem(
            f"{key}.url",
            f"{endpoint.url} does not answer ({answer})",
            "its log-probs are the distillation signal",
            f"Start the server, or set {key}.url to one that runs",
        )
        for endpoint, answer in zip(endpoints, answers, strict=True)
        if isinstance(answer, BaseException)
    ]
    _refuse(problems)
    infos = [answer for answer in answers if not isinstance(answer, BaseException)]
    paths = sorted({str(model["model_path"]) for model, _ in infos})
    if len(paths) > 1:
        what, why = f"the servers serve different models: {', '.join(paths)}", "one teacher has one opinion"
        problems.append(Problem(f"{key}.url", what, why, "Name servers of one model"))
    limits = [limit for _, server in infos if (limit := _context(server)) is not None]
    max_length = min(limits, default=None)
    if student is None:
        _refuse(problems)
        return ServerFacts(model_path=paths[0], max_length=max_length, mean_log_prob=math.nan, ignores_temperature=True)
    if max_length is not None and student.max_tokens + 1 > max_length:
        what = f"a context of {max_length} tokens"
        why = f"prompt, response and one more need {student.max_tokens + 1}"
        fix = "Lower rollout.max_response_tokens or rollout.max_prompt_tokens, or serve with a longer --context-length"
        problems.append(Problem(key, what, why, fix))
    notes = _compare(student.profile, paths[0], problems, key)
    mean, ignores = await _probe(client, config, student, problems, key)
    _refuse(problems)
    uniform = -math.log(student.profile.identity.vocab_size)
    if mean < uniform:
        notes += (
            f"a mean log-prob of {mean:.3f} on prompts of the training data, less than a uniform guess's "
            f"{uniform:.3f}: right for one that learned responses alone, otherwise its tokens are not the student's",
        )
    return ServerFacts(
        model_path=paths[0], max_length=max_length, mean_log_prob=mean, ignores_temperature=ignores, remarks=notes
    )


def told(name: str, facts: ServerFacts) -> str:
    """What a preflight learned, for the user."""
    context = "unknown" if facts.max_length is None else f"{facts.max_length} tokens"
    known = "" if math.isnan(facts.mean_log_prob) else f", mean log-prob {facts.mean_log_prob:.3f} on prompts"
    lines = [f"teacher {name}: {facts.model_path}, context {context}{known}"]
    return "\n".join([*lines, *(f"  note: {remark}" for remark in facts.remarks)])


async def _info(client: SglangClient, endpoint: Endpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    return await client.info(endpoint, "/model_info"), await client.info(endpoint, "/server_info")


def _context(server: dict[str, Any]) -> int | None:
    if server.get("context_length"):
        return int(server["context_length"])
    longest = server.get("max_req_input_len")
    return None if longest is None else int(longest) + CONTEXT_RESERVE


def _compare(student: ModelProfile, path: str, problems: list[Problem], key: str) -> tuple[str, ...]:
    """Tokenizer, special ids and template, where the served folder can be read from here."""
    folder = Path(path)
    if not folder.is_dir():
        return (f"{path} cannot be read from here: its vocabulary was not compared with the student's",)
    try:
        teacher = profile(folder, folder)
        # Asked of the folder and not of the server: SGLang 0.5.23 dies of a token id beyond its vocabulary.
        rows = int(language_setting(folder, "vocab_size"))
    except CheckpointError as error:
        return (f"the tokenizer was not compared with the student's: {error}",)
    needed = student.identity.vocab_size
    if rows < needed:
        what, why = (
            f"a vocabulary of {rows}, the student's has {needed}",
            "its server would die of the student's tokens",
        )
        problems.append(Problem(key, what, why, "Use a teacher of the student's family"))
    problems += check_compatible(key, student, teacher)
    return tuple(remarks(student.identity, teacher.identity))


async def _probe(
    client: SglangClient, config: ServerTeacher, student: Student, problems: list[Problem], key: str
) -> tuple[float, bool]:
    """Scores the probes: mean log-prob, and whether temperature is ignored."""
    vocab_size = student.profile.identity.vocab_size
    values: list[float] = []
    same = True
    try:
        for probe in student.probes:
            plain, cool = [await _log_probs(client, probe, temperature) for temperature in (1.0, 0.5)]
            values += plain
            same = same and all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(plain, cool, strict=True))
    except RequestFailed as error:
        what, why = f"a prompt of the training data could not be scored ({error})", "no sample could be either"
        problems.append(Problem(key, what, why, "Look at the server's log"))
        return math.nan, True
    mean = sum(values) / len(values) if values else math.nan
    if same and student.temperature != 1.0:
        problems.append(
            Problem(
                "rollout.temperature",
                f"{student.temperature:g} with a server that gives log-probs of temperature 1 whatever it is asked for",
                "the difference of log-probs of two temperatures means nothing",
                "Set rollout.temperature=1.0, or opd=megatron, where both sides are computed at the same temperature",
            )
        )
    uniform = -math.log(vocab_size)
    if config.check_trained and values and _same(values, mean) and 2 * uniform < mean < (1 - SAME) * uniform:
        problems.append(
            Problem(
                key,
                f"log-probs of {mean:.3f} for about every token of prompts of the training data, "
                f"a uniform guess has {uniform:.3f}",
                "its weights are random or were lost",
                f"Serve a trained model; if it is meant to be so, set {key}.check_trained=false",
            )
        )
    return mean, same


def _same(values: Sequence[float], mean: float) -> bool:
    """Whether log-probs are all about the same, as those of random weights are: of real text no model is that unsure.

    The mean alone would not tell: of prompts a teacher that learned responses alone knows less than nothing.
    """
    return sum(abs(value - mean) for value in values) < SAME * abs(mean) * len(values)


async def _log_probs(client: SglangClient, tokens: Sequence[int], temperature: float) -> list[float]:
    body = score_body(tokens, 1, temperature=temperature)
    scored = await client.generate(body, lambda answer: read_scored(answer, tokens[1:]))
    return scored.log_probs.tolist()


def _refuse(problems: Sequence[Problem]) -> None:
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise PreflightError(f"The teacher has {count}:\n{lines}")
