"""Tests of synther_sac_online.py: the agent, environments, the replay buffer, and whole runs, some of them stopped."""

import copy
import json
import math
import re

import gymnasium as gym
import h5py
import helpers
import numpy as np
import pytest
import torch
from helpers import assert_same_state, command, plain, read_metrics

import edm
import synther_sac_online as online
import synther_td3bc
from synther_sac_online import SAC, Args, TanhGaussianActor


class Toy(gym.Env):
    """A point that moves by a tenth of the action, whose second half is in other units. It seeks the middle.

    An episode begins where the last one began, and ends where the point is further than `limit` from the middle.
    """

    observation_space = gym.spaces.Box(-9, 9, (2,), np.float64)
    action_space = gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 4]))

    def __init__(self, limit):
        self.limit = limit

    def reset(self, *, seed=None, options=None):
        self.position = np.array([0.8, -0.6])
        return self.position, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.position = self.position + 0.1 * (action - [0, 2]) / [1, 2]
        distance = float(np.linalg.norm(self.position))
        return self.position, -distance, distance > self.limit, False, {}


class Reusing(Toy):
    """Writes each observation into the same array."""

    def step(self, action):
        position, (self.position, *others) = self.position, super().step(action)
        position[:] = self.position
        self.position = position
        return position, *others


class Broken(Toy):
    """Gives NaN from the 30th step on."""

    steps = 0

    def step(self, action):
        self.steps += 1
        obs, *others = super().step(action)
        return (obs if self.steps < 30 else obs * math.nan), *others


class Nested(Toy):
    """Toy in other units and with a dictionary of observations."""

    observation_space = gym.spaces.Dict(here=Toy.observation_space)
    action_space = gym.spaces.Box(-2, 2, (2,))

    def reset(self, **options):
        return {"here": super().reset(**options)[0]}, {}

    def step(self, action):
        self.position = self.position + 0.1 * action
        return {"here": self.position}, 0.0, False, False, {}


def with_actions(space):
    toy = Toy(1)
    toy.action_space = space
    return toy


gym.register("Integers-v0", lambda: with_actions(gym.spaces.Box(0, 3, (2,), int)))
gym.register(
    "Narrow-v0", lambda: with_actions(gym.spaces.Box(np.float32([-1, 1]), np.float32([1, 1])))
)
gym.register("Reusing-v0", Reusing, max_episode_steps=20, kwargs=dict(limit=1.1))
gym.register("Broken-v0", Broken, max_episode_steps=20, kwargs=dict(limit=1.1))
gym.register(
    "Nested-v0",
    lambda: gym.wrappers.RescaleAction(gym.wrappers.FlattenObservation(Nested(1)), -1.0, 1.0),
)
gym.register("Toy-v0", Toy, max_episode_steps=20, kwargs=dict(limit=1.1))
gym.register("Loop-v0", Toy, max_episode_steps=20, kwargs=dict(limit=math.inf))
gym.register("Edge-v0", Toy, max_episode_steps=1, kwargs=dict(limit=0))
gym.register("Unbounded-v0", lambda: gym.wrappers.ClipAction(Toy(1)))

TINY = dict(
    env="Toy-v0", device="cpu", total_steps=130, learning_starts=50, utd=2, num_q=2, hidden_dim=16, batch_size=32,
    eval_every=50, eval_episodes=1, checkpoint_every=1_000, retrain_every=60, diffusion_steps=50, diffusion_width=16,
    diffusion_depth=2, num_samples=300,
)  # fmt: skip


def run(out_dir, **options):
    """main() with these arguments beside TINY. Returns the run folder."""
    return helpers.run(online, out_dir, **TINY | options)


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


# --- Arguments and environments ---------------------------------------------------------------------------------------

PAPER = dict(
    batch_size=256, hidden_dim=256, learning_rate=3e-4, discount=0.99, tau=0.005, synther_ratio=0.5
)
SIZES = dict(
    diffusion_steps=100_000,
    diffusion_width=1024,
    diffusion_depth=6,
    diffusion_lr=3e-4,
    num_samples=1_000_000,
)


