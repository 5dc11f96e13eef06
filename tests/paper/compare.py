"""Compare runs of any script: mean and standard deviation over seeds, as a table and as learning curves.

    python tests/paper/compare.py runs/walker2d* --out comparison.png
    python tests/paper/compare.py runs/HalfCheetah* runs/dmc* --wall-clock --out online.png

Runs that differ in their seed only are one line, named after --exp-name and, where that is not enough, the arguments in
which the lines differ. A run with --synthetic-path is on a par with the run that made the samples. Each environment has
its own panel.
"""

import csv
import json
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

NOT_SETTINGS = {"seed", "device", "out_dir", "track", "wandb_project", "wandb_entity", "resume", "compile"} | {
    "checkpoint_every", "save_dataset"
}  # fmt: skip


@dataclass
class Args:
    runs: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """run folders"""
    out: str = "comparison.png"
    """the plot to write"""
    wall_clock: bool = False
    """a second panel over the minutes since the start of each run, evaluations included"""


def read_settings(run):
    """The arguments that decide what an experiment is; those of the diffusion model from the run that trained it."""
    settings = json.loads((run / "args.json").read_text())
    of_samples = [k for k in settings if k.startswith(("diffusion_", "sample_")) or k in ("sampler", "num_samples")]
    if settings.get("data") == "real":
        settings = {k: v for k, v in settings.items() if k not in of_samples}
    elif settings.get("synthetic_path"):
        maker = Path(settings["synthetic_path"]).parent / "args.json"
        if maker.exists():
            made = json.loads(maker.read_text())
            settings |= {k: made[k] for k in of_samples if k in made} | {"synthetic_path": None}
    return settings


def minutes(run):
    """Minutes since the start of a run at each of its evaluations."""
    with open(run / "metrics.csv") as f:
        return np.array([float(row["value"]) / 60 for row in csv.DictReader(f) if row["key"] == "perf/seconds"])


def draw(ax, x, y, label, color):
    mean, std = y.mean(0), y.std(0)
    ax.plot(x, mean, color=color, label=label)
    ax.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)


def main(args):
    found = defaultdict(lambda: defaultdict(dict))  # environment -> settings -> seed -> folder
    for run in map(Path, sorted(args.runs)):
        if (run / "final_returns.npz").exists():  # the run has ended
            settings = read_settings(run)
            key = tuple((k, str(v)) for k, v in settings.items() if k not in NOT_SETTINGS)
            seeds = found[settings["env"]][key]
            if settings["seed"] in seeds:
                sys.exit(f"{run} and {seeds[settings['seed']]} are the same experiment")
            seeds[settings["seed"]] = run
    if not found:
        sys.exit("no finished run among these folders")
    rows, columns = (len(found), 2) if args.wall_clock else (1, len(found))
    fig, axes = plt.subplots(rows, columns, figsize=(5.5 * columns, 4 * rows), squeeze=False, layout="constrained")
    colors = {}  # of a label, the same in all panels
    print("| environment | runs | seeds | after | last score | mean of the last three evaluations | best |")
    print("|---|---|---|---|---|---|---|")
    for row, (env_id, groups) in zip(axes if args.wall_clock else axes.T, found.items()):
        for key, runs in groups.items():
            name = dict(key)["exp_name"]
            others = [dict(other) for other in groups if dict(other)["exp_name"] == name]
            differ = [f"{k}={v}" for k, v in key if any(other.get(k, v) != v for other in others)]
            label = ", ".join([name, *differ])
            finals = [np.load(run / "final_returns.npz") for run in runs.values()]
            color = colors.setdefault(label, f"C{len(colors)}")
            unit = "updates" if "updates" in finals[0] else "steps"
            scored = "returns" if np.isnan(finals[0]["normalized_scores"]).any() else "normalized_scores"
            scores = np.stack([final[scored].mean(1) for final in finals])  # [seeds, evaluations]
            summary = scores[:, -1], scores[:, -3:].mean(1), scores.max(1)
            print(
                f"| {env_id} | {label} | {len(scores)} | {finals[0][unit][-1]:,} {unit} | "
                + " | ".join(f"{x.mean():.1f} ± {x.std():.1f}" for x in summary)
                + " |"
            )
            draw(row[0], finals[0][unit], scores, label, color)
            if args.wall_clock:
                draw(row[1], np.mean([minutes(run) for run in runs.values()], axis=0), scores, label, color)
        row[0].set(xlabel=unit if unit == "updates" else "environment steps", title=env_id)
        row[0].set(ylabel="return" if scored == "returns" else "normalised score")
        if args.wall_clock:
            row[1].set(xlabel="minutes")
        row[0].legend()
    fig.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
