"""The CPU kernel: builds kernels/*_cpu.cpp at first use, and wraps int4_cpu.cpp as int4_reference.py says."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minichat.console import say
from minichat.errors import BadInput
from minichat.files import cache_folder, sync
from minichat.kernels import _sources
from minichat.kernels import int4_reference as reference
from minichat.kernels.int4_reference import Packed

SOURCES = [_sources / "int4_cpu.cpp", _sources / "step_cpu.cpp"]  # compiled at once, each by one process
INCLUDED = [_sources / "cpu.h", _sources / "attention_cpu.h"]
FLAGS = ["-O2", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-Wno-psabi"]
LINK = ["-shared"]
if sys.platform == "darwin":
    LINK += ["-undefined", "dynamic_lookup"]  # OpenMP's functions are found when it is loaded

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum Kind in cpu.h
ROWS = 16  # per block of the layout

# ---- the functions of a kernel ----


def pack(q: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Packed:
    """As in int4_reference; the layout is drawn in int4_cpu.cpp: codes (N / 16, words of a row, 16), scale and zero
    (N / 16, K / G, 16), with N rounded up."""
    group_size = reference.check(q, scale, zero, bits)
    codes = _interleave(reference.words_from_codes(q, bits))
    zero = None if zero is None else _interleave(zero)
    return Packed(codes, _interleave(scale), zero, *q.shape, group_size, bits)


def unpack(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
    """The (q, scale, zero) that `pack` was given, exactly."""
    N = packed.out_features
    q = reference.codes_from_words(_separate(packed.codes, N), packed.bits)
    return q, _separate(packed.scale, N), None if packed.zero is None else _separate(packed.zero, N)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight, (N, K): computed in fp32 and rounded once to `dtype`."""
    return _dequantize_rows(packed, 0, packed.out_features, dtype)


