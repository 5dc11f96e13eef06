"""Tests of edm.py: the diffusion model against written-out formulas, analytic solutions, and itself after a restart."""

import copy
import http.server
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import scipy.stats
import torch
from helpers import command, d4rl_rows, episodes, make_minari, transitions, write
from hypothesis import given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from scipy.stats import kstest, norm, rankdata

import edm
from edm import EDM, Denoiser, DiffusionArgs, RunError

# --- Denoiser ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dim, options, count",
    [
        (42, {}, 6_497_066),  # walker2d, halfcheetah
        (27, {}, 6_479_771),  # hopper
        (42, {"width": 2048}, 25_552_682),
        (27, {"time_dim": 256}, 6_666_011),  # online
        (27, {"depth": 2}, 2_281_371),  # Table 10
        (27, {"depth": 4, "residual": False}, 4_380_571),
    ],
)
def test_number_of_trainable_parameters(dim, options, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Denoiser(dim, **options).parameters()) == count


def plain_denoiser(net, x, c_noise):
    """F_theta for one row x and one number c_noise, written out from the weights of `net`."""
    linear = lambda name, h: net.get_parameter(f"{name}.weight") @ h + net.get_parameter(f"{name}.bias")  # noqa: E731
    angles = [2 * math.pi * c_noise * w for w in net.frequencies.tolist()]
    features = torch.tensor([c_noise, *map(math.sin, angles), *map(math.cos, angles)])
    t = linear("time_mlp.0", features)
    h = linear("hidden_in", linear("row_in", x) + linear("time_mlp.2", t / (1 + (-t).exp())))
    for i in range(len(net.blocks)):
        h = linear(f"blocks.{i}", h.clamp(min=0)) + (h if net.residual else 0)
    return linear("out", h.clamp(min=0))


@pytest.mark.parametrize("residual", [True, False])
def test_denoiser_equals_the_formula(float64, residual):
    torch.manual_seed(0)
    net = Denoiser(5, width=16, depth=3, time_dim=8, residual=residual)
    x, c_noise = torch.randn(7, 5), torch.randn(7)
    expected = torch.stack([plain_denoiser(net, row, c) for row, c in zip(x, c_noise.tolist())])
    torch.testing.assert_close(net(x, c_noise), expected)
    torch.testing.assert_close(net(x, c_noise[:1]), net(x, c_noise[:1].expand(7)))  # one noise level for all


def test_gates_and_waves(float64):
    """Beside each input x, sin and cos(2^k pi x) with their mean factor under the noise in x; units come in pairs."""
    torch.manual_seed(0)
    net, x, sigma = Denoiser(3, width=8, depth=1, time_dim=5, gated=True, waves=2), torch.randn(4, 3), torch.rand(4) * 2
    seen, c_noise = [], sigma.log() / 4
    net.row_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    out = net(x, c_noise)
    w = [math.pi, 2 * math.pi]
    factors = [torch.exp(-(k**2) * sigma**2 / (1 + sigma**2) / 2)[:, None] for k in w]
    sines = [f * torch.sin(k * x) for k, f in zip(w, factors)] + [f * torch.cos(k * x) for k, f in zip(w, factors)]
    torch.testing.assert_close(seen[0], torch.cat([x, *sines], dim=1))
    gate = lambda h: h[:, :8] * torch.nn.functional.gelu(h[:, 8:])  # noqa: E731
    angle = 2 * math.pi * c_noise[:, None] * net.frequencies
    embedding = net.time_mlp(torch.cat([c_noise[:, None], angle.sin(), angle.cos()], dim=1))
    h = net.hidden_in(net.row_in(seen[0]) + embedding)
    h = h + net.blocks[0](gate(h))
    torch.testing.assert_close(out, net.out(gate(h)))


# --- Preconditioning, loss, normaliser, guidance ----------------------------------------------------------------------


def test_preconditioning_equals_the_formula(float64):
    torch.manual_seed(0)
    model, rows = EDM(4, width=16, depth=2), []
    x, sigma = torch.randn(6, 4), torch.tensor([0.002, 0.1, 0.5, 1.0, 7.0, 80.0])
    for row, s in zip(x, sigma.tolist()):
        network = plain_denoiser(model.denoiser, row / math.sqrt(s * s + 1), math.log(s) / 4)
        rows.append(1 / (s * s + 1) * row + s / math.sqrt(s * s + 1) * network)
        torch.testing.assert_close(model(row[None], s)[0], rows[-1])
    torch.testing.assert_close(model(x, sigma), torch.stack(rows))


def test_loss_equals_the_formula(float64):
    torch.manual_seed(0)
    model, x = EDM(4, width=16, depth=2), torch.randn(64, 4)
    torch.manual_seed(5)
    loss = model.loss(x).item()
    torch.manual_seed(5)
    sigma = torch.exp(-1.2 + 1.2 * torch.randn(64, 1))
    error = (model(x + sigma * torch.randn(64, 4), sigma) - x).square().mean(1)  # per row
    weight = (sigma[:, 0] ** 2 + 1) / sigma[:, 0] ** 2
    assert loss == pytest.approx((weight * error).mean().item())


@pytest.mark.parametrize("knots, eta", [(0, 0.0), (5, 1.0)])
def test_models_with_knots_are_sampled_with_new_noise(monkeypatch, knots, eta):
    seen = []
    monkeypatch.setattr(edm, "sample_dpmpp", lambda denoise, x, sigmas, **options: seen.append(options) or x)
    model = EDM(3, width=8, depth=1, knots=knots)
    model.fit_normalizer(torch.randn(5, 3))
    edm.generate(model, 4)
    assert seen == [dict(eta=eta)]


def test_normalizer():
    data = torch.tensor([[1.0, 7.0, 0.0], [2.0, 7.0, 1.0], [6.0, 7.0, 1.0]])
    model = EDM(3, width=8, depth=1)
    model.fit_normalizer(data, raw_columns=[-1])
    std = math.sqrt((2**2 + 1**2 + 3**2) / 2)  # around the mean 3, unbiased
    torch.testing.assert_close(model.mean, torch.tensor([3.0, 7.0, 0.0]))
    torch.testing.assert_close(model.std, torch.tensor([std + 1e-5, 1e-5, 1.0]), rtol=1e-6, atol=0)
    z = model.normalize(data)
    torch.testing.assert_close(z[:, 0], torch.tensor([-2.0, -1.0, 3.0]) / std, rtol=1e-4, atol=0)
    assert torch.equal(z[:, 1], torch.zeros(3)) and torch.equal(z[:, 2], data[:, 2])
    torch.testing.assert_close(model.unnormalize(z), data)


def test_normalizer_with_knots():
    """A fifth of the rank; values that many rows share fill an interval; nothing leaves the range of the data."""
    torch.manual_seed(0)
    data = torch.randn(5_000, 4).exp()
    data[:, 1].clamp_(0.5, 2.0)  # a quarter of the rows at each limit
    data[:, 2], data[:, 3] = 7.0, (data[:, 3] > 4).float()
    model = EDM(4, width=8, depth=1, knots=1_000)
    model.fit_normalizer(data, raw_columns=[-1])
    z, x, limited = model.normalize(data), data[:, 0].numpy(), data[:, 1] == 2.0
    x2 = data[:, 1]
    error = z[:, 0].numpy() - 0.8 * (x - x.mean()) / x.std() - 0.2 * norm.ppf((rankdata(x) - 0.5) / len(x))
    assert np.median(abs(error)) < 1e-3 and abs(error).max() < 0.1  # the ends are steep
    first, last = model.knots[1][model.values[1] == 2.0].aminmax()
    assert limited.float().mean() == pytest.approx(norm.sf((first - 0.8 * (2 - x2.mean()) / x2.std()) / 0.2), abs=0.01)
    assert kstest(z[limited, 1], "uniform", (first, last - first)).statistic < 0.05
    assert 0.2 < z[:, 2].std() < 0.5 and torch.equal(z[:, 3], data[:, 3])
    torch.testing.assert_close(model.unnormalize(z), data, rtol=1e-5, atol=1e-5)
    assert (model.unnormalize(z)[limited, 1] == 2.0).all()
    low, high = data.aminmax(dim=0)
    torch.testing.assert_close(model.unnormalize(torch.full((1, 4), -9.0)), low[None])
    torch.testing.assert_close(model.unnormalize(torch.full((1, 4), 99.0)), high[None])


