"""How true generated transitions are: each is replayed in the simulator from its own (s, a)."""

import warnings

import gymnasium as gym
import numpy as np

# Observation = qpos without the x position, then qvel (clipped at 10 in Walker2d and Hopper): the size of qpos.
NQ = {"HalfCheetah-v4": 9, "Hopper-v4": 6, "Walker2d-v4": 9}


def simulate(env_id, observations, actions):
    """One simulator step from each state and action (Figure 5, and Lu et al. 2023).

    Args: observations [N, obs_dim], actions [N, act_dim]. Only rows whose state can be recovered are simulated: where
    an observed velocity is within 0.01 of the clip at 10, the true one is unknown.

    Returns: dict of arrays over the n simulated rows: `index` [n] into the arguments, `next_observations` [n, obs_dim],
    `rewards` [n], `terminals` [n].
    """
    nq = NQ[env_id]
    observations, actions = np.asarray(observations, np.float64), np.asarray(actions, np.float64)
    known = np.isfinite(observations).all(1)
    if env_id != "HalfCheetah-v4":
        known &= (np.abs(observations[:, nq - 1 :]) < 9.99).all(1)
    index = np.flatnonzero(known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        env = gym.make(env_id).unwrapped
    env.reset(seed=0)
    steps = []
    for i in index:
        env.set_state(np.concatenate([[0.0], observations[i, : nq - 1]]), observations[i, nq - 1 :])
        steps.append(env.step(np.clip(actions[i], -1, 1))[:3])
    next_observations, rewards, terminals = (np.array(x) for x in zip(*steps))
    return {"index": index, "next_observations": next_observations, "rewards": rewards, "terminals": terminals}


def dynamics_scores(env_id, data):
    """Compare generated transitions (dict of `edm.unpack`) with the simulator. Returns a dict:

    dynamics: median over the rows of the squared error of s', mean over its dimensions, in raw units; rows that are
        terminal in the data or the simulator are left out, because D4RL's s' is another episode's there.
    reward: median squared error of the reward on the same rows.
    falls: share of rows that end the episode in the simulator.
    recall, precision: share of these rows that the data call terminal, and of the terminal rows that are such.
    simulated: share of rows that could be simulated.
    """
    sim = simulate(env_id, data["observations"], data["actions"])
    index = sim["index"]
    flagged, falls = data["terminals"][index], sim["terminals"]
    going_on = ~flagged & ~falls
    error = ((data["next_observations"][index] - sim["next_observations"]) ** 2).mean(1)[going_on]
    reward_error = ((data["rewards"][index] - sim["rewards"]) ** 2)[going_on]
    return {
        "dynamics": float(np.median(error)),
        "reward": float(np.median(reward_error)),
        "falls": float(falls.mean()),
        "recall": float((flagged & falls).sum() / max(falls.sum(), 1)),
        "precision": float((flagged & falls).sum() / max(flagged.sum(), 1)),
        "simulated": len(index) / len(data["terminals"]),
    }
