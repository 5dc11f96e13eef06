"""SynthER from pixels: DrQ+BC or BC on V-D4RL, its heads trained on latent transitions from a diffusion model.

Synthetic Experience Replay (Lu et al., NeurIPS 2023, https://arxiv.org/abs/2303.06614), Section 4.3 and Appendix F, on
V-D4RL (Lu et al., 2022). Stage 1 trains DrQ+BC, or behaviour cloning, from images. Then its encoder and trunks are
frozen. They turn each transition into 50 features of the actor and 50 of the critic, before and after. Stage 2 trains
new heads, the layers behind the trunks, on such latent transitions: those of the dataset, or generated ones.

    python synther_vd4rl.py --env walker-walk-expert --dataset-path vd4rl_data             # the paper's; wants a GPU
    python synther_vd4rl.py --env walker-walk-expert --dataset-path vd4rl_data --data real            # the control
    python synther_vd4rl.py ... --agent-path runs/... --data real                      # another stage 2, same stage 1
    python synther_vd4rl.py ... --algo bc                                                      # behaviour cloning
    python synther_vd4rl.py --resume runs/...                     # continue a run that was stopped

Both stages are evaluated from images. The end of stage 1 is the paper's "Original", that of stage 2 its "SynthER"
(Table 4). `vd4rl_data` is the folder that holds `main/`, from https://github.com/conglu1997/v-d4rl. To try all this
without it, `python tests/paper/vd4rl_data.py` renders a small dataset of the same layout.
"""

import contextlib
import copy
import ctypes
import functools
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

import edm

# --- Arguments --------------------------------------------------------------------------------------------------------


@dataclass
class Args(edm.DiffusionArgs):
    env: str = "walker-walk-expert"
    """task and level: walker-walk or cheetah-run, then -random, -mixed, -medium, -medexp or -expert"""
    dataset_path: Optional[str] = None
    """the folder that holds V-D4RL's main/ (default: downloaded, into Hugging Face's cache)"""
    agent_path: Optional[str] = None
    """run folder whose stage-1 agent (agent.pt, of the same env, algo and feature_dim) to use instead of a new one"""
    seed: int = 0
    """seed of the agent, its batches and its evaluation; --diffusion-seed is that of latents, model and samples"""
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU if there is one
    out_dir: str = "runs"  # where the run folder {env}__{exp_name}__{seed}__{unix_time_in_ms} is made
    exp_name: Optional[str] = None
    """name of the experiment, part of the run folder's name; None takes synther_vd4rl-{algo}-{data}"""
    resume: Optional[str] = None  # run folder to continue, with the arguments saved there
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project: str = "synther"  # project to log to with --track
    wandb_entity: Optional[str] = None  # team or user to log to with --track

    algo: Literal["drqbc", "bc"] = "drqbc"  # DrQ+BC, or behaviour cloning, which has no critic and no rewards
    data: Literal["synther", "real"] = "synther"
    """what the heads learn from in stage 2: generated latent transitions (Table 4), or those of the dataset"""
    latent: Literal["both", "actor", "critic"] = "both"
    """features in a latent transition: of actor and critic, or of one of them, that then feeds both heads (Table 13)"""
    max_frames: int = 1_000_000
    """stop loading after the file that brings the frames to this number (paper: 1,000,000; its sets have 100,000)"""

    stage1_updates: int = 550_000
    """gradient updates from images (paper: 1,100,000 iterations, an update every second one)"""
    stage2_updates: int = 550_000  # gradient updates of the new heads (paper: not said; here as many)
    nstep: Optional[int] = None
    """steps of a transition's return (default: 3 for DrQ+BC as in V-D4RL's README, else 1; the paper writes one)"""
    batch_size: int = 256  # transitions per update (paper: 256)
    hidden_dim: int = 1024  # units per hidden layer of the heads (paper: 1024)
    feature_dim: int = 50  # features of a trunk (paper: 50)
    learning_rate: float = 3e-4  # Adam's learning rate (paper: 3e-4)
    discount: float = 0.99  # discount factor gamma (paper: 0.99)
    tau: float = 0.01  # rate of the target networks' moving average (paper: 0.01)
    alpha: float = 2.5  # weight of the Q-value against behaviour cloning (paper: 2.5)
    noise_duration: int = 125_000
    """updates over which the noise on the actions falls from 1.0 to 0.1, in each stage (paper: 250,000 iterations)"""
    noise_clip: float = 0.3  # limit of that noise (paper: 0.3)
    eval_every: int = 5_000  # updates between evaluations (paper: 10,000 iterations)
    eval_episodes: int = 10  # episodes per evaluation, rendered, with the mean action (paper: 10); 0 skips evaluation
    checkpoint_every: int = 5_000  # diffusion training steps, or updates of the agent, between checkpoints


