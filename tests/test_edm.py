"""Tests of edm.py: the diffusion model against independent formulas, analytic solutions and itself after a restart."""

import copy
import math
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edm
from edm import EDM, Denoiser, RunError

# --- Denoiser ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dim, options, count",
    [
        (42, {}, 6_497_066),  # walker2d, halfcheetah
        (27, {}, 6_479_771),  # hopper
        (12, {}, 6_462_476),  # maze2d
        (42, {"width": 2048}, 25_552_682),
        (27, {"time_dim": 256}, 6_666_011),  # online
        (27, {"depth": 2}, 2_281_371),  # Table 10
        (27, {"depth": 4}, 4_380_571),
        (27, {"depth": 4, "residual": False}, 4_380_571),
    ],
)
def test_number_of_trainable_parameters(dim, options, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Denoiser(dim, **options).parameters()) == count


def plain_denoiser(net, x, c_noise, residual):
    """F_theta for one row x and one number c_noise, written out from the weights of `net`."""
    linear = lambda name, h: net.get_parameter(f"{name}.weight") @ h + net.get_parameter(f"{name}.bias")  # noqa: E731
    angles = [2 * math.pi * c_noise * w for w in net.frequencies.tolist()]
    features = torch.tensor([c_noise, *map(math.sin, angles), *map(math.cos, angles)], dtype=x.dtype)
    t = linear("time_mlp.0", features)
    t = linear("time_mlp.2", t / (1 + (-t).exp()))
    h = linear("hidden_in", linear("row_in", x) + t)
    for i in range(len(net.blocks)):
        new = linear(f"blocks.{i}", h.clamp(min=0))
        h = h + new if residual else new
    return linear("out", h.clamp(min=0))


@pytest.mark.parametrize("residual", [True, False])
def test_denoiser_equals_the_formula(float64, residual):
    torch.manual_seed(0)
    net = Denoiser(5, width=16, depth=3, time_dim=8, residual=residual)
    x, c_noise = torch.randn(7, 5), torch.randn(7)
    expected = torch.stack([plain_denoiser(net, row, c, residual) for row, c in zip(x, c_noise.tolist())])
    torch.testing.assert_close(net(x, c_noise), expected)


def test_residual_changes_the_output_of_the_same_weights():
    torch.manual_seed(0)
    with_skip, without = Denoiser(5, width=16, depth=3), Denoiser(5, width=16, depth=3, residual=False)
    without.load_state_dict(with_skip.state_dict())
    x, c_noise = torch.randn(7, 5), torch.randn(7)
    assert (with_skip(x, c_noise) - without(x, c_noise)).abs().max() > 1e-2


def test_condition_enters_beside_the_row(float64):
    torch.manual_seed(0)
    net = Denoiser(3, width=16, depth=2, cond_dim=2)
    x, cond, c_noise = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4)
    expected = [plain_denoiser(net, torch.cat([a, b]), c, True) for a, b, c in zip(x, cond, c_noise.tolist())]
    torch.testing.assert_close(net(x, c_noise, cond), torch.stack(expected))


# --- Preconditioning and loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_preconditioning_equals_the_formula(float64, sigma_data):
    torch.manual_seed(0)
    model = EDM(4, width=16, depth=2, sigma_data=sigma_data)
    x, sigma = torch.randn(6, 4), torch.tensor([0.002, 0.1, 0.5, 1.0, 7.0, 80.0])
    rows = []
    for row, s in zip(x, sigma.tolist()):
        v = s * s + sigma_data**2
        network = model.denoiser(row[None] / math.sqrt(v), torch.tensor([math.log(s) / 4]))[0]
        rows.append(sigma_data**2 / v * row + s * sigma_data / math.sqrt(v) * network)
    torch.testing.assert_close(model(x, sigma), torch.stack(rows))
    torch.testing.assert_close(model(x, sigma[:, None]), torch.stack(rows))


@pytest.mark.parametrize("sigma", [0.002, 1.0, 80.0])
def test_one_noise_level_for_all_equals_one_per_row(sigma):
    torch.manual_seed(0)
    model, x = EDM(4, width=16, depth=2), torch.randn(6, 4)
    torch.testing.assert_close(model(x, sigma), model(x, torch.full((6,), sigma)))
    torch.testing.assert_close(model(x, torch.tensor(sigma)), model(x, torch.full((6,), sigma)))


def test_limits_of_the_preconditioning():
    """Without noise the row comes back; under much noise the network alone decides."""
    torch.manual_seed(0)
    model, x = EDM(4, width=16, depth=2), torch.randn(6, 4)
    assert torch.equal(model(x, 0.0), x)
    torch.testing.assert_close(model(x, 1e-6), x, atol=1e-5, rtol=0)
    network = model.denoiser(x, torch.tensor([math.log(1e6) / 4]))
    torch.testing.assert_close(model(1e6 * x, 1e6), network, atol=1e-4, rtol=1e-4)


def test_loss_equals_the_formula():
    torch.manual_seed(0)
    model, x = EDM(4, width=16, depth=2), torch.randn(64, 4)
    torch.manual_seed(5)
    loss = model.loss(x).item()
    torch.manual_seed(5)
    sigma = torch.exp(-1.2 + 1.2 * torch.randn(64, 1).double())
    noisy = x.double() + sigma * torch.randn(64, 4).double()
    error = (model.double()(noisy, sigma) - x.double()).square().mean(1)  # per row
    weight = (sigma[:, 0] ** 2 + 1) / sigma[:, 0] ** 2
    assert loss == pytest.approx((weight * error).mean().item(), rel=1e-4)


def test_normalizer():
    data = torch.tensor([[1.0, 7.0, 0.0], [2.0, 7.0, 1.0], [6.0, 7.0, 1.0]])
    model = EDM(3, width=8, depth=1)
    model.fit_normalizer(data, skip=[2])
    std = math.sqrt((2**2 + 1**2 + 3**2) / 2)  # around the mean 3, unbiased
    torch.testing.assert_close(model.mean, torch.tensor([3.0, 7.0, 0.0]))
    torch.testing.assert_close(model.std, torch.tensor([std + 1e-5, 1e-5, 1.0]), rtol=1e-6, atol=0)
    z = model.normalize(data)
    torch.testing.assert_close(z[:, 0], torch.tensor([-2.0, -1.0, 3.0]) / std, rtol=1e-4, atol=0)
    assert torch.equal(z[:, 1], torch.zeros(3)) and torch.equal(z[:, 2], data[:, 2])
    torch.testing.assert_close(model.unnormalize(z), data)


