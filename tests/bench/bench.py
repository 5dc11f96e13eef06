"""Speed of training, sampling and agent updates on this machine, beside plain references and the matmul limit.

    python tests/bench/bench.py                      # about 5 minutes on a 2-core CPU
    python tests/bench/bench.py --quick              # about 2 minutes, less exact
    python tests/bench/bench.py --memory             # peak memory of a 5M-row experiment, or of --memory ROWS
    python tests/bench/bench.py --image-memory       # peak memory of the pixel script with 100,000 images

Each figure is measured on the code that users run. Beside it stand `plain`, the same arithmetic as the public codes
write it (SynthER, CORL, REDQ, V-D4RL), run eagerly, and `matmul`, the time that the matrix multiplies and convolutions
of our code take alone. The three take turns, so that other load on the machine meets all of them. The table shows
medians over the turns, and the median of the ratios within a turn.

Tried on a CPU and not taken: nn.ReLU in place in the actors (no gain), gradients that keep their memory in the agents
(no gain; in the diffusion model a tenth), one all-reduce for each tensor under torchrun (half as fast as for all
together), fewer threads where other work runs (they would change the agents' results in the last digits).
"""

import argparse
import copy
import ctypes
import importlib
import math
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial, partialmethod
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

PLAIN_PRECISION = torch.backends.mkldnn.matmul.fp32_precision  # PyTorch's own, which edm may change
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import edm  # noqa: E402

OUR_PRECISION = torch.backends.mkldnn.matmul.fp32_precision
edm.Bar.__init__ = partialmethod(tqdm.__init__, disable=True)  # no progress bars among the figures
warnings.filterwarnings("ignore", ".*Overriding environment")  # each script registers its mazes
OBS_DIM, ACT_DIM, DIM = 17, 6, 42  # Walker2d and HalfCheetah
PAIR, BATCH = OBS_DIM + ACT_DIM, 256
SIZES = [OBS_DIM, ACT_DIM, 1, OBS_DIM, 1]  # the columns of a row [s, a, r, s', d]

# --- Clock and limit --------------------------------------------------------------------------------------------------


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_per_call(function, count, precision=OUR_PRECISION):
    """Time function(0), ..., function(count - 1) together."""
    torch.backends.mkldnn.matmul.fp32_precision = precision
    start = clock()
    for i in range(count):
        function(i)
    seconds = (clock() - start) / count
    torch.backends.mkldnn.matmul.fp32_precision = OUR_PRECISION
    return seconds


def take_turns(ours, limit, plain, count, repeats, units=(1, 1, 1)):
    """Time three functions one after the other, `repeats` times after a first turn that does not count.

    Returns: [repeats] of (ours, limit, plain), seconds per unit; `units` are how many of these a call does.
    """
    functions = (ours, OUR_PRECISION), (limit, OUR_PRECISION), (plain, PLAIN_PRECISION)
    turns = [
        [seconds_per_call(f, count, precision) for f, precision in functions]
        for _ in range(repeats + 1)
    ]
    return [[seconds / unit for seconds, unit in zip(turn, units)] for turn in turns[1:]]


def multiplies_of(step, device):
    """A function that does the matrix multiplies and convolutions of a step again, and nothing else."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result, packet = operator(*args, **(kwargs or {})), operator.overloadpacket
            if packet.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
                calls.append((packet.out, args, {"out": torch.empty_like(result)}))
            elif packet.__name__ in ("convolution", "convolution_backward"):
                calls.append((operator, args, {}))
            return result

    with Record():
        step()

    @torch.no_grad()
    def run():
        for operator, args, kwargs in calls:
            operator(*args, **kwargs)

    return edm.cuda_graph(run) if device == "cuda" else run


def ours_and_limit(device, update, *steps):
    """Two functions of i: update(i, *steps) with the steps as the scripts run them, and with their multiplies alone."""
    multiplies = [multiplies_of(step, device) for step in steps]
    steps = [edm.cuda_graph(step) for step in steps] if device == "cuda" else steps
    return lambda i: update(i, *steps), lambda i: update(i, *multiplies)


# --- Plain references -------------------------------------------------------------------------------------------------


def mlp(*sizes):
    layers = [layer for pair in zip(sizes, sizes[1:]) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def adam(*parts):
    return torch.optim.Adam(
        [p for x in parts for p in (x.parameters() if isinstance(x, nn.Module) else [x])], lr=3e-4
    )


def descend(loss, *optimizers):
    """One step. The value of the loss goes to the log at every update, as in the public codes."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def follow(targets, networks, tau=0.005):
    for slow, fast in zip(targets.parameters(), networks.parameters()):
        slow.data.copy_(tau * fast.data + (1 - tau) * slow.data)


