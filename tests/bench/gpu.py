"""All that is to be measured on a GPU, in one command:

    python tests/bench/gpu.py --data walker2d_medium_replay.hdf5

1. CUDA agrees with the CPU, and CUDA graphs with eager steps, offline and online.
2. The table of bench.py.
3. The paper's experiment on Walker2d in full (100,000 diffusion steps of 6 x 1024, 5M samples, 1M
   TD3+BC updates), generated and real, then with IQL and EDAC on the same samples, timed.
4. The online experiment on HalfCheetah, 100,000 steps, with all three methods, timed.
5. With --data: the paper's recipe in full on 45,000 rows, `fast` for as long, and for a tenth.

`--quick --device cpu` tries the command without a GPU.
"""

import os
import subprocess
import sys
import tempfile
import time
import unittest.mock
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "tests/paper")]
from dynamics import dynamics_scores

import edm
import synther_edac
import synther_iql
import synther_sac_online
import synther_td3bc


@dataclass
class Args:
    data: Optional[str] = None  # D4RL-layout HDF5 of Walker2d, for 3 and 5; else 3 downloads D4RL's
    out_dir: str = "runs"  # where its run folders go
    device: Literal["cuda", "cpu"] = "cuda"  # cpu tries the command
    # One part alone
    only: Optional[Literal["agreement", "bench", "experiment", "online", "recipes"]] = None
    quick: bool = False  # small sizes


def largest_difference(a, b):
    """The largest difference of two tensors, relative to the largest entry."""
    return ((a.cpu() - b.cpu()).abs().max() / b.cpu().abs().max()).item()


def agent_difference(device):
    """Relative difference of actions after 200 updates on device and CPU, without noise."""
    rows = torch.randn(10_000, 42)
    rows[:, -1] = rows[:, -1] > 2
    actions = []
    for place in (device, "cpu"):
        torch.manual_seed(0)
        args = synther_td3bc.Args(policy_noise=0.0, device=place)
        agent = synther_td3bc.TD3BC(17, 6, 1.0, args)
        for i in range(200):
            batch = rows[40 * i : 40 * i + 256].to(place)
            agent.update_critic(batch)
            if i % 2:
                agent.update_actor(batch)
        actions.append(agent.actor.act(rows[:256, :17].to(place)).detach())
    return largest_difference(*actions)


def graph_difference(train):
    """Relative difference of what train() gives, a dict of tensors, with and without graphs."""
    recorded = train()
    with unittest.mock.patch("edm.cuda_graph", lambda step: step):
        eager = train()
    return max(largest_difference(recorded[name], eager[name]) for name in recorded)


def train_a_little(script, device):
    """The critics' weights after a run of a script without evaluation."""
    options = dict(data="real", updates=300)
    if script is synther_sac_online:
        options = dict(env="Pendulum-v1", total_steps=400, learning_starts=100, retrain_every=250)
        options["diffusion_steps"] = 100
    with tempfile.TemporaryDirectory() as folder:
        script.main(script.Args(eval_episodes=0, out_dir=folder, device=device, **options))
        agent = edm.load_torch(next(Path(folder).glob("*/checkpoint.pt")))["agent"]
    return {name: x for name, x in agent.items() if name.startswith("critic.")}


def agreement(args):
    device = args.device
    torch.manual_seed(0)
    model = edm.EDM(42).requires_grad_(False)
    x = 80 * torch.randn(256, 42)
    sigmas = edm.karras_sigmas(20)
    rows = edm.sample_dpmpp(model, x, sigmas)
    new = edm.sample_dpmpp(model.to(device), x.to(device), sigmas)
    print(f"{device} against CPU: 20 steps of the sampler {largest_difference(new, rows):.1e}")
    print(f"200 agent updates: {agent_difference(device):.1e}")
    rows = torch.randn(5_000, 42)
    few = edm.DiffusionArgs(diffusion_steps=300, diffusion_width=256)
    difference = graph_difference(lambda: edm.train_edm(rows, few, device=device).state_dict())
    print(f"graphs against eager steps, 300 diffusion steps: {difference:.1e}")
    for script in (synther_td3bc, synther_iql, synther_edac, synther_sac_online):
        difference = graph_difference(lambda: train_a_little(script, device))  # noqa: B023
        print(f"graphs against eager steps, {script.__name__}: {difference:.1e}", flush=True)