def skewed_rows(n=20_000):
    """Columns: log-normal; a normal one clipped at -1 and 1, 16% of rows at either end; constant; a rare flag."""
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0].exp_()
    x[:, 1].clamp_(-1, 1)
    x[:, 2] = 5.0
    x[:, 3] = (x[:, 3] > 2).float()
    return x


@pytest.mark.parametrize("n", [50, 20_000])  # fewer and more rows than quantiles
def test_rank_normalizer(n):
    data = skewed_rows(n)
    model = EDM(4, width=8, depth=1, normalizer="rank")
    model.fit_normalizer(data, skip=[3])
    z = model.normalize(data)
    assert torch.equal(z[:, 3], 4 * data[:, 3] - 2)
    assert torch.equal(z, model.normalize(data))
    uniform = torch.special.ndtr(z[:, :3].sort(0).values)  # each column is normal, atoms included
    distance = (uniform - (torch.arange(n)[:, None] + 0.5) / n).abs().amax(0)
    assert distance[0] < 1.1 / n + 1.1 / edm.NUM_QUANTILES and (distance[1:] < 2 / n**0.5).all()
    assert (z[data[:, 0].argsort(), 0].diff() >= 0).all()
    back = model.unnormalize(z)
    torch.testing.assert_close(back[:, 1:], data[:, 1:], rtol=0, atol=1e-5)
    assert (back[:, 1].abs() == 1).equal(data[:, 1].abs() == 1)  # atoms come back exactly
    inside = z[:, 0].abs() < 3
    torch.testing.assert_close(back[inside, 0], data[inside, 0], rtol=1e-2, atol=1e-4)
    assert model.unnormalize(torch.full((1, 4), math.nan)).isnan().all()  # counted later, not a crash here
    far = model.unnormalize(torch.tensor([[-9.0] * 4, [9.0] * 4]))
    torch.testing.assert_close(far[:, :3], torch.stack([data.amin(0), data.amax(0)])[:, :3], rtol=1e-5, atol=0)


def test_guidance():
    """Below a noise level of 0.3, samplers see the late estimate moved on by half its distance to the early one."""
    torch.manual_seed(0)
    model, plain = EDM(3, width=8, depth=2, guided=True), EDM(3, width=8, depth=2)
    model.early.out.bias.data += torch.tensor([0.1, 0.5, 5.0])  # the last is further away than the noise
    plain.load_state_dict(model.state_dict(), strict=False)
    early = copy.deepcopy(plain)
    early.denoiser.load_state_dict(model.early.state_dict())
    x = torch.randn(5, 3)
    for sigma, guided in ((0.31, False), (0.29, True), (0.002, True)):
        expected = plain(x, sigma)
        if guided:
            expected = torch.where(torch.arange(3) < 2, 1.5 * expected - 0.5 * early(x, sigma), expected - 0.5 * sigma)
        torch.testing.assert_close(model.denoise(x, sigma), expected)
        torch.testing.assert_close(model(x, sigma), plain.denoise(x, sigma))


def test_guidance_cannot_drive_rows_away():
    """However wild the early estimate, guided samples stay near those without guidance."""
    torch.manual_seed(0)
    model = EDM(3, width=8, depth=2, guided=True)
    model.early.out.weight.data *= 1e4
    rows = edm.generate(model, 100, progress=False)
    model.GUIDANCE = 1.0
    unguided = edm.generate(model, 100, progress=False)
    assert 0 < (rows - unguided).abs().max() < 2 * 0.5 * model.GUIDED_BELOW


def test_limits_of_the_estimates():
    """A denoiser that drives rows away is stopped at twice the range of the data; the paper's recipe has no limits."""
    data = torch.rand(100, 2) * torch.tensor([1.0, 10.0])
    for recipe in ("fast", "paper"):
        model = edm.train_edm(data, recipe=recipe, steps=20, skip=[0], **SMALL)
        model.denoiser.out.weight.data *= 1e6
        rows = edm.generate(model, 200, progress=False)
        width = data.amax(0) - data.amin(0)
        inside = (rows >= data.amin(0) - 0.501 * width) & (rows <= data.amax(0) + 0.501 * width)
        assert inside.all() if recipe == "fast" else not inside.any(1).all()
        assert not (data.amin(0) <= rows).all() and not (rows <= data.amax(0)).all()


def test_fast_recipe_learns_next_states_in_few_steps():
    """s' = sin(3 s): closer than the paper's recipe, from a network of the same size at the same learning rate."""
    s = torch.randn(5_000, 1, generator=torch.Generator().manual_seed(0))
    data = torch.cat([s, (3 * s).sin()], dim=1)
    options = dict(steps=1_500, lr=2e-3, width=64, depth=2, seed=0, device="cpu", progress=False)
    errors = {}
    for recipe in ("paper", "fast"):
        rows = edm.generate(edm.train_edm(data, recipe=recipe, **options), 4_000, progress=False)
        errors[recipe] = (rows[:, 1] - (3 * rows[:, 0]).sin()).square().median().item()
    assert errors["fast"] < 0.5 * errors["paper"], errors


def test_recipes():
    """Few steps learn the atoms and the tail of skewed columns, which standardised ones smear. Sizes too."""
    data = skewed_rows()
    options = dict(steps=600, lr=2e-3, width=64, depth=2, skip=[3], seed=0, device="cpu", progress=False)
    scores, atoms = {}, {}
    for recipe in ("paper", "ranks"):
        rows = edm.generate(edm.train_edm(data, recipe=recipe, **options), 5_000, progress=False)
        rows[:, 3] = rows[:, 3] > 0.5
        scores[recipe] = edm.marginal(data, rows)
        atoms[recipe] = (rows[:, 1].abs() == 1).float().mean().item()
    assert scores["ranks"] > 0.98 and scores["ranks"] > scores["paper"] + 0.05, scores
    assert atoms["ranks"] == pytest.approx(0.32, abs=0.04) and atoms["paper"] < 0.01, atoms
    for recipe in edm.RECIPES:
        model = edm.train_edm(data, steps=1, recipe=recipe, device="cpu", progress=False)
        config = {"width": model.config["width"], "depth": model.config["depth"]}
        assert config == {key: value for key, value in edm.RECIPES[recipe].items() if key in config}


