"""Several environments together (Figure 7): interquartile mean, and how probably one kind of run beats another.

    pip install -r tests/paper/requirements-figure7.txt
    python tests/paper/figure7.py --new runs/*generated* --old runs/*real*

An environment counts if both kinds have run there, with as many seeds as the rarest pair has. Scores are those of the
last evaluation. The intervals are 95% bootstrap intervals over seeds, by the library rliable (Agarwal et al. 2021).
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rliable import library, metrics
from runs import last_score


@dataclass
class Args:
    new: tuple[Path, ...]  # run folders of one kind, such as those on generated data
    old: tuple[Path, ...]  # run folders of the other kind
    draws: int = 5_000  # of the bootstrap


def scores_of(folders):
    """{environment: the scores of its finished runs}."""
    found = defaultdict(list)
    for folder in folders:
        if (folder / "final_returns.npz").exists():
            found[json.loads((folder / "args.json").read_text())["env"]].append(last_score(folder))
    return found


def main(args):
    new, old = scores_of(args.new), scores_of(args.old)
    envs = sorted(set(new) & set(old))
    if not envs:
        sys.exit("error: no environment has finished runs of both kinds")
    seeds = min(len(kind[env]) for kind in (new, old) for env in envs)
    new, old = (np.array([kind[env][:seeds] for env in envs]).T for kind in (new, old))  # [seeds, environments]
    print(
        f"{len(envs)} environments ({', '.join(envs)}), {seeds} seeds\n\n| | interquartile mean | 95% |\n|---|---|---|"
    )
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
