"""Tests of synther_vd4rl.py: loader, images, agent, latents, whole runs, runs that were stopped."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_state, command, copy_before_writes, plain, read_metrics, run

import edm
import synther_vd4rl
from synther_vd4rl import (
    Agent,
    Args,
    extract_latents,
    find_files,
    load_dataset,
    random_shift,
    stacked,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests/paper"))
import vd4rl_data  # noqa: E402

# --- Data -------------------------------------------------------------------------------------------------------------


def make_files(folder, lengths, level="expert", per_file=1):
    """Episodes of noise in V-D4RL's layout. All numbers differ. Returns the arrays, one after the other."""
    rng, n = np.random.default_rng(0), sum(lengths)
    data = {
        "observation": rng.integers(0, 256, (n, 3, 84, 84), dtype=np.uint8),
        "action": rng.uniform(-1, 1, (n, 6)).astype(np.float32),
        "reward": rng.standard_normal(n).astype(np.float32),
        "discount": rng.uniform(0.5, 1, n).astype(np.float32),
        "step_type": np.ones(n, np.int64),
    }
    ends = np.cumsum(lengths)
    data["step_type"][ends - lengths], data["step_type"][ends - 1] = 0, 2
    folder = Path(folder) / "main/walker_walk" / level / "84px"
    folder.mkdir(parents=True)
    for i, group in enumerate(
        np.split(np.arange(len(lengths)), range(per_file, len(lengths), per_file))
    ):
        with h5py.File(folder / f"part_{i:02}.hdf5", "w") as f:
            for key, x in data.items():
                f[key] = x[ends[group[0]] - lengths[group[0]] : ends[group[-1]]]
    return data


def filled(folder="", **options):
    """Arguments as main fills them."""
    args = Args(
        **dict(dataset_path=str(folder), device="cpu", hidden_dim=16, learning_rate=1e-3) | options
    )
    return edm.fill(args, dict(nstep=3 if args.algo == "drqbc" else 1)) or args


def load(args):
    return load_dataset(find_files(args), args)


@pytest.mark.parametrize("nstep", [1, 3])
@pytest.mark.parametrize("per_file", [1, 3])
def test_transitions_of_hand_made_files(tmp_path, nstep, per_file):
    """Every n-step window within an episode, and no other, against a loop over episodes."""
    lengths = np.array([6, 2, 9])
    raw = make_files(tmp_path, lengths, per_file=per_file)
    data = load(filled(tmp_path, nstep=nstep))
    assert torch.equal(data["frames"], torch.from_numpy(raw["observation"]))
    expected, first = [], 0
    for length in lengths:
        for i in range(first + 1, first + length - nstep + 1):
            rewards = sum(0.99**k * float(raw["reward"][i + k]) for k in range(nstep))
            discount = 0.99**nstep * float(raw["discount"][i + nstep - 1])
            before = [max(i - k, first) for k in (3, 2, 1)]
            after = [max(i + nstep - k, first) for k in (3, 2, 1)]
            expected.append((i, first, rewards, discount, before, after))
        first += length
    row, start = data["row"], data["start"]
    assert len(row) == len(expected) == sum(max(length - nstep, 0) for length in lengths)
    images, next_images = (
        stacked(data["frames"], row - 1, start),
        stacked(data["frames"], row + nstep - 1, start),
    )
    for k, (i, first, rewards, discount, before, after) in enumerate(expected):
        assert (row[k], start[k]) == (i, first)
        assert data["reward"][k].item() == pytest.approx(rewards, rel=1e-5)
        assert data["discount"][k].item() == pytest.approx(discount, rel=1e-5)
        np.testing.assert_array_equal(data["action"][k], raw["action"][i])
        np.testing.assert_array_equal(images[k], raw["observation"][before].reshape(9, 84, 84))
        np.testing.assert_array_equal(next_images[k], raw["observation"][after].reshape(9, 84, 84))


