"""A training run from its flags: data, adapter or all weights, the loop, the run folder."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from minichat import chat, cli, data, files, lora, metrics, sources, store, training, weights
from minichat.assets import sums
from minichat.errors import BadInput
from minichat.examples import Dpo, Report, Sft
from minichat.model import Mistral
from minichat.tokenizer import Tokenizer

EMBEDDED = {"sft": ("sft", 8000), "dpo": ("pairs", 1500)}  # without --data: kind and number of records


def say(text: str) -> None:
    metrics.show(f"minichat: {text}")


def new_model(args: argparse.Namespace) -> tuple[Mistral, Tokenizer]:
    """Random weights of the shape that --from-config says, and the tokenizer beside it."""
    from minichat import device

    folder = Path(args.from_config)
    if not folder.is_dir():
        raise BadInput(f"--from-config {folder}: no such folder")
    where = device.pick(args.device)
    config, tokenizer = weights.read_config(folder), Tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise BadInput(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, config.json {config.vocab_size}")
    model = Mistral(config)
    model.init_weights(args.seed)
    model.source = model.identity = model.scheme = None
    return model.to(where, cli.torch_dtype(args.dtype) or device.default_dtype(where)), tokenizer


def embedded(args: argparse.Namespace, what: str) -> Iterator[dict]:
    """The records of the embedded default, as they will be in the run folder's data.jsonl."""
    kind, count = EMBEDDED[what]
    return sums.records(kind, count, args.seed)


def check_out(args: argparse.Namespace) -> None:
    """Raise BadInput if the run would replace what it starts from."""
    folder, adapters = weights.chain(args.model)
    extra = [weights.resolve(args.adapter)] if args.adapter else []
    for used in (folder, *(adapter.folder for adapter in adapters), *extra):
        if used.resolve().is_relative_to(args.out.resolve()):
            raise BadInput(f"--out {args.out} holds {used}, which this run starts from; choose another folder")
    specs = [*(args.data or ()), *(args.eval_data or ())]
    read = {file.resolve() for spec in specs for file in sources.find(spec).files}
    for name in cli.WRITES:  # a run writes these, and replaces its own
        if (args.out / name).resolve() in read:
            raise BadInput(f"{args.out / name} is where this run writes its own; choose another --out")


def read_data(args: argparse.Namespace, encoder: Sft | Dpo, what: str) -> tuple[data.Mix, data.Mix, list[str]]:
    """What the flags name: items to learn from, items to evaluate on, and bad records, a line each."""
    found = [sources.find(spec) for spec in args.data or ()]
    held_out = [sources.find(spec) for spec in args.eval_data or ()]
    bad: list[str] = []

    def tell(name: str, report: Report) -> None:
        say(f"{name}: {report}")
        for line in report.bad[:3]:
            say(f"bad: {line}")
        bad.extend(report.bad)

    def items_of(source: sources.Source) -> store.Items:
        items, report = store.load(source, encoder, args.strict)
        tell(source.name, report)
        return items

    if found:
        parts = [items_of(source) for source in found]
    else:
        items, report = store.of_records(str(args.out / "data.jsonl"), embedded(args, what), encoder)
        tell("no --data, so sums", report)
        parts = [items]
    eval_parts = [items_of(source) for source in held_out]
    if args.eval_split:
        parts, eval_parts = zip(*(items.split(args.eval_split) for items in parts))
        say(f"--eval-split {args.eval_split}: {sum(map(len, eval_parts)):,} records to evaluate on")
        if not all(map(len, parts)) or not any(map(len, eval_parts)):
            raise BadInput(f"--eval-split {args.eval_split} leaves no record on one side; choose another share")
    return data.Mix(parts, [source.weight for source in found] or None), data.Mix(eval_parts), bad