@pytest.mark.parametrize(
    "env, algo, expected",
    [
        ("HalfCheetah-v4", "sac", dict(utd=1, num_q=2, total_steps=100_000, learning_starts=5_000)),
        (
            "Walker2d-v4",
            "redq",
            dict(utd=20, num_q=10, eval_every=1_000, eval_episodes=10, standardize_reward=True),
        ),
        (
            "Hopper-v4",
            "synther",
            SIZES | dict(utd=20, num_q=2, retrain_every=10_000, diffusion_batch_size=256),
        ),
        ("dmc/cheetah-run", "synther", SIZES | dict(total_steps=200_000, standardize_reward=False)),
        ("Pendulum-v1", "synther", dict(total_steps=2_000, diffusion_recipe="fast", utd=20)),
    ],
)
def test_values_of_the_paper(monkeypatch, env, algo, expected):
    args = Args(env=env, algo=algo)
    monkeypatch.setattr(online, "make_env", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        online.main(args)
    assert {name: getattr(args, name) for name in PAPER | expected} == PAPER | expected


@pytest.mark.parametrize(
    "env_id, obs_dim, act_dim",
    [("dmc/cheetah-run", 17, 6), ("dmc/quadruped-walk", 78, 12), ("dmc/reacher-hard", 6, 2)],
)
def test_dmc_equals_the_suite(env_id, obs_dim, act_dim):
    """Observations in dm_control's order, its rewards, seeded resets, 1000 steps and then a time limit."""
    from dm_control import suite

    env = online.make_env(env_id).unwrapped
    assert (env.observation_space.shape, env.action_space.shape) == ((obs_dim,), (act_dim,))
    dm_env = suite.load(*env_id[4:].split("-"), task_kwargs={"random": 7})
    expected, (obs, _) = dm_env.reset(), env.reset(seed=7)
    rng = np.random.default_rng(0)
    for t in range(1_000):
        if t in (0, 1, 500, 999):
            np.testing.assert_array_equal(
                obs, np.hstack([*map(np.ravel, expected.observation.values())]).astype("f")
            )
        action = rng.uniform(env.action_space.low, env.action_space.high)
        obs, reward, terminated, truncated, _ = env.step(action)
        expected = dm_env.step(action)
        assert reward == expected.reward and not terminated and truncated == (t == 999)
    assert online.normalized_score(env_id, 250.0) == 25


def test_dmc_ends_an_episode_whose_simulation_fails(monkeypatch):
    from dm_control.rl.control import PhysicsError

    env = online.make_env("dmc/reacher-hard")
    env.reset(seed=2**32)  # more than dm_control can take
    action = np.zeros(2, np.float32)
    expected = env.step(action)[0]
    monkeypatch.setattr(
        env.unwrapped.dm_env, "step", lambda action: exec("raise error", {"error": PhysicsError()})
    )
    obs, reward, terminated, truncated, _ = env.step(action)
    assert (obs == expected).all() and (reward, terminated, truncated) == (0, False, True)


def test_dmc_tasks_without_a_time_limit_get_one():
    env = online.make_env("dmc/reacher-hard")
    env.unwrapped.dm_env._step_limit = math.inf  # as that of lqr-lqr_2_1
    env.reset(seed=0)
    truncated = [env.step(np.zeros(2, np.float32))[3] for _ in range(1_000)]
    assert truncated == 999 * [False] + [True]


def test_actions_are_rescaled_and_clipped():
    env = online.make_env("Toy-v0")
    for action in (-3.0, -1.0, 0.25, 5.0):
        before, _ = env.reset()
        after = env.step(np.array([0, action], np.float32))[0]
        np.testing.assert_allclose(after - before, [0, 0.1 * np.clip(action, -1, 1)], atol=1e-6)


# --- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(obs_dim=3, act_dim=2, **options):
    options = dict(num_q=2, hidden_dim=16, learning_rate=1e-3) | options
    return SAC(obs_dim, act_dim, Args(device="cpu", **options))


def test_density_of_the_policy(float64):
    torch.manual_seed(0)
    actor, obs = TanhGaussianActor(3, 2, 16, 2).requires_grad_(False), 0.5 * torch.randn(1_000, 3)
    actions, log_density = actor.sample(obs)
    mean, std = actor.mean(actor.net(obs)), actor.log_std(actor.net(obs)).exp()
    squash = torch.distributions.TanhTransform()
    expected = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, std), squash
    )
    away = actions.abs().amax(1) < 0.99  # near the bounds the 1e-6 in the density shows
    assert away.sum() > 300
    torch.testing.assert_close(
        log_density[away], expected.log_prob(actions).sum(1)[away], atol=1e-3, rtol=1e-3
    )
    assert ((actions.atanh() - mean) / std).std() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(actor(obs), mean.tanh())


