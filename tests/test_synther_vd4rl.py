"""Tests of synther_vd4rl.py: dataset, images, agent, latents, whole runs, stopped runs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import h5py
import helpers
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import vd4rl_data
from plain_agents import plain_drqbc

import edm
import synther_vd4rl
from synther_vd4rl import Args, DrQBC, extract_latents, find_files, random_shift, stacked

# --- Dataset ---


def filled(folder="", **options):
    """Arguments as main fills them, but of small heads."""
    small = dict(dataset_path=str(folder), hidden_dim=16, learning_rate=1e-3)
    return helpers.filled(synther_vd4rl, **small | options)


def load(args):
    return synther_vd4rl.load_dataset(find_files(args), args)


@pytest.mark.parametrize("nstep", [1, 3])
@pytest.mark.parametrize("per_file", [1, 3])
def test_transitions_are_all_windows_within_episodes(tmp_path, nstep, per_file):
    lengths = np.array([6, 2, 9])
    raw = helpers.make_files(tmp_path, lengths, per_file=per_file)
    data = load(filled(tmp_path, nstep=nstep))
    assert torch.equal(data["frames"], torch.from_numpy(raw["observation"]))
    images = stacked(data["frames"], data["row"] - 1, data["start"])
    next_images = stacked(data["frames"], data["row"] - 1 + nstep, data["start"])
    count = 0
    for first, end in zip(np.cumsum(lengths) - lengths, np.cumsum(lengths)):
        for i in range(first + 1, end - nstep + 1):
            rewards = sum(0.99**k * float(raw["reward"][i + k]) for k in range(nstep))
            discount = 0.99**nstep * float(raw["discount"][i + nstep - 1])
            assert (data["row"][count], data["start"][count]) == (i, first)
            assert data["reward"][count].item() == pytest.approx(rewards, rel=1e-5)
            assert data["discount"][count].item() == pytest.approx(discount, rel=1e-5)
            np.testing.assert_array_equal(data["action"][count], raw["action"][i])
            for seen, end_of_seen in ((images, i), (next_images, i + nstep)):
                rows = [max(end_of_seen - k, first) for k in (3, 2, 1)]
                stack = raw["observation"][rows].reshape(9, 84, 84)
                np.testing.assert_array_equal(seen[count], stack)
            count += 1
    assert count == len(data["row"])


@pytest.mark.parametrize("name", ["{}", "s{:04}", "{}_of_200", "2024-{}-09_5", "{}0", "{:c}"])
def test_files_are_read_in_the_order_of_their_numbers(tmp_path, name):
    """Also where they begin within an episode. Without one of them, a sentence says where it was."""
    lengths = np.array([5] * 9 + [7 if name == "{}" else 5])
    raw = helpers.make_files(tmp_path, lengths, per_file=10)
    args = filled(tmp_path)
    (whole,) = find_files(args)
    whole.unlink()
    files = [whole.with_name(f"{name.format(i)}.hdf5") for i in range(97, 110)]
    for last in (1, 2):  # without rows of the type LAST, and with them
        raw["step_type"][np.cumsum(lengths) - 1] = last
        for i, path in enumerate(files):
            helpers.write(path, {key: x[4 * i : 4 * i + 4] for key, x in raw.items()})
        data = load(args)
        assert torch.equal(data["frames"], torch.from_numpy(raw["observation"]))
        assert data["start"].tolist() == np.arange(0, 50, 5).repeat(lengths - 3).tolist()
    for before, path, after in zip(files, files[1:], files[2:]):
        path.rename(tmp_path / "away")
        with pytest.raises(edm.RunError, match=f"not in order: .*({before}|{after})"):
            load(args)
        (tmp_path / "away").rename(path)


BAD_FILES = {  # an array, and what is in its place
    "cannot read .*part_00.hdf5: .*discount": ("discount", None),
    "cannot read .*part_00.hdf5: cannot reshape": ("step_type", np.zeros(4)),
    "cannot read .*part_00.hdf5: .*broadcast": ("observation", np.zeros((5, 3, 64, 64), "u1")),
    "cannot read .*part_00.hdf5: .*float64": ("observation", np.zeros((5, 3, 84, 84))),
    "cannot read .*part_01.hdf5: .*dimensions": ("action", np.zeros((5, 3))),
    "reward or discount of walker-walk-expert is NaN": ("reward", np.full(5, math.nan)),
    "cannot read .*part_00.hdf5: 0 images": ("observation", np.zeros((0, 3, 84, 84), "u1")),
    "not in order: .*part_00.hdf5, then .*part_00.hdf5": ("step_type", np.array([0, 1, 2, 1, 2])),
    "not in order: .*part_00.hdf5, then .*part_01.hdf5": ("step_type", np.array([0, 1, 1, 1, 1])),
    "part_00.hdf5 does not begin with the first row": ("step_type", np.ones(5)),
    "cannot read .*part_00.hdf5: .*truncated": ("the file", None),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_file_ends_in_one_sentence(tmp_path, message):
    helpers.make_files(tmp_path, np.array([5, 5]))
    path = tmp_path / "main/walker_walk/expert/84px/part_00.hdf5"
    key, value = BAD_FILES[message]
    with h5py.File(path, "a") as f:
        f.pop(key, None)
        if value is not None:
            f[key] = value
    if key == "the file":
        os.truncate(path, 2_000)
    with pytest.raises(edm.RunError, match=message) as error:
        load(filled(tmp_path))
    assert "\n" not in str(error.value)


def test_random_shift_moves_a_stack_as_one():
    """By up to 4 pixels each way. What comes in repeats the border."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (200, 1, 84, 84), dtype=torch.uint8).repeat(1, 9, 1, 1)
    shifted = random_shift(images)
    assert shifted.dtype == torch.uint8 and (shifted == shifted[:, :1]).all()
    padded = F.pad(images[:, :1].float(), (4, 4, 4, 4), mode="replicate")
    windows = padded.unfold(2, 84, 1).unfold(3, 84, 1)[:, 0].byte()  # [200, 9, 9, 84, 84]
    is_same = (windows == shifted[:, :1, None]).flatten(3).all(3)
    _, y, x = is_same.nonzero().T
    assert len(y) == 200 and len({*zip(y.tolist(), x.tolist())}) > 60
    assert {*y.tolist()} == {*x.tolist()} == {*range(9)}


