"""Quantities, numbers in words and choices as people write them."""

import time

import pytest

from opd_trainer.reward.equality import answer_in, same_answer
from opd_trainer.reward.numerals import number_from_words
from opd_trainer.reward.spelling import chosen, spelled

SAME = [
    ("12 square meters", "12 m²"), ("12 m2", "12 m²"), ("12 m2", "12"), ("12 sq m", "12 m^2"),
    ("12 meters squared", r"12\text{ m}^2"), ("12 square meters", "12"), ("12 cubic cm", "12 cm^3"),
    ("12立方厘米", "12 cm³"), ("12平方米", r"12\text{ m}^2"), ("12 m^2", r"12\,\mathrm{m}^2"),
    ("10 km/h", "10 km/h"), ("10 km/h", "10"), ("10 km/h", r"10 \text{ km/h}"),
    ("10 km/h", r"10 \text{ km}/\text{h}"), ("10千米每小时", "10 km/h"), ("10公里/小时", "10 kilometers per hour"),
    ("10 mph", r"10 \text{ miles per hour}"), ("9.8 m/s^2", r"9.8\ \mathrm{m/s^2}"), ("9.8 m/s²", "9.8"),
    ("5 g/cm^3", "5克/立方厘米"), ("336°C", "336"), ("336℃", r"336^\circ C"),
    (r"336^{\circ}\text{C}", "336 degrees Celsius"), ("30摄氏度", r"30^\circ"), ("68°F", "68 degrees fahrenheit"),
    ("20欧元", "€20"), ("RMB 5", "5元"), ("RMB 5", "5"), ("USD 5", r"\$5"), ("5 USD", r"\$5"),
    ("US dollars 5", "US dollars 5"), ("5 US dollars", r"\$5"), ("6吨", "6 tons"), ("6吨", "6"), ("6斤", "6"),
    ("5 (cm)", "5 cm"), (r"\$1.2 million", "1200000"), (r"\$1.2 million", "1.2 million dollars"),
    ("1.2 million", "1,200,000"), (r"1.2 \text{ million}", "1200000"), ("2 million people", "2,000,000"),
    ("1e6", "1000000"), ("1.5e3", "1500"), ("1e-3", "0.001"), ("1e6", "10^6"), ("3.5万", "35000"),
    ("3.5万元", "35000"), ("200万人", "2000000"), ("1万2千", "12000"), ("三亿两千万", "320,000,000"),
    ("一百二", "120"), ("十二点五", "12.5"), ("十二点五厘米", "12.5 cm"), ("三又二分之一", "3.5"),
    ("三又二分之一", r"3\frac12"), ("三百米", "300"), ("两周", "2"), ("五个", "5"), ("百分之五十", r"50\%"),
    ("百分之五十", "0.5"), ("百分之五十", "50"), ("two-thirds", r"\frac23"), ("one half", "0.5"),
    ("two and a half", "2.5"), ("two and a half hours", "2.5"), ("five dollars", "5"),
    ("10 m/s", r"10\text{ meters per second}"), ("three quarters", r"75\%"), ("twelve point five", "12.5"),
    ("five dollars", r"\$5"), ("约5", "5"), ("≈5", "5"), (r"\approx 5", "5"), ("about 5", "5"),
    ("大约5厘米", "5 cm"), (r"\boldsymbol{5}", "5"), (r"\boldsymbol{\frac{1}{2}}", "0.5"), (r"\underline{5}", "5"),
    (r"\mathbf{5}", "5"), ("选C", "C"), ("选项C", r"\text{(C)}"), ("option C", "C"), ("Option (C)", r"\text{C}"),
    ("choice c", "C"), ("5和-5", "5,-5"), ("5和-5", "-5, 5"), ("5或-5", r"\pm 5"), ("5, -5", r"\pm 5"),
    ("星期一", "Monday"), ("周日", r"\text{Sunday}"), ("空集", r"\emptyset"), ("∅", r"\varnothing"),
    ("无穷大", r"\infty"), ("infinity", r"\infty"), ("负无穷", r"-\infty"), ("椭圆", r"\text{ellipse}"),
    ("第5个", "5"), ("24辆车", "24"), ("24名学生", "24"), ("24 people", "24"), ("3个小时", "3 hours"),
    ("6 h", "6 hours"), ("6s", "6"), ("6 s", "6 seconds"), ("5 L", "5 liters"), ("5th", "5"), ("3倍", "3"),
    (r"\frac{1}{2}\text{ apples}", r"\frac12"), ("twelve apples", "twelve apples"), ("x=5或x=-5", "5,-5"),
    ("2m", "2m"), ("3h", "3h"), ("5 N", "5 newtons"),
    ("(C) 12", "C"), ("C. 12", r"\text{(C)}"), ("C. 12", "12"), (r"\textbf{(C)}\ \frac{1}{2}", "0.5"),
    ("(C) 12", "(C) 12"), ("C: 12 apples", "C"), ("C. -5", "-5"), ("12 per cent", "0.12"), ("one hundredth", "0.01"),
]  # fmt: skip
DIFFERENT = [
    ("(C) 12", "D"), ("(C) 12", "13"), ("(C) 12", "(D) 12"), ("(C) 12", "(C) 13"), ("(C) or (D)", "C"),
    ("(C) and D", "C"), ("(A)(B)", "A"), ("(A) + B", "A"), (r"(C) \cup (D)", "C"), ("(C) 12, (A) 3", "C"), ("A:5", "5"),
    ("C: -5", "5"),
    ("12 twelfths", "12"),
    ("3 million", "3"), ("1.2 million", "1.2"), ("1e6", "1e5"), ("1e6", "6"), ("1e6", "16"), ("2abc", "2"),
    ("five and six", "11"), ("one two three", "6"), ("一百二", "102"), ("三亿两千万", "3"), ("12 m2", "122"),
    ("12 m2", "144"), ("12 m2", "12 m"), ("12 square meters", "12 m^3"), ("12 square meters", "12 cm^2"),
    ("12 square meters", "13 m²"), ("10 km/h", "10 km"), ("10 km/h", "10 m/h"), ("10 km/h", "10 miles per hour"),
    ("10 km/h", "11 km/h"), ("336°C", "335"), ("68°F", "68°C"), ("30°C", "86°F"), ("20欧元", r"\$20"),
    ("RMB 5", r"\$5"), ("USD 5", "5 cents"), ("100 cm", "1 m"), ("60 minutes", "1 hour"), ("6吨", "6 kg"),
    ("3.5万", "3.5"), ("3.5万", "3500"), ("1万2千", "10002"), ("十二点五", "125"), ("十二点五", "12"),
    ("三又二分之一", "3"), ("三又二分之一", "1.5"), ("two-thirds", "2/5"), ("two-thirds", "3/2"), ("one half", "1"),
    ("twenty-third", "20/3"), ("two and a half", "2"), ("12 and a half", "12"), ("3个半小时", "3"),
    ("3个半小时", "3 hours"), ("5以上", "5"), ("5 or more", "5"), ("5 less than x", "5"), ("5多个", "5"),
    ("选C", "D"), ("option C", "B"), ("选C", "3"), ("5和-5", "5"), ("5和-5", "5,5"), ("5和6", "11"), ("5和6", "56"),
    ("星期一", "Tuesday"), ("周日", "周一"), ("空集", "0"), ("无穷大", r"-\infty"), ("负无穷", r"\infty"),
    ("无", "0"), ("圆", "ellipse"), ("第5个", "4"), ("约5", "6"), ("about 5", "about"), ("3 sin x", "3"),
    ("2 x y", "2"), (r"2\pi", "2"), ("3 times x", "3"), ("3小时20分钟", "3"), ("3小时20分钟", "20"),
    ("3 hours 20 minutes", "3"), ("3 hours and 20 minutes", "20 minutes"), ("5 ft 3 in", "5"),
    ("5 ft 3 in", "3 in"), ("5 feet 3 inches", "53"), ("-5元", "5"), (r"-\$5", r"\$5"), ("负五", "5"),
    ("minus two thirds", r"\frac23"), ("2x", "2"), ("2 x", "2"), ("3y", "3"), ("7k", "7"), ("4 n", "4"),
    (r"2\text{ or }3", "2"), ("3 dozen", "36"), ("十", "1"), (r"\pm 5", "5"), (r"\pm 5", "-5"), ("x^2 m", "x"),
    ("12人", "13人"), ("第三", "1/3"), ("三分", r"\frac13"), ("0.5 million", "500"), (r"5\text{ if } x>0", "5"),
    ("50 percent", "0.05"), ("百分之五十", "5"), ("1 and 2", "3"), ("x/h", "x"), ("5/h", "5"), ("a/s", "a"),
    ("5/m", "5"), ("1/m", "1"), ("9/s", "9"), ("v/t", "v"), ("10/3 m", "10 m"), ("3m+2", "3"), ("2 to 3", "2"),
    ("2-3 apples", "3"), ("2N", "2"), ("5 W", "5 volts"), ("5 squared", "5"), ("5 factorial", "5"),
    ("2的平方", "2"), ("2的倍数", "2"), ("five dollars", "five euros"), ("five dollars", r"\$6"),
    ("9.8 m/s", "9.8 m/s^2"), ("half", "2"), ("10 m/s", "10 s/m"), (r"\text{two apples}", r"\text{two pears}"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_the_same_quantity(answer, gold):
    assert same_answer(answer, gold)
    assert same_answer(gold, answer)


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_another_quantity(answer, gold):
    assert not same_answer(answer, gold)
    assert not same_answer(gold, answer)


@pytest.mark.parametrize(
    ("words", "digits"),
    [
        ("三亿两千万", "320000000"), ("一万二千亿", "1200000000000"), ("一万亿", "1000000000000"), ("一百零二", "102"),
        ("一百二", "120"), ("一万二", "12000"), ("一千零二十", "1020"), ("1,200万", "12000000"), ("1万2000", "12000"),
        ("壹佰", "100"), ("负三又四分之一", "-3.25"), ("一点二万", "12000"), ("三分之二", r"\frac{2}{3}"),
        ("nineteen", "19"), ("twelve hundred", "1200"), ("a hundred and five", "105"), ("negative one half", "-0.5"),
        ("one hundred and two thirds", r"\frac{302}{3}"), ("twenty thirds", r"\frac{20}{3}"),
        ("five million three hundred thousand and six", "5300006"), ("zero", "0"),
    ],
)  # fmt: skip
def test_numbers_in_words(words, digits):
    assert number_from_words(words) == digits


@pytest.mark.parametrize(
    "words",
    ["十二三", "一百二三", "万", "千百", "零分之一", "二又三分之四", "一百1.5", "12", "", "a", "and", "one two three",
     "twenty thirty", "ten five", "zero five", "twenty-third", "third", "one and five thirds", "two thousand million",
     "five thousand and", "point five", "one thirds"],
)  # fmt: skip
def test_no_numbers(words):
    assert number_from_words(words) is None


@pytest.mark.parametrize(
    "text",
    ["十", "一万", "一百和", "个", "one ", "**", "5 a ", "(A) ", "3 million ", "9", "/m", r"\text{m}", "m^2 ", "答"],
)
def test_a_response_without_end_takes_no_time(text):
    started = time.process_time()
    long = text * 2000
    spelled(answer_in(f"Answer: {long}") or "")
    spelled(f"5 {long}")
    chosen(long, "C")
    assert time.process_time() - started < 2
