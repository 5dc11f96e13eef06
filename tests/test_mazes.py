"""Tests of the mazes (tests/paper): dynamics, starts, goals, rewards, time limits, data."""

import runpy
import warnings

import gymnasium as gym
import h5py
import maze_data
import mujoco
import numpy as np
import pytest
from helpers import command

import edm
from synther_td3bc import make_env, normalized_score
from tests.paper import mazes

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


def test_free_cells_by_row_are_d4rls():
    for maze, counts in dict(umaze="313", medium="453545", large="9593848").items():
        rows = [i for i, _ in mazes.maze_cells(maze, mazes.FREE)]
        assert np.bincount(rows).tolist() == [0, *map(int, counts)]


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
    env = make_env(env_id)
    goal, steps, low, high = BALLS[env_id]
    side = np.array([0, 1] if env_id == "maze2d-umaze-v1" else [-1, 0])  # to a free cell
    for distance, speed in ((0, 0), (0.45, 0), (0.55, 0), (0.52, -5), (0.48, 5)):
        env.reset(seed=0)
        put(env, goal + distance * side, speed * side)
        assert env.step(np.zeros(2))[1] == (distance + 0.01 * speed < 0.5), (distance, speed)
    env.reset(seed=0)
    for t in range(1, steps + 1):
        *_, terminated, truncated, _ = env.step(np.zeros(2))
        assert not terminated and truncated == (t == steps)
    assert [normalized_score(env_id, x) for x in (low, high)] == [0, 100]


@pytest.mark.parametrize("env_id", BALLS)
def test_controller_reaches_d4rls_reference_score(env_id):
    """D4RL's 100: a controller that plans its way in the first episode only."""
    env = make_env(env_id)
    goal, _, _, high = BALLS[env_id]
    returns = np.zeros(100)
    for episode in range(100):
        obs, _ = env.reset(seed=episode)
        if episode == 0:
            policy = maze_data.controller(env.unwrapped, obs, goal, np.array(goal))
        done = False
        while not done:
            obs, reward, _, done, _ = env.step(policy(obs))
            returns[episode] += reward
    assert abs(returns.mean() - high) < 2 * returns.std() / 10


def test_ball_dynamics_are_d4rls():
    """Mass 4.189, damping 1, force up to 100, speed cut at 5 before a step of 0.01. Walls stop."""
    env = make_env("maze2d-umaze-v1")
    env.reset(seed=0)
    mass = 4 / 3 * np.pi * 0.1**3 * 1000
    for action, velocity in (([0.5, -0.2], [0.3, -0.2]), ([3, 0], [9, -7]), ([0, 0], [-1, 1])):
        put(env, [1.0, 2.0], velocity)
        obs, *_ = env.step(np.array(action))
        v = np.clip(velocity, -5, 5)
        v = v + 0.01 * (100 * np.clip(action, -1, 1) - v) / (mass + 0.01)  # damping is implicit
        np.testing.assert_allclose(obs, [*([1.0, 2.0] + 0.01 * v), *v], rtol=1e-6)
    put(env, [1.0, 1.0], [0.0, 0.0])
    for _ in range(200):
        obs, *_ = env.step(np.array([-1.0, 0.0]))
    np.testing.assert_allclose(obs[:2], [0.5 - 0.2 + 0.1, 1], atol=0.01)  # the wall ends at 0.5


@pytest.mark.parametrize("env_id", ANTS)
def test_ant_starts_in_the_corner_and_ends_at_its_goal(env_id):
    env = make_env(env_id)
    middle, steps = ANTS[env_id]
    offsets = []
    for seed in range(50):
        start, _ = env.reset(seed=seed)
        offsets.append(env.unwrapped.goal - middle)
        assert len(start) == 29 and np.abs(start[:3] - [0, 0, 0.75]).max() <= 0.1
    assert 0 <= np.min(offsets) < 0.3 and 1.2 < np.max(offsets) < 1.5
    for distance, speed in ((0, 0), (20, 0), (0.7, -10), (0.45, 10)):  # metres, m/s
        reached = distance + 0.1 * speed < 0.5  # after the step
        env.reset(seed=0)
        put(env, [*env.unwrapped.goal + [distance, 0], 1.5], [speed, 0, 0])  # in the air
        assert env.step(np.zeros(8))[1:4] == (reached, reached, False)
    assert env.spec.max_episode_steps == steps and normalized_score(env_id, 0.25) == 25


