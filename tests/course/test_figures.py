"""The shared figures say what was computed, and the explorers of notebooks 0 and 9 move."""

from itertools import product

import matplotlib.pyplot as plt
import pytest

from qlora_edu import memory, quantize
from qlora_edu.course import explorers, plots
from qlora_edu.course.explorers import chapter_00, chapter_09
from qlora_edu.memory import GIB, plan_memory
from qlora_edu.planner.fake_step import ROWS

PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def course_style():
    plots.use_style()
    yield
    plt.close("all")


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def inside(figure) -> None:
    """No text of a figure may be cut off at its edge."""
    figure.canvas.draw()
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0, text.get_text()
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()


def test_bits_a_weight_are_those_of_a_real_tensor():
    import torch

    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    # The tensor also holds one 32-bit offset: 32 / 2**18 of a bit for each weight.
    assert quantize(weight).bits_per_weight == pytest.approx(memory.nf4_bits_per_weight(), abs=2e-4)


def test_llama_7b_is_counted_as_in_the_paper():
    linear, rest = memory.llama_parameters("7B")
    assert linear == 6_476_005_376
    assert linear + rest == 6_738_415_616
    assert memory.adapter_parameters("7B", 64) == 159_907_840


def test_full_finetuning_of_65b_needs_more_than_780_gb():
    assert sum(explorers.training_gigabytes("65B", "full").values()) > 780


@pytest.mark.parametrize("size", memory.LLAMA_SHAPES)
def test_each_method_needs_less_than_the_one_before(size):
    sums = [sum(explorers.training_gigabytes(size, m).values()) for m in explorers.METHODS]
    assert sums == sorted(sums, reverse=True)


def test_unknown_size_and_method_are_refused():
    with pytest.raises(KeyError, match="8B"):
        explorers.training_gigabytes("8B", "qlora")
    with pytest.raises(KeyError, match="magic"):
        explorers.training_gigabytes("7B", "magic")


@pytest.mark.parametrize(
    "draw", [explorers.draw_qlora_in_one_picture, explorers.draw_finetune_pipeline]
)
def test_pictures_keep_inside_their_edges(draw):
    inside(draw())


@pytest.mark.parametrize(("size", "rank"), product(memory.LLAMA_SHAPES, (8, 256)))
def test_memory_bars_show_their_sums(size, rank):
    figure = explorers.draw_training_memory(size, rank)
    shown = texts(figure)
    for method in explorers.METHODS:
        total = sum(explorers.training_gigabytes(size, method, rank).values())
        assert any(text.startswith((f"{total:.1f} GB", f"{total:.0f} GB")) for text in shown)
    inside(figure)


def test_token_boxes_are_coloured_by_what_happens_to_them():
    figure = explorers.draw_trained_tokens("abcd", [False, True, True, True], 3, "four")
    colors = [plots.plt.matplotlib.colors.to_hex(p.get_facecolor()) for p in figure.axes[0].patches]
    orange = plots.PALETTE["adapter"].lower()
    assert colors == [plots.PALE_GREY.lower(), orange, orange, "#ffffff"]


@pytest.mark.parametrize(
    ("model", "method", "card"),
    [("qwen2.5-0.5b", "qlora", 8), ("qwen2.5-0.5b", "full", 80), ("llama-65b", "full", 24)],
)
def test_budget_bars_add_up_and_the_title_is_the_plan_s_sentence(model, method, card):
    plan = plan_memory(model, method, batch_size=2, max_length=64)
    figure = explorers.draw_budget(plan, card)
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
    inside(figure)


def test_every_row_of_a_ledger_has_a_style_of_its_own():
    assert set(explorers.ROW_STYLES) == set(ROWS)
    assert explorers.row_style("adapters", "lora")["facecolor"] == plots.PALETTE["adapter"]


def test_the_readme_picture_is_the_one_that_is_drawn(tmp_path):
    assert explorers.PICTURE.read_bytes()[:4] == PNG
    written = explorers.save_picture(tmp_path / "docs" / "picture.png")
    width = plt.imread(written).shape[1]
    # Fonts may differ by machine, so sizes are compared and not bytes.
    assert width == plt.imread(explorers.PICTURE).shape[1]
    assert [path.name for path in written.parent.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("size", memory.LLAMA_SHAPES)
@pytest.mark.parametrize("rank", (chapter_00.RANKS[0], chapter_00.RANKS[-1]))
def test_memory_explorer_draws_at_both_ends(size, rank):
    assert explorers.render_training_memory(size, rank)[:4] == PNG


@pytest.mark.parametrize("row", (0, 2, chapter_09.ROWS - 1))
@pytest.mark.parametrize("limit", chapter_09.LIMITS)
def test_tokens_explorer_draws_at_both_ends(row, limit):
    assert explorers.render_trained_tokens(row, limit)[:4] == PNG


@pytest.mark.parametrize(
    ("make", "control", "value"),
    [
        (explorers.memory_explorer, "size", "65B"),
        (explorers.memory_explorer, "r", 8),
        (explorers.tokens_explorer, "row", 5),
        (explorers.tokens_explorer, "max_length", 20),
    ],
)
def test_every_control_changes_the_picture(make, control, value):
    explorer = make()
    before = bytes(explorer.picture.value)
    explorer.controls[control].value = value
    assert explorer.message.value == ""
    assert bytes(explorer.picture.value) != before
