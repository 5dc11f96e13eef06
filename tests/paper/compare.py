"""Compare runs of any script: mean and standard deviation over seeds, as a table and as learning curves.

    python tests/paper/compare.py runs/walker2d* --out comparison.png
    python tests/paper/compare.py runs/HalfCheetah* runs/dmc* --wall-clock --out online.png
    python tests/paper/compare.py runs/quickstart* --against subsample --out small_data.png

Runs that differ in their seeds only are one line, named after --exp-name and, where that is not enough, the arguments
in which the lines differ. A run with --synthetic-path is on a par with the run that made the samples. Each environment
has its own panel.
"""

import csv
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Optional

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[2]))
import edm

NOT_SETTINGS = {
    "seed", "diffusion_seed", "device", "out_dir", "track", "wandb_project", "wandb_entity", "resume", "compile",
    "checkpoint_every", "save_dataset",
}  # fmt: skip


@dataclass
class Args:
    runs: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """run folders"""
    out: str = "comparison.png"
    """the plot to write"""
    wall_clock: bool = False
    """a second panel over the minutes since the start of each run, evaluations included"""
    against: Optional[str] = None
    """draw the last scores over this number instead of learning curves: subsample (Figure 4), num_samples (Figure 9)"""


def read_settings(run):
    """The arguments that decide what an experiment is; those of the diffusion model from the run that trained it."""
    settings = json.loads((run / "args.json").read_text())
    of_samples = [k for k in settings if k.startswith(("diffusion_", "sample_")) or k in ("sampler", "num_samples")]
    of_samples = [k for k in of_samples if k != "diffusion_seed"]  # it decides the subsample, too
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


def draw_against(ax, points, colors):
    """Last scores over an argument; points: label -> its value (None: no limit, "": not an argument) -> scores."""
    try:
        values = {value: float("inf" if value == "None" else value) for p in points.values() for value in p if value}
    except ValueError as error:
        raise edm.RunError(f"--against wants an argument whose values are numbers ({error})")
    values = sorted(values, key=values.get)
    ax.set_xticks(range(len(values)), ["all" if v == "None" else f"{float(v):,g}" for v in values])
    for label, scores in points.items():
        if "" in scores:
            ax.axhline(scores[""].mean(), color=colors[label], linestyle="--", label=label)
        else:
            y = [scores[v] for v in values if v in scores]
            x = [values.index(v) for v in values if v in scores]
            style = dict(color=colors[label], marker="o", capsize=3, label=label)
            ax.errorbar(x, [y.mean() for y in y], [y.std() for y in y], **style)


def main(args):
    found = defaultdict(lambda: defaultdict(dict))  # environment -> settings -> seeds -> folder
    for run in map(Path, sorted(args.runs)):
        if (run / "final_returns.npz").exists():  # the run has ended
            settings = read_settings(run)
            key = tuple((k, str(v)) for k, v in settings.items() if k not in NOT_SETTINGS)
            seeds = found[settings["env"]][key]
            seed = settings["seed"], settings.get("diffusion_seed")
            if seed in seeds:
                raise edm.RunError(f"{run} and {seeds[seed]} are the same experiment")
            seeds[seed] = run
    if not found:
        raise edm.RunError("no finished run among these folders")
    if args.against and args.wall_clock:
        raise edm.RunError("--against has no minutes to draw: leave out --wall-clock")
    if args.against and not any(args.against in dict(key) for groups in found.values() for key in groups):
        raise edm.RunError(f"--against {args.against}: no run has such an argument")
    rows, columns = (len(found), 2) if args.wall_clock else (1, len(found))
    fig, axes = plt.subplots(rows, columns, figsize=(5.5 * columns, 4 * rows), squeeze=False, layout="constrained")
    colors = {}  # of a label, the same in all panels
    print("| environment | runs | seeds | after | last score | mean of the last three evaluations | best |")
    print("|---|---|---|---|---|---|---|")
    for row, (env_id, groups) in zip(axes if args.wall_clock else axes.T, found.items()):
        points = defaultdict(dict)
        for key, runs in groups.items():
            name = dict(key)["exp_name"]
            others = [dict(other) for other in groups if dict(other)["exp_name"] == name]
            differ = [k for k, v in key if any(other.get(k, v) != v for other in others)]
            label = ", ".join([name, *(f"{k}={dict(key)[k]}" for k in differ)])
            curve = ", ".join([name, *(f"{k}={dict(key)[k]}" for k in differ if k != args.against)])
            finals = [np.load(run / "final_returns.npz") for run in runs.values()]
            color = colors.setdefault(curve, f"C{len(colors)}")
            unit = "updates" if "updates" in finals[0] else "steps"
            scored = "returns" if np.isnan(finals[0]["normalized_scores"]).any() else "normalized_scores"
            scores = np.stack([final[scored].mean(1) for final in finals])  # [seeds, evaluations]
            summary = scores[:, -1], scores[:, -3:].mean(1), scores.max(1)
            print(
                f"| {env_id} | {label} | {len(scores)} | {finals[0][unit][-1]:,} {unit} | "
                + " | ".join(f"{x.mean():.1f} ± {x.std():.1f}" for x in summary)
                + " |"
            )
            if args.against:
                points[curve][dict(key).get(args.against, "")] = scores[:, -1]
            else:
                draw(row[0], finals[0][unit], scores, curve, color)
            if args.wall_clock:
                draw(row[1], np.mean([minutes(run) for run in runs.values()], axis=0), scores, label, color)
        if args.against:
            draw_against(row[0], points, colors)
        row[0].set(xlabel=args.against or (unit if unit == "updates" else "environment steps"), title=env_id)
        row[0].set(ylabel="return" if scored == "returns" else "normalised score")
        if args.wall_clock:
            row[1].set(xlabel="minutes")
        row[0].legend()
    fig.savefig(args.out, dpi=100)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except edm.RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
