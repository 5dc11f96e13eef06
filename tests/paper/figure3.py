"""How noise becomes transitions (Figure 3): rendered states, and the cloud of samples in two dimensions by t-SNE.

    python tests/paper/figure3.py --model runs/Walker2d-v4__.../diffusion.pt --env Walker2d-v4 --out figure3.png

A state of much noise is drawn at the ends of the data's range. It needs a renderer, as `synther_vd4rl.py` does.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
from dynamics import NQ
from runs import launch
from sklearn.manifold import TSNE

import edm
import synther_vd4rl


@dataclass
class Args:
    model: Path  # diffusion.pt of a run folder
    env: Literal[tuple(NQ)] = "Walker2d-v4"  # the environment of its data
    out: str = "figure3.png"  # the picture
    samples: int = 3_000  # points of a cloud
    noise: tuple[float, ...] = (80, 2, 0.8, 0.4, 0.1, 0)  # the panels: the moments with the nearest noise levels
    states: int = 4  # rendered states at each, an even number


def path_of_samples(model, count):
    """Samples at each step of the sampler, a list of (noise level, rows [count, dim] in normalised units)."""
    path = []

    def denoise(x, sigma):
        path.append((sigma, x))
        return model.denoise(x, sigma)

    sigmas = edm.karras_sigmas(32)
    torch.manual_seed(0)
    with torch.no_grad():
        x = sigmas[0].item() * torch.randn(count, len(model.mean))
        x = edm.sample_dpmpp(denoise, x, sigmas, eta=int(model.knots.numel() > 0))  # as in edm.generate
    return [*path, (0.0, x)]


def render(env, nq, state):
    """The picture of a state [obs_dim], whose x position is 0."""
    env.unwrapped.set_state(np.concatenate([[0.0], state[: nq - 1]]), state[nq - 1 :])
    return env.render()[100:300, 70:270]  # without its surroundings


def main(args):
    model, nq = edm.load_edm(args.model), NQ[args.env]
    path = path_of_samples(model, args.samples)
    moments = [min(path, key=lambda moment: abs(moment[0] - noise)) for noise in args.noise]
    synther_vd4rl.choose_renderer()
    with warnings.catch_warnings(action="ignore"):  # about v4
        env = gym.make(args.env, render_mode="rgb_array", width=340, height=340)
    env.reset(seed=0)
    fig, axes = plt.subplots(2, len(moments), figsize=(2.4 * len(moments), 4.8), layout="constrained")
    for (sigma, x), top, bottom in zip(moments, *axes):
        rows = model.unnormalize(x / (sigma**2 + 1) ** 0.5).numpy()
        pictures = [render(env, nq, row[: 2 * nq - 1].astype(float)) for row in rows[: args.states]]
        half = len(pictures) // 2
        top.imshow(np.vstack([np.hstack(pictures[:half]), np.hstack(pictures[half:])]))
        cloud = TSNE(random_state=0).fit_transform((x / (sigma**2 + 1) ** 0.5).numpy())
        bottom.scatter(*cloud.T, s=1, alpha=0.5)
        top.set(title=f"noise {sigma:.2g}", xticks=[], yticks=[])
        bottom.set(xticks=[], yticks=[])
    fig.savefig(args.out, dpi=80)


if __name__ == "__main__":
    launch(main, Args, __doc__)
