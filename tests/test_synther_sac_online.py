"""Tests of synther_sac_online.py: agent, environments, replay buffer, whole and stopped runs."""

import json
import math
import re
from types import SimpleNamespace
from unittest.mock import Mock

import gymnasium as gym
import h5py
import helpers
import numpy as np
import pytest
import torch
from dm_control import suite
from dm_control.rl import control
from helpers import assert_same_state, command, read_metrics, watch
from plain_agents import plain_sac

import edm
import synther_sac_online as online
import synther_td3bc
from synther_sac_online import SAC, Args, TanhGaussianActor


class Toy(gym.Env):
    """A point that moves by a tenth of the action. Every episode begins in one place and ends `limit`
    away from the middle. All observations are in one array, and rewards are arrays too."""

    observation_space = gym.spaces.Box(-9, 9, (2,), np.float64)
    action_space = gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 4]))

    def __init__(self, limit=1.1, action_space=action_space):
        self.limit = limit
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        self.position = np.array([0.8, -0.6])
        return self.position, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.position += 0.1 * (action - [0, 2]) / [1, 2]
        distance = np.linalg.norm(self.position)
        info = {"is_success": distance > 0.9}
        return self.position, np.array([-distance]), distance > self.limit, np.False_, info


def broken(rewards=(0.0, 0.0, 0.0, 0.0, math.nan)):
    return gym.wrappers.TransformReward(Toy(), lambda r, left=iter(rewards): next(left))


ENVS = {
    "Toy-v0": Toy,
    "Loop-v0": lambda: Toy(math.inf),
    "Wrapped-v0": lambda: gym.wrappers.RescaleAction(Toy(math.inf), np.float32(-2), np.float32(2)),
    "Broken-v0": broken,
    "Integers-v0": lambda: Toy(action_space=gym.spaces.Box(0, 3, (2,), int)),
    "Narrow-v0": lambda: Toy(action_space=gym.spaces.Box(np.float32([-1, 1]), np.float32([1, 1]))),
}
for _name, _make in ENVS.items():
    gym.register(_name, _make, max_episode_steps=20)
gym.register("Edge-v0", lambda: Toy(limit=0), max_episode_steps=1)

TINY = dict(env="Toy-v0", device="cpu", total_steps=130, learning_starts=50, utd=2, num_q=2)
TINY |= dict(hidden_dim=16, batch_size=32, eval_every=50, eval_episodes=1, retrain_every=60)
TINY |= dict(diffusion_steps=50, diffusion_width=16, diffusion_depth=2, num_samples=300)


def run(out_dir, **options):
    """main() with these arguments beside TINY. Returns the run folder."""
    return helpers.run(online, out_dir, **TINY | options)


def checkpoint(folder):
    return edm.load_torch(folder / "checkpoint.pt")


# --- Arguments, environments, agent ---

PAPER = dict(batch_size=256, hidden_dim=256, hidden_layers=2, learning_rate=3e-4, discount=0.99)
PAPER |= dict(tau=0.005, synther_ratio=0.5, eval_episodes=10)
MUJOCO = dict(total_steps=100_000, learning_starts=5_000, eval_every=1_000)
MODEL = dict(diffusion_steps=100_000, diffusion_width=1024, diffusion_depth=6, diffusion_lr=3e-4)
MODEL |= dict(diffusion_batch_size=256, num_samples=1_000_000, retrain_every=10_000)


@pytest.mark.parametrize(
    "env, algo, expected",
    [
        ("HalfCheetah-v4", "sac", MUJOCO | dict(utd=1, num_q=2)),
        ("Walker2d-v4", "redq", MUJOCO | dict(utd=20, num_q=10)),
        ("Hopper-v4", "synther", MODEL | dict(utd=20, num_q=2, standardize_reward=True)),
        ("dmc/cheetah-run", "synther", MODEL | dict(total_steps=200_000, standardize_reward=False)),
        ("Pendulum-v1", "synther", dict(total_steps=2_000, diffusion_recipe="fast", utd=20)),
    ],
)
def test_defaults_are_the_papers(env, algo, expected):
    args = helpers.filled(online, env=env, algo=algo)
    assert {name: getattr(args, name) for name in PAPER | expected} == PAPER | expected


