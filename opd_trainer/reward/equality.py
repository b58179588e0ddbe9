r"""Whether two answers mean the same, as a person would say: by spelling first, then by mathematics (math-verify).

A hostile expression can take forever here; callers run it in a process that they can kill, see
`opd_trainer.reward.sandbox`.
"""

import re
from fractions import Fraction

from opd_trainer.reward.spelling import Spelled, chosen, spelled
from opd_trainer.reward.units import agree

MARK = re.compile(
    r"####"
    r"|(?:\banswer|答案)\s*\**\s*(?:(?:\bis\b|是|为)\s*[:\uff1a]?|[:\uff1a]|=+)"
    r"|答\s*\**\s*[:\uff1a]",
    re.IGNORECASE,
)
FILLER = re.compile(r"^(?:therefore|thus|hence|then|simply|just|equal to)\b[,:]?\s+(?=\S)", re.IGNORECASE)
BOLD = re.compile(r"\*\*(\S(?:.*?\S)?)\*\*")
SENTENCE_END = re.compile(r"(?:(?<=[\d)}\]$%])|(?<=[a-z]{3}))\.\s+(?=[A-Z])|。")


def answer_in(response: str) -> str | None:
    r"""The final answer: the last \boxed{}, else what follows the last `Answer:` or `####`; None without one."""
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed
    matches = list(MARK.finditer(response))
    if not matches:
        return None
    lines = response[matches[-1].end() :].lstrip("* \n\t").splitlines()
    return first_formula(first_sentence(lines[0])) if lines else None


def first_sentence(line: str) -> str:
    """A line without the words around the answer: `therefore **42**. I hope it is correct.` as `42`."""
    line = re.sub(r"\*\*(?=\W*$)", "", BOLD.sub(r"\1", line.strip()))
    line = FILLER.sub("", line)
    end = SENTENCE_END.search(line)
    return (line[: end.start()] if end and end.start() else line).strip("* ")


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
    if (option := chosen(answer, gold) or chosen(gold, answer)) is not None:
        answer, gold = option
    left, right = spelled(answer), spelled(gold)
    if not agree(left.unit, right.unit):
        return False
    if squeezed(left.core) == squeezed(right.core):
        return True
    return not (left.is_text or right.is_text) and same_mathematics(left, right)


def same_mathematics(left: Spelled, right: Spelled) -> bool:
    """Whether two expressions, whose units do not contradict each other, have the same value."""
    entries = paired_entries(left.core, right.core)
    if entries is not None:
        return all(same_answer(one, other) for one, other in entries)
    numbers = exact_number(left.core), exact_number(right.core)
    if numbers[0] == numbers[1] if None not in numbers else same_value(left.core, right.core):
        return True
    if "percent" in {left.unit, right.unit} and left.unit != right.unit:
        return same_value(as_fraction(left), as_fraction(right))
    return False


def paired_entries(left: str, right: str) -> list[tuple[str, str]] | None:
    """The entries of a tuple `(a, b)` and of a bare list `a, b`, pair by pair; None unless they are one of each.

    A bare list of solutions has no order, and math-verify gives a tuple beside it none either; a person does.
    """
    found = []
    for text, other in ((left, right), (right, left)):
        inner = unwrapped(text)
        if inner is not None and unwrapped(other) is None:
            found.append((entries_of(inner), entries_of(other), text is left))
    if len(found) != 1:
        return None
    ordered, bare, is_left = found[0]
    if len(ordered) < 2 or len(ordered) != len(bare):
        return None
    return list(zip(ordered, bare, strict=True) if is_left else zip(bare, ordered, strict=True))


def unwrapped(text: str) -> str | None:
    """What is inside of the parentheses that enclose the whole text; None without such."""
    text = text.strip()
    if not text.startswith("(") or not text.endswith(")"):
        return None
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0:
            return text[1:-1] if place == len(text) - 1 else None
    return None


def entries_of(text: str) -> list[str]:
    """The text, cut at the commas that are in no bracket."""
    entries, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            entries.append("")
        else:
            entries[-1] += sign
    return entries


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
