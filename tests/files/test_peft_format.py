"""Chapter 4: adapters as files go to PEFT and come back, or are refused with what is wrong."""

import copy
import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_adapters import DTYPES, MODULES, logits, make, train_a_little

from qlora_edu.adapters import adapter_tensors, add_houlsby, add_lora, lora_layers
from qlora_edu.compat import quiet
from qlora_edu.errors import LoRAError
from qlora_edu.files.peft_format import load_adapter, save_adapter
from qlora_edu.lora import LoRALinear
from qlora_edu.qlora import replace_linear_layers


@st.composite
def adapters(draw) -> dict:
    """What an adapter can be: on any layers of any architecture, of any rank and dtype."""
    architecture = draw(st.sampled_from(sorted(MODULES)))
    modules = MODULES[architecture]
    some = st.lists(st.sampled_from(modules), min_size=1, max_size=len(modules), unique=True)
    return {
        "architecture": architecture,
        "target_modules": draw(st.just("all-linear") | some),
        "r": draw(st.integers(1, 40)),  # beyond min(in, out), too
        "lora_alpha": draw(st.sampled_from([1, 3, 8, 16.5])),
        "dtype": draw(st.sampled_from(DTYPES)),
    }


def assert_equal_outputs(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The products run in the same order; only where α/r acts differs: one rounding a layer.

    In 16 bits a rounding that falls the other way grows through two layers: a few units of 2^-8
    (2^-11) of outputs of size 1 to 10. A wrong scaling is off by ten times that.
    """
    assert ours.dtype == theirs.dtype
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.02}[ours.dtype]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


EXAMPLES = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@EXAMPLES
@given(adapter=adapters())
def test_saved_here_loads_in_peft(adapter, tmp_path_factory):
    from peft import PeftModel

    folder = tmp_path_factory.mktemp("ours") / "adapter"
    base = make(adapter["architecture"], adapter["dtype"])
    ours = copy.deepcopy(base)
    add_lora(
        ours,
        adapter["r"],
        adapter["lora_alpha"],
        target_modules=adapter["target_modules"],
    )
    train_a_little(ours)
    save_adapter(ours, folder, base_model="nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that are missing
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    assert not torch.equal(logits(ours), logits(base))
    assert_equal_outputs(logits(ours), logits(theirs))


@EXAMPLES
@given(adapter=adapters(), init=st.sampled_from([True, "gaussian"]))
def test_saved_by_peft_loads_here(adapter, init, tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("theirs")
    base = make(adapter["architecture"], adapter["dtype"])
    config = LoraConfig(
        r=adapter["r"],
        lora_alpha=adapter["lora_alpha"],
        target_modules=adapter["target_modules"],
        init_lora_weights=init,
        task_type="CAUSAL_LM",
    )
    with quiet():
        theirs = get_peft_model(copy.deepcopy(base), config).eval()
        train_a_little(theirs)
        theirs.save_pretrained(folder)
    ours = copy.deepcopy(base)
    said = load_adapter(ours, folder)
    assert said["r"] == adapter["r"]
    assert_equal_outputs(logits(ours), logits(theirs))
    stored = load_file(folder / "adapter_model.safetensors")
    assert adapter_tensors(ours).keys() == stored.keys()
    assert all(
        torch.equal(adapter_tensors(ours)[name].to(t.dtype), t) for name, t in stored.items()
    )


def saved(tmp_path, **options):
    model = make("Llama")
    add_lora(model, r=4, lora_alpha=8, **options)
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"use_dora": True}, LoRAError, "use_dora"),
        ({"use_rslora": True}, LoRAError, "use_rslora"),
        ({"rank_pattern": {"q_proj": 2}}, LoRAError, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, LoRAError, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, LoRAError, "pissa"),
        ({"peft_type": "IA3"}, LoRAError, "IA3"),
        ({"r": 8}, LoRAError, "has shape"),
        ({"bias": "all"}, LoRAError, "bias"),
        ({"r": 0}, LoRAError, "not r=0, "),
        ({"lora_alpha": "8"}, LoRAError, "lora_alpha='8', "),
    ],
)
def test_an_adapter_of_another_kind_is_refused_and_the_model_stays(fields, error, says, tmp_path):
    folder, model = saved(tmp_path), make("Llama")
    rewrite(folder, **fields)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error, match=says):
        load_adapter(model, folder)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not lora_layers(model)


def test_the_fields_of_peft_s_own_config_are_read_or_refused(tmp_path):
    """A new field of a new release must not be passed over: its default must be empty or known."""
    from peft import LoraConfig

    folder = saved(tmp_path)
    own = json.loads((folder / "adapter_config.json").read_text())
    defaults = {k: v for k, v in LoraConfig().to_dict().items() if not isinstance(v, set)}
    rewrite(folder, **(defaults | own))
    load_adapter(make("Llama"), folder)


def test_a_file_without_tensors_is_refused(tmp_path):
    folder = saved(tmp_path)
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(LoRAError, match="empty"):
        load_adapter(make("Llama"), folder)


def test_a_cut_file_and_a_missing_one_are_refused(tmp_path):
    folder = saved(tmp_path)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LoRAError, match="no adapter"):
        load_adapter(make("Llama"), folder)
    path.unlink()
    with pytest.raises(LoRAError, match="no adapter"):
        load_adapter(make("Llama"), folder)
    for text in ("[]", "[" * 100_000):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(LoRAError, match="no adapter"):
            load_adapter(make("Llama"), folder)


def test_an_adapter_is_not_loaded_over_another_kind(tmp_path):
    folder, model = saved(tmp_path), make("Llama")
    add_houlsby(model, bottleneck=4)
    with pytest.raises(LoRAError, match="4 adapted layers already.*HoulsbyAdapter"):
        load_adapter(model, folder)
    assert not lora_layers(model)


def test_an_adapter_for_other_layers_lists_them(tmp_path):
    folder = saved(tmp_path)
    with pytest.raises(LoRAError, match=r"called .*0.self_attn.q_proj"):
        load_adapter(make("GPT-NeoX"), folder)


def test_another_alpha_is_refused_where_the_layers_are_there(tmp_path):
    folder, model = saved(tmp_path), make("Llama")
    replace_linear_layers(model, r=4, lora_alpha=16)
    with pytest.raises(LoRAError, match="scaled wrongly"):
        load_adapter(model, folder)


def test_nothing_is_overwritten_and_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model = make("Llama")
    add_lora(model, r=4, lora_alpha=8)
    with pytest.raises(FileExistsError, match="overwritten"):
        save_adapter(model, tmp_path)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_what_would_not_be_saved_is_refused(tmp_path):
    model = make("Qwen2")
    add_lora(model, r=4, lora_alpha=8)
    model.model.layers[0].self_attn.q_proj.base.bias.requires_grad_()
    with pytest.raises(LoRAError, match="q_proj.base.bias.* would not be saved"):
        save_adapter(model, tmp_path / "adapter")


def test_layers_that_differ_do_not_fit_in_a_file(tmp_path):
    model = make("Llama")
    layer = model.model.layers[0].mlp
    layer.up_proj = LoRALinear(layer.up_proj, r=2, lora_alpha=4)
    layer.down_proj = LoRALinear(layer.down_proj, r=4, lora_alpha=4)
    with pytest.raises(LoRAError, match="one"):
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(LoRAError, match="one"):
        save_adapter(make("Llama"), tmp_path / "adapter")