@pytest.mark.parametrize("sigma", [0.002, 0.29, 0.31, 7.0])
def test_guidance(sigma):
    """Up to a noise level of 0.3, the estimate moves on by half its change since early, of which sigma counts at most.

    With knots, estimates stay between the first and the last at any noise level.
    """
    torch.manual_seed(0)
    model, plain = EDM(3, width=8, depth=2, guided=True), EDM(3, width=8, depth=2)
    model.early.out.bias.data += torch.tensor([0.1, 0.5, 50.0])  # the last is further away than the noise
    plain.load_state_dict(model.state_dict(), strict=False)
    early = copy.deepcopy(plain)
    early.denoiser.load_state_dict(model.early.state_dict())
    x = torch.randn(5, 3)
    late, change = plain(x, sigma), plain(x, sigma) - early(x, sigma)
    assert (change[:, :2].abs() < sigma).all() and (change[:, 2] < -sigma).all()
    change[:, 2] = -sigma
    guided = late + 0.5 * change if sigma < 0.3 else late
    torch.testing.assert_close(model.denoise(x, sigma), guided)
    torch.testing.assert_close(plain.denoise(x, sigma), late)
    limited = EDM(3, width=8, depth=2, guided=True, knots=2)
    knots = dict(values=torch.zeros(3, 2), knots=torch.tensor([[-0.01, 0.02]] * 3))
    limited.load_state_dict(model.state_dict() | knots)
    torch.testing.assert_close(limited.denoise(x, sigma), guided.clamp(-0.01, 0.02))


# --- Samplers ---------------------------------------------------------------------------------------------------------


def test_karras_sigmas():
    sigmas = edm.karras_sigmas(128)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (129,) and (sigmas.diff() < 0).all()
    assert sigmas[:3].tolist() == pytest.approx([80, 76.62, 73.37], abs=0.005)
    assert sigmas[-3:].tolist() == pytest.approx([0.002425, 0.002, 0], abs=5e-7)
    assert edm.karras_sigmas(5, 0.1, 10, rho=1).tolist() == pytest.approx([10, 7.525, 5.05, 2.575, 0.1, 0])


MEAN, SD = 0.7, 0.5  # of the analytic data, a Gaussian


def gaussian_denoise(x, sigma):
    """The ideal denoiser of N(MEAN, SD^2)."""
    return MEAN + (x - MEAN) * SD**2 / (SD**2 + sigma**2)


def heun(denoise, x, sigmas):
    return edm.sample_sde(denoise, x, sigmas, s_churn=0.0)


def uneven_sigmas(num_steps):
    """From 80 to 0.002, every second step three times as long in ln(sigma)."""
    lengths = torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(num_steps // 2).cumsum(0)
    return 80 * (0.002 / 80) ** (torch.cat([torch.zeros(1), lengths]) / lengths[-1])


@pytest.mark.parametrize("sampler", [heun, edm.sample_dpmpp])
@pytest.mark.parametrize("schedule", [lambda n: edm.karras_sigmas(n)[:-1], uneven_sigmas], ids=["karras", "uneven"])
def test_deterministic_samplers_are_second_order(sampler, schedule):
    """The error against the exact solution of the probability-flow ODE falls as num_steps^-2."""
    x = 80 * torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = MEAN + (x - MEAN) * math.sqrt((SD**2 + 0.002**2) / (SD**2 + 80**2))  # at sigma_min
    steps = np.array([80, 160, 320, 640])
    errors = [(sampler(gaussian_denoise, x, schedule(n)) - exact).abs().max().item() for n in steps]
    slope, _ = np.polyfit(np.log(steps), np.log(errors), 1)
    assert slope == pytest.approx(-2, abs=0.1) and errors[-1] < 2e-4


@pytest.mark.parametrize("num_steps, tolerance", [(32, 0.05), (128, 0.005)])
def test_new_noise_mends_earlier_errors(num_steps, tolerance):
    """With eta = 1, samples are as wide as the data, also from a start that is half as wide as it should be."""
    torch.manual_seed(0)
    x, sigmas = 80 * torch.randn(200_000, dtype=torch.float64), edm.karras_sigmas(num_steps)
    for scale in (1.0, 0.5):
        samples = edm.sample_dpmpp(gaussian_denoise, scale * x, sigmas, eta=1.0)
        assert samples.mean() == pytest.approx(MEAN, abs=0.005) and samples.std() == pytest.approx(SD, rel=tolerance)
    assert edm.sample_dpmpp(gaussian_denoise, 0.5 * x, sigmas).std() == pytest.approx(SD / 2, rel=0.03)


@pytest.mark.parametrize("sampler, calls_for", [(edm.sample_dpmpp, lambda n: n), (edm.sample_sde, lambda n: 2 * n - 1)])
@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_last_step_returns_the_estimate(sampler, calls_for, num_steps):
    """A single data point, 3, comes out to the last bits, after so many network calls."""
    levels = []

    def denoise(x, sigma):
        levels.append(sigma)
        return torch.full_like(x, 3.0)

    x = sampler(denoise, 80 * torch.randn(5), edm.karras_sigmas(num_steps))
    torch.testing.assert_close(x, torch.full((5,), 3.0), rtol=0, atol=1e-5)
    assert len(levels) == calls_for(num_steps) and min(levels) > 0


def test_stochastic_sampler_equals_algorithm_2():
    """Karras' Algorithm 2 with the constants of Table 9, line by line, on a network that is not linear."""
    network = lambda x, sigma: torch.tanh(x) * sigma / (1 + sigma) + x / (1 + sigma**2)  # noqa: E731
    t, x = edm.karras_sigmas(40), 80 * torch.linspace(-2, 2, 9, dtype=torch.float64)
    torch.manual_seed(1)
    actual = edm.sample_sde(network, x, t)
    torch.manual_seed(1)
    for i in range(40):
        gamma = min(80 / 40, math.sqrt(2) - 1) if 0.05 <= t[i] <= 50 else 0.0
        t_hat = t[i] + gamma * t[i]
        if gamma > 0:
            x = x + torch.sqrt(t_hat**2 - t[i] ** 2) * 1.003 * torch.randn(9, dtype=torch.float64)
        d = (x - network(x, t_hat)) / t_hat
        x_next = x + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x_next - network(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)
        x = x_next
    torch.testing.assert_close(actual, x)


def heun_moments(sigmas):
    """Mean and variance of what stochastic Heun makes of the ideal denoiser: every step is linear in x."""
    mean, variance = 0.0, sigmas[0] ** 2
    for s, s_next in zip(sigmas[:-1], sigmas[1:]):
        s_hat = s * (1 + min(80 / (len(sigmas) - 1), math.sqrt(2) - 1)) if 0.05 <= s <= 50 else s
        variance += 1.003**2 * (s_hat**2 - s**2)
        slope, slope_next = s_hat / (SD**2 + s_hat**2), s_next / (SD**2 + s_next**2)  # of (x - D) / sigma, in x - MEAN
        factor = 1 + (s_next - s_hat) * slope
        if s_next > 0:
            factor = 1 + (s_next - s_hat) * (slope + slope_next * factor) / 2
        mean, variance = MEAN + factor * (mean - MEAN), factor**2 * variance
    return mean, variance


@pytest.mark.parametrize("num_steps, low, high", [(8, 2.6, 2.8), (32, 1.05, 1.35), (400, 1.0, 1.3)])
def test_churn_gives_the_closed_form_moments(num_steps, low, high):
    """With few steps the variance is larger than the data's, as the docstring says."""
    torch.manual_seed(0)
    sigmas = edm.karras_sigmas(num_steps)
    x = edm.sample_sde(gaussian_denoise, 80 * torch.randn(100_000, dtype=torch.float64), sigmas)
    mean, variance = heun_moments(sigmas.tolist())
    assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / 100_000))
    assert x.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / 100_000))
    assert low < variance / SD**2 < high


