"""How far are new rows from the data, and how true are they (Figure 5)?

    python tests/paper/figure5.py --run runs/Walker2d-v4__... --env Walker2d-v4 --out figure5.png

SynthER's rows stand beside augmented ones. Distance: from a new row to the nearest row that the
model was trained on, in standardised units. Error: the mean squared error of s' and r against the
simulator, in raw units. The table shows medians.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
from dynamics import replay
from runs import launch, print_row

import edm
import synther_td3bc


@dataclass
class Args:
    run: Path  # folder of a run of an offline script, of which only the samples are used
    env: str = "Walker2d-v4"  # the simulator
    rows: int = 5_000  # new rows of each kind
    out: str = "figure5.png"  # the picture


def augmented(rows, kind, obs_dim):
    """Rows with explicit augmentation, on the scale of normalised states, as the agent's."""
    rows = rows.clone()
    s, _, _, next_s, _ = edm.split(rows, obs_dim)
    std, mean = torch.std_mean(s, dim=0)
    std += 1e-3
    for states in (s, next_s):
        states.sub_(mean).div_(std)
    synther_td3bc.augment_batch(rows, kind, obs_dim)
    for states in (s, next_s):
        states.mul_(std).add_(mean)
    return rows


def main(args):
    settings = SimpleNamespace(**json.loads((args.run / "args.json").read_text()))
    real = synther_td3bc.load_real(settings, [])
    std, mean = torch.std_mean(real.rows, dim=0)
    points = (real.rows - mean) / (std + 1e-5)
    torch.manual_seed(0)
    some = real.rows[torch.randperm(len(real.rows))[: args.rows]]
    kinds = {"SynthER": edm.pack(**edm.load_transitions(args.run / "synthetic.npz"))[: args.rows]}
    for kind in ("additive", "multiplicative", "dynamics"):
        kinds[kind] = augmented(some, kind, real.obs_dim)
    options = dict(figsize=(14, 3.5), sharex=True, sharey=True, layout="constrained")
    fig, axes = plt.subplots(1, len(kinds), **options)
    print_row("", "distance", "error of s' and r", head=True)
    for ax, (kind, new) in zip(axes, kinds.items()):
        data = edm.unpack(new, real.obs_dim, real.act_dim)
        known, *truth, falls = replay(args.env, data["observations"], data["actions"])
        parts = ((new - mean) / (std + 1e-5)).split(500)
        distance = torch.cat([torch.cdist(part, points).amin(1) for part in parts])[known].numpy()
        proposed = np.column_stack([data["next_observations"], data["rewards"]])[known]
        error = ((proposed - np.column_stack(truth)) ** 2).mean(1)
        # s' of the others is another episode's, in D4RL's files
        goes_on = ~falls & ~data["terminals"][known]
        ax.scatter(distance[goes_on], error[goes_on] + 1e-9, s=2, alpha=0.3)
        ax.set(title=kind, xlabel="distance to the data")
        ax.set(xscale="log", yscale="log", ylim=(1e-6, 1e2))
        medians = (np.median(distance[goes_on]), np.median(error[goes_on]))
        print_row(kind, f"{medians[0]:.2f}", f"{medians[1]:.4f}")
    axes[0].set_ylabel("error against the simulator")
    fig.savefig(args.out, dpi=80)


if __name__ == "__main__":
    launch(main, Args, __doc__)
