"""Folders that are written whole or not at all, and one line for what is wrong with a file."""

import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minichat import files
from minichat.errors import BadInput
from minichat.files import read_json, staged

ROOT = Path(__file__).parent.parent

OLD = {"config.json": "old", "model-1.bin": "old", "model-2.bin": "old", "notes": "mine"}


@pytest.fixture
def folder(tmp_path):
    """A folder with an earlier version of what is written, and a file of its owner's."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in OLD.items():
        (folder / name).write_text(text)
    return folder


def content(folder) -> dict[str, str | None]:
    """The texts of its files; None for a folder."""
    return {file.name: file.read_text() if file.is_file() else None for file in folder.iterdir()}


def write(folder, *names):
    for name in names:
        (folder / name).write_text("new")


# ---- staged ----


def test_staged_files_take_their_place_together(folder):
    with staged(folder, last="config.json", stale=("model*.bin", "index")) as new:
        write(new, "config.json", "model-1.bin", "tokenizer")
        assert content(folder) == {**OLD, new.name: None}  # nothing moves before the end
    assert content(folder) == {"config.json": "new", "model-1.bin": "new", "tokenizer": "new", "notes": "mine"}
    with staged(folder.parent / "a" / "b", last="x") as new:
        write(new, "x")
    assert content(folder.parent / "a" / "b") == {"x": "new"}


def test_what_a_killed_process_had_begun_goes(folder):
    """Not what another one is writing, nor what may hold the only copy of what was to be replaced."""
    code = """
