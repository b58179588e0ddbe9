"""The demo's task: chains of additions and subtractions with a worked answer, and a tokenizer of one character each.

Prompt ``37+58-19=``, response ``+785+359-596-917\\n#### 76``. The working is column arithmetic: for each operation and
column, lowest digit first, the sign, the two digits, and the digit that results with the carry of the column before:
7+8 gives 5, 3+5 gives 9, then 5-9 gives 6, 9-1 gives 7. Each digit follows from the few tokens before it, so that a
tiny model learns it in a minute; with running totals alone (``37+58=95``) it takes several times as long.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from opd_trainer.demo.config import DemoConfig
from opd_trainer.errors import DataError

ANSWER_MARK = "####"
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
VOCABULARY = (PAD, EOS, UNKNOWN, *"0123456789+-=; \n", ANSWER_MARK)
SMALLEST, LARGEST = 10, 99


@dataclass(frozen=True, slots=True)
class Problem:
    """A chain such as 37 + 58 - 19.

    Attributes:
        terms: signed operands, the first positive; operands and running totals have two digits each.
    """

    terms: tuple[int, ...]

    @property
    def totals(self) -> list[int]:
        """Running totals, the first operand included."""
        return [sum(self.terms[: count + 1]) for count in range(len(self.terms))]

    @property
    def prompt(self) -> str:
        """The question."""
        return str(self.terms[0]) + "".join(f"{term:+d}" for term in self.terms[1:]) + "="

    @property
    def label(self) -> str:
        """The answer."""
        return str(self.totals[-1])

    @property
    def response(self) -> str:
        """The worked answer."""
        steps = zip(self.totals, self.terms[1:], self.totals[1:], strict=False)
        working = "".join(columns(total, term, result) for total, term, result in steps)
        return f"{working}\n{ANSWER_MARK} {self.label}"


def columns(total: int, term: int, result: int) -> str:
    """The working of ``total + term = result`` for numbers of two digits, lowest digit first."""
    sign = "+" if term > 0 else "-"
    digits = zip(str(total)[::-1], str(abs(term))[::-1], str(result)[::-1], strict=True)
    return "".join(sign + "".join(column) for column in digits)


def draw_problems(count: int, num_operands: int, seed: int) -> list[Problem]:
    """`count` different problems; a longer list from the same seed starts with the shorter one.

    Raises:
        DataError: so many different problems do not exist, or are too rare to find.
    """
    generator = random.Random(seed)
    problems: dict[Problem, None] = {}
    misses = 0
    while len(problems) < count:
        signs = [1, *(generator.choice((1, -1)) for _ in range(num_operands - 1))]
        problem = Problem(tuple(sign * generator.randint(SMALLEST, LARGEST) for sign in signs))
        if min(problem.totals) < SMALLEST or max(problem.totals) > LARGEST or problem in problems:
            misses += 1
            if misses > 100 * count + 1000:
                raise DataError(
                    f"demo: only {len(problems)} different problems of {num_operands} operands were found, {count} are "
                    "needed: there are not many more. Lower demo.num_train or demo.num_heldout, or raise "
                    "demo.num_operands"
                )
            continue
        problems[problem] = None
    return list(problems)


def write_dataset(folder: Path, config: DemoConfig) -> None:
    """Writes ``train.jsonl`` and ``heldout.jsonl``, rows {"prompt", "label", "response"}; no problem is in both.

    The held-out problems depend on the seed and their number alone, not on the size of the training set.
    """
    problems = draw_problems(config.num_heldout + config.num_train, config.num_operands, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("heldout", problems[: config.num_heldout]), ("train", problems[config.num_heldout :])):
        rows = ({"prompt": p.prompt, "label": p.label, "response": p.response} for p in chosen)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_tokenizer(folder: Path) -> None:
    """Writes the tokenizer as a Hugging Face folder for ``AutoTokenizer``: one token a character, one for ``####``."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{ANSWER_MARK}|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