def test_initial_weights():
    torch.manual_seed(0)
    agent = make_agent(17, 6, num_q=3, hidden_dim=256)
    for name, parameter in [*agent.actor.named_parameters(), *agent.critic.named_parameters()]:
        if "bias" in name:
            assert (parameter == 0).all()
        else:
            bound = math.sqrt(6 / sum(parameter.shape[-2:]))
            assert (
                0.9 * bound < parameter.abs().max() <= bound
                and parameter.mean().abs() < 0.1 * bound
            )
    assert_same_state(agent.critic.state_dict(), agent.critic_target.state_dict())
    assert [make_agent(target_entropy=x).target_entropy for x in (None, -1.5)] == [-2, -1.5]


@pytest.mark.parametrize("num_q, utd, entropy", [(2, 1, None), (2, 4, -1.0), (5, 4, None)])
def test_sac_equals_a_plain_implementation(float64, num_q, utd, entropy):
    """100 updates in the order of REDQ's code. That every loss is the same shows that all parameters are."""
    torch.manual_seed(0)
    agent = make_agent(num_q=num_q, target_entropy=entropy)
    actor, critic, target = copy.deepcopy(agent.actor), plain(agent.critic), plain(agent.critic)
    log_alpha, alpha = torch.zeros(1, requires_grad=True), 0.2
    params = dict(actor=actor.parameters(), critic=critic.parameters(), alpha=[log_alpha])
    optimizers = {name: torch.optim.Adam(p, lr=1e-3) for name, p in params.items()}

    def q(net, s, a):
        return torch.cat([member(torch.cat([s, a], 1)) for member in net], 1)

    def act(s):
        h = actor.net(s)
        normal = torch.distributions.Normal(actor.mean(h), actor.log_std(h).clamp(-20, 2).exp())
        raw = normal.mean + normal.stddev * torch.randn_like(normal.mean)
        return raw.tanh(), (normal.log_prob(raw) - (1 - raw.tanh() ** 2 + 1e-6).log()).sum(
            1, keepdim=True
        )

    for i in range(100):
        batch = torch.randn(32, 10)
        batch[:, -1] = (batch[:, -1] > 0.8).double()
        s, a, r, s_next, d = batch.split([3, 2, 1, 3, 1], 1)
        torch.manual_seed(i)
        losses = agent.update(batch, with_actor=i % utd == utd - 1)

        torch.manual_seed(i)
        with torch.no_grad():
            a_next, log_prob_next = act(s_next)
            chosen = torch.rand(num_q).argsort(descending=True)[:2]
            q_next = q(target, s_next, a_next)[:, chosen].min(1, keepdim=True).values
            y = r + 0.99 * (1 - d) * (q_next - alpha * log_prob_next)
        critic_loss, actor_loss = ((q(critic, s, a) - y) ** 2).mean(0).sum(), torch.zeros(())
        grads = {"critic": torch.autograd.grad(critic_loss, list(critic.parameters()))}
        if i % utd == utd - 1:
            pi, log_prob = act(s)
            actor_loss = (alpha * log_prob - q(critic, s, pi).mean(1, keepdim=True)).mean()
            alpha_loss = -(
                log_alpha * (log_prob + (-2 if entropy is None else entropy)).detach()
            ).mean()
            grads["actor"] = torch.autograd.grad(actor_loss, list(actor.parameters()))
            grads["alpha"] = torch.autograd.grad(alpha_loss, [log_alpha])
        torch.testing.assert_close(
            losses, torch.stack([critic_loss, actor_loss]).detach(), rtol=1e-9, atol=1e-9
        )
        for name, gradient in grads.items():
            for parameter, grad in zip(optimizers[name].param_groups[0]["params"], gradient):
                parameter.grad = grad
            optimizers[name].step()
        alpha = log_alpha.exp().item() if "alpha" in grads else alpha
        for p, t in zip(critic.parameters(), target.parameters()):
            t.data += 0.005 * (p.data - t.data)


