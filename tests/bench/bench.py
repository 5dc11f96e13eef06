"""Speed of training, sampling and agent updates on this machine, beside plain references and the matmul limit.

    python tests/bench/bench.py                      # about 5 minutes on a 2-core CPU
    python tests/bench/bench.py --quick              # about a minute, less exact
    python tests/bench/bench.py --memory             # peak memory of a 5M-row experiment, or of --memory ROWS
    python tests/bench/bench.py --image-memory       # peak memory of the pixel script with 100,000 images

Each figure is measured on the code that users run. It is printed beside
- a reference: the same arithmetic written as the public codes write it (SynthER, CORL, ema-pytorch), run eagerly;
- the limit: the time that the matrix multiplies of these exact shapes take alone, with the settings of our own run.

The three take turns, so that other load on the machine meets all of them. The table shows medians over the turns, and
the median of the ratios within a turn. Nothing is asserted.
"""

import argparse
import copy
import ctypes
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

PLAIN_PRECISION = torch.backends.mkldnn.matmul.fp32_precision  # PyTorch's own, before our code may change it
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import edm  # noqa: E402

OBS_DIM, ACT_DIM, DIM = 17, 6, 42  # Walker2d and HalfCheetah
WIDTH, DEPTH, BATCH = 1024, 6, 256


# --- Clock ------------------------------------------------------------------------------------------------------------


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function):
    start = clock()
    function()
    return clock() - start


def take_turns(functions, repeats):
    """Time the functions one after the other, `repeats` times after a first round that does not count.

    Returns: [len(functions)] lists of `repeats` seconds.
    """
    rounds = [[seconds(function) for function in functions] for _ in range(repeats + 1)]
    return [list(times) for times in zip(*rounds[1:])]


class plain_pytorch:
    """A block with PyTorch's own choice of matmul kernels, which is what the public codes get."""

    def __enter__(self):
        self.ours = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = PLAIN_PRECISION

    def __exit__(self, *_):
        torch.backends.mkldnn.matmul.fp32_precision = self.ours


# --- Matmul limit -----------------------------------------------------------------------------------------------------


def matmuls(device, forward=(), backward=(), first=()):
    """A function that does the multiplies of linear layers, once, into fixed outputs.

    Args:
        forward, backward, first: layers (rows, inputs, outputs), or (n, rows, inputs, outputs) for n batched ones, that
            are run forward only; forward and backward; likewise but with an input that needs no gradient.
    """
    new = lambda *shape: torch.randn(shape, device=device)  # noqa: E731
    jobs = []
    for group, gradients in ((forward, ""), (backward, "wx"), (first, "w")):
        for *n, rows, inputs, outputs in group:
            x, w, y = new(*n, rows, inputs), new(*n, inputs, outputs), new(*n, rows, outputs)
            jobs.append((x, w, torch.empty_like(y)))
            if "w" in gradients:
                jobs.append((x.mT, y, torch.empty_like(w)))
            if "x" in gradients:
                jobs.append((y, w.mT, torch.empty_like(x)))

    def run():
        for a, b, out in jobs:
            torch.matmul(a, b, out=out)

    return edm.cuda_graph(run) if device == "cuda" else run


def denoiser_layers(rows):
    """The multiplies of the denoiser but for its noise-level embedding: input layer, the others."""
    return [(rows, DIM, 128)], [(rows, 128, WIDTH)] + DEPTH * [(rows, WIDTH, WIDTH)] + [(rows, WIDTH, DIM)]


# --- References: the public way of writing it -------------------------------------------------------------------------


class PlainBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.activation = nn.ReLU()
        self.norm = nn.Identity()

    def forward(self, x):
        return x + self.linear(self.activation(self.norm(x)))


class PlainDenoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(8), requires_grad=False)
        self.project = nn.Linear(DIM, 128)
        self.time_mlp = nn.Sequential(nn.Linear(17, 128), nn.SiLU(), nn.Linear(128, 128))
        self.network = nn.Sequential(nn.Linear(128, WIDTH), *[PlainBlock(WIDTH) for _ in range(DEPTH)], nn.ReLU())
        self.final = nn.Linear(WIDTH, DIM)

    def forward(self, x, time):
        frequencies = time[:, None] * self.weights[None, :] * 2 * math.pi
        embedding = torch.cat([time[:, None], frequencies.sin(), frequencies.cos()], dim=-1)
        return self.final(self.network(self.project(x) + self.time_mlp(embedding)))


class PlainEDM(nn.Module):
    """Preconditioning with one noise level per row throughout, in sampling too."""

    def __init__(self):
        super().__init__()
        self.net = PlainDenoiser()
        self.register_buffer("mean", torch.zeros(DIM))
        self.register_buffer("std", torch.ones(DIM))

    def denoise(self, x, sigma):
        if isinstance(sigma, float):
            sigma = torch.full((x.shape[0],), sigma, device=x.device)
        padded = sigma[:, None]
        c_in = (padded**2 + 1) ** -0.5
        c_skip = 1 / (padded**2 + 1)
        c_out = padded * (padded**2 + 1) ** -0.5
        return c_skip * x + c_out * self.net(c_in * x, torch.log(sigma.clamp(min=1e-20)) * 0.25)

    def forward(self, x):
        x = (x - self.mean) / self.std
        sigma = (-1.2 + 1.2 * torch.randn((x.shape[0],), device=x.device)).exp()
        denoised = self.denoise(x + sigma[:, None] * torch.randn_like(x), sigma)
        losses = F.mse_loss(denoised, x, reduction="none").mean(dim=1)
        return (losses * (sigma**2 + 1) * sigma**-2).mean()


