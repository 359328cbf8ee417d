"""What the three scripts share: flags, the run folder, and one line for whatever is wrong. Imports no torch."""

import argparse
import atexit
import difflib
import errno
import importlib.util
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from minichat import run_folder, sources
from minichat.console import say
from minichat.errors import BadInput

BASE = Path(__file__).parent / "assets" / "base"  # the embedded default
REQUIRED = ("torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "jinja2", "tqdm")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, keeps the description's lines."""

    def _get_help_string(self, action):
        # "(default: None)" says nothing: such a flag's text says what happens without it
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X", seed: "N"}.get(action.type) or super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """argparse with files of flags, `@recipes/x.args`: shell words, # comments, as many on a line as one likes."""

    def __init__(self, description: str, prog: str | None = None):
        super().__init__(
            prog=prog,
            usage="%(prog)s [flags] [@file of flags]",  # the whole list comes below, grouped
            description=description,
            formatter_class=_Help,
            allow_abbrev=False,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        return super().parse_args(self._expanded(sys.argv[1:] if args is None else args), namespace)

    def _expanded(self, words: Sequence[str], beside: Path = Path(), depth: int = 0) -> list[str]:
        """The words with those of files in the place of @file; what a flag takes is no file, also if it begins so.

        beside: where files lie; those that a file names lie beside it.
        """
        takes = {flag for action in self._actions if action.nargs in (None, "+") for flag in action.option_strings}
        found: list[str] = []
        for before, word in zip(["", *words], words):
            if not word.startswith("@") or before in takes:
                found.append(word)
                continue
            file = beside / word[1:]
            if depth == 8:
                self.error(f"file of flags {file}: files in files without end")
            try:
                text = file.read_text(encoding="utf-8-sig")
                # shlex would take the # of runs/a#1 for the beginning of a comment
                comments = r"""(\\.|"(?:\\.|[^"\\])*"|'[^']*')|(?<!\S)#[^\n]*"""
                inside = shlex.split(re.sub(comments, lambda m: m[1] or "", text, flags=re.DOTALL))
            except OSError as error:
                self.error(f"file of flags {file}: {error.strerror}")
            except ValueError as error:
                self.error(f"file of flags {file}: {error}")
            found += self._expanded(inside, file.parent, depth + 1)
        return found

    def print_help(self, file=None):
        # where this fails, argparse says nothing
        print(self.format_help(), end="", file=file or sys.stdout or sys.stderr, flush=True)

    def error(self, message: str):
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            flags = [flag for action in self._actions for flag in action.option_strings]
            if near := difflib.get_close_matches(unknown[1], flags, 1):
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"error: {BadInput(message)}; {self.prog} --help lists the flags\n")


def seed(text: str) -> int:
    """What --seed takes; argparse names this function where it does not."""
    if not 0 <= (value := int(text)) < 1 << 63:
        raise ValueError
    return value


def source(text: str) -> str:
    """What --model and --adapter take: anything but nothing."""
    if not text.strip():
        raise ValueError
    return text


def model_flags(parser: Parser, default: str) -> "argparse._ArgumentGroup":
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", type=source, metavar="SOURCE", help=f"Hugging Face folder, run folder or hub id ({default})"
    )
    group.add_argument(
        "--adapter", type=source, metavar="FOLDER", help="a LoRA adapter in PEFT's format, merged into the model"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or hpu")
    group.add_argument("--emulate", nargs="?", const="cpu", choices=["cpu", "meta"], metavar="HOW", help="an HPU in "
                       "lazy mode on this CPU: its graphs and waits are reported; meta: shapes alone")  # fmt: skip
    group.add_argument("--max-graphs", type=int, metavar="N", help="--emulate: exit code 1 if there are more graphs")
    group.add_argument("--max-syncs", type=int, metavar="N", help="--emulate: exit code 1 if the host waits more often")
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of weights and activations (without it: float32 on the CPU, bfloat16 elsewhere)",
    )
    quantise_flags(group)
    return group


_emulated: list[argparse.Namespace] = []  # the flags, once --emulate is on


