"""Several environments together (Figure 7): interquartile mean, and how probably one kind of run beats another.

    pip install -r tests/paper/requirements-figure7.txt
    python tests/paper/figure7.py runs/* --new data=synther --old data=real augment=none
    python tests/paper/figure7.py small_data/small_data.jsonl --seeds 2 --new data=synther --old data=real augment=none

Environment, dataset and --subsample make a task, and the script in files of results. Give run folders of one script at
a time: they do not name it. A task counts if it has --seeds runs of both kinds; what is more is left out. A run's score
is the mean of its last three evaluations. The intervals are 95% bootstrap intervals over seeds, by rliable (Agarwal et
al. 2021).
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import tyro
from runs import last_values, launch, recorded

import edm


@dataclass
class Args:
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders, or files of results of the other studies (.jsonl)"""
    new: tuple[str, ...]
    """runs of one kind: arguments and their values, such as algo=synther"""
    old: tuple[str, ...]
    """runs of the other kind, such as algo=sac utd=20"""
    seeds: int = 1  # runs of each kind and task
    draws: int = 5_000  # of the bootstrap
    out: Path = Path("figure7.png")  # the picture


def scores_of(path):
    """(arguments, score) of each finished run at a path."""
    if path.suffix == ".jsonl":
        for entry in recorded(path):
            yield entry, entry["values"]["score"]
    elif (path / "final_returns.npz").exists():
        yield json.loads((path / "args.json").read_text()), last_values(path)["score"]


def paired_scores(args):
    """Scores of both kinds, [seeds, tasks] each. Raises edm.RunError if there are none, or if one kind has two runs of
    a task with the same seeds."""
    found = defaultdict(dict)  # (kind, task) -> seeds -> score
    for settings, score in (pair for path in args.paths for pair in scores_of(path)):
        task = tuple(str(settings.get(key)) for key in ("script", "env", "dataset_path", "subsample"))
        seeds = settings["seed"], settings.get("diffusion_seed")
        for kind in ("new", "old"):
            if all(
                str(settings.get(key)) == value for key, _, value in (x.partition("=") for x in getattr(args, kind))
            ):
                if seeds in found[kind, task]:
                    raise edm.RunError(f"two --{kind} runs of {task} have the same seeds: add what they differ in")
                found[kind, task][seeds] = score
    counts = {task: min(len(found[kind, task]) for kind in ("new", "old")) for _, task in list(found)}
    tasks = sorted(task for task, count in counts.items() if count >= args.seeds)
    if not tasks:
        raise edm.RunError(f"no task has {args.seeds} finished runs of both kinds")
    return (np.array([[*found[kind, task].values()][: args.seeds] for task in tasks]).T for kind in ("new", "old"))


def main(args):
    from rliable import library, metrics  # here, so that it is not needed by the tests

    new, old = paired_scores(args)
    print(f"{new.shape[1]} tasks, {len(new)} seeds\n\n| | interquartile mean | 95% |\n|---|---|---|")
    iqm = lambda scores: np.array([metrics.aggregate_iqm(scores)])  # noqa: E731
    values, limits = library.get_interval_estimates({"new": new, "old": old}, iqm, reps=args.draws)
    fig, ax = plt.subplots(figsize=(6, 1.6), layout="constrained")
    for name in values:
        ax.plot(limits[name][:, 0], [name, name], linewidth=8, alpha=0.4, color="C0")
        ax.plot(values[name], [name], "o", color="C0")
        print(f"| {name} | {values[name][0]:.1f} | {limits[name][0, 0]:.1f} to {limits[name][1, 0]:.1f} |")
    pair = {"new,old": (new, old)}
    values, limits = library.get_interval_estimates(pair, metrics.probability_of_improvement, reps=args.draws)
    low, high = limits["new,old"][:, 0]
    print(f"\nprobability that a new run is better than an old one: {values['new,old']:.2f} ({low:.2f} to {high:.2f})")
    ax.set(title=f"a new run is better with probability {values['new,old']:.2f}", xlabel="interquartile mean")
    fig.savefig(args.out, dpi=80)


if __name__ == "__main__":
    launch(main, Args, __doc__)
