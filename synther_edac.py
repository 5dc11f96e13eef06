"""SynthER with EDAC (An et al., 2021): train an offline agent on transitions that a diffusion model generates.

Synthetic Experience Replay (Lu et al., NeurIPS 2023, https://arxiv.org/abs/2303.06614), Section 4.1. One command loads
a dataset, trains a diffusion model on it, generates as many transitions as you like, trains the agent on these alone,
evaluates it, and leaves everything in one run folder.

    python synther_edac.py

The command as it stands learns from 40,000 transitions of HalfCheetah-v4, the replay buffer of an agent whose return
had come to 2,350. It ends at a score of about 36; with --data real at about 33. Options make it another experiment:

    --env walker2d-medium-replay-v2                       # the paper's; wants a GPU
    --env walker2d-medium-replay-v2 --data real           # its baseline, without generated transitions
    --env walker2d-medium-replay-v2 --seed 1 --synthetic-path runs/.../synthetic.npz  # another seed, the same samples
    --env Walker2d-v4 --dataset-path my_transitions.npz   # your own data
    --resume runs/...                                     # continue a run that was stopped
"""

import contextlib
import copy
import hashlib
import json
import math
import re
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

import edm

try:
    import mujoco
except Exception as error:  # MUJOCO_GL asks for a renderer that is not here
    print(f"error: cannot import mujoco (is MUJOCO_GL wrong?): {error}", file=sys.stderr)
    sys.exit(2)

# --- Arguments --------------------------------------------------------------------------------------------------------


@dataclass
class Args(edm.DiffusionArgs):
    env: str = "quickstart"
    """a D4RL name, a Minari id or `quickstart`; with --dataset-path, the D4RL name or Gymnasium id to evaluate in"""
    dataset_path: Optional[str] = None  # a D4RL-layout HDF5 file or an .npz of transitions to learn from
    synthetic_path: Optional[str] = None
    """learn from the synthetic.npz of an earlier offline run (its first --num-samples rows) instead of generating"""
    seed: int = 0
    """seed of the agent, its batches and its evaluation; --diffusion-seed seeds subset, diffusion model and samples"""
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU if there is one
    out_dir: str = "runs"  # where the run folder {env}__{exp_name}__{seed}__{unix_time_in_ms} is made
    exp_name: str = "synther_edac"  # name of the experiment, part of the run folder's name
    resume: Optional[str] = None  # run folder to continue, with the arguments saved there
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project: str = "synther"  # project to log to with --track
    wandb_entity: Optional[str] = None  # team or user to log to with --track

    data: Literal["synther", "real", "mixed"] = "synther"
    """what the agent learns from: generated transitions (Table 2), real ones, or equal numbers of both (Table 12)"""
    subsample: Optional[float] = None
    """keep this fraction (up to 1) or number of the real transitions (Figures 1a and 4)"""
    true_next_obs: bool = False
    """take s' of terminal rows from the file's next_observations, not from the next row as D4RL does"""

    updates: Optional[int] = None  # gradient updates (paper: 3,000,000; quickstart: 30,000)
    batch_size: int = 256  # transitions per update (paper: 256)
    hidden_dim: Optional[int] = None  # units per hidden layer (paper: 256; quickstart: 128)
    hidden_layers: int = 3  # hidden layers (paper: 3)
    learning_rate: Optional[float] = None  # Adam's learning rate (paper: 3e-4; quickstart: 1e-3)
    discount: float = 0.99  # discount factor gamma (paper: 0.99)
    tau: float = 0.005  # rate of the target networks' moving average (paper: 0.005)
    num_critics: Optional[int] = None  # critics in the ensemble (paper: 10; hopper 50)
    eta: Optional[float] = None
    """weight of the diversity term (paper: 1; halfcheetah- and walker2d-medium-expert 5; maze2d 0.1)"""
    eval_every: int = 5_000  # updates between evaluations (paper: 5,000)
    eval_episodes: int = 10
    """episodes per evaluation (paper: 10; mazes 100); 0: none, and --env is any name, the sizes and bound the data's"""
    checkpoint_every: int = 5_000  # diffusion training steps, or updates of the agent, between checkpoints


