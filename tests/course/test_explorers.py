"""Every position of every control gives a picture, and figures say what was computed."""

import importlib
import pkgutil
import xml.etree.ElementTree as ET
from itertools import product

import matplotlib.pyplot as plt
import pytest
import torch
from ipywidgets import FloatSlider, IntSlider

from qlora_edu.blockwise import quantize_blockwise
from qlora_edu.codebooks import get_levels
from qlora_edu.course import explorers as ex
from qlora_edu.course import plots
from qlora_edu.course.explorers import chapter_02
from qlora_edu.errors import QuantizationError
from qlora_edu.files import ROOT
from qlora_edu.memory import GIB, LLAMA_SHAPES, nf4_bits_per_weight, plan_memory
from qlora_edu.paging import PageTable
from qlora_edu.planner.trace import ROWS

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
    assert sorted(page for page in state.holds if page is not None) == sorted(table.frame_of)
    counts = state.counts
    assert counts["hits"] + counts["prefetched"] + counts["faults"] == len(uses)
    assert counts["KiB in"] == table.faults


@pytest.fixture
def course_style():
    plots.use_style()
    yield
    plt.close("all")


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def check_inside(figure) -> None:
    """No text of a figure may be cut off at its edge."""
    figure.canvas.draw()
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0, text.get_text()
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()


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


def test_the_drawing_of_blocks_shows_the_bytes_that_are_packed(course_style):
    weight = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    figure = ex.draw_blocks_and_bytes(weight, get_levels("nf4"), 4)
    texts = [text.get_text() for text in figure.axes[0].texts]
    # Blocks of 4 are too small for the quantiser; so each is quantised as a tensor of its own.
    parts = weight.view(-1, 4)
    packed = torch.cat([quantize_blockwise(part, get_levels("nf4"), 64)[0] for part in parts])
    expected = [f"0x{value:02X}" for value in packed.flatten().tolist()]
    assert [text for text in texts if text.startswith("0x")] == expected
    assert sum(text.startswith("block ") for text in texts) == 3
    check_inside(figure)


@pytest.mark.parametrize(("size", "r"), [*product(LLAMA_SHAPES, (8, 256))])
def test_memory_bars_show_their_sums(course_style, size, r):
    figure = ex.draw_training_memory(size, r)
    sums = [sum(ex.training_gigabytes(size, method, r).values()) for method in ex.METHODS]
    assert sums == sorted(sums, reverse=True)
    for total in sums:
        starts = (f"{total:.1f} GB", f"{total:.0f} GB")
        assert any(text.startswith(starts) for text in texts(figure))
    check_inside(figure)


@pytest.mark.parametrize("size", LLAMA_SHAPES)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_training_gigabytes_are_those_of_the_planner(size, method):
    plan = plan_memory(f"llama-{size}", method, optim="adamw_32bit")
    planned = sum(plan.held.values()) + plan.gradient_bytes
    total = sum(ex.training_gigabytes(size, method).values())
    assert total == pytest.approx(planned / 1e9, rel=1e-3)


def test_unknown_size_and_method_are_refused():
    with pytest.raises(KeyError, match="8B"):
        ex.training_gigabytes("8B", "qlora")
    with pytest.raises(KeyError, match="magic"):
        ex.training_gigabytes("7B", "magic")


def test_token_boxes_are_coloured_by_what_happens_to_them(course_style):
    figure = ex.draw_trained_tokens("abcd", [False, True, True, True], 3, "four")
    colors = [plt.matplotlib.colors.to_hex(p.get_facecolor()) for p in figure.axes[0].patches]
    orange = plots.PALETTE["adapter"].lower()
    assert colors == [plots.PALE_GREY.lower(), orange, orange, "#ffffff"]


@pytest.mark.parametrize(
    ("model", "method", "card"),
    [("qwen2.5-0.5b", "qlora", 8), ("qwen2.5-0.5b", "full", 80), ("llama-65b", "full", 24)],
)
def test_budget_bars_add_up_and_the_title_is_the_plan_s_sentence(course_style, model, method, card):
    plan = plan_memory(model, method, batch_size=2, max_length=64)
    figure = ex.draw_budget(plan, card)
    (ax,) = figure.axes
    assert ax.get_title(loc="left") == plan.sentence(card)
    sums = {}
    for bar in ax.patches:
        if bar.get_height() == pytest.approx(0.62):
            row = round(bar.get_y() + 0.31)
            sums[row] = sums.get(row, 0) + bar.get_width()
    for row, (moment, rows) in enumerate(plan.moments.items()):
        assert sums[row] == pytest.approx(sum(rows.values()) / GIB), moment
    assert any(f"{plan.peak_bytes / GIB:,.1f} GiB, the peak" in text for text in texts(figure))
    check_inside(figure)


def test_every_row_of_a_ledger_has_a_style_of_its_own():
    assert set(ex.ROW_STYLES) == set(ROWS)
    assert ex.row_style("adapters", "lora")["facecolor"] == plots.PALETTE["adapter"]


SVG = "{http://www.w3.org/2000/svg}"
WORDS = {
    "qlora_in_one_picture": (
        *("W as stored, frozen", f"{nf4_bits_per_weight():.3f} bits per weight", "A", "B", "x"),
        *("loss", "W x", "(α/r) · B A x", "gradients pass through W", "only A and B are changed"),
    ),
    "finetune_pipeline": (
        *("1  config", "2  rows of chat", "3  base", "4  adapters", "5  training"),
        "6  run folder",
    ),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_picture_says_what_it_must_in_the_course_s_colours(name):
    root = ET.fromstring(plots.picture(name).data)
    shown = [text.text for text in root.iter(f"{SVG}text")]
    assert set(WORDS[name]) <= set(shown)
    assert root.find(f"{SVG}title").text in shown and len(root.find(f"{SVG}desc").text) > 100
    pale = {plots.PALE_BLUE, plots.PALE_ORANGE, plots.PALE_GREY, "#F6D5C3", "white", "none"}
    used = {part.get(key) for part in root.iter() for key in ("fill", "stroke")} - {None}
    assert used <= {*plots.PALETTE.values(), *pale}
    width, height = (float(root.get(side)) for side in ("width", "height"))
    for text in root.iter(f"{SVG}text"):
        x, y, size = (float(text.get(key)) for key in ("x", "y", "font-size"))
        reach = 0.62 * size * len(text.text)  # no letter of a sans-serif is wider on average
        left = x - reach / 2 if text.get("text-anchor") == "middle" else x
        assert left >= 0 and left + reach <= width and 0 < y - size < y < height, text.text


def test_an_arrow_of_the_picture_leads_through_the_weight_and_back():
    root = ET.fromstring(plots.picture("qlora_in_one_picture").data)
    arrows = [path.get("stroke") for path in root.iter(f"{SVG}path") if path.get("marker-end")]
    assert arrows.count(plots.PALETTE["gradient"]) == 8 == arrows.count(plots.PALETTE["ink"])
    assert sum(1 for part in root.iter(f"{SVG}rect") if part.get("fill-opacity")) == 64


def test_the_readme_shows_the_picture():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](docs/qlora_in_one_picture.svg)" in readme
