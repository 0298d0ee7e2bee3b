"""What works round the versions of other libraries that are named here."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def forbid_cpu_repacking(model: torch.nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers trainable on processors with AVX512-BF16.

    There 0.50 repacks its weights at the first evaluation, for a kernel without a backward pass.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back three messages that say nothing about the run."""
    from transformers.utils import logging as bars

    # On a CPU bitsandbytes advises a package from the Hub, which the course does without.
    advice = logging.getLogger("bitsandbytes.backends.cpu.ops")
    had_bars, level = bars.is_progress_bar_enabled(), advice.level
    bars.disable_progress_bar()
    advice.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5 for this by its former name.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            yield
    finally:
        advice.setLevel(level)
        if had_bars:
            bars.enable_progress_bar()


@contextmanager
def rows_never_packed() -> Iterator[None]:
    """Let transformers 5 take every row for one text, without a look at its position ids.

    Tensors without memory have none to compare, and it would trace a mask that no real step makes.
    """
    from transformers import masking_utils

    looks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks
