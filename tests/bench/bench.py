"""Speed of training, sampling and agent updates on this machine, beside plain references and the
limit of the matrix multiplies.

    python tests/bench/bench.py                      # about 5 minutes on a 2-core CPU
    python tests/bench/bench.py --quick              # about 2 minutes, less exact
    python tests/bench/bench.py --memory             # peak memory of an experiment with 5M rows
    python tests/bench/bench.py --image-memory       # that of the pixel script with 100,000 images

Each figure is measured on the code that users run. Beside it stand `plain`, the same arithmetic as
the public codes write it (SynthER, CORL, REDQ, V-D4RL), run eagerly, and `matmul`, the time that
the matrix multiplies and convolutions of our code take alone. The three take turns, so that other
load on the machine meets all of them. The table shows medians over the turns, and the median of
the ratios within a turn.
"""

import argparse
import ctypes
import importlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

PLAIN_PRECISION = torch.backends.mkldnn.matmul.fp32_precision  # PyTorch's own; edm may change it
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import plain_agents
from helpers import filled, make_files

import edm

OUR_PRECISION = torch.backends.mkldnn.matmul.fp32_precision
edm.Bar.__init__ = partialmethod(tqdm.__init__, disable=True)  # no progress bars among the figures
OBS_DIM = 17  # Walker2d and HalfCheetah
ACT_DIM = 6
SIZES = [OBS_DIM, ACT_DIM, 1, OBS_DIM, 1]  # the columns of a row [s, a, r, s', d]
DIM = sum(SIZES)
BATCH = 256
TURNS = 5


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_per_call(function, count, precision=OUR_PRECISION):
    """Time function(0), ..., function(count - 1) together."""
    torch.backends.mkldnn.matmul.fp32_precision = precision
    start = clock()
    for i in range(count):
        function(i)
    seconds = (clock() - start) / count
    torch.backends.mkldnn.matmul.fp32_precision = OUR_PRECISION
    return seconds


def take_turns(ours, limit, plain, count, units=(1, 1, 1)):
    """Time three functions one after the other, TURNS times after a first turn that does not
    count. Returns a list of (ours, limit, plain), seconds per unit. A call does so many units."""
    turns = []
    for _ in range(TURNS + 1):
        times = [seconds_per_call(ours, count), seconds_per_call(limit, count)]
        times.append(seconds_per_call(plain, count, PLAIN_PRECISION))
        turns.append([seconds / number for seconds, number in zip(times, units)])
    return turns[1:]


def multiplies_of(step, device):
    """A function that does the matrix multiplies and convolutions of a step again, nothing else."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            packet = operator.overloadpacket
            if packet.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
                calls.append(partial(packet.out, *args, out=torch.empty_like(result)))
            elif packet.__name__ in ("convolution", "convolution_backward"):
                calls.append(partial(operator, *args))
            return result

    with Record():
        step()

    @torch.no_grad()
    def run():
        for call in calls:
            call()

    return edm.cuda_graph(run) if device == "cuda" else run


def with_limit(update, device):
    """Two functions of i: the update of this number, and its multiplies alone. An even number may
    do more than an odd one."""
    odd = multiplies_of(lambda: update(1), device)
    even = multiplies_of(lambda: update(2), device)
    return lambda i: update(i + 1), lambda i: even() if i % 2 else odd()


# --- Plain references -----------------------------------------------------------------------------


def draw(parts, size=BATCH):
    """A batch as CORL's buffer draws it: an array for each part of a row, indices from numpy."""
    index = np.random.randint(0, len(parts[0]), size=size)
    return [part[index] for part in parts]


def random_shift_by_sampling(images):
    """The public random shift: every image is interpolated at shifted positions."""
    images = F.pad(images, (4, 4, 4, 4), "replicate")
    new = dict(device=images.device, dtype=images.dtype)
    line = torch.linspace(-1 + 1 / 92, 1 - 1 / 92, 92, **new)[:84]
    base = torch.stack([line.expand(84, 84), line[:, None].expand(84, 84)], dim=-1)
    shift = torch.randint(0, 9, (len(images), 1, 1, 2), **new) * 2 / 92
    return F.grid_sample(images, base + shift, padding_mode="zeros", align_corners=False)


def draw_images(frames, actions, rewards):
    """A batch as a data loader draws it, image by image from numpy."""
    batch = []
    for i in np.random.randint(3, len(rewards) - 3, size=BATCH):
        images = [frames[k : k + 3].reshape(9, 84, 84) for k in (i - 3, i)]
        batch.append((images[0], actions[i], rewards[i], np.float32(0.97), images[1]))
    return [np.stack(x) for x in zip(*batch)]


# --- Rows of the table, each with what `take_turns` returns ---------------------------------------


def random_rows(num_rows):
    rows = torch.randn(num_rows, DIM)
    rows[:, -1] = rows[:, -1] > 3
    return rows


