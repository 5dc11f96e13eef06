"""Tests of what the scripts share: arguments, run folders and logs, what the agents learn from,
runs that were stopped. The offline scripts' copies are tested in synther_td3bc.py alone."""

import copy
import dataclasses
import json
import math
import random
import re
import shutil
import subprocess
import sys
import types
import typing
from pathlib import Path
from unittest.mock import Mock

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
import torch.nn as nn
import tyro
from helpers import assert_same_state, outcome, read_metrics, run, transitions, write

import edm
import synther_edac
import synther_iql
import synther_sac_online
import synther_td3bc
import synther_vd4rl

OFFLINE = [synther_td3bc, synther_iql, synther_edac]
SCRIPTS = [*OFFLINE, synther_sac_online, synther_vd4rl]
offline = pytest.mark.parametrize("script", OFFLINE, ids=lambda script: script.__name__)

# --- Arguments ---


def arguments(script):
    """{name: (type with its limits, default, help as tyro shows it)} of the command line."""
    source = Path(script.__file__).read_text() + Path(edm.__file__).read_text()
    headings = re.findall(r"\n    # ([A-Z].*)\n    \w+: ", source)
    hints = typing.get_type_hints(script.Args, include_extras=True)
    found = {}
    for field in dataclasses.fields(script.Args):
        help = tyro._docstrings.get_field_docstring(script.Args, field.name, ())
        assert help and not help.startswith(tuple(headings)), field.name
        found[field.name] = (hints[field.name], field.default, help)
    return found


def test_arguments_agree_and_have_help():
    """An argument of all scripts has one type. One of the offline scripts that stands before their
    agents' also has one place, one default and one help."""
    tables = [arguments(script) for script in SCRIPTS]
    for name in set.intersection(*map(set, tables)):
        assert len({typing.Optional[table[name][0]] for table in tables}) == 1, name
    shared = set.intersection(*map(set, tables[: len(OFFLINE)])) - {"exp_name"}
    first = [name for name in tables[0] if name in shared]
    for table in tables[1 : len(OFFLINE)]:
        assert [name for name in table if name in shared] == first
        for name in first[: first.index("updates")]:
            assert table[name] == tables[0][name]
    assert arguments(edm)


def test_sections_agree():
    """Arguments, agent, the rest: one order in all scripts."""
    for script, agent in zip(SCRIPTS, ("TD3+BC", "IQL", "EDAC", "SAC", "DrQ+BC and BC")):
        sections = re.findall("^# --- (.*?) -+$", Path(script.__file__).read_text(), re.M)
        shared = ["Arguments", agent, "Run folder", "Experiment"]
        assert sections[:2] + sections[-2:] == shared


IQL = dict(tau=0.005, expectile=0.7, beta=3, deterministic=False, normalize_reward=False)
IQL |= dict(updates=1_000_000, eval_episodes=10)
EDAC = dict(num_q=10, eta=1.0, updates=3_000_000, hidden_layers=3, hidden_dim=256)
EDAC |= dict(learning_rate=3e-4)
HOPPER = dict(tau=0.001, deterministic=True, normalize_reward=True)
PAPERS = [
    (synther_iql, "walker2d-medium-replay-v2 halfcheetah-medium-expert-v2 hopper-random-v2", IQL),
    (synther_iql, "hopper-medium-v2 hopper-medium-replay-v2 hopper-mixed-v2", IQL | HOPPER),
    (synther_iql, "hopper-medium-expert-v2", IQL | dict(expectile=0.5, beta=6)),
    (synther_iql, "maze2d-umaze-v1 maze2d-large-v1", IQL | dict(eval_episodes=100)),
    (synther_edac, "halfcheetah-medium-v2 walker2d-medium-replay-v2 walker2d-mixed-v2", EDAC),
    (synther_edac, "halfcheetah-medium-expert-v2 walker2d-medium-expert-v2", EDAC | dict(eta=5)),
    (synther_edac, "hopper-medium-v2 hopper-medium-replay-v2", EDAC | dict(num_q=50)),
    (synther_edac, "hopper-medium-expert-v2", EDAC | dict(num_q=50)),
    (synther_edac, "maze2d-umaze-v1 maze2d-large-v1", EDAC | dict(eta=0.1)),
]


