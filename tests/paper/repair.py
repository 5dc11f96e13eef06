"""Which error of generated transitions costs an agent its score: mend one respect of them, and train the agent again.

    python tests/paper/repair.py --data walker2d.hdf5 --true-next-obs --samples runs/.../synthetic.npz \\
        --mend dynamics --out mended.npz
    python synther_td3bc.py --env Walker2d-v4 --dataset-path walker2d.hdf5 --true-next-obs --synthetic-path mended.npz

"dynamics" replays the generated (s, a) in the simulator, and takes its s', r and d where no velocity is cut at 10.
"terminals" takes d alone from there. "starts" replaces random rows by real ones from the start of an episode, as many
as the real data have. "actions" gives each generated s the action of the nearest real s, and the simulator's s', r, d.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from dynamics import replay
from runs import launch
from sklearn.neighbors import NearestNeighbors

import edm


@dataclass(kw_only=True)
class Args:
    data: str
    """D4RL-layout HDF5 that the samples imitate"""
    samples: str
    """synthetic.npz of a run folder"""
    mend: Literal["dynamics", "terminals", "starts", "actions"]
    """what is made as good as in real transitions"""
    out: str
    """.npz to write"""
    env: str = "Walker2d-v4"
    """simulator"""
    true_next_obs: bool = False
    """as the model was trained"""
    seed: int = 0
    """seed of the rows that are replaced"""


def main(args):
    real, new = edm.load_transitions(args.data, args.true_next_obs), edm.load_transitions(args.samples)
    std = real["observations"].std(0) + 1e-5
    if args.mend == "starts":
        jump = (real["observations"][1:] != real["next_observations"][:-1]).any(1) | real["terminals"][:-1]
        first = np.concatenate([[True], jump])
        starts = np.flatnonzero(first)
        rng = np.random.default_rng(args.seed)
        rows = rng.choice(len(new["rewards"]), round(len(starts) / len(first) * len(new["rewards"])), replace=False)
        chosen = rng.choice(starts, len(rows))
        for key in edm.KEYS:
            new[key][rows] = real[key][chosen]
    else:
        actions = new["actions"]
        if args.mend == "actions":
            neighbours = NearestNeighbors(n_neighbors=1).fit(real["observations"] / std)
            actions = real["actions"][neighbours.kneighbors(new["observations"] / std)[1][:, 0]]
        known, next_observations, rewards, falls = replay(args.env, new["observations"], actions)
        new["actions"][known], new["terminals"][known] = actions[known], falls
        if args.mend != "terminals":
            new["next_observations"][known], new["rewards"][known] = next_observations, rewards
        print(f"{known.mean():.1%} of the rows are replayed, {falls.mean():.2%} of these end the episode")
    edm.save_atomically(Path(args.out), lambda f: np.savez(f, **new))


if __name__ == "__main__":
    launch(main, Args, __doc__)
