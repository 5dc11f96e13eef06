"""Runs that get a signal at a random moment go on with --resume. `pytest tests/test_stops.py --kills 4`: 20 of them."""

import os
import random
import re
import signal
import sys
import time
import warnings

import numpy as np
import pytest
from helpers import assert_same_state, collect_random, command, read_metrics, run, write
from test_synther_vd4rl import make_files

import edm
import synther_edac
import synther_iql
import synther_sac_online
import synther_td3bc
import synther_vd4rl

DIFFUSION = dict(
    diffusion_steps=300,
    diffusion_width=16,
    diffusion_depth=1,
    num_samples=3_000,
    sample_batch_size=100,
)
OFFLINE = dict(
    env="Pendulum-v1", updates=300, hidden_dim=16, batch_size=32, eval_every=100, eval_episodes=1
)
OPTIONS = {
    synther_td3bc: OFFLINE,
    synther_iql: OFFLINE,
    synther_edac: OFFLINE,
    synther_vd4rl: dict(stage1_updates=8, stage2_updates=40, batch_size=4, hidden_dim=16, feature_dim=4,
                        eval_episodes=0),
    synther_sac_online: dict(env="Pendulum-v1", total_steps=300, learning_starts=50, retrain_every=100, utd=1,
                             hidden_dim=16, eval_every=100, eval_episodes=1),
}  # fmt: skip


def pytest_generate_tests(metafunc):
    if "kill" in metafunc.fixturenames:
        kills = range(metafunc.config.getoption("kills"))
        metafunc.parametrize(
            "script, kill", [(script, i) for script in OPTIONS for i in kills], scope="module"
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, script):
    """Options of a run that is not stopped, its folder, and the seconds that it took from when the folder was made."""
    folder = tmp_path_factory.mktemp("whole")
    options = OPTIONS[script] | DIFFUSION | dict(checkpoint_every=70, device="cpu", seed=1)
    if script is synther_vd4rl:
        make_files(folder / "vd4rl", np.array([8, 8, 8]))
        options |= dict(dataset_path=str(folder / "vd4rl"), checkpoint_every=3)
    elif script is not synther_sac_online:
        options |= dict(dataset_path=write(folder / "data.npz", collect_random("Pendulum-v1", 300)))
    done = run(script, folder / "runs", **options)
    return options, done, time.time() - os.path.getmtime(done / "args.json")


def signalled(script, out_dir, options, number, seconds):
    """The folder of a run in another process that got a signal, its exit status, and what it said last."""
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
    made, deadline = [], time.time() + 60
    while not made and time.time() < deadline:
        made = list(out_dir.glob("*/args.json"))
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(pid, number)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return made[0].parent, status, (out_dir.parent / "said.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "script, owner, name, call, progress",
    [
        (synther_td3bc, edm.EDM, "loss", 45, dict(stage="diffusion", step=45)),
        (synther_td3bc, synther_td3bc.TD3BC, "update_critic", 33, dict(stage="agent", update=33)),
        (synther_iql, synther_iql.IQL, "update", 33, dict(stage="agent", update=33)),
        (synther_edac, synther_edac.EDAC, "update", 33, dict(stage="agent", update=33)),
        (synther_vd4rl, synther_vd4rl.Agent, "update", 5, dict(stage="stage1", update=5)),
        (synther_vd4rl, synther_vd4rl.Agent, "update", 8 + 13, dict(stage="stage2", update=13)),
        (synther_sac_online, synther_sac_online.SAC, "update", 33, dict(step=83)),
    ],
)
def test_signal_saves_the_step_in_progress(
    tmp_path, monkeypatch, script, owner, name, call, progress, number
):
    """It comes within a step, far from any regular checkpoint. The run ends after this step, and has saved it."""
    options = (
        OPTIONS[script]
        | DIFFUSION
        | dict(checkpoint_every=70, device="cpu", out_dir=str(tmp_path / "runs"))
    )
    if script is synther_vd4rl:
        make_files(tmp_path / "vd4rl", np.array([8, 8, 8]))
        options |= dict(dataset_path=str(tmp_path / "vd4rl"))
    elif script is not synther_sac_online:
        options |= dict(
            dataset_path=write(tmp_path / "data.npz", collect_random("Pendulum-v1", 300))
        )
    original, calls = getattr(owner, name), []

    def signalling(*args, **kwargs):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalling)
    with pytest.raises(SystemExit, match="stopped: go on with python .* --resume .*runs"):
        script.main(script.Args(**options))
    (folder,) = (tmp_path / "runs").iterdir()
    saved = edm.load_file(folder / "checkpoint.pt")
    assert len(calls) == call and {key: saved[key] for key in progress} == progress


def test_signalled_run_goes_on(tmp_path, monkeypatch, script, kill, whole):
    """Ctrl-C and SIGTERM save and name the command that goes on. SIGKILL leaves the last checkpoint. Offline and from
    pixels the end is that of a run never stopped, to the last bit.

    Online the buffer is whole, and a new episode begins.
    """
    options, done, seconds = whole
    chance = random.Random(f"{script.__name__}{kill}")
    number = chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    folder, status, said = signalled(
        script, tmp_path / "runs", options, number, chance.uniform(0.1, 0.9) * seconds
    )
    if status == 1:
        assert re.fullmatch(rf"stopped: go on with python \S+ --resume {folder}", said)
    else:
        assert status in (-number, 0)  # 0: it had ended already
    command(monkeypatch, script, resume=folder)
    if script is synther_sac_online:
        saved = edm.load_file(folder / "checkpoint.pt")
        rows, timeouts = saved["replay"], saved["timeouts"]
        assert saved["step"] == len(rows) == 300 and len(saved["evaluations"]) == 4
        assert (
            (rows[:-1, 5:8] == rows[1:, :3]).all(1) | timeouts[:-1]
        ).all() and timeouts.sum() <= 3
        return
    assert {path.name for path in folder.iterdir()} == {path.name for path in done.iterdir()}
    for path in (path for path in done.iterdir() if path.suffix == ".pt"):
        states = [edm.load_file(f / path.name) for f in (folder, done)]
        for state in states if path.name == "checkpoint.pt" else ():
            del state["seconds"], state["log_size"]
        assert_same_state(*states, path.name)
    logs = (
        {key: x for key, x in read_metrics(f).items() if "perf/" not in key[1]}
        for f in (folder, done)
    )
    np.testing.assert_equal(*logs)
