"""Tests of synther_vd4rl.py: loader, images, agents, latents; whole runs, killed and resumed."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_state, flags, read_metrics, separate_critics, snapshot, wait_and_kill

import edm
import synther_vd4rl
from edm import RunError
from synther_vd4rl import Args, LatentAgent, PixelAgent, load_dataset, random_shift, stacked

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "synther_vd4rl.py"


# --- Data -------------------------------------------------------------------------------------------------------------


def make_files(folder, lengths, seed=0, act_dim=2, task="walker_walk", level="expert", per_file=1):
    """Episodes of noise in V-D4RL's layout; all numbers differ. Returns the arrays, one after the other."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    data = {
        "observation": rng.integers(0, 256, (n, 3, 84, 84), dtype=np.uint8),
        "action": rng.uniform(-1, 1, (n, act_dim)).astype(np.float32),
        "reward": rng.standard_normal(n).astype(np.float32),
        "discount": rng.uniform(0.5, 1, n).astype(np.float32),
        "step_type": np.ones(n, np.int64),
    }
    ends = np.cumsum(lengths)
    data["step_type"][ends - lengths] = 0
    data["step_type"][ends - 1] = 2
    folder = Path(folder) / "main" / task / level / "84px"
    folder.mkdir(parents=True, exist_ok=True)
    groups = np.split(np.arange(len(lengths)), range(per_file, len(lengths), per_file))
    for i, group in enumerate(groups):
        part = slice(ends[group[0]] - lengths[group[0]], ends[group[-1]])
        with h5py.File(folder / f"part_{i:02}.hdf5", "w") as f:
            for key, x in data.items():
                f[key] = x[part]
    return data


def args_for(folder, **options):
    return synther_vd4rl.resolve(Args(**dict(env="walker-walk-expert", dataset_path=str(folder)) | options))


@pytest.mark.parametrize("nstep", [1, 3])
@pytest.mark.parametrize("per_file", [1, 3])
def test_transitions_of_hand_made_files(tmp_path, nstep, per_file):
    """Every n-step window within an episode, and no other, against a loop over episodes."""
    lengths = [6, 2, 9]
    raw = make_files(tmp_path, np.array(lengths), per_file=per_file)
    data = load_dataset(args_for(tmp_path, nstep=nstep))
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
    assert len(data["row"]) == len(expected) == sum(max(length - nstep, 0) for length in lengths)
    row, start = data["row"], data["start"]
    images, next_images = stacked(data["frames"], row - 1, start), stacked(data["frames"], row + nstep - 1, start)
    for k, (i, first, rewards, discount, before, after) in enumerate(expected):
        assert (row[k], start[k]) == (i, first)
        assert data["reward"][k].item() == pytest.approx(rewards, rel=1e-5)
        assert data["discount"][k].item() == pytest.approx(discount, rel=1e-5)
        np.testing.assert_array_equal(data["action"][k], raw["action"][i])
        np.testing.assert_array_equal(images[k], raw["observation"][before].reshape(9, 84, 84))
        np.testing.assert_array_equal(next_images[k], raw["observation"][after].reshape(9, 84, 84))
    k = [i for i, *_ in expected].index(1)
    assert torch.equal(images[k, :3], images[k, 3:6]) and torch.equal(images[k, :3], images[k, 6:])  # three times


def test_files_of_64_pixels(tmp_path):
    """V-D4RL's other form, one episode per .npz: enlarged, channels first, a constant stays what it is."""
    folder = tmp_path / "main/cheetah_run/medium_replay/64px"
    folder.mkdir(parents=True)
    image = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    image[0] = [10, 20, 255]
    others = dict(action=np.ones((5, 6), np.float32), reward=np.arange(5.0), discount=np.ones(5))
    np.savez(folder / "a.npz", image=image, is_first=np.arange(5) == 0, **others)
    data = load_dataset(args_for(tmp_path, env="cheetah-run-mixed", nstep=1))
    assert data["frames"].shape == (5, 3, 84, 84) and data["frames"].dtype == torch.uint8
    assert data["frames"][0].float().mean((1, 2)).tolist() == [10, 20, 255]
    small = F.interpolate(data["frames"][1:].float(), (64, 64), mode="bicubic", antialias=True)
    reference = torch.from_numpy(image[1:]).permute(0, 3, 1, 2).float()
    assert np.corrcoef(small.flatten(), reference.flatten())[0, 1] > 0.9
    assert data["reward"].tolist() == [1, 2, 3, 4]


