r"""One spelling for what people write in many ways.

Full-width signs, LaTeX decoration, number words, thousands separators, units. Nothing here understands mathematics;
`opd_trainer.reward.equality` does that with what is left.
"""

# ruff: noqa: RUF001 (the signs that look alike are the subject of this file)

import re
from dataclasses import dataclass

FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
SIGNS = FULL_WIDTH | {
    ord(sign): plain
    for sign, plain in {
        "\u3000": " ", "\xa0": " ", "。": ".", "、": ",", "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ",
        "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ", "º": r"^\circ", "∶": ":", "²": "^2", "³": "^3",
        "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "￥": "¥", "“": '"', "”": '"',
    }.items()
}  # fmt: skip
"""Signs that have a plain equivalent."""

WORDS = {
    "是": "yes", "是的": "yes", "否": "no", "不是": "no", "对": "true", "正确": "true", "错": "false", "错误": "false",
    "偶数": "even", "奇数": "odd", "无解": "no solution", "不存在": "does not exist", "东": "east", "西": "west",
    "南": "south", "北": "north",
}  # fmt: skip
"""Chinese answers in words, in English."""

UNITS = {
    "degree": "degrees deg 度",
    "percent": "% 百分点",
    "dollar": "dollars usd 美元",
    "yuan": "rmb cny 元 人民币",
    "cent": "cents 美分",
    "mm": "millimeter millimeters millimetre millimetres 毫米",
    "cm": "centimeter centimeters centimetre centimetres 厘米",
    "m": "meter meters metre metres 米",
    "km": "kilometer kilometers kilometre kilometres 千米 公里",
    "inch": "inches",
    "foot": "feet ft",
    "yard": "yards yd",
    "mile": "miles",
    "mg": "milligram milligrams 毫克",
    "g": "gram grams 克",
    "kg": "kilogram kilograms 千克 公斤",
    "pound": "pounds lb lbs",
    "ounce": "ounces oz",
    "ml": "milliliter milliliters millilitre millilitres 毫升",
    "liter": "liters litre litres 升",
    "second": "seconds sec 秒",
    "minute": "minutes min 分钟",
    "hour": "hours hr hrs 小时",
    "day": "days 天",
    "week": "weeks 周 星期",
    "month": "months 个月",
    "year": "years 年",
    "mph": "",
    "unit": "units 单位",
    "other": "个 人 次 种 只 本 条 块 颗 辆 名 位 台 张 头 棵",
}
"""Unit -> other spellings. `unit` and `other` name no quantity, so they agree with every unit."""

CANONICAL = {spelling: unit for unit, spellings in UNITS.items() for spelling in (unit, *spellings.split())}
NEUTRAL = frozenset({"unit", "other"})
POWER_WORDS = {"square": "^2", "sq": "^2", "平方": "^2", "cubic": "^3", "cu": "^3", "立方": "^3"}

SMALL = {
    word: value
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
    )
} | {
    word: 10 * value
    for value, word in enumerate(("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"), 2)
}  # fmt: skip
LARGE = {"thousand": 1000, "million": 10**6, "billion": 10**9}
CHINESE_DIGITS = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
CHINESE_UNITS = {"十": 10, "百": 100, "千": 1000}
CHINESE_LARGE = {"万": 10**4, "亿": 10**8}
CHINESE_NUMBER = "[零〇一二两三四五六七八九十百千万亿]+"


FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "log", "exp", "sqrt", "mod"}
)
"""Words of mathematics, which make no phrase."""


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
    plain = (wrapped.group(1) if wrapped else text).strip()
    number = number_from_words(plain)
    if number is not None:
        return Spelled(number, "", False)
    choice = re.fullmatch(r"\(?([A-Za-z])\)?", plain)
    if choice and (wrapped or plain[0] == "(" or plain.isupper()):
        return Spelled(choice.group(1).lower(), "", True)
    word = WORDS.get(plain, plain)
    if (wrapped and not any(c.isdigit() for c in word)) or is_phrase(word):
        return Spelled(" ".join(word.lower().split()), "", True)
    core, unit = split_unit(plain)
    return Spelled(without_separators(number_from_words(core) or core), unit, False)


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


