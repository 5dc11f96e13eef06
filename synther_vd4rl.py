"""SynthER from pixels: DrQ+BC or BC on V-D4RL, its heads trained on latent transitions from a diffusion model.

Synthetic Experience Replay (Lu et al., NeurIPS 2023, https://arxiv.org/abs/2303.06614), Section 4.3 and Appendix F, on
V-D4RL (Lu et al., 2022). Stage 1 trains DrQ+BC, or behaviour cloning, from images. Then its encoder and trunks are
frozen; they turn each transition into 50 features of the actor and 50 of the critic, before and after. Stage 2 trains
new heads, the layers behind the trunks, on such latent transitions: those of the dataset, or those that a diffusion
model generates. Both stages are evaluated from images: the end of stage 1 is the paper's "Original", that of stage 2 on
generated latents its "SynthER" (Table 4), and on the dataset's latents (--data real) a control for the new heads.

    python synther_vd4rl.py --env walker-walk-expert --dataset-path vd4rl_data             # the paper's; wants a GPU
    python synther_vd4rl.py --env walker-walk-expert --dataset-path vd4rl_data --data real            # the control
    python synther_vd4rl.py ... --agent-path runs/... --data real                      # another stage 2, same stage 1
    python synther_vd4rl.py ... --algo bc                                                      # behaviour cloning
    python synther_vd4rl.py --resume runs/...                                   # continue a run that was stopped

`vd4rl_data` is the folder that holds `main/`, from https://github.com/conglu1997/v-d4rl. To try all this without it,
`python tests/paper/vd4rl_data.py` renders a small dataset of the same layout.

Sections: arguments | data | environment and scores | networks | agents | experiment.
"""

import copy
import ctypes
import dataclasses
import filecmp
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
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
from tqdm import tqdm

import edm

# --- Arguments --------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    env: str = "walker-walk-expert"
    """task and level: walker-walk or cheetah-run, then -random, -mixed, -medium, -medexp or -expert"""
    dataset_path: Optional[str] = None
    """the folder that holds V-D4RL's main/; None takes vd4rl_data"""
    seed: int = 0
    """seed of the agent, its batches and its evaluation"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one"""
    out_dir: str = "runs"
    """where the run folder {env}__{exp_name}__{seed}__{unix_time} is made"""
    exp_name: Optional[str] = None
    """name of the experiment, part of the run folder's name; None takes synther_vd4rl-{algo}-{data}"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline needs no account)"""
    wandb_project: str = "synther"
    """project to log to with --track"""
    wandb_entity: Optional[str] = None
    """team or user to log to with --track"""
    resume: Optional[str] = None
    """run folder to continue; its args.json supplies every other argument, and none can be changed"""
    compile: Literal["auto", "on", "off"] = "auto"
    """CUDA graphs of the training steps: auto uses them on a GPU, off runs every step eagerly, on insists on a GPU"""

    # the data
    algo: Literal["drqbc", "bc"] = "drqbc"
    """DrQ+BC, or behaviour cloning, which has no critic and no rewards"""
    data: Literal["synther", "real"] = "synther"
    """what the heads learn from in stage 2: generated latent transitions (Table 4), or those of the dataset"""
    latent: Literal["both", "actor", "critic"] = "both"
    """features in a latent transition: of actor and critic, or of one of them, that then feeds both heads (Table 13)"""
    max_frames: int = 1_000_000
    """stop loading after the file that brings the frames to this number (paper: 1,000,000; its sets have 100,000)"""
    agent_path: Optional[str] = None
    """run folder whose stage-1 agent (agent.pt, of the same env, algo and feature_dim) to use, not training one"""
    synthetic_path: Optional[str] = None
    """synthetic.npz, in the run folder that made it, to use instead of training a diffusion model; wants --agent-path,
    the stage-1 agent that the run had"""

    # the diffusion model
    diffusion_steps: int = 100_000
    """training steps of the diffusion model (paper: 100,000, Table 8)"""
    diffusion_recipe: Optional[Literal["paper", "fast", "ranks"]] = None
    """how to train: as the paper (the default from 100,000 steps on); fast (the default for less): a smaller, smoother
    denoiser, a higher learning rate, guided samples; ranks: fast with columns bent into normal distributions"""
    diffusion_width: Optional[int] = None
    """units per block of the denoiser (paper: 1024, Appendix F; fast: 384)"""
    diffusion_depth: Optional[int] = None
    """residual blocks of the denoiser (paper: 6, Table 8; fast: 4)"""
    diffusion_batch_size: int = 256
    """rows per training step (paper: 256)"""
    diffusion_lr: Optional[float] = None
    """initial learning rate of the cosine schedule (paper: 3e-4, Table 8; fast: 2e-3)"""
    diffusion_seed: int = 0
    """seed of the latent transitions' shifts, the diffusion model and its samples"""
    sampler: Literal["sde", "dpmpp", "dpmpp-sde"] = "dpmpp"
    """dpmpp-sde, dpmpp: DPM-Solver++(2M) with and without noise, one network call per step; sde: the paper's stochastic
    Heun, two (Table 9)"""
    sample_steps: Optional[int] = None
    """noise levels of the sampler (default 32; 128 for sde, the paper's)"""
    num_samples: int = 5_000_000
    """latent transitions to generate, or to take at most from --synthetic-path (paper: 5,000,000, Section 4.3)"""
    sample_batch_size: Optional[int] = None
    """transitions generated at a time (default 2,000 on a CPU; 100,000 on a GPU, the paper's)"""

    # the agent (V-D4RL's values)
    stage1_updates: int = 550_000
    """gradient updates from images (paper: 1,100,000 iterations, an update every second one)"""
    stage2_updates: int = 550_000
    """gradient updates of the new heads (paper: not said; here as many)"""
    nstep: Optional[int] = None
    """steps of a transition's return (paper: 3 for DrQ+BC; for BC it makes no difference, and is 1)"""
    batch_size: int = 256
    """transitions per update (paper: 256)"""
    hidden_dim: int = 1024
    """units per hidden layer of the heads (paper: 1024)"""
    feature_dim: int = 50
    """features of a trunk (paper: 50, Appendix F)"""
    learning_rate: float = 3e-4
    """Adam's learning rate (paper: 3e-4)"""
    discount: float = 0.99
    """discount factor gamma (paper: 0.99)"""
    tau: float = 0.01
    """rate of the target networks' moving average (paper: 0.01)"""
    alpha: float = 2.5
    """weight of the Q-value against behaviour cloning (paper: 2.5)"""
    noise_duration: int = 125_000
    """updates over which the noise on the actions falls from 1.0 to 0.1, in each stage (paper: 250,000 iterations)"""
    noise_clip: float = 0.3
    """limit of that noise (paper: 0.3)"""
    eval_every: int = 5_000
    """updates between evaluations (paper: 10,000 iterations)"""
    eval_episodes: int = 10
    """episodes per evaluation, rendered, with the mean action (paper: 10); 0 skips evaluation"""
    checkpoint_every: int = 5_000
    """steps or updates between checkpoints"""


