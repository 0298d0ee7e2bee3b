"""Chapter 4: adapters in a model fit or are refused, and are swapped on one base."""

import copy
import math

import pytest
import torch
from torch import nn

from qlora_edu.adapters import (
    PEFT_PREFIX,
    adapter_tensors,
    add_houlsby,
    add_lora,
    find_linear_layers,
    load_adapters,
    lora_layers,
    remove_adapters,
)
from qlora_edu.compat import quiet
from qlora_edu.errors import LoRAError
from qlora_edu.qlora import QLoRALinear, replace_linear_layers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def make(architecture: str, dtype=torch.float32) -> nn.Module:
    """A random model of 20,000 parameters or so; Qwen2 and GPT-NeoX have biases, Llama has none."""
    import transformers as hf

    torch.manual_seed(0)
    if architecture == "GPT-2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4))
    else:
        heads = {} if architecture == "GPT-NeoX" else {"num_key_value_heads": 2}
        kind = {"Llama": "Llama", "Qwen2": "Qwen2", "GPT-NeoX": "GPTNeoX"}[architecture]
        config = getattr(hf, f"{kind}Config")(
            intermediate_size=48, tie_word_embeddings=False, initializer_range=0.2, **SHAPE, **heads
        )
        model = getattr(hf, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they start at zero, which would hide a lost one
                parameter.normal_()
    return model.to(dtype).eval()


MODULES = {
    "Llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "Qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "GPT-NeoX": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
}


def train_a_little(model: nn.Module, seed: int = 1) -> None:
    """Move every trainable tensor, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(24).view(2, 12)).logits


@pytest.mark.parametrize("stored_as", DTYPES)
def test_a_file_of_any_dtype_loads_exactly(stored_as, tmp_path):
    model = make("Llama")
    add_lora(model, r=4, lora_alpha=8)
    train_a_little(model)
    rounded = {name: tensor.to(stored_as) for name, tensor in adapter_tensors(model).items()}
    load_adapters(model, rounded)
    for name, tensor in adapter_tensors(model).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, rounded[name].float())


def test_the_names_are_those_of_a_qlora_model_too():
    lora, qlora = make("Qwen2"), make("Qwen2")
    add_lora(lora, r=4, lora_alpha=8, target_modules=["q_proj"])
    replace_linear_layers(qlora, r=4, lora_alpha=8, target_modules=["q_proj"])
    assert all(isinstance(layer, QLoRALinear) for layer in lora_layers(qlora).values())
    train_a_little(lora)
    load_adapters(qlora, adapter_tensors(lora))
    theirs = adapter_tensors(lora)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in adapter_tensors(qlora).items())


# Swapping


def test_adapters_are_swapped_on_one_base_without_a_trace():
    base = make("Llama")
    model = copy.deepcopy(base)
    add_lora(model, r=4, lora_alpha=8)
    kept, answers = [], []
    for seed in (1, 2, 3):
        train_a_little(model, seed)
        kept.append({name: tensor.clone() for name, tensor in adapter_tensors(model).items()})
        answers.append(logits(model))
    for i in (2, 0, 1, 0):
        load_adapters(model, kept[i])
        assert torch.equal(logits(model), answers[i])
    remove_adapters(model)
    assert torch.equal(logits(model), logits(base))
    assert model.state_dict().keys() == base.state_dict().keys()


def test_loading_copies_and_does_not_share():
    model = make("Llama")
    add_lora(model, r=4, lora_alpha=8)
    train_a_little(model)
    kept = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    load_adapters(model, kept)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    train_a_little(model)
    assert all(torch.equal(kept[name], before[name]) for name in kept)


# What does not fit


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    train_a_little(model)
    return {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}


LAST = f"{PEFT_PREFIX}model.layers.1.mlp.down_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda t: t.pop(LAST), LoRAError, f"{LAST} is missing"),
        (lambda t: t.update({"zz.lora_A": t[LAST]}), LoRAError, "zz.lora_A is not a"),
        (
            lambda t: t.update({LAST: torch.ones(32, 2)}),
            LoRAError,
            rf"{LAST} has shape \(32, 2\), the model needs \(32, 4\)",
        ),
        (lambda t: t[LAST].fill_(math.nan), LoRAError, f"{LAST} holds NaN or infinity"),
        (lambda t: t[LAST].fill_(-math.inf), LoRAError, f"{LAST} holds NaN or infinity"),
        (lambda t: t.clear(), LoRAError, "empty"),
        (lambda t: t.update({LAST: t[LAST].int()}), LoRAError, "int32.*no floating"),
        (
            lambda t: [tensor.zero_() for name, tensor in t.items() if "lora_B" in name],
            LoRAError,
            "changes nothing",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(change, error, says):
    model = make("Llama")
    add_lora(model, r=4, lora_alpha=8)
    tensors = trained_tensors(model)
    train_a_little(model, seed=2)
    before = logits(model)
    change(tensors)
    with pytest.raises(error, match=says):
        load_adapters(model, tensors)
    assert torch.equal(logits(model), before)


def test_another_rank_lists_the_tensors():
    model, other = make("Llama"), make("Llama")
    add_lora(model, r=4, lora_alpha=8)
    add_lora(other, r=2, lora_alpha=8)
    with pytest.raises(LoRAError) as error:
        load_adapters(model, trained_tensors(other))
    assert str(error.value).startswith("tensors that do not fit (28): ")
    assert str(error.value).count("has shape") == 6 and "and 22 more" in str(error.value)


def test_faults_of_every_kind_are_listed_together():
    model = make("Llama")
    add_lora(model, r=4, lora_alpha=8)
    tensors = trained_tensors(model)
    first = next(iter(tensors))
    tensors[first] = torch.ones(2, 32)
    tensors["zz.lora_A"] = tensors.pop(LAST)
    with pytest.raises(LoRAError) as error:
        load_adapters(model, tensors)
    says = str(error.value)
    assert says.startswith("tensors that do not fit (3): ")
    assert f"{LAST} is missing from the adapter" in says
    assert "zz.lora_A is not a tensor of this model" in says
    assert f"{first} has shape (2, 32)" in says


def test_an_untrained_adapter_loads_if_that_is_said():
    model = make("Llama")
    add_lora(model, r=4, lora_alpha=8)
    fresh = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    train_a_little(model)
    load_adapters(model, fresh, allow_untrained=True)
    assert not any(tensor.any() for name, tensor in fresh.items() if "lora_B" in name)
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in adapter_tensors(model).items())


def test_loading_into_a_merged_layer_is_refused():
    model = make("Llama")
    add_lora(model, r=4, lora_alpha=8)
    tensors = trained_tensors(model)
    model.model.layers[0].mlp.up_proj.merge()
    with pytest.raises(LoRAError, match=r"unmerge.*up_proj"):
        load_adapters(model, tensors)


def test_loading_without_adapted_layers_is_refused():
    with pytest.raises(LoRAError, match="add_lora"):
        load_adapters(make("Llama"), {"a": torch.ones(1)})


# Adapters on adapters

WAYS_TO_ADD = {
    "LoRA": lambda model: add_lora(model, r=4, lora_alpha=8, target_modules="q_proj"),
    "Houlsby": lambda model: add_houlsby(model, bottleneck=4),
    "QLoRA": lambda model: replace_linear_layers(
        model, r=4, lora_alpha=8, target_modules="up_proj"
    ),
}


@pytest.mark.parametrize("second", WAYS_TO_ADD)
@pytest.mark.parametrize("first", WAYS_TO_ADD)
def test_a_second_adapter_is_refused_and_the_first_stays_as_it_is(first, second):
    model = make("Llama")
    names = WAYS_TO_ADD[first](model)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    says = rf"{len(names)} adapted layers.*{names[0]}.*remove_adapters.*4 bits"
    with pytest.raises(LoRAError, match=says):
        WAYS_TO_ADD[second](model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    if first != "QLoRA":
        remove_adapters(model)
        assert torch.equal(logits(model), logits(make("Llama")))
        WAYS_TO_ADD[second](model)


def test_a_model_that_peft_has_adapted_is_refused():
    from peft import LoraConfig, get_peft_model

    with quiet():
        model = get_peft_model(make("Llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(LoRAError, match=r"2 adapted layers.*q_proj.*unload"):
        add_lora(model, r=4, lora_alpha=8)


# Which layers


@pytest.mark.parametrize("targets", ["q_proj, v_proj", " q_proj,v_proj ,", [" q_proj", "v_proj "]])
def test_names_may_have_commas_between_and_spaces_around_them(targets):
    model = make("Llama")
    wanted = find_linear_layers(model, ["q_proj", "v_proj"])
    assert len(wanted) == 4 and find_linear_layers(model, targets) == wanted


@pytest.mark.parametrize("targets", ["", [], " , "])
def test_no_target_at_all_is_refused(targets):
    with pytest.raises(LoRAError, match=r"called \[\].*'q_proj'"):
        find_linear_layers(make("Llama"), targets)


@pytest.mark.parametrize(
    ("target_modules", "found"),
    [
        ("all-linear", r"but \[.*'Conv1D'.*\]"),
        (["c_attn"], "c_attn cannot be adapted: Conv1D is not a plain nn.Linear"),
    ],
)
def test_conv1d_of_gpt2_is_refused_in_clear_words(target_modules, found):
    model = make("GPT-2")
    with pytest.raises(LoRAError, match=f"{found}.*PEFT can adapt it"):
        add_lora(model, r=4, lora_alpha=8, target_modules=target_modules)
    with pytest.raises(LoRAError, match=f"{found}.*PEFT can adapt it"):
        replace_linear_layers(model, r=4, lora_alpha=8, target_modules=target_modules)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_where_every_linear_layer_is_left_out_the_reason_says_so():
    with pytest.raises(LoRAError, match="no nn.Linear to adapt"):
        find_linear_layers(nn.Sequential(nn.Linear(4, 4)), skip=["0"])
    with pytest.raises(LoRAError, match="no weight"):
        find_linear_layers(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("architecture", sorted(MODULES))
def test_all_linear_is_what_peft_takes_it_to_be(architecture):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear

    with quiet():
        theirs = get_peft_model(make(architecture), LoraConfig(target_modules="all-linear"))
    adapted = {n for n, module in theirs.named_modules() if isinstance(module, Linear)}
    found = find_linear_layers(make(architecture))
    assert {f"{PEFT_PREFIX}{name}" for name in found} == adapted


def test_a_target_that_is_nowhere_is_named_with_what_there_is():
    with pytest.raises(LoRAError, match=r"\['q_prj'\].*'q_proj'"):
        add_lora(make("Llama"), r=4, lora_alpha=8, target_modules=["q_prj", "v_proj"])
