"""Tests of synther_sac_online.py: agent, environments, replay buffer, whole and stopped runs."""

import copy
import json
import math
import re
from types import SimpleNamespace

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

# --- Environments and runs of these tests ---


class Toy(gym.Env):
    """A point that moves by a tenth of the action, whose second half is in other units. It seeks the
    middle. Every episode begins in one place, and ends `limit` away from the middle."""

    observation_space = gym.spaces.Box(-9, 9, (2,), np.float64)
    action_space = gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 4]))

    def __init__(self, limit=1.1):
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
    """Writes each observation into the same array, and has arrays of one element as rewards."""

    def step(self, action):
        array = self.position
        _, reward, *others = super().step(action)
        array[:] = self.position
        self.position = array
        return array, np.array([reward]), *others


class Broken(Toy):
    """Gives NaN from the 30th step on."""

    steps = 0

    def step(self, action):
        self.steps += 1
        obs, *others = super().step(action)
        return obs * math.nan if self.steps >= 30 else obs, *others


def with_actions(*bounds):
    toy = Toy()
    toy.action_space = gym.spaces.Box(*bounds)
    return toy


gym.register("Toy-v0", Toy, max_episode_steps=20)
gym.register("Loop-v0", lambda: Toy(limit=math.inf), max_episode_steps=20)
gym.register("Edge-v0", lambda: Toy(limit=0), max_episode_steps=1)
gym.register("Reusing-v0", Reusing, max_episode_steps=20)
gym.register("Broken-v0", Broken, max_episode_steps=20)
gym.register("Wrapped-v0", lambda: gym.wrappers.RescaleAction(Toy(), np.float32(-2), np.float32(2)))
gym.register("Integers-v0", lambda: with_actions(0, 3, (2,), int))
gym.register("Narrow-v0", lambda: with_actions(np.float32([-1, 1]), np.float32([1, 1])))
gym.register("Unbounded-v0", lambda: gym.wrappers.ClipAction(Toy()))

TINY = dict(env="Toy-v0", device="cpu", total_steps=130, learning_starts=50, utd=2, num_q=2)
TINY |= dict(hidden_dim=16, batch_size=32, eval_every=50, eval_episodes=1, retrain_every=60)
TINY |= dict(diffusion_steps=50, diffusion_width=16, diffusion_depth=2, num_samples=300)


def run(out_dir, **options):
    """main() with these arguments beside TINY. Returns the run folder."""
    return helpers.run(online, out_dir, **TINY | options)


def checkpoint(folder):
    return edm.load_torch(folder / "checkpoint.pt")


# --- Arguments and environments ---

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
    args = Args(env=env, algo=algo)
    online.fill_args(args)
    assert {name: getattr(args, name) for name in PAPER | expected} == PAPER | expected


@pytest.mark.parametrize(
    "name, obs_dim, act_dim",
    [("dmc/cheetah-run", 17, 6), ("dmc/quadruped-walk", 78, 12), ("dmc/reacher-hard", 6, 2)],
)
def test_dmc_equals_the_suite(name, obs_dim, act_dim):
    """Observations in dm_control's order, its rewards, seeded resets, a time limit of 1000 steps."""
    from dm_control import suite

    env = online.make_env(name).unwrapped
    assert (env.observation_space.shape, env.action_space.shape) == ((obs_dim,), (act_dim,))
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


def test_dmc_ends_an_episode_whose_simulation_fails(monkeypatch):
    from dm_control.rl.control import PhysicsError

    def fail(action):
        raise PhysicsError

    env = online.make_env("dmc/reacher-hard")
    env.reset(seed=2**32)  # more than dm_control can take
    action = np.zeros(2, np.float32)
    expected, *_ = env.step(action)
    monkeypatch.setattr(env.unwrapped.dm_env, "step", fail)
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
        after, *_ = env.step(np.array([0, action], np.float32))
        np.testing.assert_allclose(after - before, [0, 0.1 * np.clip(action, -1, 1)], atol=1e-6)


def test_normalized_score():
    assert online.normalized_score("Hopper-v5", 3234.3) == 100
    assert online.normalized_score("dmc/cheetah-run", 250.0) == 25
    assert math.isnan(online.normalized_score("Pendulum-v1", 0.0))


# --- Agent ---