def emulate(args: argparse.Namespace) -> None:
    """--emulate: make the device hpu, for this process; run() ends with the report. Before anything is computed."""
    if args.emulate is None:
        if args.max_graphs is not None or args.max_syncs is not None:
            raise BadInput("--max-graphs and --max-syncs are budgets of --emulate; add it")
        return
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise BadInput("--emulate is of one process; start it without torchrun")
    if args.device not in ("auto", "hpu"):
        raise BadInput(f"--device {args.device} with --emulate, which is of hpu; leave one of them out")
    from minichat import lazy

    args.device = "hpu"
    lazy.install(args.emulate)
    _emulated.append(args)
    if args.emulate == "meta" and hasattr(args, "out"):
        args.out = Path(tempfile.mkdtemp(prefix="minichat-"))
        atexit.register(shutil.rmtree, args.out, ignore_errors=True)
        say("shapes alone: all values are 0, and nothing is kept")


def quantise_flags(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--int4", nargs="?", const=True, default=False, choices=["nf4"], help="quantise the weights of "
                       "the linear layers as they are read; nf4: to QLoRA's 4-bit floats, for training")  # fmt: skip
    group.add_argument("--bits", type=int, default=4, choices=[4, 8], help="--int4: of a quantised weight")
    group.add_argument("--group-size", type=int, metavar="N", help="--int4: weights of one scale, 32, 64 or 128 "
                       "(without it: 32, of nf4 64)")  # fmt: skip
    group.add_argument("--asymmetric", action="store_true", help="--int4: a zero-point beside each group's "
                       "scale, with which transformers (5.24) does not open what is saved")  # fmt: skip
    group.add_argument("--lm-head", action="store_true", help="--int4: the head too (without it: as it is, but "
                       "8 bits where infer.py decodes in fp32 on the CPU)")  # fmt: skip


def activations_flag(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--activations", choices=["exact", "int8"], default="exact", help="--int4 on the CPU: how they "
                       "are rounded, to 15 bits or to 8, which reads prompts more than 1.5 times as fast")  # fmt: skip


def scheme(args: argparse.Namespace):
    """What load_model takes as int4. Raises BadInput for flags that say how without --int4, and for nf4 where nothing
    trains.
    """
    from minichat import int4

    default = int4.Scheme.group_size
    usual = args.bits == 4 and args.group_size in (None, default) and not args.asymmetric and not args.lm_head
    if not args.int4 and not usual:
        raise BadInput("--bits, --group-size, --asymmetric and --lm-head say how to quantise; add --int4")
    nf4 = args.int4 == "nf4"
    if nf4 and "lora_r" not in args:
        raise BadInput("--int4 nf4 is a base to train over, for train.py and dpo.py; here, leave nf4 out")
    group_size = args.group_size if args.group_size is not None else int4.NF4.group_size if nf4 else default
    skip = () if args.lm_head else int4.Scheme.skip
    wanted = int4.Scheme(args.bits, group_size, not args.asymmetric, skip, nf4)
    return bool(args.int4) and (wanted == int4.Scheme() or wanted)  # True: what is INT4 on disk stays as it is


def chat_flags(parser: Parser) -> "argparse._ArgumentGroup":
    group = parser.add_argument_group("text")
    group.add_argument(
        "--template",
        default="auto",
        help="auto (the model's own, else neuralchat), neuralchat, neuralchat-card, zephyr, chatml, mistral-instruct, "
        "none, or a .jinja file",
    )
    return group


