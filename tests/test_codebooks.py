"""Chapter 1: the derived tables equal the published ones, and numbers go to their nearest level."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import unhurried

from qlora_edu import codebooks as cb
from qlora_edu.errors import QuantizationError

# The published table, written out so that no library is asked.
PUBLISHED_NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]

# Yoshida's published AF4 tables: the second, seventh, ninth and fifteenth level of each block size.
PUBLISHED_AF4 = {
    32: [-0.72380075, -0.05258802, 0.04554747, 0.75299116],
    64: [-0.69441008, -0.04934812, 0.04273164, 0.72424863],
    128: [-0.66495284, -0.04645526, 0.04021689, 0.69496104],
    512: [-0.60903865, -0.04161132, 0.03600625, 0.63827231],
    4096: [-0.53790030, -0.03618635, 0.03129431, 0.56468758],
}


def misses(levels):
    return int((levels != torch.tensor(PUBLISHED_NF4)).sum())


def test_nf4_equals_the_published_table_in_all_sixteen_entries():
    assert cb.nf4_levels().tolist() == PUBLISHED_NF4
    assert torch.equal(cb.nf4_levels(), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(cb.nf4_levels(), bnb.create_normal_map().unique())


def test_nf4_has_seven_negative_levels_one_zero_and_eight_positive():
    levels = cb.nf4_levels()
    assert [int((levels.sign() == sign).sum()) for sign in (-1, 0, 1)] == [7, 1, 8]


@pytest.mark.parametrize("offset", [929 / 960, 0.9677, 0.967709, 0.96])
def test_any_other_offset_misses_the_table(offset):
    assert misses(cb.nf4_levels(offset=offset)) >= 12


def test_probabilities_spaced_in_float64_miss_the_table():
    """The subtlety of chapter 1: the float32 rounding of the probabilities is in the table."""
    positive, negative = (
        torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1])
        for n in (9, 8)
    )
    levels = torch.cat([-negative, torch.zeros(1), positive]).sort().values
    in_float64 = (levels / levels.max()).float()
    assert 6 <= misses(in_float64) <= 10
    # About one step of float32 at 1, 1.19e-7: too small to matter, large enough to break equality.
    assert (in_float64 - cb.nf4_levels()).abs().max() < 1.3e-7


def test_nf4_does_not_depend_on_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        tables = {name: cb.get_levels(name) for name in cb.LEVELS}
    finally:
        torch.set_default_dtype(torch.float32)
    for name, table in tables.items():
        assert torch.equal(table, cb.get_levels(name)), name


def test_normal_quantile_equals_scipy():
    from scipy.stats import norm

    probability = torch.linspace(0.001, 0.999, 999)
    expected = torch.from_numpy(norm.ppf(probability.double().numpy())).float()
    assert torch.equal(cb.normal_quantile(probability), expected)


@unhurried
@given(bits=st.integers(2, 8), offset=st.floats(0.51, 0.9999))
def test_nf_of_any_width_has_a_zero_and_spans_minus_one_to_one(bits, offset):
    levels = cb.nf4_levels(bits, offset)
    assert levels.shape == (2**bits,) and levels.dtype == torch.float32
    assert (levels.diff() > 0).all()
    assert levels[0] == -1 and levels[2 ** (bits - 1) - 1] == 0 and levels[-1] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"bits": 1}, "not 1, "),
        ({"bits": 9}, "not 9, "),
        ({"offset": 0.5}, "not 4, 0.5$"),
        ({"offset": 1.0}, "not 4, 1.0$"),
    ],
)
def test_nf4_refuses_what_makes_no_codebook(arguments, says):
    with pytest.raises(cb.QuantizationError, match=says):
        cb.nf4_levels(**arguments)


def test_rivals_equal_their_definitions():
    assert torch.equal(cb.fp4_levels(), bnb.get_4bit_type("fp4", device="cpu"))
    # bitsandbytes lists an "int4" too, but raises when asked for it.
    assert torch.equal(cb.get_levels("int4"), torch.tensor([i / 7 for i in range(-7, 8)]))
    e3m0 = bnb.create_fp8_map(exponent_bits=3, precision_bits=0, total_bits=4)
    assert torch.equal(cb.get_levels("fp4-e3m0"), e3m0.unique())
    # The values of the OCP MX specification v1.0, over the largest.
    ocp = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    assert torch.equal(cb.get_levels("fp4-e2m1"), torch.cat([-ocp.flip(0), torch.zeros(1), ocp]))


def test_fp4_of_bitsandbytes_differs_from_e2m1_in_the_subnormal_alone():
    ours, theirs = cb.get_levels("fp4-e2m1"), cb.fp4_levels().unique()
    differing = (ours - theirs).abs() > 1e-6
    assert differing.nonzero().flatten().tolist() == [6, 8]


@pytest.mark.parametrize("blocksize", PUBLISHED_AF4)
def test_af4_is_derived_to_the_published_digits(blocksize):
    levels = cb.af4_levels(blocksize)
    # Published digits come from another quadrature; 1e-6 is six times our largest difference.
    expected = torch.tensor(PUBLISHED_AF4[blocksize])
    assert torch.allclose(levels[[1, 6, 8, 14]], expected, rtol=0, atol=1e-6)
    assert levels[0] == -1 and levels[7] == 0 and levels[15] == 1
    if blocksize == 64:
        # bitsandbytes lists AF4 from the largest down.
        whole = bnb.get_4bit_type("af4", device="cpu").flip(0)
        assert torch.allclose(levels, whole, rtol=0, atol=1e-6)


def normal_over_absmax(blocks=20_000, blocksize=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(blocks, blocksize, generator=generator)
    return x / x.abs().amax(dim=1, keepdim=True)


def test_lloyd_max_stands_still_at_cell_means_and_keeps_its_pins():
    samples = normal_over_absmax()
    levels = cb.lloyd_max_levels(samples)
    codes = cb.assign(samples, levels).long().flatten()
    sums = torch.zeros(16, dtype=torch.float64).index_add_(0, codes, samples.double().flatten())
    means = sums / torch.bincount(codes, minlength=16)
    free = [i for i in range(16) if levels[i] not in (-1, 0, 1)]
    assert len(free) == 13
    # It stops when no level moves by 1e-7; slow convergence leaves a few such steps ahead.
    assert torch.allclose(levels[free].double(), means[free], rtol=0, atol=1e-5)

    def squared_error(table):
        return (table[cb.assign(samples, table).int()] - samples).square().mean()

    assert squared_error(levels) < 0.95 * squared_error(cb.nf4_levels())
    assert squared_error(cb.lloyd_max_levels(samples, pinned=())) < squared_error(levels)


@pytest.mark.parametrize(
    ("samples", "arguments"),
    [
        (torch.empty(0), {}),
        (torch.tensor([1.0, torch.nan]), {}),
        (torch.ones(4), {"n_levels": 2}),
        (torch.ones(4), {"n_levels": 1, "pinned": ()}),
    ],
)
def test_lloyd_max_refuses_what_it_cannot_fit(samples, arguments):
    with pytest.raises(cb.QuantizationError):
        cb.lloyd_max_levels(samples, **arguments)


@pytest.mark.parametrize("name", cb.LEVELS)
def test_a_tie_goes_to_the_lower_level_and_the_next_float_above_it_up(name):
    levels = cb.get_levels(name)
    ascending = levels.unique()
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    above = torch.nextafter(midpoints, torch.tensor(2.0))
    assert torch.equal(levels[cb.assign(midpoints, levels).int()], ascending[:-1])
    assert torch.equal(levels[cb.assign(above, levels).int()], ascending[1:])


@unhurried
@given(
    x=st.lists(st.floats(-1, 1, width=32), max_size=40),
    name=st.sampled_from(cb.LEVELS),
)
def test_assign_finds_the_nearest_level(x, name):
    """Compared with a search through all distances, which has no midpoints and no order."""
    x, levels = torch.tensor(x, dtype=torch.float32), cb.get_levels(name)
    codes = cb.assign(x, levels)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape
    distances = (x.double()[:, None] - levels.double()).abs()
    found = distances.gather(1, codes.long()[:, None]).squeeze(1)
    # A midpoint is rounded to float32, so beside it the second nearest may win by half a step.
    assert (found - distances.amin(dim=1) <= 2**-24).all()


def test_assign_takes_levels_in_any_order():
    levels = torch.tensor([1.0, -1.0, 0.0])
    x = torch.tensor([[-0.9, 0.1], [0.5, 0.51]])
    assert cb.assign(x, levels).tolist() == [[1, 2], [2, 0]]


def test_level_usage_and_entropy_of_normal_weights():
    """Equal-mass bins are not used equally once blocks are scaled by their largest member."""
    codes = cb.assign(normal_over_absmax(), cb.nf4_levels())
    usage = cb.level_usage(codes)
    assert usage.sum().item() == pytest.approx(1, abs=1e-12)
    # 1.28 million samples: a share of 9 % has a standard error of 0.03 %, the entropy 0.001 bits.
    assert usage.min().item() == pytest.approx(0.0173, abs=0.001)
    assert usage.max().item() == pytest.approx(0.0925, abs=0.001)
    assert cb.entropy_bits(usage) == pytest.approx(3.884, abs=0.004)
    wide = cb.assign(normal_over_absmax(400, 4096), cb.nf4_levels())
    assert cb.entropy_bits(cb.level_usage(wide)) == pytest.approx(3.52, abs=0.01)


def test_entropy_counts_an_unused_level_as_nothing():
    assert cb.entropy_bits(torch.tensor([0.0, 1.0])) == 0
    assert cb.entropy_bits(torch.full((16,), 1 / 16)) == 4


@pytest.mark.parametrize(
    "levels",
    [
        "NF4",
        "nf3",
        "",
        None,
        7,
        torch.zeros(1),
        torch.zeros(17),
        torch.zeros(2, 2),
        torch.tensor([0, 1]),
        torch.tensor([0.0, torch.nan]),
        torch.tensor([0.0, 1.5]),
    ],
)
def test_unknown_levels_are_refused_by_name(levels):
    with pytest.raises(QuantizationError, match="levels"):
        cb.get_levels(levels)


def test_unknown_levels_name_the_way_out():
    with pytest.raises(QuantizationError, match="'nf5'.*nf4', 'fp4', 'int4"):
        cb.get_levels("nf5")


def test_a_table_given_as_a_tensor_is_copied():
    table = torch.tensor([-1.0, 1.0])
    levels = cb.get_levels(table)
    table.zero_()
    assert levels.tolist() == [-1, 1]


def test_affine_int4_errs_by_half_a_step_and_knows_no_exact_zero():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    blocks = weight.view(-1, 32)
    step = (blocks.amax(dim=1) - blocks.amin(dim=1)) / 15
    error = (cb.affine_int4(weight, 32) - weight).view(-1, 32).abs().amax(dim=1)
    # Half a step, and what rounding the two constants to 16 bits adds.
    assert (error < 0.51 * step + 0.003).all()
    assert cb.affine_int4(torch.tensor([-1.0, 0.0, 0.0, 2.0]), 4)[1] != 0
    assert cb.affine_int4(torch.full((4,), 0.5), 4).isnan().all(), "a constant block is 0 / 0"
