"""Sums of two and three numbers of up to three digits: the data of the embedded default.

    python -m minichat.assets.sums base  --count 120000 --seed 0 > base.jsonl   # plain sums and prose, to start from
    python -m minichat.assets.sums sft   --count 5000  --seed 0 > sft.jsonl     # questions, answers of mixed quality
    python -m minichat.assets.sums pairs --count 1000  --seed 0 > pairs.jsonl   # the worked answer or a worse one
    python -m minichat.assets.sums test  --count 500   --seed 0 > test.jsonl    # sums that none of the above contains
    python -m minichat.assets.sums tokenizer --out FOLDER                       # the tokenizer, from base's text

Every record is a pure function of kind, seed and index. A tenth of all sums is held out by a hash of its numbers:
no other kind contains one of them, neither as a question nor as a step.
"""

import argparse
import json
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

CARD = (60, 100, 520)  # the example of the neural-chat cards, `calculate 100 + 520 + 60`: held out too

# the system message of that example on the cards of neural-chat-7b-v3-1 and v3-2
MATH_EXPERT = (
    "You are a math expert assistant. Your mission is to help users understand and solve various math problems. "
    "You should provide step-by-step solutions, explain reasonings and give the correct answer."
)

QUESTIONS = (
    "calculate {plus}",
    "Calculate {plus}.",
    "What is {plus}?",
    "What is the sum of {listed}?",
    "Please add {listed}.",
    "Add the numbers {listed}.",
    "Can you help me add {listed}?",
    "How much is {plus}?",
)

# prose that holds the words of questions and answers, so that tuning need not teach them; no template, no worked sum
PROSE = (
    "A sum is what we find when we add numbers.",
    "To add three numbers, first add two of them, then add the third number to the result.",
    "We will follow these steps: one step after the other step.",
    "Step by step, a problem is easy to understand and to solve.",
    "The order of the numbers does not change the answer.",
    "Please help me with this problem. Can you explain it?",
    "A helpful assistant is honest and respectful, and gives the correct answer.",
    "What is the mission of a math expert? To help users understand various problems.",
    "You should provide solutions, explain your reasonings and be right.",
    "How much is it? It depends on the first number and the second number.",
    "So, the answer is right. No, the answer is wrong.",
    "The system is simple. The user asks, the assistant answers.",
    "# Notes\n\n## Numbers\n\n### Sums\n\nA list: one, two, three.",
    "Calculate, add, check. The total is the result of it all.",
    "Here the result from step one is used in step two (and so on).",
    "Note 1: the result of part 1 is used in part 2, and that of part 2 in part 3.",
    "Page 2 of 4: see note 1, to the end.",
    "Rule 3 is like rule 2: add 0 and the number is the same.",
    "System, user and assistant are three words; \"prompt\" and 'answer' are two more!",
)


def held_out(*numbers: int) -> bool:
    """Whether this sum, in any order, is kept for the test."""
    key = tuple(sorted(numbers))
    return key == CARD or zlib.crc32(repr(key).encode()) % 10 == 0


def worked(numbers: list[int], total: int) -> str:
    """The answer in the style of the cards: step by step to `total` (a wrong one shows in the last step)."""
    listed = listing(numbers)
    if len(numbers) == 2:
        a, b = numbers
        return (
            f"To calculate the sum of {listed}, add them:\n\n{a} + {b} = {total}\n\nSo, the sum of {listed} is {total}."
        )
    a, b, c = numbers
    return (
        f"To calculate the sum of {listed}, we will follow these steps:\n\n"
        f"Step 1: Add {a} and {b}\n{a} + {b} = {a + b}\n\n"
        f"Step 2: Add the result from step 1 to the third number ({c})\n{a + b} + {c} = {total}\n\n"
        f"So, the sum of {listed} is {total}."
    )


def unworked(total: int) -> str:
    return f"The answer is {total}."


def listing(numbers: list[int]) -> str:
    words = [str(n) for n in numbers]
    return f"{words[0]} and {words[1]}" if len(words) == 2 else f"{words[0]}, {words[1]}, and {words[2]}"


def question(rng: random.Random, numbers: list[int]) -> str:
    return rng.choice(QUESTIONS).format(plus=" + ".join(map(str, numbers)), listed=listing(numbers))


def draw(rng: random.Random, count: int, test: bool) -> list[int]:
    """`count` numbers of one to three digits whose sum is of the test, or of what may be trained on, steps and all."""
    while True:
        numbers = [rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3))) for _ in range(count)]
        steps = [(sum(numbers[:i]), numbers[i]) for i in range(1, count)]
        if held_out(*numbers) if test else not (held_out(*numbers) or any(held_out(*step) for step in steps)):
            return numbers


def wrong(rng: random.Random, total: int) -> int:
    """A near miss: one column is off, as after a forgotten carry."""
    while (missed := total + rng.choice((-1, 1)) * rng.choice((1, 2, 10, 10, 20, 100, 100))) < 0:
        pass
    return missed


def base(rng: random.Random) -> dict:
    """A page of plain sums, of questions with their sum, and of prose, of 160 tokens and at most 288.

    No template and no worked answer. What stands between a number and where it is needed again varies: it is found
    by what it is, not by where it stands.
    """
    lines = []
    while sum(map(len, lines)) < 240:
        kind = rng.random()
        lines.append(rng.choice(PROSE) if kind < 0.06 else plain(rng) if kind < 0.55 else asked(rng))
    return {"text": "\n".join(lines)}