def values(critics, observations, actions):
    return [critic(torch.cat([observations, actions], 1)) for critic in critics]


def draw(parts, size=BATCH):
    """A batch as CORL's buffer draws it: an array for each part of a transition, indices from numpy."""
    index = np.random.randint(0, len(parts[0]), size=size)
    return [part[index] for part in parts]


class PlainEDM(nn.Module):
    """The diffusion model with one noise level per row throughout, in sampling too."""

    def __init__(self):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(8), requires_grad=False)
        self.project, self.first, self.last = (
            nn.Linear(DIM, 128),
            nn.Linear(128, 1024),
            nn.Linear(1024, DIM),
        )
        self.time_mlp = nn.Sequential(nn.Linear(17, 128), nn.SiLU(), nn.Linear(128, 128))
        self.blocks = nn.ModuleList([nn.Linear(1024, 1024) for _ in range(6)])

    def denoise(self, x, sigma):
        sigma = torch.as_tensor(sigma, device=x.device).expand(len(x))[:, None]
        time = torch.log(sigma.clamp(min=1e-20)) * 0.25
        angles = time * self.frequencies[None, :] * 2 * math.pi
        embedding = self.time_mlp(torch.cat([time, angles.sin(), angles.cos()], dim=-1))
        h = self.first(self.project((sigma**2 + 1) ** -0.5 * x) + embedding)
        for block in self.blocks:
            h = h + block(F.relu(h))
        return x / (sigma**2 + 1) + sigma * (sigma**2 + 1) ** -0.5 * self.last(F.relu(h))

    def loss(self, x):
        sigma = (-1.2 + 1.2 * torch.randn((x.shape[0],), device=x.device)).exp()
        denoised = self.denoise(x + sigma[:, None] * torch.randn_like(x), sigma)
        losses = F.mse_loss(denoised, x, reduction="none").mean(dim=1)
        return (losses * (sigma**2 + 1) * sigma**-2).mean()


def plain_training(data, device):
    """A step of training: rows come from the host, the loss goes to a log."""
    model = PlainEDM().to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=3e-4, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100_000)

    def step(i):
        loss = model.loss(data[torch.randint(len(data), (BATCH,))].to(device))
        loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if i % 10 == 0:
            for slow, fast in zip(average.parameters(), model.parameters()):
                slow.lerp_(fast.detach(), 0.005)
        schedule.step()

    return step


def plain_td3bc(parts, device):
    """An update: three networks with an optimiser each."""
    actor = nn.Sequential(mlp(OBS_DIM, 256, 256, ACT_DIM), nn.Tanh()).to(device)
    critics = nn.ModuleList([mlp(PAIR, 256, 256, 1) for _ in range(2)]).to(device)
    actor_target, targets = copy.deepcopy((actor, critics))
    actor_optimizer, critic_optimizers = adam(actor), [adam(critic) for critic in critics]

    def update(i):
        observations, actions, rewards, next_observations, terminals = draw(parts)
        with torch.no_grad():
            noise = (torch.randn_like(actions) * 0.2).clamp(-0.5, 0.5)
            next_actions = (actor_target(next_observations) + noise).clamp(-1.0, 1.0)
            y = rewards + (1 - terminals) * 0.99 * torch.min(
                *values(targets, next_observations, next_actions)
            )
        descend(
            sum(F.mse_loss(q, y) for q in values(critics, observations, actions)),
            *critic_optimizers,
        )
        if i % 2 == 1:
            policy_actions = actor(observations)
            (q,) = values(critics[:1], observations, policy_actions)
            descend(
                -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(policy_actions, actions),
                actor_optimizer,
            )
            follow(targets, critics)
            follow(actor_target, actor)

    return update