def bench(args):
    command = [sys.executable, str(ROOT / "tests/bench/bench.py"), "--device", args.device]
    subprocess.run(command + ["--quick"] * args.quick, check=True)


def run(args, script, *options):
    """Run a script of the project and print its time."""
    start = time.time()
    options = [*options, "--device", args.device, "--out-dir", args.out_dir]
    if args.quick:
        options += "--diffusion-steps 200 --diffusion-width 64 --num-samples 20000".split()
    subprocess.run([sys.executable, str(ROOT / script), *options], check=True)
    print(f"{script} {' '.join(options)}: {time.time() - start:.0f} s", flush=True)


def experiment(args):
    common = ["--env", "walker2d-medium-replay-v2"]
    common += ["--updates", "500"] if args.quick else []
    common += ["--dataset-path", args.data] if args.data else []
    run(args, "synther_td3bc.py", *common)
    found = Path(args.out_dir).glob("walker2d*__synther_td3bc__*/synthetic.npz")
    samples = str(max(found, key=os.path.getmtime))
    for script in ("synther_iql.py", "synther_edac.py"):
        run(args, script, *common, "--synthetic-path", samples)
    for script in ("synther_td3bc.py", "synther_iql.py", "synther_edac.py"):
        run(args, script, *common, "--data", "real")


def online(args):
    common = ["--env", "HalfCheetah-v4"]
    if args.quick:
        common += "--total-steps 700 --learning-starts 500 --retrain-every 600".split()
    for algo in ("synther", "redq", "sac"):
        run(args, "synther_sac_online.py", *common, "--algo", algo)


def recipes(args):
    """Quality of samples: the paper's recipe in full, and `fast` for as long and for a tenth."""
    rows = edm.pack(**edm.load_transitions(args.data, true_next_obs=True))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:45_000]]

    def train(recipe, steps):
        start = time.time()
        options = edm.DiffusionArgs(diffusion_recipe=recipe, diffusion_steps=steps)
        model = edm.train_edm(rows, options, raw_columns=[-1], device=args.device)
        return model, time.time() - start

    trial_steps = 50 if args.quick else 2_000
    train("fast", trial_steps)  # the first training on a GPU is slower
    step_seconds = train("fast", trial_steps)[1] / trial_steps
    model, seconds = train("paper", 200 if args.quick else 100_000)
    num_samples = 2_000 if args.quick else 100_000
    for recipe, share in (("paper", 1), ("fast", 1), ("fast", 0.1)):
        if recipe == "fast":
            model, _ = train("fast", round(share * seconds / step_seconds))
        for sampler, steps in (("dpmpp", 32), ("sde", 128)):
            options = dict(sampler=sampler, sample_steps=steps, terminals="column")
            new = edm.generate_transitions(model, rows, num_samples, **options)
            scores = edm.quality_report(rows, new)
            scores |= dynamics_scores("Walker2d-v4", edm.unpack(new[:10_000], 17))
            keys = ("marginal", "correlation", "dynamics", "recall")
            scores = {key: round(scores[key], 4) for key in keys}
            print(f"{recipe}, {share * seconds:.0f} s of training, {sampler}: {scores}", flush=True)


def main(args):
    parts = dict(agreement=agreement, bench=bench, experiment=experiment, online=online)
    if args.data:
        parts["recipes"] = recipes
    for name, part in parts.items():
        if args.only in (None, name):
            part(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
