"""Tests of synther_td3bc.py: agent, scores, evaluation. test_siblings.py has what scripts share."""

import math
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from helpers import assert_same_losses, random_rows
from plain_agents import plain_td3bc

import edm
import synther_sac_online
import synther_td3bc
from synther_td3bc import TD3BC, Args, augment_batch, evaluate, make_env, normalized_score


@pytest.mark.parametrize("hidden_layers", [2, 3])
def test_td3bc_equals_a_plain_implementation(float64, hidden_layers):
    torch.manual_seed(0)
    sizes = dict(hidden_dim=16, hidden_layers=hidden_layers)
    agent = TD3BC(3, 2, 1.5, Args(learning_rate=1e-3, tau=0.02, device="cpu", **sizes))

    def update(i, batch):
        losses = [agent.update_critic(batch)]
        if i % 2:
            losses.append(agent.update_actor(batch))
        return torch.stack(losses)

    assert_same_losses(update, plain_td3bc(agent), 100)


def test_network_sizes_and_initial_range():
    """The paper's counts for walker2d (actor 71,942, critic 72,193), and PyTorch's range."""
    agent = TD3BC(17, 6, 1.0, Args(device="cpu"))
    for net, count in ((agent.actor, 71_942), (agent.critic, 2 * 72_193)):
        assert sum(p.numel() for p in net.parameters()) == count
    for weight, bias in zip(agent.critic.weights, agent.critic.biases):
        bound = 1 / math.sqrt(weight.shape[1])
        assert 0.9 * bound < weight.abs().max() <= bound and bias.abs().max() <= bound
        assert not torch.equal(weight[0], weight[1])  # they start apart


def test_actor_follows_every_third_critic_update_on_its_batch():
    """The next critic update has another batch."""
    calls = []

    def record(name):
        return lambda batch: calls.append((name, batch.clone())) or torch.ones(())

    agent = types.SimpleNamespace(obs_dim=3)
    agent.update_critic = record("critic")
    agent.update_actor = record("actor")
    args = Args(policy_freq=3, augment="dynamics", device="cpu")
    loss_sums = torch.zeros(2)
    update = synther_td3bc.make_update(args, agent, random_rows(1_000), loss_sums)
    for number in range(1, 11):
        update(number)
    names = [name for name, _ in calls]
    assert names == 3 * ["critic", "critic", "critic", "actor"] + ["critic"]
    third, of_actor, fourth = (batch for _, batch in calls[2:5])
    assert torch.equal(third, of_actor) and not torch.equal(of_actor, fourth)
    assert loss_sums.tolist() == [10, 9]  # of 10 critic updates each, but for the last


@pytest.mark.parametrize(
    "kind, low, high", [("additive", 0, 0), ("multiplicative", 0.8, 1.2), ("dynamics", 0.5, 1.5)]
)
def test_augmentation_is_that_of_appendix_d1(float64, kind, low, high):
    """One noise of 0.1 for s and s'; one factor for both; one factor for the change of s to s'."""
    torch.manual_seed(0)
    before = random_rows(4_000)
    after = before.clone()
    augment_batch(after, "none", 3)
    assert torch.equal(before, after)
    augment_batch(after, kind, 3)
    s, others, next_s, d = before.split([3, 3, 3, 1], 1)
    new_s, new_others, new_next_s, new_d = after.split([3, 3, 3, 1], 1)
    assert torch.equal(others, new_others) and torch.equal(d, new_d)
    if kind == "additive":
        noise = new_s - s
        torch.testing.assert_close(new_next_s, next_s + noise)
        torch.testing.assert_close(noise.T.cov(), 0.01 * torch.eye(3), atol=1e-3, rtol=0)
        return
    origin = s if kind == "dynamics" else 0
    factors = ((new_next_s - origin) / (next_s - origin))[:, :1]
    torch.testing.assert_close(new_next_s, origin + factors * (next_s - origin))
    torch.testing.assert_close(new_s, s if kind == "dynamics" else factors * s)
    assert low - 1e-6 < factors.min() < low + 0.01 and high - 0.01 < factors.max() < high + 1e-6
    assert factors.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "names, low, high",
    [
        ("quickstart HalfCheetah-v4 halfcheetah-medium-v2", -280.178953, 12135.0),
        ("Hopper-v5 hopper-expert-v2 mujoco/hopper/medium-v0", -20.272305, 3234.3),
        ("Walker2d-v4 walker2d-medium-replay-v2", 1.629008, 4592.3),
    ],
)
def test_scores_are_d4rls(names, low, high):
    for name in names.split():
        scores = normalized_score(name, np.array([low, high, (low + high) / 2]))
        np.testing.assert_allclose(scores, [0, 100, 50], atol=1e-9)
    assert math.isnan(normalized_score("Pendulum-v1", low))


