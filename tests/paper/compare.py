"""Compare finished runs of any script: mean and standard deviation over seeds, as a table and as learning curves.

    python tests/paper/compare.py runs/walker2d* --by data terminals --out comparison.png
    python tests/paper/compare.py runs/HalfCheetah* runs/dmc* --wall-clock --out online.png
    python tests/paper/compare.py runs/quickstart* --by data augment --against subsample --out small_data.png

A line is the runs of one environment that agree in --exp-name and in the arguments of --by, and differ in their seeds.
Each environment has its own panel.
"""

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import matplotlib.pyplot as plt
import numpy as np
import tyro
from runs import launch

import edm


@dataclass
class Args:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run folders; those that have not ended are left out"""
    out: str = "comparison.png"
    """the plot to write"""
    by: tuple[str, ...] = ("data", "algo")
    """arguments, such as data, terminals, diffusion_recipe, whose values make a line of their own"""
    wall_clock: bool = False
    """a second panel over the minutes since the start of each run, evaluations included"""
    against: Optional[str] = None
    """draw the last scores over this number instead of learning curves: subsample (Figure 4), num_samples (Figure 9)"""


def minutes(run):
    """Minutes since the start of a run at each of its evaluations."""
    with open(run / "metrics.csv") as f:
        return np.array([float(row["value"]) / 60 for row in csv.DictReader(f) if row["key"] == "perf/seconds"])


def draw(ax, x, scores, **style):
    """Mean and standard deviation over the seeds of scores [seeds, evaluations]."""
    mean, std = scores.mean(0), scores.std(0)
    ax.plot(x, mean, **style)
    ax.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.2, linewidth=0)


def main(args):
    found = defaultdict(dict)  # (environment, label, value of --against) -> seeds -> folder
    for run in map(Path, sorted(args.runs)):
        if (run / "final_returns.npz").exists():
            settings = json.loads((run / "args.json").read_text())
            label = ", ".join([settings["exp_name"], *(f"{k}={settings[k]}" for k in args.by if k in settings)])
            seeds = settings["seed"], settings["diffusion_seed"]
            other = found[settings["env"], label, settings.get(args.against)].setdefault(seeds, run)
            if other != run:
                raise edm.RunError(f"{run} and {other} have the same seeds: add to --by what they differ in")
    if not found:
        raise edm.RunError("no finished run among these folders")
    envs, labels, values = ([*dict.fromkeys(column)] for column in zip(*found))
    values = sorted(values, key=lambda value: np.inf if value is None else value)  # None: no limit
    shape = (len(envs), 2) if args.wall_clock else (1, len(envs))
    fig, axes = plt.subplots(*shape, figsize=(5.5 * shape[1], 4 * shape[0]), squeeze=False, layout="constrained")
    panels = dict(zip(envs, axes if args.wall_clock else axes.T))
    print("| environment | runs | seeds | after | last score | mean of the last three evaluations | best |")
    print("|---|---|---|---|---|---|---|")
    points = defaultdict(list)  # (environment, label) -> (position on the axis of --against, mean, deviation)
    for (env, label, value), runs in found.items():
        finals = [np.load(run / "final_returns.npz") for run in runs.values()]
        unit = "updates" if "updates" in finals[0] else "steps"
        scored = "returns" if np.isnan(finals[0]["normalized_scores"]).any() else "normalized_scores"
        if len({len(final[scored]) for final in finals}) > 1:
            raise edm.RunError(f"runs of {label} on {env} differ in their evaluations: add to --by what they differ in")
        scores = np.stack([final[scored].mean(1) for final in finals])  # [seeds, evaluations]
        name = f"{label}, {args.against}={value}" if args.against else label
        columns = scores[:, -1], scores[:, -3:].mean(1), scores.max(1)
        summary = " | ".join(f"{x.mean():.1f} +- {x.std():.1f}" for x in columns)
        print(f"| {env} | {name} | {len(scores)} | {finals[0][unit][-1]:,} {unit} | {summary} |")
        style = dict(label=label, color=f"C{labels.index(label)}")
        points[env, label].append((values.index(value), scores[:, -1].mean(), scores[:, -1].std()))
        if not args.against:
            draw(panels[env][0], finals[0][unit], scores, **style)
        if args.wall_clock:
            draw(panels[env][1], np.mean([minutes(run) for run in runs.values()], axis=0), scores, **style)
            panels[env][1].set(xlabel="minutes")
        ylabel = "return" if scored == "returns" else "normalised score"
        panels[env][0].set(title=env, xlabel=args.against or unit, ylabel=ylabel)
    if args.against:
        for (env, label), own in points.items():
            style = dict(label=label, color=f"C{labels.index(label)}", marker="o", capsize=3)
            panels[env][0].errorbar(*zip(*sorted(own)), **style)
            panels[env][0].set_xticks(range(len(values)), ["all" if v is None else f"{v:,g}" for v in values])
    for panel in panels.values():
        panel[0].legend()
    fig.savefig(args.out, dpi=100)


if __name__ == "__main__":
    launch(main, Args, __doc__)
