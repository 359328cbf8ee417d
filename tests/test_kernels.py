"""Every kernel against float64 on the dequantised weights, the rounding rule, and building the C++ one."""

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minichat import kernels
from minichat.errors import BadInput
from minichat.kernels import cpu, int4_hpu
from minichat.kernels import int4_reference as reference

ROOT = Path(__file__).parent.parent
SETS = ["portable", "avx2", "avx512"]  # the C++ kernel's instruction sets, in the order of its enum; 3 is attention's
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
many = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(scope="module", params=["reference", "hpu", *SETS])
def kernel(request):
    """Each kernel, Gaudi's without its own operation, and the C++ one by each instruction set that this machine has."""
    if request.param in ("reference", "hpu"):
        yield reference if request.param == "reference" else int4_hpu
        return
    if not cpu.available():
        pytest.skip("no C++ compiler")
    isa = SETS.index(request.param)
    if isa > cpu.isa():
        pytest.skip(f"this machine has no {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "isa", lambda: isa)
        yield cpu


@pytest.fixture
def compiled():
    if not cpu.available():
        pytest.skip("no C++ compiler")
    return cpu


def random_weight(N, K, G, bits, symmetric, dtype=torch.bfloat16, seed=0):
    """Codes, scales and zero-points of every value, as `pack` takes them."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << bits, (N, K), generator=generator, dtype=torch.uint8)
    scale = ((torch.rand(N, K // G, generator=generator) + 0.1) / 100).to(dtype)
    zero = torch.randint(0, 1 << bits, (N, K // G), generator=generator, dtype=torch.uint8)
    return q, scale, None if symmetric else zero, bits


def from_shape(shape):
    N, groups, G, bits, symmetric, dtype, seed = (
        shape[key] for key in ("N", "groups", "G", "bits", "symmetric", "dtype", "seed")
    )
    return random_weight(N, groups * G, G, bits, symmetric, dtype, seed)


def exact(q, scale, zero, bits):
    """The weight in float64, written independently of the kernels."""
    G = q.shape[1] // scale.shape[1]
    zero = torch.full_like(q, 1 << (bits - 1)) if zero is None else zero.repeat_interleave(G, 1)
    return (q.double() - zero.double()) * scale.double().repeat_interleave(G, 1)


def error(y, x, w):
    """Relative to the sums without their cancellation, so that one unlucky output is no failure."""
    x = x.double()
    return ((y.double() - x @ w.T).norm() / (x.abs() @ w.abs().T).norm().clamp_min(1e-300)).item()


def limit(kernel, exact=True):
    """What matmul's error may be: the C++ kernel rounds activations to 15 or to 8 bits."""
    return 1e-4 if kernel is cpu and exact else 1e-2 if kernel is cpu else 1e-6


def same(a, b):
    return a is b is None or (a.dtype == b.dtype and torch.equal(a, b))


shapes = st.fixed_dictionaries(
    dict(
        N=st.integers(1, 70),
        groups=st.integers(1, 5),
        G=st.sampled_from([32, 64, 96, 128]),
        bits=st.sampled_from([4, 8]),
        symmetric=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 1000),
    )
)


@given(
    shape=shapes, M=st.integers(0, 40), x_dtype=st.sampled_from(DTYPES), strided=st.booleans(), exactly=st.booleans()
)
@many
def test_matmul(kernel, shape, M, x_dtype, strided, exactly):
    N, K = shape["N"], shape["groups"] * shape["G"]
    weight = from_shape(shape)
    w = exact(*weight)
    packed = kernel.pack(*weight)
    rounding = 0 if x_dtype == torch.float32 else 5e-3  # of what comes out
    x = torch.randn(M, 2 * K, generator=torch.Generator().manual_seed(1)).to(x_dtype)
    x = x[:, ::2] if strided else x[:, :K].contiguous()
    y = kernel.matmul(x, packed, exactly)
    assert y.shape == (M, N) and y.dtype == x_dtype and y.is_contiguous()
    assert M == 0 or error(y, x, w) < limit(kernel, exactly) + rounding
    grad = torch.randn(M, N, generator=torch.Generator().manual_seed(2)).to(x_dtype)
    back = kernel.matmul_transposed(grad, packed)
    assert back.shape == (M, K) and back.dtype == x_dtype
    assert M == 0 or error(back, grad, w.T) < 1e-6 + rounding


