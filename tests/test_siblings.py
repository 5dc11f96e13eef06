"""Tests of what the scripts share: arguments, run folders, log keys; whole runs of synther_iql.py and synther_edac.py.

What is copied from synther_td3bc.py word for word (test_copies.py) is tested there.
"""

import dataclasses
import importlib
import json
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same_state, collect_random, flags, read_metrics, transitions, wait_and_kill, write_npz

import edm
import synther_edac
import synther_iql
import synther_sac_online
import synther_td3bc
from edm import RunError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [importlib.import_module(path.stem) for path in sorted(ROOT.glob("synther_*.py"))]
OFFLINE = [synther_td3bc, synther_iql, synther_edac]
SIBLINGS = OFFLINE[1:]
IDS = dict(ids=lambda module: module.__name__)


# --- Arguments --------------------------------------------------------------------------------------------------------

AGENTS_WORDS = {  # arguments whose text or default names what is peculiar to an agent
    "exp_name", "normalize_reward", "updates", "batch_size", "hidden_dim", "hidden_layers", "learning_rate", "tau",
    "eval_every", "eval_episodes", "checkpoint_every",
}  # fmt: skip
OWN_WORDS = AGENTS_WORDS | {  # and to the offline, the online and the pixel setting
    "env", "seed", "resume", "diffusion_steps", "diffusion_width", "diffusion_batch_size", "diffusion_lr",
    "diffusion_seed", "noise_clip", "num_samples", "data", "terminals", "algo", "dataset_path", "synthetic_path",
}  # fmt: skip


def arguments(script):
    """{name: (type, default, docstring)} of the command line, docstrings from the source."""
    source = Path(script.__file__).read_text()
    body = source[source.index("class Args:") : source.index("\n\n\n", source.index("class Args:"))]
    hints, found = typing.get_type_hints(script.Args), {}
    for field in dataclasses.fields(script.Args):
        text = body[body.index(f"\n    {field.name}: ") :]
        found[field.name] = (hints[field.name], field.default, " ".join(text.split('"""')[1].split()))
    return found


def test_shared_arguments_agree():
    """Arguments of one name have one kind of value in all scripts, and, but for those listed, one text and default."""
    tables = {script.__name__: arguments(script) for script in SCRIPTS}
    for name in set().union(*tables.values()):
        entries = {script: table[name] for script, table in tables.items() if name in table}
        kinds = {typing.Optional[entry[0]] for entry in entries.values()}
        kinds = {"choice" if "Literal" in str(kind) else kind for kind in kinds}
        assert len(kinds) == 1, (name, entries)
        if name not in OWN_WORDS:
            assert len(set(entries.values())) == 1, (name, entries)
        offline = [entries[script.__name__] for script in OFFLINE if script.__name__ in entries]
        if name not in AGENTS_WORDS:
            assert len(set(offline)) <= 1, (name, offline)


def test_diffusion_settings_agree():
    """The three offline scripts train the same diffusion model for a dataset, whatever the agent."""
    levels = ("random", "medium", "expert", "medium-replay", "mixed", "full-replay", "medium-expert")
    names = [f"{env}-{level}-v2" for env in ("halfcheetah", "hopper", "walker2d") for level in levels]
    keys = [name for name in arguments(synther_td3bc) if name.startswith(("diffusion_", "sampl", "num_samples"))]
    for name in (*names, *synther_td3bc.MAZE_TASKS, "quickstart"):
        for num_rows in (1_000, 1_000_000):
            for recipe in edm.RECIPES:
                args = [script.Args(env=name, diffusion_recipe=recipe) for script in OFFLINE]
                settings = [vars(script.resolve(a, num_rows)) for script, a in zip(OFFLINE, args)]
                assert len({tuple(values[key] for key in keys) for values in settings}) == 1, name


@pytest.mark.parametrize("recipe", ["fast", "ranks"])
def test_recipe_sets_the_sizes(recipe):
    """Whatever the dataset or environment; what is given on the command line goes before it."""
    fast = {f"diffusion_{key}": value for key, value in edm.RECIPES[recipe].items()}
    for script in SCRIPTS:
        num_rows = [1_000_000] if script in OFFLINE else []
        for env in (script.Args().env, "hopper-medium-v2"):  # both have a width of their own in the offline scripts
            args = script.resolve(script.Args(env=env, diffusion_recipe=recipe), *num_rows)
            assert {key: getattr(args, key) for key in fast} == fast and args.diffusion_batch_size == 256
            args = script.resolve(script.Args(env=env, diffusion_recipe=recipe, diffusion_width=8), *num_rows)
            assert args.diffusion_width == 8 and args.diffusion_depth == fast["diffusion_depth"]


