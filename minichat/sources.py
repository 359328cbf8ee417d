"""Where records come from: files, folders and data sets of the hub, one record at a time."""

import codecs
import fnmatch
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from minichat.console import say
from minichat.errors import BadInput, brief, why

SUFFIXES = (".jsonl.gz", ".jsonl", ".json.gz", ".json", ".parquet")  # the longer of two first
# what lies beside data in data sets and is none
BESIDE = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "package.json")
CHUNK = 1 << 20  # characters of a JSON array read at a time
LONGEST = 1 << 26  # characters of one record in it: more is no record


@dataclass(frozen=True)
class Source:
    """What --data names: its files, as they are called in messages, and its share of what is learnt (None: all)."""

    name: str
    files: tuple[Path, ...]
    weight: float | None = None


def find(spec: str) -> Source:
    """The source that `SOURCE[:WEIGHT]` names.

    SOURCE is a file, a folder, or OWNER/NAME[@REVISION] of the hub's data sets; a folder or a data set may be followed
    by /SPLIT (train_sft) or by a /PATTERN of files (data/train-*.parquet). Raises BadInput if there is no such thing.
    """
    try:
        return _found(spec)
    except (OSError, RuntimeError) as error:  # a folder that may not be searched, a name too long, ~nobody
        raise BadInput(f"--data {spec}: {getattr(error, 'strerror', None) or error}") from None


def _found(spec: str) -> Source:
    name, weight = spec, None
    match = re.fullmatch(r"(.+):([^:/\\]*)", spec)
    if match and not Path(spec).exists():
        name = match[1]
        try:
            weight = float(match[2])
        except ValueError:
            weight = -1.0
        if not 1e-9 <= weight <= 1e9:
            raise BadInput(
                f"--data {spec}: the weight {match[2]!r} after the colon must be a positive number (1e-9 to 1e9)"
            )
    path = Path(name).expanduser()
    if not name.strip():
        raise BadInput("--data has an empty name; it takes files, folders and data sets of the hub")
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise BadInput(f"{path}: records are read from {', '.join(SUFFIXES)}; rename it, or convert it")
        return Source(name, (path,), weight)
    if path.is_dir():
        return Source(name, tuple(path / file for file in _chosen(_listing(path), "", name)), weight)
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    if re.search(r"[*?[]", name) or folder != Path() and not name.endswith(SUFFIXES):
        # the owner of a hub id may be called as a folder here: what is here comes first where it has what is asked for
        found = _chosen(_listing(folder), path.relative_to(folder).as_posix(), name, strict=False)
        if found:
            return Source(name, tuple(folder / file for file in found), weight)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?", name)
    if not match or name.startswith((".", "/", "~")) or match[2] is None and Path(match[1]).name.endswith(SUFFIXES):
        raise BadInput(f"--data {name}: no such file or folder, and not a data set of the hub (owner/name)")
    return Source(name, _download(name, match[1], match[2], match[3] or ""), weight)


def _listing(folder: Path) -> list[str]:
    """Its files as they are called in it, as deep as data sets have them: never a walk over a whole disk."""
    found = [file for depth in ("*", "*/*", "*/*/*") for file in folder.glob(depth)]
    return sorted(file.relative_to(folder).as_posix() for file in found if file.is_file())


def _chosen(files: list[str], inside: str, name: str, strict: bool = True) -> list[str]:
    """The files of records in a listing: those of a split or a pattern; or without one train, or all that is not by its
    name for evaluation. Raises BadInput where that is nothing, one thing several times, or not all of its shards."""
    data = [file for file in files if _is_data(file)]
    splits = sorted({_split(file) for file in data})
    train = [split for split in splits if re.match(r"train(?![a-z])", split, re.IGNORECASE)]
    pattern = bool(re.search(r"[*?[]", inside))
    if inside not in ("", "."):
        found = [file for file in data if fnmatch.fnmatchcase(file, inside) or _split(file) == inside]
    elif len(train) > 1:
        raise BadInput(f"{name} holds {', '.join(splits)}: say which, --data {name}/{train[0]}"[:400])
    else:
        held_out = r"(test|valid|validation|val|dev|eval|evaluation)(?![a-z])"
        rest = [file for file in data if not re.match(held_out, _split(file), re.IGNORECASE)]
        found = [file for file in data if _split(file) == train[0]] if train else rest or data
    if strict and not found:
        there = (
            f"nothing there is called {inside!r}; it holds {', '.join(splits)}" if data else f"no {', '.join(SUFFIXES)}"
        )
        raise BadInput(f"{name}: {there}"[:400])
    if strict and not inside and not train and len(found) < len(data):
        say(f"{name}: left out, as for evaluation: {', '.join(sorted({*data} - {*found}))}"[:400])
    if not pattern and inside not in files:
        _check_whole(found, name.removesuffix(f"/{inside}"))
    return found