def test_files_of_64_pixels(tmp_path):
    """V-D4RL's other form, one episode per .npz: enlarged, channels first, a constant stays what it is."""
    folder = tmp_path / "main/cheetah_run/medium_replay/64px"
    folder.mkdir(parents=True)
    image = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    image[0] = [10, 20, 255]
    others = dict(action=np.ones((5, 6), np.float32), reward=np.arange(5.0), discount=np.ones(5))
    np.savez(folder / "a.npz", image=image, is_first=np.arange(5) == 0, **others)
    data = load(filled(tmp_path, env="cheetah-run-mixed", nstep=1))
    assert data["frames"].shape == (5, 3, 84, 84) and data["frames"].dtype == torch.uint8
    assert data["frames"][0].float().mean((1, 2)).tolist() == [10, 20, 255]
    small = F.interpolate(data["frames"][1:].float(), (64, 64), mode="bicubic", antialias=True)
    reference = torch.from_numpy(image[1:]).permute(0, 3, 1, 2).float()
    assert np.corrcoef(small.flatten(), reference.flatten())[0, 1] > 0.9
    assert data["reward"].tolist() == [1, 2, 3, 4]


def test_loading_stops_after_the_file_that_suffices(tmp_path):
    make_files(tmp_path, np.array([4, 4, 4, 4]), per_file=2)
    for limit, num_frames in ((1, 8), (8, 8), (9, 16), (100, 16)):
        assert len(load(filled(tmp_path, max_frames=limit, nstep=1))["frames"]) == num_frames


def replace(key, value):
    """A change of a file: an array, or what a function makes of it, in place of the old."""

    def change(path):
        with h5py.File(path, "a") as f:
            x = f[key][:]
            del f[key]
            f[key] = value(x) if callable(value) else value

    return change


