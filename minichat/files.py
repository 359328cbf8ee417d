"""Files of JSON and tensors: read with one clear line for what is wrong, written whole or not at all."""

import fcntl
import hashlib
import json
import math
import mmap
import os
import platform
import re
import shutil
import struct
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from minichat.errors import BadInput, brief

if TYPE_CHECKING:
    from torch import Tensor

PART = ".part-"  # how the name of a folder begins that is being written, or deleted
_DTYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
_DTYPES |= {"torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.bool": "BOOL"}
_DTYPES |= {f"torch.{u}int{bits}": f"{u or 'i'}{bits}".upper() for u in ("", "u") for bits in (8, 16, 32, 64)}
_OLD = ".old"  # in a folder that is being written: what it replaces


def cache_folder() -> Path:
    """Where what can be made again is kept: $MINICHAT_CACHE, else the user's cache. Raises OSError if there is none."""
    if folder := os.environ.get("MINICHAT_CACHE"):
        return Path(folder).expanduser().absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minichat"
    except RuntimeError as error:  # neither $HOME nor an entry for this user
        raise OSError(f"{error} Or set MINICHAT_CACHE to a folder") from None


def read_json(path: Path, missing: dict | None = None) -> dict:
    """The object in a JSON file. If there is no such file: `missing`, or BadInput where that is None."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if missing is not None:
            return missing
        raise BadInput(f"{path}: {error.strerror}") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON ({brief(error)}); download it again") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds a {type(value).__name__}, not an object; download it again")
    return value


def fingerprint(file: Path) -> str:
    """A short hash of a file: its size, the beginnings of it (of safetensors, the header) and of 16 parts, and its end.

    It tells one training from another, which moves every weight; not a large file with a few bytes changed.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        digest.update(stream.read(8 + min(size, 1 << 20)))
        for part in range(16):
            stream.seek(size * part // 16)
            digest.update(stream.read(65536))
        stream.seek(max(0, size - 65536))
        digest.update(stream.read())
    return digest.hexdigest()[:16]


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character as JSON writes it


def write_tensors(tensors: dict, path: Path, metadata: dict[str, str] | None = None, finite: bool = False) -> None:
    """Write a safetensors file. Equal tensors and metadata make equal bytes: a fingerprint tells files apart by them,
    and the safetensors library writes several metadata in another order each time. Raises BadInput naming the file if
    it cannot be written, or if numbers have to be finite and one is not; TypeError if metadata are no strings.
    """
    from torch.linalg import vector_norm as norm

    metadata = {"format": "pt", **(metadata or {})}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError(f"metadata {metadata}; a safetensors file holds strings alone")
    # wide types first: a tensor of a narrow one may end anywhere
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    for name, tensor in ordered.items() if finite else ():
        if tensor.is_floating_point() and tensor.numel():
            # of NaN the norm is NaN; and unlike isfinite(), it makes no tensor
            wide = tensor if tensor.element_size() > 1 else tensor.float()
            if not norm(wide, math.inf).isfinite():
                why = "has the training diverged (a lower --lr helps), or is the dtype too narrow?"
                raise BadInput(f"{path}: {name} is not finite in {tensor.dtype}: not saved; {why}")
    try:
        with path.open("wb") as file:
            _write(file, ordered, {"__metadata__": dict(sorted(metadata.items()))})
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}") from None


def write_mapped(tensors: dict, path: Path) -> None:
    """Write a safetensors file with the tensors in their order, for read_mapped, and let go of its pages."""
    with path.open("wb") as file:
        _write(file, tensors, {})
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # or its small pages would stay, and the reader gets them
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write(file: BinaryIO, tensors: dict, header: dict) -> None:
    """The format of safetensors: the header's length, the header, and the data, here from a multiple of 64 bytes on."""
    import torch

    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[str(tensor.dtype)], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode(errors="replace")  # a path may be no Unicode, the format is
    text += b" " * (-(8 + len(text)) % 64)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        file.write(tensor.contiguous().flatten().view(torch.uint8).numpy())


def read_mapped(path: Path) -> dict:
    """The tensors in a file of write_mapped, mapped, on the CPU: pages are read when they are used, in large ones if
    the system can (decoding a 7B is a fifth faster from those). Raises BadInput if the file is corrupt."""
    import torch

    with _readable(path), path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        tensors = {}
        for name, (dtype, shape, start) in _places(file).items():
            flat = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start)
            tensors[name] = flat.view(shape)
        return tensors


def read_rows(path: Path, name: str) -> "Callable[[Tensor], Tensor]":
    """A function from (…) row numbers to the (…, K) rows of a matrix in a file of write_mapped, which are read as they
    are asked for: mapped, all of it would come in with the large pages. Raises BadInput if the file is corrupt."""
    import torch

    with _readable(path), path.open("rb") as file:
        dtype, (N, K), start = _places(file)[name]
        handle = os.dup(file.fileno())
    size = K * dtype.itemsize

    def rows(numbers: "Tensor") -> "Tensor":
        found = torch.empty(numbers.numel(), K, dtype=dtype)
        memory = found.view(torch.uint8).numpy()
        for i, number in enumerate(numbers.flatten().tolist()):
            if not 0 <= number < N:
                raise IndexError(f"row {number} of {N} in {path}")
            if os.preadv(handle, [memory[i]], start + number * size) != size:
                raise BadInput(f"{path} was cut while it was open; delete it: it is made again")
        return found.view(*numbers.shape, K)

    weakref.finalize(rows, os.close, handle)
    return rows


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, struct.error) as error:
        raise BadInput(f"{path} cannot be read ({error}); delete it: it is made again") from None


