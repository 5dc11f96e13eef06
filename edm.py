"""The diffusion model of Synthetic Experience Replay (SynthER, Lu et al., NeurIPS 2023), in one file.

An Elucidated Diffusion Model (EDM, Karras et al. 2022) learns the rows [s, a, r, s', d] of a replay buffer, and
generates as many new ones as an agent wants. The scripts import this file. It also works alone. Sections, tables and
figures are those of the SynthER paper; Karras is arXiv 2206.00364. From the shell:

    python edm.py --data my_transitions.npz --num-samples 1000000 --out synthetic.npz
    python edm.py --data walker2d-medium-replay-v2 --out synthetic.npz      # a D4RL name; or a Minari id

From Python, with any rows, a float32 tensor:

    model = edm.train_edm(rows)                                             # [num_rows, dim] -> EDM
    new_rows = edm.generate(model, 1_000_000)                               # [1_000_000, dim]
"""

import contextlib
import copy
import hashlib
import itertools
import math
import os
import signal
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, Optional

import h5py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

if not torch.cuda.is_available():
    # Let oneDNN multiply all float32 matrices in PyTorch: twice as fast on AMD with AVX-512. PyTorch uses it only if
    # rounding to bfloat16 is allowed. Most CPUs still do not round then. Intel's AMX does, so test it.
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    if (torch.full((512, 512), 1 + 2**-12) @ torch.ones(512, 512) != 512 * (1 + 2**-12)).any():
        torch.backends.mkldnn.matmul.fp32_precision = "none"

# --- Options ----------------------------------------------------------------------------------------------------------


class RunError(Exception):
    """The run cannot go on. The message is one sentence for the user; the scripts print it and exit with code 2."""


@dataclass
class DiffusionArgs:
    """Options of the diffusion model and its samples. The scripts' arguments inherit these."""

    diffusion_steps: Optional[int] = None  # training steps of the diffusion model (paper: 100,000)
    diffusion_recipe: Optional[Literal["paper", "fast"]] = None  # default: below 100,000 steps fast, which is ours
    diffusion_width: Optional[int] = None  # units per block (paper: 1024, three sets 2048; fast: 256, from pixels 512)
    diffusion_depth: Optional[int] = None  # blocks of the denoiser (paper: 6; fast: 3)
    diffusion_residual: bool = True  # residual blocks; without, a plain MLP (Table 10)
    diffusion_batch_size: Optional[int] = None  # rows per step (paper: 256, from 800,000 rows on 1024; fast: 256)
    diffusion_lr: Optional[float] = None  # falls along a cosine (paper: from 3e-4; fast: 2e-3, from pixels 1e-3)
    diffusion_seed: int = 0  # seed of the diffusion model and its samples
    sampler: Literal["dpmpp", "sde"] = "dpmpp"  # dpmpp: DPM-Solver++(2M); sde: the paper's stochastic Heun (Table 9)
    sample_steps: Optional[int] = None  # noise levels of the sampler (default: 32; with sde 128, the paper's)
    num_samples: Optional[int] = None  # transitions to generate (paper: 5,000,000; online 1,000,000)
    sample_batch_size: Optional[int] = None  # rows at a time (default: 2,000 on a CPU; on a GPU 100,000, as the paper)
    terminals: Optional[Literal["column", "classifier"]] = None  # column: d > 0.5 (paper); classifier: a tree's (fast)


RECIPES = {
    "paper": dict(diffusion_lr=3e-4, diffusion_width=1024, diffusion_depth=6, terminals="column"),  # Table 8
    "fast": dict(diffusion_lr=2e-3, diffusion_width=256, diffusion_depth=3, terminals="classifier"),  # ours
}
WIDE = ("halfcheetah-medium-expert-v2", "hopper-medium-v2", "hopper-medium-expert-v2")  # 2048 units, Appendix B.2


def fill(args, values):
    """Set the arguments that are None to these values, a dict by name."""
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def resolve(args, num_rows, dataset="", latents=False):
    """Fill the diffusion options that are None: by recipe, number of rows, name of the dataset, kind of rows."""
    fill(args, dict(diffusion_steps=100_000, num_samples=5_000_000))
    fill(args, dict(diffusion_recipe="paper" if args.diffusion_steps >= 100_000 else "fast"))
    if args.diffusion_recipe == "paper" and dataset in WIDE:
        fill(args, dict(diffusion_width=2048))
    if args.diffusion_recipe == "paper" and num_rows >= 800_000:  # the official code's limit; the paper says 1M
        fill(args, dict(diffusion_batch_size=1024))
    if args.diffusion_recipe == "fast" and latents:  # up to 207 columns; 256 units cannot keep them apart
        fill(args, dict(diffusion_lr=1e-3, diffusion_width=512))
    fill(args, RECIPES[args.diffusion_recipe])
    fill(args, dict(diffusion_batch_size=256, sample_steps=128 if args.sampler == "sde" else 32))
    return args


