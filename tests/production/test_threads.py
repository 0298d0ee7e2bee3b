"""Threads that wait do not hold the core that another one needs."""

import os
import subprocess
import sys

import pytest

from qlora_edu.production import threads


def chosen(**variables: str) -> str:
    """What a fresh process says that it chose."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    code = "from qlora_edu.production.threads import *; import torch; print(choose_threads(0.1))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_policy_that_is_set_stands(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY")
    threads.wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    threads.wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has nothing to choose")
def test_what_was_chosen_is_said():
    assert chosen(OMP_NUM_THREADS="1") == "1 thread"
    assert chosen(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive") == "2 threads, waiting passively"
    assert chosen(OMP_NUM_THREADS="2") == "2 threads"
    assert "the faster of 1 and " in chosen()


@pytest.mark.parametrize("faster", [1, 2])
def test_the_faster_of_two_is_taken(monkeypatch, faster):
    import torch

    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(
        threads,
        "_seconds_per_step",
        lambda seconds: 1.0 if torch.get_num_threads() == faster else 2.0,
    )
    try:
        torch.set_num_threads(2)
        assert threads.choose_threads().startswith(f"{faster} thread")
        assert torch.get_num_threads() == faster
    finally:
        torch.set_num_threads(before)
