"""Compare finished runs of any script: mean and standard deviation over seeds, as a table and as
learning curves.

    python tests/paper/compare.py runs/walker2d* --by data terminals --out comparison.png
    python tests/paper/compare.py runs/quickstart* --by data augment --against subsample

A line is the runs of one environment that agree in --exp-name and in the arguments of --by, and
differ in their seeds. Each environment has its own panel.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import matplotlib.pyplot as plt
import numpy as np
import tyro
from runs import launch, print_row, read_log

import edm


@dataclass
class Args:
    # Run folders; those that have not ended are left out
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: str = "comparison.png"  # the plot to write
    by: tuple[str, ...] = ("data", "algo")  # arguments whose values make a line of their own
    wall_clock: bool = False  # a second panel over minutes since the start, evaluations included
    # Draw the last scores over this number: subsample (Figure 4), num_samples (Figure 9)
    against: Optional[str] = None


def find_runs(args):
    """(environment, label, value of --against) -> seeds -> folder of each finished run."""
    found = defaultdict(dict)
    for run in sorted(args.runs):
        if not (run / "final_returns.npz").exists():
            continue
        settings = json.loads((run / "args.json").read_text())
        words = [f"{key}={settings[key]}" for key in args.by if key in settings]
        label = ", ".join([settings["exp_name"], *words])
        seeds = (settings["seed"], settings["diffusion_seed"])
        own = found[settings["env"], label, settings.get(args.against)]
        if seeds in own:
            same = f"{run} and {own[seeds]} have the same seeds"
            raise edm.RunError(f"{same}: add to --by what they differ in")
        own[seeds] = run
    if not found:
        raise edm.RunError("no finished run among these folders")
    return found


def draw(ax, x, scores, **style):
    """Mean and standard deviation over the seeds of scores [seeds, evaluations]."""
    mean = scores.mean(0)
    std = scores.std(0)
    ax.plot(x, mean, **style)
    ax.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.2, linewidth=0)


def main(args):
    found = find_runs(args)
    envs, labels, values = (list(dict.fromkeys(column)) for column in zip(*found))
    values.sort(key=lambda value: np.inf if value is None else value)  # None: no limit
    shape = (len(envs), 2) if args.wall_clock else (1, len(envs))
    size = (5.5 * shape[1], 4 * shape[0])
    fig, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    panels = dict(zip(envs, axes if args.wall_clock else axes.T))
    points = defaultdict(list)  # (environment, label) -> place over --against, mean, deviation
    last_three = "mean of the last three evaluations"
    print_row("environment", "runs", "seeds", "after", "last score", last_three, "best", head=True)
    for (env, label, value), runs in found.items():
        finals = [np.load(run / "final_returns.npz") for run in runs.values()]
        unit = "updates" if "updates" in finals[0] else "steps"
        steps = finals[0][unit]
        key = "returns" if np.isnan(finals[0]["normalized_scores"]).any() else "normalized_scores"
        if len({len(final[key]) for final in finals}) > 1:
            raise edm.RunError(f"runs of {label} differ: add to --by what they differ in")
        scores = np.stack([final[key].mean(1) for final in finals])  # [seeds, evaluations]
        name = f"{label}, {args.against}={value}" if args.against else label
        columns = (scores[:, -1], scores[:, -3:].mean(1), scores.max(1))
        columns = [f"{x.mean():.1f} +- {x.std():.1f}" for x in columns]
        print_row(env, name, str(len(scores)), f"{steps[-1]:,} {unit}", *columns)
        style = dict(label=label, color=f"C{labels.index(label)}")
        ylabel = "return" if key == "returns" else "normalised score"
        panels[env][0].set(title=env, xlabel=args.against or unit, ylabel=ylabel)
        points[env, label].append((values.index(value), scores[:, -1].mean(), scores[:, -1].std()))
        if not args.against:
            draw(panels[env][0], steps, scores, **style)
        if args.wall_clock:
            seconds = np.mean([read_log(run)["perf/seconds"] for run in runs.values()], axis=0)
            draw(panels[env][1], seconds / 60, scores, **style)
            panels[env][1].set(xlabel="minutes")
    for (env, label), own in points.items() if args.against else ():
        style = dict(label=label, color=f"C{labels.index(label)}", marker="o", capsize=3)
        panels[env][0].errorbar(*zip(*sorted(own)), **style)
        names = ["all" if value is None else f"{value:,g}" for value in values]
        panels[env][0].set_xticks(range(len(values)), names)
    for panel in panels.values():
        panel[0].legend()
    fig.savefig(args.out, dpi=100)


if __name__ == "__main__":
    launch(main, Args, __doc__)
