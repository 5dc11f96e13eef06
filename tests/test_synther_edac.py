"""Tests of synther_edac.py: the agent. test_siblings.py has what scripts share."""

import pytest
import torch
from helpers import assert_same_losses, filled
from plain_agents import plain_edac

import synther_edac
from synther_edac import EDAC


@pytest.mark.parametrize("num_q, eta, hidden_layers", [(4, 1.0, 3), (10, 5.0, 2), (3, 0.0, 1)])
def test_edac_equals_a_plain_implementation(float64, num_q, eta, hidden_layers):
    torch.manual_seed(0)
    sizes = dict(hidden_dim=16, hidden_layers=hidden_layers, num_q=num_q)
    agent = EDAC(3, 2, 1.5, filled(synther_edac, eta=eta, learning_rate=1e-3, **sizes))
    agent.actor.log_std.bias.data[:] = torch.tensor([-5.0, 2.0])  # the limits
    limits = dict(rel=1e-8, abs=1e-10)
    assert_same_losses(lambda i, batch: agent.update(batch), plain_edac(agent), 50, **limits)


def test_critic_that_ignores_the_action_gives_no_nan(float64):
    """A gradient of length 0 has no direction. It must not make the others' NaN."""
    agent = EDAC(3, 2, 1.0, filled(synther_edac, hidden_dim=8, num_q=3))
    agent.critic.weights[-1].data[0] = 0
    for _ in range(2):
        assert agent.update(torch.randn(16, 10)).isfinite().all()


def test_initial_weights_are_corls():
    """The critics' first weights lie within 1 / sqrt(outputs)."""
    agent = EDAC(17, 6, 1.0, filled(synther_edac, env="walker2d-medium-v2"))
    heads = (agent.actor.mean.weight, agent.actor.log_std.weight)
    weights = (agent.critic.weights[0], agent.critic.weights[-1])
    for x, limit in zip((*heads, *weights), (1e-3, 1e-3, 1 / 16, 3e-3)):
        assert 0.9 * limit < x.abs().max() <= limit
    assert agent.critic.biases[-1].abs().max() <= 3e-3
    for bias in (*(layer.bias for layer in agent.actor.net[::2]), *agent.critic.biases[:-1]):
        assert (bias == 0.1).all()