class PlainEMA(nn.Module):
    """Average of a model as ema-pytorch keeps it: called every step, counting in a buffer, acting every 10th time."""

    def __init__(self, model):
        super().__init__()
        self.model, self.average = [model], copy.deepcopy(model).requires_grad_(False)
        self.register_buffer("step", torch.tensor(0))

    @torch.no_grad()
    def update(self):
        step = self.step.item()
        self.step += 1
        if step % 10:
            return
        decay = min(0.995, 1 - max(step - 100, 1) ** (-2 / 3))
        for average, current in zip(self.average.parameters(), self.model[0].parameters()):
            average.lerp_(current, 1 - decay)
        for average, current in zip(self.average.buffers(), self.model[0].buffers()):
            average.copy_(current)


def plain_training(data, device):
    """A function that takes one training step."""
    model = PlainEDM().to(device)
    decay = [p for name, p in model.named_parameters() if "bias" not in name]
    no_decay = [p for name, p in model.named_parameters() if "bias" in name]
    groups = [{"params": decay, "weight_decay": 0.0}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100_000)
    ema = PlainEMA(model).to(device)
    # The public code starts a worker per core. On a CPU they would take cores from the training: none there.
    workers = dict(num_workers=8, pin_memory=True) if device == "cuda" else {}
    loader = DataLoader(TensorDataset(data), batch_size=BATCH, shuffle=True, **workers)

    def forever():
        while True:
            yield from loader

    batches = forever()

    def step():
        batch = next(batches)[0].to(device)
        loss = model(batch)
        loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        schedule.step()

    return step


def plain_sde(model, x, sigmas):
    """Karras' stochastic Heun sampler, 2 * len(sigmas) - 3 network calls."""
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        gamma = min(80 / 128, math.sqrt(2) - 1) if 0.05 <= sigma <= 50 else 0.0
        sigma_hat = sigma + gamma * sigma
        x_hat = x + math.sqrt(sigma_hat**2 - sigma**2) * 1.003 * torch.randn_like(x)
        slope = (x_hat - model.denoise(x_hat, sigma_hat)) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * slope
        if sigma_next != 0:
            slope_next = (x - model.denoise(x, sigma_next)) / sigma_next
            x = x_hat + 0.5 * (sigma_next - sigma_hat) * (slope + slope_next)
    return x


class PlainActor(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(OBS_DIM, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, ACT_DIM), nn.Tanh()
        )

    def forward(self, observations):
        return 1.0 * self.net(observations)


class PlainCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(OBS_DIM + ACT_DIM, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1)
        )

    def forward(self, observations, actions):
        return self.net(torch.cat([observations, actions], 1))


def plain_td3bc(arrays, device):
    """A function that takes update i: three networks with an optimiser each, a float of each loss each time."""
    actor, critic_1, critic_2 = (network().to(device) for network in (PlainActor, PlainCritic, PlainCritic))
    networks = [actor, critic_1, critic_2]
    actor_target, critic_1_target, critic_2_target = targets = [copy.deepcopy(network) for network in networks]
    actor_optimizer, critic_1_optimizer, critic_2_optimizer = [
        torch.optim.Adam(network.parameters(), lr=3e-4) for network in networks
    ]
    buffer = [torch.tensor(x, device=device) for x in arrays]

    def update(i):
        indices = np.random.randint(0, len(buffer[0]), size=BATCH)
        observations, actions, rewards, next_observations, terminals = [x[indices].to(device) for x in buffer]
        with torch.no_grad():
            noise = (torch.randn_like(actions) * 0.2).clamp(-0.5, 0.5)
            next_actions = (actor_target(next_observations) + noise).clamp(-1.0, 1.0)
            target_q1 = critic_1_target(next_observations, next_actions)
            target_q2 = critic_2_target(next_observations, next_actions)
            target_q = rewards + (1 - terminals) * 0.99 * torch.min(target_q1, target_q2)
        q1, q2 = critic_1(observations, actions), critic_2(observations, actions)
        critic_loss = F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q)
        log = {"critic_loss": critic_loss.item()}
        critic_1_optimizer.zero_grad()
        critic_2_optimizer.zero_grad()
        critic_loss.backward()
        critic_1_optimizer.step()
        critic_2_optimizer.step()
        if i % 2 == 1:
            policy_actions = actor(observations)
            q = critic_1(observations, policy_actions)
            actor_loss = -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(policy_actions, actions)
            log["actor_loss"] = actor_loss.item()
            actor_optimizer.zero_grad()
            actor_loss.backward()
            actor_optimizer.step()
            for target, network in zip(targets, networks):
                for slow, fast in zip(target.parameters(), network.parameters()):
                    slow.data.copy_(0.005 * fast.data + 0.995 * slow.data)
        return log

    return update