import os
from minichat.files import staged
with staged(".", last="x") as new:
    (new / "x").touch()
    os._exit(9)"""
    subprocess.run([sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
    [dead] = folder.glob(".part-*")
    old, moved, elsewhere = (folder / f".part-{name}" for name in ("old", "moved", "another-host-1-x"))
    for left in (old, moved / ".old", elsewhere):
        left.mkdir(parents=True)
        write(left, "a")
    for left in (old, moved):
        os.utime(left, (1, 1))
    with staged(folder, last="config.json") as one:
        write(one, "config.json")
        with staged(folder, last="config.json") as other:
            assert one.exists() and not dead.exists() and not old.exists()
            write(other, "config.json")
    assert (moved / ".old" / "a").exists()
    assert {path.name for path in folder.glob(".part-*")} == {moved.name, elsewhere.name}


@pytest.mark.parametrize("names", [("config.json", "a", "z"), ("a", "config.json", "z"), ("z", "a", "config.json")])
def test_the_last_file_comes_last(folder, monkeypatch, names):
    moved, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (moved.append((self, to)), rename(self, to))[1])
    monkeypatch.setattr(Path, "iterdir", lambda self: iter([self / name for name in names]))  # in any order
    with staged(folder, last="config.json") as new:
        write(new, *names)
    came = [to.name for _, to in moved if to.parent == folder]
    went = [self.name for self, _ in moved if self.parent == folder]
    assert sorted(came) == sorted(names)
    assert came[-1] == "config.json" == went[0]  # a reader finds the old files, none, or the new ones


def fail(error):
    raise error


def fail_inside(new):
    with staged(new, last="b") as inner:
        write(inner, "a", "b")
        raise OSError(errno.ENOSPC, "No space left on device", str(inner / "c"))


FAILURES = {
    "stopped": (lambda new: fail(KeyboardInterrupt()), KeyboardInterrupt, None),
    "a mistake": (lambda new: fail(ZeroDivisionError("here")), ZeroDivisionError, None),
    "full disk": (lambda new: fail(OSError(errno.ENOSPC, "No space left on device")), BadInput, "No space left"),
    "a write": (lambda new: (new / "no" / "such").write_text(""), BadInput, "No such file"),
    "bad input": (lambda new: fail(BadInput(f"{new / 'a'}: too bad")), BadInput, "/a: too bad"),
    "a save inside": (fail_inside, BadInput, "No space left"),
}


@pytest.mark.parametrize("failing, kind, message", FAILURES.values(), ids=FAILURES)
def test_what_fails_leaves_the_folder_as_it_was(folder, failing, kind, message):
    with pytest.raises(kind) as error, staged(folder, last="config.json", stale=("model*",)) as new:
        write(new, "config.json", "model-1.bin", "more")
        failing(new)
    assert content(folder) == OLD  # and nothing beside
    if kind is BadInput:  # the folder that was asked for, not one that has gone
        said = str(error.value)
        assert said.startswith(str(folder)) and message in said and ".part-" not in said and "\n" not in said


@pytest.mark.parametrize("failing, kind, message", FAILURES.values(), ids=FAILURES)
def test_what_fails_leaves_no_folder_that_was_not_there(tmp_path, failing, kind, message):
    with pytest.raises(kind), staged(tmp_path / "a" / "b", last="x") as new:
        write(new, "x")
        failing(new)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocked", ["config.json", "model-1.bin", "more"])
def test_a_folder_in_the_place_of_a_file(folder, blocked):
    (folder / blocked).unlink(missing_ok=True)
    (folder / blocked).mkdir()
    before = content(folder)
    with pytest.raises(BadInput, match="cannot be written"), staged(folder, "config.json", ("model*", "n*")) as new:
        write(new, "config.json", "model-1.bin", "more")
    assert content(folder) == before


@pytest.mark.parametrize("late", [False, True], ids=["before it has moved", "after"])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("fails", range(6))  # three old files, three new ones
def test_a_move_that_fails_takes_the_others_back(folder, monkeypatch, fails, kind, late):
    calls, rename = [], Path.rename

    def failing(self, to):
        calls.append(to)
        if len(calls) != fails + 1:
            return rename(self, to)
        if late:
            rename(self, to)
        raise kind("here")

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BadInput if kind is OSError else kind), staged(folder, "config.json", ("model*",)) as new:
        write(new, "config.json", "model-1.bin", "more")
    assert content(folder) == OLD and len(calls) > fails


def test_what_cannot_be_taken_back_is_kept(folder, monkeypatch):
    def failing(self, to, rename=Path.rename):
        if self.parent.name == ".old" or self.name == "more":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BadInput, match="Input/output error"), staged(folder, "config.json", ("model*",)) as new:
        write(new, "more")
    assert content(folder) | content(new / ".old") == {**OLD, new.name: None}


def test_a_folder_is_never_stale(folder):
    (folder / "model-of-mine").mkdir()
    with staged(folder, last="config.json", stale=("model*",)) as new:
        write(new, "config.json")
    assert content(folder) == {"config.json": "new", "notes": "mine", "model-of-mine": None}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_a_file_that_cannot_be_written_is_named(folder):
    for size in (1, 1 << 20):  # one fails as it is closed, one as it is written
        with pytest.raises(BadInput) as error, staged(folder, last="config.json") as new:
            (new / "model-1.bin").symlink_to("/dev/full")
            files.write_tensors({"a": torch.ones(size)}, new / "model-1.bin")
        assert str(error.value) == f"{folder / 'model-1.bin'}: cannot be written: No space left on device"
        assert content(folder) == OLD


def test_tensors_of_every_type_as_the_library_reads_them(tmp_path):
    """Odd sizes before wide types, an empty tensor, one without dimensions, one that is a view; names beyond ASCII."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    types = [getattr(torch, name.removeprefix("torch.")) for name in files._DTYPES]
    tensors = {str(dtype): torch.arange(-5, 8).to(dtype) for dtype in types}
    tensors |= {"é😀": torch.tensor(3.5), "none": torch.empty(0, 4), "view": torch.arange(12.0).view(3, 4).t()[1:]}
    metadata = {f"key {i}": f"value \n é {i}" for i in range(8)}
    files.write_tensors(tensors, tmp_path / "a", metadata)
    found = load_file(tmp_path / "a")
    assert found.keys() == tensors.keys()
    for name, each in tensors.items():
        assert found[name].dtype == each.dtype and torch.equal(found[name].double(), each.double()), name
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}
        assert all(torch.equal(file.get_tensor(name).double(), each.double()) for name, each in tensors.items())
    files.write_tensors(dict(reversed(tensors.items())), tmp_path / "b", dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(TypeError, match="strings"):
        files.write_tensors(tensors, tmp_path / "b", {"step": 1})
    files.write_tensors(tensors, tmp_path / "c", {"path": os.fsdecode(b"b\xe9")})  # no UTF-8, which the library refuses
    assert load_file(tmp_path / "c").keys() == tensors.keys()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
def test_what_has_to_be_finite_is(tmp_path, bad, dtype):
    tensors = {"a": torch.arange(5), "b": torch.zeros(0), "c": (torch.randn(300, 3) * 100).to(dtype)}
    files.write_tensors(tensors, tmp_path / "x", finite=True)
    tensors["c"][17, 1] = bad
    with pytest.raises(BadInput, match=f"y: c is not finite in {dtype}: not saved"):
        files.write_tensors(tensors, tmp_path / "y", finite=True)
    files.write_tensors(tensors, tmp_path / "y")


def test_a_file_in_the_place_of_the_folder(folder):
    for place in (folder / "notes", folder / "notes" / "below"):
        with pytest.raises(BadInput, match=f"{place}: cannot be written"), staged(place, last="x") as new:
            write(new, "x")
    assert content(folder) == OLD


# ---- JSON ----


def test_json_goes_there_and_back(tmp_path):
    value = {"é": [1, None, {"a": "\u2028 😀"}]}
    files.write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "a.json", missing={}) == value
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "none.json", missing={"a": 1}) == {"a": 1}


