"""A run that gets a signal in the middle of a step saves it, and goes on with --resume."""

import os
import signal

import gymnasium as gym
import numpy as np
import pytest
from helpers import assert_same_state, collect_random, command, outcome, run, write

import edm
import synther_sac_online
import synther_td3bc
import synther_vd4rl
from tests.test_synther_vd4rl import make_files


def prepare(script, folder):
    """Options of a small run, and in the folder the data that it needs."""
    options = dict(device="cpu", seed=1, hidden_dim=16, diffusion_steps=300, diffusion_width=16)
    options |= dict(diffusion_depth=1, num_samples=1_000, checkpoint_every=70)
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
def test_signalled_run_goes_on(tmp_path, monkeypatch, script, owner, name, call, progress):
    """To the end of a run never stopped, to the last bit. Online a new episode begins."""
    number = signal.SIGINT if call % 2 else signal.SIGTERM
    options = prepare(script, tmp_path)
    calls = []
    original = getattr(owner, name)

    def signalling(*args, **options):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalling)
        with pytest.raises(SystemExit, match="stopped: go on with python .* --resume '.*my runs/"):
            run(script, tmp_path / "my runs", **options)
    (folder,) = (tmp_path / "my runs").iterdir()
    saved = edm.load_torch(folder / "checkpoint.pt")
    assert len(calls) == call and {key: saved[key] for key in progress} == progress
    edm.Bar.stop = None
    command(monkeypatch, script, resume=folder)
    if script is synther_sac_online:
        saved = edm.load_torch(folder / "checkpoint.pt")
        assert saved["step"] == len(saved["replay"]) == 250 and len(saved["evaluations"]) == 4
        assert 2 <= edm.episode_starts(saved["replay"], 3).sum() <= 3  # one is the time limit's
        return
    done = run(script, tmp_path / "whole", **options)
    assert_same_state(outcome(folder), outcome(done))
