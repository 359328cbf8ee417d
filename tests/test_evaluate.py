"""Scores: the number that an answer ends in, and the share of right ones against a loop over the records."""

import pytest

import minichat
from minichat import chat
from minichat.evaluate import exact_match, last_number

NUMBERS = {
    "So, the sum of 100, 520, and 60 is 680.": "680",
    "100 + 520 = 620\n620 + 60 = 680": "680",
    "The answer is 1,234,567.": "1234567",
    "It is 1,234.50 in all": "1234.50",
    "one of 3,4": "4",  # no thousands separator
    "1,2345": "2345",
    "12,345,67": "67",
    "the sum of 1,2,3": "3",
    "minus: -17": "-17",
    "5-3": "3",
    "x-3": "3",
    "(-3)": "-3",
    "3.": "3",
    "version 2.0, 3": "3",
    "it is .5": ".5",
    "= \N{MINUS SIGN}17": "-17",
    "5\N{MINUS SIGN}3": "3",
    "So it is 1.5.": "1.5",
    "x.5": "5",
    " no number \n": "no number",
    "": "",
}


@pytest.mark.parametrize("text, expected", NUMBERS.items())
def test_last_number(text, expected):
    assert last_number(text) == expected


def test_exact_match_is_a_loop_over_the_records(base):
    """One record at a time and no cache of them; every other answer is set to what the model says."""
    model, tokenizer = minichat.load(base)
    questions = [f"calculate {a} + {b}" + " please" * (a % 3) for a in range(1, 8) for b in (2, 30)]
    texts = []
    for question in questions:
        prompt = chat.prompt_ids([{"role": "user", "content": question}], "zephyr", tokenizer)
        [ids] = minichat.generate(model, [prompt], 10, stop_ids=tokenizer.stop_ids)
        texts.append(tokenizer.decode(ids))
    answers = [text if i % 2 else "-1" for i, text in enumerate(texts)]
    right = sum(last_number(answer) == last_number(text) for answer, text in zip(answers, texts))
    assert 7 <= right < 14
    records = [{"question": q, "answer": a} for q, a in zip(questions, answers)]
    for batch_size in (1, 4, 50):
        found = exact_match(model, tokenizer, records, "zephyr", batch_size, 10)
        assert found["answers"] == texts and found["exact_match"] == right / 14


def test_the_embedded_answers_are_right_by_their_own_rule():
    """What the demo's data calls an answer is what its score reads in a worked answer."""
    from minichat.assets import sums

    for record in sums.records("pairs", 200, 3):
        chosen, rejected = (last_number(record[key]) for key in ("chosen", "rejected"))
        first = record["chosen"].split("sum of ")[1].split(",")[0].split(" and ")
        assert chosen.isdigit() and rejected.isdigit() and int(first[0]) <= int(chosen)
    for record in sums.records("test", 200, 3):
        assert last_number(sums.worked(record["numbers"], sum(record["numbers"]))) == record["answer"]