@pytest.mark.parametrize("script, names, expected", PAPERS)
def test_hyperparameters_are_the_papers(script, names, expected):
    for name in names.split():
        assert vars(helpers.filled(script, env=name)).items() >= expected.items()


# --- Whole runs, in miniature ---

TINY = dict(device="cpu", diffusion_steps=300, diffusion_width=32, diffusion_depth=2)
TINY |= dict(diffusion_batch_size=64, num_samples=1_500, sample_batch_size=1_000, updates=200)
TINY |= dict(hidden_dim=16, batch_size=32, eval_every=100, eval_episodes=2, seed=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{script: folder of a small run of its default command}."""
    parent = tmp_path_factory.mktemp("runs")
    return {script: run(script, parent, subsample=2_000, **TINY) for script in OFFLINE}


@offline
def test_run_leaves_its_files_and_logs_every_key(folders, script):
    folder = folders[script]
    assert folder.name.startswith(f"quickstart__{script.__name__}__3__")
    files = "args.json metrics.csv checkpoint.pt diffusion.pt synthetic.npz final_returns.npz"
    files += " marginals.png learning_curve.png"
    assert {path.name for path in folder.iterdir()} == set(files.split())
    args = json.loads((folder / "args.json").read_text())
    unset = {name for name in args if args[name] is None}
    assert unset <= {"dataset_path", "wandb_entity", "resume", "synthetic_path", "subsample"}
    metrics = read_metrics(folder)
    keys = {"train/critic_loss", "train/actor_loss"}
    keys |= {f"diffusion/{name}" for name in ("loss", "marginal", "correlation", "terminals")}
    keys |= {f"eval/{name}" for name in ("return_mean", "return_std", "normalized_score")}
    keys |= {f"perf/{name}" for name in ("updates_per_sec", "samples_per_sec", "seconds")}
    assert {key for _, key in metrics} >= keys and all(map(math.isfinite, metrics.values()))
    assert metrics[300, "diffusion/loss"] < 1 and 0.5 < metrics[300, "diffusion/marginal"] <= 1
    final = np.load(folder / "final_returns.npz")
    returns = final["returns"]
    assert final["updates"].tolist() == [0, 100, 200] and returns.shape == (3, 2)
    scores = script.normalized_score("halfcheetah-v2", returns)
    np.testing.assert_array_equal(final["normalized_scores"], scores)
    assert (final["final_scores"] == scores[-1]).all()
    assert (final["final_returns"] == returns[-1]).all()
    for i, number in enumerate((0, 100, 200)):
        assert metrics[number, "eval/return_mean"] == pytest.approx(returns[i].mean())
        assert metrics[number, "eval/normalized_score"] == pytest.approx(scores[i].mean())


def test_scripts_leave_the_same_keys_and_samples(folders):
    """And the saved model makes the saved transitions."""
    first, *others = folders.values()
    data = edm.load_transitions(first / "synthetic.npz")
    model = edm.load_edm(first / "diffusion.pt")
    assert (model.mean[-1], model.std[-1]) == (0, 1) and (model.std[:-1] != 1).all()
    args = synther_td3bc.Args(**json.loads((first / "args.json").read_text()))
    real = synther_td3bc.load_real(args, [])
    rows = edm.generate_transitions(model, real.rows, 1_500, reward=real.reward)
    assert_same_state(edm.pack(**data), rows)
    keys = {key for _, key in read_metrics(first) if not key.startswith("train/")}
    for folder in others:
        own_keys = {key for _, key in read_metrics(folder)}
        assert {key for key in own_keys if not key.startswith("train/")} == keys
        assert_same_state(outcome(folder)["synthetic.npz"], outcome(first)["synthetic.npz"])


@pytest.mark.parametrize("script", [synther_iql, synther_edac])
def test_another_agent_on_the_same_samples(folders, tmp_path, script):
    """--synthetic-path with another script's samples gives the agent that the whole run gave."""
    path = folders[synther_td3bc] / "synthetic.npz"
    folder = run(script, tmp_path, subsample=2_000, synthetic_path=str(path), **TINY)
    assert not (folder / "diffusion.pt").exists() and not (folder / "synthetic.npz").exists()
    assert_same_state(*[outcome(own)["checkpoint.pt"] for own in (folder, folders[script])])


class Point(gym.Env):
    """A point on a line, moved by a tenth of the action. It should go to the middle."""

    observation_space = gym.spaces.Box(-2, 2, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1)
        return np.array([self.x, 0.5], np.float32), {}

    def step(self, action):
        self.x += 0.1 * float(action[0])
        return np.array([self.x, 0.5], np.float32), -abs(self.x), abs(self.x) > 1.2, False, {}


class GlobalPoint(Point):
    """It begins where Python's and numpy's global generators say."""

    def reset(self, **options):
        self.x = random.random() - np.random.random()
        return np.array([self.x, 0.5], np.float32), {"success": False}


gym.register("Point-v0", Point, max_episode_steps=20)
gym.register("Global-v0", GlobalPoint, max_episode_steps=20)
gym.register("antmaze-foo-v0", Point, max_episode_steps=20)  # as OGBench's


@pytest.fixture(scope="module")
def point(tmp_path_factory):
    """Files of random transitions, and of those that a diffusion model generates from them."""
    folder = tmp_path_factory.mktemp("point")
    data = write(folder / "data.npz", helpers.collect_random(gym.make("Point-v0"), 3_000))
    options = dict(diffusion_steps=800, diffusion_width=64, diffusion_depth=2, diffusion_lr=3e-3)
    generated = str(folder / "generated.npz")
    edm.main(edm.Args(data=data, out=generated, num_samples=5_000, device="cpu", **options))
    return dict(env="Point-v0", dataset_path=data, synthetic_path=generated, num_samples=5_000)


@offline
def test_agent_learns_from_generated_transitions(tmp_path, point, script):
    """From random data alone, each agent comes closer to the best policy of a simple task."""
    options = dict(updates=600, hidden_dim=32, batch_size=64, learning_rate=3e-3, tau=0.02)
    options |= dict(discount=0.8, eval_every=600, eval_episodes=20, device="cpu")
    of_agents = [dict(alpha=100.0), dict(beta=30.0), dict(eta=0.1, num_q=3)]
    folder = run(script, tmp_path, **options | point | of_agents[OFFLINE.index(script)])
    trained = np.load(folder / "final_returns.npz")["returns"][-1].mean()
    envs = [script.make_env("Point-v0") for _ in range(20)]
    torch.manual_seed(0)
    chance, _ = script.evaluate(lambda obs: 2 * torch.rand_like(obs[:, :1]) - 1, envs, seed=0)
    best, _ = script.evaluate(lambda obs: (-10 * obs[:, :1]).clamp(-1, 1), envs, seed=0)
    share = (trained - chance.mean()) / (best.mean() - chance.mean())
    assert share > 0.7, share


def record(monkeypatch, script):
    """A list that fills with (agent, the rows that it learns from), of each run."""
    seen = []
    see = lambda args, agent, rows, loss_sums: seen.append((agent, rows.clone()))  # noqa: E731
    helpers.watch(monkeypatch, script, "make_update", see)
    return seen


@offline
@pytest.mark.parametrize("data", ["real", "synther", "mixed"])
def test_agent_gets_rows_and_observations_in_the_same_units(tmp_path, monkeypatch, script, data):
    """States are scaled by the real rows' mean and std, but for EDAC. Mixed are half of each."""
    real = transitions(400, act_dim=1)
    generated = transitions(1_000, act_dim=1, seed=1)
    for arrays, mean, std in ((real, 5, 2), (generated, 9, 4)):
        for key in ("observations", "next_observations"):
            arrays[key] = arrays[key] * std + mean
    seen = record(monkeypatch, script)
    options = dict(env="Pendulum-v1", dataset_path=write(tmp_path / "real.npz", real), data=data)
    if data != "real":
        options["synthetic_path"] = write(tmp_path / "generated.npz", generated)
    run(script, tmp_path, **TINY | options | dict(updates=2, eval_episodes=1))
    real = edm.pack(**real)
    generated = edm.pack(**generated)
    mixed = torch.cat([real, generated[:400]])
    expected = dict(real=real, synther=generated, mixed=mixed)[data].clone()
    raw_s = expected[:, :3].clone()
    if script is not synther_edac:
        for s in (expected[:, :3], expected[:, 5:8]):
            s.sub_(real[:, :3].mean(0)).div_(real[:, :3].std(0, unbiased=False) + 1e-3)
    ((agent, rows),) = seen
    torch.testing.assert_close(rows, expected)
    of_rows = copy.deepcopy(agent.actor)
    for name, buffer in of_rows.named_buffers():
        buffer.fill_(float(name == "obs_std"))  # acts on the states of rows
    torch.testing.assert_close(agent.actor.act(raw_s), of_rows.act(rows[:, :3]))


@offline
@pytest.mark.parametrize("data", ["real", "mixed"])
@pytest.mark.parametrize("env", ["antmaze-umaze-v2", "tests.test_siblings:antmaze-foo-v0"])
def test_rewards_of_d4rls_antmaze_are_shifted(tmp_path, monkeypatch, point, script, data, env):
    """And those of no other, which has no score either. The real rows themselves stay as read."""
    loaded = []
    load_real = script.load_real

    def recording(*args):
        loaded.append(load_real(*args))
        return loaded[-1]

    monkeypatch.setattr(script, "load_real", recording)
    seen = record(monkeypatch, script)
    is_d4rls = env == "antmaze-umaze-v2"
    options = TINY | point | dict(env=env, data=data, updates=2, eval_episodes=int(not is_d4rls))
    options["synthetic_path"] = None if data == "real" else point["synthetic_path"]
    folder = run(script, tmp_path, **options)
    real = edm.pack(**edm.load_transitions(point["dataset_path"]))
    for dataset in loaded:
        assert torch.equal(dataset.rows, real)
    ((_, rows),) = seen
    assert torch.equal(rows[: len(real), 3], real[:, 3] - int(is_d4rls))
    if not is_d4rls:
        assert np.isnan(np.load(folder / "final_returns.npz")["final_scores"]).all()


@offline
def test_actor_of_a_checkpoint_acts_as_in_the_run(tmp_path, monkeypatch, point, script):
    """Alone, on raw observations. Dropout is on in training, and off in evaluations."""
    actor_class = getattr(script, "Actor", None) or script.TanhGaussianActor
    init = actor_class.__init__

    def with_dropout(self, *sizes):
        init(self, *sizes)
        self.net[1] = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))

    monkeypatch.setattr(actor_class, "__init__", with_dropout)
    seen = record(monkeypatch, script)
    folder = run(script, tmp_path, **TINY | point | dict(updates=5, eval_every=5))
    assert seen[0][0].actor.training
    sizes = [2, 1, 16, seen[0][0].args.hidden_layers, 1.0]
    actor = actor_class(*sizes, False) if script is synther_iql else actor_class(*sizes)
    agent = edm.load_torch(folder / "checkpoint.pt")["agent"]
    actor.load_state_dict({k[6:]: x for k, x in agent.items() if k.startswith("actor.")})
    envs = [script.make_env("Point-v0") for _ in range(2)]
    returns, _ = script.evaluate(actor.eval().act, envs, seed=3)
    np.testing.assert_array_equal(np.load(folder / "final_returns.npz")["final_returns"], returns)


