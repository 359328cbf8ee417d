"""A training run from its flags: data, adapter or all weights, the loop, the run folder."""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import torch

from minichat import (
    chat,
    checkpoint,
    cli,
    data,
    device,
    distributed,
    files,
    int4,
    lora,
    metrics,
    plan,
    run_folder,
    sources,
    store,
    training,
    weights,
)
from minichat.assets import sums
from minichat.console import plural, say
from minichat.errors import BadInput
from minichat.examples import Dpo, Report, Sft
from minichat.model import Mistral, without_weights
from minichat.tokenizer import Tokenizer
from minichat.version import __version__

REFERENCE = "logps.safetensors"  # in the cache, a reference's log-probs of the answers of a source's pairs, (n, 2)
EMBEDDED = {"sft": ("sft", 5000), "dpo": ("pairs", 1000)}  # without --data: kind and number of records
# flags that do not decide a run's numbers, or whose content is compared instead
NOT_DECIDING = ("out", "overwrite", "resume", "save_every", "keep", "log_every", "log", "device", "emulate",
                "max_graphs", "max_syncs", "save_dtype", "gradient_checkpointing", "memory_budget", "tflops", "plan",
                "strict", "model", "template",
                "format", "data", "eval_data", "eval_split")  # fmt: skip


def new_model(args: argparse.Namespace) -> tuple[Mistral, Tokenizer]:
    """Random weights of the shape that --from-config says, and the tokenizer beside it."""
    folder = Path(args.from_config)
    if not folder.is_dir():
        raise BadInput(f"--from-config {folder}: no such folder")
    where = device.pick(args.device)
    config, tokenizer = weights.read_config(folder), Tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise BadInput(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, config.json {config.vocab_size}")
    dtype = cli.torch_dtype(args.dtype) or device.default_dtype(where)
    if args.plan or not device.holds_values(where):
        model = without_weights(config)
        weights.imagine(model, torch.device("meta") if args.plan else where, dtype, None)
    else:
        model = Mistral(config)
        model.init_weights(args.seed)
        model.to(where, dtype)
    model.source = model.identity = model.scheme = None
    return model, tokenizer


def check_out(args: argparse.Namespace) -> None:
    """Raise BadInput if the run would replace what it starts from."""
    folder, adapters = weights.chain(args.model)
    extra = [weights.resolve(args.adapter)] if args.adapter else []
    for used in (folder, *(adapter.folder for adapter in adapters), *extra):
        if used.resolve().is_relative_to(args.out.resolve()):
            raise BadInput(f"--out {args.out} holds {used}, which this run starts from; choose another folder")
    specs = [*(args.data or ()), *(args.eval_data or ())]
    read = {file.resolve() for spec in specs for file in sources.find(spec).files}
    for name in run_folder.WRITES:  # a run writes these, and replaces its own
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
        records = sums.records(*EMBEDDED[what], args.seed)
        items, report = store.of_records(str(args.out / "data.jsonl"), records, encoder)
        tell("no --data, so sums", report)
        parts = [items]
    eval_parts = [items_of(source) for source in held_out]
    if args.eval_split:
        parts, eval_parts = zip(*(items.split(args.eval_split) for items in parts))
        say(f"--eval-split {args.eval_split}: {plural(sum(map(len, eval_parts)), 'record')} to evaluate on")
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
    distributed.start(model.device)
    check_out(args)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise BadInput(
            f"{tokenizer.folder} has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}: added tokens "
            "need rows in the embedding; resize it, or take the tokenizer without them"
        )
    model.model.set_checkpointing(args.gradient_checkpointing or "")
    if args.compile and not args.plan:
        model.model.compile_blocks(device.compiler(model.device))
    if args.full and model.scheme is not None:
        raise BadInput(f"{args.model} is quantised: --full trains float weights; train an adapter, without --full")
    prepare(args, model)
    stop_ids, _ = chat.stops(encoder.template, tokenizer)
    with distributed.main_process_first():  # others find in the cache what it has tokenised
        items, eval_items, bad = read_data(args, encoder, what)
    run = describe_run(args, model, encoder, {"data": items.parts, "evaluation data": eval_items.parts})
    found = checkpoint.read(args.out) if args.resume and not args.plan else []
    done = found[-1][1]["step"] if found else -1
    if distributed.host_max(done) != -distributed.host_max(-done):
        raise BadInput(f"--resume: the processes see different checkpoints in {args.out}; they need one disk for all")
    if found and (other := checkpoint.differences(run, found[-1][1]["run"])):
        raise BadInput(f"--resume: not the run in {args.out}: {'; '.join(other)}; resume it as it was, or --overwrite")
    settings = settings_of(args)
    asked = what == "dpo" and (args.full or args.precompute_reference or args.reference)
    referenced = asked and not args.reference_free
    if args.plan or args.tflops or args.memory_budget:
        planned, useful = make_plan(args, model, method, items, settings, referenced)
        model.model.set_checkpointing(*planned.again)
    if args.plan:
        return
    if referenced:
        add_reference(args, model, tokenizer, method, (items, eval_items), settings, run)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = training.count_steps(items, settings)
    several = f" in {distributed.world()} processes" if distributed.world() > 1 else ""
    say(f"{trained:,} weights train on {model.device}{several}, {plural(total, 'step')}")
    if settings.pack:
        say_packed(items, settings)
    if args.resume:
        say(f"resumed after step {found[-1][1]['step']}" if found else f"no checkpoint in {args.out}: from step 1")
    first = distributed.rank() == 0  # which alone writes

    def save(folder: Path) -> None:
        if args.full:
            dtype = cli.torch_dtype(args.save_dtype)
            weights.save_model(model, tokenizer, folder / "model", dtype, encoder.template, stop_ids)
        else:
            save_adapter(model, tokenizer, folder / "adapter", encoder.template, stop_ids)

    with files.alone(args.out) if first else nullcontext():
        if first:
            begin(args, what, bool(found), bad)
        saved = checkpoint.Checkpoints(args.out, run, save, args.save_every, args.keep)
        at = found[-1][1]["step"] if found else None
        followers = [metrics.follower(name, args.out, run, at) for name in args.log or () if first]
        folder = args.out if first else None
        with metrics.Metrics(folder, total, what, bool(found), followers) as log, saved.stopping():
            try:
                last = training.fit(model, method, items, settings, log, eval_items, saved, bool(found))
            except checkpoint.Stopped as stopped:
                if first:
                    draw(args.out)
                say(f"stopped at step {stopped.step} of {total}, and saved: the same command with --resume goes on")
                distributed.stop()
                sys.exit(128 + stopped.number)
            if first:
                for begun in args.out.glob(f"*/{files.PART}*"):  # by a save that was killed
                    shutil.rmtree(begun, ignore_errors=True)
                save(args.out)  # still here: what would stop the run now waits for it
                run_folder.end(args)
        world = distributed.world()
        distributed.stop()
        if first:
            draw(args.out)
        if args.compile and last:  # nothing where --resume had nothing left to do
            say(f"compiled: {last['graphs']} graphs, {last['recompiled']} of them after the first step")
        if args.tflops and last and first:
            say_measured(args, model, planned, useful, world)
        if args.emulate != "meta":  # which has kept nothing
            say(f"done: {args.out}; talk to it: python infer.py --model {args.out}")


def settings_of(args: argparse.Namespace) -> training.Settings:
    """The loop's settings: those flags that are called as they are, and three that are not."""
    same = {f.name: getattr(args, f.name) for f in fields(training.Settings) if f.name in args}
    pack = args.max_length if getattr(args, "pack", False) else None
    changed = {"betas": tuple(args.betas), "pack": pack, "offload": args.offload_optimizer}
    return training.Settings(**{**same, **changed})


def say_packed(items: data.Mix, settings: training.Settings) -> None:
    """How full the rows of the first epoch are."""
    known = items.lengths()
    rows = [row for step in training.order(items, settings, 0) for batch in step for row in batch]
    share = sum(known[i] for row in rows for i in row) / (len(rows) * settings.pack)
    say(f"packed: {len(rows):,} rows of {settings.pack} tokens, {share:.1%} of them used")


def say_measured(args: argparse.Namespace, model: Mistral, planned: plan.Plan, useful: float, processes: int) -> None:
    """What the run made of --tflops, and of the memory that was planned."""
    rate = tokens_per_s(metrics.read(args.out))
    share = rate * useful / args.tflops / processes / 1e12
    held = f"{device.peak_memory_gib(model.device):.2f} GiB" + " of the process" * (model.device.type == "cpu")
    say(
        f"measured: {rate:,.0f} tokens/s, {share:.1%} of {args.tflops:g} TFLOP/s; "
        f"peak {held}, planned {plan.number(planned.peak / plan.GIB)} GiB of tensors"
    )


def tokens_per_s(lines: Sequence[dict]) -> float:
    """Tokens/s after the first logged step, which warms up; of a single one, its own. What is evaluated and saved in
    between does not count: a line's own rate is without it."""
    tokens = [(after["tokens"] - before["tokens"], after["tokens_per_s"]) for before, after in pairwise(lines)]
    seconds = sum(count / rate for count, rate in tokens if rate)
    return sum(count for count, rate in tokens if rate) / seconds if seconds else lines[-1]["tokens_per_s"]


def begin(args: argparse.Namespace, what: str, resumes: bool, bad: Sequence[str]) -> None:
    """The run folder's first files."""
    run_folder.check(args)  # again, now that no other run can begin in it
    if not resumes:
        run_folder.start(args)
    if args.data is None:
        sums.write(*EMBEDDED[what], args.seed, args.out / "data.jsonl")
    if bad:
        text = "".join(f"{line}\n" for line in bad)  # whose files may have names that are no Unicode
        (args.out / "bad-records.txt").write_text(text, encoding="utf-8", errors="backslashreplace")


def add_reference(
    args: argparse.Namespace,
    model: Mistral,
    tokenizer: Tokenizer,
    method: training.Method,
    mixes: Sequence[data.Mix],
    settings: training.Settings,
    run: dict,
) -> None:
    """Give the pairs that the run will see their log-probs under the reference, computed once and kept in the cache, by
    all that decides them. mixes: to train on, and held out. Of several processes each computes a share, and the first
    one writes. Raises BadInput for a --reference with another tokenizer.
    """
    reference = model
    if args.reference:
        say(f"loading {args.reference}")
        reference, other = weights.load_model(args.reference, args.device, model.dtype, cli.scheme(args))
        if other.fingerprint != tokenizer.fingerprint:
            raise BadInput(f"--reference {args.reference} has another tokenizer than {args.model}: its ids mean others")
        lora.freeze(reference)  # an adapter beside INT4 weights is of the reference: only the one that trains is off
    adapter = args.adapter and not args.reference and weights.identity(weights.resolve(args.adapter))
    of_kernels = sorted({module.kernel for module in reference.modules() if isinstance(module, int4.Int4Linear)})
    # 3: what was kept before may be of a reference over INT4 without its adapter, or of another config.json or kernel
    known = [3, reference.identity, adapter, str(reference.scheme), str(reference.dtype), model.device.type,
             args.loss == "ipo", args.batch_size, run["tokenizer and template"], __version__, args.compile,
             str(reference.config), of_kernels]  # fmt: skip
    kept = device.holds_values(model.device)  # of shapes alone there is nothing to keep
    first = distributed.rank() == 0  # whose cache counts: another process may have another disk
    train, held_out = mixes
    for mix, seen in ((train, training.seen(train, settings)), (held_out, set(range(len(held_out))))):
        for i, part in enumerate(mix.parts):
            wanted = [j for j in range(len(part)) if mix.starts[i] + j in seen]
            which = [] if len(wanted) == len(part) else [wanted]
            key = hashlib.sha256(json.dumps([*known, part.fingerprint(), *which]).encode()).hexdigest()[:32]
            folder = files.cache_folder() / "reference" / key
            if distributed.host_max(first and kept and (folder / REFERENCE).exists()):
                say(f"the reference's log-probs are known: {folder}")
                logps = files.read_tensors(folder / REFERENCE)["logps"] if first else torch.empty(len(part), 2)
                logps = distributed.all_gather({"logps": logps})[0]["logps"]
            else:
                some = f"{len(wanted):,} of " if which else ""
                say(f"the reference's log-probs of {some}{len(part):,} pairs, once")
                pairs = [part[j] for j in wanted] if which else part
                logps = torch.full((len(part), 2), torch.nan)  # for those that no step will see
                if wanted:
                    logps[wanted] = training.reference_logps(reference, method, pairs, settings)
                if first and kept:
                    with files.staged(folder, last=REFERENCE) as new:  # another run may write the same
                        files.write_tensors({"logps": logps}, new / REFERENCE)
            mix.parts[i] = data.Referenced(part, logps)


def prepare(args: argparse.Namespace, model: Mistral) -> None:
    """Say what trains."""
    if args.full:
        model.requires_grad_(True)
        return
    lora.freeze(model)  # adapters over INT4 weights stay beside them, and this one goes over them
    targets = [name.strip() for name in args.lora_targets.split(",") if name.strip()]
    if "lm_head" in targets and model.config.tie_word_embeddings and model.scheme is None:
        raise BadInput(
            f"--lora-targets lm_head: {args.model} shares its head with its embedding, so that nothing could merge the "
            "adapter; leave lm_head out"
        )
    lora.attach(model, args.lora_r, args.lora_alpha, args.lora_dropout, targets, args.rslora, seed=args.seed)


def make_plan(
    args: argparse.Namespace,
    model: Mistral,
    method: training.Method,
    items: data.Mix,
    settings: training.Settings,
    referenced: bool,
) -> tuple[plan.Plan, float]:
    """What the run will need, said on standard error; and FLOP per token without what is computed again (for MFU)."""
    where = device.pick(args.device) if model.device.type == "meta" else model.device
    batch = training.largest(items, settings, method, where)
    if referenced:
        batch.tensors["reference"] = torch.zeros(2 * len(batch.tensors["pairs"]))

    def prepared(imagined: Mistral) -> None:
        lora.freeze_like(imagined, model)
        prepare(args, imagined)

    def of(again: Sequence[str]) -> plan.Plan:
        shape = model.config, model.scheme, model.dtype
        moments = args.optimizer == "adamw8bit", args.offload_optimizer
        return plan.make(*shape, prepared, method, batch, args.accumulate, again, *moments)

    if args.memory_budget:
        found = plan.choose(args.memory_budget, model.config.num_hidden_layers, of)
    else:
        found = of([args.gradient_checkpointing or ""])
    say(f"plan: {found}")
    steps = training.count_steps(items, settings)
    epoch = sum(size for size, _ in training.sizes(items, settings, where))
    tokens = epoch / training.count_steps(items, replace(settings, steps=None, epochs=1)) * steps
    flops = tokens * found.flops_per_token
    if referenced:  # every pair that is seen goes through the reference once
        flops += min(tokens, epoch) * 2 * found.weights
    several = f" in {distributed.world()} processes" if distributed.world() > 1 else ""
    hours = flops / (args.tflops or 1) / distributed.world() / 3.6e15
    hours = f", {plan.number(hours)} h at {args.tflops:g} TFLOP/s{several}" if args.tflops else ""
    if referenced and args.reference:
        both = plan.sized(2 * found.parts["weights"])
        say(f"plan: before, the weights of --reference are there too: {both} of both")
    say(f"plan: {plural(steps, 'step')}, {tokens:,.0f} tokens, {plan.number(flops / 1e15)} PFLOP{hours}")
    return found, (of([""]) if any(found.again) else found).flops_per_token


def describe_run(args: argparse.Namespace, model: Mistral, encoder: Sft | Dpo, parts: dict[str, list]) -> dict:
    """What decides a run's numbers: a run that resumes with anything else would not be the same."""
    flags = {cli.flag(name): value for name, value in vars(args).items() if name not in NOT_DECIDING}
    text = hashlib.sha256(f"{encoder.tokenizer.fingerprint} {encoder.template}".encode()).hexdigest()[:16]
    for name in ("adapter", "reference"):  # the folder may hold another by now
        if (source := getattr(args, name, None)) and not args.plan:
            flags[f"--{name}"] = f"{source} ({weights.identity(weights.resolve(source))})"
    config = hashlib.sha256(str(model.config).encode()).hexdigest()[:16]
    run = {**flags, "the base": model.identity, "its config.json": config, "tokenizer and template": text}
    run |= {name: ", ".join(f"{len(part):,} records {part.fingerprint()}" for part in of) for name, of in parts.items()}
    if distributed.world() > 1:
        run["processes"] = distributed.world()
    run |= {
        "--dtype": str(model.dtype),
        "the shares of the data": [sources.find(spec).weight for spec in args.data or ()],
    }
    return json.loads(json.dumps(run))  # as a checkpoint gives it back


def save_adapter(model: Mistral, tokenizer: Tokenizer, folder: Path, template: str, stop_ids: Sequence[int]) -> None:
    """The adapter with its tokenizer, so that the folder is a model; and where its base lies."""
    metadata = {"base_fingerprint": model.identity}
    base = Path(model.source)
    if base.name == "adapter" and any((base.parent / name).exists() for name in ("metrics.jsonl", checkpoint.STATE)):
        base = base.parent  # PEFT opens an adapter as if it were the model, and then is wrong; a run it refuses
    if base.is_dir():
        metadata["base_beside"] = os.path.relpath(base, folder.resolve())
    if model.scheme is not None:
        metadata["int4"] = str(model.scheme)
    with files.staged(folder, last=lora.CONFIG) as new:
        tokenizer.save(new, template, stop_ids)
        lora.save(model, new, base=str(base), metadata=metadata)


def draw(folder: Path) -> None:
    """loss.png, where matplotlib is there."""
    try:
        from minichat import plots

        plots.draw_run(folder)
    except OSError as error:
        say(f"no loss.png: {error}")
    except ImportError:
        say("no loss.png: it needs matplotlib, pip install 'minichat[plots]'")
