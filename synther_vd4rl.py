"""SynthER from pixels: DrQ+BC or BC, with heads that learn from latents of a diffusion model.

Synthetic Experience Replay (Lu et al., NeurIPS 2023, https://arxiv.org/abs/2303.06614), Section
4.3 and Appendix F, on V-D4RL (Lu et al., 2022). Read `main`, at the end, first.

Stage 1 trains an agent from images: an encoder, trunks that make features of its output, and heads
behind them. Then encoder and trunks are frozen. The features before and after a step of the dataset
make a latent transition. Stage 2 trains new heads on latent transitions, generated or real. The end
of stage 1 is the "Original" of Table 4, that of stage 2 is "SynthER".

    python synther_vd4rl.py --env walker-walk-expert --dataset-path vd4rl_data

is the paper's experiment, for a GPU. `vd4rl_data` holds `main/` of github.com/conglu1997/v-d4rl.
`python tests/paper/vd4rl_data.py` renders a small one. Other experiments:

    --data real                        # the control: heads on real latent transitions
    --data real --agent-path runs/...  # another stage 2, after the same stage 1
    --algo bc                          # behaviour cloning
    --resume runs/...                  # continue a run that was stopped
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
import subprocess
import sys
import time
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

# --- Arguments ---


@dataclass
class Args(edm.DiffusionArgs):
    # Experiment
    env: str = "walker-walk-expert"  # or cheetah-run; or -random, -mixed, -medium, -medexp
    seed: edm.NotNegativeInt = 0  # of the agent and its evaluations
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    out_dir: str = "runs"  # where the run folder is made
    exp_name: Optional[str] = None  # part of the folder's name (synther_vd4rl-ALGO-DATA)
    resume: Optional[str] = None  # run folder to go on with
    track: bool = False  # log to Weights & Biases too
    wandb_project: str = "synther"  # for --track
    wandb_entity: Optional[str] = None  # for --track

    # Data
    data: Literal["synther", "real"] = "synther"  # what the heads learn from in stage 2
    dataset_path: Optional[str] = None  # folder that holds main/ (None: downloaded)
    agent_path: Optional[str] = None  # run folder whose stage 1 to take

    # Agent
    algo: Literal["drqbc", "bc"] = "drqbc"  # bc: behaviour cloning, without critics
    latent: Literal["both", "actor", "critic"] = "both"  # trunks of the latents (Table 13)
    stage1_updates: edm.Count = 550_000  # from images (paper: half of 1.1M iterations)
    stage2_updates: edm.Count = 550_000  # of the new heads (not in the paper)
    nstep: Optional[edm.Count] = None  # steps of a return (V-D4RL's DrQ+BC: 3; paper, BC: 1)
    batch_size: edm.Count = 256  # transitions per update (paper)
    hidden_dim: edm.Count = 1024  # units per hidden layer of the heads (paper)
    feature_dim: edm.Count = 50  # features of a trunk (paper)
    learning_rate: edm.Positive = 3e-4  # Adam's (paper)
    discount: edm.Fraction = 0.99  # gamma (paper)
    tau: edm.Fraction = 0.01  # rate of the targets' moving average (paper)
    alpha: edm.NotNegative = 2.5  # weight of Q against behaviour cloning (paper)
    noise_duration: edm.Count = 125_000  # updates until action noise is 0.1 (paper)
    noise_clip: edm.NotNegative = 0.3  # limit of that noise (paper)

    # Evaluation
    eval_every: edm.Count = 5_000  # updates between evaluations, logs and checkpoints
    eval_episodes: edm.NotNegativeInt = 10  # rendered, at each (paper); or 0


# --- DrQ+BC and BC ---


class Encoder(nn.Module):
    """DrQ-v2's: images [batch, 9, 84, 84] of bytes -> [batch, 39200]."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(9, 32, 3, stride=2), nn.ReLU(inplace=True)]
        for _ in range(3):
            layers += [nn.Conv2d(32, 32, 3), nn.ReLU(inplace=True)]
        self.net = nn.Sequential(*layers, nn.Flatten())

    def forward(self, images):
        return self.net((images / 255).sub_(0.5))