# --- Replay buffer and saved datasets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch_size, ratio, rows, num_synthetic",
    [(256, 0.5, 70, 128), (10, 0.25, 70, 2), (10, 0.0, 70, 0), (4, 1.0, 70, 4), (256, 0.5, 0, 0)],
)
def test_mix_of_a_batch(batch_size, ratio, rows, num_synthetic):
    """int(batch_size * ratio) generated rows in every batch, none before the first model; all rows are drawn."""
    torch.manual_seed(0)
    replay, synthetic = torch.arange(50.0)[:, None], 1_000 + torch.arange(float(rows))[:, None]
    batches = online.sample_batches(replay, synthetic, 300, batch_size, ratio)
    assert batches.shape == (300, batch_size, 1) and not torch.equal(batches[0], batches[1])
    assert ((batches >= 1_000).sum(1) == num_synthetic).all()
    assert len(batches.unique()) == (50 if num_synthetic < batch_size else 0) + (
        70 if num_synthetic else 0
    )


@pytest.mark.parametrize("terminal", [None, 2, 6])
def test_saved_hdf5(tmp_path, terminal):
    """Actions in the environment's units; the last row ends an episode; s' only where it cannot be known otherwise."""
    rows, path = torch.rand(7, 8), tmp_path / "data.hdf5"
    rows[:, 2:4] = torch.tensor(
        [[-1, -1], [1, 1], [0, 0], [0.5, -0.5], [0, 1], [1, 0], [-0.5, 0.5]]
    )
    rows[:, -1] = 0
    timeouts = torch.tensor([0, 0, 1, 0, 1, 0, 0]).bool()
    if terminal is not None:
        rows[terminal, -1] = 1
    online.save_dataset(path, online.make_env("Toy-v0"), rows, timeouts)
    expected = dict(observations=rows[:, :2], rewards=rows[:, 4], terminals=rows[:, -1] == 1)
    expected["actions"] = torch.tensor(
        [[-1, 0], [1, 4], [0, 2], [0.5, 1], [0, 4], [1, 2], [-0.5, 3]]
    )
    expected["timeouts"] = {None: [2, 4, 6], 2: [4, 6], 6: [2, 4]}[terminal]
    expected["timeouts"] = torch.isin(torch.arange(7), torch.tensor(expected["timeouts"]))
    expected["next_observations"] = rows[:, 5:7]
    with h5py.File(path) as f:
        assert set(f) == set(expected)
        for key, x in expected.items():
            assert f[key].dtype == (bool if key in ("terminals", "timeouts") else np.float32)
            np.testing.assert_array_equal(f[key], x, err_msg=key)
    kept = ~expected["timeouts"] & (torch.arange(7) < 6)
    data = edm.load_transitions(path, true_next_obs=True)
    np.testing.assert_array_equal(data["actions"], expected["actions"][kept])
    np.testing.assert_array_equal(data["next_observations"], rows[kept, 5:7])


