"""Tests of the mazes in the offline scripts: dynamics, goals, rewards, time limits, data."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import pytest
from helpers import d4rl_rows, write_hdf5

import synther_td3bc
from synther_td3bc import MAZE_TASKS, Args, make_env, maze_cells, normalized_score

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests/paper"))
import maze_data  # noqa: E402

BALLS = [name for name in MAZE_TASKS if name.startswith("maze2d")]
ANTS = [name for name in MAZE_TASKS if name.startswith("antmaze")]


@pytest.mark.parametrize("env_id", BALLS)
def test_ball_starts_anywhere_free_and_seeks_one_goal(env_id):
    env = make_env(env_id)
    free = maze_cells(MAZE_TASKS[env_id][1], ".").tolist()
    starts = np.array([env.reset(seed=i)[0] for i in range(40 * len(free))])
    cells = np.round(starts[:, :2])
    assert {tuple(cell) for cell in cells.tolist()} == {tuple(cell) for cell in free}
    assert 0.09 < np.abs(starts[:, :2] - cells).max() <= 0.1
    assert starts[:, 2:].std() == pytest.approx(0.1, rel=0.15)
    again = np.array([env.reset(seed=i)[0] for i in range(3)])
    np.testing.assert_array_equal(again, starts[:3])


@pytest.mark.parametrize("env_id", BALLS)
def test_ball_reward_and_time_limit(env_id):
    """1 within 0.5 of the goal after the step; the time limit truncates, nothing terminates."""
    env, (_, _, goal, steps) = make_env(env_id), MAZE_TASKS[env_id]
    env.reset(seed=0)
    side = np.array([0, 1]) if env_id == "maze2d-umaze-v1" else np.array([-1, 0])  # a free cell beside the goal's
    for distance, speed, reward in ((0, 0, 1), (0.45, 0, 1), (0.55, 0, 0), (0.52, -5, 1), (0.48, 5, 0)):
        env.unwrapped._set_state(goal + distance * side, speed * side)
        assert env.step(np.zeros(2))[1] == reward, (distance, speed)
    env.reset(seed=0)
    for t in range(1, steps + 1):
        *_, terminated, truncated, _ = env.step(np.zeros(2))
        assert not terminated and truncated == (t == steps)
    low, high = {"u": (23.85, 161.86), "m": (13.13, 277.39), "l": (6.7, 273.99)}[env_id[7]]
    assert [normalized_score(env_id, x) for x in (low, high)] == [0, 100]


def test_layout_of_the_mazes():
    """Free cells as in D4RL's strings, counted by row."""
    counts = {
        "umaze": [0, 3, 1, 3, 0],
        "medium": [0, 4, 5, 3, 5, 4, 5, 0],
        "large": [0, 9, 5, 9, 3, 8, 4, 8, 0],
    }
    for maze, expected in counts.items():
        rows = maze_cells(maze, ".")[:, 0]
        assert np.bincount(rows, minlength=len(expected)).tolist() == expected
    assert maze_cells("umaze", ".").tolist() == [[1, 1], [1, 2], [1, 3], [2, 3], [3, 1], [3, 2], [3, 3]]


@pytest.mark.parametrize("env_id, reference", [(BALLS[0], 161.86), (BALLS[1], 277.39), (BALLS[2], 273.99)])
def test_controller_reaches_d4rls_reference_score(env_id, reference):
    """D4RL's 100: a controller that plans its way in the first episode only, and from then on often meets walls."""
    env, returns = make_env(env_id), []
    for episode in range(100):
        obs, _ = env.reset(seed=episode)
        if episode == 0:
            goal = MAZE_TASKS[env_id][2]
            policy = maze_data.controller(env.unwrapped, obs, goal, np.array(goal))
        done, total = False, 0.0
        while not done:
            obs, reward, _, done, _ = env.step(policy(obs))
            total += reward
        returns.append(total)
    assert abs(np.mean(returns) - reference) < 2 * np.std(returns) / 10


