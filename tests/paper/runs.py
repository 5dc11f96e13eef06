"""What the studies share: runs of the scripts, each made once, and a task of the DeepMind Control suite.

Where this folder is on PYTHONPATH, the task is named as `--env runs:cartpole-swingup-v0`.
"""

import csv
import json
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import gymnasium as gym
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
import edm  # noqa: E402

ENVIRON = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/paper")])}

gym.register("cartpole-swingup-v0", "synther_sac_online:DMC", max_episode_steps=1000,
             kwargs=dict(domain="cartpole", task="swingup"))  # fmt: skip


def run(out, name, script, **options):
    """The folder of a finished run of a script with these options, in out/name. It is made if it is not there, and goes
    on if it was stopped. Paths among the options are relative to `out`. The program ends if it was made with others."""
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
        words = ["--out-dir", name]
        for key, value in options.items():
            flag, is_flag = key.replace("_", "-"), isinstance(value, bool) and key != "standardize_reward"  # or None
            words += [f"--{'' if value else 'no-'}{flag}"] if is_flag else [f"--{flag}", value]
    print(f"{name}: {script} {' '.join(map(str, words))}", flush=True)
    with open(out / name / "log.txt", "a") as log:
        command = [sys.executable, ROOT / script, *map(str, words)]
        if subprocess.run(command, cwd=out, env=ENVIRON, stdout=log, stderr=log).returncode != 0:
            sys.exit(f"error: {name} has failed, see {log.name}")
    return run(out, name, script, **options)


def result(path, name, script, source=None, takes=("synthetic_path", "synthetic.npz"), **options):
    """What `last_values` says of a run: {"return_mean": ..., "marginal": ...}. It is in the file `path` (.jsonl), with
    the options, so that results outlive their runs. If it is not, the run is made, in the file's folder. `source`:
    name, script and options of the run from which this one takes its samples, or another option and file."""
    own = dict(name=name, script=script, **options) | (dict(source=source[0]) if source else {})
    own |= dict(dataset_path=Path(options["dataset_path"]).name) if "dataset_path" in options else {}
    for entry in recorded(path):
        if entry["name"] == name:
            values = entry.pop("values")
            if entry != own:
                sys.exit(f"error: {path} has another {name}: {entry}")
            return values
    if source:
        source_name, source_script, source_options = source
        folder = run(path.parent, source_name, source_script, **source_options)
        options[takes[0]] = str((folder / takes[1]).relative_to(path.parent))
    values = last_values(run(path.parent, name, script, **options))
    with open(path, "a") as f:
        f.write(json.dumps(own | dict(values=values)) + "\n")
    return values


def recorded(path):
    """The entries of a file of results."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_values(folder):
    """Sample quality, size of the diffusion model and return of a run: means over the last three evaluations, so that
    one bad evaluation does not decide. "score" is the normalised score, or a tenth of the return where there is none
    (1,000 at most in dmc/)."""
    logged = defaultdict(list)
    with open(folder / "metrics.csv") as f:
        for row in csv.DictReader(f):
            logged[row["key"]].append(float(row["value"]))
    logged = {key: x[-3:] if key.startswith("eval/") else x[-1:] for key, x in logged.items() if np.isfinite(x[-1])}
    values = {key.split("/")[1]: round(np.mean(x), 4) for key, x in logged.items() if key.startswith(("eval", "diff"))}
    if (folder / "diffusion.pt").exists():
        values["parameters"] = sum(x.numel() for x in edm.load_edm(folder / "diffusion.pt").parameters())
    return values | dict(score=values.get("normalized_score", round(values["return_mean"] / 10, 4)))


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
