"""Online (Figure 6): SAC with generated transitions, SAC, SAC with as many updates, and REDQ.

    python tests/paper/figure6.py --out online --tasks HalfCheetah-v4 --seeds 3  # hours
    python tests/paper/figure6.py --out tests/paper/results --tasks Hopper-v4 --seeds 0
    python tests/paper/compare.py online/*/* --by algo utd standardize_reward  # learning curves

The table shows the return, mean of the last three evaluations, and its standard deviation over all
seeds that are recorded.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal, Optional

import runs

import edm

METHODS = {
    "sac": dict(algo="sac"),
    "sac, 20 updates": dict(algo="sac", utd=20),
    "redq": dict(algo="redq"),
    "synther": dict(algo="synther"),
    "synther, reward standardised": dict(algo="synther", standardize_reward=True),
}
SMALL = dict(total_steps=15_000, retrain_every=5_000, eval_episodes=5)
SMALL |= dict(diffusion_steps=10_000, num_samples=100_000)
SCALES = dict(cpu=SMALL, paper={})


@dataclass(kw_only=True)
class Args(runs.StudyArgs):
    # The paper has these in v2, and dmc/cheetah-run, dmc/quadruped-walk, dmc/reacher-hard
    tasks: tuple[str, ...] = ("HalfCheetah-v4", "Walker2d-v4", "Hopper-v4")
    # 'synther, reward standardised' differs from synther in dmc/ alone
    methods: tuple[Literal[tuple(METHODS)], ...] = ("sac", "sac, 20 updates", "redq", "synther")
    total_steps: Optional[int] = None  # environment steps; default: those of the scale


def main(args):
    path = args.out / "figure6.jsonl"
    jobs = []
    for seed, task, method in product(range(args.seeds), args.tasks, args.methods):
        options = dict(env=task, seed=seed, **SCALES[args.scale], **METHODS[method])
        if args.total_steps:
            options["total_steps"] = args.total_steps
        name = f"{task.replace('/', '-')} {method} {seed}"
        jobs.append(partial(runs.result, path, name, "synther_sac_online.py", **options))
    runs.at_once(args.workers, jobs)
    show(args, path)


def show(args, path):
    """Print the table of what is recorded for these tasks and methods, and draw its picture."""
    panels = {task: {} for task in args.tasks}
    for task, method in product(args.tasks, args.methods):
        found = runs.every_seed(path, f"{task.replace('/', '-')} {method}")
        if found:
            panels[task][method] = [values["return_mean"] for values in found]
    if not any(panels.values()):
        raise edm.RunError(f"nothing is recorded in {args.out} for these tasks and methods")
    runs.print_row("return (seeds)", *args.tasks, head=True)
    for method in args.methods:
        cells = [runs.summary(own.get(method, []), digits=0) for own in panels.values()]
        runs.print_row(method, *cells)
    runs.draw_scores(path.with_suffix(".png"), panels, "return")


if __name__ == "__main__":
    runs.launch(main, Args, __doc__)
