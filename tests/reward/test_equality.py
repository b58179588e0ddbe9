import pytest

from opd_trainer.reward.equality import answer_in, same_answer

# Gold answers as MATH-500 has them, one of each kind.
GOLD = [
    r"\left( 3, \frac{\pi}{2} \right)", "p - q", r"\frac{14}{3}", "9", r"\text{Evelyn}", r"90^\circ", r"3\sqrt{13}",
    "6 - 5i", "x=5", "1,-2", "52_8", "3, 5, 7", "1.25", "x^5 - x^4 + x^3 - x^2 + x - 1", r"\cot x", r"1 \pm \sqrt{19}",
    r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}", "(a+5)(b+2)", "(3,4]", "4210_{5}",
    r"\frac{270}7\text{ degrees}",
    ".0000672", "5x - 7y + 11z + 4 = 0", r"10,\!080", r"11,\! 111,\! 111,\! 100", r"\text{(C)}", r"\$32,\!348",
    r"864 \mbox{ inches}^2", r"1\frac{4}{5}", r"5.4 \text{ cents}", "58,500", r"(0,9) \cup (9,36)", r"x \in [-2,7]",
    r"\{1\pm\sqrt{5},-2\}", "y = 2x + 3", r"15\mbox{ cm}^2", r"137 \frac{1}{2}",
    r"\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right]",
]  # fmt: skip


@pytest.mark.parametrize("gold", GOLD)
def test_a_gold_answer_equals_itself_and_no_other(gold):
    answer = answer_in(rf"So the answer is \boxed{{{gold}}}.")
    assert answer is not None
    assert same_answer(answer, gold)
    other = GOLD[(GOLD.index(gold) + 7) % len(GOLD)]
    assert not same_answer(other, gold)


