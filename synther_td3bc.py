"""SynthER with TD3+BC: train an offline agent on transitions that a diffusion model generates.

Synthetic Experience Replay (Lu et al., NeurIPS 2023, https://arxiv.org/abs/2303.06614), Section
4.1, with the agent of Fujimoto and Gu (2021). Read `main`, at the end, first.

    python synther_td3bc.py

learns from the replay buffer of an agent whose return on HalfCheetah-v4 had come to 2,350. It ends
at a score of about 28; with --data real at about 24. Other experiments:

    --env walker2d-medium-replay-v2                      # the paper's; wants a GPU
    --seed 1 --synthetic-path runs/.../synthetic.npz     # another agent, on the same samples
    --env Walker2d-v4 --dataset-path my_transitions.npz  # your own data
    --resume runs/...                                    # continue a run that was stopped
"""

import contextlib
import copy
import hashlib
import json
import math
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

import gymnasium as gym
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
    env: str = "quickstart"  # D4RL name or Minari id; with --dataset-path, Gymnasium id
    seed: edm.NotNegativeInt = 0  # of agent and evaluation
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if any
    out_dir: str = "runs"  # of run folders
    exp_name: str = "synther_td3bc"  # part of its name
    resume: Optional[str] = None  # run folder to go on with
    track: bool = False  # to Weights & Biases too
    wandb_project: str = "synther"  # for --track
    wandb_entity: Optional[str] = None  # for --track

    # Data
    data: Literal["synther", "real", "mixed"] = "synther"  # for the agent; mixed: 1:1
    dataset_path: Optional[str] = None  # real transitions: .npz, or HDF5 as D4RL's
    synthetic_path: Optional[str] = None  # synthetic.npz of an earlier run
    subsample: Optional[edm.Positive] = None  # rows kept: a fraction, or a number above 1
    true_next_obs: bool = False  # HDF5: terminal rows keep the file's s'
    augment: Literal["none", "additive", "multiplicative", "dynamics"] = "none"  # of states

    # Agent
    updates: Optional[edm.Count] = None  # (paper: 1,000,000; quickstart: 50,000)
    batch_size: edm.Count = 256  # transitions per update (paper)
    hidden_dim: edm.Count = 256  # units per layer (paper)
    hidden_layers: edm.Count = 2  # hidden layers (paper)
    learning_rate: edm.Positive = 3e-4  # Adam's (paper)
    discount: edm.Fraction = 0.99  # gamma (paper)
    tau: edm.Fraction = 0.005  # rate of the targets' moving average (paper)
    policy_noise: edm.NotNegative = 0.2  # std of noise on target actions, over max_action (paper)
    noise_clip: edm.NotNegative = 0.5  # its limit, likewise (paper)
    policy_freq: edm.Count = 2  # critic updates per actor update (paper)
    alpha: edm.NotNegative = 2.5  # weight of Q against behaviour cloning (paper)

    # Evaluation
    eval_every: edm.Count = 5_000  # updates between evaluations
    eval_episodes: Optional[edm.NotNegativeInt] = None  # per evaluation; 0: none


# For arguments that are None: the first entry that matches --env and has it, or edm.resolve's
DEFAULTS = {
    "quickstart": dict(diffusion_steps=20_000, num_samples=200_000, updates=50_000),
    "maze2d|antmaze": dict(eval_episodes=100),
    "": dict(updates=1_000_000, eval_episodes=10),
}

# --- TD3+BC ---


class Actor(nn.Module):
    """Deterministic policy: normalised states [batch, obs_dim] -> actions [batch, act_dim]."""

    def __init__(self, obs_dim, act_dim, hidden_dim, hidden_layers, max_action):
        super().__init__()
        layers = [nn.Linear(obs_dim, hidden_dim), nn.ReLU()]
        for _ in range(hidden_layers - 1):
            layers += [nn.Linear(hidden_dim, hidden_dim), nn.ReLU()]
        layers += [nn.Linear(hidden_dim, act_dim), nn.Tanh()]
        self.net = nn.Sequential(*layers)
        self.max_action = max_action
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))

    def forward(self, states):
        return self.max_action * self.net(states)

    def act(self, observations):
        """Actions for observations as the environment gives them, not normalised."""
        return self((observations - self.obs_mean) / self.obs_std)


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


