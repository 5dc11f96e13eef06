"""Tests of synther_sac_online.py: agent, replay buffer, environments, datasets; whole runs, killed and resumed."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    PointEnv,
    agent_rows,
    assert_same_state,
    flags,
    read_metrics,
    separate_critics,
    snapshot,
    wait_and_kill,
)
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import edm
import synther_sac_online
import synther_td3bc
from edm import RunError
from synther_sac_online import SAC, Args, TanhGaussianActor

SCRIPT = Path(synther_sac_online.__file__)

# --- Settings by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env, algo, expected",
    [
        ("HalfCheetah-v4", "sac", dict(utd=1, num_q=2, total_steps=100_000, learning_starts=5_000)),
        ("Walker2d-v4", "redq", dict(utd=20, num_q=10, eval_every=1_000, standardize_reward=True)),
        ("Hopper-v4", "synther", dict(utd=20, num_q=2, retrain_every=10_000, num_samples=1_000_000)),
        ("Hopper-v4", "synther", dict(diffusion_steps=100_000, diffusion_width=1024, diffusion_lr=3e-4)),
        ("dmc/cheetah-run", "synther", dict(utd=20, num_q=2, total_steps=200_000, standardize_reward=False)),
    ],
)
def test_values_of_the_paper(env, algo, expected):
    args = synther_sac_online.resolve(Args(env=env, algo=algo))
    assert {name: getattr(args, name) for name in expected} == expected
    assert (args.batch_size, args.discount, args.tau, args.synther_ratio) == (256, 0.99, 0.005, 0.5)
    assert synther_sac_online.resolve(Args(env=env, algo=algo, utd=3, num_samples=7)).utd == 3


# --- Environments -----------------------------------------------------------------------------------------------------


def random_steps(env, num_steps, seed):
    """What the environment answers to random actions, resets included."""
    rng, answers = np.random.default_rng(seed), []
    for _ in range(num_steps):
        obs, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        answers += [*obs, reward, terminated, truncated]
        if terminated or truncated:
            answers += [*env.reset()[0]]
    return np.array(answers)


@pytest.mark.parametrize(
    "env_id, num_steps",
    [
        ("Pendulum-v1", 300), ("Hopper-v4", 200), ("Ant-v4", 200), ("HalfCheetah-v4", 1_100),
        ("dmc/reacher-hard", 1_100), ("dmc/cheetah-run", 50), ("dmc/quadruped-walk", 50),
    ],
)  # fmt: skip
def test_environment_goes_on_from_its_saved_state(env_id, num_steps):
    """To the last bit, through resets and time limits, in a new environment of another past."""
    env, other = synther_sac_online.make_env(env_id), synther_sac_online.make_env(env_id)
    env.reset(seed=1), other.reset(seed=2)
    random_steps(env, 30, seed=0), random_steps(other, 45, seed=1)
    synther_sac_online.set_env_state(other, synther_sac_online.get_env_state(env))
    np.testing.assert_array_equal(random_steps(env, num_steps, seed=2), random_steps(other, num_steps, seed=2))


@pytest.mark.parametrize(
    "env_id, obs_dim, act_dim", [("dmc/cheetah-run", 17, 6), ("dmc/quadruped-walk", 78, 12), ("dmc/reacher-hard", 6, 2)]
)
def test_dmc_equals_the_suite(env_id, obs_dim, act_dim):
    """Observations in dm_control's order, its rewards, 1000 steps and then truncated, seeded resets."""
    from dm_control import suite

    env = synther_sac_online.make_env(env_id).unwrapped
    assert (env.observation_space.shape, env.action_space.shape) == ((obs_dim,), (act_dim,))
    domain, task = env_id[4:].split("-")
    dm_env = suite.load(domain, task, task_kwargs={"random": 7})
    expected, (obs, _) = dm_env.reset(), env.reset(seed=7)
    rng = np.random.default_rng(0)
    for t in range(1_000):
        if t in (0, 1, 500, 999):
            np.testing.assert_array_equal(obs, np.hstack([*map(np.ravel, expected.observation.values())]).astype("f"))
        action = rng.uniform(env.action_space.low, env.action_space.high)
        obs, reward, terminated, truncated, _ = env.step(action)
        expected = dm_env.step(action)
        assert reward == expected.reward and not terminated and truncated == (t == 999)
    assert synther_sac_online.normalized_score(env_id, 250.0) == 25


def test_actions_are_rescaled_and_clipped():
    env, plain = synther_sac_online.make_env("Pendulum-v1"), gym.make("Pendulum-v1")
    for action in (-3.0, -1.0, 0.25, 5.0):
        env.reset(seed=0), plain.reset(seed=0)
        actual = env.step(np.array([action], np.float32))
        expected = plain.step(np.array([2 * np.clip(action, -1, 1)], np.float32))
        np.testing.assert_allclose(actual[0], expected[0], atol=1e-6)