def training(part, device, count):
    """A step of train_edm, which waits at its checkpoints while the others have their turn."""
    rows = torch.randn(50_000, DIM)
    model = edm.EDM(DIM).to(device)
    step = plain_agents.plain_training(edm.EDM(DIM).to(device), rows, 3e-4, 100_000)
    multiply = multiplies_of(lambda: model.loss(rows[:BATCH].to(device)).backward(), device)
    turns = []
    last = clock()

    def save(state):
        nonlocal last
        ours = (clock() - last) / count
        limit = seconds_per_call(lambda i: multiply(), count)
        turns.append((ours, limit, seconds_per_call(step, count, PLAIN_PRECISION)))
        last = clock()

    args = edm.DiffusionArgs(diffusion_steps=count * (TURNS + 1), diffusion_recipe="paper")
    args.checkpoint_every = count
    run = SimpleNamespace(saved=dict(stage=""), log=lambda step, values: None, save=save)
    edm.train_edm(rows, args, device=device, run=run)
    return turns[1:]


@torch.no_grad()
def sampling(part, device, count):
    """A network call, per row: our sampler makes 32, the plain one three here."""
    num_rows = 100_000 if device == "cuda" else 2_000
    num_plain = 100_000 if device == "cuda" else 10_000
    model = edm.EDM(DIM).to(device).requires_grad_(False)
    x = torch.randn(num_rows, DIM, device=device)
    plain_x = torch.randn(num_plain, DIM, device=device)
    sigmas = edm.karras_sigmas(3)
    multiply = multiplies_of(lambda: model(x, 1.0), device)

    def ours(i):
        edm.generate(model, num_rows)

    def plain_denoise(x, sigma):  # one noise level for each row
        levels = torch.full((len(x), 1), sigma, device=device)
        return plain_agents.plain_denoised(model, x, levels)

    def plain(i):
        edm.sample_dpmpp(plain_denoise, plain_x, sigmas).cpu()

    units = (32 * num_rows, num_rows, 3 * num_plain)
    return take_turns(ours, lambda i: multiply(), plain, count, units)


def offline(part, device, count):
    """An update of TD3+BC, IQL or EDAC."""
    script = importlib.import_module(f"synther_{part}")
    args = filled(script, env="walker2d-medium-v2", device=device)
    rows = random_rows(100_000).to(device)
    parts = [x.contiguous() for x in rows.split(SIZES, dim=1)]
    agent = getattr(script, part.upper())(OBS_DIM, ACT_DIM, 1.0, args)
    plain_update = getattr(plain_agents, f"plain_{part}")(agent)
    loss_sums = torch.zeros(len(agent.LOSSES), device=device)
    update = script.make_update(args, agent, rows, loss_sums)

    def plain(i):
        plain_update(i, *draw(parts))

    return take_turns(*with_limit(update, device), plain, count)