def test_loading_stops_after_the_file_that_suffices(tmp_path):
    make_files(tmp_path, np.array([4, 4, 4, 4]), per_file=2)
    for limit, num_frames in ((1, 8), (8, 8), (9, 16), (100, 16)):
        assert len(load_dataset(args_for(tmp_path, max_frames=limit, nstep=1))["frames"]) == num_frames


BAD_FILES = {
    "absent": "V-D4RL's files come from",
    "level": "unknown dataset walker-walk-best",
    "truncated": "cannot read .*part_00.hdf5",
    "missing key": "cannot read .*part_00.hdf5.*discount",
    "shape": "cannot read .*part_00.hdf5",
    "observation": "cannot read .*part_00.hdf5",
    "step_type": "cannot read .*part_00.hdf5",
    "action": "cannot read .*part_00.hdf5",
    "width": "cannot read .*part_0[01].hdf5: the lengths or the shapes",
    "NaN": "reward of walker-walk-expert holds NaN",
    "short": "longer than 3 steps",
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files(tmp_path, what):
    env = "walker-walk-expert"
    make_files(tmp_path, np.array([5, 5]))
    file = tmp_path / "main/walker_walk/expert/84px/part_00.hdf5"
    if what == "absent":
        env = "cheetah-run-expert"
    elif what == "level":
        env = "walker-walk-best"
    elif what == "truncated":
        os.truncate(file, 2_000)
    elif what == "short":
        for path in file.parent.iterdir():
            path.unlink()
        make_files(tmp_path, np.array([3, 2]))
    else:
        with h5py.File(file, "a") as f:
            if what == "missing key":
                del f["discount"]
            elif what == "NaN":
                f["reward"][2] = np.nan
            else:
                key = {"shape": "observation", "width": "action"}.get(what, what)
                x = f[key][:]
                del f[key]
                wrong = {
                    "shape": np.zeros((5, 3, 64, 64), np.uint8),
                    "width": np.zeros((5, 3)),
                    "action": np.zeros((6, 2)),
                }
                f[key] = wrong.get(what, x[:-1])
    with pytest.raises(RunError, match=BAD_FILES[what]):
        load_dataset(args_for(tmp_path, env=env, nstep=3))


def test_random_shift_keeps_a_stack_together():
    """Each stack moves as one, by up to 4 pixels each way; what comes in repeats the border."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (200, 1, 84, 84), dtype=torch.uint8).repeat(1, 9, 1, 1)
    shifted = random_shift(images)
    assert shifted.dtype == torch.uint8 and (shifted == shifted[:, :1]).all()
    padded, seen = F.pad(images.float(), (4, 4, 4, 4), mode="replicate").byte(), set()
    for before, after in zip(padded[:, 0], shifted[:, 0]):
        matches = [(y, x) for y in range(9) for x in range(9) if torch.equal(before[y : y + 84, x : x + 84], after)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(9)) and len(seen) > 60


# --- Environment ------------------------------------------------------------------------------------------------------

# Runs in a process of its own, because MuJoCo loads its renderer once, and the tests' own loads none.
RENDERED = """
import sys
import numpy as np, torch
import synther_vd4rl
try:
    synther_vd4rl.choose_renderer()
except synther_vd4rl.edm.RunError:
    sys.exit(77)
from dm_control import suite
env = synther_vd4rl.PixelEnv("walker-walk")
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
    environ = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"} | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", RENDERED, path], env=environ, capture_output=True, text=True)
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
    assert first.shape == (9, 84, 84) and first.dtype == images.dtype == np.uint8 and first.std() > 10
    np.testing.assert_array_equal(first, rendered["again"])
    newest = np.stack([first[:3], first[:3], first[:3], *images[:, -3:]])  # the first image stands for those before it
    assert len({image.tobytes() for image in newest}) > 25
    for t, seen in enumerate(images, start=1):
        np.testing.assert_array_equal(seen, np.concatenate(newest[t : t + 3]))
    np.testing.assert_array_equal(newest[-1], rendered["shown"].transpose(2, 0, 1))


def test_evaluation_repeats_itself(rendered):
    """An evaluation begins with its own seeds, whatever was played before; its film is the first episode's."""
    returns = rendered["returns"]
    np.testing.assert_array_equal(returns[0], returns[1])
    assert returns.shape == (2, 2) and returns[0, 0] != returns[0, 1] and (0 < returns).all() and (returns < 60).all()
    assert rendered["film"].shape == (30, 3, 84, 84)