@pytest.mark.parametrize("env_id", ["NoSuch-v0", "CartPole-v1", "dmc/cheetah", "dmc/cheetah-fly", "dmc/nobody-run"])
def test_unknown_environment(env_id):
    with pytest.raises(RunError) as error:
        synther_sac_online.make_env(env_id)
    assert env_id in str(error.value) and "\n" not in str(error.value)


# --- Networks and agent -----------------------------------------------------------------------------------------------


def test_density_of_the_policy(float64):
    torch.manual_seed(0)
    actor, obs = TanhGaussianActor(3, 2, 16, 2).requires_grad_(False), 0.5 * torch.randn(1_000, 3)
    actions, log_density = actor.sample(obs)
    h = actor.net(obs)
    normal = Normal(actor.mean(h), actor.log_std(h).exp())
    expected = Independent(TransformedDistribution(normal, TanhTransform(cache_size=1)), 1).log_prob(actions)
    away = actions.abs().amax(1) < 0.99  # near the bounds the 1e-6 in the density shows
    assert away.sum() > 300
    torch.testing.assert_close(log_density[away], expected[away], atol=1e-3, rtol=1e-3)
    standardised = (actions.atanh() - actor.mean(h)) / actor.log_std(h).exp()
    assert standardised.std() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(actor(obs), actor.mean(h).tanh())