class TD3BC(nn.Module):
    """The agent. A batch holds rows [s, a, r, s', d] with normalised states."""

    LOSSES = ("critic_loss", "actor_loss")

    def __init__(self, obs_dim, act_dim, max_action, args):
        super().__init__()
        self.obs_dim = obs_dim
        self.max_action = max_action
        self.args = args
        sizes = (args.hidden_dim, args.hidden_layers)
        self.actor = Actor(obs_dim, act_dim, *sizes, max_action)
        self.critic = EnsembleCritic(obs_dim + act_dim, *sizes)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.to(args.device)

        self.actor_params = list(self.actor.parameters())
        self.critic_params = list(self.critic.parameters())
        self.target_params = [*self.actor_target.parameters(), *self.critic_target.parameters()]
        adam = dict(lr=args.learning_rate, fused=True, capturable=True)
        self.optimizers = {
            "actor": torch.optim.Adam(self.actor_params, **adam),
            "critic": torch.optim.Adam(self.critic_params, **adam),
        }

    def update_critic(self, batch):
        """One step of both critics. Returns the loss."""
        args = self.args
        s, a, r, next_s, done = edm.split(batch, self.obs_dim)
        with torch.no_grad():
            noise = args.policy_noise * torch.randn_like(a)
            noise = noise.clamp(-args.noise_clip, args.noise_clip)
            next_a = self.actor_target(next_s) + self.max_action * noise
            next_a = next_a.clamp(-self.max_action, self.max_action)
            next_q = self.critic_target(torch.cat([next_s, next_a], dim=1)).amin(0)
            target = r + args.discount * (1 - done) * next_q
        q = self.critic(torch.cat([s, a], dim=1))
        loss = (q - target).square().mean(1).sum()
        self.optimizers["critic"].zero_grad()
        loss.backward()
        self.optimizers["critic"].step()
        return loss.detach()

    def update_actor(self, batch):
        """One step of the actor, then of all targets. Returns the loss."""
        s, a, _, _, _ = edm.split(batch, self.obs_dim)
        policy_a = self.actor(s)
        q = self.critic(torch.cat([s, policy_a], dim=1), members=slice(1))  # the first, as in TD3
        loss = F.mse_loss(policy_a, a) - self.args.alpha * q.mean() / q.abs().mean().detach()
        self.optimizers["actor"].zero_grad()
        loss.backward(inputs=self.actor_params)  # no gradient for the critics
        self.optimizers["actor"].step()
        with torch.no_grad():
            params = self.actor_params + self.critic_params
            torch._foreach_lerp_(self.target_params, params, self.args.tau)
        return loss.detach()


def augment_batch(batch, kind, obs_dim):
    """Explicit augmentation of normalised states, in place (Appendix D.1)."""
    s, _, r, next_s, _ = edm.split(batch, obs_dim)
    if kind == "additive":
        noise = 0.1 * torch.randn_like(s)  # the paper's 0.1 may also be a variance
        s += noise
        next_s += noise
    elif kind == "multiplicative":
        factor = torch.empty_like(r).uniform_(0.8, 1.2)[:, None]
        s *= factor
        next_s *= factor
    elif kind == "dynamics":
        factor = torch.empty_like(r).uniform_(0.5, 1.5)[:, None]
        next_s.copy_(torch.lerp(s, next_s, factor))


def make_update(args, agent, rows, loss_sums):
    """A function update(number) that trains on a batch of rows, and adds up the losses."""
    batch = torch.empty(args.batch_size, rows.shape[1], device=args.device)

    def critic_step():
        chosen = torch.randint(len(rows), (args.batch_size,), device=args.device)
        batch.copy_(rows[chosen])
        augment_batch(batch, args.augment, agent.obs_dim)
        loss_sums[0] += agent.update_critic(batch)

    def actor_step():  # on the same batch; weighted, as means are over all updates
        loss_sums[1] += args.policy_freq * agent.update_actor(batch)

    if args.device == "cuda":
        critic_step = edm.cuda_graph(critic_step)
        actor_step = edm.cuda_graph(actor_step)

    def update(number):
        critic_step()
        if number % args.policy_freq == 0:
            actor_step()

    return update


