"""Tests of synther_td3bc.py: data, agent and scores against plain code, and whole runs: small, killed and resumed."""

import copy
import http.client
import io
import json
import math
import os
import shutil
import subprocess
import sys
import urllib.error
import warnings
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import (
    agent_rows,
    assert_same_data,
    assert_same_state,
    collect_random,
    d4rl_rows,
    flags,
    read_metrics,
    separate_critics,
    snapshot,
    transitions,
    wait_and_kill,
    write_hdf5,
    write_npz,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import edm
import synther_td3bc
from edm import RunError
from synther_td3bc import TD3BC, TRANSITION_KEYS, Args, EnsembleCritic

SCRIPT = Path(synther_td3bc.__file__)


# --- Data to test with ------------------------------------------------------------------------------------------------


# --- qlearning_dataset ------------------------------------------------------------------------------------------------


def slow_qlearning_dataset(raw, max_episode_steps, true_next_obs):
    """d4rl.qlearning_dataset, row by row.

    Without `timeouts`, its step counter starts at 1 after a terminal row: it drops the row before the last of a full
    episode that follows, and keeps the last with a wrong s'.
    """
    rows, episode_step = [], 0
    for i in range(len(raw["rewards"]) - 1):
        if "timeouts" in raw:
            last = raw["timeouts"][i]
        else:
            last = episode_step == max_episode_steps - 1
        if last:
            episode_step = 0
            continue
        done = bool(raw["terminals"][i])
        next_obs = raw["next_observations"][i] if true_next_obs and done else raw["observations"][i + 1]
        rows.append((raw["observations"][i], raw["actions"][i], raw["rewards"][i], next_obs, done))
        if done:
            episode_step = 0
        episode_step += 1
    return {key: [row[i] for row in rows] for i, key in enumerate(TRANSITION_KEYS)}


@settings(deadline=None, max_examples=150)
@given(
    ends=st.lists(st.sampled_from(["", "", "", "terminal", "timeout", "both"]), min_size=3, max_size=40),
    has_timeouts=st.booleans(),
    max_episode_steps=st.integers(1, 8),
    true_next_obs=st.booleans(),
)
def test_qlearning_dataset_equals_the_loop(ends, has_timeouts, max_episode_steps, true_next_obs):
    raw = d4rl_rows(len(ends))
    raw["terminals"] = np.array([e in ("terminal", "both") for e in ends])
    raw["timeouts"] = np.array([e in ("timeout", "both") for e in ends])
    if not has_timeouts:
        del raw["timeouts"]
    expected = slow_qlearning_dataset(raw, max_episode_steps, true_next_obs)
    actual = synther_td3bc.qlearning_dataset(raw, true_next_obs, max_episode_steps)
    if len(expected["rewards"]) == 0:
        assert all(len(x) == 0 for x in actual.values())
    else:
        assert_same_data(actual, expected)


def numbered_rows(n, terminals=(), timeouts=None):
    """Observation i is i, and the file's next observation 100 + i."""
    raw = {
        "observations": np.arange(n)[:, None].astype(np.float32),
        "next_observations": 100 + np.arange(n)[:, None].astype(np.float32),
        "actions": np.zeros((n, 1), np.float32),
        "rewards": np.arange(n).astype(np.float32),
        "terminals": np.isin(np.arange(n), terminals),
    }
    return raw if timeouts is None else raw | {"timeouts": np.isin(np.arange(n), timeouts)}


def test_qlearning_dataset_by_hand():
    raw = numbered_rows(8, terminals=[2], timeouts=[5])
    data = synther_td3bc.qlearning_dataset(raw)
    assert data["observations"][:, 0].tolist() == [0, 1, 2, 3, 4, 6]  # neither the timeout nor the last row
    assert data["next_observations"][:, 0].tolist() == [1, 2, 3, 4, 5, 7]  # 3 begins the next episode
    assert data["terminals"].tolist() == [False, False, True, False, False, False]
    data = synther_td3bc.qlearning_dataset(raw, true_next_obs=True)
    assert data["next_observations"][:, 0].tolist() == [1, 2, 102, 4, 5, 7]


def test_step_counter_starts_again_after_terminals_and_timeouts():
    raw = numbered_rows(12, terminals=[1])
    data = synther_td3bc.qlearning_dataset(raw, max_episode_steps=4)
    assert data["observations"][:, 0].tolist() == [0, 1, 2, 3, 5, 6, 7, 9, 10]  # after a terminal D4RL counts from 1


def test_true_next_obs_needs_next_observations():
    raw = numbered_rows(8, terminals=[4], timeouts=[])
    del raw["next_observations"]
    with pytest.raises(RunError, match="next_observations"):
        synther_td3bc.qlearning_dataset(raw, true_next_obs=True)
    raw["terminals"][:] = False  # now every s' is in the next row
    assert synther_td3bc.qlearning_dataset(raw, true_next_obs=True)["next_observations"][:, 0].tolist() == list(
        range(1, 8)
    )


# --- load_transitions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".hdf5", ".h5"])
@pytest.mark.parametrize("true_next_obs", [False, True])
def test_load_hdf5(tmp_path, suffix, true_next_obs):
    raw = d4rl_rows(50)
    path = write_hdf5(tmp_path / f"data{suffix}", raw | {"infos/qpos": np.zeros((3, 2))})
    expected = slow_qlearning_dataset(raw, 1000, true_next_obs)
    assert_same_data(synther_td3bc.load_transitions(path, true_next_obs), expected)


def test_load_hdf5_with_columns_and_without_timeouts(tmp_path):
    raw = d4rl_rows(50)
    raw["terminals"][:] = False
    del raw["timeouts"], raw["next_observations"]
    columns = {k: raw[k].reshape(-1, 1) for k in ("rewards", "terminals")}
    data = synther_td3bc.load_transitions(write_hdf5(tmp_path / "data.hdf5", raw | columns))
    assert_same_data(data, slow_qlearning_dataset(raw, 1000, False))


def test_load_npz(tmp_path):
    data = transitions(50)
    path = write_npz(tmp_path / "data.npz", data | {"more": np.zeros(3)})
    assert_same_data(synther_td3bc.load_transitions(path), data)  # every row, with the file's s'


def make_minari(monkeypatch, folder, **options):
    """A local Minari dataset of two episodes of Pendulum: one terminated, one truncated. Returns its transitions."""
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    rng, buffers, parts = np.random.default_rng(0), [], []
    for i, length in enumerate([7, 5]):
        obs = rng.uniform(-1, 1, (length + 1, 3)).astype(np.float32)
        actions = rng.uniform(-1, 1, (length, 1)).astype(np.float32)
        rewards, last = rng.standard_normal(length), np.arange(length) == length - 1
        terminations, truncations = last & (i == 0), last & (i == 1)
        buffers.append(
            EpisodeBuffer(
                id=i,
                observations=obs,
                actions=actions,
                rewards=rewards,
                terminations=terminations,
                truncations=truncations,
            )  # fmt: skip
        )
        parts.append((obs[:-1], actions, rewards, obs[1:], terminations))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("test/two-episodes-v0", buffers, **options)
    return {key: np.concatenate(x) for key, x in zip(TRANSITION_KEYS, zip(*parts))}


def test_load_minari(tmp_path, monkeypatch):
    expected = make_minari(monkeypatch, tmp_path, env="Pendulum-v1")
    assert_same_data(synther_td3bc.load_transitions("test/two-episodes-v0"), expected)
    data, env_id = synther_td3bc.load_dataset(Args(env="test/two-episodes-v0"))
    assert_same_data(data, expected)
    assert env_id == "Pendulum-v1"


def test_minari_dataset_without_an_environment(tmp_path, monkeypatch):
    spaces = gym.make("Pendulum-v1")
    make_minari(
        monkeypatch, tmp_path, observation_space=spaces.observation_space, action_space=spaces.action_space
    )  # fmt: skip
    with pytest.raises(RunError, match="environment"):
        synther_td3bc.load_dataset(Args(env="test/two-episodes-v0"))


def spoil(key, value):
    def change(data):
        data[key] = data[key].astype(float)
        data[key][(3, 0) if data[key].ndim == 2 else 3] = value
        return data

    return change


def without(*keys):
    return lambda data: {k: x for k, x in data.items() if k not in keys}


def with_array(key, x):
    return lambda data: data | {key: x}


BAD_ARRAYS = {
    **{f"{key} missing": without(key) for key in TRANSITION_KEYS},
    **{f"{key} NaN": spoil(key, math.nan) for key in TRANSITION_KEYS},
    **{f"{key} Inf": spoil(key, -math.inf) for key in TRANSITION_KEYS[:-1]},
    **{f"{key} too short": with_array(key, x[:-1]) for key, x in transitions(20).items()},
    "too large for float32": spoil("rewards", 1e300),
    "observations flat": with_array("observations", np.zeros(20)),
    "actions flat": with_array("actions", np.zeros(20)),
    "observations of images": with_array("observations", np.zeros((20, 4, 4))),
    "observations a number": with_array("observations", np.zeros(())),
    "rewards a number": with_array("rewards", np.zeros(())),
    "no rows": lambda data: {k: x[:0] for k, x in data.items()},
    "text": with_array("actions", np.full((20, 2), b"left")),
}


def assert_one_sentence(error, path):
    """The message names the file and has one line."""
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_bad_npz(tmp_path, what):
    path = write_npz(tmp_path / "data.npz", BAD_ARRAYS[what](transitions(20)))
    with pytest.raises(RunError) as error:
        synther_td3bc.load_transitions(path)
    assert_one_sentence(error, path)


@pytest.mark.parametrize("what", [k for k in BAD_ARRAYS if "next_obs" not in k])
def test_bad_hdf5(tmp_path, what):
    path = write_hdf5(tmp_path / "data.hdf5", BAD_ARRAYS[what](transitions(20)))
    with pytest.raises(RunError) as error:
        synther_td3bc.load_transitions(path)
    assert_one_sentence(error, path)


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "another format", "a folder"])
def test_unreadable_file(tmp_path, suffix, damage):
    path = tmp_path / f"data{suffix}"
    if damage == "a folder":
        path.mkdir()
    elif damage == "another format":
        path.write_text("<html>404</html>" * 100)
    elif damage != "missing":
        (write_npz if suffix == ".npz" else write_hdf5)(path, transitions(2000))
        os.truncate(path, path.stat().st_size * 2 // 3 if damage == "truncated" else 0)
    with pytest.raises(RunError) as error:
        synther_td3bc.load_transitions(str(path))
    assert_one_sentence(error, path)


# --- Download ---------------------------------------------------------------------------------------------------------


class Response(io.BytesIO):
    """What urlopen returns: a body, and the length the server promised."""

    def __init__(self, body, length=None):
        super().__init__(body)
        self.headers = {"Content-Length": str(len(body) if length is None else length)}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A fake network and an empty cache folder. `answer` gets the URL; `urls` are those asked for."""

    class Server:
        folder, urls = tmp_path / "cache", []
        body = Path(write_hdf5(tmp_path / "on_server.hdf5", d4rl_rows(2000))).read_bytes()

        def urlopen(self, url, timeout):
            self.urls.append(url)
            return self.answer(url)

    server = Server()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(server.folder))
    monkeypatch.setattr(synther_td3bc.urllib.request, "urlopen", server.urlopen)
    return server


def test_download_is_cached_under_d4rls_name(server):
    server.answer = lambda url: Response(server.body)
    path = server.folder / "walker2d_medium_replay-v2.hdf5"
    assert synther_td3bc.download_d4rl("walker2d-medium-replay-v2") == str(path)
    assert path.read_bytes() == server.body and list(server.folder.iterdir()) == [path]
    assert len(server.urls) == 1 and server.urls[0].endswith("/gym_mujoco_v2/walker2d_medium_replay-v2.hdf5")
    synther_td3bc.download_d4rl("walker2d-medium-replay-v2")
    assert len(server.urls) == 1
    data, env_id = synther_td3bc.load_dataset(Args(env="walker2d-mixed-v2"))  # another name of the same
    assert_same_data(data, slow_qlearning_dataset(d4rl_rows(2000), 1000, False))
    assert len(server.urls) == 1 and env_id == "Walker2d-v4"


def fail(error):
    def answer(url):
        raise error

    return answer


class BreakingResponse(Response):
    def read(self, size=-1):
        raise http.client.IncompleteRead(b"half", 1000)


BAD_ANSWERS = {
    "no network": fail(urllib.error.URLError("Name or service not known")),
    "not found": fail(urllib.error.HTTPError("http://server", 404, "Not Found", {}, None)),
    "error page": lambda body: Response(b"<html>moved</html>"),
    "short read": lambda body: Response(body[: len(body) // 2], len(body)),
    "short file": lambda body: Response(body[: len(body) // 2]),
    "broken connection": lambda body: BreakingResponse(body),
    "nonsense": fail(http.client.BadStatusLine("???")),
}


@pytest.mark.parametrize("what", BAD_ANSWERS)
def test_failed_download_names_three_ways_out_and_leaves_nothing(server, what):
    server.answer = lambda url: BAD_ANSWERS[what](server.body)
    with pytest.raises(RunError) as error:
        synther_td3bc.download_d4rl("hopper-medium-v2")
    assert_one_sentence(error, server.folder / "hopper_medium-v2.hdf5")
    assert "--dataset-path" in str(error.value) and "quickstart" in str(error.value)
    assert not server.folder.exists() or not list(server.folder.iterdir())


def test_second_address_is_tried(server):
    server.answer = lambda url: Response(b"<html>" if len(server.urls) == 1 else server.body)
    assert Path(synther_td3bc.download_d4rl("hopper-medium-v2")).read_bytes() == server.body
    assert len(server.urls) == 2 and server.urls[0].split("/")[2] != server.urls[1].split("/")[2]


# --- load_dataset: subsets and settings by name -----------------------------------------------------------------------


@pytest.mark.parametrize("subsample, count", [(1.0, 40), (0.25, 10), (0.1, 4), (2.0, 2), (40.0, 40)])
def test_subsample(tmp_path, subsample, count):
    data = transitions(40)
    args = Args(env="Pendulum-v1", dataset_path=write_npz(tmp_path / "data.npz", data), subsample=subsample)
    loaded, _ = synther_td3bc.load_dataset(args)
    subset = synther_td3bc.subsample(loaded, args)
    rows = [data["rewards"].astype(np.float32).tolist().index(r) for r in subset["rewards"]]
    assert len(rows) == len(set(rows)) == count
    assert_same_data(subset, {k: x[rows] for k, x in data.items()})  # rows stay whole
    same = synther_td3bc.subsample(loaded, replace(args, seed=5))
    np.testing.assert_array_equal(same["rewards"], subset["rewards"])  # whatever the agent's seed
    if count == 10:
        assert max(rows) - min(rows) > 15  # not the first or last ones
        other = synther_td3bc.subsample(loaded, replace(args, diffusion_seed=5))
        assert set(other["rewards"]) != set(subset["rewards"])


@pytest.mark.parametrize("subsample", [1e-6, 0.02, 41.0, 1e9, 2.5, math.nan, math.inf])
def test_bad_subsample(tmp_path, subsample):
    path = write_npz(tmp_path / "data.npz", transitions(40))
    args = Args(env="Pendulum-v1", dataset_path=path, subsample=subsample)
    with pytest.raises(RunError, match="subsample"):
        synther_td3bc.check_args(args)
        synther_td3bc.subsample(synther_td3bc.load_dataset(args)[0], args)


def test_bundled_dataset():
    """40 episodes of 1000 steps that follow one another, of an agent that learns to run; each loses its last row."""
    data, env_id = synther_td3bc.load_dataset(Args())
    assert env_id == "HalfCheetah-v4" and data["observations"].shape == (39_960, 17) and not data["terminals"].any()
    joined = (data["next_observations"][:-1] == data["observations"][1:]).all(1)
    assert np.flatnonzero(~joined).tolist() == list(range(998, 39_959, 999))
    returns = data["rewards"].reshape(40, 999).sum(1)
    assert returns[:5].max() < 0 and returns[-4:].min() > 1_500
    assert np.abs(data["actions"]).max() <= 1
    assert synther_td3bc.BUNDLED.stat().st_size < 4e6
    # The simulator agrees: the file holds what HalfCheetah-v4 does
    env = synther_td3bc.make_env(env_id).unwrapped
    env.reset(seed=0)
    for i in range(0, 39_960, 4_000):
        obs = data["observations"][i].astype(np.float64)
        env.set_state(np.concatenate([[0.0], obs[:8]]), obs[8:])
        next_obs, reward, *_ = env.step(data["actions"][i])
        np.testing.assert_allclose(next_obs, data["next_observations"][i], atol=1e-3)
        assert reward == pytest.approx(data["rewards"][i], abs=1e-3)


def test_mixing_generates_as_many_as_there_are():
    assert synther_td3bc.resolve(Args(env="hopper-medium-v2", data="mixed"), 123).num_samples == 123


@pytest.mark.parametrize(
    "env, rows, width, batch_size",
    [
        ("walker2d-medium-replay-v2", 300_000, 1024, 256),
        ("halfcheetah-medium-v2", 998_999, 1024, 1024),
        ("halfcheetah-medium-expert-v2", 1_998_000, 2048, 1024),
        ("hopper-medium-v2", 999_000, 2048, 1024),
        ("hopper-medium-replay-v2", 400_000, 1024, 256),
        ("hopper-medium-expert-v2", 1_998_000, 2048, 1024),
        ("walker2d-medium-expert-v2", 60_000, 1024, 256),
    ],
)
def test_defaults_are_the_papers(env, rows, width, batch_size):
    args = synther_td3bc.resolve(Args(env=env), rows)
    assert (args.diffusion_width, args.diffusion_batch_size) == (width, batch_size)
    assert (args.diffusion_steps, args.diffusion_lr, args.diffusion_depth) == (100_000, 3e-4, 6)
    assert (args.num_samples, args.updates, args.eval_every) == (5_000_000, 1_000_000, 5_000)
    assert args.sample_steps == 32 and synther_td3bc.resolve(Args(env=env, sampler="sde"), rows).sample_steps == 128
    by_hand = synther_td3bc.resolve(Args(env=env, diffusion_width=3, diffusion_batch_size=4, sample_steps=5), rows)
    assert (by_hand.diffusion_width, by_hand.diffusion_batch_size, by_hand.sample_steps) == (3, 4, 5)


# --- Environment and scores -------------------------------------------------------------------------------------------


def test_normalized_score():
    score = synther_td3bc.normalized_score
    assert score("Hopper-v4", -20.272305) == 0 and score("Hopper-v4", 3234.3) == 100
    assert score("HalfCheetah-v4", np.array([-280.178953, 12135.0])).tolist() == [0, 100]
    assert score("Walker2d-v4", 3000.0) == pytest.approx(100 * (3000 - 1.629008) / (4592.3 - 1.629008))
    assert np.isnan(score("Pendulum-v1", np.array([1.0, 2.0]))).all()


class Countdown(gym.Env):
    """Observation: (seed, steps so far). Reward: the action. Ends after seed + 1 steps: odd seeds terminate, even ones
    are truncated. May not be stepped after that."""

    observation_space = gym.spaces.Box(-100, 100, (2,), np.float32)
    action_space = gym.spaces.Box(-100, 100, (1,), np.float32)

    def reset(self, seed=None, options=None):
        self.seed, self.steps = seed, 0
        return np.array([seed, 0], np.float32), {}

    def step(self, action):
        assert self.steps <= self.seed, "stepped after the end"
        self.steps += 1
        over, odd = self.steps > self.seed, self.seed % 2 == 1
        return np.array([self.seed, self.steps], np.float32), float(action[0]), over and odd, over and not odd, {}


def test_evaluate_counts_each_episode_to_its_end():
    asked = []

    def policy(observations):
        asked.append(len(observations))
        return observations[:, :1] * 10 + observations[:, 1:]

    seeds = [3, 4, 5, 6]
    returns = synther_td3bc.evaluate(policy, [Countdown() for _ in seeds], seed=3)
    assert returns.tolist() == [sum(10 * s + t for t in range(s + 1)) for s in seeds]
    assert asked == [4, 4, 4, 4, 3, 2, 1]  # episodes that are over are not computed


def test_evaluation_is_the_same_each_time():
    envs = [synther_td3bc.make_env("Pendulum-v1") for _ in range(2)]
    policy = lambda observations: observations[:, 1:2]  # noqa: E731
    first = synther_td3bc.evaluate(policy, envs, seed=7)
    assert (synther_td3bc.evaluate(policy, envs, seed=7) == first).all() and first[0] != first[1]
    assert synther_td3bc.evaluate(policy, envs, seed=8)[0] == first[1]


@pytest.mark.parametrize("env_id", ["NoSuchEnv-v0", "CartPole-v1", "no_such_module:Env-v0"])
def test_make_env_refuses(env_id):
    with pytest.raises(RunError, match=env_id.split(":")[0]):
        synther_td3bc.make_env(env_id)


@pytest.mark.parametrize(
    "version, other_dynamics", [("3.4.0", False), ("3.5.0", True), ("3.10.0", True), ("4.0.0", True)]
)
def test_warning_about_mujoco(monkeypatch, version, other_dynamics):
    monkeypatch.setattr(synther_td3bc.mujoco, "mj_versionString", lambda: version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        synther_td3bc.make_env("Hopper-v4")
    assert any("mujoco 3.5" in str(w.message) for w in caught) == other_dynamics


# --- Networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_critics, hidden_layers", [(2, 2), (5, 3)])
def test_ensemble_equals_separate_critics(float64, num_critics, hidden_layers):
    torch.manual_seed(0)
    critic, x = EnsembleCritic(5, 16, hidden_layers, num_critics), torch.randn(7, 5)
    mlps = separate_critics(critic)
    assert len([m for m in mlps[0] if isinstance(m, nn.Linear)]) == hidden_layers + 1
    expected = torch.stack([mlp(x)[:, 0] for mlp in mlps])
    torch.testing.assert_close(critic(x), expected)
    torch.testing.assert_close(critic(x, slice(1)), expected[:1])
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # they start apart


def test_network_sizes_and_initial_range():
    """The paper's counts for walker2d (a critic 72,193, an actor 71,942), and PyTorch's initial range."""
    agent = TD3BC(17, 6, 1.0, Args(), "cpu")
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    assert (count(agent.actor), count(agent.critic)) == (71_942, 2 * 72_193)
    for weight, bias in zip(agent.critic.weights, agent.critic.biases):
        bound = 1 / math.sqrt(weight.shape[1])
        assert 0.9 * bound < weight.abs().max() <= bound and bias.abs().max() <= bound


# --- Agent ------------------------------------------------------------------------------------------------------------


def test_td3bc_equals_a_plain_implementation(float64):
    """100 updates as in the TD3+BC paper's own code: separate critics, Adam, torch.min, mse_loss."""
    args = Args(hidden_dim=16, batch_size=32, learning_rate=1e-3)
    torch.manual_seed(0)
    max_action, rows = 1.5, agent_rows(500)
    agent = TD3BC(3, 2, max_action, args, "cpu")
    actor = nn.Sequential(*copy.deepcopy(agent.actor.net))
    q1, q2 = separate_critics(agent.critic)
    actor_target, q1_target, q2_target = copy.deepcopy((actor, q1, q2))
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    critic_optimizer = torch.optim.Adam([*q1.parameters(), *q2.parameters()], lr=1e-3)

    for i in range(100):
        batch = rows[torch.randint(500, (32,))]
        torch.manual_seed(i)
        loss = agent.update_critic(batch)
        actor_loss = agent.update_actor(batch) if i % 2 == 1 else None

        torch.manual_seed(i)
        s, a, r, s_next, d = batch[:, :3], batch[:, 3:5], batch[:, 5:6], batch[:, 6:9], batch[:, 9:]
        with torch.no_grad():
            noise = (torch.randn_like(a.clone()) * 0.2 * max_action).clamp(-0.5 * max_action, 0.5 * max_action)
            a_next = (max_action * actor_target(s_next) + noise).clamp(-max_action, max_action)
            x_next = torch.cat([s_next, a_next], 1)
            y = r + 0.99 * (1 - d) * torch.min(q1_target(x_next), q2_target(x_next))
        x = torch.cat([s, a], 1)
        plain_loss = F.mse_loss(q1(x), y) + F.mse_loss(q2(x), y)
        critic_optimizer.zero_grad()
        plain_loss.backward()
        critic_optimizer.step()
        assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
        if actor_loss is not None:
            pi = max_action * actor(s)
            q = q1(torch.cat([s, pi], 1))
            plain_loss = -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, a)
            actor_optimizer.zero_grad()
            plain_loss.backward()
            actor_optimizer.step()
            assert actor_loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
            for net, target in ((actor, actor_target), (q1, q1_target), (q2, q2_target)):
                for p, t in zip(net.parameters(), target.parameters()):
                    t.data.copy_(0.005 * p.data + 0.995 * t.data)

    def assert_same(ours, plain):
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)

    assert_same(agent.actor, actor)
    assert_same(agent.actor_target, actor_target)
    for ensemble, mlps in ((agent.critic, (q1, q2)), (agent.critic_target, (q1_target, q2_target))):
        for ours, plain in zip(separate_critics(ensemble), mlps):
            assert_same(ours, plain)