@offline
def test_diverging_agent_stops_the_run(tmp_path, point, script):
    with pytest.raises(edm.RunError, match="a loss became NaN or Inf .*100"):
        run(script, tmp_path, **TINY | point | dict(learning_rate=1e30))


@offline
@pytest.mark.parametrize("env", ["maze2d-umaze-v1", "antmaze-umaze-v2"])
def test_mazes_run_from_data_to_score(tmp_path, script, env):
    data = write(tmp_path / "data.npz", helpers.collect_random(script.make_env(env), 300))
    options = dict(env=env, dataset_path=data, data="real", updates=5, eval_episodes=1)
    folder = run(script, tmp_path / "runs", **TINY | options)
    low, high = (23.85, 161.86) if env.startswith("maze2d") else (0, 1)
    final = np.load(folder / "final_returns.npz")
    scores = 100 * (final["returns"] - low) / (high - low)
    np.testing.assert_allclose(final["normalized_scores"], scores)


def test_minari_dataset_runs(tmp_path, monkeypatch, capsys):
    """Its environment comes with it, with all its arguments. An unknown score is not printed."""
    envs = dict(env=gym.make("Pendulum-v1", g=2.0))
    envs["eval_env"] = gym.make("Pendulum-v1", g=3.0, max_episode_steps=7)
    helpers.make_minari(monkeypatch, tmp_path / "minari", **envs)
    env = synther_td3bc.make_env("test/two-v0")
    assert (env.unwrapped.g, env.spec.max_episode_steps) == (3, 7)
    folder = run(synther_td3bc, tmp_path, **TINY | dict(env="test/two-v0", data="real", updates=5))
    assert folder.name.startswith("test-two-v0__")
    assert capsys.readouterr().out.splitlines()[-2].startswith("return")
    final = np.load(folder / "final_returns.npz")
    assert -7 * 17 < final["returns"].min() and final["returns"].max() < -1  # 7 steps
    assert np.isnan(final["normalized_scores"]).all()


