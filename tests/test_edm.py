"""Tests of edm.py: against written-out formulas, analytic solutions, and itself after a restart."""

import copy
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Optional

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
import torch.nn as nn
from dynamics import replay
from helpers import assert_refused, d4rl_rows, episodes, make_minari, transitions, write
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_agents import plain_denoised, plain_training
from scipy.stats import kstest, norm, rankdata

import edm
from edm import EDM, Denoiser, DiffusionArgs, Recipe, RowModel, RunError

# --- Denoiser, normaliser, guidance ---


def test_number_of_trainable_parameters():
    for dim, options, count in (
        (42, {}, 6_497_066),  # walker2d, halfcheetah
        (27, {}, 6_479_771),  # hopper
        (42, dict(width=2048), 25_552_682),
        (27, dict(time_dim=256), 6_666_011),  # online
        (27, dict(depth=2), 2_281_371),  # Table 10
        (27, dict(depth=4, residual=False), 4_380_571),
    ):
        with torch.device("meta"):
            assert sum(p.numel() for p in Denoiser(dim, **options).parameters()) == count


@pytest.mark.parametrize("options", [{}, dict(waves=2, gated=True), dict(residual=False)], ids=str)
def test_denoiser_equals_the_formula(float64, options):
    torch.manual_seed(0)
    model = EDM(4, width=16, depth=3, time_dim=8, **options)
    x = torch.randn(6, 4)
    sigma = torch.tensor([0.002, 0.1, 0.5, 1.0, 7.0, 80.0])
    torch.testing.assert_close(model(x, sigma), plain_denoised(model, x, sigma[:, None]))
    torch.testing.assert_close(model(x, 7.0), model(x, torch.full((6,), 7.0)))


def test_normaliser_standardises_all_but_raw_columns():
    data = torch.tensor([[1.0, 7.0, 0.0], [2.0, 7.0, 1.0], [6.0, 7.0, 1.0]])
    model = EDM(3, width=8, depth=1)
    model.fit_normalizer(data, raw_columns=[-1])
    std = math.sqrt((2**2 + 1**2 + 3**2) / 2)  # around the mean 3, unbiased
    torch.testing.assert_close(model.std, torch.tensor([std + 1e-5, 1e-5, 1.0]), rtol=1e-6, atol=0)
    z = model.normalize(data)
    expected = torch.stack([torch.tensor([-2.0, -1.0, 3.0]) / std, torch.zeros(3), data[:, 2]], 1)
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(model.unnormalize(z), data)


def test_normaliser_with_knots_adds_a_fifth_of_the_rank_and_keeps_the_range():
    """Values that many rows share fill an interval."""
    torch.manual_seed(0)
    data = torch.randn(5_000, 4).exp()
    data[:, 1].clamp_(0.5, 2.0)  # a quarter of the rows at each limit
    data[:, 2] = 7.0
    data[:, 3] = (data[:, 3] > 4).float()
    model = EDM(4, width=8, depth=1, knots=1_000)
    model.fit_normalizer(data, raw_columns=[-1])
    z = model.normalize(data)
    x = data[:, 0].numpy()
    standardised = 0.8 * (x - x.mean()) / x.std()
    error = z[:, 0].numpy() - standardised - 0.2 * norm.ppf((rankdata(x) - 0.5) / len(x))
    assert np.median(abs(error)) < 1e-3 and abs(error).max() < 0.1  # the ends are steep
    x = data[:, 1]
    limited = x == 2.0
    first, last = model.knots[1][model.raw_knots[1] == 2.0].aminmax()
    share = norm.sf((first - 0.8 * (2 - x.mean()) / x.std()) / 0.2)
    assert limited.float().mean() == pytest.approx(share, abs=0.01)
    assert kstest(z[limited, 1], "uniform", (first, last - first)).statistic < 0.05
    assert (model.unnormalize(z)[limited, 1] == 2.0).all()
    assert 0.2 < z[:, 2].std() < 0.5 and torch.equal(z[:, 3], data[:, 3])
    torch.testing.assert_close(model.unnormalize(z), data, rtol=1e-5, atol=1e-5)
    beyond = model.unnormalize(torch.tensor([[-9.0] * 4, [99.0] * 4]))
    torch.testing.assert_close(beyond, torch.stack(data.aminmax(dim=0)))


@pytest.mark.parametrize("sigma, guidance", [(0.002, 1.5), (0.29, 3.0), (0.31, 1.5), (7.0, 3.0)])
def test_guidance_moves_away_from_the_early_copy_at_low_noise(sigma, guidance):
    """Up to a noise level of 0.3, by (guidance - 1) times the change since early, of which sigma
    counts at most. With knots, estimates stay between the first and the last at any level."""
    torch.manual_seed(0)
    model = EDM(3, width=8, depth=2, guidance=guidance)
    model.early.out.bias.data += torch.tensor([0.1, 0.5, 50.0])  # the last further than the noise
    x = torch.randn(5, 3)
    late = model(x, sigma)
    change = late - model(x, sigma, model.early)
    assert (change[:, :2].abs() < sigma).all() and (change[:, 2] < -sigma).all()
    change[:, 2] = -sigma
    guided = late + (guidance - 1) * change if sigma < 0.3 else late
    torch.testing.assert_close(model.denoise(x, sigma), guided)
    limited = EDM(3, width=8, depth=2, guidance=guidance, knots=2)
    knots = dict(raw_knots=torch.zeros(3, 2), knots=torch.tensor([[-0.01, 0.02]] * 3))
    limited.load_state_dict(model.state_dict() | knots)
    torch.testing.assert_close(limited.denoise(x, sigma), guided.clamp(-0.01, 0.02))


# --- Samplers ---


def test_noise_levels_are_karras():
    sigmas = edm.karras_sigmas(128)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (129,) and (sigmas.diff() < 0).all()
    assert sigmas[:3].tolist() == pytest.approx([80, 76.62, 73.37], abs=0.005)
    assert sigmas[-3:].tolist() == pytest.approx([0.002425, 0.002, 0], abs=5e-7)
    straight = edm.karras_sigmas(5, 0.1, 10, rho=1).tolist()
    assert straight == pytest.approx([10, 7.525, 5.05, 2.575, 0.1, 0])


MEAN = 0.7  # of the analytic data, a Gaussian
SD = 0.5


def gaussian_denoise(x, sigma):
    """The ideal denoiser of N(MEAN, SD^2)."""
    return MEAN + (x - MEAN) * SD**2 / (SD**2 + sigma**2)


