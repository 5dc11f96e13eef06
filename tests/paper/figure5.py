"""How far are new rows from the data, and how true are they (Figure 5)? SynthER's against explicit augmentations.

    python synther_td3bc.py --env walker2d-medium-replay-v2 --true-next-obs --subsample 0.15 --diffusion-steps 20000 \\
        --num-samples 100000 --updates 1 --eval-episodes 1          # an experiment, of which only the samples are used
    python tests/paper/figure5.py --run runs/walker2d-medium-replay-v2__... --env Walker2d-v4 --out figure5.png

Distance: from a new row to the nearest row that the model was trained on, in standardised units. Error: the mean
squared error of s' and r against the simulator, in raw units. The table shows medians over the rows that it takes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from dynamics import replay
from runs import launch

import edm
import synther_td3bc


@dataclass
class Args:
    run: Path  # folder of a run of an offline script
    env: str = "Walker2d-v4"  # the simulator
    rows: int = 5_000  # new rows of each kind
    out: str = "figure5.png"  # the picture


def training_rows(settings):
    """The rows [N, dim] that the model of a run was trained on, and the sizes of observations and actions."""
    data = edm.load_transitions(settings["dataset_path"] or settings["env"], settings["true_next_obs"])
    rows, obs_dim = edm.pack(**data), data["observations"].shape[1]
    if settings["subsample"]:
        count = round(settings["subsample"] * (len(rows) if settings["subsample"] <= 1 else 1))
        rows = rows[np.random.default_rng(settings["diffusion_seed"]).choice(len(rows), count, replace=False)]
    return rows, obs_dim, data["actions"].shape[1]


def augmented(rows, kind, obs_dim):
    """Rows with explicit augmentation, whose scale is that of states normalised as the agent's are."""
    mean, std = rows[:, :obs_dim].mean(0), rows[:, :obs_dim].std(0) + 1e-3
    rows = rows.clone()
    for states in (rows[:, :obs_dim], rows[:, -1 - obs_dim : -1]):
        states.sub_(mean).div_(std)
    synther_td3bc.augment_batch(rows, kind, obs_dim)
    for states in (rows[:, :obs_dim], rows[:, -1 - obs_dim : -1]):
        states.mul_(std).add_(mean)
    return rows


def main(args):
    rows, obs_dim, act_dim = training_rows(json.loads((args.run / "args.json").read_text()))
    torch.manual_seed(0)
    some = rows[torch.randperm(len(rows))[: args.rows]]
    kinds = {"SynthER": edm.pack(**edm.load_transitions(args.run / "synthetic.npz"))[: args.rows]}
    kinds |= {kind: augmented(some, kind, obs_dim) for kind in ("additive", "multiplicative", "dynamics")}
    fig, axes = plt.subplots(1, len(kinds), figsize=(14, 3.5), sharex=True, sharey=True, layout="constrained")
    print("| | distance | error of s' and r |\n|---|---|---|")
    std, mean = torch.std_mean(rows, dim=0)
    for ax, (kind, new) in zip(axes, kinds.items()):
        data = edm.unpack(new, obs_dim, act_dim)
        known, next_observations, rewards, falls = replay(args.env, data["observations"], data["actions"])
        distance = torch.cat([torch.cdist((part - mean) / (std + 1e-5), (rows - mean) / (std + 1e-5)).amin(1)
                              for part in new.split(500)])[known].numpy()  # fmt: skip
        proposed = np.column_stack([data["next_observations"], data["rewards"]])[known]
        error = ((proposed - np.column_stack([next_observations, rewards])) ** 2).mean(1)
        alive = ~falls & ~data["terminals"][known]  # s' of the others is another episode's, in D4RL's files
        ax.scatter(distance[alive], error[alive] + 1e-9, s=2, alpha=0.3)
        ax.set(title=kind, xlabel="distance to the data", xscale="log", yscale="log", ylim=(1e-6, 1e2))
        print(f"| {kind} | {np.median(distance[alive]):.2f} | {np.median(error[alive]):.4f} |")
    axes[0].set_ylabel("error against the simulator")
    fig.savefig(args.out, dpi=80)


if __name__ == "__main__":
    launch(main, Args, __doc__)
