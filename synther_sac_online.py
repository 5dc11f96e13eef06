"""SynthER online: SAC with a diffusion model beside its replay buffer, and the baselines SAC and REDQ.

Synthetic Experience Replay (Lu et al., NeurIPS 2023, https://arxiv.org/abs/2303.06614), Section 4.2 and Algorithm 1.
The agent is soft actor-critic as REDQ's code has it (Chen et al. 2021), the same for all three methods. With --algo
synther a new diffusion model is trained on the replay buffer every 10,000 environment steps, and half of each batch
comes from its samples. That is all that changes, and it lets SAC make 20 updates per environment step.

    python synther_sac_online.py                                      # Pendulum; a few minutes on two CPU cores
    python synther_sac_online.py --env HalfCheetah-v4                 # the paper's experiment; wants a GPU
    python synther_sac_online.py --env dmc/cheetah-run                # the DeepMind Control suite
    python synther_sac_online.py --env HalfCheetah-v4 --algo redq     # a baseline; so is --algo sac
    python synther_sac_online.py --env Hopper-v4 --algo sac --total-steps 50000 --save-dataset hopper.hdf5
    python synther_sac_online.py --resume runs/...                    # continue a run that was stopped
"""

import contextlib
import copy
import functools
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
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

# --- Arguments --------------------------------------------------------------------------------------------------------


@dataclass
class Args(edm.DiffusionArgs):
    env: str = "Pendulum-v1"
    """a Gymnasium id with flat Box spaces (HalfCheetah-v4), or dmc/domain-task (dmc/cheetah-run)"""
    seed: int = 0
    """seed of agent, environment and evaluation; that of each diffusion model adds --diffusion-seed and the step"""
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU if there is one
    out_dir: str = "runs"  # where the run folder {env}__{exp_name}__{seed}__{unix_time_in_ms} is made
    exp_name: Optional[str] = None
    """name of the experiment, part of the run folder's name (default: synther_sac_online-{algo})"""
    resume: Optional[str] = None  # run folder to continue, with the arguments saved there
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project: str = "synther"  # project to log to with --track
    wandb_entity: Optional[str] = None  # team or user to log to with --track

    algo: Literal["sac", "redq", "synther"] = "synther"
    """sac: 2 critics, 1 update per step; redq: 10 and 20; synther: 2 and 20, half of each batch generated"""
    synther_ratio: float = 0.5  # share of generated transitions in a batch (paper: 0.5)
    retrain_every: Optional[int] = None  # environment steps between diffusion models (paper: 10,000; Pendulum: 500)
    warm_start: bool = False  # start each diffusion model from the last one's weights (official code: from new weights)
    standardize_reward: Optional[bool] = None
    """standardise the reward for the diffusion model (paper: yes; official code and default: but for dmc/)"""
    save_dataset: Optional[str] = None
    """write the replay buffer to this .hdf5 file, in D4RL's layout; with --resume, that of a run that has ended too"""

    total_steps: Optional[int] = None
    """environment steps (paper: 200,000 on DeepMind Control, 100,000 else; Pendulum: 2,000)"""
    learning_starts: Optional[int] = None
    """environment steps before the first update, with random actions (paper: 5,000; Pendulum: 500)"""
    utd: Optional[int] = None
    """critic updates per environment step (paper: 20; sac: 1); one of the policy, as in the official code up to 20"""
    num_q: Optional[int] = None
    """critics; a target is the minimum of two of them, drawn anew for each update (paper: 2; redq: 10)"""
    batch_size: int = 256  # transitions per update (paper: 256)
    hidden_dim: int = 256  # units per hidden layer (paper: 256)
    hidden_layers: int = 2  # hidden layers (paper: 2)
    learning_rate: float = 3e-4  # Adam's learning rate (paper: 3e-4)
    discount: float = 0.99  # discount factor gamma (paper: 0.99)
    tau: float = 0.005  # rate of the target networks' moving average (paper: 0.005)
    target_entropy: Optional[float] = None
    """entropy that the temperature is tuned to (default, and official code: minus the dimension of the actions)"""
    eval_every: Optional[int] = None  # environment steps between evaluations (paper: 1,000; Pendulum: 250)
    eval_episodes: int = 10  # episodes per evaluation (paper: 10); 0 skips evaluation
    checkpoint_every: Optional[int] = None  # environment steps between checkpoints (default: 5,000; Pendulum: 500)