BAD_FILES = {
    "cannot read .*part_00.hdf5: .*truncated": lambda path: os.truncate(path, 2_000),
    "cannot read .*part_00.hdf5: .*discount": lambda path: h5py.File(path, "a").pop("discount"),
    "cannot read .*part_00.hdf5": replace("observation", np.zeros((5, 3, 64, 64), np.uint8)),
    "cannot read .*part_00.hdf5: ": replace("step_type", lambda x: x[:-1]),
    "cannot read .*part_00.hdf5: cannot reshape": replace("action", np.zeros((6, 6))),
    "cannot read .*part_01.hdf5: the lengths or the shapes": replace("action", np.zeros((5, 3))),
    "an action, reward or discount of walker-walk-expert is NaN": replace(
        "reward", np.full(5, math.nan)
    ),
    "cannot read .*part_00.hdf5: its images are float64": replace("observation", lambda x: x / 255),
    "part_00.hdf5 does not begin with the first row": replace("step_type", np.ones(5, np.int64)),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_files(tmp_path, message):
    make_files(tmp_path, np.array([5, 5]))
    BAD_FILES[message](tmp_path / "main/walker_walk/expert/84px/part_00.hdf5")
    with pytest.raises(edm.RunError, match=message) as error:
        load(filled(tmp_path))
    assert "\n" not in str(error.value)


def test_dataset_is_downloaded_by_default(tmp_path, monkeypatch):
    make_files(tmp_path / "snapshot/vd4rl", np.array([8]))
    asked = []

    def snapshot_download(repo, **options):
        asked.append((repo, *options.values()))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (file,) = synther_vd4rl.find_files(args := Args())
    assert asked == [("conglu/vd4rl", "dataset", "vd4rl/main/walker_walk/expert/84px/*")]
    assert (
        file.is_file() and synther_vd4rl.find_files(args) == [file] and len(asked) == 1
    )  # the path is kept
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(
        edm.RunError, match="cannot download V-D4RL .see vd4rl_data.py.: division by zero"
    ):
        synther_vd4rl.find_files(Args())


def test_random_shift_keeps_a_stack_together():
    """Each stack moves as one, by up to 4 pixels each way. What comes in repeats the border."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (200, 1, 84, 84), dtype=torch.uint8).repeat(1, 9, 1, 1)
    shifted, seen = random_shift(images), set()
    assert shifted.dtype == torch.uint8 and (shifted == shifted[:, :1]).all()
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="replicate").byte()
    for before, after in zip(padded[:, 0], shifted[:, 0]):
        (match,) = [
            (y, x) for y in range(9) for x in range(9) if torch.equal(before[y : y + 84, x : x + 84], after)
        ]  # fmt: skip
        seen.add(match)
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(9)) and len(seen) > 60


# --- Environment ------------------------------------------------------------------------------------------------------

# Runs in a process of its own, because MuJoCo loads its renderer once, and the tests' own loads none.
RENDERED = """
import sys
import numpy as np, torch
import synther_vd4rl
try:
    env = synther_vd4rl.make_env("walker-walk")
except synther_vd4rl.edm.RunError:
    sys.exit(77)
from dm_control import suite
env.env._step_limit = 60
first, actions = env.reset(3), np.random.RandomState(0).uniform(-1, 1, (30, 6))
steps = [env.step(action) for action in actions]
positions = env.env.physics.data.qpos.copy()
again = env.reset(3)
plain = suite.load("walker", "walk", task_kwargs={"random": 3})
plain.reset()
rewards = [sum(plain.step(action).reward for _ in range(2)) for action in actions]
shown = plain.physics.render(84, 84, camera_id=0)
policy = lambda images: torch.tanh(images.float().mean() / 100 + torch.arange(6)[None] / 6)
evaluations = [synther_vd4rl.evaluate(policy, env, 2, 7) for _ in range(2)]
np.savez(
    sys.argv[1], first=first, again=again, images=np.stack([s[0] for s in steps]), reward=[s[1] for s in steps],
    ended=[s[2] for s in steps], positions=positions, plain_rewards=rewards, plain_positions=plain.physics.data.qpos,
    shown=shown, returns=[e[0] for e in evaluations], film=evaluations[0][1],
)
"""


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    path = tmp_path_factory.mktemp("rendered") / "out.npz"
    environ = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"} | {
        "PYTHONPATH": str(ROOT)
    }
    result = subprocess.run(
        [sys.executable, "-c", RENDERED, path], env=environ, capture_output=True, text=True
    )
    if result.returncode == 77:
        pytest.skip("this machine has neither EGL nor OSMesa")
    assert result.returncode == 0, result.stderr
    return dict(np.load(path))


def test_actions_act_twice(rendered):
    """Against dm_control itself, from the same seed: rewards of two steps are added, and the same state is reached."""
    assert len(set(rendered["reward"].round(6))) > 20
    np.testing.assert_allclose(rendered["reward"], rendered["plain_rewards"])
    np.testing.assert_array_equal(rendered["positions"], rendered["plain_positions"])
    assert not rendered["ended"][:-1].any() and rendered["ended"][-1]


def test_three_images_are_seen(rendered):
    first, images = rendered["first"], rendered["images"]
    assert (
        first.shape == (9, 84, 84) and first.dtype == images.dtype == np.uint8 and first.std() > 10
    )
    np.testing.assert_array_equal(first, rendered["again"])
    newest = np.stack(
        [first[:3], first[:3], first[:3], *images[:, -3:]]
    )  # the first image stands for those before it
    assert len({image.tobytes() for image in newest}) > 25
    for t, seen in enumerate(images, start=1):
        np.testing.assert_array_equal(seen, np.concatenate(newest[t : t + 3]))
    np.testing.assert_array_equal(newest[-1], rendered["shown"].transpose(2, 0, 1))


def test_evaluation_repeats_itself(rendered):
    """An evaluation begins with its own seeds, whatever was played before. Its film is the first episode's."""
    returns = rendered["returns"]
    np.testing.assert_array_equal(returns[0], returns[1])
    assert (
        returns.shape == (2, 2)
        and returns[0, 0] != returns[0, 1]
        and (0 < returns).all()
        and (returns < 60).all()
    )
    assert rendered["film"].shape == (30, 3, 84, 84)


def test_no_renderer(monkeypatch):
    """Where neither way of rendering works, the message names the packages, and nothing is set."""
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(sys, "platform", "linux")
    tried, working = [], []

    def run(*args, env, **options):
        tried.append(env["MUJOCO_GL"])
        return subprocess.CompletedProcess(args, env["MUJOCO_GL"] not in working)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(synther_vd4rl, "PixelEnv", lambda task: {}["no OpenGL"])
    synther_vd4rl.choose_renderer.cache_clear()
    for _ in range(2):  # the second time it is known
        with pytest.raises(edm.RunError, match="libegl1.*libosmesa6.*--eval-episodes 0"):
            synther_vd4rl.make_env("walker-walk")
    assert "MUJOCO_GL" not in os.environ and tried == ["egl", "osmesa"]
    working.append("osmesa")
    synther_vd4rl.choose_renderer.cache_clear()
    synther_vd4rl.choose_renderer()
    assert os.environ["MUJOCO_GL"] == "osmesa"


# --- Agent ------------------------------------------------------------------------------------------------------------


def batch_for(agent, n=8):
    """The arguments of Agent.update: images of bytes in stage 1, latents in stage 2."""
    if isinstance(agent.actor_trunk, synther_vd4rl.Columns):
        width = 50 if agent.args.latent != "both" or agent.args.algo == "bc" else 100
        x, next_x = torch.rand(2, n, width) * 2 - 1
    else:
        x, next_x = torch.randint(0, 256, (2, n, 9, 84, 84), dtype=torch.uint8)
    return x, torch.rand(n, 6) * 1.8 - 0.9, torch.randn(n), torch.full((n,), 0.97), next_x


def test_network_sizes():
    agent = Agent(6, Args(device="cpu"), "stage1")
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    assert count(agent.encoder) == 32 * (9 * 9 + 1) + 3 * 32 * (32 * 9 + 1)
    assert count(agent.actor_trunk) == count(agent.critic_trunk) == 39_200 * 50 + 50 + 100
    assert count(agent.policy) == 50 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 6 + 6
    assert count(agent.critic) == 2 * (56 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 + 1)
    assert agent.encoder(torch.zeros(1, 9, 84, 84, dtype=torch.uint8)).shape == (1, 39_200)
    for weight in (agent.critic.weights[1][0], agent.policy[2].weight):
        torch.testing.assert_close(
            weight @ weight.T, torch.eye(1024), atol=1e-4, rtol=0
        )  # orthogonal


@pytest.mark.parametrize(
    "stage, latent", [("stage1", "both"), ("stage2", "both"), ("stage2", "critic")]
)
@pytest.mark.parametrize("algo", ["drqbc", "bc"])
def test_update_equals_a_plain_implementation(float64, stage, latent, algo):
    """Three updates in V-D4RL's order: critic with encoder, actor on the old features, targets.

    Latents are [pi(h), Q(h)], or one of both that feeds both heads.
    """
    torch.manual_seed(0)
    agent = Agent(6, filled(algo=algo, latent=latent), stage)
    encoder, actor_trunk, critic_trunk = copy.deepcopy(
        (agent.encoder, agent.actor_trunk, agent.critic_trunk)
    )
    policy, critics = copy.deepcopy(agent.policy), plain(agent.critic)
    trunk_target, targets = copy.deepcopy((critic_trunk, critics))
    if stage == "stage2":
        actor_trunk, critic_trunk = lambda z: z[:, :50], lambda z: z[:, z.shape[1] - 50 :]
        trunk_target = critic_trunk
    actor_params = [*agent.actor_trunk.parameters(), *policy.parameters()]
    if stage == "stage1":
        actor_params = [*actor_trunk.parameters(), *policy.parameters()]
    critic_params = [
        *critics.parameters(),
        *(critic_trunk.parameters() if stage == "stage1" else []),
    ]
    (actor_params if algo == "bc" else critic_params).extend(encoder.parameters())
    actor_optimizer, critic_optimizer = (
        torch.optim.Adam(params, 1e-3) for params in (actor_params, critic_params)
    )
    x, a, r, discount, next_x = batch_for(agent)

    def sample(mean, noise):
        raw = mean + torch.clamp(noise * torch.randn_like(mean), -0.3, 0.3)
        return raw - raw.detach() + torch.clamp(raw.detach(), -1 + 1e-6, 1 - 1e-6)

    for i in range(3):
        noise = torch.tensor(1.0 - 0.4 * i)
        torch.manual_seed(i)
        losses = agent.update(x, a, r, discount, next_x, noise)
        torch.manual_seed(i)
        h, critic_loss = encoder(x), torch.zeros(())
        if algo == "drqbc":
            h_next = encoder(next_x).detach()
            x_next = torch.cat(
                [trunk_target(h_next), sample(policy(actor_trunk(h_next)), noise)], 1
            )
            y = (
                r[:, None] + discount[:, None] * torch.min(targets[0](x_next), targets[1](x_next))
            ).detach()
            critic_loss = sum(
                F.mse_loss(critic(torch.cat([critic_trunk(h), a], 1)), y) for critic in critics
            )
            critic_optimizer.zero_grad()
            critic_loss.backward()
            critic_optimizer.step()
            h = h.detach()
        pi = sample(policy(actor_trunk(h)), noise)
        actor_loss = F.mse_loss(pi, a)
        if algo == "drqbc":
            features = torch.cat([critic_trunk(h), pi], 1)
            q = torch.min(critics[0](features), critics[1](features))
            actor_loss = actor_loss - 2.5 / q.abs().mean().detach() * q.mean()
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()
        pairs = [(critics, targets)] + ([(critic_trunk, trunk_target)] if stage == "stage1" else [])
        for net, target in pairs if algo == "drqbc" else ():
            for p, t in zip(net.parameters(), target.parameters()):
                t.data.copy_(0.01 * p.data + 0.99 * t.data)
        torch.testing.assert_close(
            losses, torch.stack([critic_loss, actor_loss]).detach(), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_cloning_finds_the_actions(stage):
    torch.manual_seed(0)
    agent = Agent(6, filled(algo="bc", hidden_dim=64), stage)
    batch, noise = batch_for(agent), torch.tensor(0.0)
    losses = [agent.update(*batch, noise)[1].item() for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0] and set(agent.optimizers) == {"actor"}


def test_noise_is_clipped_and_stays_inside():
    mean = torch.tensor([[0.0, 0.95, -1.0]]).repeat(5_000, 1).requires_grad_()
    actions = Agent(3, filled(), "stage2").noisy(mean, torch.tensor(1.0))
    assert actions.abs().max() < 1 and (actions - mean).abs().max() <= 0.3 + 1e-6
    assert (actions[:, 0].abs() > 0.2999).float().mean() > 0.7  # most of a noise of 1 is cut
    actions.sum().backward()
    assert (mean.grad == 1).all()  # also where the action was cut


@pytest.mark.parametrize("nstep", [1, 3])
@pytest.mark.parametrize(
    "algo, latent", [("drqbc", "both"), ("drqbc", "actor"), ("drqbc", "critic"), ("bc", "both")]
)
def test_order_of_a_latent_row(tmp_path, monkeypatch, algo, latent, nstep):
    """[pi(h), Q(h), a, r, pi(h'), Q(h')], features of the images before and nstep later, both shifted (Appendix F)."""
    make_files(tmp_path, np.array([7, 6]))
    args = filled(tmp_path, algo=algo, latent=latent, nstep=nstep)
    data, agent = load(args), Agent(6, args, "stage1")
    monkeypatch.setattr(
        synther_vd4rl, "random_shift", lambda images: images.flip(-1)
    )  # shows that it was called
    rows = extract_latents(agent, data, args)
    trunks = [agent.actor_trunk] if algo == "bc" or latent == "actor" else [agent.critic_trunk]
    if (algo, latent) == ("drqbc", "both"):
        trunks = [agent.actor_trunk, agent.critic_trunk]
    assert rows.shape == (13 - 2 * nstep, 2 * 50 * len(trunks) + 6 + 1)
    with torch.no_grad():
        h = agent.encoder(stacked(data["frames"], data["row"] - 1, data["start"]).flip(-1))
        h_next = agent.encoder(
            stacked(data["frames"], data["row"] + nstep - 1, data["start"]).flip(-1)
        )
        parts = [trunk(h) for trunk in trunks] + [data["action"], data["reward"][:, None]]
        parts += [trunk(h_next) for trunk in trunks]
    torch.testing.assert_close(rows, torch.cat(parts, 1))


def test_latents_repeat_themselves(tmp_path):
    """Their shifts are random, but the same for a --diffusion-seed, and the caller's random state is left alone."""
    make_files(tmp_path, np.array([5, 4]))
    args, other = filled(tmp_path), filled(tmp_path, diffusion_seed=1)
    data, agent, state = load(args), Agent(6, args, "stage1"), torch.get_rng_state()
    first, again, third = (extract_latents(agent, data, a) for a in (args, args, other))
    assert torch.equal(first, again) and not torch.equal(first[:, :100], third[:, :100])
    assert torch.equal(torch.get_rng_state(), state)


# --- Whole runs, in miniature -----------------------------------------------------------------------------------------

TINY = dict(
    device="cpu", stage1_updates=4, stage2_updates=4, batch_size=4, hidden_dim=16, diffusion_steps=40,
    diffusion_width=16, diffusion_depth=1, num_samples=300, eval_episodes=2, eval_every=2, checkpoint_every=2,
)  # fmt: skip


class NoiseEnv:
    """In PixelEnv's place: noise to look at, three steps per episode, and a record of what was seen and done."""

    played = []

    def __init__(self, task_name):
        self.act_dim = 6

    def observe(self):
        self.images = self.rng.integers(0, 256, (9, 84, 84), dtype=np.uint8)
        return self.images

    def reset(self, seed):
        self.rng, self.steps = np.random.default_rng(seed), 0
        return self.observe()

    def step(self, action):
        self.played.append((self.images, np.array(action)))
        self.steps += 1
        return self.observe(), float(self.steps), self.steps == 3


@pytest.fixture(autouse=True)
def no_rendering(monkeypatch):
    monkeypatch.setattr(synther_vd4rl, "PixelEnv", NoiseEnv)
    monkeypatch.setattr(NoiseEnv, "played", [])


@pytest.fixture(scope="module")
def vd4rl(tmp_path_factory):
    """A folder with a dataset of three short episodes."""
    make_files(tmp_path_factory.getbasetemp() / "vd4rl", np.array([8, 8, 8]))
    return str(tmp_path_factory.getbasetemp() / "vd4rl")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, vd4rl):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synther_vd4rl, "PixelEnv", NoiseEnv)
        return run(synther_vd4rl, tmp_path_factory.mktemp("runs"), dataset_path=vd4rl, **TINY)


