"""Chapter 2's pictures: an outlier in its block, and blocks as bytes."""

import pytest
import torch

from qlora_edu.blockwise import quantize_blockwise
from qlora_edu.codebooks import get_levels
from qlora_edu.course import explorers
from qlora_edu.course.explorers import chapter_02
from qlora_edu.errors import QuantizationError


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
        explorers.render_outlier_map(format="INT3")
    with pytest.raises(QuantizationError, match="blocksize"):
        explorers.render_outlier_map(blocksize=48)


def test_the_drawing_of_blocks_shows_the_bytes_that_are_packed():
    import matplotlib.pyplot as plt

    weight = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    figure = explorers.draw_blocks_and_bytes(weight, get_levels("nf4"), 4)
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
