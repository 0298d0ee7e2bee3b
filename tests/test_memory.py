"""The planner against real steps, real tensors and PyTorch's own checkpointing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_edu.errors import DoesNotFitError, PlanError
from qlora_edu.memory import GIB, MODELS, OPTIMIZERS, check_lengths, plan_memory, recompute
from qlora_edu.planner.fake_step import (
    ROWS,
    Allocations,
    StepSettings,
    build_model,
    find_blocks,
    kept_tensors,
    pretend_to_quantize,
    training_loss,
    weigh,
)
from qlora_edu.planner.trace import trace_memory
from qlora_edu.quantized import quantize

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
STORED = json.loads(
    (Path(__file__).parents[1] / "data" / "results" / "memory.json").read_text(encoding="utf-8")
)


def make(**changes):
    shape = {**LLAMA, **changes}
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def measured_peak(config, step_settings, batch, length):
    """The allocator's peak in the second step, and what was there before it."""
    kept = {}

    def step():
        training_loss(kept["model"], kept["ids"], step_settings).backward()
        kept["optimizer"].step()
        kept["optimizer"].zero_grad()

    def start():
        torch.manual_seed(0)
        kept["model"] = build_model(config, step_settings)
        trained = [p for p in kept["model"].parameters() if p.requires_grad]
        kept["optimizer"] = torch.optim.AdamW(trained)
        kept["ids"] = torch.randint(0, config.vocab_size, (batch, length))
        step()

    before = trace_memory(start).live[-1]
    return before + trace_memory(step).peak


# 5 % is what is promised; what was seen is below 1 %. Here 2 %, so that a lost row of the ledger
# shows: the smallest of interest, the adapters' gradients, are 3 % of these peaks.
@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "houlsby"])
def test_the_plan_is_what_a_real_step_needs(method, gradient_checkpointing):
    chosen = {
        "r": 16,
        "bottleneck": 16,
        "dtype": "float32",
        "gradient_checkpointing": gradient_checkpointing,
    }
    plan = plan_memory(make(), method, batch_size=2, max_length=100, device="cpu", **chosen)
    assert plan.peak_bytes == pytest.approx(measured_peak(make(), plan.settings, 2, 100), rel=0.02)


