"""Generated tensors that are hard to quantise, for the tests of chapters 2, 3 and 5."""

from functools import cache

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from qlora_edu.blockwise import BLOCKSIZES, DTYPES
from qlora_edu.codebooks import get_levels

# No deadline and no complaint about slow generation: a busy machine is no fault of the code.
unhurried = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

blocksizes = st.sampled_from(BLOCKSIZES)

levels_of = cache(get_levels)
"""AF4 takes a moment to derive, and a test asks for it often."""


@st.composite
def weights(draw, longest=12_288):
    """Draw a 1-D tensor: normal, tied, constant, sparse or wild, from 1e-40 to 3e38 in size."""
    dtype = draw(st.sampled_from(DTYPES))
    largest = min(3e38, torch.finfo(dtype).max)
    n = draw(st.integers(1, 300) | st.sampled_from([512, 1023, 4096, 4097, 8225, 10_001, 12_288]))
    n = min(n, longest)
    kind = draw(st.sampled_from(["normal", "ties", "constant", "sparse", "wild"]))
    if kind == "wild":
        numbers = draw(st.lists(st.floats(-largest, largest), min_size=1, max_size=80))
        return torch.tensor(numbers, dtype=torch.float64).to(dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if kind == "ties":
        # A power of two leaves midpoints exact, so ties stay ties and neighbours neighbours.
        levels = get_levels(draw(st.sampled_from(["nf4", "fp4"]))).unique()
        ties = (levels[:-1] + levels[1:]) / 2
        two = torch.tensor(2.0)
        pool = torch.cat([levels, ties, torch.nextafter(ties, two), torch.nextafter(ties, -two)])
        x = pool[torch.randint(len(pool), (n,), generator=generator)]
        x[::32] = 1
        scale = 2.0 ** draw(st.integers(-130, 126))
    else:
        x = torch.randn(n, generator=generator)
        if kind == "constant":
            x = torch.ones(n) * draw(st.sampled_from([-1.0, 0.0, 1.0]))
        if kind == "sparse":
            x *= torch.rand(n, generator=generator) < 0.02
        scale = draw(st.sampled_from([1e-40, 1e-38, 1.2e-38, 1e-30, 1e-3, 1.0, 6e4, 3e38]))
    return (x.double() * scale).clamp(-largest, largest).to(dtype)


@st.composite
def tensors(draw, longest=12_288):
    """Draw one of `weights` in one to three dimensions, contiguous or transposed."""
    flat = draw(weights(longest))
    dimensions = draw(st.integers(1, 3))
    if dimensions == 1:
        return flat
    rows = draw(st.integers(1, min(5, len(flat))))
    shape = (rows, -1) if dimensions == 2 else (1, rows, -1)
    shaped = flat[: len(flat) // rows * rows].view(shape)
    return shaped.mT if draw(st.booleans()) else shaped
