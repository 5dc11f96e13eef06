"""Which recipe makes good samples in little time: variations of the diffusion model's training, at equal CPU seconds.

    python tests/paper/recipes.py --data walker2d.hdf5 --env Walker2d-v4 --seconds 60 --out recipes.jsonl
    python tests/paper/recipes.py --out recipes.jsonl --table
    python tests/paper/recipes.py --out recipes.jsonl --only fast paper --plot frontier.png

Each variation is trained on one thread for as many steps as take the given seconds of processor time there, so that
other work on the machine changes nothing but the waiting (100 steps are timed first, the best of three turns). Results
that --out has already are not made again, so the command can be stopped and repeated. Start rows are not repeated here,
and terminals are the column's.
"""

import copy
import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import matplotlib.pyplot as plt
import numpy as np
import torch
from dynamics import NQ, dynamics_scores
from runs import launch

import edm

PAPER = dict(lr=3e-4, batch_size=256, width=1024, depth=6, residual=True, time_dim=128, gated=False, waves=0, knots=0)
PAPER |= dict(betas=(0.9, 0.99), ema=0.995, clip=1.0, p_mean=-1.2, p_std=1.2, early=0.0, guidance=1.5)
SMALL = dict(PAPER, lr=2e-3, width=384, depth=4, time_dim=128, ema="scaled")
FAST = dict(SMALL, width=256, depth=3, time_dim=256, gated=True, waves=3, knots=1_000, early=0.1)
VARIATIONS = {
    "paper": PAPER,
    "fast": FAST,
    **{f"paper, depth {depth}": dict(PAPER, depth=depth) for depth in (2, 4)},
    **{f"paper, plain MLP, depth {depth}": dict(PAPER, depth=depth, residual=False) for depth in (2, 4, 6)},  # Table 10
    "4 x 384": SMALL,
    "no gates": dict(FAST, width=384, time_dim=384, gated=False),
    "no waves": dict(FAST, waves=0),
    "no knots, no new noise": dict(FAST, knots=0),  # the first brings the second in `edm.generate`
    "no guidance": dict(FAST, early=0.0),
    "guidance 2": dict(FAST, guidance=2.0),
    **{f"waves {waves}": dict(FAST, waves=waves) for waves in (1, 2, 5)},
    **{f"knots {knots}": dict(FAST, knots=knots) for knots in (100, 10_000)},
    **{f"lr {lr:g}": dict(FAST, lr=lr) for lr in (1e-3, 4e-3)},
    **{f"width {width}": dict(FAST, width=width, time_dim=width) for width in (192, 384)},
    **{f"depth {depth}": dict(FAST, depth=depth) for depth in (2, 4)},
    "batch 128": dict(FAST, batch_size=128),
    "batch 1024": dict(FAST, batch_size=1024, lr=4e-3),
    "no clipping": dict(FAST, clip=math.inf),
    "betas 0.9, 0.999": dict(FAST, betas=(0.9, 0.999)),
    "EMA 0.995": dict(FAST, ema=0.995),
    **{f"P_mean {p_mean}": dict(FAST, p_mean=p_mean) for p_mean in (-2.0, -0.6)},
    "P_std 1.6": dict(FAST, p_std=1.6),
}


@dataclass
class Args:
    data: str = ""
    """dataset as D4RL-layout HDF5"""
    env: Literal[tuple(NQ)] = "Walker2d-v4"
    """simulator"""
    rows: int = 45_000
    """real transitions to learn from, drawn uniformly; as many others are compared with the samples"""
    seconds: tuple[int, ...] = (60,)
    """processor seconds of training, on one thread"""
    only: tuple[Literal[tuple(VARIATIONS)], ...] = ()
    """names of variations; all if left out"""
    seeds: tuple[int, ...] = (0,)
    """seeds of the network and its batches"""
    num_samples: int = 20_000
    """rows to generate for the scores"""
    out: str = "recipes.jsonl"
    """file to add results to, one JSON object per line"""
    table: bool = False
    """print the results so far as a table instead"""
    plot: Optional[str] = None
    """draw the results so far of the variations in --only over the seconds instead, into this PNG"""