LEVELS = {
    "random": "random",
    "mixed": "medium_replay",
    "medium": "medium",
    "medexp": "medium_expert",
    "expert": "expert",
}


def resolve(args):
    """Fill every argument that is None and has a value for this algorithm. Returns the same Args."""
    recipe = args.diffusion_recipe or edm.default_recipe(args.diffusion_steps)
    values = {
        "diffusion_recipe": recipe,
        **{f"diffusion_{name}": value for name, value in edm.RECIPES[recipe].items()},
        "dataset_path": "vd4rl_data",
        "exp_name": f"synther_vd4rl-{args.algo}-{args.data}",
        "nstep": 3 if args.algo == "drqbc" else 1,
        "sample_steps": 128 if args.sampler == "sde" else 32,
    }
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


# --- Data -------------------------------------------------------------------------------------------------------------
# Row t of an episode holds image t, and the action and the reward that led to it. Images are kept once, as bytes, and
# stacked when a batch is drawn.


def find_files(args):
    """The dataset's files, sorted: 84px/*.hdf5, or else 64px/*.npz. Raises RunError if there are neither."""
    match = re.fullmatch(r"(walker-walk|cheetah-run)-(\w+)", args.env)
    if not match or match[2] not in LEVELS:
        raise edm.RunError(
            f"unknown dataset {args.env}: give walker-walk or cheetah-run, then -random, -mixed, -medium, -medexp or "
            "-expert"
        )
    folder = Path(args.dataset_path) / "main" / match[1].replace("-", "_") / LEVELS[match[2]]
    files = sorted((folder / "84px").glob("*.hdf5")) or sorted((folder / "64px").glob("*.npz"))
    if not files:
        raise edm.RunError(
            f"no 84px/*.hdf5 or 64px/*.npz in {folder}; V-D4RL's files come from https://github.com/conglu1997/v-d4rl "
            "(Google Drive) or the Hugging Face dataset conglu/vd4rl, and --dataset-path names the folder that holds "
            "main/; tests/paper/vd4rl_data.py makes small sets of the same layout, -random, -mixed and -expert"
        )
    return files


def count_rows(path):
    with np.load(path) if path.suffix == ".npz" else h5py.File(path, "r") as f:
        return f["reward"].shape[0]


def read_file(path, frames):
    """Read one file's images into `frames` [N, 3, 84, 84] uint8; returns its action, reward, discount, is_first.

    Images of 64 x 64 are enlarged (cubic interpolation, as V-D4RL's conversion does).
    """
    if path.suffix == ".npz":  # one episode, [501, 64, 64, 3]
        with np.load(path) as f:
            images = torch.from_numpy(f["image"]).permute(0, 3, 1, 2).float()
            others = [f[key] for key in ("action", "reward", "discount", "is_first")]
        images = F.interpolate(images, frames.shape[2:], mode="bicubic", align_corners=False)
        frames.copy_(images.round().clamp(0, 255))
        return others
    with h5py.File(path, "r") as f:
        f["observation"].read_direct(frames.numpy())
        action, *others = (f[key][:] for key in ("action", "reward", "discount", "step_type"))
    reward, discount, step_type = (x.reshape(len(action)) for x in others)
    return action, reward, discount, step_type == 0


# Differs from synther_td3bc.load_dataset: images
def load_dataset(args):
    """All images, and the n-step transitions between them.

    Returns: dict of tensors
        frames [N, 3, 84, 84] uint8: the images of all episodes, one after the other.
        row [M]: the transitions, by the row of their action; it led from image row - 1 to image row.
        start [M]: the row of the first image of the transition's episode.
        action [M, act_dim], reward [M], discount [M]: float32; the sum of nstep discounted rewards, and what is left of
            the discount after them.

    Raises:
        RunError: no files, or files that are not V-D4RL's.
    """
    files, counts, read = find_files(args), [], []
    try:
        for path in files:
            counts.append(count_rows(path))
            if sum(counts) >= args.max_frames:
                break
        frames = torch.empty(sum(counts), 3, 84, 84, dtype=torch.uint8)
        for path, part in zip(tqdm(files[: len(counts)], "images", **edm.BAR), frames.split(counts)):
            read.append(read_file(path, part))
            if any(len(x) != len(part) for x in read[-1]) or read[-1][0].shape[1:] != read[0][0].shape[1:]:
                raise ValueError("the lengths or the shapes of its arrays do not agree")
    except Exception as error:  # truncated, another layout, a missing key, ...
        raise edm.RunError(f"cannot read {path}: {error}") from None
    names = ("action", "reward", "discount", "first")
    data = {key: np.concatenate(parts) for key, parts in zip(names, zip(*read))}
    for key in ("action", "reward", "discount"):
        if not np.isfinite(data[key]).all():
            raise edm.RunError(f"{key} of {args.env} holds NaN or Inf")
    if not data["first"][0]:
        raise edm.RunError(f"{files[0]} does not begin with the first row of an episode")
    num_rows, n = len(frames), args.nstep
    starts, episode = np.flatnonzero(data["first"]), np.cumsum(data["first"]) - 1
    start, end = starts[episode], np.append(starts[1:], num_rows)[episode]
    row = np.flatnonzero((np.arange(num_rows) > start) & (np.arange(num_rows) + n <= end))
    if len(row) == 0:
        raise edm.RunError(f"no episode of {args.env} is longer than {n} steps")
    reward = sum(args.discount**k * data["reward"][row + k] for k in range(n))
    discount = args.discount**n * data["discount"][row + n - 1]
    to_float = lambda x: torch.from_numpy(x.astype(np.float32))  # noqa: E731
    return {
        "frames": frames,
        "row": torch.from_numpy(row),
        "start": torch.from_numpy(start[row]),
        "action": to_float(data["action"][row]),
        "reward": to_float(reward),
        "discount": to_float(discount),
    }


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


