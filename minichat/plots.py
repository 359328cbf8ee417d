"""Pictures of runs; matplotlib is the extra `plots`.

python -m minichat.plots runs/a runs/b --out compare.png       # the same curves of several runs over each other
"""

from collections.abc import Sequence
from pathlib import Path

from minichat import metrics
from minichat.errors import BadInput

PANELS = {  # what a panel shows, where the run has it: title -> (unit, keys)
    "loss": ("nats", ("loss", "eval_loss")),
    "rewards": ("nats", ("margin", "chosen_reward", "rejected_reward")),
    "accuracy": ("share of pairs", ("accuracy", "eval_accuracy")),
}
STYLES = ("-", "--", ":")  # of a panel's keys, where a run has a colour


def draw_run(folder: Path) -> Path:
    """Draw folder/metrics.jsonl as folder/loss.png: the loss, and for DPO rewards and accuracy; its path."""
    return draw([folder], folder / "loss.png")


def draw(folders: Sequence[Path], out: Path) -> Path:
    """Draw the metrics of one or several runs over each other; `out`. Raises BadInput for a run without any, and
    ImportError without the extra.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = {}
    for folder in folders:
        try:
            runs[str(folder)] = metrics.read(folder)
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder} is no run with metrics: {error}") from None
        if not runs[str(folder)]:
            raise BadInput(f"{folder}: its run has logged nothing yet")
        if not all(isinstance(r, dict) and isinstance(r.get("step"), int) for r in runs[str(folder)]):
            raise BadInput(f"{folder}/metrics.jsonl holds a line without a step: it is not a run's")
    alone = len(runs) == 1
    logged = {key for records in runs.values() for record in records for key in record}
    panels = {title: spec for title, spec in PANELS.items() if logged & set(spec[1])}
    if not panels:
        raise BadInput(f"{', '.join(runs)}: nothing to draw: no loss, rewards or accuracy was logged")
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, (title, (unit, keys)) in zip(axes[0], panels.items()):
        for n, (name, records) in enumerate(runs.items()):
            for key, style in zip(keys, STYLES):
                points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
                if points:
                    look = {} if alone else {"color": f"C{n % 10}", "linestyle": style}
                    words = key.replace("_", " ")
                    label = words if alone else name if key == keys[0] else f"{name}, {words}"
                    marker = "o" if len(points) < 3 else None
                    axis.plot(*zip(*points), label=label, marker=marker, linewidth=1.5, **look)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=None if alone else "small")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return out


def main() -> None:
    from minichat import cli

    parser = cli.Parser(__doc__, prog="python -m minichat.plots")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("runs.png"), metavar="FILE", help=".png, .svg or .pdf")
    args = parser.parse_args()
    if args.out.suffix not in (".png", ".svg", ".pdf"):
        raise BadInput(f"--out {args.out}: pictures are .png, .svg or .pdf")
    try:
        print(draw(args.runs, args.out))
    except ImportError as error:
        raise BadInput(f"pictures need matplotlib ({error}): pip install 'minichat[plots]'") from None


if __name__ == "__main__":
    from minichat import cli

    cli.run(main)
