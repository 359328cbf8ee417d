"""A 7B in INT4 on the CPU: ours beside llama.cpp and ik_llama.cpp, in one run, in turn.

    python bench/cpu.py --record --scratch DIR --ik FOLDER  # about an hour and 15 GB of disk on 2 cores
    python bench/cpu.py --record --scratch DIR --rest       # 5 minutes: what of a token's time is no INT4 matmul

llama.cpp is built from the source archive that the package index carries with llama-cpp-python; FOLDER holds a built
ik_llama.cpp, which is left out without --ik. The models have Mistral-7B's shape and random weights; theirs are Q4_0
with a Q6_K head (4.5 bits a weight), ours groups of 32 (4.5 bits) or 128 (4.125) with the head in INT8. Each
measurement is a process of its own, and all take turns.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT))
from recording import commit, cpu  # noqa: E402

LLAMA = "0.3.36"  # the release of llama-cpp-python whose llama.cpp is built
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 32, 8, 32000
PREFILLS = (16, 128, 512)
DEPTH = 2048
TOKENS = 32  # of a measurement of decoding
DUELS = 3  # such measurements of everyone, in turn, in a round
ISAS = ("plain C++", "AVX2", "AVX-512 VNNI", "AVX-512 VNNI and BF16")  # minichat.kernels.cpu.isa()
# what a CPU says of itself in /proc/cpuinfo, and llama.cpp's option for it. No AMX: some virtual machines name it and
# stop a program that uses it.
OPTIONS = {
    "avx": "AVX", "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "bmi2": "BMI2", "avx512f": "AVX512",
    "avx512vbmi": "AVX512_VBMI", "avx512_vnni": "AVX512_VNNI", "avx512_bf16": "AVX512_BF16", "avx_vnni": "AVX_VNNI",
}  # fmt: skip


# ---- the peer ----


def build_llama(scratch: Path) -> Path:
    """llama-bench, built for this CPU."""
    binary = scratch / "llama-build" / "bin" / "llama-bench"
    if binary.exists():
        return binary
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(scratch)]
    subprocess.run([*pip, f"llama-cpp-python=={LLAMA}"], check=True)
    with tarfile.open(scratch / f"llama_cpp_python-{LLAMA}.tar.gz") as archive:
        archive.extractall(scratch, filter="data")
    flags = Path("/proc/cpuinfo").read_text().split("flags")[1].split("\n")[0].split()
    options = [f"-DGGML_{option}={'ON' if flag in flags else 'OFF'}" for flag, option in OPTIONS.items()]
    options += ["-DGGML_NATIVE=OFF", "-DLLAMA_CURL=OFF", "-DBUILD_SHARED_LIBS=OFF", "-DCMAKE_BUILD_TYPE=Release"]
    options += [f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "SERVER", "EXAMPLES")]
    source, build = scratch / f"llama_cpp_python-{LLAMA}" / "vendor" / "llama.cpp", scratch / "llama-build"
    subprocess.run(["cmake", "-S", str(source), "-B", str(build), *options], check=True, stdout=subprocess.DEVNULL)
    command = ["cmake", "--build", str(build), "--target", "llama-bench", "-j", str(os.cpu_count())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return binary


def make_gguf(file: Path) -> None:
    """The model as llama.cpp's own quantiser would leave it: Q4_0, the head Q6_K, the norms in fp32."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(32768)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")
    rng = np.random.default_rng(0)

    def random(N: int, K: int, block: int, size: int, scale_at: int, scale: float):
        """Rows of blocks of `size` bytes, random but for the fp16 scale."""
        rows = rng.integers(0, 256, (N, K // block, size), dtype=np.uint8)
        scales = (rng.uniform(0.5, 1.5, (N, K // block, 1)) * scale).astype(np.float16)
        rows[..., scale_at : scale_at + 2] = scales.view(np.uint8)
        return rows.reshape(N, -1)

    names = gguf.GGMLQuantizationType
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv, HIDDEN),
        "attn_v": (kv, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
    }
    shapes |= {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
    matrices = {"token_embd": (VOCAB, HIDDEN)}
    matrices |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}
    for name, (N, K) in matrices.items():
        writer.add_tensor_info(f"{name}.weight", (N, K // 32 * 18), np.dtype(np.uint8), N * K // 32 * 18, names.Q4_0)
    head = HIDDEN // 256 * 210
    writer.add_tensor_info("output.weight", (VOCAB, head), np.dtype(np.uint8), VOCAB * head, names.Q6_K)
    norms = ["output_norm", *(f"blk.{i}.{name}" for i in range(LAYERS) for name in ("attn_norm", "ffn_norm"))]
    for name in norms:
        writer.add_tensor_info(f"{name}.weight", (HIDDEN,), np.dtype(np.float32), HIDDEN * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for N, K in matrices.values():
        writer.write_tensor_data(random(N, K, 32, 18, 0, 0.004))
    writer.write_tensor_data(random(VOCAB, HIDDEN, 256, 210, 208, 0.0001))
    for _ in norms:
        writer.write_tensor_data(np.ones(HIDDEN, np.float32))
    writer.close()


def measure_llama(binary: Path, model: Path, threads: int, decode: bool, depth: int = 0, flags: tuple = ()) -> dict:
    """Tokens/s of decoding (at a depth), or of prompts, and the process's peak of resident memory, GB."""
    prompts = ",".join(map(str, PREFILLS if threads > 1 else PREFILLS[1:2]))
    command = [str(binary), "-m", str(model), "-t", str(threads), "-r", "1", "-o", "json"]
    command += ["-p", "0", "-n", str(TOKENS)] if decode else ["-p", prompts, "-n", "0"]
    command += ["-d", str(depth)] if depth else []  # ik_llama.cpp does not know it
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    rows = json.loads(process.stdout.read() or "[]")
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{binary} ended with status {status}")
    found = {f"prefill_{row['n_prompt']}" if row["n_prompt"] else "decode": row["avg_ts"] for row in rows}
    return {**found, "peak_gb": usage.ru_maxrss * 1024 / 1e9, "build": rows[0]["build_commit"]}


def measure_ik(binary: Path, model: Path, threads: int, decode: bool) -> dict:
    """ik_llama.cpp's. Prompts by both of its layouts, and the faster one counts: which it is differs."""
    found = measure_llama(binary, model, threads, decode, flags=("-rtr", "1"))
    if decode:
        return found
    plain = measure_llama(binary, model, threads, decode, flags=("-rtr", "0"))
    rates = {
        f"{name}_rtr_{i}": each[name] for i, each in enumerate((plain, found)) for name in each if "prefill" in name
    }
    return {**found, **{name: max(found[name], plain[name]) for name in found if "prefill" in name}, **rates}


# ---- the limit ----

READER = r"""// Reads 1 GB with all threads, 5 times by each of 5 ways of prefetching; prints the best median, GB/s.
#include <omp.h>
#include <sys/mman.h>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
int main(int, char** argv) {
    const int64_t size = 1 << 30;
    auto* memory = static_cast<uint64_t*>(aligned_alloc(1 << 21, size));
    madvise(memory, size, MADV_HUGEPAGE);
    memset(memory, 1, size);
    omp_set_num_threads(atoi(argv[1]));
    double rates[5][5], best = 0;
    uint64_t all = 0;
    for (int pass = 0; pass < 25; pass++) {
        const int64_t way = pass % 5, ahead = way * 128;  // 0 .. 3 KiB, and as int4_cpu.cpp does it
        const double start = omp_get_wtime();
        #pragma omp parallel for schedule(static) reduction(^ : all)
        for (int64_t i = 0; i < size / 8; i += 32) {
            for (int64_t line = 0; line < 32; line += 8) {
                if (way < 4) __builtin_prefetch(memory + i + line + ahead);
                if (way == 4) __builtin_prefetch(memory + i + line + 2048, 0, 2);
                if (way == 4) __builtin_prefetch(memory + i + line + 512, 0, 0);
            }
            for (int64_t j = 0; j < 32; j++) all ^= memory[i + j];
        }
        rates[way][pass / 5] = size / (omp_get_wtime() - start) / 1e9;
    }
    for (auto& rate : rates) {
        std::sort(rate, rate + 5);
        best = std::max(best, rate[2]);
    }
    printf("%.2f\n", best + (all == 1));
}
"""


def build_reader(scratch: Path) -> None:
    (scratch / "read.cpp").write_text(READER)
    command = ["g++", "-O3", "-march=native", "-fopenmp", str(scratch / "read.cpp"), "-o", str(scratch / "read")]
    subprocess.run(command, check=True)


# ---- ours ----


def make_ours(folder: Path, group: int) -> None:
    """The same shape in compressed-tensors' format, from random codes."""
    import torch
    from minichat.kernels.int4_reference import Packed
    from torch import nn

    import minichat
    from minichat import int4
    from minichat.assets import sums
    from minichat.model import Config, without_weights
    from minichat.tokenizer import Tokenizer

    tokenizer = folder.parent / "tokenizer"
    if not tokenizer.exists():
        tokenizer.mkdir()
        sums.train_tokenizer(tokenizer)
    kv = HIDDEN // HEADS
    model = without_weights(Config(VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, kv, 4096, 32768, rms_norm_eps=1e-5))
    model.scheme = int4.Scheme(group_size=group)
    generator = torch.Generator().manual_seed(0)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            N, K = module.out_features, module.in_features
            codes = torch.randint(-(2**62), 2**62, (N, K // 16), generator=generator).view(torch.int32)
            scale = ((torch.rand(N, K // group, generator=generator) + 0.5) * 0.004).bfloat16()
            parent, _, leaf = name.rpartition(".")
            packed = Packed(codes, scale, None, N, K, group, 4)
            setattr(model.get_submodule(parent), leaf, int4.Int4Linear(packed, "int4_reference"))
        elif hasattr(module, "weight"):
            shape = module.weight.shape
            drawn = torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.02, generator=generator)
            module.weight = nn.Parameter(drawn.bfloat16())
    minichat.save(model, Tokenizer(tokenizer), folder)


def work(folder: Path, what: str, threads: int, scratch: Path) -> dict:
    """One measurement in this process, over a folder that was opened before, so that the cache has it."""
    import torch

    start = time.perf_counter()
    from minichat import device, fused, int4, packed
    from minichat.cache import KVCache
    from minichat.generation import Sampling, decode

    torch.set_num_threads(threads)
    model, _ = packed.load_model(str(folder), "cpu", None, True)
    int4.set_exact(model, not what.startswith("int8"))
    found = {"load_seconds": time.perf_counter() - start}
    generator = torch.Generator().manual_seed(1)

    def run(prompts: int, length: int, new: int) -> tuple[float, float]:
        """Prompt tokens/s, and new tokens/s of all rows."""
        ids = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for _ in range(prompts)]
        start = time.perf_counter()
        times = [time.perf_counter() - start for _ in decode(model, ids, new + 1, Sampling(), ())]
        return prompts * length / times[0], prompts * new / max(1e-9, times[-1] - times[0])

    def at(depth: int, new: int) -> float:
        """New tokens/s over a cache that holds `depth` tokens, here random ones."""
        with torch.inference_mode():
            cache = KVCache(model.config, 1, depth + new + 1, model.device, torch.bfloat16)
            for tensor in (*cache.k, *cache.v):
                tensor.normal_(generator=generator)
            cache.filled = depth
            cache.columns += depth
            cache.positions[:, :depth] = torch.arange(depth)
            step, ids = fused.decoder(model, cache), torch.tensor([[5]])
            for i in range(new + 1):
                if i == 1:
                    start = time.perf_counter()
                ids = model.lm_head(step(ids, torch.tensor([[depth + i]])))[:, -1].argmax(-1, keepdim=True)
            return new / (time.perf_counter() - start)

    if what == "memory":
        rates = run(1, DEPTH - 64, 63)
        return {"peak_gb": device.peak_memory_gib(model.device) * 2**30 / 1e9, "prefill_1984": rates[0]}
    if what.endswith("speculate"):
        return speculation(model)
    if what == "rest":
        shares, small = {}, int4.Int4Linear.from_weight(model.lm_head.dequantize(), int4.Scheme())
        for name, depth, int8, head in (  # as it is; with cache and activations in bytes; and with a head in INT4
            (512, 512, False, None), (4096, 4096, False, None), ("512_int8", 512, True, None),
            ("4096_int8", 4096, True, None), ("512_int8_int4_head", 512, True, small),
            ("4096_int8_int4_head", 4096, True, small),
        ):  # fmt: skip
            model.lm_head = model.lm_head if head is None else head
            int4.set_exact(model, not int8)
            kv = torch.int8 if int8 else torch.bfloat16
            shares[f"rest_at_{name}"], shares[f"head_at_{name}"] = rest(model, depth, kv)
        return shares

    run(1, 4, 2)
    if what.endswith("decode"):
        found["decode"] = run(1, 4, TOKENS)[1]
        # afterwards: what it leaves for the system to tidy up would cost a tenth of the decoding
        read = subprocess.run([scratch / "read", str(threads)], capture_output=True, check=True)
        found["read_gb_per_s"] = float(read.stdout)
        weights = [m for m in model.modules() if isinstance(m, int4.Int4Linear)]
        found["gb_per_token"] = sum(b.nbytes for module in weights for b in module.buffers(recurse=False)) / 1e9
        found["bandwidth_share"] = found["decode"] * found["gb_per_token"] / found["read_gb_per_s"]
        return found
    for length in PREFILLS if threads > 1 else PREFILLS[1:2]:
        found[f"prefill_{length}"] = run(1, length, 1)[0]
    if threads > 1:
        found["batch_ratio"] = statistics.median(run(8, 4, 16)[1] / run(1, 4, 16)[1] for _ in range(3))
        pairs = [(at(0, 16), at(DEPTH, 16)) for _ in range(3)]
        found["depth_ratio"] = statistics.median(b / a for a, b in pairs)
        found[f"decode_at_{DEPTH}"] = pairs[-1][1]
    return found


def rest(model, depth: int, kv) -> list[float]:
    """Shares of a token's time: of the same loop with linears of no rows and no head, and of the head. The first
    lacks SwiGLU and its rounding to integers, which have no rows then: 14,336 numbers a layer."""
    import torch

    from minichat import fused
    from minichat.cache import KVCache
    from minichat.generation import Sampling, sample

    @torch.inference_mode()
    def loop(empty: bool):
        cache = KVCache(model.config, 1, 4096, model.device, kv)
        for tensor in (*cache.k, *cache.v):
            tensor.random_(-127, 128) if kv == torch.int8 else tensor.normal_()
        for scale in (scale for pair in cache.scales for scale in pair):
            scale.fill_(2 / 127)
        cache.filled = depth - 32
        cache.columns += depth - 32
        cache.positions[:, : depth - 32] = torch.arange(depth - 32)
        step, logits, ids = fused.decoder(model, cache), torch.randn(1, VOCAB), torch.tensor([5])
        if empty:  # once in whole: what no matmul writes afterwards would be anything, and slow if it is denormal
            step(ids[:, None], torch.tensor([[cache.filled]]))
        for layer in step.step.layers[: model.config.num_hidden_layers] if empty else ():
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                getattr(layer, name).N = 0
        while True:
            start = time.perf_counter()
            hidden = step(ids[:, None], torch.tensor([[cache.filled]]))
            before_head = time.perf_counter()
            logits = logits if empty else model.lm_head(hidden)[:, -1]
            head = time.perf_counter() - before_head
            ids = sample(logits, Sampling(), None, None)
            yield time.perf_counter() - start, head

    empty, whole = loop(True), loop(False)
    times = [(next(empty)[0], *next(whole)) for _ in range(34)][2:]
    return [statistics.median(part) for part in zip(*((rest / whole, head / whole) for rest, whole, head in times))]


def speculation(model) -> dict:
    """Tokens/s with drafts over those without, in turn. What the model says is told to it, at the cost of its own
    words: an edit of a source file (each 40th piece is another one), and the next words of prose and of code that is
    not a copy of anything, where drafts are mostly wrong."""
    import re

    from torch import nn

    from minichat import fused, generation

    decoder, ids, positions = fused.decoder, {}, []

    class Watched(fused.CpuStep):
        def __call__(self, ids, at):
            positions[:] = at[0].tolist()
            return super().__call__(ids, at)

    class Told(nn.Module):
        def __init__(self, head, text: list[int]):
            super().__init__()
            self.head, self.text = head, text

        def forward(self, hidden):
            logits = self.head(hidden)
            rows = logits.view(-1, VOCAB)
            for row, at in zip(rows, positions[-len(rows) :]):
                row[self.text[at + 1]] = 1e9
            return logits

    def gain(prompt: list[int], text: list[int]) -> float:
        """Both say the text, 8 tokens of the one and 8 of the other in turn: the machine's speed changes."""
        head, model.lm_head = model.lm_head, Told(model.lm_head, prompt + text)
        how = len(text), generation.Sampling(), ()
        both = [generation.decode(model, [prompt], *how, speculate) for speculate in (True, False)]
        said, seconds = [next(steps) for steps in both], [0.0, 0.0]
        while len(said[1]) < len(text):
            for i, steps in enumerate(both):
                start = time.perf_counter()
                said[i] += [token for [token] in itertools.islice(steps, 8)]
                seconds[i] += time.perf_counter() - start
        model.lm_head = head
        if said != [text, text]:
            raise SystemExit("drafts changed the text")
        return seconds[1] / seconds[0]

    def pieces(file: str) -> list[int]:
        found = re.findall(r"\s*(?:\w+|[^\w\s])", (ROOT / file).read_text())
        return [3 + ids.setdefault(piece, len(ids)) for piece in found]

    code, prose = pieces("minichat/model.py"), pieces("LICENSE")
    edited = [VOCAB - 1 - i if i % 40 == 39 else id for i, id in enumerate(code[:96])]
    texts = {"edit": (code[:200], edited), "code": (code[:200], code[200:296]), "prose": (prose[:200], prose[200:296])}
    fused.decoder = Watched
    gains = {name: [gain(*text) for _ in range(3)] for name, text in texts.items()}
    fused.decoder = decoder
    return {name: spread(ratios) for name, ratios in gains.items()}


def transformers_bf16(threads: int) -> dict:
    """transformers' Mistral in bf16, where 14.5 GB fit: 16 tokens read, and 8 more one by one."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    free = next(int(x.split()[1]) for x in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in x)
    if free < 17e6:
        return {}
    torch.set_num_threads(threads)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, sliding_window=4096, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = MistralForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    drawn = torch.empty(1 << 20, dtype=torch.bfloat16).normal_(0, 0.02)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = drawn.repeat(-(-tensor.numel() // len(drawn)))[: tensor.numel()].view(tensor.shape)
    times, cache, ids = [], None, torch.randint(3, VOCAB, (1, 16))
    with torch.inference_mode():
        for _ in range(10):
            start = time.perf_counter()
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - start)
    return {"prefill_16": 16 / times[0], "decode": 1 / statistics.median(times[2:])}


def torch_int4(threads: int) -> dict:
    """torch's own INT4 matmul, groups of 128: the linears of a token alone, by 8 layers of them."""
    import torch

    torch.set_num_threads(threads)
    qkv = HIDDEN + 2 * HIDDEN // HEADS * KV_HEADS
    weights = []
    for N, K in [(qkv, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)] * 8:
        codes = torch.randint(0, 16, (N, K), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        scales = torch.rand(K // 128, N, 2).bfloat16() / 100
        weights.append((K, packed, scales))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for K, packed, scales in weights:
            torch.ops.aten._weight_int4pack_mm_for_cpu(torch.ones(1, K, dtype=torch.bfloat16), packed, 128, scales)
        seconds.append((time.perf_counter() - start) * LAYERS / 8)
    return {"decode": 1 / statistics.median(seconds)}


def measure(folder: Path, what: str, threads: int, cache: Path) -> dict:
    command = [sys.executable, __file__, "--work", what, "--model", str(folder), "--threads", str(threads)]
    command += ["--scratch", str(cache.parent)]
    environment = {**os.environ, "MINICHAT_CACHE": str(cache), "OMP_NUM_THREADS": str(threads)}
    environment.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # no AMX for torch either
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---- the run ----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scratch", type=Path, required=True, help="where builds and models are kept, to use them again"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ik", type=Path, help="a built ik_llama.cpp: the folder that holds llama-bench")
    parser.add_argument("--rest", action="store_true", help="no peers: what of a token's time is no INT4 matmul")
    parser.add_argument("--record", action="store_true", help="write bench/results/cpu.json, of --rest cpu-rest.json")
    parser.add_argument("--name", default="", help="of the machine, after cpu and cpu-rest: --name=-avx2")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        peers = {"torch": torch_int4, "transformers": transformers_bf16}
        peer = peers.get(args.work)
        print(json.dumps(peer(args.threads) if peer else work(args.model, args.work, args.threads, args.scratch)))
        return
    if args.rest and args.ik:
        parser.error("--rest has no peers: leave --ik out")
    scratch, cache = args.scratch, args.scratch / "cache"
    scratch.mkdir(parents=True, exist_ok=True)
    build_reader(scratch)
    for group in (32,) if args.rest else (32, 128):
        folder = scratch / f"int4-g{group}"
        if not (folder / "config.json").exists():
            make_ours(folder, group)
        measure(folder, "decode", 2, cache)  # the first start writes the cache
    if args.rest:
        return rest_of_a_token(scratch / "int4-g32", cache, args)
    binary, gguf = build_llama(scratch), scratch / "7b-q4_0.gguf"
    if not gguf.exists():
        make_gguf(scratch / "writing.gguf")
        (scratch / "writing.gguf").rename(gguf)
    ik = args.ik and args.ik / "llama-bench"

    parts = {
        "prompts, batch, depth": {
            "llama": lambda threads: measure_llama(binary, gguf, threads, decode=False),
            "g32_int8": lambda threads: measure(scratch / "int4-g32", "int8", threads, cache),
            "ik": lambda threads: measure_ik(ik, gguf, threads, decode=False),
            "g32": lambda threads: measure(scratch / "int4-g32", "exact", threads, cache),
        },
        "decode": {
            "llama": lambda threads: measure_llama(binary, gguf, threads, decode=True),
            "g32_int8": lambda threads: measure(scratch / "int4-g32", "int8-decode", threads, cache),
            "ik": lambda threads: measure_ik(ik, gguf, threads, decode=True),
            "g32": lambda threads: measure(scratch / "int4-g32", "exact-decode", threads, cache),
            "g128": lambda threads: measure(scratch / "int4-g128", "exact-decode", threads, cache),
            "g128_int8": lambda threads: measure(scratch / "int4-g128", "int8-decode", threads, cache),
            "torch": lambda threads: measure(scratch, "torch", threads, cache),
        },
    }
    rounds = []
    for i, threads in [(1, 2), (1, 1), *((i, 2) for i in range(2, args.rounds + 1))]:
        for part in ["prompts, batch, depth", *["decode"] * (DUELS if threads > 1 else 1)]:
            found = {"round": i, "threads": threads, "part": part}
            kinds = [kind for kind in parts[part] if kind != "ik" or ik]
            turns = sum((one["part"], one["threads"]) == (part, threads) for one in rounds)
            for kind in reversed(kinds) if turns % 2 else kinds:  # a drift favours each of them in turn
                found[kind] = parts[part][kind](threads)
                shown = ", ".join(f"{name} {value:.2f}" for name, value in found[kind].items() if name != "build")
                print(f"round {i}, {threads} threads, {part}, {kind:9}: {shown}", flush=True)
            rounds.append(found)
    deep = measure_llama(binary, gguf, 2, decode=True, depth=DEPTH)  # once: its prompt takes minutes
    print(f"llama.cpp at a depth of {DEPTH}: {deep}")
    bf16 = measure(scratch, "transformers", 2, cache)
    print(f"transformers in bf16: {bf16}")
    memory = measure(scratch / "int4-g32", "memory", 2, cache)
    print(f"{DEPTH} tokens: {memory}")
    speculate = {
        **{f"speculate_{name}": found for name, found in measure(scratch / "int4-g32", "speculate", 2, cache).items()},
        **{f"int8_speculate_{name}": found
           for name, found in measure(scratch / "int4-g32", "int8-speculate", 2, cache).items()},
    }  # fmt: skip
    print(f"speculation: {speculate}")

    def figures(kind: str, name: str) -> list[float]:
        """Those of the rounds with two threads that have it."""
        return [found[kind][name] for found in rounds if found["threads"] == 2 and name in found.get(kind, {})]

    def ratio(ours: str, name: str, peer: str = "llama") -> dict:
        return spread([mine / theirs for mine, theirs in zip(figures(ours, name), figures(peer, name), strict=True)])

    ratios = {
        "decode_g32": ratio("g32_int8", "decode"),
        "decode_g128": ratio("g128_int8", "decode"),
        "exact_decode": ratio("g32", "decode"),
        "exact_decode_g128": ratio("g128", "decode"),
        "prefill_16": ratio("g32_int8", "prefill_16"),
        "prefill_128": ratio("g32_int8", "prefill_128"),
        "prefill_512": ratio("g32_int8", "prefill_512"),
        "exact_prefill_128": ratio("g32", "prefill_128"),
        "exact_prefill_512": ratio("g32", "prefill_512"),
        "bandwidth_share": spread(figures("g32_int8", "bandwidth_share")),
        "exact_bandwidth_share": spread(figures("g32", "bandwidth_share")),
        "batch8": spread(figures("g32_int8", "batch_ratio")),
        "exact_batch8": spread(figures("g32", "batch_ratio")),
        "depth2048": spread(figures("g32", "depth_ratio")),
        "peak_gb": memory["peak_gb"],
        **speculate,
    }
    if args.ik:
        ratios |= {
            "ik_decode_g32": ratio("g32_int8", "decode", "ik"),
            "ik_exact_decode": ratio("g32", "decode", "ik"),
            "ik_prefill_128": ratio("g32_int8", "prefill_128", "ik"),
            "ik_prefill_512": ratio("g32_int8", "prefill_512", "ik"),
            "ik_exact_prefill_128": ratio("g32", "prefill_128", "ik"),
            "ik_exact_prefill_512": ratio("g32", "prefill_512", "ik"),
        }
    for name, value in ratios.items():
        print(f"{name}: {value}")
    if args.record:
        versions = {"llama-cpp-python": LLAMA, **({"ik_llama.cpp": rounds[0]["ik"]["build"]} if args.ik else {})}
        once = {f"llama_at_{DEPTH}": deep, "memory": memory, "transformers_bf16": bf16}
        model = "llama.cpp Q4_0 with a Q6_K head, ours INT4 with an INT8 head"
        found = {"rounds": rounds, **once, "ratios": ratios}
        flags = f" --rounds {args.rounds}" * (args.rounds != 3) + " --ik FOLDER" * bool(args.ik)
        record(f"cpu{args.name}", flags, model, versions, found)


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def rest_of_a_token(folder: Path, cache: Path, args: argparse.Namespace) -> None:
    rounds = []
    for i in range(1, args.rounds + 1):
        rounds.append(measure(folder, "rest", 2, cache))
        print(f"round {i}: {', '.join(f'{name} {value:.4f}' for name, value in rounds[-1].items())}", flush=True)
    ratios = {name: spread([found[name] for found in rounds]) for name in rounds[0]}
    if args.record:
        flags = f" --rest --rounds {args.rounds}"
        found = {"rounds": rounds, "ratios": ratios}
        record(f"cpu-rest{args.name}", flags, "INT4 with a head in INT8 or INT4", {}, found)


def record(name: str, flags: str, model: str, versions: dict, content: dict) -> None:
    """bench/results/NAME.json: the machine, what made it, and the content."""
    import torch

    from minichat.kernels.cpu import isa

    content = {
        "command": f"python bench/cpu.py --record --scratch DIR{flags}",
        "commit": commit(),
        "machine": f"{cpu()}, {os.cpu_count()} cores, {ISAS[isa()]}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
        "model": f"Mistral-7B's shape, random weights; {model}",
        **content,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