@pytest.mark.parametrize("name", ["dmc/cheetah-run", "dmc/quadruped-walk", "dmc/reacher-hard"])
def test_dmc_equals_the_suite(name):
    """Observations in dm_control's order, its rewards, seeded resets, a time limit of 1000 steps."""
    env = online.make_env(name).unwrapped
    dm_env = suite.load(*name[4:].split("-"), task_kwargs={"random": 7})
    expected = dm_env.reset()
    obs, _ = env.reset(seed=7)
    rng = np.random.default_rng(0)
    for t in range(1_000):
        if t in (0, 1, 500, 999):
            parts = [np.ravel(part) for part in expected.observation.values()]
            np.testing.assert_array_equal(obs, np.hstack(parts).astype(np.float32))
        action = rng.uniform(env.action_space.low, env.action_space.high)
        obs, reward, terminated, truncated, _ = env.step(action)
        expected = dm_env.step(action)
        assert reward == expected.reward and not terminated and truncated == (t == 999)


def test_dmc_episodes_end(monkeypatch):
    """After 1000 steps in a task without a time limit, too, and where the simulation fails."""
    env = online.make_env("dmc/reacher-hard")
    env.unwrapped.dm_env._step_limit = math.inf  # as that of lqr-lqr_2_1
    env.reset(seed=2**32)  # more than dm_control can take
    steps = [env.step(np.zeros(2, np.float32)) for _ in range(1_000)]
    assert [truncated for _, _, _, truncated, _ in steps] == 999 * [False] + [True]
    monkeypatch.setattr(env.unwrapped.dm_env, "step", Mock(side_effect=control.PhysicsError))
    obs, *others = env.unwrapped.step(np.zeros(2, np.float32))
    assert (obs == steps[-1][0]).all() and others == [0, False, True, {}]


def test_actions_are_rescaled_and_clipped():
    env = online.make_env("Toy-v0")
    for action in (-3.0, -1.0, 0.25, 5.0):
        env.reset()
        obs, *_ = env.step(np.array([0, action], np.float32))
        np.testing.assert_allclose(obs, [0.8, -0.6 + 0.1 * np.clip(action, -1, 1)], atol=1e-6)


def test_normalized_score():
    assert online.normalized_score("Hopper-v5", 3234.3) == 100
    assert math.isnan(online.normalized_score("Pendulum-v1", 0.0))


def make_agent(obs_dim=3, act_dim=2, **options):
    options = dict(num_q=2, hidden_dim=16, learning_rate=1e-3) | options
    return SAC(obs_dim, act_dim, Args(device="cpu", **options))


def test_initial_weights():
    torch.manual_seed(0)
    agent = make_agent(17, 6, num_q=3, hidden_dim=256)
    for name, parameter in [*agent.actor.named_parameters(), *agent.critic.named_parameters()]:
        if "bias" in name:
            assert (parameter == 0).all()
        else:
            bound = math.sqrt(6 / sum(parameter.shape[-2:]))
            assert 0.9 * bound < parameter.max() <= bound and -0.9 * bound > parameter.min()
    assert_same_state(agent.critic.state_dict(), agent.critic_target.state_dict())


@pytest.mark.parametrize("num_q, utd, entropy", [(2, 1, None), (2, 4, -1.0), (5, 4, None)])
def test_sac_equals_a_plain_implementation(float64, num_q, utd, entropy):
    torch.manual_seed(0)
    agent = make_agent(num_q=num_q, utd=utd, target_entropy=entropy)
    assert agent.target_entropy == (-2 if entropy is None else entropy)

    def update(i, batch):
        return agent.update(batch, with_actor=i % utd == utd - 1)

    helpers.assert_same_losses(update, plain_sac(agent), 100, abs=1e-9)