# --- Training ---------------------------------------------------------------------------------------------------------


def test_moving_average_of_the_weights(monkeypatch):
    """Every tenth step, with ema-pytorch's weights: 0 for the old average at first, then up to 0.995."""
    weights = []
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda old, new, weight: weights.append(1 - weight))
    options = dict(diffusion_steps=2_951, diffusion_width=2, diffusion_depth=1, diffusion_batch_size=2)
    edm.train_edm(torch.randn(9, 2), DiffusionArgs(diffusion_recipe="paper", **options))
    assert len(weights) == 296 and weights[:11] == [0] * 11
    assert [weights[k] for k in (11, 20, 100)] == pytest.approx([0.798, 0.954, 0.989], abs=6e-4)
    assert weights[292] < 0.995 == weights[293] == weights[-1]


def two_modes(num_rows, seed=0):
    """Rows [x, y]: x has two modes, y follows it with noise, in very different units."""
    rng = np.random.default_rng(seed)
    x = rng.choice([-2.0, 2.0], num_rows) + 0.3 * rng.standard_normal(num_rows)
    y = 300 + 50 * x + 30 * rng.standard_normal(num_rows)
    return torch.from_numpy(np.stack([x, y], axis=1)).float()


def diffusion_args(**options):
    sizes = dict(diffusion_width=32, diffusion_depth=2, diffusion_batch_size=32)
    return DiffusionArgs(**sizes | {f"diffusion_{name}": value for name, value in options.items()})


FAST = dict(time_dim=32, gated=True, waves=3, guided=True, knots=200)  # as many as rows


@pytest.mark.parametrize(
    "recipe, steps, lr, options, beta", [("paper", 140, 3e-2, {}, 0.995), ("fast", 800, 3e-3, FAST, 3 / 8)]
)
def test_training_equals_a_plain_loop(float64, recipe, steps, lr, options, beta):
    """Adam, cosine schedule, clipping and EMA, written with PyTorch's own parts."""
    data = two_modes(200).double() * torch.tensor([1.0, 1e-3])
    trained = edm.train_edm(data, diffusion_args(steps=steps, recipe=recipe, lr=lr, seed=3))

    torch.manual_seed(3)
    model = EDM(2, width=32, depth=2, **options)
    model.fit_normalizer(data)
    rows, params = model.normalize(data), list(model.denoiser.parameters())
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average, clipped = [p.detach().clone() for p in params], 0
    for k in range(steps):
        x = rows[torch.randint(200, (32,))]
        sigma = torch.exp(-1.2 + 1.2 * torch.randn(32, 1))
        error = model(x + sigma * torch.randn(32, 2), sigma) - x
        optimizer.zero_grad()
        ((sigma**2 + 1) / sigma**2 * error**2).mean().backward()
        clipped += torch.nn.utils.clip_grad_norm_(params, 1.0) > 1
        optimizer.step()
        scheduler.step()
        if k % 10 == 0:
            decay = min(beta, 1 - (1 + k - 100) ** (-2 / 3)) if k > 100 else 0
            for a, p in zip(average, params):
                a.copy_(decay * a + (1 - decay) * p.detach())
        if k == steps // 10:
            early = [a.clone() for a in average]
    assert 0 < clipped < steps
    pairs = [(trained.denoiser, average)] + [(trained.early, early)] * (recipe == "fast")
    for network, expected in pairs:
        for p, q in zip(network.parameters(), expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    assert (trained.early is None) == (recipe == "paper")
    assert not any(p.requires_grad for p in trained.parameters())


@pytest.fixture(scope="module")
def learned():
    """A model trained on `two_modes`, and the losses on the way."""
    losses, args = [], diffusion_args(steps=2_500, batch_size=256, lr=3e-3, width=64)
    return edm.train_edm(two_modes(5_000), args, log=lambda step, x: losses.append(x["diffusion/loss"])), losses


def test_training_lowers_the_loss(learned):
    """To well below that of the best linear denoiser."""
    eigenvalues = np.linalg.eigvalsh(np.cov(learned[0].normalize(two_modes(5_000)).T))
    sigma = np.exp(-1.2 + 1.2 * np.random.default_rng(0).standard_normal((10_000, 1)))
    linear = (eigenvalues * (sigma**2 + 1) / (sigma**2 + eigenvalues)).mean()
    assert len(learned[1]) == 5 and learned[1][-1] < 0.85 * linear


@pytest.mark.parametrize("sampler", ["dpmpp", "sde"])
def test_generated_rows_follow_the_data(learned, sampler):
    rows = edm.generate(learned[0], 4_000, DiffusionArgs(sampler=sampler))
    data = two_modes(50_000, seed=1)
    assert rows.dtype == torch.float32 and rows.shape == (4_000, 2)
    scale = data.std(0)
    assert ((rows.mean(0) - data.mean(0)) / scale).abs().max() < 0.1
    difference = torch.cov(rows.T) - torch.cov(data.T)
    assert (difference / scale[:, None] / scale[None, :]).abs().max() < 0.1
    assert edm.marginal(data, rows) > 0.95
    assert (rows[:, 0].abs() < 0.8).float().mean() < 0.02  # hardly anything between the modes


def weights(model):
    return torch.cat([x.flatten() for x in model.state_dict().values()])


def test_training_is_deterministic_and_leaves_the_random_state_alone():
    data, before = two_modes(200), torch.get_rng_state()
    first, second, other = (edm.train_edm(data, diffusion_args(steps=30, seed=seed)) for seed in (1, 1, 2))
    edm.generate(second, 20, DiffusionArgs(sampler="sde", sample_steps=5))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights(first), weights(second)) and not torch.equal(weights(first), weights(other))


def test_resumed_training_equals_uninterrupted():
    """Weights and logged losses are the same to the last bit, from wherever it goes on; `early` is in the state."""
    data, args, states, log = two_modes(200), diffusion_args(steps=1_100, seed=1), [], {}
    save = lambda state: states.append(copy.deepcopy(state))  # noqa: E731
    expected = edm.train_edm(data, args, save=save, save_every=350, log=log.__setitem__)
    assert [state["step"] for state in states] == [350, 700, 1_050, 1_100] and list(log) == [500, 1_000, 1_100]
    for state in states:
        again = {}
        resumed = edm.train_edm(data, args, saved=copy.deepcopy(state), log=again.__setitem__)
        assert torch.equal(weights(resumed), weights(expected))
        assert again == {step: values for step, values in log.items() if step > state["step"]}
    swapped = data[[1, 0, *range(2, 200)]]  # the same means
    for other, changed in ((data, dict(lr=1e-3)), (data, dict(seed=2)), (data + 1, {}), (swapped, {})):
        with pytest.raises(RunError, match="of other options or data"):
            edm.train_edm(other, diffusion_args(**dict(steps=1_100, seed=1) | changed), saved=states[0])
    fresh = [edm.train_edm(data, diffusion_args(steps=20), saved=saved) for saved in (None, {"stage": "agent"})]
    assert torch.equal(weights(fresh[0]), weights(fresh[1]))  # a state of another stage is passed over


def test_warm_start():
    """Training goes on from the weights of a model, with the normaliser of the new data."""
    data = two_modes(200)
    first = edm.train_edm(data, diffusion_args(steps=20))
    model = edm.train_edm(data + 1, diffusion_args(steps=1, lr=1e-9, seed=5), init=first)
    torch.testing.assert_close(weights(model.denoiser), weights(first.denoiser), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.mean, data.mean(0) + 1)


