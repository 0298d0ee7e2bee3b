"""Chapter 7: `PagedAdamW` and its fast twin are torch's to the bit, and keep their budget."""

import copy
import errno
import itertools
import math
import os
import pickle
import threading
import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from qlora_edu import paging
from qlora_edu.errors import PagingError
from qlora_edu.files import host_tier
from qlora_edu.kernels import PagingCounters, PrefetchingPagedAdamW
from qlora_edu.paging import (
    PagedAdamW,
    PageTable,
    adamw_update,
)

KINDS = (PagedAdamW, PrefetchingPagedAdamW, partial(PrefetchingPagedAdamW, prefetch=False))

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
STATES = ("exp_avg", "exp_avg_sq")
LAYOUTS = ("plain", "transposed", "every other", "odd offset")


def same_bits(a: Tensor, b: Tensor, zeros_have_signs: bool = True) -> bool:
    """Every bit but the payload of NaN, and the sign of zeros where torch has no one answer."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not zeros_have_signs:
        a, b = a + 0.0, b + 0.0
    bits = BITS[a.element_size()]
    differ = a.reshape(-1).view(bits) != b.reshape(-1).view(bits)
    return not (differ & ~(a.isnan() & b.isnan()).reshape(-1)).any()


def make_pages_of(shape, dtype, seed: int, special: bool) -> Tensor:
    """Normal numbers over many orders of magnitude; if `special`, zeros, NaN and the like too."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    numbers *= torch.exp(3 * torch.randn(shape, generator=generator, dtype=torch.float64))
    if special:
        values = [0.0, -0.0, 1e-42, -1e-30, 1e30, 6e4, -6e4, math.inf, -math.inf, math.nan]
        values = torch.tensor(values, dtype=torch.float64)
        which = torch.randint(3 * len(values), numbers.shape, generator=generator)
        numbers = torch.where(which < len(values), values[which % len(values)], numbers)
    return numbers.to(dtype)


def lay_out(values: Tensor, layout: str) -> nn.Parameter:
    """A leaf with these values, not always contiguous or aligned."""
    n = values.numel()
    if layout == "transposed" and values.ndim == 2:
        values = values.t().contiguous().t()
    elif layout == "every other":
        values = (
            values.new_zeros(2 * n)[::2]
            .view(-1)
            .copy_(values.reshape(-1))
            .as_strided(values.shape, [2 * s for s in values.contiguous().stride()])
        )
    elif layout == "odd offset":
        values = values.new_zeros(n + 1)[1:].copy_(values.reshape(-1)).view(values.shape)
    return nn.Parameter(values.clone() if layout == "plain" else values)


SHAPES = [(), (0,), (1,), (3, 0), (7,), (16,), (33,), (5, 13), (64,), (9, 31), (257,), (40, 25)]


@st.composite
def runs(draw) -> dict:
    """A model, its groups, a budget, and what happens to them."""
    parameter = st.fixed_dictionaries(
        {
            "shape": st.sampled_from(SHAPES),
            "dtype": st.sampled_from(host_tier.DTYPES),
            "layout": st.sampled_from(LAYOUTS),
            "gradient layout": st.sampled_from(LAYOUTS),
        }
    )
    group = st.fixed_dictionaries(
        {
            "params": st.lists(parameter, min_size=1, max_size=4),
            "options": st.fixed_dictionaries(
                {},
                optional={
                    "lr": st.sampled_from([0.0, 1e-3, 0.1, 1]),
                    "betas": st.sampled_from([(0.9, 0.95), (0.0, 0.5), (0.3, 0.0), (0.5, 0.9999)]),
                    "eps": st.sampled_from([0.0, 1e-8, 1e-3]),
                    "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
                },
            ),
        }
    )
    groups = draw(st.lists(group, min_size=1, max_size=3))
    steps = draw(st.integers(1, 5))
    count = sum(len(group["params"]) for group in groups)
    page_bytes = draw(st.sampled_from([16, 24, 100, 128, 1000, 4096, 2**16]))
    budget_bytes = page_bytes * draw(st.integers(1, 12)) + draw(st.integers(0, 15))
    has_gradient = st.lists(st.booleans(), min_size=count, max_size=count)
    return {
        "groups": groups,
        "present": draw(st.lists(has_gradient, min_size=steps, max_size=steps)),
        "special": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**30)),
        "settings": {
            "budget_bytes": budget_bytes,
            "page_bytes": page_bytes,
        },
        "kind": draw(st.sampled_from(KINDS)),
        "reload": draw(st.sampled_from([None, "another budget", "by way of torch", "the same"])),
        "reload_at": draw(st.integers(0, steps - 1)),
        "late group": draw(st.booleans()),
    }