def test_initial_weights():
    torch.manual_seed(0)
    agent = SAC(17, 6, synther_sac_online.resolve(Args(num_q=3)), "cpu")
    layers = [m for m in agent.actor.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 4
    weights = [(layer.weight, layer.weight.shape, layer.bias) for layer in layers]
    weights += [(w, w.shape[1:], b) for w, b in zip(agent.critic.weights, agent.critic.biases)]
    for weight, shape, bias in weights:
        bound = math.sqrt(6 / sum(shape))
        assert 0.9 * bound < weight.abs().max() <= bound and (bias == 0).all()
    assert torch.equal(snapshot(agent.critic), snapshot(agent.critic_target))


def sac_args(**options):
    return synther_sac_online.resolve(Args(hidden_dim=16, learning_rate=1e-3, **options))


@pytest.mark.parametrize("num_q, utd", [(2, 1), (2, 4), (5, 4)])
def test_sac_equals_a_plain_implementation(float64, num_q, utd):
    """100 updates in the order of REDQ's code: a network and an optimiser per critic, the policy at every last one."""
    torch.manual_seed(0)
    rows, agent = agent_rows(500), SAC(3, 2, sac_args(num_q=num_q), "cpu")
    actor, critics = copy.deepcopy(agent.actor), separate_critics(agent.critic)
    targets = copy.deepcopy(critics)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    critic_optimizers = [torch.optim.Adam(critic.parameters(), lr=1e-3) for critic in critics]
    log_alpha = torch.zeros(1, requires_grad=True)
    alpha_optimizer, alpha = torch.optim.Adam([log_alpha], lr=1e-3), 0.2

    def sample(obs):
        h = actor.net(obs)
        mean, std = actor.mean(h), actor.log_std(h).clamp(-20, 2).exp()
        noise = torch.randn_like(mean)
        action = torch.tanh(mean + std * noise)
        log_prob = Normal(mean, std).log_prob(mean + std * noise) - torch.log(1 - action**2 + 1e-6)
        return action, log_prob.sum(1, keepdim=True)

    for i in range(100):
        batch, last = rows[torch.randint(500, (32,))], i % utd == utd - 1
        torch.manual_seed(i)
        critic_loss, actor_loss = agent.update(batch, last)

        torch.manual_seed(i)
        s, a, r, s_next, d = batch[:, :3], batch[:, 3:5], batch[:, 5:6], batch[:, 6:9], batch[:, 9:]
        with torch.no_grad():
            a_next, log_prob_next = sample(s_next)
            chosen = torch.rand(num_q).argsort(descending=True)[:2]
            q_next = torch.cat([targets[k](torch.cat([s_next, a_next], 1)) for k in chosen], 1)
            y = r + 0.99 * (1 - d) * (q_next.min(1, keepdim=True).values - alpha * log_prob_next)
        q = torch.cat([critic(torch.cat([s, a], 1)) for critic in critics], 1)
        plain_loss = num_q * F.mse_loss(q, y.expand(-1, num_q))
        for optimizer in critic_optimizers:
            optimizer.zero_grad()
        plain_loss.backward()
        assert critic_loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
        if last:
            for critic in critics:
                critic.requires_grad_(False)
            pi, log_prob = sample(s)
            q_pi = torch.cat([critic(torch.cat([s, pi], 1)) for critic in critics], 1).mean(1, keepdim=True)
            plain_loss = (alpha * log_prob - q_pi).mean()
            actor_optimizer.zero_grad()
            plain_loss.backward()
            for critic in critics:
                critic.requires_grad_(True)
            assert actor_loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
            alpha_loss = -(log_alpha * (log_prob - 2).detach()).mean()
            alpha_optimizer.zero_grad()
            alpha_loss.backward()
            alpha_optimizer.step()
            alpha = log_alpha.exp().item()
        for optimizer in critic_optimizers:
            optimizer.step()
        if last:
            actor_optimizer.step()
        for critic, target in zip(critics, targets):
            for p, t in zip(critic.parameters(), target.parameters()):
                t.data.mul_(0.995).add_(0.005 * p.data)

    assert agent.alpha.item() == pytest.approx(alpha, rel=1e-6)
    pairs = [(agent.actor, actor)]
    for ours, plain in ((agent.critic, critics), (agent.critic_target, targets)):
        pairs += zip(separate_critics(ours), plain)
    for ours, plain in pairs:
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_q", [2, 5])
def test_target_takes_a_random_pair_of_critics(num_q):
    """Critic k answers k, so that the target shows the smaller member of its pair."""
    torch.manual_seed(0)
    agent, batch = SAC(3, 2, sac_args(num_q=num_q, discount=1.0), "cpu"), agent_rows(64)
    batch[:, 5], batch[:, -1], agent.alpha[:] = 0, 0, 0  # no reward, no end, no entropy
    for parameter in agent.target_params:
        parameter.zero_()
    agent.critic_target.biases[-1][:, 0, 0] = torch.arange(num_q)
    seen, start = [], copy.deepcopy(agent.state_dict())
    for _ in range(300):
        agent.load_state_dict(start)
        with torch.no_grad():
            q = agent.critic(batch[:, :5])
        loss = agent.update(batch, with_actor=False)[0]
        errors = torch.stack([(q - k).square().mean(1).sum() for k in range(num_q)])
        seen.append((errors - loss).abs().argmin().item())
        assert errors[seen[-1]].item() == pytest.approx(loss.item(), rel=1e-5)
    shares = np.bincount(seen, minlength=num_q) / 300
    pairs = num_q * (num_q - 1) / 2
    np.testing.assert_allclose(shares, [(num_q - 1 - k) / pairs for k in range(num_q)], atol=0.1)


def test_updates_change_what_they_should():
    torch.manual_seed(0)
    agent, batch = SAC(3, 2, sac_args(), "cpu"), agent_rows(64)
    parts = {name: getattr(agent, name) for name in ("actor", "critic", "critic_target")}

    def changed(with_actor):
        before, alpha = {name: snapshot(part) for name, part in parts.items()}, agent.alpha.item()
        agent.update(batch, with_actor)
        found = {name for name, part in parts.items() if not torch.equal(snapshot(part), before[name])}
        return found | ({"alpha"} if agent.alpha.item() != alpha else set())

    assert changed(with_actor=False) == {"critic", "critic_target"}
    assert changed(with_actor=True) == {"critic", "critic_target", "actor", "alpha"}


def test_agent_state_comes_back(tmp_path):
    torch.manual_seed(0)
    agent, other, batch = SAC(3, 2, sac_args(), "cpu"), SAC(3, 2, sac_args(), "cpu"), agent_rows(64)
    agent.update(batch, True)
    torch.save(agent.state_dict(), tmp_path / "agent.pt")
    other.load_state_dict(torch.load(tmp_path / "agent.pt", weights_only=True))
    for one in (agent, other):
        torch.manual_seed(1)
        one.update(batch, True)
    assert_same_state(agent.state_dict(), other.state_dict())


# --- Replay buffer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch_size, ratio, num_synthetic", [(256, 0.5, 128), (10, 0.25, 2), (10, 0.0, 0), (4, 1.0, 4)]
)
def test_mix_of_a_batch(batch_size, ratio, num_synthetic):
    """Exactly int(batch_size * ratio) generated rows in every batch, after the real ones; all rows are drawn."""
    torch.manual_seed(0)
    replay, synthetic = torch.arange(50.0)[:, None], 1_000 + torch.arange(70.0)[:, None]
    batches = synther_sac_online.sample_batches(replay, synthetic, 300, batch_size, ratio)
    assert batches.shape == (300, batch_size, 1)
    real = batch_size - num_synthetic
    assert (batches[:, :real] < 1_000).all() and (batches[:, real:] >= 1_000).all()
    if real:
        assert len(batches[:, :real].unique()) == 50
    if num_synthetic:
        assert len(batches[:, real:].unique()) == 70
    assert not torch.equal(batches[0], batches[1])


def test_batches_are_real_before_the_first_model():
    batches = synther_sac_online.sample_batches(torch.zeros(50, 3), torch.zeros(0, 3), 20, 256, 0.5)
    assert batches.shape == (20, 256, 3)


# --- Whole runs, in miniature -----------------------------------------------------------------------------------------

TINY = dict(
    device="cpu", total_steps=260, learning_starts=100, utd=2, hidden_dim=16, batch_size=32, eval_every=100,
    eval_episodes=1, checkpoint_every=5_000, retrain_every=120, diffusion_steps=60, diffusion_width=16,
    diffusion_depth=2, num_samples=500,
)  # fmt: skip