@pytest.mark.parametrize("lr, scale", [(1e30, 1.0), (1e-3, math.nan)])
def test_diverging_training_stops_and_says_where(lr, scale):
    with pytest.raises(RunError, match=r"loss became (nan|inf) in the 20 steps up to 20"):
        edm.train_edm(scale * two_modes(50), diffusion_args(steps=20, lr=lr))


def test_fast_matmul_keeps_float32_accuracy():
    """Whatever library the import chose: products are not rounded to bfloat16, which would err by 1e-3."""
    x, w = torch.randn(256, 1024), torch.randn(1024, 1024)
    exact = x.double() @ w.double()
    assert (x @ w - exact).abs().max() < 1e-5 * exact.abs().max()


# --- Generation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    return EDM(3, width=16, depth=1).requires_grad_(False)


def draw(model, num_samples, **options):
    return edm.generate(model, num_samples, DiffusionArgs(**dict(sample_steps=5, sample_batch_size=10) | options))


@pytest.mark.parametrize("num_samples", [1, 7, 10, 25, 30])
def test_any_number_of_samples(model, num_samples):
    rows = draw(model, num_samples)
    assert rows.shape == (num_samples, 3) and torch.isfinite(rows).all()
    assert len(rows.unique(dim=0)) == num_samples  # no batch repeats another
    full = num_samples // 10 * 10
    assert torch.equal(rows[:full], draw(model, 40)[:full])


@pytest.mark.parametrize("sampler", ["dpmpp", "sde"])
def test_samples_depend_on_the_seed_alone(model, sampler):
    rows = draw(model, 25, sampler=sampler, diffusion_seed=4)
    torch.manual_seed(99)
    assert torch.equal(draw(model, 25, sampler=sampler, diffusion_seed=4), rows)
    assert not torch.isclose(draw(model, 25, sampler=sampler, diffusion_seed=5), rows).any()


def test_samples_are_in_raw_units_and_finite(model):
    unit = draw(model, 25)
    model.mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
    model.std.copy_(torch.tensor([10.0, 0.5, 1.0]))
    torch.testing.assert_close(draw(model, 25), unit * model.std + model.mean)
    for bad in (math.nan, math.inf):
        model.mean[1] = bad
        with pytest.raises(RunError, match="NaN or Inf"):
            draw(model, 25)


def test_terminals_of_generated_rows(model, monkeypatch):
    """The column: d above 0.5. The classifier: where d depends on s', generated rows get the d of their s'."""
    columns = lambda n, seed: torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)) * 100 + 7  # noqa: E731
    real, raw = columns(3_000, 0), columns(1_000, 1)
    real[:, -1] = real[:, 3] > 150  # 8 %
    raw[:, -1] = torch.linspace(-0.2, 1.2, 1_000)
    monkeypatch.setattr(edm, "generate", lambda model, num_samples, args: raw[:num_samples].clone())
    args = DiffusionArgs(num_samples=999)
    draw = lambda terminals: edm.generate_transitions(model, real, replace(args, terminals=terminals))  # noqa: E731
    before, column, relabelled = torch.get_rng_state(), draw("column"), draw("classifier")
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(draw("classifier"), relabelled)
    assert torch.equal(column[:, :-1], raw[:999, :-1]) and torch.equal(relabelled[:, :-1], raw[:999, :-1])
    assert torch.equal(column[:, -1], (raw[:999, -1] > 0.5).float())
    assert set(relabelled[:, -1].tolist()) == {0.0, 1.0}
    assert (relabelled[:, -1] == (raw[:999, 3] > 150)).float().mean() > 0.995


# --- Transitions <-> rows ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 20), obs_dim=st.integers(1, 5), act_dim=st.integers(1, 4), as_tensors=st.booleans())
def test_unpack_undoes_pack(n, obs_dim, act_dim, as_tensors):
    data = transitions(n, obs_dim=obs_dim, act_dim=act_dim)
    rows = edm.pack(**{key: torch.from_numpy(x) for key, x in data.items()} if as_tensors else data)
    order = ["observations", "actions", "rewards", "next_observations", "terminals"]
    assert rows.dtype == torch.float32 and np.array_equal(rows, np.column_stack([data[key] for key in order]))
    back = edm.unpack(rows, obs_dim, act_dim)
    assert list(back) == order
    assert all(x.dtype == data[key].dtype and np.array_equal(x, data[key]) for key, x in back.items())


def test_terminal_threshold_is_strict():
    rows = torch.zeros(5, 5)
    rows[:, -1] = torch.tensor([-1.0, 0.5, np.nextafter(np.float32(0.5), np.float32(1)), 1.0, 3.0])
    assert edm.unpack(rows, 1, 1)["terminals"].tolist() == [False, False, True, True, True]


def test_rows_that_begin_an_episode_are_repeated():
    """One follows a time limit, whose row is missing, one a terminal, whose s' is the next first state in D4RL."""
    states = torch.arange(1_000.0)
    rows = torch.stack([states, states, states, states + 1, torch.zeros(1_000)], dim=1)  # s, a, r, s', d
    rows[399, 3], rows[700, 4] = -1, 1
    starts = edm.episode_starts(rows, 1)
    assert starts.nonzero().flatten().tolist() == [0, 400, 701]
    repeated = torch.cat([rows] + 6 * [rows[[0, 400, 701]]])  # seven of each: 21 of 1,018
    for learned, recipe, mask in (
        (repeated, "fast", starts),
        (rows, "fast", None),
        (rows, "fast", starts & False),
        (rows, "fast", states % 20 == 0),
        (rows, "paper", starts),
    ):
        model = edm.train_edm(rows, diffusion_args(steps=1, recipe=recipe), starts=mask)
        assert torch.equal(model.mean, learned.mean(0))


# --- Sample quality ---------------------------------------------------------------------------------------------------