def build_groups(run: dict) -> list[dict]:
    seeds = itertools.count(run["seed"])
    return [
        {
            **group["options"],
            "params": [
                lay_out(make_pages_of(p["shape"], p["dtype"], next(seeds), False), p["layout"])
                for p in group["params"]
            ],
        }
        for group in run["groups"]
    ]


def give_gradients(run: dict, groups: list[dict], step: int) -> None:
    parameters = [p for group in groups for p in group["params"]]
    plans = [p for group in run["groups"] for p in group["params"]]
    for i, (p, plan) in enumerate(zip(parameters, plans, strict=True)):
        seed = run["seed"] + 1000 * step + i
        numbers = make_pages_of(p.shape, p.dtype, seed, run["special"])
        p.grad = lay_out(numbers, plan["gradient layout"]).detach()
        if not run["present"][step][i]:
            p.grad = None


def assert_equal(ours: PagedAdamW, theirs: torch.optim.AdamW) -> None:
    """Parameters, states, steps and options."""
    state, other = ours.state_dict(), theirs.state_dict()
    for group, twin in zip(state["param_groups"], other["param_groups"], strict=True):
        assert {**group, "foreach": None} == {**twin, "foreach": None}
    assert sorted(state["state"]) == sorted(other["state"])
    for group, twin in zip(ours.param_groups, theirs.param_groups, strict=True):
        signs = group["betas"][0] > 0
        for p, q in zip(group["params"], twin["params"], strict=True):
            assert same_bits(p.detach(), q.detach(), signs)
    for group in state["param_groups"]:
        signs = group["betas"][0] > 0
        for i in set(group["params"]) & set(state["state"]):
            assert sorted(state["state"][i]) == sorted(other["state"][i])
            assert torch.equal(state["state"][i]["step"], other["state"][i]["step"])
            for name in STATES:
                assert same_bits(state["state"][i][name], other["state"][i][name], signs)


def reload(ours: PagedAdamW, theirs, run: dict, groups: list[dict]) -> PagedAdamW:
    saved = ours.state_dict()
    if run["reload"] == "by way of torch":
        between = torch.optim.AdamW(copy.deepcopy(groups), foreach=False)
        between.load_state_dict(saved)
        saved = between.state_dict()
        assert_equal(ours, theirs)
    if run["reload"] == "the same":
        for group in groups:  # what is loaded must replace what was done since
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        before = [p.detach().clone() for group in groups for p in group["params"]]
        ours.step()
        with torch.no_grad():
            for p, old in zip((p for g in groups for p in g["params"]), before, strict=True):
                p.copy_(old)
    else:
        page_bytes = run["settings"]["page_bytes"] * 2
        ours = type(ours)(groups, page_bytes=page_bytes, budget_bytes=3 * page_bytes)
    ours.load_state_dict(saved)
    return ours