def uneven_sigmas(num_steps):
    """From 80 to 0.002, every second step three times as long in ln(sigma)."""
    lengths = torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(num_steps // 2).cumsum(0)
    return 80 * (0.002 / 80) ** (torch.cat([torch.zeros(1), lengths]) / lengths[-1])


@pytest.mark.parametrize("sampler", [edm.sample_dpmpp, partial(edm.sample_sde, s_churn=0.0)])
def test_deterministic_samplers_are_second_order(sampler):
    """The error against the exact solution of the probability-flow ODE falls as num_steps^-2."""
    x = 80 * torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = MEAN + (x - MEAN) * math.sqrt((SD**2 + 0.002**2) / (SD**2 + 80**2))  # at sigma_min
    steps = [80, 160, 320, 640]
    made = [sampler(gaussian_denoise, x, uneven_sigmas(n)) for n in steps]
    errors = [(rows - exact).abs().max() for rows in made]
    slope, _ = np.polyfit(np.log(steps), np.log(errors), 1)
    assert slope == pytest.approx(-2, abs=0.1) and errors[-1] < 2e-4


@pytest.mark.parametrize("num_steps, tolerance", [(32, 0.05), (128, 0.005)])
def test_new_noise_mends_earlier_errors(num_steps, tolerance):
    """With eta = 1, samples are as wide as the data, also from a start of half the right width."""
    torch.manual_seed(0)
    x = 80 * torch.randn(200_000, dtype=torch.float64)
    sigmas = edm.karras_sigmas(num_steps)
    for scale in (1.0, 0.5):
        samples = edm.sample_dpmpp(gaussian_denoise, scale * x, sigmas, eta=1.0)
        assert samples.mean() == pytest.approx(MEAN, abs=0.005)
        assert samples.std() == pytest.approx(SD, rel=tolerance)
    samples = edm.sample_dpmpp(gaussian_denoise, 0.5 * x, sigmas)
    assert samples.std() == pytest.approx(SD / 2, rel=0.03)


@pytest.mark.parametrize("num_steps", [1, 2, 20])
@pytest.mark.parametrize("sampler", [edm.sample_dpmpp, edm.sample_sde])
def test_last_step_returns_the_estimate(sampler, num_steps):
    """A single data point, 3, comes out to the last bits, after so many network calls."""
    levels = []

    def denoise(x, sigma):
        levels.append(sigma)
        return torch.full_like(x, 3.0)

    x = sampler(denoise, 80 * torch.randn(5), edm.karras_sigmas(num_steps))
    torch.testing.assert_close(x, torch.full((5,), 3.0), rtol=0, atol=1e-5)
    calls = num_steps if sampler is edm.sample_dpmpp else 2 * num_steps - 1
    assert len(levels) == calls and min(levels) > 0


def test_stochastic_sampler_equals_algorithm_2():
    """Karras' Algorithm 2 with the constants of Table 9, line by line, on a bent network."""

    def network(x, sigma):
        return torch.tanh(x) * sigma / (1 + sigma) + x / (1 + sigma**2)

    t = edm.karras_sigmas(40)
    x = 80 * torch.linspace(-2, 2, 9, dtype=torch.float64)
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


# --- Training ---


def two_modes(num_rows, seed=0):
    """Rows [x, y]: x has two modes, y follows it with noise, in very different units."""
    rng = np.random.default_rng(seed)
    x = rng.choice([-2.0, 2.0], num_rows) + 0.3 * rng.standard_normal(num_rows)
    y = 300 + 50 * x + 30 * rng.standard_normal(num_rows)
    return torch.from_numpy(np.stack([x, y], axis=1)).float()


def diffusion_args(**options):
    """Options without their prefix, and by default those of a small model."""
    options = dict(width=32, depth=2, batch_size=32) | options
    return DiffusionArgs(**{f"diffusion_{name}": value for name, value in options.items()})


def recorder(saved=None):
    """What train_edm takes as `run`, with all that it was told."""
    run = SimpleNamespace(saved=copy.deepcopy(saved or {"stage": ""}), states=[], logged={})
    run.log = run.logged.__setitem__
    run.save = lambda state: run.states.append(copy.deepcopy(state))
    return run


def weights(model):
    return torch.cat([x.flatten() for x in model.state_dict().values()])


FAST = dict(time_dim=32, gated=True, waves=3, guidance=1.5, knots=200)  # as many knots as rows
OWN = dict(batch_size=16, betas=(0.8, 0.95), clip=2.0, ema_decay=0.6, residual=False, sampler="sde")


LOOPS = [("paper", 140, 3e-2, {}, 0.995), ("fast", 900, 3e-3, FAST, 4 / 9)]
LOOPS += [("own", 140, 1e-2, OWN, 0.6)]


@pytest.mark.parametrize("name, steps, lr, options, decay_limit", LOOPS)
def test_training_equals_a_plain_loop(float64, monkeypatch, name, steps, lr, options, decay_limit):
    """Loss, Adam, cosine schedule, clipping and moving average, written with PyTorch's own parts.
    A recipe that is added to RECIPES is used."""
    options = dict(width=32, depth=2, batch_size=32) | options
    monkeypatch.setitem(edm.RECIPES, "own", Recipe(lr=lr, **options))
    args = diffusion_args(steps=steps, recipe=name, lr=lr, seed=3)
    if name == "own":  # all else from the recipe
        args = DiffusionArgs(diffusion_steps=steps, diffusion_recipe=name, diffusion_seed=3)
    data = two_modes(200).double() * torch.tensor([1.0, 1e-3])
    run = recorder()
    trained = edm.train_edm(data, args, run=run)

    torch.manual_seed(3)
    model = EDM(2, **options)
    model.fit_normalizer(data)
    rows = model.normalize(data)
    step = plain_training(model, rows, lr, steps, decay_limit)
    losses = []
    clipped = 0
    for k in range(steps):
        loss, norm = step(k)
        losses.append(loss)
        clipped += norm > model.recipe.clip
        if k == steps // 10:
            early = copy.deepcopy(step.average)
    assert 0 < clipped < steps
    torch.testing.assert_close(
        list(trained.denoiser.parameters()), step.average, rtol=1e-7, atol=1e-9
    )
    if name == "fast":
        torch.testing.assert_close(list(trained.early.parameters()), early, rtol=1e-7, atol=1e-9)
    assert trained.recipe.sampler == model.recipe.sampler
    assert not any(p.requires_grad for p in trained.parameters())
    last = losses[500:] if steps > 500 else losses
    assert run.logged[steps]["diffusion/loss"] == pytest.approx(np.mean(last))


def test_resumed_training_equals_uninterrupted():
    """Weights and logged losses are the same to the last bit, from wherever it goes on, before
    and after the early copy at step 60. A checkpoint of other options or data is refused."""
    data = two_modes(200)
    args = replace(diffusion_args(steps=600, seed=1), checkpoint_every=50)
    random_state = torch.get_rng_state()
    whole = recorder({"stage": "agent"})  # is passed over
    expected = edm.train_edm(data, args, run=whole)
    assert [state["step"] for state in whole.states] == list(range(50, 601, 50))
    assert list(whole.logged) == [500, 600]
    for state in (whole.states[0], whole.states[6], whole.states[-1]):
        run = recorder(state)
        assert torch.equal(weights(edm.train_edm(data, args, run=run)), weights(expected))
        later = {step: x for step, x in whole.logged.items() if step > state["step"]}
        assert run.logged == later
    assert torch.equal(torch.get_rng_state(), random_state)

    swapped = data[[1, 0, *range(2, 200)]]  # the same means
    changes = [dict(diffusion_lr=1e-3), dict(diffusion_seed=2), dict(diffusion_recipe="paper")]
    runs = [(data, replace(args, **change)) for change in changes]
    for other in [*runs, (data + 1, args), (swapped, args)]:
        with pytest.raises(RunError, match="of other options or data"):
            edm.train_edm(*other, run=recorder(whole.states[0]))


@pytest.mark.parametrize("lr, scale", [(1e30, 1.0), (1e-3, math.nan)])
def test_loss_and_samples_that_are_not_finite_stop_the_run(lr, scale):
    with pytest.raises(RunError, match="loss became (nan|inf) in the .*steps up to 20"):
        edm.train_edm(scale * two_modes(50), diffusion_args(steps=20, lr=lr))
    model = EDM(3, width=8, depth=1)
    model.mean[1] = lr * math.inf * scale
    with pytest.raises(RunError, match="NaN or Inf"):
        edm.generate(model, 25)


def run_python(code, *words):
    """Run these lines in a new process, from the folder of edm.py."""
    words = [sys.executable, "-c", code, *map(str, words)]
    folder = Path(edm.__file__).parent
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


PRODUCT = """
x = torch.randn(256, 1024, dtype=torch.float32)
w = torch.randn(1024, 1024, dtype=torch.float32)
exact = x.double() @ w.double()
assert (x @ w - exact).abs().max() < 1e-5 * exact.abs().max()  # of bfloat16 1e-3
"""
ROUNDING_CPU = """
import torch
torch.set_default_dtype(torch.float64)
multiply = torch.Tensor.__matmul__

def round_and_multiply(x, y):
    if x.dtype == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision == "bf16":
        x = x.bfloat16().float()
    return multiply(x, y)

torch.Tensor.__matmul__ = round_and_multiply
import edm
"""


def test_products_of_float32_are_not_rounded():
    """On this CPU, whatever library the import chose. And under a float64 default on a CPU that
    rounds float32 factors where PyTorch allows it, as Intel's AMX does."""
    exec(PRODUCT)
    run_python(ROUNDING_CPU + PRODUCT)


# --- Other models, without an edit in edm.py ---


class FlowMatching(RowModel):
    """Rectified flow (Liu et al. 2023): straight ways from noise to rows."""

    def __init__(self, dim, recipe):
        super().__init__(dim, recipe)
        width = recipe.width
        layers = [nn.Linear(dim + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.velocity = nn.Sequential(*layers, nn.Linear(width, dim))

    def loss(self, x):
        noise = torch.randn_like(x)
        time = torch.rand(len(x), 1)
        velocity = self.velocity(torch.cat([noise.lerp(x, time), time], dim=1))
        return (velocity - (x - noise)).square().mean()

    def sample(self, num_rows):
        x = torch.randn(num_rows, len(self.mean))
        for i in range(self.recipe.sample_steps):
            time = torch.full((num_rows, 1), i / self.recipe.sample_steps)
            x = x + self.velocity(torch.cat([x, time], dim=1)) / self.recipe.sample_steps
        return self.unnormalize(x)


class Regularised(EDM):
    """Its denoiser has batch norm and dropout. Normalised estimates lie within -1 and 1."""

    def __init__(self, dim, recipe):
        super().__init__(dim, recipe)
        norm = nn.BatchNorm1d(recipe.width)
        self.denoiser.out = nn.Sequential(norm, nn.Dropout(0.5), self.denoiser.out)

    def denoise(self, x, sigma):
        return super().denoise(x, sigma).clamp(-1, 1)


def train_save_load(path, make, rows, **options):
    args = diffusion_args(**dict(batch_size=256, lr=3e-3) | options)
    model = edm.train_edm(rows, args, make=make, raw_columns=range(2, rows.shape[1]))
    edm.save_edm(path, model)
    loaded = edm.load_edm(path, make=make)
    assert torch.equal(weights(loaded), weights(model)) and loaded.recipe == model.recipe
    return loaded


@pytest.mark.parametrize("make, steps", [(EDM, 1_500), (FlowMatching, 2_500)])
def test_samples_of_a_loaded_model_follow_the_data(tmp_path, make, steps):
    """In means, covariances, columns, and the gap between the modes."""
    model = train_save_load(tmp_path / "model.pt", make, two_modes(5_000), steps=steps, width=64)
    data = two_modes(50_000, seed=1)
    scale = data.std(0)
    for changes in ({}, dict(sampler="sde", sample_steps=128)):
        rows = edm.generate(model, 4_000, **changes)
        assert rows.dtype == torch.float32 and rows.shape == (4_000, 2)
        assert ((rows.mean(0) - data.mean(0)) / scale).abs().max() < 0.1
        difference = torch.cov(rows.T) - torch.cov(data.T)
        assert (difference / scale[:, None] / scale).abs().max() < 0.1
        assert edm.marginal(data, rows) > 0.95
        assert (rows[:, 0].abs() < 0.8).float().mean() < 0.02


def test_samples_have_no_dropout_and_the_batch_norm_of_training(tmp_path):
    path = tmp_path / "model.pt"
    model = train_save_load(path, Regularised, two_modes(200), steps=50, recipe="paper")
    norm = model.denoiser.out[0]
    assert norm.num_batches_tracked == 50 and (norm.running_var != 1).all()
    torch.manual_seed(0)
    expected = model.sample(20)
    assert torch.equal(edm.generate(model.train(), 20), expected)
    assert 0.9 < model.normalize(expected).abs().max() < 1 + 1e-6


# --- Generation ---


@pytest.mark.parametrize("changes", [{}, dict(eta=1.0), dict(sampler="sde"), dict(sample_steps=9)])
@torch.no_grad()
def test_samples_are_the_samplers_by_the_seed_in_raw_units(changes):
    """The last batch is smaller. Changes are for one call, and otherwise like those of a recipe."""
    model = EDM(3, width=16, depth=1, sample_steps=5, sample_batch_size=10)
    model.fit_normalizer(torch.tensor([[1.0, -2.0, 0.0], [10.0, 0.5, 1.0]]))
    sampler = edm.sample_sde if "sampler" in changes else edm.sample_dpmpp
    eta = {key: value for key, value in changes.items() if key == "eta"}
    sigmas = edm.karras_sigmas(changes.get("sample_steps", 5))
    torch.manual_seed(4)
    expected = []
    for num_rows in (10, 10, 5):
        x = sigmas[0].item() * torch.randn(num_rows, 3)
        expected.append(sampler(model.denoise, x, sigmas, **eta) * model.std + model.mean)
    before = edm.generate(model, 25, seed=4)
    assert torch.equal(edm.generate(model, 25, seed=4, **changes), torch.cat(expected))
    assert torch.equal(edm.generate(model, 25, seed=4), before)
    model.recipe = replace(model.recipe, **changes)
    assert torch.equal(edm.generate(model, 25, seed=4), torch.cat(expected))


NEW_PROCESS = """
import sys
import edm
model = edm.load_edm(sys.argv[1])
real = edm.load_torch(sys.argv[2])["real"]
made = dict(rows=edm.generate(model, 500), transitions=edm.generate_transitions(model, real, 500))
edm.save_torch(sys.argv[3], made)
"""


def test_fast_model_in_a_new_process_needs_no_further_arguments(tmp_path):
    """It gives the same rows as here, with the tree's terminals. Another seed gives other rows."""
    real = torch.rand(3_000, 5, generator=torch.Generator().manual_seed(0))  # s, a, r, s', d
    real[:, 4] = real[:, 3] > 0.9
    model = edm.train_edm(real, diffusion_args(steps=50, recipe="fast"), raw_columns=[-1])
    paths = [tmp_path / name for name in ("model.pt", "real.pt", "made.pt")]
    edm.save_edm(paths[0], model)
    edm.save_torch(paths[1], dict(real=real))
    run_python(NEW_PROCESS, *paths)
    made = edm.load_torch(paths[2])
    random_state = torch.get_rng_state()
    rows = edm.generate(model, 500)
    tree = edm.generate_transitions(model, real, 500)
    column = edm.generate_transitions(model, real, 500, terminals="column")
    other = edm.generate(model, 500, seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(made["rows"], rows) and torch.equal(made["transitions"], tree)
    assert torch.equal(tree[:, :4], rows[:, :4]) and torch.equal(column[:, :4], rows[:, :4])
    assert torch.equal(column[:, 4], (rows[:, 4] > 0.5).float())
    ends = rows[:, 3] > 0.9
    assert (tree[:, 4] == ends).float().mean() > 0.99 > (column[:, 4] == ends).float().mean()
    assert tree[:, 4].unique().tolist() == [0.0, 1.0]
    assert (other != rows).any(1).all()


# --- Rows and their quality ---


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2))
def test_unpack_undoes_pack(n, obs_dim, act_dim, num_extra):
    """Extra columns between r and s' are passed over."""
    data = transitions(n, obs_dim=obs_dim, act_dim=act_dim)
    rows = edm.pack(**data)
    order = ["observations", "actions", "rewards", "next_observations", "terminals"]
    assert rows.dtype == torch.float32
    assert np.array_equal(rows, np.column_stack([data[key] for key in order]))
    first, last = rows.tensor_split([obs_dim + act_dim + 1], dim=1)
    rows = torch.cat([first, torch.full((n, num_extra), 9.0), last], dim=1)
    back = edm.unpack(rows, obs_dim, act_dim if num_extra else None)
    assert list(back) == order
    for key, x in back.items():
        assert x.dtype == data[key].dtype and np.array_equal(x, data[key])
    for part in edm.split(rows, obs_dim, act_dim):
        part[:] = 0.5  # the parts are views
    assert rows.unique().tolist() == ([0.5, 9.0] if num_extra else [0.5])
    assert not edm.unpack(rows, obs_dim, act_dim)["terminals"].any()  # which are above 0.5


def test_starts_follow_an_end_or_a_gap():
    """The first row, one after a time limit, whose row is missing, and one after a terminal."""
    states = torch.arange(1_000.0)
    rows = torch.stack([states, states, states, states + 1, 0 * states], dim=1)  # s, a, r, s', d
    rows[399, 3] = -1
    rows[700, 4] = 1
    starts = edm.episode_starts(rows, 1)
    assert starts.nonzero().flatten().tolist() == [0, 400, 701]


def test_clusters_are_few_values_or_parts_between_wide_gaps():
    values = np.linspace(0, 1, 1_000)
    values[:5] = [-9_999, -9_999, -9_999, 99, 100]
    number, nearest, share = edm.clusters(values, np.array([-9e9, -4_990, 0.5, 20, 98, 99.5]))
    assert number.tolist() == [0, 1, 1, 1, 2, 2] and share.tolist() == [0.003, 0.995, 0.002]
    assert nearest.tolist() == [-9_999, values[5], 0.5, 1, 99, 99.5]
    few = np.repeat([0.0, 1.0, 7.0], [900, 90, 10])
    number, nearest, share = edm.clusters(few, np.array([-3, 0.4, 0.6, 3.9, 4.1]))
    assert nearest.tolist() == [0, 0, 1, 1, 7] and share.tolist() == [0.9, 0.09, 0.01]
    x = np.random.default_rng(0).normal(size=2_000).clip(-2, 2)  # with ties at both ends
    number, nearest, share = edm.clusters(x, x)
    assert number.max() == 0 and np.array_equal(nearest, x) and share == 1
    levels = np.repeat(np.arange(50.0), 9)
    number, nearest, share = edm.clusters(levels, levels + 0.3)
    assert np.array_equal(nearest, levels) and (share == 1).all()  # too many to be rare kinds


def rare_rows(num_rows):
    """Rows [s, one of four, r, s', d], and starts. Of r, 1% are 1,000 higher; d is 1 where s' is in
    its highest 1%; half a percent begin an episode, where s is about 4."""
    rng = np.random.default_rng(0)
    s = rng.normal(size=(num_rows, 2))
    starts = np.arange(num_rows) % 200 == 0
    s[starts] = 4 + 0.01 * s[starts]
    next_s = 0.9 * s + 0.1 * rng.normal(size=s.shape)
    reward = rng.uniform(size=num_rows) + 1_000 * (np.arange(num_rows) % 100 == 1)
    done = next_s[:, 1] > np.quantile(next_s[:, 1], 0.99)
    rows = [s, np.eye(4)[rng.integers(4, size=num_rows)], reward, next_s, done]
    return torch.from_numpy(np.column_stack(rows)).float(), torch.from_numpy(starts)


def test_rare_rows_are_repeated_up_to_a_share():
    rows, starts = rare_rows(10_000)
    times = edm.repeats(rows, starts.float(), 0.02)
    bonus = rows[:, 6] > 500
    done = rows[:, -1] > 0.5
    assert (times[starts] == 4).all() and (times[bonus | done] >= 2).all()
    assert times[~starts & ~bonus & ~done].max() == 1
    few = starts & (torch.arange(10_000) < 250)  # two of 10,000
    assert (edm.repeats(rows, few.float(), 0.02)[few] == 40).all()
    many = torch.cat([rows[:, :6], torch.arange(10_000)[:, None] % 20 < torch.arange(20)], dim=1)
    assert edm.repeats(many, few.float(), 0.02).float().mean() < 1.2


class Surplus(RowModel):
    """Gives rows like those of `rare_rows`, with errors, and each kind of rare ones too often."""

    def sample(self, num_rows):
        rows, starts = rare_rows(40_000)
        often = starts | (rows[:, 6] > 500) | (rows[:, -1] > 0.5)
        weight = 1 + 2.0 * often
        rows = rows[weight.multinomial(num_rows, replacement=True)]
        errors = torch.tensor([0.05, 0.05, 0.2, 0.2, 0.2, 0.2, 0.1, 0.05, 0.05, 0.2])
        rows += errors * torch.randn(10)
        rows[::50, 6] = 400 + rows[::50, 6] % 1  # in the gap
        return rows


def test_samples_have_values_and_shares_of_the_real_rows():
    """Whatever the model gives too often: bonus, terminals, starts. One-hot columns are one-hot."""
    rows, starts = rare_rows(10_000)
    rows[:, -1] = rows[:, 8] > rows[:, 8].quantile(0.99)
    model = Surplus(10, edm.RECIPES["fast"])
    model.starts = starts.float()
    new = edm.generate_transitions(model, rows, 20_000)
    assert len(new) == 20_000 and torch.equal(new, edm.generate_transitions(model, rows, 20_000))
    assert ((new[:, 2:6] == 0) | (new[:, 2:6] == 1)).all() and (new[:, 2:6].sum(1) == 1).all()
    shares = []
    for x in (rows, new):
        rare = torch.stack([x[:, 6] > 500, x[:, 6] > 1, x[:, -1] > 0.5])
        shares.append(rare.double().mean(1))
    torch.testing.assert_close(*shares, rtol=0.02, atol=0)
    ends = new[:, 8] > rows[:, 8].quantile(0.99)
    assert (new[:, -1] == ends).float().mean() > 0.999
    close = [((x[:, :2] - 4).abs() < 0.5).all(1).double().mean() for x in (rows, new)]
    assert close[1] == pytest.approx(close[0], rel=0.2)
    column = edm.generate_transitions(model, rows, 20_000, rare_share=0.0)
    assert (column[:, 6] > 500).float().mean() > 0.02  # as the model has it


def test_reward_of_few_values_is_the_trees():
    """It is 1 where s' > 1.5, which errors of the model's r do not change."""
    real = torch.randn(5_000, 5, generator=torch.Generator().manual_seed(0))
    real[:, 2] = real[:, 3] > 1.5
    real[:, 4] = 0
    model = edm.train_edm(real, diffusion_args(steps=50, recipe="fast"), raw_columns=[-1])
    new = edm.generate_transitions(model, real, 3_000, reward=2)
    assert (new[:, 2] == (new[:, 3] > 1.5)).float().mean() > 0.99
    for rows in (new, edm.generate_transitions(model, real, 900)):
        assert rows[:, 2].unique().tolist() == [0, 1]


def test_recipe_decides_what_a_model_learns_from(monkeypatch):
    """`fast` repeats rare rows, so that they have knots of their own. `paper` repeats none."""
    rows, starts = rare_rows(2_000)
    learned = {}
    monkeypatch.setattr(edm, "run_training", lambda model, x, *_: learned.update({model: x}))
    for recipe in ("fast", "paper"):
        edm.train_edm(rows, diffusion_args(steps=1, recipe=recipe), starts=starts)
    fast, paper = learned
    times = edm.repeats(rows, starts.float(), 0.02)
    torch.testing.assert_close(paper.mean, rows.mean(0))
    torch.testing.assert_close(fast.mean, rows.repeat_interleave(times, 0).mean(0))
    assert len(learned[paper]) == 2_000 and len(learned[fast]) == times.sum() > 2_000
    assert (fast.raw_knots[6] > 500).sum() > 10  # of the bonus, 1% of the rows


def sample_rows(n, seed):
    """Correlated columns, one of them with many ties, one a rare terminal."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 5)) @ rng.standard_normal((5, 5))
    x[:, 3] = x[:, 3].round()
    x[:, 4] = x[:, 4] > np.quantile(x[:, 4], 0.9)
    return torch.from_numpy(x).float()


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
@pytest.mark.parametrize("constant", [0.1, 1000.3])
def test_correlation_is_numpys(constant):
    """Column 1, constant in the real rows, is left out. Column 2 counts as uncorrelated."""
    real = sample_rows(1_000, 0)
    synthetic = sample_rows(83, 1)
    real[:, 1] = constant
    synthetic[:, 2] = constant
    rho_real, rho = [np.corrcoef(x.double().T) for x in (real, synthetic)]
    pairs = [(0, 2), (0, 3), (0, 4), (2, 3), (2, 4), (3, 4)]
    differences = [rho_real[pair] - (0 if 2 in pair else rho[pair]) for pair in pairs]
    expected = 1 - np.abs(differences).mean() / 2
    assert edm.correlation(real, synthetic) == pytest.approx(expected, abs=1e-5)
    x = torch.linspace(0, 1, 20)
    assert edm.correlation(torch.stack([x, x], 1), torch.stack([x, -x], 1)) == pytest.approx(0)


def test_quality_report_holds_the_measures_and_repeats_itself():
    real = sample_rows(3_000, 0)
    synthetic = sample_rows(400, 1)  # another mixture of the columns
    random_state = torch.get_rng_state()
    report = edm.quality_report(real, synthetic)
    for measure in (edm.marginal, edm.correlation):
        assert report[measure.__name__] == pytest.approx(measure(real, synthetic), abs=1e-5)
    assert report["c2st"] > 0.9 and report["c2st_real"] == pytest.approx(0.5, abs=0.1)
    assert report["detection"] == pytest.approx(2 - 2 * report["c2st"], abs=1e-4)
    assert report["terminals_real"] == report["terminals"] == pytest.approx(0.1, abs=1e-3)
    assert edm.quality_report(real, synthetic) == report
    assert torch.equal(torch.get_rng_state(), random_state)


def test_quality_report_says_what_is_missing(capsys):
    """Half of the bonuses, terminals half too many, values that no real row has."""
    real, starts = rare_rows(10_000)
    edm.quality_report(real, real.flip(0), reward=6)
    assert re.fullmatch("sample quality: .*\n", capsys.readouterr().out)
    new = real.clone()
    bonus = (real[:, 6] > 500).nonzero().flatten()
    new[bonus[::2], 6] -= 1_000
    new[:50, -1] = 1
    new[-100:, 2] = 0.5
    report = edm.quality_report(real, new, reward=6)
    (share,) = [key for key in report if key.startswith("column6=100") and "real" not in key]
    assert (report[f"{share}_real"], report[share]) == (0.01, 0.005)
    assert report["reward"] == pytest.approx(report["reward_real"] - 5, abs=1e-3)
    assert report["invalid"] == 0.01 and report["terminals"] > 0.012
    said = capsys.readouterr().out
    assert f"{share} is off by 0.005" in said
    for line in ("terminals is off by 0.004", "reward is off by 5, ", "invalid is off by 0.01"):
        assert line in said


@pytest.mark.parametrize("num_real", [400, 3_000])
def test_quality_report_tells_copies_from_samples(num_real):
    """In standardised units, fresh rows are as far from the real ones as these from each other."""
    points = torch.randn(2 * num_real + 2_000, 4, generator=torch.Generator().manual_seed(0))
    rows = points * torch.tensor([1.0, 10.0, 100.0, 0.1])
    real, others, fresh = rows.split([num_real, num_real, 2_000])
    report = edm.quality_report(real, fresh, others=others)
    distance = torch.cdist(points[-2_000:], points[:num_real]).amin(1).median().item()
    assert report["nearest"] == pytest.approx(distance, rel=0.1)
    assert report["nearest_real"] == pytest.approx(distance, rel=0.3)
    assert report["membership"] == pytest.approx(0.5, abs=0.05)
    assert edm.quality_report(real, real.flip(0))["nearest"] < 1e-3
    copies = edm.quality_report(real, real + 0.01 * rows.std(0), others=others)
    assert copies["membership"] > 0.95
    assert "membership" not in edm.quality_report(real, fresh, others=rows[:0])


@pytest.mark.parametrize("extra", [[], ["x[0]", "x[1]"]])
def test_plot_has_a_histogram_of_each_column(tmp_path, monkeypatch, extra):
    """Extra columns stand between r and s'."""
    figure = edm.Figure(figsize=(16, 2))
    monkeypatch.setattr(edm, "Figure", lambda **options: figure)
    rows = torch.rand(100, 5 + len(extra))
    edm.plot_marginals(tmp_path / "marginals.png", rows, rows, obs_dim=1, act_dim=1)
    assert (tmp_path / "marginals.png").read_bytes().startswith(b"\x89PNG")
    titles = [ax.get_title() for ax in figure.axes if ax.patches]
    assert titles == ["s[0]", "a[0]", "r[0]", *extra, "s'[0]", "d[0]"]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    arrays = dict(x=torch.zeros(100_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for save in (edm.save_npz, edm.save_torch):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))  # bytes, as on a full disk
        with pytest.raises(RunError, match=f"cannot write {path}.*(large|space)"):
            save(path, arrays)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
        with pytest.raises(RunError, match="cannot write .*No such file or directory"):
            save(tmp_path / "nowhere/file", arrays)

    def write_half(f):
        f.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edm.save_atomically(path, write_half)
    assert path.read_text() == "old"
    edm.save_torch(path, arrays)
    assert list(tmp_path.iterdir()) == [path]
    os.truncate(path, 1_000)
    with pytest.raises(RunError, match=f"cannot read {path}"):
        edm.load_edm(path)


def test_bar_in_a_log_file_is_a_plain_line_now_and_then(capsys):
    for _ in edm.Bar(range(50_000), "work"):
        pass
    output = capsys.readouterr().err
    assert 1 <= len(output.splitlines()) <= 3 and "\r" not in output and "50000/50000" in output


# --- Datasets ---


def slow_qlearning_dataset(raw, true_next_obs=False, max_episode_steps=1000):
    """d4rl.qlearning_dataset, row by row. Without `timeouts`, its step counter starts at 1 after a
    terminal row: it drops the row before the last of a full episode that follows, and keeps the
    last with a wrong s'."""
    rows = []
    step = 0
    for i in range(len(raw["rewards"]) - 1):
        if raw["timeouts"][i] if "timeouts" in raw else step == max_episode_steps - 1:
            step = 0
            continue
        done = bool(raw["terminals"][i])
        next_obs = raw["observations"][i + 1]
        if true_next_obs and done:
            next_obs = raw["next_observations"][i]
        rows.append((raw["observations"][i], raw["actions"][i], raw["rewards"][i], next_obs, done))
        step = 1 if done else step + 1
    return dict(zip(edm.KEYS, zip(*rows))) if rows else {key: [] for key in edm.KEYS}


def assert_same_data(actual, expected):
    assert list(actual) == list(edm.KEYS)
    for key, x in actual.items():
        assert x.dtype == (bool if key == "terminals" else np.float32), key
        assert x.ndim == (1 if key in ("rewards", "terminals") else 2), key
        y = np.reshape(expected[key], x.shape).astype(x.dtype)
        np.testing.assert_array_equal(x, y, err_msg=key)


@settings(deadline=None, max_examples=150)
@given(
    ends=st.lists(st.sampled_from(["", "", "", "terminal", "timeout", "both"]), min_size=3),
    has_timeouts=st.booleans(),
    max_episode_steps=st.integers(1, 8),
    true_next_obs=st.booleans(),
)
def test_qlearning_dataset_equals_the_loop(ends, has_timeouts, max_episode_steps, true_next_obs):
    raw = d4rl_rows(len(ends))
    raw["terminals"] = np.array([end in ("terminal", "both") for end in ends])
    raw["timeouts"] = np.array([end in ("timeout", "both") for end in ends])
    if not has_timeouts:
        del raw["timeouts"]
    expected = slow_qlearning_dataset(raw, true_next_obs, max_episode_steps)
    assert_same_data(edm.qlearning_dataset(raw, true_next_obs, max_episode_steps), expected)


@pytest.mark.parametrize("suffix, true_next_obs", [(".hdf5", False), (".h5", True)])
def test_hdf5_is_loaded_as_d4rl_does(tmp_path, capsys, suffix, true_next_obs):
    """Also with flags in columns and without what is optional, or where it says nothing."""
    raw = episodes(50)
    path = write(tmp_path / f"data{suffix}", raw | {"infos/qpos": np.zeros((3, 2))})
    expected = slow_qlearning_dataset(raw, true_next_obs)
    assert_same_data(edm.load_transitions(path, true_next_obs), expected)
    del raw["next_observations"], raw["timeouts"]
    columns = {key: raw[key].reshape(-1, 1) for key in ("rewards", "terminals")}
    for flags in ({}, dict(timeouts=np.zeros(50)), dict(truncations=np.zeros((50, 1), bool))):
        path = write(tmp_path / f"columns{suffix}", raw | columns | flags)
        data = edm.load_transitions(path, max_episode_steps=7)
        assert_same_data(data, slow_qlearning_dataset(raw, max_episode_steps=7))
        assert "no `timeouts`: its episodes end after 7 rows" in capsys.readouterr().err
    with pytest.raises(RunError, match="--true-next-obs needs `next_observations`"):
        edm.load_transitions(path, true_next_obs=True)


def test_hdf5_in_another_order_or_without_ends_keeps_its_own_next_observations(tmp_path):
    raw = episodes(50)
    del raw["timeouts"]
    order = np.random.default_rng(0).permutation(50)
    shuffled = {key: x[order] for key, x in raw.items()}
    for name, rows in (("shuffled", shuffled), ("unmarked", raw)):
        data = edm.load_transitions(write(tmp_path / f"{name}.hdf5", rows), true_next_obs=True)
        assert_same_data(data, {key: x[:-1] for key, x in rows.items()})


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_terminal_rows_are_not_those_of_time_limits(tmp_path, capsys, suffix):
    raw = episodes(200)
    is_limit = raw["timeouts"]
    ends = raw["terminals"] | is_limit
    terminals = ends & ~is_limit
    early = is_limit & (np.arange(200) < 100)
    expected = raw | dict(terminals=terminals)
    if suffix == ".hdf5":
        expected = edm.load_transitions(write(tmp_path / "d4rl.hdf5", raw))
    files = [{"terminals": ends, name: is_limit} for name in edm.LIMITS]
    files += [{"terminals": terminals, name: ends} for name in ("dones", "episode_terminals")]
    files += [dict(masks=~terminals, terminals=ends), dict(terminals=ends, is_terminal=terminals)]
    files += [dict(dones=ends, timeouts=is_limit)]
    files += [dict(dones=ends & ~early, truncations=early, terminals=terminals)]
    for flags in files:
        arrays = {key: raw[key] for key in edm.KEYS[:4]}
        arrays |= {key: x.astype(np.float32)[:, None] for key, x in flags.items()}
        data = edm.load_transitions(write(tmp_path / f"data{suffix}", arrays))
        assert_same_data(data, {key: expected[key] for key in edm.KEYS})
    line = f"{is_limit.sum()} ends are not terminal, by terminals, dones, truncations"
    assert capsys.readouterr().err.splitlines()[-1] == line


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_columns_whose_changes_float32_loses_are_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).normal(size=301)
    walk = np.cumsum(0.05 * noise)
    time = 1_700_000_000 + np.arange(301)
    good = [walk + 990, 0 * walk + 1000.3, 1000.3 + 1e-13 * noise, 1.3 + 1e-9 * noise]
    raw = d4rl_rows(300)
    for columns in (good, [4_649_776 + walk], [0.01 * time], [time], [time.astype(np.uint32)]):
        x = np.stack(columns, axis=1)
        raw |= dict(observations=x[:-1], next_observations=x[1:])
        path = write(tmp_path / f"data{suffix}", raw)
        if columns is good:
            edm.load_transitions(path)
            continue
        with pytest.raises(RunError, match="column 0 of observations: subtract an offset"):
            edm.load_transitions(path)


def test_virtual_hdf5_without_its_source_is_refused(tmp_path):
    raw = transitions(50)
    source = write(tmp_path / "source.h5", dict(x=raw.pop("observations")))
    path = write(tmp_path / "data.hdf5", raw)
    layout = h5py.VirtualLayout((50, 3), np.float32)
    layout[:] = h5py.VirtualSource("source.h5", "x", (50, 3))
    with h5py.File(path, "a") as f:
        f.create_virtual_dataset("observations", layout)
    assert edm.load_transitions(path)["observations"].all()
    Path(source).unlink()
    with pytest.raises(RunError, match=f"observations are in {source}, which is gone"):
        edm.load_transitions(path)


def test_every_row_of_npz_and_minari_is_loaded(tmp_path, monkeypatch):
    data = transitions(50)
    path = write(tmp_path / "data.npz", data | {"more": np.zeros(3)})
    assert_same_data(edm.load_transitions(path), data)
    data = make_minari(monkeypatch, tmp_path, env="Pendulum-v1")
    assert_same_data(edm.load_transitions("test/two-v0"), data)


def test_minari_dataset_without_plain_observations_is_refused(monkeypatch):
    dataset = SimpleNamespace(observation_space=gym.spaces.Dict(x=gym.spaces.Discrete(2)))
    monkeypatch.setattr(minari, "load_dataset", lambda name, download: dataset)
    with pytest.raises(RunError, match=r"its observations are no arrays: Dict\('x'"):
        edm.load_transitions("test/dict-v0")


def test_bundled_dataset_is_what_the_simulator_does():
    """40 episodes, each of 1000 rows but the last one, of an agent that learns to run."""
    data = edm.load_transitions("quickstart")
    assert data["observations"].shape == (39_960, 17) and not data["terminals"].any()
    joined = (data["next_observations"][:-1] == data["observations"][1:]).all(1)
    assert np.flatnonzero(~joined).tolist() == list(range(998, 39_959, 999))
    returns = data["rewards"].reshape(40, 999).sum(1)
    assert returns[:5].max() < 0 and returns[-4:].min() > 1_500
    some = {key: x[::4_000] for key, x in data.items()}
    steps = replay("HalfCheetah-v4", some["observations"], some["actions"])
    known, next_obs, rewards, ends = steps
    assert known.all() and not ends.any()
    np.testing.assert_allclose(next_obs, some["next_observations"], atol=1e-3)
    np.testing.assert_allclose(rewards, some["rewards"], atol=1e-3)


def put_in(value):
    return lambda x: np.where(np.arange(x.size).reshape(x.shape) == x.size // 2, value, x)


BAD = {
    "no columns": lambda x: x.reshape(len(x), -1)[:, :0],
    "least": lambda x: put_in(np.iinfo(np.int64).min)(x.astype(np.int64)),
    "NaN": put_in(np.nan),
    "Inf": put_in(-np.inf),
    "huge": put_in(np.float64(1e300)),
    "complex": lambda x: x + 1j,
    "text": lambda x: x.astype("S5"),
    "one axis less": lambda x: x[..., 0],
    "one number": lambda x: x.flat[0],
    "too short": lambda x: x[:-1],
    "two columns": lambda x: np.stack([x, x], -1),
}
UNUSUAL = {
    "constant": np.ones_like,
    "large": lambda x: x * 1e17,
    "float16": lambda x: x.astype(np.float16),
    "int64": lambda x: x.astype(np.int64),
    "cut at a half": lambda x: np.where(x > 0.5, 0.9, -0.2),
}


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize("key", edm.KEYS)
def test_arrays_are_refused_in_one_sentence_or_used_rightly(tmp_path, suffix, key):
    raw = d4rl_rows(30)
    flags = dict(timeouts=np.where(raw["timeouts"], 0.9, 0.1))
    bad = {name: raw | {key: change(raw[key])} for name, change in BAD.items()}
    if suffix == ".npz" or key != "next_observations":
        bad["missing"] = {name: x for name, x in raw.items() if name != key}
    for name, arrays in bad.items():
        path = write(tmp_path / f"{name}{suffix}", arrays)
        with pytest.raises(RunError, match=rf"cannot read {path}: [^\n]{{5,250}}\Z"):
            edm.load_transitions(path)
    for name, change in UNUSUAL.items():
        arrays = raw | {key: change(raw[key])}
        data = edm.load_transitions(write(tmp_path / f"{name}{suffix}", arrays | flags))
        arrays["terminals"] = arrays["terminals"] > 0.5
        if suffix == ".npz":
            arrays["terminals"] &= ~raw["timeouts"]
        if suffix == ".hdf5":  # s' is the file's, but D4RL's in terminal rows
            own = arrays | dict(observations=arrays["next_observations"])
            own = slow_qlearning_dataset(own)["observations"]
            arrays = slow_qlearning_dataset(arrays)
            ends = np.array(arrays["terminals"])[:, None]
            arrays["next_observations"] = np.where(ends, arrays["next_observations"], own)
        assert_same_data(data, arrays)
        rows = edm.pack(**data)
        starts = edm.episode_starts(rows, 3)
        model = edm.train_edm(rows, diffusion_args(steps=2), raw_columns=[-1], starts=starts)
        edm.quality_report(rows, edm.generate_transitions(model, rows, 20, sample_steps=3))


@pytest.mark.parametrize("suffix, last", [(".hdf5", "2000"), (".npz", "2000"), (".csv", "known")])
def test_unreadable_file_ends_in_one_sentence(tmp_path, monkeypatch, suffix, last):
    whole = Path(write(tmp_path / f"whole{suffix}", transitions(2000))).read_bytes()
    half = {key: np.concatenate([x, 0 * x]) for key, x in transitions(2000).items()}
    half = Path(write(tmp_path / f"half{suffix}", half)).read_bytes()
    no_rows = Path(write(tmp_path / f"no_rows{suffix}", transitions(0))).read_bytes()
    contents = [b"", whole[: len(whole) * 2 // 3], b"<html>404</html>" * 100, no_rows, half]
    monkeypatch.chdir(tmp_path.parent)
    tmp_path = Path(tmp_path.name)
    paths = [tmp_path / f"missing{suffix}", tmp_path / f"folder{suffix}"]
    paths[1].mkdir()
    for i, content in enumerate(contents):
        paths.append(tmp_path / f"{i}{suffix}")
        paths[-1].write_bytes(content)
    for path in paths:
        with pytest.raises(RunError, match=rf"{path}[^\n]{{5,1000}}\Z") as error:
            edm.load_transitions(path)
        assert "Malformed" not in str(error.value)
    assert last in str(error.value)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """The second of two addresses, a folder on this machine. The first never answers."""
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_timeout(seconds and 0.2))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    for folder in ("gym_mujoco_v2", "maze2d", "ant_maze_v2"):
        (tmp_path / folder).mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = f"http://127.0.0.1:{server.getsockname()[1]}/{{file}}"
        addresses = [silent, f"file://{tmp_path}/{{folder}}/{{file}}"]
        monkeypatch.setattr(edm, "D4RL_ADDRESSES", addresses)
        yield tmp_path


ANTMAZE = "ant_maze_v2/Ant_maze_{}_multigoal_False_sparse_fixed.hdf5"
FILES = {
    "walker2d-mixed-v2": "gym_mujoco_v2/walker2d_medium_replay-v2.hdf5",
    "maze2d-large-v1": "maze2d/maze2d-large-sparse-v1.hdf5",
    "antmaze-umaze-v2": ANTMAZE.format("u-maze_noisy_multistart_False"),
    "antmaze-medium-play-v2": ANTMAZE.format("big-maze_noisy_multistart_True"),
    "antmaze-large-play-v2": ANTMAZE.format("hardest-maze_noisy_multistart_True"),
}


@pytest.mark.parametrize("name", FILES)
def test_download_is_cached_under_d4rls_name(mirror, name):
    path = mirror / FILES[name]
    write(path, episodes(2000))
    for _ in range(2):  # the second time from the cache
        assert_same_data(edm.load_transitions(name), slow_qlearning_dataset(episodes(2000)))
        path.unlink(missing_ok=True)
    assert [file.name for file in (mirror / "cache").iterdir()] == [path.name]


@pytest.mark.parametrize("problem", ["another name", "error page", "half a file"])
def test_failed_download_says_why_then_names_three_ways_out(mirror, capsys, problem):
    """Nothing broken is ever taken, and no other file. Each failure is one line."""
    name = "antmaze-large-play-v2"
    path = mirror / FILES[name]
    whole = Path(write(path, episodes(2000))).read_bytes()
    path.write_bytes(b"<html>moved</html>" if problem == "error page" else whole[:10_000])
    if problem == "another name":
        path.write_bytes(whole)
        path.rename(str(path).replace("_fixed", ""))
    cached = mirror / "cache" / path.name
    match = rf"put it at {cached}.*your own.*maze_data.*quickstart[^\n]*\Z"
    with pytest.raises(RunError, match=match):
        edm.load_transitions(name)
    said = re.findall("^(downloading|failed:) ", capsys.readouterr().err, flags=re.MULTILINE)
    assert said == ["downloading", "failed:"] * 2
    assert not list(cached.parent.iterdir()) and socket.getdefaulttimeout() is None
    path.write_bytes(whole)
    assert len(edm.load_transitions(name)["rewards"]) > 1_000


# --- Options and command line ---


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
    papers = dict(diffusion_width=width, diffusion_batch_size=batch_size, diffusion_depth=6)
    papers |= dict(diffusion_steps=100_000, diffusion_lr=3e-4, num_samples=5_000_000)
    papers |= dict(diffusion_recipe="paper", sample_steps=32, terminals="column")
    assert vars(edm.resolve(DiffusionArgs(), num_rows, name)).items() >= papers.items()
    assert edm.resolve(DiffusionArgs(sampler="sde"), num_rows, name).sample_steps == 128
    given = dict(diffusion_width=3, diffusion_batch_size=4, sample_steps=6, num_samples=7)
    assert vars(edm.resolve(DiffusionArgs(**given), num_rows, name)).items() >= given.items()
    recipe = edm.RECIPES["paper"]  # of the official code
    assert (recipe.betas, recipe.clip, recipe.ema_decay) == ((0.9, 0.99), 1.0, 0.995)


@pytest.mark.parametrize("latents, lr, width", [(False, 2e-3, 256), (True, 1e-3, 512)])
def test_fewer_steps_choose_the_fast_recipe(latents, lr, width):
    fast = dict(diffusion_recipe="fast", diffusion_lr=lr, diffusion_width=width, diffusion_depth=3)
    fast |= dict(diffusion_batch_size=256, terminals="classifier")
    for option in (dict(diffusion_steps=99_999), dict(diffusion_recipe="fast")):
        args = edm.resolve(DiffusionArgs(**option), 1_000_000, "hopper-medium-v2", latents)
        assert vars(args).items() >= fast.items()
    args = DiffusionArgs(diffusion_steps=50, diffusion_recipe="paper")
    assert edm.resolve(args, 1_000_000, "hopper-medium-v2", latents).diffusion_width == 2048


@dataclass
class ForkArgs:
    """Arguments at their limits, and two without any, as a fork adds them."""

    count: edm.Count = 1
    not_negative_int: edm.NotNegativeInt = 0
    at_least_two: edm.AtLeastTwo = 2
    positive: Optional[edm.Positive] = None
    not_negative: edm.NotNegative = 0.0
    fraction: edm.Fraction = 1.0
    dropout: float = 0.0
    log_std_min: float = -20.0
    folder: str = "~/data"
    exp_name: str = "a~b"
    device: str = "auto"


def test_only_numbers_beyond_the_limits_of_their_type_are_refused(monkeypatch):
    monkeypatch.setenv("HOME", "/home/reader")
    args = ForkArgs()
    edm.check_args(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert args == ForkArgs(folder="/home/reader/data", device=device)
    beyond = dict(count=(0, -5), not_negative_int=(-1,), at_least_two=(1,))
    beyond |= dict(positive=(0.0, -1e-3, math.nan, math.inf), fraction=(-0.5, 1.1, math.nan))
    beyond |= dict(not_negative=(-0.5, math.nan, math.inf))
    for name, values in beyond.items():
        for value in values:
            with pytest.raises(RunError, match=f"--{name.replace('_', '-')} cannot be {value}"):
                edm.check_args(ForkArgs(**{name: value}))


TINY = dict(diffusion_steps=1_000, diffusion_width=16, num_samples=10_250, sample_batch_size=500)


def test_command_killed_while_it_samples_goes_on(tmp_path):
    """Given again, it writes what one that was never stopped does, to the last bit."""
    data = write(tmp_path / "data.npz", transitions(300))
    edm.main(edm.Args(data=data, out=str(tmp_path / "whole.npz"), device="cpu", **TINY))
    words = [sys.executable, edm.__file__]
    for key, value in (TINY | dict(data="data.npz", device="cpu", out="killed.npz")).items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    pipe = subprocess.PIPE
    start = partial(subprocess.Popen, words, cwd=tmp_path, stdout=pipe, stderr=subprocess.STDOUT)
    process = start()
    while process.poll() is None and not (tmp_path / "killed.checkpoint").exists():
        time.sleep(0.002)
    process.kill()
    assert process.communicate() and process.returncode == -signal.SIGKILL
    assert 0 < edm.load_torch(tmp_path / "killed.checkpoint")["step"]
    assert not (tmp_path / "killed.npz").exists()
    process = start(text=True)
    said = process.communicate()[0]
    assert process.returncode == 0 and said.count("sample quality") == 1, said
    assert " 0/1000 " not in said
    assert_same_data(*[edm.load_transitions(tmp_path / f"{x}.npz") for x in ("killed", "whole")])
    model, whole_model = [edm.load_edm(tmp_path / f"{x}.pt") for x in ("killed", "whole")]
    assert torch.equal(weights(model), weights(whole_model))
    assert (model.mean[-1], model.std[-1]) == (0, 1) and (model.std[:-1] != 1).all()
    assert {path.suffix for path in tmp_path.glob("killed.*")} == {".npz", ".pt", ".png"}


BAD_OPTIONS = """data=nothing.npz data=data.csv out=old.npz out=old_model.npz out=out.hdf5
out=nowhere/out.npz num_samples=0 diffusion_lr=nan device=cuda"""


@pytest.mark.parametrize("option", BAD_OPTIONS.split())
def test_bad_command_ends_in_one_sentence(tmp_path, monkeypatch, capsys, option):
    if torch.cuda.is_available() and option == "device=cuda":
        pytest.skip("there is a GPU")
    write(tmp_path / "data.npz", transitions(300))
    for name in ("old.npz", "old_model.pt"):
        (tmp_path / name).write_text("precious")
    options = TINY | dict(data="data.npz", out="out.npz", device="cpu") | dict([option.split("=")])
    assert_refused(monkeypatch, capsys, tmp_path, edm, "", **options)