# Copied from synther_td3bc.EnsembleCritic
class EnsembleCritic(nn.Module):
    """Q-functions in one network: (s, a) [batch, in_dim] -> [num_critics, batch]."""

    def __init__(self, in_dim, hidden_dim, hidden_layers, num_critics=2):
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        sizes = [in_dim] + [hidden_dim] * hidden_layers + [1]
        for fan_in, fan_out in zip(sizes, sizes[1:]):
            bound = 1 / math.sqrt(fan_in)
            self.weights.append(torch.empty(num_critics, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(num_critics, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x, members=None):
        """members: the slice or indices of those to evaluate. None: all."""
        h = x
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            if members is not None:
                weight = weight[members]
                bias = bias[members]
            h = F.relu(h, inplace=True) if i > 0 else h.expand(len(bias), *h.shape)
            h = torch.baddbmm(bias, h, weight)
        return h.squeeze(-1)


@torch.no_grad()
def orthogonal_init(module):
    """DrQ-v2's initial weights: orthogonal, with gain sqrt(2) for convolutions. Biases are 0."""
    for name, x in module.named_parameters():
        if "bias" in name:
            nn.init.zeros_(x)
        elif x.dim() > 1:  # not LayerNorm's
            for weight in x if x.dim() == 3 else [x]:  # 3: of several critics
                nn.init.orthogonal_(weight, math.sqrt(2) if x.dim() == 4 else 1)


def make_trunk(feature_dim):
    """What makes features [batch, feature_dim] of the encoder's output."""
    return nn.Sequential(nn.Linear(39_200, feature_dim), nn.LayerNorm(feature_dim), nn.Tanh())


class Columns(nn.Module):
    """Some columns of its input: a trunk of stage 2, whose inputs are features already."""

    def __init__(self, columns):
        super().__init__()
        self.columns = columns

    def forward(self, x):
        return x[:, self.columns]


class DrQBC(nn.Module):
    """DrQ+BC (Lu et al. 2022), or behaviour cloning, which leaves the critics alone. In stage 1 it
    learns from images. In stage 2 it has only the heads, pi^fc and Q^fc of Appendix F, and learns
    from latents: the features of both trunks of a stage-1 agent side by side, or those of one."""

    LOSSES = ("critic_loss", "actor_loss")

    def __init__(self, act_dim, args, stage):
        super().__init__()
        self.act_dim = act_dim
        self.args = args
        self.stage = stage  # "stage1" or "stage2"
        self.has_critic = args.algo == "drqbc"
        width = args.feature_dim
        hidden = args.hidden_dim
        self.latent_dim = 2 * width if self.has_critic and args.latent == "both" else width
        if stage == "stage1":
            self.encoder = Encoder()
            self.actor_trunk = make_trunk(width)
            self.critic_trunk = make_trunk(width)
        else:
            self.encoder = nn.Identity()
            self.actor_trunk = Columns(slice(width))  # the first
            self.critic_trunk = Columns(slice(-width, None))  # the last
        layers = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        self.policy = nn.Sequential(*layers, nn.Linear(hidden, act_dim), nn.Tanh())
        self.critic = EnsembleCritic(width + act_dim, hidden, 2)
        orthogonal_init(self)
        self.critic_trunk_target = copy.deepcopy(self.critic_trunk).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.to(args.device)

        self.actor_params = [*self.actor_trunk.parameters(), *self.policy.parameters()]
        self.critic_params = [*self.critic_trunk.parameters(), *self.critic.parameters()]
        targets = nn.ModuleList([self.critic_trunk_target, self.critic_target])
        self.target_params = list(targets.parameters())
        adam = dict(lr=args.learning_rate, fused=True, capturable=True)
        self.optimizers = {}
        if self.has_critic:
            params = [*self.encoder.parameters(), *self.critic_params]
            self.optimizers["critic"] = torch.optim.Adam(params, **adam)
        else:
            self.actor_params += self.encoder.parameters()
        self.optimizers["actor"] = torch.optim.Adam(self.actor_params, **adam)

    def act(self, x):
        """Deterministic actions [batch, act_dim] for images, or in stage 2 for latents."""
        return self.policy(self.actor_trunk(self.encoder(x)))

    def latents(self, images):
        """The features of --latent, the actor's before the critic's: [batch, latent_dim]."""
        h = self.encoder(images)
        if not self.has_critic or self.args.latent == "actor":
            return self.actor_trunk(h)
        if self.args.latent == "critic":
            return self.critic_trunk(h)  # of s' too, not by the target's trunk
        return torch.cat([self.actor_trunk(h), self.critic_trunk(h)], dim=1)

    def noisy(self, mean, noise):
        """Actions: mean and noise of up to noise_clip, cut to (-1, 1). The gradient is not cut."""
        clip = self.args.noise_clip
        a = mean + (noise * torch.randn_like(mean)).clamp(-clip, clip)
        return a + (a.clamp(-1 + 1e-6, 1 - 1e-6) - a).detach()

    def update(self, x, a, r, discount, next_x, noise):
        """One step of encoder and critics, then of the actor, then of the targets. Returns LOSSES.

        x, next_x: shifted images [batch, 9, 84, 84], or in stage 2 latents. a: [batch, act_dim].
        r, discount: [batch]. noise: size of the noise on actions, a scalar tensor."""
        h = self.encoder(x)
        critic_loss = torch.zeros((), device=h.device)
        if self.has_critic:
            with torch.no_grad():
                next_h = self.encoder(next_x)
                next_a = self.noisy(self.policy(self.actor_trunk(next_h)), noise)
                next_input = torch.cat([self.critic_trunk_target(next_h), next_a], dim=1)
                target = r + discount * self.critic_target(next_input).amin(0)
            q = self.critic(torch.cat([self.critic_trunk(h), a], dim=1))
            critic_loss = (q - target).square().mean(1).sum()
            self.optimizers["critic"].zero_grad()
            critic_loss.backward()
            self.optimizers["critic"].step()
            h = h.detach()  # the actor does not train the encoder
        policy_a = self.noisy(self.policy(self.actor_trunk(h)), noise)
        actor_loss = F.mse_loss(policy_a, a)
        if self.has_critic:
            q = self.critic(torch.cat([self.critic_trunk(h), policy_a], dim=1)).amin(0)
            actor_loss = actor_loss - self.args.alpha * q.mean() / q.abs().mean().detach()
        self.optimizers["actor"].zero_grad()
        actor_loss.backward(inputs=self.actor_params)  # no gradient for the critics
        self.optimizers["actor"].step()
        if self.has_critic:
            with torch.no_grad():
                torch._foreach_lerp_(self.target_params, self.critic_params, self.args.tau)
        return torch.stack([critic_loss, actor_loss]).detach()


def load_agent(path, act_dim, args):
    """The frozen encoder and trunks that stage 1 left in a file, in a DrQBC with other heads, and
    its evaluations. RunError if it is of another dataset, algorithm or size."""
    saved = edm.load_torch(path, args.device)
    for name, value in saved["settings"].items():
        if value != getattr(args, name):
            raise edm.RunError(f"{path} is an agent of {name}={value}")
    agent = DrQBC(act_dim, args, "stage1")
    parts = ("encoder", "actor_trunk", "critic_trunk")
    frozen = {name: x for name, x in saved["agent"].items() if name.startswith(parts)}
    agent.load_state_dict(frozen, strict=False)
    return agent.requires_grad_(False).eval(), saved["evaluations"]


# Differs from synther_td3bc.make_update: the noise on the actions falls
def make_update(args, agent, draw, loss_sums):
    """A function update(number) that trains on one batch of draw(), and adds up the losses."""
    noise = torch.ones((), device=args.device)

    def step():
        loss_sums.add_(agent.update(*draw(), noise))

    if args.device == "cuda":
        step = edm.cuda_graph(step)

    def update(number):
        noise.fill_(1 - 0.9 * min((number - 1) / args.noise_duration, 1))
        step()

    return update


# --- Data ---
# Row t of an episode holds image t, and the action and the reward that led to it. The three images
# that an agent sees are put together for each batch.

LEVELS = dict(random="random", mixed="medium_replay", medium="medium")
LEVELS |= dict(medexp="medium_expert", expert="expert")


def find_files(args):
    """The dataset's files, 2 before 10. A download sets args.dataset_path. RunError if none."""
    match = re.fullmatch(r"(walker-walk|cheetah-run)-(\w+)", args.env)
    if not match or match[2] not in LEVELS:
        known = f"walker-walk or cheetah-run, then -{', -'.join(LEVELS)}"
        raise edm.RunError(f"unknown dataset {args.env}: give {known}")
    folder = f"main/{match[1].replace('-', '_')}/{LEVELS[match[2]]}/84px"
    if args.dataset_path is None:
        from huggingface_hub import snapshot_download

        wanted = dict(repo_type="dataset", allow_patterns=f"vd4rl/{folder}/*")
        try:
            args.dataset_path = f"{snapshot_download('conglu/vd4rl', **wanted)}/vd4rl"
        except Exception as error:  # no network, ...
            message = " ".join(str(error).split())
            raise edm.RunError(f"cannot download V-D4RL (see vd4rl_data.py): {message}") from None
    files = sorted(Path(args.dataset_path, folder).glob("[!.]*.hdf5"))
    files.sort(key=lambda path: re.sub(r"\d+", lambda x: x[0].zfill(99), path.stem))
    if not files:
        raise edm.RunError(f"--dataset-path {args.dataset_path} holds no {folder}/*.hdf5")
    return files


def read_files(files, args):
    """The images [N, 3, 84, 84] of all episodes, one after the other, each row's file [N], and a
    dict of action [N, act_dim], reward, discount, step_type [N]. RunError for other files."""
    columns = dict(action=[], reward=[], discount=[], step_type=[])
    counts = []
    try:
        for path in files:
            with h5py.File(path) as f:
                counts.append(len(f["reward"]))
        frames = torch.empty(sum(counts), 3, 84, 84, dtype=torch.uint8)
        for path, part in zip(edm.Bar(files, "images"), frames.split(counts)):
            with h5py.File(path) as f:
                images = f["observation"]
                if images.dtype != np.uint8 or len(images) == 0:
                    raise ValueError(f"{len(images)} images of {images.dtype}, not some of uint8")
                images.read_direct(part.numpy())
                for key, parts in columns.items():
                    shape = (len(part), -1) if key == "action" else len(part)
                    parts.append(f[key][:].reshape(shape).astype(np.float32))
        columns = {key: torch.from_numpy(np.concatenate(x)) for key, x in columns.items()}
    except Exception as error:  # of many kinds
        raise edm.RunError(f"cannot read {path}: {error}") from None
    return frames, np.repeat(files, counts), columns


def find_episodes(paths, step_type):
    """The first row of each row's episode, and its end, [N] both, by the rows' files and types [N].
    RunError where an episode is not whole. A file may go on with one if it has the next number, or
    if this gives the episode the usual length."""
    is_first = ~(step_type > 0)  # NaN too
    is_last = step_type == 2
    if not is_first[0]:
        raise edm.RunError(f"{paths[0]} does not begin with the first row of an episode")
    starts = np.flatnonzero(is_first)
    lengths = np.diff(starts, append=len(paths))
    start = np.repeat(starts, lengths)
    length = np.repeat(lengths, lengths)
    is_wrong = (is_first[1:] != is_last[:-1]) & is_last.any()
    is_odd = ~is_first & (length != np.bincount(lengths).argmax())
    is_odd[1:] &= paths[1:] != paths[:-1]
    for i in np.flatnonzero(is_wrong | is_odd[1:]):
        numbers = [re.findall(r"\d+", path.stem) for path in paths[i : i + 2]]
        if is_wrong[i] or 1 not in [int(b) - int(a) for a, b in zip(*numbers)]:
            raise edm.RunError(f"rows are missing or not in order: {paths[i]}, then {paths[i + 1]}")
    return torch.from_numpy(start), torch.from_numpy(start + length)


def load_dataset(files, args):
    """A dict of tensors: images and transitions of nstep steps. RunError if there are none.

    frames [N, 3, 84, 84] uint8: all images.
    row [M]: the row of a transition's action, from image row - 1 to row - 1 + nstep.
    start [M]: the row of the first image of its episode.
    action [M, act_dim], reward, discount [M]: of nstep discounted rewards, and what comes after."""
    frames, paths, columns = read_files(files, args)
    start, end = find_episodes(paths, columns["step_type"].numpy())
    n = args.nstep
    rows = torch.arange(len(frames))
    row = rows[(rows > start) & (rows + n <= end)]
    if len(row) == 0:
        raise edm.RunError(f"no episode of {args.env} is longer than {n} steps")
    data = dict(frames=frames, row=row, start=start[row])
    data["action"] = columns["action"][row]
    data["reward"] = sum(args.discount**k * columns["reward"][row + k] for k in range(n))
    data["discount"] = args.discount**n * columns["discount"][row + n - 1]
    if not all(data[key].isfinite().all() for key in ("action", "reward", "discount")):
        raise edm.RunError(f"an action, reward or discount of {args.env} is NaN or Inf")
    return data


def stacked(frames, last, start):
    """The images of rows last - 2 to last, [batch, 9, 84, 84], an episode's first one repeated."""
    rows = torch.stack([torch.maximum(last - k, start) for k in (2, 1, 0)], dim=1)
    return frames[rows].flatten(1, 2)


def random_shift(images, pad=4):
    """Shift each stack of images by up to `pad` pixels, with its border repeated (DrQ)."""
    batch, _, size, _ = images.shape
    shift = torch.randint(0, 2 * pad + 1, (2, batch, 1), device=images.device) - pad
    y, x = (torch.arange(size, device=images.device) + shift).clamp(0, size - 1)
    images = images.gather(2, y[:, None, :, None].expand(images.shape))
    return images.gather(3, x[:, None, None, :].expand(images.shape))


def shifted(data, chosen, steps):
    """The images that an agent sees, `steps` after the beginning of the chosen transitions."""
    last = data["row"][chosen] - 1 + steps
    return random_shift(stacked(data["frames"], last, data["start"][chosen]))


def draw_images(args, data):
    """A batch of the dataset: the arguments of DrQBC.update but the noise. next_x: for critics."""
    chosen = torch.randint(len(data["row"]), (args.batch_size,), device=args.device)
    x = shifted(data, chosen, 0)
    next_x = shifted(data, chosen, args.nstep) if args.algo == "drqbc" else x
    a, r, discount = [data[key][chosen] for key in ("action", "reward", "discount")]
    return x, a, r, discount, next_x


def draw_latents(args, rows, latent_dim):
    """A batch of rows [z, a, r, z']: the arguments of DrQBC.update without the noise."""
    batch = rows[torch.randint(len(rows), (args.batch_size,), device=args.device)]
    act_dim = rows.shape[1] - 2 * latent_dim - 1
    z, a, r, next_z = batch.split([latent_dim, act_dim, 1, latent_dim], dim=1)
    return z, a, r[:, 0], args.discount**args.nstep, next_z


@edm.own_randomness
@torch.no_grad()
def extract_latents(agent, data, args):
    """Rows [z, a, r, z'] of all transitions, on the CPU. Each stack of images is shifted once."""
    torch.manual_seed(args.diffusion_seed)
    rows = torch.empty(len(data["row"]), 2 * agent.latent_dim + agent.act_dim + 1)
    for chosen in edm.Bar(torch.arange(len(rows), device=args.device).split(256), "latents"):
        z = agent.latents(shifted(data, chosen, 0))
        next_z = agent.latents(shifted(data, chosen, args.nstep))
        parts = [z, data["action"][chosen], data["reward"][chosen][:, None], next_z]
        rows[chosen.cpu()] = torch.cat(parts, dim=1).cpu()
    return rows


def keep_freed_memory():
    """Let glibc keep freed memory for the next images: an update on a CPU takes 0.8 s, not 1.4."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        if libc.mallopt(-3, 2**30) == 1:  # M_MMAP_THRESHOLD; some refuse
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# --- Environment and scores ---


class PixelEnv:
    """A DeepMind Control task as V-D4RL has it: each action acts twice, and three images of 84 x 84
    are seen at once. step returns images [9, 84, 84] uint8, reward, whether the episode ends."""

    def __init__(self, task_name):
        import mujoco  # both after MUJOCO_GL is set
        from dm_control import suite

        if tuple(map(int, mujoco.__version__.split(".")[:2])) >= (3, 5):
            print("mujoco 3.5 and later draw another floor than V-D4RL's: use 3.4.0")
        self.env = suite.load(*task_name.split("-"))
        self.act_dim = self.env.action_spec().shape[0]

    def render(self):
        return self.env.physics.render(84, 84, camera_id=0).transpose(2, 0, 1)

    def reset(self, seed):
        self.env.task._random = np.random.RandomState(seed % 2**32)
        self.env.reset()
        self.images = 3 * [self.render()]
        return np.concatenate(self.images)

    def step(self, action):
        reward = 0.0
        for _ in range(2):
            time_step = self.env.step(action)
            reward += time_step.reward
            if time_step.last():
                break
        self.images = [*self.images[1:], self.render()]
        return np.concatenate(self.images), reward, time_step.last()


@functools.cache
def choose_renderer():
    """On Linux, set MUJOCO_GL, if it is not, to what renders without a screen, if anything does."""
    if "MUJOCO_GL" in os.environ or sys.platform != "linux":
        return
    test = [sys.executable, "-c", "import mujoco; mujoco.GLContext(84, 84).make_current()"]
    for backend in ("egl", "osmesa"):
        environ = os.environ | {"MUJOCO_GL": backend}
        if subprocess.run(test, env=environ, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return


# Differs from synther_td3bc.make_env: images
def make_env(task):
    """The environment of a task. RunError if it cannot be rendered here."""
    choose_renderer()
    try:
        env = PixelEnv(task)
        env.reset(0)
    except Exception as error:  # of many kinds
        ways = "install libegl1 with libgl1-mesa-dri, or libosmesa6; or give --eval-episodes 0"
        raise edm.RunError(f"cannot render: {error} ({ways})") from None
    return env


def make_policy(agent, frozen=None):
    """The agent on the CPU, for `evaluate`. frozen: in stage 2, that of stage 1."""
    agent = copy.deepcopy(agent).cpu().eval()
    if frozen is None:
        return agent.act
    frozen = copy.deepcopy(frozen).cpu().eval()
    return lambda images: agent.act(frozen.latents(images))


# Differs from synther_td3bc.evaluate: images, and one environment
@torch.no_grad()
def evaluate(policy, env, episodes, seed):
    """Returns [episodes], reset with seed + i. policy: [1, 9, 84, 84] -> [1, act_dim], on a CPU."""
    returns = np.zeros(episodes)
    for i in range(episodes):
        images = env.reset(seed + i)
        ended = False
        while not ended:
            action = policy(torch.from_numpy(images)[None])[0].numpy()
            if not np.isfinite(action).all():
                raise edm.RunError("the agent's action became NaN or Inf in an evaluation")
            try:
                images, reward, ended = env.step(action)
            except Exception as error:  # of many kinds
                raise edm.RunError(f"the environment failed: {error}") from None
            returns[i] += reward
    return returns


# --- Run folder ---


# Copied from synther_td3bc.parse_args
def parse_args():
    """The command line's arguments; with --resume, those of that run."""
    args = tyro.cli(Args, description=__doc__)
    if not args.resume:
        return args
    with edm.errors_as(f"{args.resume} is not a run folder"):
        path = Path(args.resume).expanduser()
        saved = Args(**json.loads((path / "args.json").read_text()))
    args = tyro.cli(Args, default=saved)
    free = "resume|out_dir|device|track|wandb|dataset|synthetic|save"
    for name, value in vars(args).items():
        if not re.match(free, name) and value != getattr(saved, name):
            raise edm.RunError(f"{args.resume} was started with another {name}")
    return args


# Copied from synther_td3bc.Run
class Run:
    """A run's folder: arguments, log, checkpoint. data: bytes that no resume may change."""

    def __init__(self, args, data=b""):
        name = f"{args.env}__{args.exp_name}__{args.seed}__{1000 * time.time():.0f}"
        self.folder = Path(args.resume or Path(args.out_dir) / re.sub(r"[^\w.-]", "-", name))
        self.track = lambda values: None
        if args.track:
            import wandb

            where = dict(project=args.wandb_project, entity=args.wandb_entity, dir=args.out_dir)
            with edm.errors_as("--track"):
                wandb.init(**where, id=self.folder.name, config=vars(args), resume="allow")
            wandb.define_metric("*", step_metric="step")
            self.track = wandb.log
        text = json.dumps(vars(args), indent=2)
        print(f"{text}\nrun folder: {self.folder}")
        if not args.resume:
            self.folder.mkdir(parents=True)
            (self.folder / "args.json").write_text(text)
        edm.on_signal("--resume", str(self.folder))
        self.checkpoint = self.folder / "checkpoint.pt"
        self.saved = dict(stage="", log_size=0, seconds=0)
        if self.checkpoint.exists():
            self.saved = edm.load_torch(self.checkpoint, args.device)
        self.data_hash = hashlib.sha256(data).hexdigest()
        if not self.saved.get("data_hash", self.data_hash).startswith(self.data_hash):
            raise edm.RunError(f"{self.checkpoint} is of other data: start a new run")
        self.start_time = time.time() - self.saved["seconds"]
        self.metrics = edm.open_alone(self.folder / "metrics.csv")
        log = self.metrics.read(self.saved["log_size"])  # what came later is logged again
        if self.metrics.truncate(log.rfind(b"\n") + 1) == 0:
            self.metrics.write(b"step,key,value\n")

    def log(self, step, values):
        """values: {key: number}, NaN if unknown. step: of the diffusion model, or the agent."""
        lines = [f"{step},{key},{float(x)}\n" for key, x in values.items() if x == x]
        self.metrics.write("".join(lines).encode())
        with contextlib.suppress(Exception):  # it may fail
            self.track(values | {"step": step})

    def save(self, state):
        """Write the checkpoint: `state`, a dict, and where log and clock are."""
        now = dict(log_size=self.metrics.seek(0, 2), seconds=time.time() - self.start_time)
        edm.save_torch(self.checkpoint, state | now | dict(data_hash=self.data_hash))


# --- Experiment ---


# Differs from synther_td3bc.fill_args: defaults by --algo
def fill_args(args):
    """Fill the arguments that are None. RunError for what cannot be."""
    nstep = 3 if args.algo == "drqbc" else 1
    edm.fill(args, dict(exp_name=f"synther_vd4rl-{args.algo}-{args.data}", nstep=nstep))
    edm.check_args(args)
    if args.algo == "bc" and args.latent != "both":
        raise edm.RunError("--latent needs a critic, and --algo bc has no critic")
    if args.agent_path and not (Path(args.agent_path) / "agent.pt").is_file():
        raise edm.RunError(f"--agent-path {args.agent_path} holds no agent.pt of a stage 1")


def train_from_images(args, run, data, env):
    """Stage 1. Its agent is kept in agent.pt, which may be there from before a stop, or is copied
    from --agent-path. Gives the frozen agent, and evaluations and number of updates in this run."""
    act_dim = data["action"].shape[1]
    path = run.folder / "agent.pt"
    if args.agent_path and not path.exists():
        content = (Path(args.agent_path) / "agent.pt").read_bytes()
        edm.save_atomically(path, lambda f: f.write(content))
    if not path.exists():
        torch.manual_seed(args.seed)
        agent = DrQBC(act_dim, args, "stage1")
        evaluations = train(args, run, agent, lambda: draw_images(args, data), env)
        settings = dict(env=args.env, algo=args.algo, feature_dim=args.feature_dim)
        state = dict(settings=settings, agent=agent.state_dict(), evaluations=evaluations)
        edm.save_torch(path, state)
    agent, evaluations = load_agent(path, act_dim, args)
    return (agent, [], 0) if args.agent_path else (agent, evaluations, args.stage1_updates)


# Differs from synther_td3bc.generate_synthetic: rows without terminals
def generate_synthetic(args, run, agent, real):
    """SynthER: train a diffusion model on the latent transitions, generate and save new ones."""
    make = edm.EDM
    if args.diffusion_recipe == "paper":  # 128 is less than DrQ+BC's 207 columns
        make = functools.partial(edm.EDM, time_dim=256)
    model = edm.train_edm(real, args, make=make, device=args.device, run=run)
    edm.save_edm(run.folder / "diffusion.pt", model)
    clock = time.time()
    real = F.pad(real, (0, 1))  # all d are 0
    rows = edm.generate_transitions(model, real, args.num_samples, args.diffusion_seed)
    rate = len(rows) / (time.time() - clock)
    run.log(args.diffusion_steps, {"perf/samples_per_sec": rate})
    arrays = edm.unpack(rows, agent.latent_dim, agent.act_dim)
    edm.save_npz(run.folder / "synthetic.npz", arrays)


# Differs from synther_td3bc.agent_rows: latent transitions
def agent_rows(args, run, agent, real):
    """The latent transitions that the heads learn from: real ones or generated ones."""
    rows = real
    if args.data == "synther":
        path = run.folder / "synthetic.npz"
        if not path.exists():
            generate_synthetic(args, run, agent, real)
        rows = edm.pack(**edm.load_transitions(path))
        if run.saved["stage"] != "stage2":
            sizes = (agent.latent_dim, agent.act_dim)
            real = F.pad(real, (0, 1))
            report = edm.quality_report(real, rows, reward=sum(sizes))
            run.log(args.diffusion_steps, {f"diffusion/{key}": x for key, x in report.items()})
            edm.plot_marginals(run.folder / "marginals.png", real, rows, *sizes)
        rows = rows[:, :-1]
    print(f"the heads learn from {len(rows):,} latent transitions ({args.data})")
    return rows.to(args.device)


# Differs from synther_td3bc.train: two stages, batches from a function, and images
def train(args, run, agent, draw, env, frozen=None):
    """Train the agent of a stage. At 0, each --eval-every and the end: log, evaluate, save. Gives
    the evaluations, a list of (updates, returns).

    draw() gives the arguments of agent.update but the noise. frozen: for stage 2, stage 1's."""
    updates = getattr(args, f"{agent.stage}_updates")
    is_evaluated = agent.stage == "stage2" and not args.agent_path  # at 0: stage 1's end
    evaluations = []
    first = 0
    loss_sums = torch.zeros(len(agent.LOSSES), device=args.device)
    parts = {"agent": agent} | agent.optimizers
    rng = torch.cuda if args.device == "cuda" else torch
    if run.saved["stage"] == agent.stage:
        for name, part in parts.items():
            part.load_state_dict(run.saved[name])
        evaluations = run.saved["evaluations"]
        first = run.saved["update"] + 1
        loss_sums.copy_(run.saved["loss_sums"])
        rng.set_rng_state(run.saved["rng"].cpu())

    update = make_update(args, agent, draw, loss_sums)
    clock = time.time()
    bar = edm.Bar(range(first, updates + 1), agent.stage, initial=first, total=updates + 1)
    for number in bar:
        if number > 0:
            update(number)
        is_boundary = number % args.eval_every == 0 or number == updates
        if is_boundary and number > 0:
            count = number % args.eval_every or args.eval_every
            rate = min(count, number + 1 - first) / (time.time() - clock)
            means = (loss_sums / count).tolist()
            if not math.isfinite(sum(means)):
                raise edm.RunError(f"a loss became NaN or Inf before update {number}")
            values = {f"train/{name}": mean for name, mean in zip(agent.LOSSES, means)}
            run.log(number, values | {"perf/updates_per_sec": rate})
            loss_sums.zero_()
        if is_boundary and env and (number > 0 or not is_evaluated):
            policy = make_policy(agent, frozen)
            returns = evaluate(policy, env, args.eval_episodes, args.seed)
            evaluations.append((number, returns.tolist()))
            values = {"eval/return_mean": returns.mean(), "eval/return_std": returns.std()}
            values["eval/normalized_score"] = 100 * returns.mean() / 1_000
            run.log(number, values | {"perf/seconds": time.time() - run.start_time})
            bar.set_postfix(return_mean=f"{returns.mean():.1f}", refresh=False)
        if is_boundary or bar.stop:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= dict(stage=agent.stage, update=number, evaluations=evaluations)
            run.save(state | dict(loss_sums=loss_sums, rng=rng.get_rng_state()))
        if is_boundary:
            clock = time.time()
    return evaluations


# Differs from synther_td3bc.write_results: V-D4RL's scores
def write_results(run, evaluations):
    """Write final_returns.npz and learning_curve.png, and print the last evaluation."""
    updates = np.array([number for number, _ in evaluations])
    returns = np.array([returns for _, returns in evaluations])  # [evaluations, episodes]
    scores = 100 * returns / 1_000  # an expert's return is 1,000
    arrays = dict(updates=updates, returns=returns, normalized_scores=scores)
    arrays |= dict(final_returns=returns[-1], final_scores=scores[-1])  # unifloral's names
    edm.save_npz(run.folder / "final_returns.npz", arrays)
    print(f"normalised score {scores[-1].mean():.1f} +- {scores[-1].std():.1f}")
    fig = Figure(figsize=(6, 4), layout="constrained")
    ax = fig.subplots()
    ax.errorbar(updates, scores.mean(1), scores.std(1), capsize=2)
    ax.set(xlabel="updates", ylabel="normalised score", title=run.folder.name)
    edm.save_atomically(run.folder / "learning_curve.png", fig.savefig)


def main(args):
    """Images -> agent -> its latents -> diffusion model -> generated latents -> heads -> scores."""
    fill_args(args)
    if args.device == "cpu":
        keep_freed_memory()
    files = find_files(args)
    env = make_env(args.env.rpartition("-")[0]) if args.eval_episodes else None
    data = load_dataset(files, args)
    act_dim = data["action"].shape[1]
    if env and env.act_dim != act_dim:
        raise edm.RunError(f"{args.env} has {env.act_dim} action dimensions, its files {act_dim}")
    if args.agent_path:
        load_agent(Path(args.agent_path) / "agent.pt", act_dim, args)  # does it fit?
    edm.resolve(args, len(data["row"]), args.env, latents=True)
    run = Run(args, torch.cat([data["action"], data["reward"][:, None]], dim=1).numpy())
    print(f"{len(data['frames']):,} images, {len(data['row']):,} transitions")
    data = {key: x.to(args.device) for key, x in data.items()}
    agent, evaluations, offset = train_from_images(args, run, data, env)
    if evaluations:
        print(f"stage 1: normalised score {np.mean(evaluations[-1][1]) / 10:.1f}")
    latents_path = run.folder / "latents.pt"
    if not latents_path.exists():  # a resumed run reads them, to have the same bits
        edm.save_torch(latents_path, extract_latents(agent, data, args))
    real = edm.load_torch(latents_path)
    del data  # to free the images' memory
    later = copy.copy(run)  # the steps in its log follow those of stage 1
    later.log = lambda step, values: run.log(offset + step, values)
    rows = agent_rows(args, later, agent, real)
    torch.manual_seed(args.seed)
    heads = DrQBC(act_dim, args, "stage2")
    draw = functools.partial(draw_latents, args, rows, agent.latent_dim)
    for number, returns in train(args, later, heads, draw, env, agent):
        evaluations.append((offset + number, returns))
    if evaluations:
        write_results(run, evaluations)
    print(f"done in {time.time() - run.start_time:.0f} s: {run.folder}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (edm.RunError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(2)
