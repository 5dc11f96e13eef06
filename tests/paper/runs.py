"""What the studies share: runs of the scripts, each made once, and environments of the DeepMind Control suite.

Where this folder is on PYTHONPATH, an environment is named as `--env runs:reacher-easy-v0`.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import gymnasium as gym
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
ENVIRON = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/paper")])}

gym.register("reacher-easy-v0", "synther_sac_online:DMC", max_episode_steps=1000,
             kwargs=dict(domain="reacher", task="easy"))  # fmt: skip


def run(out, name, script, **options):
    """The folder of a finished run of a script with these options, in out/name. It is made if it is not there, and goes
    on if it was stopped. The program ends if it was made with other options."""
    made = sorted((out / name).glob("*/args.json"))
    if made:
        folder, saved = made[-1].parent, json.loads(made[-1].read_text())
        if changed := [key for key, value in options.items() if saved[key] != value]:
            sys.exit(f"error: {folder} was made with another {', '.join(changed)}: move it away")
        if (folder / "final_returns.npz").exists():
            return folder
        words = ["--resume", folder]
    else:
        (out / name).mkdir(parents=True, exist_ok=True)
        words = ["--out-dir", out / name]
        for key, value in options.items():
            flag = f"--{'no-' if value is False else ''}{key.replace('_', '-')}"
            words += [flag] if isinstance(value, bool) else [flag, value]
    print(f"{name}: {script} {' '.join(map(str, words))}", flush=True)
    with open(out / name / "log.txt", "a") as log:
        command = [sys.executable, ROOT / script, *map(str, words)]
        if subprocess.run(command, env=ENVIRON, stdout=log, stderr=log).returncode != 0:
            sys.exit(f"error: {name} has failed, see {log.name}")
    return run(out, name, script, **options)


def last_score(folder):
    """The normalised score of a run's last evaluation, or a tenth of the return, which is 1,000 at most in dmc/."""
    with np.load(folder / "final_returns.npz") as f:
        scores = f["returns"] / 10 if np.isnan(f["normalized_scores"]).any() else f["normalized_scores"]
    return scores[-1].mean()


def at_once(workers, jobs):
    """Call functions without arguments, `workers` at a time, in their order. Returns what they return. After an error
    or Ctrl-C no more are begun."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [future.result() for future in futures if not future.cancelled()]
