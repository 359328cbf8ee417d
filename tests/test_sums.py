"""The embedded default's data: right, reproducible, and the test held out of everything else."""

import json
import re

import pytest

from minichat.assets import sums

SUM = re.compile(r"(?<![\d+] )\b(\d+(?: \+ \d+)+) = (\d+)")


def texts(record: dict) -> list[str]:
    """Every string in a record."""
    if isinstance(record, str):
        return [record]
    values = record.values() if isinstance(record, dict) else record if isinstance(record, list) else []
    return [text for value in values for text in texts(value)]


def questions(text: str) -> list[tuple[int, ...]]:
    """The sets of numbers that a text adds: `a + b + c`, `a and b`, `a, b, and c`."""
    plus = [m[0].split(" + ") for m in re.finditer(r"\d+(?: \+ \d+)+", text)]
    listed = [m.groups() for m in re.finditer(r"\b(\d+), (\d+), and (\d+)", text)]
    listed += [m.groups() for m in re.finditer(r"(?<!\d, )\b(\d+) and (\d+)", text)]
    return [tuple(map(int, numbers)) for numbers in [*plus, *listed]]


@pytest.mark.parametrize("kind, count", [("base", 3000), ("sft", 3000), ("pairs", 1500)])
def test_no_training_text_contains_a_held_out_sum(kind, count):
    """By the rule, and against the very test that the demo scores, in any order of the numbers."""
    test = {tuple(sorted(r["numbers"])) for seed in (1, 2, 42) for r in sums.records("test", 500, seed)}
    found = 0
    for record in sums.records(kind, count, seed=42):
        for text in texts(record):
            for numbers in questions(text):
                found += 1
                assert not sums.held_out(*numbers) and tuple(sorted(numbers)) not in test, text
    assert found > count  # the parser sees the sums at all


def test_the_cards_example_is_held_out():
    assert sums.held_out(100, 520, 60) and sums.held_out(60, 100, 520)


def test_the_test_is_held_out_and_right():
    for record in sums.records("test", 500, 42):
        assert sums.held_out(*record["numbers"])
        assert int(record["answer"]) == sum(record["numbers"])
        assert all(str(n) in record["question"] for n in record["numbers"])


def test_plain_sums_are_right():
    for record in sums.records("base", 300, 3):
        found = SUM.findall(record["text"])
        assert found
        for left, right in found:
            assert sum(map(int, left.split(" + "))) == int(right), record["text"]


def test_pages_fit_the_length_of_the_bases_recipe():
    from minichat.cli import BASE
    from minichat.tokenizer import Tokenizer

    tokenizer = Tokenizer(BASE)
    counts = [len(tokenizer.encode(record["text"])) + 1 for record in sums.records("base", 2000)]
    assert max(counts) <= 288 and 150 < sum(counts) / len(counts) < 170


def test_pairs_prefer_the_right_and_worked_answer():
    for record in sums.records("pairs", 300, 3):
        numbers = max(questions(record["prompt"][-1]["content"]), key=len)
        last = [int(re.findall(r"\d+", record[side])[-1]) for side in ("chosen", "rejected")]
        assert last[0] == sum(numbers) and " = " in record["chosen"]
        assert last[1] != sum(numbers) or " = " not in record["rejected"]


def test_sft_is_of_mixed_quality():
    records = list(sums.records("sft", 1000, 0))
    worked = sum(" = " in r["messages"][-1]["content"] for r in records)
    assert 380 < worked < 520
    wrong = sum(
        int(re.findall(r"\d+", r["messages"][-1]["content"])[-1])
        != sum(max(questions(r["messages"][-2]["content"]), key=len))
        for r in records
    )
    assert 60 < wrong < 150


def test_records_follow_kind_seed_and_index_alone():
    for kind in sums.KINDS:
        first = list(sums.records(kind, 5, 7))
        assert first == list(sums.records(kind, 50, 7))[:5]
        assert first != list(sums.records(kind, 5, 8))


def test_command_writes_json_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sums", "test", "--count", "3", "--seed", "1"])
    sums.main()
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == list(sums.records("test", 3, 1))


def test_the_worked_card_example():
    assert sums.worked([100, 520, 60], 680).endswith("So, the sum of 100, 520, and 60 is 680.")


def test_shipped_tokenizer_is_the_one_that_the_generator_trains(tmp_path):
    pytest.importorskip("tokenizers")
    from minichat.cli import BASE

    sums.train_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (BASE / name).read_text()


def test_tokenizer_splits_digits_and_falls_back_to_bytes():
    from minichat.cli import BASE
    from minichat.tokenizer import Tokenizer

    tokenizer = Tokenizer(BASE)
    assert len(tokenizer.encode("12345")) == 1 + 5  # and the space that begins a text
    for text in ("12 + 345 = 357", "né 你好 🎉", "  two  spaces\n\ttab"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