def test_steps_choose_the_recipe():
    """The paper's from the paper's number of steps on, as where the dataset says so; fast for less."""
    for script in SCRIPTS:
        num_rows = [1_000_000] if script in OFFLINE else []
        for steps, recipe in ((100_000, "paper"), (99_999, "fast")):
            args = script.resolve(script.Args(env="Hopper-v4", diffusion_steps=steps), *num_rows)
            sizes = {key: getattr(args, f"diffusion_{key}") for key in edm.RECIPES[recipe]}
            assert args.diffusion_recipe == recipe and sizes == edm.RECIPES[recipe]
        args = script.resolve(script.Args(env="Hopper-v4", diffusion_steps=50, diffusion_recipe="paper"), *num_rows)
        assert (args.diffusion_width, args.diffusion_depth) == (1024, 6)
        assert script.resolve(script.Args(env="Hopper-v4"), *num_rows).diffusion_recipe == "paper"
    for script in (*OFFLINE, synther_sac_online):  # the small runs that need no arguments
        args = script.resolve(script.Args(), *([40_000] if script in OFFLINE else []))
        assert args.diffusion_recipe == "fast" and args.diffusion_width == edm.RECIPES["fast"]["width"]


def test_offline_scripts_share_arguments():
    """Outside the agent, the three offline scripts have the same arguments in the same order, and the same sections."""
    agents = {
        "policy_noise", "noise_clip", "policy_freq", "alpha", "expectile", "beta", "deterministic", "tanh_mean",
        "num_critics", "eta",
    }  # fmt: skip
    orders = [[name for name in arguments(script) if name not in agents] for script in OFFLINE]
    assert orders[0] == orders[1] == orders[2]
    sections = [
        [line for line in Path(script.__file__).read_text().splitlines() if line.startswith("# --- ")]
        for script in OFFLINE
    ]
    assert sections[0] == sections[1] == sections[2] and len(sections[0]) == 6


# --- Whole runs -------------------------------------------------------------------------------------------------------

TINY = dict(
    device="cpu", diffusion_steps=500, diffusion_width=32, diffusion_depth=2, diffusion_batch_size=64,
    num_samples=1_500, sample_batch_size=1_000, updates=1_000, hidden_dim=16, batch_size=32, eval_every=500,
    eval_episodes=2, subsample=2_000,
)  # fmt: skip


def run(script, out_dir, **options):
    """main() with these arguments; returns the run folder."""
    before = set(Path(out_dir).glob("*__*"))
    script.main(script.Args(out_dir=str(out_dir), **options))
    (folder,) = set(Path(out_dir).glob("*__*")) - before
    return folder


@pytest.fixture(scope="module")
def quickstarts(tmp_path_factory):
    """{script: folder of a small run of its default command}."""
    folders = {}
    for script in OFFLINE:
        folders[script] = run(script, tmp_path_factory.mktemp("runs"), seed=3, **TINY)
    return folders


@pytest.mark.parametrize("script", SIBLINGS, **IDS)
def test_same_files_and_log_keys(quickstarts, script):
    folder, other = quickstarts[script], quickstarts[synther_td3bc]
    assert folder.name.startswith(f"quickstart__{script.__name__}__3__")
    assert {p.name for p in folder.iterdir()} == {p.name for p in other.iterdir()}
    keys, others = ({key for _, key in read_metrics(f)} for f in (folder, other))
    assert keys - others == {f"train/{name}" for name in script.LOSSES} - others and others <= keys
    with np.load(folder / "final_returns.npz") as a, np.load(other / "final_returns.npz") as b:
        assert a.files == b.files and all(a[key].shape == b[key].shape for key in a.files)
    args = json.loads((folder / "args.json").read_text())
    unset = {name for name in args if args[name] is None}
    assert unset <= {"dataset_path", "wandb_entity", "resume", "synthetic_path", "sample_batch_size"}