def sample_rows(n, seed):
    """Correlated columns, one of them with many ties, one a rare terminal."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 5)) @ rng.standard_normal((5, 5))
    x[:, 3] = x[:, 3].round()
    x[:, 4] = x[:, 4] > np.quantile(x[:, 4], 0.9)
    return torch.from_numpy(x).float()


def test_marginal_is_scipys():
    real, synthetic = sample_rows(120, 0), sample_rows(83, 1)
    distances = [scipy.stats.ks_2samp(x, y).statistic for x, y in zip(real.T.numpy(), synthetic.T.numpy())]
    assert edm.marginal(real, synthetic) == pytest.approx(1 - np.mean(distances), abs=1e-12)
    assert edm.marginal(real, real.flip(0)) == 1 and edm.marginal(real, real + 1000) == 0
    assert edm.marginal(np.zeros((10, 1)), np.full((10, 1), 1e-9)) == 0  # a constant column and rounding noise


@pytest.mark.parametrize("constant", [None, 0.1, 1000.3])
def test_correlation_is_numpys(constant):
    """A column that is constant in the real rows is left out; one only in the generated rows counts as uncorrelated."""
    real, synthetic = sample_rows(1_000, 0), sample_rows(83, 1)
    if constant is not None:
        real[:, 1] = synthetic[:, 2] = constant
    rho = [np.corrcoef(x.double().T.numpy()) for x in (real, synthetic)]
    if constant is not None:
        rho[1][2, :] = rho[1][:, 2] = 0
    pairs = [(i, j) for i in range(5) for j in range(i) if constant is None or 1 not in (i, j)]
    expected = np.mean([1 - abs(rho[0][pair] - rho[1][pair]) / 2 for pair in pairs])
    assert edm.correlation(real, synthetic) == pytest.approx(expected, abs=1e-5)
    x = torch.linspace(0, 1, 20)
    assert edm.correlation(torch.stack([x, x], 1), torch.stack([x, -x], 1)) == pytest.approx(0)


def test_classifier_sees_what_the_columns_do_not_show():
    """Rows of the same distribution cannot be told apart, rows with the same columns drawn independently can."""
    real = sample_rows(3_000, 0)
    real[:, 1] = real[:, 0] + 0.1 * real[:, 1]
    shuffled = torch.stack([column[torch.randperm(1_500)] for column in real[1_500:].T], dim=1)
    assert 0.4 < edm.c2st(real[:1_500], real[1_500:]) < 0.6
    assert edm.c2st(real[:1_500], shuffled) > 0.9


def test_quality_report():
    real, synthetic = sample_rows(3_000, 0), sample_rows(400, 1)
    report, before = edm.quality_report(real, synthetic), torch.get_rng_state()
    assert report["marginal"] == pytest.approx(edm.marginal(real, synthetic), abs=1e-5)
    assert report["correlation"] == pytest.approx(edm.correlation(real, synthetic), abs=1e-5)
    assert report["c2st"] > 0.9 and report["c2st_real"] == pytest.approx(0.5, abs=0.1)  # another mixture of the columns
    assert report["terminals_real"] == pytest.approx(0.1, abs=1e-3) and report["terminals"] == pytest.approx(0.1)
    assert edm.quality_report(real, synthetic) == report and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_real", [400, 3_000])
def test_quality_report_detects_copies(num_real):
    """In standardised units: fresh rows are as far from the real ones as these from each other."""
    rows = torch.randn(num_real + 2_000, 4, generator=torch.Generator().manual_seed(0))
    real, fresh = (rows * torch.tensor([1.0, 10.0, 100.0, 0.1])).split([num_real, 2_000])
    report = edm.quality_report(real, fresh)
    distance = torch.cdist(rows[num_real:], rows[:num_real]).amin(1).median().item()
    assert report["nearest"] == pytest.approx(distance, rel=0.1)
    assert report["nearest_real"] == pytest.approx(distance, rel=0.3)
    assert edm.quality_report(real, real.flip(0))["nearest"] < 1e-3


def test_plot_of_the_marginals(tmp_path):
    edm.plot_marginals(tmp_path / "marginals.png", sample_rows(100, 0), sample_rows(100, 1), obs_dim=1, act_dim=1)
    assert (tmp_path / "marginals.png").read_bytes().startswith(b"\x89PNG")


# --- Files and progress -----------------------------------------------------------------------------------------------


def test_saved_model_comes_back_the_same(tmp_path):
    torch.manual_seed(0)
    model = EDM(3, width=16, depth=2, time_dim=8, residual=False, guided=True, gated=True, knots=9, waves=2)
    model.early.out.bias.data += 1
    model.fit_normalizer(torch.randn(20, 3) * 7 + 1)
    edm.save_edm(tmp_path / "diffusion.pt", model)
    loaded, x = edm.load_edm(tmp_path / "diffusion.pt"), torch.randn(4, 3)
    assert torch.equal(loaded.denoise(x, 0.2), model.denoise(x, 0.2))
    assert torch.equal(loaded.unnormalize(x), model.unnormalize(x))
    assert not any(p.requires_grad for p in loaded.parameters())
    os.truncate(tmp_path / "diffusion.pt", 1_000)
    with pytest.raises(RunError, match="cannot read .*diffusion.pt"):
        edm.load_edm(tmp_path / "diffusion.pt")


@contextmanager
def full_disk():
    """Files cannot grow beyond 1,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "content",
    [lambda f: np.savez(f, x=np.zeros(100_000)), lambda f: torch.save({"x": torch.zeros(100_000)}, f)],
    ids=["numpy", "torch"],
)
def test_full_disk_leaves_the_old_file_and_no_other(tmp_path, content):
    path = tmp_path / "file"
    edm.save_atomically(path, lambda f: f.write(b"old"))
    with full_disk(), pytest.raises(RunError, match=f"cannot write {path}.*(large|space)"):
        edm.save_atomically(path, content)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RunError, match="cannot write .*No such file or directory"):
        edm.save_atomically(tmp_path / "nowhere/file", content)