# --- Environment and scores -------------------------------------------------------------------------------------------

# Copied from synther_td3bc.REFERENCE_SCORES
REFERENCE_SCORES = {
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
    """D4RL's score of undiscounted returns: 0 is a random policy, 100 an expert. NaN for environments without one."""
    scores = (scores for prefix, scores in REFERENCE_SCORES.items() if env_id.startswith(prefix))
    low, high = next(scores, (math.nan, math.nan))
    return 100 * (returns - low) / (high - low)


def choose_renderer():
    """Set MUJOCO_GL to a way of rendering without a screen that works here.

    Raises:
        RunError: there is none.
    """
    if "MUJOCO_GL" in os.environ or sys.platform != "linux":
        return
    for backend in ("egl", "osmesa"):
        test = "import mujoco; mujoco.GLContext(84, 84).make_current()"
        env = os.environ | {"MUJOCO_GL": backend}
        if subprocess.run([sys.executable, "-c", test], env=env, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return
    raise edm.RunError(
        "evaluation needs a renderer, and neither EGL nor OSMesa works; install one (Debian, Ubuntu: libegl1 with "
        "libgl1-mesa-dri, or libosmesa6), or skip evaluation with --eval-episodes 0"
    )


class PixelEnv:
    """A DeepMind Control task as V-D4RL has it: each action acts twice, three images of 84 x 84 are seen at once."""

    def __init__(self, task_name):
        import mujoco  # both after MUJOCO_GL is set
        from dm_control import suite

        if tuple(map(int, mujoco.mj_versionString().split(".")[:2])) >= (3, 5):
            warnings.warn("with mujoco 3.5 and later the floor looks different: its images are not V-D4RL's; use 3.4.0")
        self.env = suite.load(*task_name.split("-"))
        self.act_dim = self.env.action_spec().shape[0]

    def render(self):
        return self.env.physics.render(84, 84, camera_id=0).transpose(2, 0, 1)

    def reset(self, seed):
        """Returns [9, 84, 84] uint8."""
        self.env.task._random = np.random.RandomState(seed)
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


# Differs from synther_td3bc.evaluate: one environment, whose images are kept for a picture
@torch.no_grad()
def evaluate(policy, env, episodes, seed):
    """Returns of some episodes, and the images of the first, a list of [3, 84, 84].

    Args:
        policy: maps images [1, 9, 84, 84], a CPU tensor of bytes, to actions [1, act_dim].
        seed: episode i begins with seed + i, the same at every evaluation.
    """
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


# --- Networks ---------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """DrQ-v2's: images [batch, 9, 84, 84] of bytes -> [batch, 39200]."""

    def __init__(self):
        super().__init__()
        convolutions = [nn.Conv2d(9, 32, 3, stride=2)] + [nn.Conv2d(32, 32, 3) for _ in range(3)]
        layers = (layer for conv in convolutions for layer in (conv, nn.ReLU(inplace=True)))
        self.net = nn.Sequential(*layers, nn.Flatten())

    def forward(self, images):
        return self.net((images / 255).sub_(0.5))


def make_trunk(feature_dim):
    """What reduces the encoder's output to features, within (-1, 1)."""
    return nn.Sequential(nn.Linear(39_200, feature_dim), nn.LayerNorm(feature_dim), nn.Tanh())


def make_policy(feature_dim, hidden_dim, act_dim):
    """The actor's head: features -> mean action, within (-1, 1)."""
    hidden = nn.Linear(feature_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(hidden_dim, act_dim), nn.Tanh())


# Copied from synther_td3bc.EnsembleCritic
class EnsembleCritic(nn.Module):
    """Independent Q-functions as one batched network: (s, a) [batch, obs_dim + act_dim] -> [num_critics, batch]."""

    def __init__(self, in_dim, hidden_dim, hidden_layers, num_critics=2):
        super().__init__()
        sizes = [in_dim] + [hidden_dim] * hidden_layers + [1]
        bound = [1 / math.sqrt(fan_in) for fan_in in sizes[:-1]]  # PyTorch's default for a linear layer
        new = torch.empty
        weights = [new(num_critics, i, o).uniform_(-b, b) for b, i, o in zip(bound, sizes, sizes[1:])]
        biases = [new(num_critics, 1, o).uniform_(-b, b) for b, o in zip(bound, sizes[1:])]
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)

    def forward(self, x, members=slice(None)):
        """members: a slice or index tensor of the Q-functions to evaluate; all of them if left out."""
        h = x.expand(len(self.biases[0][members]), *x.shape)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias[members], F.relu(h) if i else h, weight[members])
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


# --- Agents -----------------------------------------------------------------------------------------------------------


def noisy(mean, noise, clip):
    """An action around the mean: noise cut at `clip`, result within (-1, 1); the gradient ignores the second cut."""
    action = mean + (noise * torch.randn_like(mean)).clamp(-clip, clip)
    return action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()