# --- Environment ---

# Each action acts twice. Three images are seen, at the beginning the first one three times. This
# runs in a process of its own, because MuJoCo loads its renderer once, and the tests' own has none.
RENDERED = """
import sys
import numpy as np
import synther_vd4rl
try:
    env = synther_vd4rl.make_env("walker-walk")
except synther_vd4rl.edm.RunError:
    sys.exit(77)
from dm_control import suite
env.env._step_limit = 40
plain = suite.load("walker", "walk", task_kwargs={"random": 3})
render = lambda: plain.physics.render(84, 84, camera_id=0).transpose(2, 0, 1)
plain.reset()
seen = 3 * [render()]
first = env.reset(3)
assert first.dtype == np.uint8 and (first == np.concatenate(seen)).all()
for i, action in enumerate(np.random.RandomState(0).uniform(-1, 1, (20, 6))):
    images, reward, ended = env.step(action)
    assert reward == sum(plain.step(action).reward for _ in range(2)) != 0
    seen.append(render())
    assert (images == np.concatenate(seen[-3:])).all() and ended == (i == 19)
assert len({image.tobytes() for image in seen}) == 21 and (env.reset(3) == first).all()
"""


def test_rendered_environment_equals_dm_control():
    environ = os.environ | {"PYTHONPATH": str(Path(synther_vd4rl.__file__).parent)}
    del environ["MUJOCO_GL"]
    words = [sys.executable, "-c", RENDERED]
    result = subprocess.run(words, env=environ, capture_output=True, text=True)
    if result.returncode == 77:
        pytest.skip("this machine has neither EGL nor OSMesa")
    assert result.returncode == 0, result.stderr


# --- Agent and latents ---