def run(out_dir, **options):
    """main() with these arguments; returns the run folder."""
    before = set(Path(out_dir).glob("*__*"))
    synther_sac_online.main(Args(out_dir=str(out_dir), **options))
    (folder,) = set(Path(out_dir).glob("*__*")) - before
    return folder


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_run_folder_and_log(tmp_path):
    folder = run(tmp_path, env="dmc/reacher-hard", seed=3, **TINY)
    assert folder.name.startswith("dmc-reacher-hard__synther_sac_online-synther__3__")
    assert {path.name for path in folder.iterdir()} == {
        "args.json", "metrics.csv", "checkpoint.pt", "diffusion.pt", "final_returns.npz", "learning_curve.png",
        "marginals.png", "synthetic.npz",
    }  # fmt: skip
    metrics = read_metrics(folder)
    assert {step for step, key in metrics if key == "diffusion/marginal"} == {120, 240}  # one model each
    assert {step for step, key in metrics if key == "eval/return_mean"} == {0, 100, 200, 260}
    assert {key for _, key in metrics} >= {
        "diffusion/loss", "diffusion/correlation", "train/critic_loss", "train/actor_loss", "train/alpha",
        "eval/return_std", "eval/normalized_score", "perf/updates_per_sec", "perf/samples_per_sec", "perf/seconds",
    }  # fmt: skip
    assert all(math.isfinite(value) for value in metrics.values())
    with np.load(folder / "final_returns.npz") as final:
        assert final["steps"].tolist() == [0, 100, 200, 260] and final["returns"].shape == (4, 1)
        np.testing.assert_allclose(final["normalized_scores"], final["returns"] / 10)
    args = json.loads((folder / "args.json").read_text())
    assert args["standardize_reward"] is False and args["num_q"] == 2
    model = edm.load_edm(folder / "diffusion.pt")
    assert model.dim == 6 + 2 + 1 + 6  # no terminal on DeepMind Control
    assert (model.mean[8], model.std[8]) == (0, 1) and (model.std[:8] != 1).all()  # nor is the reward standardised
    synthetic = synther_td3bc.load_transitions(folder / "synthetic.npz")  # as the offline scripts read it
    assert synthetic["observations"].shape == (500, 6) and not synthetic["terminals"].any()


class RecordingAgent(SAC):
    updates = []  # (batch, with_actor)

    def update(self, batch, with_actor):
        self.updates.append((batch.clone(), with_actor))
        return super().update(batch, with_actor)


@pytest.fixture
def updates(monkeypatch):
    """All updates of the agents of this test."""
    monkeypatch.setattr(synther_sac_online, "SAC", RecordingAgent)
    monkeypatch.setattr(RecordingAgent, "updates", [])
    return RecordingAgent.updates


def test_updates_per_step_and_share_of_synthetic_rows(tmp_path, monkeypatch, updates):
    """Nothing before learning_starts; then utd updates a step, the policy's at the last; half synthetic from 120 on."""

    def make_synthetic(args, replay, step, *_):
        return torch.full((500, replay.shape[1]), 1e3 + step)

    monkeypatch.setattr(synther_sac_online, "make_synthetic", make_synthetic)
    run(tmp_path, env="Pendulum-v1", **TINY | dict(utd=3, eval_episodes=0))
    assert [with_actor for _, with_actor in updates] == 160 * [False, False, True]
    share = torch.stack([(batch[:, 0] >= 1e3).float().mean() for batch, _ in updates])
    assert (share[: 3 * 20] == 0).all() and (share[3 * 20 :] == 0.5).all()
    generation = torch.stack([batch[-1, 0] for batch, _ in updates])
    assert (generation[60:420] == 1e3 + 120).all() and (generation[420:] == 1e3 + 240).all()  # replaced, not added


@pytest.mark.parametrize("options", [dict(), dict(warm_start=True, patience=1, terminals="classifier")])
def test_diffusion_leaves_environment_and_agent_alone(tmp_path, monkeypatch, options):
    """With a synthetic share of 0, a run with diffusion stages stores and learns the same as one without."""
    relabel = edm.relabel_terminals
    monkeypatch.setattr(edm, "relabel_terminals", lambda *a, **k: relabel(*a, **k, steps=50))
    options = TINY | dict(env="Hopper-v4", synther_ratio=0.0) | options
    folders = [run(tmp_path / algo, algo=algo, **options) for algo in ("synther", "sac")]
    assert [(folder / "synthetic.npz").exists() for folder in folders] == [True, False]
    with_stages, without = map(checkpoint, folders)
    for key in ("replay", "timeouts", "agent", "rng", "obs", "evaluations"):
        assert_same_state(with_stages[key], without[key], key)


def test_synthetic_data_change_the_agent(tmp_path):
    a = checkpoint(run(tmp_path / "a", env="Pendulum-v1", **TINY))
    b = checkpoint(run(tmp_path / "b", env="Pendulum-v1", **TINY | dict(algo="sac")))
    assert torch.equal(a["replay"][:110], b["replay"][:110]) and not torch.equal(a["replay"][150:], b["replay"][150:])


