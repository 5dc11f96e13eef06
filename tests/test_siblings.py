"""Tests of what the scripts share: arguments, run folders and logs, what the agents learn from, runs that were stopped.

Whole runs are of the three offline scripts. test_synther_sac_online.py and test_synther_vd4rl.py have the others'.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import assert_same_state, collect_random, command, copy_before_writes, make_minari, read_metrics, run
from helpers import transitions, write

import edm
import synther_edac
import synther_iql
import synther_sac_online
import synther_td3bc
import synther_vd4rl

OFFLINE = [synther_td3bc, synther_iql, synther_edac]
SCRIPTS = [*OFFLINE, synther_sac_online, synther_vd4rl]
AGENTS = {synther_td3bc: synther_td3bc.TD3BC, synther_iql: synther_iql.IQL, synther_edac: synther_edac.EDAC}
UPDATES = {synther_td3bc: "update_critic", synther_iql: "update", synther_edac: "update"}
offline = pytest.mark.parametrize("script", OFFLINE, ids=lambda script: script.__name__)


# --- Arguments --------------------------------------------------------------------------------------------------------


def arguments(script):
    """{name: (type, default, docstring)} of the command line, docstrings from the source."""
    source = Path(script.__file__).read_text() + Path(edm.__file__).read_text()
    hints, found = typing.get_type_hints(script.Args), {}
    for field in dataclasses.fields(script.Args):
        text = source[source.index(f"\n    {field.name}: ") :].split('"""')[1]
        found[field.name] = hints[field.name], field.default, " ".join(text.split())
    return found


def test_arguments_agree():
    """An argument of all scripts has one kind of value. One of the offline scripts also has one place and one text."""
    tables = {script: arguments(script) for script in SCRIPTS}
    for name in set.intersection(*map(set, tables.values())):
        kinds = {typing.Optional[table[name][0]] for table in tables.values()}
        assert len(kinds) == 1 and all(table[name][2] for table in tables.values()), name
    shared = [name for name in tables[synther_td3bc] if all(name in tables[script] for script in OFFLINE)]
    first_of_agent = shared.index("updates")
    assert all([name for name in tables[script] if name in shared] == shared for script in OFFLINE)
    for name in shared[:first_of_agent]:
        texts = {re.sub(r"synther_\w+", "", str(tables[script][name])) for script in OFFLINE}
        assert len(texts) == 1, texts


def test_sections_agree():
    """Docstring, imports, arguments, agent, the rest: one order in all scripts."""
    for script, agent in zip(SCRIPTS, ("TD3+BC", "IQL", "EDAC", "SAC", "DrQ+BC and BC")):
        sections = re.findall("^# --- (.*?) -+$", Path(script.__file__).read_text(), re.M)
        others = [name for name in sections if name not in ("Replay buffer", "Data")]
        assert others[:2] == ["Arguments", agent] and others[-1] == "Experiment" and len(others) == 4


def test_defaults_train_one_diffusion_model():
    """The three offline scripts train the same diffusion model for a dataset, so that any can use another's samples."""
    levels = ("random", "medium", "medium-replay", "mixed", "expert", "medium-expert", "full-replay")
    names = [f"{env}-{level}-v2" for env in ("halfcheetah", "hopper", "walker2d") for level in levels]
    for name in (*names, "maze2d-umaze-v1", "quickstart"):
        for num_rows in (1_000, 1_000_000):
            settings = []
            for script in OFFLINE:
                args = script.Args(env=name)
                for pattern, values in script.DEFAULTS.items():
                    if re.match(pattern, name):
                        edm.fill(args, values)
                edm.resolve(args, num_rows, name)
                settings.append(
                    {field.name: getattr(args, field.name) for field in dataclasses.fields(edm.DiffusionArgs)}
                )
            assert settings[0] == settings[1] == settings[2]


# --- Whole runs, in miniature -----------------------------------------------------------------------------------------