def test_ball_dynamics():
    """A mass of 4.189 with damping 1, a force of up to 100, speed cut at 5 before a step of 0.01; walls stop it."""
    env = make_env("maze2d-umaze-v1").unwrapped
    env.reset(seed=0)
    mass = 4 / 3 * np.pi * 0.1**3 * 1000
    for action, velocity in (([0.5, -0.25], [0.3, -0.2]), ([3.0, 0.0], [9.0, -7.0]), ([0.0, 0.0], [-1.0, 1.0])):
        env._set_state([1.0, 2.0], velocity)
        obs, *_ = env.step(np.array(action))
        v = np.clip(velocity, -5, 5)
        v = v + 0.01 * (100 * np.clip(action, -1, 1) - v) / (mass + 0.01)  # Euler's step is implicit in the damping
        np.testing.assert_allclose(obs[2:], v, rtol=1e-6)
        np.testing.assert_allclose(obs[:2], [1.0, 2.0] + 0.01 * v, rtol=1e-6)
    env._set_state([1.0, 1.0], [0.0, 0.0])
    for _ in range(200):
        obs, *_ = env.step(np.array([-1.0, 0.0]))
    assert obs[0] == pytest.approx(0.5 - 0.2 + 0.1, abs=0.01) and abs(obs[1] - 1) < 1e-6  # the wall ends at 0.5


@pytest.mark.parametrize("env_id", ANTS)
def test_ant_goal_ends_the_episode(env_id):
    env, (_, _, goal, steps) = make_env(env_id), MAZE_TASKS[env_id]
    goals, starts = [], []
    for i in range(50):
        starts.append(env.reset(seed=i)[0])
        goals.append(env.unwrapped.goal.copy())
    middle = 4 * np.array([goal[1] - 1, goal[0] - 1])
    offsets = np.array(goals) - middle
    assert (offsets >= 0).all() and 1.2 < offsets.max() < 1.5 and offsets.min() < 0.3
    assert np.abs(np.array(starts)[:, :2]).max() <= 0.1 and starts[0].shape == (29,)
    assert np.abs(np.array(starts)[:, 2] - 0.75).max() <= 0.1
    physics = env.unwrapped.physics
    physics.qpos[:2] = goals[-1]
    _, reward, terminated, truncated, _ = env.step(np.zeros(8))
    assert (reward, terminated, truncated) == (1, True, False)
    env.reset(seed=0)
    _, reward, terminated, truncated, _ = env.step(np.zeros(8))
    assert (reward, terminated, truncated) == (0, False, False)
    assert env.spec.max_episode_steps == steps and normalized_score(env_id, 0.25) == 25


def test_ant_is_d4rls():
    """Gym's ant but for the torques, up to 30, and the time of a step, 0.1; D4RL's order (the fourth leg first)."""
    env = make_env("antmaze-umaze-v2").unwrapped
    model, gym_ant = env.model, gym.make("Ant-v4").unwrapped.model
    for name in ("jnt_range", "jnt_axis", "jnt_type", "dof_damping", "dof_armature", "qpos0"):
        np.testing.assert_allclose(getattr(model, name), getattr(gym_ant, name), err_msg=name)
    assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
    assert (model.nq, model.nv, model.nu) == (15, 14, 8)
    np.testing.assert_allclose(np.sort(model.body_mass), np.sort(gym.make("Ant-v4").unwrapped.model.body_mass))
    names = [model.joint(model.actuator_trnid[i, 0]).name for i in range(8)]
    assert names == [f"{joint}_{leg}" for leg in (4, 1, 2, 3) for joint in ("hip", "ankle")]
    env.reset(seed=0)
    for _ in range(50):
        obs, *_ = env.step(np.full(8, 2.0))
    assert (env.physics.ctrl == 30).all() and 0.2 < obs[2] < 1.0 and np.isfinite(obs).all()
    assert env.physics.time == pytest.approx(50 * 0.1)


@pytest.mark.parametrize("axis, sign, free", [(0, -1, False), (0, 1, True), (1, -1, False), (1, 1, False)])
def test_walls_hold_the_ant(axis, sign, free):
    """From the start of the umaze the way is free along x only: to the next columns, not to the next row."""
    env = make_env("antmaze-umaze-v2").unwrapped
    env.reset(seed=0)
    env.physics.qvel[axis] = 30.0 * sign
    position = [sign * env.step(np.zeros(8))[0][axis] for _ in range(20)]
    assert max(position) > 3 if free else 1 < max(position) < 2  # the walls begin at 2


def test_ant_reward_is_that_of_the_next_position():
    env = make_env("antmaze-umaze-v2").unwrapped
    env.reset(seed=0)
    for distance, speed, reward in ((0.7, -10.0, 1), (0.45, 10.0, 0)):
        env.reset(seed=0)
        env.physics.qpos[:2] = env.goal + [distance, 0]
        env.physics.qpos[2] = 1.5  # in the air
        env.physics.qvel[:] = 0
        env.physics.qvel[0] = speed
        assert env.step(np.zeros(8))[1] == reward