def online(part, device, count):
    """A critic update of SAC (SynthER) or REDQ, at 20 per environment step."""
    script = importlib.import_module("synther_sac_online")
    args = filled(script, env="HalfCheetah-v4", algo=part, device=device)
    rows = random_rows(20_000).to(device)
    replay = SimpleNamespace(rows=rows, step=len(rows), synthetic=rows[:0])
    buffers = [[x.numpy() for x in rows.cpu().split(SIZES, dim=1)]]
    if part == "synther":
        replay.synthetic = rows.repeat(10, 1)
        buffers.append([x.repeat(10, axis=0) for x in buffers[0]])
    agent = script.SAC(OBS_DIM, ACT_DIM, args)
    plain_update = plain_agents.plain_sac(agent)
    update = script.make_update(args, agent, replay, torch.zeros(2, device=device))
    critic_step = multiplies_of(lambda: agent.update(rows[:BATCH], with_actor=False), device)
    last_step = multiplies_of(lambda: agent.update(rows[:BATCH], with_actor=True), device)

    def limit(i):
        for _ in range(args.utd - 1):
            critic_step()
        last_step()

    def plain(_):
        for i in range(args.utd):
            drawn = zip(*[draw(parts, BATCH // len(buffers)) for parts in buffers])
            batch = [torch.Tensor(np.concatenate(x)).to(device) for x in drawn]
            plain_update(i, *batch)

    return take_turns(lambda i: update(), limit, plain, count, units=3 * (args.utd,))


def pixels(part, device, count):
    """An update of DrQ+BC from images."""
    script = importlib.import_module("synther_vd4rl")
    args = filled(script, device=device)
    frames = torch.randint(0, 256, (4_004, 3, 84, 84), dtype=torch.uint8)
    data = dict(frames=frames, row=torch.arange(4_000), start=torch.zeros(4_000, dtype=torch.long))
    data |= dict(action=2 * torch.rand(4_000, ACT_DIM) - 1, reward=2 * torch.rand(4_000))
    data["discount"] = torch.full((4_000,), 0.97)
    parts = [data[key].numpy() for key in ("frames", "action", "reward")]
    data = {key: x.to(device) for key, x in data.items()}
    agent = script.DrQBC(ACT_DIM, args, "stage1")
    plain_update = plain_agents.plain_drqbc(agent)
    loss_sums = torch.zeros(2, device=device)
    update = script.make_update(args, agent, lambda: script.draw_images(args, data), loss_sums)
    update_once, limit = with_limit(update, device)

    def ours(i):
        script.keep_freed_memory()
        update_once(i)

    def plain(i):
        if sys.platform == "linux":  # where glibc's own thresholds, which grow by themselves, end
            ctypes.CDLL(None).mallopt(-1, 2**26)
            ctypes.CDLL(None).mallopt(-3, 2**25)
        batch = [torch.as_tensor(x, device=device) for x in draw_images(*parts)]
        for k in (0, 4):  # the images before and after
            batch[k] = random_shift_by_sampling(batch[k].float())
        plain_update(i, *batch, 0.5)

    return take_turns(ours, limit, plain, count)


def peak_memory(label, script, folder, **options):
    """Run a script in a process of its own, with a tiny network, and print its peak memory."""
    options |= dict(device="cpu", out_dir=folder, eval_episodes=0, sample_steps=2)
    options |= dict(diffusion_steps=10, diffusion_width=32, diffusion_depth=1)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *words]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(f"{label}: peak memory {peak:.2f} GB, {time.perf_counter() - start:.0f} s")


def memory_of_rows(folder):
    """synther_td3bc.py on random data of Walker2d's size."""
    np.savez(f"{folder}/data.npz", **edm.unpack(random_rows(20_000), OBS_DIM))
    options = dict(env="Walker2d-v4", dataset_path=f"{folder}/data.npz", num_samples=5_000_000)
    peak_memory("5M rows (0.84 GB)", "synther_td3bc.py", folder, **options, updates=20)


def memory_of_images(folder):
    """synther_vd4rl.py on random images, a few updates of the paper's batch size."""
    make_files(folder, np.full(200, 501))
    options = dict(dataset_path=folder, stage1_updates=20, stage2_updates=20, num_samples=100_000)
    peak_memory("100,000 images (2.12 GB)", "synther_vd4rl.py", folder, **options)


ROWS = (  # part of --only, name, unit, function, calls per turn on a CPU and on a GPU
    ("training", "diffusion step, 6 x 1024, batch 256", "ms/step", training, 40, 500),
    ("sampling", "sampling, one network call", "us/row", sampling, 1, 1),
    ("td3bc", "TD3+BC update, 2 x 256, batch 256", "us/update", offline, 300, 5_000),
    ("iql", "IQL update, 2 x 256, batch 256", "us/update", offline, 300, 5_000),
    ("edac", "EDAC update, 10 critics, 3 x 256", "us/update", offline, 40, 5_000),
    ("synther", "SAC (SynthER) update, 20 per step", "us/update", online, 20, 200),
    ("redq", "REDQ update, 20 per step", "us/update", online, 8, 200),
    ("drqbc", "DrQ+BC update from images, batch 256", "ms/update", pixels, 2, 200),
)


def show(name, unit, turns):
    """Print a line of the table."""
    scale = 1e3 if unit.startswith("ms") else 1e6
    ratio = statistics.median(plain / ours for ours, _, plain in turns)
    share = statistics.median(limit / ours for ours, limit, _ in turns)
    ours, limit, plain = [f"{scale * statistics.median(x):9.3f}" for x in zip(*turns)]
    print(f"{name:<36} {unit:<10} {ours} {plain} {limit} {ratio:10.2f}x {share:9.0%}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="shorter turns")
    add("--only", choices=[row[0] for row in ROWS], help="one part of the table")
    add("--memory", action="store_true", help="peak memory instead, with 5M rows")
    add("--image-memory", action="store_true", help="the same with 100,000 images")
    args = parser.parse_args()
    if args.memory or args.image_memory:
        with tempfile.TemporaryDirectory() as folder:
            return (memory_of_rows if args.memory else memory_of_images)(folder)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    if args.device == "cpu" and Path("/proc/cpuinfo").exists():
        name = re.findall("model name.*: (.*)|$", Path("/proc/cpuinfo").read_text())[0]
    threads = f"{torch.get_num_threads()} threads"
    print(f"{name} | torch {torch.__version__} | {threads} | float32 matmul as {OUR_PRECISION}")
    columns = f"{'ours':>9} {'plain':>9} {'matmul':>9} {'speed-up':>11} {'of limit':>9}"
    print(f"{'':<36} {'unit':<10} {columns}")
    for part, name, unit, measure, cpu_calls, gpu_calls in ROWS:
        if args.only in (None, part):
            calls = gpu_calls if args.device == "cuda" else cpu_calls
            calls = max(calls // 4, 1) if args.quick else calls
            turns = measure(part, args.device, calls)
            show(name, unit, turns)
            if part == "sampling":
                turns = [(32 * ours, 32 * limit, 255 * plain) for ours, limit, plain in turns]
                show("sampling, 32 calls (plain: 255)", unit, turns)


if __name__ == "__main__":
    main()