# What depends on the environment. An argument that is None takes the value of the first pattern that matches.
DEFAULTS = {
    "Pendulum": dict(total_steps=2_000, learning_starts=500, eval_every=250, checkpoint_every=500, retrain_every=500,
                     diffusion_steps=2_000, num_samples=20_000),
    "dmc/": dict(total_steps=200_000, standardize_reward=False),
    "": dict(total_steps=100_000, learning_starts=5_000, eval_every=1_000, checkpoint_every=5_000, retrain_every=10_000,
             diffusion_steps=100_000, num_samples=1_000_000, standardize_reward=True),
}  # fmt: skip
ALGOS = {"sac": dict(utd=1, num_q=2), "redq": dict(utd=20, num_q=10), "synther": dict(utd=20, num_q=2)}

# --- SAC --------------------------------------------------------------------------------------------------------------


class TanhGaussianActor(nn.Module):
    """Stochastic policy: observations [batch, obs_dim] -> a Gaussian, squashed to actions in (-1, 1) by a tanh."""

    def __init__(self, obs_dim, act_dim, hidden_dim, hidden_layers):
        super().__init__()
        sizes = [obs_dim] + [hidden_dim] * hidden_layers
        hidden = [layer for pair in zip(sizes, sizes[1:]) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.net = nn.Sequential(*hidden)
        self.mean, self.log_std = nn.Linear(sizes[-1], act_dim), nn.Linear(sizes[-1], act_dim)

    def forward(self, observations):
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


class SAC(nn.Module):
    """SAC in the order of REDQ's code (Chen et al. 2021). A batch holds rows [s, a, r, s', d] of `edm.pack`."""

    LOSSES = ("critic_loss", "actor_loss")

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.sizes = [obs_dim, act_dim, 1, obs_dim, 1]
        self.args = args
        self.target_entropy = -act_dim if args.target_entropy is None else args.target_entropy
        self.actor = TanhGaussianActor(obs_dim, act_dim, args.hidden_dim, args.hidden_layers)
        self.critic = EnsembleCritic(obs_dim + act_dim, args.hidden_dim, args.hidden_layers, args.num_q)
        for name, parameter in self.named_parameters():  # as REDQ: Glorot and Bengio's uniform weights, biases 0
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                bound = math.sqrt(6 / sum(parameter.shape[-2:]))
                nn.init.uniform_(parameter, -bound, bound)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(1))
        self.register_buffer("alpha", torch.full((1,), 0.2))  # REDQ's value until the first update of log_alpha
        self.to(args.device)
        self.actor_params, self.critic_params = list(self.actor.parameters()), list(self.critic.parameters())
        self.target_params = list(self.critic_target.parameters())
        adam = dict(lr=args.learning_rate, fused=True, capturable=args.device == "cuda")  # capturable: in CUDA graphs
        groups = dict(actor=self.actor_params, critic=self.critic_params, alpha=[self.log_alpha])
        self.optimizers = {name: torch.optim.Adam(params, **adam) for name, params in groups.items()}

    def update(self, batch, with_actor):
        """One step of all critics on rows [batch, dim], if asked one of actor and temperature, then one of the targets.

        The target uses the actor before this step's update, and the actor's loss the critics before theirs. Returns
        both losses; the actor's is 0 if it has no step.
        """
        args = self.args
        observations, actions, rewards, next_observations, terminals = batch.split(self.sizes, dim=1)
        with torch.no_grad():
            next_actions, next_log_density = self.actor.sample(next_observations)
            members = torch.rand(args.num_q, device=batch.device).topk(2).indices  # two different critics
            next_q = self.critic_target(torch.cat([next_observations, next_actions], dim=1), members).amin(0)
            next_value = next_q - self.alpha * next_log_density
            target = rewards[:, 0] + args.discount * (1 - terminals[:, 0]) * next_value
        q = self.critic(torch.cat([observations, actions], dim=1))
        critic_loss = (q - target).square().mean(1).sum()
        self.optimizers["critic"].zero_grad()
        critic_loss.backward()
        actor_loss = torch.zeros_like(critic_loss)
        if with_actor:
            policy_actions, log_density = self.actor.sample(observations)
            q = self.critic(torch.cat([observations, policy_actions], dim=1)).mean(0)  # not the minimum
            actor_loss = (self.alpha * log_density - q).mean()
            alpha_loss = -self.log_alpha * (log_density.detach() + self.target_entropy).mean()
            self.optimizers["actor"].zero_grad()
            actor_loss.backward(inputs=self.actor_params)  # no gradient for the critics
            self.optimizers["actor"].step()
            self.optimizers["alpha"].zero_grad()
            alpha_loss.backward()
            self.optimizers["alpha"].step()
            self.alpha.copy_(self.log_alpha.detach().exp())
        self.optimizers["critic"].step()
        with torch.no_grad():
            torch._foreach_lerp_(self.target_params, self.critic_params, args.tau)
        return torch.stack([critic_loss, actor_loss]).detach()


