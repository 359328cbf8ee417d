"""Training: ours beside transformers + peft and trl, in one run, in turn.

    python bench/train.py --record               # a model of 110 M weights on the CPU; about an hour on 2 cores
    python bench/train.py --record --plan        # the memory of a 7B, on fake tensors; a minute
    python bench/train.py --record --gpu         # a 7B of random weights on one GPU; under 10 minutes, no network

The model on the CPU is of Mistral's proportions, in fp32, with LoRA of rank 16 on every linear. SFT is measured
against transformers' Trainer with peft (padded to the longest of a batch, grouped by length), DPO against trl's
DPOTrainer as its documentation runs it, but in fp32, and without its default of gradient checkpointing ("stored").
Lengths are drawn like those of SlimOrca and orca_dpo_pairs, whose files have 1,900 and 2,800 bytes a record. First
both sides take 20 steps with the same batches, and their losses are compared; then each measurement is an epoch in a
process of its own, and rounds alternate. Both take the same examples; the peer's SFT batches are grouped as
transformers' sampler groups a large data set: 50 batches at a time are sorted by length.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from recording import commit, cpu, keep, run_process  # noqa: E402

BEGUN = time.perf_counter()

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 32000, 768, 2688, 8, 12, 3
LONGEST = 1024
RANK, ALPHA, LR, EPS = 16, 32, 1e-4, 1e-8
BATCH = {"sft": 4, "dpo": 2}  # sequences, or pairs, of a step
CHECKED = 20  # steps whose losses are compared
SORTED = 50  # batches that transformers' sampler sorts at a time


# ---- data ----


def lengths(rng: random.Random, *parts: tuple[float, float]) -> list[int]:
    """Tokens of each part of a record: log-normal, by mean and sigma of the logarithm."""
    return [max(8, round(mean * rng.lognormvariate(-sigma * sigma / 2, sigma))) for mean, sigma in parts]


def records(what: str, count: int, longest: int = LONGEST, prompts: int = LONGEST // 2) -> list:
    """Examples of about 450 tokens, half of them learnt; or pairs of about 230 of prompt, 170 chosen, 300 rejected.
    longest, prompts: what those are cut to."""
    from minichat.examples import Example, Pair

    rng = random.Random(what)
    draw = lambda n: [rng.randrange(3, VOCAB) for _ in range(n)]  # noqa: E731
    found = []
    for _ in range(count):
        if what == "sft":
            prompt, answer = lengths(rng, (230, 0.8), (220, 0.8))
            prompt = min(prompt, prompts)
            answer = min(answer, longest - prompt)
            found.append(Example(draw(prompt + answer), [0] * prompt + [1] * answer))
        else:
            prompt, chosen, rejected = lengths(rng, (230, 0.85), (170, 0.95), (300, 0.65))
            prompt = min(prompt, prompts)
            room = longest - prompt
            found.append(Pair(draw(prompt), draw(min(chosen, room)), draw(min(rejected, room))))
    return found


def grouped(count: int) -> list:
    """SFT's examples: of each SORTED batches, sorted, one, from short to long ones."""
    size = BATCH["sft"]
    every, steps = SORTED * size, count // size
    pool, found = records("sft", steps * every), []
    for step in range(steps):
        at = (2 * step + 1) * SORTED // (2 * steps) * size
        found += sorted(pool[step * every : (step + 1) * every], key=len)[at : at + size]
    return found


def targets(what: str, items: list) -> int:
    """What a rate counts: tokens learnt, or pairs."""
    return sum(sum(e.mask[1:]) for e in items) if what == "sft" else len(items)


# ---- one measurement ----