FILES = "args.json metrics.csv checkpoint.pt agent.pt latents.pt final_returns.npz learning_curve.png episode.png"


def test_run_folder_and_log(first_run):
    assert first_run.name.startswith("walker-walk-expert__synther_vd4rl-drqbc-synther__0__")
    names = {path.name for path in first_run.iterdir()}
    assert names == {*FILES.split(), "diffusion.pt", "synthetic.npz", "marginals.png"}
    metrics = read_metrics(first_run)
    assert {key for _, key in metrics} == {
        "diffusion/loss", "diffusion/marginal", "diffusion/correlation", "diffusion/nearest", "diffusion/nearest_real",
        "diffusion/c2st", "diffusion/c2st_real",
        "train/critic_loss", "train/actor_loss", "eval/return_mean", "eval/return_std", "eval/normalized_score",
        "perf/updates_per_sec", "perf/samples_per_sec", "perf/seconds",
    }  # fmt: skip
    with np.load(first_run / "final_returns.npz") as f:
        assert (
            f["updates"].tolist() == [0, 2, 4, 6, 8]
            and (f["returns"] == 6).all()
            and f["returns"].shape == (5, 2)
        )
        np.testing.assert_allclose(f["normalized_scores"], 0.6)
    assert metrics[8, "eval/normalized_score"] == pytest.approx(0.6)
    with np.load(first_run / "synthetic.npz") as f:
        assert f["observations"].shape == f["next_observations"].shape == (300, 100) and f[
            "actions"
        ].shape == (300, 6)
    model = edm.load_edm(first_run / "diffusion.pt")
    assert len(model.mean) == 207 and (model.std != 1).all()  # every dimension is standardised


