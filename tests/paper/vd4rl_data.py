"""Make a small dataset of V-D4RL's layout: a task of the DeepMind Control suite, rendered while an agent acts.

    python synther_sac_online.py --env dmc/walker-walk --algo sac --total-steps 100000                 # the agent
    python tests/paper/vd4rl_data.py --env walker-walk-mixed --run runs/dmc-walker-walk__... --episodes 40
    python synther_vd4rl.py --env walker-walk-mixed --dataset-path vd4rl_data

About 30 images a second on a CPU: 40 episodes of 501 images take 11 minutes. An episode of level `expert` is the
agent's. One of `random` has random actions and needs no agent. In one of `mixed` each action is random with a
probability that is drawn once for the episode. As in V-D4RL every action is held for two steps of the simulator. The
agent learned to choose one for each step, so it plays a little worse than in its own run.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import h5py
import numpy as np
import torch
from runs import launch

import edm
import synther_sac_online
import synther_vd4rl

TYPES = dict(observation=np.uint8, action=np.float32, reward=np.float32, discount=np.float32, step_type=np.int64)


@dataclass
class Args:
    env: str = "walker-walk-mixed"
    """walker-walk or cheetah-run, then -random, -mixed or -expert"""
    run: Optional[str] = None
    """run folder of synther_sac_online.py with the agent that acts; random needs none"""
    episodes: int = 40
    """episodes of 501 images"""
    out: str = "vd4rl_data"
    """folder to write to; episodes that it has already are not touched, and another --seed adds to them"""
    seed: int = 0
    """seed of the tasks and the actions"""


@torch.no_grad()
def main(args):
    task, _, level = args.env.rpartition("-")
    if task not in ("walker-walk", "cheetah-run") or level not in ("random", "mixed", "expert"):
        raise edm.RunError(f"--env must be walker-walk or cheetah-run, then -random, -mixed or -expert, not {args.env}")
    if level != "random" and not args.run:
        raise edm.RunError(f"{args.env} needs --run, an agent that acts")
    folder = Path(args.out) / "main" / task.replace("-", "_") / synther_vd4rl.LEVELS[level] / "84px"
    if any(folder.glob(f"episode_{args.seed}_*")):
        raise edm.RunError(f"{folder} has episodes of seed {args.seed} already; give another --seed to add to them")
    env = synther_vd4rl.make_env(task)
    if level != "random":
        saved = edm.load_file(Path(args.run) / "checkpoint.pt")["agent"]
        run = synther_sac_online.Args(**json.loads((Path(args.run) / "args.json").read_text()) | {"device": "cpu"})
        agent = synther_sac_online.SAC(saved["critic.weights.0"].shape[1] - env.act_dim, env.act_dim, run)
        agent.load_state_dict(saved)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    returns = []
    for episode in edm.Bar(range(args.episodes), args.env):
        share = {"random": 1.0, "expert": 0.0, "mixed": rng.uniform()}[level]  # of random actions
        images, ended = env.reset(10_000 * args.seed + episode), False
        rows = [(images[-3:], np.zeros(env.act_dim), 0.0, 1.0, 0)]
        while not ended:
            if rng.uniform() < share:
                action = rng.uniform(-1, 1, env.act_dim)
            else:
                observation = np.concatenate([np.ravel(x) for x in env.observation.values()])
                action = agent.actor.sample(torch.as_tensor(observation, dtype=torch.float32)[None])[0][0].numpy()
            images, reward, ended = env.step(action)
            rows.append((images[-3:], action, reward, 1.0, 2 if ended else 1))
        with h5py.File(folder / f"episode_{args.seed}_{episode:04}.hdf5", "w") as f:
            for (name, dtype), x in zip(TYPES.items(), zip(*rows)):
                f.create_dataset(name, data=np.array(x, dtype), compression="gzip" if name == "observation" else None)
        returns.append(sum(row[2] for row in rows))
    print(f"{folder}: {args.episodes} episodes, return {np.mean(returns):.0f} +- {np.std(returns):.0f}")


if __name__ == "__main__":
    launch(main, Args, __doc__)
