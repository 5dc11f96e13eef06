"""Other generative models (Table 1): how close are their samples to the data, and what does an agent learn from them?

    pip install -r tests/paper/requirements-table1.txt
    python tests/paper/table1.py --out table1                                        # 2 hours on two cores
    python tests/paper/table1.py --out table1 --data walker2d.hdf5 --env Walker2d-v4

"real" are rows of the data that no model has seen. "independent" draws each column from the data for itself. "copula"
is a Gaussian copula: it keeps the columns' distributions and the correlations of their ranks. TVAE and CTGAN are those
of the library ctgan, with its defaults. All learn from the same half of the data.

The columns of the table: marginal and correlation are the paper's. AUC: can a classifier tell the samples from rows
that no model has seen? 0.5: no. Dynamics and reward are errors against the simulator. Score: TD3+BC on the samples.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.stats
import torch
from dynamics import NQ, dynamics_scores
from runs import at_once, draw_scores, launch, result, summary

import edm

SCALES = {
    "cpu": dict(diffusion_steps=20_000, num_samples=100_000, updates=50_000, eval_every=5_000),
    "paper": dict(diffusion_steps=100_000, num_samples=5_000_000, updates=1_000_000, eval_every=5_000),
}
MODELS = ("real", "independent", "copula", "diffusion", "tvae", "ctgan")


@dataclass
class Args:
    out: Path  # folder for samples, runs and the table
    data: str = "quickstart"  # the data
    env: Literal[tuple(NQ)] = "HalfCheetah-v4"  # their environment
    true_next_obs: bool = False  # as in the scripts
    scale: Literal["cpu", "paper"] = "cpu"  # cpu: 20,000 diffusion steps, 100,000 samples, 50,000 updates
    models: tuple[Literal[MODELS], ...] = MODELS
    seeds: int = 1  # agents on each model's samples; 0: none
    workers: int = 2  # agents at a time, one thread each


def independent(rows, num_samples):
    torch.manual_seed(0)
    return torch.stack([column[torch.randint(len(rows), (num_samples,))] for column in rows.T], dim=1)


def copula(rows, num_samples):
    """Gaussian copula: normal scores of the ranks are correlated, and then turned into values of the data again."""
    scores = scipy.stats.norm.ppf(scipy.stats.rankdata(rows.numpy(), axis=0) / (len(rows) + 1))
    correlated = np.random.default_rng(0).multivariate_normal(np.zeros(rows.shape[1]), np.cov(scores.T), num_samples)
    ranks = scipy.stats.norm.cdf(correlated / (scores.std(0) + 1e-9))
    return torch.stack([torch.from_numpy(np.quantile(x.numpy(), u)) for x, u in zip(rows.T, ranks.T)], dim=1).float()


def diffusion(rows, num_samples, args, starts):
    """Both the samples and the terminals are those of the project's scripts."""
    settings = edm.resolve(edm.DiffusionArgs(**{k: SCALES[args.scale][k] for k in ("diffusion_steps", "num_samples")}),
                           len(rows))  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = edm.train_edm(rows, settings, starts=starts, raw_columns=[-1], device=device)
    return edm.generate_transitions(model, rows, settings)[:num_samples]


def from_library(name, rows, num_samples):
    """TVAE or CTGAN. Constant columns, which they cannot take, are put back."""
    import ctgan

    torch.manual_seed(0)
    np.random.seed(0)
    varies = (rows != rows[0]).any(0)
    model = getattr(ctgan, {"tvae": "TVAE", "ctgan": "CTGAN"}[name])(enable_gpu=torch.cuda.is_available())
    model.fit(rows[:, varies].numpy())
    samples = rows[0].repeat(num_samples, 1)
    samples[:, varies] = torch.as_tensor(np.asarray(model.sample(num_samples), dtype=np.float32))
    return samples


def main(args):
    args.out = args.out.resolve() / f"{Path(args.data).stem}-{args.scale}{'-true' * args.true_next_obs}"
    args.out.mkdir(parents=True, exist_ok=True)
    data = edm.load_transitions(args.data, args.true_next_obs)
    obs_dim, act_dim = data["observations"].shape[1], data["actions"].shape[1]
    rows = edm.pack(**data)
    chosen = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))
    seen, unseen = chosen.tensor_split(2)
    starts, num_samples = edm.episode_starts(rows, obs_dim)[seen], SCALES[args.scale]["num_samples"]
    rows_seen, rows_unseen = rows[seen], rows[unseen]
    make = {
        "real": lambda: rows_unseen,
        "independent": lambda: independent(rows_seen, num_samples),
        "copula": lambda: copula(rows_seen, num_samples),
        "diffusion": lambda: diffusion(rows_seen, num_samples, args, starts),
        "tvae": lambda: from_library("tvae", rows_seen, num_samples),
        "ctgan": lambda: from_library("ctgan", rows_seen, num_samples),
    }
    for name in args.models:
        if not (path := args.out / f"{name}.npz").exists():
            start = time.time()
            samples = make[name]()
            edm.save_atomically(path, lambda f: np.savez(f, **edm.unpack(samples, obs_dim, act_dim)))  # noqa: B023
            print(f"{name}: {len(samples):,} samples in {time.time() - start:.0f} s", flush=True)
    options = {key: SCALES[args.scale][key] for key in ("updates", "eval_every")}
    path = Path(args.data)
    data_options = dict(dataset_path=str(path.resolve()) if path.exists() else args.data)
    data_options |= dict(env=args.env, true_next_obs=args.true_next_obs)
    options |= data_options if args.data != "quickstart" else dict(env="quickstart")
    jobs = [partial(result, args.out / "table1.jsonl", f"{name}-{seed}", "synther_td3bc.py", **options, seed=seed,
                    num_samples=num_samples, synthetic_path=f"{name}.npz") for name in args.models
            for seed in range(args.seeds)]  # fmt: skip
    scores = np.array([values["score"] for values in at_once(args.workers, jobs)]).reshape(len(args.models), args.seeds)
    print("| model | marginal | correlation | AUC | dynamics | reward | score |\n|---|---|---|---|---|---|---|")
    for name, own in zip(args.models, scores):
        samples = edm.load_transitions(args.out / f"{name}.npz")
        quality = edm.quality_report(rows_unseen if name != "real" else rows_seen, edm.pack(**samples))
        errors = dynamics_scores(args.env, {key: x[:5_000] for key, x in samples.items()})
        columns = [f"{quality[key]:.3f}" for key in ("marginal", "correlation", "c2st")]
        columns += [f"{errors['dynamics']:.3f}", f"{errors['reward']:.4f}", summary(own)]
        print(f"| {name} | {' | '.join(columns)} |")
    if args.seeds:
        draw_scores(args.out / "table1.png", {"TD3+BC on samples of": dict(zip(args.models, scores))})


if __name__ == "__main__":
    launch(main, Args, __doc__)
