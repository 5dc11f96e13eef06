"""How true generated transitions are: each is replayed in the simulator from its own (s, a). Used
by other studies."""

import warnings
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import runs  # noqa: F401, so that edm is found

import edm

# An observation is qpos without the x position, then qvel, in Walker2d and Hopper clipped at 10.
NQ = {"HalfCheetah-v4": 9, "Hopper-v4": 6, "Walker2d-v4": 9}  # the size of qpos


@dataclass(kw_only=True)
class ModelArgs:
    data: str  # D4RL-layout HDF5 that the model was trained on
    model: str  # diffusion.pt of a run folder
    env: Literal[tuple(NQ)] = "Walker2d-v4"  # the simulator
    true_next_obs: bool = False  # as the model was trained


def load(args):
    """The rows [N, dim] of args.data, and the sizes of observations and actions."""
    data = edm.load_transitions(args.data, args.true_next_obs)
    return edm.pack(**data), data["observations"].shape[1], data["actions"].shape[1]


def replay(env_id, observations, actions):
    """What the simulator makes of states [N, obs_dim] and actions [N, act_dim]: the mask [N] of
    rows whose s' can be known, and of these the s', the rewards, and whether the episode ends."""
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
    """Compare transitions, a dict of `edm.unpack`, with the simulator (Figure 5). Returns a dict.

    dynamics, reward: medians of the squared errors of s' (the mean over its dimensions) and r, in
        raw units, without terminal rows, because D4RL's s' is another episode's there.
    falls: share of rows that end the episode in the simulator.
    recall: share of these that are terminal in the data.
    precision: share of the terminal rows that end the episode in the simulator."""
    known, next_observations, rewards, falls = replay(env_id, data["observations"], data["actions"])
    data = {key: x[known] for key, x in data.items()}
    goes_on = ~data["terminals"] & ~falls
    error = ((data["next_observations"] - next_observations) ** 2).mean(1)
    hits = (data["terminals"] & falls).sum()
    return {
        "dynamics": float(np.median(error[goes_on])),
        "reward": float(np.median(((data["rewards"] - rewards) ** 2)[goes_on])),
        "falls": float(falls.mean()),
        "recall": float(hits / max(falls.sum(), 1)),
        "precision": float(hits / max(data["terminals"].sum(), 1)),
    }
