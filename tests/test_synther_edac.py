"""Tests of synther_edac.py: the agent. The rest is common to the offline scripts: test_siblings.py."""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import agent_rows, separate_critics, snapshot

import synther_edac
from synther_edac import EDAC, Args


def make_agent(max_action=1.0, **options):
    return EDAC(3, 2, max_action, synther_edac.resolve(Args(**dict(env="x") | options), 1_000), "cpu")


def diversity(critics, s, a):
    """ES of An et al. 2021, Equation 4, pair by pair."""
    directions = []
    for critic in critics:
        a_i = a.clone().requires_grad_()
        (g,) = torch.autograd.grad(critic(torch.cat([s, a_i], 1)).sum(), a_i, create_graph=True)
        directions.append(g / (g.norm(dim=1, keepdim=True) + 1e-10))
    n = len(critics)
    pairs = [directions[i] * directions[j] for i in range(n) for j in range(n) if i != j]
    return sum(pairs).sum(1).mean() / (n - 1)


@pytest.mark.parametrize("num_critics, eta, hidden_layers", [(4, 1.0, 3), (10, 5.0, 2), (3, 0.0, 1)])
def test_edac_equals_a_plain_implementation(float64, num_critics, eta, hidden_layers):
    """100 updates in CORL's order: temperature, actor, critics, targets; separate critics, and pairs of gradients."""
    torch.manual_seed(0)
    options = dict(hidden_dim=16, hidden_layers=hidden_layers, learning_rate=1e-3, num_critics=num_critics, eta=eta)
    agent, rows = make_agent(1.5, **options), agent_rows(500)
    actor, critics = copy.deepcopy(agent.actor), separate_critics(agent.critic)
    targets, log_alpha = copy.deepcopy(critics), torch.zeros(1, requires_grad=True)
    critic_params = [p for critic in critics for p in critic.parameters()]
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    critic_optimizer = torch.optim.Adam(critic_params, lr=1e-3)
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=1e-3)

    def act(s):
        h = actor.net(s)
        std = actor.log_std(h).clamp(-5, 2).exp()
        normal = torch.distributions.Normal(actor.mean(h), std)
        raw = actor.mean(h) + std * torch.randn_like(std)
        squashed = torch.tanh(raw)
        return 1.5 * squashed, (normal.log_prob(raw) - torch.log(1 - squashed**2 + 1e-6)).sum(1, keepdim=True)

    for i in range(100):
        batch = rows[torch.randint(500, (32,))]
        torch.manual_seed(i)
        losses = agent.update(batch)

        torch.manual_seed(i)
        s, a, r, s_next, d = batch[:, :3], batch[:, 3:5], batch[:, 5:6], batch[:, 6:9], batch[:, 9:]
        alpha_loss = (-log_alpha * (act(s)[1].detach() - 2)).mean()
        alpha_optimizer.zero_grad()
        alpha_loss.backward()
        alpha_optimizer.step()
        alpha = log_alpha.exp().detach()
        pi, log_pi = act(s)
        q = torch.cat([critic(torch.cat([s, pi], 1)) for critic in critics], 1).min(1, keepdim=True).values
        actor_loss = (alpha * log_pi - q).mean()
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()
        with torch.no_grad():
            a_next, log_next = act(s_next)
            x_next = torch.cat([s_next, a_next], 1)
            q_next = torch.cat([target(x_next) for target in targets], 1).min(1, keepdim=True).values
            y = r + 0.99 * (1 - d) * (q_next - alpha * log_next)
        critic_loss = sum(F.mse_loss(critic(torch.cat([s, a], 1)), y) for critic in critics)
        es = diversity(critics, s, a)
        critic_optimizer.zero_grad()
        (critic_loss + eta * es).backward()
        critic_optimizer.step()
        for p, t in zip(critic_params, [p for target in targets for p in target.parameters()], strict=True):
            t.data.copy_(0.005 * p.data + 0.995 * t.data)
        plain = torch.stack([critic_loss, es, actor_loss, alpha[0]]).detach()
        torch.testing.assert_close(losses, plain, rtol=1e-6, atol=1e-9)

    def assert_same(ours, plain):
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)

    assert_same(agent.actor, actor)
    for ensemble, mlps in ((agent.critic, critics), (agent.critic_target, targets)):
        for ours, plain in zip(separate_critics(ensemble), mlps, strict=True):
            assert_same(ours, plain)


