"""SynthER online: SAC learns from its replay buffer and from what a diffusion model makes of it.

Synthetic Experience Replay (Lu et al., NeurIPS 2023, https://arxiv.org/abs/2303.06614), Section
4.2 and Algorithm 1, with soft actor-critic as in REDQ's code (Chen et al. 2021). Half of each batch
is generated, and there are 20 updates per environment step. Read `main`, at the end, first.

    python synther_sac_online.py

learns to hold up a pendulum, in a few minutes on two CPU cores. Other experiments:

    --env HalfCheetah-v4                # the paper's; wants a GPU
    --env HalfCheetah-v4 --algo redq    # a baseline; --algo sac is the other
    --env dmc/cheetah-run               # the DeepMind Control suite
    --resume runs/...                   # continue a run that was stopped
"""

import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

import gymnasium as gym
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
    env: str = "Pendulum-v1"  # Gymnasium id, or dmc/domain-task
    seed: edm.NotNegativeInt = 0  # of all but the models
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if any
    out_dir: str = "runs"  # of run folders
    exp_name: Optional[str] = None  # (None: synther_sac_online-ALGO)
    resume: Optional[str] = None  # run folder to go on with
    track: bool = False  # to Weights & Biases too
    wandb_project: str = "synther"  # for --track
    wandb_entity: Optional[str] = None  # for --track
    save_dataset: Optional[str] = None  # .hdf5 for all rows

    # Agent
    algo: Literal["sac", "redq", "synther"] = "synther"  # the others are baselines
    synther_ratio: edm.Fraction = 0.5  # generated rows in a batch (paper)
    retrain_every: Optional[edm.Count] = None  # steps per model (paper: 10,000)
    warm_start: bool = False  # from the last model's weights
    standardize_reward: Optional[bool] = None  # (paper: yes; dmc/: no)
    total_steps: Optional[edm.Count] = None  # (paper: 100,000; dmc/: 200,000)
    learning_starts: Optional[edm.Count] = None  # steps before updates (paper: 5,000)
    utd: Optional[edm.Count] = None  # updates per step (paper: 20; sac: 1)
    num_q: Optional[edm.AtLeastTwo] = None  # critics (paper: 2; redq: 10)
    batch_size: edm.Count = 256  # rows per update (paper)
    hidden_dim: edm.Count = 256  # units per layer (paper)
    hidden_layers: edm.Count = 2  # hidden layers (paper)
    learning_rate: edm.Positive = 3e-4  # Adam's (paper)
    discount: edm.Fraction = 0.99  # gamma (paper)
    tau: edm.Fraction = 0.005  # of the targets' average (paper)
    target_entropy: Optional[float] = None  # None: minus act_dim

    # Evaluation
    eval_every: Optional[edm.Count] = None  # steps per evaluation (paper: 1,000)
    eval_episodes: edm.NotNegativeInt = 10  # at each (paper); or 0


# An argument that is None takes its value from the first entry that matches --env and has one.
DEFAULTS = {
    "Pendulum": dict(total_steps=2_000, learning_starts=500, eval_every=250, retrain_every=500)
    | dict(diffusion_steps=2_000, num_samples=20_000),
    "dmc/": dict(total_steps=200_000, standardize_reward=False),
    "": dict(total_steps=100_000, learning_starts=5_000, eval_every=1_000, retrain_every=10_000)
    | dict(diffusion_steps=100_000, num_samples=1_000_000, standardize_reward=True),
}
ALGOS = dict(sac=dict(utd=1, num_q=2), redq=dict(utd=20, num_q=10))
ALGOS["synther"] = dict(utd=20, num_q=2)
CAPACITY = 1_000_000  # rows in the replay buffer

# --- SAC ---