class Heads(nn.Module):
    """The layers behind the trunks, and DrQ+BC's losses of features (Appendix F: pi^fc and Q^fc)."""

    def __init__(self, act_dim, args):
        super().__init__()
        self.args = args
        self.policy = orthogonal_init(make_policy(args.feature_dim, args.hidden_dim, act_dim))
        if args.algo == "drqbc":
            self.critic = orthogonal_init(EnsembleCritic(args.feature_dim + act_dim, args.hidden_dim, 2))
            self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)

    def critic_loss(self, features, actions, rewards, discounts, next_actor_features, next_features, noise):
        """Temporal difference: `next_features` are those for the target critics."""
        with torch.no_grad():
            next_actions = noisy(self.policy(next_actor_features), noise, self.args.noise_clip)
            next_q = self.critic_target(torch.cat([next_features, next_actions], dim=1)).amin(0)
            target = rewards + discounts * next_q
        q = self.critic(torch.cat([features, actions], dim=1))
        return (q - target).square().mean(1).sum()

    def actor_loss(self, actor_features, critic_features, actions, noise):
        """Behaviour cloning, and for DrQ+BC minus the Q-value in units of its size."""
        policy_actions = noisy(self.policy(actor_features), noise, self.args.noise_clip)
        loss = F.mse_loss(policy_actions, actions)
        if self.args.algo == "drqbc":
            q = self.critic(torch.cat([critic_features, policy_actions], dim=1)).amin(0)
            loss = loss - self.args.alpha * q.mean() / q.abs().mean().detach()
        return loss


LOSSES = ("critic_loss", "actor_loss")
IMAGES_AT_ONCE = {"cpu": 32, "cuda": 256}  # through the encoder; a few are as fast on a CPU, and take 0.5 GB less


class PixelAgent(nn.Module):
    """Stage 1: DrQ+BC (Lu et al. 2022), or behaviour cloning, from images. An update touches tensors only."""

    def __init__(self, act_dim, args, device):
        super().__init__()
        self.args = args
        self.encoder = orthogonal_init(Encoder())
        self.actor_trunk = orthogonal_init(make_trunk(args.feature_dim))
        self.heads = Heads(act_dim, args)
        actor_parts, online, target = [self.actor_trunk, self.heads.policy], [], []
        if args.algo == "drqbc":
            self.critic_trunk = orthogonal_init(make_trunk(args.feature_dim))
            self.critic_trunk_target = copy.deepcopy(self.critic_trunk).requires_grad_(False)
            online, target = (
                (self.critic_trunk, self.heads.critic),
                (self.critic_trunk_target, self.heads.critic_target),
            )
        else:
            actor_parts.append(self.encoder)
        self.to(device)
        self.online, self.target = ([p for part in parts for p in part.parameters()] for parts in (online, target))
        self.actor_params = [p for part in actor_parts for p in part.parameters()]
        adam = dict(lr=args.learning_rate, fused=True, capturable=torch.device(device).type == "cuda")
        self.optimizers = {"actor": torch.optim.Adam(self.actor_params, **adam)}
        if args.algo == "drqbc":
            self.optimizers["critic"] = torch.optim.Adam([*self.encoder.parameters(), *self.online], **adam)

    def update(self, images, actions, rewards, discounts, next_images, noise):
        """One step of encoder and critics, then one of the actor, then of the targets. Returns the losses, [2].

        Args: images and next_images [batch, 9, 84, 84], shifted; the others [batch, act_dim], [batch], [batch].
        """
        is_bc, num_images = self.args.algo == "bc", len(images)
        encoder_optimizer = self.optimizers["actor" if is_bc else "critic"]
        encoder_optimizer.zero_grad(set_to_none=True)
        at_once = IMAGES_AT_ONCE[images.device.type]
        parts = (x.split(at_once) for x in (images, actions, rewards, discounts, next_images))
        hidden, loss_sum = [], torch.zeros((), device=images.device)
        for x, action, reward, discount, next_x in zip(*parts):
            if not is_bc:
                with torch.no_grad():
                    next_h = self.encoder(next_x)
                    next_features = self.actor_trunk(next_h), self.critic_trunk_target(next_h)
            h = self.encoder(x)
            if is_bc:
                loss = self.heads.actor_loss(self.actor_trunk(h), None, action, noise)
            else:
                loss = self.heads.critic_loss(self.critic_trunk(h), action, reward, discount, *next_features, noise)
            loss = loss * (len(x) / num_images)
            loss.backward()
            hidden.append(h.detach())
            loss_sum += loss.detach()
        encoder_optimizer.step()
        if is_bc:
            return torch.stack([torch.zeros_like(loss_sum), loss_sum])
        h = torch.cat(hidden)
        with torch.no_grad():
            critic_features = self.critic_trunk(h)
        actor_loss = self.heads.actor_loss(self.actor_trunk(h), critic_features, actions, noise)
        step_on_gradient(self.optimizers["actor"], actor_loss, self.actor_params)
        with torch.no_grad():
            torch._foreach_lerp_(self.target, self.online, self.args.tau)
            return torch.stack([loss_sum, actor_loss])

    def latents(self, images):
        """The frozen features of --latent: [batch, feature_dim], or [batch, 2 * feature_dim] of actor and critic."""
        h = self.encoder(images)
        if self.args.algo == "bc" or self.args.latent == "actor":
            return self.actor_trunk(h)
        if self.args.latent == "critic":
            return self.critic_trunk(h)
        return torch.cat([self.actor_trunk(h), self.critic_trunk(h)], dim=1)