# --- Environments and scores ---


def normalized_score(env_name, returns):
    """D4RL's score of undiscounted returns: 0 is a random policy, 100 an expert. NaN if unknown."""
    references = {
        "quickstart|(mujoco/)?halfcheetah[-/]": (-280.178953, 12135.0),
        "(mujoco/)?hopper[-/]": (-20.272305, 3234.3),
        "(mujoco/)?walker2d[-/]": (1.629008, 4592.3),
        "maze2d-umaze-": (23.85, 161.86),
        "maze2d-medium-": (13.13, 277.39),
        "maze2d-large-": (6.7, 273.99),
        "antmaze-.*-v2": (0.0, 1.0),
    }
    for pattern, (low, high) in references.items():
        if re.match(pattern, env_name, re.IGNORECASE):
            return 100 * (returns - low) / (high - low)
    return np.nan * returns


def make_env(name):
    """The environment of a D4RL name, a Minari id or a Gymnasium id. RunError if it fails."""
    maze = f"tests.paper.mazes:{name}"  # Gymnasium imports what is before the colon
    ids = dict(quickstart="HalfCheetah-v4", halfcheetah="HalfCheetah-v4", hopper="Hopper-v4")
    ids |= dict(walker2d="Walker2d-v4", maze2d=maze, antmaze=maze)
    with edm.errors_as(f"cannot make the environment {name}"):
        if "/" in name:
            import minari

            env = minari.load_dataset(name, download=True).recover_environment(eval_env=True)
        else:
            gym.logger.min_level = gym.logger.ERROR  # no warnings about v4
            env = gym.make(ids.get(name.split("-")[0], name), disable_env_checker=True)
        if env.spec.max_episode_steps is None:
            print(f"{name} has no time limit: its episodes end after 1,000 steps")
            env = gym.wrappers.TimeLimit(env, 1_000)
        if re.search("Norm[^<]*(Obs|Rew)", str(env)) or env.has_wrapper_attr("obs_rms"):
            raise ValueError(f"{env} changes its statistics in each episode")
        env.reset(seed=0)
        reward = np.asarray(env.step(env.action_space.sample())[1])
        if reward.size != 1 or not np.isfinite(reward):
            raise ValueError(f"its reward is {reward}, not a number")
    spaces = (env.observation_space, env.action_space)
    bounds = [0]
    if all(len(space.shape or ()) == 1 for space in spaces) and spaces[1].dtype.kind == "f":
        bounds = np.unique([-spaces[1].low, spaces[1].high])
    if len(bounds) > 1 or not 0 < bounds[0] < 1e9:
        needed = "flat Box spaces with one bound, +-x, for all float actions"
        raise edm.RunError(f"{name} has {spaces}, not {needed}")
    return env


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


# --- Run folder ---


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


def load_real(args, envs):
    """real: rows [N, dim], others (not chosen), starts, obs_dim, act_dim, reward, max_action."""
    sizes = None
    limit = 1_000
    if envs:
        sizes = envs[0].observation_space.shape + envs[0].action_space.shape
        limit = envs[0].spec.max_episode_steps
    data = edm.load_transitions(args.dataset_path or args.env, args.true_next_obs, limit, sizes)
    real = SimpleNamespace(rows=edm.pack(**data))
    real.obs_dim = data["observations"].shape[1]
    real.act_dim = data["actions"].shape[1]
    real.reward = real.obs_dim + real.act_dim  # its column
    real.starts = edm.episode_starts(real.rows, real.obs_dim)
    real.others = real.rows[:0]
    largest = torch.from_numpy(data["actions"]).abs().amax(0)
    real.max_action = nn.Buffer(largest.where(largest > 0, 1.0))  # the actor keeps it
    if envs:
        real.max_action = float(envs[0].action_space.high[0])
        if largest.max() > real.max_action:
            print(f"some actions are beyond the bound +-{real.max_action}")
    elif largest.max() > 10 * largest.min():
        print("columns of actions differ in scale: rescale them")
    if args.subsample:
        num_rows = len(real.rows)
        count = round(args.subsample * num_rows if args.subsample <= 1 else args.subsample)
        if not 2 <= count <= num_rows:
            raise edm.RunError(f"--subsample asks for {count} transitions, not 2 to {num_rows}")
        chosen = np.random.default_rng(args.diffusion_seed).choice(num_rows, count, replace=False)
        real.others = torch.from_numpy(np.delete(real.rows.numpy(), chosen, 0))
        real.rows = real.rows[chosen]
        real.starts = real.starts[chosen]
    return real