@pytest.mark.parametrize(
    "chosen",
    [
        {"stack": "bitsandbytes"},
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
    plan = plan_memory(make(), "qlora", batch_size=2, max_length=100, device="cpu", **chosen)
    assert plan.peak_bytes == pytest.approx(measured_peak(make(), plan.settings, 2, 100), rel=0.02)


def test_one_row_needs_no_copies_of_slices_and_the_plan_knows():
    chosen = {"dtype": "float32", "r": 4, "gradient_checkpointing": False, "device": "cpu"}
    plan = plan_memory(make(vocab_size=20000), "lora", batch_size=1, max_length=64, **chosen)
    measured = measured_peak(make(vocab_size=20000), plan.settings, 1, 64)
    assert plan.peak_bytes == pytest.approx(measured, rel=0.02)


def test_an_eager_attention_keeps_a_square_and_the_plan_says_so():
    config = make()
    config._attn_implementation = "eager"
    chosen = {"dtype": "float32", "gradient_checkpointing": False, "device": "cpu"}
    plan = plan_memory(config, "full", batch_size=1, max_length=300, **chosen)
    assert plan.peak_bytes == pytest.approx(measured_peak(config, plan.settings, 1, 300), rel=0.02)
    plain = plan_memory(make(), "full", batch_size=1, max_length=300, **chosen)
    assert plan.peak_bytes > 1.2 * plain.peak_bytes


def test_the_optimizer_step_can_be_the_worst_moment():
    chosen = {"dtype": "float32", "gradient_checkpointing": False, "device": "cpu"}
    config = make(vocab_size=20000)
    plan = plan_memory(config, "full", batch_size=1, max_length=8, **chosen)
    assert plan.peak_moment == "optimizer step"
    assert plan.peak_bytes == pytest.approx(measured_peak(config, plan.settings, 1, 8), rel=0.02)


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
    config = make(num_hidden_layers=depth)
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
    heard = Allocations()
    heard.ignore([ids, *kept_tensors(model)])
    with heard:
        training_loss(model, ids, plan.settings).backward()
    real = sum(weigh(model).values()) + np.cumsum(heard.changes).max()
    # Rotary tables depend on the length and not on the batch: at most 64 bytes a token here.
    assert abs(plan.peak_bytes - real) <= 0.01 * real + 64 * 5 * length


def test_the_stored_measurements_hold_the_planner_to_its_promise():
    assert len(STORED["rows"]) >= 20 and sum(row["held_out"] for row in STORED["rows"]) >= 10
    assert STORED["command"] == "python benchmarks/memory.py"
    for row in STORED["rows"]:
        ratio = row["predicted_bytes"] / row["measured_bytes"]
        assert row["error"] == pytest.approx(ratio - 1)
        assert abs(row["error"]) <= 0.05, row
    for row in STORED["big"]:
        assert abs(row["predicted_bytes"] / row["heard_bytes"] - 1) <= 0.01, row
        if row["mem_tracker_bytes"]:
            assert row["heard_bytes"] == pytest.approx(row["mem_tracker_bytes"], rel=0.01)


@pytest.mark.parametrize("row", STORED["rows"][::6], ids=lambda row: row["model"])
def test_the_planner_still_predicts_what_is_stored(row):
    config = AutoConfig.for_model(row["model"], **row["shape"])
    plan = plan_memory(
        config,
        row["method"],
        batch_size=row["batch"],
        max_length=row["length"],
        device="cpu",
        **row["settings"],
    )
    assert plan.peak_bytes == pytest.approx(row["predicted_bytes"], rel=0.01)


def test_llama_7b_weighs_what_arithmetic_says():
    held = plan_memory("llama-7b", "qlora", r=64).held
    assert held["quantised weights"] == 6_476_005_376 // 2
    assert held["quantised weights"] + held["quantisation constants"] == pytest.approx(
        6_476_005_376 * 4.126953125 / 8, rel=1e-4
    )
    assert held["embeddings and head"] == 2 * 262_144_000
    assert held["adapters"] == 4 * 159_907_840


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt2"])
def test_a_named_model_has_the_size_of_its_name(name):
    plan = plan_memory(name, "full")
    with torch.device("meta"):
        config = plan.config
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    size = float(name.split("-")[-1].rstrip("b"))
    assert parameters / 1e9 == pytest.approx(size, rel=0.06)
    assert sum(plan.rehearsal.weights.values()) == pytest.approx(2 * parameters, rel=1e-4)


def test_the_field_s_two_headlines():
    full = plan_memory("llama-65b", "full", optim="adamw_32bit")
    assert full.peak_bytes > 780e9
    guanaco = {"r": 64, "stack": "bitsandbytes", "adapter_dtype": "bfloat16"}
    qlora = plan_memory("llama-65b", "qlora", optim="paged_adamw_32bit", **guanaco)
    assert qlora.peak_bytes < 48e9


def test_rows_of_every_moment_have_names_and_add_up():
    plan = plan_memory(make(), "qlora", r=4)
    assert set(plan.moments) == {"forward", "logits and loss", "backward", "optimizer step"}
    for moment in plan.moments.values():
        assert set(moment) <= set(ROWS) and min(moment.values()) >= 0
    assert plan.peak_bytes == max(sum(moment.values()) for moment in plan.moments.values())
    lines = plan.table().splitlines()
    assert any(line.startswith("quantisation constants") for line in lines)
    assert lines[-2].startswith("peak: ")
    kept = plan_memory(make(), "qlora", r=4, gradient_checkpointing=False)
    assert (
        plan.without_checkpointing.rows == kept.rows
        and kept.table().count("gradient_checkpointing") == 0
    )
    assert f"without checkpointing {kept.activation_bytes / GIB:.3f}" in lines[-1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4000), st.sampled_from(["full", "lora", "qlora"]))
def test_more_tokens_never_need_less(batch, length, method):
    plan = plan_memory(make(), method, batch_size=batch, max_length=length)
    assert plan.peak_bytes <= plan.at(max_length=length + 1).peak_bytes
    if batch > 1:  # one row is a case of its own
        assert plan.peak_bytes <= plan.at(batch_size=batch + 1).peak_bytes


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 4), st.integers(1, 4))
def test_the_longest_length_fits_and_the_next_does_not(card, batch):
    plan = plan_memory(make(), "qlora", batch_size=batch, r=4)
    longest = plan.longest_length(card, reserve=0)
    if longest:
        assert plan.at(max_length=longest).peak_bytes <= card * GIB
    assert plan.at(max_length=longest + 1).peak_bytes > card * GIB