@settings(max_examples=200, deadline=None)
@given(runs())
def test_it_is_torchs_adamw_to_the_bit(run):
    groups, twins = build_groups(run), build_groups(run)
    late = len(groups) - 1 if run["late group"] and len(groups) > 1 else len(groups)
    ours = run["kind"](groups[:late], **run["settings"])
    theirs = torch.optim.AdamW(twins[:late], foreach=False)
    for group, twin in zip(groups[late:], twins[late:], strict=True):
        ours.add_param_group(group)
        theirs.add_param_group(twin)
    for step in range(len(run["present"])):
        if run["reload"] and step == run["reload_at"]:
            ours = reload(ours, theirs, run, groups)
            assert_equal(ours, theirs)
        give_gradients(run, groups, step)
        give_gradients(run, twins, step)
        ours.step()
        theirs.step()
        assert ours.device_bytes <= run["settings"]["budget_bytes"] * (6 if run["reload"] else 1)
        if step % 2:  # the dirty pages of even steps stay in their frames
            assert_equal(ours, theirs)
    assert_equal(ours, theirs)
    resumed = torch.optim.AdamW(copy.deepcopy(groups), foreach=False)
    resumed.load_state_dict(ours.state_dict())
    give_gradients(run, resumed.param_groups, 0)
    give_gradients(run, twins, 0)
    resumed.step()
    theirs.step()
    for p, q in zip(resumed.param_groups[0]["params"], twins[0]["params"], strict=True):
        assert same_bits(p.detach(), q.detach(), resumed.param_groups[0]["betas"][0] > 0)


def make_parameters(*sizes: int, dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]


def train(optimizer, steps: int = 1, seed: int = 0) -> None:
    """Some steps with gradients that are the same for every optimizer."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def make_pair(
    *sizes: int, kind: type[PagedAdamW] = PrefetchingPagedAdamW, **settings
) -> tuple[PagedAdamW, torch.optim.AdamW]:
    ours = kind(make_parameters(*sizes), **settings)
    return ours, torch.optim.AdamW(make_parameters(*sizes), foreach=False)


@pytest.mark.parametrize(("kind", "threads"), [(k, n) for k in KINDS[:2] for n in (1, 2)])
@pytest.mark.parametrize("dtype", host_tier.DTYPES)
def test_large_parameters_are_equal_too(kind, threads, dtype):
    """From 32,768 elements on, torch itself cuts a tensor in as many parts as there are threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = kind(make_parameters(150_001, dtype=dtype), budget_bytes=300_000, page_bytes=100_000)
        theirs = torch.optim.AdamW(make_parameters(150_001, dtype=dtype), foreach=False)
        for seed in range(3):
            train(ours, seed=seed)
            train(theirs, seed=seed)
        assert_equal(ours, theirs)
    finally:
        torch.set_num_threads(before)


def test_the_update_of_a_slice_is_the_slice_of_the_update():
    numbers = [make_pages_of((1003,), torch.float32, seed, False) for seed in range(4)]
    numbers[3].abs_()
    whole, cut = [x.clone() for x in numbers], [x.clone() for x in numbers]
    options = (3.0, 0.01, (0.9, 0.99), 1e-8, 0.1)
    adamw_update(*whole, *options)
    for start in range(0, 1003, 7):
        adamw_update(*(x[start : start + 7] for x in cut), *options)
    assert all(same_bits(a, b) for a, b in zip(whole, cut, strict=True))


class NaiveTable:
    """The same by brute force: every frame with the time of its last use."""

    def __init__(self, frames: int) -> None:
        self.pages, self.used = [None] * frames, [-1] * frames

    def access(self, page: int, now: int) -> tuple:
        fault = page not in self.pages
        if fault:
            free = [f for f, p in enumerate(self.pages) if p is None]
            frame = free[0] if free else self.used.index(min(self.used))
        else:
            frame = self.pages.index(page)
        evicted = self.pages[frame] if fault else None
        self.pages[frame], self.used[frame] = page, now
        return frame, fault, evicted

    def resident(self) -> list[int]:
        filled = [(t, p) for t, p in zip(self.used, self.pages, strict=True) if p is not None]
        return [page for _, page in sorted(filled)]


