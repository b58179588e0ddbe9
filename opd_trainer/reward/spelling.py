r"""One spelling for what people write in many ways.

Full-width signs, LaTeX decoration, number words, thousands separators, units. Nothing here understands mathematics;
`opd_trainer.reward.equality` does that with what is left.
"""

# ruff: noqa: RUF001 (the signs that look alike are the subject of this file)

import re
from dataclasses import dataclass

from opd_trainer.reward.numerals import LARGE, number_from_words, with_plain_magnitudes
from opd_trainer.reward.units import FUNCTIONS, split_unit

FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
SIGNS = FULL_WIDTH | {
    ord(sign): plain
    for sign, plain in {
        "\u3000": " ", "\xa0": " ", "。": ".", "、": ",", "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ",
        "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ", "º": r"^\circ", "∶": ":", "²": "^2", "³": "^3",
        "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "∅": r"\emptyset ", "℃": r"^\circ C",
        "￥": "¥", "“": '"', "”": '"',
    }.items()
}  # fmt: skip
"""Signs that have a plain equivalent."""

WORDS = {
    "是": "yes", "是的": "yes", "否": "no", "不是": "no", "对": "true", "正确": "true", "错": "false", "错误": "false",
    "偶数": "even", "奇数": "odd", "无解": "no solution", "不存在": "does not exist", "东": "east", "西": "west",
    "南": "south", "北": "north", "无": "none", "没有": "none", "空集": r"\emptyset", "empty set": r"\emptyset",
    "无穷大": r"\infty", "正无穷": r"\infty", "正无穷大": r"\infty", "infinity": r"\infty",
    "负无穷": r"-\infty", "负无穷大": r"-\infty", "negative infinity": r"-\infty",
    "圆": "circle", "椭圆": "ellipse", "抛物线": "parabola", "双曲线": "hyperbola", "直线": "line",
    "三角形": "triangle", "正方形": "square", "长方形": "rectangle", "矩形": "rectangle",
} | {
    f"{week}{sign}": day
    for week in ("星期", "周", "礼拜")
    for sign, day in zip(
        "一二三四五六日天",
        ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "sunday"),
        strict=True,
    )
}  # fmt: skip
"""Answers in words, mostly Chinese, as they are compared."""

CHOICE = r"(?:(?:故选|应选|选项?|[Oo]ption|[Cc]hoice)\s*:?\s*)?\(?([A-Za-z])\)?"
LETTER = r"(?:\\text\s*\{\s*)?\(?[A-H]\)?(?:\s*\})?"
OPTION = r"(?:\\text\s*\{\s*)?\(?([A-H])(?:\)(?:\s*\})?|[.:])\s+([\w\\$-].*)"
"""A letter, and what a list of options has beside it."""
ABOUT = (
    r"(?:大约|约为|约|近似|≈|\\approx(?![A-Za-z])|(?:about|approximately|roughly)\s)\s*"
    r"(?=[-+\d\\.$¥€£零一二两三四五六七八九十百半])"
)
"""Before a number, this changes nothing that a comparison could see."""

MAGNITUDE_IN_TEXT = rf"\s*\\text\s*\{{\s*({'|'.join(LARGE)})\s*\}}"
SCIENTIFIC = r"(?<![\w.])(\d+(?:\.\d+)?)[eE]\+?(-?\d{1,3})(?![\w.])"


@dataclass(frozen=True, slots=True)
class Spelled:
    """An answer taken apart.

    Attributes:
        core: what is left without units.
        unit: canonical unit with its power, e.g. ``cm^2``; "" when there is none or none that we know.
        is_text: the answer is a word, not an expression.
    """

    core: str
    unit: str
    is_text: bool


