"""Token ids of many records: arrays, in memory or in files of the cache that are mapped into it.

A large source is tokenised once, by all cores; the next run that wants the same of it opens the files.
"""

import hashlib
import json
import os
import signal
import struct
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from minichat import files, sources
from minichat.console import say
from minichat.errors import BadInput
from minichat.examples import Dpo, Example, Pair, Report, Sft, encode

VERSION = 2  # of the cache's files, and of what encoders make of a record
LARGE = 16 << 20  # bytes of files from which on processes are started and the result is kept
BLOCK = 1 << 20  # bytes that a process gets at a time, or 1,000 records
HOPELESS = 100  # bad records with no good one among them: the rest is not tried
HEADER = 512  # bytes before the tokens in their file
TOKENS, INDEX, REPORT = "tokens.safetensors", "index.safetensors", "report.json"

Rows = tuple[int, str, list[tuple[int, object]]]  # which file, its name, and (number, line or value) of its records


@dataclass
class Block:
    """The items of some records. tokens: ids << 1 | mask, one item after the other.

    index: of each item its count of tokens, a pair's cuts (lengths of prompt and chosen answer), its record's file and
    number, and a draw from 0 .. 2^32 - 1 that depends on the record's content alone.
    """

    tokens: np.ndarray
    index: dict[str, np.ndarray]
    report: Report


class Items(Sequence):
    """Examples or pairs whose tokens lie in an array or in a file; each is made when it is asked for."""

    def __init__(self, tokens, index: dict[str, np.ndarray], names: Sequence[str], chosen: np.ndarray | None = None):
        self.tokens = tokens  # whatever gives tokens[a:b]
        self.index = index
        self.names = names  # of the files
        self.ends = np.cumsum(index["counts"], dtype=np.int64)
        self.chosen = np.arange(len(self.ends)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Example | Pair:
        i = self.chosen[i]
        end = int(self.ends[i])
        packed = self.tokens[end - int(self.index["counts"][i]) : end]
        ids, mask = (packed >> 1).tolist(), (packed & 1).tolist()
        where = f"{self.names[self.index['files'][i]]}:{self.index['numbers'][i]}"
        cuts = self.index["cuts"][i].tolist()
        if not cuts:
            return Example(ids, mask, where)
        P, C = cuts[0], cuts[0] + cuts[1]
        return Pair(ids[:P], ids[P:C], ids[C:], where, masks=(mask[P:C], mask[C:]))

    def lengths(self) -> list[int]:
        """len() of each item, without making it."""
        return self.index["counts"][self.chosen].tolist()

    def fingerprint(self) -> str:
        """A hash of the records that the items come from, in their order, and of the items' lengths."""
        known = (self.index[name][self.chosen].tobytes() for name in ("draws", "counts", "cuts"))
        return hashlib.sha256(b" ".join(known)).hexdigest()[:16]

    def split(self, share: float) -> tuple["Items", "Items"]:
        """The items of all records but about a share of them, and those of that share.

        Which they are depends on a record alone: not on its place, nor on a seed, and equal records go together.
        """
        held = self.index["draws"][self.chosen] < share * 2**32
        return tuple(Items(self.tokens, self.index, self.names, self.chosen[part]) for part in (~held, held))


def load(source: sources.Source, encoder: Sft | Dpo, strict: bool = False) -> tuple[Items, Report]:
    """All of a source as token ids, from the cache if it is large and was read before.

    Raises BadInput if there is nothing to learn from, at the first bad record if `strict`, and if the cache's folder
    cannot be written.
    """
    try:
        return _load(source, encoder, strict)
    except BadInput as error:
        if source.name in str(error) or any(str(file) in str(error) for file in source.files):
            raise
        raise BadInput(f"{source.name}: {error}") from None


def _load(source: sources.Source, encoder: Sft | Dpo, strict: bool) -> tuple[Items, Report]:
    names = [str(file) for file in source.files]
    size = sum(file.stat().st_size for file in source.files)
    if size < LARGE:
        return _in_memory((work(rows, encoder, strict) for rows in _read(source)), names)
    folder = files.cache_folder() / "data" / _key(source, encoder)
    if not (folder / REPORT).exists():
        with files.staged(folder, last=REPORT) as new:
            _build(source, encoder, strict, size, new)
        say(f"kept in {folder}")
    report = Report(**files.read_json(folder / REPORT))
    report.counts = Counter(report.counts)
    if strict and report.bad:
        raise BadInput(report.bad[0])
    return _open(folder, names), report


def of_records(name: str, records: Iterable[dict], encoder: Sft | Dpo) -> tuple[Items, Report]:
    """Records of a file called `name` that is not there yet."""
    return _in_memory([work((0, name, list(enumerate(records, 1))), encoder, True)], [name])


def _in_memory(blocks: Iterable[Block], names: list[str]) -> tuple[Items, Report]:
    tokens: list[np.ndarray] = []
    index, report = _gather(blocks, tokens.append)
    return Items(np.concatenate(tokens), index, names), report


def _gather(blocks: Iterable[Block], keep: Callable[[np.ndarray], object]) -> tuple[dict[str, np.ndarray], Report]:
    """The index and the report of all blocks together; their tokens go to `keep`, in order."""
    parts, report = [], Report()
    for block in blocks:
        keep(block.tokens)
        parts.append(block.index)
        report.add(block.report)
        if report.refused >= HOPELESS and not report.kept:
            raise BadInput(f"the first {report.refused:,} records are all bad, {report.bad[0]}")
    report.check()
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, report


def _read(source: sources.Source, seen: Callable[[int], object] = lambda bytes: None) -> Iterator[Rows]:
    """The records of a source, some at a time, not parsed yet. seen: is told how many bytes of all files are read."""
    before = 0
    for i, file in enumerate(source.files):
        rows, size = [], 0
        for number, value, at in sources.raw(file):
            rows.append((number, value))
            size += len(value) if isinstance(value, bytes) else BLOCK // 1000
            if size >= BLOCK:
                yield i, str(file), rows
                seen(before + at)
                rows, size = [], 0
        yield i, str(file), rows
        before += file.stat().st_size
        seen(before)


def work(rows: Rows, encoder: Sft | Dpo, strict: bool) -> Block:
    """The items of these records."""
    file, name, values = rows
    dtype = np.uint16 if encoder.tokenizer.vocab_size <= 1 << 15 else np.uint32
    packed, counts, cuts, numbers, draws, total = [], [], [], [], [], Report()
    for number, value in values:
        record = sources.parse(value)
        items, report = encode([(f"{name}:{number}", record)], encoder, strict)
        total.add(report)
        draw = _draw(record) if items else 0
        for item in items:
            if isinstance(item, Pair):
                ids = item.prompt + item.chosen + item.rejected
                mask = [0] * len(item.prompt) + item.masks[0] + item.masks[1]
                cuts.append((len(item.prompt), len(item.chosen)))
            else:
                ids, mask = item.ids, item.mask
            packed.append(np.array(ids, dtype) << 1 | np.array(mask, dtype))
            counts.append(len(ids))
            numbers.append(number)
            draws.append(draw)
    index = {
        "counts": np.array(counts, np.int32),
        "cuts": np.array(cuts, np.int32).reshape(len(counts), 2 if isinstance(encoder, Dpo) else 0),
        "numbers": np.array(numbers, np.int64),
        "draws": np.array(draws, np.uint32),
        "files": np.full(len(counts), file, np.int32),
    }
    return Block(np.concatenate([np.zeros(0, dtype), *packed]), index, total)


def _draw(record: dict) -> int:
    content = json.dumps(record, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=4).digest(), "big")