@given(st.integers(1, 6), st.lists(st.integers(0, 9), max_size=60))
def test_the_page_table_evicts_what_was_used_least_recently(frames, pages):
    table, naive = PageTable(frames), NaiveTable(frames)
    for now, page in enumerate(pages):
        assert tuple(table.access(page)) == naive.access(page, now)
        assert list(table.frame_of) == naive.resident() and page in table.frame_of
        assert naive.pages[table.frame_of[page]] == page
    assert table.hits + table.faults == len(pages)


def test_a_table_without_frames_is_refused():
    with pytest.raises(PagingError, match="at least one frame"):
        PageTable(0)


# What paging costs


def test_when_everything_fits_only_the_first_step_reads():
    ours, _ = make_pair(1000, 500, budget_bytes=2**14, page_bytes=1024, prefetch=False)
    train(ours)
    pages = len(ours.pages)
    assert pages == 8 + 4 and ours.counters == PagingCounters(faults=pages, bytes_in=12_000)
    ours.counters = PagingCounters()
    train(ours, 3)
    assert ours.counters == PagingCounters(hits=3 * pages)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_sweep_over_one_page_too_many_finds_nothing(prefetch):
    """LRU evicts just the page that comes next: five pages thrash four frames."""
    ours, _ = make_pair(5 * 128, budget_bytes=4096, page_bytes=1024, prefetch=prefetch)
    train(ours, 10)
    counters = ours.counters
    assert counters.hits == 0
    assert (counters.faults, counters.prefetched) == ((10, 40) if prefetch else (50, 0))
    assert counters.evictions == 46 and counters.bytes_in == 50 * 1024
    assert counters.bytes_out == 46 * 1024
    ours.flush()
    assert counters.bytes_out == 50 * 1024
    ours.flush()  # nothing has changed since
    assert counters.bytes_out == 50 * 1024


def test_with_one_frame_there_is_no_prefetch():
    ours, theirs = make_pair(1000, budget_bytes=1024, page_bytes=1024)
    train(ours, 2)
    train(theirs, 2)
    assert ours.counters.prefetched == 0 and ours.counters.faults == 16
    assert_equal(ours, theirs)


def test_the_trace_tells_what_happened():
    ours, _ = make_pair(3 * 128, budget_bytes=2048, page_bytes=1024)
    ours.trace = []
    train(ours)
    assert [tuple(event) for event in ours.trace] == [
        (0, "fault", 0, None),
        (1, "prefetch", 1, None),
        (1, "prefetched", 1, None),
        (2, "prefetch", 0, 0),
        (2, "prefetched", 0, None),
    ]
    assert [page.columns for page in ours.pages] == [
        slice(0, 128),
        slice(128, 256),
        slice(256, 384),
    ]


@settings(max_examples=40, deadline=None)
@given(runs())
def test_the_counters_add_up(run):
    groups = build_groups(run)
    prefetch = run["kind"] is not PagedAdamW
    ours = PrefetchingPagedAdamW(groups, **run["settings"], prefetch=prefetch)
    ours.trace = []
    for step in range(len(run["present"])):
        give_gradients(run, groups, step)
        ours.step()
    uses = [event for event in ours.trace if event.what != "prefetch"]
    present = [
        len(ours._pages_of[p])
        for step in run["present"]
        for p, there in zip((p for g in groups for p in g["params"]), step, strict=True)
        if there
    ]
    counters = ours.counters
    assert counters.hits + counters.prefetched + counters.faults == len(uses) == sum(present)
    loads = [event for event in ours.trace if event.what in ("fault", "prefetch")]
    assert counters.bytes_in == sum(ours.pages[event.page].host.nbytes for event in loads)
    assert counters.evictions == sum(event.evicted is not None for event in loads)
    assert ours.table.faults == len(loads) == counters.faults + counters.prefetched
    ours.flush()
    assert ours.counters.bytes_out == counters.bytes_in  # each visit changes the page
    assert all(page.host.nbytes <= ours.page_bytes for page in ours.pages)
    # Every element once, and in order.
    for p, numbers in ours._pages_of.items():
        ends = [0] + [ours.pages[number].columns.stop for number in numbers]
        assert [ours.pages[number].columns.start for number in numbers] == ends[:-1]
        assert ends[-1] == p.numel()


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("budget", [2**16, 2**18, 2**22])
def test_a_step_allocates_the_frames_and_half_a_page(budget, kind):
    """By the allocator's own record, from before the optimizer is made."""
    parameters = make_parameters(300_000, 100_000)
    for p in parameters:
        p.grad = torch.ones_like(p)
    page = 2**16
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        optimizer = kind(parameters, budget_bytes=budget, page_bytes=page)
        for _ in range(2):
            optimizer.step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]
    most = max(itertools.accumulate(changes))
    frames = min(budget, len(optimizer.pages) * page)
    assert optimizer.device_bytes == frames == sum(f.nbytes for f in optimizer.frames)
    assert frames + page // 2 <= most <= frames + page // 2 + 1024  # two steps, some scalars


