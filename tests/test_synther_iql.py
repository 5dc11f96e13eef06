"""Tests of synther_iql.py: agent, rewards. test_siblings.py has what scripts share."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import assert_same_losses, filled
from plain_agents import plain_iql

import edm
import synther_iql
from synther_iql import IQL, Args


@pytest.mark.parametrize("deterministic", [False, True])
def test_iql_equals_a_plain_implementation(float64, deterministic):
    torch.manual_seed(0)
    values = dict(expectile=0.8, beta=2.0, tau=0.01, learning_rate=1e-3, hidden_dim=16, updates=100)
    agent = IQL(3, 2, 1.5, filled(synther_iql, deterministic=deterministic, **values))
    assert isinstance(agent.actor.net[-1], nn.Tanh) == deterministic

    def update(i, batch):
        agent.anneal(i + 1)
        return agent.update(batch)

    assert_same_losses(update, plain_iql(agent), 100)


def test_weight_std_and_action_are_bounded():
    """An advantage's weight by 100, a standard deviation by e^2, a mean action by max_action."""
    agent = IQL(3, 2, 1.5, filled(synther_iql, beta=1e3, updates=1))
    nn.init.constant_(agent.value.biases[-1], -10)  # every advantage is large
    nn.init.constant_(agent.actor.log_std, 50)
    nn.init.constant_(agent.actor.net[-1].bias, 100)
    policy = torch.distributions.Normal(1.5 * agent.actor.net(torch.zeros(3)).detach(), np.exp(2))
    expected = -100 * policy.log_prob(torch.zeros(2)).sum()
    torch.testing.assert_close(agent.update(torch.zeros(64, 10))[2], expected)
    assert (agent.actor.act(torch.zeros(64, 3)) == 1.5).all()


@pytest.mark.parametrize("env, scale", [("Hopper-v4", 1000 / 6), ("maze2d-umaze-v1", 1)])
def test_rewards_are_scaled_by_the_returns_of_the_whole_dataset(tmp_path, monkeypatch, env, scale):
    """Its episodes have returns 2, 8, 4. The subsample's would give another scale. Mazes' rewards
    are left alone. The actor's learning rate falls to 0."""
    seen = []
    rates = []

    def update(self, batch):
        seen.append(batch.clone())
        rates.append(self.optimizers["actor"].param_groups[0]["lr"].item())
        return torch.zeros(3)

    monkeypatch.setattr(IQL, "update", update)
    r = np.zeros(2_000)
    r[[0, 1, 500, 900, 1999]] = (2, 8, 1, 3, 99)  # the last episode is not finished
    s = np.zeros((2_000, 2))
    data = (s, s, r, s, np.arange(2_000) < 2)  # two terminals, 1000 rows, 998 rows
    np.savez(tmp_path / "x.npz", **dict(zip(edm.KEYS, data)))
    options = dict(dataset_path=str(tmp_path / "x.npz"), data="real", updates=8, eval_episodes=0)
    options |= dict(subsample=0.5, batch_size=2_000, normalize_reward=True)
    synther_iql.main(Args(env=env, device="cpu", out_dir=str(tmp_path), **options))
    rewards = torch.cat(seen)[:, 4].unique().numpy() / scale
    assert len(rewards) > 1 and np.isin(rewards.round(4), (0, 1, 2, 3, 8, 99)).all()
    np.testing.assert_allclose(rates, 1.5e-4 * (1 + np.cos(np.pi * np.arange(8) / 8)), rtol=1e-5)