def make_agent(obs_dim=3, act_dim=2, **options):
    options = dict(num_q=2, hidden_dim=16, learning_rate=1e-3) | options
    return SAC(obs_dim, act_dim, Args(device="cpu", **options))


def test_density_of_the_policy(float64):
    torch.manual_seed(0)
    actor = TanhGaussianActor(3, 2, 16, 2).requires_grad_(False)
    obs = 0.5 * torch.randn(1_000, 3)
    actions, log_density = actor.sample(obs)
    h = actor.net(obs)
    normal = torch.distributions.Normal(actor.mean(h), actor.log_std(h).exp())
    squash = torch.distributions.TanhTransform()
    squashed = torch.distributions.TransformedDistribution(normal, squash)
    expected = squashed.log_prob(actions).sum(1)
    away = actions.abs().amax(1) < 0.99  # near the bounds the 1e-6 in the density shows
    assert away.sum() > 300
    torch.testing.assert_close(log_density[away], expected[away], atol=1e-3, rtol=1e-3)
    assert ((actions.atanh() - normal.mean) / normal.stddev).std() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(actor.act(obs), normal.mean.tanh())


def test_initial_weights():
    torch.manual_seed(0)
    agent = make_agent(17, 6, num_q=3, hidden_dim=256)
    for name, parameter in [*agent.actor.named_parameters(), *agent.critic.named_parameters()]:
        if "bias" in name:
            assert (parameter == 0).all()
        else:
            bound = math.sqrt(6 / sum(parameter.shape[-2:]))
            assert 0.9 * bound < parameter.abs().max() <= bound
            assert parameter.mean().abs() < 0.1 * bound
    assert_same_state(agent.critic.state_dict(), agent.critic_target.state_dict())
    assert [make_agent(target_entropy=x).target_entropy for x in (None, -1.5)] == [-2, -1.5]


@pytest.mark.parametrize("num_q, utd, entropy", [(2, 1, None), (2, 4, -1.0), (5, 4, None)])
def test_sac_equals_a_plain_implementation(float64, num_q, utd, entropy):
    """100 updates in the order of REDQ's code. All losses are the same only if all parameters are."""
    torch.manual_seed(0)
    agent = make_agent(num_q=num_q, target_entropy=entropy)
    actor = copy.deepcopy(agent.actor)
    critic = plain(agent.critic)
    target = plain(agent.critic)
    alpha = 0.2
    log_alpha = torch.zeros(1, requires_grad=True)
    params = dict(actor=list(actor.parameters()), critic=list(critic.parameters()))
    params["alpha"] = [log_alpha]
    optimizers = {name: torch.optim.Adam(p, lr=1e-3) for name, p in params.items()}

    def q(net, s, a):
        return torch.cat([member(torch.cat([s, a], 1)) for member in net], 1)

    def act(s):
        h = actor.net(s)
        normal = torch.distributions.Normal(actor.mean(h), actor.log_std(h).clamp(-20, 2).exp())
        raw = normal.mean + normal.stddev * torch.randn_like(normal.mean)
        density = normal.log_prob(raw) - (1 - raw.tanh() ** 2 + 1e-6).log()
        return raw.tanh(), density.sum(1, keepdim=True)

    for i in range(100):
        batch = torch.randn(32, 10)
        batch[:, -1] = (batch[:, -1] > 0.8).double()
        s, a, r, s_next, d = batch.split([3, 2, 1, 3, 1], 1)
        with_actor = i % utd == utd - 1
        torch.manual_seed(i)
        losses = agent.update(batch, with_actor)

        torch.manual_seed(i)
        with torch.no_grad():
            a_next, log_prob_next = act(s_next)
            chosen = torch.rand(num_q).argsort(descending=True)[:2]
            q_next = q(target, s_next, a_next)[:, chosen].min(1, keepdim=True).values
            y = r + 0.99 * (1 - d) * (q_next - alpha * log_prob_next)
        critic_loss = ((q(critic, s, a) - y) ** 2).mean(0).sum()
        actor_loss = torch.zeros(())
        grads = {"critic": torch.autograd.grad(critic_loss, params["critic"])}
        if with_actor:
            pi, log_prob = act(s)
            actor_loss = (alpha * log_prob - q(critic, s, pi).mean(1, keepdim=True)).mean()
            surplus = log_prob + (-2 if entropy is None else entropy)
            alpha_loss = -(log_alpha * surplus.detach()).mean()
            grads["actor"] = torch.autograd.grad(actor_loss, params["actor"])
            grads["alpha"] = torch.autograd.grad(alpha_loss, params["alpha"])
        expected = torch.stack([critic_loss, actor_loss]).detach()
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
        for name, gradient in grads.items():
            for parameter, grad in zip(params[name], gradient):
                parameter.grad = grad
            optimizers[name].step()
        if with_actor:
            alpha = log_alpha.exp().item()
        for p, t in zip(critic.parameters(), target.parameters()):
            t.data += 0.005 * (p.data - t.data)


