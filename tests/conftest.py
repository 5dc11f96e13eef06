"""Shared by all tests: the folders of imports, one thread, the signals' handlers, float64."""

import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for the subprocesses too
os.environ["MUJOCO_GL"] = "disable"  # nothing is rendered

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # pytest adds the folder above, but not this one
sys.path.append(str(Path(__file__).parent / "paper"))

import edm

torch.set_num_threads(1)
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
    """Double precision by default, so that two implementations can be compared closely."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
