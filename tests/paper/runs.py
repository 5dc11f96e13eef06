"""What the studies share: start, tables, runs of the scripts, each made once, and an environment,
which is `--env runs:cartpole-swingup-v0` where this folder is on PYTHONPATH."""

import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
import edm  # noqa: E402

SCRIPTS = []  # the processes of this study
STOPPED = []  # the signal that has stopped it
# The size of the paper's offline experiments
PAPER = dict(updates=1_000_000, eval_every=5_000, diffusion_steps=100_000, num_samples=5_000_000)
TASK = dict(domain="cartpole", task="swingup")
gym.register("cartpole-swingup-v0", "synther_sac_online:DMC", max_episode_steps=1000, kwargs=TASK)


@dataclass(kw_only=True)
class StudyArgs:
    out: Path  # folder for the runs and their results
    scale: Literal["cpu", "paper"] = "cpu"  # sizes; paper wants a GPU
    seeds: int = 1  # 0: nothing is run, the table is of what is recorded
    workers: int = 2  # runs at a time, one thread each

    def __post_init__(self):
        self.out = self.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)


def stop(number, _):
    """A signal to a study also stops its scripts, which save. A second one ends the study at once."""
    signal.signal(number, signal.SIG_DFL)
    STOPPED.append(number)
    for process in SCRIPTS:
        process.terminate()
    raise KeyboardInterrupt


