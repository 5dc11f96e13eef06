"""How true generated transitions are: each is replayed in the simulator from its own (s, a). Used by other studies."""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np

sys.path.append(str(Path(__file__).parents[2]))
import edm

# Observation = qpos without the x position, then qvel (clipped at 10 in Walker2d and Hopper): the size of qpos.
NQ = {"HalfCheetah-v4": 9, "Hopper-v4": 6, "Walker2d-v4": 9}


@dataclass(kw_only=True)
class ModelArgs:
    data: str
    """D4RL-layout HDF5 that the model was trained on"""
    model: str
    """diffusion.pt of a run folder"""
    env: Literal[tuple(NQ)] = "Walker2d-v4"
    """simulator"""
    true_next_obs: bool = False
    """as the model was trained"""


def load(args):
    """The rows [N, dim] of args.data, and the sizes of observations and actions."""
    data = edm.load_transitions(args.data, args.true_next_obs)
    return edm.pack(**data), data["observations"].shape[1], data["actions"].shape[1]


def replay(env_id, observations, actions):
    """What the simulator makes of states [N, obs_dim] and actions [N, act_dim], those apart whose s' cannot be known.

    Returns: known [N], bool; of the known rows the next observations, the rewards, and whether the episode ends.
    """
    nq = NQ[env_id]
    known = np.isfinite(observations).all(1)
    if env_id != "HalfCheetah-v4":  # where a velocity is clipped, the true one is unknown
        known &= (np.abs(observations[:, nq - 1 :]) < 9.99).all(1)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # about v4
        env = gym.make(env_id).unwrapped
    env.reset(seed=0)
    steps = []
    for s, a in zip(observations[known].astype(np.float64), actions[known].astype(np.float64)):
        env.set_state(np.concatenate([[0.0], s[: nq - 1]]), s[nq - 1 :])
        steps.append(env.step(np.clip(a, -1, 1))[:3])
    return known, *map(np.array, zip(*steps))


def dynamics_scores(env_id, data):
    """Compare generated transitions (dict of `edm.unpack`) with the simulator (Figure 5). Returns a dict:

    dynamics: median over the rows of the squared error of s', mean over its dimensions, in raw units. Rows that are
        terminal in the data or the simulator are left out, because D4RL's s' is another episode's there.
    reward: median squared error of the reward on the same rows.
    falls: share of rows that end the episode in the simulator.
    recall, precision: share of these rows that the data call terminal, and of the terminal rows that are such.
    """
    known, next_observations, rewards, falls = replay(env_id, data["observations"], data["actions"])
    data = {key: x[known] for key, x in data.items()}
    going_on = ~data["terminals"] & ~falls
    hits = (data["terminals"] & falls).sum()
    return {
        "dynamics": float(np.median(((data["next_observations"] - next_observations) ** 2).mean(1)[going_on])),
        "reward": float(np.median(((data["rewards"] - rewards) ** 2)[going_on])),
        "falls": float(falls.mean()),
        "recall": float(hits / max(falls.sum(), 1)),
        "precision": float(hits / max(data["terminals"].sum(), 1)),
    }