def test_replay_buffer_holds_what_happened(tmp_path):
    """s' of a row is s of the next but at the end of an episode; time limits end episodes and are not terminal."""
    saved = checkpoint(run(tmp_path, env="Pendulum-v1", algo="sac", **TINY | dict(total_steps=450, eval_episodes=0)))
    rows, timeouts = saved["replay"], saved["timeouts"]
    assert torch.nonzero(timeouts).flatten().tolist() == [199, 399] and (rows[:, -1] == 0).all()
    joined = (rows[:-1, 5:8] == rows[1:, :3]).all(1)
    assert torch.nonzero(~joined).flatten().tolist() == [199, 399]
    angle = torch.atan2(rows[:, 1], rows[:, 0])
    torque = 2 * rows[:, 3]
    torch.testing.assert_close(
        rows[:, 4], -(angle**2 + 0.1 * rows[:, 2] ** 2 + 0.001 * torque**2), atol=1e-4, rtol=1e-4
    )
    np.testing.assert_array_equal(saved["obs"].numpy(), rows[-1, 5:8].numpy())


def test_falls_are_terminal(tmp_path):
    saved = checkpoint(run(tmp_path, env="Hopper-v4", algo="sac", **TINY | dict(eval_episodes=0)))
    rows = saved["replay"]
    ends = rows[:, -1] == 1
    assert ends.sum() > 3 and not saved["timeouts"].any()
    assert torch.equal(~(rows[:-1, 15:26] == rows[1:, :11]).all(1), ends[:-1])


def test_full_buffer_forgets_the_oldest(tmp_path, monkeypatch):
    target = tmp_path / "data.hdf5"
    options = dict(env="Pendulum-v1", algo="sac", **TINY | dict(eval_episodes=0), save_dataset=str(target))
    whole = checkpoint(run(tmp_path / "a", **options | dict(learning_starts=259, save_dataset=None)))["replay"]
    monkeypatch.setattr(synther_sac_online, "CAPACITY", 200)
    saved = checkpoint(run(tmp_path / "b", **options | dict(learning_starts=259)))["replay"]
    assert torch.equal(saved, torch.cat([whole[200:260], whole[60:200]]))
    with h5py.File(target) as f:
        np.testing.assert_array_equal(f["observations"], whole[60:, :3].numpy())
        assert np.flatnonzero(f["timeouts"]).tolist() == [139, 199]


@pytest.mark.parametrize("algo, steps", [("sac", 2_500), ("synther", 1_000)])
def test_agent_learns_pendulum(tmp_path, algo, steps):
    """From -1200 for an untrained policy to better than -400; the best is about -150."""
    folder = run(
        tmp_path, env="Pendulum-v1", algo=algo, total_steps=steps, eval_every=steps, learning_starts=300,
        hidden_dim=64, learning_rate=2e-3, batch_size=128, tau=0.02, discount=0.95, utd=1 if algo == "sac" else 4,
        retrain_every=350, diffusion_steps=1_000, diffusion_width=64, diffusion_depth=2, diffusion_lr=3e-3,
        num_samples=5_000, device="cpu",
    )  # fmt: skip
    first, last = np.load(folder / "final_returns.npz")["returns"].mean(1)
    assert first < -900 and last > -400


def test_warm_start_and_patience_reach_the_training(tmp_path, monkeypatch):
    calls, train_edm = [], edm.train_edm

    def recording_train_edm(rows, **options):
        model = train_edm(rows, **options)
        calls.append(options | {"result": model})
        return model

    monkeypatch.setattr(edm, "train_edm", recording_train_edm)
    options = TINY | dict(eval_episodes=0, total_steps=250, warm_start=True, patience=3)
    folder = run(tmp_path, env="Pendulum-v1", standardize_reward=False, **options)
    first, second = calls
    assert first["init"] is None and first["patience"] == second["patience"] == 3
    assert_same_state(second["init"].state_dict(), first["result"].state_dict())
    assert first["seed"] != second["seed"]
    assert first["skip"] == [8, 4] and first["time_dim"] == 256  # terminal and reward
    assert_same_state(second["result"].state_dict(), edm.load_edm(folder / "diffusion.pt").state_dict())


@pytest.mark.parametrize("terminals", ["column", "classifier"])
def test_terminals_of_generated_rows_are_zero_or_one(tmp_path, monkeypatch, terminals):
    """What the model draws is a real number; cut at 0.5, or judged by the classifier."""

    def generate(model, num_samples, **options):
        options["partial_path"].touch()
        return torch.randn(num_samples, 27) * torch.cat([torch.ones(26), torch.tensor([0.3])]) + 0.4

    used, relabel, sample_batches = [], edm.relabel_terminals, synther_sac_online.sample_batches
    monkeypatch.setattr(edm, "generate", generate)
    monkeypatch.setattr(
        edm, "relabel_terminals", lambda *a, **k: used.append("classifier") or relabel(*a, **k, steps=50)
    )
    monkeypatch.setattr(
        synther_sac_online, "sample_batches", lambda *args: used.append(args[1].clone()) or sample_batches(*args)
    )
    run(tmp_path, env="Hopper-v4", **TINY | dict(eval_episodes=0, terminals=terminals))
    flags = used[-1][:, -1]
    assert len(flags) == 500 and ("classifier" in used) == (terminals == "classifier")
    assert ((flags == 0) | (flags == 1)).all()
    if terminals == "column":
        assert 0.3 < flags.mean() < 0.45  # P(0.4 + 0.3 n > 0.5) = 0.37