def plain_iql(parts, device):
    """An update: four networks, three optimisers, a distribution object."""
    value, mean = mlp(OBS_DIM, 256, 256, 1).to(device), mlp(OBS_DIM, 256, 256, ACT_DIM).to(device)
    critics = nn.ModuleList([mlp(PAIR, 256, 256, 1) for _ in range(2)]).to(device)
    targets = copy.deepcopy(critics)
    log_std = nn.Parameter(torch.zeros(ACT_DIM, device=device))
    value_optimizer, critic_optimizer, actor_optimizer = (
        adam(value),
        adam(critics),
        adam(mean, log_std),
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(actor_optimizer, 1_000_000)

    def update(i):
        observations, actions, rewards, next_observations, terminals = draw(parts)
        with torch.no_grad():
            y = rewards + (1 - terminals) * 0.99 * value(next_observations)
            target_q = torch.min(*values(targets, observations, actions))
        advantage = target_q - value(observations)
        descend(
            torch.mean(torch.abs(0.7 - (advantage < 0).float()) * advantage**2), value_optimizer
        )
        descend(
            sum(F.mse_loss(q, y) for q in values(critics, observations, actions)) / 2,
            critic_optimizer,
        )
        follow(targets, critics)
        weight = torch.exp(3.0 * advantage.detach()).clamp(max=100.0).squeeze(-1)
        scale = torch.diag(torch.exp(log_std.clamp(-5.0, 2.0)))
        policy = torch.distributions.MultivariateNormal(mean(observations), scale_tril=scale)
        descend(torch.mean(weight * -policy.log_prob(actions)), actor_optimizer)
        schedule.step()

    return update


class PlainPolicy(nn.Module):
    def __init__(self, *hidden):
        super().__init__()
        self.hidden = nn.Sequential(mlp(OBS_DIM, *hidden), nn.ReLU())
        self.mean, self.log_std = nn.Linear(256, ACT_DIM), nn.Linear(256, ACT_DIM)

    def forward(self, observations):
        h = self.hidden(observations)
        normal = torch.distributions.Normal(
            self.mean(h), torch.exp(torch.clamp(self.log_std(h), -20, 2))
        )
        raw = normal.rsample()
        actions = torch.tanh(raw)
        log_density = normal.log_prob(raw) - torch.log(1 - actions.pow(2) + 1e-6)
        return actions, log_density.sum(1, keepdim=True)


class PlainEnsemble(nn.Module):
    """Ten critics, as CORL's EDAC has them."""

    def __init__(self):
        super().__init__()
        sizes = [PAIR, 256, 256, 256, 1]
        self.weights = nn.ParameterList(
            torch.randn(10, i, o) / math.sqrt(i) for i, o in zip(sizes, sizes[1:])
        )
        self.biases = nn.ParameterList(torch.zeros(10, 1, o) for o in sizes[1:])

    def forward(self, observations, actions):
        x = torch.cat([observations, actions], dim=-1)
        if x.dim() == 2:
            x = x.unsqueeze(0).repeat_interleave(10, dim=0)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = (torch.relu(x) if i else x) @ weight + bias
        return x.squeeze(-1)


def plain_edac(parts, device):
    """An update: autograd of the gradients by the actions, an inner product for each pair of critics."""
    actor, critic = PlainPolicy(256, 256, 256).to(device), PlainEnsemble().to(device)
    target = copy.deepcopy(critic)
    log_alpha = torch.zeros(1, device=device, requires_grad=True)
    actor_optimizer, critic_optimizer, alpha_optimizer = adam(actor), adam(critic), adam(log_alpha)

    def update(i):
        observations, actions, rewards, next_observations, terminals = draw(parts)
        descend((-log_alpha * (actor(observations)[1].detach() - ACT_DIM)).mean(), alpha_optimizer)
        alpha = log_alpha.exp().detach()
        policy_actions, log_density = actor(observations)
        q = critic(observations, policy_actions).min(0).values.unsqueeze(-1)
        descend((alpha * log_density - q).mean(), actor_optimizer)
        with torch.no_grad():
            next_actions, next_log_density = actor(next_observations)
            next_q = (
                target(next_observations, next_actions).min(0).values.unsqueeze(-1)
                - alpha * next_log_density
            )
            y = rewards + 0.99 * (1 - terminals) * next_q
        critic_loss = ((critic(observations, actions) - y.view(1, -1)) ** 2).mean(dim=1).sum(dim=0)
        many_actions = actions.unsqueeze(0).repeat_interleave(10, dim=0).requires_grad_(True)
        many_q = critic(observations.unsqueeze(0).repeat_interleave(10, dim=0), many_actions)
        (gradient,) = torch.autograd.grad(
            many_q.sum(), many_actions, retain_graph=True, create_graph=True
        )
        gradient = (gradient / (torch.norm(gradient, p=2, dim=2).unsqueeze(-1) + 1e-10)).transpose(
            0, 1
        )
        products = torch.einsum("bik,bjk->bij", gradient, gradient)
        others = 1 - torch.eye(10, device=device).unsqueeze(0).repeat(products.shape[0], 1, 1)
        descend(critic_loss + (others * products).sum(dim=(1, 2)).mean() / 9, critic_optimizer)
        follow(target, critic)

    return update


def plain_sac(buffers, num_q, utd, device):
    """The updates of one environment step: a network and an optimiser per critic, half of a batch from each buffer."""
    policy = PlainPolicy(256, 256).to(device)
    critics = nn.ModuleList([mlp(PAIR, 256, 256, 1) for _ in range(num_q)]).to(device)
    targets = copy.deepcopy(critics)
    log_alpha = torch.zeros(1, requires_grad=True, device=device)
    policy_optimizer, alpha_optimizer, critic_optimizers = (
        adam(policy),
        adam(log_alpha),
        [adam(c) for c in critics],
    )

    def step(_):
        alpha = log_alpha.exp().item()
        for i in range(utd):
            columns = map(
                np.concatenate, zip(*[draw(parts, BATCH // len(buffers)) for parts in buffers])
            )
            observations, actions, rewards, next_observations, terminals = [
                torch.Tensor(x).to(device) for x in columns
            ]
            with torch.no_grad():
                next_actions, next_log_density = policy(next_observations)
                two = [targets[k] for k in np.random.choice(num_q, 2, replace=False)]
                next_q = (
                    torch.cat(values(two, next_observations, next_actions), 1)
                    .min(dim=1, keepdim=True)
                    .values
                )
                y = rewards + 0.99 * (1 - terminals) * (next_q - alpha * next_log_density)
            q = torch.cat(values(critics, observations, actions), 1)
            descend(F.mse_loss(q, y.expand(-1, num_q)) * num_q, *critic_optimizers)
            if i == utd - 1:
                critics.requires_grad_(False)
                policy_actions, log_density = policy(observations)
                q = torch.cat(values(critics, observations, policy_actions), 1).mean(
                    1, keepdim=True
                )
                descend((alpha * log_density - q).mean(), policy_optimizer)
                critics.requires_grad_(True)
                descend(-(log_alpha * (log_density - ACT_DIM).detach()).mean(), alpha_optimizer)
            follow(targets, critics)

    return step


def random_shift_by_sampling(images):
    """The public random shift: every image is interpolated at shifted positions."""
    images, new = (
        F.pad(images, (4, 4, 4, 4), "replicate"),
        dict(device=images.device, dtype=images.dtype),
    )
    line = torch.linspace(-1 + 1 / 92, 1 - 1 / 92, 92, **new)[:84]
    base = torch.stack([line.expand(84, 84), line[:, None].expand(84, 84)], dim=-1)
    shift = torch.randint(0, 9, (len(images), 1, 1, 2), **new) * 2 / 92
    return F.grid_sample(images, base + shift, padding_mode="zeros", align_corners=False)


def plain_drqbc(frames, actions, rewards, device):
    """An update: the batch is drawn as a data loader does, image by image from numpy."""
    layers = [nn.Conv2d(9, 32, 3, stride=2), *(nn.Conv2d(32, 32, 3) for _ in range(3))]
    encoder = nn.Sequential(
        *(part for layer in layers for part in (layer, nn.ReLU())), nn.Flatten()
    ).to(device)
    trunk = nn.Sequential(nn.Linear(39_200, 50), nn.LayerNorm(50), nn.Tanh()).to(device)
    actor = nn.Sequential(trunk, mlp(50, 1024, 1024, ACT_DIM), nn.Tanh()).to(device)
    critic_trunk, critics = (
        copy.deepcopy(trunk),
        nn.ModuleList([mlp(50 + ACT_DIM, 1024, 1024, 1) for _ in range(2)]),
    )
    critic = nn.ModuleList([critic_trunk, critics]).to(device)
    target = copy.deepcopy(critic)
    actor_optimizer, critic_optimizer, encoder_optimizer = adam(actor), adam(critic), adam(encoder)

    def draw_one():
        i = np.random.randint(3, len(frames) - 3)
        return (
            frames[i - 3 : i].reshape(9, 84, 84),
            actions[i],
            rewards[i],
            frames[i : i + 3].reshape(9, 84, 84),
        )

    def encode(images):
        return encoder(random_shift_by_sampling(images.float()) / 255.0 - 0.5)

    def sample(h):
        mean = actor(h)
        raw = mean + torch.clamp(torch.randn_like(mean) * 0.5, -0.3, 0.3)
        return raw - raw.detach() + torch.clamp(raw, -1 + 1e-6, 1 - 1e-6).detach()

    def update(i):
        batch = [np.stack(x) for x in zip(*(draw_one() for _ in range(BATCH)))]
        images, a, r, next_images = [torch.as_tensor(x, device=device) for x in batch]
        h = encode(images)
        with torch.no_grad():
            next_h = encode(next_images)
            y = r[:, None] + 0.97 * torch.min(*values(target[1], target[0](next_h), sample(next_h)))
        descend(
            sum(F.mse_loss(q, y) for q in values(critics, critic_trunk(h), a)),
            encoder_optimizer,
            critic_optimizer,
        )
        policy_actions = sample(h.detach())
        q = torch.min(*values(critics, critic_trunk(h.detach()), policy_actions))
        descend(
            -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(policy_actions, a),
            actor_optimizer,
        )
        follow(target, critic, tau=0.01)

    return update


# --- Rows of the table ------------------------------------------------------------------------------------------------
# Each returns what `take_turns` does.


def resolved(script, device, **options):
    """The arguments of a script as its main resolves them."""
    args = script.Args(device=device, **options)
    for pattern, defaults in script.DEFAULTS.items():
        if re.match(pattern, args.env):
            edm.fill(args, defaults)
    return args


def random_rows(num_rows):
    rows = torch.randn(num_rows, DIM)
    rows[:, -1] = rows[:, -1] > 3
    return rows


def training(device, count, repeats):
    """A step of train_edm, which waits at its checkpoints while the others have their turn."""
    rows, model, turns = torch.randn(50_000, DIM), edm.EDM(DIM).to(device), []
    plain = plain_training(rows, device)
    multiply = multiplies_of(lambda: model.loss(rows[:BATCH].to(device)).backward(), device)
    last = clock()

    def save(state):
        nonlocal last
        ours = (clock() - last) / count
        limit = seconds_per_call(lambda i: multiply(), count)
        turns.append((ours, limit, seconds_per_call(plain, count, PLAIN_PRECISION)))
        last = clock()

    args = edm.DiffusionArgs(diffusion_steps=count * (repeats + 1), diffusion_recipe="paper")
    edm.train_edm(rows, args, device=device, save=save, save_every=count)
    return turns[1:]


@torch.no_grad()
def sampling(device, count, repeats):
    """A network call, per row: our sampler makes 32, the plain one three here."""
    rows, plain_rows = (100_000, 100_000) if device == "cuda" else (2_000, 10_000)
    model, plain_model = edm.EDM(DIM).to(device).requires_grad_(False), PlainEDM().to(device)
    x, plain_x = torch.randn(rows, DIM, device=device), torch.randn(plain_rows, DIM, device=device)
    multiply = multiplies_of(lambda: model(x, 1.0), device)

    def ours(i):
        edm.generate(model, rows, edm.DiffusionArgs(sample_steps=32))

    def plain(i):
        edm.sample_dpmpp(plain_model.denoise, plain_x, edm.karras_sigmas(3)).cpu()

    return take_turns(
        ours, lambda i: multiply(), plain, count, repeats, units=(32 * rows, rows, 3 * plain_rows)
    )


def offline(device, count, repeats, name):
    """An update of TD3+BC, IQL or EDAC, as in the script's main."""
    script = importlib.import_module(f"synther_{name}")
    args = resolved(script, device, env="walker2d-medium-v2")
    rows = random_rows(100_000).to(device)
    plain = {"td3bc": plain_td3bc, "iql": plain_iql, "edac": plain_edac}[name]
    plain = plain([part.contiguous() for part in rows.split(SIZES, dim=1)], device)
    agent = getattr(script, name.upper())(OBS_DIM, ACT_DIM, 1.0, args)
    batch, losses = (
        torch.empty(BATCH, DIM, device=device),
        torch.zeros(len(agent.LOSSES), device=device),
    )

    def train_step():
        batch.copy_(rows[torch.randint(len(rows), (BATCH,), device=device)])
        losses.add_(agent.update_critic(batch) if name == "td3bc" else agent.update(batch))

    def actor_step():
        losses[1] += args.policy_freq * agent.update_actor(batch)

    def update(i, train_step, actor_step=None):
        if name == "iql":
            agent.anneal(i)
        train_step()
        if actor_step and i % args.policy_freq == 1:
            actor_step()

    steps = (train_step, actor_step) if name == "td3bc" else (train_step,)
    return take_turns(*ours_and_limit(device, update, *steps), plain, count, repeats)


def online(device, count, repeats, algo):
    """A critic update of SAC (SynthER) or REDQ, at 20 per environment step, as in the script's main."""
    import synther_sac_online as script

    args = resolved(script, device, env="HalfCheetah-v4", algo=algo)
    edm.fill(args, script.ALGOS[algo])
    replay = random_rows(20_000).to(device)
    buffers = [
        [part.numpy() for part in replay.cpu().repeat(n, 1).split(SIZES, dim=1)] for n in (1, 10)
    ]
    plain = plain_sac(buffers if algo == "synther" else buffers[:1], args.num_q, args.utd, device)
    synthetic = replay.repeat(10, 1) if algo == "synther" else replay[:0]
    agent = script.SAC(OBS_DIM, ACT_DIM, args)
    batch, losses = (
        torch.empty(BATCH, DIM, device=device),
        torch.zeros(len(agent.LOSSES), device=device),
    )

    def critic_step():
        losses.add_(agent.update(batch, with_actor=False))

    def last_step():
        losses.add_(agent.update(batch, with_actor=True))

    def updates(_, critic_step, last_step):
        batches = script.sample_batches(replay, synthetic, args.utd, BATCH, args.synther_ratio)
        for i in range(args.utd):
            batch.copy_(batches[i])
            critic_step() if i < args.utd - 1 else last_step()

    ours, limit = ours_and_limit(device, updates, critic_step, last_step)
    return take_turns(ours, limit, plain, count, repeats, units=3 * (args.utd,))


def pixels(device, count, repeats):
    """An update of DrQ+BC from images, as in the script's main."""
    import synther_vd4rl as script

    args = script.Args(device=device)
    frames = np.random.randint(0, 256, (4_000, 3, 84, 84), dtype=np.uint8)
    actions = np.random.uniform(-1, 1, (4_000, ACT_DIM)).astype(np.float32)
    rewards = np.random.uniform(0, 2, 4_000).astype(np.float32)
    plain_update = plain_drqbc(frames, actions, rewards, device)
    agent = script.Agent(ACT_DIM, args, "stage1")
    images, a, r = (torch.as_tensor(x, device=device) for x in (frames, actions, rewards))
    noise, losses = torch.full((), 0.5, device=device), torch.zeros(2, device=device)

    def train_step():
        row = torch.randint(3, 3_900, (args.batch_size,), device=device)
        stacks = (
            script.stacked(images, last, torch.zeros_like(row)) for last in (row - 1, row + 2)
        )
        batch, next_batch = (script.random_shift(stack) for stack in stacks)
        losses.add_(
            agent.update(batch, a[row], r[row], torch.full_like(r[row], 0.97), next_batch, noise)
        )

    def update(i, train_step):
        script.keep_freed_memory()
        train_step()

    def plain(i):
        for threshold, size in ((-1, 2**26), (-3, 2**25)) if sys.platform == "linux" else ():
            ctypes.CDLL(None).mallopt(
                threshold, size
            )  # where glibc's own thresholds, which grow by themselves, end
        plain_update(i)

    return take_turns(*ours_and_limit(device, update, train_step), plain, count, repeats)


# --- Memory -----------------------------------------------------------------------------------------------------------


def peak_memory(label, script, **options):
    """Run a script in a process of its own, and print its peak memory."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, str(ROOT / script), "--device=cpu", "--eval-episodes=0", *options]
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(f"{label}: peak memory {peak:.2f} GB, {time.perf_counter() - start:.0f} s")


def memory_of_rows(num_rows, folder):
    """synther_td3bc.py on random data of Walker2d's size, with a tiny network."""
    np.savez(Path(folder) / "data.npz", **edm.unpack(random_rows(20_000), OBS_DIM, ACT_DIM))
    options = dict(
        env="Walker2d-v4", dataset_path=f"{folder}/data.npz", out_dir=folder, num_samples=num_rows
    )
    options |= dict(
        diffusion_steps=10, diffusion_width=32, diffusion_depth=1, sample_steps=2, updates=20
    )
    peak_memory(
        f"{num_rows:,} rows ({num_rows * DIM * 4 / 1e9:.2f} GB)", "synther_td3bc.py", **options
    )


def memory_of_images(num_images, folder):
    """synther_vd4rl.py on random images, a few updates of the paper's batch size."""
    files = Path(folder) / "main/walker_walk/expert/84px"
    files.mkdir(parents=True)
    for i in range(math.ceil(num_images / 501)):
        with h5py.File(files / f"{i:05}.hdf5", "w") as f:
            f["observation"] = np.random.randint(0, 256, (501, 3, 84, 84), dtype=np.uint8)
            f["action"] = np.random.uniform(-1, 1, (501, ACT_DIM)).astype(np.float32)
            f["reward"], f["discount"] = np.ones((2, 501), np.float32)
            f["step_type"] = np.array([0] + 499 * [1] + [2])
    options = dict(
        env="walker-walk-expert",
        dataset_path=folder,
        out_dir=folder,
        stage1_updates=20,
        stage2_updates=20,
    )
    options |= dict(diffusion_steps=10, diffusion_width=32, sample_steps=2, num_samples=100_000)
    peak_memory(
        f"{num_images:,} images ({num_images * 3 * 84 * 84 / 1e9:.2f} GB)",
        "synther_vd4rl.py",
        **options,
    )


# --- Table ------------------------------------------------------------------------------------------------------------

ROWS = (  # part of --only, name, unit, units per second, function, calls per turn on a CPU and on a GPU
    ("training", "diffusion step, 6 x 1024, batch 256", "ms/step", 1e3, training, 40, 500),
    ("sampling", "sampling, one network call", "us/row", 1e6, sampling, 1, 1),
    (
        "td3bc",
        "TD3+BC update, 2 x 256, batch 256",
        "us/update",
        1e6,
        partial(offline, name="td3bc"),
        300,
        5_000,
    ),
    (
        "iql",
        "IQL update, 2 x 256, batch 256",
        "us/update",
        1e6,
        partial(offline, name="iql"),
        300,
        5_000,
    ),
    (
        "edac",
        "EDAC update, 10 critics, 3 x 256",
        "us/update",
        1e6,
        partial(offline, name="edac"),
        40,
        5_000,
    ),
    (
        "sac",
        "SAC (SynthER) update, 20 per step",
        "us/update",
        1e6,
        partial(online, algo="synther"),
        20,
        200,
    ),
    ("sac", "REDQ update, 20 per step", "us/update", 1e6, partial(online, algo="redq"), 8, 200),
    ("drqbc", "DrQ+BC update from images, batch 256", "ms/update", 1e3, pixels, 2, 200),
)


def show(name, unit, scale, turns):
    """One line of the table."""
    ours, limit, plain = (statistics.median(column) * scale for column in zip(*turns))
    ratio = statistics.median(plain / ours for ours, _, plain in turns)
    share = statistics.median(limit / ours for ours, limit, _ in turns)
    print(
        f"{name:<36} {unit:<10} {ours:9.3f} {plain:9.3f} {limit:9.3f} {ratio:10.2f}x {share:9.0%}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    parser.add_argument("--quick", action="store_true", help="shorter turns")
    parser.add_argument(
        "--only", choices={row[0]: None for row in ROWS}, help="one part of the table"
    )
    parser.add_argument(
        "--memory", type=int, nargs="?", const=5_000_000, metavar="ROWS", help="peak memory instead"
    )
    parser.add_argument(
        "--image-memory", type=int, nargs="?", const=100_000, metavar="IMAGES", help="likewise"
    )
    args = parser.parse_args()
    if args.memory or args.image_memory:
        with tempfile.TemporaryDirectory() as folder:
            return (
                memory_of_rows(args.memory, folder)
                if args.memory
                else memory_of_images(args.image_memory, folder)
            )
    device = (
        args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    torch.manual_seed(0)
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else (re.findall("model name.*: (.*)", cpu) or ["CPU"])[0]
    )
    print(
        f"{name} | torch {torch.__version__} | {torch.get_num_threads()} threads | float32 matmul as {OUR_PRECISION}"
    )
    print(
        f"{'':<36} {'unit':<10} {'ours':>9} {'plain':>9} {'matmul':>9} {'speed-up':>11} {'of limit':>9}"
    )
    for part, name, unit, scale, measure, cpu_calls, gpu_calls in ROWS:
        if args.only in (None, part):
            calls = gpu_calls if device == "cuda" else cpu_calls
            turns = measure(device, max(calls // 4, 1) if args.quick else calls, args.repeats)
            show(name, unit, scale, turns)
            if part == "sampling":
                turns = [(32 * ours, 32 * limit, 255 * plain) for ours, limit, plain in turns]
                show("sampling, 32 calls (plain: 255)", unit, scale, turns)


if __name__ == "__main__":
    main()
