"""Variations of an experiment: larger agents (Table 3), small denoisers (Table 5), depth and plain MLPs (Table 10),
half real data (Table 12), number of samples (Figure 9). Each is a list of runs of `synther_td3bc.py`.

    python tests/paper/variations.py table12 --out variations               # on the quickstart's data: an hour
    python tests/paper/variations.py figure9 --out variations --seeds 3     # goes on where it stopped, with more seeds

A run's score is the mean of its last three evaluations. The table has the mean and the standard deviation of it over
seeds of the agent. All seeds learn from the samples of seed 0. Data / model: how many numbers the real data have for
one of the diffusion model.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Optional

import numpy as np
import tyro
from runs import at_once, draw_scores, launch, result

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
ONLY_CPU = {  # more options of table3's larger agents, and of all runs of the others, at scale cpu
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
    seeds: int = 1  # of the agent, at least one
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
        options, source, source_run = options_of(args, label, seed), label.partition("samples of ")[2] or label, None
        if options.get("data") != "real" and (seed > 0 or source != label):
            source_run = f"{source}-0", "synther_td3bc.py", options_of(args, source, 0)
        return result(args.out / "variations.jsonl", f"{label}-{seed}", "synther_td3bc.py", source_run, **options)

    labels, found = STUDIES[args.study], {}
    own = [label for label in labels if "samples of" not in label]
    for seed in range(args.seeds):
        for some in own, [label for label in labels if label not in own]:
            values = at_once(args.workers, [partial(job, label, seed) for label in some])
            found |= {(label, seed): value for label, value in zip(some, values)}
    real = edm.load_transitions(str(args.dataset_path or args.env))
    numbers = sum(x.size for x in real.values())
    print("| | data / model | marginal | correlation | AUC | score |\n|---|---|---|---|---|---|")
    panel = {label: np.array([found[label, seed]["score"] for seed in range(args.seeds)]) for label in labels}
    for label, scores in panel.items():
        first = found[label, 0]
        columns = [f"{numbers / first['parameters']:.1f}" if "parameters" in first else ""]
        columns += [f"{first[key]:.3f}" if key in first else "" for key in ("marginal", "correlation", "c2st")]
        print(f"| {label} | {' | '.join(columns)} | {scores.mean():.1f} ± {scores.std():.1f} |")
    draw_scores(args.out / f"{args.study}.png", {args.study: panel})


if __name__ == "__main__":
    launch(main, Args, __doc__)
