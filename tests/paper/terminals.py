"""How good generated terminals are: the diffusion model's column against a classifier, for a trained model.

    python tests/paper/terminals.py --data FILE.hdf5 --model runs/.../diffusion.pt --true-next-obs

Walker2d and Hopper end an episode by a rule on the state, so the simulator can tell which generated (s, a) end one.
Printed are the share of terminals, and the recall and precision of the flags against the simulator.
"""

from dataclasses import dataclass

from dynamics import ModelArgs, dynamics_scores, load
from runs import launch

import edm


@dataclass
class Args(ModelArgs):
    num_samples: int = 100_000
    """rows to generate"""


def main(args):
    real, obs_dim, act_dim = load(args)
    options = [edm.DiffusionArgs(num_samples=args.num_samples, terminals=name) for name in ("column", "classifier")]
    column, classifier = (edm.generate_transitions(edm.load_edm(args.model), real, option) for option in options)
    print("| terminals | share | ends in the simulator | recall | precision | dynamics error |\n" + "|---" * 6 + "|")
    for name, rows in (("real rows", real[:100_000]), ("column", column), ("classifier", classifier)):
        scores = dynamics_scores(args.env, edm.unpack(rows, obs_dim, act_dim))
        print(
            f"| {name} | {rows[:, -1].mean():.2%} | {scores['falls']:.2%} | {scores['recall']:.0%} "
            f"| {scores['precision']:.0%} | {scores['dynamics']:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    launch(main, Args, __doc__)