class TanhGaussianActor(nn.Module):
    """Random policy: observations [batch, obs_dim] -> a Gaussian, squashed by a tanh to (-1, 1)."""

    def __init__(self, obs_dim, act_dim, hidden_dim, hidden_layers):
        super().__init__()
        layers = [nn.Linear(obs_dim, hidden_dim), nn.ReLU()]
        for _ in range(hidden_layers - 1):
            layers += [nn.Linear(hidden_dim, hidden_dim), nn.ReLU()]
        self.net = nn.Sequential(*layers)
        self.mean = nn.Linear(hidden_dim, act_dim)
        self.log_std = nn.Linear(hidden_dim, act_dim)

    def act(self, observations):
        """The action of the mean, [batch, act_dim]."""
        return self.mean(self.net(observations)).tanh()

    def sample(self, observations):
        """Random actions [batch, act_dim] and their log-densities [batch]."""
        h = self.net(observations)
        log_std = self.log_std(h).clamp(-20, 2)
        noise = torch.randn_like(log_std)
        actions = (self.mean(h) + log_std.exp() * noise).tanh()
        log_density = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        return actions, (log_density - (1 - actions.square() + 1e-6).log()).sum(1)


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


class SAC(nn.Module):
    """The agent, in the order of REDQ's code. A batch holds rows [s, a, r, s', d]."""

    LOSSES = ("critic_loss", "actor_loss")

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.obs_dim = obs_dim
        self.act_dim = act_dim
        self.args = args
        self.target_entropy = -act_dim if args.target_entropy is None else args.target_entropy
        sizes = (args.hidden_dim, args.hidden_layers)
        self.actor = TanhGaussianActor(obs_dim, act_dim, *sizes)
        self.critic = EnsembleCritic(obs_dim + act_dim, *sizes, args.num_q)
        for name, parameter in self.named_parameters():  # as in REDQ's code
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                bound = math.sqrt(6 / sum(parameter.shape[-2:]))
                nn.init.uniform_(parameter, -bound, bound)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(1))
        self.register_buffer("alpha", torch.full((1,), 0.2))  # at first
        self.to(args.device)
        self.actor_params = [*self.actor.parameters(), self.log_alpha]
        self.critic_params = list(self.critic.parameters())
        self.target_params = list(self.critic_target.parameters())
        adam = dict(lr=args.learning_rate, fused=True, capturable=True)
        self.optimizers = {
            "actor": torch.optim.Adam(self.actor_params, **adam),
            "critic": torch.optim.Adam(self.critic_params, **adam),
        }

    def update(self, batch, with_actor):
        """One step of all critics, if asked one of actor and temperature, then one of the targets.
        The target uses the actor before its step, the actor's loss the critics before theirs."""
        s, a, r, next_s, done = edm.split(batch, self.obs_dim)
        with torch.no_grad():
            next_a, log_density = self.actor.sample(next_s)
            members = torch.rand(self.args.num_q, device=batch.device).topk(2).indices
            next_q = self.critic_target(torch.cat([next_s, next_a], dim=1), members).amin(0)
            target = r + self.args.discount * (1 - done) * (next_q - self.alpha * log_density)
        q = self.critic(torch.cat([s, a], dim=1))
        critic_loss = (q - target).square().mean(1).sum()
        self.optimizers["critic"].zero_grad()
        critic_loss.backward()
        actor_loss = torch.zeros_like(critic_loss)
        if with_actor:
            policy_a, log_density = self.actor.sample(s)
            q = self.critic(torch.cat([s, policy_a], dim=1)).mean(0)  # not the minimum
            actor_loss = (self.alpha * log_density - q).mean()
            alpha_loss = -self.log_alpha * (log_density.detach() + self.target_entropy).mean()
            self.optimizers["actor"].zero_grad()
            (actor_loss + alpha_loss).backward(inputs=self.actor_params)
            self.optimizers["actor"].step()
            self.alpha.copy_(self.log_alpha.detach().exp())
        self.optimizers["critic"].step()
        with torch.no_grad():
            torch._foreach_lerp_(self.target_params, self.critic_params, self.args.tau)
        return torch.stack([critic_loss, actor_loss]).detach()


# Differs from synther_td3bc.make_update: several batches, the actor's step at the last
def make_update(args, agent, replay, loss_sums):
    """A function update() that trains on the --utd batches of a step, and adds up the losses."""
    batch = torch.empty(args.batch_size, replay.rows.shape[1], device=args.device)

    def step(with_actor):
        loss_sums.add_(agent.update(batch, with_actor))

    critic_step = functools.partial(step, with_actor=False)
    last_step = functools.partial(step, with_actor=True)
    if args.device == "cuda":
        critic_step = edm.cuda_graph(critic_step)
        last_step = edm.cuda_graph(last_step)

    def update():
        sizes = (args.utd, args.batch_size, args.synther_ratio)
        batches = sample_batches(replay.rows[: replay.step], replay.synthetic, *sizes)
        for rows in batches[:-1]:
            batch.copy_(rows)
            critic_step()
        batch.copy_(batches[-1])
        last_step()

    return update