def make(folder: Path) -> None:
    """The model's folder, and beside it an adapter that both sides start from."""
    import minichat
    from minichat import lora
    from minichat.cli import BASE
    from minichat.model import Config, Mistral
    from minichat.tokenizer import Tokenizer

    config = Config(VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HIDDEN // HEADS, 4096, 32768, rms_norm_eps=1e-5)
    model = Mistral(config)
    model.init_weights(0)
    minichat.save(model, Tokenizer(BASE), folder / "model")
    lora.save(lora.attach(model, RANK, ALPHA), folder / "adapter", str(folder / "model"))


def ours(what: str, folder: Path, items: list, steps: int) -> dict:
    import minichat
    from minichat import lora, training
    from minichat.metrics import Metrics

    model, _ = minichat.load(folder / "model", device="cpu")
    lora.load(model, folder / "adapter")
    method = training.sft() if what == "sft" else training.dpo()
    settings = training.Settings(steps=steps, batch_size=BATCH[what], lr=LR, eps=EPS, warmup=0, log_every=1)
    start = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as run, Metrics(Path(run), steps, what) as metrics:
        training.fit(model, method, items, settings, metrics)
        times = elapsed(*start)
        lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return {**times, "losses": [json.loads(line)["loss"] for line in lines]}


def elapsed(seconds: float, processor: float) -> dict:
    return {"seconds": time.perf_counter() - seconds, "cpu_seconds": time.process_time() - processor}


def theirs(what: str, folder: Path, items: list, steps: int, strategy: str, stored: bool) -> dict:
    """transformers' Trainer or trl's. stored: trl without its default of gradient checkpointing."""
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    lora = peft.LoraConfig.from_pretrained(folder / "adapter")
    lora.inference_mode = False
    common = dict(
        output_dir=str(folder / "out"), max_steps=steps, per_device_train_batch_size=BATCH[what], learning_rate=LR,
        lr_scheduler_type="cosine", warmup_steps=0, max_grad_norm=1.0, adam_epsilon=EPS, weight_decay=0.0,
        logging_steps=1, save_strategy="no", bf16=False, use_cpu=True, report_to=[], disable_tqdm=True,
        optim="adamw_torch", train_sampling_strategy=strategy, remove_unused_columns=what == "dpo", seed=42,
    )  # fmt: skip
    if what == "sft":
        model = peft.get_peft_model(model, lora)
        rows = [{"input_ids": e.ids, "labels": [t if m else -100 for t, m in zip(e.ids, e.mask)]} for e in items]

        def collate(rows: list[dict]) -> dict:
            T = max(len(row["input_ids"]) for row in rows)
            pad = lambda key, by: torch.tensor([row[key] + [by] * (T - len(row[key])) for row in rows])  # noqa: E731
            mask = [[1] * len(row["input_ids"]) + [0] * (T - len(row["input_ids"])) for row in rows]
            return {
                "input_ids": pad("input_ids", 0),
                "labels": pad("labels", -100),
                "attention_mask": torch.tensor(mask),
            }

        args = transformers.TrainingArguments(**common)
        trainer = transformers.Trainer(model, args, train_dataset=rows, data_collator=collate)
    else:
        import datasets
        import tokenizers
        import trl

        trl.DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset  # these are ids already
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
        names = dict(eos_token="</s>", pad_token="</s>", unk_token="<unk>")
        rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in items]
        trainer = trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(**common, **({"gradient_checkpointing": False} if stored else {})),
            processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names),
            train_dataset=datasets.Dataset.from_list(rows),
            peft_config=lora,
        )
        model = trainer.model
    peft.set_peft_model_state_dict(model, load_file(folder / "adapter" / "adapter_model.safetensors"))
    start = time.perf_counter(), time.process_time()
    trainer.train()
    times = elapsed(*start)
    return {**times, "losses": [float(record["loss"]) for record in trainer.state.log_history if "loss" in record]}


def work(what: str, who: str, folder: Path, steps: int, check: bool) -> dict:
    """One run in this process. check: the batches that ours takes, in its order, for the other as well."""
    import torch

    from minichat import data, device, training

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    items = grouped(steps * BATCH["sft"]) if what == "sft" and not check else records(what, steps * BATCH[what])
    if who == "ours":
        found = ours(what, folder, items, steps)
    else:
        strategy = "sequential" if check or what == "sft" else "random"
        if check:
            planned = training.order(data.Mix([items]), training.Settings(batch_size=BATCH[what]), 0)
            items = [items[i] for step in planned for batch in step for row in batch for i in row]
        found = theirs(what, folder, items, steps, strategy, who == "stored")
    found["rate"] = targets(what, items) / found["seconds"]
    found["peak_gib"] = device.peak_memory_gib(torch.device("cpu"))
    return found


# ---- a 7B: planned, and on a GPU ----

SEVEN = dict(
    vocab_size=VOCAB, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, sliding_window=4096, max_position_embeddings=32768, rms_norm_eps=1e-5,
)  # fmt: skip
TINY = SEVEN | dict(vocab_size=2000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, head_dim=8)
PARTS = ("matmul", "sft-2048", "peer-2048", "dpo", "full-2048", "sft-4096", "peer-4096", "compiled-2048")
LIMIT = 150  # of one part: what hangs or compiles for long takes the time of two others at most
STEPS = 12  # of a part, the first two of them to warm up