def plain_iql(arrays, device):
    """A function that takes update i: four networks, three optimisers, a distribution object, a float of each loss."""
    value = nn.Sequential(nn.Linear(OBS_DIM, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    mean = nn.Sequential(nn.Linear(OBS_DIM, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, ACT_DIM))
    value, mean, critics = value.to(device), mean.to(device), nn.ModuleList([PlainCritic(), PlainCritic()]).to(device)
    log_std = nn.Parameter(torch.zeros(ACT_DIM, device=device))
    targets = copy.deepcopy(critics)
    value_optimizer = torch.optim.Adam(value.parameters(), lr=3e-4)
    critic_optimizer = torch.optim.Adam(critics.parameters(), lr=3e-4)
    actor_optimizer = torch.optim.Adam([*mean.parameters(), log_std], lr=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(actor_optimizer, 1_000_000)
    buffer = [torch.tensor(x, device=device) for x in arrays]

    def update(i):
        indices = np.random.randint(0, len(buffer[0]), size=BATCH)
        observations, actions, rewards, next_observations, terminals = [x[indices].to(device) for x in buffer]
        log = {}
        with torch.no_grad():
            next_v = value(next_observations).squeeze(-1)
            target_q = torch.min(*(target(observations, actions).squeeze(-1) for target in targets))
        advantage = target_q - value(observations).squeeze(-1)
        value_loss = torch.mean(torch.abs(0.7 - (advantage < 0).float()) * advantage**2)
        log["value_loss"] = value_loss.item()
        value_optimizer.zero_grad()
        value_loss.backward()
        value_optimizer.step()
        y = rewards.squeeze(-1) + (1.0 - terminals.squeeze(-1)) * 0.99 * next_v.detach()
        critic_loss = sum(F.mse_loss(critic(observations, actions).squeeze(-1), y) for critic in critics) / 2
        log["critic_loss"] = critic_loss.item()
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()
        for target, critic in zip(targets, critics):
            for slow, fast in zip(target.parameters(), critic.parameters()):
                slow.data.copy_(0.005 * fast.data + 0.995 * slow.data)
        weight = torch.exp(3.0 * advantage.detach()).clamp(max=100.0)
        scale = torch.diag(torch.exp(log_std.clamp(-5.0, 2.0)))
        policy = torch.distributions.MultivariateNormal(mean(observations), scale_tril=scale)
        actor_loss = torch.mean(weight * -policy.log_prob(actions))
        log["actor_loss"] = actor_loss.item()
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()
        schedule.step()
        return log

    return update


class PlainEnsemble(nn.Module):
    """Ten critics of three hidden layers, as CORL's EDAC has them."""

    def __init__(self):
        super().__init__()
        sizes = [OBS_DIM + ACT_DIM, 256, 256, 256, 1]
        self.weights = nn.ParameterList(torch.randn(10, i, o) / math.sqrt(i) for i, o in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.zeros(10, 1, o) for o in sizes[1:])

    def forward(self, observations, actions):
        x = torch.cat([observations, actions], dim=-1)
        if x.dim() == 2:
            x = x.unsqueeze(0).repeat_interleave(10, dim=0)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = (torch.relu(x) if i else x) @ weight + bias
        return x.squeeze(-1)


def plain_edac(arrays, device):
    """A function that takes update i: autograd of the gradients by the actions, an inner product for each pair."""
    actor = PlainPolicy(hidden_layers=3).to(device)
    critic = PlainEnsemble().to(device)
    target = copy.deepcopy(critic)
    log_alpha = torch.zeros(1, device=device, requires_grad=True)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=3e-4)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=3e-4)
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=3e-4)
    buffer = [torch.tensor(x, device=device) for x in arrays]

    def update(i):
        indices = np.random.randint(0, len(buffer[0]), size=BATCH)
        observations, actions, rewards, next_observations, terminals = [x[indices].to(device) for x in buffer]
        alpha_loss = (-log_alpha * (actor(observations)[1].detach() - ACT_DIM)).mean()
        alpha_optimizer.zero_grad()
        alpha_loss.backward()
        alpha_optimizer.step()
        alpha = log_alpha.exp().detach()

        policy_actions, log_density = actor(observations)
        q = critic(observations, policy_actions).min(0).values
        actor_loss = (alpha * log_density.squeeze(-1) - q).mean()
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()

        with torch.no_grad():
            next_actions, next_log_density = actor(next_observations)
            next_q = target(next_observations, next_actions).min(0).values.unsqueeze(-1) - alpha * next_log_density
            y = rewards + 0.99 * (1 - terminals) * next_q
        q = critic(observations, actions)
        critic_loss = ((q - y.view(1, -1)) ** 2).mean(dim=1).sum(dim=0)
        many_actions = actions.unsqueeze(0).repeat_interleave(10, dim=0).requires_grad_(True)
        many_observations = observations.unsqueeze(0).repeat_interleave(10, dim=0)
        many_q = critic(many_observations, many_actions)
        (gradient,) = torch.autograd.grad(many_q.sum(), many_actions, retain_graph=True, create_graph=True)
        gradient = (gradient / (torch.norm(gradient, p=2, dim=2).unsqueeze(-1) + 1e-10)).transpose(0, 1)
        products = torch.einsum("bik,bjk->bij", gradient, gradient)
        mask = torch.eye(10, device=device).unsqueeze(0).repeat(products.shape[0], 1, 1)
        diversity = ((1 - mask) * products).sum(dim=(1, 2)).mean() / 9
        loss = critic_loss + 1.0 * diversity
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), critic.parameters()):
                slow.data.copy_(0.995 * slow.data + 0.005 * fast.data)
        return {"alpha_loss": alpha_loss.item(), "actor_loss": actor_loss.item(), "critic_loss": loss.item()}

    return update


class PlainPolicy(nn.Module):
    def __init__(self, hidden_layers=2):
        super().__init__()
        more = [layer for _ in range(hidden_layers - 1) for layer in (nn.Linear(256, 256), nn.ReLU())]
        self.hidden = nn.Sequential(nn.Linear(OBS_DIM, 256), nn.ReLU(), *more)
        self.mean, self.log_std = nn.Linear(256, ACT_DIM), nn.Linear(256, ACT_DIM)

    def forward(self, observations):
        h = self.hidden(observations)
        mean, std = self.mean(h), torch.exp(torch.clamp(self.log_std(h), -20, 2))
        normal = torch.distributions.Normal(mean, std)
        raw = normal.rsample()
        actions = torch.tanh(raw)
        log_prob = normal.log_prob(raw) - torch.log(1 - actions.pow(2) + 1e-6)
        return actions, log_prob.sum(1, keepdim=True)


