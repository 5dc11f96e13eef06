"""SynthER online: SAC with a diffusion model beside its replay buffer, and the baselines SAC and REDQ.

Synthetic Experience Replay (Lu et al., NeurIPS 2023, https://arxiv.org/abs/2303.06614), online part (Section 3.2 and
4.2, Algorithm 1). The agent is soft actor-critic as REDQ's code has it (Chen et al. 2021), the same for all three
methods. With --algo synther a new diffusion model is trained on the replay buffer every 10,000 environment steps, and
half of every batch comes from its samples: that is all that changes, and lets SAC take 20 updates per step.

    python synther_sac_online.py                                              # Pendulum; two minutes on 2 cores
    python synther_sac_online.py --env HalfCheetah-v4                         # the paper's experiment; wants a GPU
    python synther_sac_online.py --env dmc/cheetah-run                        # the DeepMind Control suite
    python synther_sac_online.py --env HalfCheetah-v4 --algo redq             # 10 critics, 20 updates per step
    python synther_sac_online.py --env HalfCheetah-v4 --algo sac              # one update per step
    python synther_sac_online.py --env Hopper-v4 --algo sac --total-steps 50000 --save-dataset hopper.hdf5
    python synther_sac_online.py --resume runs/...                            # continue a run that was stopped

On two CPU cores an update takes about 3 ms, and 1,000 environment steps with 20 updates each about a minute. A
diffusion model of the paper's size takes an hour to train there and 20 minutes to draw 1,000,000 samples; one of
6 x 256 and 5,000 steps half a minute, and 20 seconds for 100,000.

Sections: arguments | environment and scores | replay buffer | networks | agent | experiment.
"""