@contextmanager
def slow_copies(monkeypatch, seconds: float):
    quick = host_tier._copy

    def slow(moves):
        time.sleep(seconds)
        quick(moves)

    with monkeypatch.context() as patch:
        patch.setattr(host_tier, "_copy", slow)
        yield


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_nothing_is_used_before_it_has_arrived(monkeypatch, frames):
    ours, theirs = make_pair(700, 300, budget_bytes=frames * 1024, page_bytes=1024)
    with slow_copies(monkeypatch, 0.003):
        train(ours, 3)
        train(theirs, 3)
        assert_equal(ours, theirs)


def test_the_next_page_travels_while_this_one_is_computed(monkeypatch):
    ours, _ = make_pair(4 * 128, budget_bytes=2048, page_bytes=1024)
    update, copy_at_once, pending = paging.adamw_update, host_tier._copy, []
    permits = threading.Semaphore(1)  # for the first page: nothing is computed before it

    def copy_if_permitted(moves):
        assert permits.acquire(timeout=300), "a page was waited for too early"
        copy_at_once(moves)

    def spy(*args, **options):
        pending.append(sum(not arrival.done() for arrival in ours._pending.values()))
        permits.release()
        update(*args, **options)

    monkeypatch.setattr(host_tier, "_copy", copy_if_permitted)
    monkeypatch.setattr(paging, "adamw_update", spy)
    train(ours)
    assert pending == [1, 1, 1, 0]


def test_an_error_on_the_way_is_not_lost(monkeypatch):
    def broken(moves):
        raise RuntimeError("the disk is on fire")

    ours, _ = make_pair(700, budget_bytes=1024, page_bytes=1024)
    monkeypatch.setattr(host_tier, "_copy", broken)
    with pytest.raises(RuntimeError, match="on fire"):
        train(ours)


# A GPU is not needed to check what is asked of one


def test_on_a_gpu_copies_and_computation_wait_for_each_other(monkeypatch):
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            number = sum(entry.startswith("event") for entry in log)
            log.append(f"event {number}")
            return SimpleNamespace(
                number=number, synchronize=lambda: log.append(f"host waits {number}")
            )

        def wait_event(self, event):
            log.append(f"{self.name} waits for event {event.number}")

    @contextmanager
    def on(stream):
        log.append(f"on {stream.name}")
        yield

    main = Stream("main")
    fake = SimpleNamespace(
        Stream=lambda device: Stream("side"),
        current_stream=lambda device: main,
        stream=on,
    )
    ours, theirs = make_pair(3 * 128, budget_bytes=2048, page_bytes=1024)
    monkeypatch.setattr(torch, "cuda", fake)
    ours._copier = host_tier.StreamCopier(torch.device("cuda"))
    update = paging.adamw_update

    def spy(*args, **options):
        log.append("update")
        update(*args, **options)

    monkeypatch.setattr(paging, "adamw_update", spy)
    train(ours)
    ours.flush()
    monkeypatch.undo()
    ours._copier = host_tier.ThreadCopier(torch.device("cpu"))
    train(theirs)
    copying = ["side waits for main", "on side"]
    assert log == [
        *copying, "event 0", *copying, "event 1", "main waits for event 0", "update",
        *copying, "event 2", "main waits for event 1", "update",
        "main waits for event 2", "update", *copying, "event 3", "host waits 3",
    ]  # fmt: skip
    assert_equal(ours, theirs)