# --- Noise schedule and samplers --------------------------------------------------------------------------------------


def test_karras_sigmas():
    sigmas = edm.karras_sigmas(128)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (129,)
    assert (sigmas.diff() < 0).all()
    assert sigmas[:3].tolist() == pytest.approx([80, 76.62, 73.37], abs=0.005)
    assert sigmas[-3:].tolist() == pytest.approx([0.002425, 0.002, 0], abs=5e-7)
    i, n = 5, 20
    expected = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert edm.karras_sigmas(n)[i].item() == pytest.approx(expected, rel=1e-12)
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
    assert slope == pytest.approx(-2, abs=0.1)
    assert errors[-1] < 2e-4


def test_stochastic_sampler_equals_algorithm_2():
    """Karras' Algorithm 2 with the constants of Table 9, line by line, on a network that is not linear."""
    network = lambda x, sigma: torch.tanh(x) * sigma / (1 + sigma) + x / (1 + sigma**2)  # noqa: E731
    t, x = edm.karras_sigmas(40), 80 * torch.linspace(-2, 2, 9, dtype=torch.float64)
    actual = edm.sample_sde(network, x, t, generator=torch.Generator().manual_seed(1))
    generator, churned = torch.Generator().manual_seed(1), 0
    for i in range(40):
        gamma = 0.0
        if 0.05 <= t[i] <= 50:
            gamma, churned = min(80 / 40, math.sqrt(2) - 1), churned + 1
            noise = 1.003 * torch.randn(9, dtype=torch.float64, generator=generator)
            x = x + torch.sqrt((t[i] + gamma * t[i]) ** 2 - t[i] ** 2) * noise
        t_hat = t[i] + gamma * t[i]
        d = (x - network(x, t_hat)) / t_hat
        x_next = x + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x_next - network(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)
        x = x_next
    assert 20 < churned < 40
    torch.testing.assert_close(actual, x)


@pytest.mark.parametrize("sampler", [heun, edm.sample_sde, edm.sample_dpmpp, partial(edm.sample_dpmpp, eta=1.0)])
def test_samplers_reach_the_data(sampler):
    """From sigma_max all the way to 0, samples of the ideal denoiser have the data's mean and deviation."""
    torch.manual_seed(0)
    x = sampler(gaussian_denoise, 80 * torch.randn(100_000, dtype=torch.float64), edm.karras_sigmas(128))
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(SD, rel=0.02)


def heun_moments(sigmas, s_churn=80.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003):
    """Mean and variance of what stochastic Heun makes of the ideal denoiser: every step is linear in x."""
    mean, variance = 0.0, sigmas[0] ** 2
    for s, s_next in zip(sigmas[:-1], sigmas[1:]):
        churn = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= s <= s_tmax else 0
        s_hat = s + churn * s
        variance += s_noise**2 * (s_hat**2 - s**2)
        slope, slope_next = s_hat / (SD**2 + s_hat**2), s_next / (SD**2 + s_next**2)  # of (x - D) / sigma, in x - MEAN
        factor = 1 + (s_next - s_hat) * slope
        if s_next > 0:
            factor = 1 + (s_next - s_hat) * (slope + slope_next * factor) / 2
        mean, variance = MEAN + factor * (mean - MEAN), factor**2 * variance
    return mean, variance


@pytest.mark.parametrize("num_steps", [8, 32, 128])
def test_churn_gives_the_closed_form_moments(num_steps):
    torch.manual_seed(0)
    sigmas = edm.karras_sigmas(num_steps)
    x = edm.sample_sde(gaussian_denoise, 80 * torch.randn(200_000, dtype=torch.float64), sigmas)
    mean, variance = heun_moments(sigmas.tolist())
    assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / 200_000))
    assert x.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / 200_000))


def test_churn_inflates_the_variance_at_few_steps():
    variances = [heun_moments(edm.karras_sigmas(n).tolist())[1] / SD**2 for n in (8, 16, 32, 128)]
    assert variances == sorted(variances, reverse=True) and variances[0] > 1.2 and variances[-1] < 1.03
    torch.manual_seed(0)
    x = edm.sample_sde(gaussian_denoise, 80 * torch.randn(50_000, dtype=torch.float64), edm.karras_sigmas(8))
    assert x.std() > 1.1 * SD