# --- Environments and scores ---


# Differs from synther_td3bc.normalized_score: DeepMind Control
def normalized_score(env_name, returns):
    """D4RL's score of undiscounted returns. In dmc/ 1000 gives 100. NaN if unknown."""
    references = {
        "HalfCheetah-": (-280.178953, 12135.0),
        "Hopper-": (-20.272305, 3234.3),
        "Walker2d-": (1.629008, 4592.3),
        "dmc/": (0.0, 1000.0),
    }
    for prefix, (low, high) in references.items():
        if env_name.startswith(prefix):
            return 100 * (returns - low) / (high - low)
    return np.nan * returns


class DMC(gym.Env):
    """A task of the DeepMind Control suite, with flat float32 observations in its own order."""

    def __init__(self, domain, task):
        choose_renderer()  # for quadruped-escape
        from dm_control import rl, suite

        self.PhysicsError = rl.control.PhysicsError
        self.dm_env = suite.load(domain, task, environment_kwargs=dict(flat_observation=True))
        shape = self.dm_env.observation_spec()["observations"].shape
        bounds = self.dm_env.action_spec()
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.action_space = gym.spaces.Box(np.float32(bounds.minimum), np.float32(bounds.maximum))

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.dm_env.task._random = np.random.RandomState(seed % 2**32)
        self.observation = np.float32(self.dm_env.reset().observation["observations"])
        return self.observation, {}

    def step(self, action):
        try:
            time_step = self.dm_env.step(action)
        except self.PhysicsError:  # diverged: the episode ends, not terminal
            return self.observation, 0.0, False, True, {}
        self.observation = np.float32(time_step.observation["observations"])
        return self.observation, time_step.reward, False, time_step.last(), {}


# Copied from synther_vd4rl.choose_renderer
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


# Differs from synther_td3bc.make_env: DeepMind Control, and actions rescaled to [-1, 1]
def make_env(name):
    """The environment of a Gymnasium id or dmc/domain-task. RunError if it fails."""
    with edm.errors_as(f"cannot make the environment {name}"):
        if name.startswith("dmc/"):
            env = gym.wrappers.TimeLimit(DMC(*name[4:].split("-", 1)), 1_000)
        else:
            gym.logger.min_level = gym.logger.ERROR  # no warnings about v4
            env = gym.make(name, disable_env_checker=True)
            if env.spec.max_episode_steps is None:
                print(f"{name} has no time limit: its episodes end after 1,000 steps")
                env = gym.wrappers.TimeLimit(env, 1_000)
        if re.search("Norm[^<]*(Obs|Rew)", str(env)) or env.has_wrapper_attr("obs_rms"):
            raise ValueError(f"{env} changes its statistics in each episode")
        env.reset(seed=0)
        reward = np.asarray(env.step(env.action_space.sample())[1])
        if reward.size != 1 or not np.isfinite(reward):
            raise ValueError(f"its reward is {reward}, not a number")
    states = env.observation_space
    actions = env.action_space
    is_flat = all(len(space.shape or ()) == 1 for space in (states, actions))
    has_range = is_flat and actions.dtype.kind == "f" and (actions.low < actions.high).all()
    if not has_range or np.abs([actions.low, actions.high]).max() >= 1e9:
        needed = "flat Box spaces with float actions in a range"
        raise edm.RunError(f"{name} has {states} and {actions}, not {needed}")
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return gym.wrappers.ClipAction(env)


