"""New heads on frozen latents, over several seeds: their scores, and whether they remember the dataset's actions.

    python tests/paper/latent_heads.py --run runs/walker-walk-expert__synther_vd4rl-bc-synther__... --out heads.jsonl
    python tests/paper/latent_heads.py --out heads.jsonl --table

For a finished run of synther_vd4rl.py with a diffusion model: heads are trained on the dataset's latent transitions, on
the generated ones, and on the dataset's without every tenth episode, each in the run's own number of updates. "Error"
is what of the variance of the dataset's actions the policy's mean action leaves unexplained, "held-out" the same on
those tenth episodes, "size" the mean absolute action. A policy can lower the first below the second only by remembering
single actions, noise and all.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import trange

sys.path.append(str(Path(__file__).parents[2]))
import edm
import synther_vd4rl


@dataclass
class Args:
    run: str = ""
    """finished run folder of synther_vd4rl.py --data synther"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the heads and of their batches"""
    sources: tuple[Literal["real", "generated", "held-out"], ...] = ("real", "generated", "held-out")
    """what the heads learn from: held-out is real without every tenth episode"""
    episodes: int = 10
    """episodes of an evaluation, the same for all, and not the run's own"""
    out: str = "heads.jsonl"
    """file to add results to, one JSON object per line"""
    table: bool = False
    """print the results so far as a table instead"""


def train_heads(rows, seed, act_dim, args):
    """Stage 2 of synther_vd4rl.py on a CPU: a LatentAgent after args.stage2_updates."""
    torch.manual_seed(seed)
    heads, noise = synther_vd4rl.LatentAgent(act_dim, args, "cpu"), torch.ones(())
    for update in trange(args.stage2_updates, desc="stage2", **edm.BAR):
        noise.fill_(1 - 0.9 * min(update / args.noise_duration, 1))
        heads.update(rows[torch.randint(len(rows), (args.batch_size,))], noise)
    return heads


@torch.no_grad()
def action_error(heads, rows):
    """The unexplained share of the variance of the rows' actions, and the mean absolute action of the policy."""
    latents, actions, _, _ = rows.split(heads.sizes, dim=1)
    policy_actions = heads.heads.policy(heads.features(latents)[0])
    error = (policy_actions - actions).square().mean() / (actions - actions.mean(0)).square().mean()
    return error.item(), policy_actions.abs().mean().item()


def read_results(path):
    """The results so far, a list of dicts."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        raise edm.RunError(f"{path} has a line that is no JSON; take it out") from None


def print_table(path):
    """Mean and standard deviation over the seeds of each run and source."""
    groups = {}
    for result in read_results(path):
        groups.setdefault((result["run"], result["source"]), []).append(result)
    print("| run | heads on | score | error | held-out error | size |\n|---|---|---|---|---|---|")
    for (run, source), results in groups.items():
        scores = [np.mean(r["returns"]) / 10 for r in results if "returns" in r]
        score = f"{np.mean(scores):.1f} ± {np.std(scores):.1f}" if scores else ""
        means = [np.mean([r[key] for r in results if key in r] or np.nan) for key in ("error", "held_out", "size")]
        print(f"| {run} | {source} | {score} | " + " | ".join("" if np.isnan(x) else f"{x:.2f}" for x in means) + " |")


def main(args):
    if args.table:
        return print_table(args.out)
    run_dir = Path(args.run)
    if not args.run or not (run_dir / "synthetic.npz").is_file():
        raise edm.RunError(
            "--run wants the folder of a finished run of synther_vd4rl.py that trained a diffusion model"
        )
    try:
        run = synther_vd4rl.Args(**json.loads((run_dir / "args.json").read_text()) | {"resume": None})
    except (OSError, ValueError, TypeError):
        raise edm.RunError(f"{run_dir} is no run folder of synther_vd4rl.py") from None
    if args.episodes < 1 or min(args.seeds, default=0) < 0:
        raise edm.RunError("--episodes must be at least 1, and --seeds at least 0")
    done = {(x["run"], x["source"], x["seed"]) for x in read_results(args.out)}
    synther_vd4rl.choose_renderer()
    synther_vd4rl.keep_freed_memory()
    env = synther_vd4rl.PixelEnv(run.env.rsplit("-", 1)[0])
    data = synther_vd4rl.load_dataset(run)
    act_dim = data["action"].shape[1]
    agent, _ = synther_vd4rl.load_agent(run_dir / "agent.pt", act_dim, run, "cpu")
    real = edm.load_file(run_dir / "latents.pt")
    _, episode = data["start"].unique(return_inverse=True)
    held_out = episode % 10 == min(9, episode.max())
    with np.load(run_dir / "synthetic.npz") as f:
        rows = {"real": real, "generated": edm.pack(**f)[:, :-1], "held-out": real[~held_out]}

    for seed in args.seeds:
        for source in args.sources:
            if (run_dir.name, source, seed) in done:
                continue
            heads = train_heads(rows[source], seed, act_dim, run)
            result = dict(run=run_dir.name, source=source, seed=seed)
            if source == "held-out":
                result["held_out"], result["size"] = action_error(heads, real[held_out])
            else:
                result["error"], result["size"] = action_error(heads, real)
                policy = lambda images: heads.heads.policy(heads.features(agent.latents(images))[0])  # noqa: E731
                result["returns"] = synther_vd4rl.evaluate(policy, env, args.episodes, 1000)[0].tolist()
            with open(args.out, "a") as f:
                f.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (edm.RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