# By dataset: an argument that is None takes its value from the first entry that matches (re.match) and has one.
DEFAULTS = {
    "quickstart": dict(diffusion_steps=20_000, num_samples=200_000, updates=30_000)
    | dict(hidden_dim=128, learning_rate=1e-3),
    "hopper": dict(num_critics=50),
    "halfcheetah-medium-expert|walker2d-medium-expert": dict(eta=5.0),
    "maze2d": dict(eta=0.1),
    "": dict(diffusion_steps=100_000, num_samples=5_000_000, updates=3_000_000)
    | dict(hidden_dim=256, learning_rate=3e-4, num_critics=10, eta=1.0),
}

# --- EDAC -------------------------------------------------------------------------------------------------------------


# Differs from synther_td3bc.Actor: a random policy
class Actor(nn.Module):
    """Random policy: observations [batch, obs_dim] -> a Gaussian, squashed by a tanh to +-max_action."""

    def __init__(self, obs_dim, act_dim, hidden_dim, hidden_layers, max_action):
        super().__init__()
        sizes = [obs_dim] + [hidden_dim] * hidden_layers
        hidden = [layer for pair in zip(sizes, sizes[1:]) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.net = nn.Sequential(*hidden)
        self.mean, self.log_std = nn.Linear(sizes[-1], act_dim), nn.Linear(sizes[-1], act_dim)
        self.max_action = max_action

    def forward(self, observations):
        return self.max_action * self.mean(self.net(observations)).tanh()

    def sample(self, observations):
        """Random actions [batch, act_dim], and the log-densities [batch] of these in units of max_action."""
        h = self.net(observations)
        log_std = self.log_std(h).clamp(-5, 2)
        noise = torch.randn_like(log_std)
        actions = (self.mean(h) + log_std.exp() * noise).tanh()
        log_density = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        return self.max_action * actions, (log_density - (1 - actions.square() + 1e-6).log()).sum(1)


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
def edac_init(actor, critic):
    """CORL's initial weights. Those of the critics' hidden layers reach to 1 / sqrt(outputs), not inputs."""
    for bias in (*(layer.bias for layer in actor.net[::2]), *critic.biases[:-1]):
        bias.fill_(0.1)
    for parameter in (*actor.mean.parameters(), *actor.log_std.parameters()):
        parameter.uniform_(-1e-3, 1e-3)
    for weight in critic.weights[:-1]:
        bound = 1 / math.sqrt(weight.shape[2])
        weight.uniform_(-bound, bound)
    for parameter in (critic.weights[-1], critic.biases[-1]):
        parameter.uniform_(-3e-3, 3e-3)


def q_and_gradient(critic, x):
    """Q-values [num_critics, batch] at x [batch, dim], and their gradients by x, [num_critics, batch, dim].

    With its ReLUs held as they are, Q is linear in x and in each bias. So with v = dQ/d(output of a layer's bias),
    Q = x . dQ/dx + sum of bias . v over the layers. One sweep back through the layers gives all of it. Both results can
    be differentiated by the weights. Gradients of autograd's gradients would make an update 1.25 times as long.
    """
    h, masks = x.expand(len(critic.weights[0]), *x.shape), []
    with torch.no_grad():
        for weight, bias in zip(critic.weights[:-1], critic.biases):
            h = torch.baddbmm(bias, h, weight).relu()
            masks.append(h.sign())
    v, q = torch.ones_like(h[..., :1]), critic.biases[-1]
    for weight, mask, bias in reversed(list(zip(critic.weights[1:], masks, critic.biases))):
        v = torch.bmm(v, weight.mT) * mask
        q = q + torch.bmm(v, bias.mT)
    gradient = torch.bmm(v, critic.weights[0].mT)
    return q[..., 0] + (gradient * x).sum(2), gradient


class EDAC(nn.Module):
    """EDAC (An et al. 2021). A batch holds rows [s, a, r, s', d] of `edm.pack`."""

    LOSSES = ("critic_loss", "diversity_loss", "actor_loss", "alpha")

    def __init__(self, obs_dim, act_dim, max_action, args):
        super().__init__()
        self.sizes = [obs_dim, act_dim, 1, obs_dim, 1]
        self.args = args
        self.actor = Actor(obs_dim, act_dim, args.hidden_dim, args.hidden_layers, max_action)
        self.critic = EnsembleCritic(obs_dim + act_dim, args.hidden_dim, args.hidden_layers, args.num_critics)
        edac_init(self.actor, self.critic)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(1))
        self.to(args.device)
        self.actor_params, self.critic_params = list(self.actor.parameters()), list(self.critic.parameters())
        self.target_params = list(self.critic_target.parameters())
        adam = dict(lr=args.learning_rate, fused=True, capturable=args.device == "cuda")  # capturable: in CUDA graphs
        groups = dict(actor=self.actor_params, critic=self.critic_params, alpha=[self.log_alpha])
        self.optimizers = {name: torch.optim.Adam(params, **adam) for name, params in groups.items()}

    def update(self, batch):
        """One step of temperature, actor, critics and targets, in this order, on rows [batch, dim]. Returns LOSSES."""
        args = self.args
        observations, actions, rewards, next_observations, terminals = batch.split(self.sizes, dim=1)
        with torch.no_grad():
            log_density = self.actor.sample(observations)[1]
        self.log_alpha.grad = -(log_density - actions.shape[1]).mean(0, keepdim=True)  # target entropy: -act_dim
        self.optimizers["alpha"].step()
        alpha = self.log_alpha.detach().exp()

        policy_actions, log_density = self.actor.sample(observations)
        q = self.critic(torch.cat([observations, policy_actions], dim=1)).amin(0)
        actor_loss = (alpha * log_density - q).mean()
        self.optimizers["actor"].zero_grad()
        actor_loss.backward(inputs=self.actor_params)  # no gradient for the critics
        self.optimizers["actor"].step()

        with torch.no_grad():
            next_actions, next_log_density = self.actor.sample(next_observations)
            next_q = self.critic_target(torch.cat([next_observations, next_actions], dim=1)).amin(0)
            target = rewards[:, 0] + args.discount * (1 - terminals[:, 0]) * (next_q - alpha * next_log_density)
        q, gradient = q_and_gradient(self.critic, torch.cat([observations, actions], dim=1))
        critic_loss = (q - target).square().mean(1).sum()
        e = gradient[..., -actions.shape[1] :]  # dQ/da
        e = e / (e.norm(dim=2, keepdim=True) + 1e-10)
        pairs = e.sum(0).square().sum(1) - e.square().sum((0, 2))  # sum_{i != j} e_i . e_j (An et al., Equation 4)
        diversity_loss = pairs.mean() / (len(q) - 1)
        self.optimizers["critic"].zero_grad()
        (critic_loss + args.eta * diversity_loss).backward()
        self.optimizers["critic"].step()
        with torch.no_grad():
            torch._foreach_lerp_(self.target_params, self.critic_params, args.tau)
        return torch.stack([critic_loss, diversity_loss, actor_loss, alpha[0]]).detach()


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


