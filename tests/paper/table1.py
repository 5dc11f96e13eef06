"""Other generative models (Table 1): the quality of their samples, and an agent's score on
these.

    python tests/paper/table1.py --out table1                                # 2 hours on two cores
    python tests/paper/table1.py --out table1 --data walker2d.hdf5 --env Walker2d-v4
    python tests/paper/table1.py --out tests/paper/results --seeds 0         # our own results

It needs requirements-table1.txt. All models learn from half of the data. "real" is the other half.
"independent" draws each column for itself. "copula" is a Gaussian copula: it keeps the columns'
distributions and the correlations of their ranks. c2st, an AUC: can a classifier tell the samples from rows
that no model has seen? 0.5: no. Dynamics and reward are errors against the simulator.
"""

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import runs
import scipy.stats
import torch
from dynamics import NQ, dynamics_scores

import edm

SMALL = dict(updates=50_000, eval_every=5_000, diffusion_steps=20_000, num_samples=100_000)
SCALES = dict(cpu=SMALL, paper=runs.PAPER)
QUALITY = ("marginal", "correlation", "c2st")
MODELS = ("real", "independent", "copula", "diffusion", "tvae", "ctgan")


@dataclass(kw_only=True)
class Args(runs.StudyArgs):
    data: str = "quickstart"  # the data
    env: Literal[tuple(NQ)] = "HalfCheetah-v4"  # their environment
    true_next_obs: bool = False  # as in the scripts
    models: tuple[Literal[MODELS], ...] = MODELS  # lines of the table


def independent(rows, num_samples):
    torch.manual_seed(0)
    columns = [column[torch.randint(len(rows), (num_samples,))] for column in rows.T]
    return torch.stack(columns, dim=1)


def copula(rows, num_samples):
    """Normal scores of the ranks are correlated, and then turned into values of the data again."""
    scores = scipy.stats.norm.ppf(scipy.stats.rankdata(rows.numpy(), axis=0) / (len(rows) + 1))
    mean = np.zeros(rows.shape[1])
    normal = np.random.default_rng(0).multivariate_normal(mean, np.cov(scores.T), num_samples)
    ranks = scipy.stats.norm.cdf(normal / (scores.std(0) + 1e-9))
    columns = [np.quantile(column, rank) for column, rank in zip(rows.T.numpy(), ranks.T)]
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def diffusion(rows, num_samples, steps, starts):
    """The project's own model. starts: which rows begin an episode."""
    args = edm.DiffusionArgs(diffusion_steps=steps)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = edm.train_edm(rows, args, starts=starts, raw_columns=[-1], device=device)
    return edm.generate_transitions(model, rows, num_samples)


def from_library(rows, num_samples, name):
    """TVAE or CTGAN. Constant columns, which they cannot take, are put back."""
    import ctgan

    torch.manual_seed(0)
    np.random.seed(0)
    varies = (rows != rows[0]).any(0)
    model = getattr(ctgan, name)(enable_gpu=torch.cuda.is_available())
    model.fit(rows[:, varies].numpy())
    samples = rows[0].repeat(num_samples, 1)
    samples[:, varies] = torch.as_tensor(np.asarray(model.sample(num_samples), dtype=np.float32))
    return samples


def show(args, folder):
    """Print what is recorded of the agents, and of the samples against all rows."""
    path = (folder if folder.exists() else args.out) / "table1.jsonl"
    if not path.exists():
        raise edm.RunError(f"nothing is recorded in {path}")
    runs.print_row("model", *QUALITY, "score", head=True)
    for name in args.models:
        values = runs.every_seed(path, name)
        cells = [f"{values[0][key]:.3f}" if values else "" for key in QUALITY]
        runs.print_row(name, *cells, runs.summary([x["score"] for x in values]))


def main(args):
    folder = args.out / f"{Path(args.data).stem}-{args.scale}{'-true' * args.true_next_obs}"
    if args.seeds == 0:
        return show(args, folder)
    missing = [name for name in args.models if not (folder / f"{name}.npz").exists()]
    if {"tvae", "ctgan"} & {*missing} and find_spec("ctgan") is None:
        raise edm.RunError("no ctgan: pip install -r tests/paper/requirements-table1.txt")
    folder.mkdir(exist_ok=True)
    size = SCALES[args.scale]
    data = edm.load_transitions(args.data, args.true_next_obs)
    obs_dim = data["observations"].shape[1]
    rows = edm.pack(**data)
    chosen = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))
    seen, unseen = chosen.tensor_split(2)
    starts = edm.episode_starts(rows, obs_dim)[seen]
    given = (rows[seen], size["num_samples"])
    make = {
        "real": lambda: rows[unseen],
        "independent": partial(independent, *given),
        "copula": partial(copula, *given),
        "diffusion": partial(diffusion, *given, size["diffusion_steps"], starts),
        "tvae": partial(from_library, *given, "TVAE"),
        "ctgan": partial(from_library, *given, "CTGAN"),
    }
    for name in missing:
        edm.save_npz(folder / f"{name}.npz", edm.unpack(make[name](), obs_dim))

    options = {key: size[key] for key in ("updates", "eval_every", "num_samples")}
    options["env"] = "quickstart"
    if args.data != "quickstart":
        path = str(Path(args.data).resolve()) if Path(args.data).exists() else args.data
        options |= dict(dataset_path=path, env=args.env, true_next_obs=args.true_next_obs)
    jobs = []
    for name, seed in product(args.models, range(args.seeds)):
        where = (folder / "table1.jsonl", f"{name}-{seed}", "synther_td3bc.py")
        own = options | dict(seed=seed, synthetic_path=f"{name}.npz")
        jobs.append(partial(runs.result, *where, **own))
    scores = [values["score"] for values in runs.at_once(args.workers, jobs)]
    scores = dict(zip(args.models, np.reshape(scores, (len(args.models), args.seeds))))
    runs.print_row("model", *QUALITY, "dynamics", "reward", "score", head=True)
    for name in args.models:
        samples = edm.load_transitions(folder / f"{name}.npz")
        others = rows[seen] if name == "real" else rows[unseen]
        quality = edm.quality_report(others, edm.pack(**samples))
        errors = dynamics_scores(args.env, {key: x[:5_000] for key, x in samples.items()})
        cells = [f"{quality[key]:.3f}" for key in QUALITY]
        cells += [f"{errors['dynamics']:.3f}", f"{errors['reward']:.4f}"]
        runs.print_row(name, *cells, runs.summary(scores[name]))
    runs.draw_scores(folder / "table1.png", {"TD3+BC on samples of": scores})


if __name__ == "__main__":
    runs.launch(main, Args, __doc__)