import copy
import dataclasses
import json
import math
import pickle
import re
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import gymnasium as gym
import h5py
import mujoco
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
    env: str = "Pendulum-v1"
    """environment: a Gymnasium id with flat Box spaces (HalfCheetah-v4), or dmc/domain-task (dmc/cheetah-run)"""
    algo: Literal["sac", "redq", "synther"] = "synther"
    """sac: 2 critics, 1 update per step; redq: 10 and 20; synther: 2 and 20, half of each batch generated"""
    seed: int = 0
    """seed of agent, environment, diffusion models and evaluation"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one"""
    out_dir: str = "runs"
    """where the run folder {env}__{exp_name}__{seed}__{unix_time} is made"""
    exp_name: Optional[str] = None
    """name of the experiment, part of the run folder's name; None takes synther_sac_online-{algo}"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline needs no account)"""
    wandb_project: str = "synther"
    """project to log to with --track"""
    wandb_entity: Optional[str] = None
    """team or user to log to with --track"""
    resume: Optional[str] = None
    """run folder to continue; its args.json supplies every other argument, and none but --save-dataset can change"""
    compile: Literal["auto", "on", "off"] = "auto"
    """CUDA graphs of the training steps: auto uses them on a GPU, off runs every step eagerly, on insists on a GPU"""

    # the run; None takes the value for this environment or --algo, see DEFAULTS
    total_steps: Optional[int] = None
    """environment steps (paper: 200,000 on DeepMind Control, 100,000 else; Pendulum: 2,000)"""
    learning_starts: Optional[int] = None
    """first environment step with updates; actions are random up to it (paper: 5,000; Pendulum: 500)"""
    eval_every: Optional[int] = None
    """environment steps between evaluations, and between logged losses (paper: 1,000; Pendulum: 250)"""
    eval_episodes: int = 10
    """episodes per evaluation, with the mean action (paper: 10); 0 skips evaluation"""
    checkpoint_every: Optional[int] = None
    """environment steps between checkpoints (default: 5,000; Pendulum: 500)"""
    save_dataset: Optional[str] = None
    """write the replay buffer at the end: a file.hdf5 in D4RL's layout, or a Minari id such as hopper/sac-v0; can be
    given with --resume too, for a run that has ended"""

    # the agent (REDQ's code, which the paper builds on)
    utd: Optional[int] = None
    """updates of the critics per environment step (paper: 20; sac 1)"""
    num_q: Optional[int] = None
    """critics; targets take the minimum of two of them, drawn anew for each update (paper: 2; redq 10)"""
    batch_size: int = 256
    """transitions per update (paper: 256)"""
    hidden_dim: int = 256
    """units per hidden layer of actor and critics (paper: 256)"""
    hidden_layers: int = 2
    """hidden layers of actor and critics (paper: 2)"""
    learning_rate: float = 3e-4
    """Adam's learning rate for actor, critics and temperature (paper: 3e-4)"""
    discount: float = 0.99
    """discount factor gamma (paper: 0.99)"""
    tau: float = 0.005
    """rate of the target networks' moving average (paper: 0.005)"""
    target_entropy: Optional[float] = None
    """entropy that the temperature is tuned to (default: minus the dimension of the actions, as in SynthER's code)"""

    # the diffusion model, with --algo synther
    synther_ratio: float = 0.5
    """share of generated transitions in a batch (paper: 0.5, Section 3.2)"""
    retrain_every: Optional[int] = None
    """environment steps between diffusion models (paper: 10,000; Pendulum: 500)"""
    warm_start: bool = False
    """start each diffusion model from the last one's weights (the official code starts from new ones)"""
    patience: Optional[int] = None
    """stop training a diffusion model once its loss on 5% of the buffer, held out, has not fallen by 0.5% for this
    many thousand steps (paper: never)"""
    terminals: Literal["column", "classifier"] = "column"
    """terminals of generated rows: the diffusion model's last column above 0.5 (the paper's), or a small classifier of
    d from (s, a, r, s'), better where terminals are rare"""
    standardize_reward: Optional[bool] = None
    """standardise the reward for the diffusion model (paper: all columns; official code: not on DeepMind Control);
    --diffusion-recipe ranks always bends it"""
    diffusion_steps: Optional[int] = None
    """training steps of each diffusion model (paper: 100,000; Pendulum: 2,000)"""
    diffusion_recipe: Optional[Literal["paper", "fast", "ranks"]] = None
    """how to train: as the paper (the default from 100,000 steps on); fast (the default for less): a smaller, smoother
    denoiser, a higher learning rate, guided samples; ranks: fast with columns bent into normal distributions"""
    diffusion_width: Optional[int] = None
    """units per block of the denoiser (paper: 1024; fast: 384)"""
    diffusion_depth: Optional[int] = None
    """residual blocks of the denoiser (paper: 6, Table 8; fast: 4)"""
    diffusion_batch_size: int = 256
    """rows per training step (paper: 256)"""
    diffusion_lr: Optional[float] = None
    """initial learning rate of the cosine schedule (paper: 3e-4; fast: 2e-3)"""
    sampler: Literal["sde", "dpmpp", "dpmpp-sde"] = "dpmpp"
    """dpmpp-sde, dpmpp: DPM-Solver++(2M) with and without noise, one network call per step; sde: the paper's stochastic
    Heun, two (Table 9)"""
    sample_steps: Optional[int] = None
    """noise levels of the sampler (default 32; 128 for sde, the paper's)"""
    num_samples: Optional[int] = None
    """transitions that each model generates; they replace the last model's (paper: 1,000,000; Pendulum: 20,000)"""
    sample_batch_size: Optional[int] = None
    """transitions generated at a time (default 2,000 on a CPU; 100,000 on a GPU, the paper's)"""


# The paper's values, and small ones for Pendulum, by a pattern of the environment's id: each that matches adds to those
# before it.
DEFAULTS = {
    r".*": dict(
        total_steps=100_000, learning_starts=5_000, eval_every=1_000, checkpoint_every=5_000, retrain_every=10_000,
        standardize_reward=True, diffusion_steps=100_000, num_samples=1_000_000,
    ),
    r"dmc/": dict(total_steps=200_000, standardize_reward=False),
    r"Pendulum": dict(
        total_steps=2_000, learning_starts=500, eval_every=250, checkpoint_every=500, retrain_every=500,
        diffusion_steps=2_000, num_samples=20_000,
    ),
}  # fmt: skip
ALGOS = {"sac": dict(utd=1, num_q=2), "redq": dict(utd=20, num_q=10), "synther": dict(utd=20, num_q=2)}


def resolve(args):
    """Fill every argument that is None and has a value for this environment and algorithm. Returns the same Args."""
    values = {}
    for pattern, row in DEFAULTS.items():
        if re.match(pattern, args.env):
            values |= row
    values |= ALGOS[args.algo]
    recipe = args.diffusion_recipe or edm.default_recipe(args.diffusion_steps or values["diffusion_steps"])
    values |= {f"diffusion_{name}": value for name, value in edm.RECIPES[recipe].items()}
    values["diffusion_recipe"] = recipe
    values["exp_name"] = f"synther_sac_online-{args.algo}"
    values["sample_steps"] = 128 if args.sampler == "sde" else 32
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


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