# ---- the cache ----


def _key(source: sources.Source, encoder: Sft | Dpo) -> str:
    """A hash of everything that decides what the items are."""
    known = {
        "version": VERSION,
        "files": [(file.name, file.stat().st_mtime_ns, files.fingerprint(file)) for file in source.files],
        "tokenizer": encoder.tokenizer.fingerprint,
        "encoder": type(encoder).__name__,
        **{field.name: getattr(encoder, field.name) for field in fields(encoder) if field.name != "tokenizer"},
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def _build(source: sources.Source, encoder: Sft | Dpo, strict: bool, size: int, folder: Path) -> None:
    """Write the cache's files: the tokens as they come, which are too many to hold, then what is known of them."""
    import torch
    from tqdm import tqdm

    dtype, length = None, 0
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"tokenising {source.name}", disable=not sys.stderr.isatty())
    say(f"tokenising {source.name}, {size / 1e6:,.0f} MB, with {cores()} processes")
    with bar, (folder / TOKENS).open("wb") as file:
        file.seek(HEADER)

        def keep(tokens: np.ndarray) -> None:
            nonlocal dtype, length
            dtype, length = tokens.dtype, length + len(tokens)
            file.write(tokens.tobytes())

        rows = _read(source, lambda at: bar.update(at - bar.n))
        index, report = _gather(_by_all_cores(rows, encoder, strict), keep)
        name = {2: "U16", 4: "U32"}[dtype.itemsize]
        header = {"tokens": {"dtype": name, "shape": [length], "data_offsets": [0, length * dtype.itemsize]}}
        file.seek(0)
        file.write(struct.pack("<Q", HEADER - 8) + json.dumps(header).encode().ljust(HEADER - 8))
    files.write_tensors({name: torch.from_numpy(values) for name, values in index.items()}, folder / INDEX)
    files.write_json(folder / REPORT, vars(report))


def _open(folder: Path, names: list[str]) -> Items:
    """The items in a folder of the cache. Raises BadInput if its files are corrupt."""
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    try:
        index = load_file(folder / INDEX)
        tokens = safe_open(folder / TOKENS, framework="numpy").get_slice("tokens")
        if tokens.get_shape() != [int(index["counts"].sum(dtype=np.int64))]:
            raise SafetensorError("tokens and index do not belong together")
    except (SafetensorError, KeyError, OSError) as error:
        raise BadInput(f"{folder} is corrupt ({error}); delete it: it is made again") from None
    return Items(tokens, index, names)


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker: tuple[Sft | Dpo, bool] | None = None  # in a process that tokenises: what with


def _start(encoder: Sft | Dpo, strict: bool) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = encoder, strict


def _work(rows: Rows) -> Block:
    return work(rows, *_worker)


def _by_all_cores(rows: Iterable[Rows], encoder: Sft | Dpo, strict: bool) -> Iterator[Block]:
    """work() on each, in order, a few of them at a time."""
    count = cores()
    # new processes rather than copies of this one, whose threads would be lost in the middle of what they do
    with ProcessPoolExecutor(count, get_context("spawn"), _start, (encoder, strict)) as pool:
        try:
            waiting: deque = deque()
            for some in rows:
                waiting.append(pool.submit(_work, some))
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise BadInput("a process that tokenised was killed; is there memory enough?") from None
        finally:
            pool.shutdown(cancel_futures=True)
