"""Tests of synther_td3bc.py: agent, augmentation, evaluation. test_siblings.py has what the offline scripts share."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import plain

import edm
import synther_td3bc
from synther_td3bc import TD3BC, Args, normalized_score

# --- Agent ------------------------------------------------------------------------------------------------------------


def rows(n):
    return torch.cat([torch.randn(n, 9), (torch.rand(n, 1) > 0.8).to(torch.get_default_dtype())], 1)


@pytest.mark.parametrize("hidden_layers", [2, 3])
def test_td3bc_equals_a_plain_implementation(float64, hidden_layers):
    """100 updates. That every loss is the same shows that all parameters are."""
    torch.manual_seed(0)
    args = Args(hidden_dim=16, hidden_layers=hidden_layers, learning_rate=1e-3, tau=0.02, device="cpu")
    agent = TD3BC(3, 2, 1.5, args)
    actor, critics = copy.deepcopy(agent.actor.net), plain(agent.critic)
    actor_target, targets = copy.deepcopy((actor, critics))
    actor_optimizer, critic_optimizer = (torch.optim.Adam(net.parameters(), 1e-3) for net in (actor, critics))
    for i in range(100):
        batch = rows(32)
        torch.manual_seed(i)
        loss = agent.update_critic(batch)
        actor_loss = agent.update_actor(batch) if i % 2 else None
        torch.manual_seed(i)
        s, a, r, s_next, d = batch.split([3, 2, 1, 3, 1], 1)
        noise = (0.2 * torch.randn_like(a) * 1.5).clamp(-0.5 * 1.5, 0.5 * 1.5)
        x_next = torch.cat([s_next, (1.5 * actor_target(s_next) + noise).clamp(-1.5, 1.5)], 1)
        y = (r + 0.99 * (1 - d) * torch.min(targets[0](x_next), targets[1](x_next))).detach()
        expected = sum(F.mse_loss(critic(torch.cat([s, a], 1)), y) for critic in critics)
        critic_optimizer.zero_grad()
        expected.backward()
        critic_optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
        if i % 2:
            pi = 1.5 * actor(s)
            q = critics[0](torch.cat([s, pi], 1))
            expected = -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, a)
            actor_optimizer.zero_grad()
            expected.backward()
            actor_optimizer.step()
            torch.testing.assert_close(actor_loss, expected.detach(), rtol=1e-9, atol=0)
            for net, target in ((actor, actor_target), (critics, targets)):
                for p, t in zip(net.parameters(), target.parameters()):
                    t.data.copy_(0.02 * p.data + 0.98 * t.data)


def test_network_sizes_and_initial_range():
    """The paper's counts for walker2d (a critic 72,193, an actor 71,942), and PyTorch's initial range."""
    agent = TD3BC(17, 6, 1.0, Args(device="cpu"))
    counts = [sum(p.numel() for p in net.parameters()) for net in (agent.actor, agent.critic)]
    assert counts == [71_942, 2 * 72_193]
    for weight, bias in zip(agent.critic.weights, agent.critic.biases):
        bound = 1 / math.sqrt(weight.shape[1])
        assert 0.9 * bound < weight.abs().max() <= bound and bias.abs().max() <= bound
    assert not torch.equal(agent.critic.weights[0][0], agent.critic.weights[0][1])  # they start apart


def test_critics_fit_a_fixed_batch():
    torch.manual_seed(0)
    agent, batch = TD3BC(3, 2, 1.0, Args(hidden_dim=32, learning_rate=3e-3, device="cpu")), rows(64)
    batch[:, -1] = 1  # all terminal: the target is the reward
    losses = [agent.update_critic(batch).item() for _ in range(300)]
    assert losses[-1] < 0.05 * losses[0]
    torch.testing.assert_close(agent.critic(batch[:, :5]), batch[:, 5].expand(2, -1), atol=0.5, rtol=0)


@pytest.mark.parametrize("kind", ["none", "additive", "multiplicative", "dynamics"])
def test_augmentation(kind):
    """Appendix D.1: one noise of 0.1 for s and s'; one factor for both; one factor for the change from s to s'."""
    torch.manual_seed(0)
    before = rows(4_000)
    after = before.clone()
    synther_td3bc.augment_batch(after, kind, 3)
    s, rest, s_next, d = before.split([3, 3, 3, 1], 1)
    new_s, new_rest, new_s_next, new_d = after.split([3, 3, 3, 1], 1)
    assert torch.equal(rest, new_rest) and torch.equal(d, new_d)
    close = lambda x, y: torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3)  # noqa: E731
    if kind == "none":
        assert torch.equal(before, after)
    elif kind == "additive":
        noise = new_s - s
        close(new_s_next - s_next, noise)
        torch.testing.assert_close(noise.T.cov(), 0.01 * torch.eye(3), atol=1e-3, rtol=0)
    else:
        base = 0 if kind == "multiplicative" else s
        change, new_change = s_next - base, new_s_next - base
        factor = (new_change * change).sum(1, keepdim=True) / (change * change).sum(1, keepdim=True)
        close(new_change, factor * change)
        close(new_s, factor * s if kind == "multiplicative" else s)
        low, high = (0.8, 1.2) if kind == "multiplicative" else (0.5, 1.5)
        assert low - 1e-3 < factor.min() < low + 0.01 and high - 0.01 < factor.max() < high + 1e-3
        assert factor.mean() == pytest.approx(1, abs=0.02)


# --- Environments and scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id, low, high",
    [
        ("HalfCheetah-v4", -280.178953, 12135.0),
        ("Hopper-v5", -20.272305, 3234.3),
        ("Walker2d-v4", 1.629008, 4592.3),
        ("dmc/cheetah-run", 0.0, 1000.0),
    ],
)
def test_scores_are_d4rls(env_id, low, high):
    returns = np.array([low, high, (low + high) / 2])
    np.testing.assert_allclose(normalized_score(env_id, returns), [0, 100, 50], atol=1e-9)
    assert math.isnan(normalized_score("Pendulum-v1", 0.0))


class Countdown(gym.Env):
    """Seed s gives an episode of s + 1 steps with the action as reward. Even seeds end in termination, odd ones are
    truncated. May not be stepped after that."""

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

    returns = synther_td3bc.evaluate(policy, [Countdown() for _ in range(4)], seed=3)
    assert returns.tolist() == [sum(10 * s + t for t in range(s + 1)) for s in (3, 4, 5, 6)]
    assert asked == [4, 4, 4, 4, 3, 2, 1]  # episodes that are over are not computed


def test_evaluation_sees_fractions_after_an_integer_reset():
    class Halves(Countdown):
        def reset(self, seed=None, options=None):
            return super().reset(seed)[0].astype(int), {}

        def step(self, action):
            observation, *others = super().step(action)
            return observation / 2, *others

    returns = synther_td3bc.evaluate(lambda observations: observations[:, 1:], [Halves()], seed=3)
    assert returns.tolist() == [0 + 0.5 + 1 + 1.5]


def test_evaluation_says_whose_number_is_not_finite():
    class Broken(Countdown):
        def step(self, action):
            observation, *others = super().step(action)
            return observation * math.nan, *others

    with pytest.raises(edm.RunError, match="the environment's observation became NaN"):
        synther_td3bc.evaluate(lambda observations: observations[:, 1:], [Broken()], seed=3)
    with pytest.raises(edm.RunError, match="the agent's action became NaN"):
        synther_td3bc.evaluate(lambda observations: observations[:, 1:] * math.nan, [Countdown()], seed=3)


def test_evaluation_is_the_same_each_time():
    envs = [synther_td3bc.make_env("Pendulum-v1") for _ in range(2)]
    first, again, other = (synther_td3bc.evaluate(lambda obs: obs[:, 1:2], envs, seed) for seed in (7, 7, 8))
    assert (again == first).all() and first[0] != first[1] == other[0]


@pytest.mark.parametrize("low, high, dtype", [(0, 0, np.float32), (-1, 1, int), (-1e10, 1e10, np.float32)])
def test_make_env_refuses_actions(monkeypatch, low, high, dtype):
    env = synther_td3bc.make_env("Pendulum-v1")
    env.action_space = gym.spaces.Box(low, high, (1,), dtype)
    monkeypatch.setattr(gym, "make", lambda *args, **options: env)
    with pytest.raises(edm.RunError, match="only flat Box spaces"):
        synther_td3bc.make_env("Pendulum-v1")


@pytest.mark.parametrize("name", ["NoSuchEnv-v0", "CartPole-v1", "no_such_module:Env-v0", "antmaze-medium-v2"])
def test_make_env_refuses(name):
    with pytest.raises(edm.RunError, match=name.split(":")[0]) as error:
        synther_td3bc.make_env(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "version, other_dynamics", [("3.4.0", False), ("3.5.0", True), ("3.10.0", True), ("4.0.0", True)]
)
@pytest.mark.filterwarnings("always")
def test_warning_about_mujoco(monkeypatch, recwarn, version, other_dynamics):
    monkeypatch.setattr(synther_td3bc.mujoco, "__version__", version)
    synther_td3bc.make_env("Hopper-v4")
    assert any("mujoco 3.5" in str(warning.message) for warning in recwarn) == other_dynamics