def test_online_run_has_the_same_files_and_log_keys(quickstarts, tmp_path):
    options = dict(
        env="HalfCheetah-v4", device="cpu", total_steps=300, learning_starts=100, utd=2, hidden_dim=16, batch_size=32,
        eval_every=100, eval_episodes=1, retrain_every=150, diffusion_steps=500, diffusion_width=16, diffusion_depth=2,
        num_samples=500,
    )  # fmt: skip
    folder, other = run(synther_sac_online, tmp_path, **options), quickstarts[synther_td3bc]
    assert {p.name for p in folder.iterdir()} == {p.name for p in other.iterdir()}
    keys, others = ({key for _, key in read_metrics(f)} for f in (folder, other))
    assert keys - others == {"train/alpha", "diffusion/steps", "perf/diffusion_seconds"} and others <= keys


def test_learning_rate_of_iql_falls_during_a_run(quickstarts):
    checkpoint = torch.load(quickstarts[synther_iql] / "checkpoint.pt", weights_only=True)
    (actor_group,), (critic_group,) = (
        checkpoint["agent"][f"{name}_optimizer"]["param_groups"] for name in ("actor", "critic")
    )
    assert actor_group["lr"] == edm.cosine_lr(3e-4, 999, 1_000) < 1e-8 and critic_group["lr"] == 3e-4


@pytest.mark.parametrize("script", SIBLINGS, **IDS)
def test_same_synthetic_data_for_all_agents(quickstarts, tmp_path, script):
    """The diffusion stage is the same in all offline scripts, so that any can use another's samples."""
    folder, other = quickstarts[script], quickstarts[synther_td3bc]
    with np.load(folder / "synthetic.npz") as a, np.load(other / "synthetic.npz") as b:
        for key in b.files:
            np.testing.assert_array_equal(a[key], b[key])
    again = run(script, tmp_path, seed=3, synthetic_path=str(other / "synthetic.npz"), **TINY)
    checkpoints = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (again, folder)]
    for checkpoint in checkpoints:
        checkpoint.pop("seconds")
    assert_same_state(*checkpoints)


@pytest.mark.parametrize("script", OFFLINE, **IDS)
def test_agent_learns_from_synthetic_data(tmp_path, script):
    """From random data alone, each agent comes closer to the best policy of a simple task."""
    data = write_npz(tmp_path / "data.npz", collect_random("Point-v0", 5_000))
    options = dict(
        env="Point-v0", dataset_path=data, diffusion_steps=1_500, diffusion_width=64, diffusion_depth=2,
        diffusion_lr=3e-3, num_samples=10_000, updates=2_000, hidden_dim=64, batch_size=128, learning_rate=1e-3,
        tau=0.02, discount=0.8, eval_every=2_000, eval_episodes=20, device="cpu",
    )  # fmt: skip
    options |= {
        synther_td3bc: dict(alpha=100.0),
        synther_iql: dict(beta=30.0),
        synther_edac: dict(eta=0.1, num_critics=4, updates=4_000, eval_every=4_000),
    }[script]
    folder = run(script, tmp_path / "runs", **options)
    trained = np.load(folder / "final_returns.npz")["returns"][-1].mean()
    envs = [script.make_env("Point-v0") for _ in range(20)]
    torch.manual_seed(0)
    chance = script.evaluate(lambda obs: 2 * torch.rand_like(obs) - 1, envs, seed=0).mean()
    best = script.evaluate(lambda obs: (-10 * obs).clamp(-1, 1), envs, seed=0).mean()
    assert (trained - chance) / (best - chance) > 0.7, (chance, trained, best)


AGENTS = {synther_td3bc: "TD3BC", synther_iql: "IQL", synther_edac: "EDAC"}