def test_half_a_character_goes_there_and_back(tmp_path):
    value = {"a": "\ud83d", "é": "😀"}
    files.write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


BAD = {
    "not json": (b"{'a': 1}", "is not JSON"),
    "cut": (b'{"a": 1', "is not JSON"),
    "empty": (b"", "is not JSON"),
    "not utf-8": (b'{"a": "\xff"}', "is not JSON"),
    "deep": (b'{"a":' * 100_000, "is not JSON"),
    "list": (b"[1]", "holds a list, not an object"),
    "string": (b'"{}"', "holds a str, not an object"),
    "null": (b"null", "holds a NoneType, not an object"),
}


@pytest.mark.parametrize("missing", [None, {}], ids=["needed", "optional"])
@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD)
def test_what_is_wrong_with_json_is_one_line(tmp_path, text, message, missing):
    file = tmp_path / "a.json"
    file.write_bytes(text)
    with pytest.raises(BadInput) as error:
        read_json(file, missing)
    assert str(error.value).startswith(f"{file} {message}") and "download it again" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(file)) + 300


def test_json_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput) as error:
        read_json(tmp_path / "none.json")
    assert str(error.value) == f"{tmp_path / 'none.json'}: {os.strerror(errno.ENOENT)}"
    for missing in (None, {}):  # not there is one thing, there and no file is another
        with pytest.raises(BadInput) as error:
            read_json(tmp_path, missing)
        assert str(error.value) == f"{tmp_path}: {os.strerror(errno.EISDIR)}"


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value, folder in (
        ("HOME", tmp_path, tmp_path / ".cache/minichat"),
        ("XDG_CACHE_HOME", tmp_path / "x", tmp_path / "x/minichat"),
        ("MINICHAT_CACHE", "y", tmp_path / "y"),
        ("MINICHAT_CACHE", "~/z", tmp_path / "z"),
    ):
        if name == "HOME":
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
            monkeypatch.delenv("MINICHAT_CACHE", raising=False)
        monkeypatch.setenv(name, str(value))
        assert files.cache_folder() == folder
