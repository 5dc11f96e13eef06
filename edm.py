"""The diffusion model of Synthetic Experience Replay (SynthER, Lu et al., NeurIPS 2023), in one file.

An Elucidated Diffusion Model (EDM, Karras et al. 2022) learns the rows [s, a, r, s', d] of a replay buffer and
generates as many new ones as an agent wants. The scripts import this module and nothing else of the
project; it also works alone, for people who bring their own agent:

    python edm.py --data my_transitions.npz --num-samples 1000000 --out synthetic.npz
    python edm.py --data ~/.d4rl/datasets/hopper_medium-v2.hdf5 --num-samples 5000000 --out synthetic.npz
    python edm.py --data mujoco/hopper/medium-v0 --num-samples 100000 --out synthetic.npz   # a Minari dataset

or from Python, with any float32 rows:

    model = edm.train_edm(rows, steps=100_000)             # [num_rows, dim] -> EDM (the EMA weights)
    new_rows = edm.generate(model, 1_000_000)              # [1_000_000, dim]

Contents: denoiser | preconditioning and loss | noise schedule and samplers | training | generation |
transitions <-> rows | sample quality | command line.

On a CPU, importing it changes which library PyTorch multiplies float32 matrices with: see `use_fast_matmul`.

"Section", "Table" and "Figure" refer to the SynthER paper, "Karras" to Karras et al. 2022 (arXiv 2206.00364).
"""

import copy
import ctypes
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal, Optional

import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


class RunError(Exception):
    """The run cannot go on; the message is one sentence for the user. The scripts print it and exit with code 2."""


BAR = dict(mininterval=0.5 if sys.stderr.isatty() else 30, dynamic_ncols=True)  # progress bars: rarely into a log file


def use_fast_matmul():
    """Let oneDNN multiply float32 matrices on the CPU: twice as fast as PyTorch's own choice on AMD with AVX-512.

    PyTorch asks oneDNN only where rounding to bfloat16 is allowed. Most CPUs still compute in float32 then: one product
    is tried, and if it was rounded (Intel's AMX), the setting is taken back.
    """
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ x.double()
    if (x @ x - exact).abs().max() > 1e-5 * exact.abs().max():
        torch.backends.mkldnn.matmul.fp32_precision = "none"


if not torch.cuda.is_available():
    use_fast_matmul()


def trim_memory():
    """Give freed memory back to the system: glibc reuses it badly, and hours of training would pile up gigabytes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # another C library


def warn_if_crowded():
    """Say so if this machine has far more to do than it has cores: PyTorch's threads then wait for each other."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # not on Windows
    if torch.get_num_threads() > 1 and load > 1.5 * os.cpu_count():
        tqdm.write(
            f"this machine is crowded: {load:.0f} threads for {os.cpu_count()} cores. That can slow a run of several "
            "threads down a hundred times; stop it, and --resume it with OMP_NUM_THREADS=1"
        )