# --- Replay buffer and saved datasets ---


@pytest.mark.parametrize(
    "batch_size, ratio, rows, num_synthetic",
    [(256, 0.5, 70, 128), (10, 0.25, 70, 2), (10, 0.0, 70, 0), (4, 1.0, 70, 4), (256, 0.5, 0, 0)],
)
def test_mix_of_a_batch(batch_size, ratio, rows, num_synthetic):
    """int(batch_size * ratio) rows are generated, none before the first model. All rows are drawn."""
    torch.manual_seed(0)
    real = torch.arange(50.0)[:, None]
    synthetic = 1_000 + torch.arange(float(rows))[:, None]
    batches = online.sample_batches(real, synthetic, 300, batch_size, ratio)
    assert batches.shape == (300, batch_size, 1) and not torch.equal(batches[0], batches[1])
    assert ((batches >= 1_000).sum(1) == num_synthetic).all()
    num_real = 50 if num_synthetic < batch_size else 0
    assert len(batches.unique()) == num_real + (70 if num_synthetic else 0)


@pytest.mark.parametrize("terminal", [None, 2, 6])
def test_saved_hdf5(tmp_path, terminal):
    """Actions in the environment's units, the oldest row first. Episodes end where s' is not the next
    s, and at the last row."""
    path = tmp_path / "data.hdf5"
    rows = torch.rand(7, 8)
    pairs = [[-1, -1], [1, 1], [0, 0], [0.5, -0.5], [0, 1], [1, 0], [-0.5, 0.5]]
    rows[:, 2:4] = torch.tensor(pairs)
    for i in (0, 1, 3, 5):
        rows[i, 5:7] = rows[i + 1, :2]
    rows[:, -1] = 0
    if terminal is not None:
        rows[terminal, -1] = 1
    replay = SimpleNamespace(rows=rows.roll(3, 0), step=10)  # the first three were overwritten
    online.save_dataset(path, online.make_env("Toy-v0"), replay)
    expected = dict(observations=rows[:, :2], rewards=rows[:, 4], terminals=rows[:, -1] == 1)
    expected["next_observations"] = rows[:, 5:7]
    pairs = [[-1, 0], [1, 4], [0, 2], [0.5, 1], [0, 4], [1, 2], [-0.5, 3]]
    expected["actions"] = torch.tensor(pairs)
    is_timeout = [i in (2, 4, 6) and i != terminal for i in range(7)]
    expected["timeouts"] = torch.tensor(is_timeout)
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
    """Wrappers of an id belong to the environment. Here they make a range of 2 out of others."""
    path = tmp_path / "data.hdf5"
    options = dict(algo="sac", eval_episodes=0, save_dataset=str(path))
    folder = run(tmp_path / "runs", env="Wrapped-v0", **options)
    with h5py.File(path) as f:
        moves = f["next_observations"][:] - f["observations"][:]
        np.testing.assert_allclose(f["actions"], 20 * moves, atol=1e-5)
        np.testing.assert_allclose(f["actions"], 2 * checkpoint(folder)["replay"][:, 2:4])


def test_full_buffer_forgets_the_oldest(tmp_path, monkeypatch):
    path = tmp_path / "data.hdf5"
    options = dict(env="Loop-v0", algo="sac", eval_episodes=0, learning_starts=129)
    whole = checkpoint(run(tmp_path / "a", **options))["replay"]
    monkeypatch.setattr(online, "CAPACITY", 100)
    folder = run(tmp_path / "b", **options, save_dataset=str(path))
    assert torch.equal(checkpoint(folder)["replay"], torch.cat([whole[100:130], whole[30:100]]))
    assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.csv", "checkpoint.pt"}
    with h5py.File(path) as f:
        np.testing.assert_array_equal(f["rewards"], whole[30:, 4])
        assert np.flatnonzero(f["timeouts"]).tolist() == [9, 29, 49, 69, 89, 99]


