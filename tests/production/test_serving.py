"""Support for chapter 10: what is merged answers as before, without PEFT; adapters on a shelf."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_edu.errors import LoRAError
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.production.loading import attach_adapter, load_base, locate
from qlora_edu.production.serving import AdapterShelf, merged_tensors, write_merged
from qlora_edu.quantized import QuantizedTensor

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
NAMES = ("absent", "question", "record", "all")
FOLDERS = {name: locate(f"data/adapters/{name}") for name in NAMES}

WITHOUT_PEFT = """
import sys
for name in ("peft", "bitsandbytes", "qlora_edu"):
    sys.modules[name] = None  # an import of it fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert type(model).__name__ == "LlamaForCausalLM" and tokenizer.chat_template
with torch.no_grad():
    logits = model(torch.tensor([[5, 6, 7, 8, 9, 10, 11]])).logits
save_file({"logits": logits.contiguous()}, sys.argv[2])
"""


def load(method="qlora", adapter=FOLDERS["all"]):
    base, tokenizer = load_base(FinetuneConfig.from_preset("embedded", method=method))
    return attach_adapter(base, adapter), tokenizer


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits.float()


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(
    "dtype, tolerance",
    # float32: another order of sums. bfloat16: each weight is off by up to 2^-9 of itself, and
    # logits up to 15 are sums of hundreds of products of them.
    [(torch.float32, 1e-4), (torch.bfloat16, 0.5)],
)
def test_merged_loads_in_a_process_without_peft(method, dtype, tolerance, tmp_path):
    model, tokenizer = load(method)
    folder = write_merged(model, tokenizer, tmp_path / "merged", dtype=dtype)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", WITHOUT_PEFT, folder, tmp_path / "logits.safetensors"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "logits.safetensors")["logits"]
    unmerged = logits_of(model)
    torch.testing.assert_close(theirs, unmerged, rtol=0, atol=tolerance)
    with model.disable_adapter():
        assert (logits_of(model) - unmerged).abs().max() > 5, "the adapter does next to nothing"
    config = json.loads((folder / "config.json").read_text())
    merged = json.loads((folder / "merged.json").read_text())
    assert merged["merged_into"] == "dequantized" and merged["r"] == 16
    assert "quantization_config" not in config and config["dtype"] == str(dtype)[6:]


def test_a_merged_weight_is_the_sum(tmp_path):
    model, _ = load()
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    packed = QuantizedTensor.from_state_dict(layer.base_layer.state_dict())
    adapter = load_file(Path(FOLDERS["all"]) / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    scaling = json.loads((Path(FOLDERS["all"]) / "adapter_config.json").read_text())
    delta = (adapter[name.format("B")] @ adapter[name.format("A")]).float()
    delta *= scaling["lora_alpha"] / scaling["r"]
    plain = load_file(Path(locate("data/base-model")) / "model.safetensors")
    key = "model.layers.1.mlp.down_proj.weight"
    merged = {
        into: merged_tensors(model, into, torch.float32, plain)[key]
        for into in ("dequantized", "original", "4-bit")
    }
    torch.testing.assert_close(merged["dequantized"], packed.dequantize(torch.float32) + delta)
    torch.testing.assert_close(merged["original"], plain[key].float() + delta)
    assert len(merged["4-bit"].unique()) < 0.5 * merged["original"].numel()
    assert not torch.equal(merged["dequantized"], merged["original"])


def test_what_is_not_adapted_is_the_base_to_the_bit():
    model, _ = load()
    plain = load_file(Path(locate("data/base-model")) / "model.safetensors")
    merged = merged_tensors(model, dtype=torch.float32)
    for name, tensor in merged.items():
        if "norm" in name or "embed" in name:
            assert torch.equal(tensor, plain[name].float())
    assert merged.keys() <= plain.keys() | {"lm_head.weight"}


def test_nothing_is_overwritten_and_half_a_folder_is_none(tmp_path, monkeypatch):
    model, tokenizer = load()
    write_merged(model, tokenizer, tmp_path / "merged")
    with pytest.raises(FileExistsError, match="choose another"):
        write_merged(model, tokenizer, tmp_path / "merged")
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_merged(model, tokenizer, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_bad_merges_are_refused():
    model, _ = load()
    with pytest.raises(LoRAError, match="into must be one of"):
        merged_tensors(model, "5-bit")
    with pytest.raises(LoRAError, match="nothing"):
        merged_tensors(model, "original")
    model.peft_config["default"].modules_to_save = ["embed_tokens"]
    with pytest.raises(LoRAError, match="modules_to_save"):
        merged_tensors(model)
    model.peft_config["default"].modules_to_save = None
    for method in ("lora", "qlora"):
        model, _ = load(method)
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        layer.lora_B["default"].weight.data[0, 0] = float("nan")
        with pytest.raises(LoRAError, match="NaN or infinity"):
            merged_tensors(model)


# Several adapters on one base


@pytest.fixture(scope="module", params=["lora", "qlora"])
def shelf(request):
    base, _ = load_base(FinetuneConfig.from_preset("embedded", method=request.param))
    return AdapterShelf(base, FOLDERS), request.param


def test_each_adapter_answers_as_if_it_were_alone(shelf):
    shelf, method = shelf
    alone = {name: logits_of(load(method, folder)[0]) for name, folder in FOLDERS.items()}
    base, _ = load_base(FinetuneConfig.from_preset("embedded", method=method))
    alone["base"] = logits_of(base)
    for name in ("all", "record", "base", "absent", "question", "base", "all"):
        with shelf.using(name) as model:
            torch.testing.assert_close(logits_of(model), alone[name], rtol=1e-5, atol=1e-4)
    apart = [(alone[a] - alone[b]).abs().max() for a, b in (("all", "record"), ("base", "absent"))]
    assert min(apart) > 1


def test_an_unknown_adapter_is_named_with_what_there_is(shelf):
    shelf, _ = shelf
    with pytest.raises(LoRAError, match="did you mean 'record'"):
        shelf.check("recrod")
    with (
        pytest.raises(LoRAError, match="there are base, absent, question"),
        shelf.using("x"),
    ):
        pass


def test_a_shelf_refuses_what_does_not_fit(tmp_path):
    base, _ = load_base(FinetuneConfig.from_preset("embedded", method="lora"))
    with pytest.raises(LoRAError, match="without an adapter"):
        AdapterShelf(base, {"base": FOLDERS["all"]})
    with pytest.raises(LoRAError, match="cannot read the adapter"):
        AdapterShelf(base, {"nothing": tmp_path})
    shelf = AdapterShelf(base, {"all": FOLDERS["all"]})
    before = logits_of(shelf.model)
    says = {"pop": "is missing from the adapter", "fill": "holds NaN or infinity"}
    for change in says:
        tensors = load_file(Path(FOLDERS["record"]) / "adapter_model.safetensors")
        key = sorted(tensors)[0]
        if change == "pop":
            tensors.pop(key)
        else:
            tensors[key].fill_(float("nan"))
        folder = tmp_path / change
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = (Path(FOLDERS["record"]) / "adapter_config.json").read_text()
        (folder / "adapter_config.json").write_text(config)
        with pytest.raises(LoRAError, match=f"{key} {says[change]}"):
            attach_adapter(shelf.model, folder, name="broken")
        assert list(shelf.model.peft_config) == ["all"]
        assert torch.equal(logits_of(shelf.model), before)


def test_a_deeper_base_is_noticed_beside_another_adapter(tmp_path):
    base, _ = load_base(FinetuneConfig.from_preset("embedded", method="lora"))
    tensors = load_file(Path(FOLDERS["record"]) / "adapter_model.safetensors")
    save_file(
        {name: t for name, t in tensors.items() if "layers.3." not in name},
        tmp_path / "adapter_model.safetensors",
    )
    config = (Path(FOLDERS["record"]) / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    shelf = AdapterShelf(base, {"all": FOLDERS["all"]})
    with pytest.raises(LoRAError, match="is missing from the adapter"):
        attach_adapter(shelf.model, tmp_path, name="shallow")