def acts(folder, stage, images, algo):
    """What the agent that a stage left in a run folder does."""
    agent, _ = synther_vd4rl.load_agent(folder / "agent.pt", 6, filled(algo=algo))
    policy = Agent(6, filled(algo=algo), stage)
    file = folder / ("agent.pt" if stage == "stage1" else "checkpoint.pt")
    policy.load_state_dict(edm.load_file(file)["agent"])
    return policy.policy(agent.actor_trunk(agent.encoder(torch.from_numpy(images)[None])))[0]


@pytest.mark.parametrize("algo", ["drqbc", "bc"])
def test_each_stage_is_scored_by_its_own_policy(tmp_path, vd4rl, algo):
    folder = run(synther_vd4rl, tmp_path, dataset_path=vd4rl, algo=algo, data="real", **TINY)
    assert {path.name for path in folder.iterdir()} == set(FILES.split())
    assert len(NoiseEnv.played) == 5 * 2 * 3  # evaluations, episodes, steps
    for played, stage in ((NoiseEnv.played[12:18], "stage1"), (NoiseEnv.played[-6:], "stage2")):
        for images, action in played:
            expected = acts(folder, stage, images, algo)
            torch.testing.assert_close(torch.from_numpy(action), expected, atol=1e-6, rtol=1e-5)
    assert json.loads((folder / "args.json").read_text())["nstep"] == (3 if algo == "drqbc" else 1)