class DMC(gym.Env):
    """A task of the DeepMind Control suite: flat float32 observations in its own order; 1000 steps, no terminals."""

    def __init__(self, domain, task):
        from dm_control import suite  # takes seconds, and nothing else here needs it

        self.dm_env = suite.load(domain, task)
        obs_dim = sum(int(np.prod(spec.shape)) for spec in self.dm_env.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        spec = self.dm_env.action_spec()
        self.action_space = gym.spaces.Box(spec.minimum.astype(np.float32), spec.maximum.astype(np.float32))

    def _flat(self, observation):
        return np.concatenate([np.ravel(x) for x in observation.values()]).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.dm_env.task._random = np.random.RandomState(seed)
        return self._flat(self.dm_env.reset().observation), {}

    def step(self, action):
        time_step = self.dm_env.step(action)
        return self._flat(time_step.observation), time_step.reward, False, time_step.last(), {}


# Differs from synther_td3bc.make_env: DeepMind Control, and actions rescaled to [-1, 1]
def make_env(env_id):
    """A Gymnasium or DeepMind Control environment that takes actions in [-1, 1].

    Raises:
        RunError: unknown id, or spaces that are not flat bounded boxes.
    """
    if tuple(map(int, mujoco.mj_versionString().split(".")[:2])) >= (3, 5):
        warnings.warn("mujoco 3.5 and later add up contact margins: Hopper's dynamics differ from D4RL's; use 3.4.0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # gymnasium announces v5 with every v4
            if env_id.startswith("dmc/"):
                domain, _, task = env_id.removeprefix("dmc/").partition("-")
                env = DMC(domain, task)
            else:
                env = gym.make(env_id, disable_env_checker=True)
    except (gym.error.Error, ImportError, ValueError) as error:
        raise edm.RunError(f"cannot make the environment {env_id}: {' '.join(str(error).split())}") from None
    for space in (env.observation_space, env.action_space):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise edm.RunError(f"{env_id} has the space {space}; only flat Box spaces are supported")
    if not env.action_space.is_bounded():
        raise edm.RunError(f"{env_id} has the actions {env.action_space}; only bounded ones are supported")
    return gym.wrappers.ClipAction(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))


# Copied from synther_td3bc.evaluate
@torch.no_grad()
def evaluate(policy, envs, seed):
    """Returns [len(envs)] of one episode in each environment, stepped together with one forward pass of `policy`.

    Args:
        policy: maps float32 observations [n, obs_dim] to actions [n, act_dim], both CPU tensors.
        seed: environment i is reset with seed + i, the same at every evaluation, as in SynthER.
    """
    observations = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    returns, alive = np.zeros(len(envs)), list(range(len(envs)))
    while alive:
        actions = policy(torch.as_tensor(observations[alive], dtype=torch.float32)).numpy()
        for i, action in zip(tuple(alive), actions):
            observations[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            if terminated or truncated:
                alive.remove(i)
    return returns


STATE_TYPES = (bool, int, float, np.ndarray, np.random.Generator, mujoco.MjData)


def env_layers(env):
    """The environment's wrappers from the outermost to the environment itself."""
    layers = [env]
    while layers[-1] is not env.unwrapped:
        layers.append(layers[-1].env)
    return layers


def get_env_state(env):
    """Everything that changes in an environment as it runs, as bytes: physics, step counter, random generator.

    MuJoCo's whole state is kept, not just positions and velocities: with these alone Ant's next reward would differ.
    """
    is_state = lambda x: isinstance(x, STATE_TYPES) or type(x).__module__.startswith("dm_control")  # noqa: E731
    return pickle.dumps([{k: v for k, v in vars(layer).items() if is_state(v)} for layer in env_layers(env)])


def set_env_state(env, state):
    """Undo `get_env_state`, in this or another environment of the same id."""
    for layer, values in zip(env_layers(env), pickle.loads(state)):
        vars(layer).update(values)


def can_restore(env_id):
    """Whether `get_env_state` catches all there is: true for MuJoCo, DeepMind Control, and most classic tasks."""
    envs = [make_env(env_id) for _ in range(2)]
    rng = np.random.default_rng(0)
    actions = [rng.uniform(-1, 1, envs[0].action_space.shape).astype(np.float32) for _ in range(4)]
    for seed, env in enumerate(envs):
        env.reset(seed=seed)
        env.step(actions[seed])
    try:
        set_env_state(envs[1], get_env_state(envs[0]))
    except Exception:  # pickling has no exception of its own
        return False
    for action in actions:
        (obs, *others), (same_obs, *same_others) = (env.step(action)[:4] for env in envs)
        if not np.array_equal(obs, same_obs) or others != same_others:
            return False
    return np.array_equal(*(env.reset()[0] for env in envs))


# --- Replay buffer ----------------------------------------------------------------------------------------------------
# A tensor of rows [s, a, r, s', d] on the device, oldest overwritten first. Time limits are not terminals.

CAPACITY = 1_000_000


def sample_batches(replay, synthetic, num_batches, batch_size, ratio):
    """Batches for all updates of one environment step (Algorithm 1, line 9), drawn with replacement.

    Args: replay [size, dim] and synthetic [M, dim], rows; the latter empty before the first diffusion model.
    Returns: [num_batches, batch_size, dim], of each batch int(batch_size * ratio) rows synthetic, if there are any.
    """
    num_synthetic = int(batch_size * ratio) if len(synthetic) else 0
    index = torch.randint(len(replay), (num_batches, batch_size - num_synthetic), device=replay.device)
    if not num_synthetic:
        return replay[index]
    synthetic_index = torch.randint(len(synthetic), (num_batches, num_synthetic), device=replay.device)
    return torch.cat([replay[index], synthetic[synthetic_index]], dim=1)


def dataset_exists(target):
    """Whether there is a file or local Minari dataset of this name. Raises RunError if it cannot be such a name."""
    if target.endswith((".hdf5", ".h5")):
        if not Path(target).parent.is_dir():
            raise edm.RunError(f"the folder of --save-dataset {target} does not exist")
        return Path(target).exists()
    import minari

    try:
        minari.dataset.minari_dataset.parse_dataset_id(target)
    except (ValueError, TypeError):
        message = f"--save-dataset must be a file.hdf5 or a Minari id like hopper/sac-v0, not {target}"
        raise edm.RunError(message) from None
    return target in minari.list_local_datasets()


def save_dataset(target, env_id, rows, timeouts):
    """Write transitions of the environment `env_id` in the order of their collection, actions in its own units.

    Args:
        target: an .hdf5 file in D4RL's layout, or a Minari id. If rows are terminal, the file holds the true s' as
            next_observations; otherwise it needs none, since s' is the s of the next row.
        rows: [N, dim] of `edm.pack`.
        timeouts: bool tensor [N], where an episode ended by its time limit. The last row counts as one.
    """
    env = make_env(env_id).unwrapped
    data = edm.unpack(rows, env.observation_space.shape[0], env.action_space.shape[0])
    low, high = env.action_space.low, env.action_space.high
    data["actions"] = (low + high) / 2 + (high - low) / 2 * data["actions"]
    timeouts = timeouts.numpy() & ~data["terminals"]
    timeouts[-1] = not data["terminals"][-1]
    if target.endswith((".hdf5", ".h5")):
        kept = [key for key in data if key != "next_observations" or data["terminals"].any()]

        def write(f):
            with h5py.File(f, "w") as file:
                for key, x in ({key: data[key] for key in kept} | {"timeouts": timeouts}).items():
                    file.create_dataset(key, data=x, compression="gzip", compression_opts=9, shuffle=True)

        edm.save_atomically(target, write)
        return
    import minari
    from minari.data_collector import EpisodeBuffer

    ends = np.flatnonzero(data["terminals"] | timeouts) + 1
    episodes = []
    for i, (start, end) in enumerate(zip([0, *ends], ends)):
        part = {key: x[start:end] for key, x in data.items()}
        observations = np.concatenate([part["observations"], part["next_observations"][-1:]])
        episodes.append(
            EpisodeBuffer(
                id=i,
                observations=observations,
                actions=part["actions"],
                rewards=part["rewards"],
                terminations=part["terminals"],
                truncations=timeouts[start:end],
            )  # fmt: skip
        )
    spaces = dict(
        observation_space=gym.spaces.Box(-np.inf, np.inf, observations.shape[1:], np.float32),
        action_space=gym.spaces.Box(low, high, dtype=np.float32),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an author, a description, ...
        env_name = None if env_id.startswith("dmc/") else env_id
        minari.create_dataset_from_buffers(target, episodes, env=env_name, **spaces)


# --- Networks ---------------------------------------------------------------------------------------------------------


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
def xavier_init(actor, critic):
    """REDQ's initial weights: Glorot and Bengio's uniform ones, each critic a network of its own, and no biases."""
    for layer in actor.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    for weight, bias in zip(critic.weights, critic.biases):
        bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
        weight.uniform_(-bound, bound)
        bias.zero_()


# --- Agent ------------------------------------------------------------------------------------------------------------


class SAC:
    """Soft actor-critic with any number of critics, in the order of steps of REDQ's code (Chen et al. 2021).

    A batch holds rows [s, a, r, s', d] of `edm.pack`. The updates touch tensors only: no logging, no waiting.
    """

    def __init__(self, obs_dim, act_dim, args, device):
        self.sizes = [obs_dim, act_dim, 1, obs_dim, 1]
        self.args = args
        self.target_entropy = -act_dim if args.target_entropy is None else args.target_entropy
        self.actor = TanhGaussianActor(obs_dim, act_dim, args.hidden_dim, args.hidden_layers)
        self.critic = EnsembleCritic(obs_dim + act_dim, args.hidden_dim, args.hidden_layers, args.num_q)
        xavier_init(self.actor, self.critic)
        self.actor, self.critic = self.actor.to(device), self.critic.to(device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = torch.zeros(1, device=device, requires_grad=True)
        self.alpha = torch.full((1,), 0.2, device=device)  # REDQ's value until the first update of log_alpha
        adam = dict(lr=args.learning_rate, fused=True, capturable=torch.device(device).type == "cuda")
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), **adam)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), **adam)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], **adam)
        self.critic_params, self.target_params = list(self.critic.parameters()), list(self.critic_target.parameters())

    def update(self, batch, with_actor):
        """One step of all critics on rows [batch, dim], and of actor and temperature if asked; then of the targets.

        The actor's gradient is that of the critics before their step, and the critics' target that of the actor before
        its own. Returns the losses of critics and actor, tensors (the second 0 without the actor).
        """
        args = self.args
        observations, _, rewards, next_observations, terminals = batch.split(self.sizes, dim=1)
        with torch.no_grad():
            next_actions, next_log_density = self.actor.sample(next_observations)
            members = torch.rand(args.num_q, device=batch.device).topk(2).indices  # two different critics
            next_q = self.critic_target(torch.cat([next_observations, next_actions], dim=1), members).amin(0)
            next_value = next_q - self.alpha * next_log_density
            target = rewards[:, 0] + args.discount * (1 - terminals[:, 0]) * next_value
        q = self.critic(batch[:, : self.sizes[0] + self.sizes[1]])  # a row starts with (s, a)
        critic_loss = (q - target).square().mean(1).sum()
        self.critic_optimizer.zero_grad(set_to_none=True)
        critic_loss.backward()

        actor_loss = critic_loss.new_zeros(())
        if with_actor:
            actions, log_density = self.actor.sample(observations)
            q = self.critic(torch.cat([observations, actions], dim=1))
            actor_loss = (self.alpha * log_density - q.mean(0)).mean()  # the mean of all critics, not their minimum
            grads = torch.autograd.grad(actor_loss, list(self.actor.parameters()))  # none for the critics
            for parameter, grad in zip(self.actor.parameters(), grads):
                parameter.grad = grad
            self.log_alpha.grad = -(log_density.detach() + self.target_entropy).mean(0, keepdim=True)
            self.alpha_optimizer.step()
            self.actor_optimizer.step()
            self.alpha.copy_(self.log_alpha.detach().exp())
        self.critic_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.target_params, self.critic_params, args.tau)
        return critic_loss.detach(), actor_loss.detach()

    def state_dict(self):
        parts = ("actor", "critic", "critic_target", "actor_optimizer", "critic_optimizer", "alpha_optimizer")
        state = {name: getattr(self, name).state_dict() for name in parts}
        return state | {"log_alpha": self.log_alpha.detach(), "alpha": self.alpha}

    def load_state_dict(self, state):
        for name, value in state.items():
            if torch.is_tensor(value):
                getattr(self, name).data.copy_(value)
            else:
                getattr(self, name).load_state_dict(value)