def test_target_entropy_may_be_negative():
    args = synther_sac_online.resolve(Args(algo="redq", target_entropy=-1.0))
    synther_sac_online.check_args(args)
    assert SAC(3, 2, args, "cpu").target_entropy == -1
    assert SAC(3, 2, replace(args, target_entropy=None), "cpu").target_entropy == -2
    with pytest.raises(RunError, match="--target-entropy must be finite"):
        synther_sac_online.check_args(replace(args, target_entropy=math.nan))


def test_actions_are_random_first_and_then_the_policys(tmp_path, monkeypatch):
    """The first learning_starts + 1 from the whole range, all others sampled, not the mean."""
    sampled, sample = [], TanhGaussianActor.sample

    def recording_sample(self, observations):
        actions, log_density = sample(self, observations)
        if len(observations) == 1:
            sampled.append(actions[0])
        return actions, log_density

    monkeypatch.setattr(TanhGaussianActor, "sample", recording_sample)
    options = TINY | dict(eval_episodes=0, learning_starts=150)
    rows = checkpoint(run(tmp_path, env="Hopper-v4", algo="sac", **options))["replay"]
    actions = rows[:, 11:14]
    assert len(sampled) == 260 - 151 and torch.equal(actions[151:], torch.stack(sampled))
    assert actions[:151].abs().max() > 0.95 and actions[:151].std() == pytest.approx(1 / math.sqrt(3), rel=0.1)


class ForgetfulPoint(PointEnv):
    """Its state is in a place that nobody would look for."""

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.hidden = [self.position]
        del self.position
        return obs, info

    def step(self, action):
        self.position = self.hidden[0]
        answer = super().step(action)
        self.hidden = [self.position]
        del self.position
        return answer


class GoalPoint(PointEnv):
    """Its reward depends on a goal in a place where nobody would look for it; its observations do not."""

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.goals = [self.np_random.uniform(-1, 1, 2)]
        return obs, info

    def step(self, action):
        obs, _, *others = super().step(action)
        return obs, -float(np.linalg.norm(obs - self.goals[0])), *others


class LockedPoint(PointEnv):
    """Its state cannot be pickled."""

    def reset(self, seed=None, options=None):
        self.locks = np.array([lambda: None])
        return super().reset(seed=seed)


gym.register("ForgetfulPoint-v0", ForgetfulPoint, max_episode_steps=30)
gym.register("GoalPoint-v0", GoalPoint, max_episode_steps=30)
gym.register("LockedPoint-v0", LockedPoint, max_episode_steps=30)


@pytest.mark.parametrize("env_id", ["ForgetfulPoint-v0", "GoalPoint-v0", "LockedPoint-v0"])
def test_state_out_of_reach_is_noticed(env_id):
    assert synther_sac_online.can_restore("Point-v0") and not synther_sac_online.can_restore(env_id)


