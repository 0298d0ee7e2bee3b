"""What is allocated, traced two ways, and what a model keeps."""

import pytest
import torch
from steps import make_config
from transformers import AutoModelForCausalLM

from qlora_edu.errors import PlanError
from qlora_edu.planner.fake_step import StepSettings, build_model
from qlora_edu.planner.trace import (
    Allocations,
    find_blocks,
    kept_tensors,
    trace_memory,
    weigh,
)


def test_trace_memory_begins_at_nothing_and_counts_releases():
    trace = trace_memory(lambda: torch.ones(1000).exp().sum())
    assert trace.peak >= 8000 and trace.live[-1] < 100
    assert trace_memory(lambda: None).peak == 0


def test_trace_memory_is_silent_and_an_error_comes_through(capfd):
    with pytest.raises(ZeroDivisionError):
        trace_memory(lambda: 1 / 0)
    trace_memory(lambda: torch.ones(3))
    print("still here")
    out, err = capfd.readouterr()
    assert (out, err) == ("still here\n", "")


def test_allocations_count_views_sharing_and_growth():
    x = torch.ones(100)
    allocations = Allocations()
    allocations.ignore([x])
    with allocations:
        y = x.view(10, 10).T  # no new storage
        z = y + 1
        z.add_(1)
        buffer = torch.empty(0)
        buffer.resize_(50)
        del y, z
    assert allocations.changes == [400, 200, -400]


def test_allocations_tell_what_is_unpacked():
    allocations = Allocations()
    with allocations:
        first = torch.ones(10)
        with allocations.unpacking():
            second = torch.ones(10)
        third = first + second
    numbers = [allocations.number(tensor) for tensor in (first, second, third)]
    assert numbers == [0, 1, 2] and allocations.dequantised == {1}


def test_weigh_counts_shared_storage_once():
    model = AutoModelForCausalLM.from_config(make_config(tie_word_embeddings=True))
    assert weigh(model)["embeddings and head"] == 4 * 500 * 128
    total = sum(tensor.nbytes for tensor in {id(t): t for t in kept_tensors(model)}.values())
    assert sum(weigh(model).values()) == total


@pytest.mark.parametrize("backend", ["qlora_edu", "bitsandbytes"])
def test_weigh_knows_the_4_bit_weights_of_both_backends(backend):
    model = build_model(make_config(), StepSettings(r=4, dtype="float32", backend=backend))
    n = 5 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 320)
    rows = weigh(model)
    assert rows["quantised weights"] == n // 2
    assert rows["adapters"] == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert n / 64 < rows["quantisation constants"] < n / 64 + 35 * 1400
    assert len(find_blocks(model)) == 5


def test_weigh_takes_experts_for_the_linear_weights_they_are():
    config = make_config(model_type="mixtral", num_local_experts=4)
    rows = weigh(AutoModelForCausalLM.from_config(config))
    experts = 5 * 4 * 3 * 128 * 320 * 4  # in float32
    assert rows["linear weights"] > experts and rows["norms and the rest"] < 0.01 * experts


def test_find_blocks_refuses_a_model_without_a_list_of_them():
    model = AutoModelForCausalLM.from_config(make_config())
    model.config.num_hidden_layers = 4
    with pytest.raises(PlanError, match="no list of 4 blocks"):
        find_blocks(model)
