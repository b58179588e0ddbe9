r"""The unit of a quantity, in one spelling. Units are compared, never converted."""

import re
from collections.abc import Mapping
from types import MappingProxyType

from opd_trainer.reward.numerals import CHANGES_A_NUMBER, CHINESE_SIGNS

UNITS = {
    "degree": "degrees deg 度",
    "celsius": "摄氏度",
    "fahrenheit": "华氏度",
    "radian": "radians rad 弧度",
    "percent": "% 百分点",
    "dollar": "dollars usd 美元 美金",
    "yuan": "rmb cny 元 人民币 块钱",
    "euro": "euros eur 欧元",
    "sterling": "gbp 英镑",
    "yen": "jpy 日元",
    "cent": "cents 美分",
    "mm": "millimeter millimeters millimetre millimetres 毫米",
    "cm": "centimeter centimeters centimetre centimetres 厘米 公分",
    "dm": "decimeter decimeters decimetre decimetres 分米",
    "m": "meter meters metre metres 米",
    "km": "kilometer kilometers kilometre kilometres 千米 公里",
    "inch": "inches 英寸",
    "foot": "feet ft 英尺",
    "yard": "yards yd",
    "mile": "miles 英里",
    "hectare": "hectares 公顷",
    "acre": "acres 英亩",
    "mg": "milligram milligrams 毫克",
    "g": "gram grams 克",
    "kg": "kilogram kilograms 千克 公斤",
    "jin": "斤",
    "ton": "tons tonne tonnes 吨",
    "pound": "pounds lb lbs 磅",
    "ounce": "ounces oz",
    "ml": "milliliter milliliters millilitre millilitres 毫升",
    "liter": "liters litre litres 升",
    "gallon": "gallons",
    "second": "seconds sec secs 秒 秒钟",
    "minute": "minutes min mins 分钟",
    "hour": "hours hr hrs 小时 钟头",
    "day": "days 天 日",
    "week": "weeks 周 星期",
    "month": "months 个月",
    "year": "years 年",
    "newton": "newtons 牛 牛顿",
    "joule": "joules 焦耳",
    "watt": "watts 瓦",
    "volt": "volts 伏",
    "mile/hour": "mph",
    "km/hour": "kph kmh",
    "unit": "units 单位",
    "other": "人 倍 分",
}
"""Unit -> other spellings. `unit` and `other` name no quantity, so they agree with every unit."""

SHORT = {
    "h": "hour", "s": "second", "t": "ton", "L": "liter", "N": "newton", "J": "joule", "W": "watt", "V": "volt",
}  # fmt: skip
"""Units of one letter that is also a variable: after a number and a space, and in ratios."""

CANONICAL = {spelling: unit for unit, spellings in UNITS.items() for spelling in (unit, *spellings.split())}
NEUTRAL = frozenset({"unit", "other"})
POWERS = {"square": 2, "sq": 2, "平方": 2, "cubic": 3, "cu": 3, "立方": 3}
POWERS_BEHIND = {"squared": 2, "cubed": 3}
MEASURE_WORDS = (
    "个次种只本条块颗辆名位台张头棵件双对把箱盒瓶袋页层排组班行列岁场局题道株朵匹幅根支枝套筐桶包桌家间座艘架项步粒户批"
    "圈份级节"
)
LONGEST = 80
"""Characters of a unit with what was counted."""
MONEY = {"$": "dollar", "¥": "yuan", "€": "euro", "£": "sterling"}
TEMPERATURES = {"C": "celsius", "F": "fahrenheit"}

FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "log", "exp", "sqrt", "mod"}
)
"""Words of mathematics, which make no phrase."""
NOT_A_NOUN = CHANGES_A_NUMBER | FUNCTIONS | {
    "times", "less", "more", "than", "least", "most", "below", "above", "to", "pi", "if", "not", "squared", "cubed",
    "factorial", "choose", "root",
}  # fmt: skip
NOT_A_CHINESE_NOUN = f"[{CHINESE_SIGNS}半多余几又点分之以上下不约至到或和的方阶]"
"""What makes another quantity of the number before it; all else after a number is what was counted."""


def agree(left: str, right: str) -> bool:
    """Whether two canonical units can be the same; "" is a unit left out."""
    if not left or not right or left == right:
        return True
    return "degree" in (left, right) and not {left, right}.isdisjoint(TEMPERATURES.values())


def split_unit(text: str) -> tuple[str, str]:
    """(what is measured, canonical unit); a word that is no unit of ours is dropped, but only after a number."""
    return split_money(text) or split_sign(text) or split_words(text) or (text, "")


def split_money(text: str) -> tuple[str, str] | None:
    """`$5`, `USD 5`, `¥5元`."""
    money = re.fullmatch(r"(-?)\s*(\\?\$|¥|€|£|(?:RMB|USD|CNY|EUR|GBP|JPY)(?![A-Za-z]))\s*(.+)", text)
    if money is None:
        return None
    sign, mark, rest = money.groups()
    unit = MONEY.get(mark.lstrip("\\")) or CANONICAL[mark.lower()]
    amount, again = split_unit(rest)
    return sign + (amount if again == unit else rest), unit


