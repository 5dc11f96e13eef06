"""How good generated terminals are: the diffusion model's column against a classifier.

    python tests/paper/terminals.py --data FILE.hdf5 --model runs/.../diffusion.pt --true-next-obs

Walker2d and Hopper end an episode by a rule on the state, so the simulator can tell which generated
(s, a) end one. Recall and precision are those of the flags against it.
"""

from dataclasses import dataclass

from dynamics import ModelArgs, dynamics_scores, load
from runs import launch, print_row

import edm


@dataclass
class Args(ModelArgs):
    num_samples: int = 100_000  # rows to generate


def main(args):
    real, obs_dim, act_dim = load(args)
    model = edm.load_edm(args.model)
    kinds = {"real rows": real[:100_000]}
    for kind in ("column", "classifier"):
        kinds[kind] = edm.generate_transitions(model, real, args.num_samples, terminals=kind)
    columns = "terminals, share, ends in the simulator, recall, precision, dynamics error"
    print_row(*columns.split(", "), head=True)
    for kind, rows in kinds.items():
        scores = dynamics_scores(args.env, edm.unpack(rows, obs_dim, act_dim))
        cells = [f"{rows[:, -1].mean():.2%}", f"{scores['falls']:.2%}"]
        cells += [f"{scores['recall']:.0%}", f"{scores['precision']:.0%}"]
        print_row(kind, *cells, f"{scores['dynamics']:.1e}")


if __name__ == "__main__":
    launch(main, Args, __doc__)
