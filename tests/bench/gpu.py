"""All that is to be measured on a GPU, in one command:

    python tests/bench/gpu.py --data walker2d_medium_replay.hdf5

1. CUDA agrees with the CPU: denoiser, sampler and 200 agent updates from the same weights, noise and batches; and CUDA
   graphs agree with eager steps, offline and online.
2. The table of bench.py.
3. The paper's experiment on Walker2d in full (100,000 diffusion steps of 6 x 1024, 5M samples, 1M TD3+BC updates),
   generated and real, then with IQL and EDAC on the same samples, timed.
4. The online experiment on HalfCheetah, 100,000 steps, with all three methods, timed.
5. With --data: the paper's recipe in full on 45,000 rows, and `fast` in the same seconds and a tenth of them.

--only picks one of the five; --quick shrinks the last three to try the command; with --device cpu everything but the
graphs can be tried without a GPU.
"""

import copy
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "tests/paper")]
import edm
import synther_edac
import synther_iql
import synther_sac_online
import synther_td3bc
from dynamics import dynamics_scores


@dataclass
class Args:
    data: Optional[str] = None
    """D4RL-layout HDF5 of Walker2d for the third and fifth part"""
    out_dir: str = "runs"
    """where its run folders go"""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu tries the command"""
    only: Optional[Literal["agreement", "bench", "experiment", "online", "recipes"]] = None
    """one part alone"""
    quick: bool = False
    """tiny sizes in the last three parts"""


def largest_difference(a, b):
    """The largest difference of two tensors, relative to the largest entry."""
    return ((a.cpu() - b.cpu()).abs().max() / b.abs().max()).item()


@torch.no_grad()
def denoiser_difference(device):
    """Relative differences between device and CPU: one call of the default denoiser, and 20 calls of the sampler."""
    torch.manual_seed(0)
    model = edm.EDM(42)
    other = copy.deepcopy(model).to(device)
    x, sigmas = torch.randn(256, 42), edm.karras_sigmas(20)
    call = largest_difference(other(x.to(device), 0.5), model(x, 0.5))
    return call, largest_difference(
        edm.sample_dpmpp(other, 80 * x.to(device), sigmas), edm.sample_dpmpp(model, 80 * x, sigmas)
    )


def agent_difference(device, updates=200):
    """Relative difference of the actor's actions after the same updates on device and CPU, target noise off."""
    args = synther_td3bc.Args(policy_noise=0.0)
    torch.manual_seed(0)
    agents = [synther_td3bc.TD3BC(17, 6, 1.0, args, d) for d in (device, "cpu")]
    agents[0].load_state_dict(copy.deepcopy(agents[1].state_dict()))
    for i in range(updates):
        batch = torch.randn(256, 42)
        batch[:, -1] = (batch[:, -1] > 2).float()
        for agent, d in zip(agents, (device, "cpu")):
            agent.update_critic(batch.to(d))
            if i % 2:
                agent.update_actor(batch.to(d))
    x = torch.randn(256, 17)
    with torch.no_grad():
        return largest_difference(agents[0].actor(x.to(device)), agents[1].actor(x))


def graph_difference(device):
    """Relative difference of the weights after 300 diffusion steps as CUDA graphs and eagerly, from the same seed."""
    rows = torch.randn(5_000, 42)
    options = dict(steps=300, width=256, device=device, progress=False)
    a, b = (edm.train_edm(rows, compile=compile, **options) for compile in ("auto", "off"))
    return max(largest_difference(x, y) for x, y in zip(a.parameters(), b.parameters()))


def offline_graph_difference(script, device):
    """Relative difference of the critics after 300 updates on the bundled data as CUDA graphs and eagerly."""
    critics = []
    for compile in ("auto", "off"):
        with tempfile.TemporaryDirectory() as folder:
            options = dict(data="real", updates=300, eval_episodes=0, out_dir=folder, device=device, compile=compile)
            script.main(script.Args(**options))
            (path,) = Path(folder).glob("*/checkpoint.pt")
            critics.append(torch.load(path, map_location="cpu", weights_only=True)["agent"]["critic"])
    return max(largest_difference(critics[0][name], critics[1][name]) for name in critics[0])


def online_graph_difference(device):
    """Relative difference of the critics after a short online run of Pendulum as CUDA graphs and eagerly."""
    critics = []
    for compile in ("auto", "off"):
        with tempfile.TemporaryDirectory() as folder:
            options = dict(total_steps=400, learning_starts=100, retrain_every=250, diffusion_steps=100)
            options |= dict(eval_episodes=0, out_dir=folder, device=device, compile=compile)
            synther_sac_online.main(synther_sac_online.Args(**options))
            (path,) = Path(folder).glob("*/checkpoint.pt")
            critics.append(torch.load(path, map_location="cpu", weights_only=True)["agent"]["critic"])
    return max(largest_difference(critics[0][name], critics[1][name]) for name in critics[0])