def plain_sac(buffers, num_q, utd, device):
    """A function that does the updates of one environment step: a network and an optimiser per critic, batches from
    numpy buffers (of real, and if there are two, of generated rows) at every update, a float of each loss each time.
    """
    policy, critics = PlainPolicy().to(device), [PlainCritic().to(device) for _ in range(num_q)]
    targets = [copy.deepcopy(critic) for critic in critics]
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)
    optimizers = [torch.optim.Adam(critic.parameters(), lr=3e-4) for critic in critics]
    log_alpha = torch.zeros(1, requires_grad=True, device=device)
    alpha_optimizer, alpha = torch.optim.Adam([log_alpha], lr=3e-4), 0.2
    size = BATCH // len(buffers)

    def sample():
        indices = [np.random.randint(0, len(arrays[0]), size=size) for arrays in buffers]
        columns = zip(*[[x[index] for x in arrays] for arrays, index in zip(buffers, indices)])
        return [torch.Tensor(np.concatenate(column)).to(device) for column in columns]

    def step():
        nonlocal alpha
        for i in range(utd):
            observations, actions, rewards, next_observations, terminals = sample()
            with torch.no_grad():
                next_actions, next_log_prob = policy(next_observations)
                chosen = np.random.choice(num_q, 2, replace=False)
                next_q = torch.cat([targets[k](next_observations, next_actions) for k in chosen], 1)
                next_q = torch.min(next_q, dim=1, keepdim=True).values - alpha * next_log_prob
                target = rewards + 0.99 * (1 - terminals) * next_q
            q = torch.cat([critic(observations, actions) for critic in critics], 1)
            critic_loss = F.mse_loss(q, target.expand(-1, num_q)) * num_q
            for optimizer in optimizers:
                optimizer.zero_grad()
            critic_loss.backward()
            if i == utd - 1:
                policy_actions, log_prob = policy(observations)
                for critic in critics:
                    critic.requires_grad_(False)
                q = torch.cat([critic(observations, policy_actions) for critic in critics], 1).mean(1, keepdim=True)
                policy_loss = (alpha * log_prob - q).mean()
                policy_optimizer.zero_grad()
                policy_loss.backward()
                for critic in critics:
                    critic.requires_grad_(True)
                alpha_loss = -(log_alpha * (log_prob - ACT_DIM).detach()).mean()
                alpha_optimizer.zero_grad()
                alpha_loss.backward()
                alpha_optimizer.step()
                alpha = log_alpha.exp().item()
                policy_loss.item()
            for optimizer in optimizers:
                optimizer.step()
            if i == utd - 1:
                policy_optimizer.step()
            for slow_network, fast_network in zip(targets, critics):
                for slow, fast in zip(slow_network.parameters(), fast_network.parameters()):
                    slow.data.mul_(0.995)
                    slow.data.add_(0.005 * fast.data)
            critic_loss.item()

    return step


def random_shift_by_sampling(images, pad=4):
    """The public random shift: every image is interpolated at shifted positions."""
    n, _, height, width = images.shape
    images = F.pad(images, (pad, pad, pad, pad), "replicate")
    size = height + 2 * pad
    line = torch.linspace(-1 + 1 / size, 1 - 1 / size, size, device=images.device, dtype=images.dtype)[:height]
    base = torch.stack([line.expand(height, width), line[:, None].expand(height, width)], dim=-1)
    shift = torch.randint(0, 2 * pad + 1, (n, 1, 1, 2), device=images.device, dtype=images.dtype) * 2 / size
    return F.grid_sample(images, base + shift, padding_mode="zeros", align_corners=False)


def plain_drqbc(frames, actions, rewards, device):
    """A function that draws a batch as a data loader does, image by image from numpy, and makes a DrQ+BC update."""
    layers = [nn.Conv2d(9, 32, 3, stride=2), nn.ReLU()] + 3 * [nn.Conv2d(32, 32, 3), nn.ReLU()]
    encoder = nn.Sequential(*[copy.deepcopy(layer) for layer in layers], nn.Flatten()).to(device)
    trunk = nn.Sequential(nn.Linear(39_200, 50), nn.LayerNorm(50), nn.Tanh())
    actor_trunk, critic_trunk = trunk.to(device), copy.deepcopy(trunk).to(device)

    def head(inputs, outputs):
        hidden = [nn.Linear(inputs, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(1024, outputs)).to(device)

    policy, q1, q2 = head(50, ACT_DIM), head(50 + ACT_DIM, 1), head(50 + ACT_DIM, 1)
    critic = nn.ModuleList([critic_trunk, q1, q2])
    target = copy.deepcopy(critic)
    encoder_optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-4)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=3e-4)
    actor_optimizer = torch.optim.Adam([*actor_trunk.parameters(), *policy.parameters()], lr=3e-4)

    def draw():
        i = np.random.randint(3, len(frames) - 3)
        return frames[i - 3 : i].reshape(9, 84, 84), actions[i], rewards[i], frames[i : i + 3].reshape(9, 84, 84)

    def sample(h, std):
        mean = torch.tanh(policy(actor_trunk(h)))
        raw = mean + torch.clamp(torch.randn_like(mean) * std, -0.3, 0.3)
        return raw - raw.detach() + torch.clamp(raw, -1 + 1e-6, 1 - 1e-6).detach()

    def values(networks, h, a):
        x = torch.cat([networks[0](h), a], dim=-1)
        return networks[1](x), networks[2](x)

    def update():
        batch = [np.stack(x) for x in zip(*(draw() for _ in range(BATCH)))]
        images, a, r, next_images = [torch.as_tensor(x, device=device) for x in batch]
        h = encoder(random_shift_by_sampling(images.float()) / 255.0 - 0.5)
        with torch.no_grad():
            h_next = encoder(random_shift_by_sampling(next_images.float()) / 255.0 - 0.5)
            y = r[:, None] + 0.97 * torch.min(*values(target, h_next, sample(h_next, 0.5)))
        v1, v2 = values(critic, h, a)
        critic_loss = F.mse_loss(v1, y) + F.mse_loss(v2, y)
        log = {"critic_loss": critic_loss.item()}
        encoder_optimizer.zero_grad()
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()
        encoder_optimizer.step()
        pi = sample(h.detach(), 0.5)
        q = torch.min(*values(critic, h.detach(), pi))
        actor_loss = -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, a)
        log["actor_loss"] = actor_loss.item()
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()
        for slow, fast in zip(target.parameters(), critic.parameters()):
            slow.data.copy_(0.01 * fast.data + 0.99 * slow.data)
        return log

    return update