def train(
    args: argparse.Namespace,
    model: Mistral,
    tokenizer: Tokenizer,
    method: training.Method,
    encoder: Sft | Dpo,
    what: str,
) -> None:
    """Everything after loading: the same for SFT and DPO. what: "sft" or "dpo"."""
    check_out(args)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise BadInput(
            f"{tokenizer.folder} has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}: added tokens "
            "need rows in the embedding; resize it, or take the tokenizer without them"
        )
    model.model.gradient_checkpointing = args.gradient_checkpointing
    if args.full and model.scheme is not None:
        raise BadInput(f"{args.model} is quantised: --full trains float weights; train an adapter, without --full")
    if args.full:
        model.requires_grad_(True)
    else:
        lora.freeze(model)  # adapters over INT4 weights stay beside them, and this one goes over them
        targets = [name.strip() for name in args.lora_targets.split(",") if name.strip()]
        lora.attach(model, args.lora_r, args.lora_alpha, args.lora_dropout, targets, args.rslora, seed=args.seed)
    stop_ids, _ = chat.stops(encoder.template, tokenizer)
    items, eval_items, bad = read_data(args, encoder, what)
    settings = training.Settings(
        steps=args.steps,
        epochs=args.epochs,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        lr=args.lr,
        schedule=args.schedule,
        warmup=args.warmup,
        clip=args.clip,
        betas=tuple(args.betas),
        eps=args.eps,
        weight_decay=args.weight_decay,
        seed=args.seed,
        log_every=args.log_every,
        eval_every=args.eval_every,
    )
    if args.full and what == "dpo" and not args.reference_free:
        say("full fine-tuning: the reference's log-probs, once")
        for mix in (items, eval_items):
            mix.parts = [training.with_reference(model, method, part, settings) for part in mix.parts]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = training.count_steps(items, settings)
    say(f"{trained:,} weights train on {model.device}, {total} steps")
    cli.start_run(args)
    if args.data is None:
        sums.write(*EMBEDDED[what], args.seed, args.out / "data.jsonl")
    if bad:
        (args.out / "bad-records.txt").write_text("".join(f"{line}\n" for line in bad), encoding="utf-8")
    with metrics.Metrics(args.out, total, what) as log:
        training.fit(model, method, items, settings, log, eval_items)
    if args.full:
        weights.save_model(
            model, tokenizer, args.out / "model", cli.torch_dtype(args.save_dtype), encoder.template, stop_ids
        )
    else:
        metadata = {"base_fingerprint": model.identity}
        base = Path(model.source)
        if base.name == "adapter" and (base.parent / "metrics.jsonl").exists():
            base = (
                base.parent
            )  # PEFT opens a run's adapter as if it were the model, and then is wrong; a run it refuses
        if base.is_dir():
            metadata["base_beside"] = os.path.relpath(base, args.out.resolve() / "adapter")
        if model.scheme is not None:
            metadata["int4"] = str(model.scheme)
        with files.staged(args.out / "adapter", last=lora.CONFIG) as new:
            tokenizer.save(new, encoder.template, stop_ids)
            lora.save(model, new, base=str(base), metadata=metadata)
    cli.end_run(args)
    draw(args.out)
    say(f"done: {args.out}; talk to it: python infer.py --model {args.out}")


def draw(folder: Path) -> None:
    """loss.png, where matplotlib is there."""
    try:
        from minichat import plots

        plots.draw_run(folder)
    except OSError as error:
        say(f"no loss.png: {error}")
    except ImportError:
        say("no loss.png: it needs matplotlib, pip install 'minichat[plots]'")


def describe(model: Mistral) -> str:
    """One line: where it runs, how large it is."""
    count = sum(p.numel() for p in model.parameters()) + sum(
        m.in_features * m.out_features for m in model.modules() if hasattr(m, "group_size")
    )
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    quantised = f", {model.scheme}" if model.scheme else ""
    threads = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    return f"{count / 1e6:,.1f} M weights, {dtype}{quantised}, on {model.device}{threads}"
