"""How noise becomes transitions (Figure 3): rendered states, and the cloud of samples by t-SNE.

    python tests/paper/figure3.py --model runs/Walker2d-v4__.../diffusion.pt --out figure3.png

A state of much noise is drawn at the ends of the data's range.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
from dynamics import NQ
from runs import launch
from sklearn.manifold import TSNE

import edm
import synther_vd4rl


@dataclass
class Args:
    model: Path  # diffusion.pt of a run folder
    env: Literal[tuple(NQ)] = "Walker2d-v4"  # the environment of its data; it needs a renderer
    out: str = "figure3.png"  # the picture
    samples: int = 3_000  # points of a cloud
    noise: tuple[float, ...] = (80, 2, 0.8, 0.4, 0.1, 0)  # panels: the nearest noise levels
    states: int = 4  # rendered states at each, an even number


class RecordedEDM(edm.EDM):
    """A model that keeps what its sampler makes: noise level -> normalised rows."""

    path = {}

    def denoise(self, x, sigma):
        self.path[sigma] = x
        self.path[0.0] = super().denoise(x, sigma)  # the last one is the sample
        return self.path[0.0]


def main(args):
    nq = NQ[args.env]
    model = edm.load_edm(args.model, make=RecordedEDM)
    options = dict(sampler="dpmpp", sample_steps=32, sample_batch_size=args.samples)
    edm.generate(model, args.samples, **options)
    synther_vd4rl.choose_renderer()
    with warnings.catch_warnings(action="ignore"):  # about v4
        env = gym.make(args.env, render_mode="rgb_array", width=340, height=340)
    env.reset(seed=0)
    size = (2.4 * len(args.noise), 4.8)
    fig, axes = plt.subplots(2, len(args.noise), figsize=size, layout="constrained")
    for noise, top, bottom in zip(args.noise, *axes):
        sigma = min(model.path, key=lambda sigma: abs(sigma - noise))  # noqa: B023
        x = model.path[sigma] / (sigma**2 + 1) ** 0.5
        pictures = []
        for state in model.unnormalize(x)[: args.states, : 2 * nq - 1].double().numpy():
            env.unwrapped.set_state(np.append(0.0, state[: nq - 1]), state[nq - 1 :])
            pictures.append(env.render()[100:300, 70:270])  # without its surroundings
        half = len(pictures) // 2
        top.imshow(np.vstack([np.hstack(pictures[:half]), np.hstack(pictures[half:])]))
        top.set(title=f"noise {sigma:.2g}", xticks=[], yticks=[])
        bottom.scatter(*TSNE(random_state=0).fit_transform(x.numpy()).T, s=1, alpha=0.5)
        bottom.set(xticks=[], yticks=[])
    fig.savefig(args.out, dpi=80)


if __name__ == "__main__":
    launch(main, Args, __doc__)