@given(shape=shapes)
@many
def test_pack_loses_nothing(kernel, shape):
    weight = from_shape(shape)
    packed = kernel.pack(*weight)
    assert all(same(a, b) for a, b in zip(kernel.unpack(packed), weight))
    assert packed.group_size == shape["G"]
    for dtype in DTYPES:
        w = kernel.dequantize(packed, dtype)
        assert w.dtype == dtype and w.is_contiguous()
        assert torch.equal(w, exact(*weight).float().to(dtype))  # fp32, then one rounding


@pytest.mark.parametrize("M", [1, 2, 13, 200])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_real_size(kernel, M, bits):
    weight = random_weight(1000, 1024, 128, bits, True)
    packed, w = kernel.pack(*weight), exact(*weight)
    x = torch.randn(M, 1024)
    y = x.double() @ w.T
    assert (kernel.matmul(x, packed) - y).norm() / y.norm() < limit(kernel)
    assert (kernel.matmul(x, packed, exact=False) - y).norm() / y.norm() < limit(kernel, False)
    assert (kernel.matmul(x.bfloat16(), packed) - y).norm() / y.norm() < 1e-2
    assert kernel.matmul(x.view(M, 1, 1, 1024), packed).shape == (M, 1, 1, 1000)


def test_a_group_as_long_as_the_row(kernel):
    weight = random_weight(20, 608, 608, 4, False)  # longer than a panel, and no multiple of one
    x = torch.randn(5, 608)
    assert error(kernel.matmul(x, kernel.pack(*weight)), x, exact(*weight)) < limit(kernel)


@pytest.mark.parametrize("M", [1, 7])
def test_extreme_values(kernel, M):
    for dtype, scale in [(torch.float16, 6e-8), (torch.float16, 6e4), (torch.bfloat16, 1e30), (torch.float32, 1e-37)]:
        q = torch.tensor([0, 15, 8, 7], dtype=torch.uint8).repeat_interleave(64).repeat(5, 1)
        weight = q, torch.full((5, 8), scale).to(dtype), None, 4
        x = torch.randn(M, 256)
        for exactly in (True, False):
            assert error(kernel.matmul(x, kernel.pack(*weight), exactly), x, exact(*weight)) < limit(kernel, exactly)
    zeros = random_weight(5, 64, 32, 4, False)[0], torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.uint8), 4
    assert not kernel.matmul(torch.randn(M, 64), kernel.pack(*zeros)).any()
    assert not kernel.matmul(torch.zeros(M, 64), kernel.pack(*random_weight(5, 64, 32, 4, True))).any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_sum_overflows(kernel, bits, symmetric):
    """The largest codes with the largest activations, of one sign or of alternating ones, are exact in 8 bits too."""
    top = (1 << bits) - 1
    for codes in ([top], [0], [top, 0], [0, top]):
        q = torch.tensor(codes, dtype=torch.uint8).repeat(17, 256 // len(codes))
        zero = None if symmetric else torch.tensor([0, top], dtype=torch.uint8).repeat(17, 2)
        weight = q, torch.ones(17, 4), zero, bits
        for x in (torch.ones(3, 256), -torch.ones(3, 256), torch.tensor([1.0, -1.0]).repeat(3, 128)):
            for exactly in (True, False):
                y = kernel.matmul(x, kernel.pack(*weight), exactly)
                assert ((y.double() - x.double() @ exact(*weight).T).abs() <= 1e-6 * 256 * top).all()


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e20, 1e37])
def test_activations_of_any_size(kernel, size):
    weight = random_weight(20, 128, 32, 4, True)
    x = torch.randn(3, 128) * size
    tolerance = limit(kernel) if size > 1e-30 else 0.2  # numbers that small have few bits themselves
    assert error(kernel.matmul(x, kernel.pack(*weight)) / size, x.double() / size, exact(*weight)) < tolerance
    x[1] = 0
    assert not kernel.matmul(x, kernel.pack(*weight))[1].any()