# Copied from synther_td3bc.evaluate
@torch.no_grad()
def evaluate(policy, envs, seed):
    """The return of an episode in each environment, [len(envs)], reset with seed + index, and the
    share of successes: `success` at any step (Meta-World), `is_success` at the last. NaN: unknown.
    `policy` maps observations [n, obs_dim] to actions [n, act_dim]."""
    with edm.errors_as("the environment failed"):
        resets = [env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]
        obs = np.stack(resets, dtype=np.float32)
    returns = np.zeros(len(envs))
    won = np.full(len(envs), np.nan)
    running = list(range(len(envs)))
    while running:
        actions = policy(torch.from_numpy(obs[running])).numpy()
        if not np.isfinite(actions).all():
            what = "the agent's action" if np.isfinite(obs).all() else "an observation"
            raise edm.RunError(f"{what} became NaN or Inf in an evaluation")
        for i, action in zip(tuple(running), actions):
            with edm.errors_as("the environment failed"):
                obs[i], reward, terminated, truncated, info = envs[i].step(action)
                returns[i] += np.asarray(reward).item()
                won[i] = info.get("is_success", np.fmax(won[i], info.get("success", np.nan)))
            if terminated or truncated:
                running.remove(i)
    return returns, won.mean()


# --- Replay buffer ---


def sample_batches(real, synthetic, num_batches, batch_size, ratio):
    """Batches [num_batches, batch_size, dim] (Algorithm 1, line 9). int(batch_size * ratio) rows of
    each are from synthetic [M, dim], if M > 0, the others from real [N, dim]."""
    num_synthetic = int(batch_size * ratio) if len(synthetic) else 0
    parts = []
    for rows, count in ((real, batch_size - num_synthetic), (synthetic, num_synthetic)):
        if count > 0:
            chosen = torch.randint(len(rows), (num_batches, count), device=rows.device)
            parts.append(rows[chosen])
    return torch.cat(parts, dim=1)


def save_dataset(path, env, replay):
    """Write the rows of the environment, the oldest first, to an HDF5 file in D4RL's layout, with
    actions in the environment's own units. The last row ends an episode."""
    obs_dim = env.observation_space.shape[0]
    rows = replay.rows[: replay.step].cpu().roll(-replay.step, 0)
    data = edm.unpack(rows, obs_dim)
    space = env.env.env.action_space  # of the environment itself
    data["actions"] = (space.low + space.high) / 2 + (space.high - space.low) / 2 * data["actions"]
    data["timeouts"] = edm.episode_starts(rows, obs_dim).roll(-1).numpy() & ~data["terminals"]
    file = io.BytesIO()
    with h5py.File(file, "w") as f:
        for key, x in data.items():
            f.create_dataset(key, data=x, compression="gzip", shuffle=True)
    edm.save_atomically(path, lambda f: f.write(file.getbuffer()))


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


@torch.no_grad()
def act(args, env, agent, replay, obs):
    """Make an environment step and store its row. Returns the next observation."""
    obs = np.array(obs)  # it may be reused
    t = replay.step
    if t == args.learning_starts:
        edm.check_digits("observations", np.array(replay.first))
    if t <= args.learning_starts:
        replay.first.append(obs)
        action = 2 * torch.rand(agent.act_dim, device=args.device) - 1
    else:
        s = torch.as_tensor(obs, dtype=torch.float32, device=args.device)
        action = agent.actor.sample(s[None])[0][0]
    action = action.cpu().numpy()  # the only wait in training
    if not np.isfinite(action).all():
        what = "the agent's action" if np.isfinite(obs).all() else "an observation"
        raise edm.RunError(f"{what} became NaN or Inf at step {t}")
    with edm.errors_as("the environment failed"):
        next_obs, reward, terminated, truncated, _ = env.step(action)
        row = np.hstack([obs, action, reward, next_obs, terminated], dtype=np.float32)
        if terminated or truncated:
            next_obs, _ = env.reset()
    if not np.isfinite(row).all():
        raise edm.RunError(f"{args.env} gave NaN or Inf at step {t}")
    replay.rows[t % len(replay.rows)] = torch.from_numpy(row).to(args.device)
    replay.step += 1
    return next_obs


