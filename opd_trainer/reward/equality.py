r"""Whether two answers mean the same, as a person would say: by spelling first, then by mathematics (math-verify).

A hostile expression can take forever here; callers run it in a process that they can kill, see
`opd_trainer.reward.sandbox`.
"""

import re
from fractions import Fraction

from opd_trainer.reward.spelling import Spelled, spelled


def answer_in(response: str) -> str | None:
    r"""The final answer: the last \boxed{}, else what follows the last `Answer:` or `####`; None without one."""
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed
    pattern = r"####|(?:\banswer|答案)\s*\**\s*(?:(?:\bis\b|是|为)\s*[:\uff1a]?|[:\uff1a])\s*\**"
    matches = list(re.finditer(pattern, response, re.IGNORECASE))
    if not matches:
        return None
    lines = response[matches[-1].end() :].strip().splitlines()
    return first_formula(lines[0].strip()) if lines else None


def last_boxed(response: str) -> str | None:
    r"""What is inside the last complete \boxed{...} or \fbox{...}, braces balanced."""
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed\s*\{|\\fbox\s*\{", response)]):
        depth = 1
        for end in range(start, len(response)):
            depth += {"{": 1, "}": -1}.get(response[end], 0)
            if depth == 0:
                return response[start:end]
    return None


def first_formula(line: str) -> str:
    """The only formula of a sentence, or the sentence when it has none or several."""
    formulas = re.findall(r"(?<!\\)\$((?:\\.|[^$\\])+)\$|\\\((.+?)\\\)", line)
    return "".join(formulas[0]) if len(formulas) == 1 else line


def same_answer(answer: str, gold: str) -> bool:
    """Whether `answer` means what `gold` means.

    Units may be left out, but two different ones are not the same; `10%` is 10 (a percentage was asked for) and 0.1.
    """
    left, right = spelled(answer), spelled(gold)
    if left.unit and right.unit and left.unit != right.unit:
        return False
    if squeezed(left.core) == squeezed(right.core):
        return True
    if left.is_text or right.is_text:
        return False
    numbers = exact_number(left.core), exact_number(right.core)
    if numbers[0] == numbers[1] if None not in numbers else same_value(left.core, right.core):
        return True
    if "percent" in {left.unit, right.unit} and left.unit != right.unit:
        return same_value(as_fraction(left), as_fraction(right))
    return False


def squeezed(text: str) -> str:
    """Without spaces and needless braces."""
    return re.sub(r"[_^]\{(\w)\}", lambda match: match.group(0)[0] + match.group(1), re.sub(r"\s+", "", text))


def exact_number(text: str) -> Fraction | None:
    """The value of a plain decimal number, also with a power of ten; None when it is anything else."""
    match = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:\s*\\times\s*10\^\{?(-?\d{1,3})\}?)?", text.strip())
    return None if match is None else Fraction(match.group(1)) * Fraction(10) ** int(match.group(2) or 0)


def as_fraction(value: Spelled) -> str:
    """A percentage divided by 100, everything else as it is."""
    return rf"\frac{{{value.core}}}{{100}}" if value.unit == "percent" else value.core


def same_value(left: str, right: str) -> bool:
    """Whether math-verify finds the two expressions equal."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # Its own time limit needs signals in the main thread; ours is around the whole process.
    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    parsed = [parse(rf"\boxed{{{text}}}", extraction, parsing_timeout=0, raise_on_error=True) for text in (right, left)]
    return bool(all(parsed) and verify(parsed[0], parsed[1], timeout_seconds=0, raise_on_error=True))