def check_args(args):
    """Raise RunError for a number out of range or a GPU that is not there. Replaces --device auto, and ~ in paths."""
    may_be_zero = "seed diffusion_seed eval_episodes synther_ratio policy_noise noise_clip alpha beta eta".split()
    for name, value in vars(args).items():
        if isinstance(value, str):
            setattr(args, name, os.path.expanduser(value))
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "target_entropy":
            high = 1 if name in ("synther_ratio", "discount", "tau", "expectile") else sys.float_info.max
            if not 0 <= value <= high or (value == 0 and name not in may_be_zero):
                raise RunError(f"--{name.replace('_', '-')} cannot be {value}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda needs a GPU, and PyTorch finds none")
    args.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if torch.get_num_threads() > 1 and hasattr(os, "getloadavg") and os.getloadavg()[0] > os.cpu_count() / 2:
        print("other work runs here: on a CPU, OMP_NUM_THREADS=1 may be several times faster", file=sys.stderr)


# --- Denoiser and EDM -------------------------------------------------------------------------------------------------


def geglu(x):
    """Gated GELU (Shazeer 2020): [batch, 2 * width] -> [batch, width]. Equations of motion are full of products."""
    x, gate = x.chunk(2, dim=1)
    return x * F.gelu(gate)


class Denoiser(nn.Module):
    """F_theta: a residual MLP over a row, told the noise level by random Fourier features (Appendix B.2, Table 8), or
    without `residual` a plain one (Table 10). time_dim is the size of the embeddings of row and noise level. Ours:
    `gated` units, and `waves` sines and cosines of each input, because without them it is too smooth for edges."""

    def __init__(self, dim, width=1024, depth=6, residual=True, time_dim=128, rff_dim=16, gated=False, waves=0):
        super().__init__()
        self.residual, self.activation, stream = residual, geglu if gated else F.relu, width * (1 + gated)
        self.register_buffer("frequencies", torch.randn(rff_dim // 2))  # drawn once; a sine and a cosine of each
        self.register_buffer("waves", math.pi * 2.0 ** torch.arange(waves)[:, None])
        self.row_in = nn.Linear(dim * (1 + 2 * waves), time_dim)
        self.time_mlp = nn.Sequential(nn.Linear(rff_dim + 1, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.hidden_in = nn.Linear(time_dim, stream)
        self.blocks = nn.ModuleList([nn.Linear(width, stream) for _ in range(depth)])
        self.out = nn.Linear(width, dim)

    def forward(self, x, c_noise):
        """x [batch, dim] -> [batch, dim]. c_noise is [batch], or [1] for one level for all rows."""
        angle = 2 * math.pi * c_noise[:, None] * self.frequencies
        embedding = self.time_mlp(torch.cat([c_noise[:, None], angle.sin(), angle.cos()], dim=-1))
        if len(self.waves):  # damped as noise blurs them: that in x has variance sigma^2 / (sigma^2 + 1)
            damping = (-0.5 * self.waves**2 * torch.sigmoid(8 * c_noise)[:, None, None]).exp()
            phase = self.waves * x[:, None]
            x = torch.cat([x, (damping * phase.sin()).flatten(1), (damping * phase.cos()).flatten(1)], dim=1)
        h = self.hidden_in(self.row_in(x) + embedding)
        for block in self.blocks:
            update = block(self.activation(h))
            h = update.add_(h) if self.residual else update  # Equation 3; in place, because fresh memory is slow
        return self.out(self.activation(h))


def interpolate(x, xs, ys):
    """np.interp for each column of x [batch, dim], through its own points (xs, ys), [dim, K] each."""
    columns = [torch.from_numpy(np.interp(*(v.cpu() for v in column))).to(x) for column in zip(x.T, xs, ys)]
    return torch.stack(columns, dim=1)


class EDM(nn.Module):
    """D_theta: the denoiser with Karras' preconditioning (their Table 1), its loss, and the normaliser of the rows.
    Ours: `guided` keeps a copy of the average denoiser as it was early in the training, and the normaliser is a table
    of `knots`, see `fit_normalizer`. The other arguments are the Denoiser's."""

    P_MEAN, P_STD = -1.2, 1.2  # training noise levels: ln(sigma) ~ N(P_mean, P_std^2), Karras' Table 1
    GUIDANCE, GUIDED_BELOW = 1.5, 0.3  # weight of the guidance, and the noise level up to which it acts

    def __init__(self, dim, guided=False, knots=0, **denoiser):
        super().__init__()
        self.config = dict(dim=dim, guided=guided, knots=knots, **denoiser)
        self.denoiser = Denoiser(dim, **denoiser)
        self.early = copy.deepcopy(self.denoiser) if guided else None
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.register_buffer("values", torch.zeros(dim, knots))  # raw values, from the least to the greatest, ...
        self.register_buffer("knots", torch.zeros(dim, knots))  # ... and what they are normalised to

    def fit_normalizer(self, rows, raw_columns=()):
        """Standardise the columns of rows [num_rows, dim], except the `raw_columns`. With knots, the result is 0.8
        times this plus 0.2 times the rank, as a normal quantile. A value that many rows share, such as a limit, becomes
        an interval where each row gets a random place, and what is unnormalised stays in the range of the rows."""
        raw, num_knots = list(raw_columns), self.knots.shape[1]
        std, mean = torch.std_mean(rows, dim=0)
        self.std[:], self.mean[:] = std + 1e-5, mean  # 1e-5: no column is divided by 0
        self.std[raw], self.mean[raw] = 1.0, 0.0
        if num_knots:
            ranks = np.linspace(0, len(rows) - 1, num_knots).round().astype(int)
            self.values[:] = torch.from_numpy(np.sort(rows.cpu().numpy(), axis=0)[ranks].T)
            quantiles = torch.special.ndtri((torch.arange(num_knots) + 0.5) / num_knots).to(self.knots)
            self.knots[:] = 0.8 * (self.values - self.mean[:, None]) / self.std[:, None] + 0.2 * quantiles
            self.knots[raw] = self.values[raw]

    def normalize(self, rows):
        if self.knots.numel() == 0:
            return (rows - self.mean) / self.std
        last = interpolate(rows, self.values, self.knots)
        first = -interpolate(-rows, -self.values.flip(1), -self.knots.flip(1))  # differs where values are equal
        return first.lerp(last, torch.rand_like(rows))

    def unnormalize(self, x):
        return interpolate(x, self.knots, self.values) if self.knots.numel() else x * self.std + self.mean

    def forward(self, x, sigma, denoiser=None):
        """The denoised estimate of normalised rows x [batch, dim] with noise of level sigma, a scalar or [batch]."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1)
        c_skip = 1 / (sigma**2 + 1)  # the 1 is sigma_data^2: the rows are standardised
        c_out = sigma / (sigma**2 + 1).sqrt()
        c_in = 1 / (sigma**2 + 1).sqrt()
        c_noise = sigma.log().flatten() / 4
        return c_skip * x + c_out * (denoiser or self.denoiser)(c_in * x, c_noise)

    def denoise(self, x, sigma):
        """What samplers call: `forward` for one noise level, with autoguidance (Karras et al. 2024) if the model has an
        early copy: at low noise the estimate moves away from that copy's by sigma / 2 at most, between the knots."""
        denoised = self(x, sigma)
        if self.early is not None and sigma <= self.GUIDED_BELOW:
            change = denoised - self(x, sigma, self.early)
            denoised = denoised + (self.GUIDANCE - 1) * change.clamp(-sigma, sigma)
        return denoised.clamp(self.knots[:, 0], self.knots[:, -1]) if self.knots.numel() else denoised

    def loss(self, x, part=slice(None)):
        """Weighted error of denoising normalised rows x [batch, dim], a noise level for each (Karras, Equation 8). With
        `part`, a slice, the share of these rows in it: the parts' losses add up to that of all, with the same noise."""
        sigma = (self.P_MEAN + self.P_STD * torch.randn(len(x), 1, device=x.device)).exp()[part]
        noise, clean = torch.randn_like(x)[part], x[part]
        denoised = self(clean + sigma * noise, sigma)
        weight = (sigma**2 + 1) / sigma**2
        return (weight * (denoised - clean) ** 2).sum() / x.numel()


# --- Samplers ---------------------------------------------------------------------------------------------------------
# `denoise(x, sigma)` is all that a sampler knows of a model. x is sigmas[0] times unit noise.


def karras_sigmas(num_steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """The noise levels of Karras' Equation 5, from sigma_max to sigma_min, then 0. Returns float64 [num_steps + 1]."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def sample_sde(denoise, x, sigmas, s_churn=80.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003):
    """The paper's sampler: Karras' Algorithm 2, stochastic Heun with the constants of Table 9. 2N - 1 network calls."""
    sigmas = sigmas.tolist()
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
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
    """DPM-Solver++(2M) (Cheng Lu et al. 2022, Algorithm 2): deterministic, second order, N network calls. With eta = 1
    its SDE version between s_tmin and s_tmax: new noise for old, which mends errors of earlier steps."""
    sigmas = sigmas.tolist()
    previous, h_previous = None, None
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        denoised = target = denoise(x, sigma)
        if sigma_next == 0:
            return denoised
        h = math.log(sigma / sigma_next)
        if previous is not None:  # linear extrapolation of the estimate to the middle of the step
            target = denoised + (h / (2 * h_previous)) * (denoised - previous)
        noise = eta * h if s_tmin <= sigma <= s_tmax else 0.0
        x = (sigma_next / sigma) * math.exp(-noise) * x - math.expm1(-h - noise) * target
        if noise > 0:
            x = x + sigma_next * math.sqrt(-math.expm1(-2 * noise)) * torch.randn_like(x)
        previous, h_previous = denoised, h
    return x


# --- Files and progress -----------------------------------------------------------------------------------------------


class Bar(tqdm):
    """A progress bar. Where the output is no terminal, a line every half minute. For `stop` see `on_signal`."""

    tty, stop = sys.stderr.isatty(), None
    display = tqdm.display if tty else lambda self, *_, **__: print(self, file=sys.stderr, flush=True)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, disable=rank > 0, mininterval=0.5 if self.tty else 30, maxinterval=30, **kwargs)

    def __iter__(self):
        for item in super().__iter__():
            yield item
            if Bar.stop:
                sys.exit(Bar.stop)


def on_signal(message):
    """From now on a Bar's loop ends at Ctrl-C or SIGTERM: it finishes its step, may save, exits with this message."""

    def stop(number, _):
        Bar.stop = message
        signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once

    signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)


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


def load_file(path, device="cpu"):
    """What torch.save wrote. RunError where the file cannot be read."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception:  # a damaged file fails in many ways
        raise RunError(f"cannot read {path}; if it is damaged, delete it, and it is made again") from None


def save_edm(path, model):
    """Write a trained model to one file, which `load_edm` opens."""
    save_atomically(path, lambda f: torch.save({"config": model.config, "state": model.state_dict()}, f))


def load_edm(path, device="cpu"):
    """The model in a file of `save_edm` (`diffusion.pt` of a run folder)."""
    saved = load_file(path, device)
    model = EDM(**saved["config"]).to(device)
    model.load_state_dict(saved["state"])
    return model.requires_grad_(False)


# --- Training and generation ------------------------------------------------------------------------------------------

rank, num_processes = 0, 1  # of this process under torchrun


def join_processes(device):
    """Under `torchrun` the first process returns and goes on with the script. The others stay here until it ends, and
    take their share of what it does: again and again, one `train_edm` and one `generate` with the same arguments."""
    global rank, num_processes
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=timedelta(days=30))  # so long may an agent learn between two models
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    while rank > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            dist.broadcast_object_list(given := [None, None, None])
        except RuntimeError:  # the first process has ended
            sys.exit()
        rows, args, options = given
        with contextlib.suppress(RunError):  # the first process has it, too
            generate(train_edm(rows, args, device=device, **options), args.num_samples, args)


# A decorator: torch's generators are seeded inside the function, and are afterwards as they were before it.
own_randomness = torch.random.fork_rng(devices=[0] if torch.cuda.is_available() else [])


def generator(device):
    """What draws torch's random numbers on a device, "cpu" or "cuda"."""
    return torch.cuda.default_generators[torch.cuda.current_device()] if device == "cuda" else torch.default_generator


def cuda_graph(step, warmup=3):
    """Record `step`, which reads and writes fixed tensors only, and replay it from then on, by one launch on the GPU.
    The first calls run as usual, so that optimisers and workspaces can allocate their memory."""
    graph, stream, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), itertools.count()

    def run():
        call = next(calls)
        if call == warmup:
            with torch.cuda.graph(graph):  # records without running
                step()
        if call >= warmup:
            return graph.replay()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)

    return run


@own_randomness
def train_edm(rows, args=DiffusionArgs(), *, starts=None, raw_columns=(), time_dim=128, init=None, device="cpu",
              saved=None, save=None, save_every=10_000, log=lambda *_: None):  # fmt: skip
    """Train a diffusion model on rows (Appendix B.2, Table 8) and return the moving average of its weights. RunError
    where the loss is not finite, or `saved` is of another configuration or other data.

    Args:
        rows: float32 [num_rows, dim], in raw units.
        starts: the mask of `episode_starts`. The fast recipe repeats the rows in it until they are 2% of all.
        raw_columns: columns that are not standardised, such as terminals.
        time_dim: see Denoiser; the fast recipe takes the width.
        init: a model of the same size, whose denoiser to start from.
        saved: a state that `save` got, to go on from, exactly; one of another stage is passed over.
        save: called with the state, a dict, every `save_every` steps and at the end.
        log: called with (step, {key: value}) every 500 steps."""
    if num_processes > 1 and rank == 0:
        options = dict(starts=starts, raw_columns=raw_columns, time_dim=time_dim, init=init, saved=saved)
        dist.broadcast_object_list([rows, args, options])
    args = resolve(copy.copy(args), len(rows))
    settings = {name: value for name, value in vars(args).items() if name.startswith("diffusion_")}
    settings["rows"] = hashlib.sha256(rows.cpu().contiguous().numpy()).hexdigest()
    steps, is_paper = args.diffusion_steps, args.diffusion_recipe == "paper"
    if starts is not None and not is_paper:  # each episode needs one; where they are rare, none are generated
        rows = torch.cat([rows] + [rows[starts]] * (round(0.02 * len(rows) / max(starts.sum().item(), 1)) - 1))
    beta = 0.995 if is_paper else max(1 - 500 / steps, 0.0)  # over the same share of the training
    torch.manual_seed(args.diffusion_seed)
    sizes = dict(width=args.diffusion_width, depth=args.diffusion_depth, residual=args.diffusion_residual)
    ours = dict(gated=True, waves=3, guided=True, time_dim=args.diffusion_width, knots=min(1_000, len(rows)))
    model = EDM(rows.shape[1], **sizes, **(dict(time_dim=time_dim) if is_paper else ours))
    if init is not None:
        model.denoiser.load_state_dict(init.denoiser.state_dict())
    model.fit_normalizer(rows, raw_columns)
    ema = copy.deepcopy(model.to(device)).requires_grad_(False)
    params, ema_params = list(model.denoiser.parameters()), list(ema.denoiser.parameters())
    lr = torch.tensor(0.0, device=device)  # a tensor, which a CUDA graph reads anew
    optimizer = torch.optim.Adam(params, lr, betas=(0.9, 0.99), fused=True, capturable=device == "cuda")
    x = model.normalize(rows.to(device))
    loss_sum, start = torch.zeros((), device=device), 0
    if saved and saved["stage"] == "diffusion":
        if saved["settings"] != settings:
            raise RunError("the checkpoint (checkpoint.pt or OUT.checkpoint) is of other options or data: delete it")
        for name, part in (("model", model), ("ema", ema), ("optimizer", optimizer)):
            part.load_state_dict(saved[name])
        start = saved["step"]
        loss_sum.copy_(saved["loss_sum"])
        generator(device).set_state(saved["rng"].cpu())
    optimizer.param_groups[0]["lr"] = lr  # load_state_dict has replaced the tensor

    def train_step():
        optimizer.zero_grad(set_to_none=device == "cuda")  # on a CPU, fresh memory costs a tenth of the step
        batch = x[torch.randint(len(x), (args.diffusion_batch_size,), device=device)]  # the same in all processes
        loss = model.loss(batch, slice(rank, None, num_processes))
        loss.backward()
        loss = loss.detach()
        if num_processes > 1:  # add up loss and gradients of the processes' parts
            sums = nn.utils.parameters_to_vector([loss, *(p.grad for p in params)])
            dist.all_reduce(sums)
            nn.utils.vector_to_parameters(sums, [loss, *(p.grad for p in params)])
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        loss_sum.add_(loss)

    train_step = cuda_graph(train_step) if device == "cuda" and num_processes == 1 else train_step
    bar = Bar(range(start, steps), "diffusion", initial=start, total=steps)
    for step in bar:
        lr.fill_(0.5 * args.diffusion_lr * (1 + math.cos(math.pi * step / steps)))  # annealed to 0 (Table 8)
        train_step()
        if step % 10 == 0:
            decay = min(beta, 1 - (step - 99) ** (-2 / 3)) if step > 100 else 0.0  # as in ema-pytorch
            torch._foreach_lerp_(ema_params, [p.detach() for p in params], 1 - decay)
        if step == steps // 10 and not is_paper:  # a tenth of the way: the early copy
            ema.early.load_state_dict(ema.denoiser.state_dict())
        done = step + 1
        if done % 500 == 0 or done == steps:
            loss = loss_sum.item() / (done % 500 or 500)  # the only wait in training
            if not math.isfinite(loss):
                raise RunError(f"the diffusion loss became {loss} in the {done % 500 or 500} steps up to {done}")
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            log(done, {"diffusion/loss": loss})
            loss_sum.zero_()
        if save and (done % save_every == 0 or done == steps or bar.stop):
            state = dict(stage="diffusion", settings=settings, step=done, loss_sum=loss_sum)
            state |= dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
            save(state | dict(rng=generator(device).get_state()))
    return ema


@own_randomness
@torch.no_grad()
def generate(model, num_samples, args=DiffusionArgs()):
    """Draw new rows from a trained model, on the device that it is on: float32 [num_samples, dim] on the CPU, in raw
    units. Those of the fast recipe are in the range of the data. RunError where one holds NaN."""
    device, args = model.mean.device, resolve(copy.copy(args), 0)
    batch_size = args.sample_batch_size or (100_000 if device.type == "cuda" else 2_000)
    sample = sample_sde if args.sampler == "sde" else lambda *x: sample_dpmpp(*x, eta=int(model.knots.numel() > 0))
    sigmas = karras_sigmas(args.sample_steps)
    torch.manual_seed(args.diffusion_seed)
    rows = torch.zeros(num_samples, len(model.mean))
    for i, part in enumerate(Bar(rows.split(batch_size), f"sampling, {batch_size:,} rows at a time")):
        mine = i % num_processes == rank
        denoise = model.denoise if mine else lambda x, sigma: x  # another process' part: draw its noise, no more
        x = sample(denoise, sigmas[0].item() * torch.randn(part.shape, device=device), sigmas)
        part.copy_(model.unnormalize(x) if mine else part)
    if num_processes > 1:
        dist.all_reduce(rows)  # the parts of others are 0
    if not rows.sum().isfinite():
        raise RunError("generated rows hold NaN or Inf: the diffusion model has diverged")
    return rows


def generate_transitions(model, real, args):
    """`generate` args.num_samples rows [s, a, r, s', d] like `real` [N, dim], with terminals 0 or 1; args as `resolve`
    fills them. The decision tree is ours: it finds limits of s' exactly, where the model misses most rare terminals."""
    rows = generate(model, args.num_samples, args)
    rows[:, -1] = rows[:, -1] > 0.5
    if args.terminals == "classifier":
        from sklearn.tree import DecisionTreeClassifier  # here, because it takes seconds

        tree = DecisionTreeClassifier(random_state=0).fit(real[:, :-1].numpy(), real[:, -1].numpy() > 0.5)
        rows[:, -1] = torch.from_numpy(tree.predict(rows[:, :-1].numpy()))
    return rows


# --- Sample quality ---------------------------------------------------------------------------------------------------


def marginal(real, synthetic):
    """Mean over the columns of 1 - Kolmogorov-Smirnov distance (Table 1; SDMetrics' KSComplement): 1 is perfect."""
    from scipy.stats import ks_2samp  # here, because it takes a second

    return 1 - float(np.mean([ks_2samp(x, y, method="asymp").statistic for x, y in zip(real.T, synthetic.T)]))


def correlation(real, synthetic):
    """Mean over the pairs of columns of 1 - |rho_real - rho_synthetic| / 2, rho Pearson's (Table 1): 1 is perfect.
    Columns constant in `real` are left out. One that is constant only in `synthetic` counts as uncorrelated."""
    real, synthetic = torch.as_tensor(real), torch.as_tensor(synthetic)
    varies = (real != real[0]).any(0)
    pairs = torch.triu_indices(varies.sum(), varies.sum(), 1).unbind()
    rho_real, rho_synthetic = (torch.corrcoef(rows[:, varies].T).nan_to_num()[pairs] for rows in (real, synthetic))
    return (1 - (rho_real - rho_synthetic).abs().double() / 2).mean().item()


def c2st(real, synthetic, max_rows=15_000):
    """Classifier two-sample test: the area under the ROC curve of gradient-boosted trees that tell generated rows from
    real ones, on a third of the first `max_rows`, which they have not seen. 0.5: they cannot; NaN: too few."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    if min(len(real), len(synthetic)) < 9:
        return math.nan
    rows = np.concatenate([real[:max_rows], synthetic[:max_rows]])
    is_real = np.arange(len(rows)) < min(len(real), max_rows)
    trees = HistGradientBoostingClassifier(max_iter=200, early_stopping=True, random_state=0)
    split = StratifiedShuffleSplit(1, test_size=1 / 3, random_state=0)
    return cross_val_score(trees, rows, is_real, scoring="roc_auc", cv=split).item()


@own_randomness
def quality_report(real, synthetic):
    """How close generated rows [M, dim] are to real ones [N, dim], in numbers. marginal and correlation (Table 1)
    are of at most 100,000 generated rows. terminals is the share of rows whose last column is above 0.5. nearest is the
    median distance, in standardised units, to the nearest real row: for copies it is far below nearest_real, that of
    real rows from one another. c2st leaves out the last column; c2st_real is that of real rows among themselves."""
    torch.manual_seed(0)
    some = synthetic[:100_000]
    std, mean = torch.std_mean(real, dim=0)
    chosen = real[torch.randperm(len(real))[:50_000]]
    points, new = ((rows - mean) / (std + 1e-5) for rows in (chosen, some))
    queries, others = points.tensor_split([min(1_000, len(points) // 2)])
    report = {
        "marginal": marginal(real, some),
        "correlation": correlation(real, some),
        "c2st": c2st(points[:, :-1], new[:, :-1]),
        "c2st_real": c2st(*points[:, :-1].tensor_split(2)),
        "terminals_real": (real[:, -1] > 0.5).double().mean().item(),
        "terminals": (some[:, -1] > 0.5).double().mean().item(),
        "nearest": torch.cdist(new[:1_000], points).amin(1).median().item(),
        "nearest_real": torch.cdist(queries, others).amin(1).median().item(),
    }
    return {key: round(value, 5) for key, value in report.items()}


def plot_marginals(path, real, synthetic, obs_dim, act_dim, max_panels=48):
    """Histograms of the columns of real and generated rows (Figure 8) as a PNG. Of many columns, an even choice."""
    sizes = {"s": obs_dim, "a": act_dim, "r": 1, "s'": obs_dim, "d": 1}
    names = [f"{name}[{i}]" for name, size in sizes.items() for i in range(size)]
    shown = np.unique(np.linspace(0, real.shape[1] - 1, max_panels).round().astype(int))
    fig = Figure(figsize=(16, 1 + 0.2 * len(shown)), layout="constrained")
    for i, ax in zip(shown, fig.subplots(math.ceil(len(shown) / 8), 8).flat):
        low, high = np.quantile(real[:100_000, i], [0.001, 0.999])
        for rows, color in ((real, "tab:orange"), (synthetic, "tab:blue")):
            values, bins = rows[:100_000, i].clamp(low, high).numpy(), np.linspace(low - 1e-3, high + 1e-3, 60)
            ax.hist(values, bins, density=True, histtype="stepfilled", fc=color, alpha=0.6)
        ax.set(title=names[i], yticks=[])
    fig.suptitle("real (orange) and generated (blue)")
    save_atomically(path, lambda f: fig.savefig(f, format="png", dpi=80))


# --- Transitions and datasets -----------------------------------------------------------------------------------------

KEYS = ("observations", "actions", "rewards", "next_observations", "terminals")


def pack(observations, actions, rewards, next_observations, terminals):
    """The rows [s, a, r, s', d], float32 [N, dim], of arrays [N, obs_dim], [N, act_dim], [N], [N, obs_dim], [N]."""
    columns = [torch.as_tensor(x) for x in (observations, actions, rewards, next_observations, terminals)]
    return torch.cat([x.reshape(len(x), -1).float() for x in columns], dim=1)


def unpack(rows, obs_dim, act_dim):
    """The arrays of rows [N, dim], a dict by D4RL's names. A terminal is a value above 0.5."""
    parts = rows.split([obs_dim, act_dim, 1, obs_dim, 1], dim=1)
    data = {key: part.cpu().numpy() for key, part in zip(KEYS, parts)}
    return data | {"rewards": data["rewards"][:, 0], "terminals": data["terminals"][:, 0] > 0.5}


def episode_starts(rows, obs_dim):
    """Which rows begin an episode, a mask [N] of rows [N, dim] in their order: those where s is not the s' of the row
    before, or that row is terminal. Where the rows are in random order, nearly every one is marked."""
    follows = (rows[1:, :obs_dim] == rows[:-1, -1 - obs_dim : -1]).all(1) & (rows[:-1, -1] == 0)
    return torch.cat([follows.new_ones(1), ~follows])


# The replay buffer of `synther_sac_online.py --env HalfCheetah-v4 --algo sac --total-steps 40000`
BUNDLED = Path(__file__).parent / "tests/data/halfcheetah_sac.hdf5"
D4RL = {f"maze2d-{maze}-v1": f"maze2d/maze2d-{maze}-sparse-v1.hdf5" for maze in ("umaze", "medium", "large")}
for _env in ("halfcheetah", "hopper", "walker2d"):
    for _level in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert"):
        D4RL[f"{_env}-{_level}-v2"] = f"gym_mujoco_v2/{_env}_{_level.replace('-', '_')}-v2.hdf5"
for _name, _maze in {"umaze": "u-maze", "medium-play": "big-maze", "large-play": "hardest-maze"}.items():
    _file = f"Ant_maze_{_maze}_noisy_multistart_{_maze != 'u-maze'}_multigoal_False_sparse_fixed.hdf5"
    D4RL[f"antmaze-{_name}-v2"] = f"ant_maze_v2/{_file}"
D4RL_ADDRESSES = (
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/{file}",  # locomotion and antmaze
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/{folder}/{file}",
)


def download_d4rl(name):
    """The path of a D4RL dataset in D4RL's own cache folder, downloaded first if it is not there. For the large AntMaze
    the file from before D4RL corrected the ends of its episodes is the last resort, and a line says so."""
    folder, file = D4RL[name].split("/")
    cache = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    files = [file, file.replace("_fixed", "")] if "hardest" in file else [file]
    for url in [address.format(folder=folder, file=f) for f in files for address in D4RL_ADDRESSES]:
        path = cache / url.split("/")[-1]
        temporary = cache / f"{path.name}.{os.getpid()}.tmp"
        if path.exists():
            return path
        print(f"downloading {url}", "" if path.name == file else "(episodes' ends not corrected)", file=sys.stderr)
        try:
            socket.setdefaulttimeout(60)  # seconds without an answer
            torch.hub.download_url_to_file(url, str(temporary))
            with h5py.File(temporary) as f:  # an error page or half a file fails here
                f["observations"]
            return temporary.replace(path)
        except Exception as error:  # no network, not found, broken off, ...
            print(f"failed: {error}", file=sys.stderr)
        finally:
            socket.setdefaulttimeout(None)
            temporary.unlink(missing_ok=True)
    raise RunError(f"cannot download {name}: put it at {cache / file}, take your own (maze_data.py) or `quickstart`")


def qlearning_dataset(raw, true_next_obs=False, max_episode_steps=1000):
    """Transitions (s, a, r, s', d) from the rows of a D4RL file, as `d4rl.qlearning_dataset` makes them: s' is the next
    row's s. The last row, and those that end an episode by its time limit, have none and are left out. In terminal rows
    s' is the next episode's first observation: Q-learning masks it, but the diffusion model learns it.

    `raw` is a dict of arrays [N, ...] by D4RL's names. Without `timeouts`, episodes are cut after `max_episode_steps`.
    With `true_next_obs`, terminal rows get the s' in `next_observations`; RunError if there are none."""
    terminals = raw["terminals"].reshape(-1) > 0.5
    if "timeouts" in raw:
        timeouts = raw["timeouts"].reshape(-1) > 0.5
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
    data = {key: raw[key][keep] for key in ("observations", "actions", "rewards")}
    return data | {"next_observations": next_observations, "terminals": terminals[keep]}


def load_transitions(source, true_next_obs=False, max_episode_steps=1000, sizes=None):
    """Transitions from any of the datasets that the scripts know.

    Args:
        source: a D4RL name (walker2d-medium-replay-v2), a path that ends in .hdf5, .h5 (D4RL's layout) or .npz
            (transitions), a Minari id (mujoco/hopper/medium-v0), or `quickstart`, the bundled dataset.
        true_next_obs, max_episode_steps: for HDF5, see `qlearning_dataset`. Rows that go on have the file's s', if any.
        sizes: (obs_dim, act_dim) that the transitions must have; any, if None.

    Returns: dict by KEYS of float32 arrays [N, obs_dim], [N, act_dim], [N], [N, obs_dim], and terminals [N], bool.
    RunError where the source is unknown, missing, unreadable, or not a set of finite transitions."""
    source, name = str(source), str(source).replace("-mixed-", "-medium-replay-")  # D4RL's older name
    path = BUNDLED if name == "quickstart" else download_d4rl(name) if name in D4RL else Path(source)
    is_hdf5 = path.suffix in (".hdf5", ".h5")
    if not is_hdf5 and path.suffix != ".npz" and "/" not in source:
        raise RunError(f"unknown dataset {source}; known are .hdf5, .h5 and .npz files, Minari ids, {', '.join(D4RL)}")
    try:
        if is_hdf5:
            with h5py.File(path) as f:
                data = {key: f[key][:] for key in [*KEYS[:3], "terminals", *{"timeouts", "next_observations"} & set(f)]}
                others = {"truncations", "truncateds", "episode_terminals", "dones"} & set(f)
                for key in others if "timeouts" not in f else ():
                    ends = (f[key][:].reshape(-1) > 0.5) & (data["terminals"].reshape(-1) <= 0.5)
                    print(f"{source} has no `timeouts`; {ends.sum()} ends are taken from `{key}`", file=sys.stderr)
                    data |= {"timeouts": ends} if ends.any() else {}
        elif path.suffix == ".npz":
            with np.load(path) as f:
                data = {key: f[key] for key in KEYS}
        else:
            import minari

            episodes = minari.load_dataset(source, download=True)
            if episodes.observation_space.shape is None:
                raise ValueError(f"its observations are no arrays: {episodes.observation_space}")
            parts = [(e.observations[:-1], e.actions, e.rewards, e.observations[1:], e.terminations) for e in episodes]
            data = dict(zip(KEYS, map(np.concatenate, zip(*parts))))
    except Exception as error:  # each format fails in its own way: truncated, another format, a missing key, no network
        raise RunError(f"cannot read {source}: {' '.join(str(error).split())}") from None
    data |= {key: data[key].reshape(-1) for key in ("rewards", "terminals", "timeouts") if key in data}
    for key, x in data.items():
        if x.ndim == 0 or x.dtype.kind not in "fiub" or not (np.abs(x) < np.float64(1e18)).all():
            raise RunError(f"{source}: {key} holds NaN, Inf or numbers beyond 1e18, or is not numeric")
    shapes = {key: x.shape for key, x in data.items()}
    is_whole = len({shape[0] for shape in shapes.values()}) == 1 and [len(shapes[k]) for k in KEYS[:2]] == [2, 2]
    if not is_whole or shapes.get("next_observations", shapes["observations"]) != shapes["observations"]:
        raise RunError(f"{source}: arrays of these shapes are not one row per transition: {shapes}")
    found = shapes["observations"][1:] + shapes["actions"][1:]
    if sizes not in (None, found):
        raise RunError(f"{source} has {found} observation and action dimensions, not {sizes}")
    data = {key: x.astype(np.float32, copy=False) for key, x in data.items()}
    if is_hdf5 and "timeouts" not in data:
        print(f"{source} has no `timeouts`: its episodes end after {max_episode_steps} rows at most", file=sys.stderr)
    if is_hdf5:
        raw, data = data, qlearning_dataset(data, true_next_obs, max_episode_steps)
        if "next_observations" in raw:  # the same where rows are in order; where they are not, the file is right
            own = qlearning_dataset(raw | {"observations": raw["next_observations"]}, true_next_obs, max_episode_steps)
            data["next_observations"][~data["terminals"]] = own["observations"][~data["terminals"]]
    if len(data["rewards"]) < 2:
        raise RunError(f"{source} holds fewer than two transitions")
    return data | {"terminals": data["terminals"] > 0.5}


# --- Command line -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Args(DiffusionArgs):
    data: str  # a D4RL name, an .hdf5 in D4RL's layout, an .npz of transitions, a Minari id, or `quickstart`
    out: str  # the .npz to write, with D4RL's keys; an existing file is not overwritten
    true_next_obs: bool = False  # s' of terminal rows is the file's, not the next row's as in D4RL
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU if there is one


def main(args):
    """Train on args.data, write args.num_samples generated transitions to args.out, print the quality report. Beside
    OUT.npz stay OUT.pt, the model, and OUT.png, its histograms. OUT.checkpoint lets a stopped command go on."""
    check_args(args)
    join_processes(args.device)
    out = Path(args.out)
    model_path, plot_path, checkpoint = (out.with_suffix(suffix) for suffix in (".pt", ".png", ".checkpoint"))
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise RunError(f"--out must be an .npz file in an existing folder, not {out}")
    if not checkpoint.exists() and (taken := [str(p) for p in (out, model_path, plot_path) if p.exists()]):
        raise RunError(f"{taken[0]} exists; give another --out or move it away")
    data = load_transitions(args.data, args.true_next_obs)
    obs_dim, act_dim = data["observations"].shape[1], data["actions"].shape[1]
    real = pack(**data)
    resolve(args, len(real), args.data)
    on_signal("stopped: the same command goes on")
    saved = load_file(checkpoint, args.device) if checkpoint.exists() else None
    saving = dict(saved=saved, save=lambda state: save_atomically(checkpoint, lambda f: torch.save(state, f)))
    model = train_edm(real, args, starts=episode_starts(real, obs_dim), raw_columns=[-1], device=args.device, **saving)
    rows = generate_transitions(model, real, args)
    print("sample quality:", quality_report(real, rows))
    plot_marginals(plot_path, real, rows, obs_dim, act_dim)
    save_edm(model_path, model)
    save_atomically(out, lambda f: np.savez(f, **unpack(rows, obs_dim, act_dim)))
    checkpoint.unlink()
    print(f"{len(rows)} transitions in {out}, the model in {model_path}")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args, description=__doc__))
    except (RunError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(2)
