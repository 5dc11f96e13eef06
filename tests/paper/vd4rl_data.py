"""Make a small dataset of V-D4RL's layout: a task of the DeepMind Control suite, rendered while an
agent acts.

    python tests/paper/vd4rl_data.py --env walker-walk-mixed --run runs/dmc-walker-walk__...
    python synther_vd4rl.py --env walker-walk-mixed --dataset-path vd4rl_data

An episode of level `expert` is the agent's, one of `random` has random actions. In one of `mixed`
each action is random with a probability that is drawn once for it. As in V-D4RL every action is
held for two steps of the simulator. The agent learned to choose one for each, so it plays a little
worse.
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

TYPES = dict(observation="uint8", action="float32", reward="float32", discount="float32")
TYPES["step_type"] = "int64"


@dataclass
class Args:
    env: str = "walker-walk-mixed"  # walker-walk or cheetah-run, then -random, -mixed or -expert
    run: Optional[Path] = None  # run folder of synther_sac_online.py; random needs none
    episodes: int = 40  # of 501 images
    out: str = "vd4rl_data"  # folder to write to; its episodes of other seeds stay
    seed: int = 0  # of the tasks and the actions


@torch.no_grad()
def main(args):
    task, _, level = args.env.rpartition("-")
    if task not in ("walker-walk", "cheetah-run") or level not in ("random", "mixed", "expert"):
        known = "walker-walk or cheetah-run, then -random, -mixed or -expert"
        raise edm.RunError(f"--env must be {known}, not {args.env}")
    if level != "random" and not args.run:
        raise edm.RunError(f"{args.env} needs --run, an agent that acts")
    folder = Path(args.out) / "main" / task.replace("-", "_") / synther_vd4rl.LEVELS[level] / "84px"
    if any(folder.glob(f"episode_{args.seed}_*")):
        raise edm.RunError(f"{folder} has episodes of seed {args.seed} already: give another")
    if level != "random":
        run = json.loads((args.run / "args.json").read_text()) | dict(device="cpu")
        if run.get("env") != f"dmc/{task}":
            raise edm.RunError(f"{args.run} is an agent of {run.get('env')}, not of dmc/{task}")
    env = synther_vd4rl.make_env(task)
    if level != "random":
        saved = edm.load_torch(args.run / "checkpoint.pt")["agent"]
        sizes = (saved["actor.net.0.weight"].shape[1], env.act_dim)
        agent = synther_sac_online.SAC(*sizes, synther_sac_online.Args(**run))
        agent.load_state_dict(saved)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    returns = []
    for episode in edm.Bar(range(args.episodes), args.env):
        random_share = dict(random=1.0, expert=0.0, mixed=rng.uniform())[level]
        images = env.reset(10_000 * args.seed + episode)
        rows = [(images[-3:], np.zeros(env.act_dim), 0.0, 1.0, 0)]
        ended = False
        while not ended:
            if rng.uniform() < random_share:
                action = rng.uniform(-1, 1, env.act_dim)
            else:
                state = env.env.task.get_observation(env.env.physics).values()
                observation = torch.from_numpy(np.concatenate([np.ravel(x) for x in state]))
                actions, _ = agent.actor.sample(observation.float()[None])
                action = actions[0].numpy()
            images, reward, ended = env.step(action)
            rows.append((images[-3:], action, reward, 1.0, 2 if ended else 1))
        with h5py.File(folder / f"episode_{args.seed}_{episode:04}.hdf5", "w") as f:
            for (name, dtype), x in zip(TYPES.items(), zip(*rows)):
                compression = "gzip" if name == "observation" else None
                f.create_dataset(name, data=np.array(x, dtype), compression=compression)
        returns.append(sum(row[2] for row in rows))
    print(f"{folder}: return {np.mean(returns):.0f} +- {np.std(returns):.0f}")


if __name__ == "__main__":
    launch(main, Args, __doc__)
