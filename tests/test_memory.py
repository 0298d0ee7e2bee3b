"""The planner against real steps and stored measurements."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import LLAMA, make_config, measured_peak
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_edu.errors import ModelUnavailableError, PlanError
from qlora_edu.files import ROOT
from qlora_edu.memory import (
    GIB,
    LLAMA_SHAPES,
    MODELS,
    OPTIMIZERS,
    RESERVE,
    llama_parameters,
    nf4_bits_per_weight,
    plan_memory,
)
from qlora_edu.planner.trace import ROWS
from qlora_edu.quantized import quantize

STORED = json.loads((ROOT / "data" / "results" / "memory.json").read_text(encoding="utf-8"))


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
    plan = plan_memory(make_config(), method, batch_size=2, max_length=100, device="cpu", **chosen)
    assert plan.peak_bytes == pytest.approx(
        measured_peak(make_config(), plan.settings, 2, 100), rel=0.02
    )


def test_the_optimizer_step_can_be_the_worst_moment():
    chosen = {"dtype": "float32", "gradient_checkpointing": False, "device": "cpu"}
    config = make_config(vocab_size=20000)
    plan = plan_memory(config, "full", batch_size=1, max_length=8, **chosen)
    assert plan.peak_moment == "optimizer step"
    assert plan.peak_bytes == pytest.approx(measured_peak(config, plan.settings, 1, 8), rel=0.02)


def test_the_stored_measurements_hold_the_planner_to_its_promise():
    assert len(STORED["rows"]) >= 20 and sum(row["held_out"] for row in STORED["rows"]) >= 10
    assert STORED["command"] == "python benchmarks/memory.py"
    for row in STORED["rows"]:
        ratio = row["predicted_bytes"] / row["measured_bytes"]
        assert row["error"] == pytest.approx(ratio - 1)
        assert abs(row["error"]) <= 0.05, row
    for row in STORED["big"]:
        assert abs(row["predicted_bytes"] / row["traced_bytes"] - 1) <= 0.01, row
        if row["mem_tracker_bytes"]:
            assert row["traced_bytes"] == pytest.approx(row["mem_tracker_bytes"], rel=0.01)


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


def test_bitsandbytes_quantises_every_linear_layer_whatever_is_adapted():
    chosen = {"backend": "bitsandbytes", "r": 8}
    every = plan_memory("llama-7b", **chosen).held
    two = plan_memory("llama-7b", target_modules=["q_proj", "v_proj"], **chosen).held
    for row in ("quantised weights", "quantisation constants", "embeddings and head"):
        assert two[row] == every[row] and "linear weights" not in two
    assert two["adapters"] == 4 * 32 * 2 * 8 * (4096 + 4096) < every["adapters"]


@pytest.mark.parametrize("size", LLAMA_SHAPES)
def test_llama_parameters_are_those_of_the_planned_model(size):
    rows = plan_memory(f"llama-{size}", "full").trace.weights
    linear, rest = llama_parameters(size)
    assert rows["linear weights"] == 2 * linear
    assert sum(rows.values()) == pytest.approx(2 * (linear + rest), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt2"])
def test_a_named_model_has_the_size_of_its_name(name):
    plan = plan_memory(name, "full")
    with torch.device("meta"):
        config = plan.config
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    size = float(name.split("-")[-1].rstrip("b"))
    assert parameters / 1e9 == pytest.approx(size, rel=0.06)
    assert sum(plan.trace.weights.values()) == pytest.approx(2 * parameters, rel=1e-4)


def test_the_field_s_two_headlines():
    full = plan_memory("llama-65b", "full", optim="adamw_32bit")
    assert full.peak_bytes > 780e9
    guanaco = {"r": 64, "backend": "bitsandbytes", "adapter_dtype": "bfloat16"}
    qlora = plan_memory("llama-65b", "qlora", optim="paged_adamw_32bit", **guanaco)
    assert qlora.peak_bytes < 48e9


def test_rows_of_every_moment_have_names_and_add_up():
    plan = plan_memory(make_config(), "qlora", r=4)
    assert set(plan.moments) == {"forward", "logits and loss", "backward", "optimizer step"}
    for moment in plan.moments.values():
        assert set(moment) <= set(ROWS) and min(moment.values()) >= 0
    assert plan.peak_bytes == max(sum(moment.values()) for moment in plan.moments.values())
    lines = str(plan).splitlines()
    assert any(line.startswith("quantisation constants") for line in lines)
    assert lines[-2].startswith("peak: ")
    kept = plan_memory(make_config(), "qlora", r=4, gradient_checkpointing=False)
    assert kept.activation_bytes > plan.activation_bytes
    assert lines[-1].endswith(f"loss begins: {plan.activation_bytes / GIB:.3f} GiB")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4000), st.sampled_from(["full", "lora", "qlora"]))
def test_more_tokens_never_need_less(batch, length, method):
    plan = plan_memory(make_config(), method, batch_size=batch, max_length=length)
    assert plan.peak_bytes <= plan.at(max_length=length + 1).peak_bytes
    if batch > 1:  # one row is a case of its own
        assert plan.peak_bytes <= plan.at(batch_size=batch + 1).peak_bytes


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 4), st.integers(1, 4))
def test_the_longest_length_fits_and_the_next_does_not(card, batch):
    plan = plan_memory(make_config(), "qlora", batch_size=batch, r=4)
    longest = plan.longest_length(card + RESERVE / GIB)
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
    assert plan.spare_bytes((plan.peak_bytes + RESERVE) / GIB) == pytest.approx(0)


@pytest.mark.parametrize("card", [-5, 0, float("nan"), "24", None, True])
def test_a_card_has_a_positive_number_of_gib(card):
    plan = plan_memory(LLAMA, "lora", r=4)
    for ask in (plan.spare_bytes, plan.sentence, plan.longest_length):
        with pytest.raises(PlanError, match="positive number of GiB"):
            ask(card)


def test_print_shows_the_table_and_repr_is_short():
    plan = plan_memory("llama-7b", "qlora")
    assert str(plan) == plan.table() and "\npeak: " in str(plan)
    assert "LlamaConfig" not in repr(plan)


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_number"),
    [("adamw_torch", 4), ("adamw_32bit", 8), ("adamw_8bit", 2 * (1 + 4 / 256)), ("sgd", 0)],
)
def test_optimizer_states(optimizer, bytes_a_number):
    config = make_config(vocab_size=8192)  # every matrix is a multiple of 256 and above 4,096
    plan = plan_memory(config, "full", optim=optimizer)
    sizes = [n for n, _ in plan.trace.trained]
    large = sum(n for n in sizes if n >= 4096)
    small = (sum(sizes) - large) * (8 if optimizer == "adamw_8bit" else bytes_a_number)
    assert plan.state_bytes == large * bytes_a_number + small


def test_a_paged_optimizer_keeps_small_states_on_the_device():
    plan = plan_memory("llama-7b", "qlora", r=16, optim="paged_adamw_32bit")
    sizes = [n for n, _ in plan.trace.trained]
    assert plan.host_bytes == 8 * sum(n for n in sizes if n >= 100_000)  # 16 · 11,008 is above
    assert plan.held["optimizer states"] == 8 * sum(n for n in sizes if n < 100_000) > 0
    assert plan.moments["optimizer step"]["optimizer states"] == 8 * sum(sizes)
    assert plan_memory("llama-7b", "qlora", r=16, optim="adamw_32bit").host_bytes == 0


def test_the_smallest_state_that_is_paged_is_the_one_of_bitsandbytes():
    shape = {**LLAMA, "hidden_size": 1000, "num_attention_heads": 10, "num_key_value_heads": 10}
    plan = plan_memory(shape, "qlora", r=100, optim="paged_adamw_32bit", target_modules=["q_proj"])
    assert {n for n, _ in plan.trace.trained} == {100_000}
    assert plan.host_bytes == plan.state_bytes > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama-8b",), r"'llama-8b' is neither a folder.*owner/name.*did you mean 'llama-"),
        (("llama-7b", "qlora", {"lenght": 9}), "'lenght'; did you mean 'max_length'"),
        (("llama-7b", "qlora", {"x": 9}), "batch_size, max_length, optim, method, r, .*device"),
        (("llama-7b", "qlora", {"quant_type": "nf9"}), "quant_type must be one of"),
        (({"model_type": "bert"}, "full"), "a bert fills gaps"),
        (("llama-7b", "dora"), "method must be one of"),
        ((LLAMA, "qlora", {"rank": 8}), "no setting 'rank'"),
        ((LLAMA, "qlora", {"r": 0}), "r must be a whole number of at least 1, not 0"),
        ((LLAMA, "qlora", {"r": True}), "r must be a whole number"),
        ((LLAMA, "qlora", {"lora_dropout": 1.0}), "lora_dropout must be in"),
        ((LLAMA, "qlora", {"dtype": "int8"}), "dtype must be one of"),
        ((LLAMA, "qlora", {"batch_size": 0}), "batch_size must be a whole number"),
        ((LLAMA, "qlora", {"max_length": 2.5}), "max_length must be a whole number"),
        ((LLAMA, "qlora", {"optim": "lion"}), "optim must be one of"),
        ((LLAMA, "lora", {"target_modules": ["w_proj"]}), "no layer is called"),
        (("gpt2", "qlora"), "Conv1D"),
        (({"hidden_size": 4},), "this describes no model"),
        (({"model_type": "llamma"},), "this describes no model"),
        ((3,), "this describes no model"),
        (({"model_type": "t5"},), "no causal language model"),
        (({"model_type": "resnet"},), "no causal language model"),
        (({"model_type": "mamba"}, "full"), "a step of MambaConfig cannot be traced"),
        (({**LLAMA, "num_attention_heads": 0},), "describes no model"),
        (({**LLAMA, "num_attention_heads": 3},), "describes no model"),
        (({**LLAMA, "num_key_value_heads": 0},), "no causal language model"),
        (({**LLAMA, "num_hidden_layers": 0}, "full"), "no list of 0 blocks"),
        ((LLAMA, "qlora", dict.fromkeys("hgfedcba", 1)), "no setting 'h'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_argument_is_named(arguments, message):
    model, *rest = arguments
    chosen = rest.pop() if rest and isinstance(rest[-1], dict) else {}
    with pytest.raises(PlanError, match=message):
        plan_memory(model, *rest, **chosen)


def test_a_model_and_a_folder_are_as_good_as_a_configuration(tmp_path):
    config = make_config()
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    peaks = {plan_memory(m, "lora").peak_bytes for m in (config, model, tmp_path, str(tmp_path))}
    assert len(peaks) == 1


def test_a_folder_with_a_broken_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_attention_heads": 0}))
    with pytest.raises(PlanError, match="has no config.json that describes a model"):
        plan_memory(tmp_path)


def test_a_name_may_be_written_in_capitals():
    assert plan_memory("Llama-7B").rows == plan_memory("llama-7b").rows


def test_a_folder_that_is_no_model_and_a_hub_out_of_reach_are_told_apart(tmp_path):
    with pytest.raises(PlanError, match="has no config.json"):
        plan_memory(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(PlanError, match="describes a model"):
        plan_memory(tmp_path)
    with pytest.raises(ModelUnavailableError, match="the Hub does not give.*check name"):
        plan_memory("meta-llama/Llama-2-7b-hf")


def test_a_model_on_the_hub_is_found_by_its_name(monkeypatch):
    asked = []
    monkeypatch.setattr(
        AutoConfig, "from_pretrained", lambda name, **_: asked.append(name) or make_config()
    )
    plan = plan_memory("meta-llama/Llama-2-7b-hf")
    assert plan.name == "meta-llama/Llama-2-7b-hf" and asked == [plan.name]
    assert plan.rows == plan_memory(make_config()).rows


def test_bits_per_weight_are_those_of_a_real_tensor():
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    # The tensor also holds one 32-bit offset: 32 / 2**18 of a bit for each weight.
    assert quantize(weight).bits_per_weight == pytest.approx(nf4_bits_per_weight(), abs=2e-4)
    plain = quantize(weight, double_quant=False).bits_per_weight
    assert plain == nf4_bits_per_weight(absmax_blocksize=None) == 4.5


def test_every_optimizer_plans():
    for optimizer in OPTIMIZERS:
        assert plan_memory(make_config(), "lora", optim=optimizer).peak_bytes > 0