def test_saved_actions_are_those_of_the_id(tmp_path):
    """Wrappers in the entry point belong to the environment: here they make one of the range 1 out of one of 2."""
    path = tmp_path / "data.hdf5"
    folder = run(
        tmp_path / "runs", env="Nested-v0", algo="sac", eval_episodes=0, save_dataset=str(path)
    )
    with h5py.File(path) as f:
        np.testing.assert_allclose(f["actions"], checkpoint(folder)["replay"][:, 2:4], rtol=1e-6)
        np.testing.assert_allclose(
            f["next_observations"], f["observations"] + 0.2 * f["actions"][:], atol=1e-6
        )


def test_full_buffer_forgets_the_oldest(tmp_path, monkeypatch):
    options = dict(env="Loop-v0", algo="sac", eval_episodes=0, learning_starts=129)
    whole = checkpoint(run(tmp_path / "a", **options))["replay"]
    monkeypatch.setattr(online, "CAPACITY", 100)
    folder = run(tmp_path / "b", **options, save_dataset=str(tmp_path / "data.hdf5"))
    assert torch.equal(checkpoint(folder)["replay"], torch.cat([whole[100:130], whole[30:100]]))
    assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.csv", "checkpoint.pt"}
    with h5py.File(tmp_path / "data.hdf5") as f:
        np.testing.assert_array_equal(f["rewards"], whole[30:, 4])
        assert np.flatnonzero(f["timeouts"]).tolist() == [9, 29, 49, 69, 89, 99]


@pytest.mark.parametrize("env", ["Toy-v0", "Reusing-v0"])
def test_replay_buffer_holds_what_happened(tmp_path, env):
    """s' of a row is the s of the next but at the ends of episodes, and time limits are not terminal."""
    saved = checkpoint(run(tmp_path, env=env, algo="sac", total_steps=300))
    (s, a, r, s_next, d), timeouts = saved["replay"].split([2, 2, 1, 2, 1], 1), saved["timeouts"]
    torch.testing.assert_close(s_next, s + 0.1 * a)
    torch.testing.assert_close(r, -s_next.norm(dim=1, keepdim=True))
    assert torch.equal(d, (r < -1.1).float()) and 0 < d.sum() < 300 and timeouts.any()
    starts = [-1, *torch.nonzero(timeouts | (d[:, 0] == 1)).flatten().tolist()]
    assert max(np.diff(starts)) == 20 and (~timeouts | (torch.arange(300) >= 19)).all()
    assert torch.equal(s[1:] == s_next[:-1], ~(timeouts | (d[:, 0] == 1))[:-1, None].expand(-1, 2))
    assert checkpoint(run(tmp_path / "edge", env="Edge-v0", algo="sac"))["replay"][
        :, -1
    ].all()  # both at once


# --- Whole runs -------------------------------------------------------------------------------------------------------


def test_run_folder_and_log(tmp_path, capsys):
    """On DeepMind Control: d is no part of the model, and the reward is not standardised."""
    folder = run(tmp_path, env="dmc/reacher-hard", seed=3)
    assert folder.name.startswith("dmc-reacher-hard__synther_sac_online-synther__3__")
    files = "args.json checkpoint.pt diffusion.pt final_returns.npz learning_curve.png marginals.png metrics.csv"
    assert {path.name for path in folder.iterdir()} == {*files.split(), "synthetic.npz"}
    metrics, args = read_metrics(folder), json.loads((folder / "args.json").read_text())
    assert {step for step, key in metrics if key == "diffusion/marginal"} == {
        60,
        120,
    }  # one model each
    assert {step for step, key in metrics if key == "eval/return_mean"} == {0, 50, 100, 130}
    assert {step for step, key in metrics if key == "train/critic_loss"} == {100, 130}
    assert {key for _, key in metrics} >= {
        "diffusion/loss", "diffusion/correlation", "train/actor_loss", "train/alpha", "eval/return_std",
        "eval/normalized_score", "perf/updates_per_sec", "perf/samples_per_sec", "perf/diffusion_seconds",
    }  # fmt: skip
    assert all(map(math.isfinite, metrics.values())) and capsys.readouterr().out.isascii()
    assert (args["num_q"], args["standardize_reward"], args["exp_name"]) == (
        2,
        False,
        "synther_sac_online-synther",
    )
    with np.load(folder / "final_returns.npz") as final:
        assert final["steps"].tolist() == [0, 50, 100, 130]
        np.testing.assert_allclose(final["normalized_scores"], final["returns"] / 10)
    model = edm.load_edm(folder / "diffusion.pt")
    assert (
        len(model.mean) == 6 + 2 + 1 + 6
        and (model.mean[8], model.std[8]) == (0, 1)
        and (model.std[:8] != 1).all()
    )
    assert not edm.load_transitions(folder / "synthetic.npz")["terminals"].any()


