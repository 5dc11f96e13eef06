"""Tests of synther_iql.py: the agent. The rest is common to the offline scripts: test_siblings.py."""

import copy
import math

import pytest
import torch
import torch.nn as nn
from helpers import agent_rows, separate_critics, snapshot
from torch.distributions import MultivariateNormal

import synther_iql
from synther_iql import IQL, Args


def make_agent(max_action=1.0, **options):
    return IQL(3, 2, max_action, synther_iql.resolve(Args(**dict(updates=100, env="x") | options), 1_000), "cpu")


@pytest.mark.parametrize("deterministic, tanh_mean", [(False, False), (False, True), (True, False)])
def test_iql_equals_a_plain_implementation(float64, deterministic, tanh_mean):
    """100 updates in CORL's order: value, critics, targets, policy; each network with its own optimiser."""
    torch.manual_seed(0)
    options = dict(hidden_dim=16, batch_size=32, learning_rate=1e-3, expectile=0.8, beta=2.0, tau=0.01)
    agent, rows = make_agent(1.5, deterministic=deterministic, tanh_mean=tanh_mean, **options), agent_rows(500)
    mean_net, log_std = copy.deepcopy(agent.actor.net), copy.deepcopy(agent.actor.log_std)
    policy_params = [*mean_net.parameters(), *([] if deterministic else [log_std])]
    q1, q2 = separate_critics(agent.critic)
    (v,) = separate_critics(agent.value)
    q1_target, q2_target = copy.deepcopy((q1, q2))
    v_optimizer = torch.optim.Adam(v.parameters(), lr=1e-3)
    q_optimizer = torch.optim.Adam([*q1.parameters(), *q2.parameters()], lr=1e-3)
    policy_optimizer = torch.optim.Adam(policy_params, lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(policy_optimizer, 100)
    assert isinstance(mean_net[-1], nn.Tanh) == (deterministic or tanh_mean)

    for i in range(100):
        batch = rows[torch.randint(500, (32,))]
        agent.anneal(i)
        losses = agent.update(batch)

        s, a, r, s_next, d = batch[:, :3], batch[:, 3:5], batch[:, 5:6], batch[:, 6:9], batch[:, 9:]
        x = torch.cat([s, a], 1)
        with torch.no_grad():
            next_v = v(s_next)
            target_q = torch.min(q1_target(x), q2_target(x))
        advantage = target_q - v(s)
        v_loss = torch.mean(torch.abs(0.8 - (advantage < 0).double()) * advantage**2)
        v_optimizer.zero_grad()
        v_loss.backward()
        v_optimizer.step()
        y = r + (1 - d) * 0.99 * next_v
        q_loss = (nn.functional.mse_loss(q1(x), y) + nn.functional.mse_loss(q2(x), y)) / 2
        q_optimizer.zero_grad()
        q_loss.backward()
        q_optimizer.step()
        for net, target in ((q1, q1_target), (q2, q2_target)):
            for p, t in zip(net.parameters(), target.parameters()):
                t.data.copy_(0.01 * p.data + 0.99 * t.data)
        weight = torch.exp(2.0 * advantage.detach()).clamp(max=100.0).squeeze(1)
        if deterministic:
            cloning_loss = ((1.5 * mean_net(s) - a) ** 2).sum(1)
        else:
            scale = torch.diag(log_std.clamp(-5, 2).exp())
            cloning_loss = -MultivariateNormal(1.5 * mean_net(s), scale_tril=scale).log_prob(a)
        policy_loss = torch.mean(weight * cloning_loss)
        policy_optimizer.zero_grad()
        policy_loss.backward()
        policy_optimizer.step()
        schedule.step()
        torch.testing.assert_close(losses, torch.stack([q_loss, v_loss, policy_loss]).detach(), rtol=1e-6, atol=1e-9)

    plain_nets = (q1, q2, v, q1_target, q2_target)
    ensembles = (agent.critic, agent.value, agent.critic_target)
    ours = [mlp for ensemble in ensembles for mlp in separate_critics(ensemble)]
    for net, plain in zip((*ours, agent.actor.net), (*plain_nets, mean_net), strict=True):
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    if not deterministic:
        torch.testing.assert_close(agent.actor.log_std, log_std, rtol=0, atol=1e-6)
        assert log_std.abs().max() > 1e-3


def test_weight_of_an_advantage_is_at_most_100():
    agent, batch = make_agent(beta=1e3), agent_rows(64)
    batch[:, 3:5] = 0
    with torch.no_grad():
        agent.value.biases[-1].fill_(-10.0)  # every advantage is large
        expected = 100 * agent.actor.cloning_loss(batch[:, :3], batch[:, 3:5]).mean()
    torch.testing.assert_close(agent.update(batch)[2], expected)


def test_an_update_changes_all_networks():
    torch.manual_seed(0)
    agent, batch = make_agent(hidden_dim=16), agent_rows(64)
    parts = {name: getattr(agent, name) for name in ("actor", "critic", "value", "critic_target")}
    before = {name: snapshot(part) for name, part in parts.items()}
    agent.anneal(0)
    agent.update(batch)
    assert all(not torch.equal(snapshot(part), before[name]) for name, part in parts.items())
    before = snapshot(agent.actor)
    agent.anneal(100)  # the end of the schedule
    agent.update(batch)
    assert torch.equal(snapshot(agent.actor), before)


def test_value_is_the_expectile():
    """Of Q-values that are 0 or 1 with equal chance, the expectile 0.8 is 0.8 (the mean would be 0.5)."""
    torch.manual_seed(0)
    agent = make_agent(expectile=0.8, hidden_dim=32, learning_rate=3e-3, tau=1e-9)
    with torch.no_grad():
        agent.critic_target.weights[0].zero_()
        agent.critic_target.weights[0][:, 3, 0] = 1e6  # Q is the sign of the first action, as 0 or 1
        agent.critic_target.weights[0][:, 3, 1] = 1e6
        for layer in (0, 1):
            agent.critic_target.biases[layer].zero_()
        agent.critic_target.biases[0][:, 0, 1] = -1.0
        agent.critic_target.weights[1].zero_()
        agent.critic_target.weights[1][:, 0, 0], agent.critic_target.weights[1][:, 1, 0] = 1.0, -1.0
        agent.critic_target.weights[2].zero_()
        agent.critic_target.weights[2][:, 0], agent.critic_target.biases[2][:] = 1.0, 0.0
    batch = agent_rows(512)
    batch[:, 3] = torch.where(torch.arange(512) % 2 == 0, 1.0, -1.0)
    batch[:, :3] = batch[:1, :3]
    assert set(agent.critic_target(batch[:, :5])[0].round(decimals=3).tolist()) == {0.0, 1.0}
    for _ in range(500):
        agent.update(batch)
    assert agent.value(batch[:1, :3]).item() == pytest.approx(0.8, abs=0.03)


def test_network_sizes():
    """The networks for walker2d: a critic as TD3+BC's, an actor with six log standard deviations more."""
    agent = IQL(17, 6, 1.0, synther_iql.resolve(Args(), 1_000), "cpu")
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    assert (count(agent.actor), count(agent.critic), count(agent.value)) == (71_942 + 6, 2 * 72_193, 70_657)


def test_evaluation_clips_the_mean():
    agent = make_agent(max_action=1.5)
    with torch.no_grad():
        agent.actor.net[-1].bias.fill_(100.0)
    assert (agent.actor(torch.zeros(1, 3)) == 1.5).all()


@pytest.mark.parametrize(
    "env, tau, expectile, beta, deterministic, normalize_reward",
    [
        ("walker2d-medium-replay-v2", 0.005, 0.7, 3, False, False),
        ("halfcheetah-medium-expert-v2", 0.005, 0.7, 3, False, False),
        ("hopper-random-v2", 0.005, 0.7, 3, False, False),
        ("hopper-medium-v2", 0.001, 0.7, 3, True, True),
        ("hopper-medium-replay-v2", 0.001, 0.7, 3, True, True),
        ("hopper-mixed-v2", 0.001, 0.7, 3, True, True),
        ("hopper-medium-expert-v2", 0.005, 0.5, 6, False, False),
        ("maze2d-umaze-v1", 0.005, 0.7, 3, False, False),
        ("antmaze-umaze-v2", 0.005, 0.9, 10, False, True),
    ],
)
def test_defaults_are_the_papers(env, tau, expectile, beta, deterministic, normalize_reward):
    args = synther_iql.resolve(Args(env=env), 200_000)
    assert (args.tau, args.expectile, args.beta) == (tau, expectile, beta)
    assert (args.deterministic, args.normalize_reward) == (deterministic, normalize_reward)
    assert (args.updates, args.num_samples, args.eval_every) == (1_000_000, 5_000_000, 5_000)
    assert args.eval_episodes == (100 if "maze" in env else 10)


def test_learning_rate_of_the_actor():
    agent = make_agent(learning_rate=2.0)
    rates = []
    for update in (0, 50, 100):
        agent.anneal(update)
        rates.append(agent.actor_optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([2.0, 2.0 * (1 + math.cos(math.pi / 2)) / 2, 0.0])
    assert agent.critic_optimizer.param_groups[0]["lr"] == 2.0