def test_a_nan_token_stays_in_its_row(kernel):
    packed = kernel.pack(*random_weight(40, 64, 32, 4, True))
    x = torch.randn(9, 64)
    y = kernel.matmul(x, packed)
    x[4, 3], x[5, 40] = float("nan"), float("inf")
    poisoned = kernel.matmul(x, packed)
    assert poisoned[4].isnan().all() and not poisoned[5].isfinite().any()
    kept = (torch.arange(9) != 4) & (torch.arange(9) != 5)
    assert torch.equal(poisoned[kept], y[kept])
    half = kernel.matmul(x.half(), packed)
    assert half[4].isnan().all() and not half[5].isfinite().any() and half[kept].isfinite().all()


def test_every_output_is_written(kernel, monkeypatch):
    """Fresh memory holds NaN, or 255: what is left of it would show."""
    weight = random_weight(37, 192, 32, 4, False)
    packed, x, w = kernel.pack(*weight), torch.randn(9, 192), torch.randn(37, 192)
    empty = torch.empty

    def poisoned(*size, **options):
        fresh = empty(*size, **options)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", poisoned)
    for tokens in (x[:1], x):
        assert error(kernel.matmul(tokens, packed), tokens, exact(*weight)) < limit(kernel)
    assert torch.equal(kernel.dequantize(packed, torch.float32), exact(*weight).float())
    quantised = kernel.quantize(w, 32, 4, False, torch.float32)
    assert quantised[0].max() == 15 and (exact(*quantised, 4) - w).norm() / w.norm() < 0.1


def test_threads_change_nothing(compiled):
    weight = random_weight(333, 256, 32, 4, False)
    packed, w = compiled.pack(*weight), torch.randn(333, 256)

    def everything():
        x = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
        yield compiled.matmul(x[:1], packed)
        yield compiled.matmul(x, packed)
        yield compiled.matmul(x, packed, exact=False)
        yield compiled.dequantize(packed, torch.bfloat16)
        yield from compiled.quantize(w, 64, 4, False, torch.bfloat16)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = list(everything())
        torch.set_num_threads(2)
        assert all(same(a, b) for a, b in zip(one, everything()))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_token_does_not_depend_on_its_batch(compiled, bits, symmetric):
    packed, x = compiled.pack(*random_weight(48, 512, 32, bits, symmetric)), torch.randn(200, 512)
    for exactly in (True, False):
        y = compiled.matmul(x, packed, exactly)
        for M in (1, 2, 3, 7, 12, 13, 193):
            assert torch.equal(compiled.matmul(x[:M], packed, exactly), y[:M])


@pytest.mark.parametrize("exactly", [True, False])
def test_tokens_that_do_not_stay_in_the_cache_together(compiled, exactly):
    """The kernel takes as many at a time as fit in 1 MiB: here 26 or 46, in tiles, and a part of one at the end."""
    packed, x = compiled.pack(*random_weight(16, 16384, 32, 4, True)), torch.randn(61, 16384)
    alone = torch.cat([compiled.matmul(row, packed, exactly) for row in x.split(1)])
    assert torch.equal(compiled.matmul(x, packed, exactly), alone)


def test_the_gradient_holds_a_few_rows_of_the_weight_at_a_time(compiled, monkeypatch):
    weight = random_weight(70, 64, 32, 4, False)
    packed, grad, plain, held = compiled.pack(*weight), torch.randn(5, 70), compiled._dequantize_rows, []

    def watched(*arguments):
        rows = plain(*arguments)
        held.append(len(rows))
        return rows

    monkeypatch.setattr(compiled, "_dequantize_rows", watched)
    monkeypatch.setattr(reference, "CHUNK", 32 * 64)
    assert error(compiled.matmul_transposed(grad, packed), grad, exact(*weight).T) < 1e-6
    assert held == [32, 32, 6]


# ---- quantising ----