def test_updates_and_their_batches(tmp_path, monkeypatch):
    """utd updates a step, the policy's at the last; half of each batch from the last model; terminals 0 or 1."""
    updates, update = [], SAC.update

    def generate(model, num_samples, args):
        rows = torch.full((num_samples, len(model.mean)), 1e3 + args.diffusion_seed)
        rows[:, -1] = torch.linspace(0, 1, num_samples)
        return rows

    def recording_update(self, batch, with_actor):
        updates.append((batch.clone(), with_actor))
        return update(self, batch, with_actor)

    monkeypatch.setattr(edm, "generate", generate)
    monkeypatch.setattr(SAC, "update", recording_update)
    losses = read_metrics(run(tmp_path, utd=3, eval_episodes=0, terminals="column"))
    batches = torch.stack([batch for batch, _ in updates])
    assert [with_actor for _, with_actor in updates] == 80 * [False, False, True]
    synthetic = batches[:, :, 0] > 500
    assert not synthetic[:30].any() and (synthetic[30:].sum(1) == 16).all()
    assert (batches[30:210][synthetic[30:210]][:, 0] == 1_060).all()
    assert (batches[210:][synthetic[210:]][:, 0] == 1_120).all()  # replaced, not added
    assert (
        set(batches[:, :, -1].unique().tolist()) == {0, 1}
        and 0.4 < batches[synthetic][:, -1].mean() < 0.6
    )
    assert {step for step, key in losses if key == "train/alpha"} == {100, 130}


def test_diffusion_leaves_environment_and_agent_alone(tmp_path):
    """With a synthetic share of 0, a run with diffusion models stores and learns the same as one without."""
    folders = [run(tmp_path / algo, algo=algo, synther_ratio=0.0) for algo in ("synther", "sac")]
    assert [(folder / "synthetic.npz").exists() for folder in folders] == [True, False]
    a, b = map(checkpoint, folders)
    for key in ("replay", "timeouts", "agent", "optimizers", "rng", "evaluations"):
        assert_same_state(a[key], b[key], key)


@pytest.mark.parametrize(
    "env, standardize_reward, raw_columns",
    [
        ("Toy-v0", True, [-1]),
        ("Toy-v0", False, [-1, 4]),
        ("dmc/reacher-hard", True, []),
        ("dmc/reacher-hard", None, [8]),
    ],
)
def test_models_of_a_run(tmp_path, monkeypatch, env, standardize_reward, raw_columns):
    """Columns that are not standardised, seeds, and with --warm-start the weights to start from."""
    calls, train_edm = [], edm.train_edm

    def recording_train_edm(rows, args, **options):
        model = train_edm(rows, args, **options)
        calls.append(options | dict(rows=rows, seed=args.diffusion_seed, result=model.state_dict()))
        return model

    monkeypatch.setattr(edm, "train_edm", recording_train_edm)
    options = dict(env=env, standardize_reward=standardize_reward, warm_start=env == "Toy-v0")
    run(tmp_path, eval_episodes=0, seed=2, diffusion_seed=1, **options)
    first, second = calls
    assert sorted(first["raw_columns"]) == sorted(raw_columns) and first["time_dim"] == 256
    assert (first["seed"], second["seed"]) == (3_000_069, 3_000_129)
    assert (len(first["rows"]), len(second["rows"])) == (60, 120) and first["init"] is None
    if options["warm_start"]:
        assert_same_state(second["init"].state_dict(), first["result"])
    else:
        assert second["init"] is None


