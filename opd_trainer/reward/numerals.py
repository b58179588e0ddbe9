"""Numbers in words, English and Chinese, in digits.

Strict on purpose: what is not a number as people write it (`five and six`, `十二三`) stays the words that it is.
"""

# ruff: noqa: RUF001 (a sign for zero that looks like a letter)

import re
from decimal import Decimal
from fractions import Fraction

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
LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
ARTICLES = frozenset({"a", "an"})
PART = (
    {"half": 2, "third": 3, "quarter": 4, "fourth": 4}
    | {
        word: value
        for value, word in enumerate(
            ("fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth"), 5
        )
    }
    | {"hundredth": 100, "thousandth": 1000}
)
"""Name of one part -> how many of them make one."""
PARTS = {f"{word}s": value for word, value in PART.items() if word != "half"} | {"halves": 2}
CHANGES_A_NUMBER = frozenset({*SMALL, *LARGE, *PART, *PARTS, "hundred", "and", "or", "plus", "minus", "over", "point"})
"""English words that make another number of the one before them."""

CHINESE_DIGITS = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
CHINESE_UNITS = {"亿": 10**8, "万": 10**4, "千": 1000, "百": 100, "十": 10}
CHINESE_SIGNS = "".join([*CHINESE_DIGITS, *CHINESE_UNITS])
OTHER_SIGNS = str.maketrans("壹贰叁肆伍陆柒捌玖拾佰仟萬億兩", "一二三四五六七八九十百千万亿两")
DIGITS = r"\d{1,3}(?:,\d{3}){1,40}(?:\.\d{1,40})?|\d{1,40}(?:\.\d{1,40})?"
LONGEST = 200
"""Characters of a number in words; what is longer is text that never came to an end."""


def number_from_words(text: str) -> str | None:
    """`thirty-six`, `三十六`, `3.5万` and `三分之二` in digits; None when it is not a number in words."""
    text = text.strip()
    if len(text) > LONGEST:
        return None
    is_chinese = re.search(rf"[{CHINESE_SIGNS}半又分]", text.translate(OTHER_SIGNS)) is not None
    value = chinese_number(text.translate(OTHER_SIGNS)) if is_chinese else english_number(text)
    return None if value is None else in_digits(value)


def in_digits(value: Fraction) -> str:
    """A decimal number where there is a short one, a fraction otherwise."""
    if value.denominator == 1:
        return str(value.numerator)
    decimal = Decimal(value.numerator) / Decimal(value.denominator)
    if Fraction(decimal) == value:
        return format(decimal, "f")
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def with_plain_magnitudes(text: str) -> str:
    """`1.2 million people` as `1200000 people`."""

    def plain(match: re.Match[str]) -> str:
        scale = {"hundred": 100, **LARGE}[match["scale"].lower()]
        return in_digits(Fraction(match["digits"].replace(",", "")) * scale)

    scales = "|".join(["hundred", *LARGE])
    return re.sub(rf"(?<![\w.,])(?P<digits>{DIGITS})[\s-]*(?P<scale>{scales})(?![A-Za-z])", plain, text, flags=re.I)


def english_number(text: str) -> Fraction | None:
    """The value of English number words; None when they are none."""
    words = re.split(r"[\s-]+", text.lower())
    if words[0] in {"minus", "negative"}:
        value = english_number(" ".join(words[1:]))
        return None if value is None else -value
    if words[-1] in PART or words[-1] in PARTS:
        return english_fraction(words)
    if "point" in words:
        place = words.index("point")
        whole, decimals = english_integer(words[:place]), words[place + 1 :]
        if whole is None or not decimals or any(SMALL.get(word, 10) > 9 for word in decimals):
            return None
        return Fraction(f"{whole}.{''.join(str(SMALL[word]) for word in decimals)}")
    integer = english_integer(words)
    return None if integer is None else Fraction(integer)


