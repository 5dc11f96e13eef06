"""Tests of the mazes: dynamics, starts, goals, rewards, time limits, and the program that makes data for them."""

import sys
from pathlib import Path

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import pytest
from helpers import command

import edm
from synther_td3bc import make_env, maze_cells, normalized_score

sys.path.append(str(Path(__file__).parent / "paper"))
import maze_data  # noqa: E402

BALLS = {  # D4RL's goal, time limit, and returns of score 0 and 100
    "maze2d-umaze-v1": ((1, 1), 300, 23.85, 161.86),
    "maze2d-medium-v1": ((6, 6), 600, 13.13, 277.39),
    "maze2d-large-v1": ((7, 9), 800, 6.7, 273.99),
}
ANTS = {  # D4RL's goal as (x, y), and time limit
    "antmaze-umaze-v2": ((0, 8), 700),
    "antmaze-medium-play-v2": ((20, 20), 1000),
    "antmaze-large-play-v2": ((32, 24), 1000),
}


def put(env, positions, velocities):
    env.unwrapped.physics.qpos[: len(positions)] = positions
    env.unwrapped.physics.qvel[: len(velocities)] = velocities


@pytest.mark.parametrize(
    "maze, counts",
    [("umaze", [0, 3, 1, 3, 0]), ("medium", [0, 4, 5, 3, 5, 4, 5, 0]), ("large", [0, 9, 5, 9, 3, 8, 4, 8, 0])],
)
def test_layout_of_the_mazes(maze, counts):
    """Free cells by row, as in D4RL's strings."""
    assert np.bincount([i for i, _ in maze_cells(maze, ".")], minlength=len(counts)).tolist() == counts
    assert maze_cells("umaze", ".") == [(1, 1), (1, 2), (1, 3), (2, 3), (3, 1), (3, 2), (3, 3)]


@pytest.mark.parametrize("env_id", BALLS)
def test_ball_starts_anywhere_free(env_id):
    env = make_env(env_id)
    cells = env.unwrapped.cells
    starts = np.array([env.reset(seed=i)[0] for i in range(40 * len(cells))])
    nearest = np.round(starts[:, :2])
    assert {tuple(cell) for cell in nearest.tolist()} == set(cells)
    assert 0.09 < np.abs(starts[:, :2] - nearest).max() <= 0.1
    assert starts[:, 2:].std() == pytest.approx(0.1, rel=0.15)
    np.testing.assert_array_equal([env.reset(seed=i)[0] for i in range(3)], starts[:3])


@pytest.mark.parametrize("env_id", BALLS)
def test_ball_reward_and_time_limit(env_id):
    """1 within 0.5 of the goal after the step. The time limit truncates, nothing terminates."""
    env, (goal, steps, low, high) = make_env(env_id), BALLS[env_id]
    side = np.array([0, 1]) if env_id == "maze2d-umaze-v1" else np.array([-1, 0])  # a free cell beside the goal's
    for distance, speed, reward in ((0, 0, 1), (0.45, 0, 1), (0.55, 0, 0), (0.52, -5, 1), (0.48, 5, 0)):
        env.reset(seed=0)
        put(env, goal + distance * side, speed * side)
        assert env.step(np.zeros(2))[1] == reward, (distance, speed)
    env.reset(seed=0)
    for t in range(1, steps + 1):
        *_, terminated, truncated, _ = env.step(np.zeros(2))
        assert not terminated and truncated == (t == steps)
    assert [normalized_score(env_id, x) for x in (low, high)] == [0, 100]


@pytest.mark.parametrize("env_id", BALLS)
def test_controller_reaches_d4rls_reference_score(env_id):
    """D4RL's 100: a controller that plans its way in the first episode only, and from then on often meets walls."""
    env, returns = make_env(env_id), []
    for episode in range(100):
        obs, _ = env.reset(seed=episode)
        if episode == 0:
            goal = BALLS[env_id][0]
            policy = maze_data.controller(env.unwrapped, obs, goal, np.array(goal))
        done, total = False, 0.0
        while not done:
            obs, reward, _, done, _ = env.step(policy(obs))
            total += reward
        returns.append(total)
    assert abs(np.mean(returns) - BALLS[env_id][3]) < 2 * np.std(returns) / 10


def test_ball_dynamics():
    """A mass of 4.189 with damping 1, a force of up to 100, speed cut at 5 before a step of 0.01. Walls stop it."""
    env = make_env("maze2d-umaze-v1")
    env.reset(seed=0)
    mass = 4 / 3 * np.pi * 0.1**3 * 1000
    for action, velocity in (([0.5, -0.25], [0.3, -0.2]), ([3.0, 0.0], [9.0, -7.0]), ([0.0, 0.0], [-1.0, 1.0])):
        put(env, [1.0, 2.0], velocity)
        obs, *_ = env.step(np.array(action))
        v = np.clip(velocity, -5, 5)
        v = v + 0.01 * (100 * np.clip(action, -1, 1) - v) / (mass + 0.01)  # Euler's step is implicit in the damping
        np.testing.assert_allclose(obs, [*([1.0, 2.0] + 0.01 * v), *v], rtol=1e-6)
    put(env, [1.0, 1.0], [0.0, 0.0])
    for _ in range(200):
        obs, *_ = env.step(np.array([-1.0, 0.0]))
    assert obs[0] == pytest.approx(0.5 - 0.2 + 0.1, abs=0.01) and abs(obs[1] - 1) < 1e-6  # the wall ends at 0.5


