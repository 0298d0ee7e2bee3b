"""The host tier of chapter 7: a file without a name that leaves nothing behind, pinned memory."""

import gc
import os
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch
from torch import nn

from qlora_edu.errors import PagingError
from qlora_edu.files import host_tier
from qlora_edu.kernels import PrefetchingPagedAdamW
from qlora_edu.paging import PagedAdamW


def make(*sizes: int, kind=PrefetchingPagedAdamW, **settings) -> PagedAdamW:
    return kind([nn.Parameter(torch.ones(n)) for n in sizes], **settings)


def step(optimizer: torch.optim.Optimizer) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_pinned_memory_that_is_refused_is_a_paging_error(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(PagingError, match=r"1,000 bytes .*out of memory\) in pinned memory"):
        host_tier._reserve(1000, True, None)


def test_the_space_of_a_file_is_taken_at_once(tmp_path):
    with (tmp_path / "states").open("wb") as file:
        host_tier._fill(file, 2**20)
        assert os.fstat(file.fileno()).st_blocks * 512 >= 2**20


IMPORT = "from qlora_edu.paging import PagedAdamW"


def script(body: str, *args: object, **settings) -> subprocess.Popen:
    code = f"import sys, torch\nfrom qlora_edu.files.host_tier import *\n{IMPORT}\n{body}"
    command = [sys.executable, "-c", code, *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **settings)


def test_a_killed_process_leaves_no_file(tmp_path):
    process = script(
        """
p = torch.nn.Parameter(torch.ones(100_000))
optimizer = PagedAdamW([p], budget_bytes=2**14, page_bytes=2**13, folder=sys.argv[1])
p.grad = torch.ones_like(p)
for step in range(10**9):
    optimizer.step()
    print(step, flush=True)
""",
        tmp_path,
    )
    assert process.stdout.readline().strip() == "0" and process.stdout.readline().strip() == "1"
    process.kill()
    process.communicate()
    assert process.returncode == -9 and list(tmp_path.iterdir()) == []


def test_the_folder_is_empty_all_the_time(tmp_path):
    step(make(1000, budget_bytes=1024, page_bytes=1024, folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


DISK_FULL = """
import resource
p = torch.nn.Parameter(torch.ones(1000))
settings = dict(budget_bytes=2048, page_bytes=1024, folder=sys.argv[1])
optimizer = PagedAdamW([p], **settings)
twin = torch.nn.Parameter(torch.ones(1000))
other = torch.optim.AdamW([twin], foreach=False)
def step():
    p.grad, twin.grad = torch.ones(1000), torch.ones(1000)
    optimizer.step(), other.step()
step()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
q = torch.nn.Parameter(torch.ones(10_000))
late = {"params": [q]}
for attempt in (lambda: PagedAdamW([q], **settings), lambda: optimizer.add_param_group(late)):
    try:
        attempt()
    except PagingError as error:
        print(error)
step()
assert torch.equal(p, twin) and torch.equal(q, torch.ones(10_000))
assert len(optimizer.param_groups) == 1 and optimizer.host_bytes == 8000
"""


def test_a_file_that_may_not_grow_is_refused_before_the_first_step(tmp_path):
    """A real refusal by the kernel, in a process that may not write files over 4 KiB."""
    out, err = script(DISK_FULL, tmp_path).communicate()
    lines = out.splitlines()
    assert err == "" and len(lines) == 2
    for line in lines:
        assert "File too large" in line and str(tmp_path) in line
        assert "80,000 bytes for optimizer states" in line


READ_ONLY = """
import os
p = torch.nn.Parameter(torch.ones(9))
settings = dict(budget_bytes=64, page_bytes=64)
PagedAdamW([p], **settings)  # imports what torch puts off
os.setuid(65534)
try:
    PagedAdamW([p], **settings, folder=sys.argv[1])
except PagingError as error:
    print(error)
"""


def test_a_read_only_folder_is_refused():
    with tempfile.TemporaryDirectory() as folder:  # one that others may enter, unlike tmp_path
        os.chmod(folder, 0o555)
        body = READ_ONLY if os.geteuid() == 0 else READ_ONLY.replace("os.setuid(65534)", "")
        out, err = script(body, folder).communicate()
        assert err == "" and "Permission denied" in out and f"in {folder}" in out
        assert "pass another folder=" in out


def test_without_posix_fallocate_zeros_are_written(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    ours = make(400_000, budget_bytes=2**20, page_bytes=2**18)
    theirs = torch.optim.AdamW([nn.Parameter(torch.ones(400_000))], foreach=False)
    assert not ours.pages[-1].host.any()
    for optimizer in (ours, theirs):
        step(optimizer)
    assert torch.equal(*(o.param_groups[0]["params"][0] for o in (ours, theirs)))
    ours, theirs = (o.state_dict()["state"][0] for o in (ours, theirs))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if os.path.exists("/dev/full"):
        full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        with pytest.raises(OSError, match="No space"):
            host_tier._fill(full, 10)
        full.close()


def test_a_missing_folder_is_refused(tmp_path):
    for folder in (tmp_path / "nowhere", __file__):
        with pytest.raises(PagingError, match="cannot reserve 64 bytes"):
            make(5, budget_bytes=64, page_bytes=64, folder=folder)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts open files in /proc")
def test_many_optimizers_leave_no_threads_and_no_files():
    gc.collect()
    threads, files = threading.active_count(), open_files()
    for _ in range(30):
        ours = make(*[100] * 40, budget_bytes=1024, page_bytes=512)
        step(ours)
        assert open_files() <= files + 2  # one file a group, not one a parameter
        del ours  # in no cycle, so gone at once
    deadline = time.time() + 300
    while threading.active_count() > threads and time.time() < deadline:
        time.sleep(0.01)  # a worker needs a moment to notice
    assert threading.active_count() <= threads and open_files() <= files