def test_the_sentence():
    plan = plan_memory("llama-7b", "qlora")
    spare = (23 * GIB - plan.peak_bytes) / GIB
    assert plan.sentence(24) == (
        f"llama-7b, qlora: fits on a 24 GB card with {spare:.1f} GiB to spare; longest sequence "
        f"{plan.longest_length(24):,}"
    )
    assert "does not fit on a 4 GB card" in plan.sentence(4)
    assert "longest sequence 0" in plan.sentence(4)
    assert "fits on an 8 GB card" in plan.sentence(8)


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_number"),
    [("adamw", 4), ("adamw_32bit", 8), ("adamw_8bit", 2 * (1 + 4 / 256)), ("sgd", 0)],
)
def test_optimizer_states(optimizer, bytes_a_number):
    config = make(vocab_size=8192)  # every matrix is a multiple of 256 and above 4,096
    plan = plan_memory(config, "full", optim=optimizer)
    sizes = [n for n, _ in plan.rehearsal.trained]
    large = sum(n for n in sizes if n >= 4096)
    small = (sum(sizes) - large) * (8 if optimizer == "adamw_8bit" else bytes_a_number)
    assert plan.state_bytes == large * bytes_a_number + small


def test_a_paged_optimizer_keeps_small_states_on_the_device():
    plan = plan_memory("llama-7b", "qlora", r=16, optim="paged_adamw_32bit")
    sizes = [n for n, _ in plan.rehearsal.trained]
    assert plan.host_bytes == 8 * sum(n for n in sizes if n >= 100_000)  # 16 · 11,008 is above
    assert plan.held["optimizer states"] == 8 * sum(n for n in sizes if n < 100_000) > 0
    assert plan.moments["optimizer step"]["optimizer states"] == 8 * sum(sizes)
    assert plan_memory("llama-7b", "qlora", r=16, optim="adamw_32bit").host_bytes == 0


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


def test_weigh_counts_shared_storage_once():
    model = AutoModelForCausalLM.from_config(make(tie_word_embeddings=True))
    assert weigh(model)["embeddings and head"] == 4 * 500 * 128
    total = sum(tensor.nbytes for tensor in {id(t): t for t in kept_tensors(model)}.values())
    assert sum(weigh(model).values()) == total


@pytest.mark.parametrize("stack", ["qlora_edu", "bitsandbytes"])
def test_weigh_knows_the_4_bit_weights_of_both_stacks(stack):
    model = build_model(make(), StepSettings(r=4, dtype="float32", backend=stack))
    n = 5 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 320)
    rows = weigh(model)
    assert rows["quantised weights"] == n // 2
    assert rows["adapters"] == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert n / 64 < rows["quantisation constants"] < n / 64 + 35 * 1400
    assert len(find_blocks(model)) == 5