def test_beginnings_of_episodes_are_known_in_a_subset(tmp_path):
    """They are found before the subset is drawn, when each row still follows the one before it."""
    s = np.arange(300.0)[:, None]
    next_s = s + 1
    next_s[9::10] = -1  # ends of episodes of ten rows, by a time limit
    arrays = (s, 0 * s, 0 * s[:, 0], next_s, s[:, 0] < 0)
    path = write(tmp_path / "data.npz", dict(zip(edm.KEYS, arrays)))
    for subsample, count in ((None, 300), (200, 200), (0.5, 150)):
        args = synther_td3bc.Args(env="robot", dataset_path=path, subsample=subsample)
        real = synther_td3bc.load_real(args, [])
        assert len(real.rows) == count and torch.equal(real.starts, real.rows[:, 0] % 10 == 0)


def test_bound_of_actions_is_the_environments_or_the_datas(tmp_path, capsys):
    data = transitions(100, act_dim=3) | {"actions": np.full((100, 3), [2.1, -0.01, 0])}
    args = synther_td3bc.Args(env="robot", dataset_path=write(tmp_path / "data.npz", data))
    bounds = synther_td3bc.load_real(args, []).max_action
    torch.testing.assert_close(bounds.data, torch.tensor([2.1, 0.01, 1.0]))
    assert "differ in scale" in capsys.readouterr().out
    state = synther_td3bc.Actor(3, 3, 8, 2, bounds).state_dict()
    assert torch.equal(state["max_action"], bounds)
    data["actions"] = data["actions"][:, :1]
    args = synther_td3bc.Args(env="Pendulum-v1", dataset_path=write(tmp_path / "data.npz", data))
    assert "bound" not in "".join(capsys.readouterr())
    envs = [synther_td3bc.make_env("Pendulum-v1")]
    assert synther_td3bc.load_real(args, envs).max_action == 2
    assert re.search("actions are beyond .*2.0", "".join(capsys.readouterr()))


