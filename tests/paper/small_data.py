"""Small datasets (Figures 1a and 4): agents on a few real rows, on what a diffusion model makes of these, and on
augmented ones. And the data multiplier: how many real rows give the score that N upsampled rows give?

    python tests/paper/small_data.py --out small_data                       # collects the data, then hours on two cores
    python tests/paper/small_data.py --out small_data --seeds 5             # goes on where it stopped, with more seeds

The data are replay buffers of SAC agents that `synther_sac_online.py` collects, or a file of yours:

    python tests/paper/small_data.py --out small_data --data walker2d.hdf5 --env Walker2d-v4

The table shows the normalised score, mean of the last three evaluations, and its standard deviation over seeds. Each
seed has its own subset of the rows, diffusion model and agent.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal, Optional

import matplotlib.pyplot as plt
import numpy as np
import tyro
from runs import at_once, result, run

# Name of the data -> the environment to evaluate in, and how to collect them.
DATA = {
    "halfcheetah": ("quickstart", None),  # its data come with the repository
    "hopper": ("Hopper-v4", dict(env="Hopper-v4", total_steps=100_000, utd=3)),
    "walker2d": ("Walker2d-v4", dict(env="Walker2d-v4", total_steps=100_000, utd=3)),
    "cartpole": ("runs:cartpole-swingup-v0", dict(env="dmc/cartpole-swingup", total_steps=30_000)),
}
SCALES = {
    "cpu": dict(updates=20_000, eval_every=2_500, diffusion_steps=10_000, num_samples=100_000),
    "paper": dict(updates=1_000_000, eval_every=5_000, diffusion_steps=100_000, num_samples=5_000_000),
}
METHODS = {"real": {}, "generated": {}, **{x: dict(augment=x) for x in ("additive", "multiplicative", "dynamics")}}


@dataclass
class Args:
    out: Path  # folder for the runs, the table and the picture
    scale: Literal["cpu", "paper"] = "cpu"
    """cpu: 20,000 updates, 10,000 diffusion steps, 100,000 samples; paper: 1M, 100,000 and 5M, which want a GPU"""
    seeds: int = 3  # of the rows, the diffusion model and the agent
    data: tuple[str, ...] = tuple(DATA)  # and files in D4RL's layout
    env: Optional[str] = None  # where agents on such a file are evaluated
    sizes: tuple[int, ...] = (2_500, 5_000, 10_000, 20_000)
    methods: tuple[str, ...] = ("real", "generated")  # and additive, multiplicative, dynamics
    agents: tuple[Literal["td3bc", "iql"], ...] = ("td3bc",)
    workers: int = 2  # runs at a time, one thread each


def collect(args, name):
    """Make the file of a replay buffer, if it is not there."""
    _, options = DATA.get(name, (None, None))
    if options and not (args.out / f"{name}.hdf5").exists():
        options = options | dict(algo="sac", eval_every=10_000, save_dataset=f"{name}.hdf5")
        run(args.out, f"collect-{name}", "synther_sac_online.py", **options)


def score(args, agent, name, method, size, seed):
    """The last score of one agent. Each seed has its own rows and diffusion model; all agents take the samples of the
    first."""

    def run_of(agent):
        options = dict(env=DATA[name][0] if name in DATA else args.env)
        options |= dict(subsample=float(size), seed=seed, diffusion_seed=seed, **SCALES[args.scale], **METHODS[method])
        options |= dict(data="synther" if method == "generated" else "real")
        if name != "halfcheetah":
            options |= dict(dataset_path=f"{name}.hdf5" if name in DATA else str(Path(name).resolve()))
        return f"{agent}-{Path(name).stem}-{method}-{size}-{seed}", f"synther_{agent}.py", options

    own_name, script, options = run_of(agent)
    samples_of = run_of(args.agents[0]) if method == "generated" and agent != args.agents[0] else None
    return result(args.out, own_name, script, samples_of, **options)["score"]


def multiplier(sizes, real, generated, draws=1_000):
    """For each size, how many times as many real rows have the score of the generated ones, and the limits of 80% of
    the bootstrap samples over seeds. Args: scores [sizes, seeds].

    The score of real rows is interpolated over the logarithm of their number. 0 and inf: fewer, or more, than tried."""
    rng, factors = np.random.default_rng(0), []
    for draw in range(draws):
        chosen = [x if draw == 0 else x[:, rng.integers(x.shape[1], size=x.shape[1])] for x in (real, generated)]
        real_mean, generated_mean = (x.mean(1) for x in chosen)
        real_mean = np.maximum.accumulate(real_mean)  # more rows are not worse
        rows = np.exp(np.interp(generated_mean, real_mean, np.log(sizes), left=-np.inf, right=np.inf))
        factors.append(rows / sizes)
    low, high = np.sort(factors, axis=0)[[draws // 10, -draws // 10]]
    return [f"{mid:.1f} ({a:.1f} to {b:.1f})" for mid, a, b in zip(factors[0], low, high)]


def main(args):
    args.out, args.sizes = args.out.resolve(), sorted(args.sizes)
    args.out.mkdir(parents=True, exist_ok=True)
    at_once(args.workers, [partial(collect, args, name) for name in args.data])
    found = defaultdict(list)
    for seed in range(args.seeds):  # so that a table can be shown after each
        for agent in args.agents:  # one after the other, because the second takes the samples of the first
            cells = [(agent, *cell) for cell in product(args.data, args.methods, args.sizes)]
            for cell, value in zip(cells, at_once(args.workers, [partial(score, args, *cell, seed) for cell in cells])):
                found[cell].append(value)
        show(args, found)


def show(args, found):
    """Print the table and draw the picture: scores over the number of rows."""
    print(f"| agent, data, rows | {' | '.join(map(str, args.sizes))} |\n|---{'|---' * len(args.sizes)}|")
    fig, axes = plt.subplots(1, len(args.data), figsize=(4 * len(args.data), 3.5), squeeze=False, layout="constrained")
    for agent in args.agents:
        for ax, name in zip(axes[0], args.data):
            values = {}
            for i, method in enumerate(args.methods):
                scores = np.array([found[agent, name, method, size] for size in args.sizes])
                values[method] = scores
                text = " | ".join(f"{x.mean():.1f} ± {x.std():.1f}" for x in scores)
                print(f"| {agent}, {Path(name).stem}, {method} ({scores.shape[1]} seeds) | {text} |")
                style = dict(color=f"C{i}", linestyle="--" if agent == "iql" else "-", marker="o", capsize=3)
                ax.errorbar(args.sizes, scores.mean(1), scores.std(1), label=f"{agent}, {method}", **style)
            if {"real", "generated"} <= set(values):
                factors = multiplier(args.sizes, values["real"], values["generated"])
                print(f"| {agent}, {Path(name).stem}, data multiplier | {' | '.join(factors)} |")
            ax.set(title=Path(name).stem, xscale="log", xlabel="real transitions", ylabel="normalised score")
    axes[0, 0].legend()
    fig.savefig(args.out / "small_data.png", dpi=100)
    plt.close(fig)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