def convolutions(device):
    """A function that does DrQ+BC's convolutions and its trunks' multiplies once: images with gradients, next images
    without."""
    jobs, shape = [], (BATCH, 9, 84, 84)
    for i, stride in enumerate((2, 1, 1, 1)):
        x, w = torch.randn(shape, device=device), torch.randn(32, shape[1], 3, 3, device=device)
        gradient = torch.randn_like(F.conv2d(x, w, stride=stride))
        jobs.append((x, w, gradient, stride, [i > 0, True, False]))
        shape = gradient.shape
    wide = (BATCH, 39_200, 50)
    multiply = matmuls(device, forward=2 * [wide] + [wide], backward=[wide], first=[wide])

    def run():
        for x, w, gradient, stride, which in jobs:
            F.conv2d(x, w, stride=stride)
            F.conv2d(x, w, stride=stride)
            convolution = [stride, stride], [0, 0], [1, 1], False, [0, 0], 1
            torch.ops.aten.convolution_backward(gradient, x, w, None, *convolution, which)
        multiply()

    return run


# --- Rows of the table ------------------------------------------------------------------------------------------------


def bench_training(device, repeats, quick):
    """Returns seconds per step: ours, reference, limit."""
    data = torch.randn(50_000, DIM)
    steps = (50 if quick else 500) if device == "cuda" else (10 if quick else 40)
    reference_step = plain_training(data, device)
    first, rest = denoiser_layers(BATCH)
    multiply = matmuls(device, first=first + [(BATCH, 17, 128)], backward=rest + [(BATCH, 128, 128)])

    def reference():
        with plain_pytorch():
            for _ in range(steps):
                reference_step()

    def limit():
        for _ in range(steps):
            multiply()

    times, last = [], None

    def on_log(*_):  # train_edm is kept waiting here while the others have their turn
        nonlocal last
        times.append((clock() - last, seconds(reference), seconds(limit)))
        last = clock()

    last = clock()
    edm.train_edm(
        data, steps=steps * (repeats + 2), log_every=steps, on_log=on_log, device=device, width=WIDTH, depth=DEPTH,
        progress=False,
    )  # fmt: skip
    return [[t / steps for t in column] for column in zip(*times[2:])]


@torch.no_grad()
def bench_sampling(device, repeats, quick):
    """Returns two rows: seconds per network call and row (ours, reference, limit), and per row at equal quality."""
    model = edm.EDM(DIM, WIDTH, DEPTH).to(device).requires_grad_(False)
    plain = PlainEDM().to(device)
    gpu = device == "cuda"
    rows, plain_rows = (100_000, 100_000) if gpu else (2_000, 2_000 if quick else 10_000)
    calls = 32  # the default of edm.generate
    plain_sigmas = edm.karras_sigmas(20 if gpu else 3).tolist()
    sde_sigmas = edm.karras_sigmas(128).tolist()[-129 if gpu else -3 :]  # on a CPU the last two steps stand for all
    plain_calls, sde_calls = len(plain_sigmas) - 1, 2 * len(sde_sigmas) - 3
    limit_calls = 20 if gpu else 4
    first, rest = denoiser_layers(rows)
    multiply = matmuls(device, forward=first + rest)

    def ours():
        edm.generate(model, rows, sampler="dpmpp", sample_steps=calls, progress=False)

    def reference():
        with plain_pytorch():
            x = torch.randn(plain_rows, DIM, device=device)
            edm.sample_dpmpp(plain.denoise, x, torch.tensor(plain_sigmas)).cpu()

    def reference_sde():
        with plain_pytorch():
            plain_sde(plain, torch.randn(plain_rows, DIM, device=device), sde_sigmas).cpu()

    def limit():
        for _ in range(limit_calls):
            multiply()

    a, b, c, d = take_turns([ours, reference, limit, reference_sde], repeats)
    per_call = [
        [t / rows / calls for t in a],
        [t / plain_rows / plain_calls for t in b],
        [t / rows / limit_calls for t in c],
    ]
    equal_quality = [
        [t / rows for t in a],
        [t / plain_rows / sde_calls * 255 for t in d],
        [calls * t for t in per_call[2]],
    ]
    return per_call, equal_quality


