"""Which error of generated transitions costs an agent its score: mend one respect of them, and
train the agent on them with --synthetic-path.

    python tests/paper/repair.py --data walker2d.hdf5 --true-next-obs \\
        --samples runs/.../synthetic.npz --mend dynamics --out mended.npz

"dynamics" replays the generated (s, a) in the simulator, and takes its s', r and d where no
velocity is cut at 10. "terminals" takes d alone from there. "starts" replaces random rows by real
ones from the start of an episode, as many as the real data have.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from dynamics import replay
from runs import launch

import edm


@dataclass(kw_only=True)
class Args:
    data: str  # D4RL-layout HDF5 that the samples imitate
    samples: str  # synthetic.npz of a run folder
    mend: Literal["dynamics", "terminals", "starts"]  # what is made as good as in real rows
    out: Path  # .npz to write
    env: str = "Walker2d-v4"  # the simulator
    true_next_obs: bool = False  # as the model was trained
    seed: int = 0  # of the rows that are replaced


def main(args):
    real = edm.load_transitions(args.data, args.true_next_obs)
    new = edm.load_transitions(args.samples)
    num_rows, obs_dim = new["observations"].shape
    if args.mend == "starts":
        is_start = edm.episode_starts(edm.pack(**real), obs_dim).numpy()
        rng = np.random.default_rng(args.seed)
        replaced = rng.choice(num_rows, round(is_start.mean() * num_rows), replace=False)
        chosen = rng.choice(np.flatnonzero(is_start), len(replaced))
        for key in edm.KEYS:
            new[key][replaced] = real[key][chosen]
    else:
        known, *mended, falls = replay(args.env, new["observations"], new["actions"])
        new["terminals"][known] = falls
        if args.mend != "terminals":
            new["next_observations"][known], new["rewards"][known] = mended
        print(f"{known.mean():.1%} of the rows are replayed, {falls.mean():.2%} of these are ends")
    edm.save_npz(args.out, new)


if __name__ == "__main__":
    launch(main, Args, __doc__)