def test_stopped_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    edm.save_atomically(path, lambda f: f.write(b"old"))

    def write_half(f):
        f.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edm.save_atomically(path, write_half)
    assert path.read_bytes() == b"old"
    edm.save_atomically(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_bar_in_a_log_file_is_a_plain_line_now_and_then(capsys):
    for _ in edm.Bar(range(50_000), "work"):
        pass
    output = capsys.readouterr().err
    assert 1 <= len(output.splitlines()) <= 3 and "\r" not in output and "50000/50000" in output


# --- Datasets ---------------------------------------------------------------------------------------------------------


def slow_qlearning_dataset(raw, true_next_obs=False, max_episode_steps=1000):
    """d4rl.qlearning_dataset, row by row.

    Without `timeouts`, its step counter starts at 1 after a terminal row: it drops the row before the last of a full
    episode that follows, and keeps the last with a wrong s'.
    """
    rows, episode_step = [], 0
    for i in range(len(raw["rewards"]) - 1):
        last = raw["timeouts"][i] if "timeouts" in raw else episode_step == max_episode_steps - 1
        if last:
            episode_step = 0
            continue
        done = bool(raw["terminals"][i])
        next_obs = raw["next_observations"][i] if true_next_obs and done else raw["observations"][i + 1]
        rows.append((raw["observations"][i], raw["actions"][i], raw["rewards"][i], next_obs, done))
        if done:
            episode_step = 0
        episode_step += 1
    return {key: [row[i] for row in rows] for i, key in enumerate(edm.KEYS)}


def assert_same_data(actual, expected):
    assert list(actual) == list(edm.KEYS)
    for key, x in actual.items():
        assert x.dtype == (bool if key == "terminals" else np.float32), key
        assert x.ndim == (1 if key in ("rewards", "terminals") else 2), key
        np.testing.assert_array_equal(x, np.reshape(expected[key], x.shape).astype(x.dtype), err_msg=key)


@settings(deadline=None, max_examples=150)
@given(
    ends=st.lists(st.sampled_from(["", "", "", "terminal", "timeout", "both"]), min_size=3, max_size=40),
    has_timeouts=st.booleans(),
    max_episode_steps=st.integers(1, 8),
    true_next_obs=st.booleans(),
)
def test_qlearning_dataset_equals_the_loop(ends, has_timeouts, max_episode_steps, true_next_obs):
    raw = d4rl_rows(len(ends))
    raw["terminals"] = np.array([e in ("terminal", "both") for e in ends])
    raw["timeouts"] = np.array([e in ("timeout", "both") for e in ends])
    if not has_timeouts:
        del raw["timeouts"]
    expected = slow_qlearning_dataset(raw, true_next_obs, max_episode_steps)
    assert_same_data(edm.qlearning_dataset(raw, true_next_obs, max_episode_steps), expected)


def test_qlearning_dataset_by_hand():
    i = np.arange(8)
    raw = dict(observations=i[:, None], next_observations=100 + i[:, None], actions=i[:, None], rewards=i)
    raw |= dict(terminals=i == 2, timeouts=i == 5)
    data = edm.qlearning_dataset(raw)
    assert data["observations"][:, 0].tolist() == [0, 1, 2, 3, 4, 6]  # neither the timeout nor the last row
    assert data["next_observations"][:, 0].tolist() == [1, 2, 3, 4, 5, 7]  # 3 begins the next episode
    assert data["terminals"].tolist() == [False, False, True, False, False, False]
    assert edm.qlearning_dataset(raw, true_next_obs=True)["next_observations"][:, 0].tolist() == [1, 2, 102, 4, 5, 7]
    del raw["next_observations"]
    with pytest.raises(RunError, match="next_observations"):
        edm.qlearning_dataset(raw, true_next_obs=True)
    raw["terminals"][:] = False  # now every s' is in the next row
    assert edm.qlearning_dataset(raw, true_next_obs=True)["next_observations"][:, 0].tolist() == [1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize("suffix", [".hdf5", ".h5"])
@pytest.mark.parametrize("true_next_obs", [False, True])
def test_load_hdf5(tmp_path, suffix, true_next_obs):
    raw = episodes(50)
    path = write(tmp_path / f"data{suffix}", raw | {"infos/qpos": np.zeros((3, 2))})
    assert_same_data(edm.load_transitions(path, true_next_obs), slow_qlearning_dataset(raw, true_next_obs))


def test_load_hdf5_whose_rows_do_not_follow_one_another(tmp_path):
    """In another order, or with ends that are not marked, each row has the s' that the file says."""
    raw = episodes(50)
    order = np.random.default_rng(0).permutation(50)
    shuffled = {key: x[order] for key, x in raw.items() if key != "timeouts"}
    for name, rows in (("shuffled", shuffled), ("unmarked", {k: x for k, x in raw.items() if k != "timeouts"})):
        data = edm.load_transitions(write(tmp_path / f"{name}.hdf5", rows), true_next_obs=True)
        index = {row.tobytes(): i for i, row in enumerate(rows["observations"])}
        index = [index[row.tobytes()] for row in data["observations"]]
        assert index == list(range(49))
        for key, x in data.items():
            np.testing.assert_array_equal(x, rows[key][index], err_msg=key)


@pytest.mark.parametrize("name", ["truncations", "truncateds", "episode_terminals", "dones"])
def test_load_hdf5_with_ends_of_another_name(tmp_path, capsys, name):
    raw = episodes(50)
    raw["timeouts"] &= ~raw["terminals"]
    expected = edm.load_transitions(write(tmp_path / "d4rl.hdf5", raw))
    raw[name] = raw.pop("timeouts") | (raw["terminals"] & (name in ("episode_terminals", "dones")))
    raw[name] = raw[name].astype(np.float32)[:, None]
    assert_same_data(edm.load_transitions(write(tmp_path / "other.hdf5", raw)), expected)
    assert re.search(rf"no `timeouts`; [1-9]\d* ends are taken from `{name}`\n\Z", capsys.readouterr().err)
    raw[name][:] = 0  # says nothing
    edm.load_transitions(write(tmp_path / "none.hdf5", raw), max_episode_steps=7)
    assert "no `timeouts`: its episodes end after 7 rows" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_flags_are_cut_at_a_half(tmp_path, suffix):
    raw = episodes(50)
    del raw["timeouts"]
    expected = edm.load_transitions(write(tmp_path / f"flags{suffix}", raw))
    for no, yes in ((0.01, 0.9), (-0.2, 255), (-1, 1)):
        path = write(tmp_path / f"{yes}{suffix}", raw | {"terminals": np.where(raw["terminals"], yes, no)})
        assert_same_data(edm.load_transitions(path), expected)


def test_load_hdf5_with_columns_and_without_timeouts(tmp_path):
    raw = {key: d4rl_rows(50)[key] for key in ("observations", "actions", "rewards", "terminals")}
    columns = {key: raw[key].reshape(-1, 1) for key in ("rewards", "terminals")}
    data = edm.load_transitions(write(tmp_path / "data.hdf5", raw | columns), max_episode_steps=7)
    assert_same_data(data, slow_qlearning_dataset(raw, max_episode_steps=7))


def test_load_npz_and_minari(tmp_path, monkeypatch):
    """Every row, with the file's own s'."""
    data = transitions(50)
    assert_same_data(edm.load_transitions(write(tmp_path / "data.npz", data | {"more": np.zeros(3)})), data)
    data = make_minari(monkeypatch, tmp_path, env="Pendulum-v1")
    assert_same_data(edm.load_transitions("test/two-v0"), data)
    monkeypatch.setattr(minari, "load_dataset", lambda name, download: {}[f"no such\n\ndataset {name} {download}"])
    with pytest.raises(RunError, match="cannot read test/other-v0: .*no such"):
        edm.load_transitions("test/other-v0")


def test_minari_dataset_without_plain_observations(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    space = gym.spaces.Dict(x=gym.spaces.Box(-1, 1, (2,)))
    obs, ends = {"x": np.zeros((4, 2), np.float32)}, np.array([False, False, True])
    buffer = EpisodeBuffer(0, None, None, obs, np.zeros((3, 1), np.float32), np.zeros(3), ends, ~ends & ends)
    with warnings.catch_warnings(action="ignore"):
        minari.create_dataset_from_buffers(
            "test/dict-v0", [buffer], observation_space=space, action_space=gym.spaces.Box(-1, 1, (1,))
        )
    with pytest.raises(edm.RunError, match=r"its observations are no arrays: Dict\('x'"):
        edm.load_transitions("test/dict-v0")


def test_bundled_dataset():
    """40 episodes of 1000 steps that follow one another, of an agent that learns to run; each loses its last row."""
    data = edm.load_transitions("quickstart")
    assert data["observations"].shape == (39_960, 17) and not data["terminals"].any()
    joined = (data["next_observations"][:-1] == data["observations"][1:]).all(1)
    assert np.flatnonzero(~joined).tolist() == list(range(998, 39_959, 999))
    returns = data["rewards"].reshape(40, 999).sum(1)
    assert returns[:5].max() < 0 and returns[-4:].min() > 1_500 and np.abs(data["actions"]).max() <= 1
    env = gym.make("HalfCheetah-v4", disable_env_checker=True).unwrapped  # the file holds what the simulator does
    env.reset(seed=0)
    for i in range(0, 39_960, 4_000):
        obs = data["observations"][i].astype(np.float64)
        env.set_state(np.concatenate([[0.0], obs[:8]]), obs[8:])
        next_obs, reward, *_ = env.step(data["actions"][i])
        np.testing.assert_allclose(next_obs, data["next_observations"][i], atol=1e-3)
        assert reward == pytest.approx(data["rewards"][i], abs=1e-3)


def spoil(key, value):
    def change(data):
        data[key] = data[key].astype(float)
        data[key][(3, 0) if data[key].ndim == 2 else 3] = value
        return data

    return change


BAD_ARRAYS = {
    **{f"{key} missing": lambda data, key=key: {k: x for k, x in data.items() if k != key} for key in edm.KEYS},
    **{f"{key} NaN": spoil(key, math.nan) for key in edm.KEYS},
    **{f"{key} too short": lambda data, key=key: data | {key: data[key][:-1]} for key in edm.KEYS},
    "rewards Inf": spoil("rewards", -math.inf),
    "observations flat": lambda data: data | {"observations": np.zeros(20)},
    "actions flat": lambda data: data | {"actions": np.zeros(20)},
    "observations of images": lambda data: data | {"observations": np.zeros((20, 4, 4))},
    "observations a number": lambda data: data | {"observations": np.zeros(())},
    "rewards a number": lambda data: data | {"rewards": np.zeros(())},
    "next_observations wider": lambda data: data | {"next_observations": np.zeros((20, 4))},
    "no rows": lambda data: {k: x[:0] for k, x in data.items()},
    "text": lambda data: data | {"actions": np.full((20, 2), b"left")},
}


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_bad_arrays_end_in_one_sentence(tmp_path, suffix, what):
    if suffix == ".hdf5" and what in ("next_observations missing", "next_observations wider"):
        pytest.skip("not needed there")
    path = write(tmp_path / f"data{suffix}", BAD_ARRAYS[what](transitions(20)))
    with pytest.raises(RunError, match=rf"{path}[^\n]{{5,250}}\Z"):
        edm.load_transitions(path)


SPOILED = {
    **{kind: lambda x, kind=kind: x.astype(kind) for kind in ("float64", "float16", "int64", "uint8", "bool", "S5")},
    "complex": lambda x: x + 1j,
    "another axis": lambda x: x[..., None],
    "one axis less": lambda x: x[..., 0],
    "one number": lambda x: x.flat[0],
    "too short": lambda x: x[:-1],
    "two columns": lambda x: np.stack([x, x], -1),
    "constant": lambda x: np.ones_like(x),
    "huge": lambda x: x * 1e17,
    "too huge": lambda x: x.astype(np.float64) * 1e300,
    "NaN": lambda x: np.where(np.arange(x.size).reshape(x.shape) == x.size // 2, np.nan, x),
    "missing": lambda x: None,
}


@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(0, 30),
    suffix=st.sampled_from([".npz", ".hdf5"]),
    changes=st.lists(st.tuples(st.sampled_from([*edm.KEYS, "timeouts"]), st.sampled_from([*SPOILED])), max_size=2),
    true_next_obs=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::numpy.exceptions.ComplexWarning")
def test_dirty_data_are_used_rightly_or_refused_in_one_sentence(tmp_path_factory, n, suffix, changes, true_next_obs):
    raw = d4rl_rows(n)
    for key, change in changes:
        try:
            raw[key] = SPOILED[change](raw[key])
        except (AttributeError, IndexError, TypeError, ValueError):  # this cannot be done to it (any more)
            pass
    raw = {key: x for key, x in raw.items() if x is not None}
    path = write(tmp_path_factory.getbasetemp() / f"dirty{suffix}", raw)
    try:
        data = edm.load_transitions(path, true_next_obs)
    except RunError as error:
        assert "\n" not in str(error)
        assert changes or n < 6 or (n < 30 and len(slow_qlearning_dataset(raw)["rewards"]) < 2)
        return
    finally:
        os.remove(path)
    expected = raw
    if suffix == ".hdf5":
        raw |= {key: x.reshape(n) > 0.5 for key, x in raw.items() if key in ("terminals", "timeouts")}
        expected = slow_qlearning_dataset(raw, true_next_obs)
        if "next_observations" in raw:  # what the file says, but for D4RL's s' of terminal rows
            own = slow_qlearning_dataset(raw | {"observations": raw["next_observations"]}, true_next_obs)
            choice = zip(expected["terminals"], expected["next_observations"], own["observations"])
            expected["next_observations"] = [d4rls if terminal else s for terminal, d4rls, s in choice]
    else:
        expected = raw | {"terminals": np.asarray(raw["terminals"]) > 0.5}
    assert_same_data(data, expected)
    rows = edm.pack(**data)
    model = edm.train_edm(rows, diffusion_args(steps=2), raw_columns=[-1], starts=edm.episode_starts(rows, 3))
    args = edm.resolve(DiffusionArgs(num_samples=20, sample_steps=3, terminals="classifier"), len(rows))
    edm.quality_report(rows, edm.generate_transitions(model, rows, args))


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "another format", "a folder"])
def test_unreadable_file_ends_in_one_sentence(tmp_path, suffix, damage):
    path = tmp_path / f"data{suffix}"
    if damage == "a folder":
        path.mkdir()
    elif damage == "another format":
        path.write_text("<html>404</html>" * 100)
    elif damage != "missing":
        write(path, transitions(2000))
        os.truncate(path, path.stat().st_size * 2 // 3 if damage == "truncated" else 0)
    with pytest.raises(RunError, match=rf"cannot read {path}: [^\n]{{5,500}}\Z"):
        edm.load_transitions(path)


@pytest.mark.parametrize("name", ["walker3d-medium-v2", "data.csv", "maze2d-open-v1", "antmaze-medium-v2"])
def test_unknown_dataset(name):
    with pytest.raises(RunError, match=f"unknown dataset {name}; known are .*walker2d-medium-replay-v2"):
        edm.load_transitions(name)


@pytest.fixture
def mirrors(tmp_path, monkeypatch):
    """Two mirrors on this machine. `answers` are theirs, in turn; `paths` what was asked for; `folder` the cache."""
    body = Path(write(tmp_path / "on_server.hdf5", episodes(2000))).read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            mirrors.paths.append(self.path)
            answer = mirrors.answers.pop(0)
            status = 404 if answer == "absent" else 200
            content = {"error page": b"<html>moved</html>", "half a file": body[: len(body) // 2]}.get(answer, body)
            self.send_response(status)
            self.send_header("Content-Length", len(body) if answer == "cut off" else len(content))
            self.end_headers()
            if answer == "slow":
                time.sleep(2)
            self.wfile.write(content[: len(body) // 2] if answer == "cut off" else content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mirrors = SimpleNamespace(answers=[], paths=[], folder=tmp_path / "cache")
        there, nowhere = f"http://127.0.0.1:{server.server_port}", "http://127.0.0.1:9"
        mirrors.addresses = [f"{there}/flat/{{file}}", f"{there}/d4rl/{{folder}}/{{file}}", nowhere + "/{file}"]
        monkeypatch.setenv("D4RL_DATASET_DIR", str(mirrors.folder))
        monkeypatch.setattr(edm, "D4RL_ADDRESSES", mirrors.addresses[:2])
        yield mirrors
        server.shutdown()


@pytest.mark.parametrize(
    "name, folder, file",
    [
        ("walker2d-mixed-v2", "gym_mujoco_v2", "walker2d_medium_replay-v2.hdf5"),
        ("hopper-full-replay-v2", "gym_mujoco_v2", "hopper_full_replay-v2.hdf5"),
        ("maze2d-large-v1", "maze2d", "maze2d-large-sparse-v1.hdf5"),
        *(
            (f"antmaze-{name}-v2", "ant_maze_v2", f"Ant_maze_{maze}_multigoal_False_sparse_fixed.hdf5")
            for name, maze in (
                ("umaze", "u-maze_noisy_multistart_False"),
                ("medium-play", "big-maze_noisy_multistart_True"),
                ("large-play", "hardest-maze_noisy_multistart_True"),
            )
        ),
    ],
)
def test_download_is_cached_under_d4rls_name(mirrors, name, folder, file):
    mirrors.answers = ["absent", "whole"]
    for _ in range(2):  # the second time from the cache
        assert_same_data(edm.load_transitions(name), slow_qlearning_dataset(episodes(2000)))
    assert mirrors.paths == [f"/flat/{file}", f"/d4rl/{folder}/{file}"]
    assert [path.name for path in mirrors.folder.iterdir()] == [file]


def test_uncorrected_antmaze_is_the_last_resort_and_named(mirrors, capsys):
    mirrors.answers = ["absent", "absent", "whole"]
    for _ in range(2):  # the second time from the cache, but only after the right file was asked for once more
        assert len(edm.load_transitions("antmaze-large-play-v2")["rewards"]) > 1_000
        mirrors.answers = ["absent", "absent"]
    name = "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse"
    assert [path.split("/")[-1] for path in mirrors.paths] == 2 * [f"{name}_fixed.hdf5"] + [f"{name}.hdf5"] + 2 * [
        f"{name}_fixed.hdf5"
    ]
    assert [path.name for path in mirrors.folder.iterdir()] == [f"{name}.hdf5"]
    assert capsys.readouterr().err.count("(episodes' ends not corrected)") == 1


@pytest.mark.parametrize("answer", ["absent", "error page", "half a file", "cut off", "slow", "no server"])
def test_failed_download_tries_another_address_then_names_three_ways_out(mirrors, monkeypatch, capsys, answer):
    """Nothing broken is ever taken. Each failure is one line."""
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_timeout(seconds and 0.5))
    mirrors.answers = [answer, answer, answer, "whole"]
    if answer == "no server":
        mirrors.answers = ["whole"]
        monkeypatch.setattr(edm, "D4RL_ADDRESSES", mirrors.addresses[2:])
    path = mirrors.folder / "hopper_medium-v2.hdf5"
    with pytest.raises(RunError, match=rf"put it at {path}.*your own.*maze_data.*quickstart[^\n]*\Z"):
        edm.load_transitions("hopper-medium-v2")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("downloading", "failed"))]
    assert [line.split()[0] for line in lines] == ["downloading", "failed:"] * len(edm.D4RL_ADDRESSES)
    assert not list(mirrors.folder.iterdir()) and socket.getdefaulttimeout() is None
    monkeypatch.setattr(edm, "D4RL_ADDRESSES", mirrors.addresses[:2])
    assert len(edm.load_transitions("hopper-medium-v2")["rewards"]) > 1_000


# --- More than one process --------------------------------------------------------------------------------------------


def torchrun(*words, cwd):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    return subprocess.Popen(words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_equal_one(tmp_path):
    """Model and samples, to rounding, where batches and samples divide unevenly. When torchrun gets SIGTERM, the first
    process saves. The same command then ends as the one that was never stopped."""
    write(tmp_path / "data.npz", transitions(300))
    words = "--data data.npz --diffusion-steps 200 --diffusion-width 16 --diffusion-batch-size 25 --num-samples 950"
    words = [*words.split(), *"--sample-batch-size 200 --sample-steps 8 --device cpu --out".split()]
    two, stopped = (torchrun(edm.__file__, *words, name, cwd=tmp_path) for name in ("two.npz", "stopped.npz"))
    for line in stopped.stdout:
        if line.startswith("diffusion"):  # the progress bar
            stopped.terminate()
    assert stopped.wait() != 0 and 0 < edm.load_file(tmp_path / "stopped.checkpoint")["step"] < 200
    again = torchrun(edm.__file__, *words, "stopped.npz", cwd=tmp_path)
    subprocess.run([sys.executable, edm.__file__, *words, "one.npz"], cwd=tmp_path, check=True, capture_output=True)
    for process in (two, again):
        said = process.communicate()[0]
        assert process.returncode == 0 and "200/200" in said and said.count("sample quality") == 1, said
    one, two = (edm.load_edm(tmp_path / f"{name}.pt").state_dict() for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-4)
    one, two, stopped = (edm.load_transitions(tmp_path / f"{name}.npz") for name in ("one", "two", "stopped"))
    for key in one:
        np.testing.assert_allclose(one[key], two[key], rtol=1e-3, atol=1e-3)
    assert_same_data(two, stopped)


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, num_rows, width, batch_size",
    [
        ("walker2d-medium-replay-v2", 799_999, 1024, 256),
        ("halfcheetah-medium-v2", 800_000, 1024, 1024),
        ("halfcheetah-medium-expert-v2", 1_998_000, 2048, 1024),
        ("hopper-medium-v2", 999_000, 2048, 1024),
        ("hopper-medium-expert-v2", 60_000, 2048, 256),
    ],
)
def test_defaults_are_the_papers(name, num_rows, width, batch_size):
    args = edm.resolve(DiffusionArgs(), num_rows, name)
    assert (args.diffusion_width, args.diffusion_batch_size, args.diffusion_depth) == (width, batch_size, 6)
    assert (args.diffusion_steps, args.diffusion_lr, args.num_samples) == (100_000, 3e-4, 5_000_000)
    assert args.sample_steps == 32 and edm.resolve(DiffusionArgs(sampler="sde"), num_rows, name).sample_steps == 128
    given = dict(diffusion_width=3, diffusion_batch_size=4, diffusion_depth=5, sample_steps=6, num_samples=7)
    assert vars(edm.resolve(DiffusionArgs(**given), num_rows, name)).items() >= given.items()


@pytest.mark.parametrize(
    "options, recipe",
    [
        (dict(diffusion_steps=99_999), "fast"),
        (dict(diffusion_steps=50, diffusion_recipe="paper"), "paper"),
        (dict(diffusion_recipe="fast"), "fast"),
    ],
)
@pytest.mark.parametrize("latents", [False, True])
def test_steps_choose_the_recipe(options, recipe, latents):
    args = edm.resolve(DiffusionArgs(**options), 1_000_000, "hopper-medium-v2", latents)
    values = [getattr(args, f"diffusion_{name}") for name in ("recipe", "lr", "width", "depth", "batch_size")]
    fast = ["fast", 1e-3, 512, 3, 256] if latents else ["fast", 2e-3, 256, 3, 256]
    assert values == {"fast": fast, "paper": ["paper", 3e-4, 2048, 6, 1024]}[recipe]


@pytest.mark.parametrize(
    "name, values",
    [
        ("updates", (0, -5)),
        ("learning_rate", (0.0, -1e-3, math.nan, math.inf)),
        ("seed", (-1,)),
        ("eval_episodes", (-1,)),
        ("tau", (0.0, 1.5)),
        ("discount", (1.1, math.nan)),
        ("subsample", (-0.5, 0.0, math.inf)),
    ],
)
def test_numbers_that_cannot_be(name, values):
    for value in values:
        with pytest.raises(RunError, match=f"--{name.replace('_', '-')} cannot be {value}"):
            edm.check_args(SimpleNamespace(device="cpu", **{name: value}))


def test_home_folder_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/reader")
    args = SimpleNamespace(device="cpu", dataset_path="~/data.hdf5", out_dir="~", exp_name="a~b")
    edm.check_args(args)
    assert (args.dataset_path, args.out_dir, args.exp_name) == ("/home/reader/data.hdf5", "/home/reader", "a~b")


def test_numbers_that_can_be():
    args = SimpleNamespace(device="auto", seed=0, eval_episodes=0, tau=1.0, target_entropy=-3.0, track=False, env="x")
    edm.check_args(args)
    assert args.device == ("cuda" if torch.cuda.is_available() else "cpu")


# --- Command line -----------------------------------------------------------------------------------------------------

TINY = dict(num_samples=15_300, sample_batch_size=500, diffusion_steps=300, diffusion_width=16, device="cpu")


def test_killed_command_goes_on(tmp_path):
    """`python edm.py`, killed while it samples and given again, writes what one never killed does."""
    write(tmp_path / "data.npz", transitions(300))
    edm.main(edm.Args(data=str(tmp_path / "data.npz"), out=str(tmp_path / "whole.npz"), **TINY))
    words = [word for key, value in TINY.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    words = [sys.executable, edm.__file__, "--data", "data.npz", "--out", "out.npz", *words]
    with open(tmp_path / "stderr.txt", "w") as stderr:
        process = subprocess.Popen(words, cwd=tmp_path, stdout=stderr, stderr=stderr)
    while process.poll() is None and not (tmp_path / "out.checkpoint").exists():
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "stderr.txt").read_text()
    assert not (tmp_path / "out.npz").exists()
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0 and "marginal" in result.stdout and " 0/300 " not in result.stderr, result.stderr
    names = {f"{name}{suffix}" for name in ("out", "whole") for suffix in (".npz", ".pt", ".png")}
    assert {p.name for p in tmp_path.iterdir()} == names | {"data.npz", "stderr.txt"}
    data, whole = (edm.load_transitions(tmp_path / f"{name}.npz") for name in ("out", "whole"))
    assert_same_data(data, whole)
    model = edm.load_edm(tmp_path / "out.pt")
    assert (model.mean[-1], model.std[-1]) == (0, 1) and (model.std[:-1] != 1).all()  # all but d are standardised
    args = DiffusionArgs(num_samples=15_300, sample_batch_size=500, terminals="classifier")
    real = edm.pack(**edm.load_transitions(tmp_path / "data.npz"))
    assert_same_data(data, edm.unpack(edm.generate_transitions(model, real, args), 3, 2))


@pytest.mark.parametrize(
    "options",
    [
        dict(data="nothing.npz"),
        dict(data="data.csv"),
        dict(out="old.npz"),
        dict(out="old_model.npz"),
        dict(out="out.hdf5"),
        dict(out="nowhere/out.npz"),
        dict(num_samples=0),
        dict(diffusion_lr="nan"),
        dict(device="cuda"),
    ],
    ids=lambda options: " ".join(map(str, *options.items())),
)
def test_bad_command_ends_in_one_sentence(tmp_path, monkeypatch, capsys, options):
    if torch.cuda.is_available() and "device" in options:
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.npz", transitions(300))
    for name in ("old.npz", "old_model.pt"):
        (tmp_path / name).write_text("precious")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, edm, **dict(data="data.npz", out="out.npz") | TINY | options)
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
