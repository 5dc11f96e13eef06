"""What tests share: small datasets, runs in this process, comparisons."""

import csv
import itertools
import os
import re
import runpy
import shutil
import signal
import sys
import warnings
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

import edm


def d4rl_rows(n, obs_dim=3, act_dim=2, seed=0):
    """The arrays of a D4RL file. All numbers differ, so that mixed-up rows show."""
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.standard_normal((n, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, act_dim)).astype(np.float32),
        "rewards": rng.standard_normal(n).astype(np.float32),
        "next_observations": rng.standard_normal((n, obs_dim)).astype(np.float32),
        "terminals": rng.random(n) < 0.1,
        "timeouts": rng.random(n) < 0.1,
    }


def episodes(n):
    """`d4rl_rows` whose s' is the s of the next row, but at the ends of episodes."""
    raw = d4rl_rows(n)
    going_on = np.flatnonzero(~raw["terminals"][:-1] & ~raw["timeouts"][:-1])
    raw["next_observations"][going_on] = raw["observations"][going_on + 1]
    return raw


def transitions(n, **options):
    return {key: x for key, x in d4rl_rows(n, **options).items() if key in edm.KEYS}


def collect_random(env, num_steps):
    """Transitions of uniformly random actions in an environment."""
    env.action_space.seed(0)
    steps = []
    obs, _ = env.reset(seed=0)
    for _ in range(num_steps):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        steps.append((obs, action, reward, next_obs, terminated))
        obs = env.reset()[0] if terminated or truncated else next_obs
    return {key: np.array(x) for key, x in zip(edm.KEYS, zip(*steps))}


def random_rows(n):
    """Rows [s, a, r, s', d] with 3 and 2 dimensions of s and a."""
    return torch.cat([torch.randn(n, 9), 1.0 * (torch.rand(n, 1) > 0.8)], dim=1)


def assert_same_losses(update, plain_update, num_updates, rel=1e-9, abs=0):
    """That every loss is the same shows that all parameters are. update gets a number and rows."""
    for i in range(num_updates):
        batch = random_rows(32)
        torch.manual_seed(i)
        losses = update(i, batch).tolist()
        torch.manual_seed(i)
        expected = plain_update(i, *batch.split([3, 2, 1, 3, 1], 1))
        assert losses == pytest.approx(expected, rel=rel, abs=abs)


def filled(script, **options):
    """Arguments of a script as its main fills them."""
    args = script.Args(**dict(device="cpu") | options)
    script.fill_args(args)
    return args


def write(path, arrays):
    """Write arrays to an .npz or HDF5 file. Returns the path as a string."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as f:
            f.update(arrays)
    return str(path)


def make_files(folder, lengths, level="expert", per_file=1):
    """Episodes of noise in V-D4RL's layout. All numbers differ. Returns the arrays of all files."""
    rng = np.random.default_rng(0)
    n = sum(lengths)
    ends = np.cumsum(lengths)
    data = {
        "observation": rng.integers(0, 256, (n, 3, 84, 84), dtype=np.uint8),
        "action": rng.uniform(-1, 1, (n, 6)).astype(np.float32),
        "reward": rng.standard_normal(n).astype(np.float32),
        "discount": rng.uniform(0.5, 1, n).astype(np.float32),
        "step_type": np.ones(n, np.int64),
    }
    data["step_type"][ends - lengths] = 0
    data["step_type"][ends - 1] = 2
    for key in ("action", "reward", "discount"):
        data[key][ends - lengths] = np.nan  # these are never read
    folder = Path(folder) / "main/walker_walk" / level / "84px"
    folder.mkdir(parents=True)
    (folder / "._0.hdf5").touch()  # nor is this, which some systems make
    bounds = [0, *ends[per_file - 1 : -1 : per_file], n]
    for i, (first, end) in enumerate(zip(bounds, bounds[1:])):
        with h5py.File(folder / f"part_{i:02}.hdf5", "w") as f:
            f.update({key: x[first:end] for key, x in data.items()})
    return data


