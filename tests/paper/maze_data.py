"""Make a dataset like D4RL's maze2d, with a controller that walks from place to place.

    python tests/paper/maze_data.py --env maze2d-umaze-v1 --out maze2d_umaze.hdf5
    python synther_td3bc.py --env maze2d-umaze-v1 --dataset-path maze2d_umaze.hdf5

As in D4RL, a controller with noise walks to one random goal after the other, on the shortest path
over cells. `timeouts` mark arrivals, nothing terminates, and a row's reward is that of its own
position."""

from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import h5py
import numpy as np
from runs import launch

import edm


@dataclass
class Args:
    out: str  # file to write, in D4RL's layout
    # the maze
    env: Literal["maze2d-umaze-v1", "maze2d-medium-v1", "maze2d-large-v1"] = "maze2d-umaze-v1"
    steps: int = 100_000  # transitions (D4RL: 1M, 2M, 4M)
    seed: int = 0  # of goals and noise


def next_cells(cells, goal):
    """{cell: its neighbour on a shortest path to the goal} of all free cells."""
    step = {goal: goal}
    queue = [goal]
    for i, j in queue:  # which grows on the way: a breadth-first search
        for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if cell in cells and cell not in step:
                step[cell] = (i, j)
                queue.append(cell)
    return step


def controller(env, observation, goal_cell, goal):
    """A policy observation [4] -> action [2] that walks to a goal [2] in a cell, with D4RL's gains
    of a proportional-derivative controller."""
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
    env = gym.make(f"tests.paper.mazes:{args.env}").unwrapped
    rng = np.random.default_rng(args.seed)
    observation, _ = env.reset(seed=args.seed)
    rows = []
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
        rows.append((observation, action, reward, arrived, goal))
        observation = env.step(action)[0]
    names = ("observations", "actions", "rewards", "timeouts", "infos/goal")
    arrays = {name: np.array(x, np.float32) for name, x in zip(names, zip(*rows))}
    arrays["timeouts"] = arrays["timeouts"] > 0
    arrays["terminals"] = np.zeros(args.steps, bool)
    arrays["infos/qpos"], arrays["infos/qvel"] = np.split(arrays["observations"], 2, axis=1)
    with h5py.File(args.out, "w") as f:
        for key, x in arrays.items():
            f.create_dataset(key, data=x, compression="gzip")
    print(f"{args.out}: {arrays['timeouts'].sum()} arrivals, {arrays['rewards'].sum():.0f} rewards")


if __name__ == "__main__":
    launch(main, Args, __doc__)
