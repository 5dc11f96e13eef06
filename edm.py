"""The diffusion model of Synthetic Experience Replay (SynthER, Lu et al., NeurIPS 2023).

An Elucidated Diffusion Model (EDM, Karras et al. 2022, arXiv 2206.00364) learns the rows
[s, a, r, s', d] of a replay buffer, and generates as many new ones as an agent wants. Tables and
figures are those of the SynthER paper. The scripts import this file. It also works alone:

    python edm.py --data my_transitions.npz --num-samples 1000000 --out synthetic.npz

From Python, with any float32 rows [num_rows, dim]:

    new_rows = edm.generate(edm.train_edm(rows), 1_000_000)
"""

import contextlib
import copy
import hashlib
import itertools
import math
import os
import shlex
import signal
import socket
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, Optional, get_args, get_type_hints

import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

if not torch.cuda.is_available():
    # oneDNN is twice as fast on AMD with AVX-512. PyTorch uses it only if bfloat16 is allowed. A
    # product is tried, as Intel's AMX does round to bfloat16.
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    _ones = torch.ones(512, 512, dtype=torch.float32)
    if ((1 + 2**-12) * _ones @ _ones != 512 + 2**-3).any():
        torch.backends.mkldnn.matmul.fp32_precision = "none"

# --- Options ---


class RunError(Exception):
    """The run cannot go on. The message is one sentence for the user."""


@contextlib.contextmanager
def errors_as(what):
    """Errors of any kind become a RunError that begins with `what`."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, RunError) else f" ({type(error).__name__})"
        raise RunError(" ".join(f"{what}: {error}{kind}".split())) from None


@dataclass(frozen=True)
class Recipe:
    """What makes a diffusion model. Defaults: the paper's (Table 8), but the sampler is ours."""

    width: int = 1024  # units per block
    depth: int = 6  # blocks
    residual: bool = True
    time_dim: Optional[int] = 128  # size of the embeddings of row and noise level; None: width
    gated: bool = False  # gated units instead of ReLU
    waves: int = 0  # sine-cosine pairs beside each input
    knots: int = 0  # points of the normaliser's table; 0: standardise
    batch_size: int = 256
    lr: float = 3e-4  # of Adam, at first
    betas: tuple[float, float] = (0.9, 0.99)  # of Adam
    clip: float = 1.0  # limit of the gradient's norm
    ema_decay: Optional[float] = 0.995  # of weights, per 10 steps; None: 1 - 500 / steps
    rare_share: float = 0.0  # rare rows are repeated up to this share, and samples thinned
    guidance: float = 1.0  # weight of autoguidance; 1: none
    sampler: str = "dpmpp"
    sample_steps: int = 32
    sample_batch_size: Optional[int] = None
    eta: float = 0.0  # of dpmpp; 1: its SDE version
    terminals: str = "column"


# Ours, for few training steps
FAST = dict(width=256, depth=3, time_dim=None, gated=True, waves=3, knots=1_000, lr=2e-3)
FAST |= dict(ema_decay=None, rare_share=0.02, guidance=1.5, eta=1.0, terminals="classifier")
RECIPES = {"paper": Recipe(), "fast": Recipe(**FAST)}  # by --diffusion-recipe
WIDE = ("halfcheetah-medium-expert-v2", "hopper-medium-v2", "hopper-medium-expert-v2")
# Types of arguments with limits, which `check_args` checks. Other numbers may have any value.
Count = Annotated[int, lambda n: n >= 1]
NotNegativeInt = Annotated[int, lambda n: 0 <= n < 2**63]  # as torch's seeds
AtLeastTwo = Annotated[int, lambda n: n >= 2]
Positive = Annotated[float, lambda x: 0 < x < math.inf]
NotNegative = Annotated[float, lambda x: 0 <= x < math.inf]
Fraction = Annotated[float, lambda x: 0 <= x <= 1]


@dataclass
class DiffusionArgs:
    """Options of the diffusion model and its samples. `resolve` fills those that are None."""

    # Diffusion model
    diffusion_steps: Optional[Count] = None  # training steps (paper: 100,000)
    diffusion_recipe: Optional[Literal[tuple(RECIPES)]] = None  # ours, fast, if < 100,000 steps
    diffusion_width: Optional[Count] = None  # units per block (paper: 1024, some 2048; fast: 256)
    diffusion_depth: Optional[Count] = None  # blocks of the denoiser (paper: 6; fast: 3)
    diffusion_residual: bool = True  # residual blocks; without, a plain MLP (Table 10)
    diffusion_batch_size: Optional[Count] = None  # rows per step (256; paper, large data: 1024)
    diffusion_lr: Optional[Positive] = None  # falls to 0 along a cosine (paper: 3e-4; fast: 2e-3)
    diffusion_seed: NotNegativeInt = 0  # of the diffusion model and its samples
    checkpoint_every: Count = 5_000  # diffusion steps per checkpoint (not online)

    # Samples
    sample_steps: Optional[Count] = None  # noise levels (dpmpp: 32; sde: 128, as the paper)
    # dpmpp: DPM-Solver++(2M), stochastic in `fast`; sde: the paper's stochastic Heun
    sampler: Optional[Literal["dpmpp", "sde"]] = None
    num_samples: Optional[Count] = None  # rows to generate (paper: 5,000,000; online 1,000,000)
    sample_batch_size: Optional[Count] = None  # rows at a time (2,000; on a GPU 100,000)
    terminals: Optional[Literal["column", "classifier"]] = None  # d > 0.5, or by a tree (fast)


RECIPE_OPTIONS = {}  # those that set a field of the recipe, as diffusion_width sets width
for _option in DiffusionArgs.__dataclass_fields__:
    if hasattr(Recipe, _option.removeprefix("diffusion_")):
        RECIPE_OPTIONS[_option] = _option.removeprefix("diffusion_")


def fill(args, values):
    """Set arguments that are None, to values by their names."""
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def resolve(args, num_rows, dataset="", latents=False):
    """Fill the options that are None. dataset: its name; latents: whether rows are from pixels."""
    fill(args, dict(diffusion_steps=100_000, num_samples=5_000_000))
    if args.diffusion_recipe is None:
        args.diffusion_recipe = "paper" if args.diffusion_steps >= 100_000 else "fast"
    is_paper = args.diffusion_recipe == "paper"
    if is_paper and dataset in WIDE:  # Appendix B.2
        fill(args, dict(diffusion_width=2048))
    if is_paper and num_rows >= 800_000:  # official code (paper: 1M)
        fill(args, dict(diffusion_batch_size=1024))
    if latents and not is_paper:  # up to 207 columns
        fill(args, dict(diffusion_lr=1e-3, diffusion_width=512))
    if args.sampler == "sde":
        fill(args, dict(sample_steps=128))
    for option, field in RECIPE_OPTIONS.items():
        fill(args, {option: getattr(RECIPES[args.diffusion_recipe], field)})
    args.diffusion_residual &= RECIPES[args.diffusion_recipe].residual
    return args