@offline
def test_robot_without_environment_gets_an_agent(tmp_path, monkeypatch, script):
    path = write(tmp_path / "data.npz", transitions(200, obs_dim=4, act_dim=3))
    options = dict(env="my-robot", dataset_path=path, data="real", eval_episodes=0, updates=5)
    seen = record(monkeypatch, script)
    folder = run(script, tmp_path / "runs", **TINY | options)
    assert seen[0][0].actor.act(torch.zeros(5, 4)).shape == (5, 3)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".csv", ".pt"}


def test_constant_column_may_vary_in_the_environment():
    """It is not divided by almost nothing, so that an agent that meets another value can act."""
    rows = edm.pack(**transitions(100))
    rows[:, 1] = 1e4
    rows[:, 2] *= 1e-7  # this one varies
    real = types.SimpleNamespace(rows=rows, obs_dim=3)
    actor = synther_td3bc.Actor(3, 2, 8, 2, 1.0)
    synther_td3bc.normalize_states(actor, rows.clone(), real)
    expected = rows[:, :3].std(0, unbiased=False) + 1e-3
    expected[1] = 1
    torch.testing.assert_close(actor.obs_std, expected)


def test_tracker_that_fails(tmp_path, monkeypatch):
    """Before the run, it is one sentence and nothing is made. In the run, it is passed over."""

    error = type("Error", (Exception,), {})
    fake = Mock(Error=error)
    fake.init.side_effect = fake.log.side_effect = error("no API key")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    args = synther_td3bc.Args(out_dir=str(tmp_path / "runs"), track=True)
    with pytest.raises(edm.RunError, match="--track: no API key"):
        synther_td3bc.Run(args)
    assert not (tmp_path / "runs").exists()
    fake.init.side_effect = None
    own_run = synther_td3bc.Run(args)
    own_run.log(5, {"train/loss": 2.0})
    assert read_metrics(own_run.folder) == {(5, "train/loss"): 2}