def squared(w, quantised, bits):
    """The squared error of each group."""
    K, groups = w.shape[1], quantised[1].shape[1]
    return (exact(*quantised, bits) - w.double()).square().view(len(w), groups, K // groups).sum(-1)


def plain(w, G, bits, symmetric, dtype):
    """Round to nearest over the whole range, without a search: what the search must never lose to."""
    groups, top = w.view(len(w), -1, G).float(), (1 << bits) - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    scale = (span / top).to(dtype)
    scale[scale == 0] = 1
    zero = torch.full_like(low, 1 << (bits - 1)) if symmetric else (-low / scale.float()).round().clamp(0, top)
    q = ((groups / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, top)
    return q.view_as(w).to(torch.uint8), scale, None if symmetric else zero.to(torch.uint8)


@given(shape=shapes, spread=st.sampled_from([1e-6, 0.02, 1.0, 1e3]), outliers=st.booleans())
@many
def test_the_search_never_loses_to_plain_rounding(kernel, shape, spread, outliers):
    N, G, bits, symmetric, dtype = (shape[k] for k in ("N", "G", "bits", "symmetric", "dtype"))
    w = torch.randn(N, shape["groups"] * G, generator=torch.Generator().manual_seed(shape["seed"])) * spread
    w = w**3 if outliers else w
    if dtype == torch.float16 and w.abs().max() > 6e4:
        w = w / 1e6
    w = w.to(torch.bfloat16)
    quantised = kernel.quantize(w, G, bits, symmetric, dtype)
    assert quantised[1].dtype == dtype and quantised[0].max().item() < 1 << bits
    ours, base = squared(w, quantised, bits), squared(w, plain(w, G, bits, symmetric, dtype), bits)
    assert (ours <= base * (1 + 1e-5)).all()


def test_the_search_pays():
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    gain = squared(w, reference.quantize(w, 32, 4, True, torch.bfloat16), 4).sum()
    assert gain < 0.87 * squared(w, plain(w, 32, 4, True, torch.bfloat16), 4).sum()


@given(shape=shapes)
@many
def test_cpp_quantises_as_the_reference(kernel, shape):
    N, K = shape["N"], shape["groups"] * shape["G"]
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(shape["seed"])).to(shape["dtype"]) / 50
    settings = shape["G"], shape["bits"], shape["symmetric"], torch.bfloat16
    ours, theirs = kernel.quantize(w, *settings), reference.quantize(w, *settings)
    a, b = squared(w, ours, shape["bits"]), squared(w, theirs, shape["bits"])
    assert (a - b).abs().max() <= 1e-6 * b.max()  # two ranges may tie
    assert (ours[1] == theirs[1]).double().mean() > 0.99 or (ours[1] != theirs[1]).sum() <= 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_degenerate_groups(kernel, bits, symmetric):
    w = torch.zeros(7, 64)
    w[1] = 0.3
    w[2] = -0.3
    w[3] = 1e-45  # the scale rounds to 0
    w[4, 5] = 1.0
    w[5] = 3e38
    w[6] = -1e-38
    q, scale, zero = kernel.quantize(w, 32, bits, symmetric, torch.bfloat16)
    back = exact(q, scale, zero, bits)
    assert scale.isfinite().all() and (scale > 0).all()
    assert not back[0].any() and not back[3].any()
    # the squares of row 5 are no float32: all ranges tie, and the plain one is taken; row 6's bf16 scale is denormal,
    # which torch may flush to 0
    for row, limit in {1: 0.02, 2: 0.02, 5: 0.08, 6: 1}.items():
        assert (back[row] - w[row].double()).abs().max() <= limit * w[row].abs().max()
    assert back[4].count_nonzero() == 1  # a zero among others stays exactly zero


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_must_be_finite(kernel, bad):
    w = torch.randn(40, 64)
    w[33, 40] = bad
    with pytest.raises(BadInput, match="NaN or infinite"):
        kernel.quantize(w, 32, 4, True, torch.bfloat16)


def test_bad_quantise(kernel):
    w = torch.randn(4, 64)
    for arguments, words in [
        ((w, 48, 4, True, torch.bfloat16), "group size 48 is not a multiple of 32"),
        ((w, 128, 4, True, torch.bfloat16), "in_features 64 is not a multiple of group size 128"),
        ((w, 32, 3, True, torch.bfloat16), "bits is 3"),
        ((w, 32, 4, True, torch.float64), "scale_dtype is torch.float64"),
        ((w.double(), 32, 4, True, torch.bfloat16), "float64; it must be"),
        ((w.flatten(), 32, 4, True, torch.bfloat16), "it must be .N, K."),
        ((w * 1e6, 32, 4, True, torch.float16), "past the range of torch.float16"),
    ]:
        with pytest.raises(BadInput, match=words):
            kernel.quantize(*arguments)


def test_bad_pack_and_input(kernel):
    q, scale, zero, bits = random_weight(8, 64, 32, 4, False)
    for arguments, words in [
        ((q, scale, zero, 5), "bits is 5"),
        ((q.int(), scale, zero, 4), "must be .N, K. torch.uint8"),
        ((q, scale.double(), zero, 4), "float64; it must be"),
        ((q, scale[:4], zero, 4), "for codes .8, 64."),
        ((q[:, :48], scale, zero, 4), "multiple of 32"),
        ((q, scale, zero[:4], 4), "zero is .4, 2."),
        ((q, scale, zero.int(), 4), "or None"),
        ((q, scale.to("meta"), zero, 4), "one device"),
    ]:
        with pytest.raises(BadInput, match=words):
            kernel.pack(*arguments)
    packed = kernel.pack(q, scale, zero, bits)
    for x in (torch.randn(2, 65), torch.tensor(1.0), torch.zeros(2, 64).double(), torch.zeros(2, 64, device="meta")):
        with pytest.raises(BadInput, match="it must be"):
            kernel.matmul(x, packed)


@pytest.mark.slow
def test_reference_quantises_in_little_memory():
    """Half of a 7B's largest weight takes less than 0.25 GiB beyond its codes; all at once, it would be 0.43."""
    code = """if True:
        import torch, resource
        from minichat.kernels import int4_reference
        w = torch.randn(7168, 4096, dtype=torch.bfloat16)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        int4_reference.quantize(w, 32, 4, True, torch.bfloat16)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 0.25 + 7168 * 4096 / 2**30


# ---- choosing and building ----


def fresh(code, **environment):
    """Run code in a new process that has these environment variables; its stdout and stderr."""
    code = "import torch\nfrom minichat import kernels\n" + code
    environment = {**os.environ, "MINICHAT_KERNEL": "", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def rebuilt(monkeypatch, **environment):
    """Forget the kernel that is loaded, for one test, and set environment variables."""
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(cpu, "_build_and_load", cpu.functools.cache(cpu._build_and_load.__wrapped__))


def test_the_environment_takes_the_reference(monkeypatch):
    monkeypatch.setenv("MINICHAT_KERNEL", "reference")
    assert kernels.for_device(torch.device("cpu")) is reference
    monkeypatch.setenv("MINICHAT_KERNEL", "fast")
    with pytest.raises(BadInput, match="MINICHAT_KERNEL is 'fast'"):
        kernels.for_device(torch.device("cpu"))


def test_other_devices_take_a_kernel_that_runs_there():
    assert kernels.for_device(torch.device("meta")) is reference


@pytest.mark.parametrize(
    "environment, why",
    [
        ({"CXX": "", "PATH": "/nonexistent"}, "no C++ compiler among"),
        ({"CXX": "/nonexistent/g++"}, "/nonexistent/g++"),
        ({"CXX": "false"}, "false"),
        ({"CXX": "sh -c 'echo no tools >&2; exit 1'"}, "no tools"),
        ({"MINICHAT_CACHE": "/dev/null/cache"}, "/dev/null"),
    ],
)
def test_no_compiler_means_the_reference_and_one_warning(monkeypatch, tmp_path, capfd, environment, why):
    if "CXX" not in environment and cpu.shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    rebuilt(monkeypatch, **{"MINICHAT_CACHE": tmp_path, "CXX": "", **environment})
    for _ in range(3):
        assert kernels.for_device(torch.device("cpu")) is reference
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("minichat: no C++ kernel") and why in said[0]
    packed = cpu.pack(*random_weight(3, 32, 32, 4, True))
    with pytest.raises(BadInput, match="load the model again"):
        cpu.matmul(torch.randn(1, 32), packed)


def test_without_a_home_the_reference_runs_and_says_what_to_set(monkeypatch, capfd):
    def nobody(user):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "MINICHAT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    rebuilt(monkeypatch)
    for _ in range(3):
        assert kernels.for_device(torch.device("cpu")) is reference
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "set MINICHAT_CACHE to a folder" in said[0]


@pytest.mark.parametrize("environment", [{"PATH": "/nonexistent"}, {"CXX": "false"}])
def test_what_was_compiled_runs_where_no_compiler_is(compiled, monkeypatch, tmp_path, capfd, environment):
    """As in a container that was built in stages; but not what was compiled from another source."""
    shutil.copy(cpu._build(), tmp_path)
    rebuilt(monkeypatch, **{"MINICHAT_CACHE": tmp_path, "CXX": "", **environment})
    assert kernels.for_device(torch.device("cpu")) is cpu
    assert capfd.readouterr().err == ""
    other = tmp_path / "step_cpu.cpp"
    other.write_bytes(cpu.SOURCES[1].read_bytes() + b"// changed")
    monkeypatch.setattr(cpu, "SOURCES", [cpu.SOURCES[0], other])
    rebuilt(monkeypatch)
    assert kernels.for_device(torch.device("cpu")) is reference
    assert len(capfd.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"\x7fELF and no more"])
def test_a_library_that_was_cut_is_built_again(compiled, monkeypatch, tmp_path, capfd, content):
    whole = cpu._build()
    (tmp_path / whole.name).write_bytes(content)
    made = iter([tmp_path / whole.name, whole])
    monkeypatch.setattr(cpu, "_build", lambda anew=False: next(made))
    rebuilt(monkeypatch)
    assert kernels.for_device(torch.device("cpu")) is cpu
    assert capfd.readouterr().err == ""


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path, capfd):
    (tmp_path / "file").touch()
    rebuilt(monkeypatch, MINICHAT_CACHE=tmp_path / "file" / "below")
    assert kernels.for_device(torch.device("cpu")) is reference
    said = capfd.readouterr().err.splitlines()[-1]
    assert str(tmp_path) in said and "MINICHAT_CACHE" in said and "CXX" not in said


def test_another_compiler_or_other_options_are_another_library():
    makers = [(["g++"], "12"), (["g++"], "13"), (["g++", "-DA"], "12"), (["g++", "-DA", "-DB"], "12")]
    assert len({cpu._made_by(*each) for each in makers}) == 4
    assert cpu._made_by(["g++"], "12") == cpu._made_by(["/usr/bin/g++"], "12")


def test_what_does_not_compile_means_the_reference(compiled, monkeypatch, tmp_path, capfd):
    broken = tmp_path / "int4_cpu.cpp"
    broken.write_text("int matmul( {")
    whole = tmp_path / "whole.cpp"
    whole.write_text("")
    monkeypatch.setattr(cpu, "SOURCES", [whole, broken])
    rebuilt(monkeypatch, MINICHAT_CACHE=tmp_path / "cache")
    assert kernels.for_device(torch.device("cpu")) is reference
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and "compiling" in said[0] and "error" in said[1]
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_compiles_once(compiled, tmp_path):
    """Two processes at once, and then a third; of the little that compiles in seconds."""
    code = "from minichat.kernels import cpu\ncpu.FLAGS[0] = '-O0'\ncpu.FLAGS.append('-DPORTABLE_ONLY')\n"
    code += "print(kernels.for_device(torch.device('cpu')).__name__)"
    run = [sys.executable, "-c", "import torch\nfrom minichat import kernels\n" + code]
    environment = {**os.environ, "MINICHAT_KERNEL": "", "MINICHAT_CACHE": str(tmp_path / "deep" / "cache")}
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    both = [subprocess.Popen(run, **options) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert all(out == "minichat.kernels.cpu\n" for out, _ in said)
    assert any(err == f"minichat: compiling kernels/*_cpu.cpp (once, into {tmp_path}/deep/cache)\n" for _, err in said)
    assert len(list((tmp_path / "deep" / "cache").iterdir())) == 1
    assert fresh(code, MINICHAT_CACHE=str(tmp_path / "deep" / "cache")) == ("minichat.kernels.cpu\n", "")


def test_imports_compile_nothing(tmp_path):
    assert fresh("import minichat.int4", MINICHAT_CACHE=str(tmp_path / "cache"), CXX="/nonexistent") == ("", "")
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_one_openmp_runtime_serves_torch_and_the_kernel(compiled):
    code = """if True:
        import os
        torch.set_num_threads(2)
        kernel = kernels.for_device(torch.device("cpu"))
        # too small for torch to use threads
        packed = kernel.pack(torch.zeros(64, 64, dtype=torch.uint8), torch.ones(64, 2), None, 4)
        count = lambda: len(os.listdir("/proc/self/task"))
        print(count())
        kernel.matmul(torch.randn(1, 64), packed)
        print(count())
        torch.randn(1 << 20).exp()
        print(count(), len(kernel.openmp_runtimes()))
    """
    before, kernel, torch_too, runtimes = map(int, fresh(code)[0].split())
    assert (kernel, torch_too, runtimes) == (before + 1, before + 1, 1)


def test_a_forked_process_computes_the_same(compiled):
    """OpenMP's threads do not come along; a child that waited for them would never end."""
    code = """if True:
        import os
        torch.set_num_threads(2)
        kernel = kernels.for_device(torch.device("cpu"))
        packed = kernel.pack(torch.arange(64 * 64).view(64, 64).to(torch.uint8) & 15, torch.ones(64, 2), None, 4)
        x = torch.randn(5, 64)
        y = kernel.matmul(x, packed)
        if os.fork() == 0:
            os._exit(0 if torch.equal(kernel.matmul(x, packed), y) else 1)
        print(os.waitstatus_to_exitcode(os.wait()[1]))
    """
    assert fresh(code)[0] == "0\n"


SANITIZED = """if True:
    import sys
    sys.path.insert(0, "tests")
    from minichat import fused
    from minichat.cache import KVCache
    from minichat.kernels import cpu
    from test_fused import make
    from test_kernels import random_weight

    best = cpu.isa()
    for isa in range(best + 1):
        cpu.isa = lambda: isa
        for N, K, G, bits, symmetric in ((1, 32, 32, 4, True), (37, 192, 96, 4, False), (50, 320, 64, 8, False)):
            packed = cpu.pack(*random_weight(N, K, G, bits, symmetric))
            cpu.unpack(packed)
            for dtype in (torch.float32, torch.bfloat16):
                cpu.dequantize(packed, dtype)
                cpu.quantize(torch.randn(N, K).to(dtype), G, bits, symmetric, torch.bfloat16)
                for M in (1, 7, 19):
                    for exact in (True, False):
                        for size in (1, 1e-44, float("nan")):
                            cpu.matmul(torch.randn(M, K).to(dtype) * size, packed, exact)
        for Hd, kind, exact in (
            (32, torch.bfloat16, False), (32, torch.int8, True), (64, torch.int8, False), (32, torch.float32, True)
        ):
            model = make(5, 1, Hd, window=None if exact else 5, exact=exact)
            step = fused.CpuStep(model, KVCache(model.config, 2, 43, torch.device("cpu"), kind))
            with torch.inference_mode():
                for first, last in ((0, 4), (4, 5), (5, 38), (38, 39), (39, 42)):
                    if last == 42:
                        model.model.layers[0].input_layernorm.weight.fill_(float("nan"))
                    step(torch.ones(2, last - first, dtype=torch.int64), torch.arange(first, last).repeat(2, 1))
    print("clean", best)
"""


@pytest.mark.skipif(os.environ.get("MINICHAT_SANITIZE") != "1", reason="takes three minutes: MINICHAT_SANITIZE=1")
def test_sanitizers_find_nothing(compiled, tmp_path):
    """Every function under AddressSanitizer, which sees torch's memory too, and UndefinedBehaviorSanitizer."""
    asan = subprocess.run(
        [*cpu._compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    build = (
        "from minichat.kernels import cpu\ncpu.FLAGS += ['-fsanitize=address,undefined', '-fno-sanitize-recover=all']\n"
    )
    environment = {"LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0", "MINICHAT_CACHE": str(tmp_path)}
    out, err = fresh(build + SANITIZED, **environment)
    assert out.startswith("clean"), err[-3000:]


def test_builds_without_any_vector_extension(compiled, tmp_path):
    """As on ARM: there are no intrinsics."""
    command = [*cpu._compiler(), *cpu.FLAGS, *cpu.LINK, "-DPORTABLE_ONLY", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, *map(str, cpu.SOURCES), "-o", str(tmp_path / "k.so")], check=True)