SAME = [
    ("336º", "336"), (r"336\degree", r"336^\circ"), ("24名", "24"), ("24台", "24"), ("8∶5", "8:5"),  # noqa: RUF001
    ("336", r"336^\circ"), (r"336^{\circ}", "336"), ("336 degrees", r"336^\circ"), ("336°", "336"),
    ("336度", r"336^\circ"), ("336 度。", "336"), ("1,000", "1000"), (r"1,\!000", "1000"), ("10 080", r"10,\!080"),
    (r"58{,}500", "58,500"), (r"\$1,234.50", "1234.5"), ("18 dollars", r"\$18"), ("$18$", "18"), (r"$\$18$", "18"),
    ("18美元", r"\$18"),
    (r"864\text{ square inches}", r"864 \mbox{ inches}^2"), ("864", r"864 \mbox{ inches}^2"),
    (r"15 \text{cm}^2", r"15\mbox{ cm}^2"), ("15平方厘米", r"15\mbox{ cm}^2"), ("12厘米", "12 cm"), ("12个", "12"),
    ("12 apples", "12"), ("5 minutes", "5 min"), ("5分钟", "5"), ("3km", r"3 \text{ kilometers}"),
    (r"\frac{14}{3}\text{ hours}", r"\frac{14}{3}"), ("三百三十六", "336"), ("两万零五", "20005"), ("负十二", "-12"),
    ("二〇二四", "2024"), ("三分之二", r"\frac{2}{3}"), ("thirty-six", "36"), ("one hundred and five", "105"),
    ("two thousand three hundred", "2300"), ("minus seven", "-7"), ("C", r"\text{(C)}"), ("(c)", r"\text{(C)}"),
    ("even", r"\text{even}"), ("偶数", r"\text{even}"), ("Even.", r"\text{even}"), ("是", "yes"),
    (r"\text{no solution}", "No solution"), ("无解", r"\text{no solution}"), ("5", "x=5"), ("x=5", "5"),
    ("[-2,7]", r"x \in [-2,7]"), ("2x+3", "y = 2x + 3"), ("-2,1", "1,-2"), (r"\{1,-2\}", "1,-2"),
    ("9/5", r"1\frac{4}{5}"), ("1.8", r"1\frac{4}{5}"), ("137.5", r"137 \frac{1}{2}"), ("0.5", r"\frac12"),
    ("1/2", r"\dfrac{1}{2}"), ("10%", "10"), ("10", r"10\%"), ("0.1", r"10\%"), ("１２３", "123"),  # noqa: RUF001
    (r"2\sqrt{13}", r"\sqrt{52}"), ("1±√19", r"1 \pm \sqrt{19}"), (r"52_{\text{8}}", "52_8"), ("52", "52_8"),
    ("(3, π/2)", r"\left( 3, \frac{\pi}{2} \right)"), ("x^2+2x+1", "(x+1)^2"), ("3.0", "3"), ("+5", "5"), ("025", "25"),
    (r"6.02\times 10^{23}", "602000000000000000000000"), (".5", "0.5"), (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    ("1,-2", "(1,-2)"), ("(1, -2.0)", "1,-2"), ("(1,2),(3,4)", "(3,4),(1,2)"), (r"(\frac12,3)", "0.5,3"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -\frac13 \\ \frac23 \end{pmatrix}"),
]  # fmt: skip
DIFFERENT = [
    ("335", r"336^\circ"), ("1,001", "1000"), ("15 cm", r"15\mbox{ cm}^2"), ("18 cents", r"\$18"), ("15 m", "15 cm"),
    ("(3,4)", "(3,4]"), ("(4,3)", "(3,4)"), ("east", r"\text{seat}"), ("D", r"\text{(C)}"), ("0.33", r"\frac13"),
    ("52", "53_8"), ("42_8", "34_8"), ("1", "1,-2"), ("10", "0.1"), ("-5", "5"), ("x=5", "x=6"), ("1.8", "4/5"),
    ("100", "10%"), ("yes", "no"), ("是", "no"), ("(1,000)", "1"), ("thirty", "13"), ("三十", "13"),
    ("12 apples", "13"),
    ("(-2,1)", "1,-2"), ("1,-2", "(-2,1)"), ("(1,2,3)", "1,3,2"), ("(1,2)", "1,2,3"), ("(1)", "1,2"),
    ("x", "y"), ("", "0"), ("2^{10}", "1023"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_spellings_a_person_takes_for_the_same(answer, gold):
    assert same_answer(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_answers_a_person_tells_apart(answer, gold):
    assert not same_answer(answer, gold)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"blah \boxed{\frac{1}{2}} ok", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"Answer: 3, no: \fbox{4}", "4"),
        (r"Answer: \boxed{7}", "7"),
        ("The answer is 42.", "42."),
        (r"Answer: $\frac{1}{2}$ m", r"\frac{1}{2}"),
        (r"Answer: $\$32,\!348$", r"\$32,\!348"),
        (r"Answer: $1$ or $2$", r"$1$ or $2$"),
        ("Answer: 1\nAnswer: 2\nthanks", "2"),
        ("**Answer:** 336°", "336°"),
        ("the answer is\n\n12", "12"),
        ("答案\uff1a336度", "336度"),
        ("答案是 12。", "12"),
        ("答案为336度。希望正确。", "336度"),
        ("答\uff1a12", "12"),
        ("answer = 12", "12"),
        ("The answer is therefore 12", "12"),
        ("The answer is: **12**", "12"),
        ("The answer is **12 cm**.", "12 cm."),
        ("**Answer: (C)**", "(C)"),
        ("The final answer is 42. I hope it is correct.", "42"),
        ("The answer is 3.14. Good", "3.14"),
        ("Answer: St. Petersburg", "St. Petersburg"),
        ("Answer: C. Twelve", "C. Twelve"),
        ("so\n#### 1,000\n", "1,000"),
        ("it is 5", None),
        ("Answer:", None),
        ("", None),
    ],
)
def test_where_the_answer_is(response, answer):
    assert answer_in(response) == answer