def test_a_rehearsal_leaves_random_numbers_and_defaults_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    plan_memory(make(hidden_size=64), "lora", r=3)
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_default_dtype() == torch.float32
    assert quantize(torch.ones(64)).dequantize().sum() == 64  # no table has become a fake one


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama-8b",), "neither a folder with a config.json nor one of llama-7b"),
        (("llama-7b", "dora"), "method must be one of"),
        ((LLAMA, "qlora", {"rank": 8}), "no setting 'rank'"),
        ((LLAMA, "qlora", {"r": 0}), "r must be a whole number of at least 1, not 0"),
        ((LLAMA, "qlora", {"r": True}), "r must be a whole number"),
        ((LLAMA, "qlora", {"lora_dropout": 1.0}), "dropout must be in"),
        ((LLAMA, "qlora", {"dtype": "int8"}), "dtype must be one of"),
        ((LLAMA, "qlora", {"batch_size": 0}), "batch_size must be a whole number"),
        ((LLAMA, "qlora", {"max_length": 2.5}), "max_length must be a whole number"),
        ((LLAMA, "qlora", {"optimizer": "lion"}), "optimizer must be one of"),
        ((LLAMA, "lora", {"target_modules": ["w_proj"]}), "no layer is called"),
        (("gpt2", "qlora"), "Conv1D"),
        (({"hidden_size": 4},), "this describes no model"),
        (({"model_type": "llamma"},), "this describes no model"),
        ((3,), "this describes no model"),
        (({"model_type": "t5"},), "no causal language model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_argument_is_named(arguments, message):
    model, *rest = arguments
    chosen = rest.pop() if rest and isinstance(rest[-1], dict) else {}
    with pytest.raises(PlanError, match=message):
        plan_memory(model, *rest, **chosen)


def test_a_model_and_a_folder_are_as_good_as_a_configuration(tmp_path):
    config = make()
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    peaks = {plan_memory(m, "lora").peak_bytes for m in (config, model, tmp_path, str(tmp_path))}
    assert len(peaks) == 1


def test_rows_that_are_too_long_are_named():
    plan = plan_memory(make(), "qlora", r=4, batch_size=2)
    longest = plan.longest_length(1.5)
    assert check_lengths(plan, [1, longest], 1.5) == longest
    with pytest.raises(DoesNotFitError) as caught:
        check_lengths(plan, [5, longest + 1, 7, longest + 9], 1.5)
    message = str(caught.value)
    assert "2 of 4 rows are too long" in message and f"At most {longest:,} tokens" in message
    assert f"row 1 with {longest + 1:,}" in message and f"row 3 with {longest + 9:,}" in message
    assert "gradient_checkpointing" not in message  # it is on already
    with pytest.raises(DoesNotFitError, match="and 2 more.*gradient_checkpointing=True"):
        check_lengths(plan_memory(make(), "qlora", gradient_checkpointing=False), [10**9] * 7, 1.5)


# The tools


def test_the_trace_begins_at_nothing_and_counts_releases():
    trace = trace_memory(lambda: torch.ones(1000).exp().sum())
    assert trace.peak >= 8000 and trace.live[-1] < 100
    assert len(trace.seconds) == len(trace.live) and (np.diff(trace.seconds) >= 0).all()
    assert trace_memory(lambda: None).peak == 0


def test_the_trace_is_silent_and_an_error_comes_through(capfd):
    with pytest.raises(ZeroDivisionError):
        trace_memory(lambda: 1 / 0)
    trace_memory(lambda: torch.ones(3))
    print("still here")
    out, err = capfd.readouterr()
    assert (out, err) == ("still here\n", "")


def test_allocations_hear_views_sharing_and_growth():
    x = torch.ones(100)
    heard = Allocations()
    heard.ignore(x)
    with heard:
        y = x.view(10, 10).T  # no new storage
        z = y + 1
        z.add_(1)
        buffer = torch.empty(0)
        buffer.resize_(50)
        del y, z
    assert heard.changes == [400, 200, -400]


class Block(nn.Module):
    def __init__(self, lora_dropout=0.0):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.lora_dropout(self.inner(x))


@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
def test_recompute_equals_pytorch_to_the_bit(lora_dropout):
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(lora_dropout) for _ in range(4))
    x = torch.randn(3, 16)
    results = []
    for again in (
        recompute,
        lambda block, h: checkpoint(block, h, use_reentrant=True),
        lambda block, h: block(h),
    ):
        blocks.zero_grad()
        torch.manual_seed(1)
        h = start = x.clone().requires_grad_()
        for block in blocks:
            h = again(block, h)
        h.square().sum().backward()
        after = torch.rand(1)
        results.append([h, start.grad, after, *(p.grad.clone() for p in blocks.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert blocks[0].calls == 2 + 2 + 1


def test_recompute_saves_memory():
    blocks = [Block() for _ in range(8)]
    x = torch.randn(4000, 16, requires_grad=True)

    def run(step):
        h = x
        for block in blocks:
            h = step(block, h)
        h.sum().backward()

    kept = trace_memory(lambda: run(lambda block, h: block(h))).peak
    again = trace_memory(lambda: run(recompute)).peak
    assert again < kept / 2


def test_recompute_refuses_an_input_that_would_cut_the_gradients():
    with pytest.raises(PlanError, match="requires_grad"):
        recompute(Block(), torch.ones(2, 16))
    with torch.no_grad():
        assert recompute(Block(), torch.ones(2, 16)).shape == (2, 16)


def test_every_optimizer_plans():
    for optimizer in OPTIMIZERS:
        assert plan_memory(make(), "lora", optim=optimizer).peak_bytes > 0