def test_network_sizes_and_initial_weights():
    agent = DrQBC(6, Args(device="cpu"), "stage1")
    parts = (agent.encoder, agent.actor_trunk, agent.critic_trunk, agent.policy, agent.critic)
    counts = [sum(map(torch.numel, part.parameters())) for part in parts]
    trunk = 39_200 * 50 + 50 + 100
    policy = 50 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 6 + 6
    critics = 2 * (56 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 + 1)
    assert counts == [32 * 82 + 3 * 32 * (32 * 9 + 1), trunk, trunk, policy, critics]
    assert agent.encoder(torch.zeros(1, 9, 84, 84, dtype=torch.uint8)).shape == (1, 39_200)
    for weight in (agent.critic.weights[1][0], agent.policy[2].weight):  # orthogonal
        torch.testing.assert_close(weight @ weight.T, torch.eye(1024), atol=1e-4, rtol=0)


STAGES = [("drqbc", "stage1", "both"), ("drqbc", "stage2", "both"), ("drqbc", "stage2", "critic")]
STAGES += [("bc", "stage1", "both"), ("bc", "stage2", "both")]


@pytest.mark.parametrize("algo, stage, latent", STAGES)
def test_updates_equal_a_plain_implementation(float64, algo, stage, latent):
    """Critic with encoder, actor on the old features, targets. Latents are [pi(h), Q(h)], or one of
    both that feeds both heads."""
    torch.manual_seed(0)
    agent = DrQBC(6, filled(algo=algo, latent=latent), stage)
    update = plain_drqbc(agent)
    x, next_x = torch.randint(0, 256, (2, 8, 9, 84, 84), dtype=torch.uint8)
    if stage == "stage2":
        x, next_x = torch.rand(2, 8, agent.latent_dim) * 2 - 1
        assert torch.equal(agent.actor_trunk(x), x[:, :50])
        assert torch.equal(agent.critic_trunk(x), x[:, -50:])
    batch = (x, torch.rand(8, 6) * 1.8 - 0.9, torch.randn(8), torch.full((8,), 0.97), next_x)
    for i in range(3):
        noise = torch.tensor(1.0 - 0.4 * i)
        torch.manual_seed(i)
        losses = agent.update(*batch, noise).tolist()
        torch.manual_seed(i)
        assert losses == pytest.approx(update(i, *batch, noise), rel=1e-6, abs=1e-9)


BOTH = ["actor_trunk", "critic_trunk"]
CASES = [("drqbc", "both", BOTH), ("drqbc", "actor", BOTH[:1]), ("drqbc", "critic", BOTH[1:])]


@pytest.mark.parametrize("nstep", [1, 3])
@pytest.mark.parametrize("algo, latent, trunks", [*CASES, ("bc", "both", BOTH[:1])])
def test_order_of_a_latent_row(tmp_path, monkeypatch, algo, latent, trunks, nstep):
    """[pi(h), Q(h), a, r, pi(h'), Q(h')] of shifted images (Appendix F), h' nstep after h."""
    helpers.make_files(tmp_path, np.array([7, 6]))
    args = filled(tmp_path, algo=algo, latent=latent, nstep=nstep)
    data = load(args)
    agent = DrQBC(6, args, "stage1")
    monkeypatch.setattr(synther_vd4rl, "random_shift", lambda images: images.flip(-1))
    rows = extract_latents(agent, data, args)
    assert rows.shape == (13 - 2 * nstep, 2 * 50 * len(trunks) + 6 + 1)
    before = stacked(data["frames"], data["row"] - 1, data["start"]).flip(-1)
    after = stacked(data["frames"], data["row"] - 1 + nstep, data["start"]).flip(-1)
    with torch.no_grad():
        parts = [getattr(agent, trunk)(agent.encoder(before)) for trunk in trunks]
        parts += [data["action"], data["reward"][:, None]]
        parts += [getattr(agent, trunk)(agent.encoder(after)) for trunk in trunks]
    torch.testing.assert_close(rows, torch.cat(parts, 1))


# --- Whole runs, in miniature ---

