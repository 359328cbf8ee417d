"""The folder of a run: whether --out can take one, its config.json, what it replaces, and what an earlier one made."""

import argparse
import json
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from minichat.console import say
from minichat.errors import BadInput
from minichat.version import __version__

RUNS = {"sft": Path("runs/sft"), "dpo": Path("runs/dpo")}
REPLACED = "replaced-run"  # where --overwrite keeps the old run until the new one is saved
WRITES = ("config.json", "metrics.jsonl", "loss.png", "data.jsonl", "bad-records.txt", "checkpoints",
          "tensorboard", "wandb")  # of a run  # fmt: skip
RESULTS = {"adapter": "adapter_config.json", "model": "config.json"}  # of a run: a folder, and what is in every such


def finished(folder: Path) -> bool:
    """Whether a run there has saved its result."""
    return any((folder / kind / last).exists() for kind, last in RESULTS.items())


def check(args: argparse.Namespace) -> None:
    """Raise BadInput if --out cannot take this run; end here if it holds its result."""
    if args.out.exists() and not args.out.is_dir():
        raise BadInput(f"--out {args.out} is a file; it takes a folder")
    if args.resume and args.overwrite:
        raise BadInput("--resume goes on with the run that --overwrite replaces: one of them")
    is_run = (args.out / "metrics.jsonl").exists()
    if args.resume and is_run and finished(args.out):
        further = f"--model {args.out} --out ANOTHER"
        say(f"the run in {args.out} is done: nothing to resume; train further: {further}")
        sys.exit(0)
    if int(os.environ.get("RANK") or 0):  # of several processes the first one looks, and may have begun already
        return
    if is_run and not (args.overwrite or args.resume):
        raise BadInput(
            f"--out {args.out} holds a run already; choose another folder, --overwrite, or --resume if it was stopped"
        )
    for name in (*WRITES, *RESULTS):
        if not is_run and (args.out / name).exists():
            raise BadInput(f"--out {args.out} holds {name}, which is not of a run; choose another folder")


def start(args: argparse.Namespace) -> None:
    """Make the run folder and its config.json: flags, versions and commit.

    An earlier run in it is moved to replaced-run/ until this one has saved its result: one that fails loses nothing.
    """
    import torch

    args.out.mkdir(parents=True, exist_ok=True)
    was_run = (args.out / "metrics.jsonl").exists()
    aside = args.out / REPLACED
    # an old run is there still: the one after it failed, and what that left goes
    failed = (aside / "metrics.jsonl").exists()
    for name in (*WRITES, *RESULTS):
        old = args.out / name
        if not was_run or not old.exists():
            continue
        if failed:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            if not aside.exists():
                say(f"the old run is kept in {aside} until this one is done")
            aside.mkdir(exist_ok=True)
            old.rename(aside / name)
    (args.out / "metrics.jsonl").touch()  # by it the folder is known as a run's, from its first file on
    content = {
        "id": secrets.token_hex(8),
        "minichat": __version__,
        "commit": _commit(),
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {os.cpu_count()} CPUs",
        "flags": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
    }
    (args.out / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def end(args: argparse.Namespace) -> None:
    """The run has its result: what it replaces is no longer needed."""
    aside = args.out / REPLACED
    if (aside / "metrics.jsonl").exists():
        shutil.rmtree(aside, ignore_errors=True)


def _commit() -> str | None:
    """The checkout's commit, with + where it is changed; None for an installed package."""
    if not (Path(__file__).parents[1] / ".git").exists():  # git would find that of whoever installed it
        return None
    try:
        say = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 5, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **say).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **say).stdout.strip()
        return commit + "+" * bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None
