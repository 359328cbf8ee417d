"""Training: ours beside transformers + peft and trl, in one run, in turn.

    python bench/train.py --record               # a model of 110 M weights on the CPU; about 20 minutes on 2 cores

Of Mistral's proportions, random weights in fp32, LoRA of rank 16 on every linear. SFT against transformers' Trainer
with peft (padded to the longest of a batch, grouped by length), DPO against trl's DPOTrainer as its documentation runs
it, but in fp32. Lengths are drawn like those of SlimOrca and orca_dpo_pairs, whose files have 1,900 and 2,800 bytes a
record. First both sides take 20 steps with the same batches, and their losses are compared; then each measurement is
an epoch in a process of its own, and rounds alternate.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 32000, 768, 2688, 8, 12, 3
LONGEST = 1024
RANK, ALPHA, LR, EPS = 16, 32, 1e-4, 1e-8
BATCH = {"sft": 4, "dpo": 2}  # sequences, or pairs, of a step
CHECKED = 20  # steps whose losses are compared


# ---- data ----


def lengths(rng: random.Random, *parts: tuple[float, float]) -> list[int]:
    """Tokens of each part of a record: log-normal, by mean and sigma of the logarithm."""
    return [max(8, round(mean * rng.lognormvariate(-sigma * sigma / 2, sigma))) for mean, sigma in parts]


def records(what: str, count: int) -> list:
    """Examples of about 450 tokens, half of them learnt; or pairs of about 230 of prompt, 170 chosen, 300 rejected."""
    from minichat.examples import Example, Pair

    rng = random.Random(what)
    draw = lambda n: [rng.randrange(3, VOCAB) for _ in range(n)]  # noqa: E731
    found = []
    for _ in range(count):
        if what == "sft":
            prompt, answer = lengths(rng, (230, 0.8), (220, 0.8))
            prompt = min(prompt, LONGEST // 2)
            answer = min(answer, LONGEST - prompt)
            found.append(Example(draw(prompt + answer), [0] * prompt + [1] * answer))
        else:
            prompt, chosen, rejected = lengths(rng, (230, 0.85), (170, 0.95), (300, 0.65))
            prompt = min(prompt, LONGEST // 2)
            room = LONGEST - prompt
            found.append(Pair(draw(prompt), draw(min(chosen, room)), draw(min(rejected, room))))
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
    items = records(what, steps * BATCH[what])
    if who == "ours":
        found = ours(what, folder, items, steps)
    else:
        strategy = "sequential" if check else "group_by_length" if what == "sft" else "random"
        if check:
            planned = training.order(data.Mix([items]), training.Settings(batch_size=BATCH[what]), 0)
            items = [items[i] for step in planned for batch in step for row in batch for i in row]
        found = theirs(what, folder, items, steps, strategy, who == "stored")
    found["rate"] = targets(what, items) / found["seconds"]
    found["peak_gib"] = device.peak_memory_gib(torch.device("cpu"))
    return found


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
    parser.add_argument("--steps", type=int, default=5, help="optimiser steps of a measurement")
    parser.add_argument("--only", choices=["sft", "dpo"], help="one of the two")
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison of losses")
    parser.add_argument("--record", action="store_true", help="write bench/results/train-cpu.json")
    parser.add_argument("--scratch", type=Path, help="keep the model here, to use it again")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--who", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(args.work, args.who, args.scratch, args.steps, args.check)))
        return
    kinds = [args.only] if args.only else ["sft", "dpo"]
    with tempfile.TemporaryDirectory() as thrown_away:
        folder = args.scratch or Path(thrown_away)
        folder.mkdir(exist_ok=True)
        if not (folder / "adapter" / "adapter_config.json").exists():
            make(folder)
        apart = {}
        for what in () if args.no_check else kinds:
            both = [measure(what, who, folder, CHECKED, check=True)["losses"] for who in ("ours", "theirs")]
            apart[what] = max(abs(a - b) for a, b in zip(*both, strict=True))
            print(f"{what}: losses of {CHECKED} steps differ by at most {apart[what]:.1e}", flush=True)
        rounds = [
            {what: {who: measure(what, who, folder, args.steps) for who in ("ours", "theirs")} for what in kinds}
            for _ in range(args.rounds)
        ]
        stored = measure("dpo", "stored", folder, args.steps) if "dpo" in kinds else None
    ratios = {}
    for what in kinds:
        sides = [(found[what]["ours"], found[what]["theirs"]) for found in rounds]
        ratios[f"{what}_speed"] = spread([a["rate"] / b["rate"] for a, b in sides])
        ratios[f"{what}_memory"] = spread([a["peak_gib"] / b["peak_gib"] for a, b in sides])
    for name, value in ratios.items():
        print(f"{name}: {value}")
    if args.record:
        record(rounds, apart, stored, ratios)


def record(rounds: list[dict], apart: dict, stored: dict, ratios: dict) -> None:
    import peft
    import torch
    import transformers
    import trl
    from demo import cpu

    for found in (stored, *(run for round in rounds for sides in round.values() for run in sides.values())):
        del found["losses"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    libraries = {library.__name__: library.__version__ for library in (torch, transformers, peft, trl)}
    content = {
        "command": "python bench/train.py --record",
        "commit": commit.strip(),
        "machine": f"{cpu()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **libraries},
        "model": f"{LAYERS} layers of width {HIDDEN}, {VOCAB} tokens, fp32; LoRA of rank {RANK} on every linear",
        "losses_differ_by": apart,
        "rounds": rounds,
        "trl_without_checkpointing": stored,
        "ratios": ratios,
    }
    (ROOT / "bench" / "results" / "train-cpu.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