# --- DrQ+BC and BC ----------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """DrQ-v2's: images [batch, 9, 84, 84] of bytes -> [batch, 39200]."""

    def __init__(self):
        super().__init__()
        convolutions = [nn.Conv2d(9, 32, 3, stride=2)] + [nn.Conv2d(32, 32, 3) for _ in range(3)]
        layers = (layer for conv in convolutions for layer in (conv, nn.ReLU(inplace=True)))
        self.net = nn.Sequential(*layers, nn.Flatten())

    def forward(self, images):
        return self.net((images / 255).sub_(0.5))


# Copied from synther_td3bc.EnsembleCritic
class EnsembleCritic(nn.Module):
    """Independent Q-functions as one batched network: (s, a) [batch, obs_dim + act_dim] -> [num_critics, batch]."""

    def __init__(self, in_dim, hidden_dim, hidden_layers, num_critics=2):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        sizes = [in_dim] + [hidden_dim] * hidden_layers + [1]
        for fan_in, fan_out in zip(sizes, sizes[1:]):
            bound = 1 / math.sqrt(fan_in)  # PyTorch's default for a linear layer
            self.weights.append(torch.empty(num_critics, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(num_critics, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x, members=None):  # members: a slice or index tensor of the Q-functions to evaluate; None: all
        layers = [(w, b) if members is None else (w[members], b[members]) for w, b in zip(self.weights, self.biases)]
        h = x.expand(len(layers[0][1]), *x.shape)
        for i, (weight, bias) in enumerate(layers):
            h = torch.baddbmm(bias, F.relu(h, inplace=True) if i else h, weight)  # in place is faster
        return h.squeeze(-1)


@torch.no_grad()
def orthogonal_init(module):
    """DrQ-v2's initial weights: orthogonal, with a gain of sqrt(2) for convolutions, and no biases."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.orthogonal_(part.weight, math.sqrt(2) if isinstance(part, nn.Conv2d) else 1)
            nn.init.zeros_(part.bias)
        if isinstance(part, EnsembleCritic):
            for weight, bias in zip(part.weights, part.biases):
                for w in weight:
                    nn.init.orthogonal_(w)
                bias.zero_()
    return module


class Columns(nn.Module):
    """Some columns of its input: the trunk of stage 2, whose inputs are features already."""

    def __init__(self, columns):
        super().__init__()
        self.columns = columns

    def forward(self, x):
        return x[:, self.columns]


class Agent(nn.Module):
    """DrQ+BC (Lu et al. 2022), or behaviour cloning, which leaves the critics alone. Learns from images in stage 1:
    an encoder, trunks that reduce its output to features, and heads. In stage 2, new heads learn from latents: the
    features of one of the stage-1 agent's trunks, or of both, side by side (Appendix F: pi^fc and Q^fc)."""

    LOSSES = ("critic_loss", "actor_loss")

    def __init__(self, act_dim, args, stage):
        super().__init__()
        self.args, width, hidden = args, args.feature_dim, args.hidden_dim
        if stage == "stage1":
            self.encoder = Encoder()
            make_trunk = lambda: nn.Sequential(nn.Linear(39_200, width), nn.LayerNorm(width), nn.Tanh())  # noqa: E731
            self.actor_trunk, self.critic_trunk = make_trunk(), make_trunk()
        else:
            self.encoder = nn.Identity()
            self.actor_trunk, self.critic_trunk = Columns(slice(width)), Columns(slice(-width, None))
        layers = nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, act_dim)
        self.policy = nn.Sequential(*layers, nn.Tanh())
        self.critic = EnsembleCritic(width + act_dim, hidden, 2)
        orthogonal_init(self)
        self.critic_trunk_target = copy.deepcopy(self.critic_trunk).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.to(args.device)
        self.actor_params = [*self.actor_trunk.parameters(), *self.policy.parameters()]
        self.critic_params = [*self.critic_trunk.parameters(), *self.critic.parameters()]
        self.target_params = [*self.critic_trunk_target.parameters(), *self.critic_target.parameters()]
        groups = dict(actor=self.actor_params, critic=[*self.encoder.parameters(), *self.critic_params])
        if args.algo == "bc":
            self.actor_params += self.encoder.parameters()
            del groups["critic"]
        adam = dict(lr=args.learning_rate, fused=True, capturable=args.device == "cuda")
        self.optimizers = {name: torch.optim.Adam(params, **adam) for name, params in groups.items()}

    def noisy(self, mean, noise):
        """An action around the mean: noise cut at noise_clip, result within (-1, 1). The gradient ignores the last."""
        action = mean + (noise * torch.randn_like(mean)).clamp(-self.args.noise_clip, self.args.noise_clip)
        return action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()

    def update(self, x, actions, rewards, discounts, next_x, noise):
        """One step of encoder and critics, then of the actor, then of the targets. x and next_x are shifted images
        [batch, 9, 84, 84], or latents; actions [batch, act_dim]; rewards and discounts [batch]. Returns LOSSES."""
        h = self.encoder(x)
        critic_loss = torch.zeros((), device=h.device)
        if self.args.algo == "drqbc":
            with torch.no_grad():
                next_h = self.encoder(next_x)
                next_actions = self.noisy(self.policy(self.actor_trunk(next_h)), noise)
                next_q = self.critic_target(torch.cat([self.critic_trunk_target(next_h), next_actions], dim=1)).amin(0)
                target = rewards + discounts * next_q
            q = self.critic(torch.cat([self.critic_trunk(h), actions], dim=1))
            critic_loss = (q - target).square().mean(1).sum()
            self.optimizers["critic"].zero_grad()
            critic_loss.backward()
            self.optimizers["critic"].step()
            h = h.detach()  # the actor does not train the encoder
        policy_actions = self.noisy(self.policy(self.actor_trunk(h)), noise)
        actor_loss = F.mse_loss(policy_actions, actions)
        if self.args.algo == "drqbc":
            q = self.critic(torch.cat([self.critic_trunk(h), policy_actions], dim=1)).amin(0)
            actor_loss = actor_loss - self.args.alpha * q.mean() / q.abs().mean().detach()
        self.optimizers["actor"].zero_grad()
        actor_loss.backward(inputs=self.actor_params)  # no gradient for the critics
        self.optimizers["actor"].step()
        if self.args.algo == "drqbc":
            with torch.no_grad():
                torch._foreach_lerp_(self.target_params, self.critic_params, self.args.tau)
        return torch.stack([critic_loss, actor_loss]).detach()

    def latents(self, images):
        """The features of --latent: [batch, feature_dim], or [batch, 2 * feature_dim] of actor and critic."""
        h = self.encoder(images)
        if self.args.algo == "bc" or self.args.latent == "actor":
            return self.actor_trunk(h)
        if self.args.latent == "critic":
            return self.critic_trunk(h)  # s' by the same trunk, not by the target's
        return torch.cat([self.actor_trunk(h), self.critic_trunk(h)], dim=1)


# --- Data -------------------------------------------------------------------------------------------------------------
# Row t of an episode holds image t, and the action and the reward that led to it. Images are stacked for each batch.

LEVELS = dict(random="random", mixed="medium_replay", medium="medium", medexp="medium_expert", expert="expert")


def find_files(args):
    """The dataset's files, sorted: 84px/*.hdf5, or else 64px/*.npz. Without args.dataset_path they are
    downloaded. RunError if there are none."""
    match = re.fullmatch(r"(walker-walk|cheetah-run)-(\w+)", args.env)
    if not match or match[2] not in LEVELS:
        raise edm.RunError(f"unknown dataset {args.env}: give walker-walk or cheetah-run, then -{', -'.join(LEVELS)}")
    part = Path("main", match[1].replace("-", "_"), LEVELS[match[2]])
    if args.dataset_path is None:
        from huggingface_hub import snapshot_download

        try:
            snapshot = snapshot_download("conglu/vd4rl", repo_type="dataset", allow_patterns=f"vd4rl/{part}/84px/*")
        except Exception as error:  # no network, ...
            raise edm.RunError(f"cannot download V-D4RL (see vd4rl_data.py): {' '.join(str(error).split())}") from None
        args.dataset_path = f"{snapshot}/vd4rl"
    folder = Path(args.dataset_path) / part
    files = sorted((folder / "84px").glob("*.hdf5")) or sorted((folder / "64px").glob("*.npz"))
    if not files:
        raise edm.RunError(f"no 84px/*.hdf5 or 64px/*.npz in {folder}; --dataset-path holds V-D4RL's main/")
    return files


def read_file(path, frames):
    """Read one file's images into `frames` [N, 3, 84, 84] uint8. Returns its action, reward, discount, is_first. Images
    of 64 x 64 are enlarged (cubic interpolation, as V-D4RL's conversion does)."""
    is_npz = path.suffix == ".npz"  # one episode, [501, 64, 64, 3]
    with np.load(path) if is_npz else h5py.File(path, "r") as f:
        images = f["image" if is_npz else "observation"]
        if images.dtype != np.uint8:
            raise ValueError(f"its images are {images.dtype}, not uint8")
        if is_npz:
            images = torch.from_numpy(images).permute(0, 3, 1, 2).float()
            frames.copy_(F.interpolate(images, frames.shape[2:], mode="bicubic").round().clamp(0, 255))
            return [f[key] for key in ("action", "reward", "discount", "is_first")]
        images.read_direct(frames.numpy())
        action, *others = (f[key][:] for key in ("action", "reward", "discount", "step_type"))
    reward, discount, step_type = (x.reshape(len(action)) for x in others)
    return action, reward, discount, step_type == 0


def load_dataset(files, args):
    """All images, and the n-step transitions between them. RunError where the files are not V-D4RL's.

    Returns: dict of tensors
        frames [N, 3, 84, 84] uint8: the images of all episodes, one after the other.
        row [M]: the transitions, by the row of their action; it led from image row - 1 to image row.
        start [M]: the row of the first image of the transition's episode.
        action [M, act_dim], reward [M], discount [M]: float32; the sum of nstep discounted rewards, and what is left of
            the discount after them.
    """
    counts, read = [], []
    try:
        for path in files:
            with np.load(path) if path.suffix == ".npz" else h5py.File(path, "r") as f:
                counts.append(f["reward"].shape[0])
            if sum(counts) >= args.max_frames:
                break
        frames = torch.empty(sum(counts), 3, 84, 84, dtype=torch.uint8)
        for path, part in zip(edm.Bar(files[: len(counts)], "images"), frames.split(counts)):
            read.append(read_file(path, part))
            if any(len(x) != len(part) for x in read[-1]) or read[-1][0].shape[1:] != read[0][0].shape[1:]:
                raise ValueError("the lengths or the shapes of its arrays do not agree")
    except Exception as error:  # truncated, another layout, a missing key, ...
        raise edm.RunError(f"cannot read {path}: {error}") from None
    action, reward, discount, first = (np.concatenate(parts) for parts in zip(*read))
    if not all(np.isfinite(x).all() for x in (action, reward, discount)):
        raise edm.RunError(f"an action, reward or discount of {args.env} is NaN or Inf")
    if not first[0]:
        raise edm.RunError(f"{files[0]} does not begin with the first row of an episode")
    num_rows, n = len(frames), args.nstep
    starts, episode = np.flatnonzero(first), np.cumsum(first) - 1
    start, end = starts[episode], np.append(starts[1:], num_rows)[episode]
    row = np.flatnonzero((np.arange(num_rows) > start) & (np.arange(num_rows) + n <= end))
    if len(row) == 0:
        raise edm.RunError(f"no episode of {args.env} is longer than {n} steps")
    reward = sum(args.discount**k * reward[row + k] for k in range(n))
    discount = args.discount**n * discount[row + n - 1]
    data = dict(row=row, start=start[row], action=action[row], reward=reward, discount=discount)
    data = {key: torch.from_numpy(x if x.dtype == np.int64 else x.astype(np.float32)) for key, x in data.items()}
    return data | {"frames": frames}


def stacked(frames, last, start):
    """The images of rows last - 2 to last, [batch, 9, 84, 84]; before an episode's start its first image."""
    rows = torch.stack([torch.maximum(last - k, start) for k in (2, 1, 0)], dim=1)
    return frames[rows].flatten(1, 2)


def random_shift(images, pad=4):
    """Shift each stack of images by up to `pad` pixels, its border repeated (DrQ's augmentation)."""
    batch, channels, height, width = images.shape
    shift = torch.randint(0, 2 * pad + 1, (2, batch, 1), device=images.device) - pad
    y = (torch.arange(height, device=images.device) + shift[0]).clamp(0, height - 1)
    x = (torch.arange(width, device=images.device) + shift[1]).clamp(0, width - 1)
    images = images.gather(2, y[:, None, :, None].expand(batch, channels, height, width))
    return images.gather(3, x[:, None, None, :].expand(batch, channels, height, width))


@edm.own_randomness
@torch.no_grad()
def extract_latents(agent, data, args):
    """Rows [z, a, r, z'] of all transitions of the dataset, on the CPU. Each image stack is shifted at random once."""
    torch.manual_seed(args.diffusion_seed)
    rows = None
    for index in edm.Bar(torch.arange(len(data["row"]), device=args.device).split(256), "latents"):
        row, start = data["row"][index], data["start"][index]
        z, next_z = (
            agent.latents(random_shift(stacked(data["frames"], last, start)))
            for last in (row - 1, row + args.nstep - 1)
        )
        part = torch.cat([z, data["action"][index], data["reward"][index][:, None], next_z], dim=1)
        rows = torch.empty(len(data["row"]), part.shape[1]) if rows is None else rows  # small pieces would hold memory
        rows[index.cpu()] = part.cpu()
    return rows


def keep_freed_memory():
    """Let glibc keep the memory of freed images for the next ones. An update on a CPU takes 0.8 s instead of 1.4."""
    try:
        libc, (trim_threshold, mmap_threshold) = ctypes.CDLL(None), (-1, -3)  # names from malloc.h
        if libc.mallopt(mmap_threshold, 2**30) == 1:  # some versions refuse so much
            libc.mallopt(trim_threshold, 2**31 - 1)
    except (AttributeError, OSError, TypeError):
        pass  # another C library


# --- Environment and scores -------------------------------------------------------------------------------------------

# Copied from synther_td3bc.REFERENCE_SCORES
REFERENCE_SCORES = {  # returns of a random and an expert policy: D4RL's 0 and 100
    "HalfCheetah-": (-280.178953, 12135.0),
    "Hopper-": (-20.272305, 3234.3),
    "Walker2d-": (1.629008, 4592.3),
    "maze2d-umaze-": (23.85, 161.86),
    "maze2d-medium-": (13.13, 277.39),
    "maze2d-large-": (6.7, 273.99),
    "antmaze-": (0.0, 1.0),
    "dmc/": (0.0, 1000.0),  # every task of the DeepMind Control suite
}


# Copied from synther_td3bc.normalized_score
def normalized_score(env_id, returns):
    """D4RL's score of undiscounted returns: 0 is a random policy, 100 an expert. NaN without an entry above."""
    low, high = next((x for prefix, x in REFERENCE_SCORES.items() if env_id.startswith(prefix)), (math.nan, math.nan))
    return 100 * (returns - low) / (high - low)


class PixelEnv:
    """A DeepMind Control task as V-D4RL has it: each action acts twice, three images of 84 x 84 are seen at once."""

    def __init__(self, task_name):
        import mujoco  # both after MUJOCO_GL is set
        from dm_control import suite

        if tuple(map(int, mujoco.__version__.split(".")[:2])) >= (3, 5):
            warnings.warn("with mujoco 3.5 and later the floor looks different: its images are not V-D4RL's; use 3.4.0")
        self.env = suite.load(*task_name.split("-"))
        self.act_dim = self.env.action_spec().shape[0]

    def render(self):
        return self.env.physics.render(84, 84, camera_id=0).transpose(2, 0, 1)

    def reset(self, seed):
        """Returns [9, 84, 84] uint8."""
        self.env.task._random = np.random.RandomState(seed % 2**32)
        self.observation = self.env.reset().observation  # of the state
        self.images = 3 * [self.render()]
        return np.concatenate(self.images)

    def step(self, action):
        """Returns (images, reward, whether the episode has ended)."""
        reward = 0.0
        for _ in range(2):
            time_step = self.env.step(action)
            reward += time_step.reward
            if time_step.last():
                break
        self.images, self.observation = [*self.images[1:], self.render()], time_step.observation
        return np.concatenate(self.images), reward, time_step.last()


@functools.cache
def choose_renderer():
    """On Linux, where MUJOCO_GL is not set: set it to a renderer that works and needs no screen, if there is one."""
    if "MUJOCO_GL" in os.environ or sys.platform != "linux":
        return
    test = [sys.executable, "-c", "import mujoco; mujoco.GLContext(84, 84).make_current()"]
    for backend in ("egl", "osmesa"):
        if subprocess.run(test, env=os.environ | {"MUJOCO_GL": backend}, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return


# Differs from synther_td3bc.make_env: images
def make_env(task):
    """The environment of a task. RunError if it cannot be rendered here."""
    choose_renderer()
    try:
        env = PixelEnv(task)
        env.reset(0)
    except Exception as error:  # MuJoCo's and OpenGL's, of many kinds
        raise edm.RunError(
            f"cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {error} (evaluation needs EGL or OSMesa; on "
            "Debian and Ubuntu libegl1 with libgl1-mesa-dri, or libosmesa6; or skip it with --eval-episodes 0)"
        ) from None
    return env


# Differs from synther_td3bc.evaluate: one environment, whose images are kept for a picture
@torch.no_grad()
def evaluate(policy, env, episodes, seed):
    """Returns of some episodes, and the images of the first, a list of [3, 84, 84]. `policy` maps images
    [1, 9, 84, 84], a CPU tensor of bytes, to actions [1, act_dim]. Episode i begins with seed + i, as elsewhere."""
    returns, film = np.zeros(episodes), []
    for i in range(episodes):
        images, ended = env.reset(seed + i), False
        while not ended:
            action = policy(torch.from_numpy(images)[None])[0]
            images, reward, ended = env.step(action.numpy())
            returns[i] += reward
            if i == 0:
                film.append(images[-3:])
    return returns, film


def plot_episode(path, film, title, images=10):
    """A strip of images from an episode, evenly spaced, as a PNG."""
    fig = Figure(figsize=(1.2 * images, 1.5), layout="constrained")
    for ax, i in zip(fig.subplots(1, images), np.linspace(0, len(film) - 1, images).astype(int)):
        ax.imshow(film[i].transpose(1, 2, 0))
        ax.axis("off")
    fig.suptitle(title, fontsize=8)
    edm.save_atomically(path, lambda f: fig.savefig(f, format="png", dpi=100))


# --- Experiment -------------------------------------------------------------------------------------------------------


# Copied from synther_td3bc.parse_args
def parse_args():
    """The arguments of the command line. With --resume, those that the run was started with."""
    args = tyro.cli(Args, description=__doc__)
    if args.resume:
        try:
            saved = Args(**json.loads((Path(args.resume) / "args.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise edm.RunError(f"{args.resume} is not a run folder of this script: {error}") from None
        args = tyro.cli(Args, default=saved)
        may_change = ("resume", "track", "wandb_project", "wandb_entity")
        if changed := [k for k, v in vars(args).items() if k not in may_change and v != getattr(saved, k)]:
            raise edm.RunError(f"{args.resume} was started with other values of: {', '.join(changed)}")
    return args


def load_agent(path, act_dim, args):
    """The frozen encoder and trunks that stage 1 left in `path`, in an Agent, and its evaluations. RunError if it is of
    another dataset, algorithm or size."""
    saved = edm.load_file(path, args.device)
    own = {"env": args.env, "algo": args.algo, "feature_dim": args.feature_dim}
    if different := [f"{name}={x}" for name, x in saved["settings"].items() if x != own[name]]:
        raise edm.RunError(f"{path} is an agent of {', '.join(different)}")
    agent = Agent(act_dim, args, "stage1")
    frozen = {name: x for name, x in saved["agent"].items() if name.startswith(("encoder", "actor_t", "critic_trunk"))}
    agent.load_state_dict(frozen, strict=False)
    return agent.requires_grad_(False), saved["evaluations"]


def train(stage, agent, draw, make_policy, offset, evaluations, *, env, saved, log, save, run_dir, start_time, args):
    """Train the agent of a stage, "stage1" or "stage2", with evaluations and checkpoints.

    Args:
        draw: function () -> a batch: the arguments of Agent.update without the noise.
        make_policy: function () -> the policy for `evaluate`, on the CPU.
        offset: updates of the stage before, added to the logged steps.
        evaluations: list of (step, returns), which grows.
        saved: the checkpoint of the run, to go on from if it is of this stage.
    """
    losses, noise, start = torch.zeros(2, device=args.device), torch.ones((), device=args.device), 0
    updates = args.stage1_updates if stage == "stage1" else args.stage2_updates
    if saved["stage"] == stage:
        agent.load_state_dict(saved["agent"])
        for name, optimizer in agent.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        losses.copy_(saved["losses"])
        evaluations[:], start = saved["evaluations"], saved["update"] + 1
        edm.generator(args.device).set_state(saved["rng"].cpu())

    def train_step():
        losses.add_(agent.update(*draw(), noise))

    train_step = edm.cuda_graph(train_step) if args.device == "cuda" else train_step
    bar = edm.Bar(range(start, updates + 1), stage, initial=start, total=updates + 1)
    clock = time.time()
    for update in bar:
        if update > 0:
            noise.fill_(1 - 0.9 * min((update - 1) / args.noise_duration, 1))
            train_step()
        if update > 0 and (update % 1_000 == 0 or update == updates):
            count = update % 1_000 or 1_000
            means = (losses / count).tolist()  # the only wait in training
            if not math.isfinite(sum(means)):
                raise edm.RunError(f"a loss of {stage} is no longer finite, in updates {update - count} to {update}")
            values = {f"train/{name}": mean for name, mean in zip(agent.LOSSES, means)}
            log(offset + update, values | {"perf/updates_per_sec": count / (time.time() - clock)})
            losses.zero_()
            clock = time.time()
        is_due = update % args.eval_every == 0 or update == updates
        if args.eval_episodes and is_due and (update > 0 or not evaluations):  # stage 2 begins where stage 1 ended
            pause = time.time()
            returns, film = evaluate(make_policy(), env, args.eval_episodes, args.seed)
            plot_episode(run_dir / "episode.png", film, f"{run_dir.name}: {stage}, {update:,} updates")
            evaluations.append((offset + update, returns.tolist()))
            values = {"eval/return_mean": returns.mean(), "eval/return_std": returns.std()}
            values["eval/normalized_score"] = normalized_score("dmc/", returns.mean())
            log(offset + update, values | {"perf/seconds": time.time() - start_time})
            bar.set_postfix({key.removeprefix("eval/"): f"{value:.1f}" for key, value in values.items()}, refresh=False)
            clock += time.time() - pause  # the rate is the training's
        if update > 0 and (update % args.checkpoint_every == 0 or update == updates or bar.stop):
            optimizers = {name: optimizer.state_dict() for name, optimizer in agent.optimizers.items()}
            state = dict(stage=stage, update=update, agent=agent.state_dict(), optimizers=optimizers, losses=losses)
            save(state | dict(evaluations=evaluations, rng=edm.generator(args.device).get_state()))


def main(args):
    # --- Arguments, images, environment ---
    start_time = time.time()
    edm.fill(args, dict(exp_name=f"synther_vd4rl-{args.algo}-{args.data}", nstep=3 if args.algo == "drqbc" else 1))
    edm.check_args(args)
    edm.join_processes(args.device)  # under torchrun all but the first stay here
    if args.algo == "bc" and args.latent != "both":
        raise edm.RunError("--latent is a choice between the features of actor and critic; --algo bc has no critic")
    if args.agent_path and not (Path(args.agent_path) / "agent.pt").is_file():
        raise edm.RunError(f"no agent.pt in {args.agent_path}: --agent-path wants the run folder that trained stage 1")
    if args.device == "cpu":
        keep_freed_memory()
    files, task = find_files(args), args.env.rsplit("-", 1)[0]
    env = make_env(task) if args.eval_episodes else None
    data = load_dataset(files, args)
    act_dim = data["action"].shape[1]
    if env and env.act_dim != act_dim:
        raise edm.RunError(f"the dataset has {act_dim} action dimensions, {task} has {env.act_dim}")
    if args.agent_path:
        load_agent(Path(args.agent_path) / "agent.pt", act_dim, args)  # refuses one that does not fit
    edm.resolve(args, len(data["row"]), args.env, latents=True)
    run_name = re.sub(r"[^\w.-]", "-", f"{args.env}__{args.exp_name}__{args.seed}__{1000 * start_time:.0f}")
    run_dir = Path(args.resume or Path(args.out_dir) / run_name)

    # --- Run folder and log ---
    if args.track:
        import wandb

        where = dict(project=args.wandb_project, entity=args.wandb_entity, id=run_dir.name, dir=args.out_dir)
        try:
            wandb.init(**where, config=vars(args), resume="allow")
        except wandb.Error as error:
            raise edm.RunError(f"--track: {error}") from None
        wandb.define_metric("*", step_metric="step")
    if not args.resume:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps(vars(args), indent=2))
    checkpoint = run_dir / "checkpoint.pt"
    data_hash = hashlib.sha256(torch.cat([data["action"], data["reward"][:, None]], dim=1).numpy()).hexdigest()
    saved = edm.load_file(checkpoint, args.device) if checkpoint.exists() else dict(stage="", log_size=0, seconds=0)
    if saved.get("data", data_hash) != data_hash:
        raise edm.RunError(f"{checkpoint} is of other data than {args.dataset_path} has: start a new run")
    start_time -= saved["seconds"]
    print(f"{json.dumps(vars(args), indent=2)}\nrun folder: {run_dir}  (if stopped, go on with --resume {run_dir})")
    edm.on_signal(f"stopped: go on with python {sys.argv[0]} --resume {run_dir}")
    metrics = open(run_dir / "metrics.csv", "a+", buffering=1)
    metrics.truncate(saved["log_size"])  # what was logged after the checkpoint comes again
    metrics.write("" if saved["log_size"] else "step,key,value\n")

    def log(step, values):  # step: diffusion steps for diffusion/... and sampling, updates for all else
        metrics.writelines(f"{step},{key},{float(value)}\n" for key, value in values.items())
        if args.track:
            with contextlib.suppress(Exception):  # a failure of the tracker does not end the run
                wandb.log(values | {"step": step})

    def save(state):
        state |= dict(log_size=metrics.seek(0, 2), seconds=time.time() - start_time, data=data_hash)
        edm.save_atomically(checkpoint, lambda f: torch.save(state, f))

    # --- Stage 1: from images ---
    print(f"{len(data['frames']):,} images, {len(data['row']):,} transitions of {args.nstep} steps")
    data = {key: x.to(args.device) for key, x in data.items()}
    agent_path, latents_path = run_dir / "agent.pt", run_dir / "latents.pt"
    run = dict(env=env, saved=saved, log=log, save=save, run_dir=run_dir, start_time=start_time, args=args)
    evaluations = []
    if args.agent_path and not agent_path.exists():
        shutil.copy(Path(args.agent_path) / "agent.pt", f"{agent_path}.tmp")
        os.replace(f"{agent_path}.tmp", agent_path)
    torch.manual_seed(args.seed)
    if not agent_path.exists():
        agent = Agent(act_dim, args, "stage1")

        def draw_images():
            index = torch.randint(len(data["row"]), (args.batch_size,), device=args.device)
            row, start = data["row"][index], data["start"][index]
            images = next_images = random_shift(stacked(data["frames"], row - 1, start))
            if args.algo == "drqbc":
                next_images = random_shift(stacked(data["frames"], row + args.nstep - 1, start))
            return images, *(data[key][index] for key in ("action", "reward", "discount")), next_images

        def policy_from_images():
            return copy.deepcopy(nn.Sequential(agent.encoder, agent.actor_trunk, agent.policy)).cpu()

        train("stage1", agent, draw_images, policy_from_images, 0, evaluations, **run)
        settings = dict(env=args.env, algo=args.algo, feature_dim=args.feature_dim)
        state = dict(settings=settings, agent=agent.state_dict(), evaluations=evaluations)
        edm.save_atomically(agent_path, lambda f: torch.save(state, f))
    agent, agent_evaluations = load_agent(agent_path, act_dim, args)
    offset = 0 if args.agent_path else args.stage1_updates
    evaluations = [] if args.agent_path else agent_evaluations

    # --- SynthER: train a diffusion model on the latent transitions and generate new ones ---
    if not latents_path.exists():  # kept, so that a resumed run has them to the last bit
        latents = extract_latents(agent, data, args)
        edm.save_atomically(latents_path, lambda f: torch.save(latents, f))
    real = edm.load_file(latents_path)
    data = None  # gives the images' memory back
    latent_dim = (real.shape[1] - act_dim - 1) // 2
    synthetic_path, rows = run_dir / "synthetic.npz", real
    if args.data == "synther" and synthetic_path.exists():
        rows = edm.pack(**edm.load_transitions(synthetic_path))[:, :-1]
    elif args.data == "synther":
        saving = dict(saved=saved, save=save, save_every=args.checkpoint_every)
        saving["log"] = lambda step, values: log(offset + step, values)
        # time_dim is 128 elsewhere offline, which is less than the 207 columns of DrQ+BC's rows
        model = edm.train_edm(real, args, time_dim=256, device=args.device, **saving)
        edm.save_edm(run_dir / "diffusion.pt", model)
        sampling_time = time.time()
        rows = edm.generate(model, args.num_samples, args)
        log(offset + args.diffusion_steps, {"perf/samples_per_sec": len(rows) / (time.time() - sampling_time)})
        edm.plot_marginals(run_dir / "marginals.png", real, rows, latent_dim, act_dim)
        arrays = edm.unpack(F.pad(rows, (0, 1)), latent_dim, act_dim)  # nothing is terminal in these tasks
        edm.save_atomically(synthetic_path, lambda f: np.savez(f, **arrays))
    if args.data == "synther" and saved["stage"] != "stage2":
        report = edm.quality_report(real, rows)
        report = {key: value for key, value in report.items() if "terminals" not in key}  # the last column is a feature
        print("sample quality:", report, "" if report["marginal"] > 0.8 else "\nthe samples are not like the data")
        log(offset + args.diffusion_steps, {f"diffusion/{key}": value for key, value in report.items()})
    print(f"the heads learn from {len(rows):,} latent transitions ({args.data}); the dataset has {len(real):,}")
    rows = rows.to(args.device)

    # --- Stage 2: new heads ---
    torch.manual_seed(args.seed)
    heads = Agent(act_dim, args, "stage2")  # from new weights

    def draw_latents():
        batch = rows[torch.randint(len(rows), (args.batch_size,), device=args.device)]
        z, actions, rewards, next_z = batch.split([latent_dim, act_dim, 1, latent_dim], dim=1)
        return z, actions, rewards[:, 0], args.discount**args.nstep, next_z

    def policy_from_latents():
        frozen, new = (copy.deepcopy(part).cpu() for part in (agent, heads))
        return lambda images: new.policy(new.actor_trunk(frozen.latents(images)))

    train("stage2", heads, draw_latents, policy_from_latents, offset, evaluations, **run)

    # --- Results ---
    if evaluations:
        updates, returns = (np.array(x) for x in zip(*evaluations))
        scores = normalized_score("dmc/", returns)
        arrays = dict(updates=updates, returns=returns, normalized_scores=scores)
        arrays |= dict(final_returns=returns[-1], final_scores=scores[-1])  # by unifloral's names
        edm.save_atomically(run_dir / "final_returns.npz", lambda f: np.savez(f, **arrays))
        unit = "updates of stage 1, then of stage 2" if offset else "updates of stage 2"
        mean, std = scores.mean(1), scores.std(1)  # over the episodes of each evaluation
        ax = Figure(figsize=(6, 4), layout="constrained").subplots()
        ax.fill_between(updates, mean - std, mean + std, alpha=0.25, linewidth=0)
        ax.plot(updates, mean)
        ax.set(xlabel=unit, ylabel="normalised score", title=run_dir.name)
        edm.save_atomically(run_dir / "learning_curve.png", lambda f: ax.figure.savefig(f, format="png", dpi=120))
        ends = [("stage 1", np.flatnonzero(updates <= offset)[-1])] if offset else []
        for name, k in (*ends, ("stage 2", -1)):
            print(f"{name}: normalised score {scores[k].mean():.1f} +- {scores[k].std():.1f}", end=", ")
            print(f"return {returns[k].mean():.0f} +- {returns[k].std():.0f}")
    print(f"done in {time.time() - start_time:.0f} s: {run_dir}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (edm.RunError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(2)