@pytest.mark.parametrize("data", ["real", "synther"])
def test_heads_learn_from_latents(first_run, tmp_path, vd4rl, monkeypatch, data):
    """Of the dataset, or of the diffusion model. --agent-path leaves stage 1 out, and gives the same heads."""
    seen, update = [], Agent.update
    monkeypatch.setattr(
        Agent, "update", lambda self, *batch: seen.append(batch) or update(self, *batch)
    )
    folder = run(
        synther_vd4rl, tmp_path, dataset_path=vd4rl, data=data, agent_path=str(first_run), **TINY
    )
    assert (folder / "agent.pt").read_bytes() == (first_run / "agent.pt").read_bytes()
    with np.load(folder / "final_returns.npz") as f:
        assert f["updates"].tolist() == [0, 2, 4]
    args = filled(vd4rl)
    agent, _ = synther_vd4rl.load_agent(first_run / "agent.pt", 6, args)
    rows = extract_latents(agent, load(args), args)
    assert torch.equal(rows, edm.load_file(first_run / "latents.pt"))
    if data == "synther":
        rows = edm.pack(**edm.load_transitions(first_run / "synthetic.npz"))[:, :-1]
        a, b = (edm.load_file(f / "checkpoint.pt") for f in (folder, first_run))
        assert_same_state(a["agent"], b["agent"])
    assert len(seen) == 4
    for x, actions, rewards, discounts, next_x, _ in seen:
        batch = torch.cat([x, actions, rewards[:, None], next_x], 1)
        assert (batch[:, None] == rows).all(2).any(1).all()  # each row of the batch is one of these
        assert discounts == 0.99**3


