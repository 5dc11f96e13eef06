"""Which recipe makes good samples in little time: variations of the diffusion model's training, at equal CPU seconds.

    python tests/paper/recipes.py --data walker2d.hdf5 --env Walker2d-v4 --seconds 60 --out recipes.jsonl
    python tests/paper/recipes.py --out recipes.jsonl --table

Every variation changes the base recipe in one place. Each is trained on one thread for so many steps as take the given
seconds of processor time there (100 steps are timed first, the best of three turns), with its learning rate falling to
zero at the end, so that other work on the machine changes nothing but the waiting. Finished lines of --out are not
done again: the command can be stopped and repeated, and run twice at once with --part.
"""

import copy
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

sys.path += [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import edm
from dynamics import dynamics_scores

BASE = dict(
    optimizer="adam", lr=1e-3, warmup=0.0, batch_size=256, width=256, depth=6, betas=(0.9, 0.99), ema=0.995, clip=1.0,
    p_mean=-1.2, p_std=1.2, noise="independent", normalizer="standard", terminal=(0.5, 0.25), sample_steps=32,
    schedule="cosine", clamp=False, activation="relu", early=0.0, guidance=1.5, guided_below=0.3,
)  # fmt: skip
SMALL = dict(ema="scaled", lr=2e-3, depth=4, width=384, terminal=(0.0, 1.0))
GELU = dict(SMALL, activation="gelu")
VARIATIONS = {
    "base": {},
    "paper's lr": dict(lr=3e-4),
    "paper's terminal column": dict(terminal=(0.0, 1.0)),
    "lr 2e-3": dict(lr=2e-3),
    "lr 4e-3": dict(lr=4e-3),
    "lr 4e-3, warm-up": dict(lr=4e-3, warmup=0.05),
    "linear decay": dict(schedule="linear"),
    "width 128": dict(width=128, lr=2e-3),
    "width 512": dict(width=512),
    "width 1024": dict(width=1024),
    "depth 3": dict(depth=3),
    "depth 12": dict(depth=12),
    "batch 128": dict(batch_size=128),
    "batch 1024": dict(batch_size=1024, lr=2e-3),
    "no clipping": dict(clip=math.inf),
    "betas 0.9, 0.999": dict(betas=(0.9, 0.999)),
    "betas 0.9, 0.95": dict(betas=(0.9, 0.95)),
    "EMA 0.98": dict(ema=0.98),
    "EMA 0.999": dict(ema=0.999),
    "P_mean -2": dict(p_mean=-2.0),
    "P_mean -0.4": dict(p_mean=-0.4),
    "P_std 1.6": dict(p_std=1.6),
    "Muon 0.01": dict(optimizer="muon", lr=1e-2),
    "Muon 0.03": dict(optimizer="muon", lr=3e-2),
    "Muon 0.02, batch 1024": dict(optimizer="muon", lr=2e-2, batch_size=1024),
    "Muon 0.02, batch 1024, width 512": dict(optimizer="muon", lr=2e-2, batch_size=1024, width=512),
    "ranks": dict(normalizer="rank"),
    "ranks, EMA by steps": dict(normalizer="rank", ema="scaled"),
    "ranks, EMA by steps, lr 2e-3, depth 4, batch 128, linear": dict(
        normalizer="rank", ema="scaled", lr=2e-3, depth=4, batch_size=128, schedule="linear"
    ),
    "EMA by steps": dict(ema="scaled"),
    "ranks, EMA by steps, lr 2e-3": dict(normalizer="rank", ema="scaled", lr=2e-3),
    "ranks, width 256": dict(normalizer="rank", ema="scaled", lr=2e-3, depth=4),
    "ranks, 4 x 384": dict(normalizer="rank", ema="scaled", lr=2e-3, depth=4, width=384),
    "ranks, width 512": dict(normalizer="rank", ema="scaled", lr=2e-3, depth=4, width=512),
    "ranks, width 512, lr 1e-3": dict(normalizer="rank", ema="scaled", lr=1e-3, depth=4, width=512),
    "ranks, 6 x 512, lr 1e-3": dict(normalizer="rank", ema="scaled", lr=1e-3, width=512),
    "4 x 384": SMALL,
    "GELU": GELU,
    "SiLU": dict(SMALL, activation="silu"),
    "guided": dict(SMALL, early=0.1),
    "fast": dict(GELU, early=0.1),
    "fast, early at 5%": dict(GELU, early=0.05),
    "fast, early at 25%": dict(GELU, early=0.25),
    "fast, guidance 2": dict(GELU, early=0.1, guidance=2.0),
    "fast, guided below 1": dict(GELU, early=0.1, guided_below=1.0),
    "fast, guided everywhere": dict(GELU, early=0.1, guided_below=100.0),
    "fast, ranks": dict(GELU, early=0.1, normalizer="rank"),
    "fast, batch 512": dict(GELU, early=0.1, batch_size=512),
    "fast, 4 x 512, lr 1e-3": dict(GELU, early=0.1, width=512, lr=1e-3),
    "fast, 4 x 256": dict(GELU, early=0.1, width=256),
    "paper, GELU, guided": dict(lr=3e-4, width=1024, terminal=(0.0, 1.0), activation="gelu", early=0.1),
    "6 x 512": dict(width=512, terminal=(0.0, 1.0)),
    "6 x 512, EMA by steps": dict(width=512, ema="scaled", terminal=(0.0, 1.0)),
    "paper": dict(lr=3e-4, width=1024, terminal=(0.0, 1.0)),
    "whitened, floor 0.1": dict(normalizer="whiten", floor=0.1),
    "whitened, floor 0.01": dict(normalizer="whiten", floor=0.01),
    "whitened, floor 0.001": dict(normalizer="whiten", floor=0.001),
    "spread noise levels": dict(noise="spread"),
    "clamped": dict(clamp=True),
}


@dataclass
class Args:
    data: str = ""
    """dataset as D4RL-layout HDF5"""
    env: str = "Walker2d-v4"
    """simulator"""
    rows: int = 45_000
    """real transitions, drawn uniformly"""
    seconds: tuple[int, ...] = (60,)
    """processor seconds of training, on one thread"""
    only: tuple[str, ...] = ()
    """names of variations; all if left out"""
    extra: str = "{}"
    """more variations, as JSON {name: {setting: value}}"""
    seeds: tuple[int, ...] = (0,)
    """seeds of the network and its batches"""
    num_samples: int = 20_000
    """rows to generate for the scores"""
    samplers: tuple[str, ...] = ("dpmpp",)
    """samplers to generate them with: dpmpp, dpmpp-sde, sde (eight times as slow)"""
    out: str = "recipes.jsonl"
    """file to add results to, one JSON object per line"""
    part: tuple[int, int] = (0, 1)
    """i and n: do every n-th run, from the i-th on"""
    table: bool = False
    """print the results so far as a table instead"""
    plot: Optional[str] = None
    """draw the results so far of the variations in --only over the seconds instead, into this PNG"""


# --- Normaliser -------------------------------------------------------------------------------------------------------


class Whitener:
    """Decorrelates the columns: directions of small variance (what s' has beyond s) count as much as the others.

    Rows are standardised, then each principal component is divided by its standard deviation, or by the square root of
    `floor` where the variance is smaller; the axes stay those of the columns (ZCA). The terminal column is left alone.
    """

    def __init__(self, rows, floor, terminal):
        std, self.mean = torch.std_mean(rows.double(), dim=0)
        std = std + 1e-5
        self.mean[-1], std[-1] = terminal
        x = ((rows - self.mean) / std)[:, :-1]
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        scale = values.clamp(min=floor).sqrt()
        self.matrix, self.inverse_matrix = torch.eye(len(std)).double(), torch.eye(len(std)).double()
        self.matrix[:-1, :-1] = vectors / scale @ vectors.T
        self.inverse_matrix[:-1, :-1] = vectors * scale @ vectors.T
        self.matrix, self.inverse_matrix = self.matrix / std[:, None], self.inverse_matrix * std

    def forward(self, rows):
        return ((rows - self.mean) @ self.matrix).float()

    def inverse(self, z):
        return (z.double() @ self.inverse_matrix + self.mean).float()


# --- Training ---------------------------------------------------------------------------------------------------------


def loss(model, x, noise):
    """EDM.loss; with noise levels spread evenly over their distribution, not drawn independently, if asked."""
    if noise == "independent":
        return model.loss(x)
    u = (torch.arange(len(x)) + torch.rand(len(x))) / len(x)
    sigma = (model.P_MEAN + model.P_STD * torch.special.ndtri(u)).exp()[:, None]
    return ((model(x + sigma * torch.randn_like(x), sigma) - x) ** 2 * (1 + sigma**-2)).mean()


def start_training(rows, recipe, seed, steps):
    """A model, and a function that makes one step at a given learning-rate factor."""
    torch.manual_seed(seed)
    kind = "rank" if recipe["normalizer"] == "rank" else "standard"
    choices = dict(normalizer=kind, activation=recipe["activation"], guided=recipe["early"] > 0)
    model = edm.EDM(rows.shape[1], recipe["width"], recipe["depth"], **choices)
    model.P_MEAN, model.P_STD = recipe["p_mean"], recipe["p_std"]
    model.GUIDANCE, model.GUIDED_BELOW = recipe["guidance"], recipe["guided_below"]
    whitener = None
    if recipe["normalizer"] == "whiten":
        whitener = Whitener(rows, recipe["floor"], recipe["terminal"])
        x = whitener.forward(rows)
    else:
        model.fit_normalizer(rows, skip=[rows.shape[1] - 1])
        model.mean[-1], model.std[-1] = recipe["terminal"]
        x = model.normalize(rows)
    ema = copy.deepcopy(model).requires_grad_(False)
    params, ema_params = list(model.denoiser.parameters()), list(ema.denoiser.parameters())
    if recipe["optimizer"] == "muon":
        hidden = [block.weight for block in model.denoiser.blocks]
        others = [p for p in params if all(p is not h for h in hidden)]
        optimizers = [
            torch.optim.Muon(hidden, recipe["lr"], weight_decay=0.0),
            torch.optim.Adam(others, 1e-3, betas=recipe["betas"], fused=True),
        ]
    else:
        optimizers = [torch.optim.Adam(params, recipe["lr"], betas=recipe["betas"], fused=True)]
    ema_beta = 1 - 500 / steps if recipe["ema"] == "scaled" else recipe["ema"]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    batches = edm.epoch_batches(len(x), recipe["batch_size"], seed)

    def step(i, factor):
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = factor * peak
            optimizer.zero_grad(set_to_none=False)
        loss(model, x[next(batches)], recipe["noise"]).backward()
        if recipe["clip"] < math.inf:
            torch.nn.utils.clip_grad_norm_(params, recipe["clip"])
        for optimizer in optimizers:
            optimizer.step()
        if i % 10 == 0:
            with torch.no_grad():
                torch._foreach_lerp_(ema_params, params, 1 - edm.ema_decay(i, ema_beta))
        if recipe["early"] and i == round(recipe["early"] * steps):
            ema.early.load_state_dict(ema.denoiser.state_dict())

    return ema, whitener, step


def seconds_per_step(rows, recipe):
    """Processor seconds of a step on one thread: the best of three turns of 100 steps."""
    *_, step = start_training(rows, recipe, 0, 1000)
    times = []
    for _ in range(3):
        start = time.process_time()
        for _ in range(100):
            step(0, 1e-3)
        times.append((time.process_time() - start) / 100)
    return min(times)


def run(real, recipe, seconds, seed, args):
    """Train, generate with each sampler, and judge one recipe. Yields dicts of scores."""
    obs_dim = {"Walker2d-v4": 17, "HalfCheetah-v4": 17, "Hopper-v4": 11}[args.env]
    act_dim = real.shape[1] - 2 * obs_dim - 2
    step_seconds = seconds_per_step(real, recipe)
    steps = round(seconds / step_seconds)
    model, whitener, step = start_training(real, recipe, seed, steps)
    start = time.process_time()
    for i in range(steps):
        left = 1 - i / steps
        factor = 0.5 * (1 - math.cos(math.pi * left)) if recipe["schedule"] == "cosine" else left
        step(i, min(factor, (i + 1) / max(recipe["warmup"] * steps, 1)))
        if i % 1000 == 0:
            edm.trim_memory()
    took = time.process_time() - start
    for sampler in args.samplers:
        steps_of = {"sample_steps": recipe["sample_steps"]} if sampler != "sde" else {}
        rows = edm.generate(model, args.num_samples, sampler=sampler, **steps_of, seed=seed, progress=False)
        if whitener:
            rows = whitener.inverse(rows)
        if recipe["clamp"]:
            rows = rows.clamp(real.amin(0), real.amax(0))
        rows[:, -1] = rows[:, -1] > 0.5
        report = edm.quality_report(real, rows)
        dynamics = dynamics_scores(args.env, edm.unpack(rows[:10_000], obs_dim, act_dim))
        training = dict(sampler=sampler, steps=steps, took=round(took, 1), step_ms=round(1e3 * step_seconds, 2))
        yield training | report | dynamics


def print_table(path):
    """The mean over the seeds of each recipe, best dynamics first."""
    groups = {}
    for line in Path(path).read_text().splitlines():
        result = json.loads(line)
        name = f"{result['name']}, {result.get('sampler', 'dpmpp')}"
        groups.setdefault((result["env"], result["seconds"], name), []).append(result)
    columns = ["steps", "marginal", "correlation", "dynamics", "reward", "terminals", "recall", "precision"]
    columns += ["nearest", "nearest_real"]
    for setting in sorted({key[:2] for key in groups}):
        print(f"\n{setting[0]}, {setting[1]} s\n\n| recipe | seeds | {' | '.join(columns)} |")
        print("|---" * (len(columns) + 2) + "|")
        table = {key[2]: results for key, results in groups.items() if key[:2] == setting}
        mean = lambda results, column: np.mean([r[column] for r in results])  # noqa: E731
        for name, results in sorted(table.items(), key=lambda item: mean(item[1], "dynamics")):
            print(f"| {name} | {len(results)} | " + " | ".join(f"{mean(results, c):.4g}" for c in columns) + " |")


def plot_frontier(path, names, plot_path):
    """Each score over the seconds of training, a line for each variation, a row of panels for each simulator."""
    matplotlib.use("Agg")
    results = [json.loads(line) for line in Path(path).read_text().splitlines()]
    results = [r for r in results if r["name"] in names and r.get("sampler", "dpmpp") == "dpmpp"]
    envs = sorted({r["env"] for r in results}, reverse=True)
    labels = {"marginal": "marginal", "correlation": "correlation", "dynamics": "squared error of s'"}
    fig, axes = plt.subplots(len(envs), 3, figsize=(9, 2.6 * len(envs)), layout="constrained", squeeze=False)
    for env, row in zip(envs, axes):
        for ax, (key, label) in zip(row, labels.items()):
            for name in names:
                own = [r for r in results if r["env"] == env and r["name"] == name]
                seconds = sorted({r["seconds"] for r in own})
                scores = [[r[key] for r in own if r["seconds"] == s] for s in seconds]
                (line,) = ax.plot(seconds, [np.mean(x) for x in scores], label=name)
                ax.plot([s for s, x in zip(seconds, scores) for _ in x], sum(scores, []), ".", color=line.get_color())
            ax.set(xscale="log", yscale="log" if key == "dynamics" else "linear", ylabel=label)
            ax.set_xticks(sorted({r["seconds"] for r in results if r["env"] == env}), minor=False)
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            ax.grid(alpha=0.3)
        row[1].set(title=env, xlabel="seconds of training on one core")
    axes[0, 0].legend()
    edm.save_atomically(Path(plot_path), lambda f: fig.savefig(f, format="png", dpi=100))
    plt.close(fig)


def main(args):
    if args.table:
        return print_table(args.out)
    if args.plot:
        return plot_frontier(args.out, args.only, args.plot)
    torch.set_num_threads(1)
    data = edm.load_transitions(args.data, True)
    rows = edm.pack(**data)
    real = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: args.rows]]
    variations = VARIATIONS | json.loads(args.extra)
    names = args.only or list(variations)
    jobs = [(s, name, seed) for s in args.seconds for seed in args.seeds for name in names]
    done = set()
    if Path(args.out).exists():
        lines = (json.loads(line) for line in Path(args.out).read_text().splitlines())
        done = {(x["env"], x["seconds"], x["name"], x["seed"]) for x in lines}
    for seconds, name, seed in jobs[args.part[0] :: args.part[1]]:
        if (args.env, seconds, name, seed) in done:
            continue
        results = [
            dict(env=args.env, rows=len(real), seconds=seconds, name=name, seed=seed) | scores
            for scores in run(real, BASE | variations[name], seconds, seed, args)
        ]
        with open(args.out, "a") as f:
            f.writelines(json.dumps(result) + "\n" for result in results)
        for result in results:
            shown = {key: round(result[key], 4) for key in ("steps", "marginal", "correlation", "dynamics", "recall")}
            print(f"{args.env} {seconds} s, {name}, seed {seed}, {result['sampler']}: {shown}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