TINY = dict(device="cpu", stage1_updates=4, stage2_updates=4, batch_size=4, hidden_dim=16)
TINY |= dict(diffusion_steps=40, diffusion_width=16, diffusion_depth=1, num_samples=300)
TINY |= dict(noise_duration=2, eval_episodes=2, eval_every=2, checkpoint_every=2)
FILES = {"args.json", "metrics.csv", "checkpoint.pt", "agent.pt", "latents.pt"}
FILES |= {"final_returns.npz", "learning_curve.png"}


class NoiseEnv:
    """In PixelEnv's place: three steps with rewards of 1, 2 and 3, and a record of them."""

    act_dim = 6
    played = []

    def reset(self, seed):
        self.noise = np.random.default_rng(seed).integers(0, 256, (4, 9, 84, 84), dtype=np.uint8)
        self.steps = 0
        return self.noise[0]

    def step(self, action):
        self.played.append((self.noise[self.steps], np.array(action)))
        self.steps += 1
        return self.noise[self.steps], float(self.steps), self.steps == 3


@pytest.fixture(scope="module", autouse=True)
def no_rendering():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synther_vd4rl, "PixelEnv", lambda task: NoiseEnv())
        yield


@pytest.fixture(scope="module")
def vd4rl(tmp_path_factory):
    """A folder with datasets of three and of two short episodes."""
    folder = tmp_path_factory.mktemp("vd4rl")
    helpers.make_files(folder, np.array([8, 8, 8]))
    helpers.make_files(folder, np.array([8, 8]), level="random")
    return str(folder)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, vd4rl):
    return helpers.run(synther_vd4rl, tmp_path_factory.mktemp("runs"), dataset_path=vd4rl, **TINY)


def test_run_folder_and_log(first_run):
    assert first_run.name.startswith("walker-walk-expert__synther_vd4rl-drqbc-synther__0__")
    names = {path.name for path in first_run.iterdir()}
    assert names == {*FILES, "diffusion.pt", "synthetic.npz", "marginals.png"}
    keys = "diffusion/loss diffusion/marginal diffusion/correlation diffusion/nearest "
    keys += "diffusion/nearest_real diffusion/c2st train/critic_loss diffusion/invalid_real "
    keys += "diffusion/detection diffusion/invalid diffusion/reward diffusion/reward_real "
    keys += "diffusion/terminals diffusion/terminals_real "
    keys += "train/actor_loss eval/return_mean eval/return_std eval/normalized_score "
    keys += "perf/updates_per_sec perf/samples_per_sec perf/seconds"
    metrics = helpers.read_metrics(first_run)
    assert {key for _, key in metrics} == set(keys.split())
    assert metrics[8, "eval/normalized_score"] == pytest.approx(0.6)  # of a return of 6
    assert {step for step, key in metrics if key == "train/actor_loss"} == {2, 4, 6, 8}
    assert (4 + 40, "diffusion/loss") in metrics
    with np.load(first_run / "final_returns.npz") as f:
        assert f["updates"].tolist() == [0, 2, 4, 6, 8]
        assert f["returns"].tolist() == 5 * [[6, 6]]
        np.testing.assert_allclose(f["normalized_scores"], 0.6)
    with np.load(first_run / "synthetic.npz") as f:
        shapes = [f[key].shape for key in ("observations", "actions", "next_observations")]
        assert shapes == [(300, 100), (300, 6), (300, 100)]
    model = edm.load_edm(first_run / "diffusion.pt")
    assert len(model.mean) == 207 and (model.std != 1).all()  # all columns are standardised


def acts(folder, stage, images, algo):
    """What the agent that a stage left in a run folder does."""
    args = filled(algo=algo)
    agent, _ = synther_vd4rl.load_agent(folder / "agent.pt", 6, args)
    heads = DrQBC(6, args, stage)
    file = folder / ("agent.pt" if stage == "stage1" else "checkpoint.pt")
    heads.load_state_dict(edm.load_torch(file)["agent"])
    return heads.policy(agent.actor_trunk(agent.encoder(torch.from_numpy(images)[None])))[0]


