"""A step without memory against real steps: other settings, depths, batches and lengths."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import make_config, measured_peak

from qlora_edu.errors import PlanError
from qlora_edu.kernels import CHUNK_SIZE, UNPACKING
from qlora_edu.memory import plan_memory
from qlora_edu.planner.fake_step import (
    StepSettings,
    build_model,
    pretend_to_quantize,
    training_loss,
    without_memory,
)
from qlora_edu.planner.trace import Allocations, kept_tensors, weigh
from qlora_edu.quantized import quantize


@pytest.mark.parametrize(
    "chosen",
    [
        {"backend": "bitsandbytes"},
        {"backend": "bitsandbytes", "target_modules": ("q_proj", "v_proj")},
        {"padding": True},
        {"lora_dropout": 0.1},
        {"dtype": "bfloat16"},
        {"autocast": True},
        {"target_modules": ("q_proj", "v_proj")},
        {"double_quant": False, "blocksize": 128},
        {"adapter_dtype": "bfloat16", "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_every_setting_counts_as_it_does_in_a_real_step(chosen):
    chosen = {"dtype": "float32", "r": 16, "gradient_checkpointing": False, **chosen}
    plan = plan_memory(make_config(), "qlora", batch_size=2, max_length=100, device="cpu", **chosen)
    assert plan.peak_bytes == pytest.approx(
        measured_peak(make_config(), plan.settings, 2, 100), rel=0.02
    )


def test_one_row_needs_no_copies_of_slices_and_the_plan_knows():
    chosen = {"dtype": "float32", "r": 4, "gradient_checkpointing": False, "device": "cpu"}
    plan = plan_memory(make_config(vocab_size=20000), "lora", batch_size=1, max_length=64, **chosen)
    measured = measured_peak(make_config(vocab_size=20000), plan.settings, 1, 64)
    assert plan.peak_bytes == pytest.approx(measured, rel=0.02)


def test_an_eager_attention_keeps_a_square_and_the_plan_says_so():
    config = make_config()
    config._attn_implementation = "eager"
    chosen = {"dtype": "float32", "gradient_checkpointing": False, "device": "cpu"}
    plan = plan_memory(config, "full", batch_size=1, max_length=300, **chosen)
    assert plan.peak_bytes == pytest.approx(measured_peak(config, plan.settings, 1, 300), rel=0.02)
    plain = plan_memory(make_config(), "full", batch_size=1, max_length=300, **chosen)
    assert plan.peak_bytes > 1.2 * plain.peak_bytes


@settings(max_examples=12, deadline=None)
@given(
    depth=st.integers(1, 9),
    batch=st.integers(1, 5),
    length=st.integers(8, 300),
    method=st.sampled_from(["full", "lora", "qlora", "houlsby"]),
    gradient_checkpointing=st.booleans(),
)
def test_three_blocks_and_three_lengths_tell_any_other(
    depth, batch, length, method, gradient_checkpointing
):
    config = make_config(num_hidden_layers=depth)
    chosen = {
        "dtype": "float32",
        "r": 8,
        "gradient_checkpointing": gradient_checkpointing,
        "device": "cpu",
    }
    plan = plan_memory(config, method, batch_size=batch, max_length=length, optim="sgd", **chosen)
    model = build_model(config, plan.settings)
    ids = torch.zeros(batch, length, dtype=torch.long)
    training_loss(model, ids, plan.settings).backward()  # tables of the first call
    model.zero_grad()
    allocations = Allocations()
    allocations.ignore([ids, *kept_tensors(model)])
    with allocations:
        training_loss(model, ids, plan.settings).backward()
    real = sum(weigh(model).values()) + np.cumsum(allocations.changes).max()
    # Rotary tables depend on the length and not on the batch: at most 64 bytes per token here.
    assert abs(plan.peak_bytes - real) <= 0.01 * real + 64 * 5 * length


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (100, 96), (3, 5)])
def test_a_pretended_weight_has_the_tensors_of_a_real_one(shape, double_quant):
    weight = torch.randn(shape)
    real = quantize(weight, "nf4", 64, double_quant).state_dict()
    pretended = pretend_to_quantize(weight, "nf4", 64, double_quant)
    for name, tensor in pretended.state_dict().items():
        if "quant_state" in name:  # JSON, which spells the offset out
            continue
        assert tensor.shape == real[name].shape and tensor.dtype == real[name].dtype, name


def test_trace_step_leaves_random_numbers_and_defaults_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    plan_memory(make_config(hidden_size=64), "lora", r=3)
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_default_dtype() == torch.float32
    assert quantize(torch.ones(64)).dequantize().sum() == 64  # no table has become a fake one


def test_without_memory_puts_everything_back():
    from transformers import masking_utils

    looks = masking_utils.find_packed_sequence_indices
    with pytest.raises(ZeroDivisionError), without_memory(StepSettings()):
        assert CHUNK_SIZE.get() == 2**26
        assert masking_utils.find_packed_sequence_indices is not looks
        raise ZeroDivisionError
    assert masking_utils.find_packed_sequence_indices is looks
    assert CHUNK_SIZE.get() is None and UNPACKING.get() is nullcontext
    assert type(torch.ones(1)) is torch.Tensor


@pytest.mark.parametrize("backend", ["qlora_edu", "bitsandbytes"])
def test_a_fake_model_keeps_what_a_real_one_keeps(backend):
    step = StepSettings(backend=backend, r=4, adapter_dtype="bfloat16", device="cpu")
    # Layers with biases, and in sizes where no block of constants has to be padded.
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4}
    config = make_config(model_type="qwen2", **shape)
    with without_memory(step):
        fake = weigh(build_model(config, step, fake=True))
    assert fake == weigh(build_model(config, step))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("quant_type", "nf9"),
        ("double_quant", "maybe"),
        ("double_quant", 1),
        ("blocksize", 7),
        ("blocksize", 64.0),
        ("gradient_checkpointing", None),
        ("lora_dropout", float("nan")),
        ("lora_dropout", "0.1"),
        ("target_modules", 3),
        ("target_modules", ("q_proj", 3)),
        ("bottleneck", 0),
        ("backend", "peft"),
        ("dtype", torch.float32),
    ],
)
def test_step_settings_refuse_a_wrong_value_and_name_it(setting, value):
    with pytest.raises(PlanError, match=setting):
        StepSettings(**{setting: value})


def test_step_settings_know_what_bitsandbytes_has_not():
    assert StepSettings(quant_type="af4").quant_type == "af4"
    with pytest.raises(PlanError, match=r"quant_type must be one of \('nf4', 'fp4'\)"):
        StepSettings(quant_type="af4", backend="bitsandbytes")
    names = StepSettings(target_modules=["q_proj"]).target_modules
    assert names == ("q_proj",)


def test_houlsby_goes_behind_the_layers_that_are_named():
    chosen = {"bottleneck": 8, "device": "cpu"}
    usual = plan_memory(make_config(), "houlsby", **chosen).trace.trained
    named = plan_memory(make_config(), "houlsby", target_modules=("down_proj",), **chosen)
    assert 0 < len(named.trace.trained) == len(usual) / 2
    with pytest.raises(PlanError, match=r"'houlsby' does not fit.*no layer is called \['w_proj'\]"):
        plan_memory(make_config(), "houlsby", target_modules=("w_proj",), **chosen)