def start_training(rows, recipe, seed, steps):
    """The average of a model's weights, and a function that makes step i of its training."""
    torch.manual_seed(seed)
    sizes = {key: recipe[key] for key in ("width", "depth", "residual", "time_dim", "gated", "waves", "knots")}
    model = edm.EDM(rows.shape[1], guided=recipe["early"] > 0, **sizes)
    model.P_MEAN, model.P_STD, model.GUIDANCE = recipe["p_mean"], recipe["p_std"], recipe["guidance"]
    model.fit_normalizer(rows, raw_columns=[-1])
    x, ema = model.normalize(rows), copy.deepcopy(model).requires_grad_(False)
    params, ema_params = list(model.denoiser.parameters()), list(ema.denoiser.parameters())
    optimizer = torch.optim.Adam(params, betas=recipe["betas"], fused=True)
    beta = max(1 - 500 / steps, 0.0) if recipe["ema"] == "scaled" else recipe["ema"]

    def step(i):
        optimizer.param_groups[0]["lr"] = 0.5 * recipe["lr"] * (1 + math.cos(math.pi * i / steps))
        optimizer.zero_grad(set_to_none=False)
        model.loss(x[torch.randint(len(x), (recipe["batch_size"],))]).backward()
        torch.nn.utils.clip_grad_norm_(params, recipe["clip"])
        optimizer.step()
        if i % 10 == 0:
            weight = max(1 - beta, (i - 99) ** (-2 / 3)) if i > 100 else 1.0
            torch._foreach_lerp_(ema_params, [p.detach() for p in params], weight)
        if recipe["early"] and i == round(recipe["early"] * steps):
            ema.early.load_state_dict(ema.denoiser.state_dict())

    return ema, step


def run(rows, others, recipe, seconds, seed, args):
    """Train on rows, generate, and compare with other real rows. Terminals are the column's. Returns a dict."""
    _, step = start_training(rows, recipe, seed, 1_000)
    times = [time.process_time()]
    for i in range(300):
        step(i)
        times.append(time.process_time())
    steps = round(100 * seconds / min(np.diff(times[::100])))
    model, step = start_training(rows, recipe, seed, steps)
    for i in range(steps):
        step(i)
    new = edm.generate(model, args.num_samples, edm.DiffusionArgs(diffusion_seed=seed))
    new[:, -1] = new[:, -1] > 0.5
    obs_dim = 11 if args.env == "Hopper-v4" else 17
    data = edm.unpack(new[:10_000], obs_dim, rows.shape[1] - 2 * obs_dim - 2)
    return dict(steps=steps) | edm.quality_report(others, new) | dynamics_scores(args.env, data)


def print_table(results):
    """The mean over the seeds of each recipe, best classifier's test first."""
    columns = "steps c2st marginal correlation dynamics reward terminals recall precision nearest".split()
    for env, seconds in sorted({(r["env"], r["seconds"]) for r in results}):
        print(f"\n{env}, {seconds} s\n\n| recipe | seeds | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
        own, table = [r for r in results if (r["env"], r["seconds"]) == (env, seconds)], {}
        for r in own:
            table.setdefault(r["name"], []).append([r[column] for column in columns])
        for name, x in sorted(table.items(), key=lambda item: np.mean(item[1], axis=0)[1]):
            print(f"| {name} | {len(x)} | {' | '.join(f'{mean:.4g}' for mean in np.mean(x, axis=0))} |")


def plot_frontier(results, names, path):
    """Each score over the seconds of training: a line for each variation, a row of panels for each simulator."""
    envs = sorted({r["env"] for r in results}, reverse=True)
    labels = {"c2st": "classifier's AUC", "correlation": "correlation", "dynamics": "squared error of s'"}
    fig, axes = plt.subplots(len(envs), 3, figsize=(9, 2.6 * len(envs)), layout="constrained", squeeze=False)
    for env, row in zip(envs, axes):
        for ax, (key, label) in zip(row, labels.items()):
            for i, name in enumerate(names):
                points = [(r["seconds"], r[key]) for r in results if (r["env"], r["name"]) == (env, name)]
                means = {s: np.mean([score for t, score in points if t == s]) for s, _ in sorted(points)}
                ax.plot(means.keys(), means.values(), color=f"C{i}", label=name)
                ax.plot(*zip(*points), ".", color=f"C{i}")
            ax.set(xscale="log", yscale="log" if key == "dynamics" else "linear", ylabel=label)
            ax.set_xticks(ticks := sorted({r["seconds"] for r in results}), ticks)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        row[1].set(title=env, xlabel="seconds of training on one core")
    axes[0, 0].legend()
    fig.savefig(path, dpi=100)


def main(args):
    results = [json.loads(line) for line in open(args.out)] if Path(args.out).exists() else []
    if args.table:
        return print_table(results)
    if args.plot:
        return plot_frontier(results, args.only, args.plot)
    torch.set_num_threads(1)
    real = edm.pack(**edm.load_transitions(args.data, true_next_obs=True))
    real = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
    rows, others = real[: args.rows], real[args.rows : 2 * args.rows]
    done = {(r["env"], r["rows"], r["seconds"], r["name"], r["seed"]) for r in results}
    for seconds, seed, name in itertools.product(args.seconds, args.seeds, args.only or VARIATIONS):
        if (args.env, len(rows), seconds, name, seed) in done:
            continue
        result = dict(env=args.env, rows=len(rows), seconds=seconds, name=name, seed=seed)
        result |= run(rows, others, VARIATIONS[name], seconds, seed, args)
        with open(args.out, "a") as f:
            f.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    launch(main, Args, __doc__)
