"""Tests of synther_edac.py: the agent, its table. test_siblings.py has what scripts share."""

import copy
import itertools

import pytest
import torch

import synther_edac
from synther_edac import EDAC, Args


def filled(**options):
    args = Args(device="cpu", **options)
    synther_edac.fill_args(args)
    return args


def q(critic, s, a):
    """The Q-values [batch, num_q], one critic after the other."""
    hidden = [torch.cat([s, a], 1)] * len(critic.weights[0])
    for i, layer in enumerate(zip(critic.weights, critic.biases)):
        hidden = [(h.relu() if i else h) @ weight + bias for h, weight, bias in zip(hidden, *layer)]
    return torch.cat(hidden, 1)


def diversity(critic, s, a):
    """ES of An et al. 2021, Equation 4, pair by pair, by autograd."""
    directions = []
    a = a.clone().requires_grad_()
    for q_i in q(critic, s, a).unbind(1):
        (g,) = torch.autograd.grad(q_i.sum(), a, create_graph=True)
        directions.append(g / (g.norm(dim=1, keepdim=True) + 1e-10))
    pairs = itertools.permutations(directions, 2)
    return sum((x * y).sum(1) for x, y in pairs).mean() / (len(directions) - 1)


@pytest.mark.parametrize("num_q, eta, hidden_layers", [(4, 1.0, 3), (10, 5.0, 2), (3, 0.0, 1)])
def test_edac_equals_a_plain_implementation(float64, num_q, eta, hidden_layers):
    """50 updates. That every loss is the same shows that all parameters are."""
    torch.manual_seed(0)
    sizes = dict(hidden_dim=16, hidden_layers=hidden_layers, num_q=num_q)
    agent = EDAC(3, 2, 1.5, filled(eta=eta, **sizes))
    agent.actor.log_std.bias.data[:] = torch.tensor([-5.0, 2.0])  # the limits
    actor = copy.deepcopy(agent.actor)
    critic = copy.deepcopy(agent.critic)
    target = copy.deepcopy(agent.critic)
    log_alpha = torch.zeros(1, requires_grad=True)
    params = dict(alpha=[log_alpha], actor=actor.parameters(), critic=critic.parameters())
    optimizers = {name: torch.optim.Adam(p, 1e-3) for name, p in params.items()}

    def act(s):
        h = actor.net(s)
        normal = torch.distributions.Normal(actor.mean(h), actor.log_std(h).clamp(-5, 2).exp())
        raw = normal.mean + normal.stddev * torch.randn_like(normal.mean)
        log_density = normal.log_prob(raw) - (1 - raw.tanh() ** 2 + 1e-6).log()
        return 1.5 * raw.tanh(), log_density.sum(1, keepdim=True)

    def step(name, loss):
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()

    for i in range(50):
        batch = torch.cat([torch.randn(32, 9), 1.0 * (torch.rand(32, 1) > 0.8)], 1)
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
        q_next = q(target, s_next, a_next).amin(1, keepdim=True) - alpha * log_next
        y = (r + 0.99 * (1 - d) * q_next).detach()
        critic_loss = ((q(critic, s, a) - y) ** 2).mean(0).sum()
        es = diversity(critic, s, a)
        step("critic", critic_loss + eta * es)
        for p, t in zip(critic.parameters(), target.parameters()):
            t.data.copy_(0.005 * p.data + 0.995 * t.data)
        expected = torch.stack([critic_loss, es, actor_loss, alpha[0]])
        torch.testing.assert_close(losses, expected, rtol=1e-8, atol=1e-10)


def test_critic_that_ignores_the_action_gives_no_nan(float64):
    """A gradient of length 0 has no direction. It must not make the others' NaN."""
    agent = EDAC(3, 2, 1.0, filled(hidden_dim=8, num_q=3))
    agent.critic.weights[-1].data[0] = 0
    for _ in range(2):
        assert agent.update(torch.randn(16, 10)).isfinite().all()


def test_initial_weights_are_corls():
    """The critics' first weights lie within 1 / sqrt(outputs)."""
    agent = EDAC(17, 6, 1.0, filled(env="walker2d-medium-v2"))
    heads = (agent.actor.mean.weight, agent.actor.log_std.weight)
    weights = (agent.critic.weights[0], agent.critic.weights[-1])
    for x, limit in zip((*heads, *weights), (1e-3, 1e-3, 1 / 16, 3e-3)):
        assert 0.9 * limit < x.abs().max() <= limit
    assert agent.critic.biases[-1].abs().max() <= 3e-3
    for bias in (*(layer.bias for layer in agent.actor.net[::2]), *agent.critic.biases[:-1]):
        assert (bias == 0.1).all()


@pytest.mark.parametrize(
    "names, num_q, eta",
    [
        ("halfcheetah-medium-v2 walker2d-medium-replay-v2 walker2d-mixed-v2", 10, 1.0),
        ("halfcheetah-medium-expert-v2 walker2d-medium-expert-v2", 10, 5.0),
        ("hopper-medium-v2 hopper-medium-replay-v2 hopper-medium-expert-v2", 50, 1.0),
        ("maze2d-umaze-v1 maze2d-large-v1", 10, 0.1),
    ],
)
def test_hyperparameters_are_the_papers(names, num_q, eta):
    for name in names.split():
        args = filled(env=name)
        assert (args.num_q, args.eta, args.updates) == (num_q, eta, 3_000_000)
        assert (args.hidden_layers, args.hidden_dim, args.learning_rate) == (3, 256, 3e-4)