@pytest.mark.parametrize(
    "batch_size, ratio, rows, num_synthetic, num_drawn",
    [(10, 0.25, 70, 2, 120), (10, 0.0, 70, 0, 50), (4, 1.0, 70, 4, 70), (256, 0.5, 0, 0, 50)],
)
def test_mix_of_a_batch(batch_size, ratio, rows, num_synthetic, num_drawn):
    torch.manual_seed(0)
    real = torch.arange(50.0)[:, None]
    synthetic = 1_000 + torch.arange(float(rows))[:, None]
    batches = online.sample_batches(real, synthetic, 300, batch_size, ratio)
    assert batches.shape == (300, batch_size, 1) and len(batches.unique()) == num_drawn
    assert ((batches >= 1_000).sum(1) == num_synthetic).all()


@pytest.mark.parametrize("terminal", [-1, 2, 6])
def test_saved_hdf5(tmp_path, terminal):
    """Actions in the environment's units, oldest row first, ends where s' is not the next s."""
    rows = torch.rand(7, 8)
    rows[:, 2] = torch.tensor([-1, 1, 0, 0.5, 0, 1, -0.5])
    rows[:, 3] = torch.tensor([-1, 1, 0, -0.5, 1, 0, 0.5])
    rows[[0, 1, 3, 5], 5:7] = rows[[1, 2, 4, 6], :2]
    rows[:, -1] = torch.arange(7) == terminal
    replay = SimpleNamespace(rows=rows.roll(3, 0), step=10)  # the first three were overwritten
    path = tmp_path / "data.hdf5"
    online.save_dataset(path, online.make_env("Toy-v0"), replay)
    actions = torch.stack([rows[:, 2], 2 + 2 * rows[:, 3]], dim=1)
    is_timeout = torch.tensor([i in (2, 4, 6) and i != terminal for i in range(7)])
    expected = dict(observations=rows[:, :2], actions=actions, rewards=rows[:, 4])
    expected |= dict(next_observations=rows[:, 5:7], terminals=rows[:, 7] == 1, timeouts=is_timeout)
    with h5py.File(path) as f:
        assert_same_state({key: torch.from_numpy(f[key][:]) for key in f}, expected)
    kept = ~is_timeout & (torch.arange(7) < 6)
    loaded = edm.load_transitions(path, true_next_obs=True)["next_observations"]
    np.testing.assert_array_equal(loaded, rows[kept, 5:7])


def test_full_buffer_forgets_the_oldest(tmp_path, monkeypatch):
    """The actions that it saves are those of the id: its own wrappers belong to the environment."""
    path = tmp_path / "data.hdf5"
    options = dict(env="Wrapped-v0", algo="sac", eval_episodes=0, learning_starts=129)
    whole = checkpoint(run(tmp_path / "a", **options))["replay"]
    monkeypatch.setattr(online, "CAPACITY", 100)
    folder = run(tmp_path / "b", **options, save_dataset=str(path))
    assert torch.equal(checkpoint(folder)["replay"], torch.cat([whole[100:130], whole[30:100]]))
    assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.csv", "checkpoint.pt"}
    with h5py.File(path) as f:
        np.testing.assert_array_equal(f["rewards"], whole[30:, 4])
        np.testing.assert_allclose(f["actions"], 2 * whole[30:, 2:4])
        assert np.flatnonzero(f["timeouts"]).tolist() == [9, 29, 49, 69, 89, 99]


def test_replay_buffer_holds_what_happened(tmp_path):
    """s' of a row is the s of the next but at the ends of episodes. Time limits are not terminal."""
    folder = run(tmp_path, algo="sac", total_steps=300)
    assert read_metrics(folder)[0, "eval/success_rate"] in (0, 1)
    rows = checkpoint(folder)["replay"]
    s, a, r, next_s, done = edm.split(rows, 2)
    torch.testing.assert_close(next_s, s + 0.1 * a)
    torch.testing.assert_close(r, -next_s.norm(dim=1))
    assert torch.equal(done, (r < -1.1).float())
    starts = edm.episode_starts(rows, 2).nonzero()[:, 0]
    lengths = starts.diff()
    assert (s[starts] == torch.tensor([0.8, -0.6])).all()
    assert ((lengths == 20) | (done[starts[1:] - 1] == 1)).all()
    assert lengths.max() == 20 and 0 < done.sum() < len(lengths)
    edge = run(tmp_path / "edge", env="Edge-v0", algo="sac")
    assert checkpoint(edge)["replay"][:, -1].all()  # at the time limit, and terminal