def bench_td3bc(device, repeats, quick):
    """Returns seconds per update: ours, reference, limit."""
    import synther_td3bc

    updates = (1_000 if quick else 5_000) if device == "cuda" else (100 if quick else 300)
    rng = np.random.default_rng(0)
    sizes = [OBS_DIM, ACT_DIM, 1, OBS_DIM, 1]
    arrays = [rng.standard_normal((100_000, size)).astype(np.float32) for size in sizes]
    arrays[-1] = (arrays[-1] > 3).astype(np.float32)
    reference_update = plain_td3bc(arrays, device)

    # As the main of the script does it
    args = synther_td3bc.Args()
    rows = edm.pack(*[x.squeeze() for x in arrays]).to(device)
    agent = synther_td3bc.TD3BC(OBS_DIM, ACT_DIM, 1.0, args, device)
    batch = torch.empty(args.batch_size, rows.shape[1], device=device)
    losses = torch.zeros(2, device=device)

    def critic_step():
        index = torch.randint(len(rows), (args.batch_size,), device=device)
        torch.index_select(rows, 0, index, out=batch)
        losses[0] += agent.update_critic(batch)

    def actor_step():
        losses[1] += agent.update_actor(batch)

    if device == "cuda":
        critic_step, actor_step = edm.cuda_graph(critic_step), edm.cuda_graph(actor_step)

    def ours():
        for i in range(updates):
            critic_step()
            if (i + 1) % args.policy_freq == 0:
                actor_step()

    def reference():
        with plain_pytorch():
            for i in range(updates):
                reference_update(i)

    b, pair = BATCH, OBS_DIM + ACT_DIM
    actor_first, actor_rest = [(b, OBS_DIM, 256)], [(b, 256, 256), (b, 256, ACT_DIM)]
    critic_first, critic_rest = [(2, b, pair, 256)], [(2, b, 256, 256), (2, b, 256, 1)]
    critic_multiply = matmuls(
        device, forward=actor_first + actor_rest + critic_first + critic_rest, first=critic_first, backward=critic_rest
    )
    through = [(b, pair, 256), (b, 256, 256), (b, 256, 1)]  # the first critic's, forward, and backward to its inputs
    back = [(rows, outputs, inputs) for rows, inputs, outputs in through]
    actor_multiply = matmuls(device, forward=through + back, first=actor_first, backward=actor_rest)

    def limit():
        for i in range(updates):
            critic_multiply()
            if (i + 1) % args.policy_freq == 0:
                actor_multiply()

    return [[t / updates for t in times] for times in take_turns([ours, reference, limit], repeats)]


def bench_offline(device, repeats, quick, name):
    """IQL or EDAC. Returns seconds per update: ours, reference, limit."""
    import synther_edac
    import synther_iql

    script, agent_class, plain = {
        "iql": (synther_iql, "IQL", plain_iql),
        "edac": (synther_edac, "EDAC", plain_edac),
    }[name]
    fewer = 8 if name == "edac" and device == "cpu" else 1
    updates = ((1_000 if quick else 5_000) if device == "cuda" else (100 if quick else 300)) // fewer
    rng = np.random.default_rng(0)
    sizes = [OBS_DIM, ACT_DIM, 1, OBS_DIM, 1]
    arrays = [rng.standard_normal((100_000, size)).astype(np.float32) for size in sizes]
    arrays[-1] = (arrays[-1] > 3).astype(np.float32)
    reference_update = plain(arrays, device)

    # As the main of the script does it
    args = script.resolve(script.Args(env="walker2d-medium-v2"), 100_000)
    rows = edm.pack(*[x.squeeze() for x in arrays]).to(device)
    agent = getattr(script, agent_class)(OBS_DIM, ACT_DIM, 1.0, args, device)
    batch = torch.empty(args.batch_size, rows.shape[1], device=device)
    losses = torch.zeros(len(script.LOSSES), device=device)

    def train_step():
        index = torch.randint(len(rows), (args.batch_size,), device=device)
        torch.index_select(rows, 0, index, out=batch)
        losses.add_(agent.update(batch))

    if device == "cuda":
        train_step = edm.cuda_graph(train_step)

    def ours():
        for i in range(updates):
            if name == "iql":
                agent.anneal(i)
            train_step()

    def reference():
        with plain_pytorch():
            for i in range(updates):
                reference_update(i)

    b, pair = BATCH, OBS_DIM + ACT_DIM
    actor_first, actor_rest = [(b, OBS_DIM, 256)], [(b, 256, 256), (b, 256, ACT_DIM)]
    if name == "iql":
        value_first, value_rest = [(b, OBS_DIM, 256)], [(b, 256, 256), (b, 256, 1)]
        critic_first, critic_rest = [(2, b, pair, 256)], [(2, b, 256, 256), (2, b, 256, 1)]
        multiply = matmuls(
            device,
            forward=value_first + value_rest + critic_first + critic_rest,
            first=value_first + critic_first + actor_first,
            backward=value_rest + critic_rest + actor_rest,
        )
    else:
        n = args.num_critics
        actor_rest = [(b, 256, 256), (b, 256, 256), (b, 256, ACT_DIM), (b, 256, ACT_DIM)]
        layers = [(n, b, pair, 256), (n, b, 256, 256), (n, b, 256, 256), (n, b, 256, 1)]
        back = [(n, b, outputs, inputs) for _, b, inputs, outputs in layers[1:]]
        to_action, from_action = [(n, b, 256, ACT_DIM)], [(n, b, pair, 256)]
        weights = [(n, inputs, b, outputs) for _, b, inputs, outputs in layers]
        through = layers[1:-1]  # ES's gradient, forward
        multiply = matmuls(
            device,
            forward=2 * (actor_first + actor_rest)  # temperature and next actions
            + layers + back + to_action  # actor
            + layers  # targets
            + layers + back + to_action + from_action + through + weights,  # critics
            first=actor_first,
            backward=actor_rest,
        )  # fmt: skip

    def limit():
        for _ in range(updates):
            multiply()

    return [[t / updates for t in times] for times in take_turns([ours, reference, limit], repeats)]