def test_churn_noise_comes_from_the_generator():
    x, sigmas = torch.ones(5), edm.karras_sigmas(10)
    a, b, c = (
        edm.sample_sde(gaussian_denoise, x, sigmas, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("eta", [0.25, 1.0])
def test_noise_of_dpmpp_replaces_the_one_it_takes(eta):
    """With a single data point, 3.0, the noise has the scheduled level at the end, and comes from the generator;
    what is left of the first noise shrinks by the ratio of the levels to the power 1 + eta."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100_000, dtype=torch.float64, generator=generator)
    sigmas = torch.tensor([80.0, 20.0, 3.0, 1.0], dtype=torch.float64)
    sample = lambda seed: edm.sample_dpmpp(  # noqa: E731
        lambda x, sigma: torch.full_like(x, 3.0), 3 + 80 * noise, sigmas, eta, torch.Generator().manual_seed(seed)
    )
    x = sample(1)
    assert x.mean().item() == pytest.approx(3, abs=0.02) and x.std().item() == pytest.approx(1, abs=0.01)
    assert (x * noise).mean().item() == pytest.approx(80 ** (1 - (1 + eta)), abs=0.02)
    assert torch.equal(x, sample(1)) and not torch.equal(x, sample(2))


@pytest.mark.parametrize("sampler, calls_for", [(edm.sample_dpmpp, lambda n: n), (edm.sample_sde, lambda n: 2 * n - 1)])
@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_number_of_network_calls(sampler, calls_for, num_steps):
    levels = []

    def denoise(x, sigma):
        levels.append(sigma)
        return gaussian_denoise(x, sigma)

    sampler(denoise, torch.ones(3), edm.karras_sigmas(num_steps) if num_steps > 1 else torch.tensor([80.0, 0.0]))
    assert len(levels) == calls_for(num_steps) and min(levels) > 0


# --- Training ---------------------------------------------------------------------------------------------------------


def test_ema_decay():
    assert [edm.ema_decay(k) for k in (0, 50, 100)] == [0, 0, 0]
    assert [edm.ema_decay(k) for k in (110, 200, 1000)] == pytest.approx([0.798, 0.954, 0.989], abs=6e-4)
    assert edm.ema_decay(2920) < 0.995
    assert edm.ema_decay(2930) == edm.ema_decay(100_000) == 0.995


def test_cosine_lr_is_pytorchs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert edm.cosine_lr(3e-4, step, 50) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def first_batches(count, *args, **kwargs):
    batches = edm.epoch_batches(*args, **kwargs)
    return [next(batches).clone() for _ in range(count)]


@pytest.mark.parametrize("num_rows, batch_size", [(10, 3), (12, 4), (7, 7), (3, 8), (1, 5)])
def test_epoch_batches(num_rows, batch_size):
    batches = first_batches(4 * num_rows, num_rows, batch_size, seed=1)
    assert all(batch.shape == (batch_size,) for batch in batches)
    epochs = torch.cat(batches).reshape(-1, num_rows)  # every row once in each
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(num_rows).expand(len(epochs), -1))
    if num_rows > 3:
        assert not torch.equal(epochs[0], epochs[1])
        assert not torch.equal(batches[0], first_batches(1, num_rows, batch_size, seed=2)[0])
    for step in range(num_rows + 1):
        later = first_batches(3, num_rows, batch_size, seed=1, step=step)
        assert torch.equal(torch.stack(later), torch.stack(batches[step : step + 3]))


def two_modes(num_rows, seed=0):
    """Rows [x, y]: x has two modes, y follows it with noise, in very different units."""
    rng = np.random.default_rng(seed)
    x = rng.choice([-2.0, 2.0], num_rows) + 0.3 * rng.standard_normal(num_rows)
    y = 300 + 50 * x + 30 * rng.standard_normal(num_rows)
    return torch.from_numpy(np.stack([x, y], axis=1)).float()


SMALL = dict(width=32, depth=2, batch_size=32, progress=False)


@pytest.mark.parametrize(
    "recipe, steps, lr, activation, beta", [("paper", 140, 3e-2, "relu", 0.995), ("fast", 1_200, 3e-3, "gelu", 7 / 12)]
)
def test_training_equals_a_plain_loop(float64, recipe, steps, lr, activation, beta):
    """Adam, cosine schedule, clipping and EMA, written with PyTorch's own parts."""
    data = two_modes(200).double() * torch.tensor([1.0, 1e-3])
    trained = edm.train_edm(data, steps=steps, recipe=recipe, lr=lr, seed=3, **SMALL)

    torch.manual_seed(3)
    model = EDM(2, width=32, depth=2, activation=activation)
    model.fit_normalizer(data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average, clipped = [p.detach().clone() for p in model.parameters()], 0
    for k, index in zip(range(steps), edm.epoch_batches(200, 32, seed=3)):
        x = (data[index] - data.mean(0)) / (data.std(0) + 1e-5)
        sigma = torch.exp(-1.2 + 1.2 * torch.randn(32, 1))
        error = model(x + sigma * torch.randn(32, 2), sigma) - x
        optimizer.zero_grad()
        ((sigma**2 + 1) / sigma**2 * error**2).mean().backward()
        clipped += torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1
        optimizer.step()
        scheduler.step()
        if k % 10 == 0:
            decay = min(beta, 1 - (1 + k - 100) ** (-2 / 3)) if k > 100 else 0
            for a, p in zip(average, model.parameters()):
                a.copy_(decay * a + (1 - decay) * p.detach())
        if k == steps // 10:
            early = [a.clone() for a in average]
    assert 0 < clipped < steps
    for actual, expected in zip(trained.denoiser.parameters(), average, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)
    if recipe == "fast":
        for actual, expected in zip(trained.early.parameters(), early, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.fixture(scope="module")
def learned():
    """A model trained on `two_modes`, and the losses on the way."""
    losses = []
    model = edm.train_edm(
        two_modes(5_000), steps=2_500, batch_size=256, lr=3e-3, width=64, depth=2, seed=0, log_every=10, progress=False,
        on_log=lambda step, values: losses.append(values["diffusion/loss"]),
    )  # fmt: skip
    return model, losses


def test_training_lowers_the_loss(learned):
    """From above that of the best linear denoiser to well below it."""
    _, losses = learned
    eigenvalues = np.linalg.eigvalsh(np.corrcoef(two_modes(5_000).T))
    sigma = np.exp(-1.2 + 1.2 * np.random.default_rng(0).standard_normal((10_000, 1)))
    linear = (eigenvalues * (sigma**2 + 1) / (sigma**2 + eigenvalues)).mean()
    assert len(losses) == 250
    assert np.mean(losses[-20:]) < 0.85 * linear < 0.85 * losses[0]


@pytest.mark.parametrize("sampler, sample_steps", [("dpmpp", 20), ("dpmpp-sde", 32), ("sde", 128)])
def test_generated_rows_follow_the_data(learned, sampler, sample_steps):
    rows = edm.generate(learned[0], 4_000, sampler=sampler, sample_steps=sample_steps, progress=False)
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


def test_trained_model_holds_no_gradients():
    model = edm.train_edm(torch.randn(500, 6), steps=25, width=16, depth=1, progress=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    edm.generate(copy.deepcopy(model), 10, progress=False)  # tensors of a graph cannot be copied


def test_training_is_deterministic_and_leaves_the_random_state_alone():
    data = two_modes(200)
    first = edm.train_edm(data, steps=30, seed=1, **SMALL)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = edm.train_edm(data, steps=30, seed=1, **SMALL)
    edm.generate(second, 20, sampler="sde", sample_steps=5, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(edm.train_edm(data, steps=30, seed=2, **SMALL)))


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("checkpoint_every", [40, 25, 7])
def test_resumed_training_equals_uninterrupted(tmp_path, checkpoint_every):
    """Weights and logged losses are the same to the last bit, wherever checkpoints fall between logs."""
    path, data = tmp_path / "checkpoint.pt", two_modes(200)
    options = dict(SMALL, steps=130, log_every=20, checkpoint_every=checkpoint_every, seed=1)
    expected_log, log = {}, {}
    expected = edm.train_edm(data, **options, on_log=lambda step, values: expected_log.update({step: values}))

    def log_until_killed(step, values):
        log[step] = values
        if step in kills:
            kills.remove(step)
            raise Killed

    kills = [60, 100]
    while True:
        try:
            resumed = edm.train_edm(data, **options, checkpoint_path=path, on_log=log_until_killed)
            break
        except Killed:
            done = torch.load(path, weights_only=True)["step"]
            assert done % checkpoint_every == 0 and done > 0
    assert not kills
    assert torch.equal(weights(resumed), weights(expected))
    assert {step: values["diffusion/loss"] for step, values in log.items()} == {
        step: values["diffusion/loss"] for step, values in expected_log.items()
    }


# Few rows and a network that learns them by heart: the loss of rows that it has not seen rises soon
OVERFIT = dict(width=64, depth=3, batch_size=64, lr=3e-3, steps=20_000, seed=1, progress=False)


def train_with_patience(path=None, on_log=None, **options):
    logged = {}

    def record(step, values):
        logged[step] = values
        if on_log:
            on_log(step)

    model = edm.train_edm(two_modes(60), **OVERFIT | options, checkpoint_path=path, on_log=record)
    return model, logged


def test_patience_stops_when_unseen_rows_get_worse():
    model, logged = train_with_patience(patience=1)
    steps, held_out = max(logged), [values["diffusion/held_out_loss"] for values in logged.values()]
    assert 2_000 <= steps <= 10_000 and steps % 1_000 == 0
    assert all(a >= b for a, b in zip(held_out, held_out[1:]))  # the best one so far
    patient, logged = train_with_patience(patience=2)
    assert max(logged) > steps and not torch.equal(weights(model), weights(patient))


def test_no_guidance_by_a_model_that_patience_stopped_before_a_tenth():
    model, logged = train_with_patience(patience=1, steps=99_000, recipe="fast")
    assert max(logged) < 9_900
    for early, late in zip(model.early.parameters(), model.denoiser.parameters(), strict=True):
        assert torch.equal(early, late)


def test_held_out_rows_are_not_trained_on():
    data, seen = two_modes(2_000), []
    loss = EDM.loss

    def recording_loss(self, x, cond=None):
        if torch.is_grad_enabled():
            seen.append(self.unnormalize(x))
        return loss(self, x, cond)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EDM, "loss", recording_loss)
        edm.train_edm(data, steps=200, patience=1, **SMALL)
    assert len(torch.cat(seen).round(decimals=2).unique(dim=0)) == pytest.approx(1_900, abs=5)


@pytest.mark.parametrize("kill_at", [1_500, "end"])
def test_resumed_training_with_patience_equals_uninterrupted(tmp_path, kill_at):
    expected, log = train_with_patience(patience=1)
    path = tmp_path / "checkpoint.pt"
    if kill_at == "end":  # after the last checkpoint, before anything else
        train_with_patience(path, patience=1)
    else:

        def kill(step):
            if step == kill_at:
                raise Killed

        with pytest.raises(Killed):
            train_with_patience(path, on_log=kill, checkpoint_every=700, patience=1)
    resumed, resumed_log = train_with_patience(path, checkpoint_every=700, patience=1)
    assert torch.equal(weights(resumed), weights(expected))
    assert all(step > 0 and log[step]["diffusion/loss"] == v["diffusion/loss"] for step, v in resumed_log.items())
    assert max(resumed_log) == max(log)  # at the end, too: the caller may not have seen it before the kill


def test_patience_with_hardly_any_rows():
    steps = []
    data = two_modes(4)
    edm.train_edm(data, steps=3_000, patience=1, on_log=lambda step, values: steps.append(values), **SMALL)
    assert math.isfinite(steps[-1]["diffusion/held_out_loss"])


def test_largest_seed():
    data, seed = two_modes(50), 2**62
    model = edm.train_edm(data, steps=5, seed=seed, **SMALL)
    assert edm.generate(model, 10, seed=seed, progress=False).isfinite().all()


def test_warm_start():
    """Training goes on from the weights of a model, with the normaliser of the new data."""
    data = two_modes(500)
    first = edm.train_edm(data, steps=600, lr=3e-3, seed=0, **SMALL)
    losses = {}
    for name, init in (("cold", None), ("warm", first)):
        record = lambda step, values: losses.setdefault(name, values["diffusion/loss"])  # noqa: E731,B023
        model = edm.train_edm(
            data + 1, steps=60, lr=1e-4, init=init, seed=5, log_every=60, on_log=record, **SMALL
        )  # fmt: skip
        torch.testing.assert_close(model.mean, data.mean(0) + 1)
    assert losses["warm"] < 0.75 * losses["cold"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_data_that_are_not_finite_are_refused(bad):
    data = two_modes(50)
    data[7, 1] = bad
    with pytest.raises(RunError, match="NaN or Inf"):
        edm.train_edm(data, steps=10, **SMALL)


def test_diverging_training_stops_and_says_where():
    with pytest.raises(RunError, match=r"loss became (nan|inf) between steps \d+ and \d+"):
        edm.train_edm(two_modes(50), steps=200, lr=1e30, log_every=50, **SMALL)


def test_conditional_training_and_generation():
    """A model of x given its sign generates the sign that it is asked for."""
    data = two_modes(2_000)[:, :1]
    model = edm.train_edm(data, cond=data.sign(), steps=400, batch_size=256, lr=3e-3, width=32, depth=2, progress=False)
    cond = torch.tensor([[-1.0], [1.0]]).repeat(150, 1)
    rows = edm.generate(model, 300, cond=cond, batch_size=70, progress=False)
    assert (rows.sign() == cond).float().mean() > 0.97


# --- Generation -------------------------------------------------------------------------------------------------------


class CountingEDM(EDM):
    calls = 0

    def forward(self, *args):
        self.calls += 1
        return super().forward(*args)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CountingEDM(3, width=16, depth=1).requires_grad_(False)


def draw(model, num_samples, **options):
    return edm.generate(model, num_samples, **(dict(sample_steps=5, batch_size=10, progress=False) | options))


@pytest.mark.parametrize("num_samples", [1, 7, 10, 25, 30])
def test_any_number_of_samples(model, num_samples):
    rows = draw(model, num_samples)
    assert rows.shape == (num_samples, 3) and torch.isfinite(rows).all()
    assert len(rows.unique(dim=0)) == num_samples  # no batch repeats another
    full = num_samples // 10 * 10
    assert torch.equal(rows[:full], draw(model, 40)[:full])


@pytest.mark.parametrize("sampler", ["dpmpp", "dpmpp-sde", "sde"])
def test_samples_depend_on_the_seed_alone(model, sampler):
    rows = draw(model, 25, sampler=sampler, seed=4)
    torch.manual_seed(99)
    assert torch.equal(draw(model, 25, sampler=sampler, seed=4), rows)
    assert not torch.isclose(draw(model, 25, sampler=sampler, seed=5), rows).any()


def test_samples_are_in_raw_units(model):
    unit = draw(model, 25)
    model.mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
    model.std.copy_(torch.tensor([10.0, 0.5, 1.0]))
    torch.testing.assert_close(draw(model, 25), unit * model.std + model.mean)


@pytest.mark.parametrize("extra_bytes", [0, 1, 4 * 3 * 9 + 2])
def test_killed_generation_goes_on_after_the_finished_batches(model, tmp_path, extra_bytes):
    path = tmp_path / "synthetic.partial"
    expected = draw(model, 47)
    assert torch.equal(draw(model, 47, partial_path=path), expected)
    content = path.read_bytes()
    assert content.endswith(expected.numpy().tobytes())
    cut = len(content) - 4 * 3 * 27 + extra_bytes  # after two batches, and the start of a third
    path.write_bytes(content[:cut])
    model.calls = 0
    assert torch.equal(draw(model, 47, partial_path=path), expected)
    assert model.calls == 3 * 5 and path.read_bytes() == content


def test_finished_or_empty_partial_file(model, tmp_path):
    path, expected = tmp_path / "synthetic.partial", draw(model, 40)
    path.touch()
    assert torch.equal(draw(model, 40, partial_path=path), expected)
    model.calls = 0
    assert torch.equal(draw(model, 40, partial_path=path), expected) and model.calls == 0


# --- Transitions <-> rows ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(1, 20), obs_dim=st.integers(1, 5), act_dim=st.integers(1, 4), seed=st.integers(0, 2**32 - 1),
    as_tensors=st.booleans(),
)  # fmt: skip
def test_unpack_undoes_pack(n, obs_dim, act_dim, seed, as_tensors):
    rng = np.random.default_rng(seed)
    data = {
        "observations": rng.standard_normal((n, obs_dim), np.float32),
        "actions": rng.standard_normal((n, act_dim), np.float32),
        "rewards": rng.standard_normal(n, np.float32),
        "next_observations": rng.standard_normal((n, obs_dim), np.float32),
        "terminals": rng.random(n) < 0.5,
    }
    rows = edm.pack(**{k: torch.from_numpy(x) for k, x in data.items()} if as_tensors else data)
    assert rows.dtype == torch.float32
    columns = [data["observations"], data["actions"], data["rewards"], data["next_observations"], data["terminals"]]
    assert np.array_equal(rows, np.column_stack(columns))
    back = edm.unpack(rows, obs_dim, act_dim)
    assert back.keys() == data.keys()
    for key, x in data.items():
        assert back[key].dtype == x.dtype and np.array_equal(back[key], x)


def test_terminal_threshold_is_strict():
    rows = torch.zeros(6, 5)
    rows[:, -1] = torch.tensor([-1.0, 0.0, 0.5, np.nextafter(np.float32(0.5), np.float32(1)), 1.0, 3.0])
    assert edm.unpack(rows, 1, 1)["terminals"].tolist() == [False, False, False, True, True, True]


def test_relabelled_terminals_follow_the_real_ones():
    """Where d depends on s', generated rows get the d of their s'; nothing else changes, and the same each time."""
    columns = lambda n, seed: torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)) * 100 + 7  # noqa: E731
    real, rows = columns(3_000, 0), columns(1_000, 1)
    real[:, -1] = real[:, 3] > 150  # 8 %
    rows[:, -1] = 0.2
    expected = (rows[:, 3] > 150).float()
    relabelled = rows.clone()
    before = torch.get_rng_state()
    assert edm.relabel_terminals(relabelled, real, steps=500) is relabelled
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(relabelled[:, :-1], rows[:, :-1])
    assert set(relabelled[:, -1].tolist()) == {0.0, 1.0}
    assert (relabelled[:, -1] == expected).float().mean() > 0.98
    assert torch.equal(edm.relabel_terminals(rows.clone(), real, steps=500), relabelled)


# --- Sample quality ---------------------------------------------------------------------------------------------------


def slow_marginal(real, synthetic):
    """1 - the largest difference of the two empirical distribution functions, which is reached at a data point."""
    scores = []
    for x, y in zip(real.T, synthetic.T):
        x, y = x[~np.isnan(x)], y[~np.isnan(y)]
        scores.append(1 - max(abs((x <= t).mean() - (y <= t).mean()) for t in [*x, *y]))
    return np.mean(scores)


def slow_correlation(real, synthetic):
    """Pair by pair from the definition of Pearson's coefficient; 0 where a synthetic column is constant."""

    def pearson(x, y):
        x, y = x - x.mean(), y - y.mean()
        scale = math.sqrt((x * x).sum() * (y * y).sum())
        return (x * y).sum() / scale if scale > 0 else 0.0

    real, synthetic = real.astype(np.float64), synthetic.astype(np.float64)
    columns = [i for i in range(real.shape[1]) if len(set(real[:, i])) > 1]
    pairs = [(i, j) for i in columns for j in columns if i < j]
    rho = [(pearson(real[:, i], real[:, j]), pearson(synthetic[:, i], synthetic[:, j])) for i, j in pairs]
    return np.mean([1 - abs(a - b) / 2 for a, b in rho])


def ranks(x):
    """Ranks from 0, ties sharing their mean."""
    return np.array([[(c < v).sum() + ((c == v).sum() - 1) / 2 for v in c] for c in x.T]).T


def sample_rows(n, seed):
    """Correlated columns, one of them with many ties, one a rare terminal."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 5)) @ rng.standard_normal((5, 5))
    x[:, 3] = x[:, 3].round()
    x[:, 4] = x[:, 4] > np.quantile(x[:, 4], 0.9)
    return x.astype(np.float32)


def test_marginal_equals_the_formula():
    real, synthetic = sample_rows(120, 0), sample_rows(83, 1)
    assert edm.marginal(real, synthetic) == pytest.approx(slow_marginal(real, synthetic), abs=1e-12)
    real[3, 0] = synthetic[:5, 2] = math.nan
    assert edm.marginal(torch.from_numpy(real), synthetic) == pytest.approx(slow_marginal(real, synthetic), abs=1e-12)


def test_marginal_extremes():
    rows = sample_rows(50, 0)
    assert edm.marginal(rows, rows[::-1]) == 1
    assert edm.marginal(rows, rows + 1000) == 0
    assert edm.marginal(np.zeros((10, 1)), np.ones((10, 1)) * 1e-9) == 0  # a constant column and rounding noise


def test_correlation_equals_the_formula():
    real, synthetic = sample_rows(120, 0), sample_rows(83, 1)
    assert edm.correlation(real, synthetic) == pytest.approx(slow_correlation(real, synthetic), abs=1e-5)
    assert edm.correlation(torch.from_numpy(real), real[::-1].copy()) == pytest.approx(1, abs=1e-5)
    x = np.linspace(0, 1, 20)
    assert edm.correlation(np.stack([x, x], 1), np.stack([x, -x], 1)) == pytest.approx(0)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1000.3])
def test_correlation_with_constant_columns(constant):
    real, synthetic = sample_rows(1000, 0), sample_rows(83, 1)
    real[:, 1] = constant  # left out, whatever rounding makes of its deviation
    synthetic[:, 2] = constant  # counts as uncorrelated
    assert edm.correlation(real, synthetic) == pytest.approx(slow_correlation(real, synthetic), abs=1e-5)
    assert math.isnan(edm.correlation(real[:, :2], synthetic[:, :2]))


def test_quality_report():
    real, synthetic = torch.from_numpy(sample_rows(3_000, 0)), torch.from_numpy(sample_rows(400, 1))
    report = edm.quality_report(real, synthetic)
    assert report["marginal"] == pytest.approx(edm.marginal(real, synthetic))
    assert report["correlation"] == pytest.approx(edm.correlation(real, synthetic))
    assert report["terminals_real"] == pytest.approx(0.1, abs=1e-3) and report["terminals"] == pytest.approx(0.1)
    assert report["nonfinite"] == 0
    assert all(f"{key} " in edm.format_report(report) for key in report)


def test_spearman_shares_ranks_between_ties():
    real, synthetic = sample_rows(200, 0), sample_rows(150, 1)
    report = edm.quality_report(torch.from_numpy(real), torch.from_numpy(synthetic))
    assert report["spearman"] == pytest.approx(slow_correlation(ranks(real), ranks(synthetic)), abs=1e-6)


def test_quality_report_detects_copies():
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(3_000, 4, generator=rng) * torch.tensor([1.0, 10.0, 100.0, 0.1])
    fresh = torch.randn(2_000, 4, generator=rng) * torch.tensor([1.0, 10.0, 100.0, 0.1])
    report = edm.quality_report(real, fresh)
    assert report["nearest"] == pytest.approx(report["nearest_real"], rel=0.15)  # from the same distribution
    copies = real[torch.randperm(3_000, generator=rng)[:2_000]]
    report = edm.quality_report(real, copies)
    assert report["nearest"] < 1e-3 and report["nearest_real"] > 0.1


def test_quality_report_detects_copies_of_few_rows():
    real = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    assert edm.quality_report(real, real.flip(0))["nearest"] < 1e-3


def test_quality_report_counts_rows_that_are_not_finite():
    real, synthetic = torch.from_numpy(sample_rows(300, 0)), torch.from_numpy(sample_rows(200, 1))
    synthetic[:10, 0], synthetic[10:20, 3], synthetic[15:20, 1] = math.nan, math.inf, -math.inf
    report = edm.quality_report(real, synthetic)
    assert report["nonfinite"] == pytest.approx(0.1)
    assert report["marginal"] == pytest.approx(edm.marginal(real, synthetic[20:]))
    assert all(math.isfinite(value) for value in report.values())
    assert edm.quality_report(real, synthetic[:20]) == {"nonfinite": 1.0}


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", ["standard", "rank"])
def test_saved_model_comes_back_the_same(tmp_path, normalizer):
    torch.manual_seed(0)
    model = EDM(3, width=16, depth=2, time_dim=8, cond_dim=2, residual=False, sigma_data=0.5, normalizer=normalizer)
    model.fit_normalizer(torch.randn(20, 3) * 7 + 1)
    edm.save_edm(tmp_path / "diffusion.pt", model)
    loaded = edm.load_edm(tmp_path / "diffusion.pt")
    x, cond = torch.randn(4, 3), torch.randn(4, 2)
    assert torch.equal(loaded(x, 0.3, cond), model(x, 0.3, cond))
    assert torch.equal(loaded.unnormalize(x), model.unnormalize(x))
    assert not any(p.requires_grad for p in loaded.parameters())


@contextmanager
def full_disk(free_bytes=1_000):
    """Files cannot grow beyond `free_bytes`, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "write",
    [
        lambda f: f.write(bytes(100_000)),
        lambda f: np.savez(f, x=np.zeros(100_000)),
        lambda f: torch.save({"x": torch.zeros(100_000)}, f),
    ],
    ids=["bytes", "numpy", "torch"],
)
def test_full_disk_leaves_the_old_file_and_no_other(tmp_path, write):
    path = tmp_path / "file"
    edm.save_atomically(path, lambda f: f.write(b"old"))
    with full_disk(), pytest.raises(RunError, match=f"cannot write {path}"):
        edm.save_atomically(path, write)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_failing_writer_leaves_the_old_file(tmp_path):
    def half(f):
        f.write(b"ne")
        raise Killed

    path = tmp_path / "file"
    edm.save_atomically(path, lambda f: f.write(b"old"))
    with pytest.raises(Killed):
        edm.save_atomically(path, half)
    assert path.read_bytes() == b"old"
    edm.save_atomically(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(RunError, match="cannot write .*No such file or directory"):
        edm.save_edm(tmp_path / "nowhere" / "diffusion.pt", EDM(2, width=4, depth=1))


def test_plot_of_the_marginals(tmp_path):
    real, synthetic = torch.from_numpy(sample_rows(100, 0)), torch.from_numpy(sample_rows(100, 1))
    edm.plot_marginals(tmp_path / "marginals.png", real, synthetic, obs_dim=1, act_dim=1)
    assert (tmp_path / "marginals.png").read_bytes().startswith(b"\x89PNG")


# --- Command line -----------------------------------------------------------------------------------------------------


def write_transitions(path, n=300):
    rng = np.random.default_rng(0)
    arrays = {
        k: rng.standard_normal((n, 2)).astype(np.float32) for k in ("observations", "next_observations", "actions")
    }
    np.savez(path, **arrays, rewards=rng.standard_normal(n).astype(np.float32), terminals=rng.random(n) < 0.1)
    return path


def command(folder, **options):
    tiny = dict(
        data="data.npz", num_samples=2_500, out="out.npz", diffusion_steps=300, diffusion_width=16, device="cpu"
    )
    words = [word for k, v in (tiny | options).items() for word in (f"--{k.replace('_', '-')}", str(v))]
    return dict(args=[sys.executable, edm.__file__, *words], cwd=folder, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("recipe", ["paper", "fast", "ranks"])
def test_command_line(tmp_path, recipe):
    write_transitions(tmp_path / "data.npz")
    result = subprocess.run(**command(tmp_path, diffusion_recipe=recipe), capture_output=True, text=True, timeout=100)
    assert result.returncode == 0 and "marginal" in result.stdout, result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"data.npz", "out.npz", "out.pt", "out.png"}
    data = edm.load_transitions(tmp_path / "out.npz")
    model = edm.load_edm(tmp_path / "out.pt")
    assert model.config["normalizer"] == ("rank" if recipe == "ranks" else "standard")
    assert model.config["depth"] == (6 if recipe == "paper" else 4)
    flag = (0.5, 0.25) if recipe == "ranks" else (0, 1)
    assert (model.mean[-1], model.std[-1]) == flag and (model.std[:-1] != 1).all()  # all but d are normalised
    rows = edm.generate(model, 2_500, progress=False)
    for key, x in edm.unpack(rows, 2, 2).items():
        np.testing.assert_array_equal(data[key], x)


def test_killed_command_goes_on(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        write_transitions(tmp_path / name / "data.npz")
    options = dict(num_samples=30_300, sample_batch_size=500)
    subprocess.run(**command(tmp_path / "whole", **options), check=True, capture_output=True, timeout=100)
    partial = tmp_path / "killed" / "out.partial"
    with open(tmp_path / "stderr.txt", "w") as stderr:
        process = subprocess.Popen(**command(tmp_path / "killed", **options), stdout=subprocess.DEVNULL, stderr=stderr)
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > 5_000 * 4 * 8):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "stderr.txt").read_text()
    assert not (tmp_path / "killed" / "out.npz").exists()
    subprocess.run(**command(tmp_path / "killed", **options), check=True, capture_output=True, timeout=100)
    with np.load(tmp_path / "killed" / "out.npz") as killed, np.load(tmp_path / "whole" / "out.npz") as whole:
        for key in whole.files:
            np.testing.assert_array_equal(killed[key], whole[key])


def stopped_command(folder, monkeypatch, where, function):
    """Run the command in this process up to a call of `where.function`. Returns its arguments."""
    options = dict(
        data=str(write_transitions(folder / "data.npz")), num_samples=3_000, out=str(folder / "out.npz"), device="cpu",
        diffusion_steps=100, diffusion_width=16, sample_batch_size=1_000,
    )  # fmt: skip

    def stop(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(where, function, stop)
        edm.main(edm.Args(**options))
    return options


@pytest.mark.parametrize("where, function", [(edm, "quality_report"), (edm, "save_edm"), (edm.np, "savez")])
def test_stopped_command_goes_on(tmp_path, monkeypatch, where, function):
    options = stopped_command(tmp_path, monkeypatch, where, function)
    edm.main(edm.Args(**options))
    assert len(np.load(tmp_path / "out.npz")["rewards"]) == 3_000
    assert {p.name for p in tmp_path.iterdir()} == {"data.npz", "out.npz", "out.pt", "out.png"}


def test_stopped_command_does_not_go_on_with_other_settings(tmp_path, monkeypatch):
    options = stopped_command(tmp_path, monkeypatch, edm, "quality_report")
    for name, other in dict(diffusion_lr=1e-3, seed=1, sampler="sde", sample_steps=5, sample_batch_size=500).items():
        with pytest.raises(RunError, match="delete it to start over"):
            edm.main(edm.Args(**options | {name: other}))


@pytest.mark.parametrize(
    "options",
    [
        dict(data="nothing.npz"),
        dict(data="nothing.csv"),
        dict(out="old.npz"),
        dict(out="old_model.npz"),
        dict(out="out.hdf5"),
        dict(out="nowhere/out.npz"),
        dict(num_samples=0),
        dict(diffusion_steps=0),
        dict(device="cuda"),
    ],
    ids=lambda options: " ".join(map(str, *options.items())),
)
def test_bad_command_ends_in_one_sentence(tmp_path, options):
    if torch.cuda.is_available() and "device" in options:
        pytest.skip("there is a GPU")
    write_transitions(tmp_path / "data.npz")
    for name in ("old.npz", "old_model.pt"):
        (tmp_path / name).write_text("precious")
    names = sorted(p.name for p in tmp_path.iterdir())
    result = subprocess.run(**command(tmp_path, **options), capture_output=True, text=True, timeout=100)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, lines[-1:]
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:] and "Traceback" not in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert (tmp_path / "old.npz").read_text() == (tmp_path / "old_model.pt").read_text() == "precious"


def test_fast_matmul_keeps_float32_accuracy():
    """Whatever library the import chose: products are not rounded to bfloat16, which would err by 1e-3."""
    x, w = torch.randn(256, 1024), torch.randn(1024, 1024)
    exact = x.double() @ w.double()
    assert (x @ w - exact).abs().max() < 1e-5 * exact.abs().max()


def test_crowded_machine_is_mentioned(monkeypatch, capsys):
    monkeypatch.setattr(edm.torch, "get_num_threads", lambda: 2)
    for load, said in ((1.0, False), (1.4, False), (2.0, True)):
        monkeypatch.setattr(edm.os, "getloadavg", lambda: (load * edm.os.cpu_count(), 0.0, 0.0))  # noqa: B023
        edm.warn_if_crowded()
        assert ("OMP_NUM_THREADS=1" in capsys.readouterr().out) == said