@pytest.mark.parametrize("script", OFFLINE, **IDS)
@pytest.mark.parametrize("data", ["real", "synther", "mixed"])
def test_what_the_agent_gets(tmp_path, monkeypatch, script, data):
    """States, also those it acts on, are scaled by the real rows' statistics (not for EDAC), rewards by their returns.

    Rewards tell real (1 or 2), synthetic (4) and surplus synthetic (8) rows apart.
    """
    rng, batches, acted_on = np.random.default_rng(0), [], []

    def rows(n, mean, std, rewards, terminals):
        x = {k: rng.standard_normal((n, 3)) * std + mean for k in ("observations", "next_observations")}
        return x | {"actions": rng.uniform(-2, 2, (n, 1)), "rewards": rewards, "terminals": terminals}

    rewards = np.repeat([1.0, 2.0], 200)  # of episodes of 20 rows: returns of 20 and 40
    real = rows(400, 5, 2, rewards, np.arange(400) % 20 == 19)
    synthetic = rows(1_000, 9, 4, np.repeat([4.0, 8.0], [400, 600]), rng.random(1_000) < 0.2)
    agent_class = getattr(script, AGENTS[script])
    update = "update_critic" if script is synther_td3bc else "update"
    original, evaluate = getattr(agent_class, update), script.evaluate

    def recording(self, batch):
        batches.append(batch.clone())
        return original(self, batch)

    def recording_evaluate(policy, envs, seed):
        acted_on.append(policy(torch.tensor([[5.0, 5.0, 5.0], [7.0, 7.0, 7.0]])))
        return evaluate(policy, envs, seed)

    monkeypatch.setattr(agent_class, update, recording)
    monkeypatch.setattr(script, "evaluate", recording_evaluate)
    options = dict(
        env="Pendulum-v1", dataset_path=write_npz(tmp_path / "real.npz", real), data=data, updates=60, hidden_dim=8,
        synthetic_path=write_npz(tmp_path / "synthetic.npz", synthetic), eval_episodes=1, device="cpu",
        normalize_reward=True,
    )  # fmt: skip
    if data == "real":
        del options["synthetic_path"]
    agents = []
    init = agent_class.__init__
    monkeypatch.setattr(agent_class, "__init__", lambda self, *a: agents.append(self) or init(self, *a))
    run(script, tmp_path / "runs", **options)
    seen, scale = torch.cat(batches), 1000 / 20
    seen[:, 4] /= scale
    values = sorted(set(seen[:, 4].round(decimals=3).tolist()))
    assert values == {"real": [1, 2], "synther": [4, 8], "mixed": [1, 2, 4]}[data]
    if data == "mixed":
        assert (seen[:, 4] == 4).float().mean().item() == pytest.approx(0.5, abs=0.03)
    mean, std = (0, 1) if script is synther_edac else (5, 2)  # what is subtracted, and divided by
    for part, center, spread in ((seen[seen[:, 4] < 3], 5, 2), (seen[seen[:, 4] > 3], 9, 4)):
        for states in (part[:, :3], part[:, 5:8]):
            if len(part):
                assert states.mean().item() == pytest.approx((center - mean) / std, abs=0.3)
                assert states.std().item() == pytest.approx(spread / std, rel=0.1)
    with torch.no_grad():
        expected = agents[0].actor((torch.tensor([[5.0] * 3, [7.0] * 3]) - mean) / std)
    torch.testing.assert_close(acted_on[-1], expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("script", OFFLINE, **IDS)
def test_augmentation_is_in_units_of_the_states(tmp_path, monkeypatch, script):
    """Additive noise has a tenth of each state's standard deviation, also where states are not normalised."""
    data, batches = transitions(300, act_dim=1), []
    data["observations"] = data["next_observations"] = data["observations"] * [1.0, 10.0, 100.0]
    agent_class = getattr(script, AGENTS[script])
    update = "update_critic" if script is synther_td3bc else "update"
    original = getattr(agent_class, update)
    monkeypatch.setattr(agent_class, update, lambda self, batch: batches.append(batch.clone()) or original(self, batch))
    options = dict(env="Pendulum-v1", dataset_path=write_npz(tmp_path / "data.npz", data), data="real", updates=40)
    run(script, tmp_path, **options, hidden_dim=8, eval_episodes=0, device="cpu", augment="additive")
    seen = torch.cat(batches)
    torch.testing.assert_close(seen[:, :3], seen[:, 5:8], atol=1e-3, rtol=1e-3)  # one noise for s and s'
    states = torch.from_numpy(data["observations"]).float()
    if script is not synther_edac:
        states = (states - states.mean(0)) / (states.std(0, unbiased=False) + 1e-3)
    row = torch.from_numpy(data["rewards"]).float()
    index = (seen[:, 4:5] - row).abs().argmin(1)  # rewards tell which row it was
    noise = (seen[:, :3] - states[index]).std(0) / states.std(0)
    torch.testing.assert_close(noise, torch.full((3,), 0.1), atol=0.005, rtol=0)


@pytest.mark.parametrize("script", SIBLINGS, **IDS)
def test_diverging_agent_stops_the_run(tmp_path, script):
    path = write_npz(tmp_path / "data.npz", transitions(100, act_dim=1))
    options = TINY | dict(env="Pendulum-v1", dataset_path=path, data="real", learning_rate=1e30, subsample=None)
    with pytest.raises(RunError, match="loss of the agent .* between updates 0 and 1000"):
        run(script, tmp_path / "runs", **options)


@pytest.mark.parametrize("script", OFFLINE, **IDS)
@pytest.mark.parametrize("env_id", ["maze2d-umaze-v1", "antmaze-umaze-v2"])
def test_mazes_run(tmp_path, script, env_id):
    """From data to score, with random actions' data."""
    data = write_npz(tmp_path / "data.npz", collect_random(env_id, 600))
    options = dict(TINY, env=env_id, dataset_path=data, updates=100, diffusion_steps=100, subsample=None)
    folder = run(script, tmp_path / "runs", **options)
    with np.load(folder / "final_returns.npz") as f:
        low, high = (23.85, 161.86) if env_id.startswith("maze2d") else (0, 1)
        np.testing.assert_allclose(f["normalized_scores"], 100 * (f["returns"] - low) / (high - low))


# --- The command line -------------------------------------------------------------------------------------------------


def command(script, *options):
    return [sys.executable, script.__file__, "--device", "cpu", *map(str, options)]


@pytest.mark.parametrize(
    "script, options",
    [
        (synther_iql, ["--expectile", "1.5"]),
        (synther_edac, ["--num-critics", "1"]),
    ]
    + [
        (script, options)
        for script in SIBLINGS
        for options in (
            ["--env", "walker3d-medium-v2"],
            ["--updates", "0"],
            ["--subsample", "2.5"],
            ["--resume", "other_run"],
            ["--tau", "1.5"],
            ["--data", "mixed", "--num-samples", "5"],
            ["--env", "Pendulum-v1", "--dataset-path", "data.npz", "--data", "real", "--normalize-reward", "True"],
        )
    ],
    ids=lambda value: value[-2].lstrip("-") if isinstance(value, list) else value.__name__,
)
def test_bad_command_ends_in_one_sentence(tmp_path, script, options):
    """Exit code 2, one line that begins with `error:`, no traceback, nothing made."""
    (tmp_path / "other_run").mkdir()
    (tmp_path / "other_run/args.json").write_text(json.dumps(vars(synther_td3bc.Args())))  # another script's
    write_npz(tmp_path / "data.npz", transitions(50, act_dim=1) | {"terminals": np.zeros(50)})
    before = sorted(tmp_path.rglob("*"))
    result = subprocess.run(
        command(script, *options), cwd=tmp_path, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL
    )
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and "Traceback" not in result.stderr, lines
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert sorted(tmp_path.rglob("*")) == before


def agent_updates(folder):
    """Updates in the checkpoint, if the agent has begun."""
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True).get("update", 0) if path.exists() else 0