def load_synthetic(args, real, path):
    """Up to num_samples rows of a synthetic.npz."""
    data = edm.load_transitions(path, sizes=(real.obs_dim, real.act_dim))
    rows = edm.pack(**data)[: args.num_samples]
    if args.data == "mixed" and len(rows) < len(real.rows):
        raise edm.RunError(f"--data mixed needs {len(real.rows)} rows, not {len(rows)}")
    return rows


def generate_synthetic(args, run, real):
    """Train a diffusion model on the real transitions and generate new ones, or read the run's."""
    path = run.folder / "synthetic.npz"
    if run.saved["stage"] == "agent" and path.exists():
        return load_synthetic(args, real, path)
    options = dict(starts=real.starts, raw_columns=[-1], device=args.device)
    model = edm.train_edm(real.rows, args, run=run, **options)
    edm.save_edm(run.folder / "diffusion.pt", model)
    clock = time.time()
    size = (args.num_samples, args.diffusion_seed)
    rows = edm.generate_transitions(model, real.rows, *size, reward=real.reward)
    rate = len(rows) / (time.time() - clock)
    run.log(args.diffusion_steps, {"perf/samples_per_sec": rate})
    edm.save_npz(path, edm.unpack(rows, real.obs_dim, real.act_dim))
    return rows


def agent_rows(args, run, real, synthetic):
    """The rows that the agent learns from: real ones, generated ones, or both."""
    if args.data == "real":
        rows = real.rows.clone()
    else:
        if synthetic is None:
            synthetic = generate_synthetic(args, run, real)
        rows = synthetic if args.data == "synther" else torch.cat([real.rows, synthetic])
        if run.saved["stage"] != "agent":
            report = edm.quality_report(
                real.rows, synthetic, reward=real.reward, others=real.others
            )
            run.log(args.diffusion_steps, {f"diffusion/{key}": x for key, x in report.items()})
            sizes = (real.obs_dim, real.act_dim)
            edm.plot_marginals(run.folder / "marginals.png", real.rows, synthetic, *sizes)
    if re.match("antmaze-.*-v2", args.env):
        rows[:, real.reward] -= 1  # -1 per step and 0 at the goal, as in CORL
    run.data_hash += hashlib.sha256(rows.numpy()).hexdigest()
    if run.saved["stage"] == "agent" and run.saved["data_hash"] != run.data_hash:
        raise edm.RunError(f"{run.checkpoint} is of other samples: start a new run")
    print(f"the agent learns from {len(rows):,} transitions")
    return rows.to(args.device)


def normalize_states(actor, rows, real):
    """Standardise s and s' in place by the real s's mean and std, which the actor keeps."""
    s = edm.split(real.rows, real.obs_dim)[0]
    std = s.std(0, unbiased=False) + 1e-3
    actor.obs_mean.copy_(s.mean(0))
    actor.obs_std.copy_(std.where(s.amin(0) < s.amax(0), 1.0))  # 1 for a constant
    s, _, _, next_s, _ = edm.split(rows, real.obs_dim)
    s.sub_(actor.obs_mean).div_(actor.obs_std)
    next_s.sub_(actor.obs_mean).div_(actor.obs_std)