class LatentAgent(nn.Module):
    """Stage 2: new heads, on latent transitions, rows [z, a, r, z'] (Appendix F). An update touches tensors only."""

    def __init__(self, act_dim, args, device):
        super().__init__()
        self.args = args
        self.heads = Heads(act_dim, args).to(device)
        self.latent_dim = args.feature_dim * (2 if args.algo == "drqbc" and args.latent == "both" else 1)
        self.sizes = [self.latent_dim, act_dim, 1, self.latent_dim]
        self.actor_params = list(self.heads.policy.parameters())
        adam = dict(lr=args.learning_rate, fused=True, capturable=torch.device(device).type == "cuda")
        self.optimizers = {"actor": torch.optim.Adam(self.actor_params, **adam)}
        self.online, self.target = [], []
        if args.algo == "drqbc":
            self.online, self.target = (
                list(critic.parameters()) for critic in (self.heads.critic, self.heads.critic_target)
            )
            self.optimizers["critic"] = torch.optim.Adam(self.online, **adam)

    def features(self, latents):
        """Features for the actor and for the critic: the two halves, or the same for both."""
        return latents[:, : self.args.feature_dim], latents[:, -self.args.feature_dim :]

    def update(self, batch, noise):
        """One step of the critics, then one of the actor, then of the targets. Returns the losses, a tensor [2]."""
        latents, actions, rewards, next_latents = batch.split(self.sizes, dim=1)
        actor_features, critic_features = self.features(latents)
        critic_loss = torch.zeros((), device=batch.device)
        if self.args.algo == "drqbc":
            discount = self.args.discount**self.args.nstep  # nothing is terminal in these tasks
            critic_loss = self.heads.critic_loss(
                critic_features, actions, rewards[:, 0], discount, *self.features(next_latents), noise
            )
            self.optimizers["critic"].zero_grad(set_to_none=True)
            critic_loss.backward()
            self.optimizers["critic"].step()
        actor_loss = self.heads.actor_loss(actor_features, critic_features, actions, noise)
        step_on_gradient(self.optimizers["actor"], actor_loss, self.actor_params)
        with torch.no_grad():
            if self.target:  # behaviour cloning has none
                torch._foreach_lerp_(self.target, self.online, self.args.tau)
            return torch.stack([critic_loss, actor_loss])


def step_on_gradient(optimizer, loss, params):
    """One step of an optimizer on the gradient of a loss by its parameters, and by no others."""
    for parameter, grad in zip(params, torch.autograd.grad(loss, params)):
        parameter.grad = grad
    optimizer.step()


# --- Experiment -------------------------------------------------------------------------------------------------------


def keep_freed_memory():
    """On a CPU, keep the memory of freed images for the next: glibc gives large blocks back to the system each time,
    and clearing new ones takes a tenth of an update."""
    try:
        libc, (trim_threshold, mmap_threshold) = ctypes.CDLL(None), (-1, -3)  # names from malloc.h
        if libc.mallopt(mmap_threshold, 2**30) == 1:  # some versions refuse so much
            libc.mallopt(trim_threshold, 2**31 - 1)
    except (AttributeError, OSError, TypeError):
        pass  # another C library


MAY_CHANGE = ("resume",)


