"""What minichat does in lazy mode, counted on the emulated HPU: graphs, waits, memory; and what the report finds.

    python bench/lazy.py                   # all rows: about 15 minutes on 2 cores
    python bench/lazy.py --only decode     # those whose names begin so
    python bench/lazy.py --record          # also into bench/results/lazy.json; with --only, beside what is there

Each row is a process of its own. A tiny model computes, and has to give what the plain CPU gives, bit for bit; the 7B
of 32 layers is shapes alone, and has to stay below 2 GB. The mutants are this checkout with one classic mistake put
back: the report has to name it with its line. Exit code 1 if a row is out of bounds.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from recording import commit, cpu  # noqa: E402

SEVEN_B = dict(
    architectures=["MistralForCausalLM"], vocab_size=32000, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, sliding_window=4096,
    max_position_embeddings=32768, rms_norm_eps=1e-5,
)  # fmt: skip
SIZES = [20, 150, 300]  # tokens of what trains, in turn: three buckets

# name: file, what is there, the mistake in its place, the work that shows it, what the report says, and the line of
# the file that it names, where that is another
MUTANTS = {
    "slicing by a Python number": (
        "cache.py", "ring.index_copy_(2, self._write, new[:, :, T - self._kept :])",
        "ring[:, :, self.filled % self.slots] = new[:, :, -1]", "decode", "replays of an HPU graph keep", None,
    ),
    "a value read in the loop": (
        "training.py", "sums[key] = sums[key] + value.detach() if key in sums else value.detach()",
        "sums[key] = sums.get(key, 0) + value.item()", "train", "aten._local_scalar_dense", None,
    ),
    "a boolean mask": (
        "training.py", '{"loss": -(logps * tensors["weights"]).sum()}',
        '{"loss": -logps[tensors["weights"] > 0].sum()}', "train", "a boolean mask", None,
    ),
    "a learning rate as a number": (
        "optim.py", "torch._foreach_mul_(update, rate)", "torch._foreach_mul_(update, lr)", "train",
        "a number is a part of the graph", None,
    ),
    "a last batch that is not padded": (
        "training.py", "full + [[]] * (settings.batch_size - len(rows)) if pad_to else full",
        "full", "train", "a shape is a part of the graph", ("model.py", "x = self.embed_tokens(ids)"),
    ),
    "multinomial": (
        "generation.py", "return (logits - torch.log(-torch.log(uniform))).argmax(dim=-1)",
        "return torch.multinomial(logits.softmax(-1), 1)[:, 0]", "decode", "aten.multinomial", None,
    ),
    "an int32 first token": (
        "generation.py", "self.token = torch.zeros(rows, dtype=torch.int64, device=where)",
        "self.token = torch.zeros(rows, dtype=torch.int32, device=where)", "decode", "token ids are torch.int32 here",
        ("model.py", "x = self.embed_tokens(ids)"),
    ),
}  # fmt: skip


def emulated(payload: str = "cpu"):
    """The emulated device, and the CPU as if it padded like an HPU, so that both compute the same."""
    import torch

    from minichat import device, lazy

    recorder = lazy.install(payload)
    torch.backends.cuda.enable_flash_sdp(False)  # of the CPU as well: the device has none
    for name in ("bucket", "reach", "rows", "cache_slots", "padding", "tokens_between_syncs"):
        plain = getattr(device, name)
        setattr(device, name, lambda *a, plain=plain: plain(*a[:-1], torch.device("hpu")))
    return recorder


def tiny(where: str, quantise: bool = False, adapt: bool = False):
    import torch

    from minichat import int4, lora
    from minichat.model import Config, Mistral

    torch.manual_seed(0)
    model = Mistral(Config(97, 32, 64, 1, 4, 2, 8, 16, 8192))
    model.init_weights(0)
    if quantise:
        int4.quantize(model)
    model = model.to(where, torch.bfloat16)
    if adapt:
        lora.attach(model, 4, 8)
    return model


def seven_b(quantise: bool = False, adapt: bool = False):
    from minichat import lora, weights

    with tempfile.TemporaryDirectory() as folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "minichat" / "assets" / "base" / name, folder)
        (Path(folder) / "config.json").write_text(json.dumps(SEVEN_B))
        model, _ = weights.load_model(folder, "hpu", int4=quantise)
    if adapt:
        lora.freeze(model)
        lora.attach(model, 16, 16)
        model.model.set_checkpointing("block")
    return model


def items(kind: str, count: int) -> list:
    import torch

    from minichat.examples import Example, Pair

    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, 97, (n,), generator=generator).tolist()  # noqa: E731
    sizes = [SIZES[i % 3] for i in range(count)]
    if kind == "sft":
        return [Example(draw(n), [0] * 10 + [1] * (n - 10)) for n in sizes]
    return [Pair(draw(9), draw(n), draw(12)) for n in sizes]


def fit(model, kind: str, folder: Path, steps: int, log_every: int = 5, eval_every: int = 0, save_every: int = 0,
        resume: bool = False) -> list[dict]:  # fmt: skip
    """The logged lines, but for their times."""
    from minichat import checkpoint, lora, metrics, training

    settings = training.Settings(steps=steps, batch_size=2, accumulate=4, lr=1e-3, warmup=0.1, log_every=log_every,
                                 eval_every=eval_every)  # fmt: skip
    saved = checkpoint.Checkpoints(folder, {}, lambda new: lora.save(model, new / "adapter"), save_every)
    with open(os.devnull, "w") as nowhere, metrics.Metrics(folder, steps, kind, resume) as log:
        sys.stderr, before = nowhere, sys.stderr
        method, evaluated = getattr(training, kind)(), items(kind, 6) if eval_every else None
        training.fit(model, method, items(kind, 47), settings, log, evaluated, saved, resume)
        sys.stderr = before
    kept = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in metrics.read(folder)]
    return kept


# ---- rows: each gives what it found, and the bounds -----------------------------------------------------------------
def decode(size: str, quantise: bool, temperature: float) -> tuple[dict, dict]:
    """20 and 400 tokens: set-up, the prompt's chunk, the first token, decoding."""
    from minichat.generation import Sampling, decode

    recorder = emulated("cpu" if size == "tiny" else "meta")
    model = tiny("hpu", quantise) if size == "tiny" else seven_b(quantise)
    prompts = [[3, 4, 5], [7] * 20] if size == "tiny" else [[5] * 8200]  # past two turns of the window
    found, bounds = {}, {}
    for new in (20, 400):
        recorder.reset()
        sampling = Sampling(temperature, 20 if temperature else 0, seed=1)
        there = list(decode(model, prompts, new, sampling, ()))
        found |= {f"graphs, {new} tokens": len(recorder.graphs), f"waits, {new}": sum(recorder.syncs.values())}
        buckets = 1 if size == "tiny" else 2
        bounds |= {f"graphs, {new} tokens": 1 + buckets + 2, f"waits, {new}": -(-new // 16)}
        if size == "tiny":
            found[f"differs, {new}"] = there != list(decode(tiny("cpu", quantise), prompts, new, sampling, ()))
            bounds[f"differs, {new}"] = False
    return found, bounds


def prompts() -> tuple[dict, dict]:
    from minichat.generation import Sampling, decode

    recorder = emulated()
    model = tiny("hpu")
    model.config.sliding_window = None
    recorder.reset()
    for n in range(1, 4001, 100):
        list(decode(model, [[5] * n], 2, Sampling(), ()))
    return {"graphs": len(recorder.graphs), "waits": sum(recorder.syncs.values())}, {"graphs": 7, "waits": 40}


def train(size: str, kind: str, quantise: bool) -> tuple[dict, dict]:
    """Three lengths, accumulation 4, warm-up and cosine, clipping."""
    recorder = emulated("cpu" if size == "tiny" else "meta")
    model = tiny("hpu", quantise, True) if size == "tiny" else seven_b(quantise, True)
    steps = 60 if size == "tiny" else 2
    recorder.reset()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        there = fit(model, kind, Path(folder), steps)
        read = [n for g in recorder.graphs.values() for n in g.nodes if n[0] == "aten.embedding"]
        buckets = len({node[1][0][1][1] for node in read})
        found = {"graphs": len(recorder.graphs), "waits": sum(recorder.syncs.values()), "buckets": buckets}
        bounds = {"graphs": 2 * buckets + 2, "waits": len(there)}
        if size == "tiny":
            found["differs"] = there != fit(tiny("cpu", quantise, True), kind, Path(other), steps)
            bounds["differs"] = False
    return found, bounds


def lifecycle(kind: str) -> tuple[dict, dict]:
    """Evaluation and checkpoints on the way, then a resumed run: as many steps again make no graph."""
    recorder = emulated()
    # a logged line, a checkpoint, its adapter, the means of an evaluation that go into a line
    files = r"minichat/(readings|checkpoint|lora)\.py:|minichat/training\.py:\d+ evaluate"
    with tempfile.TemporaryDirectory() as folder:
        model = tiny("hpu", adapt=True)
        recorder.reset()
        fit(model, kind, Path(folder), 12, eval_every=6, save_every=6)
        again = tiny("hpu", adapt=True)
        recorder.mark()  # to make it is no part of the run
        known, first = set(recorder.graphs), len(recorder.runs)
        fit(again, kind, Path(folder), 24, eval_every=6, save_every=6, resume=True)
    new = set(recorder.graphs) - known
    elsewhere = sum(count for (_, line), count in recorder.syncs.items() if not re.match(files, line))
    found = {"graphs, first pass": len(known), "new graphs": len(new), "runs after it": len(recorder.runs) - first,
             "waits": sum(recorder.syncs.values()), "waits elsewhere than for a file": elsewhere}  # fmt: skip
    return found, {"new graphs": 0, "waits elsewhere than for a file": 0}


def mutant(work: str) -> None:
    """What a mutated checkout does, with its report on standard error."""
    from minichat import lazy
    from minichat.generation import Sampling, decode

    emulated()
    try:
        if work == "train":
            with tempfile.TemporaryDirectory() as folder:
                fit(tiny("hpu", adapt=True), "sft", Path(folder), 12)
        else:
            with suppress(RuntimeError):  # what an HPU graph refuses is in the report
                list(decode(tiny("hpu"), [[3, 4, 5]], 40, Sampling(0.8, seed=1), ()))
    finally:
        sys.stderr = sys.__stderr__
        print(lazy.report(), file=sys.stderr)


def mistake(name: str) -> tuple[dict, dict]:
    file, was, now, work, words, place = MUTANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        for part in ("minichat", "kernels", "bench"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
        path = Path(folder) / "minichat" / file
        text = path.read_text()
        if text.count(was) != 1:
            sys.exit(f"error: {file} has {text.count(was)} times: {was}")
        path.write_text(text.replace(was, now))
        other, there = place or (file, now)
        lines = (Path(folder) / "minichat" / other).read_text().splitlines()
        line = f"minichat/{other}:{next(i for i, text in enumerate(lines, 1) if there in text)} "
        report = {}
        for path in (folder, ROOT):
            command = [sys.executable, "-W", "ignore", f"{path}/bench/lazy.py", "--mutant", work]
            done = subprocess.run(command, capture_output=True, text=True, cwd=path)
            report[path] = [text for text in done.stderr.splitlines() if line in text and words in text]
    if not report[folder]:
        print(done.stderr, file=sys.stderr)
    found = {"named": bool(report[folder]), "named without the mistake": bool(report[ROOT])}
    return found, {"named": True, "named without the mistake": False}


ROWS = {
    f"decode, {size}{', INT4' * quantised}, {how}": (decode, size, quantised, temperature)
    for size in ("tiny", "7B")
    for quantised in (False, True)
    for how, temperature in (("greedy", 0.0), ("sampled", 0.8))
    if not (quantised and temperature)
}
ROWS["decode, 40 prompts of 1 to 4,000 tokens"] = (prompts,)
ROWS |= {
    f"train, {size}, {kind}{', INT4' * quantised}": (train, size, kind, quantised)
    for size in ("tiny", "7B")
    for kind in ("sft", "dpo")
    for quantised in (False, True)
}
ROWS |= {f"evaluation, checkpoints, resume, {kind}": (lifecycle, kind) for kind in ("sft", "dpo")}
ROWS |= {f"mistake: {name}": (mistake, name) for name in MUTANTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME", help="rows whose names begin so")
    parser.add_argument("--record", action="store_true", help="write bench/results/lazy.json")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--mutant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mutant:
        return mutant(args.mutant)
    if args.row:
        function, *arguments = ROWS[args.row]
        start = time.perf_counter()
        found, bounds = function(*arguments)
        gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        found |= {"gb": round(gb, 2), "seconds": round(time.perf_counter() - start, 1)}
        print(json.dumps([found, {**bounds, "gb": 2.0}]))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    table, passed = {}, True
    print("| row | found | bounds |\n| --- | --- | --- |")
    for name in (name for name in ROWS if name.startswith(args.only)):
        command = [sys.executable, "-W", "ignore", __file__, "--row", name]
        # the plain CPU multiplies by the reference too
        environment["MINICHAT_KERNEL"] = "reference" if "tiny" in name else ""
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            sys.exit(f"error: {name} failed with exit code {done.returncode}")
        found, bounds = json.loads(done.stdout.splitlines()[-1])
        over = [key for key, bound in bounds.items() if (found[key] != bound if bound in (True, False) and
                isinstance(bound, bool) else found[key] > bound)]  # fmt: skip
        passed &= not over
        table[name] = {"found": found, "bounds": bounds}
        told = [", ".join(f"{key}: {value}" for key, value in each.items()) for each in (found, bounds)]
        print(f"| {name} | {told[0]} | {told[1]}{f' **passed: {over}**' if over else ''} |", flush=True)
    if args.record:
        import torch

        path = ROOT / "bench" / "results" / "lazy.json"
        if args.only and path.exists():  # the others stay as they were
            table = {**json.loads(path.read_text())["rows"], **table}
            table = {name: table[name] for name in ROWS if name in table}
        content = {"command": "python bench/lazy.py --record", "machine": f"{cpu()}, {os.cpu_count()} cores",
                   "torch": torch.__version__, "commit": commit(), "rows": table}  # fmt: skip
        path.write_text(json.dumps(content, indent=2) + "\n")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
