"""What the studies share: their start, runs of the scripts, each made once, and a task of DeepMind Control.

Where this folder is on PYTHONPATH, the task is named as `--env runs:cartpole-swingup-v0`.
"""

import csv
import fcntl
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
import edm  # noqa: E402

ENVIRON = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/paper")])}

gym.register("cartpole-swingup-v0", "synther_sac_online:DMC", max_episode_steps=1000,
             kwargs=dict(domain="cartpole", task="swingup"))  # fmt: skip


def launch(main, args_class, description):
    """Call main with the arguments of the command line. Bad input ends it with one sentence and exit code 2."""
    try:
        main(tyro.cli(args_class, description=description))
    except (edm.RunError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(2)


def words_of(options):
    """The command line of options."""
    words = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool) and key != "standardize_reward":  # which may be None, and so takes a word
            words += [f"--{'' if value else 'no-'}{flag}"]
        else:
            words += [f"--{flag}", str(value)]
    return words


def run(out, name, script, **options):
    """Make the run out/name of a script, or go on with it, and return its run folder. If it has ended, nothing is done.
    Paths in the options are relative to `out`. Raises edm.RunError if it fails, or was made with other options."""
    (out / name).mkdir(parents=True, exist_ok=True)
    with open(out / name / "log.txt", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # waits if another process makes this run
        path = out / name / "options.json"
        if not path.exists():
            path.write_text(json.dumps(options))
        if changed := differences(json.loads(path.read_text()), options):
            raise edm.RunError(f"{out / name} was made with another {changed}: move it away")
        made = sorted((out / name).glob("*/args.json"))
        if not made or not (made[-1].parent / "final_returns.npz").exists():
            words = ["--resume", str(made[-1].parent)] if made else ["--out-dir", name, *words_of(options)]
            print(f"{name}: {script} {' '.join(words)}", flush=True)
            command = [sys.executable, ROOT / script, *words]
            if subprocess.run(command, cwd=out, env=ENVIRON, stdout=log, stderr=log).returncode != 0:
                raise edm.RunError(f"{name} has failed, see {log.name}")
            made = sorted((out / name).glob("*/args.json"))
    return made[-1].parent


def differences(old, new):
    """The keys whose values differ, as a text."""
    return ", ".join(key for key in {**old, **new} if old.get(key) != new.get(key))


def result(path, name, script, source=None, takes=("synthetic_path", "synthetic.npz"), **options):
    """The values of a run, see `last_values`. If the file `path` (.jsonl) has them, they are read there: results
    outlive their runs. If not, the run is made in the file's folder, and its options and values are added to the file.
    `source` is name, script and options of a run that is made before: its file takes[1] becomes the option takes[0].
    RunError if the file has one of these two with other options, or a source with another score."""
    own = dict(name=name, script=script, **options) | (dict(source=source[0]) if source else {})
    if (data := Path(options.get("dataset_path", ""))).suffix:  # a file
        own["dataset_path"] = data.name
        if (path.parent / data).is_file():
            own["dataset_bytes"] = (path.parent / data).stat().st_size
    old = {entry["name"]: entry for entry in recorded(path)}
    if name in old:
        values = old[name].pop("values")
        if changed := differences(old[name], {"dataset_bytes": old[name].get("dataset_bytes")} | own):
            raise edm.RunError(f"{path} has a {name} with another {changed}")
        return values
    if source:
        source_name, source_script, source_options = source
        folder = run(path.parent, source_name, source_script, **source_options)
        if source_name in old and old[source_name]["values"]["score"] != last_values(folder)["score"]:
            raise edm.RunError(f"{source_name} was made anew, and came out other than in {path}: take another --out")
        options[takes[0]] = str((folder / takes[1]).relative_to(path.parent))
    values = last_values(run(path.parent, name, script, **options))
    with open(path, "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        if name not in [entry["name"] for entry in recorded(path)]:  # another process may have waited for the same run
            f.write(json.dumps(own | dict(values=values)) + "\n")
    return values


def recorded(path):
    """The entries of a file of results."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def every_seed(path, name):
    """The values of all recorded runs that are named `name` and a seed."""
    return [entry["values"] for entry in recorded(path) if re.fullmatch(re.escape(name) + r"[ -]\d+", entry["name"])]


def summary(scores, digits=1):
    """Mean, standard deviation and number of scores, one for each seed, as a text."""
    spread = f" ± {np.std(scores):,.{digits}f}" if len(scores) > 1 else ""
    return f"{np.mean(scores):,.{digits}f}{spread} ({len(scores)})" if len(scores) else ""


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
        model = edm.load_edm(folder / "diffusion.pt")
        values["parameters"] = sum(x.numel() for x in model.state_dict().values())  # all that is needed to sample
    return values | dict(score=values.get("normalized_score", round(values["return_mean"] / 10, 4)))


def draw_scores(path, panels, xlabel="score"):
    """Draw panels[title][label], an array of scores each: a dot for a seed, a bar for the mean."""
    labels = [*dict.fromkeys(label for own in panels.values() for label in own)]
    size = 2 + 4 * len(panels), 1 + 0.4 * len(labels)
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, (title, own) in zip(axes[0], panels.items()):
        for label, scores in own.items():
            ax.barh(labels.index(label), np.mean(scores), color="C0", alpha=0.4)
            ax.plot(scores, np.full(len(scores), labels.index(label)), "o", color="C0")
        ax.set(title=title, xlabel=xlabel, yticks=range(len(labels)), yticklabels=labels)
    axes[0, 0].invert_yaxis()
    fig.savefig(path, dpi=80)


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