def test_no_renderer(monkeypatch):
    """Where neither way of rendering works, the message names the packages, and nothing is set."""
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 1))
    with pytest.raises(RunError, match="libegl1.*libosmesa6.*--eval-episodes 0"):
        synther_vd4rl.choose_renderer()
    assert "MUJOCO_GL" not in os.environ


# --- Agents -----------------------------------------------------------------------------------------------------------


def small(**options):
    return synther_vd4rl.resolve(Args(hidden_dim=16, batch_size=8, learning_rate=1e-3, **options))


def pixel_batch(n=8, act_dim=2):
    images, next_images = (torch.randint(0, 256, (n, 9, 84, 84), dtype=torch.uint8) for _ in range(2))
    return images, torch.rand(n, act_dim) * 1.8 - 0.9, torch.randn(n), torch.full((n,), 0.97), next_images


def test_network_sizes():
    agent = PixelAgent(6, synther_vd4rl.resolve(Args()), "cpu")
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    assert count(agent.encoder) == 32 * (9 * 9 + 1) + 3 * 32 * (32 * 9 + 1)
    assert count(agent.actor_trunk) == count(agent.critic_trunk) == 39_200 * 50 + 50 + 100
    assert count(agent.heads.policy) == 50 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 6 + 6
    assert count(agent.heads.critic) == 2 * (56 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 + 1)
    assert agent.encoder(torch.zeros(1, 9, 84, 84, dtype=torch.uint8)).shape == (1, 39_200)
    weight = agent.heads.critic.weights[1][0]
    torch.testing.assert_close(weight @ weight.T, torch.eye(1024), atol=1e-4, rtol=0)  # orthogonal


def test_drqbc_equals_a_plain_implementation(float64):
    """Three updates in V-D4RL's order: critic with encoder, actor on the old features, targets."""
    torch.manual_seed(0)
    args = small(algo="drqbc")
    agent = PixelAgent(2, args, "cpu")
    encoder, actor_trunk, critic_trunk, trunk_target = copy.deepcopy(
        (agent.encoder, agent.actor_trunk, agent.critic_trunk, agent.critic_trunk_target)
    )
    policy = copy.deepcopy(agent.heads.policy)
    q1, q2 = separate_critics(agent.heads.critic)
    q1_target, q2_target = copy.deepcopy((q1, q2))
    encoder_optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    critic_optimizer = torch.optim.Adam([p for n in (critic_trunk, q1, q2) for p in n.parameters()], lr=1e-3)
    actor_optimizer = torch.optim.Adam([*actor_trunk.parameters(), *policy.parameters()], lr=1e-3)
    images, a, r, d, next_images = pixel_batch()
    a, r, d = a.double(), r.double(), d.double()

    def sample(mean, noise):
        raw = mean + torch.clamp(noise * torch.randn_like(mean), -0.3, 0.3)
        return raw - raw.detach() + torch.clamp(raw.detach(), -1 + 1e-6, 1 - 1e-6)

    for i in range(3):
        noise = torch.tensor(1.0 - 0.4 * i)
        torch.manual_seed(i)
        losses = agent.update(images, a, r, d, next_images, noise)
        torch.manual_seed(i)
        h = encoder(images)
        with torch.no_grad():
            h_next = encoder(next_images)
            x_next = torch.cat([trunk_target(h_next), sample(policy(actor_trunk(h_next)), noise)], 1)
            y = r[:, None] + d[:, None] * torch.min(q1_target(x_next), q2_target(x_next))
        x = torch.cat([critic_trunk(h), a], 1)
        critic_loss = F.mse_loss(q1(x), y) + F.mse_loss(q2(x), y)
        encoder_optimizer.zero_grad()
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()
        encoder_optimizer.step()
        pi = sample(policy(actor_trunk(h.detach())), noise)
        x = torch.cat([critic_trunk(h.detach()), pi], 1)
        q = torch.min(q1(x), q2(x))
        actor_loss = -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, a)
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()
        for net, target in ((critic_trunk, trunk_target), (q1, q1_target), (q2, q2_target)):
            for p, t in zip(net.parameters(), target.parameters()):
                t.data.copy_(0.01 * p.data + 0.99 * t.data)
        torch.testing.assert_close(losses, torch.stack([critic_loss, actor_loss]).detach(), rtol=1e-6, atol=1e-9)
    pairs = [
        (agent.encoder, encoder), (agent.actor_trunk, actor_trunk), (agent.critic_trunk, critic_trunk),
        (agent.critic_trunk_target, trunk_target), (agent.heads.policy, policy),
        *zip(separate_critics(agent.heads.critic), (q1, q2)),
        *zip(separate_critics(agent.heads.critic_target), (q1_target, q2_target)),
    ]  # fmt: skip
    for ours, plain in pairs:
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_cloning_trains_encoder_and_actor():
    torch.manual_seed(0)
    agent, batch = PixelAgent(2, small(algo="bc"), "cpu"), pixel_batch()
    assert set(agent.optimizers) == {"actor"} and not hasattr(agent.heads, "critic")
    before, noise = snapshot(agent.encoder), torch.tensor(0.0)
    losses = [agent.update(*batch, noise)[1].item() for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0] and not torch.equal(snapshot(agent.encoder), before)