@pytest.mark.parametrize("env", ["Toy-v0", "Reusing-v0"])
def test_replay_buffer_holds_what_happened(tmp_path, env):
    """s' of a row is the s of the next but at the ends of episodes. Time limits are not terminal."""
    rows = checkpoint(run(tmp_path, env=env, algo="sac", total_steps=300))["replay"]
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


# --- Whole runs ---


def test_run_folder_and_log(tmp_path, capsys):
    folder = run(tmp_path, env="dmc/reacher-hard", seed=3)
    assert folder.name.startswith("dmc-reacher-hard__synther_sac_online-synther__3__")
    files = "args.json metrics.csv checkpoint.pt diffusion.pt synthetic.npz final_returns.npz"
    files += " learning_curve.png marginals.png"
    assert {path.name for path in folder.iterdir()} == set(files.split())
    metrics = read_metrics(folder)
    steps = {}
    for step, key in metrics:
        steps.setdefault(key, []).append(step)
    assert steps["diffusion/marginal"] == steps["diffusion/loss"] == [60, 120]  # one model each
    assert steps["eval/normalized_score"] == steps["eval/return_mean"] == [0, 50, 100, 130]
    assert steps["train/critic_loss"] == steps["train/alpha"] == [100, 130]
    keys = "diffusion/correlation train/actor_loss eval/return_std perf/updates_per_sec"
    keys += " perf/samples_per_sec perf/diffusion_seconds perf/seconds"
    assert set(keys.split()) < set(steps)
    assert all(map(math.isfinite, metrics.values())) and capsys.readouterr().out.isascii()
    args = json.loads((folder / "args.json").read_text())
    assert (args["num_q"], args["standardize_reward"]) == (2, False)
    with np.load(folder / "final_returns.npz") as final:
        assert final["steps"].tolist() == [0, 50, 100, 130]
        np.testing.assert_allclose(final["normalized_scores"], final["returns"] / 10)
    assert not edm.load_transitions(folder / "synthetic.npz")["terminals"].any()


def test_updates_and_their_batches(tmp_path, monkeypatch):
    """utd updates a step, the policy's at the last. Half of each batch is from the last model, which
    has a seed of its own. Terminals are 0 or 1."""
    updates = []
    update = SAC.update

    def generate(model, num_samples, seed, **changes):
        rows = torch.full((num_samples, len(model.mean)), 1e3 + seed)
        rows[:, -1] = torch.linspace(0, 1, num_samples)
        return rows

    def recording_update(self, batch, with_actor):
        updates.append((batch.clone(), with_actor))
        return update(self, batch, with_actor)

    monkeypatch.setattr(edm, "generate", generate)
    monkeypatch.setattr(SAC, "update", recording_update)
    run(tmp_path, utd=3, eval_episodes=0, terminals="column")
    batches = torch.stack([batch for batch, _ in updates])
    assert [with_actor for _, with_actor in updates] == 80 * [False, False, True]
    is_synthetic = batches[:, :, 0] > 500
    assert not is_synthetic[:30].any() and (is_synthetic[30:].sum(1) == 16).all()
    assert (batches[30:210][is_synthetic[30:210]][:, 0] == 1_060).all()
    assert (batches[210:][is_synthetic[210:]][:, 0] == 1_120).all()  # replaced, not added
    assert set(batches[:, :, -1].unique().tolist()) == {0, 1}
    assert 0.4 < batches[is_synthetic][:, -1].mean() < 0.6


def test_diffusion_leaves_environment_and_agent_alone(tmp_path):
    """With a synthetic share of 0, a run with diffusion models is the same as one without."""
    with_models = run(tmp_path / "a", algo="synther", synther_ratio=0.0)
    without = run(tmp_path / "b", algo="sac", synther_ratio=0.0)
    assert (with_models / "synthetic.npz").exists() and not (without / "synthetic.npz").exists()
    a = checkpoint(with_models)
    b = checkpoint(without)
    for key in ("replay", "agent", "actor", "critic", "rng", "evaluations"):
        assert_same_state(a[key], b[key], key)