def test_run_folder_and_log(tmp_path, monkeypatch):
    modes = []
    watch(monkeypatch, TanhGaussianActor, "act", lambda actor, obs: modes.append(actor.training))
    folder = run(tmp_path, env="dmc/reacher-hard", seed=2**63 - 1)
    assert folder.name.startswith(f"dmc-reacher-hard__synther_sac_online-synther__{2**63 - 1}__")
    files = "args.json metrics.csv checkpoint.pt diffusion.pt synthetic.npz final_returns.npz "
    files += "learning_curve.png marginals.png"
    assert {path.name for path in folder.iterdir()} == set(files.split())
    metrics = read_metrics(folder)
    steps = {}
    for step, key in metrics:
        steps.setdefault(key, []).append(step)
    keys = "diffusion/marginal diffusion/correlation eval/return_mean eval/return_std train/alpha"
    keys += " train/actor_loss perf/updates_per_sec perf/samples_per_sec perf/seconds"
    assert set(keys.split()) < set(steps)
    assert steps["diffusion/loss"] == steps["perf/diffusion_seconds"] == [60, 120]  # one model each
    assert steps["eval/normalized_score"] == [0, 50, 100, 130]
    assert steps["train/critic_loss"] == [100, 130]
    assert all(map(math.isfinite, metrics.values())) and set(modes) == {False}
    with np.load(folder / "final_returns.npz") as final:
        assert final["steps"].tolist() == [0, 50, 100, 130]
        np.testing.assert_allclose(final["normalized_scores"], final["returns"] / 10)
    assert not edm.load_transitions(folder / "synthetic.npz")["terminals"].any()


def test_updates_and_their_batches(tmp_path, monkeypatch):
    """Number, mix and mean loss of updates. Each model has a seed of its own."""
    updates = []

    def generate(model, num_samples, seed, **changes):
        rows = torch.full((num_samples, len(model.mean)), 1e3 + seed)
        rows[:, -1] = torch.linspace(0, 1, num_samples)
        return rows

    def update(agent, batch, with_actor):
        updates.append((batch.clone(), with_actor))
        return torch.tensor([3.0, 7.0 * with_actor])

    monkeypatch.setattr(edm, "generate", generate)
    monkeypatch.setattr(SAC, "update", update)
    metrics = read_metrics(run(tmp_path, utd=3, eval_episodes=0, diffusion_recipe="paper"))
    assert metrics[100, "train/critic_loss"] == 3 and metrics[130, "train/actor_loss"] == 7
    assert [with_actor for _, with_actor in updates] == 80 * [False, False, True]
    batches = torch.stack([batch for batch, _ in updates])
    is_synthetic = batches[:, :, 0] > 500
    assert not is_synthetic[:30].any() and (is_synthetic[30:].sum(1) == 16).all()
    assert (batches[30:210][is_synthetic[30:210]][:, 0] == 1_060).all()
    assert (batches[210:][is_synthetic[210:]][:, 0] == 1_120).all()  # replaced, not added
    assert set(batches[:, :, -1].unique().tolist()) == {0, 1}
    assert 0.4 < batches[is_synthetic][:, -1].mean() < 0.6


def test_diffusion_leaves_environment_and_agent_alone(tmp_path):
    """With a synthetic share of 0, a run with diffusion models is the same as one without."""
    a = checkpoint(run(tmp_path / "a", algo="synther", synther_ratio=0.0))
    b = checkpoint(run(tmp_path / "b", algo="sac", synther_ratio=0.0))
    assert (a["model_step"], b["model_step"]) == (120, 0)
    for key in ("replay", "agent", "actor", "critic", "rng", "evaluations"):
        assert_same_state(a[key], b[key], key)


