"""What every test gets: no network, figures without a screen, threads that do not fight."""

import os
import socket

# Set before any test module imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each start a thread per core spend their time waiting for one another.
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))

import matplotlib
import pytest

# Not by MPLBACKEND, which a notebook kernel started by a test would inherit and draw nothing.
matplotlib.use("agg")

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