def split_sign(text: str) -> tuple[str, str] | None:
    """`336^\\circ`, `36^\\circ C`, `50%`."""
    temperature = re.fullmatch(r"(.+?)\s*\^?\\circ\s*([CF])", without_text(text))
    if temperature:
        return temperature.group(1), TEMPERATURES[temperature.group(2)]
    for mark, unit in ((r"^\circ", "degree"), (r"\circ", "degree"), (r"\%", "percent"), ("%", "percent")):
        if text.endswith(mark) and len(text) > len(mark):
            return text[: -len(mark)].strip(), unit
    return None


def split_words(text: str) -> tuple[str, str] | None:
    """`12 square meters`, `12平方米`, `12 (cm)`, `12 apples`: the longest end of the text that is a unit."""
    flat = without_text(text)
    bracketed = re.fullmatch(r"(.*[\d}])\s*\(([^()]+)\)", flat)
    if bracketed and (unit := canonical_unit(bracketed.group(2))) is not None:
        return bracketed.group(1), unit
    is_boxed = re.search(r"\\text\s*\{[^{}]*\}$", text) is not None
    start_of_unit = re.compile(r"(?<![A-Za-z\\_^{])[A-Za-z]|[\u4e00-\u9fff]")
    for start in start_of_unit.finditer(flat, max(0, len(flat) - LONGEST)):
        end = start.start()
        core, tail = flat[:end].rstrip(), flat[end:]
        if flat in CANONICAL or not re.search(rf"[\d)}}\]a-z{CHINESE_SIGNS}]$", core[-1:]):
            continue
        unit = canonical_unit(tail)
        if unit is None and flat[end - 1] == " " and re.fullmatch(r"[-+]?[\d.,]+", core):
            unit = SHORT.get(tail)
        if unit is not None:
            return core, unit
        if is_counted(core, flat[len(core) :], is_boxed=is_boxed):
            return core, ""
    return None


def without_text(text: str) -> str:
    r"""What is in `\text{}` without it."""
    return re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip()


def is_counted(core: str, tail: str, *, is_boxed: bool) -> bool:
    r"""Whether words name only what was counted: `12 apples`, `24名学生`. In `\text{}` also after a fraction."""
    if not re.search(r"[\d)}]" if is_boxed else r"\d", core[-1:]):
        return False
    if re.fullmatch(r"[\u4e00-\u9fff]{2,}", tail.strip()):
        return re.search(NOT_A_CHINESE_NOUN, tail) is None
    words = tail.lower().strip(" .").split()
    return (
        tail[0] == " "
        and all(re.fullmatch("[a-z][a-z'-]+|a", word) for word in words)
        and any(len(word) >= 3 for word in words)
        and NOT_A_NOUN.isdisjoint(part for word in words for part in word.split("-"))
    )


def canonical_unit(text: str) -> str | None:
    """`km/h` and `千米每小时` as `km/hour`, `square meters` as `m^2`; "" for one without meaning, None when unknown."""
    parts = re.split(r"\s*/\s*|\s+per\s+|\s*每\s*", text.strip().rstrip(".").replace("per cent", "percent"))
    if len(parts) == 1:
        unit = unit_with_power(parts[0])
        return "" if unit in NEUTRAL else unit
    units = [unit_with_power(part, SHORT) for part in parts]
    return None if None in units else "/".join(unit for unit in units if unit)


def unit_with_power(text: str, short: Mapping[str, str] = MappingProxyType({})) -> str | None:
    """A unit, or one of a ratio, with its power; None when unknown."""
    match = re.fullmatch(r"(.*?)\s*(?:\^\s*\{?\s*([23])\s*\}?|(?<=[a-z])([23]))?", text.strip())
    assert match is not None
    words, power = match.group(1).strip(), int(match.group(2) or match.group(3) or 1)
    if power == 1:
        words, power = without_power_words(words)
    words = re.sub(r"^degrees? (?=celsius$|fahrenheit$)|^(?:us|u\.s\.) (?=dollars?$)", "", words, flags=re.I)
    unit = short.get(words) or CANONICAL.get(words) or CANONICAL.get(words.lower() if len(words) > 1 else "")
    if unit is None and words[:1] and words[0] in MEASURE_WORDS:
        noun = words[1:]
        unit = CANONICAL.get(noun) or (
            "other" if re.search(rf"{NOT_A_CHINESE_NOUN}|[^\u4e00-\u9fff]", noun) is None else None
        )
    if unit is None or power == 1 or unit in NEUTRAL:
        return unit
    return f"{unit}^{power}"


def without_power_words(words: str) -> tuple[str, int]:
    """(`meters`, 2) for `square meters` and `meters squared`."""
    for word, power in POWERS.items():
        rest = words.removeprefix(word).strip()
        if words.startswith(word) and (rest in CANONICAL or rest.lower() in CANONICAL):
            return rest, power
    for word, power in POWERS_BEHIND.items():
        if words.endswith(f" {word}"):
            return words.removesuffix(word).strip(), power
    return words, 1