@pytest.mark.parametrize("algo", ["drqbc", "bc"])
def test_heads_learn_from_latents(algo):
    """Rows [z, a, r, z'] where the action is a function of the actor's features: the head finds it."""
    torch.manual_seed(0)
    args = synther_vd4rl.resolve(Args(algo=algo, hidden_dim=64, learning_rate=1e-3, alpha=0.0))
    agent = LatentAgent(2, args, "cpu")
    dim = agent.latent_dim
    assert dim == (100 if algo == "drqbc" else 50)
    rows = torch.rand(2_000, 2 * dim + 3) * 2 - 1
    rows[:, dim : dim + 2] = 0.9 * torch.tanh(3 * rows[:, :2])
    noise = torch.tensor(0.1)
    losses = [agent.update(rows[torch.randint(2_000, (256,))], noise)[1].item() for _ in range(600)]
    mean = agent.heads.policy(agent.features(rows[:, :dim])[0])
    assert F.mse_loss(mean, rows[:, dim : dim + 2]) < 0.05 < losses[0]


@pytest.mark.parametrize("latent", ["both", "critic"])
def test_latent_update_equals_a_plain_implementation(float64, latent):
    """Three updates of the heads on rows [pi(h), Q(h), a, r, pi(h'), Q(h')]; a discount of three steps."""
    torch.manual_seed(0)
    args = small(latent=latent, nstep=3)
    agent = LatentAgent(2, args, "cpu")
    policy, (q1, q2) = copy.deepcopy(agent.heads.policy), separate_critics(agent.heads.critic)
    q1_target, q2_target = copy.deepcopy((q1, q2))
    critic_optimizer = torch.optim.Adam([*q1.parameters(), *q2.parameters()], lr=1e-3)
    actor_optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    batch = torch.rand(16, 2 * agent.latent_dim + 3) * 2 - 1
    parts = batch.split([50, 50, 2, 1, 50, 50] if latent == "both" else [50, 2, 1, 50], dim=1)
    pi_h, q_h, a, r, pi_next, q_next = parts if latent == "both" else (parts[0], *parts, parts[3])

    def sample(mean, noise):
        raw = mean + torch.clamp(noise * torch.randn_like(mean), -0.3, 0.3)
        return raw - raw.detach() + torch.clamp(raw.detach(), -1 + 1e-6, 1 - 1e-6)

    for i in range(3):
        noise = torch.tensor(1.0 - 0.4 * i)
        torch.manual_seed(i)
        losses = agent.update(batch, noise)
        torch.manual_seed(i)
        with torch.no_grad():
            x_next = torch.cat([q_next, sample(policy(pi_next), noise)], 1)
            y = r + 0.99**3 * torch.min(q1_target(x_next), q2_target(x_next))
        x = torch.cat([q_h, a], 1)
        critic_loss = F.mse_loss(q1(x), y) + F.mse_loss(q2(x), y)
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()
        pi = sample(policy(pi_h), noise)
        x = torch.cat([q_h, pi], 1)
        q = torch.min(q1(x), q2(x))
        actor_loss = -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, a)
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()
        for net, target in ((q1, q1_target), (q2, q2_target)):
            for p, t in zip(net.parameters(), target.parameters()):
                t.data.copy_(0.01 * p.data + 0.99 * t.data)
        torch.testing.assert_close(losses, torch.stack([critic_loss, actor_loss]).detach(), rtol=1e-6, atol=1e-9)
    ours = [agent.heads.policy, *separate_critics(agent.heads.critic), *separate_critics(agent.heads.critic_target)]
    for net, plain in zip(ours, (policy, q1, q2, q1_target, q2_target)):
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_noise_is_clipped_and_stays_inside():
    mean = torch.tensor([[0.0, 0.95, -1.0]]).repeat(5_000, 1).requires_grad_()
    actions = synther_vd4rl.noisy(mean, torch.tensor(1.0), 0.3)
    assert actions.abs().max() < 1 and (actions - mean).abs().max() <= 0.3 + 1e-6
    assert (actions[:, 0].abs() > 0.2999).float().mean() > 0.7  # most of a noise of 1 is cut
    actions.sum().backward()
    assert (mean.grad == 1).all()  # also where the action was cut


