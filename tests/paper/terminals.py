"""How well generated terminals are: the diffusion model's column against a classifier, for trained models.

    python tests/paper/terminals.py --data FILE.hdf5 --model runs/.../diffusion.pt --true-next-obs

Walker2d and Hopper end an episode by a rule on the state, so the simulator can tell which generated (s, a) end one.
Printed are the share of terminals, and the recall and precision of the flags against the simulator.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

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
    """simulator"""
    num_samples: int = 100_000
    """rows to generate"""
    true_next_obs: bool = False
    """as the model was trained"""


def main(args):
    data = edm.load_transitions(args.data, args.true_next_obs)
    obs_dim, act_dim = data["observations"].shape[1], data["actions"].shape[1]
    real = edm.pack(**data)
    rows = edm.generate(edm.load_edm(args.model), args.num_samples)
    rows[:, -1] = rows[:, -1] > 0.5
    print("| terminals | share | ends in the simulator | recall | precision | dynamics error |")
    print("|---|---|---|---|---|---|")
    for name in ("real rows", "column", "classifier"):
        if name == "classifier":
            edm.relabel_terminals(rows, real)
        scores = dynamics_scores(
            args.env, edm.unpack(real[:100_000] if name == "real rows" else rows, obs_dim, act_dim)
        )
        share = (real if name == "real rows" else rows)[:, -1].mean()
        print(
            f"| {name} | {share:.2%} | {scores['falls']:.2%} | {scores['recall']:.0%} | {scores['precision']:.0%} "
            f"| {scores['dynamics']:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