def test_updates_change_what_they_should():
    torch.manual_seed(0)
    agent, batch = TD3BC(3, 2, 1.0, Args(hidden_dim=16), "cpu"), agent_rows(64)
    parts = {name: getattr(agent, name) for name in ("actor", "critic", "actor_target", "critic_target")}

    def changed(update):
        before = {name: snapshot(part) for name, part in parts.items()}
        update(batch)
        return {name for name, part in parts.items() if not torch.equal(snapshot(part), before[name])}

    assert changed(agent.update_critic) == {"critic"}
    assert changed(agent.update_actor) == {"actor", "actor_target", "critic_target"}
    assert changed(agent.update_critic) == {"critic"}


def test_critics_fit_a_fixed_batch():
    torch.manual_seed(0)
    agent, batch = TD3BC(3, 2, 1.0, Args(hidden_dim=32, learning_rate=3e-3), "cpu"), agent_rows(64)
    batch[:, -1] = 1  # all terminal: the target is the reward
    losses = [agent.update_critic(batch).item() for _ in range(300)]
    assert losses[-1] < 0.05 * losses[0]
    q = agent.critic(batch[:, :5])
    torch.testing.assert_close(q, batch[:, 5].expand(2, -1), atol=0.5, rtol=0)


def test_large_alpha_climbs_q_and_zero_alpha_clones():
    torch.manual_seed(0)
    batch = agent_rows(64)
    batch[:, 3:5].clamp_(-0.9, 0.9)
    distance = {}
    for alpha in (0.0, 1e6):
        agent = TD3BC(3, 2, 1.0, Args(hidden_dim=64, learning_rate=3e-3, alpha=alpha), "cpu")
        q = lambda: agent.critic(torch.cat([batch[:, :3], agent.actor(batch[:, :3])], 1))[0].mean().item()  # noqa: E731,B023
        before = q()
        for _ in range(300):
            agent.update_actor(batch)
        distance[alpha] = F.mse_loss(agent.actor(batch[:, :3]), batch[:, 3:5]).item()
        if alpha:
            assert q() > before
    assert distance[0.0] < 0.1 < distance[1e6]