# Copied from synther_td3bc.MAZES
MAZES = {  # walls of D4RL's mazes; a position (i, j) is row i, column j
    "umaze": "##### #...# ###.# #...# #####",
    "medium": "######## #..##..# #..#...# ##...### #..#...# #.#..#.# #...#..# ########",
    "large": "############ #....#.....# #.##.#.#.#.# #......#...# #.####.###.# "
    "#..#.#.....# ##.#.#.#.### #..#...#...# ############",
}


# Copied from synther_td3bc.maze_cells
def maze_cells(maze, kind):
    """The (row, column) of each wall ("#") or free cell (".") of a maze."""
    return [(i, j) for i, row in enumerate(MAZES[maze].split()) for j, cell in enumerate(row) if cell == kind]


# Copied from synther_td3bc.Maze2d
class Maze2d(gym.Env):
    """D4RL's maze2d: a ball that is pushed through a maze and seeks one place, the same in every episode.

    Observation [x, y, vx, vy] (x grows with the row; the middle of cell (i, j) is at (i - 0.2, j - 0.2)). Action: the
    force in [-1, 1]^2. Reward 1 for each step that ends within 0.5 of the goal. Only the time limit ends an episode."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, maze, goal):
        spec = mujoco.MjSpec.from_string("""
            <mujoco>
              <compiler inertiafromgeom="true"/> <option timestep="0.01" gravity="0 0 0" iterations="20"/>
              <default>
                <joint type="slide" damping="1"/> <motor ctrlrange="-1 1" ctrllimited="true" gear="100"/>
                <geom friction=".5 .1 .1" density="1000" margin=".002" condim="1" contype="2" conaffinity="1"/>
              </default>
              <worldbody>
                <body pos="1.2 1.2 0">
                  <geom type="sphere" size=".1" contype="1"/>
                  <joint name="x" axis="1 0 0"/> <joint name="y" axis="0 1 0"/>
                </body>
              </worldbody>
              <actuator> <motor joint="x"/> <motor joint="y"/> </actuator>
            </mujoco>""")
        for i, j in maze_cells(maze, "#"):
            spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=[0.5, 0.5, 0.2], pos=[i + 1, j + 1, 0])
        self.model = spec.compile()
        self.physics = mujoco.MjData(self.model)
        self.cells, self.goal = maze_cells(maze, "."), np.array(goal)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.physics)
        cell = self.cells[self.np_random.integers(len(self.cells))]
        self.physics.qpos[:] = cell + self.np_random.uniform(-0.1, 0.1, 2)  # 0.2 off the middle, as in D4RL
        self.physics.qvel[:] = 0.1 * self.np_random.standard_normal(2)
        return np.concatenate([self.physics.qpos, self.physics.qvel]), {}

    def step(self, action):
        self.physics.qvel[:] = np.clip(self.physics.qvel, -5, 5)
        self.physics.ctrl[:] = np.clip(action, -1, 1)
        mujoco.mj_step(self.model, self.physics)
        reward = float(np.linalg.norm(self.physics.qpos - self.goal) <= 0.5)
        return np.concatenate([self.physics.qpos, self.physics.qvel]), reward, False, False, {}


for _id, _class, _maze, _goal, _steps in (  # goal: a cell; steps: the time limit of an episode
    ("maze2d-umaze-v1", Maze2d, "umaze", (1, 1), 300),
    ("maze2d-medium-v1", Maze2d, "medium", (6, 6), 600),
    ("maze2d-large-v1", Maze2d, "large", (7, 9), 800),
):
    gym.register(_id, _class, max_episode_steps=_steps, kwargs=dict(maze=_maze, goal=_goal))


# Copied from synther_td3bc.make_env
def make_env(name):
    """The environment of a dataset or a Gymnasium id. RunError for an unknown one, or spaces that are not supported."""
    if tuple(map(int, mujoco.__version__.split(".")[:2])) >= (3, 5):
        warnings.warn("mujoco 3.5 and later add up contact margins, so the dynamics are not D4RL's: install 3.4.0")
    ids = dict(halfcheetah="HalfCheetah-v4", hopper="Hopper-v4", walker2d="Walker2d-v4", quickstart="HalfCheetah-v4")
    try:
        if "/" in name:
            import minari

            env = minari.load_dataset(name, download=True).recover_environment(eval_env=True)
        else:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # about v4
                env = gym.make(ids.get(name.split("-")[0], name), disable_env_checker=True)
        if env.spec.max_episode_steps is None:
            warnings.warn(f"{name} has no time limit: its episodes end after 1,000 steps")
            env = gym.wrappers.TimeLimit(env, 1_000)
        env.reset(seed=0), env.step(env.action_space.sample())  # what cannot work fails here
    except Exception as error:  # an environment can fail in any way
        where = " (synther_td3bc.py has umaze, medium-play and large-play)" if name.startswith("antmaze") else ""
        raise edm.RunError(f"cannot make the environment {name}: {' '.join(str(error).split())}{where}") from None
    s, a = env.observation_space, env.action_space
    is_flat = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (s, a))
    if not (is_flat and a.dtype.kind == "f" and len({*-a.low, *a.high}) == 1 and 0 < a.high[0] < 1e9):
        raise edm.RunError(f"{name} has {s} and {a}; only flat Box spaces with one bound, +-x, for all float actions")
    return env


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


def main(args):
    # --- Arguments, environments, real transitions ---
    start_time = time.time()
    for values in [values for pattern, values in DEFAULTS.items() if re.match(pattern, args.env)]:
        edm.fill(args, values)
    edm.check_args(args)
    edm.join_processes(args.device)  # under torchrun all but the first stay here
    if args.num_critics < 2:
        raise edm.RunError("--num-critics must be at least 2")
    if args.env.endswith((".hdf5", ".h5", ".npz")) or (args.env == "quickstart" and args.dataset_path):
        raise edm.RunError("--dataset-path names a file, --env the environment to evaluate in, such as Walker2d-v4")
    if args.data == "real" and args.synthetic_path:
        raise edm.RunError("--synthetic-path has no use with --data real")
    envs = [make_env(args.env) for _ in range(args.eval_episodes)]  # without any, sizes and bound are the data's
    env_id, horizon = (envs[0].spec.id, envs[0].spec.max_episode_steps) if envs else (args.env, 1_000)
    sizes = envs[0].observation_space.shape + envs[0].action_space.shape if envs else None
    data = edm.load_transitions(args.dataset_path or args.env, args.true_next_obs, horizon, sizes)
    obs_dim, act_dim = data["observations"].shape[1], data["actions"].shape[1]
    max_action = float(envs[0].action_space.high[0] if envs else np.abs(data["actions"]).max())
    if np.abs(data["actions"]).max() > max_action:
        print(f"the data have actions beyond +-{max_action}, the bound of {env_id}", file=sys.stderr)
    real, data = edm.pack(**data), None  # gives memory back
    starts = edm.episode_starts(real, obs_dim)
    if args.subsample:
        count = round(args.subsample * len(real) if args.subsample <= 1 else args.subsample)
        if not 2 <= count <= len(real):
            raise edm.RunError(f"--subsample {args.subsample} asks for {count} transitions, not 2 to {len(real)}")
        chosen = np.random.default_rng(args.diffusion_seed).choice(len(real), count, replace=False)
        real, starts = real[chosen], starts[chosen]
    if args.data == "mixed":
        args.num_samples = len(real)  # whatever was asked for
    edm.resolve(args, len(real), args.env)
    run_name = re.sub(r"[^\w.-]", "-", f"{args.env}__{args.exp_name}__{args.seed}__{1000 * start_time:.0f}")
    run_dir = Path(args.resume or Path(args.out_dir) / run_name)
    synthetic_path = Path(args.synthetic_path or run_dir / "synthetic.npz")
    rows = real if args.data == "real" else None
    if rows is None and (args.synthetic_path or synthetic_path.exists()):
        rows = edm.pack(**edm.load_transitions(synthetic_path, sizes=(obs_dim, act_dim)))[: args.num_samples]
        if args.data == "mixed" and len(rows) < len(real):
            raise edm.RunError(f"--data mixed needs {len(real)} generated rows, and {synthetic_path} has {len(rows)}")

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
    data_hash = hashlib.sha256(real.numpy()).hexdigest()
    saved = edm.load_file(checkpoint, args.device) if checkpoint.exists() else dict(stage="", log_size=0, seconds=0)
    if saved.get("data", data_hash) != data_hash:
        raise edm.RunError(f"{checkpoint} is of other data than {args.dataset_path or args.env} has: start a new run")
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

    # --- SynthER: train a diffusion model on the real transitions and generate new ones ---
    if rows is None:
        saving = dict(saved=saved, save=save, save_every=args.checkpoint_every)
        model = edm.train_edm(real, args, starts=starts, raw_columns=[-1], device=args.device, log=log, **saving)
        edm.save_edm(run_dir / "diffusion.pt", model)
        sampling_time = time.time()
        rows = edm.generate_transitions(model, real, args)
        log(args.diffusion_steps, {"perf/samples_per_sec": len(rows) / (time.time() - sampling_time)})
        edm.plot_marginals(run_dir / "marginals.png", real, rows, obs_dim, act_dim)
        edm.save_atomically(synthetic_path, lambda f: np.savez(f, **edm.unpack(rows, obs_dim, act_dim)))
    if args.data != "real" and saved["stage"] != "agent":
        report = edm.quality_report(real, rows)
        print("sample quality:", report, "" if report["marginal"] > 0.8 else "\nthe samples are not like the data")
        log(args.diffusion_steps, {f"diffusion/{key}": value for key, value in report.items()})

    # --- Rows for the agent, states normalised by the real data's statistics ---
    if args.data == "mixed":
        rows = torch.cat([real, rows])
    print(f"the agent learns from {len(rows):,} transitions ({args.data}); the dataset has {len(real):,}")
    obs_mean, obs_std = torch.zeros(obs_dim), torch.ones(obs_dim)  # EDAC takes the states as they are
    for states in (rows[:, :obs_dim], rows[:, -1 - obs_dim : -1]):  # in place: with --data real, in `real` too
        states.sub_(obs_mean).div_(obs_std)
    rows = rows.to(args.device)

    # --- Train and evaluate the agent ---
    torch.manual_seed(args.seed)
    agent = EDAC(obs_dim, act_dim, max_action, args)
    batch = torch.empty(args.batch_size, rows.shape[1], device=args.device)  # at a fixed place, for CUDA graphs
    losses, evaluations, start = torch.zeros(len(agent.LOSSES), device=args.device), [], 0
    if saved["stage"] == "agent":
        agent.load_state_dict(saved["agent"])
        for name, optimizer in agent.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        losses.copy_(saved["losses"])
        evaluations, start = saved["evaluations"], saved["update"] + 1
        edm.generator(args.device).set_state(saved["rng"].cpu())

    def train_step():
        batch.copy_(rows[torch.randint(len(rows), (args.batch_size,), device=args.device)])
        losses.add_(agent.update(batch))

    if args.device == "cuda":
        train_step = edm.cuda_graph(train_step)

    bar = edm.Bar(range(start, args.updates + 1), type(agent).__name__, initial=start, total=args.updates + 1)
    clock = time.time()
    for update in bar:
        if update > 0:  # before the first, only an evaluation
            train_step()
        if update > 0 and (update % 1_000 == 0 or update == args.updates):
            count = update % 1_000 or 1_000
            means = (losses / count).tolist()  # the only wait in training
            if not math.isfinite(sum(means)):
                raise edm.RunError(f"a loss of the agent is no longer finite, in updates {update - count} to {update}")
            values = {f"train/{name}": mean for name, mean in zip(agent.LOSSES, means)}
            log(update, values | {"perf/updates_per_sec": count / (time.time() - clock)})
            losses.zero_()
            clock = time.time()
        if args.eval_episodes and (update % args.eval_every == 0 or update == args.updates):
            pause = time.time()
            actor = copy.deepcopy(agent.actor).cpu()  # a few rows at a time are faster there
            returns = evaluate(lambda obs: actor((obs - obs_mean) / obs_std), envs, args.seed)
            evaluations.append((update, returns.tolist()))
            values = {"eval/return_mean": returns.mean(), "eval/return_std": returns.std()}
            values["eval/normalized_score"] = normalized_score(env_id, returns.mean())
            log(update, values | {"perf/seconds": time.time() - start_time})
            bar.set_postfix({key.removeprefix("eval/"): f"{value:.1f}" for key, value in values.items()}, refresh=False)
            clock += time.time() - pause  # the rate is the training's
        if update > 0 and (update % args.checkpoint_every == 0 or update == args.updates or bar.stop):
            optimizers = {name: optimizer.state_dict() for name, optimizer in agent.optimizers.items()}
            state = dict(stage="agent", update=update, agent=agent.state_dict(), optimizers=optimizers, losses=losses)
            state |= dict(evaluations=evaluations, obs_mean=obs_mean, obs_std=obs_std)  # the last two for users
            save(state | dict(rng=edm.generator(args.device).get_state()))

    # --- Results ---
    if evaluations:
        updates, returns = (np.array(x) for x in zip(*evaluations))
        scores = normalized_score(env_id, returns)
        arrays = dict(updates=updates, returns=returns, normalized_scores=scores)
        arrays |= dict(final_returns=returns[-1], final_scores=scores[-1])  # by unifloral's names
        edm.save_atomically(run_dir / "final_returns.npz", lambda f: np.savez(f, **arrays))
        values, label = (returns, "return") if np.isnan(scores).any() else (scores, "normalised score")
        mean, std = values.mean(1), values.std(1)  # over the episodes of each evaluation
        ax = Figure(figsize=(6, 4), layout="constrained").subplots()
        ax.fill_between(updates, mean - std, mean + std, alpha=0.25, linewidth=0)
        ax.plot(updates, mean)
        ax.set(xlabel="updates", ylabel=label, title=run_dir.name)
        edm.save_atomically(run_dir / "learning_curve.png", lambda f: ax.figure.savefig(f, format="png", dpi=120))
        text = "" if np.isnan(scores).any() else f"normalised score {scores[-1].mean():.1f} +- {scores[-1].std():.1f}, "
        print(f"{text}return {returns[-1].mean():.0f} +- {returns[-1].std():.0f}")
    print(f"done in {time.time() - start_time:.0f} s: {run_dir}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (edm.RunError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(2)