def test_two_runs_of_one_second_have_their_folders(tmp_path, monkeypatch):
    times = iter(1_800_000_000 + np.arange(1_000) / 100)
    monkeypatch.setattr("time.time", lambda: next(times))
    for _ in range(2):
        synther_td3bc.Run(synther_td3bc.Args(out_dir=str(tmp_path)))
    assert len(list(tmp_path.glob("quickstart__synther_td3bc__0__1800000000*"))) == 2


@pytest.mark.parametrize("script", [synther_td3bc, synther_sac_online])
def test_environment_without_time_limit_or_that_fails(monkeypatch, capsys, script):
    spec = gym.envs.registration.EnvSpec("Endless-v0", Point)
    monkeypatch.setitem(gym.registry, "Endless-v0", spec)
    env = script.make_env("Endless-v0")
    assert "Endless-v0 has no time limit" in "".join(capsys.readouterr())
    distance = abs(env.reset(seed=0)[0][0])
    returns = script.evaluate(lambda obs: torch.zeros(len(obs), 1), [env], seed=0)[0]
    assert returns == pytest.approx(-1_000 * distance)
    spec.entry_point = lambda: 1 / 0
    with pytest.raises(edm.RunError, match="cannot make .* Endless-v0: division by zero"):
        script.make_env("Endless-v0")


# --- Runs that were stopped ---

RESUMED = dict(env="Pendulum-v1", device="cpu", seed=1, diffusion_steps=240, checkpoint_every=80)
RESUMED |= dict(diffusion_width=16, diffusion_depth=1, num_samples=500, updates=240)
RESUMED |= dict(hidden_dim=16, batch_size=32, eval_every=60, eval_episodes=1)
STOPS = [
    (edm.EDM, "loss", 45, dict(stage="diffusion", step=45)),
    (synther_td3bc.TD3BC, "update_critic", 32, dict(stage="agent", update=32)),
]