def check_args(args):
    """Replace --device auto, ~ in paths, and relative paths of files, for a --resume elsewhere.
    RunError for a number that its type does not allow."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        if isinstance(value, str):
            value = os.path.expanduser(value)
            is_file = name.endswith("_path") and os.path.exists(value)  # not a dataset's name
            setattr(args, name, os.path.abspath(value) if is_file else value)
        for kind in (hint, *get_args(hint)):  # the type, or what Optional wraps
            limits = getattr(kind, "__metadata__", [])
            if value is not None and not all(allows(value) for allows in limits):
                raise RunError(f"--{name.replace('_', '-')} cannot be {value}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda needs a GPU, and PyTorch finds none")


# --- Denoiser and EDM ---


def geglu(x):
    """Gated GELU (Shazeer 2020): products, as in laws of motion. Halves the width."""
    x, gate = x.chunk(2, dim=1)
    return x * F.gelu(gate)


class Denoiser(nn.Module):
    """F_theta: a residual MLP over a row, told the noise level by random Fourier features (Table
    8), or a plain MLP (Table 10). Ours: gates; waves, which help with sharp edges."""

    def __init__(self, dim, width=1024, depth=6, residual=True, time_dim=128, gated=False, waves=0):
        super().__init__()
        self.residual = residual
        self.activation = geglu if gated else F.relu
        stream = 2 * width if gated else width
        self.register_buffer("frequencies", torch.randn(8))  # for 16 features
        self.register_buffer("waves", math.pi * 2.0 ** torch.arange(waves)[:, None])
        self.row_in = nn.Linear(dim * (1 + 2 * waves), time_dim)
        self.time_mlp = nn.Sequential(
            nn.Linear(17, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        self.hidden_in = nn.Linear(time_dim, stream)
        self.blocks = nn.ModuleList([nn.Linear(width, stream) for _ in range(depth)])
        self.out = nn.Linear(width, dim)

    def forward(self, x, c_noise):
        """x [batch, dim], c_noise [batch] or [1] -> [batch, dim]."""
        angle = 2 * math.pi * c_noise[:, None] * self.frequencies
        features = torch.cat([c_noise[:, None], angle.sin(), angle.cos()], dim=-1)
        if len(self.waves):  # damped as the noise in x damps their mean
            variance = torch.sigmoid(8 * c_noise)[:, None, None]  # sigma^2 / (sigma^2 + 1)
            damping = (-0.5 * self.waves**2 * variance).exp()
            phase = self.waves * x[:, None]
            sines = (damping * phase.sin()).flatten(1)
            cosines = (damping * phase.cos()).flatten(1)
            x = torch.cat([x, sines, cosines], dim=1)
        h = self.hidden_in(self.row_in(x) + self.time_mlp(features))
        for block in self.blocks:
            update = block(self.activation(h))
            h = update.add_(h) if self.residual else update  # Equation 3; in place is faster
        return self.out(self.activation(h))


class RowModel(nn.Module):
    """A generative model of rows, and their normaliser. A subclass needs `loss(x)`, the mean loss
    of normalised rows [batch, dim], and `sample(num_rows)`, new rows in raw units. `changes` are to
    the recipe, such as width=64."""

    def __init__(self, dim, recipe=Recipe(), **changes):
        super().__init__()
        self.recipe = replace(recipe, **changes)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.starts = torch.zeros(0)  # of the rows that it learned from: 1 for those of `starts`
        # A table of raw values, sorted, and what they become
        self.register_buffer("raw_knots", torch.zeros(dim, self.recipe.knots))
        self.register_buffer("knots", torch.zeros(dim, self.recipe.knots))

    def tenth_done(self):
        """Called after a tenth of the training."""

    def fit_normalizer(self, rows, raw_columns=()):
        """Standardise the columns of rows [num_rows, dim], except raw_columns. With knots, take 0.8
        of this and 0.2 of the rank, as a normal quantile. Then a value that many rows share becomes
        an interval, and what is unnormalised stays in the range of the rows."""
        raw = list(raw_columns)
        std, mean = torch.std_mean(rows, dim=0)
        self.std[:] = torch.where((0 < std) & (std < 1e-3), std, std + 1e-5)  # not 0
        self.mean[:] = mean
        self.std[raw] = 1.0
        self.mean[raw] = 0.0
        num_knots = self.recipe.knots
        if num_knots:
            ranks = np.linspace(0, len(rows) - 1, num_knots).round().astype(int)
            self.raw_knots[:] = torch.from_numpy(np.sort(rows.cpu().numpy(), axis=0)[ranks].T)
            centred = self.raw_knots - self.mean[:, None]
            quantiles = torch.special.ndtri((torch.arange(num_knots) + 0.5) / num_knots)
            self.knots[:] = 0.8 * centred / self.std[:, None] + 0.2 * quantiles.to(self.knots)
            self.knots[raw] = self.raw_knots[raw]

    def normalize(self, rows):
        if not self.recipe.knots:
            return (rows - self.mean) / self.std
        last = interpolate(rows, self.raw_knots, self.knots)
        first = -interpolate(-rows, -self.raw_knots.flip(1), -self.knots.flip(1))
        return first.lerp(last, torch.rand_like(rows))  # a random place where values are equal

    def unnormalize(self, x):
        if not self.recipe.knots:
            return x * self.std + self.mean
        return interpolate(x, self.knots, self.raw_knots)


def interpolate(x, xs, ys):
    """np.interp of each column of x [batch, dim], through its own points xs, ys [dim, K]."""
    columns = [np.interp(*points) for points in zip(x.T.cpu(), xs.cpu(), ys.cpu())]
    return torch.from_numpy(np.stack(columns, axis=1)).to(x)


class EDM(RowModel):
    """D_theta: the denoiser with Karras' preconditioning (their Table 1). Ours: `early`, the
    denoiser as it was early in the training, for the guidance."""

    P_MEAN = -1.2  # of ln(sigma) in training (Karras' Table 1)
    P_STD = 1.2
    GUIDED_BELOW = 0.3  # largest noise level with guidance

    def __init__(self, dim, recipe=Recipe(), **changes):
        super().__init__(dim, recipe, **changes)
        r = self.recipe
        sizes = dict(width=r.width, depth=r.depth, time_dim=r.time_dim or r.width)
        self.denoiser = Denoiser(dim, residual=r.residual, gated=r.gated, waves=r.waves, **sizes)
        self.early = None
        if r.guidance != 1:
            self.early = copy.deepcopy(self.denoiser).requires_grad_(False)

    def tenth_done(self):
        if self.early is not None:
            self.early.load_state_dict(self.denoiser.state_dict())

    def forward(self, x, sigma, denoiser=None):
        """The denoised estimate of x [batch, dim] with noise of level sigma, one or [batch]."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1)
        c_skip = 1 / (sigma**2 + 1)  # the 1 is sigma_data^2
        c_out = sigma / (sigma**2 + 1).sqrt()
        c_in = 1 / (sigma**2 + 1).sqrt()
        c_noise = sigma.log().flatten() / 4
        return c_skip * x + c_out * (denoiser or self.denoiser)(c_in * x, c_noise)

    def loss(self, x):
        """Weighted error of denoising, with a noise level for each row (Karras, Equation 8)."""
        sigma = (self.P_MEAN + self.P_STD * torch.randn(len(x), 1, device=x.device)).exp()
        noise = torch.randn_like(x)
        denoised = self(x + sigma * noise, sigma)
        weight = (sigma**2 + 1) / sigma**2
        return (weight * (denoised - x) ** 2).sum() / x.numel()

    def denoise(self, x, sigma):
        """`forward` with autoguidance (Karras et al. 2024): at low noise, away from the early
        estimate by (guidance - 1) * sigma at most, but within the knots."""
        denoised = self(x, sigma)
        if self.early is not None and sigma <= self.GUIDED_BELOW:
            change = denoised - self(x, sigma, self.early)
            denoised = denoised + (self.recipe.guidance - 1) * change.clamp(-sigma, sigma)
        if self.recipe.knots:
            denoised = denoised.clamp(self.knots[:, 0], self.knots[:, -1])
        return denoised

    def sample(self, num_rows):
        sigmas = karras_sigmas(self.recipe.sample_steps)
        x = sigmas[0].item() * torch.randn(num_rows, len(self.mean), device=self.mean.device)
        if self.recipe.sampler == "sde":
            return self.unnormalize(sample_sde(self.denoise, x, sigmas))
        return self.unnormalize(sample_dpmpp(self.denoise, x, sigmas, eta=self.recipe.eta))


