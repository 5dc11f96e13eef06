"""Latents of actor and critic, or of one of them for both heads (Table 13).

    python tests/paper/table13.py --out table13                          # hours on two cores
    python tests/paper/table13.py --out tests/paper/results --seeds 0    # our own results

An agent learns walker-walk, is filmed, and DrQ+BC learns from the images (stage 1). All latents are
its own. The table shows return / 10, mean of the last three evaluations, with heads on real latents
and on generated ones. Each seed has its own diffusion model and heads.
"""

import shutil
from functools import partial
from itertools import product
from pathlib import Path

import runs
import vd4rl_data

import edm

SMALL = dict(stage1_updates=5_000, stage2_updates=5_000, batch_size=64, noise_duration=900)
SMALL |= dict(eval_every=1_250, eval_episodes=4, diffusion_steps=6_000, num_samples=50_000)
SCALES = dict(cpu=SMALL, paper=dict(diffusion_steps=100_000, num_samples=5_000_000))
EPISODES = {"cpu": 40, "paper": 200}
LATENTS = ("both", "actor", "critic")  # of whose encoder
DATA = ("real", "synther")  # that the heads learn from
Args = runs.StudyArgs


def film(folder, episodes):
    """Make the folder of images of an agent, if it is not there."""
    if not folder.exists():
        options = dict(env="dmc/walker-walk", algo="sac", total_steps=100_000, eval_every=10_000)
        agent = runs.run(folder.parent, "agent", "synther_sac_online.py", **options)
        part = Path(f"{folder}-part")
        shutil.rmtree(part, ignore_errors=True)
        vd4rl_data.main(vd4rl_data.Args("walker-walk-expert", agent, episodes, part))
        part.rename(folder)


def main(args):
    path = args.out / "table13.jsonl"
    images = f"images-{args.scale}"
    options = dict(env="walker-walk-expert", dataset_path=images, **SCALES[args.scale])
    stage1 = ("stage 1", "synther_vd4rl.py", options | dict(data="real", stage2_updates=1))
    jobs = {}
    for seed, latent, data in product(range(args.seeds), LATENTS, DATA):
        own = options | dict(latent=latent, data=data, seed=seed, diffusion_seed=seed)
        name = f"{latent} {data} {seed}"
        where = (path, name, "synther_vd4rl.py")
        jobs[name] = partial(runs.result, *where, stage1, ("agent_path", ""), **own)
    if jobs.keys() - {entry["name"] for entry in runs.recorded(path)}:
        film(args.out / images, EPISODES[args.scale])
        runs.run(args.out, stage1[0], stage1[1], **stage1[2])
    runs.at_once(args.workers, jobs.values())
    show(path)


def show(path):
    """Print the table of what is recorded, and draw its picture."""
    panels = {data: {} for data in DATA}
    quality = {}
    for data, latent in product(DATA, LATENTS):
        found = runs.every_seed(path, f"{latent} {data}")
        if not found:
            raise edm.RunError(f"no run with {latent} {data} is recorded in {path}")
        panels[data][latent] = [values["score"] for values in found]
        quality[latent] = found[0].get("c2st")
    columns = ("heads on real latents", "on generated ones", "AUC of these")
    runs.print_row("latents of", *columns, head=True)
    for latent in LATENTS:
        cells = [runs.summary(own[latent]) for own in panels.values()]
        runs.print_row(latent, *cells, f"{quality[latent]:.3f}")
    runs.draw_scores(path.with_suffix(".png"), panels)


if __name__ == "__main__":
    runs.launch(main, Args, __doc__)
