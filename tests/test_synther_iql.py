"""Tests of synther_iql.py: the agent, its table, its rewards. test_siblings.py has what the offline scripts share."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import plain

import edm
import synther_iql
from synther_iql import IQL, Args


def filled(**options):
    args = Args(device="cpu", **options)
    for pattern, values in synther_iql.DEFAULTS.items():
        if re.match(pattern, args.env):
            edm.fill(args, values)
    return args


@pytest.mark.parametrize("deterministic", [False, True])
def test_iql_equals_a_plain_implementation(float64, deterministic):
    """100 updates. That every loss is the same shows that all parameters are."""
    torch.manual_seed(0)
    values = dict(expectile=0.8, beta=2.0, tau=0.01, learning_rate=1e-3, hidden_dim=16, updates=100)
    agent = IQL(3, 2, 1.5, filled(deterministic=deterministic, **values))
    mean, critics, value = copy.deepcopy(agent.actor.net), plain(agent.critic), plain(agent.value)[0]
    targets, log_std = copy.deepcopy(critics), copy.deepcopy(agent.actor.log_std)
    params = value.parameters(), critics.parameters(), [*mean.parameters(), *([] if deterministic else [log_std])]
    optimizers = [torch.optim.Adam(p, 1e-3) for p in params]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[2], 100)
    for i in range(100):
        batch = torch.cat([torch.randn(32, 9), (torch.rand(32, 1) > 0.8).double()], 1)
        agent.anneal(i)
        losses = agent.update(batch)
        s, a, r, s_next, d = batch.split([3, 2, 1, 3, 1], 1)
        x = torch.cat([s, a], 1)
        y = (r + (1 - d) * 0.99 * value(s_next)).detach()
        advantage = torch.min(targets[0](x), targets[1](x)).detach() - value(s)
        v_loss = ((0.8 - (advantage < 0).double()).abs() * advantage**2).mean()
        q_loss = sum(nn.functional.mse_loss(critic(x), y) for critic in critics) / 2
        distance = ((1.5 * mean(s) - a) ** 2).sum(1)
        if not deterministic:
            distance = -torch.distributions.Normal(1.5 * mean(s), log_std.exp()).log_prob(a).sum(1)
        actor_loss = ((2.0 * advantage.detach()[:, 0]).exp().clamp(max=100) * distance).mean()
        for optimizer, loss in zip(optimizers, (v_loss, q_loss, actor_loss)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        for p, t in zip(critics.parameters(), targets.parameters()):
            t.data.copy_(0.01 * p.data + 0.99 * t.data)
        torch.testing.assert_close(losses, torch.stack([q_loss, v_loss, actor_loss]), rtol=1e-9, atol=0)
    assert isinstance(mean[-1], nn.Tanh) == deterministic


def test_limits():
    """The weight of an advantage is at most 100, a standard deviation e^2, and an action of the mean the bound."""
    agent, batch = IQL(3, 2, 1.5, filled(beta=1e3, updates=1)), torch.zeros(64, 10)
    for parameter, value in ((agent.value.biases[-1], -10), (agent.actor.log_std, 50), (agent.actor.net[-1].bias, 100)):
        parameter.data.fill_(value)  # a value of -10: every advantage is large
    policy = torch.distributions.Normal(1.5 * agent.actor.net(torch.zeros(3)).detach(), np.exp(2))
    torch.testing.assert_close(agent.update(batch)[2], -100 * policy.log_prob(torch.zeros(2)).sum())
    assert (agent.actor(batch[:, :3]) == 1.5).all()


@pytest.mark.parametrize(
    "names, row",  # tau, expectile, beta, deterministic, normalize_reward, episodes per evaluation
    [
        ("walker2d-medium-replay-v2 halfcheetah-medium-expert-v2 hopper-random-v2", (0.005, 0.7, 3, False, False, 10)),
        ("hopper-medium-v2 hopper-medium-replay-v2 hopper-mixed-v2", (0.001, 0.7, 3, True, True, 10)),
        ("hopper-medium-expert-v2", (0.005, 0.5, 6, False, False, 10)),
        ("maze2d-umaze-v1 maze2d-large-v1", (0.005, 0.7, 3, False, False, 100)),
    ],
)
def test_table_is_the_papers(names, row):
    for args in (filled(env=name) for name in names.split()):
        named = (args.tau, args.expectile, args.beta, args.deterministic, args.normalize_reward, args.eval_episodes)
        assert named == row and (args.updates, args.num_samples) == (1_000_000, 5_000_000)


@pytest.mark.parametrize("env, dims, scale", [("Hopper-v4", (11, 3), 1000 / 6), ("maze2d-umaze-v1", (4, 2), 1)])
def test_rewards_and_learning_rates(tmp_path, monkeypatch, env, dims, scale):
    """Rewards by the whole dataset's episodes, of returns 2, 8 and 4, and not the subsample's. Mazes are left alone."""
    seen, lr = [], lambda agent: agent.optimizers["actor"].param_groups[0]["lr"].item()
    monkeypatch.setattr(IQL, "update", lambda self, batch: seen.append((batch.clone(), lr(self))) or torch.zeros(3))
    s, a, r, d = np.zeros((2_000, dims[0])), np.zeros((2_000, dims[1])), np.zeros(2_000), np.arange(2_000) < 2
    r[[0, 1, 500, 900, 1999]] = 2, 8, 1, 3, 99  # two terminals, 1000 rows, and an episode that is not finished
    np.savez(tmp_path / "x.npz", observations=s, actions=a, rewards=r, next_observations=s, terminals=d)
    options = dict(dataset_path=str(tmp_path / "x.npz"), data="real", subsample=0.5, updates=8, eval_episodes=0)
    synther_iql.main(Args(env=env, normalize_reward=True, out_dir=str(tmp_path / "runs"), device="cpu", **options))
    batches, rates = zip(*seen)
    rewards = torch.cat(batches)[:, sum(dims)].unique().numpy() / scale
    np.testing.assert_allclose(rates, 1.5e-4 * (1 + np.cos(np.pi * np.arange(8) / 8)), rtol=1e-5)
    assert len(rewards) > 1 and np.isin(rewards.round(4), (0, 1, 2, 3, 8, 99)).all()