def plans() -> dict:
    """Tracked peaks, GiB: SFT over bf16 of 2048 tokens, and DPO over INT4 of a pair whose sequences have 1536 each."""
    import torch

    from minichat import data, lora, plan, training
    from minichat.examples import Example, Pair
    from minichat.int4 import Scheme
    from minichat.model import Config

    example = Example([5] * 2048, [0] * 1024 + [1] * 1024)
    pair = Pair([5] * 1024, [5] * 512, [6] * 512)
    cases = {
        "sft_bf16": (None, training.sft(), data.sft_batch([[example]], None)),
        "dpo_int4": (Scheme(), training.dpo(), data.dpo_batch([[pair]], None)),
    }
    found = {}
    for name, (scheme, method, batch) in cases.items():
        attach = lambda model: lora.attach(model, 16, 16, 0.05)  # noqa: E731
        made = plan.make(Config(**SEVEN), scheme, torch.bfloat16, attach, method, batch, 1, ["block"])
        found[f"{name}_gib"] = made.peak / plan.GIB
        found[name] = str(made)
        print(f"{name}: {made}", flush=True)
    return found


def random_model(config, where, scheme):
    """Weights drawn on the device, bf16 there, INT4 as they are drawn."""
    import torch
    from torch import nn

    from minichat import int4
    from minichat.model import without_weights

    model = without_weights(config)
    model.scheme = scheme
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    for name, module in list(model.named_modules()):
        if not hasattr(module, "weight"):
            continue
        weight = torch.ones(module.weight.shape, device=where, dtype=dtype)
        if weight.dim() > 1:
            weight.normal_(0, 0.02)
        if scheme and int4.wanted(name, module, scheme):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, int4.Int4Linear.from_weight(weight, scheme))
        else:
            module.weight = nn.Parameter(weight)
    return model


def part_of_gpu(part: str, tiny: bool) -> dict:
    """One part, in a process of its own: with the largest micro-batch of 8, 4, 2 or 1 rows that fits."""
    import torch

    where = torch.device("cpu" if tiny else "cuda")
    torch.manual_seed(0)
    if part == "matmul":
        n = 512 if tiny else 8192
        a, b = (torch.randn(n, n, device=where, dtype=torch.bfloat16) for _ in "ab")
        times = []
        for _ in range(12):
            start = time.perf_counter()
            for _ in range(10):
                product = a @ b
            product[0, 0].item()  # waits
            times.append(time.perf_counter() - start)
        return {"tflops": 10 * 2 * n**3 / statistics.median(times[2:]) / 1e12}
    kind, _, length = part.partition("-")
    length = min(int(length or 0), 256) if tiny else int(length or 0)
    run = peer_on_gpu if kind == "peer" else ours_on_gpu
    for rows in (4, 2, 1) if kind == "dpo" else (8, 4, 2, 1):
        with contextlib.suppress(torch.OutOfMemoryError):  # whose traceback holds all that the attempt has made
            return {"rows": rows, **run(kind, length, rows, where)}
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return {"fits": False}


