"""Files, folders and splits; and what is wrong with a file, in one line that names the place."""

import gzip
import json
import tracemalloc

import pytest

from minichat import sources
from minichat.errors import BadInput
from minichat.sources import find, records

RECORDS = [{"text": "ä"}, {"text": "b", "more": [1, {"c": None}]}, {"text": "x" * 3000}, {"text": "]},{[\\"}]


def jsonl(rows) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def parquet(rows, path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def write(path, rows=RECORDS):
    """A file of records, in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet(rows, path)
        return path
    text = jsonl(rows) if ".jsonl" in path.name else json.dumps(rows, ensure_ascii=False, indent=1).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


# ---- records ----


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_the_records_of_a_file(tmp_path, name):
    file = write(tmp_path / name)
    assert list(records(file)) == [(f"{file}:{i}", record) for i, record in enumerate(RECORDS, 1)]


def test_parquet(tmp_path):
    rows = [{"messages": [{"role": "user", "content": str(i)}], "n": i} for i in range(1500)]
    file = write(tmp_path / "a.parquet", rows)
    assert list(records(file)) == [(f"{file}:{i}", record) for i, record in enumerate(rows, 1)]


def test_json_lines_in_a_file_that_is_called_json(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + jsonl(RECORDS))
    assert [record for _, record in records(file)] == RECORDS


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100, 1 << 20])
def test_an_array_may_be_cut_anywhere_between_two_reads(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert [record for _, record in records(tmp_path / "a.json")] == RECORDS
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf  [ ] ")
    assert list(records(tmp_path / "a.json")) == []


def test_an_array_is_not_held_in_memory(tmp_path):
    file = tmp_path / "a.json"
    row = json.dumps({"text": "x" * 1000})
    file.write_text("[" + ",".join([row] * 20_000) + "]")  # 20 MB
    tracemalloc.start()
    assert sum(1 for _ in records(file)) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


def test_a_record_of_an_array_has_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 100)
    monkeypatch.setattr(sources, "LONGEST", 1000)
    write(tmp_path / "a.json", [{"text": "x" * 900}, {"text": "x" * 1200}])
    found = records(tmp_path / "a.json")
    assert next(found)[1] == {"text": "x" * 900}
    with pytest.raises(BadInput, match="after record 1"):
        next(found)


def test_lines_are_numbered_and_empty_ones_skipped(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "\xc3\xa4"}\n\n  \n{"text": "b"}\r\n{"text": "c"}')
    assert list(records(file)) == [
        (f"{file}:1", {"text": "ä"}),
        (f"{file}:4", {"text": "b"}),
        (f"{file}:5", {"text": "c"}),
    ]


LINES = {
    "cut off": b'{"text": "a',
    "not JSON": b"hello",
    "two values": b'{"text": "a"} {"text": "b"}',
    "a list": b'["a"]',
    "a string": b'"a"',
    "null": b"null",
    "NaN alone": b"NaN",
    "not UTF-8": b'{"text": "\xff\xfe"}',
    "deep": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number without end": b'{"text": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_that_is_no_record_is_named_and_the_rest_is_read(line, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine too"}\n')
    (_, first), (where, bad), (_, last) = records(file)
    assert (first, last) == ({"text": "fine"}, {"text": "fine too"})
    assert where == f"{file}:2" and isinstance(bad, BadInput) and len(str(bad)) < 400 and "\n" not in str(bad)


def test_an_element_that_is_no_record_is_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, ["b"], null, {"text": "c"}]')
    found = list(records(tmp_path / "a.json"))
    assert [isinstance(record, BadInput) for _, record in found] == [False, True, True, False]
    assert found[1][0].endswith("a.json:2") and "a list, not an object" in str(found[1][1])


CORRUPT = {
    "gzip cut off": ("a.jsonl.gz", lambda text: gzip.compress(text)[:-20], "cut off after record"),
    "gzip of nothing": ("a.jsonl.gz", lambda text: b"", None),
    "no gzip": ("a.jsonl.gz", lambda text: text, "corrupt"),
    "gzip with a wrong byte": ("a.json.gz", lambda text: gzip.compress(text)[:40] + b"\0" * 40, "corrupt"),
    "array cut off": ("a.json", lambda text: b"[" + text.replace(b"\n", b",")[:-10], "cut off after record 3"),
    "array cut off early": ("a.json", lambda text: b"[", "cut off after record 0"),
    "array with a hole": ("a.json", lambda text: b'[{"text": "a"}, {"text" "b"}, {"text": "c"}]', "after record 1"),
    "array with more behind it": ("a.json", lambda text: b'[{"text": "a"}]\n[{"text": "b"}]', "array of 1 records"),
    "array that is deep": ("a.json", lambda text: b"[" * 100_000, "after record 0"),
    "array that is not UTF-8": ("a.json", lambda text: b'[{"text": "\xff"}]', "not UTF-8"),
    "no Parquet": ("a.parquet", lambda text: text, "is not Parquet"),
    "Parquet of nothing": ("a.parquet", lambda text: b"", "is not Parquet"),
}


@pytest.mark.parametrize("name, spoil, message", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_file_is_one_line(tmp_path, name, spoil, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    file = tmp_path / name
    file.write_bytes(spoil(jsonl(RECORDS)))
    if message is None:
        assert list(records(file)) == []
        return
    with pytest.raises(BadInput) as error:
        list(records(file))
    assert str(error.value).startswith(str(file)) and message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_parquet_file_with_a_wrong_page_is_one_line(tmp_path):
    file = write(tmp_path / "a.parquet", [{"text": str(i) * 50} for i in range(2000)])
    whole = bytearray(file.read_bytes())
    for at in range(4, len(whole) - 500, 97):
        whole[at] ^= 0xFF
    file.write_bytes(whole)
    with pytest.raises(BadInput, match="corrupt"):
        list(records(file))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(BadInput, match=r"pip install 'minichat\[data\]'"):
        list(records(tmp_path / "a.parquet"))


# ---- sources ----


def names(spec):
    return [file.name for file in find(spec).files]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What data sets look like on disk."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "plain/b.jsonl", "plain/a.json.gz", "plain/README.md", "plain/.cache/c.jsonl",
        "splits/train.jsonl", "splits/test.jsonl", "splits/dataset_info.json",
        "chats/data/train_sft-00000-of-00002-a1.parquet", "chats/data/train_sft-00001-of-00002-a1.parquet",
        "chats/data/train_gen-00000-of-00001-b2.parquet", "chats/data/test_sft-00000-of-00001.parquet",
        "parts/train/0000.jsonl", "parts/train/0001.jsonl", "parts/validation/0000.jsonl", "empty/README.md",
        "odd/a:0.5.jsonl", "odd/[1].jsonl",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


def test_what_a_source_names(folder):
    assert names("plain") == names(str(folder / "plain")) == names("./plain/") == ["a.json.gz", "b.jsonl"]
    assert names("plain/b.jsonl") == ["b.jsonl"]
    assert names("splits") == ["train.jsonl"] and names("splits/test") == ["test.jsonl"]  # what is to learn from
    assert names("chats/train_sft") == [f"train_sft-0000{i}-of-00002-a1.parquet" for i in (0, 1)]
    assert names("chats/test_sft") == ["test_sft-00000-of-00001.parquet"]
    assert names("chats/data/train_*") == names("chats/data/train_gen*") + names("chats/train_sft")
    assert (
        names("parts") == names("parts/train") == ["0000.jsonl", "0001.jsonl"] and len(names("parts/validation")) == 1
    )
    assert names("plain/*.jsonl") == names("p*/b.jsonl") == ["b.jsonl"]
    assert find("plain").weight is None and find("plain/b.jsonl:0.7").weight == 0.7 and find("plain:3").weight == 3
    assert names("odd/a:0.5.jsonl") == ["a:0.5.jsonl"] and names("odd/[1].jsonl") == ["[1].jsonl"]


@pytest.mark.parametrize(
    "beside",
    ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "package.json",
     "_a.jsonl", ".a.jsonl", "_b/a.jsonl", "b/.c/a.jsonl", "b/c/d/a.jsonl", "a.csv"],
)  # fmt: skip
def test_what_lies_beside_data_is_none(tmp_path, beside):
    for file in ("b/c/data.json", beside):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("[]")
    assert names(str(tmp_path)) == ["data.json"]


def test_a_weight_is_a_number_within_reason(folder, monkeypatch):
    for spec, weight in (("plain:1e-9", 1e-9), ("plain:1e9", 1e9), ("plain/*.jsonl:0.5", 0.5), ("parts/train:2", 2)):
        assert find(spec).weight == weight and find(spec).files
    for weight in ("9e-10", "1.1e9"):
        with pytest.raises(BadInput, match="must be a positive number"):
            find(f"plain:{weight}")
    monkeypatch.setenv("HOME", str(folder))
    assert names("~/plain:2") == names("plain")


@pytest.mark.parametrize("name", ["test", "valid", "validation", "val", "dev", "eval", "evaluation", "DEV_2"])
def test_a_split_for_evaluation_is_left_out_and_named(tmp_path, name, capsys):
    for file in ("data", "tests", "device", name):
        (tmp_path / f"{file}.jsonl").write_text("")
    assert names(str(tmp_path)) == ["data.jsonl", "device.jsonl", "tests.jsonl"]
    assert capsys.readouterr().err.endswith(f"left out, as for evaluation: {name}.jsonl\n")


@pytest.mark.parametrize("file", ["train/part-0.jsonl", "train/0.jsonl", "train.00000-of-00001.jsonl"])
def test_the_split_of_a_shard(tmp_path, file):
    for there in (file, "more.jsonl"):
        (tmp_path / there).parent.mkdir(exist_ok=True)
        (tmp_path / there).write_text("")
    assert names(str(tmp_path)) == names(f"{tmp_path}/train") == [file.rpartition("/")[2]]


WRONG = {
    "none.jsonl": "no such file or folder",
    "plain/none.jsonl": "no such file or folder",
    "/none/where/a.jsonl": "no such file or folder",
    "chats": "holds test_sft, train_gen, train_sft: say which, --data chats/train_gen",
    "empty": "empty: no .jsonl",
    "plain/README.md": "records are read from .jsonl",
    "plain:0": "'0' after the colon must be a positive number",
    "plain:-1": "positive",
    "plain:nan": "positive",
    "plain:inf": "positive",
    "plain:many": "positive",
    "plain:": "positive",
    "": "empty name",
    ".": "say which",
    "a b c": "no such file or folder",
    "plain/*.txt": "no such file or folder",
}


def test_what_is_for_evaluation_is_not_learnt_from(folder):
    for file in ("data.jsonl", "validation.jsonl", "Test.jsonl"):
        (folder / "lay").mkdir(exist_ok=True)
        (folder / "lay" / file).write_text("")
    assert names("lay") == ["data.jsonl"] and names("lay/validation") == ["validation.jsonl"]
    (folder / "lay" / "Train.jsonl").write_text("")
    assert names("lay") == ["Train.jsonl"]
    (folder / "only").mkdir()
    (folder / "only" / "test.jsonl").write_text("")
    assert names("only") == ["test.jsonl"]


def test_what_is_there_twice_or_in_part_is_refused(folder):
    """Configurations and languages, formats of one file, shards that were not fetched; a pattern says what is meant."""
    for file in ("tasks/main/train.jsonl", "tasks/socratic/train.jsonl", "twice/a.jsonl", "twice/a.json.gz",
                 "part/train-00000-of-00003.jsonl", "part/train-00002-of-00003.jsonl"):  # fmt: skip
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("")
    for spec, said in (("tasks", "say which"), ("twice", "say which"), ("part", "2 of 3"), ("part/train", "2 of 3")):
        with pytest.raises(BadInput, match=said) as error:
            find(spec)
        assert "\n" not in str(error.value) and "--data" in str(error.value)
    assert names("tasks/main/*") == names("tasks/main/train.jsonl") == ["train.jsonl"]
    assert len(names("tasks/*")) == len(names("part/*")) == 2
    assert names("part/train-00002-of-00003.jsonl") == ["train-00002-of-00003.jsonl"]
    with pytest.raises(BadInput, match=r"--data tasks/'socratic/train\*'") as error:
        find("tasks")
    assert names("tasks/socratic/train*") == ["train.jsonl"] and "'*train*'" in str(error.value)


@pytest.mark.parametrize("spec", WRONG)
def test_what_names_nothing_is_one_line(folder, spec, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput) as error:
        find(spec)
    assert WRONG[spec] in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500