@offline
def test_killed_run_equals_uninterrupted(tmp_path, monkeypatch, capsys, script):
    """A run that ended when a file is replaced, or by a signal, goes on to the same numbers."""
    monkeypatch.setattr(edm, "c2st", lambda *rows: 0.5)  # takes half of the time
    data = write(tmp_path / "data.npz", helpers.collect_random(gym.make("Pendulum-v1"), 300))
    with monkeypatch.context() as patch:
        helpers.copy_before_writes(patch, tmp_path / "killed")
        whole = run(script, tmp_path / "whole", dataset_path=data, **RESUMED)
    killed = sorted((tmp_path / "killed").iterdir(), key=lambda path: int(path.name))
    assert not list(killed[2].glob("*.npz")) and list(killed[-4].glob("*.npz"))
    plotting = [folder for folder in killed if not (folder / "marginals.png").exists()][-1]
    assert (plotting / "synthetic.npz").exists() and (plotting / "diffusion.pt").exists()
    resumed = killed[-5:-4]
    if script is synther_td3bc:
        resumed = {*killed[1::2], plotting}
        options = RESUMED | dict(dataset_path=data)
        for stop in STOPS:
            resumed.add(helpers.stopped_run(monkeypatch, script, tmp_path, *stop, **options))
    for folder in resumed:
        with open(folder / "metrics.csv", "a") as f:  # came after the checkpoint, cut by the kill
            f.write("240,eval/return_mean,1e9\n50,train/cri")
        helpers.command(monkeypatch, script, resume=folder)
        assert_same_state(outcome(folder), outcome(whole))
    with np.load(data) as f:  # the file is replaced in the meantime
        write(Path(data), dict(f) | {"terminals": np.arange(300) == 7})
    for folder in (killed[3], killed[-1]):  # in the diffusion model's stage, in the agent's
        with pytest.raises(SystemExit):
            helpers.command(monkeypatch, script, resume=folder)
        assert "checkpoint.pt is of other data" in capsys.readouterr().err


def test_ended_run_is_resumed_elsewhere(tmp_path, monkeypatch, capsys, point):
    """With relative paths, --device auto, a log that is cut or missing. Samples of other data are
    made again if the checkpoint has been deleted, and refused if it has not."""
    monkeypatch.chdir(tmp_path)
    options = dict(env="Point-v0", dataset_path=shutil.copy(point["dataset_path"], "data.npz"))
    folder = run(synther_td3bc, tmp_path, **TINY | options | dict(updates=5))
    log = (folder / "metrics.csv").read_bytes()
    samples = (folder / "synthetic.npz").read_bytes()
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(tmp_path))
    for kept in (log, log[:60], b"step"):
        (folder / "metrics.csv").write_bytes(kept)
        helpers.command(monkeypatch, synther_td3bc, resume=f"~/{folder.name}", device="auto")
        lines = log.splitlines()[: max(kept.count(b"\n"), 1)]
        assert (folder / "metrics.csv").read_bytes().splitlines() == lines
    shutil.copy(point["synthetic_path"], tmp_path / "data.npz")
    (folder / "checkpoint.pt").unlink()
    helpers.command(monkeypatch, synther_td3bc, resume=folder)
    assert (folder / "synthetic.npz").read_bytes() != samples
    (folder / "synthetic.npz").write_bytes(samples)
    with pytest.raises(SystemExit):
        helpers.command(monkeypatch, synther_td3bc, resume=folder)
    assert "checkpoint.pt is of other samples" in capsys.readouterr().err