# --- Experiment -------------------------------------------------------------------------------------------------------


MAY_CHANGE = ("resume", "save_dataset")


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


MAY_BE_ZERO = ("seed", "eval_episodes", "synther_ratio")


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


def check_args(args):
    """Raise RunError where an argument makes no sense or a choice cannot be had on this machine."""
    check_numbers(args)
    if args.num_q < 2:
        raise edm.RunError(f"--num-q must be at least 2, not {args.num_q}")
    if args.learning_starts >= args.total_steps:
        raise edm.RunError(f"--total-steps {args.total_steps} end before learning starts, at {args.learning_starts}")
    if args.algo == "synther" and args.retrain_every >= args.total_steps:
        raise edm.RunError(
            f"--total-steps {args.total_steps} end before the first diffusion model, at {args.retrain_every}"
        )
    if args.save_dataset and dataset_exists(args.save_dataset) and not args.resume:
        raise edm.RunError(f"{args.save_dataset} exists; give another --save-dataset or move it away")
    if not torch.cuda.is_available() and (args.device == "cuda" or args.compile == "on"):
        raise edm.RunError("--device cuda and --compile on need a GPU, and PyTorch finds none")
    if args.compile == "on" and args.device == "cpu":
        raise edm.RunError("--compile on needs a GPU, and --device cpu forbids it")


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