def bench_drqbc(device, repeats, quick):
    """Returns seconds per update from images: ours, reference, limit."""
    import synther_vd4rl

    updates = (50 if quick else 200) if device == "cuda" else (1 if quick else 2)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (4_000, 3, 84, 84), dtype=np.uint8)
    actions = rng.uniform(-1, 1, (4_000, ACT_DIM)).astype(np.float32)
    rewards = rng.uniform(0, 2, 4_000).astype(np.float32)
    reference_update = plain_drqbc(frames, actions, rewards, device)

    # As the main of the script does it
    args = synther_vd4rl.resolve(synther_vd4rl.Args())
    agent = synther_vd4rl.PixelAgent(ACT_DIM, args, device)
    images, a, r = (torch.as_tensor(x, device=device) for x in (frames, actions, rewards))
    rows, discounts = torch.arange(3, 3_900, device=device), torch.full((4_000,), 0.97, device=device)
    noise, losses = torch.full((), 0.5, device=device), torch.zeros(2, device=device)

    def train_step():
        row = rows[torch.randint(len(rows), (args.batch_size,), device=device)]
        start = torch.zeros_like(row)
        batch, next_batch = (
            synther_vd4rl.random_shift(synther_vd4rl.stacked(images, last, start)) for last in (row - 1, row + 2)
        )
        losses.add_(agent.update(batch, a[row], r[row], discounts[row], next_batch, noise))

    if device == "cuda":
        train_step = edm.cuda_graph(train_step)
    convolve = convolutions(device)

    def ours():
        if device == "cpu":
            synther_vd4rl.keep_freed_memory()
        for _ in range(updates):
            train_step()

    def reference():
        if device == "cpu" and sys.platform == "linux":
            libc = ctypes.CDLL(None)
            libc.mallopt(-1, 64 * 2**20)  # where glibc's own thresholds, which grow by themselves, end
            libc.mallopt(-3, 32 * 2**20)
        with plain_pytorch():
            for _ in range(updates):
                reference_update()

    def limit():
        if device == "cpu":
            synther_vd4rl.keep_freed_memory()
        for _ in range(updates):
            convolve()

    return [[t / updates for t in times] for times in take_turns([ours, reference, limit], repeats)]


def bench_sac(device, repeats, quick, algo):
    """Returns seconds per critic update at 20 updates per environment step: ours, reference, limit."""
    import synther_sac_online

    args = synther_sac_online.resolve(synther_sac_online.Args(env="HalfCheetah-v4", algo=algo))
    env_steps = (30 if quick else 200) if device == "cuda" else (3 if quick else 8 if algo == "redq" else 20)
    rng = np.random.default_rng(0)
    real = [rng.standard_normal((20_000, size)).astype(np.float32) for size in (OBS_DIM, ACT_DIM, 1, OBS_DIM, 1)]
    real[-1] = (real[-1] > 3).astype(np.float32)
    buffers = [real, [np.tile(x, (10, 1)) for x in real]] if algo == "synther" else [real]
    reference_step = plain_sac(buffers, args.num_q, args.utd, device)

    # As the main of the script does it
    replay = edm.pack(*[x.squeeze() for x in real]).to(device)
    synthetic = replay.repeat(10, 1) if algo == "synther" else replay[:0]
    agent = synther_sac_online.SAC(OBS_DIM, ACT_DIM, args, device)
    batch = torch.empty(args.batch_size, replay.shape[1], device=device)
    losses = torch.zeros(2, device=device)

    def critic_step():
        losses.add_(torch.stack(agent.update(batch, with_actor=False)))

    def last_step():
        losses.add_(torch.stack(agent.update(batch, with_actor=True)))

    if device == "cuda":
        critic_step, last_step = edm.cuda_graph(critic_step), edm.cuda_graph(last_step)

    def ours():
        for _ in range(env_steps):
            batches = synther_sac_online.sample_batches(
                replay, synthetic, args.utd, args.batch_size, args.synther_ratio
            )
            for i in range(args.utd - 1):
                batch.copy_(batches[i])
                critic_step()
            batch.copy_(batches[-1])
            last_step()

    def reference():
        with plain_pytorch():
            for _ in range(env_steps):
                reference_step()

    n, b, pair = args.num_q, BATCH, OBS_DIM + ACT_DIM
    actor = [(b, OBS_DIM, 256), (b, 256, 256), (b, 256, ACT_DIM), (b, 256, ACT_DIM)]
    pair_of_targets = [(2, b, pair, 256), (2, b, 256, 256), (2, b, 256, 1)]
    critic_first, critic_rest = [(n, b, pair, 256)], [(n, b, 256, 256), (n, b, 256, 1)]
    critic_multiply = matmuls(device, forward=actor + pair_of_targets, first=critic_first, backward=critic_rest)
    through = critic_first + critic_rest  # forward, and backward to their inputs alone
    back = [(k, rows, outputs, inputs) for k, rows, inputs, outputs in through]
    actor_multiply = matmuls(device, forward=through + back, first=actor[:1], backward=actor[1:])

    def limit():
        for _ in range(env_steps):
            for _ in range(args.utd):
                critic_multiply()
            actor_multiply()

    updates = env_steps * args.utd
    return [[t / updates for t in times] for times in take_turns([ours, reference, limit], repeats)]


# --- Memory -----------------------------------------------------------------------------------------------------------


