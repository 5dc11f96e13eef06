"""What stopping the diffusion model early saves and costs (Appendix D.2 expects a large saving).

    python tests/paper/early_stop.py --data FILE.hdf5 --env HalfCheetah-v4

For the first N rows of a replay buffer, as the online script meets them: a model trained to the end of its schedule;
models that stop once the loss of held-out rows has not fallen by 0.5% for some thousands of steps; and for each of
these one whose schedule was planned to end there. All are trained on the same 95% of the rows, and timed without
sampling.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path += [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import edm
from dynamics import dynamics_scores


@dataclass
class Args:
    data: str
    """replay buffer as D4RL-layout HDF5, in the order of its collection (--save-dataset of synther_sac_online.py)"""
    env: str = "HalfCheetah-v4"
    """simulator"""
    rows: tuple[int, ...] = (10_000, 30_000)
    """sizes of the buffer"""
    patience: tuple[int, ...] = (1, 2)
    """thousands of steps without a gain"""
    diffusion_steps: int = 20_000
    """length of the schedule"""
    diffusion_width: int = 256
    """units per block of the denoiser"""
    diffusion_lr: float = 1e-3
    """initial learning rate"""
    num_samples: int = 50_000
    """rows to generate for the scores"""
    true_next_obs: bool = False
    """take s' of terminal rows from the file's next_observations"""


def main(args):
    data = edm.load_transitions(args.data, args.true_next_obs)
    obs_dim, act_dim = data["observations"].shape[1], data["actions"].shape[1]
    buffer = edm.pack(**data)
    never = 10**6  # so that the same rows are held out
    print("| rows | patience | steps | seconds | held-out | marginal | correlation | dynamics error | nearest / real |")
    print("|---|---|---|---|---|---|---|---|---|")
    for num_rows in args.rows:
        real = buffer[:num_rows]

        def run(name, steps, patience):
            """Train, print a line of the table, and return the step at which training stopped."""
            start, last = time.time(), {}
            model = edm.train_edm(
                real, steps=steps, recipe="paper", width=args.diffusion_width, lr=args.diffusion_lr, time_dim=256,
                skip=[real.shape[1] - 1], patience=patience, on_log=lambda step, values: last.update(values, step=step),
            )  # fmt: skip
            seconds = time.time() - start
            held_out = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[: len(real) // 20]
            held_out_loss = edm.held_out_error(model, model.normalize(real[held_out]))
            rows = edm.generate(model, args.num_samples)
            rows[:, -1] = rows[:, -1] > 0.5
            report = edm.quality_report(real, rows)
            dynamics = dynamics_scores(args.env, edm.unpack(rows[:5_000], obs_dim, act_dim))["dynamics"]
            nearest = f"{report['nearest']:.2f} / {report['nearest_real']:.2f}"
            print(
                f"| {len(real)} | {name} | {last['step']} | {seconds:.0f} | {held_out_loss:.4f} "
                f"| {report['marginal']:.3f} | {report['correlation']:.4f} | {dynamics:.2g} | {nearest} |",
                flush=True,
            )
            return last["step"]

        run("to the end", args.diffusion_steps, never)
        for patience in args.patience:
            steps = run(patience, args.diffusion_steps, patience)
            run("planned", steps, never)


if __name__ == "__main__":
    main(tyro.cli(Args))