@pytest.mark.parametrize("script", SIBLINGS, **IDS)
def test_killed_run_equals_uninterrupted(tmp_path, script):
    """Killed while the diffusion model and while the agent trains: the same numbers at the end, and again."""
    data = write_npz(tmp_path / "data.npz", collect_random("Pendulum-v1", 1_000))
    options = flags(
        env="Pendulum-v1", dataset_path=data, seed=1, diffusion_steps=600, diffusion_width=32, diffusion_depth=2,
        diffusion_batch_size=64, num_samples=2_000, updates=1_600, hidden_dim=16, batch_size=64, eval_every=400,
        eval_episodes=1, checkpoint_every=150,
    )  # fmt: skip
    subprocess.run(command(script, *options, "--out-dir", "whole"), cwd=tmp_path, capture_output=True, check=True)
    (whole,) = (tmp_path / "whole").iterdir()

    begun = lambda folder: (folder / "checkpoint.pt").exists() and not (folder / "diffusion.pt").exists()  # noqa: E731
    folder = wait_and_kill(command(script, *options), tmp_path, begun)
    resume = command(script, "--resume", folder)
    wait_and_kill(resume, tmp_path, lambda folder: agent_updates(folder) >= 450)
    subprocess.run(resume, cwd=tmp_path, capture_output=True, check=True, timeout=200)

    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    for name in ("final_returns.npz", "synthetic.npz"):
        with np.load(folder / name) as a, np.load(whole / name) as b:
            for key in b.files:
                np.testing.assert_array_equal(a[key], b[key], err_msg=f"{name}: {key}")
    a, b = (edm.load_file(f / "checkpoint.pt", "cpu") for f in (folder, whole))
    del a["seconds"], b["seconds"]
    assert_same_state(a, b)
    metrics = [
        [line for line in (f / "metrics.csv").read_text().splitlines() if ",perf/" not in line] for f in (folder, whole)
    ]
    assert metrics[0] == metrics[1] and len(metrics[1]) > 10
