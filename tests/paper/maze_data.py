"""Make a dataset like D4RL's maze2d, with a controller that walks from place to place.

    python tests/paper/maze_data.py --env maze2d-umaze-v1 --out maze2d_umaze.hdf5
    python synther_td3bc.py --env maze2d-umaze-v1 --dataset-path maze2d_umaze.hdf5

As in D4RL, one long walk to goals drawn at random, on the shortest path over cells, by a proportional-derivative
controller with noise. `timeouts` mark arrivals, nothing terminates, and a row's reward is that of its own position.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

import h5py
import numpy as np
from runs import launch

import edm
import synther_td3bc


@dataclass
class Args:
    out: str
    """file to write, D4RL's layout"""
    env: Literal["maze2d-umaze-v1", "maze2d-medium-v1", "maze2d-large-v1"] = "maze2d-umaze-v1"
    """the maze"""
    steps: int = 100_000
    """transitions (D4RL: 1M, 2M, 4M)"""
    seed: int = 0
    """seed of goals and noise"""


def next_cells(cells, goal):
    """{cell: its neighbour on a shortest path to the goal} for every free cell, by breadth-first search."""
    step, queue = {goal: goal}, deque([goal])
    while queue:
        i, j = queue.popleft()
        for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if cell in cells and cell not in step:
                step[cell] = (i, j)
                queue.append(cell)
    return step


def controller(env, observation, goal_cell, goal):
    """A policy observation -> action that walks from where the ball is to a goal in a cell, with D4RL's gains."""
    step = next_cells(env.cells, goal_cell)
    waypoint = min(env.cells, key=lambda cell: np.abs(observation[:2] - cell).sum())

    def policy(observation):
        nonlocal waypoint
        if np.linalg.norm(observation[:2] - waypoint) < 0.1 and waypoint != goal_cell:
            waypoint = step[waypoint]
        aim = goal if waypoint == goal_cell else np.array(waypoint)
        return np.clip(10 * (aim - observation[:2]) - observation[2:], -1, 1)

    return policy


def main(args):
    env = synther_td3bc.make_env(args.env).unwrapped
    rng = np.random.default_rng(args.seed)
    observation, _ = env.reset(seed=args.seed)
    rows = {key: [] for key in ("observations", "actions", "rewards", "timeouts", "infos/goal")}
    arrived = True
    for _ in edm.Bar(range(args.steps), args.env):
        if arrived:
            goal_cell = env.cells[rng.integers(len(env.cells))]
            goal = goal_cell + rng.uniform(-0.1, 0.1, 2)
            policy = controller(env, observation, goal_cell, goal)
        action = policy(observation) + 0.5 * rng.standard_normal(2)  # D4RL's noise
        action = np.clip(action, -1, 1).astype(np.float32)
        arrived = np.linalg.norm(observation[:2] - goal) < 0.1
        reward = float(np.linalg.norm(observation[:2] - env.goal) <= 0.5)
        for key, value in zip(rows, (observation, action, reward, arrived, goal)):
            rows[key].append(value)
        observation = env.step(action)[0]
    arrays = {key: np.array(x, bool if key == "timeouts" else np.float32) for key, x in rows.items()}
    arrays["terminals"] = np.zeros(args.steps, bool)
    arrays["infos/qpos"], arrays["infos/qvel"] = np.split(arrays["observations"], 2, axis=1)
    with h5py.File(args.out, "w") as f:
        for key, x in arrays.items():
            f.create_dataset(key, data=x, compression="gzip")
    print(f"{args.out}: {sum(rows['timeouts'])} arrivals, mean reward {np.mean(rows['rewards']):.3f}")


if __name__ == "__main__":
    launch(main, Args, __doc__)