# --- Environments and scores ------------------------------------------------------------------------------------------

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


class DMC(gym.Env):
    """A task of the DeepMind Control suite: flat float32 observations in its own order; 1000 steps, no terminals."""

    def __init__(self, domain, task):
        choose_renderer()  # one task needs one, quadruped-escape
        from dm_control import suite  # takes seconds, and nothing else here needs it

        self.dm_env = suite.load(domain, task, environment_kwargs=dict(flat_observation=True))
        shape, actions = self.dm_env.observation_spec()["observations"].shape, self.dm_env.action_spec()
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.action_space = gym.spaces.Box(actions.minimum.astype(np.float32), actions.maximum.astype(np.float32))

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.dm_env.task._random = np.random.RandomState(seed % 2**32)
        self.observation = self.dm_env.reset().observation["observations"].astype(np.float32)
        return self.observation, {}

    def step(self, action):
        from dm_control.rl.control import PhysicsError

        try:
            time_step = self.dm_env.step(action)
        except PhysicsError:  # the simulation has diverged: the episode ends in its last valid state, not terminal
            return self.observation, 0.0, False, True, {}
        self.observation = time_step.observation["observations"].astype(np.float32)
        return self.observation, time_step.reward, False, time_step.last(), {}


# Copied from synther_vd4rl.choose_renderer
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


# Differs from synther_td3bc.make_env: DeepMind Control, and actions rescaled to [-1, 1]
def make_env(name):
    """The environment of a Gymnasium id or dmc/domain-task. RunError for an unknown one, or unsupported spaces."""
    if tuple(map(int, version("mujoco").split(".")[:2])) >= (3, 5):
        warnings.warn("mujoco 3.5 and later add up contact margins, so the dynamics are not D4RL's: install 3.4.0")
    try:
        if name.startswith("dmc/"):
            domain, _, task = name.removeprefix("dmc/").partition("-")
            env = gym.wrappers.TimeLimit(DMC(domain, task), 1000)
        else:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # about v4
                env = gym.make(name, disable_env_checker=True)
            if env.spec.max_episode_steps is None:
                warnings.warn(f"{name} has no time limit: its episodes end after 1,000 steps")
                env = gym.wrappers.TimeLimit(env, 1_000)
        env.reset(seed=0), env.step(env.action_space.sample())  # what cannot work fails here
    except Exception as error:  # an environment can fail in any way
        hint = f" (MUJOCO_GL is {os.environ.get('MUJOCO_GL')})" if "gl" in str(error).lower() else ""
        raise edm.RunError(f"cannot make the environment {name}: {' '.join(str(error).split())}{hint}") from None
    s, a = env.observation_space, env.action_space
    is_flat = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (s, a))
    if not (is_flat and a.dtype.kind == "f" and (a.low < a.high).all() and max(*-a.low, *a.high) < 1e9):
        raise edm.RunError(f"{name} has {s} and {a}; only flat Box spaces with float actions in a range are supported")
    return gym.wrappers.ClipAction(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))