TINY = dict(
    device="cpu", diffusion_steps=300, diffusion_width=32, diffusion_depth=2, diffusion_batch_size=64,
    num_samples=1_500, sample_batch_size=1_000, updates=200, hidden_dim=16, batch_size=32, eval_every=100,
    eval_episodes=2, seed=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{script: folder of a small run of its default command}."""
    return {script: run(script, tmp_path_factory.mktemp("runs"), subsample=2_000, **TINY) for script in OFFLINE}


@offline
def test_run_folder_and_log(folders, script):
    folder = folders[script]
    assert folder.name.startswith(f"quickstart__{script.__name__}__3__")
    files = "args.json metrics.csv checkpoint.pt diffusion.pt synthetic.npz final_returns.npz learning_curve.png"
    assert {path.name for path in folder.iterdir()} == {*files.split(), "marginals.png"}
    assert all((folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("learning_curve", "marginals"))
    args = json.loads((folder / "args.json").read_text())
    unset = {name for name in args if args[name] is None}
    assert unset <= {"dataset_path", "wandb_entity", "resume", "synthetic_path"} and args["diffusion_width"] == 32
    metrics = read_metrics(folder)
    assert {key for _, key in metrics} >= {f"train/{name}" for name in AGENTS[script].LOSSES} | {
        "diffusion/loss", "diffusion/marginal", "diffusion/correlation", "diffusion/terminals", "eval/return_mean",
        "eval/return_std", "eval/normalized_score", "perf/updates_per_sec", "perf/samples_per_sec", "perf/seconds",
    }  # fmt: skip
    assert all(map(math.isfinite, metrics.values()))
    assert metrics[300, "diffusion/loss"] < 1 and 0.5 < metrics[300, "diffusion/marginal"] <= 1
    with np.load(folder / "final_returns.npz") as final:
        updates, returns, scores = final["updates"].tolist(), final["returns"], final["normalized_scores"]
        assert np.array_equal(final["final_returns"], returns[-1]) and np.array_equal(final["final_scores"], scores[-1])
    assert updates == [0, 100, 200] and returns.shape == (3, 2)
    np.testing.assert_allclose(scores, script.normalized_score("HalfCheetah-v4", returns))
    for i, update in enumerate(updates):
        for key, value in dict(return_mean=returns[i].mean(), normalized_score=scores[i].mean()).items():
            assert metrics[update, f"eval/{key}"] == pytest.approx(value)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["agent"] and len(checkpoint["obs_mean"]) == len(checkpoint["obs_std"]) == 17


def test_scripts_leave_the_same_keys_and_samples(folders):
    """And the saved model made the saved transitions."""
    (first, metrics), *others = ((folder, {key for _, key in read_metrics(folder)}) for folder in folders.values())
    data = edm.load_transitions(first / "synthetic.npz")
    model = edm.load_edm(first / "diffusion.pt")
    assert (model.mean[-1], model.std[-1]) == (0, 1) and (model.std[:-1] != 1).all()  # all but d are standardised
    assert_same_state(
        edm.pack(**data)[:, :-1], edm.generate(model, 1_500, edm.DiffusionArgs(sample_batch_size=1_000))[:, :-1]
    )
    for folder, keys in others:
        assert {key for key in keys ^ metrics if not key.startswith("train/")} == set()
        for key, x in edm.load_transitions(folder / "synthetic.npz").items():
            np.testing.assert_array_equal(x, data[key])


@offline
def test_another_agent_on_the_same_samples(folders, tmp_path, script):
    """--synthetic-path with the samples of another script gives the agent that the whole run gave."""
    path = folders[synther_td3bc] / "synthetic.npz"
    folder = run(script, tmp_path, subsample=2_000, synthetic_path=str(path), **TINY)
    assert not (folder / "diffusion.pt").exists() and not (folder / "synthetic.npz").exists()
    a, b = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, folders[script]))
    for state in (a, b):
        del state["seconds"], state["log_size"]
    assert_same_state(a, b)


class Point(gym.Env):
    """A point on a line that moves by a tenth of the action and should be in the middle. It starts anywhere."""

    observation_space = gym.spaces.Box(-2, 2, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1)
        return np.array([self.x, 0.5], np.float32), {}

    def step(self, action):
        self.x += 0.1 * float(action[0])
        return np.array([self.x, 0.5], np.float32), -abs(self.x), abs(self.x) > 1.2, False, {}


gym.register("Point-v0", Point, max_episode_steps=20)


@pytest.fixture(scope="module")
def point(tmp_path_factory):
    """Files of random transitions, with terminals, and of transitions that a diffusion model generates from them."""
    folder = tmp_path_factory.mktemp("point")
    write(folder / "data.npz", collect_random("Point-v0", 5_000))
    options = dict(num_samples=10_000, diffusion_steps=1_500, diffusion_width=64, diffusion_depth=2, diffusion_lr=3e-3)
    edm.main(edm.Args(data=str(folder / "data.npz"), out=str(folder / "generated.npz"), device="cpu", **options))
    return folder


@offline
def test_agent_learns_from_generated_transitions(tmp_path, point, script):
    """From random data alone, each agent comes closer to the best policy of a simple task."""
    options = dict(
        env="Point-v0", dataset_path=str(point / "data.npz"), synthetic_path=str(point / "generated.npz"),
        num_samples=10_000, updates=2_000, hidden_dim=64, batch_size=128, learning_rate=1e-3, tau=0.02, discount=0.8,
        eval_every=2_000, eval_episodes=20, device="cpu",
    )  # fmt: skip
    options |= {
        synther_td3bc: dict(alpha=100.0),
        synther_iql: dict(beta=30.0),
        synther_edac: dict(eta=0.1, num_critics=3, updates=1_500),
    }[script]
    trained = np.load(run(script, tmp_path, **options) / "final_returns.npz")["returns"][-1].mean()
    envs = [script.make_env("Point-v0") for _ in range(20)]
    torch.manual_seed(0)
    chance = script.evaluate(lambda obs: 2 * torch.rand_like(obs[:, :1]) - 1, envs, seed=0).mean()
    best = script.evaluate(lambda obs: (-10 * obs[:, :1]).clamp(-1, 1), envs, seed=0).mean()
    assert (trained - chance) / (best - chance) > 0.7, (chance, trained, best)


def record(monkeypatch, script):
    """Lists of the batches that the script's agents learn from and of the agents, which fill as runs go on."""
    batches, agents, cls = [], [], AGENTS[script]
    update, init = getattr(cls, UPDATES[script]), cls.__init__
    monkeypatch.setattr(cls, UPDATES[script], lambda self, batch: batches.append(batch.clone()) or update(self, batch))
    monkeypatch.setattr(cls, "__init__", lambda self, *args: agents.append(self) or init(self, *args))
    return batches, agents


@offline
@pytest.mark.parametrize("data", ["real", "synther", "mixed"])
def test_what_the_agent_gets(tmp_path, monkeypatch, script, data):
    """States, also those it acts on, are scaled by the real rows' statistics, but for EDAC.

    Rewards tell real (1), generated (2) and surplus generated (3) rows apart.
    """
    rng = np.random.default_rng(0)

    def rows(n, mean, std, rewards):
        states = rng.standard_normal((2, n, 3)) * std + mean
        actions, terminals = rng.uniform(-2, 2, (n, 1)), rng.random(n) < 0.2
        return dict(zip(edm.KEYS, (states[0], actions, rewards, states[1], terminals)))

    real = write(tmp_path / "real.npz", rows(400, 5, 2, np.ones(400)))
    generated = write(tmp_path / "generated.npz", rows(1_000, 9, 4, np.repeat([2.0, 3.0], [400, 600])))
    acted_on, probe = [], torch.tensor([[5.0, 5.0, 5.0], [7.0, 7.0, 7.0]])

    def evaluate(policy, envs, seed):
        acted_on.append(policy(probe))
        return np.zeros(1)

    monkeypatch.setattr(script, "evaluate", evaluate)
    batches, agents = record(monkeypatch, script)
    options = dict(synthetic_path=None if data == "real" else generated, updates=60, hidden_dim=8, eval_episodes=1)
    run(script, tmp_path, env="Pendulum-v1", dataset_path=real, data=data, device="cpu", **options)
    seen = torch.cat(batches)
    shares = [(seen[:, 4] == reward).float().mean().item() for reward in (1, 2, 3)]
    assert shares == pytest.approx(
        {"real": [1, 0, 0], "synther": [0, 0.4, 0.6], "mixed": [0.5, 0.5, 0]}[data], abs=0.03
    )
    mean, std = (0, 1) if script is synther_edac else (5, 2)  # what is subtracted, and divided by
    for part, center, spread in ((seen[seen[:, 4] == 1], 5, 2), (seen[seen[:, 4] > 1], 9, 4)):
        for states in (part[:, :3], part[:, 5:8]) if len(part) else ():
            assert states.mean() == pytest.approx((center - mean) / std, abs=0.3)
            assert states.std() == pytest.approx(spread / std, rel=0.1)
    assert set(seen[:, -1].tolist()) == {0, 1} and 0.15 < seen[:, -1].mean() < 0.25
    with torch.no_grad():
        torch.testing.assert_close(acted_on[-1], agents[0].actor((probe - mean) / std), atol=0.1, rtol=0)


@pytest.mark.parametrize("script", [synther_td3bc, synther_iql])
def test_augmentation_is_in_units_of_the_states(tmp_path, monkeypatch, script):
    """Additive noise has a tenth of each state's standard deviation."""
    data = transitions(300, act_dim=1)
    data["observations"] = data["next_observations"] = data["observations"] * [1.0, 10.0, 100.0]
    batches, _ = record(monkeypatch, script)
    options = dict(env="Pendulum-v1", dataset_path=write(tmp_path / "data.npz", data), data="real", updates=40)
    run(script, tmp_path, **options, hidden_dim=8, eval_episodes=0, device="cpu", augment="additive")
    seen = torch.cat(batches)
    torch.testing.assert_close(seen[:, :3], seen[:, 5:8])  # one noise for s and s'
    states = torch.from_numpy(data["observations"]).float()
    states = (states - states.mean(0)) / (states.std(0, unbiased=False) + 1e-3)
    index = (seen[:, 4:5] - torch.from_numpy(data["rewards"]).float()).abs().argmin(1)  # rewards tell which row it was
    torch.testing.assert_close((seen[:, :3] - states[index]).std(0), torch.full((3,), 0.1), atol=5e-3, rtol=0)


def test_order_of_td3bcs_updates(tmp_path, monkeypatch):
    """The actor follows every policy_freq-th critic update, on its batch, which is augmented before both."""
    updates = []

    def record_too(name):
        update = getattr(synther_td3bc.TD3BC, f"update_{name}")
        recording = lambda self, batch: updates.append((name, batch.clone())) or update(self, batch)  # noqa: E731
        monkeypatch.setattr(synther_td3bc.TD3BC, f"update_{name}", recording)

    record_too("critic")
    record_too("actor")
    data = transitions(300, act_dim=1)
    data["next_observations"] = data["observations"] + 1
    options = dict(env="Pendulum-v1", dataset_path=write(tmp_path / "data.npz", data), data="real", updates=10)
    run(synther_td3bc, tmp_path, **options, policy_freq=3, eval_episodes=0, device="cpu", augment="dynamics")
    assert [name for name, _ in updates] == 3 * ["critic", "critic", "critic", "actor"] + ["critic"]
    (_, third), (_, of_actor), (_, fourth) = updates[2:5]
    assert torch.equal(third, of_actor) and not torch.equal(of_actor, fourth)
    factors = (of_actor[:, 5:8] - of_actor[:, :3])[:, 0]
    assert 0.2 < factors.std() / factors.mean() < 0.4  # uniform from 0.5 to 1.5: 0.29


@offline
def test_diverging_agent_stops_the_run(tmp_path, script):
    path = write(tmp_path / "data.npz", transitions(100, act_dim=1))
    options = TINY | dict(env="Pendulum-v1", dataset_path=path, data="real", learning_rate=1e30)
    at_the_end, before = "a loss of the agent is no longer finite, in updates 0 to 200", "the agent's action became NaN"
    for eval_every, message in ((200, at_the_end), (100, before)):
        with pytest.raises(edm.RunError, match=message):
            run(script, tmp_path / str(eval_every), **options | dict(eval_every=eval_every))


@pytest.mark.parametrize(
    "script, env_id", [*((script, "maze2d-umaze-v1") for script in OFFLINE), (synther_td3bc, "antmaze-umaze-v2")]
)
def test_mazes_run(tmp_path, monkeypatch, script, env_id):
    """From data to score, with random actions' data. AntMaze's agent gets -1 for each step, as CORL's."""
    data = write(tmp_path / "data.npz", collect_random(env_id, 600))
    batches, _ = record(monkeypatch, script)
    options = TINY | dict(env=env_id, dataset_path=data, updates=20, diffusion_steps=50, data="real", batch_size=300)
    folder = run(script, tmp_path / "runs", **options)
    rewards = torch.cat(batches)[
        :, edm.load_transitions(data)["observations"].shape[1] + len(np.load(data)["actions"][0])
    ]
    expected = [[0], [0, 1]] if env_id.startswith("maze2d") else [[-1]]
    assert sorted(set(rewards.tolist())) in expected
    with np.load(folder / "final_returns.npz") as f:
        low, high = (23.85, 161.86) if env_id.startswith("maze2d") else (0, 1)
        np.testing.assert_allclose(f["normalized_scores"], 100 * (f["returns"] - low) / (high - low))


@offline
def test_minari_dataset_runs(tmp_path, monkeypatch, capsys, script):
    """Its environment comes with it, with all its arguments. Pendulum has no score, so none is printed."""
    made = gym.make("Pendulum-v1", g=2.0), gym.make("Pendulum-v1", g=3.0, max_episode_steps=7)
    make_minari(monkeypatch, tmp_path / "minari", env=made[0], eval_env=made[1])
    env = script.make_env("test/two-v0")
    assert (env.unwrapped.g, env.spec.max_episode_steps) == (3, 7)
    folder = run(
        script, tmp_path, env="test/two-v0", data="real", updates=5, eval_episodes=1, hidden_dim=8, device="cpu"
    )
    assert folder.name.startswith("test-two-v0__") and "score" not in capsys.readouterr().out.splitlines()[-2]
    with np.load(folder / "final_returns.npz") as f:
        assert (-7 * 17 < f["returns"]).all() and (f["returns"] < -1).all()  # 7 steps
        assert np.isnan(f["normalized_scores"]).all()


@offline
def test_rows_that_begin_episodes_are_told_in_a_subset(tmp_path, monkeypatch, script):
    """They are found before the subset is drawn, when each row still follows the one before it."""
    states = np.arange(300.0)
    data = dict(zip(edm.KEYS, (states[:, None], np.zeros((300, 1)), np.zeros(300), states[:, None] + 1, states < 0)))
    data["next_observations"][9::10] = -1  # ends of episodes of ten rows, by a time limit
    seen = []
    monkeypatch.setattr(edm, "train_edm", lambda rows, args, *, starts, **_: seen.append((rows, starts)) or 1 / 0)
    for subsample in (None, 200):
        with pytest.raises(ZeroDivisionError):
            options = dict(env="robot", dataset_path=write(tmp_path / "data.npz", data), eval_episodes=0)
            run(script, tmp_path / str(subsample), subsample=subsample, device="cpu", **options)
    for rows, starts in seen:
        assert torch.equal(starts, rows[:, 0] % 10 == 0) and 15 < starts.sum() <= 30


@offline
def test_robot_without_environment(tmp_path, monkeypatch, script):
    """With --eval-episodes 0 sizes and the action bound are the data's, and an agent comes of it."""
    path = write(tmp_path / "data.npz", collect_random("Pendulum-v1", 200))  # actions in +-2
    _, agents = record(monkeypatch, script)
    folder = run(script, tmp_path / "runs", env="my-robot", dataset_path=path, **TINY | dict(eval_episodes=0))
    assert 1.9 < agents[0].actor.max_action <= 2
    agent = edm.load_file(folder / "checkpoint.pt")["agent"]
    assert agent["actor.net.0.weight"].shape[1] == 3 and not (folder / "learning_curve.png").exists()


@pytest.mark.parametrize("script", [synther_td3bc, synther_iql])
def test_constant_column_may_vary_in_the_environment(tmp_path, script):
    """It is not divided by almost nothing, so that an agent that meets another value there can act on it."""
    data = transitions(100, act_dim=1)
    data["observations"][:, 1] = 1e4
    path = write(tmp_path / "data.npz", data)
    options = TINY | dict(env="robot", data="real", updates=2, eval_episodes=0)
    saved = edm.load_file(run(script, tmp_path, dataset_path=path, **options) / "checkpoint.pt")
    expected = data["observations"].std(0) + 1e-3
    expected[1] = 1
    np.testing.assert_allclose(saved["obs_std"], expected, rtol=1e-5)


@offline
def test_tracker_that_fails(tmp_path, monkeypatch, script):
    """Before the run, it is one sentence and nothing is made. In the run, it is passed over."""
    calls, options = [], TINY | dict(data="real", updates=5, eval_episodes=0, track=True)

    class Error(Exception):
        pass

    def fail(*_, **__):
        calls.append(0)
        raise Error("no API key")

    fake = types.SimpleNamespace(Error=Error, init=fail, log=fail, define_metric=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(edm.RunError, match="--track: no API key"):
        run(script, tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()
    fake.init = lambda **_: None
    folder = run(script, tmp_path / "runs", **options)
    assert len(calls) > 1 and (5, "train/actor_loss") in read_metrics(folder)


class Endless(gym.Env):
    """An environment that never ends; or that fails, if `broken`."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-0.5, 0.5, (1,))

    def __init__(self, broken=False):
        self.broken = broken

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 1 / (not self.broken), False, False, {}


@pytest.mark.parametrize("script", [synther_td3bc, synther_sac_online])
def test_environment_without_time_limit_or_that_fails(monkeypatch, script):
    monkeypatch.setitem(gym.registry, "Endless-v0", gym.envs.registration.EnvSpec("Endless-v0", Endless))
    with pytest.warns(UserWarning, match="Endless-v0 has no time limit: its episodes end after 1,000 steps"):
        env = script.make_env("Endless-v0")
    assert env.spec.max_episode_steps == 1_000
    assert script.evaluate(lambda obs: torch.zeros(len(obs), 1), [env], seed=0) == 1_000
    gym.registry["Endless-v0"].kwargs = dict(broken=True)
    with pytest.raises(edm.RunError, match="cannot make the environment Endless-v0: division by zero"):
        script.make_env("Endless-v0")


def test_actions_beyond_the_bound_are_named(tmp_path, capsys):
    path = write(tmp_path / "data.npz", transitions(100, act_dim=1) | {"actions": np.full((100, 1), 2.1)})
    run(synther_td3bc, tmp_path, env="Pendulum-v1", dataset_path=path, **TINY | dict(data="real"))
    assert "the data have actions beyond +-2.0, the bound of Pendulum-v1" in capsys.readouterr().err


# --- Runs that were stopped -------------------------------------------------------------------------------------------

RESUMED = dict(
    env="Pendulum-v1", diffusion_steps=240, diffusion_width=16, diffusion_depth=1, num_samples=500, updates=240,
    hidden_dim=16, batch_size=32, eval_every=60, eval_episodes=1, checkpoint_every=80, device="cpu", seed=1,
)  # fmt: skip


@offline
def test_killed_run_equals_uninterrupted(tmp_path, monkeypatch, capsys, script):
    """Every moment at which a file is replaced, in all stages: a run that ended there goes on to the same numbers."""
    data = write(tmp_path / "data.npz", collect_random("Pendulum-v1", 300))
    with monkeypatch.context() as patch:
        copy_before_writes(patch, tmp_path / "killed")
        whole = run(script, tmp_path / "whole", dataset_path=data, **RESUMED)
    killed = sorted((tmp_path / "killed").iterdir(), key=lambda path: int(path.name))
    stages = [{path.suffix for path in folder.iterdir()} for folder in killed]
    assert len(killed) > 8 and ".npz" not in stages[2] and ".npz" in stages[-4]
    states = [edm.load_file(whole / name) for name in ("checkpoint.pt", "diffusion.pt")]
    for folder in killed[:: 2 if script is synther_td3bc else 5]:
        with open(folder / "metrics.csv", "a") as f:
            f.write("240,eval/return_mean,1e9\n50,train/cri")  # what came after the checkpoint, cut by the kill
        command(monkeypatch, script, resume=folder)
        assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
        for state, name in zip(states, ("checkpoint.pt", "diffusion.pt")):
            again = edm.load_file(folder / name)
            for x in (state, again):
                x.pop("seconds", None), x.pop("log_size", None)
            assert_same_state(again, state, f"{folder.name}/{name}")
        for name in ("synthetic.npz", "final_returns.npz"):
            with np.load(folder / name) as a, np.load(whole / name) as b:
                assert all(np.array_equal(a[key], b[key], equal_nan=True) for key in b.files)
        a, b = ([item for item in read_metrics(f).items() if "perf/" not in item[0][1]] for f in (folder, whole))
        np.testing.assert_equal(a, b)  # in the same order
    with np.load(data) as f:
        write(Path(data), dict(f) | {"terminals": np.arange(300) == 7})  # the file is replaced in the meantime
    for folder in (killed[3], killed[-1]):  # in the diffusion model's stage, in the agent's
        with pytest.raises(SystemExit):
            command(monkeypatch, script, resume=folder)
        assert "checkpoint.pt is of other data" in capsys.readouterr().err


BAD_COMMANDS = {
    "unknown dataset walker3d-medium-v2|cannot make the environment walker3d": dict(env="walker3d-medium-v2"),
    "cannot make the environment NoSuch-v0": dict(env="NoSuch-v0"),
    "has .3, 1. observation and action dimensions, not .11, 3.": dict(env="Hopper-v4"),
    "--dataset-path names a file, --env the environment": dict(env="quickstart"),
    "--dataset-path names a file": dict(env="sub/data.hdf5"),
    "No such file|cannot read": dict(dataset_path="nothing.npz"),
    "NaN": dict(dataset_path="bad.npz"),
    "--subsample cannot be -0.5": dict(subsample=-0.5),
    "--subsample 2000.0 asks for 2000 transitions, not 2 to 1000": dict(subsample=2_000),
    "--updates cannot be 0": dict(updates=0),
    "--eval-episodes cannot be -1": dict(eval_episodes=-1),
    "--seed cannot be -1": dict(seed=-1),
    "no use with --data real": dict(data="real", synthetic_path="data.npz"),
    "other.npz has .4, 1. observation": dict(synthetic_path="other.npz"),
    "--data mixed needs 1000 generated rows, and few.npz has 99": dict(data="mixed", synthetic_path="few.npz"),
    "CUDA|GPU": dict(device="cuda"),
    "File exists|Not a directory": dict(out_dir="data.npz"),
    "nothing is not a run folder": dict(resume="nothing"),
    "other_run is not a run folder": dict(resume="other_run"),
    "run was started with other values of: .*env, .*seed": dict(resume="run", seed=2),
}


@offline
@pytest.mark.parametrize("message", BAD_COMMANDS)
def test_bad_command_ends_in_one_sentence(tmp_path, monkeypatch, capsys, script, message):
    """Exit code 2, one line that begins with `error:`, nothing made and nothing changed."""
    if torch.cuda.is_available() and "CUDA" in message:
        pytest.skip("there is a GPU")
    write(tmp_path / "data.npz", transitions(1_000, act_dim=1))
    write(tmp_path / "few.npz", transitions(99, act_dim=1))
    write(tmp_path / "other.npz", transitions(100, obs_dim=4, act_dim=1))
    write(tmp_path / "bad.npz", transitions(20, act_dim=1) | {"rewards": np.full(20, math.nan)})
    for name, args in (("run", script.Args()), ("other_run", synther_sac_online.Args())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps(vars(args)))
    contents = lambda: {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}  # noqa: E731
    before = contents()
    monkeypatch.chdir(tmp_path)
    options = dict(env="Pendulum-v1", dataset_path="data.npz", updates=5, diffusion_steps=5, num_samples=100)
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, script, **options | dict(eval_episodes=1, device="cpu") | BAD_COMMANDS[message])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and re.search(message, line) and contents() == before


def test_antmaze_is_in_one_script(tmp_path):
    """In a process of its own, because here synther_td3bc.py has registered it."""
    path = write(tmp_path / "data.npz", transitions(20, obs_dim=29, act_dim=8))
    words = [sys.executable, synther_iql.__file__, "--env", "antmaze-umaze-v2", "--dataset-path", path]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.endswith(
        "(synther_td3bc.py has umaze, medium-play and large-play)\n"
    )


@pytest.mark.parametrize("script", [synther_td3bc, synther_sac_online])
def test_unknown_renderer_ends_in_one_sentence(tmp_path, script):
    """In a process of its own, because MuJoCo reads MUJOCO_GL once."""
    words = [sys.executable, script.__file__, "--env", "dmc/reacher-hard" if script is synther_sac_online else "x"]
    environ = os.environ | {"MUJOCO_GL": "elg"}
    result = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "MUJOCO_GL" in line and "elg" in line and "Traceback" not in result.stderr


def test_two_runs_of_one_second(tmp_path, monkeypatch):
    """Two of a sweep that differ in another option than the seed. Each has its folder."""
    path = write(tmp_path / "data.npz", collect_random("Pendulum-v1", 50))
    now = iter(1_800_000_000 + np.arange(100_000) / 10_000)
    monkeypatch.setattr("time.time", lambda: next(now))
    options = dict(env="Pendulum-v1", dataset_path=path, data="real", updates=2, eval_episodes=0, device="cpu")
    for rate in (1e-3, 1e-4):
        synther_td3bc.main(synther_td3bc.Args(**options, out_dir=str(tmp_path / "runs"), learning_rate=rate))
    assert sorted(path.name[-13:-3] for path in (tmp_path / "runs").iterdir()) == 2 * ["1800000000"]