def timed_training(rows, recipe, steps, device):
    """A model trained by a recipe, and its seconds."""
    start = time.time()
    model = edm.train_edm(rows, steps=steps, recipe=recipe, skip=[rows.shape[1] - 1], device=device)
    return model, time.time() - start


def compare_recipes(args):
    """The paper's recipe in full, then `fast` for as long and for a tenth of that: quality of the samples."""
    rows = edm.pack(**edm.load_transitions(args.data, true_next_obs=True))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:45_000]]
    paper_steps, trial_steps, num_samples = (200, 50, 2000) if args.quick else (100_000, 2_000, 100_000)
    timed_training(rows, "fast", trial_steps, args.device)  # the first training on a GPU is slower
    _, trial = timed_training(rows, "fast", trial_steps, args.device)
    model, seconds = timed_training(rows, "paper", paper_steps, args.device)
    for recipe, share in (("paper", 1), ("fast", 1), ("fast", 0.1)):
        took = seconds
        if recipe == "fast":
            model, took = timed_training(rows, "fast", round(share * seconds / trial * trial_steps), args.device)
        for sampler in ("dpmpp", "sde"):
            new = edm.generate(model, num_samples, sampler=sampler).cpu()
            new[:, -1] = new[:, -1] > 0.5
            scores = edm.quality_report(rows, new) | dynamics_scores("Walker2d-v4", edm.unpack(new[:10_000], 17, 6))
            scores = {key: round(scores[key], 4) for key in ("marginal", "correlation", "dynamics", "recall")}
            print(f"{recipe}, {took:.0f} s of training, {sampler}: {scores}", flush=True)


def run(script, options, args):
    """Run a script of the project and print its time."""
    start = time.time()
    options = options + ["--device", args.device, "--out-dir", args.out_dir]
    subprocess.run([sys.executable, str(ROOT / script), *options], check=True)
    print(f"{script} {' '.join(options)}: {time.time() - start:.0f} s", flush=True)


def main(args):
    if args.only in (None, "agreement"):
        call, sample = denoiser_difference(args.device)
        print(f"{args.device} against CPU, relative: denoiser {call:.1e}, sampler of 20 calls {sample:.1e}, ", end="")
        print(f"200 agent updates {agent_difference(args.device):.1e}")
        print(f"graphs against eager steps, 300 diffusion steps: {graph_difference(args.device):.1e}")
        print(f"and 300 steps of SynthER online: {online_graph_difference(args.device):.1e}", flush=True)
        for script in (synther_td3bc, synther_iql, synther_edac):
            difference = offline_graph_difference(script, args.device)
            print(f"and 300 updates of {script.__name__}: {difference:.1e}", flush=True)
    if args.only in (None, "bench"):
        subprocess.run([sys.executable, str(ROOT / "tests/bench/bench.py"), "--device", args.device], check=True)
    diffusion = ["--diffusion-steps", "200", "--diffusion-width", "64", "--num-samples", "20000"]
    if args.only in (None, "experiment"):
        small = diffusion + ["--updates", "2000"]
        for data in ("synther", "real"):
            options = ["--env", "walker2d-medium-replay-v2", "--data", data]
            options += ["--dataset-path", args.data] if args.data else []
            run("synther_td3bc.py", options + small * args.quick, args)
        folders = Path(args.out_dir).glob("walker2d-medium-replay-v2__synther_td3bc__*/synthetic.npz")
        samples = max(folders, key=lambda path: path.stat().st_mtime)
        for script in ("synther_iql.py", "synther_edac.py"):
            for source in (["--synthetic-path", str(samples)], ["--data", "real"]):
                options = ["--env", "walker2d-medium-replay-v2", *source]
                options += ["--dataset-path", args.data] if args.data else []
                run(script, options + small * args.quick, args)
    if args.only in (None, "online"):
        small = diffusion + ["--total-steps", "1500", "--learning-starts", "500", "--retrain-every", "700"]
        for algo in ("synther", "redq", "sac"):
            run("synther_sac_online.py", ["--env", "HalfCheetah-v4", "--algo", algo] + small * args.quick, args)
    if args.data and args.only in (None, "recipes"):
        compare_recipes(args)


if __name__ == "__main__":
    main(tyro.cli(Args))
