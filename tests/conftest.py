"""Shared by all tests: the scripts are imported from the repository root, and everything runs on one thread."""

import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for the subprocesses too
os.environ["MUJOCO_GL"] = "disable"  # nothing is rendered

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)

import edm

edm.plot_marginals.__defaults__ = (8,)  # panels: 48 take three seconds of every run


@pytest.fixture(autouse=True)
def own_signals():
    """What a script does at Ctrl-C and SIGTERM ends with the test that ran it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    edm.Bar.stop = None


@pytest.fixture
def float64():
    """Double precision as the default type, so that two implementations can be compared closely."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:.*Overriding environment")  # each script registers its mazes


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=1, help="signals to each script in test_stops.py (default: 1)")