@pytest.mark.parametrize("env_id", ANTS)
def test_ant_starts_in_the_corner_and_ends_at_its_goal(env_id):
    env, (middle, steps) = make_env(env_id), ANTS[env_id]
    starts, goals = zip(*[(env.reset(seed=i)[0], env.unwrapped.goal.copy()) for i in range(50)])
    offsets, starts = np.array(goals) - middle, np.array(starts)
    assert (offsets >= 0).all() and 1.2 < offsets.max() < 1.5 and offsets.min() < 0.3
    assert starts.shape == (50, 29) and np.abs(starts[:, :3] - [0, 0, 0.75]).max() <= 0.1
    put(env, goals[-1], [])
    assert env.step(np.zeros(8))[1:4] == (1, True, False)
    for distance, speed, reward in ((20, 0, 0), (0.7, -10, 1), (0.45, 10, 0)):  # where it is after the step
        env.reset(seed=0)
        put(env, [*env.unwrapped.goal + [distance, 0], 1.5], [speed, 0, 0])  # in the air
        assert env.step(np.zeros(8))[1:4] == (reward, bool(reward), False)
    assert env.spec.max_episode_steps == steps and normalized_score(env_id, 0.25) == 25


def test_ant_is_d4rls():
    """Gym's ant but for the torques, up to 30, and the time of a step, 0.1. D4RL's order (the fourth leg first)."""
    env = make_env("antmaze-umaze-v2").unwrapped
    model, gym_ant = env.model, gym.make("Ant-v4").unwrapped.model
    for name in ("jnt_range", "jnt_axis", "jnt_type", "dof_damping", "dof_armature", "qpos0"):
        np.testing.assert_allclose(getattr(model, name), getattr(gym_ant, name), err_msg=name)
    np.testing.assert_allclose(np.sort(model.body_mass), np.sort(gym_ant.body_mass))
    assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4 and (model.nq, model.nv, model.nu) == (15, 14, 8)
    names = [model.joint(model.actuator_trnid[i, 0]).name for i in range(8)]
    assert names == [f"{joint}_{leg}" for leg in (4, 1, 2, 3) for joint in ("hip", "ankle")]
    env.reset(seed=0)
    for _ in range(50):
        obs, *_ = env.step(np.full(8, 2.0))
    np.testing.assert_allclose(env.physics.actuator_force, 1)
    np.testing.assert_allclose(model.actuator_gear[:, 0], 30)
    assert 0.2 < obs[2] < 1.0 and np.isfinite(obs).all() and env.physics.time == pytest.approx(50 * 0.1)


@pytest.mark.parametrize("axis, sign, free", [(0, -1, False), (0, 1, True), (1, -1, False), (1, 1, False)])
def test_walls_hold_the_ant(axis, sign, free):
    """From the start of the umaze the way is free along x only: to the next columns, not to the next row."""
    env = make_env("antmaze-umaze-v2").unwrapped
    env.reset(seed=0)
    env.physics.qvel[axis] = 30.0 * sign
    position = [sign * env.step(np.zeros(8))[0][axis] for _ in range(20)]
    assert max(position) > 3 if free else 1 < max(position) < 2  # the walls begin at 2


def test_maze_data(tmp_path, monkeypatch):
    """The command's file: D4RL's layout, rewards of the row's own position, goals reached on the way."""
    path = tmp_path / "maze.hdf5"
    command(monkeypatch, maze_data, env="maze2d-medium-v1", steps=8_000, out=path)
    with h5py.File(path) as f:
        rows = {key: f[key][:] for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
        goals, qpos = f["infos/goal"][:], f["infos/qpos"][:]
    xy = rows["observations"][:, :2]
    np.testing.assert_array_equal(xy, qpos)
    np.testing.assert_array_equal(rows["rewards"], np.linalg.norm(xy - [6, 6], axis=1) <= 0.5)
    np.testing.assert_array_equal(rows["timeouts"], np.linalg.norm(xy - goals, axis=1) < 0.1)
    assert rows["timeouts"].sum() > 20 and rows["rewards"].any() and not rows["terminals"].any()
    assert np.abs(rows["actions"]).max() == 1 and 0.3 < np.abs(rows["actions"]).mean() < 1
    env = make_env("maze2d-medium-v1")
    env.reset(seed=0)
    for i in range(0, 7_999, 400):
        put(env, xy[i], rows["observations"][i, 2:])
        np.testing.assert_allclose(env.unwrapped.step(rows["actions"][i])[0], rows["observations"][i + 1], atol=1e-4)
    assert len(edm.load_transitions(path)["rewards"]) == 7_999 - rows["timeouts"][:-1].sum()