def break_disk(monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)


def test_after_an_error_everything_goes_on_as_before(monkeypatch):
    """A full disk, and every other refusal of a group, in the middle of training."""
    ours, theirs = make_pair(1000, 300, budget_bytes=4096, page_bytes=1024)
    train(ours, 2)
    train(theirs, 2)
    known = ours.param_groups[0]["params"][0]
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    elsewhere = nn.Parameter(torch.ones(3, device="meta"))
    complex_number = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    refused = [
        ({"params": [known]}, ValueError, "more than one parameter group"),
        ({"params": [frozen]}, PagingError, "requires_grad=False"),
        ({"params": [elsewhere]}, PagingError, "on meta.*all on cpu"),
        ({"params": [complex_number]}, PagingError, "complex64"),
        ({"lr": torch.tensor(1.0)}, PagingError, r"cannot do \{'lr': tensor"),
        ({"betas": (0.9, torch.tensor(0.9))}, PagingError, r"cannot do \{'betas': \(0.9, tensor"),
        *[
            ({name: True}, PagingError, f"cannot do .*{name}.: True")
            for name in host_tier.UNSUPPORTED
        ],
        ({}, PagingError, r"64 bytes .* \(.*No space left on device"),
    ]
    break_disk(monkeypatch)
    for group, error, message in refused:
        group.setdefault("params", make_parameters(5))
        given_group = dict(group)
        with pytest.raises(error, match=message):
            ours.add_param_group(group)
        assert group == given_group
    monkeypatch.undo()
    for optimizer in (ours, theirs):
        train(optimizer, 2, seed=1)
        optimizer.add_param_group({"params": make_parameters(50), "lr": 0.1})
        train(optimizer, 2, seed=2)
    assert_equal(ours, theirs)


# What is refused


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"budget_bytes": 100, "page_bytes": 101}, "page_bytes=101"),
        ({"budget_bytes": 0, "page_bytes": 0}, "budget_bytes=0, page_bytes=0"),
        ({"budget_bytes": 1e6}, "budget_bytes=1000000.0, "),
        ({"budget_bytes": 100, "page_bytes": 7}, "needs 8 bytes"),
        ({"budget_bytes": 100}, "page_bytes=1048576"),
    ],
)
def test_a_budget_below_one_page_is_refused(settings, message):
    parameters = make_parameters(5)
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(PagingError, match=message) as caught:
        PagedAdamW(parameters, **settings)
    assert isinstance(caught.value, PagingError) and isinstance(caught.value, ValueError)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_torchs_own_checks_hold(name):
    with pytest.raises(ValueError, match="Invalid"):
        PagedAdamW(make_parameters(5), **{name: -1.0}, budget_bytes=64, page_bytes=64)