def test_agent_state_comes_back(tmp_path):
    torch.manual_seed(0)
    args, batch = Args(hidden_dim=16), agent_rows(64)
    agent, other = TD3BC(3, 2, 1.0, args, "cpu"), TD3BC(3, 2, 1.0, args, "cpu")
    update = lambda a: (torch.manual_seed(1), a.update_critic(batch), a.update_actor(batch))  # noqa: E731
    update(agent)
    torch.save(agent.state_dict(), tmp_path / "agent.pt")
    other.load_state_dict(torch.load(tmp_path / "agent.pt", weights_only=True))
    update(agent), update(other)  # the same step again needs the optimisers' moments too
    for name in ("actor", "critic", "actor_target", "critic_target"):
        assert torch.equal(snapshot(getattr(agent, name)), snapshot(getattr(other, name)))


# --- Augmentation -----------------------------------------------------------------------------------------------------


def augmented(kind, seed=0):
    """A batch before and after: (s, s', the other columns) of each."""
    torch.manual_seed(0)
    before = agent_rows(4_000)
    after = before.clone()
    torch.manual_seed(seed)
    synther_td3bc.augment_batch(after, kind, 3)
    return [(x[:, :3], x[:, 6:9], torch.cat([x[:, 3:6], x[:, 9:]], 1)) for x in (before, after)]


