"""Several environments together (Figure 7): interquartile mean, and how probably one kind of run beats another.

    pip install -r tests/paper/requirements-figure7.txt
    python tests/paper/figure7.py runs/* --by data --new synther --old real
    python tests/paper/figure7.py tests/paper/results/small_data.jsonl --by data --new synther --old real

A task is an environment, its data, their number, the augmentation, the script and the name of the experiment. It counts
if both kinds have run there, with as many seeds as the task with the fewest has. Scores are means of the
last three evaluations. The intervals are 95% bootstrap intervals over seeds, by rliable (Agarwal et al. 2021).
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rliable import library, metrics
from runs import last_values, recorded


@dataclass
class Args:
    paths: Annotated[
        tuple[Path, ...], tyro.conf.Positional
    ]  # run folders, or files of results of the other studies (.jsonl)
    by: str  # the argument in which the two kinds differ, such as data or algo
    new: str  # its value for one kind
    old: str  # its value for the other
    draws: int = 5_000  # of the bootstrap


def scores_of(path):
    """(value of arguments, score) of each finished run at a path."""
    if path.suffix == ".jsonl":
        for entry in recorded(path):
            yield entry, entry["values"]["score"]
    elif (path / "final_returns.npz").exists():
        yield json.loads((path / "args.json").read_text()), last_values(path)["score"]


def main(args):
    keys = [key for key in ("script", "exp_name", "env", "dataset_path", "subsample", "augment") if key != args.by]
    found = defaultdict(list)  # (value of --by, task) -> scores
    for settings, score in (pair for path in args.paths for pair in scores_of(path)):
        settings.setdefault("augment", "none")
        found[str(settings.get(args.by)), tuple(str(settings.get(key)) for key in keys)].append(score)
    tasks = sorted({task for _, task in found if {(args.new, task), (args.old, task)} <= set(found)})
    if not tasks:
        sys.exit("error: no task has finished runs of both kinds")
    seeds = min(len(found[kind, task]) for kind in (args.new, args.old) for task in tasks)
    new, old = (np.array([found[kind, task][:seeds] for task in tasks]).T for kind in (args.new, args.old))
    print(f"{len(tasks)} tasks, {seeds} seeds\n\n| | interquartile mean | 95% |\n|---|---|---|")
    iqm = lambda scores: np.array([metrics.aggregate_iqm(scores)])  # noqa: E731
    values, limits = library.get_interval_estimates({"new": new, "old": old}, iqm, reps=args.draws)
    for name in values:
        print(f"| {name} | {values[name][0]:.1f} | {limits[name][0, 0]:.1f} to {limits[name][1, 0]:.1f} |")
    pair = {"new,old": (new, old)}
    values, limits = library.get_interval_estimates(pair, metrics.probability_of_improvement, reps=args.draws)
    low, high = limits["new,old"][:, 0]
    print(f"\nprobability that a new run is better than an old one: {values['new,old']:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