def break_gradient(p: nn.Parameter, how: str) -> None:
    if how == "sparse":
        p.grad = torch.ones(p.shape).to_sparse()
    elif how == "tensor lr":
        p.group["lr"] = torch.tensor(0.1)
    elif how == "dtype":
        p.data = p.data.double()
    else:
        p.data = torch.cat([p.data, p.data])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("sparse", r"parameter \(300,\) is torch.float32, .*keep gradients dense"),
        ("tensor lr", r"cannot do \{'lr': tensor"),
        ("dtype", r"parameter \(300,\) is torch.float64, .*keep gradients dense"),
        ("shape", r"parameter \(600,\) is torch.float32, .*keep gradients dense"),
    ],
)
def test_a_step_that_cannot_be_done_does_nothing(how, says):
    ours, theirs = make_pair(700, 300, budget_bytes=2048, page_bytes=1024)
    train(ours)
    train(theirs)
    for optimizer in (ours, theirs):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
    last = ours.param_groups[0]["params"][-1]
    gradient, data = last.grad, last.data
    last.group = ours.param_groups[0]
    last.grad = gradient if how in ("sparse", "tensor lr") else None
    break_gradient(last, how)
    last.grad = last.grad if last.grad is not None else torch.ones_like(last)
    with pytest.raises(PagingError, match=says):
        ours.step()
    last.grad, ours.param_groups[0]["lr"] = None, 1e-3
    last.data = data
    last.grad = gradient
    ours.step()
    theirs.step()
    assert_equal(ours, theirs)


def test_it_is_not_copied_or_pickled_without_its_states():
    ours, _ = make_pair(5, budget_bytes=64, page_bytes=64)
    with pytest.raises(PagingError, match="state_dict"):
        copy.deepcopy(ours)
    with pytest.raises(PagingError, match="state_dict"):
        pickle.dumps(ours)


# State dicts


def test_a_state_dict_is_a_copy_and_so_is_what_is_loaded():
    ours, theirs = make_pair(700, budget_bytes=1024, page_bytes=1024)
    train(ours)
    train(theirs)
    saved = ours.state_dict()
    kept = copy.deepcopy(saved)
    ours.load_state_dict(saved)
    train(ours, 2, seed=1)
    train(theirs, 2, seed=1)
    for name in ("step", *STATES):
        assert torch.equal(saved["state"][0][name], kept["state"][0][name])
    for value in saved["state"][0].values():
        value.zero_()
    assert_equal(ours, theirs)
    assert set(ours.state[ours.param_groups[0]["params"][0]]) == {"step"}


def test_what_is_not_in_a_state_dict_starts_from_zero():
    ours, theirs = make_pair(700, 300, budget_bytes=2**14, page_bytes=1024)
    for optimizer in (ours, theirs):
        train(optimizer, 2)
        saved = optimizer.state_dict()
        del saved["state"][1]
        optimizer.load_state_dict(saved)
        train(optimizer, 2)
    assert_equal(ours, theirs)


def test_a_state_dict_goes_to_disk_and_back(tmp_path):
    ours, theirs = make_pair(700, 300, budget_bytes=2048, page_bytes=1024)
    for optimizer, name in ((ours, "ours.pt"), (theirs, "theirs.pt")):
        train(optimizer, 2)
        torch.save(optimizer.state_dict(), tmp_path / name)
    ours.load_state_dict(torch.load(tmp_path / "theirs.pt", weights_only=True))
    theirs.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
    train(ours, 2)
    train(theirs, 2)
    assert_equal(ours, theirs)


def spoil(saved: dict, how: str) -> None:
    state, group = saved["state"], saved["param_groups"][0]
    if how == "shape":
        state[1]["exp_avg_sq"] = torch.zeros(20, 15)
    elif how == "key":
        del state[1]["exp_avg"]
    elif how == "amsgrad state":
        state[1]["max_exp_avg_sq"] = torch.zeros(300)
    elif how == "no tensor":
        state[1]["exp_avg"] = None
    elif how == "group size":
        group["params"] = [0]
    elif how == "groups":
        saved["param_groups"].append({**group, "params": []})
    elif how == "stranger":
        state[7] = state[1]
    elif how == "no lr":
        del group["lr"]
    elif how == "amsgrad":
        group["amsgrad"] = True
    elif how == "tensor lr":
        group["lr"] = torch.tensor(1e-3)
    elif how == "step":
        state[1]["step"] = None