def test_no_augmentation():
    (s, s_next, rest), (new_s, new_s_next, new_rest) = augmented("none")
    assert torch.equal(s, new_s) and torch.equal(s_next, new_s_next) and torch.equal(rest, new_rest)


def test_additive_augmentation():
    (s, s_next, rest), (new_s, new_s_next, new_rest) = augmented("additive")
    noise = new_s - s
    torch.testing.assert_close(new_s_next - s_next, noise, atol=1e-6, rtol=0)  # the same for s and s'
    assert noise.std(0).tolist() == pytest.approx([0.1] * 3, rel=0.05) and abs(noise.mean()) < 0.005
    assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 0.1  # a number of its own per dimension
    assert torch.equal(rest, new_rest)


def test_multiplicative_augmentation():
    (s, s_next, rest), (new_s, new_s_next, new_rest) = augmented("multiplicative")
    factor = (new_s * s).sum(1, keepdim=True) / (s * s).sum(1, keepdim=True)
    torch.testing.assert_close(new_s, factor * s, atol=1e-5, rtol=0)  # one number per transition
    torch.testing.assert_close(new_s_next, factor * s_next, atol=1e-5, rtol=1e-4)
    assert (
        0.799 < factor.min() < 0.81
        and 1.19 < factor.max() < 1.201
        and factor.mean().item() == pytest.approx(1, abs=0.01)
    )
    assert torch.equal(rest, new_rest)