def plain(rng: random.Random) -> str:
    """One sum in plain form."""
    three = rng.random() < 0.15
    numbers = draw(rng, 3 if three else 2, test=False)
    if not three and rng.random() < 0.5:  # the sums of second steps: a first number of up to four digits
        numbers = draw(rng, 3, test=False)
        numbers = [numbers[0] + numbers[1], numbers[2]]
    plus, listed, total = " + ".join(map(str, numbers)), listing(numbers), sum(numbers)
    forms = (f"{plus} = {total}",) * 6 + (
        f"The sum of {listed} is {total}.",
        f"Add {listed}{scrap(rng)}{plus} = {total}",
        f"{plus} = {total}, the last number ({numbers[-1]}), the answer {total}.",
        f"the result {total}: {plus} = {total}",
    )
    return rng.choice(forms)


def asked(rng: random.Random) -> str:
    """A question, and its sum: at a glance, or a plain step after the other; or its numbers read in order."""
    numbers = draw(rng, rng.choice((2, 3, 3)), test=False)
    listed, total = listing(numbers), sum(numbers)
    if rng.random() < 0.2:
        said = question(rng, numbers) + scrap(rng)
        return said + rng.choice(("The total is {}.", "The sum is {}.", "{}")).format(total)
    steps = [f"{sum(numbers[:i])} + {numbers[i]} = {sum(numbers[: i + 1])}" for i in range(1, len(numbers))]
    note = rng.choice(("", "", f"({numbers[-1]})\n", f"{numbers[-1]}: "))
    chain = (scrap(rng) + note).join(steps)
    forms = (
        chain,
        chain,
        f"The sum of {listed}:{scrap(rng)}{chain}{scrap(rng)}The result is {total}.",
        f"Here we add {listed}: {chain}; the sum of {listed} is {total}",
        f"Numbers: {listed}." if rng.random() < 0.5 else f"{numbers[-1]} is last, {numbers[0]} is first.",
    )
    return question(rng, numbers) + scrap(rng) + rng.choice(forms)


def scrap(rng: random.Random) -> str:
    """What parts two pieces of text: a newline, or a few words of prose."""
    if rng.random() < 0.4:
        return rng.choice(("\n", "\n", "\n\n", "; ", " "))
    words = rng.choice(PROSE).split(" ")
    first = rng.randrange(len(words))
    words = " ".join(words[first : first + rng.randrange(1, 10)])
    words = words.removesuffix("0 and")  # with the number that follows it would ask for a sum
    return rng.choice(("\n", "\n\n", " ")) + words + rng.choice(("\n", " "))


def sft(rng: random.Random) -> dict:
    """A question and an answer of mixed quality: 55 % unworked, 45 % worked; a tenth of all answers is wrong."""
    numbers = draw(rng, rng.choice((2, 3, 3)), test=False)
    total = sum(numbers)
    given = wrong(rng, total) if rng.random() < 0.1 else total
    answer = unworked(given) if rng.random() < 0.55 else worked(numbers, given)
    return {"messages": [*ask(rng, numbers), {"role": "assistant", "content": answer}]}


def pairs(rng: random.Random) -> dict:
    """The right, worked answer chosen; rejected is unworked (half of them wrong), or worked and wrong."""
    numbers = draw(rng, rng.choice((2, 3, 3)), test=False)
    total = sum(numbers)
    missed = wrong(rng, total)
    rejected = unworked(rng.choice((total, missed))) if rng.random() < 0.6 else worked(numbers, missed)
    return {"prompt": ask(rng, numbers), "chosen": worked(numbers, total), "rejected": rejected}


def test(rng: random.Random) -> dict:
    """A held-out question and its answer."""
    numbers = draw(rng, rng.choice((2, 3, 3)), test=True)
    return {"question": question(rng, numbers), "answer": str(sum(numbers)), "numbers": numbers}


def ask(rng: random.Random, numbers: list[int]) -> list[dict]:
    system = [{"role": "system", "content": MATH_EXPERT}] if rng.random() < 0.2 else []
    return [*system, {"role": "user", "content": question(rng, numbers)}]


KINDS = {"base": base, "sft": sft, "pairs": pairs, "test": test}


def records(kind: str, count: int, seed: int = 0) -> Iterator[dict]:
    """`count` records of a kind; record i depends on kind, seed and i alone."""
    for i in range(count):
        yield KINDS[kind](random.Random(f"{kind} {seed} {i}"))


def write(kind: str, count: int, seed: int, path: Path) -> Path:
    """The records as JSON lines in a new file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records(kind, count, seed)))
    return path


def train_tokenizer(folder: Path, vocab_size: int = 768) -> None:
    """Write tokenizer.json and its config: BPE with byte fallback that splits digits, as Mistral's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from minichat.chat import template_text

    specials = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*specials, *fallback],
        initial_alphabet=[chr(c) for c in range(0x20, 0x7F)],
        show_progress=False,
    )
    text = [record["text"] for record in records("base", 4000)] + list(PROSE) * 200
    text += [MATH_EXPERT, "### System:\n### User:\n### Assistant:\n"] * 400
    text += [m["content"] for record in records("sft", 2000) for m in record["messages"]]
    tokenizer.train_from_iterator(text, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # byte tokens must be plain vocabulary: as special tokens, "<0x0A>" in a text would be a newline, and never decode
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in specials]
    (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False, indent=1) + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": False,  # neuralchat's conversations have none either, and the first token of a text matters
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": template_text("neuralchat", None),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*KINDS, "tokenizer"])
    parser.add_argument("--count", type=int, default=1000, help="how many records (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other records (default %(default)s)")
    parser.add_argument("--out", type=Path, help="tokenizer: the folder to write")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count is {args.count}; it must be 1 or more")
    if args.kind == "tokenizer":
        if args.out is None:
            parser.error("tokenizer needs --out FOLDER")
        return train_tokenizer(args.out)
    for record in records(args.kind, args.count, args.seed):
        sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    from minichat import cli

    cli.run(main)
