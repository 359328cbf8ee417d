"""Pictures of a run; matplotlib is the extra `plots`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from minichat import metrics

PANELS = {  # what a panel shows, where the run has it: title -> (unit, keys)
    "loss": ("nats", ("loss", "eval_loss")),
    "rewards": ("nats", ("margin", "chosen_reward", "rejected_reward")),
    "accuracy": ("share of pairs", ("accuracy", "eval_accuracy")),
}


def draw_run(folder: Path) -> Path:
    """Draw folder/metrics.jsonl as folder/loss.png: the loss, and for DPO rewards and accuracy; its path."""
    records = metrics.read(folder)
    panels = {title: spec for title, spec in PANELS.items() if any(key in r for r in records for key in spec[1])}
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, (title, (unit, keys)) in zip(axes[0], panels.items()):
        for key in keys:
            points = [(r["step"], r[key]) for r in records if key in r]
            if points:
                marker = "o" if len(points) < 3 else None
                axis.plot(*zip(*points), label=key.replace("_", " "), marker=marker, linewidth=1.5)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "loss.png", dpi=120)
    plt.close(figure)
    return folder / "loss.png"