def test_actions_are_random_first_and_then_the_policys(tmp_path, monkeypatch):
    """The first learning_starts + 1 from the whole range; all others sampled, not the mean."""
    sampled, sample = [], TanhGaussianActor.sample

    def recording_sample(self, observations):
        actions, log_density = sample(self, observations)
        sampled.extend(actions if len(observations) == 1 else [])
        return actions, log_density

    monkeypatch.setattr(TanhGaussianActor, "sample", recording_sample)
    actions = checkpoint(run(tmp_path, algo="sac", learning_starts=100, eval_episodes=0))["replay"][
        :, 2:4
    ]
    assert len(sampled) == 29 and torch.equal(actions[101:], torch.stack(sampled))
    assert actions[:101].abs().max() > 0.95 and actions[:101].std() == pytest.approx(
        1 / math.sqrt(3), rel=0.1
    )


@pytest.mark.parametrize("algo, steps", [("sac", 1_200), ("synther", 600)])
def test_agent_learns(tmp_path, algo, steps):
    """From the start to the middle and to stay there gives about -5, to stay at the start -20."""
    folder = run(
        tmp_path, env="Loop-v0", algo=algo, total_steps=steps, eval_every=steps, learning_starts=200, hidden_dim=64,
        learning_rate=2e-3, batch_size=128, tau=0.02, discount=0.9, utd=1 if algo == "sac" else 3, retrain_every=300,
        diffusion_steps=500, diffusion_width=64, num_samples=3_000,
    )  # fmt: skip
    first, last = np.load(folder / "final_returns.npz")["returns"].mean(1)
    assert first < -15 and last > -8


def test_broken_environment_is_named(tmp_path):
    with pytest.raises(
        edm.RunError, match="Broken-v0 gave NaN or Inf at step 28"
    ):  # and one step was a trial
        run(tmp_path, env="Broken-v0", algo="sac", eval_episodes=0)


def test_diverging_agent_stops_the_run(tmp_path):
    with pytest.raises(
        edm.RunError, match="the agent's action is not finite at environment step 5[1-9]"
    ):
        run(tmp_path, algo="sac", learning_rate=1e30)


# --- Runs that were stopped -------------------------------------------------------------------------------------------


def stop_at(monkeypatch, owner, name, count):
    """The call number `count` of owner.name stops the run."""
    original, calls = getattr(owner, name), []

    def stopping(*args, **options):
        calls.append(0)
        if len(calls) == count:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(owner, name, stopping)


def stopped_run(monkeypatch, out_dir, owner, name, count, **options):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, owner, name, count)
        run(out_dir, **options)
    (folder,) = out_dir.glob("*__*")
    return folder


EXACT = dict(
    env="Loop-v0", seed=1, learning_starts=30, checkpoint_every=20, eval_every=30, warm_start=True
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), **EXACT)


@pytest.mark.parametrize(
    "owner, name, count",
    [
        (SAC, "update", 1), (SAC, "update", 23), (SAC, "update", 140), (edm, "train_edm", 1), (edm, "train_edm", 2),
        (edm, "generate", 1), (edm, "plot_marginals", 2), (online, "evaluate", 4), (online, "Figure", 1),
    ],
)  # fmt: skip
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, whole, owner, name, count):
    """All is restored. Episodes begin in one place and end at each checkpoint, so a new episode changes nothing."""
    folder = stopped_run(monkeypatch, tmp_path, owner, name, count, **EXACT)
    command(monkeypatch, online, resume=folder)
    a, b = map(checkpoint, (folder, whole))
    for state in (a, b):
        del state["seconds"], state["log_size"]
    assert_same_state(a, b)
    a, b = (
        {k: v for k, v in read_metrics(f).items() if "perf/" not in k[1]} for f in (folder, whole)
    )
    assert a == b and list(a) == list(b)
    assert_same_state(*(edm.load_edm(f / "diffusion.pt").state_dict() for f in (folder, whole)))
    for file in ("synthetic.npz", "final_returns.npz"):
        with np.load(folder / file) as a, np.load(whole / file) as b:
            assert all(np.array_equal(a[key], b[key], equal_nan=True) for key in b.files)