def train(args, run, agent, rows, envs):
    """Train the agent on rows. At 0, each --eval-every and the end: log, evaluate, save. Gives the
    evaluations, a list of (updates, returns)."""
    evaluations = run.saved.get("evaluations", [])
    first = run.saved.get("update", -1) + 1
    loss_sums = torch.zeros(len(agent.LOSSES), device=args.device)
    parts = {"agent": agent} | agent.optimizers
    rng = torch.cuda if args.device == "cuda" else torch
    if run.saved["stage"] == "agent":
        for name, part in parts.items():
            part.load_state_dict(run.saved[name])
        loss_sums.copy_(run.saved["loss_sums"])
        rng.set_rng_state(run.saved["rng"].cpu())
    update = make_update(args, agent, rows, loss_sums)
    clock = time.time()
    bar = edm.Bar(range(first, args.updates + 1), "agent", initial=first, total=args.updates + 1)
    for number in bar:
        if number > 0:
            update(number)
        is_boundary = number % args.eval_every == 0 or number == args.updates
        if is_boundary and number > 0:
            count = number % args.eval_every or args.eval_every
            rate = min(count, number + 1 - first) / (time.time() - clock)
            means = (loss_sums / count).tolist()
            if not math.isfinite(sum(means)):
                raise edm.RunError(f"a loss became NaN or Inf before update {number}")
            values = {f"train/{name}": mean for name, mean in zip(agent.LOSSES, means)}
            run.log(number, values | {"perf/updates_per_sec": rate})
            loss_sums.zero_()
        if is_boundary and envs:
            actor = copy.deepcopy(agent.actor).cpu().eval()  # faster there
            random.seed(args.seed)  # for some environments
            np.random.seed(args.seed % 2**32)
            returns, won = evaluate(actor.act, envs, args.seed)
            evaluations.append((number, returns.tolist()))
            values = {"eval/return_mean": returns.mean(), "eval/return_std": returns.std()}
            values["eval/success_rate"] = won
            values["eval/normalized_score"] = normalized_score(args.env, returns.mean())
            run.log(number, values | {"perf/seconds": time.time() - run.start_time})
        if is_boundary or bar.stop:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= dict(stage="agent", update=number, evaluations=evaluations)
            run.save(state | dict(loss_sums=loss_sums, rng=rng.get_rng_state()))
            clock = time.time()
    return evaluations


def write_results(args, run, evaluations):
    """Write and plot the evaluations, print the last one."""
    updates, returns = map(np.array, zip(*evaluations))  # [evaluations, episodes]
    scores = normalized_score(args.env, returns)
    arrays = dict(updates=updates, returns=returns, normalized_scores=scores)
    arrays |= dict(final_returns=returns[-1], final_scores=scores[-1])  # unifloral's names
    edm.save_npz(run.folder / "final_returns.npz", arrays)
    values = scores if np.isfinite(scores).all() else returns
    label = "normalised score" if values is scores else "return"
    print(f"{label} {values[-1].mean():.1f} +- {values[-1].std():.1f}")
    ax = Figure(layout="constrained").subplots()
    ax.errorbar(updates, values.mean(1), values.std(1), capsize=2)
    ax.set(xlabel="updates", ylabel=label, title=run.folder.name)
    edm.save_atomically(run.folder / "learning_curve.png", ax.figure.savefig)


def fill_args(args):
    """From DEFAULTS, fill arguments that are None. RunError if they do not agree."""
    for pattern, values in DEFAULTS.items():
        if re.match(pattern, args.env):
            edm.fill(args, values)
    edm.check_args(args)
    suffix = Path(args.env).suffix
    if suffix in (".hdf5", ".h5", ".npz") or (args.env == "quickstart" and args.dataset_path):
        raise edm.RunError("--dataset-path names the file, --env where to evaluate")
    if args.data == "real" and args.synthetic_path:
        raise edm.RunError("--synthetic-path has no use with --data real")


def main(args):
    """Real transitions -> diffusion model -> generated transitions -> agent -> scores."""
    fill_args(args)
    envs = [make_env(args.env) for _ in range(args.eval_episodes)]
    real = load_real(args, envs)
    if args.data == "mixed":
        args.num_samples = len(real.rows)  # half of each
    edm.resolve(args, len(real.rows), args.env)
    synthetic = args.synthetic_path and load_synthetic(args, real, args.synthetic_path)
    run = Run(args, real.rows.numpy())
    rows = agent_rows(args, run, real, synthetic)
    torch.manual_seed(args.seed)
    agent = TD3BC(real.obs_dim, real.act_dim, real.max_action, args)
    normalize_states(agent.actor, rows, real)
    evaluations = train(args, run, agent, rows, envs)
    if evaluations:
        write_results(args, run, evaluations)
    print(f"done in {time.time() - run.start_time:.0f} s: {run.folder}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (edm.RunError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(2)