# Differs from synther_td3bc.make_synthetic: many models in one run
def make_synthetic(args, replay, step, obs_dim, act_dim, run_dir, device, log):
    """Train a diffusion model on the replay buffer, generate transitions and report their quality (Algorithm 1, 6-8).

    A run that is killed in here and resumed goes on where it was: diffusion_checkpoint_* and synthetic_*.partial stay
    until the next checkpoint of the run. On DeepMind Control, where nothing is terminal, d is no part of the model.

    Returns: rows [num_samples, dim] of `edm.pack` on the device, terminals exactly 0 or 1. They are left in the run
    folder as synthetic.npz, the model as diffusion.pt, the histograms as marginals.png.
    """
    real = replay.cpu()
    terminal, reward = real.shape[1] - 1, obs_dim + act_dim
    modelled, skip = real, [terminal]
    if args.env.startswith("dmc/"):
        modelled, skip = real[:, :terminal], []
    if not args.standardize_reward and args.diffusion_recipe != "ranks":
        skip.append(reward)
    previous, last = run_dir / "diffusion.pt", {}
    start_time = time.time()
    model = edm.train_edm(
        modelled,
        steps=args.diffusion_steps,
        recipe=args.diffusion_recipe,
        batch_size=args.diffusion_batch_size,
        lr=args.diffusion_lr,
        width=args.diffusion_width,
        depth=args.diffusion_depth,
        time_dim=256,  # 128 offline
        skip=skip,
        init=edm.load_edm(previous, device) if args.warm_start and previous.exists() else None,
        patience=args.patience,
        seed=args.seed * 1_000_003 + step,
        device=device,
        compile=args.compile,
        checkpoint_path=run_dir / f"diffusion_checkpoint_{step}.pt",
        checkpoint_every=max(args.diffusion_steps // 10, 1),
        on_log=lambda diffusion_step, values: last.update(values, **{"diffusion/steps": diffusion_step}),
    )
    sampling_time = time.time()
    log(step, last | {"perf/diffusion_seconds": sampling_time - start_time})
    rows = torch.zeros(args.num_samples, real.shape[1])
    rows[:, : modelled.shape[1]] = edm.generate(
        model,
        args.num_samples,
        sampler=args.sampler,
        sample_steps=args.sample_steps,
        batch_size=args.sample_batch_size,
        seed=args.seed * 1_000_003 + step,
        partial_path=run_dir / f"synthetic_{step}.partial",
    )
    log(step, {"perf/samples_per_sec": len(rows) / (time.time() - sampling_time)})
    rows[:, -1] = rows[:, -1] > 0.5  # the official code leaves raw numbers here
    if args.terminals == "classifier":
        edm.relabel_terminals(rows, real, seed=args.seed * 1_000_003 + step)
    report = edm.quality_report(real, rows)
    tqdm.write(edm.format_report(report))
    log(step, {f"diffusion/{key}": value for key, value in report.items()})
    if report["nonfinite"] > 0:
        raise edm.RunError(f"{report['nonfinite']:.1%} of the generated transitions hold NaN or Inf")
    edm.save_edm(run_dir / "diffusion.pt", model)
    edm.plot_marginals(run_dir / "marginals.png", real, rows, obs_dim, act_dim)
    edm.save_atomically(run_dir / "synthetic.npz", lambda f: np.savez(f, **edm.unpack(rows, obs_dim, act_dim)))
    return rows.to(device)


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


def main(args):
    start_time = time.time()
    if args.resume:
        args = load_resumed_args(args)
    resolve(args)
    check_args(args)
    if args.save_dataset and args.save_dataset.endswith((".hdf5", ".h5")):  # so that a run can be resumed from anywhere
        args.save_dataset = str(Path(args.save_dataset).resolve())
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    env, envs = make_env(args.env), [make_env(args.env) for _ in range(max(args.eval_episodes, 1))]
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    run_dir, log = start_run(args, start_time)

    # --- State of the run ---
    torch.manual_seed(args.seed)
    agent = SAC(obs_dim, act_dim, args, device)
    capacity = min(CAPACITY, args.total_steps)
    replay = torch.zeros(capacity, 2 * obs_dim + act_dim + 2, device=device)
    timeouts = torch.zeros(capacity, dtype=torch.bool)
    synthetic = replay[:0]
    losses = torch.zeros(2, device=device)
    obs, _ = env.reset(seed=args.seed)
    evaluations, start, num_updates, logged_updates = [], 0, 0, 0
    checkpoint_path = run_dir / "checkpoint.pt"
    restorable = can_restore(args.env)
    if not restorable:
        print(f"the state of {args.env} cannot be saved: a resumed run would begin a new episode")
    if checkpoint_path.exists():
        checkpoint = edm.load_file(checkpoint_path, device)
        start, evaluations, losses = checkpoint["step"], checkpoint["evaluations"], checkpoint["losses"]
        num_updates, logged_updates = checkpoint["num_updates"], checkpoint["logged_updates"]
        agent.load_state_dict(checkpoint["agent"])
        saved_rows = len(checkpoint["replay"])
        replay[:saved_rows], timeouts[:saved_rows] = checkpoint["replay"], checkpoint["timeouts"].cpu()
        edm.set_rng_state(checkpoint["rng"], device)
        start_time -= checkpoint["seconds"]
        if restorable:
            obs = checkpoint["obs"].cpu().numpy()
            set_env_state(env, checkpoint["env"].cpu().numpy().tobytes())
        else:
            timeouts[(start - 1) % capacity] = True
            obs, _ = env.reset(seed=args.seed * 1_000_003 + start)
        if args.algo == "synther" and start > args.retrain_every:  # otherwise a model is due, or none was yet
            with np.load(run_dir / "synthetic.npz") as f:
                synthetic = edm.pack(**f).to(device)
        del checkpoint

    batch = torch.empty(args.batch_size, replay.shape[1], device=device)

    def critic_step():
        losses.add_(torch.stack(agent.update(batch, with_actor=False)))

    def last_step():
        losses.add_(torch.stack(agent.update(batch, with_actor=True)))

    if device.type == "cuda" and args.compile != "off":
        critic_step, last_step = edm.cuda_graph(critic_step), edm.cuda_graph(last_step)

    def save_checkpoint(step):
        size = min(step, capacity)
        state = {
            "step": step,
            "num_updates": num_updates,
            "logged_updates": logged_updates,
            "seconds": time.time() - start_time,
            "agent": agent.state_dict(),
            "replay": replay[:size].clone(),  # a slice would be saved with all that it is a slice of
            "timeouts": timeouts[:size].clone(),
            "obs": torch.as_tensor(obs),
            "env": torch.frombuffer(bytearray(get_env_state(env)), dtype=torch.uint8) if restorable else None,
            "losses": losses,
            "evaluations": evaluations,
            "rng": edm.get_rng_state(device),
        }
        edm.save_atomically(checkpoint_path, lambda f: torch.save(state, f))
        for pattern in ("diffusion_checkpoint_*.pt", "synthetic_*.partial"):  # what they led to is saved
            for path in run_dir.glob(pattern):
                path.unlink()

    def run_evaluation(step):
        actor = copy.deepcopy(agent.actor).cpu()  # ten rows at a time are faster there than on a GPU
        returns = evaluate(actor, envs, args.seed + 10_000)
        evaluations.append((step, returns.tolist()))
        values = {"eval/return_mean": returns.mean(), "eval/return_std": returns.std()}
        if scored:
            values["eval/normalized_score"] = normalized_score(args.env, returns).mean()
        log(step, values | {"perf/seconds": time.time() - start_time})
        bar.set_postfix_str(", ".join(f"{key.removeprefix('eval/')} {value:.1f}" for key, value in values.items()))

    scored = not math.isnan(normalized_score(args.env, 0.0))
    bar = tqdm(range(start, args.total_steps), args.algo, initial=start, total=args.total_steps, **edm.BAR)
    if start == 0 and args.eval_episodes:
        run_evaluation(0)
    last_time, timed_updates = time.time(), num_updates
    for t in bar:
        size = min(t, capacity)

        # --- Train a diffusion model and replace the synthetic data ---
        if args.algo == "synther" and t > 0 and t % args.retrain_every == 0:
            pause = time.time()
            if t != start and t % args.checkpoint_every:
                save_checkpoint(t)
            synthetic = make_synthetic(args, replay[:size], t, obs_dim, act_dim, run_dir, device, log)
            last_time += time.time() - pause  # the rate is the agent's

        # --- Act ---
        with torch.no_grad():
            if t <= args.learning_starts:
                action = 2 * torch.rand(act_dim, device=device) - 1
            else:
                action = agent.actor.sample(torch.as_tensor(obs, dtype=torch.float32, device=device)[None])[0][0]
        action = action.cpu().numpy()
        if not np.isfinite(action).all():
            raise edm.RunError(f"the agent's action is no longer finite at environment step {t}")
        next_obs, reward, terminated, truncated, _ = env.step(action)
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]], dtype=np.float32)
        replay[t % capacity] = torch.from_numpy(row).to(device)
        timeouts[t % capacity] = truncated
        obs = env.reset()[0] if terminated or truncated else next_obs

        # --- Learn ---
        if t >= args.learning_starts:
            batches = sample_batches(
                replay[: min(t + 1, capacity)], synthetic, args.utd, args.batch_size, args.synther_ratio
            )
            for i in range(args.utd - 1):
                batch.copy_(batches[i])
                critic_step()
            batch.copy_(batches[-1])
            last_step()
            num_updates += args.utd

        # --- Log, evaluate, save ---
        step = t + 1
        if step % args.eval_every == 0 and num_updates > logged_updates:
            critic_loss, actor_loss = (losses / (num_updates - logged_updates)).tolist()
            actor_loss *= args.utd  # which is updated once per environment step
            if not math.isfinite(critic_loss + actor_loss):
                raise edm.RunError(f"a loss of the agent is no longer finite, before environment step {step}")
            values = {"train/critic_loss": critic_loss, "train/actor_loss": actor_loss}
            rate = (num_updates - timed_updates) / (time.time() - last_time)
            log(step, values | {"train/alpha": agent.alpha.item(), "perf/updates_per_sec": rate})
            losses.zero_()
            edm.trim_memory()
            logged_updates = timed_updates = num_updates
            last_time = time.time()
        if args.eval_episodes and (step % args.eval_every == 0 or step == args.total_steps):
            pause = time.time()
            run_evaluation(step)
            last_time += time.time() - pause
        if step % args.checkpoint_every == 0 or step == args.total_steps:
            save_checkpoint(step)

    # --- Results ---
    if evaluations:
        returns = np.array([returns for _, returns in evaluations])
        scores = normalized_score(args.env, returns)
        steps = np.array([step for step, _ in evaluations])
        final = dict(steps=steps, returns=returns, normalized_scores=scores)
        edm.save_atomically(run_dir / "final_returns.npz", lambda f: np.savez(f, **final))
        plot_learning_curve(run_dir / "learning_curve.png", args.env, evaluations, "environment steps")
        best = returns.mean(1).argmax()
        for name, k in (("last", -1), ("best, in hindsight", best)):
            score = f"normalised score {scores[k].mean():.1f} ± {scores[k].std():.1f}, " if scored else ""
            print(
                f"{name}: {score}return {returns[k].mean():.0f} ± {returns[k].std():.0f} over {args.eval_episodes} "
                f"episodes, after {steps[k]} environment steps"
            )
    if args.save_dataset and dataset_exists(args.save_dataset):
        print(f"{args.save_dataset} exists, and is left as it is")
    elif args.save_dataset:
        oldest = args.total_steps % capacity  # where the next row would be written
        order = torch.arange(oldest, oldest + capacity) % capacity
        save_dataset(args.save_dataset, args.env, replay.cpu()[order], timeouts[order])
        print(f"replay buffer: {capacity} transitions in {args.save_dataset}")
    print(f"done in {time.time() - start_time:.0f} s: {run_dir}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (edm.RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")