@pytest.mark.parametrize(
    "env, recipe, standardize_reward, raw_columns",
    [("Toy-v0", "paper", True, [7]), ("Toy-v0", "fast", False, [4, 7])]
    + [("dmc/reacher-hard", "fast", True, []), ("dmc/reacher-hard", "paper", None, [8])],
)
def test_diffusion_models(tmp_path, monkeypatch, env, recipe, standardize_reward, raw_columns):
    """Columns that are not standardised, and the weights that a warm start begins with. The learning
    rate is so small that training changes nothing."""
    models = []
    watch(monkeypatch, edm, "save_edm", lambda path, model: models.append(model))
    options = dict(env=env, standardize_reward=standardize_reward, diffusion_recipe=recipe)
    options |= dict(diffusion_lr=1e-12, num_samples=8, eval_episodes=0)
    for warm_start in (True, False):
        run(tmp_path / str(warm_start), warm_start=warm_start, **options)
    first, warm, again, cold = [model.denoiser.blocks[0].weight for model in models]
    torch.testing.assert_close(warm, first)
    assert torch.equal(again, first) and not torch.allclose(cold, first, atol=0.1)
    for model in models:
        is_raw = (model.mean == 0) & (model.std == 1)
        assert is_raw.nonzero()[:, 0].tolist() == raw_columns
        assert model.recipe.time_dim == (256 if recipe == "paper" else None)


def test_actions_are_random_first_and_then_the_policys(tmp_path, monkeypatch):
    """The first learning_starts + 1 from the whole range, all others of a policy that hardly learns."""
    sizes = []
    watch(monkeypatch, TanhGaussianActor, "sample", lambda actor, obs: sizes.append(len(obs)))
    options = dict(algo="sac", total_steps=300, learning_starts=100, learning_rate=1e-12)
    saved = checkpoint(run(tmp_path, eval_episodes=0, **options))
    agent = make_agent(2, 2)
    agent.load_state_dict(saved["agent"])
    s, a, _, _, _ = edm.split(saved["replay"], 2)
    assert sizes.count(1) == 199 and a[:101].abs().max() > 0.95
    assert a[:101].std() == pytest.approx(1 / math.sqrt(3), rel=0.1)
    h = agent.actor.net(s[101:])
    noise = (a[101:].atanh() - agent.actor.mean(h)) / agent.actor.log_std(h).exp()
    assert [noise.mean().item(), noise.std().item()] == pytest.approx([0, 1], abs=0.15)


@pytest.mark.parametrize("algo, steps, utd", [("sac", 1_200, 1), ("synther", 600, 3)])
def test_agent_learns(tmp_path, algo, steps, utd):
    """To go to the middle and to stay there gives about -5, to stay at the start -20."""
    options = dict(env="Loop-v0", algo=algo, total_steps=steps, eval_every=steps, utd=utd)
    options |= dict(learning_starts=200, hidden_dim=64, batch_size=128, learning_rate=2e-3)
    options |= dict(tau=0.02, discount=0.9, retrain_every=300)
    folder = run(tmp_path, diffusion_steps=500, diffusion_width=64, num_samples=3_000, **options)
    first, last = np.load(folder / "final_returns.npz")["returns"].mean(1)
    assert first < -15 and last > -8


def test_numbers_that_are_not_finite_stop_the_run(tmp_path):
    with pytest.raises(edm.RunError, match="Broken-v0 gave NaN or Inf at step 3"):
        run(tmp_path, algo="sac", env="Broken-v0", eval_episodes=0)
    with pytest.raises(edm.RunError, match="the agent's action became NaN or Inf at step 5[1-9]"):
        run(tmp_path, algo="sac", learning_rate=1e30)


# --- Runs that were stopped ---


# Episodes begin in one place and end at each checkpoint. So a new episode changes nothing.
EXACT = dict(env="Loop-v0", seed=1, learning_starts=30, eval_every=40, warm_start=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), **EXACT)


@pytest.mark.parametrize(
    "owner, name, count",
    [(SAC, "update", 1), (SAC, "update", 70), (SAC, "update", 140), (edm, "train_edm", 2)]
    + [(edm, "generate", 1), (edm, "save_edm", 2), (edm, "plot_marginals", 1)]
    + [(online, "evaluate", 4), (online, "Figure", 1)],
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, whole, owner, name, count):
    stop = (owner, name, count)
    folder = helpers.stopped_run(monkeypatch, online, tmp_path, *stop, **TINY | EXACT)
    if name == "plot_marginals":
        assert checkpoint(folder)["model_step"] == 60  # the results are kept before they are shown
    command(monkeypatch, online, resume=folder)
    assert_same_state(helpers.outcome(folder), helpers.outcome(whole))


