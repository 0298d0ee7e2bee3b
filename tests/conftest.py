"""What every test gets: no network, figures without a screen, threads that do not fight."""

import os
import socket

# Set before any test module imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread each: on a busy machine two spend their time waiting for one another, and a run that is
# resumed gives the same bits only with as many threads as before.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import pytest
from hypothesis import settings

# No generated example is judged by the clock; in CI they are the same ones every time.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# Not by MPLBACKEND, which a notebook kernel started by a test would inherit and draw nothing.
matplotlib.use("agg")

# What trains, starts processes, sweeps controls or plans many models: `make check` leaves it out.
SLOW = {
    *("test_claims.py", "test_gpu.py", "test_pages.py", "test_three_ways.py", "test_study.py"),
    *("test_explorers.py", "test_playground.py", "test_fake_step.py", "test_memory.py"),
    *("test_checkpoints.py", "test_serving.py", "test_threads.py"),
    *("test_finetuning.py", "test_cli.py", "test_chat.py", "test_random_weights.py"),
    *("test_data.py", "test_host_tier.py", "test_training.py", "test_evaluation.py"),
}

LOOPBACK = {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuse a connection to anywhere but this machine, so that no test depends on the network."""
    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            raise OSError(f"a test tried to reach {address[0]}; tests run without the network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in SLOW:
            item.add_marker("slow")
