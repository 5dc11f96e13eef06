"""Small datasets (Figures 1a and 4): agents on a few real rows, on what a diffusion model makes of these, and on
augmented ones. And the data multiplier: how many real rows give the score that N upsampled rows give?

    python tests/paper/small_data.py --out small_data                       # collects the data, then hours on two cores
    python tests/paper/small_data.py --out small_data --seeds 5             # goes on where it stopped, with more seeds
    python tests/paper/small_data.py --out small_data --data halfcheetah --methods real --sizes 39960 # all its rows
    python tests/paper/small_data.py --out tests/paper/results --seeds 0    # nothing is run: our own results

The data are replay buffers of SAC agents that `synther_sac_online.py` collects, or a file of yours:

    python tests/paper/small_data.py --out small_data --data my_data.hdf5 --env Walker2d-v4

The table shows the normalised score, mean of the last three evaluations, and its standard deviation over all recorded
seeds. Each seed has its own subset of the rows, diffusion model and agent.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal, Optional

import matplotlib.pyplot as plt
import numpy as np
from runs import at_once, launch, recorded, result, run, summary

import edm

# Name of the data -> the environment to evaluate in, and how to collect them.
DATA = {
    "halfcheetah": ("quickstart", None),  # its data come with the repository
    "hopper": ("Hopper-v4", dict(env="Hopper-v4", total_steps=100_000, utd=3)),
    "walker2d": ("Walker2d-v4", dict(env="Walker2d-v4", total_steps=100_000, utd=3)),
    "cartpole": ("runs:cartpole-swingup-v0", dict(env="dmc/cartpole-swingup", total_steps=30_000)),
}
SCALES = {
    "cpu": dict(updates=50_000, eval_every=5_000, diffusion_steps=10_000, num_samples=100_000),
    "paper": dict(updates=1_000_000, eval_every=5_000, diffusion_steps=100_000, num_samples=5_000_000),
}
METHODS = {  # in the order of the picture's colours, as in the other pictures: blue is generated, orange real
    "generated": dict(data="synther", augment="none"),
    "real": dict(data="real", augment="none"),
    **{kind: dict(data="real", augment=kind) for kind in ("additive", "multiplicative", "dynamics")},
}


@dataclass
class Args:
    out: Path  # folder for the runs, the table and the picture
    scale: Literal["cpu", "paper"] = "cpu"
    """cpu: 50,000 updates, 10,000 diffusion steps, 100,000 samples; paper: 1M, 100,000 and 5M, which want a GPU"""
    seeds: int = 3  # of the rows, the diffusion model and the agent; 0: nothing is run
    data: tuple[str, ...] = tuple(DATA)  # halfcheetah, hopper, walker2d, cartpole, or a file in D4RL's layout
    env: Optional[str] = None  # where agents on such a file are evaluated
    sizes: tuple[int, ...] = (2_500, 5_000, 10_000, 20_000)
    methods: tuple[Literal[tuple(METHODS)], ...] = ("real", "generated")
    agents: tuple[Literal["td3bc", "iql"], ...] = ("td3bc",)
    workers: int = 2  # runs at a time, one thread each


def collect(args, name):
    """Make the file of a replay buffer, if it is not there."""
    _, options = DATA.get(name, (None, None))
    if options and not (args.out / f"{name}.hdf5").exists():
        options = options | dict(algo="sac", eval_every=10_000, save_dataset=f"{name}.hdf5")
        folder = run(args.out, f"collect-{name}", "synther_sac_online.py", **options)
        if not (args.out / f"{name}.hdf5").exists():
            raise edm.RunError(f"{name}.hdf5 is gone, but the run that made it has ended: move {folder.parent} away")


def run_of(args, agent, name, method, size, seed):
    """Name, script and options of one run."""
    options = dict(env=DATA[name][0] if name in DATA else args.env, subsample=float(size), seed=seed)
    options |= dict(diffusion_seed=seed, **SCALES[args.scale], **METHODS[method])
    if name != "halfcheetah":
        path = f"{name}.hdf5" if name in DATA else str(Path(name).resolve())
        options |= dict(dataset_path=path, true_next_obs=True)
    return f"{agent}-{Path(name).stem}-{method}-{size}-{seed}", f"synther_{agent}.py", options


def make(args, agent, *cell):
    """Make one run, if it is not recorded. Each seed has its own rows and diffusion model; all agents take the samples
    of TD3+BC."""
    name, script, options = run_of(args, agent, *cell)
    source = run_of(args, "td3bc", *cell) if options["data"] == "synther" and agent != "td3bc" else None
    result(args.out / "small_data.jsonl", name, script, source, **options)


def multiplier(real, generated, draws=1_000):
    """For each size of `generated`, how many times as many real rows have its score, and the limits of 80% of the
    bootstrap samples over seeds. Args: number of rows -> the scores of all seeds.

    The score of real rows is interpolated over the logarithm of their number."""
    rng, factors = np.random.default_rng(0), []
    real_sizes, sizes = np.array(sorted(real)), np.array(sorted(generated))
    for draw in range(draws):
        real_mean, generated_mean = (
            [np.mean(x if draw == 0 else rng.choice(x, len(x))) for _, x in sorted(kind.items())]
            for kind in (real, generated)
        )
        real_mean = np.maximum.accumulate(real_mean)  # more rows are not worse
        rows = np.exp(np.interp(generated_mean, real_mean, np.log(real_sizes), left=-np.inf, right=np.inf))
        factors.append(rows / sizes)
    low, high = np.sort(factors, axis=0)[[draws // 10, -draws // 10]]
    words = {0: "fewer than tried", np.inf: "more than tried"}  # numbers of real rows
    texts = [[words.get(x, f"{x:.1f}") for x in row] for row in (factors[0], low, high)]
    return [mid if mid == a == b else f"{mid} ({a} to {b})" for mid, a, b in zip(*texts)]


def main(args):
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.data:
        if name not in DATA and not (Path(name).is_file() and args.env and Path(name).stem not in DATA):
            raise edm.RunError(f"{name} is none of {', '.join(DATA)}; a file needs --env, and another name than these")
    known = {entry["name"] for entry in recorded(args.out / "small_data.jsonl")}
    cells = product(range(args.seeds), args.agents, args.data, args.methods, args.sizes)
    wanted = {name for seed, agent, name, *own in cells if run_of(args, agent, name, *own, seed)[0] not in known}
    at_once(args.workers, [partial(collect, args, name) for name in args.data if name in wanted])
    for seed in range(args.seeds):
        for agent in args.agents:  # one after the other, because IQL takes the samples of TD3+BC
            cells = product([agent], args.data, args.methods, args.sizes, [seed])
            at_once(args.workers, [partial(make, args, *cell) for cell in cells])
    show(args)


def show(args):
    """Print the table of all that is recorded, and draw the picture: scores over the number of rows."""
    scores = defaultdict(lambda: defaultdict(list))  # (data, agent, method) -> size -> scores
    for entry in recorded(args.out / "small_data.jsonl"):
        agent, name = entry["name"].split("-", 1)
        name, method, size, _ = name.rsplit("-", 3)
        scores[name, agent, method][int(size)].append(entry["values"]["score"])
    if not scores:
        raise edm.RunError(f"nothing is recorded in {args.out}")
    names, sizes = sorted({key[0] for key in scores}), sorted({size for own in scores.values() for size in own})
    print(f"| data, agent, rows (seeds) | {' | '.join(f'{size:,}' for size in sizes)} |\n|---{'|---' * len(sizes)}|")
    fig, axes = plt.subplots(1, len(names), figsize=(3.3 * len(names) + 2, 3.2), squeeze=False, layout="constrained")
    handles = {}
    for (name, agent, method), own in sorted(scores.items()):
        print(f"| {name}, {agent}, {method} | {' | '.join(summary(own.get(x, [])) for x in sizes)} |")
        ax, here = axes[0, names.index(name)], sorted(own)
        unit = "return / 10" if name == "cartpole" else "normalised score"
        ax.set(title=name, xscale="log", xlabel="real transitions", ylabel=unit)
        style = dict(color=f"C{[*METHODS].index(method)}", fmt="s--" if agent == "iql" else "o-", capsize=3)
        mean, spread = zip(*((np.mean(own[size]), np.std(own[size])) for size in here))
        handles[f"{agent}, {method}"] = ax.errorbar(here, mean, spread, **style)
    for name, agent in sorted({key[:2] for key in scores}):
        real, generated = (scores[name, agent, method] for method in ("real", "generated"))
        if len(real) > 1 and generated:  # with one size there is nothing to interpolate
            factors = dict(zip(sorted(generated), multiplier(real, generated)))
            print(f"| {name}, {agent}, data multiplier | {' | '.join(factors.get(size, '') for size in sizes)} |")
    for ax in axes.flat:
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45)
        ax.set(xlim=(0.8 * sizes[0], 1.25 * sizes[-1]), ylim=(0, None))
        ax.minorticks_off()
    fig.legend(handles.values(), handles.keys(), loc="outside right upper")
    fig.savefig(args.out / "small_data.png", dpi=100)
    plt.close(fig)


if __name__ == "__main__":
    launch(main, Args, __doc__)