@pytest.mark.parametrize(
    "env, standardize_reward, dim, raw",
    [
        ("Toy-v0", True, 8, [7]),
        ("Toy-v0", False, 8, [4, 7]),
        ("dmc/reacher-hard", True, 15, []),
        ("dmc/reacher-hard", None, 15, [8]),
    ],
)
def test_columns_of_the_diffusion_model(tmp_path, env, standardize_reward, dim, raw):
    """Terminals are not standardised, and no part of the model in DeepMind Control."""
    options = dict(total_steps=61, eval_episodes=0, num_samples=8, diffusion_recipe="paper")
    folder = run(tmp_path, env=env, standardize_reward=standardize_reward, **options)
    model = edm.load_edm(folder / "diffusion.pt")
    assert len(model.mean) == dim and model.recipe.time_dim == 256
    assert ((model.mean == 0) & (model.std == 1)).nonzero()[:, 0].tolist() == raw


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_warm_start_goes_on_with_the_weights(tmp_path, monkeypatch, recipe):
    """The learning rate is so small that training changes nothing."""
    weights = []
    save_edm = edm.save_edm

    def recording_save_edm(path, model):
        weights.append(model.denoiser.blocks[0].weight)
        save_edm(path, model)

    monkeypatch.setattr(edm, "save_edm", recording_save_edm)
    options = dict(eval_episodes=0, num_samples=8, diffusion_recipe=recipe, diffusion_lr=1e-12)
    run(tmp_path / "warm", warm_start=True, **options)
    run(tmp_path / "cold", warm_start=False, **options)
    torch.testing.assert_close(weights[1], weights[0])
    assert torch.equal(weights[2], weights[0]) and not weights[3].allclose(weights[0], atol=0.1)


def test_actions_are_random_first_and_then_the_policys(tmp_path, monkeypatch):
    """The first learning_starts + 1 from the whole range; all others sampled, not the mean."""
    sampled = []
    sample = TanhGaussianActor.sample

    def recording_sample(self, observations):
        actions, log_density = sample(self, observations)
        if len(observations) == 1:
            sampled.append(actions[0])
        return actions, log_density

    monkeypatch.setattr(TanhGaussianActor, "sample", recording_sample)
    folder = run(tmp_path, algo="sac", learning_starts=100, eval_episodes=0)
    actions = checkpoint(folder)["replay"][:, 2:4]
    assert len(sampled) == 29 and torch.equal(actions[101:], torch.stack(sampled))
    assert actions[:101].abs().max() > 0.95
    assert actions[:101].std() == pytest.approx(1 / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("algo, steps, utd", [("sac", 1_200, 1), ("synther", 600, 3)])
def test_agent_learns(tmp_path, algo, steps, utd):
    """To go to the middle and to stay there gives about -5, to stay at the start -20."""
    options = dict(env="Loop-v0", algo=algo, total_steps=steps, eval_every=steps, utd=utd)
    options |= dict(learning_starts=200, hidden_dim=64, batch_size=128, learning_rate=2e-3)
    options |= dict(tau=0.02, discount=0.9, retrain_every=300, diffusion_steps=500)
    folder = run(tmp_path, diffusion_width=64, num_samples=3_000, **options)
    first, last = np.load(folder / "final_returns.npz")["returns"].mean(1)
    assert first < -15 and last > -8


def test_broken_environment_is_named(tmp_path):
    with pytest.raises(edm.RunError, match="Broken-v0 gave NaN or Inf at step 28"):
        run(tmp_path, env="Broken-v0", algo="sac", eval_episodes=0)  # one step was a trial


def test_diverging_agent_stops_the_run(tmp_path):
    with pytest.raises(edm.RunError, match="the agent's action became NaN or Inf at step 5[1-9]"):
        run(tmp_path, algo="sac", learning_rate=1e30)


# --- Runs that were stopped ---


def stopped_run(monkeypatch, out_dir, owner, name, count, **options):
    """The folder of a run that ends at the call number `count` of owner.name."""
    calls = []
    original = getattr(owner, name)

    def stopping(*args, **kwargs):
        calls.append(0)
        if len(calls) == count:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, stopping)
        run(out_dir, **options)
    (folder,) = out_dir.glob("*__*")
    return folder


# Episodes begin in one place and end at each checkpoint. So a new episode changes nothing.
EXACT = dict(env="Loop-v0", seed=1, learning_starts=30, eval_every=20, warm_start=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), **EXACT)