# --- Denoiser ---------------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """F_theta: a residual MLP over a row, told the noise level by random Fourier features (Section 3.1, Appendix B.2).

    A 42-dimensional transition gives 6,497,066 trainable parameters at the default size.

    Args:
        dim: columns of a row.
        width, depth: units per residual block, number of blocks (Table 8: 1024 and 6).
        cond_dim: columns of an optional condition, concatenated to the row; the paper uses none.
        time_dim: size of the noise-level embedding (128 in the offline experiments, 256 online).
        rff_dim: random Fourier features, half sines and half cosines (Table 8: 16).
        residual: False gives the plain MLP of Table 10.
        activation: "relu" (Equation 3), or "gelu", smooth, which learns faster.
    """

    def __init__(
        self, dim, width=1024, depth=6, cond_dim=0, time_dim=128, rff_dim=16, residual=True, activation="relu"
    ):
        super().__init__()
        self.residual, self.activation = residual, getattr(F, activation)
        self.register_buffer("frequencies", torch.randn(rff_dim // 2))  # drawn once, never trained
        self.row_in = nn.Linear(dim + cond_dim, time_dim)
        self.time_mlp = nn.Sequential(nn.Linear(rff_dim + 1, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.hidden_in = nn.Linear(time_dim, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.out = nn.Linear(width, dim)

    def forward(self, x, c_noise, cond=None):
        """Args: x [batch, dim]; c_noise [batch], or [1] for one noise level for all; cond [batch, cond_dim].

        With a single noise level the embedding is computed once and broadcast, which is what the samplers rely on.
        """
        angle = 2 * math.pi * c_noise[:, None] * self.frequencies
        embedding = self.time_mlp(torch.cat([c_noise[:, None], angle.sin(), angle.cos()], dim=-1))
        h = self.row_in(x if cond is None else torch.cat([x, cond], dim=-1))
        h = self.hidden_in(h + embedding)
        for block in self.blocks:
            if self.residual:
                h = block(self.activation(h)).add_(h)  # Equation 3; in place, because fresh memory is slow
            else:
                h = block(self.activation(h))
        return self.out(self.activation(h))


# --- Rank normaliser --------------------------------------------------------------------------------------------------
# Not the paper's: each column is bent into a normal distribution. The model then need not learn the columns' shapes,
# and a value that many rows share (one in a thousand, say), such as a velocity at its limit, is an interval of ranks
# and comes back exactly.

NUM_QUANTILES = 10_000


def normal_scores(values, quantiles, generator):
    """Each value's rank among ascending quantiles [NUM_QUANTILES], as a quantile of N(0, 1). Args: values [batch].

    Between two quantiles the rank is interpolated; a value that equals several gets one of their ranks at random.
    """
    left = torch.searchsorted(quantiles, values)
    right = torch.searchsorted(quantiles, values, right=True)
    low = (left - 1).clamp(0, len(quantiles) - 2)
    gap = (quantiles[low + 1] - quantiles[low]).clamp(min=1e-30)
    between = low + ((values - quantiles[low]) / gap).clamp(0, 1)
    share = torch.rand(values.shape, generator=generator, device=values.device)
    rank = torch.where(right > left, left + share * (right - 1 - left), between)
    return torch.special.ndtri((rank + 0.5) / len(quantiles))


def from_normal_scores(z, quantiles):
    """The inverse of `normal_scores`; beyond the quantiles it gives the first or the last."""
    rank = (torch.special.ndtr(z) * len(quantiles) - 0.5).clamp(0, len(quantiles) - 1)
    low = rank.long().clamp(0, len(quantiles) - 2)  # below 0 where z is NaN
    return torch.lerp(quantiles[low], quantiles[low + 1], rank - low)


# --- Preconditioning and loss -----------------------------------------------------------------------------------------


class EDM(nn.Module):
    """D_theta: the denoiser with Karras' preconditioning (their Table 1), its loss, and the normaliser of the rows.

    `forward` and `loss` work on normalised rows; `normalize` and `unnormalize` go back and forth. sigma_data is 1
    (EDM's default is 0.5) because the rows are standardised. The normaliser is "standard", the paper's, or "rank".
    `guided` adds `early`, a denoiser as it was early in the training, that `denoise` leads away from, and limits
    that it does not leave. The other arguments are the Denoiser's.
    """

    P_MEAN, P_STD = -1.2, 1.2  # training noise levels: ln(sigma) ~ N(P_mean, P_std^2), Karras Table 1
    GUIDANCE, GUIDED_BELOW = 1.5, 0.3  # weight of the guidance, and the noise level where it begins

    def __init__(
        self,
        dim,
        width=1024,
        depth=6,
        cond_dim=0,
        time_dim=128,
        rff_dim=16,
        residual=True,
        sigma_data=1.0,
        normalizer="standard",
        activation="relu",
        guided=False,
    ):
        super().__init__()
        self.config = dict(
            dim=dim, width=width, depth=depth, cond_dim=cond_dim, time_dim=time_dim, rff_dim=rff_dim,
            residual=residual, sigma_data=sigma_data, normalizer=normalizer, activation=activation, guided=guided,
        )  # fmt: skip
        self.dim, self.sigma_data = dim, sigma_data
        self.denoiser = Denoiser(dim, width, depth, cond_dim, time_dim, rff_dim, residual, activation)
        self.early = copy.deepcopy(self.denoiser) if guided else None
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        if guided:  # limits of each normalised column's estimates
            self.register_buffer("low", torch.full((dim,), -math.inf))
            self.register_buffer("high", torch.full((dim,), math.inf))
        if normalizer == "rank":
            self.register_buffer("quantiles", torch.zeros(dim, NUM_QUANTILES))
            self.register_buffer("ranked", torch.zeros(dim, dtype=torch.bool))

    def fit_normalizer(self, data, skip=()):
        """Fit the normaliser to the columns of `data` [num_rows, dim].

        standard: each column but those in `skip` is standardised. std is the unbiased estimate plus 1e-5, so a constant
            column divides by 1e-5 and normalises to zero.
        rank: each column but those in `skip` becomes normal (`normal_scores`); those, which are flags, go from 0 and 1
            to -2 and 2.
        """
        skip = list(skip)
        std, mean = torch.std_mean(data, dim=0)
        self.mean.copy_(mean)
        self.std.copy_(std + 1e-5)
        self.mean[skip], self.std[skip] = (0.5, 0.25) if self.config["normalizer"] == "rank" else (0.0, 1.0)
        if self.config["normalizer"] == "rank":
            self.ranked.fill_(True)
            self.ranked[skip] = False
            position = torch.linspace(0, len(data) - 1, NUM_QUANTILES, dtype=torch.float64).to(data.device)
            low, high = position.floor().long(), position.ceil().long()
            for column, quantiles in zip(data.T, self.quantiles):
                ordered = column.sort().values
                quantiles.copy_(torch.lerp(ordered[low], ordered[high], (position - low).float()))
        if self.config["guided"]:
            low, high = self.normalize(data).aminmax(dim=0)
            self.low.copy_(low - (high - low) / 2)
            self.high.copy_(high + (high - low) / 2)

    def normalize(self, rows):
        """Equal values are spread at random by the rank normaliser, in the same way at each call."""
        x = (rows - self.mean) / self.std
        if self.config["normalizer"] == "rank":
            generator = torch.Generator(rows.device).manual_seed(0)
            for i in self.ranked.nonzero().flatten().tolist():
                x[:, i] = normal_scores(rows[:, i].contiguous(), self.quantiles[i], generator)
        return x

    def unnormalize(self, x):
        rows = x * self.std + self.mean
        if self.config["normalizer"] == "rank":
            for i in self.ranked.nonzero().flatten().tolist():
                rows[:, i] = from_normal_scores(x[:, i], self.quantiles[i])
        return rows

    def forward(self, x, sigma, cond=None, denoiser=None):
        """The denoised estimate of x. Args: x [batch, dim] with noise of level sigma (a scalar or [batch])."""
        denoiser = self.denoiser if denoiser is None else denoiser
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1)
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_noise = sigma.clamp(min=1e-20).log().flatten() / 4
        return c_skip * x + c_out * denoiser(c_in * x, c_noise, cond)

    def denoise(self, x, sigma, cond=None):
        """What samplers call: `forward` for one noise level, with guidance if the model has any.

        Autoguidance (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself"), within a limited
        range of noise (Kynkaanniemi et al. 2024): the estimate is moved on in the direction in which it has changed
        since early in the training. What training has begun to correct, s' above all, comes out better corrected. A
        change by more than the noise level counts as one of that size, and estimates are kept within twice the range of
        the rows (true ones, means of rows, lie within it): far from the data a denoiser extrapolates, and a few rows
        would be driven further and further away.
        """
        denoised = self(x, sigma, cond)
        if self.early is None:
            return denoised
        if sigma > self.GUIDED_BELOW:
            return denoised.clamp(self.low, self.high)
        change = (denoised - self(x, sigma, cond, self.early)).clamp(-sigma, sigma)
        return (denoised + (self.GUIDANCE - 1) * change).clamp(self.low, self.high)

    def loss(self, x, cond=None):
        """Weighted denoising error of normalised rows x [batch, dim], one noise level per row (Karras, Equation 8).

        The paper's Equation 2 leaves out the weight; its code has it, as here.
        """
        sigma = (self.P_MEAN + self.P_STD * torch.randn(len(x), 1, device=x.device)).exp()
        denoised = self(x + sigma * torch.randn_like(x), sigma, cond)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return (weight * (denoised - x) ** 2).mean()


def save_edm(path, model):
    """Write a trained model to one file that `load_edm` opens."""
    save_atomically(path, lambda f: torch.save({"config": model.config, "state": model.state_dict()}, f))


def load_edm(path, device="cpu"):
    """The model in a file of `save_edm` (`diffusion.pt` of a run folder)."""
    saved = load_file(path, device)
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left as it was
        model = EDM(**saved["config"]).to(device)
    model.load_state_dict(saved["state"])
    return model.requires_grad_(False)


# --- Noise schedule and samplers --------------------------------------------------------------------------------------
# `denoise(x, sigma)` is the only contract between a model and a sampler. x arrives as sigmas[0] times unit noise.


def karras_sigmas(num_steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """The noise levels of Karras' Equation 5, from sigma_max to sigma_min, then 0. Returns float64 [num_steps + 1]."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def sample_sde(
    denoise,
    x,
    sigmas,
    s_churn=80.0,
    s_tmin=0.05,
    s_tmax=50.0,
    s_noise=1.003,
    generator: Optional[torch.Generator] = None,
):
    """The paper's sampler: Karras' Algorithm 2, stochastic Heun with the constants of Table 9.

    N levels cost 2N - 1 network calls. With s_churn = 0 it is the deterministic Heun solver (their Algorithm 1).
    Each step with churn adds noise s_noise times too large, so few steps inflate the variance: the paper takes 128.
    """
    sigmas = sigmas.tolist()
    num_steps = len(sigmas) - 1
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        gamma = min(s_churn / num_steps, math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * noise
        slope = (x - denoise(x, sigma_hat)) / sigma_hat
        x_next = x + (sigma_next - sigma_hat) * slope
        if sigma_next > 0:  # Heun's correction; impossible at the last step, where the slope would divide by zero
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma_hat) * (slope + slope_next) / 2
        x = x_next
    return x


def sample_dpmpp(denoise, x, sigmas, eta=0.0, generator: Optional[torch.Generator] = None):
    """DPM-Solver++(2M) (Lu et al. 2022): second order, one network call per level.

    eta = 0: deterministic, their Algorithm 2. With eta > 0 each step goes down further and adds the noise that was
    lost, the solution of a stochastic equation with the same distributions (eta = 1: their SDE-DPM-Solver++): fresh
    noise corrects what earlier steps got wrong, and s' agrees better with (s, a).
    """
    sigmas = sigmas.tolist()
    previous, h_previous = None, None
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            return denoised
        h = math.log(sigma / sigma_next)
        target = denoised
        if previous is not None:  # linear extrapolation of the denoised estimate to the middle of the step
            target = denoised + (h / (2 * h_previous)) * (denoised - previous)
        x = (sigma_next / sigma) * math.exp(-eta * h) * x - math.expm1(-(1 + eta) * h) * target
        if eta > 0:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x = x + sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * noise
        previous, h_previous = denoised, h
    return x


# --- Training ---------------------------------------------------------------------------------------------------------


def ema_decay(step, beta=0.995, update_after=100, power=2 / 3):
    """The weight of the old average at the EMA call of this 0-based step; 0 copies the weights.

    The warm-up of the ema-pytorch package: 0.798 at step 110, 0.954 at 200, 0.989 at 1000, `beta` from 2930 on.
    """
    return min(beta, 1 - (1 + step - update_after) ** -power) if step > update_after else 0.0


def cosine_lr(lr, step, steps):
    """Cosine annealing from `lr` at step 0 to 0 at `steps` (Table 8): a function of the step, so resume is exact."""
    return 0.5 * lr * (1 + math.cos(math.pi * step / steps))


def epoch_batches(num_rows, batch_size, seed, step=0, device="cpu"):
    """Yield index tensors [batch_size], entered at `step`: an endless line of shuffled epochs, cut into equal batches.

    Each row comes exactly once per epoch. A batch may span two epochs; the official code makes it shorter instead.
    """

    def shuffle(epoch):
        generator = torch.Generator(device).manual_seed((seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(num_rows, generator=generator, device=device)

    epoch, start = divmod(step * batch_size, num_rows)
    line = shuffle(epoch)
    while True:
        while start + batch_size > len(line):
            epoch += 1
            line, start = torch.cat([line[start:], shuffle(epoch)]), 0
        yield line[start : start + batch_size]
        start += batch_size


def cuda_graph(step: Callable[[], None], warmup=3):
    """Record `step`, which takes no arguments and reads and writes fixed tensors only, and replay it from then on.

    A training step of these small networks is bound by kernel launches on a GPU; a replay launches once. The first
    calls run as usual (they count as steps): optimisers and workspaces are allocated there.
    """
    graph, stream, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0

    def run():
        nonlocal calls
        if calls < warmup:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if calls == warmup:
                with torch.cuda.graph(graph):  # records without running
                    step()
            graph.replay()
        calls += 1

    return run


def save_atomically(path, write: Callable):
    """Call `write(file)` on a temporary name beside `path`, then rename: `path` is never half written."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides the former in the latter
        temporary.unlink(missing_ok=True)
        error = error if isinstance(error, OSError) else error.__context__ or error
        raise RunError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def load_file(path, device="cpu"):
    """What torch.save wrote. Raises RunError where the file cannot be read."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # a damaged file fails in many ways
        raise RunError(f"{path} is damaged or of another program; once it is deleted, its step is done again") from None


# How to train: Table 8, and what tests/paper/recipes.py found to be better in little time.
PAPER_STEPS = 100_000
RECIPES = {
    "paper": dict(lr=3e-4, width=1024, depth=6),
    "fast": dict(lr=2e-3, width=384, depth=4),
    "ranks": dict(lr=2e-3, width=384, depth=4),
}


def default_recipe(steps):
    """The recipe for so many training steps: the paper's from its own number on."""
    return "paper" if steps >= PAPER_STEPS else "fast"


def train_edm(
    data,
    *,
    steps=PAPER_STEPS,
    recipe=None,
    batch_size=256,
    lr=None,
    width=None,
    depth=None,
    residual=True,
    time_dim=128,
    skip=(),
    cond=None,
    init=None,
    patience=None,
    seed=0,
    device=None,
    compile="auto",
    checkpoint_path=None,
    checkpoint_every=10_000,
    log_every=500,
    on_log: Optional[Callable[[int, dict], None]] = None,
    progress=True,
) -> EDM:
    """Train a diffusion model on rows (Appendix B.2, Table 8) and return its exponential moving average.

    Adam with betas (0.9, 0.99), cosine schedule, gradient norm clipped at 1, EMA 0.995 every 10 steps in the paper's
    recipe. The data live on the device; nothing in a step waits for the host.

    Args:
        data: [num_rows, dim] float32, in raw units.
        steps: optimiser steps.
        recipe: "paper"; "fast", for fewer than the paper's 100,000 steps: a smaller denoiser with GELU, a higher
            learning rate, an EMA over the same share of the steps (1 - 500 / steps, not 0.995), and samples guided away
            from that average as it was after 10% of the steps (`EDM.denoise`); or "ranks", the same with the rank
            normaliser. None takes "paper" from 100,000 steps on, "fast" for less.
        batch_size, lr: rows per step, initial learning rate (None takes the recipe's).
        width, depth, residual, time_dim: the Denoiser's (None takes the recipe's).
        skip: columns that are not standardised: flags.
        cond: optional condition [num_rows, cond_dim].
        init: a model of the same size, whose denoiser to start from; the normaliser is that of `data` in any case.
        patience: stop early, once the loss of the average on 5% of the rows, held out for it, has not fallen by 0.5%
            for this many thousands of steps. The paper has no such thing; Appendix D.2 expects it to save much.
        seed: of the weights, noise and batches. The caller's random state is left as it was.
        device: None takes a GPU if there is one.
        compile: "off" runs every step eagerly; otherwise a CUDA device replays a graph.
        checkpoint_path: written every `checkpoint_every` steps; if it exists, training goes on from it, exactly.
        on_log: called with (step, {key: value}) every `log_every` steps.

    Raises:
        RunError: the data are not finite, or the loss is not.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    recipe = recipe or default_recipe(steps)
    values = {"lr": lr, "width": width, "depth": depth}
    lr, width, depth = (RECIPES[recipe][key] if value is None else value for key, value in values.items())
    is_paper = recipe == "paper"
    ema_beta = 0.995 if is_paper else max(1 - 500 / max(steps, 1), 0.0)
    if not all(part.isfinite().all() for part in data.split(100_000)):
        raise RunError("the training rows of the diffusion model hold NaN or Inf")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        cond_dim = 0 if cond is None else cond.shape[1]
        choices = dict(activation="relu" if is_paper else "gelu", guided=not is_paper)
        choices["normalizer"] = "rank" if recipe == "ranks" else "standard"
        model = EDM(data.shape[1], width, depth, cond_dim, time_dim, residual=residual, **choices)
        if init is not None:
            model.denoiser.load_state_dict(init.denoiser.state_dict())
        model.fit_normalizer(data, skip)
        model = model.to(device)
        ema = copy.deepcopy(model).requires_grad_(False)
        params, ema_params = list(model.denoiser.parameters()), list(ema.denoiser.parameters())
        current_lr = torch.tensor(lr, device=device) if device.type == "cuda" else lr
        optimizer = torch.optim.Adam(
            params, current_lr, betas=(0.9, 0.99), fused=True, capturable=device.type == "cuda"
        )

        start, best_loss, best_step = 0, math.inf, 0
        settings = dict(model.config, rows=len(data), steps=steps, batch_size=batch_size, lr=lr, seed=seed)
        settings["patience"] = patience
        if checkpoint_path and os.path.exists(checkpoint_path):
            saved = load_file(checkpoint_path, device)
            if different := [k for k in settings if settings[k] != saved["settings"].get(k)]:
                raise RunError(
                    f"{checkpoint_path} is of a run with another {', '.join(different)}; delete it to start over"
                )
            if not torch.equal(saved["model"]["mean"], model.mean):
                raise RunError(f"{checkpoint_path} is of a run on other data; delete it to start over")
            model.load_state_dict(saved["model"])
            ema.load_state_dict(saved["ema"])
            optimizer.load_state_dict(saved["optimizer"])
            optimizer.param_groups[0]["lr"] = current_lr
            set_rng_state(saved["rng"], device)
            start, best_loss, best_step = saved["step"], saved["best_loss"], saved["best_step"]
            if on_log and saved["logged"]:  # the caller may not have come to write it down
                on_log(saved["last_log"], saved["logged"])

        x = model.normalize(data.to(device))
        cond = None if cond is None else cond.to(device)
        if patience:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(device)
            held_out, order = order.tensor_split([max(len(x) // 20, 1)])
            x_held_out, cond_held_out = x[held_out], None if cond is None else cond[held_out]
            x, cond = x[order], None if cond is None else cond[order]
        batch = torch.zeros(batch_size, dtype=torch.int64, device=device)
        loss_sum, last_log, logged = torch.zeros((), device=device), start, {}
        if start:
            loss_sum, last_log, logged = saved["loss_sum"], saved["last_log"], saved["logged"]

        def step():
            optimizer.zero_grad(set_to_none=device.type == "cuda")  # on a CPU, fresh memory costs a tenth of the step
            loss = model.loss(x[batch], None if cond is None else cond[batch])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            loss_sum.add_(loss.detach())

        step = cuda_graph(step) if device.type == "cuda" and compile != "off" else step
        batches = epoch_batches(len(x), batch_size, seed, start, device)
        bar = tqdm(range(start, steps), "diffusion", initial=start, total=steps, disable=not progress, **BAR)
        last_time, last_timed = time.time(), start
        stop = patience and start - best_step >= 1000 * patience  # the checkpoint of a run that had stopped
        for i in bar if not stop else ():
            batch.copy_(next(batches))
            if device.type == "cuda":
                current_lr.fill_(cosine_lr(lr, i, steps))
            else:
                optimizer.param_groups[0]["lr"] = cosine_lr(lr, i, steps)
            step()
            if i % 10 == 0:
                with torch.no_grad():
                    torch._foreach_lerp_(ema_params, params, 1 - ema_decay(i, ema_beta))
            done = i + 1
            if patience and done % 1000 == 0:
                held_out_loss = held_out_error(ema, x_held_out, cond_held_out)
                if held_out_loss < 0.995 * best_loss:
                    best_loss, best_step = held_out_loss, done
                stop = done - best_step >= 1000 * patience
            if not is_paper and (i == steps // 10 or stop and i < steps // 10):  # stopped before it: no guidance
                ema.early.load_state_dict(ema.denoiser.state_dict())
            if done % log_every == 0 or done == steps or stop:
                loss = loss_sum.item() / (done - last_log)  # the only wait for the device
                if not math.isfinite(loss):
                    raise RunError(f"the diffusion loss became {loss} between steps {last_log} and {done}")
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                rate = (done - last_timed) / (time.time() - last_time)
                logged = {"diffusion/loss": loss, "perf/diffusion_steps_per_sec": rate}
                if patience:
                    logged["diffusion/held_out_loss"] = best_loss
                if on_log:
                    on_log(done, logged)
                loss_sum.zero_()
                trim_memory()
                last_log, last_timed, last_time = done, done, time.time()
            if checkpoint_path and (done % checkpoint_every == 0 or done == steps or stop):
                state = {
                    "stage": "diffusion",
                    "settings": settings,
                    "step": done,
                    "loss_sum": loss_sum,
                    "last_log": last_log,
                    "logged": logged,
                    "best_loss": best_loss,
                    "best_step": best_step,
                    "model": model.state_dict(),
                    "ema": ema.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rng": get_rng_state(device),
                }
                save_atomically(checkpoint_path, lambda f: torch.save(state, f))
            if stop:
                break
        bar.close()
    return ema


@torch.no_grad()
def held_out_error(model, x, cond=None, draws=4):
    """The loss of normalised rows, with the same noise at every call, so that small changes show."""
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(0)
        return sum(model.loss(x, cond).item() for _ in range(draws)) / draws


def get_rng_state(device):
    """The state of torch's global generator that draws on `device`."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng_state(state, device):
    """Undo `get_rng_state`. Raises RunError for the state of another kind of device."""
    try:
        torch.cuda.set_rng_state(state.cpu(), device) if device.type == "cuda" else torch.set_rng_state(state.cpu())
    except (RuntimeError, TypeError):
        raise RunError("a run that began on a CPU cannot go on on a GPU, nor the other way round") from None


# --- Generation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    edm,
    num_samples,
    *,
    sampler="dpmpp",
    sample_steps=None,
    batch_size=None,
    seed=0,
    cond=None,
    partial_path=None,
    progress=True,
):
    """Draw new rows from a trained model.

    Args:
        edm: the model, on the device that shall do the work.
        num_samples: any number; the last batch may be partial.
        sampler: "dpmpp-sde" or "dpmpp" (`sample_dpmpp`, with and without noise; sample_steps network calls) or "sde",
            the paper's (2 * sample_steps - 1 calls).
        sample_steps: noise levels; None takes the paper's 128 for "sde", else 32.
        batch_size: rows at a time; None takes 100,000 on a GPU (as the paper) and 2,000 on a CPU, where the
            activations should fit the cache. Part of the random stream, like the seed.
        cond: optional condition [num_samples, cond_dim].
        partial_path: finished batches are appended to this file, and a run that was killed goes on after them.
            The caller deletes it.

    Returns:
        float32 [num_samples, dim] on the CPU, in raw units. Not clipped, as in the paper.

    Raises:
        RunError: partial_path was begun with other settings.
    """
    device = edm.mean.device
    batch_size = batch_size or (100_000 if device.type == "cuda" else 2_000)
    sample = sample_sde if sampler == "sde" else sample_dpmpp
    sample_steps = sample_steps or (128 if sampler == "sde" else 32)
    sigmas = karras_sigmas(sample_steps)
    rows = torch.empty(num_samples, edm.dim)
    done = 0
    if partial_path:
        settings = repr((sampler, sample_steps, batch_size, seed)).encode().ljust(256)
        partial = open(partial_path, "a+b")
        partial.seek(0)
        if (found := partial.read(256)) not in (b"", settings):
            raise RunError(
                f"{partial_path} is of a run with another sampler, batch size or seed; delete it to start over"
            )
        done = max(0, os.path.getsize(partial_path) - 256) // (4 * edm.dim) // batch_size * batch_size
        done = min(done, num_samples // batch_size * batch_size)
        if not found:
            partial.write(settings)
        partial.truncate(256 + 4 * edm.dim * done)
        partial.flush()
        rows[:done] = torch.from_numpy(np.fromfile(partial_path, np.float32, offset=256)).reshape(done, edm.dim)
    bar = tqdm(desc="sampling", initial=done, total=num_samples, unit="row", disable=not progress, **BAR)
    for start in range(done, num_samples, batch_size):
        size = min(batch_size, num_samples - start)
        batch_cond = None if cond is None else cond[start : start + size].to(device)
        generator = torch.Generator(device).manual_seed(
            (seed * 1_000_000_007 + start) % 2**63
        )  # a stream of its own per batch
        x = sigmas[0].item() * torch.randn(size, edm.dim, generator=generator, device=device)
        options = {"eta": 1.0} if sampler == "dpmpp-sde" else {}
        x = sample(lambda x, sigma: edm.denoise(x, sigma, batch_cond), x, sigmas, generator=generator, **options)
        rows[start : start + size] = edm.unnormalize(x)
        if partial_path:
            rows[start : start + size].numpy().tofile(partial)
            partial.flush()
        trim_memory()
        bar.update(size)
    bar.close()
    if partial_path:
        partial.close()
    return rows


# --- Transitions <-> rows ---------------------------------------------------------------------------------------------


def pack(observations, actions, rewards, next_observations, terminals):
    """The rows [s, a, r, s', d] of arrays or tensors [N, obs_dim], [N, act_dim], [N], [N, obs_dim], [N].

    Returns: float32 tensor [N, 2 * obs_dim + act_dim + 2].
    """
    columns = [torch.as_tensor(x) for x in (observations, actions, rewards, next_observations, terminals)]
    obs_dim, act_dim = columns[0].shape[1], columns[1].shape[1]
    rows = torch.empty(len(columns[0]), 2 * obs_dim + act_dim + 2)
    for part, column in zip(rows.split([obs_dim, act_dim, 1, obs_dim, 1], dim=1), columns):
        part.copy_(column.reshape(part.shape))
    return rows


def unpack(rows, obs_dim, act_dim):
    """The arrays of rows [N, 2 * obs_dim + act_dim + 2], by their D4RL names; a terminal is a raw value above 0.5.

    Returns: dict of numpy arrays: observations, actions, rewards [N], next_observations, terminals [N] (bool). All but
    the last are views of `rows` where these are on the CPU.
    """
    observations, actions, rewards, next_observations, terminals = (
        part.cpu().numpy() for part in rows.split([obs_dim, act_dim, 1, obs_dim, 1], dim=1)
    )
    return {
        "observations": observations,
        "actions": actions,
        "rewards": rewards[:, 0],
        "next_observations": next_observations,
        "terminals": terminals[:, 0] > 0.5,
    }


def relabel_terminals(rows, real, steps=5_000, batch_size=512, seed=0):
    """Set the last column of generated rows by a classifier of d from (s, a, r, s'), in place.

    The diffusion model draws d together with the rest, and where terminals are rare it misses most of them: it has
    seen few, and at the noise levels where d is decided the state is still vague. A small classifier trained on the
    real rows judges the finished sample instead. Not in the paper, whose Appendix A asks for a cleaner treatment.

    Args: rows [M, dim] and real [N, dim], CPU tensors in raw units. Returns: rows.
    """
    mean, std = real[:, :-1].mean(0), real[:, :-1].std(0) + 1e-5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = nn.Sequential(
            nn.Linear(len(mean), 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1), nn.Flatten(0)
        )
        optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
        for step in tqdm(range(steps), "terminals", **BAR):
            optimizer.param_groups[0]["lr"] = cosine_lr(1e-3, step, steps)
            batch = real[torch.randint(len(real), (batch_size,))]
            loss = F.binary_cross_entropy_with_logits(classifier((batch[:, :-1] - mean) / std), batch[:, -1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for part in rows.split(10_000):
                part[:, -1] = classifier((part[:, :-1] - mean) / std) > 0
    return rows


# --- Sample quality ---------------------------------------------------------------------------------------------------


def marginal(real, synthetic):
    """Mean over the columns of 1 - Kolmogorov-Smirnov distance (Table 1, "Marginal"): 1 is perfect.

    Args: real [N, dim] and synthetic [M, dim], arrays or tensors; NaNs are left out. As SDMetrics' KSComplement.
    """
    scores = []
    for x, y in zip(np.asarray(real).T, np.asarray(synthetic).T):
        x, y = np.sort(x[~np.isnan(x)]), np.sort(y[~np.isnan(y)])
        both = np.concatenate([x, y])
        distance = np.searchsorted(x, both, "right") / len(x) - np.searchsorted(y, both, "right") / len(y)
        scores.append(1 - np.abs(distance).max())
    return float(np.mean(scores))


def correlation(real, synthetic):
    """Mean over the pairs of columns of 1 - |rho_real - rho_synthetic| / 2, rho Pearson's (Table 1, "Correlation").

    Pairs with a column that is constant in `real` have no correlation to match and are left out; a column that is
    constant in `synthetic` only counts as uncorrelated. As SDMetrics' CorrelationSimilarity. NaN if no pair is left.
    """
    real, synthetic = torch.as_tensor(real), torch.as_tensor(synthetic)
    varies = (real != real[0]).any(0)
    if varies.sum() < 2:
        return math.nan
    pairs = torch.triu_indices(varies.sum(), varies.sum(), 1).unbind()
    rho_real, rho_synthetic = (torch.corrcoef(rows[:, varies].T).nan_to_num()[pairs] for rows in (real, synthetic))
    return (1 - (rho_real - rho_synthetic).abs().double() / 2).mean().item()


def mean_ranks(rows):
    """Ranks within each column; ties share their mean. Args and returns: [N, dim]."""
    ranks = torch.empty(rows.shape)
    for column, out in zip(rows.T, ranks.T):
        _, inverse, counts = column.unique(return_inverse=True, return_counts=True)
        out.copy_((counts.cumsum(0) - (counts + 1) / 2)[inverse])
    return ranks


def quality_report(real, synthetic, num_neighbors=1000):
    """How close generated rows are to real ones. Returns a dict of numbers:

    marginal, correlation, spearman: Table 1's scores, and the second with rank correlations (the paper's text has
        "Pearson rank"); all real rows against at most 100,000 generated ones, as in the paper.
    terminals_real, terminals: shares of rows whose last column is above 0.5.
    nonfinite: share of generated rows with NaN or Inf; the other figures are of the rest.
    nearest, nearest_real: median distance, in standardised units, from a generated row to its nearest real row, and
        from a real row to its nearest other one. Copying shows as nearest far below nearest_real.

    Args: real [N, dim], synthetic [M, dim] CPU tensors in raw units.
    """
    finite = sum(part.isfinite().all(1).sum().item() for part in synthetic.split(100_000))  # isfinite copies
    nonfinite = 1 - finite / len(synthetic)
    some = synthetic[:100_000]
    some = some[torch.isfinite(some).all(1)]
    if len(some) < 2:
        return {"nonfinite": nonfinite}
    generator = torch.Generator().manual_seed(0)
    shuffled = real[torch.randperm(len(real), generator=generator)[:100_000]]
    varies = (shuffled != shuffled[0]).any(0)
    std, mean = torch.std_mean(shuffled[:, varies], dim=0)
    points = (shuffled[:50_000, varies] - mean) / std
    num_neighbors = min(num_neighbors, len(points) // 2)
    queries = {"nearest": (some[:num_neighbors, varies] - mean) / std, "nearest_real": points[:num_neighbors]}
    others = {"nearest": points, "nearest_real": points[num_neighbors:]}
    nearest = {key: torch.cdist(x, others[key]).amin(1).median().item() for key, x in queries.items()}
    return {
        "marginal": marginal(real, some),
        "correlation": correlation(real, some),
        "spearman": correlation(mean_ranks(shuffled), mean_ranks(some)),
        "terminals_real": (real[:, -1] > 0.5).double().mean().item(),
        "terminals": (some[:, -1] > 0.5).double().mean().item(),
        "nonfinite": nonfinite,
        **nearest,
    }


def format_report(report):
    """The quality report as lines of text."""
    return "sample quality:\n" + "\n".join(f"  {key:<15} {value:.5g}" for key, value in report.items())


def plot_marginals(path, real, synthetic, obs_dim, act_dim, max_panels=48):
    """Histograms of the columns of real and generated rows (Figure 8) as a PNG; of many columns, an even choice."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"s[{i}]" for i in range(obs_dim)] + [f"a[{i}]" for i in range(act_dim)] + ["r"]
    names = (names + [f"s'[{i}]" for i in range(obs_dim)] + ["d"])[: real.shape[1]]
    shown = np.linspace(0, len(names) - 1, min(len(names), max_panels)).round().astype(int)
    columns = 8
    fig, axes = plt.subplots(
        -(-len(shown) // columns), columns, figsize=(16, 1.6 * -(-len(shown) // columns)), layout="constrained"
    )
    for i, ax in zip(shown, axes.flat):
        x, y = real[:100_000, i], synthetic[:100_000, i]
        low, high = x.quantile(0.001).item(), x.quantile(0.999).item()
        bins = np.linspace(low - 1e-3, high + 1e-3, 60)
        ax.hist(x.clamp(low, high).numpy(), bins, density=True, color="tab:orange", alpha=0.6)
        ax.hist(y.clamp(low, high).numpy(), bins, density=True, color="tab:blue", alpha=0.6)
        ax.set_title(names[i], fontsize=8)
        ax.set_yticks([])
        ax.tick_params(labelsize=6)
    for ax in axes.flat[len(shown) :]:
        ax.axis("off")
    fig.suptitle("real (orange) and generated (blue)")
    save_atomically(path, lambda f: fig.savefig(f, format="png", dpi=80))
    plt.close(fig)


# --- Command line -----------------------------------------------------------------------------------------------------
# The loaders are copies from synther_td3bc.py, so that each script can be read, and taken away, alone with this file;
# tests/test_copies.py keeps them equal.

# Copied from synther_td3bc.TRANSITION_KEYS
TRANSITION_KEYS = ("observations", "actions", "rewards", "next_observations", "terminals")


# Copied from synther_td3bc.qlearning_dataset with edm.RunError->RunError
def qlearning_dataset(raw, true_next_obs=False, max_episode_steps=1000):
    """Transitions (s, a, r, s', d) from the rows of a D4RL file, as `d4rl.qlearning_dataset` makes them.

    Row i gives s' = observations[i + 1]. Rows that end an episode by its time limit have no s' and are left out, as is
    the last row. On *terminal* rows D4RL does the same, so that s' there is the first observation of the next episode:
    harmless for Q-learning, which masks it, but the diffusion model learns these jumps (and from them, easily, which
    rows are terminal). With true_next_obs, terminal rows get the s' in the file's `next_observations`.

    Args:
        raw: dict of arrays [N, ...] with the keys of a D4RL file; `timeouts` and `next_observations` may be missing.
        max_episode_steps: where episodes are cut if there are no `timeouts`.

    Returns:
        dict of arrays: observations, actions, rewards, next_observations (float32) and terminals (bool).

    Raises:
        RunError: true_next_obs asked of a file with terminals and without `next_observations`.
    """
    terminals = raw["terminals"].astype(bool)
    if "timeouts" in raw:
        timeouts = raw["timeouts"].astype(bool)
    else:  # D4RL's counter, which starts at 1 in an episode that follows a terminal
        timeouts, step = np.zeros(len(terminals), bool), 0
        for i, terminal in enumerate(terminals):
            timeouts[i] = step == max_episode_steps - 1
            step = 0 if timeouts[i] else 1 if terminal else step + 1
    keep = np.flatnonzero(~timeouts[:-1])
    next_observations = raw["observations"][keep + 1]
    ends = np.flatnonzero(terminals[keep])
    if true_next_obs and len(ends):
        if "next_observations" not in raw:
            raise RunError("--true-next-obs needs a file with `next_observations`, and this one has none")
        next_observations[ends] = raw["next_observations"][keep[ends]]
    return {
        "observations": raw["observations"][keep].astype(np.float32),
        "actions": raw["actions"][keep].astype(np.float32),
        "rewards": raw["rewards"][keep].astype(np.float32).reshape(-1),
        "next_observations": next_observations.astype(np.float32),
        "terminals": terminals[keep].reshape(-1),
    }


# Copied from synther_td3bc.load_transitions with edm.RunError->RunError
def load_transitions(source, true_next_obs=False, max_episode_steps=1000):
    """Transitions from a D4RL-layout HDF5 file, an .npz of transitions, or a Minari dataset.

    Args:
        source: a path that ends in .hdf5, .h5 or .npz, or a Minari id such as mujoco/hopper/medium-v0.
        true_next_obs, max_episode_steps: see `qlearning_dataset`; the other two kinds always hold the true s'.

    Returns:
        dict of float32 arrays: observations [N, obs_dim], actions [N, act_dim], rewards [N], next_observations
        [N, obs_dim], and terminals [N] (bool).

    Raises:
        RunError: the source is missing, unreadable, or not a set of finite transitions.
    """
    is_file = Path(source).suffix in (".hdf5", ".h5", ".npz")
    if is_file and not Path(source).is_file():
        raise RunError(f"no such dataset file: {source}")
    try:
        if Path(source).suffix == ".npz":
            with np.load(source) as f:
                if missing := set(TRANSITION_KEYS) - set(f):
                    raise RunError(f"{source} lacks {', '.join(sorted(missing))}")
                data = {key: f[key] for key in TRANSITION_KEYS}
        elif is_file:
            with h5py.File(source, "r") as f:
                keys = ["observations", "actions", "rewards", "terminals"]
                raw = {key: f[key][:] for key in keys + [k for k in ("timeouts", "next_observations") if k in f]}
            check_arrays(raw, source)
            data = qlearning_dataset(raw, true_next_obs, max_episode_steps)
        else:
            import minari

            episodes = list(minari.load_dataset(source, download=True).iterate_episodes())
            data = {
                "observations": np.concatenate([e.observations[:-1] for e in episodes]),
                "actions": np.concatenate([e.actions for e in episodes]),
                "rewards": np.concatenate([e.rewards for e in episodes]),
                "next_observations": np.concatenate([e.observations[1:] for e in episodes]),
                "terminals": np.concatenate([e.terminations for e in episodes]),
            }
    except KeyError as error:
        raise RunError(f"{source} lacks a key that transitions need: {error.args[0]}") from None
    except RunError:
        raise
    except Exception as error:  # every format fails in its own way: truncated, not that format, no network, ...
        raise RunError(f"cannot read {source}: {' '.join(str(error).split())}") from None
    for key in ("rewards", "terminals"):
        data[key] = data[key].reshape(-1) if data[key].shape[1:] == (1,) else data[key]
    check_arrays(data, source)
    for key, x in data.items():
        if x.ndim != (1 if key in ("rewards", "terminals") else 2):
            raise RunError(f"{source}: {key} has the shape {x.shape}")
    return {k: data[k].astype(bool if k == "terminals" else np.float32, copy=False) for k in TRANSITION_KEYS}


# Copied from synther_td3bc.check_arrays with edm.RunError->RunError
def check_arrays(arrays, source):
    """Raise RunError unless the arrays of a dataset hold finite numbers and have the same number of rows, and some."""
    for key, x in arrays.items():
        if x.ndim == 0 or x.dtype.kind not in "fiub":
            raise RunError(f"{source}: {key} is not an array of numbers")
        with np.errstate(over="ignore"):  # a number too large for float32 becomes Inf
            finite = np.isfinite(x.astype(np.float32, copy=False)).all()
        if not finite:
            raise RunError(f"{source}: {key} holds NaN or Inf")
    rows = {key: len(x) for key, x in arrays.items()}
    if len(set(rows.values())) != 1:
        raise RunError(f"{source}: the arrays disagree in length: {rows}")
    if min(rows.values()) < 2:
        raise RunError(f"{source} holds no transitions")


@dataclass
class Args:
    data: str
    """what to learn from: a D4RL-layout .hdf5, an .npz of transitions, or a Minari id"""
    num_samples: int
    """transitions to generate"""
    out: str
    """the .npz to write, with D4RL's keys; an existing file is not overwritten"""
    true_next_obs: bool = False
    """take s' of terminal rows from the file's next_observations, not from the next row as D4RL does"""
    terminals: Literal["column", "classifier"] = "column"
    """terminals of generated rows: the diffusion model's last column above 0.5 (the paper's), or a small classifier of
    d from (s, a, r, s'), better where terminals are rare; it wants --true-next-obs"""
    diffusion_steps: int = 100_000
    """training steps (paper: 100,000, Table 8)"""
    diffusion_recipe: Optional[Literal["paper", "fast", "ranks"]] = None
    """how to train: as the paper (the default from 100,000 steps on); fast (the default for less): a smaller, smoother
    denoiser, a higher learning rate, guided samples; ranks: fast with columns bent into normal distributions"""
    diffusion_width: Optional[int] = None
    """units per block of the denoiser (paper: 1024; fast: 384)"""
    diffusion_depth: Optional[int] = None
    """residual blocks of the denoiser (paper: 6; fast: 4)"""
    diffusion_batch_size: Optional[int] = None
    """rows per training step (paper: 256, and 1024 from 800,000 rows on; fast: 256)"""
    diffusion_lr: Optional[float] = None
    """initial learning rate of the cosine schedule (paper: 3e-4; fast: 2e-3)"""
    sampler: Literal["sde", "dpmpp", "dpmpp-sde"] = "dpmpp"
    """dpmpp-sde, dpmpp: DPM-Solver++(2M) with and without noise, one network call per step; sde: the paper's stochastic
    Heun, two (Table 9)"""
    sample_steps: Optional[int] = None
    """noise levels of the sampler (default 32; 128 for sde, the paper's)"""
    sample_batch_size: Optional[int] = None
    """transitions generated at a time (default 2,000 on a CPU, 100,000 on a GPU)"""
    seed: int = 0
    """seed of the model and its samples"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one"""


def main(args):
    """Train on args.data, write args.num_samples generated transitions to args.out, print the quality report.

    Beside OUT.npz stay OUT.pt, the model, and OUT.png, its histograms. A command that was stopped and is given again
    goes on from its last checkpoint, OUT.checkpoint.
    """
    out = Path(args.out)
    for name, value in vars(args).items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and name != "seed" and not 0 < value < math.inf:
            raise RunError(f"--{name.replace('_', '-')} must be positive, not {value}")
    for path in (out, out.with_suffix(".pt"), out.with_suffix(".png")):
        if path.exists() and not out.with_suffix(".checkpoint").exists():
            raise RunError(f"{path} exists; give another --out or move it away")
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise RunError(f"--out must be an .npz file in an existing folder, not {out}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda needs a GPU, and PyTorch finds none")
    data = load_transitions(args.data, args.true_next_obs)
    obs_dim, act_dim = data["observations"].shape[1], data["actions"].shape[1]
    real = pack(**data)
    recipe = args.diffusion_recipe or default_recipe(args.diffusion_steps)
    is_large = recipe == "paper" and len(real) >= 800_000
    model = train_edm(
        real,
        steps=args.diffusion_steps,
        recipe=recipe,
        batch_size=args.diffusion_batch_size or (1024 if is_large else 256),
        lr=args.diffusion_lr,
        width=args.diffusion_width,
        depth=args.diffusion_depth,
        skip=[real.shape[1] - 1],  # the terminal
        seed=args.seed,
        device="cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu",
        checkpoint_path=out.with_suffix(".checkpoint"),
    )
    rows = generate(
        model,
        args.num_samples,
        sampler=args.sampler,
        sample_steps=args.sample_steps,
        batch_size=args.sample_batch_size,
        seed=args.seed,
        partial_path=out.with_suffix(".partial"),
    )
    rows[:, -1] = rows[:, -1] > 0.5
    if args.terminals == "classifier":
        relabel_terminals(rows, real, seed=args.seed)
    print(format_report(quality_report(real, rows)))
    plot_marginals(out.with_suffix(".png"), real, rows, obs_dim, act_dim)
    save_edm(out.with_suffix(".pt"), model)
    save_atomically(out, lambda f: np.savez(f, **unpack(rows, obs_dim, act_dim)))
    out.with_suffix(".checkpoint").unlink()
    out.with_suffix(".partial").unlink()
    print(f"{len(rows)} transitions in {out}, the model in {out.with_suffix('.pt')}")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args, description=__doc__))
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")
