"""Which sampler: quality against network calls, for the paper's sampler, its deterministic form and
DPM-Solver++(2M).

    python tests/paper/samplers.py --data FILE.hdf5 --model runs/.../diffusion.pt --env Walker2d-v4

For a model of the paper's recipe: with `fast` the scripts' sampler adds noise. The last line is the
noise of the measurement: the paper's sampler with another seed.
"""

import time
from dataclasses import dataclass

import torch
from dynamics import ModelArgs, dynamics_scores, load
from runs import launch, print_row

import edm


@dataclass
class Args(ModelArgs):
    num_samples: int = 20_000  # rows per sampler


class Heun(edm.EDM):
    """The model with the paper's sampler in its deterministic form."""

    def sample(self, num_rows):
        sigmas = edm.karras_sigmas(self.recipe.sample_steps)
        x = sigmas[0].item() * torch.randn(num_rows, len(self.mean))
        return self.unnormalize(edm.sample_sde(self.denoise, x, sigmas, s_churn=0.0))


LINES = [("paper's SDE, {} steps", edm.EDM, "sde", steps, 0) for steps in (128, 64, 32, 16)]
LINES += [("Heun without churn, {} steps", Heun, "sde", steps, 0) for steps in (128, 32, 16, 10)]
for _steps in (64, 32, 20, 16, 12, 8):
    LINES.append(("DPM-Solver++(2M), {} steps", edm.EDM, "dpmpp", _steps, 0))
LINES.append(("paper's SDE, {} steps, another seed", edm.EDM, "sde", 128, 1))


def main(args):
    real, *sizes = load(args)
    std = real[:, :-1].std(0)
    some = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:5_000]]
    floor = dynamics_scores(args.env, edm.unpack(some, *sizes))["dynamics"]
    quality = ("marginal", "correlation", "spread", "terminals", "dynamics")
    print_row("sampler", "calls", *quality, "us per row", head=True)
    print_row("(real rows)", "", "", "", "1", f"{real[:, -1].mean():.2%}", f"{floor:.1e}", "")
    for name, make, sampler, steps, seed in LINES:
        model = edm.load_edm(args.model, make=make)
        options = dict(sampler=sampler, sample_steps=steps, eta=0.0, terminals="column")
        clock = time.time()
        rows = edm.generate_transitions(model, real, args.num_samples, seed, **options)
        seconds = time.time() - clock
        calls = steps if sampler == "dpmpp" else 2 * steps - 1
        spread = (rows[:, :-1].std(0) / std)[std > 1e-6].mean()
        error = dynamics_scores(args.env, edm.unpack(rows, *sizes))["dynamics"]
        cells = [f"{edm.marginal(real, rows):.4f}", f"{edm.correlation(real, rows):.4f}"]
        cells += [f"{spread:.3f}", f"{rows[:, -1].mean():.2%}", f"{error:.3f}"]
        print_row(name.format(steps), str(calls), *cells, f"{1e6 * seconds / len(rows):.0f}")


if __name__ == "__main__":
    launch(main, Args, __doc__)