def training_flags(parser: Parser, out: Path, lr: float, warmup: float, batch_size: int, max_length: int) -> None:
    group = parser.add_argument_group("data")
    several = {"nargs": "+", "metavar": "SOURCE[:WEIGHT]"}
    group.add_argument("--data", **several, help="files (.jsonl, .json, also .gz, .parquet), folders, data sets of the "
                       "hub (owner/name), with /split or /pattern; weights are shares of the records "
                       "(without --data: sums that minichat.assets.sums makes)")  # fmt: skip
    group.add_argument("--eval-data", **several, help="the same, to evaluate on")
    group.add_argument("--eval-split", type=float, default=0.0, metavar="SHARE", help="share of --data's records to "
                       "evaluate on and not to learn from, the same ones in every run")  # fmt: skip
    group.add_argument("--strict", action="store_true", help="stop at the first bad record, instead of counting them")
    group.add_argument("--max-length", type=int, default=max_length, help="tokens of a sequence; longer ones are cut")
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=seed, default=42, help="of everything random; the same seed gives the same run")
    group.add_argument("--out", type=Path, default=out, help="the run folder: config.json, metrics.jsonl, loss.png, "
                       "and the adapter or the model")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run in --out, to "
                       "the same result; without one, from the beginning")  # fmt: skip
    group.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="steps between checkpoints, 0: only "
                       "where Ctrl-C or SIGTERM stops the run")  # fmt: skip
    group.add_argument("--keep", type=int, default=2, metavar="N", help="checkpoints that stay: the last N, and the "
                       "best by evaluation")  # fmt: skip
    group.add_argument("--steps", type=int, help="optimiser steps (without it: by --epochs)")
    group.add_argument("--epochs", type=float, default=1.0, help="passes over the data")
    group.add_argument("--log-every", type=int, default=10, metavar="STEPS", help="steps between logged ones")
    group.add_argument("--log", nargs="+", choices=["tensorboard", "wandb"], help="also log to RUN/tensorboard, or to "
                       "Weights & Biases (extras of these names)")  # fmt: skip
    group.add_argument("--eval-every", type=int, default=0, metavar="STEPS", help="steps between evaluations, "
                       "0: at the end only")  # fmt: skip
    group = parser.add_argument_group("optimiser (AdamW)")
    group.add_argument("--batch-size", type=int, default=batch_size, help="sequences or pairs in a micro-batch")
    group.add_argument("--accumulate", type=int, default=1, help="micro-batches per step (of each process)")
    group.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    group.add_argument("--schedule", choices=["cosine", "linear", "constant"], default="cosine", help="after warm-up")
    group.add_argument("--warmup", type=float, default=warmup, metavar="STEPS", help="steps, or below 1 a share of all "
                       "(less than one step is none)")  # fmt: skip
    group.add_argument("--clip", type=float, default=1.0, help="total gradient norm, 0: no clipping")
    group.add_argument("--betas", type=float, nargs=2, default=[0.9, 0.999], metavar=("BETA1", "BETA2"), help="AdamW's")
    group.add_argument("--eps", type=float, default=1e-8, help="AdamW's epsilon")
    group.add_argument("--optimizer", choices=["adamw", "adamw8bit"], default="adamw", help="adamw8bit holds its "
                       "moments in 8 bits: a quarter of the memory, other numbers")  # fmt: skip
    group.add_argument("--offload-optimizer", action="store_true", help="hold the moments on the host: slower, same "
                       "numbers")  # fmt: skip
    group.add_argument("--weight-decay", type=float, default=0.0, help="decoupled, matrices only")
    group.add_argument("--gradient-checkpointing", nargs="?", const="block", choices=["attention", "mlp", "block"],
                       metavar="WHAT", help="compute the activations of every attention, mlp or (without a word) whole "
                       "block again in the backward pass: less memory, a third to half more time")  # fmt: skip
    group.add_argument("--memory-budget", type=float, metavar="GIB", help="compute as much again as a micro-batch "
                       "needs to fit (estimated on shapes, in a minute for a 7B)")  # fmt: skip
    group.add_argument("--compile", action="store_true", help="compile the blocks, once for all lengths: needs a C++ "
                       "compiler, or Triton on CUDA, and most of a minute in the first step, for a few per cent later "
                       "(on a CPU); other last digits, another dropout")  # fmt: skip
    group.add_argument("--plan", action="store_true", help="say what the run would need and how long it would take, "
                       "without loading the weights, and stop")  # fmt: skip
    group.add_argument("--tflops", type=float, metavar="X", help="what the device does at best, in TFLOP/s: --plan "
                       "says the time, and a run its share of it (MFU)")  # fmt: skip
    group = parser.add_argument_group("what trains")
    group.add_argument("--full", action="store_true", help="all weights instead of a LoRA adapter")
    group.add_argument("--lora-r", type=int, default=16, help="rank")
    group.add_argument("--lora-alpha", type=float, default=16.0, help="scale is alpha / rank")
    group.add_argument("--lora-dropout", type=float, default=0.05, help="share of the adapter's inputs dropped")
    group.add_argument("--lora-targets", default="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
                       help="names of linears, comma-separated")  # fmt: skip
    group.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(rank)")
    group.add_argument("--save-dtype", choices=["float32", "bfloat16", "float16"], help="--full: of the saved weights "
                       "(without it: as trained)")  # fmt: skip