def _check_whole(files: list[str], name: str) -> None:
    """Raise BadInput for files that hold the same in several languages, configurations or formats, or for shards that
    lack some of theirs: nobody would notice."""
    known: dict[str, str] = {}
    shards: dict[tuple[str, str], list[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        stem = next(path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix))
        split = re.sub(r"(part[-_.])?\d+$|[-_.]\d+-of-\d+.*$", "", stem)
        if other := known.get(stem):
            some = file if path.parent == PurePosixPath(other).parent else f"'{path.parent}/{split}*'"
            which = f"--data {name}/{some}, or all by a pattern: --data {name}/'*{split}*'"
            raise BadInput(f"{name} holds {other} and {file}, perhaps the same twice; say which: {which}"[:400])
        known[stem] = file
        if part := re.fullmatch(r"(.*)-(\d+)-of-(\d+)(-\w+)?", stem):
            shards.setdefault((part[1], part[3]), []).append(file)
    for (stem, count), there in shards.items():
        if len(there) != int(count):
            some = f"fetch the others, or name some by a pattern: --data {name}/'{stem}*'"
            raise BadInput(f"{name}: {len(there)} of {int(count)} files of {stem} are there; {some}"[:400])


def _is_data(file: str) -> bool:
    path = PurePosixPath(file)
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return path.name.endswith(SUFFIXES) and path.name not in BESIDE and not hidden


def _split(file: str) -> str:
    """The split that a file is of, by its name: data/train_sft-00000-of-00003-a3f.parquet -> train_sft.

    train/0000.parquet -> train.
    """
    path = PurePosixPath(file)
    stem = path.name
    for suffix in SUFFIXES:
        stem = stem.removesuffix(suffix)
    stem = re.sub(r"[-_.]\d+-of-\d+.*$", "", stem)
    return path.parent.name if re.fullmatch(r"(part[-_.])?\d+", stem) and path.parent.name else stem


def _download(name: str, repo: str, revision: str | None, inside: str) -> tuple[Path, ...]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kind, unreached = {"repo_type": "dataset", "revision": revision}, None
    try:
        files = _hub_files(repo, kind)
        if isinstance(files, list):
            files = _chosen(files, inside, name)
            folder = Path(snapshot_download(repo, **kind, allow_patterns=[_literal(file) for file in files]))
        else:
            unreached = files
            # no pattern that any file fits: what is here of the data set is enough, whole or not
            folder = Path(snapshot_download(repo, **kind, local_files_only=True, allow_patterns=["/"]))
            files = _chosen(_listing(folder), inside, name)
            say(f"the hub did not answer: {name} as far as it is here")
    except BadInput:
        raise
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise BadInput(
            f"--data {name}: no such file or folder here, and the hub gave none: {why(unreached or error)}"
        ) from None
    return tuple(folder / file for file in files)


def _hub_files(repo: str, kind: dict) -> list[str] | Exception:
    """The names of a data set's files; what went wrong if no hub is in reach. Raises HfHubHTTPError if it says no."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # one request, which is not tried again and again where there is no hub; of very many files it names not all
        found = HfApi().dataset_info(repo, revision=kind["revision"] or "main", timeout=60).siblings
        files = [file.rfilename for file in found or ()]
        return files if 0 < len(files) < 10_000 else HfApi().list_repo_files(repo, **kind)
    except HFValidationError:
        raise
    except HfHubHTTPError as error:
        if error.response is not None:
            raise
        return error
    except Exception as error:  # of whichever HTTP library this version of the hub's package uses
        return error


def _literal(file: str) -> str:
    """A pattern that this name alone fits."""
    return re.sub(r"([*?[])", r"[\1]", file)


# ---- records ----


def all_records(source: Source) -> Iterator[tuple[str, dict | BadInput]]:
    """The records of all files of a source, as records() gives them."""
    for file in source.files:
        yield from records(file)


def records(path: Path) -> Iterator[tuple[str, dict | BadInput]]:
    """(file:number, record) for each record of a file; a BadInput in the place of one that cannot be read."""
    for number, value, _ in raw(path):
        yield f"{path}:{number}", parse(value)


def parse(value: object) -> dict | BadInput:
    """The record that a line of JSON is, or a value that is read already; a BadInput that says why it is none."""
    if isinstance(value, bytes):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:  # its own line number would be that inside the record's line
            return BadInput(f"not JSON: {error.msg} at character {error.pos + 1}; one object a line")
        except (ValueError, RecursionError) as error:
            return BadInput(f"not JSON: {brief(error)}")
    return value if isinstance(value, dict) else BadInput(f"a {type(value).__name__}, not an object")


def raw(path: Path) -> Iterator[tuple[int, object, int]]:
    """(number, line or value, bytes of the file read so far) for each record of a file, to be parsed elsewhere.

    number: its line, its place in a JSON array, or its row, from 1. Raises BadInput where the file itself is at fault
    and what follows cannot be told.
    """
    number = 0
    try:
        for number, value, at in _parquet(path) if path.name.endswith(".parquet") else _json(path):
            yield number, value, at
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{path}: corrupt or cut off after record {number} ({error}); fetch it again") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None


def _json(path: Path) -> Iterator[tuple[int, object, int]]:
    with open(path, "rb") as file:
        stream = gzip.GzipFile(fileobj=file) if path.name.endswith(".gz") else file
        if path.name.endswith((".json", ".json.gz")):
            start = stream.peek(64)[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
            if start.startswith(b"["):
                for number, value in _array(path, stream):
                    yield number, value, file.tell()
                return
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield number, line, file.tell()


def _array(path: Path, stream) -> Iterator[tuple[int, object]]:
    """The elements of a file that is one JSON array, a few at a time: such files are larger than memory."""
    decoder, scan = json.JSONDecoder(), re.compile(r"[\s,]*").match
    more = _characters(path, stream)
    text = next(more).lstrip()
    while not text:
        text = next(more).lstrip()
    at, number = 1, 0
    while True:
        at = scan(text, at).end()
        if at < len(text) and text[at] == "]":
            if text[at + 1 :].strip() or any(part.strip() for part in more):
                raise BadInput(f"{path}: more after the end of its array of {number} records; one array, or JSON lines")
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            # it may go on in what is not read yet, where the error is at the end, or in a string that has none
            cut = isinstance(error, json.JSONDecodeError) and (
                error.pos > len(text) - 12 or error.msg.startswith("Unterminated")
            )
            longer = next(more, "") if cut and len(text) - at < LONGEST else ""
            if not longer:
                raise BadInput(f"{path}: corrupt or cut off after record {number} ({error}); fetch it again") from None
            text, at = text[at:] + longer, 0
            continue
        number += 1
        yield number, value


def _characters(path: Path, stream) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        while block := stream.read(CHUNK):
            if text := decoder.decode(block):
                yield text
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 ({error.reason}); convert it") from None


def _parquet(path: Path) -> Iterator[tuple[int, dict, int]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise BadInput(f"{path}: reading Parquet needs pyarrow: pip install 'minichat[data]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            number, size = 0, path.stat().st_size / max(1, file.metadata.num_rows)
            for rows in file.iter_batches(batch_size=512):
                for record in rows.to_pylist():
                    number += 1
                    yield number, record, round(number * size)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's own, not pyarrow's word for bad bytes
            raise
        raise BadInput(f"{path} is not Parquet, or corrupt ({brief(error)}); fetch it again") from None