# --- Samplers ---
# A sampler knows only `denoise(x, sigma)` of a model. x is sigmas[0] times unit noise.


def karras_sigmas(num_steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Karras' Equation 5: noise levels from sigma_max to sigma_min, then 0; float64 [N + 1]."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    first, last = (sigma ** (1 / rho) for sigma in (sigma_max, sigma_min))
    sigmas = (first + ramp * (last - first)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def sample_sde(denoise, x, sigmas, s_churn=80.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003):
    """The paper's sampler: Karras' Algorithm 2, stochastic Heun with the constants of Table 9. For
    N noise levels, 2N - 1 network calls."""
    sigmas = sigmas.tolist()
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        gamma = 0.0
        if s_tmin <= sigma <= s_tmax:
            gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * torch.randn_like(x)
        slope = (x - denoise(x, sigma_hat)) / sigma_hat
        x_next = x + (sigma_next - sigma_hat) * slope
        if sigma_next > 0:  # Heun's correction
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma_hat) * (slope + slope_next) / 2
        x = x_next
    return x


def sample_dpmpp(denoise, x, sigmas, eta=0.0, s_tmin=0.05, s_tmax=50.0):
    """DPM-Solver++(2M) (Cheng Lu et al. 2022, Algorithm 2), N network calls. With eta = 1 its SDE
    version between s_tmin and s_tmax, whose noise mends errors of earlier steps."""
    sigmas = sigmas.tolist()
    previous = None
    h_previous = None
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            return denoised
        h = math.log(sigma / sigma_next)
        target = denoised
        if previous is not None:  # linear extrapolation to the middle of the step
            target = denoised + (h / (2 * h_previous)) * (denoised - previous)
        eta_h = eta * h if s_tmin <= sigma <= s_tmax else 0.0
        x = (sigma_next / sigma) * math.exp(-eta_h) * x - math.expm1(-h - eta_h) * target
        if eta_h > 0:
            x = x + sigma_next * math.sqrt(-math.expm1(-2 * eta_h)) * torch.randn_like(x)
        previous = denoised
        h_previous = h
    return x


# --- Files and progress ---


class Bar(tqdm):
    """A progress bar. Where the output is no terminal, a line every half minute."""

    tty = sys.stderr is not None and sys.stderr.isatty()
    stop = None  # or what to say when a signal has ended the loop

    def __init__(self, *args, **kwargs):
        interval = 0.5 if self.tty else 30
        super().__init__(*args, mininterval=interval, maxinterval=30, **kwargs)

    def display(self, *args, **kwargs):
        with contextlib.suppress(OSError):  # its reader has gone
            if self.tty:
                return super().display(*args, **kwargs)
            print(self, file=sys.stderr, flush=True)

    def __iter__(self):
        for item in super().__iter__():
            yield item
            if Bar.stop:
                sys.exit(Bar.stop)


def on_signal(*words):
    """From now on, after Ctrl-C or SIGTERM a Bar ends its step, which may save, and exits. `words`
    of the command line go on with the run."""

    def stop(number, _):
        Bar.stop = f"stopped: go on with {shlex.join(['python', sys.argv[0], *words])}"
        signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def save_atomically(path, write):
    """Call `write(file)` on a temporary file, then rename it. RunError on a full disk."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides the first in the second
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.__context__ or error}") from None


def save_torch(path, state):
    """Write a dict of tensors and numbers."""
    save_atomically(path, lambda f: torch.save(state, f))


def save_npz(path, arrays):
    """Write a dict of arrays."""
    save_atomically(path, lambda f: np.savez(f, **arrays))


def load_torch(path, device="cpu"):
    """What `save_torch` wrote. RunError where the file cannot be read."""
    with errors_as(f"cannot read {path}, and if it is damaged, delete it"):
        saved = torch.load(path, map_location=device, weights_only=True)
    own = (torch.cuda if device == "cuda" else torch).get_rng_state()
    if isinstance(saved, dict) and len(saved.get("rng", own)) != len(own):
        saved["rng"] = own  # of another kind of device
    return saved


def open_alone(path):
    """A file, open to read and append bytes. RunError if another process has it open by this."""
    file = open(path, "ab+", buffering=0)
    file.seek(0)
    try:
        os.lockf(file.fileno(), os.F_TLOCK, 0)
    except BlockingIOError:
        raise RunError(f"{path} is in use by another process") from None
    except (AttributeError, OSError):  # Windows and some file systems have no locks
        pass
    return file


def save_edm(path, model):
    """Write a trained model to one file."""
    recipe = asdict(model.recipe)
    state = dict(dim=len(model.mean), recipe=recipe, starts=model.starts)
    save_torch(path, state | dict(state=model.state_dict()))


def load_edm(path, device="cpu", make=EDM):
    """The model in a file of `save_edm`, such as a run's diffusion.pt. make: its class."""
    saved = load_torch(path, device)
    model = make(saved["dim"], Recipe(**saved["recipe"])).to(device)
    model.load_state_dict(saved["state"])
    model.starts = saved["starts"]
    return model.requires_grad_(False).eval()


# --- Training and generation ---


# A decorator: after the function, torch's generators are as before.
own_randomness = torch.random.fork_rng(devices=[0] if torch.cuda.is_available() else [])


def cuda_graph(step, warmup=3):
    """A function that runs `step`, from call 4 on as a CUDA graph. Its tensors must stay."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    calls = itertools.count()

    def run():
        call = next(calls)
        if call == warmup:  # by now optimisers have allocated their memory
            with torch.cuda.graph(graph):  # records without running
                step()
        if call >= warmup:
            return graph.replay()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)

    return run


NO_RUN = SimpleNamespace(saved=dict(stage=""), log=lambda *_: None, save=lambda state: None)


@own_randomness
def train_edm(
    rows, args=DiffusionArgs(), *, make=EDM, starts=None, raw_columns=(), device="cpu", run=NO_RUN
):
    """Train a generative model on rows [num_rows, dim] in raw units (Table 8). Gives the model with
    average weights. RunError if the loss is not finite.

    make: the model's class, a RowModel, or another function of dim and recipe.
    starts: the mask of `episode_starts`, if few rows begin an episode: see `repeats`.
    raw_columns: columns that are not standardised, such as terminals.
    run: has log(step, values), save(state), and saved: a state to go on from, if its "stage" is
        "diffusion". RunError if it is of other options or data."""
    args = resolve(copy.copy(args), len(rows))
    steps = args.diffusion_steps
    changes = {field: getattr(args, option) for option, field in RECIPE_OPTIONS.items()}
    recipe = replace(RECIPES[args.diffusion_recipe], **changes)
    settings = asdict(recipe) | dict(steps=steps, seed=args.diffusion_seed)
    settings["rows"] = hashlib.sha256(rows.cpu().contiguous().numpy()).hexdigest()
    decay = max(1 - 500 / steps, 0.0) if recipe.ema_decay is None else recipe.ema_decay
    recipe = replace(recipe, ema_decay=decay, knots=min(recipe.knots, len(rows)))
    torch.manual_seed(args.diffusion_seed)
    model = make(rows.shape[1], recipe)
    model.starts = rows[:, 0].new_zeros(len(rows)) if starts is None else starts.float()
    rows = rows.repeat_interleave(repeats(rows, model.starts, recipe.rare_share), dim=0)
    model.fit_normalizer(rows, raw_columns)  # so rare rows have knots of their own
    x = model.to(device).normalize(rows.to(device))
    return run_training(model, x, args, settings, device, run)


def run_training(model, x, args, settings, device, run):
    """The steps of `train_edm`, on normalised rows x. run.saved must have the same settings."""
    recipe = model.recipe
    steps = args.diffusion_steps
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    params = [p for p in model.parameters() if p.requires_grad]
    weights = [p.detach() for p in params]
    average = [a for a, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    lr = torch.tensor(0.0, device=device)  # CUDA graphs read it anew
    on_gpu = device == "cuda"
    rng = torch.cuda if on_gpu else torch
    optimizer = torch.optim.Adam(params, lr, recipe.betas, fused=True, capturable=True)
    parts = dict(model=model, ema=ema, optimizer=optimizer)
    loss_sum = torch.zeros((), device=device)
    first = 0
    if run.saved["stage"] == "diffusion":
        if run.saved["settings"] != settings:
            raise RunError("the checkpoint is of other options or data: delete it")
        for name, part in parts.items():
            part.load_state_dict(run.saved[name])
        loss_sum.copy_(run.saved["loss_sum"])
        first = run.saved["step"]
        rng.set_rng_state(run.saved["rng"].cpu())
    optimizer.param_groups[0]["lr"] = lr  # load_state_dict has replaced the tensor

    def train_step():
        optimizer.zero_grad(set_to_none=on_gpu)  # on a CPU, fresh memory costs a tenth of the step
        batch = x[torch.randint(len(x), (recipe.batch_size,), device=device)]
        loss = model.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(params, recipe.clip)
        optimizer.step()
        loss_sum.add_(loss.detach())

    if on_gpu:
        train_step = cuda_graph(train_step)
    bar = Bar(range(first, steps), "diffusion", initial=first, total=steps)
    for step in bar:
        lr.fill_(0.5 * recipe.lr * (1 + math.cos(math.pi * step / steps)))  # to 0 (Table 8)
        train_step()
        if step % 10 == 0:  # the decay grows from 0, as in ema-pytorch
            decay = min(recipe.ema_decay, 1 - max(step - 99, 1) ** (-2 / 3))
            torch._foreach_lerp_(average, weights, 1 - decay)
        if step == steps // 10:
            model.tenth_done()
            ema.tenth_done()
        done = step + 1
        if done % 500 == 0 or done == steps:
            loss = loss_sum.item() / (done % 500 or 500)  # the only wait in training
            if not math.isfinite(loss):
                raise RunError(f"the diffusion loss became {loss} in the steps up to {done}")
            loss_sum.zero_()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            run.log(done, {"diffusion/loss": loss})
        if done % args.checkpoint_every == 0 or done == steps or bar.stop:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= dict(stage="diffusion", step=done, settings=settings, loss_sum=loss_sum)
            run.save(state | dict(rng=rng.get_rng_state()))
    for buffer, trained in zip(ema.buffers(), model.buffers()):
        buffer.copy_(trained)  # such as the statistics of batch norm
    return ema


@own_randomness
@torch.no_grad()
def generate(model, num_samples, seed=0, **changes):
    """Draw rows [num_samples, dim] in raw units from a trained model, to the CPU. `changes` are to
    the model's recipe, as sampler="sde", sample_steps=128."""
    model = copy.deepcopy(model).eval()
    model.recipe = replace(model.recipe, **changes)
    default = 100_000 if model.mean.is_cuda else 2_000
    batch_size = model.recipe.sample_batch_size or default
    torch.manual_seed(seed)
    rows = torch.empty(num_samples, len(model.mean))
    for part in Bar(rows.split(batch_size), f"sampling, {batch_size:,} rows at a time"):
        part.copy_(model.sample(len(part)))
    if not rows.sum().isfinite():
        raise RunError("generated rows hold NaN or Inf: the diffusion model has diverged")
    return rows


def generate_transitions(model, real, num_samples, seed=0, *, reward=None, **changes):
    """`generate` rows [s, a, r, s', d] like `real` [N, dim], which the model learned from. d is 0
    or 1. Ours, in `fast`: a decision tree, which finds limits of s' exactly, gives d, and r (column
    `reward`) if its values are few. Rare rows have their share in `real`."""
    recipe = replace(model.recipe, **changes)
    starts = model.starts if len(model.starts) == len(real) else real.new_zeros(len(real))
    times = repeats(real, starts, recipe.rare_share)
    surplus = 1.05 * times.double().mean().item() if times.max() > 1 else 1
    rows = generate(model, math.ceil(surplus * num_samples), seed, **changes)
    rows = F.pad(rows, (0, real.shape[1] - rows.shape[1]))  # the model may have no d
    rows[:, -1] = rows[:, -1] > 0.5
    if recipe.terminals == "classifier":
        targets = [real.shape[1] - 1]
        if reward is not None and len(real[:, reward].unique()) < min(100, len(real) / 10):
            targets.append(reward)
        inputs = [i for i in range(real.shape[1]) if i not in targets]
        rows[:, targets] = predict(rows[:, inputs], real[:, inputs], real[:, targets])
    return thin(rows, real, starts, times, num_samples) if recipe.rare_share else rows


# --- Rare rows and discrete columns ---


def clusters(real, x):
    """Compare values x [M] of a column with clusters of its real values [N]: each value, if they
    are few and repeat, else what wide gaps divide. Gives for each x the number of its cluster and
    the nearest value there, and each cluster's share [C] of real rows; 1 if there are over 20."""
    values, counts = np.unique(real, return_counts=True)
    low, high = np.quantile(values, [0.25, 0.75])
    widest = 0 if np.median(counts) >= 5 else 3 * (high - low)
    gaps = np.flatnonzero(np.diff(values) > widest)
    begins = np.append(0, gaps + 1)
    first = values[begins]
    last = values[np.append(gaps, -1)]
    number = np.searchsorted((last[:-1] + first[1:]) / 2, x)
    share = np.add.reduceat(counts, begins) / len(real)
    return number, x.clip(first[number], last[number]), share if len(gaps) < 20 else share**0


def repeats(rows, starts, share):
    """How often to train on each row [N], so that starts, and each rare cluster of a column, become
    `share` of them: at most 40 times, and all repeats are at most a tenth of the rows."""
    extra = np.zeros(len(rows))
    for x in torch.cat([rows, starts[:, None]], dim=1).numpy().T if share else []:
        number, _, shares = clusters(x, x)
        extra = np.maximum(extra, (share / shares - 1)[number])
    extra = extra.clip(0, 39)  # five rows of 10,000 were not copied
    extra *= min(1, 0.1 / max(extra.mean(), 1e-9))
    return torch.from_numpy(1 + extra.round().astype(int))


def predict(rows, real, labels, **options):
    """Labels [M, K] of rows [M, dim], by a decision tree grown on labels [N, K] of real rows."""
    from sklearn.tree import DecisionTreeClassifier  # here, as it takes seconds

    values, number = np.unique(labels.numpy(), axis=0, return_inverse=True)
    tree = DecisionTreeClassifier(random_state=0, **options).fit(real.numpy(), number.ravel())
    return torch.from_numpy(values[tree.predict(rows.numpy())])


def one_hot_groups(rows):
    """Slices of columns, of which in each row one is 1 and the others are 0."""
    is_binary = ((rows == 0) | (rows == 1)).all(0)
    total = F.pad((is_binary * rows).cumsum(1), (1, 0))
    groups = []
    for i, j in itertools.combinations(range(total.shape[1]), 2):
        if is_binary[i:j].all() and (total[:, j] - total[:, i] == 1).all():
            groups.append(slice(i, j))
    return groups


@own_randomness
def thin(rows, real, starts, times, num_samples):
    """num_samples of rows [M, dim]. Discrete columns get values of real rows [N, dim]. Rare
    clusters of a column, and states like the starts, get the share that they have there."""
    torch.manual_seed(0)
    both = torch.cat([real, rows])
    for group in one_hot_groups(real):
        both[:, group] = F.one_hot(both[:, group].argmax(1), group.stop - group.start).to(both)
    learned = real.repeat_interleave(times, dim=0)
    learned += 0.1 * real.std(0) * torch.randn_like(learned)  # as the model's errors
    starts = starts.repeat_interleave(times)[:, None]
    leaf = max(1, int(starts.sum()) // 32)
    kind = predict(both, learned, starts, class_weight="balanced", min_samples_leaf=leaf)
    kind = kind[:, 0].long().numpy()
    for x in both.numpy().T:
        number, x[:], share = clusters(x[: len(real)], x)
        if (share < 0.1).any():  # a number for each combination of rare clusters
            number[share[number] >= 0.1] = -1
            kind = np.unique(21 * kind + number, return_inverse=True)[1]
    share = np.bincount(kind[: len(real)], minlength=kind.max() + 1) / len(real)
    rows = both[len(real) :]
    kind = kind[len(real) :]
    is_over = np.zeros(len(rows), bool)
    for k, quota in enumerate((num_samples * share).round().astype(int)):
        is_over[np.flatnonzero(kind == k)[quota:]] = True
    order = np.lexsort([kind != share.argmax(), is_over])  # if a kind lacks rows, common ones
    return rows[np.sort(order[:num_samples])]


# --- Sample quality ---


def marginal(real, synthetic):
    """1 - Kolmogorov-Smirnov distance, the mean over columns (Table 1). 1 is perfect."""
    from scipy.stats import ks_2samp  # here, as it takes a second

    distances = [ks_2samp(x, y, method="asymp").statistic for x, y in zip(real.T, synthetic.T)]
    return 1 - float(np.mean(distances))


def correlation(real, synthetic):
    """1 - |rho_real - rho_synthetic| / 2, the mean over pairs of columns (Table 1). 1 is perfect.
    Columns that are constant in `real` are left out."""
    varies = (real != real[0]).any(0)
    pairs = torch.triu_indices(varies.sum(), varies.sum(), 1).unbind()
    rho_real = torch.corrcoef(real[:, varies].T).nan_to_num()[pairs]
    rho_synthetic = torch.corrcoef(synthetic[:, varies].T).nan_to_num()[pairs]
    return (1 - (rho_real - rho_synthetic).abs().double() / 2).mean().item()


def c2st(real, synthetic, max_rows=15_000):
    """Classifier two-sample test: the area under the ROC curve of boosted trees that tell generated
    rows from real ones; 0.5 if they cannot. NaN: too few rows."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    if min(len(real), len(synthetic)) < 9:
        return math.nan
    real = real[:max_rows]
    rows = np.concatenate([real, synthetic[:max_rows]])
    is_real = np.arange(len(rows)) < len(real)
    trees = HistGradientBoostingClassifier(max_iter=200, early_stopping=True, random_state=0)
    split = StratifiedShuffleSplit(1, test_size=1 / 3, random_state=0)
    return cross_val_score(trees, rows, is_real, scoring="roc_auc", cv=split).item()


@own_randomness
def quality_report(real, synthetic, *, reward=None, others=None):
    """How close generated rows [M, dim] are to real ones [N, dim]: a dict of numbers, printed.

    marginal, correlation, c2st: see there; the last without d. c2st_real: of real rows alone.
    detection: c2st in the unit of SDMetrics; 1 is perfect.
    nearest: median distance to a real row. Of copies it is far below nearest_real.
    membership: can one tell real rows from `others` [K, dim], which the model has not seen, by
        their distance to a generated row? Area under the ROC curve; 0.5 if not.
    invalid, terminals, reward, ...: share of rows with a value that no real row has, mean of d, of
        column `reward`, share of each rare cluster. What is off by twice its error is said."""
    from sklearn.metrics import roc_auc_score

    def some_of(rows, count):
        chosen = rows[torch.randperm(len(rows))[:count]]
        return (chosen - mean) / (std + 1e-5)

    torch.manual_seed(0)
    some = synthetic[:100_000]
    std, mean = torch.std_mean(real, dim=0)
    points = some_of(real, 50_000)
    new = some_of(some, 50_000)
    queries, rest = points.tensor_split([min(1_000, len(points) // 2)])
    report = {
        "marginal": marginal(real, some),
        "correlation": correlation(real, some),
        "c2st": c2st(points[:, :-1], new[:, :-1]),
        "c2st_real": c2st(*points[:, :-1].tensor_split(2)),
        "nearest": torch.cdist(new[:1_000], points).amin(1).median().item(),
        "nearest_real": torch.cdist(queries, rest).amin(1).median().item(),
    }
    report["detection"] = 2 - 2 * max(report["c2st"], 0.5)
    if others is not None and len(others) > 0:
        distance = torch.cdist(torch.cat([queries, some_of(others, 1_000)]), new).amin(1)
        report["membership"] = roc_auc_score(np.arange(len(distance)) < len(queries), -distance)
    both = torch.cat([real, some])
    values = {"terminals": both[:, -1] > 0.5, "invalid": torch.zeros(len(both), dtype=bool)}
    if reward is not None:
        values["reward"] = both[:, reward]
    for i, x in enumerate(both.numpy().T):
        number, nearest, share = clusters(x[: len(real)], x)
        values["invalid"] |= torch.from_numpy(x != nearest)
        for k in np.flatnonzero((share < 0.02) & (share * len(real) >= 5)):
            is_in = number == k
            values[f"column{i}={nearest[is_in].min():g}"] = torch.from_numpy(is_in)
    for name, x in values.items():
        real_x, new_x = x.double().tensor_split([len(real)])
        report |= {f"{name}_real": real_x.mean().item(), name: new_x.mean().item()}
        error = real_x.std().item() * math.sqrt(1 / len(real) + 1 / len(some))
        off = abs(new_x.mean() - real_x.mean())
        if off > max(2 * error, 0.02 * real_x.std()):
            print(f"{name} is off by {off:.3g}, more than twice its error, {error:.1g}")
    if report["marginal"] < 0.8:
        print("marginal < 0.8: poor samples")
    report = {key: round(value, 5) for key, value in report.items()}
    print("sample quality:", report)
    return report


def plot_marginals(path, real, synthetic, obs_dim, act_dim):
    """Histograms of real and generated columns (Figure 8) as a PNG; of more than 48, an even
    choice. Extra columns, between r and s', are named x."""
    sizes = dict(s=obs_dim, a=act_dim, r=1, x=real.shape[1] - 2 * obs_dim - act_dim - 2)
    names = []
    for name, size in (sizes | {"s'": obs_dim, "d": 1}).items():
        names += [f"{name}[{i}]" for i in range(size)]
    shown = np.unique(np.linspace(0, real.shape[1] - 1, 48).round().astype(int))
    fig = Figure(figsize=(16, 1 + 0.2 * len(shown)), layout="constrained")
    for i, ax in zip(shown, fig.subplots(math.ceil(len(shown) / 8), 8).flat):
        low, high = np.quantile(real[:100_000, i], [0.001, 0.999])
        bins = np.linspace(low - 1e-3, high + 1e-3, 60)
        for rows, color in ((real, "tab:orange"), (synthetic, "tab:blue")):
            values = rows[:100_000, i].clamp(low, high).numpy()
            ax.hist(values, bins, density=True, histtype="stepfilled", fc=color, alpha=0.6)
        ax.set(title=names[i], yticks=[])
    fig.suptitle("real (orange) and generated (blue)")
    save_atomically(path, lambda f: fig.savefig(f, format="png", dpi=80))


# --- Transitions and datasets ---

KEYS = ("observations", "actions", "rewards", "next_observations", "terminals")


def pack(observations, actions, rewards, next_observations, terminals):
    """The rows [s, a, r, s', d], float32 [N, dim], of arrays [N, obs_dim], [N, act_dim], [N],
    [N, obs_dim], [N]."""
    parts = (observations, actions, rewards, next_observations, terminals)
    return torch.cat([torch.as_tensor(x).reshape(len(x), -1).float() for x in parts], dim=1)


def split(rows, obs_dim, act_dim=None):
    """The parts s [N, obs_dim], a [N, act_dim], r [N], s' [N, obs_dim], d [N] of rows [N, dim]:
    write to them to change rows. Extra columns go between r and s', and need act_dim."""
    if act_dim is None:
        act_dim = rows.shape[1] - 2 * obs_dim - 2
    s = rows[:, :obs_dim]
    a = rows[:, obs_dim : obs_dim + act_dim]
    r = rows[:, obs_dim + act_dim]
    next_s = rows[:, -1 - obs_dim : -1]
    return s, a, r, next_s, rows[:, -1]


def unpack(rows, obs_dim, act_dim=None):
    """The arrays of rows [N, dim], a dict by D4RL's names. A terminal is a value above 0.5."""
    data = {key: x.cpu().numpy() for key, x in zip(KEYS, split(rows, obs_dim, act_dim))}
    data["terminals"] = data["terminals"] > 0.5
    return data


def episode_starts(rows, obs_dim):
    """Which rows begin an episode, a mask [N]: those where s is not the s' of the row before, or
    that row is terminal. Where the order is random, nearly all."""
    s, _, _, next_s, done = split(rows, obs_dim)
    follows = (s[1:] == next_s[:-1]).all(1) & (done[:-1] == 0)
    return torch.cat([follows.new_ones(1), ~follows])


# The replay buffer of `synther_sac_online.py --env HalfCheetah-v4 --algo sac --total-steps 40000`
BUNDLED = Path(__file__).parent / "tests/data/halfcheetah_sac.hdf5"
D4RL = {}  # name: folder/file
for _env in ("halfcheetah", "hopper", "walker2d"):
    for _level in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert"):
        D4RL[f"{_env}-{_level}-v2"] = f"gym_mujoco_v2/{_env}_{_level.replace('-', '_')}-v2.hdf5"
for _maze in ("umaze", "medium", "large"):
    D4RL[f"maze2d-{_maze}-v1"] = f"maze2d/maze2d-{_maze}-sparse-v1.hdf5"
_ANTMAZE = "ant_maze_v2/Ant_maze_{}_multigoal_False_sparse_fixed.hdf5"
D4RL["antmaze-umaze-v2"] = _ANTMAZE.format("u-maze_noisy_multistart_False")
D4RL["antmaze-medium-play-v2"] = _ANTMAZE.format("big-maze_noisy_multistart_True")
D4RL["antmaze-large-play-v2"] = _ANTMAZE.format("hardest-maze_noisy_multistart_True")
D4RL_ADDRESSES = (
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/{file}",  # not maze2d
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/{folder}/{file}",
)


def find_d4rl(name):
    """The path of a D4RL dataset in D4RL's own cache folder, downloaded if need be."""
    folder, file = D4RL[name].split("/")
    cache = os.environ.get("D4RL_DATASET_DIR", os.path.expanduser("~/.d4rl/datasets"))
    path = Path(cache, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    if path.exists():
        return path
    for address in D4RL_ADDRESSES:
        url = address.format(folder=folder, file=file)
        print(f"downloading {url}", file=sys.stderr)
        try:
            socket.setdefaulttimeout(60)  # seconds without an answer
            torch.hub.download_url_to_file(url, str(temporary))
            with h5py.File(temporary) as f:  # an error page or half a file fails here
                f["observations"]
            return temporary.replace(path)
        except Exception as error:  # such as no network
            print(f"failed: {error}", file=sys.stderr)
        finally:
            socket.setdefaulttimeout(None)
            temporary.unlink(missing_ok=True)
    ways = f"put it at {path}, give your own (for mazes: maze_data.py), or take `quickstart`"
    raise RunError(f"cannot download {name}: {ways}")


def qlearning_dataset(raw, true_next_obs=False, max_episode_steps=1000, own_next_obs=False):
    """Transitions (s, a, r, s', d) as `d4rl.qlearning_dataset` makes them of a D4RL file's arrays.
    s' is the next row's s. The last row, and those that end an episode by its time limit, are left
    out. Terminal rows have the next episode's first s; with true_next_obs, their own s'. With
    own_next_obs all others do: no change where rows are in order."""
    terminals = raw["terminals"].reshape(-1) > 0.5
    if "timeouts" in raw:
        timeouts = raw["timeouts"].reshape(-1) > 0.5
    else:
        timeouts = np.zeros(len(terminals), bool)
        step = 0
        for i, terminal in enumerate(terminals):
            timeouts[i] = step == max_episode_steps - 1
            step = 1 if terminal else step + 1  # as D4RL
            step = 0 if timeouts[i] else step
    keep = np.flatnonzero(~timeouts[:-1])
    data = {key: raw[key][keep] for key in KEYS[:3]}
    next_observations = raw["observations"][keep + 1]
    own = np.where(terminals[keep], true_next_obs, own_next_obs)
    if own.any():
        if "next_observations" not in raw:
            raise RunError("--true-next-obs needs `next_observations`, and this file has none")
        next_observations[own] = raw["next_observations"][keep[own]]
    return data | dict(next_observations=next_observations, terminals=terminals[keep])


def read_hdf5(path, true_next_obs, max_episode_steps):
    """The transitions of a file in D4RL's layout."""
    with h5py.File(path) as f:
        raw = read_arrays(f, KEYS[:3])
        episodes = np.split(raw["terminals"], np.flatnonzero(raw["terminals"]) + 1)
        is_known = "timeouts" in f and max(map(len, episodes)) <= max_episode_steps
    if not is_known and not raw["timeouts"].any():
        del raw["timeouts"]
        text = f"{path} has no `timeouts`: its episodes end after {max_episode_steps} rows at most"
        print(text, file=sys.stderr)
    return qlearning_dataset(raw, true_next_obs, max_episode_steps, "next_observations" in raw)


def read_minari(name):
    """The transitions of a Minari dataset, downloaded if need be."""
    import minari

    dataset = minari.load_dataset(name, download=True)
    if dataset.observation_space.shape is None:
        raise RunError(f"its observations are no arrays: {dataset.observation_space}")
    parts = []
    for episode in dataset:
        s = episode.observations
        parts.append((s[:-1], episode.actions, episode.rewards, s[1:], episode.terminations))
    return {key: np.concatenate(part) for key, part in zip(KEYS, zip(*parts))}


# `masks` are 0 in terminal rows. Neither they nor `is_terminal` mark time limits.
LIMITS = ("timeouts", "truncations", "truncateds", "truncated")
FLAGS = ("masks", "is_terminal", "terminals", "dones", *LIMITS, "episode_terminals")


def read_arrays(f, needed):
    """Arrays of an .npz, HDF5 file or dict: float32, those needed, and s' if there; bool [N],
    `terminals`, and `timeouts`: all other ends. RunError where these cannot be had."""
    limit = np.float64(1e18)
    data = {}
    for key in (*needed, *(key for key in ("next_observations", *FLAGS) if key in f)):
        x = f[key]
        for source in x.virtual_sources() if getattr(x, "is_virtual", False) else ():
            path = Path(x.file.filename).parent / source.file_name  # for its own file "."
            if not path.exists() and not os.path.exists(source.file_name):
                raise RunError(f"its {key} are in {path}, which is gone")
        x = np.asarray(x)
        if x.dtype.kind not in "fiub" or not ((x > -limit) & (x < limit)).all():
            raise RunError(f"{key} holds NaN, Inf or numbers beyond 1e18, or is not numeric")
        data[key] = x if key.endswith(("observations", "actions")) else x.reshape(-1)
    shapes = {key: x.shape for key, x in data.items()}
    states = shapes["observations"]
    is_flat = len(states) == len(shapes["actions"]) == 2 and 0 not in states + shapes["actions"]
    is_even = is_flat and all(shape[0] == states[0] for shape in shapes.values())
    if not is_even or shapes.get("next_observations", states) != states:
        raise RunError(f"arrays of these shapes are not one row per transition: {shapes}")
    flags = {key: (data.pop(key) > 0.5) ^ (key == "masks") for key in FLAGS if key in data}
    for key, x in data.items():
        check_digits(key, x)
        data[key] = x.astype(np.float32, copy=False)
    used = data["observations"].any(1) | data["actions"].any(1) | (data["rewards"] != 0)
    size = np.flatnonzero(used).max(initial=-1) + 1
    if len(used) - size > 1 and used.sum() >= 0.99 * size:  # such rows are at the end alone
        raise RunError(f"all rows from {size} on are zeros, as in a buffer not full: cut them off")
    name = next(iter(flags), "")
    limits = [flags[key] for key in LIMITS if key in flags and name in ("terminals", "dones")]
    if name not in FLAGS[:3] and not limits:
        raise RunError("it has no `terminals`, nor both `dones` and `timeouts`")
    terminals = flags[name] & ~np.any(limits, axis=0)
    timeouts = np.any(list(flags.values()), axis=0) & ~terminals
    if flags.keys() - {"terminals", "timeouts"}:
        print(f"{timeouts.sum()} ends are not terminal, by {', '.join(flags)}", file=sys.stderr)
    return data | dict(terminals=terminals, timeouts=timeouts)


def check_digits(key, x):
    """RunError where float32 cannot hold the changes of a column of x [N, dim] or [N] from row to
    row. Errors below 5e-7 do not count."""
    x = x[:100_000].astype(np.float64)
    changes = np.abs(np.diff(x, axis=0))
    errors = np.abs(x - x.astype(np.float32))[1:]
    is_changed = changes > 1e-14 * np.abs(x[1:])  # not by rounding
    is_lost = is_changed & (errors > np.maximum(0.01 * changes, 5e-7))
    for i in np.flatnonzero(is_lost.sum(0) > 0.5 * is_changed.sum(0)):
        raise RunError(f"float32 loses the changes in column {i} of {key}: subtract an offset")


def load_transitions(source, true_next_obs=False, max_episode_steps=1000, sizes=None):
    """Transitions from a dataset: a dict by KEYS of float32 arrays [N, obs_dim], [N, act_dim], [N],
    [N, obs_dim], and terminals [N], bool. RunError where these cannot be had.

    source: a D4RL name, a Minari id, `quickstart` (the bundled dataset), or a path that ends in
        .hdf5, .h5 (D4RL's layout, see `qlearning_dataset`) or .npz (arrays by KEYS).
    sizes: (obs_dim, act_dim) that the transitions must have. None: any."""
    source = str(source)
    name = source.replace("-mixed-", "-medium-replay-")  # D4RL's older name
    path = find_d4rl(name) if name in D4RL else Path(source)
    if name == "quickstart":
        path = BUNDLED
    is_id = "/" in source and source[0].isalnum() and source.rpartition("-v")[2].isdigit()
    with errors_as(f"cannot read {source}"):
        if path.suffix in (".hdf5", ".h5"):
            data = read_hdf5(path, true_next_obs, max_episode_steps)
        elif path.suffix == ".npz":
            with np.load(path) as f:
                data = read_arrays(f, KEYS[:4])
        elif is_id and not path.exists():
            data = read_arrays(read_minari(source), KEYS)
        else:
            known = f".hdf5, .h5 and .npz files, Minari ids, {', '.join(D4RL)}"
            raise RunError(f"it is unknown; known are {known}")
    found = data["observations"].shape[1:] + data["actions"].shape[1:]
    if sizes not in (None, found):
        raise RunError(f"{source} has {found} observation and action dimensions, not {sizes}")
    if len(data["rewards"]) < 2:
        raise RunError(f"{source} holds fewer than two transitions")
    return {key: data[key] for key in KEYS}


# --- Command line ---


@dataclass(kw_only=True)
class Args(DiffusionArgs):
    data: str  # a D4RL name, a Minari id, `quickstart`, .npz of transitions, or HDF5 as D4RL's
    out: str  # the .npz to write, with D4RL's keys; an existing file is not overwritten
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one


def main(args):
    """Train on args.data, write args.num_samples new transitions to args.out. Beside OUT.npz stay
    OUT.pt, the model, and OUT.png, histograms. OUT.checkpoint lets a stopped command go on."""
    check_args(args)
    out = Path(args.out)
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise RunError(f"--out must be an .npz file in an existing folder, not {out}")
    checkpoint = out.with_suffix(".checkpoint")
    run = copy.copy(NO_RUN)
    run.save = lambda state: save_torch(checkpoint, state)
    if checkpoint.exists():
        run.saved = load_torch(checkpoint, args.device)
    elif any(out.with_suffix(suffix).exists() for suffix in (".npz", ".pt", ".png")):
        raise RunError(f"{out}, its .pt or its .png exists; give another --out")
    data = load_transitions(args.data)
    sizes = (data["observations"].shape[1], data["actions"].shape[1])
    real = pack(**data)
    resolve(args, len(real), args.data)
    on_signal(*sys.argv[1:])
    own = open_alone(out.with_suffix(".lock"))
    options = dict(starts=episode_starts(real, sizes[0]), raw_columns=[-1], device=args.device)
    model = train_edm(real, args, run=run, **options)
    save_edm(out.with_suffix(".pt"), model)
    size = (args.num_samples, args.diffusion_seed)
    rows = generate_transitions(model, real, *size, reward=sum(sizes))
    save_npz(out, unpack(rows, *sizes))
    quality_report(real, rows, reward=sum(sizes))
    plot_marginals(out.with_suffix(".png"), real, rows, *sizes)
    checkpoint.unlink()
    os.unlink(own.name)
    print(f"{len(rows)} transitions in {out}")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args, description=__doc__))
    except (RunError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(2)