def english_fraction(words: list[str]) -> Fraction | None:
    """`two thirds`, `half`, `two and a half`; an ordinal (`twenty-third`) is none."""
    *before, part = words
    whole: int | None = 0
    if "and" in before:
        place = len(before) - 1 - before[::-1].index("and")
        whole, before = english_integer(before[:place]), before[place + 1 :]
    is_one = before in (["a"], ["an"], ["one"]) or (not before and part == "half" and not whole)
    count = 1 if is_one else english_integer(before)
    pieces = PART.get(part) or PARTS[part]
    if whole is None or count is None or is_one != (part in PART) or (whole and count >= pieces):
        return None
    return whole + Fraction(count, pieces)


def english_integer(words: list[str]) -> int | None:
    """The value of the words of an integer; None when one of them is not where it belongs."""
    total = part = 0
    before, largest = "", 10**15
    for word in words:
        follows_scale = before in ("", "hundred", "and") or before in LARGE
        if word == "and" and (before == "hundred" or before in LARGE):
            pass
        elif word in ARTICLES and not before:
            part = 1
        elif word == "zero" and words == ["zero"]:
            pass
        elif word in SMALL and SMALL[word] and before not in ARTICLES and (follows_scale or part % 100 >= 20):
            room = 10 if SMALL[word] < 10 else 100
            if part % room:
                return None
            part += SMALL[word]
        elif word == "hundred" and (0 < part < 100 or not before):
            part = 100 * max(part, 1)
        elif word in LARGE and LARGE[word] < largest and (part or not before):
            total, part, largest = total + LARGE[word] * max(part, 1), 0, LARGE[word]
        else:
            return None
        before = word
    return None if before in {"", "and", *ARTICLES} else total + part


def chinese_number(text: str) -> Fraction | None:
    """The value of a Chinese number, also with digits in it (`1万2千`); None when it is none."""
    if text.startswith("负"):
        value = chinese_number(text[1:])
        return None if value is None else -value
    if fraction := re.fullmatch("(?:(.+)又)?(.+)分之(.+)", text):
        whole, pieces, count = (chinese_integer(part) if part else Fraction(0) for part in fraction.groups())
        if whole is None or count is None or not pieces or (whole and count >= pieces):
            return None
        return whole + count / pieces
    if decimal := re.fullmatch(f"(.+)点([{''.join(CHINESE_DIGITS)}]+)([万亿]?)", text):
        whole = chinese_integer(decimal.group(1))
        decimals = "".join(str(CHINESE_DIGITS[sign]) for sign in decimal.group(2))
        scale = CHINESE_UNITS.get(decimal.group(3), 1)
        return None if whole is None else (whole + Fraction(f"0.{decimals}")) * scale
    return Fraction(1, 2) if text in {"半", "一半"} else chinese_integer(text)


def chinese_integer(text: str) -> Fraction | None:
    """`三亿两千万`, `二〇二四`, `3.5万`, `一百二` (which is 120); None when a sign is not where it belongs."""
    for sign, unit in CHINESE_UNITS.items():
        before, found, after = text.rpartition(sign)
        if found:
            many = chinese_integer(before) if before or unit > 10 else Fraction(1)
            rest = after_unit(after, unit)
            if not many or rest is None or (many >= 10 and unit <= 1000):
                return None
            return many * unit + rest
    if text and all(sign in CHINESE_DIGITS for sign in text):
        return Fraction("".join(str(CHINESE_DIGITS[sign]) for sign in text))
    return Fraction(text.replace(",", "")) if re.fullmatch(DIGITS, text) else None


def after_unit(text: str, unit: int) -> Fraction | None:
    """What is added after a unit: `一百零二` is 102, `一百二` is 120, `一百二三` is none."""
    if not text:
        return Fraction(0)
    value = chinese_integer(text.removeprefix("零"))
    if value is None or not 0 < value < unit or value.denominator > 1:
        return None
    is_digits = all(sign in CHINESE_DIGITS or sign in "0123456789" for sign in text)
    if text.startswith("零") or not is_digits:
        return value
    if len(text) == 1:
        return value * unit / 10
    return value if text.isascii() and len(text) == len(str(unit)) - 1 else None
