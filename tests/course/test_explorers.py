"""Every position of every control gives a picture, and a picture that fails says so."""

import importlib
import pkgutil

import pytest
import torch
from ipywidgets import FloatSlider, IntSlider

from qlora_edu.blockwise import quantize_blockwise
from qlora_edu.codebooks import get_levels
from qlora_edu.course import explorers as ex
from qlora_edu.course.explorers import chapter_02
from qlora_edu.errors import QuantizationError
from qlora_edu.paging import PageTable

PNG = b"\x89PNG\r\n\x1a\n"


def explorers():
    """Find every `..._explorer` of the modules `explorers.chapter_NN`."""
    found = {}
    for module in pkgutil.iter_modules(ex.__path__):
        members = vars(importlib.import_module(f"{ex.__name__}.{module.name}"))
        found |= {name: make for name, make in members.items() if name.endswith("_explorer")}
    return found


def positions(control):
    """List every position of a discrete control; of a continuous or long one, five with both ends.

    A slider of more than forty positions draws five of them: the ends, and where ranges break is at
    ends.
    """
    if hasattr(control, "options"):
        return [option[-1] if isinstance(option, tuple) else option for option in control.options]
    steps = round((control.max - control.min) / control.step)
    chosen = range(steps + 1) if steps <= 40 else {0, 1, steps // 2, steps - 1, steps}
    return [control.min + n * control.step for n in sorted(chosen)]


def ends(control):
    return positions(control)[0], positions(control)[-1]


@pytest.fixture(params=explorers().items(), ids=lambda item: item[0])
def explorer(request):
    name, make = request.param
    return make()


def test_each_chapter_s_explorer_is_to_be_had_from_widgets():
    assert {"memory_explorer", "nf4_explorer", "tokens_explorer"} <= explorers().keys()
    for name, make in explorers().items():
        assert getattr(ex, name) is make and name in ex.__all__


def test_every_position_of_every_control_draws(explorer):
    for control in explorer.controls.values():
        home = control.value
        pictures = set()
        for value in positions(control):
            control.value = value
            assert explorer.message.value == "", explorer.parameters
            assert bytes(explorer.picture.value).startswith(PNG), explorer.parameters
            pictures.add(bytes(explorer.picture.value))
        assert len(pictures) > 1, f"{control.description} changes nothing"
        control.value = home


def test_the_ends_of_all_controls_together_draw(explorer):
    for end in (0, -1):
        for control in explorer.controls.values():
            control.value = ends(control)[end]
        assert explorer.message.value == "", explorer.parameters
        assert bytes(explorer.picture.value).startswith(PNG)


def test_the_same_parameters_give_the_same_picture(explorer):
    assert explorer.render(**explorer.parameters) == explorer.render(**explorer.parameters)
    assert explorer.render(**explorer.parameters) == bytes(explorer.picture.value)


def test_every_control_says_what_it_is_and_draws_once_at_rest(explorer):
    for control in explorer.controls.values():
        assert control.description
        assert not getattr(control, "continuous_update", False)


def test_an_error_is_shown_and_the_next_good_position_clears_it():
    def render(x):
        if x > 0.5:
            raise ValueError("no <picture> there")
        return PNG

    explorer = ex.Explorer(render, x=FloatSlider(0.0, min=0, max=1))
    explorer.controls["x"].value = 1.0
    assert explorer.message.value == "<b>ValueError</b>: no &lt;picture&gt; there"
    assert bytes(explorer.picture.value) == b"", "the old picture would look like an answer"
    explorer.controls["x"].value = 0.25
    assert explorer.message.value == "" and bytes(explorer.picture.value) == PNG


def test_render_gets_every_control_by_name():
    seen = []

    def render(**parameters):
        seen.append(parameters)
        return PNG

    explorer = ex.Explorer(render, a=IntSlider(1), b=IntSlider(2))
    explorer.controls["b"].value = 5
    assert seen == [{"a": 1, "b": 2}, {"a": 1, "b": 5}]
    assert explorer.children[-1] is explorer.picture


@pytest.mark.parametrize("distribution", ex.DRAWS)
def test_scaled_weights_have_an_absmax_of_one_in_each_block(distribution):
    scaled = ex.scaled_weights(distribution)
    assert (scaled.abs().amax(dim=1) == 1).all()
    assert torch.equal(scaled, ex.scaled_weights.__wrapped__(distribution))
    # Symmetric distributions: over 30,000 blocks the mean is within five standard errors of zero.
    assert scaled.mean().abs() < 5 * scaled.std() / scaled.numel() ** 0.5


def test_offsets_to_choose_from_hold_nf4s_own_exactly():
    assert 0.9677083 in ex.OFFSETS
    assert list(ex.OFFSETS) == sorted(set(ex.OFFSETS))


def test_a_wrong_parameter_is_refused():
    with pytest.raises(KeyError):
        ex.render_nf4_bins(distribution="cauchy")
    with pytest.raises(ValueError, match="bits"):
        ex.render_nf4_bins(bits=1)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("frames", [2, 4, 7, 10])
def test_the_replayed_trace_is_what_the_optimizer_counted(frames, prefetch):
    trace = ex.record_trace(frames, prefetch)
    state = ex.replay_trace(trace, len(trace), frames)
    uses = [event.page for event in trace if event.what != "prefetch"]
    assert uses == [*range(10), 0, 1, 2, 5, 6, 7, 8, 9]  # in the second step b has no gradient
    table = PageTable(frames)
    for event in trace:
        if event.what != "prefetched":
            assert table.access(event.page).evicted == event.evicted
    assert sorted(page for page in state.holds if page is not None) == sorted(table.resident)
    counts = state.counts
    assert counts["hits"] + counts["prefetched"] + counts["faults"] == len(uses)
    assert counts["KiB in"] == table.faults


# Chapter 2


@pytest.mark.parametrize("format", chapter_02.FORMATS)
def test_an_outlier_hurts_its_block_and_no_other(format):
    healthy, hurt = (chapter_02.matrix_with_outlier(s) for s in (1, 1000))
    changed = chapter_02.read_back_as(hurt, 64, format) != chapter_02.read_back_as(
        healthy, 64, format
    )
    rows = changed.any(dim=1).nonzero().flatten().tolist()
    assert rows == [chapter_02.OUTLIER[0]], "a row of 64 is a block"


def test_a_wrong_parameter_of_the_explorer_is_refused():
    with pytest.raises(KeyError):
        ex.render_outlier_map(format="INT3")
    with pytest.raises(QuantizationError, match="blocksize"):
        ex.render_outlier_map(blocksize=48)


def test_the_drawing_of_blocks_shows_the_bytes_that_are_packed():
    import matplotlib.pyplot as plt

    weight = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    figure = ex.draw_blocks_and_bytes(weight, get_levels("nf4"), 4)
    texts = [text.get_text() for text in figure.axes[0].texts]
    # Blocks of 4 are too small for the quantiser; so each is quantised as a tensor of its own.
    parts = weight.view(-1, 4)
    packed = torch.cat([quantize_blockwise(part, get_levels("nf4"), 64)[0] for part in parts])
    expected = [f"0x{value:02X}" for value in packed.flatten().tolist()]
    assert [text for text in texts if text.startswith("0x")] == expected
    assert sum(text.startswith("block ") for text in texts) == 3
    figure.canvas.draw()
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, text.get_text()
    plt.close(figure)