@pytest.mark.parametrize("algo", ["drqbc", "bc"])
def test_each_stage_is_evaluated_by_its_own_policy(tmp_path, vd4rl, algo):
    NoiseEnv.played.clear()
    options = TINY | dict(dataset_path=vd4rl, algo=algo, data="real")
    folder = helpers.run(synther_vd4rl, tmp_path, **options)
    assert {path.name for path in folder.iterdir()} == FILES
    assert len(NoiseEnv.played) == 5 * 2 * 3  # evaluations, episodes, steps
    starts = np.stack([images for images, _ in NoiseEnv.played[::3]])
    assert (starts[0] != starts[1]).any()  # by other seeds
    assert (starts[::2] == starts[0]).all() and (starts[1::2] == starts[1]).all()
    for played, stage in ((NoiseEnv.played[12:18], "stage1"), (NoiseEnv.played[-6:], "stage2")):
        for images, action in played:
            expected = acts(folder, stage, images, algo)
            torch.testing.assert_close(torch.from_numpy(action), expected, atol=1e-6, rtol=1e-5)
    assert json.loads((folder / "args.json").read_text())["nstep"] == (3 if algo == "drqbc" else 1)


def test_evaluation_says_what_failed():
    env = NoiseEnv()
    env.step = None
    for x, message in ((math.nan, "the agent's action became NaN"), (0, "the environment failed")):
        with pytest.raises(edm.RunError, match=message):
            synther_vd4rl.evaluate(lambda _, x=x: torch.full((1, 6), x), env, 1, 0)


def test_dropout_is_off_in_latents_and_evaluations(first_run):
    frozen, _ = synther_vd4rl.load_agent(first_run / "agent.pt", 6, filled())
    assert not any(module.training for module in frozen.modules())
    heads = DrQBC(6, filled(), "stage2")
    heads.policy.insert(0, nn.Dropout())
    policy = synther_vd4rl.make_policy(heads, frozen)
    images = torch.randint(0, 256, (1, 9, 84, 84), dtype=torch.uint8)
    assert torch.equal(policy(images), policy(images)) and heads.training


@pytest.mark.parametrize("data", ["real", "synther"])
def test_heads_learn_from_latents(first_run, tmp_path, vd4rl, monkeypatch, data):
    """Real or generated ones. --agent-path leaves stage 1 out, and gives the same heads."""
    seen = []

    def see(agent, *batch):
        seen.append((*batch[:-1], batch[-1].item()))

    helpers.watch(monkeypatch, DrQBC, "update", see)
    options = TINY | dict(dataset_path=vd4rl, data=data, agent_path=str(first_run))
    folder = helpers.run(synther_vd4rl, tmp_path, **options)
    assert (folder / "agent.pt").read_bytes() == (first_run / "agent.pt").read_bytes()
    with np.load(folder / "final_returns.npz") as f:
        assert f["updates"].tolist() == [0, 2, 4]
    args = filled(vd4rl, diffusion_seed=1)
    agent, _ = synther_vd4rl.load_agent(first_run / "agent.pt", 6, args)
    rows = edm.load_torch(first_run / "latents.pt")
    assert not torch.equal(rows[:, :100], extract_latents(agent, load(args), args)[:, :100])
    args.diffusion_seed = 0
    assert torch.equal(rows, extract_latents(agent, load(args), args))
    if data == "synther":
        rows = edm.pack(**edm.load_transitions(first_run / "synthetic.npz"))[:, :-1]
        states = [edm.load_torch(f / "checkpoint.pt")["agent"] for f in (folder, first_run)]
        helpers.assert_same_state(*states)
    for x, a, r, discount, next_x, _ in seen:
        batch = torch.cat([x, a, r[:, None], next_x], 1)
        assert (batch[:, None] == rows).all(2).any(1).all()  # each is one of the rows
        assert discount == 0.99**3
    assert [noise for *_, noise in seen] == pytest.approx([1, 0.55, 0.1, 0.1])