def test_resume_begins_a_new_episode(tmp_path, monkeypatch):
    options = dict(env="Pendulum-v1", algo="sac", eval_episodes=0, checkpoint_every=40)
    folder = stopped_run(monkeypatch, tmp_path, SAC, "update", 150, **options)
    assert checkpoint(folder)["step"] == 120 and not checkpoint(folder)["timeouts"].any()
    command(monkeypatch, online, resume=folder)
    saved = checkpoint(folder)
    rows, timeouts = saved["replay"], saved["timeouts"]
    assert saved["step"] == len(rows) == 130 and torch.nonzero(timeouts).flatten().tolist() == [119]
    assert torch.equal((rows[:-1, 5:8] == rows[1:, :3]).all(1), ~timeouts[:-1])


def test_ended_run_can_still_be_saved(tmp_path, monkeypatch):
    folder, path = run(tmp_path, algo="sac", eval_episodes=0), tmp_path / "late.h5"
    command(monkeypatch, online, resume=folder, save_dataset=path)
    with h5py.File(path) as f:
        np.testing.assert_array_equal(f["rewards"], checkpoint(folder)["replay"][:, 4])
    path.write_text("mine")
    command(monkeypatch, online, resume=folder, save_dataset=path)
    assert path.read_text() == "mine"


BAD_COMMANDS = {
    "cannot make the environment NoSuch-v0": "--env NoSuch-v0",
    "only flat Box spaces": "--env CartPole-v1",
    "only flat Box spaces with float actions in a range": "--env Unbounded-v0",
    "only flat Box spaces with float actions": "--env dmc/lqr-lqr_6_2",
    "and Box.* only flat Box spaces": "--env Integers-v0",
    "and Box.* only flat Box spaces with float": "--env Narrow-v0",
    "cannot make the environment dmc/cheetah-fly": "--env dmc/cheetah-fly",
    "cannot make the environment dmc/cheetah": "--env dmc/cheetah",
    "--num-q must be at least 2": "--num-q 1",
    "--synther-ratio cannot be 1.5": "--synther-ratio 1.5",
    "--total-steps cannot be 0": "--total-steps 0",
    "--seed cannot be -1": "--seed -1",
    "--learning-starts must be less": "--algo sac --total-steps 400",
    "--retrain-every must be less": "--total-steps 700 --retrain-every 700",
    "old.hdf5": "--save-dataset old.hdf5",
    "must be a new .hdf5 file in an existing folder": "--save-dataset nowhere/new.hdf5",
    "must be a new .hdf5 file": "--save-dataset test/replay-v0",
    "File exists|Not a directory": "--out-dir old.hdf5",
    "not a run folder of this script": "--resume nothing",
    "td3bc_run is not a run folder": "--resume td3bc_run",
    "started with another algo": "--resume run --algo redq",
    "cannot read run/checkpoint.pt": "--resume run",
}


@pytest.mark.parametrize("message", BAD_COMMANDS)
def test_bad_command_ends_in_one_sentence(tmp_path, monkeypatch, capsys, message):
    """Exit code 2, one line that begins with `error:`, nothing made and nothing changed."""
    for name, args in (
        ("run", Args(algo="sac", device="cpu")),
        ("td3bc_run", synther_td3bc.Args()),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps(vars(args)))
    (tmp_path / "run/checkpoint.pt").write_bytes(b"PK damaged")
    (tmp_path / "old.hdf5").write_text("old")
    contents = lambda: {str(p): p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}  # noqa: E731
    before = contents()
    monkeypatch.chdir(tmp_path)
    words = iter(BAD_COMMANDS[message].split())
    with pytest.raises(SystemExit) as ended:
        command(
            monkeypatch,
            online,
            device="cpu",
            **{key[2:].replace("-", "_"): next(words) for key in words},
        )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and re.search(message, line) and contents() == before