def test_dynamics_augmentation():
    (s, s_next, rest), (new_s, new_s_next, new_rest) = augmented("dynamics")
    change = s_next - s
    factor = ((new_s_next - s) * change).sum(1, keepdim=True) / (change * change).sum(1, keepdim=True)
    torch.testing.assert_close(new_s_next, s + factor * change, atol=1e-5, rtol=1e-4)
    assert (
        0.499 < factor.min() < 0.51
        and 1.49 < factor.max() < 1.501
        and factor.mean().item() == pytest.approx(1, abs=0.02)
    )
    assert torch.equal(s, new_s) and torch.equal(rest, new_rest)


@pytest.mark.parametrize("kind", ["additive", "multiplicative", "dynamics"])
def test_augmentation_is_new_for_every_batch(kind):
    assert not torch.equal(augmented(kind, seed=1)[1][1], augmented(kind, seed=2)[1][1])


# --- Whole runs, in miniature -----------------------------------------------------------------------------------------


def run(out_dir, **options):
    """main() with these arguments; returns the run folder."""
    before = set(Path(out_dir).glob("*__*"))
    synther_td3bc.main(Args(out_dir=str(out_dir), **options))
    (folder,) = set(Path(out_dir).glob("*__*")) - before
    return folder


TINY = dict(
    device="cpu", diffusion_steps=1_000, diffusion_width=32, diffusion_depth=2, diffusion_batch_size=64,
    num_samples=1_500, sample_batch_size=1_000, updates=1_000, hidden_dim=16, batch_size=32, eval_every=500,
    eval_episodes=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder of a run of the default command, but small."""
    return run(tmp_path_factory.mktemp("runs"), subsample=2_000, seed=3, **TINY)


def test_run_folder(quickstart):
    assert quickstart.name.startswith("quickstart__synther_td3bc__3__")
    assert {path.name for path in quickstart.iterdir()} == {
        "args.json", "metrics.csv", "checkpoint.pt", "diffusion.pt", "synthetic.npz", "final_returns.npz",
        "learning_curve.png", "marginals.png",
    }  # fmt: skip
    for name in ("learning_curve.png", "marginals.png"):
        assert (quickstart / name).read_bytes().startswith(b"\x89PNG")
    args = Args(**json.loads((quickstart / "args.json").read_text()))
    assert None not in (args.diffusion_lr, args.sample_steps)  # resolved
    assert args.diffusion_width == 32 and args.seed == 3


def test_run_logs(quickstart):
    metrics = read_metrics(quickstart)
    keys = {key for _, key in metrics}
    assert keys >= {
        "diffusion/loss", "diffusion/marginal", "diffusion/correlation", "train/critic_loss", "train/actor_loss",
        "eval/return_mean", "eval/return_std", "eval/normalized_score", "perf/updates_per_sec", "perf/samples_per_sec",
        "perf/seconds",
    }  # fmt: skip
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics[1_000, "diffusion/loss"] < 0.95 * metrics[500, "diffusion/loss"]
    assert 0.5 < metrics[1_000, "diffusion/marginal"] <= 1
    assert [step for step, key in metrics if key == "eval/return_mean"] == [0, 500, 1_000]


def test_run_results(quickstart):
    metrics = read_metrics(quickstart)
    with np.load(quickstart / "final_returns.npz") as final:
        updates, returns, scores = final["updates"], final["returns"], final["normalized_scores"]
    assert updates.tolist() == [0, 500, 1_000] and returns.shape == scores.shape == (3, 2)
    np.testing.assert_allclose(scores, synther_td3bc.normalized_score("HalfCheetah-v4", returns))
    for i, update in enumerate(updates.tolist()):
        assert metrics[update, "eval/return_mean"] == pytest.approx(returns[i].mean())
        assert metrics[update, "eval/return_std"] == pytest.approx(returns[i].std())
        assert metrics[update, "eval/normalized_score"] == pytest.approx(scores[i].mean())
    data = synther_td3bc.load_transitions(quickstart / "synthetic.npz")
    assert data["observations"].shape == (1_500, 17) and data["actions"].shape == (1_500, 6)


def test_saved_model_made_the_saved_transitions(quickstart):
    model = edm.load_edm(quickstart / "diffusion.pt")
    assert (model.mean[-1], model.std[-1]) == (0, 1) and (model.std[:-1] != 1).all()  # all but d are standardised
    expected = edm.unpack(edm.generate(model, 1_500, batch_size=1_000, progress=False), 17, 6)
    assert_same_data(synther_td3bc.load_transitions(quickstart / "synthetic.npz"), expected)


def test_another_agent_on_the_same_synthetic_data(quickstart, tmp_path):
    options = TINY | dict(subsample=2_000, synthetic_path=str(quickstart / "synthetic.npz"))
    folder = run(tmp_path, seed=3, **options)
    assert not (folder / "diffusion.pt").exists() and not (folder / "synthetic.npz").exists()
    with np.load(folder / "final_returns.npz") as again, np.load(quickstart / "final_returns.npz") as first:
        np.testing.assert_array_equal(again["returns"], first["returns"])  # the same agent, in fact
    checkpoints = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, quickstart)]
    assert checkpoints[0].pop("seconds") < checkpoints[1].pop("seconds")  # without the diffusion model
    assert_same_state(*checkpoints)


class RecordingAgent(TD3BC):
    updates = []  # (name, batch)

    def update_critic(self, batch):
        self.updates.append(("critic", batch.clone()))
        return super().update_critic(batch)

    def update_actor(self, batch):
        self.updates.append(("actor", batch.clone()))
        return super().update_actor(batch)


@pytest.fixture
def updates(monkeypatch):
    """All updates of the agents of this test."""
    monkeypatch.setattr(synther_td3bc, "TD3BC", RecordingAgent)
    monkeypatch.setattr(RecordingAgent, "updates", [])
    return RecordingAgent.updates


@pytest.mark.parametrize("data", ["real", "synther", "mixed"])
def test_what_the_agent_learns_from(tmp_path, updates, data):
    """Rewards tell real (0), synthetic (1) and surplus synthetic (2) rows apart; s is scaled by the real rows' s."""
    rng = np.random.default_rng(0)

    def rows(n, mean, std, rewards):
        x = {k: rng.standard_normal((n, 3)) * std + mean for k in ("observations", "next_observations")}
        return x | {"actions": rng.uniform(-2, 2, (n, 1)), "rewards": rewards, "terminals": rng.random(n) < 0.2}

    real = write_npz(tmp_path / "real.npz", rows(300, 5.0, 2.0, np.zeros(300)))
    synthetic = write_npz(tmp_path / "synthetic.npz", rows(700, 9.0, 4.0, np.repeat([1.0, 2.0], [300, 400])))
    run(
        tmp_path / "runs", env="Pendulum-v1", dataset_path=real, data=data, updates=60,
        synthetic_path=None if data == "real" else synthetic,
        batch_size=100, hidden_dim=8, eval_episodes=0, device="cpu",
    )  # fmt: skip
    seen = torch.cat([batch for name, batch in updates if name == "critic"])
    shares = [(seen[:, 4] == reward).float().mean().item() for reward in (0, 1, 2)]
    expected = {"real": [1, 0, 0], "synther": [0, 300 / 700, 400 / 700], "mixed": [0.5, 0.5, 0]}[data]
    assert shares == pytest.approx(expected, abs=0.03) and sum(shares) == pytest.approx(1)
    for reward, mean, std in ((0, 0, 1), (1, (9 - 5) / 2, 4 / 2)):
        part = seen[seen[:, 4] == reward]
        for states in (part[:, :3], part[:, 5:8]):
            if len(part):
                assert states.mean().item() == pytest.approx(mean, abs=0.2)
                assert states.std().item() == pytest.approx(std, rel=0.1)
    assert set(seen[:, -1].tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("augment", ["none", "dynamics"])
def test_order_of_the_updates(tmp_path, updates, augment):
    """The actor follows every policy_freq-th critic update, on its batch; augmentation comes before both."""
    data = transitions(300, act_dim=1)
    data["next_observations"] = data["observations"] + 1
    run(
        tmp_path, env="Pendulum-v1", dataset_path=write_npz(tmp_path / "data.npz", data), data="real", updates=10,
        policy_freq=3, batch_size=50, hidden_dim=8, eval_episodes=0, device="cpu", augment=augment,
    )  # fmt: skip
    assert [name for name, _ in updates] == 3 * ["critic", "critic", "critic", "actor"] + ["critic"]
    assert torch.equal(updates[2][1], updates[3][1]) and not torch.equal(updates[1][1], updates[2][1])
    change = updates[3][1][:, 5:8] - updates[3][1][:, :3]
    std = torch.from_numpy(data["observations"]).float().std(0, unbiased=False) + 1e-3
    factor = change * std
    assert (factor.std() > 0.2) if augment == "dynamics" else torch.allclose(factor, torch.ones(50, 3), atol=1e-4)


def test_mixed_needs_enough_synthetic_rows(tmp_path):
    real, few = (write_npz(tmp_path / f"{n}.npz", transitions(n, act_dim=1)) for n in (100, 99))
    with pytest.raises(RunError, match="100 .* 99"):
        run(tmp_path / "runs", env="Pendulum-v1", dataset_path=real, synthetic_path=few, data="mixed", **TINY)


@pytest.mark.parametrize("obs_dim, act_dim", [(4, 1), (2, 3)])  # the second has rows of the same width
def test_synthetic_data_of_another_task(tmp_path, obs_dim, act_dim):
    real = write_npz(tmp_path / "real.npz", transitions(100, act_dim=1))
    other = write_npz(tmp_path / "other.npz", transitions(100, obs_dim=obs_dim, act_dim=act_dim))
    with pytest.raises(RunError, match="other.npz"):
        run(tmp_path / "runs", env="Pendulum-v1", dataset_path=real, synthetic_path=other, **TINY)


def test_clip_actions(tmp_path):
    """With --clip-actions, generated actions keep to the action space, here [-2, 2]; without, some leave it."""
    rng = np.random.default_rng(0)
    data = transitions(500, act_dim=1) | {"actions": rng.choice([-2.0, 2.0], (500, 1))}
    path, largest = write_npz(tmp_path / "data.npz", data), {}
    for clip in (False, True):
        options = TINY | dict(diffusion_steps=200, updates=10, eval_episodes=0, clip_actions=clip, exp_name=str(clip))
        folder = run(tmp_path / "runs", env="Pendulum-v1", dataset_path=path, **options)
        largest[clip] = np.abs(np.load(folder / "synthetic.npz")["actions"]).max()
    assert largest[True] == 2 and largest[False] > 2


@pytest.mark.parametrize("terminals", ["column", "classifier"])
def test_terminals_of_generated_rows(tmp_path, monkeypatch, terminals):
    def relabel_terminals(rows, real, **options):
        assert len(real) == 500 and torch.isin(rows[:, -1], torch.tensor([0.0, 1.0])).all()
        rows[:, -1] = torch.arange(len(rows)) % 2

    monkeypatch.setattr(edm, "relabel_terminals", relabel_terminals)
    path = write_npz(tmp_path / "data.npz", transitions(500, act_dim=1) | {"terminals": np.ones(500)})
    options = TINY | dict(diffusion_steps=200, updates=10, eval_episodes=0, num_samples=400, terminals=terminals)
    folder = run(tmp_path / "runs", env="Pendulum-v1", dataset_path=path, **options)
    share = np.load(folder / "synthetic.npz")["terminals"].mean()
    assert share == 0.5 if terminals == "classifier" else share > 0.6
    assert read_metrics(folder)[200, "diffusion/terminals"] == pytest.approx(share)


def test_diverging_diffusion_stops_the_run(tmp_path):
    path = write_npz(tmp_path / "data.npz", transitions(100, act_dim=1))
    with pytest.raises(RunError, match="diffusion loss"):
        run(tmp_path / "runs", env="Pendulum-v1", dataset_path=path, **TINY | dict(diffusion_lr=1e30))


def test_diverging_agent_stops_the_run(tmp_path):
    path = write_npz(tmp_path / "data.npz", transitions(100, act_dim=1))
    with pytest.raises(RunError, match="loss of the agent .* between updates 0 and 1000"):
        run(tmp_path / "runs", env="Pendulum-v1", dataset_path=path, data="real", **TINY | dict(learning_rate=1e30))


def test_agent_learns_from_synthetic_data(tmp_path):
    """From random data alone, SynthER with TD3+BC comes close to the best policy of a simple task."""
    data = collect_random("Point-v0", 5_000)
    assert data["terminals"].any()
    options = dict(
        env="Point-v0", dataset_path=write_npz(tmp_path / "data.npz", data), diffusion_steps=1_500, diffusion_width=64,
        diffusion_depth=2, diffusion_lr=3e-3, num_samples=10_000, updates=3_000, hidden_dim=64, batch_size=128,
        learning_rate=1e-3, tau=0.02, discount=0.8, alpha=100.0, eval_every=3_000, eval_episodes=20, device="cpu",
    )  # fmt: skip
    folder = run(tmp_path / "runs", **options)
    trained = np.load(folder / "final_returns.npz")["returns"][-1].mean()
    envs = [synther_td3bc.make_env("Point-v0") for _ in range(20)]
    torch.manual_seed(0)
    chance = synther_td3bc.evaluate(lambda obs: 2 * torch.rand_like(obs) - 1, envs, seed=0).mean()
    best = synther_td3bc.evaluate(lambda obs: (-10 * obs).clamp(-1, 1), envs, seed=0).mean()
    assert (trained - chance) / (best - chance) > 0.8, (chance, trained, best)


# --- The command line -------------------------------------------------------------------------------------------------


def command(*options):
    device = [] if "--device" in options else ["--device", "cpu"]
    return [sys.executable, str(SCRIPT), *device, *map(str, options)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files for the command line: a dataset, the start of a run folder, and things that are neither."""
    folder = tmp_path_factory.mktemp("inputs")
    data = write_npz(folder / "data.npz", collect_random("Pendulum-v1", 1_000))
    write_npz(folder / "bad.npz", spoil("actions", math.nan)(transitions(20)))
    write_hdf5(folder / "truncated.hdf5", d4rl_rows(2_000))
    os.truncate(folder / "truncated.hdf5", 50_000)
    for name in ("run", "changed_run", "not_a_run"):
        (folder / name).mkdir()
    args = synther_td3bc.resolve(Args(env="Pendulum-v1", dataset_path=data, seed=1, updates=50, device="cpu"), 1_000)
    (folder / "run/args.json").write_text(json.dumps(vars(args)))
    (folder / "run/metrics.csv").write_text("step,key,value\n0,eval/return_mean,-1000.0\n")
    (folder / "changed_run/args.json").write_text(json.dumps(vars(args) | {"no_such_argument": 1}))
    (folder / "not_a_run/args.json").write_text('{"env": "Pen')
    return folder


PENDULUM = flags(
    env="Pendulum-v1", dataset_path="data.npz", updates=5, diffusion_steps=5, diffusion_width=8, num_samples=100,
    eval_episodes=1,
)  # fmt: skip
BAD_COMMANDS = {
    "unknown dataset": ["--env", "walker3d-medium-v2"],
    "unknown environment": [*PENDULUM, "--env", "NoSuch-v0"],
    "missing file": [*PENDULUM, "--dataset-path", "nothing.npz"],
    "unknown format": [*PENDULUM, "--dataset-path", "data.csv"],
    "NaN in the file": [*PENDULUM, "--dataset-path", "bad.npz"],
    "truncated file": [*PENDULUM, "--dataset-path", "truncated.hdf5"],
    "data of another environment": [*PENDULUM, "--env", "Hopper-v4"],
    "negative fraction": [*PENDULUM, "--subsample", "-0.5"],
    "more rows than there are": [*PENDULUM, "--subsample", "2000"],
    "no updates": [*PENDULUM, "--updates", "0"],
    "negative episodes": [*PENDULUM, "--eval-episodes", "-1"],
    "negative seed": [*PENDULUM, "--seed", "-1"],
    "missing synthetic data": [*PENDULUM, "--synthetic-path", "nothing.npz"],
    "too few samples to mix": [*PENDULUM, "--data", "mixed"],
    "GPU wanted": [*PENDULUM, "--device", "cuda"],
    "graphs wanted": [*PENDULUM, "--compile", "on"],
    "output is a file": [*PENDULUM, "--out-dir", "data.npz"],
    "resume of nothing": ["--resume", "nothing"],
    "resume of another folder": ["--resume", "not_a_run"],
    "resume with unknown arguments": ["--resume", "changed_run"],
    "resume with another seed": ["--resume", "run", "--seed", "2"],
    "resume with another seed, the default": ["--resume", "run", "--seed", "0"],
    "resume with another dataset": ["--resume", "run", "--env", "Hopper-v4"],
}


@pytest.mark.parametrize("what", BAD_COMMANDS)
def test_bad_command_ends_in_one_sentence(inputs, tmp_path, what):
    """Exit code 2, one line that begins with `error:`, no traceback, nothing made and nothing changed."""
    if torch.cuda.is_available() and what in ("GPU wanted", "graphs wanted"):
        pytest.skip("there is a GPU")
    cwd = shutil.copytree(inputs, tmp_path / "here")
    contents = lambda: {str(p): p.is_file() and p.read_bytes()[-10_000:].hex() for p in cwd.rglob("*")}  # noqa: E731
    before = contents()
    result = subprocess.run(
        command(*BAD_COMMANDS[what]), cwd=cwd, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL
    )
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, lines[-1:]
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:] and "Traceback" not in result.stderr
    assert len(lines[-1]) > len("error: ") + 10
    assert sorted(contents()) == sorted(before)
    assert all(contents()[path] == content for path, content in before.items())


# --- Kill and resume --------------------------------------------------------------------------------------------------


def stage(folder):
    """(stage, steps) of the checkpoint."""
    if not (folder / "checkpoint.pt").exists():
        return None, 0
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return checkpoint["stage"], checkpoint.get("step", checkpoint.get("update"))


def training_diffusion(folder):
    return stage(folder)[1] >= 450 and not (folder / "diffusion.pt").exists()


def sampling(folder):
    partial = folder / "synthetic.partial"
    return partial.exists() and partial.stat().st_size > 9_000 * 4 * 9 and not (folder / "synthetic.npz").exists()


def training_agent(folder):
    return (folder / "synthetic.npz").exists() and stage(folder)[0] == "agent" and stage(folder)[1] >= 450


def test_killed_run_equals_uninterrupted(inputs, tmp_path):
    """A run killed while it trains the diffusion model, samples, and trains the agent ends with the same numbers."""
    options = flags(
        env="Pendulum-v1", dataset_path=inputs / "data.npz", seed=1, diffusion_steps=800, diffusion_width=48,
        diffusion_depth=2, diffusion_batch_size=64, num_samples=30_500, sample_batch_size=1_000, updates=2_400,
        hidden_dim=24, batch_size=64, eval_every=300, eval_episodes=2, checkpoint_every=150,
    )  # fmt: skip
    subprocess.run(command(*options, "--out-dir", "whole"), cwd=tmp_path, capture_output=True, check=True, timeout=200)
    (whole,) = (tmp_path / "whole").iterdir()

    folder = wait_and_kill(command(*options), tmp_path, training_diffusion)
    resume = ["--resume", str(folder)]
    wait_and_kill(command(*resume), tmp_path, sampling)
    wait_and_kill(command(*resume), tmp_path, training_agent)
    subprocess.run(command(*resume), cwd=tmp_path, capture_output=True, check=True, timeout=200)

    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    for name in ("final_returns.npz", "synthetic.npz"):
        with np.load(folder / name) as a, np.load(whole / name) as b:
            assert a.files == b.files
            for key in a.files:
                np.testing.assert_array_equal(a[key], b[key], err_msg=f"{name}: {key}")
    for name in ("checkpoint.pt", "diffusion.pt"):
        a, b = (torch.load(f / name, weights_only=True) for f in (folder, whole))
        for state in (a, b):
            state.pop("seconds", None)
        assert_same_state(a, b, where=name)
    metrics = [
        [line for line in (f / "metrics.csv").read_text().splitlines() if ",perf/" not in line] for f in (folder, whole)
    ]
    assert metrics[0] == metrics[1] and len(metrics[1]) > 20


def test_metrics_cut_by_a_kill_are_repaired(inputs, tmp_path):
    options = dict(
        TINY, env="Pendulum-v1", dataset_path=str(inputs / "data.npz"), data="real", updates=300, eval_every=100
    )
    folder = run(tmp_path, **options)
    expected = [line for line in (folder / "metrics.csv").read_text().splitlines() if ",perf/" not in line]
    (folder / "checkpoint.pt").unlink()
    text = (folder / "metrics.csv").read_text()
    position = text.index("200,eval/return_std")
    (folder / "metrics.csv").write_text(text[: position + 12])
    for _ in range(2):  # the second time there is nothing left to do
        synther_td3bc.main(Args(resume=str(folder)))
        lines = (folder / "metrics.csv").read_text().splitlines()
        assert [line for line in lines if ",perf/" not in line] == expected
