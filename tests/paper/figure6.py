"""Online (Figure 6): SAC with generated transitions against SAC, SAC with as many updates, and REDQ.

    python tests/paper/figure6.py --out online --tasks HalfCheetah-v4 --seeds 3          # hours on two cores
    python tests/paper/figure6.py --out online --tasks dmc/cheetah-run --total-steps 20000 --methods sac synther
    python tests/paper/figure6.py --out tests/paper/results --tasks Hopper-v4 dmc/cheetah-run --seeds 0   # our results
    python tests/paper/compare.py online/*/* --by algo utd standardize_reward --out online.png            # the curves

The table shows the return, mean of the last three evaluations, and its standard deviation over all seeds that are
recorded.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Optional

from runs import at_once, draw_scores, every_seed, launch, result, summary

import edm

METHODS = {
    "sac": dict(algo="sac"),
    "sac, 20 updates": dict(algo="sac", utd=20),
    "redq": dict(algo="redq"),
    "synther": dict(algo="synther"),
    "synther, reward standardised": dict(algo="synther", standardize_reward=True),
}
SCALES = {
    "cpu": dict(total_steps=15_000, retrain_every=5_000, eval_episodes=5, diffusion_steps=10_000, num_samples=100_000),
    "paper": {},
}


@dataclass
class Args:
    out: Path  # folder for the runs
    tasks: tuple[str, ...] = ("HalfCheetah-v4", "Walker2d-v4", "Hopper-v4")
    """the paper has these in Gymnasium's v2, and dmc/cheetah-run, dmc/quadruped-walk, dmc/reacher-hard"""
    methods: tuple[Literal[tuple(METHODS)], ...] = ("sac", "sac, 20 updates", "redq", "synther")
    """'synther, reward standardised' differs from synther in dmc/ alone"""
    scale: Literal["cpu", "paper"] = "cpu"  # cpu: 15,000 environment steps, and a tenth of the diffusion training
    total_steps: Optional[int] = None  # environment steps; default: those of the scale
    seeds: int = 2  # 0: nothing is run, the table is of what is recorded
    workers: int = 2  # runs at a time, one thread each


def main(args):
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)

    def job(task, method, seed):
        options = dict(env=task, seed=seed, **SCALES[args.scale], **METHODS[method])
        options |= dict(total_steps=args.total_steps) if args.total_steps else {}
        name = f"{task.replace('/', '-')} {method} {seed}"
        return result(args.out / "figure6.jsonl", name, "synther_sac_online.py", **options)

    cells = [(task, method, seed) for seed in range(args.seeds) for task in args.tasks for method in args.methods]
    at_once(args.workers, [partial(job, *cell) for cell in cells])
    show(args)


def show(args):
    """Print the table of what is recorded for these tasks and methods, and draw its picture."""
    panels = {}
    for task in args.tasks:
        found = {x: every_seed(args.out / "figure6.jsonl", f"{task.replace('/', '-')} {x}") for x in args.methods}
        panels[task] = {x: [values["return_mean"] for values in own] for x, own in found.items() if own}
    if not any(panels.values()):
        raise edm.RunError(f"nothing is recorded in {args.out} for these tasks and methods")
    print(f"| return (seeds) | {' | '.join(args.tasks)} |\n|---{'|---' * len(args.tasks)}|")
    for method in args.methods:
        columns = [summary(own.get(method, []), digits=0) for own in panels.values()]
        print(f"| {method} | {' | '.join(columns)} |")
    draw_scores(args.out / "figure6.png", panels, "return")


if __name__ == "__main__":
    launch(main, Args, __doc__)