@pytest.mark.parametrize("name", ["update", "train_edm", "generate", "save_edm", "plot_marginals"])
@pytest.mark.parametrize("count", [1, 2])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, whole, owner, name, count):
    folder = stopped_run(monkeypatch, tmp_path, owner, name, count, **EXACT)
    if name == "plot_marginals":
        assert checkpoint(folder)["model_step"] == 60  # the results are kept before they are shown
    command(monkeypatch, online, resume=folder)
    states = []
    logs = []
    for own in (folder, whole):
        state = checkpoint(own) | dict(model=edm.load_edm(own / "diffusion.pt").state_dict())
        del state["seconds"], state["log_size"]
        states.append(state)
        logs.append([item for item in read_metrics(own).items() if "perf/" not in item[0][1]])
    assert_same_state(*states)
    assert logs[0] == logs[1]
    for file in ("synthetic.npz", "final_returns.npz"):
        with np.load(folder / file) as a, np.load(whole / file) as b:
            for key in b.files:
                np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_resume_begins_a_new_episode(tmp_path, monkeypatch):
    options = dict(env="Pendulum-v1", algo="sac", eval_episodes=0, eval_every=40)
    folder = stopped_run(monkeypatch, tmp_path, SAC, "update", 150, **options)
    assert checkpoint(folder)["step"] == 120
    command(monkeypatch, online, resume=folder)
    rows = checkpoint(folder)["replay"]
    assert len(rows) == 130 and edm.episode_starts(rows, 3).nonzero()[:, 0].tolist() == [0, 120]


def test_ended_run_can_still_be_saved(tmp_path, monkeypatch):
    folder = run(tmp_path, algo="sac", eval_episodes=0)
    path = tmp_path / "late.h5"
    command(monkeypatch, online, resume=folder, save_dataset=path)
    with h5py.File(path) as f:
        np.testing.assert_array_equal(f["rewards"], checkpoint(folder)["replay"][:, 4])
    path.write_text("mine")
    command(monkeypatch, online, resume=folder, save_dataset=path)
    assert path.read_text() == "mine"


SPACES = "not flat Box spaces with float actions in a range"
BAD_COMMANDS = {
    "--env NoSuch-v0": "cannot make the environment NoSuch-v0",
    "--env dmc/cheetah-fly": "cannot make the environment dmc/cheetah-fly",
    "--env dmc/cheetah": "cannot make the environment dmc/cheetah",
    "--env CartPole-v1": SPACES,
    "--env Unbounded-v0": SPACES,
    "--env dmc/lqr-lqr_6_2": SPACES,
    "--env Integers-v0": SPACES,
    "--env Narrow-v0": SPACES,
    "--num-q 1": "--num-q cannot be 1",
    "--synther-ratio 1.5": "--synther-ratio cannot be 1.5",
    "--total-steps 0": "--total-steps cannot be 0",
    "--seed -1": "--seed cannot be -1",
    "--algo sac --total-steps 400": "--total-steps must exceed --learning-starts",
    "--total-steps 700 --retrain-every 700": "--total-steps must exceed .* --retrain-every",
    "--save-dataset old.hdf5": "--save-dataset must be a new .hdf5 file in a folder, not old.hdf5",
    "--save-dataset nowhere/new.hdf5": "--save-dataset must be a new .hdf5 file",
    "--save-dataset test/replay-v0": "--save-dataset must be a new .hdf5 file",
    "--out-dir old.hdf5": "File exists|Not a directory",
    "--resume nothing": "nothing is not a run folder",
    "--resume td3bc_run": "td3bc_run is not a run folder",
    "--resume run --algo redq": "run was started with another algo",
    "--resume run": "cannot read run/checkpoint.pt",
}


@pytest.mark.parametrize("words", BAD_COMMANDS)
def test_bad_command_ends_in_one_sentence(tmp_path, monkeypatch, capsys, words):
    """Exit code 2, one line that begins with `error:`, nothing made and nothing changed."""
    run_args = Args(algo="sac", device="cpu")
    for name, args in (("run", run_args), ("td3bc_run", synther_td3bc.Args())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps(vars(args)))
    (tmp_path / "run/checkpoint.pt").write_bytes(b"PK damaged")
    (tmp_path / "old.hdf5").write_text("old")

    def contents():
        return {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    before = contents()
    monkeypatch.chdir(tmp_path)
    pairs = re.findall(r"--(\S+) (\S+)", words)
    options = {name.replace("-", "_"): value for name, value in pairs}
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, online, device="cpu", **options)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and re.search(BAD_COMMANDS[words], line) and contents() == before
