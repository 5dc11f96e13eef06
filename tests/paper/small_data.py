"""Small datasets (Figures 1a and 4): agents on a few real rows, on what a diffusion model
makes of these, and on augmented ones. And the data multiplier: how many times as many real rows
give the score of the generated ones?

    python tests/paper/small_data.py --out small_data --seeds 5       # hours
    python tests/paper/small_data.py --out small_data --data my_data.hdf5 --env Walker2d-v4
    python tests/paper/small_data.py --out tests/paper/results --seeds 0    # our own results

The data are replay buffers of SAC agents, which are collected first, or a file of yours. A score is
the mean of a run's last three evaluations. Each seed has its own rows, diffusion model and agent.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal, Optional

import matplotlib.pyplot as plt
import numpy as np
import runs

import edm

# Name of the data -> the environment to evaluate in, and how to collect them
DATA = {
    "halfcheetah": ("quickstart", None),  # its data come with the repository
    "hopper": ("Hopper-v4", dict(env="Hopper-v4", total_steps=100_000, utd=3)),
    "walker2d": ("Walker2d-v4", dict(env="Walker2d-v4", total_steps=100_000, utd=3)),
    "cartpole": ("runs:cartpole-swingup-v0", dict(env="dmc/cartpole-swingup", total_steps=30_000)),
}
SMALL = dict(updates=50_000, eval_every=5_000, diffusion_steps=10_000, num_samples=100_000)
SCALES = dict(cpu=SMALL, paper=runs.PAPER)
METHODS = {  # in the order of the picture's colours
    "generated": dict(data="synther", augment="none"),
    "real": dict(data="real", augment="none"),
}
METHODS |= {x: dict(data="real", augment=x) for x in ("additive", "multiplicative", "dynamics")}


@dataclass(kw_only=True)
class Args(runs.StudyArgs):
    seeds: int = 3  # of the rows, the diffusion model and the agent; 0: nothing is run
    data: tuple[str, ...] = tuple(DATA)  # names of data, or a file in D4RL's layout
    env: Optional[str] = None  # where agents on such a file are evaluated
    sizes: tuple[int, ...] = (2_500, 5_000, 10_000, 20_000)  # numbers of real rows
    methods: tuple[Literal[tuple(METHODS)], ...] = ("real", "generated")
    agents: tuple[Literal["td3bc", "iql"], ...] = ("td3bc",)


def collect(args, name):
    """Make the file of a replay buffer, if it is not there."""
    _, options = DATA.get(name, (None, None))
    if options and not (args.out / f"{name}.hdf5").exists():
        options = options | dict(algo="sac", eval_every=10_000, save_dataset=f"{name}.hdf5")
        runs.run(args.out, f"collect-{name}", "synther_sac_online.py", **options)


def run_of(args, agent, name, method, size, seed):
    """Name, script and options of one run."""
    env, _ = DATA.get(name, (args.env, None))
    options = dict(env=env, subsample=float(size), seed=seed, diffusion_seed=seed)
    options |= SCALES[args.scale] | METHODS[method]
    if name != "halfcheetah":
        path = f"{name}.hdf5" if name in DATA else str(Path(name).resolve())
        options |= dict(dataset_path=path, true_next_obs=True)
    return f"{agent}-{Path(name).stem}-{method}-{size}-{seed}", f"synther_{agent}.py", options


def make(args, agent, *cell):
    """Make one run, if it is not recorded. All agents take the samples of TD3+BC."""
    name, script, options = run_of(args, agent, *cell)
    takes_samples = options["data"] == "synther" and agent != "td3bc"
    source = run_of(args, "td3bc", *cell) if takes_samples else None
    runs.result(args.out / "small_data.jsonl", name, script, source, **options)


def multiplier(real, generated, draws=1_000):
    """For each size of `generated`, how many times as many real rows have its score, and the limits
    of 80% of the bootstrap samples over seeds. Both are dicts: number of rows -> scores of all
    seeds. The score of real rows is interpolated over the logarithm of their number."""
    rng = np.random.default_rng(0)
    factors = []
    for draw in range(draws):
        means = []
        for scores in (real, generated):
            own = [x if draw == 0 else rng.choice(x, len(x)) for _, x in sorted(scores.items())]
            means.append([np.mean(x) for x in own])
        real_means = np.maximum.accumulate(means[0])  # more rows are not worse
        logs = np.log(sorted(real))
        log_rows = np.interp(means[1], real_means, logs, left=-np.inf, right=np.inf)
        factors.append(np.exp(log_rows) / sorted(generated))
    low, high = np.sort(factors, axis=0)[[draws // 10, -draws // 10]]
    words = {0: "fewer than tried", np.inf: "more than tried"}  # numbers of real rows
    texts = []
    for values in zip(factors[0], low, high):
        mid, least, most = (words.get(x, f"{x:.1f}") for x in values)
        texts.append(mid if mid == least == most else f"{mid} ({least} to {most})")
    return texts


def main(args):
    for name in args.data:
        is_file = Path(name).is_file() and args.env and Path(name).stem not in DATA
        if name not in DATA and not is_file:
            names = ", ".join(DATA)
            raise edm.RunError(f"{name} is none of {names}; a file needs --env, and another name")
    known = {entry["name"] for entry in runs.recorded(args.out / "small_data.jsonl")}
    cells = list(product(args.agents, args.data, args.methods, args.sizes, range(args.seeds)))
    missing = {cell[1] for cell in cells if run_of(args, *cell)[0] not in known}
    runs.at_once(args.workers, [partial(collect, args, x) for x in args.data if x in missing])
    for seed, agent in product(range(args.seeds), args.agents):  # IQL takes the samples of TD3+BC
        own = [cell for cell in cells if (cell[-1], cell[0]) == (seed, agent)]
        runs.at_once(args.workers, [partial(make, args, *cell) for cell in own])
    show(args)


def show(args):
    """Print the table of all that is recorded, and draw the scores over numbers of rows."""
    scores = defaultdict(lambda: defaultdict(list))  # (data, agent, method) -> size -> scores
    for entry in runs.recorded(args.out / "small_data.jsonl"):
        agent, name = entry["name"].split("-", 1)
        name, method, size, _ = name.rsplit("-", 3)
        scores[name, agent, method][int(size)].append(entry["values"]["score"])
    if not scores:
        raise edm.RunError(f"nothing is recorded in {args.out}")
    names = sorted({name for name, _, _ in scores})
    sizes = sorted(set().union(*scores.values()))
    runs.print_row("data, agent, rows (seeds)", *(f"{size:,}" for size in sizes), head=True)
    figsize = (3.3 * len(names) + 2, 3.2)
    fig, axes = plt.subplots(1, len(names), figsize=figsize, squeeze=False, layout="constrained")
    panels = dict(zip(names, axes[0]))
    lines = {}  # of the legend
    for (name, agent, method), own in sorted(scores.items()):
        cells = [runs.summary(own.get(size, [])) for size in sizes]
        runs.print_row(f"{name}, {agent}, {method}", *cells)
        mean = [np.mean(x) for _, x in sorted(own.items())]
        std = [np.std(x) for _, x in sorted(own.items())]
        style = dict(color=f"C{list(METHODS).index(method)}", fmt="s--" if agent == "iql" else "o-")
        line = panels[name].errorbar(sorted(own), mean, std, capsize=3, **style)
        lines[f"{agent}, {method}"] = line
    for name, agent in sorted({(name, agent) for name, agent, _ in scores}):
        real = scores[name, agent, "real"]
        generated = scores[name, agent, "generated"]
        if len(real) > 1 and generated:  # with one size there is nothing to interpolate
            factors = dict(zip(sorted(generated), multiplier(real, generated)))
            cells = [factors.get(size, "") for size in sizes]
            runs.print_row(f"{name}, {agent}, data multiplier", *cells)
    for name, ax in panels.items():
        unit = "return / 10" if name == "cartpole" else "normalised score"
        ax.set(title=name, xscale="log", xlabel="real transitions", ylabel=unit)
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45)
        ax.set(xlim=(0.8 * sizes[0], 1.25 * sizes[-1]), ylim=(0, None))
        ax.minorticks_off()
    fig.legend(lines.values(), lines.keys(), loc="outside right upper")
    fig.savefig(args.out / "small_data.png", dpi=100)
    plt.close(fig)


if __name__ == "__main__":
    runs.launch(main, Args, __doc__)
