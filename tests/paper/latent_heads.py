"""New heads on frozen latents, over several seeds: their scores, and whether they remember the dataset's actions.

    python tests/paper/latent_heads.py --run runs/walker-walk-expert__synther_vd4rl-bc-synther__... --out heads.jsonl
    python tests/paper/latent_heads.py --out heads.jsonl                                            # the table

Heads are trained on the dataset's latent transitions, on the generated ones, and on the dataset's without every tenth
episode, each in the run's own number of updates. "Error" is the share of the variance of the dataset's actions that the
policy's mean action leaves unexplained. "Held-out" is the same on those tenth episodes, "size" the mean absolute
action. A policy can lower the first below the second only by remembering single actions, noise and all.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from runs import launch

import edm
import synther_vd4rl


@dataclass
class Args:
    run: str = ""
    """finished run folder of synther_vd4rl.py --data synther; without one, the results so far are shown as a table"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the heads and of their batches"""
    episodes: int = 10
    """episodes of an evaluation, the same for all, and not the run's own"""
    out: str = "heads.jsonl"
    """file to add results to, one JSON object per line"""


def parts(rows, act_dim):
    """z, a, r, z' of latent transitions."""
    latent_dim = (rows.shape[1] - act_dim - 1) // 2
    return rows.split([latent_dim, act_dim, 1, latent_dim], dim=1)


def train_heads(rows, seed, act_dim, args):
    """Stage 2 of synther_vd4rl.py: an Agent after args.stage2_updates."""
    torch.manual_seed(seed)
    heads, noise = synther_vd4rl.Agent(act_dim, args, "stage2"), torch.ones(())
    for update in edm.Bar(range(args.stage2_updates), "stage2"):
        noise.fill_(1 - 0.9 * min(update / args.noise_duration, 1))
        z, actions, rewards, next_z = parts(rows[torch.randint(len(rows), (args.batch_size,))], act_dim)
        heads.update(z, actions, rewards[:, 0], args.discount**args.nstep, next_z, noise)
    return heads


@torch.no_grad()
def action_error(heads, rows, act_dim):
    """The unexplained share of the variance of the rows' actions, and the mean absolute action of the policy."""
    latents, actions, _, _ = parts(rows, act_dim)
    policy_actions = heads.policy(heads.actor_trunk(latents))
    error = (policy_actions - actions).square().mean() / (actions - actions.mean(0)).square().mean()
    return error.item(), policy_actions.abs().mean().item()


def print_table(results):
    """Mean and standard deviation over the seeds of each run and source."""
    print("| run | heads on | score | error | held-out error | size |\n|---|---|---|---|---|---|")
    for run, source in dict.fromkeys((r["run"], r["source"]) for r in results):
        own = [r for r in results if (r["run"], r["source"]) == (run, source)]
        scores = [np.mean(r["returns"]) / 10 for r in own if "returns" in r]
        cells = [f"{np.mean(scores):.1f} +- {np.std(scores):.1f}" if scores else ""]
        means = {key: [r[key] for r in own if key in r] for key in ("error", "held_out", "size")}
        cells += [f"{np.mean(x):.2f}" if x else "" for x in means.values()]
        print(f"| {run} | {source} | {' | '.join(cells)} |")


def main(args):
    results = [json.loads(line) for line in open(args.out)] if Path(args.out).exists() else []
    if not args.run:
        return print_table(results)
    run_dir = Path(args.run)
    run = synther_vd4rl.Args(**json.loads((run_dir / "args.json").read_text()) | {"resume": None, "device": "cpu"})
    done = {(r["run"], r["source"], r["seed"]) for r in results}
    env = synther_vd4rl.make_env(run.env.rsplit("-", 1)[0])
    data = synther_vd4rl.load_dataset(synther_vd4rl.find_files(run), run)
    agent, _ = synther_vd4rl.load_agent(run_dir / "agent.pt", env.act_dim, run)
    real = edm.load_file(run_dir / "latents.pt")
    _, episode = data["start"].unique(return_inverse=True)
    held_out = episode % 10 == min(9, episode.max())
    with np.load(run_dir / "synthetic.npz") as f:
        rows = {"real": real, "generated": edm.pack(**f)[:, :-1], "held-out": real[~held_out]}

    for seed, source in [(seed, source) for seed in args.seeds for source in rows]:
        if (run_dir.name, source, seed) in done:
            continue
        heads = train_heads(rows[source], seed, env.act_dim, run)
        result = dict(run=run_dir.name, source=source, seed=seed)
        if source == "held-out":
            result["held_out"], result["size"] = action_error(heads, real[held_out], env.act_dim)
        else:
            result["error"], result["size"] = action_error(heads, real, env.act_dim)
            policy = lambda images: heads.policy(heads.actor_trunk(agent.latents(images)))  # noqa: E731
            result["returns"] = synther_vd4rl.evaluate(policy, env, args.episodes, 1_000)[0].tolist()
        with open(args.out, "a") as f:
            f.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    launch(main, Args, __doc__)