def flag(name: str) -> str:
    """The name of an argument as the user types it."""
    return "--" + name.replace("_", "-")


def check_training(args: argparse.Namespace) -> None:
    """Raise BadInput for flags that make no run, before anything is loaded or written."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{flag(name)} is {value}; it must be a finite number")
    positive = ("batch_size", "accumulate", "epochs", "log_every", "max_length", "lr", "keep", "eps", "lora_alpha")
    for name in positive:
        if not getattr(args, name) > 0:
            raise BadInput(f"{flag(name)} is {getattr(args, name)}; it must be positive")
    for name in ("warmup", "clip", "weight_decay", "eval_every", "save_every"):
        if getattr(args, name) < 0:
            raise BadInput(f"{flag(name)} is {getattr(args, name)}; it cannot be negative")
    if not all(0 <= beta < 1 for beta in args.betas):
        raise BadInput(f"--betas are {args.betas[0]} and {args.betas[1]}; both must be 0 or more and below 1")
    if args.steps is not None and args.steps < 1:
        raise BadInput(f"--steps is {args.steps}; it must be 1 or more")
    if args.dtype == "float16":
        raise BadInput("--dtype float16 loses small gradients; train in bfloat16 or float32")
    if args.eval_every and not (args.eval_data or args.eval_split):
        raise BadInput(f"--eval-every {args.eval_every} needs --eval-data or --eval-split to evaluate on")
    for name in args.log or ():
        if importlib.util.find_spec(name) is None:
            raise BadInput(f"--log {name} needs it: pip install 'minichat[{name}]'")
    if getattr(args, "pack", False) and args.epochs > 1000:
        raise BadInput(f"--epochs is {args.epochs:g}; with --pack, at most 1,000: give --steps")
    if args.full and (args.int4 or args.rslora):
        raise BadInput("--full trains float weights: it goes with neither --int4 nor --rslora")
    if args.save_dtype and not args.full:
        raise BadInput("--save-dtype is of whole models, --full; an adapter is saved in float32")
    if args.adapter and not args.full:  # the new one would be saved as if it had been trained over --model alone
        raise BadInput(f"an adapter over another: give that one's folder as the model, --model {args.adapter}")
    for spec in (*(args.data or ()), *(args.eval_data or ())):
        sources.find(spec)  # a wrong name is told before a model is loaded
    if weighted := [spec for spec in args.eval_data or () if sources.find(spec).weight]:
        raise BadInput(f"--eval-data {weighted[0]}: weights are shares of what is learnt, for --data alone")
    if not 0 <= args.eval_split < 1:
        raise BadInput(f"--eval-split is {args.eval_split}; it must be a share, 0 or more and below 1")
    if args.eval_split and args.eval_data:
        raise BadInput("--eval-split and --eval-data: one of them says what to evaluate on")
    for name in ("memory_budget", "tflops"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise BadInput(f"{flag(name)} is {value}; it must be positive")
    if args.memory_budget and args.gradient_checkpointing:
        raise BadInput("--memory-budget chooses what --gradient-checkpointing says; leave one of them out")
    if not args.plan:
        run_folder.check(args)


def check_prompt_length(args: argparse.Namespace) -> None:
    """Raise BadInput where --max-prompt-length is not between 0 and --max-length; None is no limit."""
    if args.max_prompt_length is not None and not 0 < args.max_prompt_length < args.max_length:
        raise BadInput(f"--max-prompt-length {args.max_prompt_length} leaves no room for answers in {args.max_length}")


def parse(parser: Parser, embedded: str) -> argparse.Namespace:
    """The flags; those of assets/`embedded` come first where the embedded default is trained, on its own data."""
    args = parser.parse_args()
    if args.model or args.data or getattr(args, "from_config", None):
        return args
    file = BASE.parent / embedded
    say(f"the embedded default, with the flags in {file}")
    return parser.parse_args([f"@{file}", *sys.argv[1:]])


def default_model(*runs: str) -> Path:
    """The last of the default runs that was finished, else the embedded base."""
    for folder in (run_folder.RUNS[run] for run in runs):
        if run_folder.finished(folder):
            return folder
        if (folder / "metrics.jsonl").exists():
            say(f"{folder} did not finish and holds no model: passed over")
    if runs:
        missing = " or ".join(str(run_folder.RUNS[run]) for run in runs)
        say(f"no finished {missing} here: the embedded base")
    return BASE


def torch_dtype(name: str | None):
    """The torch dtype called `name`; None for None."""
    import torch

    return None if name is None else getattr(torch, name)


def load(args: argparse.Namespace, only_to_decode: bool = False):
    """The model and tokenizer that the flags name; for --plan, on the meta device."""
    from minichat import chat, int4, packed, weights

    wanted = scheme(args)
    if getattr(args, "template", "auto") not in ("auto", "none"):
        chat.template_text(args.template, None)  # a wrong name is told before anything is loaded
    if getattr(args, "plan", False):
        dtype = torch_dtype(args.dtype)
        return weights.load_model(args.model, args.device, dtype, wanted, args.adapter, shapes_alone=True)
    say(f"loading {args.model}")
    how = packed.load_model if only_to_decode else weights.load_model
    model, tokenizer = how(args.model, args.device, torch_dtype(args.dtype), wanted, args.adapter)
    if getattr(args, "activations", "exact") == "int8":
        if not any(isinstance(module, int4.Int4Linear) and module.kernel == "cpu" for module in model.modules()):
            raise BadInput("--activations int8 is of INT4 on the CPU, by its C++ kernel; leave it out, or add --int4")
        int4.set_exact(model, False)
    return model, tokenizer


def run(main: Callable[[], None]) -> None:
    """Run a script's main: bad input and failing disks are one line and exit code 2, Ctrl-C is 130."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & {*os.environ}:
        # before torch comes: how long threads spin for more work. By libgomp's own 300,000 the embedded default trains
        # at 105 tokens/s beside two busy processes on two cores, by this at 500 to 2,400; on free cores they are alike
        os.environ["GOMP_SPINCOUNT"] = "20000"
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file or pipe would be it, and get what is written there
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:  # closed: print() would take standard output instead
        sys.stderr = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a result is not lost for a character that the output cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            told = _report()  # also of a run that failed
        if sys.stdout is not None:
            sys.stdout.flush()
        if told:
            sys.exit(told)
    except BrokenPipeError:  # `infer.py … | head` ends quietly
        _drop_output()
        sys.exit(1)
    except BadInput as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        where = error.filename or ("output" if error.errno == errno.ENOSPC else "the system")
        sys.exit(_fail(f"{where}: {error.strerror or error}"))
    except ModuleNotFoundError as error:
        if error.name not in REQUIRED:
            raise
        how = "`make test` makes .venv, `. .venv/bin/activate` uses it; or pip install -e ."
        sys.exit(_fail(f"{sys.executable} has no module {error.name!r}: {how}"))
    except (MemoryError, RuntimeError) as error:
        # torch's own class for it is there only once torch is, and its CPU allocator raises none
        if not (isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error))):
            raise
        what = str(error)[:200] or "the host has none left"
        sys.exit(_fail(f"out of memory: {what}; try a smaller --batch-size, --max-length, or --int4"))
    except KeyboardInterrupt:
        _drop_output()
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def _report() -> int:
    """What --emulate has seen, to standard error; 1 if a budget was passed."""
    if not _emulated:
        return 0
    from minichat import lazy

    if not lazy.RECORDER.graphs:  # it failed before
        return 0
    return lazy.finish(_emulated[0].max_graphs, _emulated[0].max_syncs)


def _drop_output() -> None:
    """Give up what cannot be written: Python would try it again as it ends, and end with 120, whatever our code."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(message: str) -> int:
    _drop_output()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