def launch(main, args_class, description):
    """Call main with the arguments of the command line. Bad input ends it with one sentence."""
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        main(tyro.cli(args_class, description=description))
    except (edm.RunError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        for process in SCRIPTS:
            process.wait()
        sys.exit(2)


def words_of(options):
    """The command line of options."""
    words = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        # --standardize-reward can be None, too, and so takes a word
        if isinstance(value, bool) and key != "standardize_reward":
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def run(out, name, script, **options):
    """Make the run out/name of a script, or go on with it, unless it has ended. Returns its folder.
    Paths in the options are relative to `out`. RunError if it fails, or is of other options."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # waits if another process makes this run
        path = folder / "options.json"
        if not path.exists():
            path.write_text(json.dumps(options))
        check_same(json.loads(path.read_text()), options, f"{folder} was made")
        words = ["--out-dir", name, *words_of(options)]
        for made in sorted(folder.glob("*/args.json")):
            if (made.parent / "final_returns.npz").exists():
                return made.parent
            words = ["--resume", str(made.parent)]
        print(f"{name}: {script} {' '.join(words)}", flush=True)
        command = [sys.executable, ROOT / script, *words]
        own = [os.path.abspath(x) for x in os.environ.get("PYTHONPATH", "").split(os.pathsep) if x]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/paper"), *own])
        environ = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=paths)
        process = subprocess.Popen(command, cwd=out, env=environ, stdout=log, stderr=log)
        SCRIPTS.append(process)
        if STOPPED:
            process.terminate()
        if process.wait() != 0:
            raise edm.RunError(f"{name} has failed, see {log.name}")
    return max(folder.glob("*/args.json")).parent


def check_same(old, new, what):
    """RunError if the values of a key differ."""
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
        raise edm.RunError(f"{what} with another {', '.join(changed)}: move it away")


def read_log(folder):
    """The logged values of a run, lists by their keys."""
    logged = defaultdict(list)
    with open(folder / "metrics.csv") as f:
        for row in csv.DictReader(f):
            logged[row["key"]].append(float(row["value"]))
    return logged


def last_values(folder):
    """Sample quality, size of the diffusion model and return of a run: means over the last three
    evaluations, so that one bad evaluation does not decide. "score" is the normalised score, or a
    tenth of the return where there is none (in dmc/ a return is 1,000 at most)."""
    values = {}
    for key, x in read_log(folder).items():
        stage, name = key.split("/")
        if stage in ("eval", "diffusion") and np.isfinite(x[-1]):
            values[name] = round(np.mean(x[-3:] if stage == "eval" else x[-1:]), 4)
    if (folder / "diffusion.pt").exists():  # all numbers that are needed to sample
        state = edm.load_edm(folder / "diffusion.pt").state_dict()
        values["parameters"] = sum(x.numel() for x in state.values())
    return values | dict(score=values.get("normalized_score", round(values["return_mean"] / 10, 4)))


def at_once(workers, jobs):
    """Call functions without arguments, `workers` at a time. Returns what they return, in order.
    After an error no more are begun."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda job: job(), jobs))


def recorded(path):
    """The entries of a file of results, one JSON object a line."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def record(path, entry):
    """Add an entry to a file of results, unless another process has added the same."""
    with open(path, "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        if entry not in recorded(path):
            f.write(json.dumps(entry) + "\n")


def result(path, name, script, source=None, takes=("synthetic_path", "synthetic.npz"), **options):
    """The values of a run, see `last_values`. Results outlive their runs: if the file `path`
    (.jsonl) has them, they are read there. If not, the run is made in its folder, and added to the
    file. `source` is name, script and options of a run that is made first: its file takes[1]
    becomes the option takes[0]. RunError if the file has one of the two with other options, or the
    source with another score."""
    own = dict(name=name, script=script, **options)
    if source:
        own["source"] = source[0]
    data = Path(options.get("dataset_path", ""))
    if data.suffix:  # a file
        own["dataset_path"] = data.name
        if (path.parent / data).is_file():
            own["dataset_bytes"] = (path.parent / data).stat().st_size
    old = {entry["name"]: entry for entry in recorded(path)}
    if name in old:
        values = old[name].pop("values")
        own.setdefault("dataset_bytes", old[name].get("dataset_bytes"))
        check_same(old[name], own, f"{path} has a {name}")
        return values
    if source:
        source_name, source_script, source_options = source
        folder = run(path.parent, source_name, source_script, **source_options)
        old_score = old[source_name]["values"]["score"] if source_name in old else None
        if old_score not in (None, last_values(folder)["score"]):
            changed = f"{source_name} was made anew, and came out other than in {path}"
            raise edm.RunError(f"{changed}: take another --out")
        options[takes[0]] = str((folder / takes[1]).relative_to(path.parent))
    values = last_values(run(path.parent, name, script, **options))
    record(path, own | dict(values=values))
    return values


def every_seed(path, name):
    """The values of all recorded runs that are named `name` and a seed."""
    pattern = re.escape(name) + r"[ -]\d+"
    return [x["values"] for x in recorded(path) if re.fullmatch(pattern, x["name"])]


def summary(scores, digits=1):
    """Mean, standard deviation and number of scores, one for each seed, as a text."""
    spread = f" ± {np.std(scores):,.{digits}f}" if len(scores) > 1 else ""
    return f"{np.mean(scores):,.{digits}f}{spread} ({len(scores)})" if len(scores) else ""


def print_row(*cells, head=False):
    """Print a line of a table."""
    print(f"| {' | '.join(cells)} |", flush=True)
    if head:
        print("|" + "---|" * len(cells))


def draw_scores(path, panels, xlabel="score"):
    """Draw panels[title][label], an array of scores each: a dot for a seed, a bar for the mean."""
    labels = list(dict.fromkeys(label for own in panels.values() for label in own))
    options = dict(figsize=(2 + 4 * len(panels), 1 + 0.4 * len(labels)), layout="constrained")
    fig, axes = plt.subplots(1, len(panels), sharey=True, squeeze=False, **options)
    for ax, (title, own) in zip(axes[0], panels.items()):
        for label, scores in own.items():
            position = labels.index(label)
            ax.barh(position, np.mean(scores), color="C0", alpha=0.4)
            ax.plot(scores, np.full(len(scores), position), "o", color="C0")
        ax.set(title=title, xlabel=xlabel, yticks=range(len(labels)), yticklabels=labels)
    axes[0, 0].invert_yaxis()
    fig.savefig(path, dpi=80)