def test_diversity_where_a_critic_ignores_the_action(float64):
    """A gradient of length 0 has no direction: it must not make the others' NaN."""
    torch.manual_seed(0)
    agent, batch = make_agent(hidden_dim=8, num_critics=3), agent_rows(16)
    with torch.no_grad():
        agent.critic.weights[-1][0] = 0
    assert agent.update(batch).isfinite().all() and snapshot(agent.critic).isfinite().all()


def test_diversity_spreads_the_gradients():
    """With a large eta the critics' gradients by the action turn away from each other; with 0 they stay as they are."""
    batch, found = agent_rows(256), {}
    for eta in (0.0, 100.0):
        torch.manual_seed(0)
        agent = make_agent(hidden_dim=32, num_critics=4, eta=eta)
        found[eta] = [agent.update(batch)[1].item() for _ in range(100)]
    assert found[0.0][0] == pytest.approx(found[100.0][0])
    assert found[100.0][-1] < -0.9 < found[0.0][-1]  # the least possible for 4 directions in the plane is -4/3


def test_initial_weights():
    """CORL's: hidden biases 0.1, heads and last layers small, the critics' hidden weights within 1/sqrt(outputs)."""
    torch.manual_seed(0)
    agent = EDAC(17, 6, 1.0, synther_edac.resolve(Args(env="x"), 1_000), "cpu")
    for layer in (m for m in agent.actor.net if isinstance(m, nn.Linear)):
        assert (layer.bias == 0.1).all() and layer.weight.abs().max() <= 1 / math.sqrt(layer.in_features)
    for head in (agent.actor.mean, agent.actor.log_std):
        assert 5e-4 < head.weight.abs().max() <= 1e-3 and head.bias.abs().max() <= 1e-3
    for weight, bias in zip(agent.critic.weights[:-1], agent.critic.biases[:-1]):
        assert 0.06 < weight.abs().max() <= 1 / 16 and (bias == 0.1).all()
    assert 2e-3 < agent.critic.weights[-1].abs().max() <= 3e-3 and agent.critic.biases[-1].abs().max() <= 3e-3
    assert len(agent.critic.weights) == 4 and len(agent.critic.weights[0]) == 10
    assert all(torch.equal(p, t) for p, t in zip(agent.online, agent.target))


def test_an_update_changes_all_networks():
    torch.manual_seed(0)
    agent, batch = make_agent(hidden_dim=16), agent_rows(64)
    parts = {name: getattr(agent, name) for name in ("actor", "critic", "critic_target")}
    before = {name: snapshot(part) for name, part in parts.items()} | {"log_alpha": agent.log_alpha.item()}
    agent.update(batch)
    assert all(not torch.equal(snapshot(part), before[name]) for name, part in parts.items())
    assert agent.log_alpha.item() != before["log_alpha"]


@pytest.mark.parametrize(
    "env, num_critics, eta",
    [
        ("halfcheetah-medium-v2", 10, 1.0),
        ("halfcheetah-medium-replay-v2", 10, 1.0),
        ("halfcheetah-medium-expert-v2", 10, 5.0),
        ("walker2d-medium-v2", 10, 1.0),
        ("walker2d-mixed-v2", 10, 1.0),
        ("walker2d-medium-expert-v2", 10, 5.0),
        ("hopper-medium-v2", 50, 1.0),
        ("hopper-medium-replay-v2", 50, 1.0),
        ("hopper-medium-expert-v2", 50, 1.0),
        ("maze2d-umaze-v1", 10, 0.1),
        ("maze2d-large-v1", 10, 0.1),
        ("antmaze-umaze-v2", 10, 1.0),
    ],
)
def test_defaults_are_the_papers(env, num_critics, eta):
    args = synther_edac.resolve(Args(env=env), 200_000)
    assert (args.num_critics, args.eta, args.updates) == (num_critics, eta, 3_000_000)
    assert (args.hidden_layers, args.hidden_dim, args.batch_size, args.learning_rate) == (3, 256, 256, 3e-4)
    assert (args.eval_episodes, args.eval_every, args.normalize_reward) == (10, 5_000, False)
