"""New heads on frozen latents, over several seeds: their scores, and whether they remember actions.

    python tests/paper/latent_heads.py --run runs/walker-walk-expert__... --out heads.jsonl
    python tests/paper/latent_heads.py --out heads.jsonl                           # the table

Heads learn from the dataset's latent transitions, from the generated ones, and from the dataset's
without every tenth episode. "Error" is the share of the variance of the dataset's actions that the
policy's mean action leaves unexplained. "Held-out" is the same on those tenth episodes, "size" the
mean absolute action. Only by remembering single actions can an error come below the held-out one.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from runs import launch, print_row, record, recorded

import edm
import synther_vd4rl as script


@dataclass
class Args:
    run: Optional[Path] = None  # folder of synther_vd4rl.py --data synther; none: show the results
    seeds: tuple[int, ...] = (0, 1, 2)  # of the heads and of their batches
    episodes: int = 10  # of an evaluation, the same for all, and not the run's own
    out: Path = Path("heads.jsonl")  # file to add results to, one JSON object per line


@torch.no_grad()
def action_error(heads, rows):
    """The unexplained share of the actions' variance, and the policy's mean absolute action."""
    actions = rows[:, heads.latent_dim : heads.latent_dim + heads.act_dim]
    policy_actions = heads.act(rows[:, : heads.latent_dim])
    error = (policy_actions - actions).square().mean() / (actions - actions.mean(0)).square().mean()
    return error.item(), policy_actions.abs().mean().item()


def print_table(results):
    """Mean and standard deviation over the seeds of each run and source."""
    print_row("run", "heads on", "score", "error", "held-out error", "size", head=True)
    lines = defaultdict(lambda: defaultdict(list))
    for result in results:
        for key, value in result.items():
            lines[result["run"], result["source"]][key].append(value)
    for name, own in lines.items():
        scores = [np.mean(returns) / 10 for returns in own["returns"]]
        cells = [f"{np.mean(scores):.1f} +- {np.std(scores):.1f}" if scores else ""]
        for key in ("error", "held_out", "size"):
            cells.append(f"{np.mean(own[key]):.2f}" if own[key] else "")
        print_row(*name, *cells)


def main(args):
    results = recorded(args.out)
    if not args.run:
        return print_table(results)
    settings = json.loads((args.run / "args.json").read_text())
    run = script.Args(**settings | dict(resume=None, device="cpu"))
    env = script.make_env(run.env.rsplit("-", 1)[0])
    data = script.load_dataset(script.find_files(run), run)
    agent, _ = script.load_agent(args.run / "agent.pt", env.act_dim, run)
    _, episode = data["start"].unique(return_inverse=True)
    held_out = episode % 10 == min(9, episode.max())
    real = edm.load_torch(args.run / "latents.pt")
    generated = edm.pack(**edm.load_transitions(args.run / "synthetic.npz"))[:, :-1]
    rows = {"real": real, "generated": generated, "held-out": real[~held_out]}
    for seed, source in product(args.seeds, rows):
        result = dict(run=args.run.name, source=source, seed=seed)
        if any(result.items() <= r.items() for r in results):
            continue
        torch.manual_seed(seed)
        heads = script.DrQBC(env.act_dim, run, "stage2")
        draw = partial(script.draw_latents, run, rows[source], heads.latent_dim)
        update = script.make_update(run, heads, draw, torch.zeros(len(heads.LOSSES)))
        for number in edm.Bar(range(1, run.stage2_updates + 1), "stage2"):
            update(number)
        if source == "held-out":
            result["held_out"], result["size"] = action_error(heads, real[held_out])
        else:
            result["error"], result["size"] = action_error(heads, real)
            policy = script.make_policy(heads, agent)
            result["returns"] = script.evaluate(policy, env, args.episodes, 1_000).tolist()
        record(args.out, result)
        print(result, flush=True)


if __name__ == "__main__":
    launch(main, Args, __doc__)