@pytest.mark.parametrize("env_id", ["ForgetfulPoint-v0", "LockedPoint-v0"])
def test_resume_begins_a_new_episode_where_the_state_is_out_of_reach(tmp_path, monkeypatch, env_id):
    options = TINY | dict(eval_episodes=0, checkpoint_every=100, algo="sac")

    def stop(self, batch, with_actor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        calls = []
        update = SAC.update
        patch.setattr(SAC, "update", lambda *a, **k: calls.append(0) or (stop if len(calls) > 215 else update)(*a, **k))
        run(tmp_path, env=env_id, **options)
    (folder,) = tmp_path.glob("*__*")
    assert checkpoint(folder)["step"] == 200
    synther_sac_online.main(Args(resume=str(folder)))
    saved = checkpoint(folder)
    rows, timeouts = saved["replay"], saved["timeouts"]
    assert timeouts[199]
    joined = (rows[:-1, 5:7] == rows[1:, :2]).all(1) | timeouts[:-1] | (rows[:-1, -1] == 1)
    assert joined.all()


def test_ended_run_can_still_be_saved(tmp_path):
    folder, target = run(tmp_path, env="Pendulum-v1", algo="sac", **TINY | dict(eval_episodes=0)), tmp_path / "late.h5"
    for _ in range(2):  # the second time the file is left alone
        synther_sac_online.main(Args(resume=str(folder), save_dataset=str(target)))
        with h5py.File(target) as f:
            np.testing.assert_array_equal(f["rewards"], checkpoint(folder)["replay"][:, 4])
        target.chmod(0o444)


@pytest.mark.parametrize("env_id", ["Hopper-v4", "dmc/reacher-hard"])
def test_diverging_agent_stops_the_run(tmp_path, env_id):
    with pytest.raises(RunError, match="no longer finite at environment step 10[1-9]"):
        run(tmp_path, env=env_id, **TINY | dict(learning_rate=1e30, algo="sac"))


# --- Saved datasets ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def episodes():
    """Rows of Hopper (falls, scaled actions) and Pendulum (time limits, actions up to 2), and their timeouts."""
    found = {}
    for env_id, num_steps in (("Hopper-v4", 150), ("Pendulum-v1", 450)):
        env, rng = synther_sac_online.make_env(env_id), np.random.default_rng(0)
        obs, _ = env.reset(seed=0)
        rows, timeouts, performed = [], [], []
        for _ in range(num_steps):
            action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append(np.concatenate([obs, action, [reward], next_obs, [terminated]]))
            timeouts.append(truncated)
            performed.append(2 * action if env_id == "Pendulum-v1" else action)
            obs = env.reset()[0] if terminated or truncated else next_obs
        rows = torch.tensor(np.array(rows), dtype=torch.float32)
        found[env_id] = rows, torch.tensor(timeouts), np.array(performed)
    return found


def expected_data(env_id, episodes):
    rows, timeouts, performed = episodes[env_id]
    obs_dim, act_dim = gym.make(env_id).observation_space.shape[0], performed.shape[1]
    return edm.unpack(rows, obs_dim, act_dim) | {"actions": performed}, timeouts.numpy()


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Pendulum-v1"])
def test_saved_hdf5_is_read_back(tmp_path, episodes, env_id):
    path = tmp_path / "data.hdf5"
    synther_sac_online.save_dataset(str(path), env_id, *episodes[env_id][:2])
    expected, timeouts = expected_data(env_id, episodes)
    with h5py.File(path) as f:
        assert ("next_observations" in f) == (env_id == "Hopper-v4")  # where falls are terminal
        for key, x in expected.items() if env_id == "Hopper-v4" else ():
            assert f[key].dtype == (bool if key == "terminals" else np.float32)
            np.testing.assert_array_equal(f[key], x, err_msg=key)
        assert np.flatnonzero(f["timeouts"]).tolist() == [*np.flatnonzero(timeouts), len(timeouts) - 1]
    data = synther_td3bc.load_transitions(path, true_next_obs=True)
    kept = ~timeouts
    kept[-1] = False  # D4RL's conversion leaves out time limits and the last row
    for key, x in data.items():
        np.testing.assert_array_equal(x, expected[key][kept], err_msg=key)


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Pendulum-v1"])
def test_saved_minari_dataset_is_read_back(tmp_path, monkeypatch, episodes, env_id):
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    synther_sac_online.save_dataset("test/saved-v0", env_id, *episodes[env_id][:2])
    expected, timeouts = expected_data(env_id, episodes)
    for key, x in synther_td3bc.load_transitions("test/saved-v0").items():
        np.testing.assert_array_equal(x, expected[key], err_msg=key)  # every row
    dataset = minari.load_dataset("test/saved-v0")
    assert dataset.spec.env_spec.id == env_id
    ends = [episode.truncations[-1] for episode in dataset.iterate_episodes()]
    assert sum(ends) == timeouts.sum() + 1 and all(not e.truncations[:-1].any() for e in dataset.iterate_episodes())


def test_saved_dataset_of_dmc(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rows = agent_rows(40, obs_dim=6, act_dim=2).clamp(-1, 1)
    rows[:, -1] = 0
    synther_sac_online.save_dataset("test/reacher-v0", "dmc/reacher-hard", rows, torch.zeros(40, dtype=torch.bool))
    np.testing.assert_array_equal(synther_td3bc.load_transitions("test/reacher-v0")["rewards"], rows[:, 8].numpy())


def test_run_saves_a_minari_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    options = TINY | dict(env="Hopper-v4", algo="sac", eval_episodes=0, save_dataset="test/run-v0")
    rows = checkpoint(run(tmp_path, **options))["replay"]
    data = edm.pack(**synther_td3bc.load_transitions("test/run-v0"))
    assert torch.equal(data, rows)
    with pytest.raises(RunError, match="exists"):
        run(tmp_path, **options)


# --- The command line -------------------------------------------------------------------------------------------------


def command(*options):
    device = [] if "--device" in options else ["--device", "cpu"]
    return [sys.executable, str(SCRIPT), *device, *map(str, options)]


BAD_COMMANDS = {
    "unknown environment": ["--env", "NoSuch-v0"],
    "discrete actions": ["--env", "CartPole-v1"],
    "unknown task": ["--env", "dmc/cheetah-fly"],
    "one critic": ["--num-q", "1"],
    "share above 1": ["--synther-ratio", "1.5"],
    "no steps": ["--total-steps", "0"],
    "negative seed": ["--seed", "-1"],
    "nothing is learned": ["--total-steps", "400"],
    "no diffusion model": ["--total-steps", "700", "--retrain-every", "700"],
    "dataset exists": ["--save-dataset", "old.hdf5"],
    "no folder for the dataset": ["--save-dataset", "nowhere/new.hdf5"],
    "no name for a dataset": ["--save-dataset", "my data"],
    "GPU wanted": ["--device", "cuda"],
    "graphs wanted": ["--compile", "on"],
    "output is a file": ["--out-dir", "old.hdf5"],
    "resume of nothing": ["--resume", "nothing"],
    "resume of another script": ["--resume", "td3bc_run"],
    "resume with another algorithm": ["--resume", "run", "--algo", "redq"],
    "resume with another, the default": ["--resume", "run", "--algo", "synther"],
    "resume from a damaged checkpoint": ["--resume", "run"],
}


@pytest.mark.parametrize("what", BAD_COMMANDS)
def test_bad_command_ends_in_one_sentence(tmp_path, what):
    """Exit code 2, one line that begins with `error:`, no traceback, nothing made and nothing changed."""
    if torch.cuda.is_available() and what in ("GPU wanted", "graphs wanted"):
        pytest.skip("there is a GPU")
    for name, args in (
        ("run", synther_sac_online.resolve(Args(algo="sac", out_dir=str(tmp_path), device="cpu"))),
        ("td3bc_run", synther_td3bc.Args()),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps(vars(args)))
    (tmp_path / "old.hdf5").write_text("old")
    (tmp_path / "run/args.json").write_text(json.dumps(json.loads((tmp_path / "run/args.json").read_text()), indent=2))
    (tmp_path / "run/metrics.csv").write_text("step,key,value\n")
    (tmp_path / "run/checkpoint.pt").write_bytes(b"PK damaged")
    contents = lambda: {str(p): p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}  # noqa: E731
    before = contents()
    result = subprocess.run(
        command(*BAD_COMMANDS[what]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
    )
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, lines[-1:]
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:] and "Traceback" not in result.stderr
    assert len(lines[-1]) > len("error: ") + 10 and contents() == before


# --- Kill and resume --------------------------------------------------------------------------------------------------


def saved_step(folder):
    return checkpoint(folder)["step"] if (folder / "checkpoint.pt").exists() else 0


def learning(folder):
    return saved_step(folder) == 150


def training_diffusion(folder):
    path = folder / "diffusion_checkpoint_330.pt"
    return path.exists() and 200 <= torch.load(path, weights_only=True)["step"] < 2_500


def sampling(folder):
    path = folder / "synthetic_330.partial"
    return path.exists() and path.stat().st_size > 15_000 * 4 * 27 and not (folder / "diffusion.pt").exists()


def generated(folder):
    return (folder / "synthetic.npz").exists() and saved_step(folder) == 330


def learning_from_both(folder):
    return saved_step(folder) == 450


def test_killed_run_equals_uninterrupted(tmp_path):
    """Killed while the agent learns, a diffusion model trains, it samples, and later: the same numbers at the end."""
    options = flags(
        env="Hopper-v4", seed=1, total_steps=700, learning_starts=100, utd=2, hidden_dim=16, batch_size=32,
        eval_every=200, eval_episodes=1, checkpoint_every=150, retrain_every=330, diffusion_steps=2_500,
        diffusion_width=48, diffusion_depth=2, num_samples=60_000, save_dataset="data.hdf5", patience=1,
    ) + ["--warm-start"]  # fmt: skip
    whole_dir, killed_dir = tmp_path / "a", tmp_path / "b"
    whole_dir.mkdir(), killed_dir.mkdir()
    subprocess.run(command(*options), cwd=whole_dir, capture_output=True, check=True, timeout=200)
    (whole,) = (whole_dir / "runs").iterdir()

    folder = wait_and_kill(command(*options), killed_dir, learning)
    resume = ["--resume", str(folder)]
    for ready in (training_diffusion, sampling, generated, learning_from_both):
        wait_and_kill(command(*resume), killed_dir, ready)
    subprocess.run(command(*resume), cwd=killed_dir, capture_output=True, check=True, timeout=200)

    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    with np.load(folder / "final_returns.npz") as a, np.load(whole / "final_returns.npz") as b:
        for key in b.files:
            np.testing.assert_array_equal(a[key], b[key])
    for name in ("checkpoint.pt", "diffusion.pt"):
        a, b = (torch.load(f / name, weights_only=True) for f in (folder, whole))
        if name == "checkpoint.pt":
            envs = [synther_sac_online.make_env("Hopper-v4") for _ in (a, b)]
            for env, state in zip(envs, (a, b)):
                env.reset()
                synther_sac_online.set_env_state(env, state.pop("env").numpy().tobytes())
                del state["seconds"]
            np.testing.assert_array_equal(*(random_steps(env, 300, seed=0) for env in envs))
        assert_same_state(a, b, where=name)
    metrics = [
        [line for line in (f / "metrics.csv").read_text().splitlines() if ",perf/" not in line] for f in (folder, whole)
    ]
    assert metrics[0] == metrics[1] and len(metrics[1]) > 20
    with h5py.File(killed_dir / "data.hdf5") as a, h5py.File(whole_dir / "data.hdf5") as b:
        assert set(a) == set(b) and len(b["rewards"]) == 700
        for key in b:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    synther_sac_online.main(Args(resume=str(folder)))  # there is nothing left to do, and it says so