def test_made_dataset_can_be_loaded(tmp_path):
    """tests/paper/vd4rl_data.py writes what load_dataset reads: image t with the action and reward that led to it."""
    options = dict(env="walker-walk-random", out=str(tmp_path))
    vd4rl_data.main(vd4rl_data.Args(episodes=2, **options))
    args = filled(tmp_path, env="walker-walk-random", nstep=1)
    data = load(args)
    assert len(data["frames"]) == 8 and data["start"].tolist() == [0, 0, 0, 4, 4, 4]
    assert data["reward"].tolist() == [1, 2, 3, 1, 2, 3] and set(data["discount"].tolist()) == {
        np.float32(0.99)
    }
    for row, action, (images, played) in zip(
        data["row"], data["action"], NoiseEnv.played, strict=True
    ):
        np.testing.assert_array_equal(data["frames"][row - 1], images[-3:])
        np.testing.assert_allclose(action, played, rtol=1e-6)
    vd4rl_data.main(vd4rl_data.Args(episodes=1, seed=1, **options))
    frames = load(args)["frames"]
    assert len(frames) == 12 and not any(torch.equal(frames[8], frames[k]) for k in (0, 4))
    with pytest.raises(edm.RunError, match="of seed 1 already"):
        vd4rl_data.main(vd4rl_data.Args(seed=1, **options))
    with pytest.raises(edm.RunError, match="needs --run"):
        vd4rl_data.main(vd4rl_data.Args(out=str(tmp_path)))