# Copied from synther_td3bc.evaluate
@torch.no_grad()
def evaluate(policy, envs, seed):
    """Returns [len(envs)] of one episode in each environment, stepped together. `policy` maps float32 observations
    [n, obs_dim] to actions [n, act_dim] on the CPU. Environment i is reset with seed + i. RunError for NaN or Inf."""
    observations = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)], dtype=np.float32)
    returns, alive = np.zeros(len(envs)), list(range(len(envs)))
    while alive:
        actions = policy(torch.from_numpy(observations[alive])).numpy()
        if not np.isfinite(actions).all():
            cause = "the agent's action" if np.isfinite(observations).all() else "the environment's observation"
            raise edm.RunError(f"{cause} became NaN or Inf in an evaluation")
        for i, action in zip(tuple(alive), actions):
            observations[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            if terminated or truncated:
                alive.remove(i)
    return returns


# --- Replay buffer ----------------------------------------------------------------------------------------------------

CAPACITY = 1_000_000  # rows; then the oldest is overwritten


def sample_batches(replay, synthetic, num_batches, batch_size, ratio):
    """Batches for one environment step, [num_batches, batch_size, dim], drawn with replacement (Algorithm 1, line 9).
    int(batch_size * ratio) rows of each are from `synthetic` [M, dim] if that holds any, the others from `replay`."""
    num_synthetic = int(batch_size * ratio) if len(synthetic) else 0
    index = torch.randint(len(replay), (num_batches, batch_size - num_synthetic), device=replay.device)
    if not num_synthetic:
        return replay[index]
    synthetic_index = torch.randint(len(synthetic), (num_batches, num_synthetic), device=replay.device)
    return torch.cat([replay[index], synthetic[synthetic_index]], dim=1)


def save_dataset(path, env, rows, timeouts):
    """Write rows [N, dim] in the order of their collection to an HDF5 file in D4RL's layout.

    timeouts [N]: where a time limit ended an episode. The last row counts as such an end. The file holds actions in the
    environment's own units.
    """
    original = env.env.env.action_space  # before ClipAction and RescaleAction
    low, high = original.low, original.high
    data = edm.unpack(rows, env.observation_space.shape[0], len(low))
    data["actions"] = (low + high) / 2 + (high - low) / 2 * data["actions"]
    timeouts[-1] = True
    data["timeouts"] = timeouts.numpy() & ~data["terminals"]

    def write(f):
        with h5py.File(f, "w") as file:
            for key, x in data.items():
                file.create_dataset(key, data=x, compression="gzip", compression_opts=9, shuffle=True)

    edm.save_atomically(path, write)


# --- Experiment -------------------------------------------------------------------------------------------------------


# Differs from synther_td3bc.parse_args: another --save-dataset can be given
def parse_args():
    """The arguments of the command line. With --resume, those that the run was started with."""
    args = tyro.cli(Args, description=__doc__)
    if args.resume:
        try:
            saved = Args(**json.loads((Path(args.resume) / "args.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise edm.RunError(f"{args.resume} is not a run folder of this script: {error}") from None
        args = tyro.cli(Args, default=saved)
        changed = [name for name, value in vars(args).items() if value != getattr(saved, name)]
        if changed := set(changed) - {"resume", "track", "wandb_project", "wandb_entity", "save_dataset"}:
            raise edm.RunError(f"{args.resume} was started with another {', '.join(changed)}")
    return args


def main(args):
    # --- Arguments, environments ---
    start_time = time.time()
    for values in [values for pattern, values in DEFAULTS.items() if re.match(pattern, args.env)]:
        edm.fill(args, values)
    edm.fill(args, ALGOS[args.algo] | dict(exp_name=f"synther_sac_online-{args.algo}"))
    edm.resolve(args, 0)
    edm.check_args(args)
    edm.join_processes(args.device)  # under torchrun all but the first stay here
    if args.num_q < 2:
        raise edm.RunError(f"--num-q must be at least 2, not {args.num_q}")
    for name in ("learning_starts", "retrain_every") if args.algo == "synther" else ("learning_starts",):
        if getattr(args, name) >= args.total_steps:
            raise edm.RunError(f"--{name.replace('_', '-')} must be less than --total-steps {args.total_steps}")
    if args.save_dataset:
        path = Path(args.save_dataset)
        if path.suffix not in (".hdf5", ".h5") or not path.parent.is_dir() or (path.exists() and not args.resume):
            raise edm.RunError(f"--save-dataset must be a new .hdf5 file in an existing folder, not {path}")
    env, envs = make_env(args.env), [make_env(args.env) for _ in range(args.eval_episodes)]
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    has_score = not math.isnan(normalized_score(args.env, 0))

    # --- Run folder and log ---
    run_name = re.sub(r"[^\w.-]", "-", f"{args.env}__{args.exp_name}__{args.seed}__{1000 * start_time:.0f}")
    run_dir = Path(args.resume or Path(args.out_dir) / run_name)
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
    saved = edm.load_file(checkpoint, args.device) if checkpoint.exists() else dict(step=0, log_size=0, seconds=0)
    start_time -= saved["seconds"]
    print(f"{json.dumps(vars(args), indent=2)}\nrun folder: {run_dir}  (if stopped, go on with --resume {run_dir})")
    edm.on_signal(f"stopped: go on with python {sys.argv[0]} --resume {run_dir}")
    metrics = open(run_dir / "metrics.csv", "a+", buffering=1)
    metrics.truncate(saved["log_size"])  # what was logged after the checkpoint comes again
    metrics.write("" if saved["log_size"] else "step,key,value\n")

    def log(step, values):  # step: environment steps, for all of them
        metrics.writelines(f"{step},{key},{float(value)}\n" for key, value in values.items())
        if args.track:
            with contextlib.suppress(Exception):  # a failure of the tracker does not end the run
                wandb.log(values | {"step": step})

    # --- Agent, replay buffer, and where a stopped run was ---
    torch.manual_seed(args.seed)
    agent = SAC(obs_dim, act_dim, args)
    capacity = min(CAPACITY, args.total_steps)
    replay = torch.zeros(capacity, 2 * obs_dim + act_dim + 2, device=args.device)
    timeouts = torch.zeros(capacity, dtype=torch.bool)
    batch = torch.empty(args.batch_size, replay.shape[1], device=args.device)
    losses = torch.zeros(len(agent.LOSSES), device=args.device)
    evaluations, start, model_step, synthetic = [], saved["step"], 0, replay[:0]
    if start > 0:
        agent.load_state_dict(saved["agent"])
        for name, optimizer in agent.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        replay[: len(saved["replay"])] = saved["replay"]
        timeouts[: len(saved["replay"])] = saved["timeouts"].cpu()
        timeouts[(start - 1) % capacity] = True  # a new episode begins: the environment's state is not saved
        losses.copy_(saved["losses"])
        evaluations, model_step = saved["evaluations"], saved["model_step"]
        edm.generator(args.device).set_state(saved["rng"].cpu())
    if model_step > 0:
        synthetic = edm.pack(**edm.load_transitions(run_dir / "synthetic.npz")).to(args.device)
    obs = np.array(env.reset(seed=args.seed + 1_003 * start)[0])  # some environments write the next into the same array

    def save(step):
        optimizers = {name: optimizer.state_dict() for name, optimizer in agent.optimizers.items()}
        state = dict(step=step, model_step=model_step, agent=agent.state_dict(), optimizers=optimizers, losses=losses)
        state |= dict(replay=replay[:step].clone(), timeouts=timeouts[:step].clone(), seconds=time.time() - start_time)
        state |= dict(rng=edm.generator(args.device).get_state(), log_size=metrics.seek(0, 2), evaluations=evaluations)
        edm.save_atomically(checkpoint, lambda f: torch.save(state, f))

    def critic_step():
        losses.add_(agent.update(batch, with_actor=False))

    def last_step():
        losses.add_(agent.update(batch, with_actor=True))

    if args.device == "cuda":
        critic_step, last_step = edm.cuda_graph(critic_step), edm.cuda_graph(last_step)

    def evaluate_agent(step):
        actor = copy.deepcopy(agent.actor).cpu()  # a few rows at a time are faster there
        returns = evaluate(actor, envs, args.seed + 10_000)  # the official code draws new seeds every 1,000 steps
        evaluations.append((step, returns.tolist()))
        values = {"eval/return_mean": returns.mean(), "eval/return_std": returns.std()}
        if has_score:
            values["eval/normalized_score"] = normalized_score(args.env, returns.mean())
        log(step, values | {"perf/seconds": time.time() - start_time})
        bar.set_postfix({key.removeprefix("eval/"): f"{value:.1f}" for key, value in values.items()}, refresh=False)

    bar = edm.Bar(range(start, args.total_steps), args.algo, initial=start, total=args.total_steps)
    if args.eval_episodes and start == 0:
        evaluate_agent(0)
    clock = time.time()
    for t in bar:
        # --- SynthER: train a new diffusion model, replace the generated transitions (Algorithm 1, lines 6 to 8) ---
        if args.algo == "synther" and t % args.retrain_every == 0 and t > model_step:
            save(t)  # so that a kill costs no more than this stage
            pause, values = time.time(), {}
            real = replay[:t].cpu()
            has_terminals = not args.env.startswith("dmc/")  # otherwise d is no part of the model
            raw_columns = ([-1] if has_terminals else []) + ([] if args.standardize_reward else [obs_dim + act_dim])
            settings = replace(args, diffusion_seed=(args.seed + args.diffusion_seed) * 1_000_003 + t)
            init = edm.load_edm(run_dir / "diffusion.pt") if args.warm_start and model_step > 0 else None
            options = dict(init=init, device=args.device, log=lambda _, loss: values.update(loss))
            columns = real if has_terminals else real[:, :-1]
            model = edm.train_edm(columns, settings, raw_columns=raw_columns, time_dim=256, **options)
            sampling_time = time.time()
            if has_terminals:
                rows = edm.generate_transitions(model, real, settings)  # the official code does not round terminals
            else:
                rows = F.pad(edm.generate(model, args.num_samples, settings), (0, 1))  # d = 0
            values["perf/diffusion_seconds"] = sampling_time - pause
            values["perf/samples_per_sec"] = len(rows) / (time.time() - sampling_time)
            report = edm.quality_report(real, rows)
            edm.plot_marginals(run_dir / "marginals.png", real, rows, obs_dim, act_dim)
            edm.save_atomically(run_dir / "synthetic.npz", lambda f: np.savez(f, **edm.unpack(rows, obs_dim, act_dim)))
            print("sample quality:", report, "" if report["marginal"] > 0.8 else "\nthe samples are not like the data")
            log(t, values | {f"diffusion/{key}": value for key, value in report.items()})
            edm.save_edm(run_dir / "diffusion.pt", model)  # last: until here, a warm start needs the one before
            synthetic, model_step = rows.to(args.device), t
            save(t)
            clock += time.time() - pause  # the rate is the agent's

        # --- Act ---
        with torch.no_grad():
            if t <= args.learning_starts:
                action = 2 * torch.rand(act_dim, device=args.device) - 1
            else:
                action = agent.actor.sample(torch.as_tensor(obs, dtype=torch.float32, device=args.device)[None])[0][0]
        action = action.cpu().numpy()  # the only wait in training
        if not np.isfinite(action).all():
            cause = "the agent's action" if np.isfinite(obs).all() else f"the observation of {args.env}"
            raise edm.RunError(f"{cause} is not finite at environment step {t}")
        next_obs, reward, terminated, truncated, _ = env.step(action)
        # A fall on the very step of the time limit is terminal too; in the official code it is not.
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]], dtype=np.float32)
        if not np.isfinite(row).all():
            raise edm.RunError(f"{args.env} gave NaN or Inf at step {t}: observation {next_obs}, reward {reward}")
        replay[t % capacity] = torch.from_numpy(row).to(args.device)
        timeouts[t % capacity] = truncated
        obs = np.array(env.reset()[0] if terminated or truncated else next_obs)

        # --- Learn ---
        if t >= args.learning_starts:
            batches = sample_batches(replay[: t + 1], synthetic, args.utd, args.batch_size, args.synther_ratio)
            for i in range(args.utd):
                batch.copy_(batches[i])
                critic_step() if i < args.utd - 1 else last_step()

        # --- Log, evaluate, save ---
        step = t + 1
        if step % args.eval_every == 0 or step == args.total_steps:
            count = min(step % args.eval_every or args.eval_every, step - args.learning_starts)
            if count > 0:
                critic_loss, actor_loss = (losses / count).tolist()
                if not math.isfinite(critic_loss + actor_loss):
                    raise edm.RunError(f"a loss of the agent is no longer finite, before environment step {step}")
                values = {"train/critic_loss": critic_loss / args.utd, "train/actor_loss": actor_loss}
                rate = args.utd * count / (time.time() - clock)
                log(step, values | {"train/alpha": agent.alpha.item(), "perf/updates_per_sec": rate})
                losses.zero_()
            if args.eval_episodes:
                evaluate_agent(step)
            clock = time.time()
        if step % args.checkpoint_every == 0 or step == args.total_steps or bar.stop:
            save(step)

    # --- Results ---
    if evaluations:
        steps, returns = (np.array(x) for x in zip(*evaluations))
        scores = normalized_score(args.env, returns)
        arrays = dict(steps=steps, returns=returns, normalized_scores=scores)
        arrays |= dict(final_returns=returns[-1], final_scores=scores[-1])  # by unifloral's names
        edm.save_atomically(run_dir / "final_returns.npz", lambda f: np.savez(f, **arrays))
        values, label = (scores, "normalised score") if has_score else (returns, "return")
        mean, std = values.mean(1), values.std(1)  # over the episodes of each evaluation
        ax = Figure(figsize=(6, 4), layout="constrained").subplots()
        ax.fill_between(steps, mean - std, mean + std, alpha=0.25, linewidth=0)
        ax.plot(steps, mean)
        ax.set(xlabel="environment steps", ylabel=label, title=run_dir.name)
        edm.save_atomically(run_dir / "learning_curve.png", lambda f: ax.figure.savefig(f, format="png", dpi=120))
        score = f"normalised score {scores[-1].mean():.1f} +- {scores[-1].std():.1f}, " if has_score else ""
        print(f"{score}return {returns[-1].mean():.0f} +- {returns[-1].std():.0f}")
    if args.save_dataset and Path(args.save_dataset).exists():
        print(f"{args.save_dataset} exists, and is left as it is")
    elif args.save_dataset:
        shift = -args.total_steps  # the oldest row first
        save_dataset(args.save_dataset, env, replay.cpu().roll(shift, 0), timeouts.roll(shift))
    print(f"done in {time.time() - start_time:.0f} s: {run_dir}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (edm.RunError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(2)