def split_unit(text: str) -> tuple[str, str]:
    """(what is measured, canonical unit); a word that is no unit of ours is dropped, but only after a number."""
    money = re.fullmatch(r"(-?)\s*(\\?\$|¥|€|£)\s*(.+)", text)
    if money:
        unit = {"¥": "yuan", "€": "euro", "£": "sterling"}.get(money.group(2), "dollar")
        return money.group(1) + money.group(3), unit
    for mark, unit in ((r"^\circ", "degree"), (r"\circ", "degree"), (r"\%", "percent"), ("%", "percent")):
        if text.endswith(mark) and len(text) > len(mark):
            return text[: -len(mark)].strip(), unit
    tail = r"(?:\\text\s*\{\s*(?P<boxed>[^{}]*)\}|(?<![A-Za-z\\])(?P<plain>[A-Za-z]+(?: [A-Za-z]+)*|[\u4e00-\u9fff]+))"
    match = re.fullmatch(rf"(?P<core>.*[\d)}}\]a-z])\s*{tail}\s*(?P<power>\^\s*\{{?\s*[23]\s*\}}?)?\.?", text)
    if match is None:
        return text, ""
    words = (match["boxed"] or match["plain"] or "").strip().rstrip(".").lower()
    unit, known = canonical_unit(words, match["power"] or "")
    is_number = re.search(r"\d\s*\}?\s*$", match["core"]) is not None
    if known or match["boxed"] is not None or (is_number and len(words) >= 3):
        return match["core"].strip(), unit
    return text, ""


def canonical_unit(words: str, power: str) -> tuple[str, bool]:
    """(canonical unit with its power, whether we know it)."""
    exponent = "^" + re.sub(r"\D", "", power) if power else ""
    for prefix, of_prefix in POWER_WORDS.items():
        if words.startswith(prefix) and words.removeprefix(prefix).strip() in CANONICAL:
            words, exponent = words.removeprefix(prefix).strip(), of_prefix
    if words not in CANONICAL:
        return "", False
    unit = CANONICAL[words]
    return ("" if unit in NEUTRAL else unit + exponent), True


def number_from_words(text: str) -> str | None:
    """`thirty-six`, `三十六` and `三分之二` in digits; None when it is not a number in words."""
    fraction = re.fullmatch(rf"(负?)({CHINESE_NUMBER})分之({CHINESE_NUMBER})", text)
    if fraction:
        sign = "-" if fraction.group(1) else ""
        return rf"{sign}\frac{{{chinese_number(fraction.group(3))}}}{{{chinese_number(fraction.group(2))}}}"
    if re.fullmatch(f"负?{CHINESE_NUMBER}", text):
        return str(chinese_number(text.removeprefix("负")) * (-1 if text.startswith("负") else 1))
    words = re.split(r"[\s-]+", text.lower().strip())
    sign = 1
    if words[0] in {"minus", "negative"}:
        sign, words = -1, words[1:]
    value = english_number([word for word in words if word != "and"])
    return None if value is None else str(sign * value)


def english_number(words: list[str]) -> int | None:
    """The value of English number words; None when one of them is not."""
    if not words:
        return None
    total = part = 0
    for word in words:
        if word in SMALL:
            part += SMALL[word]
        elif word == "hundred":
            part = 100 * max(part, 1)
        elif word in LARGE:
            total, part = total + LARGE[word] * max(part, 1), 0
        else:
            return None
    return total + part


def chinese_number(text: str) -> int:
    """The value of a Chinese integer."""
    if all(sign in CHINESE_DIGITS for sign in text):
        return int("".join(str(CHINESE_DIGITS[sign]) for sign in text))
    total = part = digit = 0
    for sign in text:
        if sign in CHINESE_DIGITS:
            digit = CHINESE_DIGITS[sign]
        elif sign in CHINESE_UNITS:
            part, digit = part + CHINESE_UNITS[sign] * (digit or 1), 0
        else:
            total, part, digit = (total + part + digit) * CHINESE_LARGE[sign], 0, 0
    return total + part + digit