def retrain(args, run, agent, replay, save):
    """Algorithm 1, lines 6 to 8: a new model, and new synthetic rows. Returns their seconds."""
    save()  # in case of a kill
    start = time.time()
    path = run.folder / "diffusion.pt"
    last = edm.load_edm(path) if args.warm_start and replay.model_step > 0 else None

    def make(dim, recipe):  # 128 offline
        model = edm.EDM(dim, recipe, time_dim=256 if recipe.time_dim else None)
        if last:
            model.denoiser.load_state_dict(last.denoiser.state_dict())
        return model

    real = replay.rows[: replay.step].cpu()
    is_dmc = args.env.startswith("dmc/")  # d is 0 there, and not modelled
    columns = real[:, :-1] if is_dmc else real
    raw_columns = [] if is_dmc else [-1]
    reward = agent.obs_dim + agent.act_dim  # its column
    if not args.standardize_reward:
        raw_columns.append(reward)
    seed = ((args.seed + args.diffusion_seed) * 1_000_003 + replay.step) % 2**63
    values = {}
    quiet = copy.copy(edm.NO_RUN)
    quiet.log = lambda step, loss: values.update(loss)
    options = dict(make=make, raw_columns=raw_columns, device=args.device, run=quiet)
    options["starts"] = edm.episode_starts(real, agent.obs_dim)
    model = edm.train_edm(columns, replace(args, diffusion_seed=seed), **options)
    clock = time.time()  # below, d is rounded, unlike in the official code
    rows = edm.generate_transitions(model, real, args.num_samples, seed, reward=reward)
    values["perf/diffusion_seconds"] = clock - start
    values["perf/samples_per_sec"] = len(rows) / (time.time() - clock)
    edm.save_npz(run.folder / "synthetic.npz", edm.unpack(rows, agent.obs_dim))
    report = edm.quality_report(real, rows, reward=reward)
    run.log(replay.step, values | {f"diffusion/{key}": x for key, x in report.items()})
    replay.synthetic = rows.to(args.device)
    replay.model_step = replay.step
    edm.save_edm(path, model)  # only now: a warm start needs the last
    save()
    edm.plot_marginals(run.folder / "marginals.png", real, rows, agent.obs_dim, agent.act_dim)
    return time.time() - start


# Differs from synther_td3bc.train: an environment, and diffusion models on the way
def train(args, run, agent, replay, env, envs):
    """Algorithm 1. Gives the evaluations, a list of (steps, returns), one every --eval-every."""
    evaluations = run.saved.get("evaluations", [])
    first = run.saved.get("step", -1) + 1
    loss_sums = torch.zeros(len(agent.LOSSES), device=args.device)
    parts = {"agent": agent} | agent.optimizers
    rng = torch.cuda if args.device == "cuda" else torch
    if run.saved["stage"] == "agent":
        for name, part in parts.items():
            part.load_state_dict(run.saved[name])
        replay.step = run.saved["step"]
        replay.rows[: replay.step] = run.saved["replay"]
        replay.model_step = run.saved["model_step"]
        if replay.model_step > 0:
            data = edm.load_transitions(run.folder / "synthetic.npz")
            replay.synthetic = edm.pack(**data).to(args.device)
        loss_sums.copy_(run.saved["loss_sums"])
        rng.set_rng_state(run.saved["rng"].cpu())

    def save():
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= dict(stage="agent", step=replay.step, model_step=replay.model_step)
        state |= dict(evaluations=evaluations, loss_sums=loss_sums, rng=rng.get_rng_state())
        run.save(state | dict(replay=replay.rows[: replay.step].clone()))

    update = make_update(args, agent, replay, loss_sums)
    with edm.errors_as("the environment failed"):
        obs, _ = env.reset(seed=args.seed + 1_003 * replay.step)
    clock = time.time()
    end = args.total_steps + 1
    bar = edm.Bar(range(first, end), args.algo, initial=first, total=end)
    for step in bar:
        is_due = replay.step > replay.model_step and replay.step % args.retrain_every == 0
        if args.algo == "synther" and is_due:
            clock += retrain(args, run, agent, replay, save)  # the rate is the agent's
        if step > 0:
            obs = act(args, env, agent, replay, obs)
        if step > args.learning_starts:
            update()
        is_boundary = step % args.eval_every == 0 or step == args.total_steps
        if is_boundary and step > args.learning_starts:
            count = min((step - 1) % args.eval_every + 1, step - args.learning_starts)
            rate = args.utd * count / (time.time() - clock)
            critic_loss, actor_loss = (loss_sums / count).tolist()
            if not math.isfinite(critic_loss + actor_loss):
                raise edm.RunError(f"a loss became NaN or Inf before step {step}")
            values = {"train/critic_loss": critic_loss / args.utd, "train/actor_loss": actor_loss}
            values |= {"train/alpha": agent.alpha.item(), "perf/updates_per_sec": rate}
            run.log(step, values)
            loss_sums.zero_()
        if is_boundary and envs:
            actor = copy.deepcopy(agent.actor).cpu().eval()  # faster there
            returns, won = evaluate(actor.act, envs, args.seed + 10_000)
            evaluations.append((step, returns.tolist()))
            values = {"eval/return_mean": returns.mean(), "eval/return_std": returns.std()}
            values["eval/success_rate"] = won
            values["eval/normalized_score"] = normalized_score(args.env, returns.mean())
            run.log(step, values | {"perf/seconds": time.time() - run.start_time})
        if is_boundary or bar.stop:
            save()
            clock = time.time()
    return evaluations


