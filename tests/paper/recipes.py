"""Which recipe makes good samples in little time: variations of it, at equal CPU seconds.

    python tests/paper/recipes.py --data walker2d.hdf5 --env Walker2d-v4 --seconds 60
    python tests/paper/recipes.py --table
    python tests/paper/recipes.py --only fast paper --plot frontier.png

Each is trained on one thread for as many steps as take the seconds of processor time there. Results
that --out has are not made again. Starts are not known, and terminals are the column's.
"""

import math
import time
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Literal, Optional

import matplotlib.pyplot as plt
import numpy as np
import torch
from dynamics import NQ, dynamics_scores
from runs import launch, print_row, record, recorded

import edm

PAPER = edm.RECIPES["paper"]
FAST = edm.RECIPES["fast"]
VARIATIONS = {
    "paper": PAPER,
    "fast": FAST,
    "paper, depth 2": replace(PAPER, depth=2),
    "paper, depth 4": replace(PAPER, depth=4),
    "paper, plain MLP, depth 2": replace(PAPER, depth=2, residual=False),  # Table 10
    "paper, plain MLP, depth 4": replace(PAPER, depth=4, residual=False),
    "paper, plain MLP, depth 6": replace(PAPER, depth=6, residual=False),
    "4 x 384": replace(PAPER, lr=2e-3, width=384, depth=4, ema_decay=None),
    "no gates": replace(FAST, width=384, gated=False),
    "no waves": replace(FAST, waves=0),
    "no knots, no new noise": replace(FAST, knots=0, eta=0.0),
    "no guidance": replace(FAST, guidance=1.0),
    "batch 128": replace(FAST, batch_size=128),
    "batch 1024": replace(FAST, batch_size=1024, lr=4e-3),
    "no clipping": replace(FAST, clip=math.inf),
    "betas 0.9, 0.999": replace(FAST, betas=(0.9, 0.999)),
    "EMA 0.995": replace(FAST, ema_decay=0.995),
}
SWEEPS = dict(waves=(1, 2, 5), knots=(100, 10_000), lr=(1e-3, 4e-3), width=(192, 384))
SWEEPS |= dict(depth=(2, 4), guidance=(2.0,))
for _field, _values in SWEEPS.items():
    for _value in _values:
        VARIATIONS[f"{_field} {_value:g}"] = replace(FAST, **{_field: _value})
MODELS = {}  # with other noise levels in training
for _field, _value in (("P_MEAN", -2.0), ("P_MEAN", -0.6), ("P_STD", 1.6)):
    _name = f"{_field.capitalize()} {_value}"
    VARIATIONS[_name] = FAST
    MODELS[_name] = type("EDM", (edm.EDM,), {_field: _value})
edm.RECIPES.update(VARIATIONS)


@dataclass
class Args:
    data: str = ""  # dataset as D4RL-layout HDF5
    env: Literal[tuple(NQ)] = "Walker2d-v4"  # the simulator
    rows: int = 45_000  # to learn from, drawn uniformly; as many others are for the comparison
    seconds: tuple[int, ...] = (60,)  # processor seconds of training, on one thread
    only: tuple[Literal[tuple(VARIATIONS)], ...] = ()  # variations; all if left out
    seeds: tuple[int, ...] = (0,)  # of the network and its batches
    num_samples: int = 20_000  # rows to generate for the scores
    out: str = "recipes.jsonl"  # file to add results to, one JSON object per line
    table: bool = False  # print the results so far as a table instead
    plot: Optional[str] = None  # draw those of --only over the seconds instead, into this PNG


def train(rows, name, steps, seed=0, **options):
    """A model of the variation `name`, on rows [N, dim] whose last column is terminals."""
    args = edm.DiffusionArgs(diffusion_steps=steps, diffusion_recipe=name, diffusion_seed=seed)
    args.checkpoint_every = 100
    make = MODELS.get(name, edm.EDM)
    return edm.train_edm(rows, args, make=make, raw_columns=[-1], **options)


def step_seconds(rows, name):
    """Processor seconds of a training step: of 300, in the fastest 100."""
    times = []
    run = SimpleNamespace(saved=dict(stage=""), log=lambda step, values: None)
    run.save = lambda state: times.append(time.process_time())
    train(rows, name, 400, run=run)
    return min(np.diff(times)) / 100


def print_table(results):
    """The mean over the seeds of each recipe, best classifier's test first."""
    columns = "steps c2st marginal correlation dynamics reward terminals recall precision nearest"
    columns = columns.split()
    for env, seconds in sorted({(r["env"], r["seconds"]) for r in results}):
        table = {}
        for r in results:
            if (r["env"], r["seconds"]) == (env, seconds):
                table.setdefault(r["name"], []).append([r[column] for column in columns])
        print(f"\n{env}, {seconds} s\n")
        print_row("recipe", "seeds", *columns, head=True)
        for name, x in sorted(table.items(), key=lambda item: np.mean(item[1], axis=0)[1]):
            print_row(name, str(len(x)), *(f"{mean:.4g}" for mean in np.mean(x, axis=0)))


def plot_frontier(results, names, path):
    """Scores over seconds of training: a row for each simulator, a line for each variation."""
    envs = sorted({r["env"] for r in results}, reverse=True)
    ticks = sorted({r["seconds"] for r in results})
    scores = dict(c2st="classifier's AUC", correlation="correlation", dynamics="error of s'")
    size = (9, 2.6 * len(envs))
    fig, axes = plt.subplots(len(envs), 3, figsize=size, layout="constrained", squeeze=False)
    for ax, (env, key) in zip(axes.flat, product(envs, scores)):
        for i, name in enumerate(names):
            own = [r for r in results if (r["env"], r["name"]) == (env, name)]
            points = sorted((r["seconds"], r[key]) for r in own)
            means = {}
            for seconds, _ in points:
                means[seconds] = np.mean([r[key] for r in own if r["seconds"] == seconds])
            ax.plot(means.keys(), means.values(), color=f"C{i}", label=name)
            ax.plot(*zip(*points), ".", color=f"C{i}")
        ax.set(xscale="log", yscale="log" if key == "dynamics" else "linear", ylabel=scores[key])
        ax.set(title=env, xlabel="seconds of training on one core")
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0, 0].legend()
    fig.savefig(path, dpi=100)


def main(args):
    results = recorded(args.out)
    if args.table:
        return print_table(results)
    if args.plot:
        return plot_frontier(results, args.only, args.plot)
    torch.set_num_threads(1)
    data = edm.load_transitions(args.data, true_next_obs=True)
    obs_dim = data["observations"].shape[1]
    real = edm.pack(**data)
    real = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
    rows = real[: args.rows]
    others = real[args.rows : 2 * args.rows]
    for seconds, seed, name in product(args.seconds, args.seeds, args.only or VARIATIONS):
        result = dict(env=args.env, rows=len(rows), seconds=seconds, name=name, seed=seed)
        if any(result.items() <= r.items() for r in results):
            continue
        result["steps"] = round(seconds / step_seconds(rows, name))
        model = train(rows, name, result["steps"], seed)
        new = edm.generate_transitions(model, rows, args.num_samples, seed, terminals="column")
        result |= edm.quality_report(others, new)
        result |= dynamics_scores(args.env, edm.unpack(new[:10_000], obs_dim))
        record(args.out, result)
        print(result, flush=True)


if __name__ == "__main__":
    launch(main, Args, __doc__)