def matmul(x: Tensor, packed: Packed, exact: bool = True) -> Tensor:
    """x (..., K) fp32, bf16 or fp16 -> x @ weight^T (..., N), in x's dtype; sums of 32 are integers, and added in fp32.

    exact: x is rounded to 15 bits in each chunk of 32 (an error of about 4e-5), else to 8 (5e-3): less work a token,
    which only shows where several share a read of the weights.
    """
    N, K = packed.out_features, packed.in_features
    reference.check_input(x, K, packed)
    rows = x.detach().reshape(-1, K).contiguous()
    M, planes = rows.shape[0], 2 if exact else 1
    # in its last shape: autograd refuses to have a view of a Function written over, as the loss does with its logits
    y = torch.empty(*x.shape[:-1], N, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
    chunks = torch.empty(M * (K // 32) * (32 * planes + 12), dtype=torch.uint8)
    if M > 0:
        library().matmul(
            _pointer(rows), KINDS[x.dtype], M, planes, _pointer(chunks), *_weight(packed), _pointer(y), KINDS[y.dtype],
            isa(), threads(),
        )  # fmt: skip
    return y.to(x.dtype)


def matmul_transposed(grad: Tensor, packed: Packed) -> Tensor:
    """grad (..., N) -> grad @ weight (..., K), in grad's dtype. Only a few MB of the weight exist at a time."""
    N, K = packed.out_features, packed.in_features
    reference.check_input(grad, N, packed)
    rows = grad.detach().reshape(-1, N).to(torch.float32)
    out = torch.zeros(rows.shape[0], K, dtype=torch.float32, device="cpu")
    step = max(ROWS, reference.CHUNK // K // ROWS * ROWS)
    for first in range(0, N, step):
        last = min(first + step, N)
        out.addmm_(rows[:, first:last], _dequantize_rows(packed, first, last, torch.float32))
    return out.to(grad.dtype).view(*grad.shape[:-1], K)


def quantize(
    w: Tensor, group_size: int, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As in int4_reference. The scales to try are its own, so only the order of the sums of squares differs."""
    reference.check_weight(w, group_size, bits, scale_dtype)
    w = w.detach().contiguous()
    N, K = w.shape
    q = torch.empty(N, K, dtype=torch.uint8, device=w.device)
    scale = torch.empty(N, K // group_size, dtype=scale_dtype, device=w.device)
    zero = torch.empty(N, K // group_size, dtype=torch.uint8, device=w.device)
    for rows in reference.chunks(N, K):
        part, n = w[rows], rows.stop - rows.start
        scales, zeros = reference.candidates(part.view(n, -1, group_size), bits, symmetric, scale_dtype)
        zeros = zeros.to(torch.uint8)
        best = torch.empty(n, K // group_size, dtype=torch.uint8, device=w.device)
        library().quantize(
            _pointer(part), KINDS[w.dtype], n, K, group_size, len(scales), _pointer(scales), _pointer(zeros), bits,
            _pointer(q[rows]), _pointer(best), isa(), threads(),
        )  # fmt: skip
        best = best.to(torch.int64).unsqueeze(0)
        scale[rows] = scales.gather(0, best).squeeze(0).to(scale_dtype)
        zero[rows] = zeros.gather(0, best).squeeze(0)
    return q, scale, None if symmetric else zero


def _dequantize_rows(packed: Packed, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows first..last of the weight; `first` is a multiple of 16."""
    direct = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    out = torch.empty(last - first, packed.in_features, dtype=direct, device="cpu")
    library().dequantize(*_weight(packed), first, last, _pointer(out), KINDS[direct], isa(), threads())
    return out.to(dtype)


def _interleave(rows: Tensor) -> Tensor:
    """(N, columns) -> (N / 16 rounded up, columns, 16), with zeros in the rows past N."""
    padded = F.pad(rows, (0, 0, 0, -len(rows) % ROWS))
    return padded.view(-1, ROWS, rows.shape[1]).transpose(1, 2).contiguous()


def _separate(blocks: Tensor, N: int) -> Tensor:
    """The inverse of `_interleave`."""
    return blocks.transpose(1, 2).flatten(0, 1)[:N].contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    if tensor.device.type != "cpu":
        raise BadInput(
            f"a tensor is on {tensor.device}; the CPU kernel reads the host's memory: move it with .to('cpu')"
        )
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _weight(p: Packed) -> tuple:
    """The arguments by which the C functions take a weight."""
    tensors = _pointer(p.codes), _pointer(p.scale), KINDS[p.scale.dtype], _pointer(p.zero)
    return *tensors, p.out_features, p.in_features, p.group_size, p.bits


# ---- building and loading ----


def available() -> bool:
    """Whether the kernel can run; the first call compiles it, or says on stderr in one line why it cannot."""
    return _build_and_load() is not None


def library() -> ctypes.CDLL:
    """The compiled kernel. Raises BadInput if there is none."""
    loaded = _build_and_load()
    if loaded is None:
        raise BadInput("this INT4 layer was packed for the C++ kernel, which is not there; load the model again")
    return loaded


def threads() -> int:
    """How many threads the kernel takes: torch's number. One in a process that was forked off, where OpenMP's others
    are gone and it would wait for them for ever."""
    return 1 if _forked else torch.get_num_threads()


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def isa() -> int:
    """The best instruction set that runs here: 0 portable, 1 AVX2 with FMA, 2 AVX-512 with VNNI, 3 and BF16."""
    return library().best_isa()


@functools.cache  # once per process: the answer, the message and the warning
def _build_and_load() -> ctypes.CDLL | None:
    try:
        path = _build()
        _share_openmp()
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as first:  # a file that was cut, or is of another machine; or something else is wrong
            try:
                loaded = ctypes.CDLL(str(_build(anew=True)))
            except (OSError, BadInput, subprocess.CalledProcessError):
                raise first from None
    except (OSError, BadInput, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        why = next((line for line in why.splitlines() if "error" in line), why.strip()).strip()
        of_cache = isinstance(error, BadInput)
        how = "$MINICHAT_CACHE may name another folder" if of_cache else "set CXX to a C++17 compiler"
        say(f"no C++ kernel, so INT4 runs on the slow reference: {why} ({how})")
        return None
    i, n, p = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    weight = [p, p, i, p, n, n, n, i]
    loaded.matmul.argtypes = [p, i, n, i, p, *weight, p, i, i, i]
    loaded.dequantize.argtypes = [*weight, n, n, p, i, i, i]
    loaded.quantize.argtypes = [p, i, n, n, n, n, p, p, i, p, p, i, i]
    loaded.step.argtypes = [p, i, i]
    loaded.step_scratch.argtypes, loaded.step_scratch.restype = [p, i], n
    for function in (loaded.matmul, loaded.dequantize, loaded.quantize, loaded.step):
        function.restype = None
    return loaded


def _build(anew: bool = False) -> Path:
    """The compiled library's path in the cache; compiles it if it is not there.

    Raises OSError, CalledProcessError, and BadInput where the cache cannot be written.
    """
    known = [file.read_bytes() for file in SOURCES + INCLUDED], FLAGS, LINK, sys.platform, platform.machine()
    source = hashlib.sha256(repr(known).encode()).hexdigest()
    folder = cache_folder()
    try:
        compiler = _compiler()
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        # no compiler here, but perhaps there was one where the cache comes from (the build stage of a container)
        if not anew and (built := sorted(folder.glob(f"cpu-{source[:16]}-*.so"))):
            return built[0]
        raise
    path = folder / f"cpu-{source[:16]}-{_made_by(compiler, version)}.so"
    if path.exists() and not anew:
        return path

    def compile_to(out: Path, *arguments: str | Path) -> Path:
        command = [*compiler, *FLAGS, *map(str, arguments), "-o", str(out)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        return out

    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written: {error.strerror}") from None
    with scratch, ThreadPoolExecutor() as pool:
        inside = Path(scratch.name)
        say(f"compiling kernels/*_cpu.cpp (once, into {folder})")
        objects = [*pool.map(lambda source: compile_to(inside / f"{source.name}.o", "-c", source), SOURCES)]
        built = compile_to(inside / path.name, *LINK, *objects)
        sync(built)
        os.replace(built, path)  # whole or not at all, also when two processes build at once
    return path


def _made_by(compiler: list[str], version: str) -> str:
    """A hash of the compiler's version and of the options that $CXX brings."""
    return hashlib.sha256(repr((compiler[1:], version)).encode()).hexdigest()[:8]


def _compiler() -> list[str]:
    """The command that compiles C++: $CXX if it is set, else the first one found. Raises OSError if there is none."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        return chosen
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if found is None:
        raise OSError("no C++ compiler among g++, c++, clang++")
    return [found]


def _share_openmp() -> None:
    """Make the OpenMP runtime that torch has loaded visible to the kernel, which names none.

    Two runtimes in one process spin against each other. Without one (torch can be built so) the kernel runs on one
    thread.
    """
    for path in openmp_runtimes():
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        return


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes in this process, torch's own first. Empty where /proc does not say (not Linux)."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line}
    except OSError:
        return []
    names = ("libgomp", "libiomp5", "libomp")
    torch_folder = str(Path(torch.__file__).parent)
    return sorted(
        (path for path in paths if Path(path).name.startswith(names)),
        key=lambda path: (not path.startswith(torch_folder), path),
    )
