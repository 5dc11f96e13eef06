"""What the tests of several scripts share."""

import csv
import signal
import subprocess
import time
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import torch
import torch.nn as nn

import synther_td3bc
from synther_td3bc import TRANSITION_KEYS


def d4rl_rows(n, seed=0, obs_dim=3, act_dim=2):
    """The arrays of a D4RL file: every number differs from every other, so that mixed-up rows show."""
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.standard_normal((n, obs_dim)),
        "actions": rng.uniform(-1, 1, (n, act_dim)),
        "rewards": rng.standard_normal(n),
        "next_observations": rng.standard_normal((n, obs_dim)),
        "terminals": rng.random(n) < 0.1,
        "timeouts": rng.random(n) < 0.1,
    }


def transitions(n, **options):
    return {k: x for k, x in d4rl_rows(n, **options).items() if k != "timeouts"}


def collect_random(env_id, num_steps, seed=0):
    """Transitions of uniformly random actions, Keys as `load_transitions`."""
    env = synther_td3bc.make_env(env_id)
    env.action_space.seed(seed)
    obs, _ = env.reset(seed=seed)
    steps = []
    for _ in range(num_steps):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        steps.append((obs, action, reward, next_obs, terminated))
        obs = env.reset()[0] if terminated or truncated else next_obs
    data = {key: np.asarray(x, np.float32) for key, x in zip(TRANSITION_KEYS, zip(*steps))}
    return data | {"terminals": data["terminals"].astype(bool)}


def write_hdf5(path, arrays):
    with h5py.File(path, "w") as f:
        for key, x in arrays.items():
            f[key] = x
    return str(path)


def write_npz(path, arrays):
    np.savez(path, **arrays)
    return str(path)


def assert_same_data(actual, expected):
    assert list(actual) == list(TRANSITION_KEYS)
    for key, x in actual.items():
        assert x.dtype == (bool if key == "terminals" else np.float32), key
        np.testing.assert_array_equal(x, np.asarray(expected[key]).astype(x.dtype), err_msg=key)


def read_metrics(folder):
    """{(step, key): value}, and a check that no entry comes twice."""
    with open(folder / "metrics.csv") as f:
        rows = [(int(row["step"]), row["key"], float(row["value"])) for row in csv.DictReader(f)]
    assert len({row[:2] for row in rows}) == len(rows)
    return {(step, key): value for step, key, value in rows}


def assert_same_state(a, b, where="checkpoint"):
    """Equality to the last bit of nested dicts, lists, tensors and numbers."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_state(x, y, f"{where}[{i}]")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def snapshot(module):
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def agent_rows(n, obs_dim=3, act_dim=2):
    rows = torch.randn(n, 2 * obs_dim + act_dim + 2)
    rows[:, -1] = (rows[:, -1] > 1).to(rows.dtype)
    return rows


def separate_critics(critic):
    """The Q-functions of an EnsembleCritic as ordinary MLPs with the same weights."""
    mlps = []
    for k in range(len(critic.weights[0])):
        layers = []
        for weight, bias in zip(critic.weights, critic.biases):
            linear = nn.Linear(*weight.shape[1:])
            with torch.no_grad():
                linear.weight.copy_(weight[k].T)
                linear.bias.copy_(bias[k, 0])
            layers += [linear, nn.ReLU()]
        mlps.append(nn.Sequential(*layers[:-1]))
    return mlps


class PointEnv(gym.Env):
    """A point in the square [-1, 1]^2 that moves by a tenth of the action. Reward: minus the distance from the middle.

    An episode ends when the point leaves the square (with a penalty) or after 30 steps.
    """

    observation_space = gym.spaces.Box(-2, 2, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-0.9, 0.9, 2)
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.position = self.position + 0.1 * np.clip(action, -1, 1)
        outside = bool(np.abs(self.position).max() > 1)
        reward = -float(np.linalg.norm(self.position)) - outside
        return self.position.astype(np.float32), reward, outside, False, {}


gym.register("Point-v0", PointEnv, max_episode_steps=30)


def flags(**options):
    return [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]


def wait_and_kill(command, cwd, ready):
    """Start a script, SIGKILL it as soon as ready(run folder) holds, and return the folder."""
    known = set((cwd / "runs").glob("*"))
    with open(cwd / "output.txt", "a") as output:
        process = subprocess.Popen(command, cwd=cwd, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        deadline = time.time() + 100
        while True:
            folders = [Path(command[command.index("--resume") + 1])] if "--resume" in command else (
                set((cwd / "runs").glob("*")) - known
            )  # fmt: skip
            for folder in folders:
                if ready(folder):
                    process.send_signal(signal.SIGKILL)
                    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed: make it longer"
                    return folder
            assert process.poll() is None and time.time() < deadline, (cwd / "output.txt").read_text()[-3000:]
            time.sleep(0.002)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
