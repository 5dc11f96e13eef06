"""Tests of synther_edac.py: the agent and its table. test_siblings.py has what the offline scripts share."""

import copy
import re

import pytest
import torch

import edm
import synther_edac
from synther_edac import EDAC, Args


def filled(**options):
    args = Args(device="cpu", **options)
    for pattern, values in synther_edac.DEFAULTS.items():
        if re.match(pattern, args.env):
            edm.fill(args, values)
    return args


def q(critic, s, a):
    """The Q-values [batch, num_critics], one critic after the other."""
    hidden = [torch.cat([s, a], 1)] * len(critic.weights[0])
    for i, layer in enumerate(zip(critic.weights, critic.biases)):
        hidden = [(h.relu() if i else h) @ weight + bias for h, weight, bias in zip(hidden, *layer)]
    return torch.cat(hidden, 1)


def diversity(critic, s, a):
    """ES of An et al. 2021, Equation 4, pair by pair, by autograd."""
    directions, a = [], a.clone().requires_grad_()
    for q_i in q(critic, s, a).unbind(1):
        (g,) = torch.autograd.grad(q_i.sum(), a, create_graph=True)
        directions.append(g / (g.norm(dim=1, keepdim=True) + 1e-10))
    pairs = [(x * y).sum(1) for i, x in enumerate(directions) for j, y in enumerate(directions) if i != j]
    return sum(pairs).mean() / (len(directions) - 1)


@pytest.mark.parametrize("num_critics, eta, hidden_layers", [(4, 1.0, 3), (10, 5.0, 2), (3, 0.0, 1)])
def test_edac_equals_a_plain_implementation(float64, num_critics, eta, hidden_layers):
    """50 updates. That every loss is the same shows that all parameters are."""
    torch.manual_seed(0)
    agent = EDAC(3, 2, 1.5, filled(hidden_dim=16, hidden_layers=hidden_layers, num_critics=num_critics, eta=eta))
    agent.actor.log_std.bias.data[:] = torch.tensor([-5.0, 2.0])  # the limits
    actor, critic, target = (copy.deepcopy(part) for part in (agent.actor, agent.critic, agent.critic))
    log_alpha = torch.zeros(1, requires_grad=True)
    params = dict(alpha=[log_alpha], actor=actor.parameters(), critic=critic.parameters())
    optimizers = {name: torch.optim.Adam(p, 1e-3) for name, p in params.items()}

    def act(s):
        h = actor.net(s)
        normal = torch.distributions.Normal(actor.mean(h), actor.log_std(h).clamp(-5, 2).exp())
        raw = normal.mean + normal.stddev * torch.randn_like(normal.mean)
        return 1.5 * raw.tanh(), (normal.log_prob(raw) - (1 - raw.tanh() ** 2 + 1e-6).log()).sum(1, keepdim=True)

    def step(name, loss):
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()

    for i in range(50):
        batch = torch.cat([torch.randn(32, 9), (torch.rand(32, 1) > 0.8).double()], 1)
        s, a, r, s_next, d = batch.split([3, 2, 1, 3, 1], 1)
        torch.manual_seed(i)
        losses = agent.update(batch)
        torch.manual_seed(i)
        step("alpha", -(log_alpha * (act(s)[1].detach() - 2)).mean())
        alpha = log_alpha.exp().detach()
        policy_a, log_density = act(s)
        actor_loss = (alpha * log_density - q(critic, s, policy_a).amin(1, keepdim=True)).mean()
        step("actor", actor_loss)
        a_next, log_next = act(s_next)
        y = (r + 0.99 * (1 - d) * (q(target, s_next, a_next).amin(1, keepdim=True) - alpha * log_next)).detach()
        critic_loss, es = ((q(critic, s, a) - y) ** 2).mean(0).sum(), diversity(critic, s, a)
        step("critic", critic_loss + eta * es)
        for p, t in zip(critic.parameters(), target.parameters()):
            t.data.copy_(0.005 * p.data + 0.995 * t.data)
        torch.testing.assert_close(losses, torch.stack([critic_loss, es, actor_loss, alpha[0]]), rtol=1e-8, atol=1e-10)


def test_a_critic_that_ignores_the_action(float64):
    """A gradient of length 0 has no direction. It must not make the others' NaN."""
    agent = EDAC(3, 2, 1.0, filled(hidden_dim=8, num_critics=3))
    agent.critic.weights[-1].data[0] = 0
    assert all(agent.update(torch.randn(16, 10)).isfinite().all() for _ in range(2))


def test_initial_weights():
    """CORL's. The critics' hidden weights lie within 1 / sqrt(outputs)."""
    agent = EDAC(17, 6, 1.0, filled(env="walker2d-medium-v2"))
    actor, weights, biases = agent.actor, agent.critic.weights, agent.critic.biases
    limits = [(actor.mean.weight, 1e-3), (actor.log_std.weight, 1e-3), (weights[0], 1 / 16), (weights[-1], 3e-3)]
    assert all(0.9 * limit < x.abs().max() <= limit for x, limit in limits) and biases[-1].abs().max() <= 3e-3
    assert all((bias == 0.1).all() for bias in (*(layer.bias for layer in actor.net[::2]), *biases[:-1]))


@pytest.mark.parametrize(
    "names, num_critics, eta",
    [
        ("halfcheetah-medium-v2 halfcheetah-medium-replay-v2 walker2d-medium-v2 walker2d-mixed-v2", 10, 1.0),
        ("halfcheetah-medium-expert-v2 walker2d-medium-expert-v2", 10, 5.0),
        ("hopper-medium-v2 hopper-medium-replay-v2 hopper-medium-expert-v2", 50, 1.0),
        ("maze2d-umaze-v1 maze2d-large-v1", 10, 0.1),
    ],
)
def test_table_is_the_papers(names, num_critics, eta):
    for args in (filled(env=name) for name in names.split()):
        assert (args.num_critics, args.eta, args.updates, args.eval_every) == (num_critics, eta, 3_000_000, 5_000)
        assert (args.hidden_layers, args.hidden_dim, args.batch_size, args.learning_rate) == (3, 256, 256, 3e-4)