class Countdown(gym.Env):
    """Seed s gives s + 1 steps with the action as reward. Even seeds end in termination, odd ones
    are truncated. The observation is [s, scale * step]. info: by the steps that are left."""

    def __init__(self, scale=1, info=lambda left: {}):
        self.scale = scale
        self.info = info

    def reset(self, seed=None, options=None):
        self.seed = seed
        self.steps = 0
        return np.array([seed, 0]), {}  # integers

    def step(self, action):
        assert self.steps <= self.seed, "stepped after the end"
        self.steps += 1
        ends = [self.steps > self.seed and self.seed % 2 == parity for parity in (0, 1)]
        info = self.info(self.seed + 1 - self.steps)
        return np.array([self.seed, self.scale * self.steps]), action[:1], *np.array(ends), info


def test_evaluate_counts_each_episode_to_its_end():
    asked = []

    def policy(observations):
        asked.append(len(observations))
        return observations[:, :1] * 10 + observations[:, 1:]

    returns, success_rate = evaluate(policy, [Countdown(scale=0.5) for _ in range(4)], seed=3)
    expected = [10 * s * (s + 1) + 0.5 * sum(range(s + 1)) for s in (3, 4, 5, 6)]
    assert returns.tolist() == expected
    assert asked == [4, 4, 4, 4, 3, 2, 1]  # episodes that are over are not computed
    assert math.isnan(success_rate)


@pytest.mark.parametrize("key, share", [("success", 0.75), ("is_success", 0.25)])
def test_share_of_successes(key, share):
    """Meta-World counts an episode by any step, Gymnasium-Robotics by its last."""
    steps = (0, 2, 2, 9)  # how many are left at a success
    envs = [Countdown(info=lambda left, k=k: {key: np.array(left == k)}) for k in steps]
    assert evaluate(lambda s: s, envs, seed=3)[1] == share


def test_evaluate_says_what_failed():
    fails_in_reset = types.SimpleNamespace(reset=lambda seed: {}[seed])
    for env in (Countdown(info=lambda left: {}[left]), Countdown(scale=None), fails_in_reset):
        with pytest.raises(edm.RunError, match="^the environment failed: .*Error"):
            evaluate(lambda s: s, [env], seed=3)
    for x, scale, what in ((1, math.nan, "observation"), (math.nan, 1, "the agent's action")):
        with pytest.raises(edm.RunError, match=f"{what} became NaN"):
            evaluate(lambda s, x=x: s[:, 1:] * x, [Countdown(scale)], seed=3)


def test_make_env_refuses_actions(monkeypatch):
    env = make_env("Pendulum-v1")
    env.step = lambda action: (None, 0.0, False, False, {})
    monkeypatch.setattr(gym, "make", lambda *args, **options: env)
    boxes = [Box(0, 0, (1,)), Box(-1, 1, (1,), int), Box(-1e10, 1e10, (1,)), Box(-1, 1, (1, 1))]
    for env.action_space in (*boxes, Discrete(2), MultiDiscrete([2, 2])):
        with pytest.raises(edm.RunError, match="flat Box spaces"):
            make_env("Pendulum-v1")
    for reward in (math.nan, np.ones(2), None):
        env.step = lambda action, reward=reward: (None, reward, False, False, {})
        with pytest.raises(edm.RunError, match="cannot make the environment Pendulum-v1: "):
            make_env("Pendulum-v1")


Renamed = type("Renamed", (gym.wrappers.NormalizeObservation,), {})


@pytest.mark.parametrize("script", [synther_td3bc, synther_sac_online])
def test_make_env_refuses_statistics_of_each_copy(monkeypatch, script):
    for layer in (gym.wrappers.NormalizeReward, gym.wrappers.NormalizeObservation, Renamed):
        env = layer(gym.make("Pendulum-v1"))
        spec = gym.envs.registration.EnvSpec("Normalized-v0", lambda env=env: env)
        monkeypatch.setitem(gym.registry, "Normalized-v0", spec)
        with pytest.raises(edm.RunError, match=f"{layer.__name__}.* changes its statistics"):
            script.make_env("Normalized-v0")