# --- Latents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nstep", [1, 3])
@pytest.mark.parametrize("algo, latent", [("drqbc", "both"), ("drqbc", "actor"), ("drqbc", "critic"), ("bc", "both")])
def test_order_of_a_latent_row(tmp_path, monkeypatch, algo, latent, nstep):
    """[pi(h), Q(h), a, r, pi(h'), Q(h')], features of the images before and nstep later, both shifted (Appendix F)."""
    make_files(tmp_path, np.array([7, 6]), act_dim=6)
    args = args_for(tmp_path, algo=algo, latent=latent, nstep=nstep, hidden_dim=16)
    data = load_dataset(args)
    monkeypatch.setattr(synther_vd4rl, "random_shift", lambda images: images.flip(-1))  # shows that it was called
    torch.manual_seed(0)
    agent = PixelAgent(6, args, "cpu")
    rows = synther_vd4rl.extract_latents(agent, data, seed=0)
    trunks = [agent.actor_trunk] if algo == "bc" or latent == "actor" else [agent.critic_trunk]
    if (algo, latent) == ("drqbc", "both"):
        trunks = [agent.actor_trunk, agent.critic_trunk]
    assert rows.shape == (13 - 2 * nstep, 2 * 50 * len(trunks) + 6 + 1)
    with torch.no_grad():
        h = agent.encoder(stacked(data["frames"], data["row"] - 1, data["start"]).flip(-1))
        h_next = agent.encoder(stacked(data["frames"], data["row"] + nstep - 1, data["start"]).flip(-1))
        parts = [trunk(h) for trunk in trunks] + [data["action"], data["reward"][:, None]]
        parts += [trunk(h_next) for trunk in trunks]
    torch.testing.assert_close(rows, torch.cat(parts, 1))


