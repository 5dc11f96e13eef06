"""Several environments together (Figure 7): interquartile mean, and how probably one kind
of run beats another.

    python tests/paper/figure7.py runs/* --new data=synther --old data=real augment=none

It needs requirements-figure7.txt. Environment, dataset and --subsample make a task, and the script
in files of results. Give run folders of one script at a time: they do not name it. A task counts if
it has --seeds runs of both kinds. A score is the mean of a run's last three evaluations. Intervals
are 95% bootstrap intervals over seeds, by rliable (Agarwal et al. 2021).
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import tyro
from runs import last_values, launch, print_row, recorded

import edm


@dataclass
class Args:
    # Run folders, or files of results of the other studies (.jsonl)
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    new: tuple[str, ...]  # runs of one kind: arguments and their values, such as algo=synther
    old: tuple[str, ...]  # runs of the other kind, such as algo=sac utd=20
    seeds: int = 1  # runs of each kind and task
    draws: int = 5_000  # of the bootstrap
    out: Path = Path("figure7.png")  # the picture


def paired_scores(args):
    """Scores of new and old runs, [2, seeds, tasks]. RunError if two runs have the same seeds."""
    finished = []
    for path in args.paths:
        if path.suffix == ".jsonl":
            finished += recorded(path)
        elif (path / "final_returns.npz").exists():
            settings = json.loads((path / "args.json").read_text())
            finished.append(settings | dict(values=last_values(path)))
    kinds = []  # of both: task -> seeds -> score
    for words in (args.new, args.old):
        found = defaultdict(dict)
        wanted = [word.partition("=") for word in words]
        for run in finished:
            if any(str(run.get(key)) != value for key, _, value in wanted):
                continue
            task = tuple(str(run.get(x)) for x in ("script", "env", "dataset_path", "subsample"))
            seeds = (run["seed"], run.get("diffusion_seed"))
            if seeds in found[task]:
                same = f"two runs of {task} with {' '.join(words)} have the same seeds"
                raise edm.RunError(f"{same}: add what they differ in")
            found[task][seeds] = run["values"]["score"]
        kinds.append(found)
    tasks = [x for x in sorted(kinds[0]) if min(len(own[x]) for own in kinds) >= args.seeds]
    if not tasks:
        raise edm.RunError(f"no task has {args.seeds} finished runs of both kinds")
    scores = [[list(found[task].values())[: args.seeds] for task in tasks] for found in kinds]
    return np.array(scores).transpose(0, 2, 1)


def main(args):
    if find_spec("rliable") is None:
        raise edm.RunError("no rliable: pip install -r tests/paper/requirements-figure7.txt")
    from rliable import library, metrics  # here, so that it is not needed by the tests

    new, old = paired_scores(args)
    print(f"{new.shape[1]} tasks, {len(new)} seeds\n")
    print_row("", "interquartile mean", "95%", head=True)
    iqm = lambda scores: np.array([metrics.aggregate_iqm(scores)])  # noqa: E731
    values, limits = library.get_interval_estimates(dict(new=new, old=old), iqm, reps=args.draws)
    fig, ax = plt.subplots(figsize=(6, 1.6), layout="constrained")
    for name, (low, high) in limits.items():
        ax.plot([low[0], high[0]], [name, name], linewidth=8, alpha=0.4, color="C0")
        ax.plot(values[name], [name], "o", color="C0")
        print_row(name, f"{values[name][0]:.1f}", f"{low[0]:.1f} to {high[0]:.1f}")
    pair = {"new,old": (new, old)}
    improvement = metrics.probability_of_improvement
    values, limits = library.get_interval_estimates(pair, improvement, reps=args.draws)
    low, high = limits["new,old"][:, 0]
    sentence = f"a new run is better than an old one with probability {values['new,old']:.2f}"
    print(f"\n{sentence} ({low:.2f} to {high:.2f})")
    ax.set(title=sentence, xlabel="interquartile mean")
    fig.savefig(args.out, dpi=80)


if __name__ == "__main__":
    launch(main, Args, __doc__)