@pytest.mark.parametrize("script", [synther_td3bc, synther_sac_online])
def test_run_is_of_one_process(tmp_path, monkeypatch, capsys, point, script):
    """Until that is killed. Environments may draw from the global generators."""
    options = dict(env="Global-v0", eval_episodes=2, device="cpu", hidden_dim=16)
    online = dict(algo="sac", total_steps=30, learning_starts=20, eval_every=10)
    offline = dict(dataset_path=point["dataset_path"], data="real", updates=5)
    options |= offline if script is synther_td3bc else online
    folder, again = [run(script, tmp_path, **options) for _ in range(2)]
    assert_same_state(*[outcome(own)["final_returns.npz"] for own in (folder, again)])
    path = str(folder / "metrics.csv")
    code = f"import edm; file = edm.open_alone({path!r}); print(flush=True); input()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=Path(edm.__file__).parent, **pipes) as other:
        other.stdout.readline()
        with pytest.raises(SystemExit):
            helpers.command(monkeypatch, script, resume=folder)
        assert f"{path} is in use by another process" in capsys.readouterr().err
        other.kill()
    helpers.command(monkeypatch, script, resume=folder)


LAST_CHECK = "--data mixed needs 1000 rows, not 99"  # nothing is made before it
BAD_COMMANDS = {
    "(unknown dataset|cannot make the environment) walker3d": dict(env="walker3d-medium-v2"),
    "cannot make the environment no_such_module": dict(env="no_such_module:Env-v0"),
    "cannot make the environment antmaze-medium-v2": dict(env="antmaze-medium-v2"),
    "has .3, 1. observation and action dimensions, not .11, 3.": dict(env="Hopper-v4"),
    "--dataset-path names the file, --env where": dict(env="quickstart"),
    "--dataset-path names the file": dict(env="sub/data.hdf5"),
    "No such file|cannot read": dict(dataset_path="nothing.npz"),
    "NaN": dict(dataset_path="bad.npz"),
    "--subsample cannot be -0.5": dict(subsample=-0.5),
    "--subsample asks for 2000 transitions, not 2 to 1000": dict(subsample=2_000),
    "--updates cannot be 0": dict(updates=0),
    "--eval-episodes cannot be -1": dict(eval_episodes=-1),
    "--seed cannot be -1": dict(seed=-1),
    "--diffusion-seed cannot be 9223372036854775808": dict(diffusion_seed=2**63),
    "no use with --data real": dict(data="real", synthetic_path="data.npz"),
    "other.npz has .4, 1. observation": dict(synthetic_path="other.npz"),
    LAST_CHECK: dict(data="mixed", synthetic_path="few.npz"),
    "GPU": dict(device="cuda"),
    "File exists|Not a directory": dict(out_dir="data.npz"),
    "nothing is not .*a run folder": dict(resume="nothing"),
    "other_run is not .*a run folder": dict(resume="other_run"),
    "run was started with another": dict(resume="run", seed=2),
}


@pytest.mark.parametrize(
    "script, message",
    [(synther_td3bc, message) for message in BAD_COMMANDS]
    + [(synther_iql, LAST_CHECK), (synther_edac, LAST_CHECK)],
)
def test_bad_command_ends_in_one_sentence(tmp_path, monkeypatch, capsys, script, message):
    if torch.cuda.is_available() and message == "GPU":
        pytest.skip("there is a GPU")
    write(tmp_path / "data.npz", transitions(1_000, act_dim=1))
    write(tmp_path / "few.npz", transitions(99, act_dim=1))
    write(tmp_path / "other.npz", transitions(100, obs_dim=4, act_dim=1))
    write(tmp_path / "bad.npz", transitions(20, act_dim=1) | {"rewards": np.full(20, math.nan)})
    for name, args in (("run", script.Args()), ("other_run", synther_sac_online.Args())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps(vars(args)))
    options = dict(env="Pendulum-v1", dataset_path="data.npz", updates=5, diffusion_steps=5)
    options |= dict(num_samples=100, eval_episodes=1, device="cpu")
    options |= BAD_COMMANDS[message]
    helpers.assert_refused(monkeypatch, capsys, tmp_path, script, message, **options)