# Differs from synther_td3bc.write_results: environment steps, not updates
def write_results(args, run, evaluations):
    """Write final_returns.npz and learning_curve.png, and print the last evaluation."""
    steps, returns = map(np.array, zip(*evaluations))  # [evaluations, episodes]
    scores = normalized_score(args.env, returns)
    arrays = dict(steps=steps, returns=returns, normalized_scores=scores)
    arrays |= dict(final_returns=returns[-1], final_scores=scores[-1])  # unifloral's names
    edm.save_npz(run.folder / "final_returns.npz", arrays)
    values = scores if np.isfinite(scores).all() else returns
    label = "normalised score" if values is scores else "return"
    print(f"{label} {values[-1].mean():.1f} +- {values[-1].std():.1f}")
    ax = Figure(layout="constrained").subplots()
    ax.errorbar(steps, values.mean(1), values.std(1), capsize=2)
    ax.set(xlabel="environment steps", ylabel=label, title=run.folder.name)
    edm.save_atomically(run.folder / "learning_curve.png", ax.figure.savefig)


# Differs from synther_td3bc.fill_args: values by --algo, and other limits
def fill_args(args):
    """Fill the arguments that are None from DEFAULTS and ALGOS. RunError for what cannot be."""
    for pattern, values in DEFAULTS.items():
        if re.match(pattern, args.env):
            edm.fill(args, values)
    edm.fill(args, ALGOS[args.algo] | dict(exp_name=f"synther_sac_online-{args.algo}"))
    edm.resolve(args, 0)
    edm.check_args(args)
    first_model = args.retrain_every if args.algo == "synther" else 0
    if max(args.learning_starts, first_model) >= args.total_steps:
        raise edm.RunError("--total-steps must exceed --learning-starts and --retrain-every")
    if args.save_dataset:
        path = Path(args.save_dataset)
        is_new = args.resume or not path.exists()
        if path.suffix not in (".hdf5", ".h5") or not path.parent.is_dir() or not is_new:
            raise edm.RunError(f"--save-dataset must be a new .hdf5 file, not {path}")


def main(args):
    """Environment -> replay buffer -> diffusion model -> generated transitions -> agent."""
    fill_args(args)
    env, *envs = [make_env(args.env) for _ in range(1 + args.eval_episodes)]
    obs_dim = env.observation_space.shape[0]
    act_dim = env.action_space.shape[0]
    run = Run(args)
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # for some environments
    np.random.seed(args.seed % 2**32)
    agent = SAC(obs_dim, act_dim, args)
    size = (min(args.total_steps, CAPACITY), 2 * obs_dim + act_dim + 2)
    rows = torch.zeros(size, device=args.device)
    # step: environment steps so far; model_step: as many at the last diffusion model
    replay = SimpleNamespace(rows=rows, synthetic=rows[:0], step=0, model_step=0, first=[])
    evaluations = train(args, run, agent, replay, env, envs)
    if args.save_dataset and not Path(args.save_dataset).exists():
        save_dataset(args.save_dataset, env, replay)
    if evaluations:
        write_results(args, run, evaluations)
    print(f"done in {time.time() - run.start_time:.0f} s: {run.folder}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (edm.RunError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(2)