def make_minari(monkeypatch, folder, **options):
    """A Minari dataset test/two-v0: a terminated episode, a truncated one. Returns its rows."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    buffers = []
    parts = []
    for i, n in enumerate([7, 5]):
        raw = d4rl_rows(n + 1, act_dim=1, seed=i)
        obs = raw["observations"]
        steps = (raw["actions"][:n], raw["rewards"][:n])
        last = np.arange(n) == n - 1
        ends = (last & (i == 0), last & (i == 1))  # terminated, truncated
        buffers.append(EpisodeBuffer(i, None, None, obs, *steps, *ends))
        parts.append((obs[:-1], *steps, obs[1:], ends[0]))
    with warnings.catch_warnings(action="ignore"):
        minari.create_dataset_from_buffers("test/two-v0", buffers, **options)
    return {key: np.concatenate(x) for key, x in zip(edm.KEYS, zip(*parts))}


def command(monkeypatch, script, **options):
    """Run a script as from the shell, `python script.py --name value ...`, but in this process."""
    words = [script.__file__]
    for key, value in options.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(script.__file__, run_name="__main__")


def assert_refused(monkeypatch, capsys, folder, script, message, **options):
    """Exit code 2, one line that begins with `error:`, nothing made and nothing changed."""
    before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, script, **options)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and re.search(message, line)
    assert {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")} == before


def run(script, out_dir, **options):
    """main() of a script with these arguments. Returns the run folder."""
    before = set(Path(out_dir).glob("*"))
    script.main(script.Args(out_dir=str(out_dir), **options))
    (folder,) = set(Path(out_dir).glob("*")) - before
    return folder


def watch(monkeypatch, owner, name, see):
    """From now on, see(...) is called before owner.name(...)."""
    original = getattr(owner, name)

    def watched(*args, **options):
        see(*args, **options)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, watched)


def copy_before_writes(monkeypatch, target):
    """Before a file is replaced, its folder is copied to target/0, ...: what a kill leaves."""
    numbers = itertools.count()

    def copy(path, write):
        shutil.copytree(Path(path).parent, target / str(next(numbers)))

    watch(monkeypatch, edm, "save_atomically", copy)


def stopped_run(monkeypatch, script, out_dir, owner, name, call, progress=None, **options):
    """The folder of a run that ends in this call of owner.name. It is killed, or if its progress is
    given, it gets a signal and saves that."""
    calls = []

    def stop(*args, **options):
        calls.append(0)
        if len(calls) == call:
            if progress is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT if call % 2 else signal.SIGTERM)

    ends = pytest.raises(KeyboardInterrupt)
    if progress:
        ends = pytest.raises(SystemExit, match="stopped: go on with python .* --resume '.*my runs/")
    with monkeypatch.context() as patch, ends:
        watch(patch, owner, name, stop)
        run(script, out_dir / "my runs", **options)
    folder = max((out_dir / "my runs").iterdir(), key=os.path.getmtime)
    if progress:
        saved = edm.load_torch(folder / "checkpoint.pt")
        assert len(calls) == call and {key: saved[key] for key in progress} == progress
    edm.Bar.stop = None
    return folder


def read_metrics(folder):
    """{(step, key): value} of a run's log, where no entry comes twice."""
    with open(folder / "metrics.csv") as f:
        rows = [((int(row["step"]), row["key"]), float(row["value"])) for row in csv.DictReader(f)]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def assert_same_state(a, b, where="state"):
    """Equality to the last bit of nested dicts, lists, tensors, arrays and numbers."""
    if isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b), where
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        np.testing.assert_array_equal(a, b, err_msg=where)


def outcome(folder):
    """{file: content} of a run, without its times and its plots' contents, the log in its order."""
    left = {path.name: None for path in folder.iterdir()}
    for path in folder.glob("*.pt"):
        left[path.name] = edm.load_torch(path)
    for path in folder.glob("*.npz"):
        with np.load(path) as f:
            left[path.name] = dict(f)
    for key in ("seconds", "log_size"):
        left["checkpoint.pt"].pop(key)
    log = read_metrics(folder)
    left["metrics.csv"] = [item for item in log.items() if "perf/" not in item[0][1]]
    return left