@pytest.mark.parametrize(
    "name, env_id, file",
    [
        ("maze2d-umaze-v1", "maze2d-umaze-v1", "maze2d/maze2d-umaze-sparse-v1.hdf5"),
        ("maze2d-large-v1", "maze2d-large-v1", "maze2d/maze2d-large-sparse-v1.hdf5"),
        (
            "antmaze-umaze-v2", "antmaze-umaze-v2",
            "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5",
        ),
        (
            "antmaze-medium-play-v2", "antmaze-medium-play-v2",
            "ant_maze_v2/Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
        ),
        (
            "antmaze-large-diverse-v2", "antmaze-large-diverse-v2",
            "ant_maze_v2/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
        ),
        ("walker2d-full-replay-v2", "Walker2d-v4", "gym_mujoco_v2/walker2d_full_replay-v2.hdf5"),
        ("antmaze-medium-v2", None, None),
        ("maze2d-open-v1", None, None),
        ("Walker2d-v4", None, None),
    ],
)  # fmt: skip
def test_names_of_d4rl(name, env_id, file):
    assert synther_td3bc.find_d4rl(name) == (env_id, file)
    assert env_id is None or make_env(env_id) is not None


@pytest.mark.parametrize("env_id, episode", [("maze2d-umaze-v1", 300), ("antmaze-umaze-v2", 700)])
def test_episodes_of_a_file_without_timeouts(tmp_path, env_id, episode):
    """D4RL cuts them at the environment's own time limit."""
    rows = d4rl_rows(1_500) | {"terminals": np.zeros(1_500, bool)}
    del rows["timeouts"], rows["next_observations"]
    path = write_hdf5(tmp_path / "maze.hdf5", rows)
    data, found = synther_td3bc.load_dataset(Args(env=env_id, dataset_path=path))
    assert found == env_id
    lost = list(range(episode - 1, 1_499, episode))
    expected = np.delete(rows["rewards"][:-1].astype(np.float32), lost)
    np.testing.assert_array_equal(data["rewards"], expected)


def test_reward_normalizer():
    """CORL's: windows end at terminals and after 1000 rows; mazes have rules of their own."""
    rewards = np.concatenate([np.full(10, 1.0), np.full(20, -1.0), np.full(1_000, 0.5), np.full(7, 1e6)])
    data = {"rewards": rewards, "terminals": np.isin(np.arange(len(rewards)), (9, 29))}
    normalizer = synther_td3bc.reward_normalizer
    assert normalizer(data, "Hopper-v4") == (1000 / (500 - -20), 0)  # the last window has no end and does not count
    assert normalizer(data, "antmaze-umaze-v2") == (1, -1) and normalizer(data, "maze2d-umaze-v1") == (1, 0)
    assert np.isnan(normalizer({k: x[:5] for k, x in data.items()}, "Hopper-v4")[0])


def test_maze_data(tmp_path):
    """The command's file: D4RL's layout, rewards of the row's own position, goals reached on the way."""
    path = tmp_path / "maze.hdf5"
    command = [sys.executable, "tests/paper/maze_data.py", "--env", "maze2d-medium-v1", "--steps", "8000"]
    subprocess.run([*command, "--out", str(path)], cwd=ROOT, capture_output=True, check=True, timeout=100)
    with h5py.File(path) as f:
        rows = {key: f[key][:] for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
        goals, qpos = f["infos/goal"][:], f["infos/qpos"][:]
    xy = rows["observations"][:, :2]
    np.testing.assert_array_equal(xy, qpos)
    near = np.linalg.norm(xy - np.array([6.0, 6.0]), axis=1) <= 0.5
    np.testing.assert_array_equal(rows["rewards"], near)
    arrived = np.linalg.norm(xy - goals, axis=1) < 0.1
    np.testing.assert_array_equal(rows["timeouts"], arrived)
    assert arrived.sum() > 20 and near.any() and not rows["terminals"].any()
    assert np.abs(rows["actions"]).max() == 1 and 0.3 < np.abs(rows["actions"]).mean() < 1
    env = make_env("maze2d-medium-v1").unwrapped
    env.reset(seed=0)
    for i in range(0, 7_999, 400):
        env._set_state(xy[i], rows["observations"][i, 2:])
        np.testing.assert_allclose(env.step(rows["actions"][i])[0], rows["observations"][i + 1], atol=1e-4)
    data, env_id = synther_td3bc.load_dataset(Args(env="maze2d-medium-v1", dataset_path=str(path)))
    assert env_id == "maze2d-medium-v1" and len(data["rewards"]) == 7_999 - rows["timeouts"][:-1].sum()
