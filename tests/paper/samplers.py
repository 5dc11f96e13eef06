"""Which sampler: quality against network calls, for the paper's sampler, its deterministic form and DPM-Solver++(2M).

    python tests/paper/samplers.py --data FILE.hdf5 --model runs/.../diffusion.pt --env Walker2d-v4

For a model of the paper's recipe: with `fast` the scripts' sampler adds noise. All lines share the model's weights. The
last line is the noise of the measurement: the paper's sampler with another seed.
"""

import time
from dataclasses import dataclass
from functools import partial

import torch
from dynamics import ModelArgs, dynamics_scores, load
from runs import launch

import edm


@dataclass
class Args(ModelArgs):
    num_samples: int = 20_000
    """rows per sampler"""


heun = partial(edm.sample_sde, s_churn=0.0)
LINES = [(f"paper's SDE, {n} steps", edm.sample_sde, n, 0) for n in (128, 64, 32, 16)]
LINES += [(f"Heun without churn, {n} steps", heun, n, 0) for n in (128, 32, 16, 10)]
LINES += [(f"DPM-Solver++(2M), {n} steps", edm.sample_dpmpp, n, 0) for n in (64, 32, 20, 16, 12, 8)]
LINES += [("paper's SDE, 128 steps, another seed", edm.sample_sde, 128, 1)]


@torch.no_grad()
def generate_with(model, sample, num_steps, num_samples, seed):
    """num_samples rows by `sample(denoise, x, sigmas)`, and the network calls per row."""
    torch.manual_seed(seed)
    rows, calls = torch.empty(num_samples, len(model.mean)), 0

    def denoise(x, sigma):
        nonlocal calls
        calls += 1
        return model.denoise(x, sigma)

    parts = rows.split(2_000)
    for part in parts:
        x = sample(denoise, 80.0 * torch.randn_like(part), edm.karras_sigmas(num_steps))
        part.copy_(model.unnormalize(x))
    return rows, calls // len(parts)


def main(args):
    real, obs_dim, act_dim = load(args)
    model, std = edm.load_edm(args.model), real[:, :-1].std(0)
    some = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:5_000]]
    floor = dynamics_scores(args.env, edm.unpack(some, obs_dim, act_dim))["dynamics"]
    columns = ("sampler", "calls", "marginal", "correlation", "spread", "terminals", "dynamics", "us per row")
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    print(f"| (real rows) | | | | 1 | {real[:, -1].mean():.2%} | {floor:.1e} | |")
    for name, sample, num_steps, seed in LINES:
        start = time.time()
        rows, calls = generate_with(model, sample, num_steps, args.num_samples, seed)
        seconds = time.time() - start
        rows[:, -1] = rows[:, -1] > 0.5
        spread = (rows[:, :-1].std(0) / std)[std > 1e-6].mean().item()
        scores = dynamics_scores(args.env, edm.unpack(rows, obs_dim, act_dim))
        print(
            f"| {name} | {calls} | {edm.marginal(real, rows):.4f} | {edm.correlation(real, rows):.4f} | {spread:.3f} "
            f"| {rows[:, -1].mean():.2%} | {scores['dynamics']:.3f} | {1e6 * seconds / len(rows):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    launch(main, Args, __doc__)
