"""Compare runs: mean and standard deviation over seeds, as a table and as learning curves.

    python tests/paper/compare.py runs/walker2d* --out comparison.png

Runs whose folders differ in seed and time only are one line.
"""

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


def main(args):
    groups = defaultdict(list)
    for run in sorted(args.runs):
        path = Path(run) / "final_returns.npz"
        if path.exists():  # the run has ended
            groups[re.sub(r"__\d+__\d+$", "", Path(run).name)].append(np.load(path))
    if not groups:
        sys.exit("no finished run among these folders")
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    print("| runs | seeds | last score | mean of the last three evaluations | best |")
    print("|---|---|---|---|---|")
    for name, results in groups.items():
        scores = np.stack([r["normalized_scores"].mean(1) for r in results])  # [seeds, evaluations]
        columns = scores[:, -1], scores[:, -3:].mean(1), scores.max(1)
        print(f"| {name} | {len(scores)} | " + " | ".join(f"{x.mean():.1f} ± {x.std():.1f}" for x in columns) + " |")
        updates, mean, std = results[0]["updates"], scores.mean(0), scores.std(0)
        ax.plot(updates, mean, label=f"{name.split('__')[-1]} ({len(scores)} seeds)")
        ax.fill_between(updates, mean - std, mean + std, alpha=0.2, linewidth=0)
    ax.set(xlabel="updates", ylabel="normalised score", title=next(iter(groups)).split("__")[0])
    ax.legend()
    fig.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Args))
