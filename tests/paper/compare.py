"""Compare runs of any script: mean and standard deviation over seeds, as a table and as learning curves.

    python tests/paper/compare.py runs/walker2d* --out comparison.png
    python tests/paper/compare.py runs/HalfCheetah* --wall-clock --out online.png

Runs whose folders differ in seed and time only are one line.
"""

import csv
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Args:
    runs: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """run folders"""
    out: str = "comparison.png"
    """the plot to write"""
    wall_clock: bool = False
    """a second panel over the minutes since the start of each run"""


def minutes(run):
    """Minutes since the start of a run at each of its evaluations."""
    with open(Path(run) / "metrics.csv") as f:
        return np.array([float(row["value"]) / 60 for row in csv.DictReader(f) if row["key"] == "perf/seconds"])


def draw(ax, x, y, label):
    mean, std = y.mean(0), y.std(0)
    ax.plot(x, mean, label=label)
    ax.fill_between(x, mean - std, mean + std, alpha=0.2, linewidth=0)


def main(args):
    groups = defaultdict(list)
    for run in sorted(args.runs):
        if (Path(run) / "final_returns.npz").exists():  # the run has ended
            groups[re.sub(r"__\d+__\d+$", "", Path(run).name)].append(run)
    if not groups:
        sys.exit("no finished run among these folders")
    fig, axes = plt.subplots(1, 1 + args.wall_clock, figsize=(6 + 5 * args.wall_clock, 4), layout="constrained")
    axes = np.atleast_1d(axes)
    print("| runs | seeds | last score | mean of the last three evaluations | best |")
    print("|---|---|---|---|---|")
    for name, runs in groups.items():
        finals = [np.load(Path(run) / "final_returns.npz") for run in runs]
        unit = "updates" if "updates" in finals[0] else "steps"
        key = "returns" if np.isnan(finals[0]["normalized_scores"]).any() else "normalized_scores"
        scores = np.stack([final[key].mean(1) for final in finals])  # [seeds, evaluations]
        columns = scores[:, -1], scores[:, -3:].mean(1), scores.max(1)
        print(f"| {name} | {len(scores)} | " + " | ".join(f"{x.mean():.1f} ± {x.std():.1f}" for x in columns) + " |")
        label = f"{name.split('__')[-1]} ({len(scores)} seeds)"
        draw(axes[0], finals[0][unit], scores, label)
        if args.wall_clock:
            draw(axes[1], np.mean([minutes(run) for run in runs], axis=0), scores, label)
    axes[0].set(xlabel=unit if unit == "updates" else "environment steps")
    axes[0].set(ylabel="return" if key == "returns" else "normalised score", title=next(iter(groups)).split("__")[0])
    if args.wall_clock:
        axes[1].set(xlabel="minutes")
    axes[0].legend()
    fig.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Args))