def _places(file: BinaryIO) -> dict:
    """Type, shape and first byte of each tensor in a file of write_mapped."""
    import torch

    names = {name: getattr(torch, dtype.removeprefix("torch.")) for dtype, name in _DTYPES.items()}
    length = struct.unpack("<Q", file.read(8))[0]
    text = file.read(min(length, os.fstat(file.fileno()).st_size))
    return {
        name: (names[entry["dtype"]], entry["shape"], 8 + length + entry["data_offsets"][0])
        for name, entry in json.loads(text).items()
    }


def read_tensors(path: Path) -> dict:
    """The tensors of a safetensors file, on the CPU. Raises BadInput if it is missing or corrupt."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which gets its name when all of it is on the disk: whatever happens, it is there
    whole or not at all. What one that died had begun goes. A disk that is full is BadInput.
    """
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for begun in folder.parent.glob(f"{PART}*"):
            shutil.rmtree(begun)
        scratch = Path(tempfile.mkdtemp(prefix=PART, dir=folder.parent))
        scratch.chmod(folder.parent.stat().st_mode & 0o777)
        yield scratch
        for path in [*scratch.rglob("*"), scratch]:
            sync(path)
        scratch.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written: {error.strerror or error}") from None
    except BadInput as error:
        raise BadInput(str(error).replace(str(scratch), str(folder))) from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is not there, against other processes. Raises BadInput if one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which ends with the process, however that ends
    except BlockingIOError:
        os.close(handle)
        raise BadInput(f"{folder}: another process is at work there; wait for it, or choose another folder") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def staged(folder: str | Path, last: str, stale: Sequence[str] = ()) -> Iterator[Path]:
    """A new folder to write files into, which take their place in `folder` together when all of them are whole.

    The file called `last`, by which a reader knows the folder, comes last. A file that matches a pattern of `stale`
    and was not written again is deleted. If writing fails, `folder` is as it was; a disk that is full is BadInput. What
    a process that died had begun goes.
    """
    folder = Path(folder)
    scratch, absent = None, []
    try:
        absent = [path for path in (folder, *folder.parents) if not path.exists()]  # the innermost first
        folder.mkdir(parents=True, exist_ok=True)
        for begun in folder.glob(f"{PART}*"):
            with suppress(OSError):
                if _forsaken(begun) and not (begun / _OLD).exists():  # which may hold what was to be replaced
                    shutil.rmtree(begun)
        scratch = Path(tempfile.mkdtemp(prefix=f"{PART}{_place()}-{os.getpid()}-", dir=folder))
        yield scratch
        _swap(scratch, folder, last, stale)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written: {error.strerror or error}") from None
    except BadInput as error:
        raise BadInput(str(error).replace(str(scratch), str(folder))) from None
    finally:
        if scratch is not None and not (scratch / _OLD).exists():
            shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):  # what was made for nothing goes again; what holds something stays
            for path in absent:
                path.rmdir()


def _place() -> str:
    """Where a process's number is its own: containers of one host name count for themselves."""
    try:
        return f"{platform.node()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return platform.node()


def _forsaken(begun: Path) -> bool:
    """Whether nobody writes into a folder of staged() any more: its process is gone, or no file came for a day."""
    if own := re.fullmatch(re.escape(f"{PART}{_place()}-") + r"(\d+)-\w+", begun.name):
        try:
            os.kill(int(own[1]), 0)  # asks, and sends nothing
        except ProcessLookupError:
            return True
    return time.time() - begun.stat().st_mtime > 86_400


def _swap(scratch: Path, folder: Path, last: str, stale: Sequence[str]) -> None:
    """Move the files of `scratch` into `folder`, and out of it what they replace and what is stale: all or nothing."""
    new = sorted((file.name for file in scratch.iterdir()), key=lambda name: name == last)
    old = {*new, *(file.name for pattern in stale for file in folder.glob(pattern))}
    if len(new) == 1 and old == {*new}:  # no other has to go with it: others may read it all along, or write the same
        os.replace(scratch / new[0], folder / new[0])
        return
    old = sorted((folder / name for name in old), key=lambda file: file.name != last)
    aside = scratch / _OLD
    aside.mkdir()
    moves = [(file, aside / file.name) for file in old if file.is_symlink() or file.is_file()]
    moves += [(scratch / name, folder / name) for name in new]
    begun = []
    try:
        for source, target in moves:
            begun.append((source, target))
            source.rename(target)
    except BaseException:
        for source, target in reversed(begun):
            with suppress(FileNotFoundError, NotADirectoryError):  # the one that failed has not moved
                target.rename(source)
        aside.rmdir()  # or what could not be moved back lies there still
        raise
    shutil.rmtree(aside, ignore_errors=True)