def test_killed_run_equals_uninterrupted(tmp_path, monkeypatch, capsys, vd4rl):
    """Every moment at which a file is replaced, in all stages: a run that ended there goes on to the same numbers."""
    with monkeypatch.context() as patch:
        copy_before_writes(patch, tmp_path / "killed")
        whole = run(
            synther_vd4rl,
            tmp_path / "whole",
            dataset_path=vd4rl,
            **TINY | dict(eval_episodes=0, feature_dim=4, diffusion_steps=6),
        )
    killed = sorted((tmp_path / "killed").iterdir(), key=lambda path: int(path.name))
    assert (
        len(killed) > 10
        and not (killed[1] / "agent.pt").exists()
        and (killed[-1] / "synthetic.npz").exists()
    )
    for folder in killed[::2]:
        command(monkeypatch, synther_vd4rl, resume=folder)
        assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
        for name in ("checkpoint.pt", "agent.pt", "latents.pt", "diffusion.pt"):
            states = [edm.load_file(f / name) for f in (folder, whole)]
            for state in states if name == "checkpoint.pt" else ():
                del state["seconds"], state["log_size"]
            assert_same_state(*states, f"{folder.name}/{name}")
        a, b = (
            [item for item in read_metrics(f).items() if "perf/" not in item[0][1]]
            for f in (folder, whole)
        )
        np.testing.assert_equal(a, b)  # in the same order
    make_files(tmp_path / "other", np.array([8, 8, 7]))
    settings = json.loads((killed[1] / "args.json").read_text()) | dict(
        dataset_path=str(tmp_path / "other")
    )
    (killed[1] / "args.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        command(monkeypatch, synther_vd4rl, resume=killed[1])
    assert "checkpoint.pt is of other data than" in capsys.readouterr().err


BAD_COMMANDS = {
    "unknown dataset walker-walk-best": dict(env="walker-walk-best"),
    "no 84px.* in .*cheetah_run": dict(env="cheetah-run-expert"),
    "no 84px.* in nothing": dict(dataset_path="nothing"),
    "no episode of walker-walk-expert is longer than 9 steps": dict(nstep=9),
    "--stage1-updates cannot be 0": dict(stage1_updates=0),
    "--algo bc has no critic": dict(algo="bc", latent="actor"),
    "no agent.pt in nothing": dict(agent_path="nothing"),
    "cannot read .*agent.pt": dict(agent_path="."),
    "agent.pt is an agent of algo=drqbc": dict(algo="bc", agent_path="{first_run}"),
    "agent.pt is an agent of feature_dim=50": dict(feature_dim=20, agent_path="{first_run}"),
    "agent.pt is an agent of env=walker-walk-expert": dict(
        env="walker-walk-random", dataset_path="random", agent_path="{first_run}"
    ),
    "nothing is not a run folder": dict(resume="nothing"),
}


@pytest.mark.parametrize("message", BAD_COMMANDS)
def test_bad_command_ends_in_one_sentence(tmp_path, monkeypatch, capsys, vd4rl, first_run, message):
    make_files(tmp_path / "random", np.array([8, 8]), level="random")
    (tmp_path / "agent.pt").write_bytes(b"PK damaged")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    options = {key: str(x).format(first_run=first_run) for key, x in BAD_COMMANDS[message].items()}
    with pytest.raises(SystemExit) as end:
        command(
            monkeypatch,
            synther_vd4rl,
            **dict(dataset_path=vd4rl, eval_episodes=0, device="cpu") | options,
        )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (
        end.value.code == 2 and re.search(message, line) and sorted(tmp_path.rglob("*")) == before
    )