def test_latents_repeat_themselves(tmp_path):
    """The shifts of the latents are random, but the same for a seed, and the caller's random state is left alone."""
    make_files(tmp_path, np.array([5, 4]), act_dim=6)
    args = args_for(tmp_path, hidden_dim=16)
    data, agent, state = load_dataset(args), PixelAgent(6, args, "cpu"), torch.get_rng_state()
    first, again, other = (synther_vd4rl.extract_latents(agent, data, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first[:, :100], other[:, :100])
    assert torch.equal(torch.get_rng_state(), state)


def test_critic_features_for_both(tmp_path):
    agent = LatentAgent(2, small(latent="critic"), "cpu")
    z = torch.randn(4, 50)
    assert agent.latent_dim == 50 and all(torch.equal(part, z) for part in agent.features(z))
    both = LatentAgent(2, small(), "cpu")
    z = torch.randn(4, 100)
    assert [torch.equal(a, b) for a, b in zip(both.features(z), (z[:, :50], z[:, 50:]))] == [True, True]


# --- Whole runs, in miniature -----------------------------------------------------------------------------------------

TINY = dict(
    device="cpu", stage1_updates=4, stage2_updates=60, batch_size=4, hidden_dim=16, diffusion_steps=40,
    diffusion_width=16, diffusion_depth=1, num_samples=300, eval_episodes=0, checkpoint_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def vd4rl(tmp_path_factory):
    """A folder with a dataset of three short episodes."""
    folder = tmp_path_factory.mktemp("vd4rl")
    make_files(folder, np.array([8, 8, 8]), act_dim=6)
    return folder


def run(out_dir, folder, **options):
    """main() with these arguments; returns the run folder."""
    before = set(Path(out_dir).glob("*__*"))
    synther_vd4rl.main(Args(out_dir=str(out_dir), dataset_path=str(folder), **TINY | options))
    (found,) = set(Path(out_dir).glob("*__*")) - before
    return found


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, vd4rl):
    return run(tmp_path_factory.mktemp("runs"), vd4rl)


def test_run_folder(first_run):
    assert first_run.name.startswith("walker-walk-expert__synther_vd4rl-drqbc-synther__0__")
    assert {path.name for path in first_run.iterdir()} == {
        "args.json", "metrics.csv", "checkpoint.pt", "agent.pt", "latents.pt", "diffusion.pt", "synthetic.npz",
        "marginals.png",
    }  # fmt: skip
    metrics = read_metrics(first_run)
    keys = {key for _, key in metrics}
    assert keys >= {"diffusion/loss", "diffusion/marginal", "train/critic_loss", "train/actor_loss"}
    with np.load(first_run / "synthetic.npz") as f:
        assert f["observations"].shape == f["next_observations"].shape == (300, 100) and f["actions"].shape == (300, 6)
    model = edm.load_edm(first_run / "diffusion.pt")
    assert len(model.mean) == 207 and (model.std != 1).all()  # every dimension is standardised


def test_stage_2_changes_new_heads_only(first_run, tmp_path, vd4rl, monkeypatch):
    """Encoder and trunks stay as stage 1 left them; the heads begin anew, and --agent-path gives the same."""
    loaded, load_agent = [], synther_vd4rl.load_agent
    monkeypatch.setattr(synther_vd4rl, "load_agent", lambda *args: loaded.append(load_agent(*args)) or loaded[-1])
    agent = load(first_run / "agent.pt")["agent"]
    heads = load(first_run / "checkpoint.pt")["agent"]
    assert not {name for name in heads if not name.startswith("heads.")}
    assert not torch.equal(heads["heads.policy.0.weight"], agent["heads.policy.0.weight"])
    options = dict(agent_path=str(first_run), synthetic_path=str(first_run / "synthetic.npz"))
    again = run(tmp_path, vd4rl, **options)
    assert (again / "agent.pt").read_bytes() == (first_run / "agent.pt").read_bytes()
    assert not (again / "diffusion.pt").exists()
    other = load(again / "checkpoint.pt")["agent"]
    assert_same_state(other, heads)
    ((used, _),) = loaded[-1:]
    for name, x in used.state_dict().items():
        assert name.startswith("heads.") or torch.equal(x, agent[name]), name


def test_real_and_generated_latents(first_run, tmp_path, vd4rl, monkeypatch):
    """--data real trains the heads on the dataset's latents, with no diffusion model."""
    seen, update = [], LatentAgent.update
    monkeypatch.setattr(LatentAgent, "update", lambda self, b, noise: seen.append(b) or update(self, b, noise))
    folder = run(tmp_path, vd4rl, data="real", agent_path=str(first_run))
    assert not (folder / "synthetic.npz").exists()
    args = args_for(vd4rl)
    data = load_dataset(args)
    agent, _ = synther_vd4rl.load_agent(first_run / "agent.pt", 6, args, "cpu")
    real = synther_vd4rl.extract_latents(agent, data, 0)
    rows = torch.cat(seen)
    index = (rows[:, 106:107] - real[:, 106]).abs().argmin(1)  # the reward tells which row it is
    assert torch.equal(rows, real[index])
    assert len({b[0, 106].item() for b in seen}) > 5


def test_agent_of_another_kind_is_refused(first_run, tmp_path, vd4rl):
    """Nothing is begun with an agent or with latents that do not fit."""
    make_files(tmp_path / "data", np.array([8, 8]), act_dim=6, level="random")
    options = dict(agent_path=str(first_run))
    with pytest.raises(RunError, match="algo=drqbc"):
        run(tmp_path, vd4rl, algo="bc", **options)
    with pytest.raises(RunError, match="env=walker-walk-expert"):
        run(tmp_path, tmp_path / "data", env="walker-walk-random", **options)
    with pytest.raises(RunError, match="latent=both"):
        run(tmp_path, vd4rl, latent="actor", synthetic_path=str(first_run / "synthetic.npz"), **options)
    another = tmp_path / "another"
    shutil.copytree(first_run, another)
    saved = load(another / "agent.pt")
    saved["agent"]["actor_trunk.0.bias"][0] += 1e-3
    torch.save(saved, another / "agent.pt")
    with pytest.raises(RunError, match="latents of another stage-1 agent"):
        run(tmp_path, vd4rl, synthetic_path=str(first_run / "synthetic.npz"), agent_path=str(another))
    (another / "synthetic.npz").write_bytes((first_run / "synthetic.npz").read_bytes()[:-1000])
    with pytest.raises(RunError, match="synthetic.npz is damaged"):
        run(tmp_path, vd4rl, synthetic_path=str(another / "synthetic.npz"), agent_path=str(another))
    with pytest.raises(RunError, match="no use with --data real"):
        run(tmp_path, vd4rl, synthetic_path=str(first_run / "synthetic.npz"), data="real", **options)
    shutil.copy(first_run / "checkpoint.pt", another / "agent.pt")
    with pytest.raises(RunError, match="is an agent of env=None"):
        run(tmp_path, vd4rl, agent_path=str(another))
    (another / "agent.pt").write_bytes((first_run / "agent.pt").read_bytes()[:-1000])
    with pytest.raises(RunError, match="agent.pt is damaged"):
        run(tmp_path, vd4rl, agent_path=str(another))
    assert {path.name for path in tmp_path.iterdir()} == {"data", "another"}


class NoiseEnv:
    """In PixelEnv's place: noise to look at, three steps per episode, and a record of what was seen and done."""

    played = []

    def __init__(self, task_name):
        self.act_dim, self.env = 6, self

    def observation_spec(self):
        return {}

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


@pytest.mark.parametrize("algo", ["drqbc", "bc"])
def test_evaluations_of_both_stages(tmp_path, vd4rl, monkeypatch, algo):
    """Each stage is scored by its own policy, from images."""
    monkeypatch.setattr(synther_vd4rl, "PixelEnv", NoiseEnv)
    monkeypatch.setattr(synther_vd4rl, "choose_renderer", lambda: None)
    monkeypatch.setattr(NoiseEnv, "played", [])
    folder = run(tmp_path, vd4rl, algo=algo, eval_episodes=2, eval_every=2, stage2_updates=4)
    assert {"learning_curve.png", "episode.png", "final_returns.npz"} <= {path.name for path in folder.iterdir()}
    with np.load(folder / "final_returns.npz") as f:
        assert f["updates"].tolist() == [0, 2, 4, 6, 8] and (f["returns"] == 6).all() and f["returns"].shape == (5, 2)
        np.testing.assert_allclose(f["normalized_scores"], 0.6)
    assert read_metrics(folder)[8, "eval/normalized_score"] == pytest.approx(0.6)
    args, state = args_for(vd4rl, algo=algo, hidden_dim=16), load(folder / "agent.pt")["agent"]
    agent, heads = PixelAgent(6, args, "cpu"), LatentAgent(6, args, "cpu")
    agent.load_state_dict(state)
    heads.load_state_dict(load(folder / "checkpoint.pt")["agent"])
    for images, action in NoiseEnv.played[-6:]:  # two episodes of three steps
        features = agent.actor_trunk(agent.encoder(torch.from_numpy(images)[None]))
        torch.testing.assert_close(torch.from_numpy(action), heads.heads.policy(features)[0], atol=1e-6, rtol=1e-5)
    for images, action in NoiseEnv.played[12:18]:
        features = agent.actor_trunk(agent.encoder(torch.from_numpy(images)[None]))
        torch.testing.assert_close(torch.from_numpy(action), agent.heads.policy(features)[0], atol=1e-6, rtol=1e-5)


def test_made_dataset_can_be_loaded(tmp_path, monkeypatch):
    """tests/paper/vd4rl_data.py writes what load_dataset reads: image t with the action and reward that led to it."""
    monkeypatch.syspath_prepend(ROOT / "tests/paper")
    import vd4rl_data

    monkeypatch.setattr(synther_vd4rl, "PixelEnv", NoiseEnv)
    monkeypatch.setattr(synther_vd4rl, "choose_renderer", lambda: None)
    monkeypatch.setattr(NoiseEnv, "played", [])
    vd4rl_data.main(vd4rl_data.Args(env="walker-walk-random", episodes=2, out=str(tmp_path)))
    data = load_dataset(args_for(tmp_path, env="walker-walk-random", nstep=1))
    assert len(data["frames"]) == 8 and data["start"].tolist() == [0, 0, 0, 4, 4, 4]
    for row, action, reward, (images, played), expected in zip(
        data["row"], data["action"], data["reward"], NoiseEnv.played, (1, 2, 3, 1, 2, 3), strict=True
    ):
        np.testing.assert_array_equal(data["frames"][row - 1], images[-3:])
        np.testing.assert_allclose(action, played, rtol=1e-6)
        assert reward == expected
    assert set(data["discount"].tolist()) == {np.float32(0.99)}
    vd4rl_data.main(vd4rl_data.Args(env="walker-walk-random", episodes=1, seed=1, out=str(tmp_path)))
    frames = load_dataset(args_for(tmp_path, env="walker-walk-random"))["frames"]
    assert len(frames) == 12 and not any(torch.equal(frames[8], frames[k]) for k in (0, 4))
    files = sorted(tmp_path.rglob("*"))
    for message, options in {
        "needs --run": dict(env="walker-walk-mixed"),
        "must be walker-walk or": dict(env="walker-run-random"),
        "then -random, -mixed or -expert, not walkerwalk": dict(env="walkerwalk"),
        "episodes must be at least 1": dict(env="walker-walk-random", episodes=0),
        "of seed 1 already": dict(env="walker-walk-random", seed=1),
        "cannot read nothing": dict(env="walker-walk-expert", run="nothing"),
    }.items():
        with pytest.raises(RunError, match=message):
            vd4rl_data.main(vd4rl_data.Args(**options, out=str(tmp_path)))
    assert sorted(tmp_path.rglob("*")) == files


def test_behaviour_cloning_runs(tmp_path, vd4rl):
    folder = run(tmp_path, vd4rl, algo="bc")
    with np.load(folder / "synthetic.npz") as f:
        assert f["observations"].shape == (300, 50)
    assert json.loads((folder / "args.json").read_text())["nstep"] == 1


# --- The command line -------------------------------------------------------------------------------------------------


def command(*options):
    return [sys.executable, str(SCRIPT), "--device", "cpu", *map(str, options)]


@pytest.mark.parametrize(
    "options",
    [
        ["--env", "walker-walk-best"],
        ["--dataset-path", "nothing"],
        ["--algo", "bc", "--latent", "actor"],
        ["--agent-path", "nothing"],
        ["--synthetic-path", "nothing.npz"],
        ["--stage1-updates", "0"],
        ["--resume", "nothing"],
    ],
    ids=lambda options: " ".join(options),
)
def test_bad_command_ends_in_one_sentence(tmp_path, vd4rl, options):
    arguments = ["--eval-episodes", "0"] + ([] if "--dataset-path" in options else ["--dataset-path", vd4rl]) + options
    result = subprocess.run(command(*arguments), cwd=tmp_path, capture_output=True, text=True, timeout=100)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and "Traceback" not in result.stderr, lines
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert not list(tmp_path.iterdir())


def test_killed_run_equals_uninterrupted(tmp_path, vd4rl):
    """Killed in stage 1, while the diffusion model trains, and in stage 2: the same numbers at the end."""
    sizes = dict(stage1_updates=12, diffusion_steps=800, stage2_updates=900, checkpoint_every=3)
    options = [x for x in flags(dataset_path=vd4rl, **TINY | sizes) if x not in ("--device", "cpu")]
    subprocess.run(command(*options, "--out-dir", "whole"), cwd=tmp_path, capture_output=True, check=True)
    (whole,) = (tmp_path / "whole").iterdir()

    def reached(stage):
        return lambda folder: (path := folder / "checkpoint.pt").exists() and load(path)["stage"] == stage

    folder = wait_and_kill(command(*options), tmp_path, reached("stage1"))
    assert load(folder / "checkpoint.pt")["update"] < 12 and not (folder / "agent.pt").exists()
    resume = command("--resume", folder)
    wait_and_kill(resume, tmp_path, lambda folder: (folder / "diffusion_checkpoint.pt").exists())
    assert (folder / "latents.pt").exists() and not (folder / "diffusion.pt").exists()
    wait_and_kill(resume, tmp_path, reached("stage2"))
    assert load(folder / "checkpoint.pt")["update"] < 900
    subprocess.run(resume, cwd=tmp_path, capture_output=True, check=True, timeout=200)
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    for name in ("checkpoint.pt", "agent.pt", "diffusion.pt"):
        a, b = (load(f / name) for f in (folder, whole))
        for state in (a, b):
            state.pop("seconds", None)
        assert_same_state(a, b, where=name)
    metrics = [
        [line for line in (f / "metrics.csv").read_text().splitlines() if ",perf/" not in line] for f in (folder, whole)
    ]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("algo", ["drqbc", "bc"])
def test_images_in_parts_give_the_update_of_the_whole_batch(monkeypatch, algo):
    results = []
    for at_once in (7, 3):  # the last part is smaller
        monkeypatch.setitem(synther_vd4rl.IMAGES_AT_ONCE, "cpu", at_once)
        torch.manual_seed(0)
        agent = PixelAgent(2, synther_vd4rl.resolve(Args(algo=algo, hidden_dim=16, feature_dim=8)), "cpu")
        images, next_images = torch.randint(0, 256, (2, 7, 9, 84, 84), dtype=torch.uint8)
        others = torch.rand(7, 2), torch.rand(7), torch.rand(7)
        losses = agent.update(images, *others, next_images, torch.zeros(()))
        grads = [p.grad for p in agent.encoder.parameters()]
        results.append([losses, *grads])
    for whole, parts in zip(*results):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)
