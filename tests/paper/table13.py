"""Latents of actor and critic, or of one of them for both heads (Table 13), on real and on generated latents.

    python tests/paper/table13.py --out table13                      # hours on two cores: agent, images, stage 1, heads
    python tests/paper/table13.py --out table13 --seeds 2            # goes on where it stopped, with more seeds
    python tests/paper/table13.py --out tests/paper/results --seeds 0    # nothing is run: our own results

An agent learns walker-walk, is filmed, and DrQ+BC learns from the images (stage 1). All latents are its own. The table
shows return / 10, mean of the last three evaluations, and its standard deviation over all recorded seeds. Each seed has
its own diffusion model and heads.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

from runs import ENVIRON, ROOT, at_once, draw_scores, every_seed, launch, recorded, result, run, summary

import edm

SCALES = {
    "cpu": dict(stage1_updates=5_000, stage2_updates=5_000, batch_size=64, noise_duration=900, eval_every=1_250,
                eval_episodes=4, diffusion_steps=6_000, num_samples=50_000),
    "paper": dict(diffusion_steps=100_000, num_samples=5_000_000),
}  # fmt: skip
LATENTS = "both", "actor", "critic"  # of whose encoder
EPISODES = {"cpu": 40, "paper": 200}


@dataclass
class Args:
    out: Path  # folder for the runs
    scale: Literal["cpu", "paper"] = "cpu"  # cpu: 40 episodes, 5,000 and 5,000 updates; paper: 200, 550,000, a GPU
    seeds: int = 1  # 0: nothing is run, the table is of what is recorded
    workers: int = 2  # runs at a time, one thread each


def film(folder, episodes):
    """Make the folder of images of an agent, if it is not there."""
    if not folder.exists():
        options = dict(env="dmc/walker-walk", algo="sac", total_steps=100_000, eval_every=10_000)
        agent, part = run(folder.parent, "agent", "synther_sac_online.py", **options), Path(f"{folder}-part")
        shutil.rmtree(part, ignore_errors=True)
        words = ["--env", "walker-walk-expert", "--run", agent, "--episodes", episodes, "--out", part]
        command = [sys.executable, ROOT / "tests/paper/vd4rl_data.py", *map(str, words)]
        if subprocess.run(command, env=ENVIRON).returncode != 0:
            raise edm.RunError("no images could be made")
        part.rename(folder)


def main(args):
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    path, cells = args.out / "table13.jsonl", [*product(range(args.seeds), LATENTS, ("real", "synther"))]
    options = dict(env="walker-walk-expert", dataset_path=f"images-{args.scale}", **SCALES[args.scale])
    stage1 = "stage 1", "synther_vd4rl.py", options | dict(data="real", stage2_updates=1)
    if {f"{latent} {data} {seed}" for seed, latent, data in cells} - {entry["name"] for entry in recorded(path)}:
        film(args.out / options["dataset_path"], EPISODES[args.scale])
        run(args.out, stage1[0], stage1[1], **stage1[2])

    def job(seed, latent, data):
        own = options | dict(latent=latent, data=data, seed=seed, diffusion_seed=seed)
        result(path, f"{latent} {data} {seed}", "synther_vd4rl.py", stage1, takes=("agent_path", ""), **own)

    at_once(args.workers, [partial(job, *cell) for cell in cells])
    show(path)


def show(path):
    """Print the table of what is recorded, and draw its picture."""
    found = {(x, data): every_seed(path, f"{x} {data}") for x, data in product(LATENTS, ("real", "synther"))}
    if not all(found.values()):
        raise edm.RunError(f"not all kinds of runs are recorded in {path}")
    panels = {"real": {}, "synther": {}}
    for (latent, data), own in found.items():
        panels[data][latent] = [values["score"] for values in own]
    print("| latents of | heads on real latents | on generated ones | AUC of these |\n|---|---|---|---|")
    for latent in LATENTS:
        real, generated = (summary(own[latent]) for own in panels.values())
        print(f"| {latent} | {real} | {generated} | {found[latent, 'synther'][0]['c2st']:.3f} |")
    draw_scores(path.with_suffix(".png"), panels)


if __name__ == "__main__":
    launch(main, Args, __doc__)