def spelled(answer: str) -> Spelled:
    """The answer in its one spelling."""
    text = undecorated(answer)
    wrapped = re.fullmatch(r"\\text\s*\{([^{}]*)\}", text)
    plain = re.sub(rf"^{ABOUT}", "", (wrapped.group(1) if wrapped else text).strip())
    plain = re.sub(r"^第(?=[\d一二三四五六七八九十百])", "", re.sub(r"^百分之(.+)$", r"\1%", plain))
    plain = with_commas(plain)
    number = number_from_words(plain)
    if number is not None:
        return Spelled(number, "", False)
    choice = re.fullmatch(CHOICE, plain)
    if choice and (wrapped or len(plain) > 1 or plain.isupper()):
        return Spelled(choice.group(1).lower(), "", True)
    word = WORDS.get(plain) or WORDS.get(plain.lower(), plain)
    if (wrapped and not any(c.isdigit() for c in word)) or is_phrase(word):
        return spelled_phrase(word)
    core, unit = split_unit(with_plain_magnitudes(re.sub(MAGNITUDE_IN_TEXT, r" \1", word)))
    core = re.sub(SCIENTIFIC, r"\1\\times 10^{\2}", core)
    return Spelled(without_separators(number_from_words(core) or core), unit, False)


def chosen(answer: str, other: str) -> tuple[str, str] | None:
    """What of `(C) 12` is to be compared with another answer without a label: `C` when it is a letter, else `12`."""
    option, plain = re.fullmatch(OPTION, undecorated(answer)), undecorated(other)
    if option is None or re.fullmatch(OPTION, plain) or re.search(r"(?<![A-Za-z\\])[A-H](?![A-Za-z])", option[2]):
        return None
    return (option[1] if re.fullmatch(LETTER, plain) else option[2]), other


def spelled_phrase(text: str) -> Spelled:
    """`Even` as a word, `five dollars` as a quantity."""
    core, unit = split_unit(text)
    number = number_from_words(core) if unit else None
    return Spelled(" ".join(text.lower().split()), "", True) if number is None else Spelled(number, unit, False)


def with_commas(text: str) -> str:
    """`5和-5` as `5,-5`; phrases are left alone."""
    entries = [number_from_words(entry) or entry.strip() for entry in re.split("以及|[和或与及]", text)]
    return ",".join(entries) if len(entries) > 1 and all(entry and entry.isascii() for entry in entries) else text


def is_phrase(text: str) -> bool:
    """Whether it is words rather than a product of variables."""
    words = re.split("[ '-]", text)
    return (
        all(re.fullmatch("[A-Za-z]+", word) for word in words)
        and any(len(word) >= 3 for word in words)
        and FUNCTIONS.isdisjoint(words)
    )


def undecorated(text: str) -> str:
    r"""Without what changes the looks only: full-width signs, `$`, `\left`, thin spaces, bold, a last full stop."""
    text = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", text).replace("√", r"\sqrt")
    text = text.translate(SIGNS).strip().strip("*").strip()
    text = re.sub(r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(?:mbox|textbf|textit|textrm|mathrm|mathbf|operatorname|textnormal)(?=\s*\{)", r"\\text", text)
    text = re.sub(r"\\(?:boldsymbol|bm|underline|mathit)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1", text)
    text = re.sub(r"\\varnothing(?![A-Za-z])", r"\\emptyset", text)
    text = re.sub(r"(?<=[_^])\{\s*\\text\s*\{([^{}]*)\}\s*\}", r"{\1}", text)
    text = re.sub(r"(?<!\\)\\[!,;: ]|~|\\q?quad(?![A-Za-z])", " ", text).replace("{,}", ",")
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}|\\degree(?![A-Za-z])", r"^\\circ", text)
    while True:
        before = text
        text = text.strip().rstrip(".")
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inner and left not in inner.replace(r"\$", ""):
                text = inner
        if text == before:
            return text


def without_separators(text: str) -> str:
    """`12,345` and `12 345` as `12345`; lists and tuples are left alone."""
    compact = re.sub(r"\s*,\s*", ",", text)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", compact) or re.fullmatch(r"-?\d{1,3}( \d{3})+(\.\d+)?", text):
        return re.sub("[, ]", "", compact)
    return text
