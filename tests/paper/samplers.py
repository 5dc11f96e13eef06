"""Which sampler: quality against network calls, for the paper's sampler, its deterministic form and DPM-Solver++(2M).

    python tests/paper/samplers.py --data FILE.hdf5 --model runs/.../diffusion.pt --env Walker2d-v4

prints one line of the README's table per sampler. Quality is that of the model given: all lines share its weights. The
last line is the noise of the measurement: the paper's sampler with another seed.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path += [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import edm
from dynamics import dynamics_scores


@dataclass
class Args:
    data: str
    """D4RL-layout HDF5 the model was trained on"""
    model: str
    """diffusion.pt of a run folder"""
    env: str = "Walker2d-v4"
    """simulator of the dynamics error"""
    num_samples: int = 20_000
    """rows per sampler"""
    true_next_obs: bool = False
    """as the model was trained"""


def generate_with(model, sample, num_samples, seed, batch_size=2_000):
    """num_samples rows by `sample(denoise, noise, generator)`, and the network calls per row."""
    calls, rows = 0, []
    for start in range(0, num_samples, batch_size):
        generator = torch.Generator().manual_seed(seed * num_samples + start)
        x = 80.0 * torch.randn(batch_size, model.dim, generator=generator)

        def denoise(x, sigma):
            nonlocal calls
            calls += 1
            return model.denoise(x, sigma)

        with torch.no_grad():
            rows.append(model.unnormalize(sample(denoise, x, generator)))
    return torch.cat(rows)[:num_samples], calls // len(rows)


def samplers():
    """(name, sample) of every line of the table."""
    sde = lambda steps, churn: (  # noqa: E731
        lambda denoise, x, generator: edm.sample_sde(
            denoise, x, edm.karras_sigmas(steps), s_churn=churn, generator=generator
        )
    )
    dpmpp = lambda steps, eta: (  # noqa: E731
        lambda denoise, x, generator: edm.sample_dpmpp(denoise, x, edm.karras_sigmas(steps), eta, generator)
    )
    return (
        [(f"paper's SDE, {n} steps", sde(n, 80.0)) for n in (128, 64, 32, 16)]
        + [(f"Heun without churn, {n} steps", sde(n, 0.0)) for n in (128, 32, 16, 10)]
        + [(f"DPM-Solver++(2M), {n} steps", dpmpp(n, 0.0)) for n in (64, 32, 20, 16, 12, 8)]
        + [(f"the same with noise, {n} steps", dpmpp(n, 1.0)) for n in (64, 32, 20, 16)]
    )


def main(args):
    real = edm.pack(**edm.load_transitions(args.data, args.true_next_obs))
    model = edm.load_edm(args.model)
    obs_dim = edm.load_transitions(args.data)["observations"].shape[1]
    act_dim = real.shape[1] - 2 * obs_dim - 2
    floor = edm.unpack(
        real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:5_000]], obs_dim, act_dim
    )
    print("| sampler | calls | marginal | correlation | spread | terminals | dynamics | µs per row |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| (real rows) | | | | 1 | {100 * float(real[:, -1].mean()):.2f}% "
        f"| {dynamics_scores(args.env, floor)['dynamics']:.1e} | |"
    )
    lines = samplers()
    for i, (name, sample) in enumerate(lines + [(lines[0][0] + ", another seed", lines[0][1])]):
        start = time.time()
        rows, calls = generate_with(model, sample, args.num_samples, seed=1 if i == len(lines) else 0)
        seconds = time.time() - start
        rows[:, -1] = rows[:, -1] > 0.5
        varies = real[:, :-1].std(0) > 1e-6
        spread = (rows[:, :-1].std(0) / real[:, :-1].std(0))[varies].mean().item()
        scores = dynamics_scores(args.env, edm.unpack(rows, obs_dim, act_dim))
        print(
            f"| {name} | {calls} | {edm.marginal(real, rows):.4f} | {edm.correlation(real, rows):.4f} | {spread:.3f} "
            f"| {100 * float(rows[:, -1].mean()):.2f}% | {scores['dynamics']:.3f} | {1e6 * seconds / len(rows):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