SPOILT = {
    "shape": r"state 1 holds .*'exp_avg_sq': \(20, 15\).* not .*'exp_avg_sq': \(300,\)",
    "key": r"state 1 holds \{'step': \(\), 'exp_avg_sq': \(300,\)\}, not ",
    "amsgrad state": "max_exp_avg_sq",
    "no tensor": "'exp_avg': None",
    "group size": r"groups of \[1\] parameters were saved, the optimizer has \[2\]",
    "groups": r"groups of \[2, 0\]",
    "stranger": "state 7 .*no such parameter",
    "no lr": "'lr': None",
    "amsgrad": "cannot do .'amsgrad'",
    "tensor lr": r"cannot do \{'lr': tensor",
    "step": "'step': None",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_state_dict_that_does_not_fit_changes_nothing(how):
    ours, theirs = make_pair(700, 300, budget_bytes=2048, page_bytes=1024)
    train(ours, 2)
    train(theirs, 2)
    saved = ours.state_dict()
    saved["state"][0]["exp_avg"].fill_(7)
    spoil(saved, how)
    with pytest.raises(PagingError, match=SPOILT[how]):
        ours.load_state_dict(saved)
    train(ours, 2)
    train(theirs, 2)
    assert_equal(ours, theirs)


# It is an optimizer like any other


@pytest.mark.parametrize("kind", KINDS[:2])
def test_it_takes_the_place_of_adamw_as_it_is(kind):
    ours, theirs = kind(make_parameters(700, 300)), torch.optim.AdamW(make_parameters(700, 300))
    train(ours, 2)
    train(theirs, 2)
    assert_equal(ours, theirs)
    assert ours.table.frames == 64 and ours.device_bytes == 2 * 2**20  # one page each, 1 MiB


def test_schedulers_closures_hooks_and_zero_grad():
    ours, theirs = make_pair(700, budget_bytes=2048, page_bytes=1024)
    calls = []
    for optimizer in (ours, theirs):
        (p,) = optimizer.param_groups[0]["params"]
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        optimizer.register_step_post_hook(lambda *_: calls.append(1))

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss

        losses = []
        for _ in range(4):
            losses.append(optimizer.step(closure).item())
            scheduler.step()
        optimizer.zero_grad()
        assert p.grad is None and losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert isinstance(ours, torch.optim.AdamW) and len(calls) == 8
    assert_equal(ours, theirs)


def test_parameters_of_one_storage():
    optimizers = []
    for make in (lambda p: PagedAdamW(p, budget_bytes=128, page_bytes=64), torch.optim.AdamW):
        buffer = torch.arange(101.0)
        parameters = [nn.Parameter(buffer[1:51]), nn.Parameter(buffer[51:].view(2, 25)[:, 1::2])]
        optimizers.append((make(parameters), buffer))
        train(optimizers[-1][0], 3)
    assert same_bits(optimizers[0][1], optimizers[1][1])


def test_an_update_is_seen_by_autograd():
    """It must spoil a graph that was recorded before, as torch's does."""
    ours, _ = make_pair(5, budget_bytes=64, page_bytes=64)
    (p,) = ours.param_groups[0]["params"]
    loss = p.square().sum()
    train(ours)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bitsandbytes_pages_the_sizes_that_are_said_here(monkeypatch):
    """Its own function decides; tensors on the meta device stand in for a GPU's."""
    from bitsandbytes import functional
    from bitsandbytes.optim import PagedAdamW as Theirs

    theirs = Theirs([nn.Parameter(torch.zeros(1))])
    paged = []

    def get_paged(*shape, dtype, device):
        paged.append(math.prod(shape))
        return torch.empty(shape, dtype=dtype, device=device)

    monkeypatch.setattr(functional, "get_paged", get_paged)
    monkeypatch.setattr(functional, "fill", lambda *_: None)
    sizes = [1, 65_536, 99_999, 100_000, 131_072]
    for n in sizes:
        theirs.get_state_buffer(torch.empty(n, device="meta"))
    theirs.page_mng.paged_tensors.clear()
    expected = [n in paged for n in sizes]
    assert [n >= host_tier.NEVER_PAGED for n in sizes] == expected
    assert expected == [False, False, False, True, True]
