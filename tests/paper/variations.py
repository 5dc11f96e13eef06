"""Variations of an experiment: larger agents (Table 3), small denoisers (Table 5), depth and plain MLPs (Table 10),
half real data (Table 12), number of samples (Figure 9). Each is a list of runs of `synther_td3bc.py`.

    python tests/paper/variations.py table12 --out variations               # on the quickstart's data: an hour
    python tests/paper/variations.py figure9 --out variations --seeds 3     # goes on where it stopped, with more seeds
    python tests/paper/variations.py table10 --out tests/paper/results --seeds 0    # nothing is run: our own results

A run's score is the mean of its last three evaluations. The table has the mean and the standard deviation of it over
all seeds of the agent that are recorded. All seeds learn from the samples of seed 0. Data / model: how many numbers the
real data have for one of the diffusion model.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Optional

import tyro
from runs import at_once, draw_scores, every_seed, launch, result, summary

import edm

LARGE = dict(hidden_dim=512, hidden_layers=3, batch_size=1024)
SCALES = {
    "cpu": dict(updates=40_000, eval_every=2_500, diffusion_steps=20_000, num_samples=200_000),
    "paper": dict(updates=1_000_000, eval_every=5_000, diffusion_steps=100_000, num_samples=5_000_000),
}
# Of each study: label -> options of the script. A label "... samples of X" takes those of X.
STUDIES = {
    "table3": {"real": dict(data="real"), "generated": {}, "real, larger agent": dict(data="real") | LARGE,
               "larger agent, samples of generated": LARGE},
    "table5": {"generated": {}} | {f"{x} units": dict(diffusion_width=x) for x in (128, 64, 32)},
    "table10": {f"depth {depth}, {kind}": dict(diffusion_depth=depth, diffusion_residual=kind == "residual")
                for kind in ("residual", "plain") for depth in (2, 4, 6)},
    "table12": {"real": dict(data="real"), "generated": {}, "half of each, samples of generated": dict(data="mixed")},
    "figure9": {"generated": {}} | {f"one in {k}, samples of generated": dict(share=k) for k in (2, 5, 20, 100)},
}  # fmt: skip
ONLY_CPU = {  # more options at scale cpu: of the larger agents of table3, and of all runs of table10
    "table3": dict(updates=10_000, eval_every=625),  # as many rows as with the smaller batch
    "table10": dict(diffusion_recipe="paper", diffusion_width=512, diffusion_lr=1e-3, diffusion_steps=10_000,
                    num_samples=100_000),
}  # fmt: skip


@dataclass
class Args:
    study: Annotated[Literal[tuple(STUDIES)], tyro.conf.Positional]
    out: Path  # folder for the runs
    env: str = "quickstart"  # as in the scripts
    dataset_path: Optional[Path] = None  # as in the scripts
    scale: Literal["cpu", "paper"] = "cpu"  # cpu: 20,000 diffusion steps, 200,000 samples, 40,000 updates
    seeds: int = 1  # of the agent; 0: nothing is run, the table is of what is recorded
    workers: int = 2  # runs at a time, one thread each


def options_of(args, label, seed):
    """The options of one run."""
    options = dict(env=args.env, seed=seed) | SCALES[args.scale]
    options |= dict(dataset_path=str(args.dataset_path.resolve())) if args.dataset_path else {}
    options |= STUDIES[args.study][label]
    if args.scale == "cpu" and (args.study != "table3" or "larger" in label):
        options |= ONLY_CPU.get(args.study, {})
    options["num_samples"] //= options.pop("share", 1)
    if options.get("data") == "mixed":
        del options["num_samples"]  # as many as there are real rows
    return options


def main(args):
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)

    def job(label, seed):
        """Seeds above 0 and labels "... samples of X" take the samples of another run."""
        options, source = options_of(args, label, seed), None
        maker = label.partition("samples of ")[2] or label
        if options.get("data") != "real" and (seed > 0 or maker != label):
            source = f"{maker}-0", "synther_td3bc.py", options_of(args, maker, 0)
        result(args.out / "variations.jsonl", f"{label}-{seed}", "synther_td3bc.py", source, **options)

    for seed in range(args.seeds):
        for later in False, True:  # first those whose samples others take
            labels = [label for label in STUDIES[args.study] if ("samples of" in label) == later]
            at_once(args.workers, [partial(job, label, seed) for label in labels])
    show(args)


def show(args):
    """Print the table of what is recorded of the study, and draw its picture."""
    found = {label: every_seed(args.out / "variations.jsonl", label) for label in STUDIES[args.study]}
    panel = {label: [values["score"] for values in own] for label, own in found.items() if own}
    if not panel:
        raise edm.RunError(f"nothing of {args.study} is recorded in {args.out}")
    numbers = sum(x.size for x in edm.load_transitions(str(args.dataset_path or args.env)).values())
    print("| | data / model | marginal | correlation | AUC | score (seeds) |\n|---|---|---|---|---|---|")
    for label, scores in panel.items():
        first = found[label][0]
        columns = [f"{numbers / first['parameters']:.1f}" if "parameters" in first else ""]
        columns += [f"{first[key]:.3f}" if key in first else "" for key in ("marginal", "correlation", "c2st")]
        print(f"| {label} | {' | '.join(columns)} | {summary(scores)} |")
    draw_scores(args.out / f"{args.study}.png", {args.study: panel})


if __name__ == "__main__":
    launch(main, Args, __doc__)