# Copied from synther_td3bc.load_resumed_args
def load_resumed_args(args):
    """The arguments saved in the run folder args.resume, but for those that MAY_CHANGE.

    Raises:
        RunError: it is not a run folder of this script, or an argument given beside --resume contradicts it.
    """
    try:
        saved = Args(**json.loads((Path(args.resume) / "args.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise edm.RunError(f"{args.resume} is not a run folder of this script: {error}") from None
    flags = {text.split("=")[0].lstrip("-").replace("-", "_") for text in sys.argv[1:]}
    for field in dataclasses.fields(Args):
        given, was = getattr(args, field.name), getattr(saved, field.name)
        if given == field.default and field.name not in flags:
            continue
        if field.name in MAY_CHANGE:
            setattr(saved, field.name, given)
        elif given != was:
            raise edm.RunError(f"{args.resume} was started with {field.name}={was}, not {given}")
    return saved


MAY_BE_ZERO = ("seed", "diffusion_seed", "eval_episodes", "noise_clip", "alpha")


# Copied from synther_td3bc.check_numbers
def check_numbers(args):
    """Raise RunError where a number makes no sense; for the arguments of all scripts."""
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if name == "target_entropy":
            if not math.isfinite(value):
                raise edm.RunError(f"--target-entropy must be finite, not {value}")
        elif name in MAY_BE_ZERO and not 0 <= value < math.inf:
            raise edm.RunError(f"--{name.replace('_', '-')} must not be negative, not {value}")
        elif name not in MAY_BE_ZERO and not 0 < value < math.inf:
            raise edm.RunError(f"--{name.replace('_', '-')} must be positive, not {value}")
        if name in ("discount", "tau", "expectile", "synther_ratio") and value > 1:
            raise edm.RunError(f"--{name.replace('_', '-')} must be at most 1, not {value}")


def check_synthetic(args):
    """Raise RunError unless the latents in --synthetic-path come from the stage-1 agent in --agent-path."""
    folder = Path(args.synthetic_path).parent
    try:
        with np.load(args.synthetic_path) as f:
            f["rewards"]
    except Exception:  # truncated, not that format, ...
        raise edm.RunError(f"{args.synthetic_path} is damaged, or not a synthetic.npz of this script") from None
    try:
        made_by = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):
        raise edm.RunError(f"{folder} lacks the args.json of the run that made {args.synthetic_path}") from None
    wanted = {name: getattr(args, name) for name in ("env", "algo", "latent", "nstep", "discount", "feature_dim")}
    if different := [f"{name}={made_by.get(name)}" for name in wanted if made_by.get(name) != wanted[name]]:
        raise edm.RunError(f"{args.synthetic_path} was made with {', '.join(different)}")
    agent_paths = folder / "agent.pt", Path(args.agent_path) / "agent.pt"
    if not agent_paths[0].is_file() or not filecmp.cmp(*agent_paths, shallow=False):
        raise edm.RunError(f"{args.synthetic_path} holds latents of another stage-1 agent than {args.agent_path}")


def check_args(args):
    """Raise RunError where an argument makes no sense or a choice cannot be had on this machine."""
    check_numbers(args)
    find_files(args)
    if args.algo == "bc" and args.latent != "both":
        raise edm.RunError("--latent is a choice between the features of actor and critic; --algo bc has no critic")
    if args.synthetic_path and args.data == "real":
        raise edm.RunError("--synthetic-path has no use with --data real")
    if args.synthetic_path and not args.agent_path:
        raise edm.RunError("--synthetic-path needs --agent-path, the run whose stage-1 agent the latents come from")
    if args.agent_path and not (Path(args.agent_path) / "agent.pt").is_file():
        raise edm.RunError(f"no agent.pt in {args.agent_path}: --agent-path wants the run folder that trained stage 1")
    if args.synthetic_path and not Path(args.synthetic_path).is_file():
        raise edm.RunError(f"no such file: {args.synthetic_path}")
    if args.synthetic_path:
        check_synthetic(args)
    if not torch.cuda.is_available() and (args.device == "cuda" or args.compile == "on"):
        raise edm.RunError("--device cuda and --compile on need a GPU, and PyTorch finds none")
    if args.compile == "on" and args.device == "cpu":
        raise edm.RunError("--compile on needs a GPU, and --device cpu forbids it")


def load_agent(path, act_dim, args, device):
    """The frozen encoder and trunks that stage 1 left in `path`, in a PixelAgent, and what was saved beside them.

    Raises:
        RunError: it is of another dataset, algorithm or size.
    """
    saved = edm.load_file(path, device)
    settings = saved.get("settings", {})
    own = {"env": args.env, "algo": args.algo, "feature_dim": args.feature_dim}
    if different := [f"{name}={settings.get(name)}" for name in own if settings.get(name) != own[name]]:
        raise edm.RunError(f"{path} is an agent of {', '.join(different)}")
    with torch.random.fork_rng(devices=[]):  # the weights are replaced
        agent = PixelAgent(act_dim, args, device)
    state = {name: x for name, x in saved["agent"].items() if not name.startswith("heads")}
    agent.load_state_dict(state, strict=False)
    return agent.requires_grad_(False), saved


# Copied from synther_td3bc.start_run
def start_run(args, start_time):
    """Make the run folder, or open it again, and write args.json.

    Returns:
        (folder, function log(step, {key: value}) that adds lines to metrics.csv and, with --track, to wandb).
    """
    run_name = f"{args.env}__{args.exp_name}__{args.seed}__{int(start_time)}".replace("/", "-")
    run_dir = Path(args.resume or Path(args.out_dir) / run_name)
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    resolved = json.dumps(vars(args) | {"resume": None}, indent=2)
    edm.save_atomically(run_dir / "args.json", lambda f: f.write(resolved.encode()))
    print(f"{resolved}\nrun folder: {run_dir}  (if stopped, go on with --resume {run_dir})")
    timer = threading.Timer(90, edm.warn_if_crowded)
    timer.daemon = True  # does not outlive the run
    timer.start()
    metrics_path = run_dir / "metrics.csv"
    lines = metrics_path.read_text().splitlines(keepends=True) if metrics_path.exists() else ["step,key,value\n"]
    lines = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
    edm.save_atomically(metrics_path, lambda f: f.write("".join(lines).encode()))
    logged = {tuple(line.split(",")[:2]) for line in lines}
    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project, entity=args.wandb_entity, name=run_dir.name, id=run_dir.name, config=vars(args),
            dir=run_dir, resume="allow",
        )  # fmt: skip
        wandb.define_metric("*", step_metric="step")

    def log(step, values):
        # After a resume, the steps since the last checkpoint come again, with the same values: log each once.
        values = {key: value for key, value in values.items() if (str(step), key) not in logged}
        logged.update((str(step), key) for key in values)
        with open(metrics_path, "a") as f:
            f.writelines(f"{step},{key},{float(value)}\n" for key, value in values.items())
        if args.track:
            wandb.log(values | {"step": step})

    return run_dir, log


@torch.no_grad()
def extract_latents(agent, data, seed):
    """Rows [z, a, r, z'] of all transitions of the dataset, each image stack shifted at random once; on the CPU."""
    device, nstep, rows = data["frames"].device, agent.args.nstep, None
    at_once = IMAGES_AT_ONCE[device.type]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for index in tqdm(torch.arange(len(data["row"]), device=device).split(at_once), "latents", **edm.BAR):
            row, start = data["row"][index], data["start"][index]
            z, next_z = (
                agent.latents(random_shift(stacked(data["frames"], last, start))) for last in (row - 1, row + nstep - 1)
            )
            part = torch.cat([z, data["action"][index], data["reward"][index][:, None], next_z], dim=1)
            if rows is None:  # one block: small ones among the images would keep their memory from being used again
                rows = torch.empty(len(data["row"]), part.shape[1])
            rows[index.cpu()] = part.cpu()
    return rows


# Differs from synther_td3bc.make_synthetic: latents instead of states, no terminals
def make_synthetic(args, real, latent_dim, act_dim, run_dir, device, log, step):
    """Train the diffusion model, generate latent transitions and report their quality; or load them if they exist.

    Returns: rows [num_samples, dim] as `real`, on the CPU. They are left in the run folder as synthetic.npz (latents
    under D4RL's names of observations), the model as diffusion.pt, the histograms as marginals.png.
    """
    path = Path(args.synthetic_path or run_dir / "synthetic.npz")
    if path.exists():
        (run_dir / "synthetic.partial").unlink(missing_ok=True)
        try:
            with np.load(path) as f:
                rows = edm.pack(**f)[:, :-1]
        except Exception:  # truncated, not that format, keys of another script, ...
            raise edm.RunError(f"{path} is damaged, or not a synthetic.npz of this script") from None
        if rows.shape[1] != real.shape[1]:
            raise edm.RunError(f"{path} has rows of {rows.shape[1]} numbers, and --latent wants {real.shape[1]}")
        return rows
    if (run_dir / "diffusion.pt").exists():
        model = edm.load_edm(run_dir / "diffusion.pt", device)
    else:
        model = edm.train_edm(
            real,
            steps=args.diffusion_steps,
            recipe=args.diffusion_recipe,
            time_dim=256,  # 128 elsewhere offline, which is less than the 207 columns of DrQ+BC's rows
            batch_size=args.diffusion_batch_size,
            lr=args.diffusion_lr,
            width=args.diffusion_width,
            depth=args.diffusion_depth,
            seed=args.diffusion_seed,
            device=device,
            compile=args.compile,
            checkpoint_path=run_dir / "diffusion_checkpoint.pt",
            checkpoint_every=args.checkpoint_every,
            on_log=lambda diffusion_step, values: log(step + diffusion_step, values),
        )
        edm.save_edm(run_dir / "diffusion.pt", model)
    (run_dir / "diffusion_checkpoint.pt").unlink(missing_ok=True)
    sampling_time = time.time()
    rows = edm.generate(
        model,
        args.num_samples,
        sampler=args.sampler,
        sample_steps=args.sample_steps,
        batch_size=args.sample_batch_size,
        seed=args.diffusion_seed,
        partial_path=run_dir / "synthetic.partial",
    )
    step += args.diffusion_steps
    log(step, {"perf/samples_per_sec": len(rows) / (time.time() - sampling_time)})
    report = edm.quality_report(real, rows)
    for key in ("terminals", "terminals_real"):  # of the last column, which is a feature here
        report.pop(key, None)
    print(edm.format_report(report))
    log(step, {f"diffusion/{key}": value for key, value in report.items()})
    if report["nonfinite"] > 0:
        raise edm.RunError(f"{report['nonfinite']:.1%} of the generated transitions hold NaN or Inf")
    edm.plot_marginals(run_dir / "marginals.png", real, rows, latent_dim, act_dim)
    z, action, reward, next_z = (part.numpy() for part in rows.split([latent_dim, act_dim, 1, latent_dim], dim=1))
    saved = dict(observations=z, actions=action, rewards=reward[:, 0], next_observations=next_z)
    edm.save_atomically(path, lambda f: np.savez(f, **saved, terminals=np.zeros(len(rows), bool)))
    (run_dir / "synthetic.partial").unlink()
    return rows


# Copied from synther_td3bc.plot_learning_curve
def plot_learning_curve(path, env_id, evaluations, unit):
    """Draw mean and standard deviation over the episodes of each evaluation, [(time in units, returns), ...]."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    times = [t for t, _ in evaluations]
    scores = normalized_score(env_id, np.array([returns for _, returns in evaluations]))
    label = "normalised score"
    if np.isnan(scores).all():
        scores, label = np.array([returns for _, returns in evaluations]), "return"
    mean, std = scores.mean(1), scores.std(1)
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.fill_between(times, mean - std, mean + std, alpha=0.25, linewidth=0)
    ax.plot(times, mean)
    ax.set(xlabel=unit, ylabel=label, title=path.parent.name)
    edm.save_atomically(path, lambda f: fig.savefig(f, format="png", dpi=120))
    plt.close(fig)


def plot_episode(path, film, title, images=10):
    """A strip of images from an episode, evenly spaced, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [film[i] for i in np.linspace(0, len(film) - 1, images).astype(int)]
    fig, axes = plt.subplots(1, images, figsize=(1.2 * images, 1.5), layout="constrained")
    for ax, image in zip(axes, chosen):
        ax.imshow(image.transpose(1, 2, 0))
        ax.axis("off")
    fig.suptitle(title, fontsize=8)
    edm.save_atomically(path, lambda f: fig.savefig(f, format="png", dpi=100))
    plt.close(fig)


def main(args):
    start_time = time.time()
    if args.resume:
        args = load_resumed_args(args)
    resolve(args)
    check_args(args)
    for name in ("dataset_path", "synthetic_path", "agent_path"):  # so that a run can be resumed from anywhere
        if getattr(args, name):
            setattr(args, name, str(Path(getattr(args, name)).resolve()))
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    task, env = args.env.rsplit("-", 1)[0], None
    if args.eval_episodes:
        choose_renderer()
        try:
            env = PixelEnv(task)
            env.reset(args.seed)
        except Exception as error:  # MuJoCo's and OpenGL's, of many kinds
            raise edm.RunError(f"cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {error}") from None
    data = load_dataset(args)
    act_dim = data["action"].shape[1]
    if env and env.act_dim != act_dim:
        raise edm.RunError(f"the dataset has {act_dim} action dimensions, {task} has {env.act_dim}")
    if args.agent_path and not args.resume:
        load_agent(Path(args.agent_path) / "agent.pt", act_dim, args, "cpu")  # refuses one that does not fit
    run_dir, log = start_run(args, start_time)
    print(f"{len(data['frames']):,} images, {len(data['row']):,} transitions of {args.nstep} steps")
    data = {key: x.to(device) for key, x in data.items()}
    checkpoint_path, latents_path, agent_path = (run_dir / f"{x}.pt" for x in ("checkpoint", "latents", "agent"))
    if args.agent_path and not agent_path.exists():
        with open(Path(args.agent_path) / "agent.pt", "rb") as source:
            edm.save_atomically(agent_path, lambda f: shutil.copyfileobj(source, f))
    score_id, evaluations = f"dmc/{task}", []

    def train(stage, agent, updates, draw_and_update, make_policy, offset):
        """Train an agent of either stage, with evaluations and checkpoints; `offset` is added to the logged steps."""
        nonlocal evaluations, start_time
        losses, noise, start = torch.zeros(len(LOSSES), device=device), torch.ones((), device=device), 0
        if checkpoint_path.exists():
            checkpoint = edm.load_file(checkpoint_path, device)
            if checkpoint["stage"] == stage:
                agent.load_state_dict(checkpoint["agent"])
                for name, optimizer in agent.optimizers.items():
                    optimizer.load_state_dict(checkpoint["optimizers"][name])
                losses, evaluations, start = checkpoint["losses"], checkpoint["evaluations"], checkpoint["update"]
                edm.set_rng_state(checkpoint["rng"], device)
                start_time = time.time() - checkpoint["seconds"]

        def train_step():
            losses.add_(draw_and_update(noise))

        if device.type == "cuda" and args.compile != "off":
            train_step = edm.cuda_graph(train_step)

        def run_evaluation(update):
            returns, film = evaluate(make_policy(), env, args.eval_episodes, args.seed)
            plot_episode(run_dir / "episode.png", film, f"{run_dir.name}: {stage}, {update:,} updates")
            evaluations.append((offset + update, returns.tolist()))
            values = {"eval/return_mean": returns.mean(), "eval/return_std": returns.std()}
            values["eval/normalized_score"] = normalized_score(score_id, returns).mean()
            log(offset + update, values | {"perf/seconds": time.time() - start_time})
            bar.set_postfix_str(", ".join(f"{key.removeprefix('eval/')} {value:.1f}" for key, value in values.items()))

        log_every = 1_000
        bar = tqdm(range(start + 1, updates + 1), stage, initial=start, total=updates, **edm.BAR)
        if args.eval_episodes and offset + start == 0:
            run_evaluation(0)
        last_time, last_log = time.time(), start - start % log_every
        for update in bar:
            noise.fill_(1 - 0.9 * min((update - 1) / args.noise_duration, 1))
            train_step()
            if update % log_every == 0 or update == updates:
                means = (losses / (update - last_log)).tolist()  # the only wait for the device
                if not math.isfinite(sum(means)):
                    raise edm.RunError(
                        f"a loss of the agent is no longer finite, between updates {last_log} and {update} of {stage}"
                    )
                values = {f"train/{name}": mean for name, mean in zip(LOSSES, means)}
                rate = (update - max(last_log, start)) / (time.time() - last_time)
                log(offset + update, values | {"perf/updates_per_sec": rate})
                losses.zero_()
                edm.trim_memory()
                last_time, last_log = time.time(), update
            if args.eval_episodes and (update % args.eval_every == 0 or update == updates):
                pause = time.time()
                run_evaluation(update)
                last_time += time.time() - pause  # the rate is the training's
            if update % args.checkpoint_every == 0 or update == updates:
                state = {
                    "stage": stage,
                    "update": update,
                    "seconds": time.time() - start_time,
                    "agent": agent.state_dict(),
                    "optimizers": {name: optimizer.state_dict() for name, optimizer in agent.optimizers.items()},
                    "losses": losses,
                    "evaluations": evaluations,
                    "rng": edm.get_rng_state(device),
                }
                edm.save_atomically(checkpoint_path, lambda f: torch.save(state, f))

    # --- Stage 1: from images ---
    torch.manual_seed(args.seed)
    if not agent_path.exists():
        agent = PixelAgent(act_dim, args, device)

        def update_from_images(noise):
            index = torch.randint(len(data["row"]), (args.batch_size,), device=device)
            row, start = data["row"][index], data["start"][index]
            images = next_images = random_shift(stacked(data["frames"], row - 1, start))
            if args.algo == "drqbc":
                next_images = random_shift(stacked(data["frames"], row + args.nstep - 1, start))
            others = (data[key][index] for key in ("action", "reward", "discount"))
            return agent.update(images, *others, next_images, noise)

        def policy_from_images():
            return copy.deepcopy(nn.Sequential(agent.encoder, agent.actor_trunk, agent.heads.policy)).cpu()

        train("stage1", agent, args.stage1_updates, update_from_images, policy_from_images, 0)
        saved = {
            "settings": {"env": args.env, "algo": args.algo, "feature_dim": args.feature_dim},
            "agent": agent.state_dict(),
            "evaluations": evaluations,
            "seconds": time.time() - start_time,
        }
        edm.save_atomically(agent_path, lambda f: torch.save(saved, f))
    agent, saved = load_agent(agent_path, act_dim, args, device)
    offset = 0
    if not args.agent_path:
        evaluations, offset, start_time = saved["evaluations"], args.stage1_updates, time.time() - saved["seconds"]

    # --- Latent transitions ---
    if not latents_path.exists():  # kept, so that a resumed run has them to the last bit
        rows = extract_latents(agent, data, args.diffusion_seed)
        edm.save_atomically(latents_path, lambda f: torch.save(rows, f))
    real = edm.load_file(latents_path)
    data = None  # gives the images' memory back
    torch.manual_seed(args.seed)
    heads = LatentAgent(act_dim, args, device)
    if args.data == "real":
        rows = real
    else:
        rows = make_synthetic(args, real, heads.latent_dim, act_dim, run_dir, device, log, offset)[: args.num_samples]
    print(f"the heads learn from {len(rows):,} latent transitions ({args.data}); {len(real):,} are real in the dataset")
    del real
    rows = rows.to(device)

    # --- Stage 2: new heads ---
    def update_from_latents(noise):
        return heads.update(rows[torch.randint(len(rows), (args.batch_size,), device=device)], noise)

    def policy_from_latents():
        frozen, new = copy.deepcopy((agent, heads))
        frozen, new = frozen.cpu(), new.cpu()
        return lambda images: new.heads.policy(new.features(frozen.latents(images))[0])

    train("stage2", heads, args.stage2_updates, update_from_latents, policy_from_latents, offset)

    # --- Results ---
    if evaluations:
        returns = np.array([returns for _, returns in evaluations])
        scores = normalized_score(score_id, returns)
        updates = np.array([update for update, _ in evaluations])
        final = dict(updates=updates, returns=returns, normalized_scores=scores)
        edm.save_atomically(run_dir / "final_returns.npz", lambda f: np.savez(f, **final))
        unit = "updates of stage 1, then of stage 2" if offset else "updates of stage 2"
        plot_learning_curve(run_dir / "learning_curve.png", score_id, evaluations, unit)
        ends = [("stage 1, last", np.flatnonzero(updates <= offset)[-1])] if offset else []
        for name, k in (*ends, ("stage 2, last", -1)):
            print(
                f"{name}: score {scores[k].mean():.1f} ± {scores[k].std():.1f}, return {returns[k].mean():.0f} ± "
                f"{returns[k].std():.0f} over {args.eval_episodes} episodes"
            )
    print(f"done in {time.time() - start_time:.0f} s: {run_dir}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (edm.RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")