def test_ant_is_gyms_with_d4rls_torques():
    """Up to 30; a step is 0.1 s; D4RL's order of the legs, the fourth first."""
    env = make_env("antmaze-umaze-v2").unwrapped
    model = env.model
    gym_ant = gym.make("Ant-v4").unwrapped.model
    for name in ("jnt_range", "jnt_axis", "jnt_type", "dof_damping", "dof_armature", "qpos0"):
        np.testing.assert_allclose(getattr(model, name), getattr(gym_ant, name), err_msg=name)
    np.testing.assert_allclose(np.sort(model.body_mass), np.sort(gym_ant.body_mass))
    assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
    joints = [model.joint(i).name for i in model.actuator_trnid[:, 0]]
    assert joints == "hip_4 ankle_4 hip_1 ankle_1 hip_2 ankle_2 hip_3 ankle_3".split()
    env.reset(seed=0)
    for _ in range(50):
        obs, *_ = env.step(np.full(8, 2.0))
    np.testing.assert_allclose(env.physics.actuator_force, 1)
    np.testing.assert_allclose(model.actuator_gear[:, 0], 30)
    assert 0.2 < obs[2] < 1.0 and np.isfinite(obs).all()
    assert env.physics.time == pytest.approx(50 * 0.1)


def test_walls_hold_the_ant():
    """At the start of the umaze, the way is free to larger x only."""
    env = make_env("antmaze-umaze-v2").unwrapped
    for axis, sign in ((0, -1), (0, 1), (1, -1), (1, 1)):
        env.reset(seed=0)
        env.physics.qvel[axis] = 30.0 * sign
        position = max(sign * env.step(np.zeros(8))[0][axis] for _ in range(20))
        assert position > 3 if (axis, sign) == (0, 1) else 1 < position < 2  # walls begin at 2


def test_data_are_like_d4rls(tmp_path, monkeypatch):
    """Its layout, rewards of a row's own position, goals reached on the way."""
    path = tmp_path / "maze.hdf5"
    command(monkeypatch, maze_data, env="maze2d-medium-v1", steps=8_000, out=path)
    with h5py.File(path) as f:
        rows = {key: f[key][:] for key in (*edm.KEYS, "timeouts", "infos/goal") if key in f}
    obs = rows["observations"]
    xy = obs[:, :2]
    assert (rows["rewards"] == (np.linalg.norm(xy - [6, 6], axis=1) <= 0.5)).all()
    assert (rows["timeouts"] == (np.linalg.norm(xy - rows["infos/goal"], axis=1) < 0.1)).all()
    assert rows["timeouts"].sum() > 20 and rows["rewards"].any() and not rows["terminals"].any()
    assert np.abs(rows["actions"]).max() == 1 and 0.3 < np.abs(rows["actions"]).mean() < 1
    env = make_env("maze2d-medium-v1")
    env.reset(seed=0)
    for i in range(0, 7_999, 400):
        put(env, xy[i], obs[i, 2:])
        next_obs = env.unwrapped.step(rows["actions"][i])[0]
        np.testing.assert_allclose(next_obs, obs[i + 1], atol=1e-4)
    assert len(edm.load_transitions(path)["rewards"]) == 7_999 - rows["timeouts"][:-1].sum()


def test_mujoco_with_other_dynamics_is_named(monkeypatch):
    monkeypatch.setattr(gym, "register", lambda *args, **options: None)
    for version, is_named in (("3.4.0", False), ("3.5.0", True), ("3.10.0", True)):
        monkeypatch.setattr(mujoco, "__version__", version)
        with warnings.catch_warnings(record=True) as caught:
            runpy.run_path(mazes.__file__)
        assert bool(caught) == is_named