def test_resume_begins_a_new_episode(tmp_path, monkeypatch):
    """The ended run can still be saved, but not over a file that exists."""
    options = TINY | dict(env="Pendulum-v1", algo="sac", eval_episodes=0, eval_every=40)
    folder = helpers.stopped_run(monkeypatch, online, tmp_path, SAC, "update", 150, **options)
    path = tmp_path / "late.h5"
    command(monkeypatch, online, resume=folder)
    command(monkeypatch, online, resume=folder, save_dataset=path)
    rows = checkpoint(folder)["replay"]
    assert len(rows) == 130 and not torch.equal(rows[120, :3], rows[0, :3])
    with h5py.File(path) as f:
        np.testing.assert_array_equal(f["rewards"], rows[:, 4])
        assert np.flatnonzero(f["timeouts"]).tolist() == [119, 129]
    path.write_text("mine")
    command(monkeypatch, online, resume=folder, save_dataset=path)
    assert path.read_text() == "mine"


STOPS = [(edm.EDM, "loss", 45, dict(step=125)), (SAC, "update", 32, dict(step=82))]


@pytest.mark.parametrize("stop", STOPS)
def test_signalled_run_goes_on(tmp_path, monkeypatch, stop):
    """A new episode begins, and in the first case the diffusion model begins anew."""
    options = TINY | dict(env="Pendulum-v1", total_steps=250, retrain_every=125, eval_every=100)
    options |= dict(utd=1, diffusion_steps=300)
    folder = helpers.stopped_run(monkeypatch, online, tmp_path, *stop, **options)
    command(monkeypatch, online, resume=folder)
    saved = checkpoint(folder)
    assert saved["step"] == len(saved["replay"]) == 250 and len(saved["evaluations"]) == 4
    assert 2 <= edm.episode_starts(saved["replay"], 3).sum() <= 3  # one is the time limit's


SPACES = "not flat Box spaces with float actions in a range"
BAD_COMMANDS = {
    "--env NoSuch-v0": "cannot make the environment NoSuch-v0",
    "--env dmc/cheetah-fly": "cannot make the environment dmc/cheetah-fly",
    "--env CartPole-v1": SPACES,
    "--env dmc/lqr-lqr_6_2": SPACES,
    "--env Integers-v0": SPACES,
    "--env Narrow-v0": SPACES,
    f"--seed {2**63}": "--seed cannot be",
    "--num-q 1": "--num-q cannot be 1",
    "--algo sac --total-steps 400": "--total-steps must exceed --learning-starts",
    "--total-steps 700 --retrain-every 700": "--total-steps must exceed .* --retrain-every",
    "--save-dataset old.hdf5": "--save-dataset must be a new .hdf5 file, not old.hdf5",
    "--save-dataset nowhere/new.hdf5": "--save-dataset must be a new .hdf5 file",
    "--save-dataset new.npz": "--save-dataset must be a new .hdf5 file",
    "--out-dir old.hdf5": "File exists|Not a directory",
    "--resume nothing": "nothing is not a run folder",
    "--resume td3bc_run": "td3bc_run is not a run folder",
    "--resume run --algo redq": "run was started with another algo",
    "--resume run": "cannot read run/checkpoint.pt",
}


@pytest.mark.parametrize("words", BAD_COMMANDS)
def test_bad_command_ends_in_one_sentence(tmp_path, monkeypatch, capsys, words):
    for name, args in (("run", Args(algo="sac")), ("td3bc_run", synther_td3bc.Args())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps(vars(args)))
    (tmp_path / "run/checkpoint.pt").write_bytes(b"PK damaged")
    (tmp_path / "old.hdf5").write_text("old")
    options = {name.replace("-", "_"): x for name, x in re.findall(r"--(\S+) (\S+)", words)}
    helpers.assert_refused(monkeypatch, capsys, tmp_path, online, BAD_COMMANDS[words], **options)
