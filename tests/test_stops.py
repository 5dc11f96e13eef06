"""Runs that get a signal at any moment go on with --resume. `--kills 4`: four of each script."""

import itertools
import os
import random
import re
import signal
import sys
import time
import warnings

import gymnasium as gym
import numpy as np
import pytest
from helpers import assert_same_state, collect_random, command, read_metrics, run, write

import edm
import synther_edac
import synther_iql
import synther_sac_online
import synther_td3bc
import synther_vd4rl
from tests.test_synther_vd4rl import make_files

SCRIPTS = [synther_td3bc, synther_iql, synther_edac, synther_vd4rl, synther_sac_online]


def prepare(script, folder):
    """Options of a small run, and in the folder the data that it needs."""
    options = dict(device="cpu", seed=1, hidden_dim=16, diffusion_steps=300, diffusion_width=16)
    options |= dict(diffusion_depth=1, num_samples=1_000, sample_batch_size=50)
    if script is not synther_sac_online:
        options |= dict(checkpoint_every=70)
    if script is synther_vd4rl:
        make_files(folder / "vd4rl", np.array([8, 8, 8]))
        options |= dict(dataset_path=str(folder / "vd4rl"), feature_dim=4, batch_size=4)
        return options | dict(stage1_updates=8, stage2_updates=40, eval_every=6, eval_episodes=0)
    options |= dict(env="Pendulum-v1", eval_every=100, eval_episodes=1)
    if script is synther_sac_online:
        return options | dict(total_steps=250, learning_starts=50, retrain_every=125, utd=1)
    data = collect_random(gym.make("Pendulum-v1"), 300)
    options |= dict(updates=300, batch_size=32)
    return options | dict(dataset_path=write(folder / "data.npz", data))


def pytest_generate_tests(metafunc):
    if "kill" in metafunc.fixturenames:
        pairs = itertools.product(SCRIPTS, range(metafunc.config.getoption("kills")))
        metafunc.parametrize("script, kill", list(pairs), scope="module")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, script):
    """Options of a run that is not stopped, its folder, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("whole")
    options = prepare(script, folder)
    done = run(script, folder / "runs", **options)
    return options, done, time.time() - os.path.getmtime(done / "args.json")


def signalled(script, out_dir, options, number, seconds):
    """The folder of a run that got a signal in another process, its exit status, its last words."""
    with warnings.catch_warnings(action="ignore"):  # about threads of the progress bars
        pid = os.fork()
    if pid == 0:
        status = 0
        sys.stdout = sys.stderr = open(out_dir.parent / "said.txt", "w", buffering=1)
        try:
            script.main(script.Args(out_dir=str(out_dir), **options))
        except SystemExit as end:
            print(end)
            status = 1
        finally:
            os._exit(status)
    made = []
    deadline = time.time() + 60
    while not made and time.time() < deadline:
        made = list(out_dir.glob("*/args.json"))
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(pid, number)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return made[0].parent, status, (out_dir.parent / "said.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    "script, owner, name, call, progress",
    [
        (synther_td3bc, edm.EDM, "loss", 45, dict(stage="diffusion", step=45)),
        (synther_td3bc, synther_td3bc.TD3BC, "update_critic", 32, dict(stage="agent", update=32)),
        (synther_vd4rl, synther_vd4rl.DrQBC, "update", 5, dict(stage="stage1", update=5)),
        (synther_vd4rl, synther_vd4rl.DrQBC, "update", 8 + 12, dict(stage="stage2", update=12)),
        (synther_sac_online, edm.EDM, "loss", 45, dict(step=125)),  # this model begins anew
        (synther_sac_online, synther_sac_online.SAC, "update", 32, dict(step=82)),
    ],
)
def test_signal_saves_the_step_in_progress(
    tmp_path, monkeypatch, script, owner, name, call, progress
):
    """The run ends after the step in which the signal comes, and has saved it."""
    number = signal.SIGINT if call % 2 else signal.SIGTERM
    calls = []
    original = getattr(owner, name)

    def signalling(*args, **options):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, signalling)
    with pytest.raises(SystemExit, match="stopped: go on with python .* --resume .*runs"):
        run(script, tmp_path / "runs", **prepare(script, tmp_path))
    (folder,) = (tmp_path / "runs").iterdir()
    saved = edm.load_torch(folder / "checkpoint.pt")
    assert len(calls) == call and {key: saved[key] for key in progress} == progress


def test_signalled_run_goes_on(tmp_path, monkeypatch, script, kill, whole):
    """After Ctrl-C, SIGTERM or SIGKILL. Offline and from pixels the end is that of a run never
    stopped, to the last bit. Online the buffer is whole, and a new episode begins."""
    options, done, seconds = whole
    chance = random.Random(f"{script.__name__}{kill}")
    number = chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    moment = chance.uniform(0.1, 0.9) * seconds
    folder, status, said = signalled(script, tmp_path / "runs", options, number, moment)
    if status == 1:
        assert re.fullmatch(rf"stopped: go on with python \S+ --resume {folder}", said)
    else:
        assert status in (-number, 0)  # 0: it had ended already
    command(monkeypatch, script, resume=folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in done.iterdir()}
    if script is synther_sac_online:
        saved = edm.load_torch(folder / "checkpoint.pt")
        assert saved["step"] == len(saved["replay"]) == 250 and len(saved["evaluations"]) == 4
        assert 2 <= edm.episode_starts(saved["replay"], 3).sum() <= 3  # one is the time limit's
        return
    for path in done.glob("*.pt"):
        states = [edm.load_torch(own / path.name) for own in (folder, done)]
        for state in states if path.stem == "checkpoint" else ():
            del state["seconds"], state["log_size"]
        assert_same_state(*states, path.name)
    logs = []
    for own in (folder, done):
        logs.append({key: x for key, x in read_metrics(own).items() if "perf/" not in key[1]})
    np.testing.assert_equal(*logs)
