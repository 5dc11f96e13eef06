"""Variations of an experiment: larger agents (Table 3), small denoisers (Table 5), depth and plain
MLPs (Table 10), half real data (Table 12), number of samples (Figure 9).

    python tests/paper/variations.py table12 --out variations             # an hour
    python tests/paper/variations.py table10 --out tests/paper/results --seeds 0  # our results

A score is the mean of a run's last three evaluations. All seeds of the agent learn from the samples
of seed 0. Data / model: how many numbers the real data have for one of the diffusion model.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Annotated, Literal

import runs
import tyro

import edm

SMALL = dict(updates=40_000, eval_every=2_500, diffusion_steps=20_000, num_samples=200_000)
SCALES = dict(cpu=SMALL, paper=runs.PAPER)
REAL = dict(data="real")
LARGE = dict(hidden_dim=512, hidden_layers=3, batch_size=1024)
# Of each study: label -> options of the script. A label "... samples of X" takes those of X.
STUDIES = {
    "table3": {"real": REAL, "generated": {}, "real, larger agent": REAL | LARGE}
    | {"larger agent, samples of generated": LARGE},
    "table5": {"generated": {}} | {f"{x} units": dict(diffusion_width=x) for x in (128, 64, 32)},
    "table10": {
        f"depth {depth}, {kind}": dict(diffusion_depth=depth, diffusion_residual=kind == "residual")
        for kind, depth in product(("residual", "plain"), (2, 4, 6))
    },
    "table12": {"real": REAL, "generated": {}}
    | {"half of each, samples of generated": dict(data="mixed")},
    "figure9": {"generated": {}}
    | {f"one in {x}, samples of generated": dict(share=x) for x in (2, 5, 20, 100)},
}
# More options at scale cpu: of the larger agents of table3, and of all runs of table10
SMALL_LARGE = dict(updates=10_000, eval_every=625)  # as many rows as with the smaller batch
SMALL_PAPER = dict(diffusion_recipe="paper", diffusion_width=512, diffusion_lr=1e-3)
SMALL_PAPER |= dict(diffusion_steps=10_000, num_samples=100_000)


@dataclass(kw_only=True)
class Args(runs.StudyArgs):
    study: Annotated[Literal[tuple(STUDIES)], tyro.conf.Positional]
    env: str = "quickstart"  # as in the scripts


def options_of(args, label, seed):
    """The options of one run."""
    options = dict(env=args.env, seed=seed) | SCALES[args.scale]
    options |= STUDIES[args.study][label]
    if args.scale == "cpu" and args.study == "table3" and "larger" in label:
        options |= SMALL_LARGE
    if args.scale == "cpu" and args.study == "table10":
        options |= SMALL_PAPER
    options["num_samples"] //= options.pop("share", 1)
    if options.get("data") == "mixed":
        del options["num_samples"]  # as many as there are real rows
    return options


def make(args, label, seed):
    """Make one run, if it is not recorded. Seeds above 0 and labels "... samples of X" take the
    samples of another run."""
    options = options_of(args, label, seed)
    maker = label.partition("samples of ")[2] or label
    source = None
    if options.get("data") != "real" and (seed > 0 or maker != label):
        source = (f"{maker}-0", "synther_td3bc.py", options_of(args, maker, 0))
    path = args.out / "variations.jsonl"
    runs.result(path, f"{label}-{seed}", "synther_td3bc.py", source, **options)


def main(args):
    for seed in range(args.seeds):
        for is_later in (False, True):  # first those whose samples others take
            own = [label for label in STUDIES[args.study] if ("samples of" in label) == is_later]
            runs.at_once(args.workers, [partial(make, args, label, seed) for label in own])
    show(args)


def show(args):
    """Print the table of what is recorded of the study, and draw its picture."""
    found = {x: runs.every_seed(args.out / "variations.jsonl", x) for x in STUDIES[args.study]}
    found = {label: own for label, own in found.items() if own}
    if not found:
        raise edm.RunError(f"nothing of {args.study} is recorded in {args.out}")
    panel = {}
    numbers = sum(x.size for x in edm.load_transitions(args.env).values())
    runs.print_row("", "data / model", "marginal", "correlation", "AUC", "score (seeds)", head=True)
    for label, own in found.items():
        panel[label] = [values["score"] for values in own]
        first = own[0]
        cells = [f"{numbers / first['parameters']:.1f}" if "parameters" in first else ""]
        for key in ("marginal", "correlation", "c2st"):
            cells.append(f"{first[key]:.3f}" if key in first else "")
        runs.print_row(label, *cells, runs.summary(panel[label]))
    runs.draw_scores(args.out / f"{args.study}.png", {args.study: panel})


if __name__ == "__main__":
    runs.launch(main, Args, __doc__)