def test_made_dataset_can_be_loaded(tmp_path):
    """tests/paper/vd4rl_data.py writes image t with the action and reward that led to it."""
    NoiseEnv.played.clear()
    options = dict(env="walker-walk-random", out=str(tmp_path))
    vd4rl_data.main(vd4rl_data.Args(episodes=2, **options))
    data = load(filled(tmp_path, env="walker-walk-random", nstep=1))
    assert len(data["frames"]) == 8 and data["start"].tolist() == [0, 0, 0, 4, 4, 4]
    assert data["reward"].tolist() == [1, 2, 3, 1, 2, 3]
    torch.testing.assert_close(data["discount"], torch.full((6,), 0.99))
    for row, action, (images, played) in zip(data["row"], data["action"], NoiseEnv.played):
        np.testing.assert_array_equal(data["frames"][row - 1], images[-3:])
        np.testing.assert_allclose(action, played, rtol=1e-6)
    with pytest.raises(edm.RunError, match="of seed 0 already"):
        vd4rl_data.main(vd4rl_data.Args(**options))
    (tmp_path / "args.json").write_text('{"env": "dmc/cheetah-run"}')
    options |= dict(env="walker-walk-expert", out=str(tmp_path / "new"), run=tmp_path)
    with pytest.raises(edm.RunError, match="an agent of dmc/cheetah-run, not of dmc/walker-walk"):
        vd4rl_data.main(vd4rl_data.Args(**options))
    assert not (tmp_path / "new").exists()


def test_killed_run_equals_uninterrupted(tmp_path, monkeypatch, capsys, vd4rl):
    """A run that ended when a file is replaced, or by a signal, goes on, but not on other data."""
    options = TINY | dict(eval_episodes=0, feature_dim=4, diffusion_steps=6, dataset_path=vd4rl)
    with monkeypatch.context() as patch:
        helpers.copy_before_writes(patch, tmp_path / "killed")
        whole = helpers.run(synther_vd4rl, tmp_path / "whole", **options)
    killed = sorted((tmp_path / "killed").iterdir(), key=lambda path: int(path.name))
    assert len(killed) > 10 and (killed[-1] / "synthetic.npz").exists()
    assert not (killed[1] / "agent.pt").exists()
    resumed = killed[::2]
    for call, stage, number in ((3, "stage1", 3), (4 + 3, "stage2", 3)):
        stop = (DrQBC, "update", call, dict(stage=stage, update=number))
        resumed += [helpers.stopped_run(monkeypatch, synther_vd4rl, tmp_path, *stop, **options)]
    for folder in resumed:
        helpers.command(monkeypatch, synther_vd4rl, resume=folder)
        helpers.assert_same_state(helpers.outcome(folder), helpers.outcome(whole), folder.name)
    settings = json.loads((killed[1] / "args.json").read_text()) | dict(env="walker-walk-random")
    (killed[1] / "args.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        helpers.command(monkeypatch, synther_vd4rl, resume=killed[1])
    assert "checkpoint.pt is of other data" in capsys.readouterr().err


BAD_COMMANDS = {
    "unknown dataset walker-walk-best": dict(env="walker-walk-best"),
    "nothing holds no main/cheetah_run": dict(env="cheetah-run-expert", dataset_path="nothing"),
    "no episode of walker-walk-expert is longer than 9 steps": dict(nstep=9),
    "--algo bc has no critic": dict(algo="bc", latent="actor"),
    "nothing holds no agent.pt": dict(agent_path="nothing"),
    "agent.pt is an agent of algo=drqbc": dict(algo="bc", agent_path="{run}"),
    "agent.pt is an agent of feature_dim=50": dict(feature_dim=20, agent_path="{run}"),
    "agent.pt is an agent of env=walker": dict(env="walker-walk-random", agent_path="{run}"),
}


@pytest.mark.parametrize("message", BAD_COMMANDS)
def test_bad_command_ends_in_one_sentence(tmp_path, monkeypatch, capsys, vd4rl, first_run, message):
    options = TINY | dict(dataset_path=vd4rl, eval_episodes=0)
    for key, x in BAD_COMMANDS[message].items():
        options[key] = str(x).format(run=first_run)
    helpers.assert_refused(monkeypatch, capsys, tmp_path, synther_vd4rl, message, **options)