def peak_memory(script, **options):
    """Run a script in a process of its own. Returns its peak memory in GB and its seconds."""
    command = [sys.executable, str(ROOT / script), "--device", "cpu", "--eval-episodes", "0"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    start = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        sys.exit(process.stdout + process.stderr)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, time.perf_counter() - start


def bench_memory(num_rows):
    """Run synther_td3bc.py on random data of Walker2d's size with a tiny network, and print its peak memory."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        data = {
            key: rng.standard_normal((20_000, OBS_DIM)).astype(np.float32)
            for key in ("observations", "next_observations")
        }
        data["actions"] = rng.uniform(-1, 1, (20_000, ACT_DIM)).astype(np.float32)
        data["rewards"] = rng.standard_normal(20_000).astype(np.float32)
        data["terminals"] = rng.random(20_000) < 0.01
        np.savez(Path(folder) / "data.npz", **data)
        peak, took = peak_memory(
            "synther_td3bc.py", env="Walker2d-v4", dataset_path=f"{folder}/data.npz", out_dir=folder,
            diffusion_steps=10, diffusion_width=32, diffusion_depth=1, sample_steps=2, num_samples=num_rows, updates=20,
        )  # fmt: skip
    size = num_rows * DIM * 4 / 1e9
    print(f"{num_rows:,} rows of {DIM} columns ({size:.2f} GB): peak memory {peak:.2f} GB, {took:.0f} s")


def bench_image_memory(num_images):
    """Run synther_vd4rl.py on random images, a few updates of the paper's batch size, and print its peak memory."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "main/walker_walk/expert/84px"
        files.mkdir(parents=True)
        for i in range(math.ceil(num_images / 501)):
            with h5py.File(files / f"{i:05}.hdf5", "w") as f:
                f["observation"] = rng.integers(0, 256, (501, 3, 84, 84), dtype=np.uint8)
                f["action"] = rng.uniform(-1, 1, (501, ACT_DIM)).astype(np.float32)
                f["reward"], f["discount"] = np.ones((2, 501), np.float32)
                f["step_type"] = np.array([0] + 499 * [1] + [2])
        peak, took = peak_memory(
            "synther_vd4rl.py", env="walker-walk-expert", dataset_path=folder, out_dir=folder, stage1_updates=20,
            stage2_updates=20, diffusion_steps=10, diffusion_width=32, sample_steps=2, num_samples=100_000,
        )  # fmt: skip
    size = num_images * 3 * 84 * 84 / 1e9
    print(f"{num_images:,} images ({size:.2f} GB): peak memory {peak:.2f} GB, {took:.0f} s")


# --- Table ------------------------------------------------------------------------------------------------------------


def show(name, unit, scale, times):
    """One line of the table. times: lists of seconds of ours, the reference and the limit, turn by turn."""
    ours, reference, limit = (statistics.median(column) * scale for column in times)
    ratio = statistics.median(b / a for a, b in zip(times[0], times[1]))
    share = statistics.median(c / a for a, c in zip(times[0], times[2]))
    print(f"{name:<34} {unit:<10} {ours:9.3f} {reference:9.3f} {limit:9.3f} {ratio:10.2f}x {share:9.0%}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    parser.add_argument("--quick", action="store_true", help="shorter turns")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU (default: its own choice)")
    parser.add_argument(
        "--only", choices=("training", "sampling", "td3bc", "iql", "edac", "sac", "drqbc"), help="one part of the table"
    )
    parser.add_argument("--memory", type=int, nargs="?", const=5_000_000, metavar="ROWS", help="peak memory instead")
    parser.add_argument("--image-memory", type=int, nargs="?", const=100_000, metavar="IMAGES", help="likewise")
    args = parser.parse_args()
    if args.memory:
        return bench_memory(args.memory)
    if args.image_memory:
        return bench_image_memory(args.image_memory)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    edm.train_edm(torch.randn(64, 3), steps=2, batch_size=8, width=8, depth=1, device=device, progress=False)  # sets up
    kernels = "PyTorch's own choice"
    if device == "cpu" and torch.backends.mkldnn.matmul.fp32_precision != PLAIN_PRECISION:
        kernels = f"mkldnn.matmul.fp32_precision={torch.backends.mkldnn.matmul.fp32_precision!r}"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    print(f"{name} | torch {torch.__version__} | {torch.get_num_threads()} threads | matmul: {kernels}")
    print(f"{'':<34} {'unit':<10} {'ours':>9} {'plain':>9} {'matmul':>9} {'speed-up':>11} {'of limit':>9}")
    options = (device, args.repeats, args.quick)
    if args.only in (None, "training"):
        show(f"diffusion step, {DEPTH} x {WIDTH}, batch {BATCH}", "ms/step", 1e3, bench_training(*options))
    if args.only in (None, "sampling"):
        per_call, equal_quality = bench_sampling(*options)
        show("sampling, one network call", "us/row", 1e6, per_call)
        show("sampling, 32 calls (plain: 255)", "us/row", 1e6, equal_quality)
    if args.only in (None, "td3bc"):
        show(f"TD3+BC update, 2 x 256, batch {BATCH}", "us/update", 1e6, bench_td3bc(*options))
    if args.only in (None, "iql"):
        show(f"IQL update, 2 x 256, batch {BATCH}", "us/update", 1e6, bench_offline(*options, name="iql"))
    if args.only in (None, "edac"):
        show("EDAC update, 10 critics, 3 x 256", "us/update", 1e6, bench_offline(*options, name="edac"))
    if args.only in (None, "sac"):
        show("SAC (SynthER) update, 20 per step", "us/update", 1e6, bench_sac(*options, algo="synther"))
        show("REDQ update, 20 per step", "us/update", 1e6, bench_sac(*options, algo="redq"))
    if args.only in (None, "drqbc"):
        show(f"DrQ+BC update from images, batch {BATCH}", "ms/update", 1e3, bench_drqbc(*options))


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


if __name__ == "__main__":
    main()
