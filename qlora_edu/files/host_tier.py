"""Where the pages of chapter 7 wait: pinned memory beside a GPU, a file beside a CPU."""

import mmap
import os
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_edu.errors import PagingError

ALIGNMENT = 64  # bytes: every dtype, and every vector register, may start here


class HostTierError(PagingError, OSError):
    """The states found no room: a full disk, a folder that is missing or read-only."""


def _reserve_rows(
    parameters: list[Tensor], folder: str | os.PathLike | None
) -> dict[Tensor, Tensor]:
    """Both states of every parameter, in the host tier: zeros ``[2, elements]`` in its dtype."""
    if not parameters:
        return {}
    sizes = [-(-2 * p.nbytes // ALIGNMENT) * ALIGNMENT for p in parameters]
    cuda = parameters[0].device.type == "cuda"
    host = _pinned_memory(sum(sizes)) if cuda else _file_memory(sum(sizes), folder)
    pieces = zip(parameters, host.split(sizes), strict=True)
    return {p: piece[: 2 * p.nbytes].view(p.dtype).view(2, p.numel()) for p, piece in pieces}


def _pinned_memory(nbytes: int) -> Tensor:
    try:
        return torch.zeros(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        raise HostTierError(
            f"cannot pin {nbytes:,} bytes of memory for optimizer states ({error}): free some, or "
            "train fewer parameters"
        ) from error


def _file_memory(nbytes: int, folder: str | os.PathLike | None) -> Tensor:
    """Zeros in a temporary file without a name, gone with the process even when that is killed.

    The disk space is taken now: a disk that is full later would kill the process in a step.
    """
    if nbytes == 0:
        return torch.zeros(0, dtype=torch.uint8, device="cpu")
    try:
        folder = tempfile.gettempdir() if folder is None else folder
        with tempfile.TemporaryFile(dir=folder) as file:
            _fill(file, nbytes)
            return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)
    except OSError as error:
        try:
            room = f"{shutil.disk_usage(folder).free:,} bytes are free there"
        except OSError:
            room = "there is no such folder"
        raise HostTierError(
            error.errno,
            f"cannot reserve {nbytes:,} bytes for optimizer states in {folder} "
            f"({error.strerror}; {room}): pass a folder= that has room and can be written to",
        ) from error


def _fill(file: Any, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return
    for start in range(0, nbytes, 2**20):
        file.write(bytes(min(2**20, nbytes - start)))
    file.flush()


def _copy(moves: list[tuple[Tensor, Tensor]]) -> None:
    # By NumPy: torch would raise a second team of threads, and the two would wait for each other.
    for destination, source in moves:
        np.copyto(destination.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())


class _ThreadCopier:
    """Copies between two places in CPU memory, on one worker thread, in the order asked for."""

    def __init__(self, device: torch.device) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="paging")

    def adopt(self, frame: Tensor) -> None:
        pass

    def start(self, moves: list[tuple[Tensor, Tensor]]) -> Future:
        return self._worker.submit(_copy, moves)

    def wait(self, copies: Future) -> None:
        copies.result()

    finish = wait


class _StreamCopier:
    """Copies between a GPU and pinned memory, on a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def adopt(self, frame: Tensor) -> None:
        # Should the frame be freed while a copy is under way, nobody else gets its memory before.
        frame.record_stream(self._stream)

    def start(self, moves: list[tuple[Tensor, Tensor]]) -> Any:
        # What is written back is computed first, and a frame is overwritten after its last use.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # Row by row: only what is contiguous on both sides goes without a detour.
            for row, source in (pair for move in moves for pair in zip(*move, strict=True)):
                row.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, copies: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(copies)

    def finish(self, copies: Any) -> None:
        copies.synchronize()