def ours_on_gpu(kind: str, length: int, rows: int, where) -> dict:
    """sft: LoRA, packed; compiled: the same with --compile; full: all weights, 8-bit moments, checkpointing; dpo:
    NeuralHermes' recipe (prompts of 1,024 tokens at most, sequences of 1,536), over NF4."""
    import torch

    from minichat import data, device, lora, plan, training
    from minichat.int4 import NF4
    from minichat.metrics import Metrics
    from minichat.model import Config

    config = Config(**(TINY if where.type == "cpu" else SEVEN))
    model = random_model(config, where, NF4 if kind == "dpo" else None)
    again = ["block"] if kind == "full" else []
    attach = lambda m: m.requires_grad_(True) if kind == "full" else lora.attach(m, RANK, RANK, 0.05)  # noqa: E731
    attach(model)
    model.model.set_checkpointing(*again or [""])
    if kind == "compiled":
        model.model.compile_blocks(device.compiler(where))
    settings = training.Settings(steps=STEPS, batch_size=rows, pack=length or None, lr=5e-5, warmup=0, log_every=1)
    method, items = training.sft(), None
    if kind == "dpo":  # 16 pairs a step
        settings.accumulate, method = 16 // rows, training.dpo()
        items = records("dpo", 16 * STEPS, 1536, 1024)
    else:
        settings.optimizer = "adamw8bit" if kind == "full" else "adamw"
        items = records("sft", STEPS * rows * max(2, length // 400) + 8)
    for item in items if config.vocab_size < VOCAB else ():  # the small model's ids
        for ids in (item.ids,) if kind != "dpo" else (item.prompt, item.chosen, item.rejected):
            ids[:] = [id % config.vocab_size for id in ids]
    with tempfile.TemporaryDirectory() as run, Metrics(Path(run), STEPS, kind) as metrics:
        training.fit(model, method, items, settings, metrics)
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    steps = list(itertools.pairwise(lines[1:]))
    seconds = [b["seconds"] - a["seconds"] for a, b in steps]
    measured = {
        "tokens_per_s": statistics.median((b["tokens"] - a["tokens"]) / took for (a, b), took in zip(steps, seconds)),
        "step_seconds": spread(seconds),
        "peak_gib": device.peak_memory_gib(where),
        **{key: lines[-1][key] for key in ("graphs", "recompiled") if key in lines[-1]},
        **({"projected_minutes_of_200_steps": statistics.median(seconds) * 200 / 60} if kind == "dpo" else {}),
    }
    print(json.dumps({"rows": rows, **measured}), flush=True)  # if the plan takes too long, this stays
    if kind == "compiled":  # its plan is that of sft
        return measured
    batch = training.largest(data.Mix([items]), settings, method, where)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    plain = plan.make(config, model.scheme, dtype, attach, method, batch)
    made = plan.make(config, model.scheme, dtype, attach, method, batch, settings.accumulate, again) if again else plain
    return {**measured, "flops_per_token": plain.flops_per_token, "planned": str(made)}


def peer_on_gpu(kind: str, length: int, rows: int, where) -> dict:
    """transformers + peft, a plain loop: full rows, no padding, fused AdamW."""
    import peft
    import torch
    import transformers

    shape = (TINY if where.type == "cpu" else SEVEN) | {"sliding_window": None}  # wider than its rows, and takes a mask
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = transformers.MistralForCausalLM._from_config(transformers.MistralConfig(**shape), dtype=dtype)
    model.to_empty(device=where)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "inv_freq" in name:
            head = shape["head_dim"]
            tensor.data = 1 / 10000 ** (torch.arange(0, head, 2, device=where).float() / head)
        else:
            tensor.data.normal_(0, 0.02)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, fused=where.type == "cuda")
    seconds = []
    for _ in range(STEPS):
        ids = torch.randint(3, shape["vocab_size"], (rows, length), device=where)
        labels = ids.masked_fill(torch.rand(ids.shape, device=where) < 0.5, -100)
        start = time.perf_counter()
        with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):  # as the Trainer's bf16=True
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trained[0].flatten()[0].item()
        seconds.append(time.perf_counter() - start)
    found = {"tokens_per_s": rows * length / statistics.median(seconds[2:]), "step_seconds": spread(seconds[2:])}
    return {**found, "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if where.type == "cuda" else None}


def gpu(tiny: bool, seconds: float, record: Callable[[dict], None]) -> None:
    """Every part that there is time for, and what follows from them; kept after each, for whoever stops it."""
    found = {}
    for name in PARTS:
        left = min(LIMIT, seconds - (time.perf_counter() - BEGUN))
        if left < 10:
            break
        command = [sys.executable, "-W", "ignore", __file__, "--gpu", "--work", name, *(["--tiny"] if tiny else [])]
        found[name] = run_process(command, left)
        print(f"{name}: {found[name]}", flush=True)
        record({"parts": found, "ratios": ratios_of(found)})
    if any("failed" in one for one in found.values()):
        sys.exit(1)


def ratios_of(found: dict) -> dict:
    """What follows from the parts that there are."""
    peak = found.get("matmul", {}).get("tflops")
    ratios = {}
    for part, one in found.items():
        if peak and "flops_per_token" in one:
            ratios[f"{part}_mfu"] = one["tokens_per_s"] * one["flops_per_token"] / peak / 1e12
        peer = found.get(part.replace("sft", "peer"), {})
        if part.startswith("sft") and "tokens_per_s" in one and "tokens_per_s" in peer:
            ratios[f"{part}_speed"] = one["tokens_per_s"] / peer["tokens_per_s"]
        plain = found.get(part.replace("compiled", "sft"), {})
        if part.startswith("compiled") and "tokens_per_s" in one and "tokens_per_s" in plain:
            ratios[f"{part}_gain"] = one["tokens_per_s"] / plain["tokens_per_s"]
    return ratios


# ---- the run ----


def measure(what: str, who: str, folder: Path, steps: int, check: bool = False) -> dict:
    command = [sys.executable, "-W", "ignore", __file__, "--work", what, "--who", who, "--scratch", str(folder)]
    command += ["--steps", str(steps), *(["--check"] if check else [])]
    environment = {"HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what}, {who}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    shown = ", ".join(f"{key} {value:.2f}" for key, value in found.items() if key != "losses")
    print(f"{what} {who:7}: {shown}", flush=True)
    return found


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps of a measurement")
    parser.add_argument("--only", choices=["sft", "dpo"], help="one of the two")
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison of losses")
    parser.add_argument("--record", action="store_true", help="write bench/results/train-cpu.json")
    parser.add_argument("--name", default="", help="of the machine, after train-cpu: --name=-avx2")
    parser.add_argument("--scratch", type=Path, help="keep the model and the comparison here, to use them again")
    parser.add_argument("--plan", action="store_true", help="a 7B on fake tensors: bench/results/train-plan.json")
    parser.add_argument("--gpu", action="store_true", help="a 7B on a GPU: bench/results/train-cuda.json")
    parser.add_argument("--seconds", type=float, default=560, help="--gpu: of all parts: none goes on after that")
    parser.add_argument("--tiny", action="store_true", help="--gpu: try it, with a small model on the CPU")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--who", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work and args.gpu:
        print(json.dumps(part_of_gpu(args.work, args.tiny)))
        return
    if args.work:
        print(json.dumps(work(args.work, args.who, args.scratch, args.steps, args.check)))
        return
    if args.plan or args.gpu:

        def record(found: dict) -> None:
            if args.record:
                write("plan" if args.plan else "cuda", found)

        if args.plan:
            record(plans())
        else:
            gpu(args.tiny, args.seconds, record)
        return
    kinds = [args.only] if args.only else ["sft", "dpo"]
    with tempfile.TemporaryDirectory() as thrown_away:
        folder = args.scratch or Path(thrown_away)
        folder.mkdir(exist_ok=True)
        if not (folder / "adapter" / "adapter_config.json").exists():
            make(folder)
        known = folder / "checked.json"  # the comparison is the longest part: --scratch keeps it too
        apart = json.loads(known.read_text()) if known.exists() else {}
        for what in kinds:
            if args.no_check or what in apart:
                continue
            both = [measure(what, who, folder, CHECKED, check=True)["losses"] for who in ("ours", "theirs")]
            apart[what] = max(abs(a - b) for a, b in zip(*both, strict=True))
            apart["commit"] = commit()
            print(f"{what}: losses of {CHECKED} steps differ by at most {apart[what]:.1e}", flush=True)
            known.write_text(json.dumps(apart))
        sides = {"sft": ["ours", "theirs"], "dpo": ["ours", "theirs", "stored"]}
        rounds = []
        for i in range(args.rounds):  # there and back: a drift favours each of them in turn
            turn = {what: sides[what][:: -1 if i % 2 else 1] for what in kinds}
            rounds.append({what: {who: measure(what, who, folder, args.steps) for who in turn[what]} for what in kinds})
    ratios = {}
    for what in kinds:
        for peer in sides[what][1:]:
            pairs, end = [(found[what]["ours"], found[what][peer]) for found in rounds], "_stored" * (peer == "stored")
            ratios[f"{what}_speed{end}"] = spread([a["rate"] / b["rate"] for a, b in pairs])
            ratios[f"{what}_memory{end}"] = spread([a["peak_gib"] / b["peak_gib"] for a, b in pairs])
    for name, value in ratios.items():
        print(f"{name}: {value}")
    if args.record:
        for found in (run for one in rounds for each in one.values() for run in each.values()):
            found.pop("losses", None)
        model = f"{LAYERS} layers of width {HIDDEN}, {VOCAB} tokens, fp32; LoRA of rank {RANK} on every linear"
        write(f"cpu{args.name}", {"model": model, "losses_differ_by": apart, "rounds": rounds, "ratios": ratios})


def write(name: str, found: dict) -> None:
    """bench/results/train-NAME.json."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {"python": platform.python_version()}
    for library in ("torch", "triton", "transformers", "peft", "trl"):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    card = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    content = {
        "command": "python " + shlex.join("DIR" if Path(x).is_absolute() else x for x in sys.argv),  # no machine's own
        "commit": commit(),
        "machine": f"{card}{cpu()}, {os.cpu_count()} cores",
        "versions": versions,
        **found,
    }
    keep(f"train-{name}.json", content)


if __name__ == "__main__":
    main()
