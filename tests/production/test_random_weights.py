"""Real architectures with random weights: written for the real loader, or built layer by layer."""

import gc
import json

import pytest
import torch
from safetensors import safe_open
from tiny import make_rows, write_jsonl

from benchmarks.gpu.build import build_random
from qlora_edu import finetune as run_finetune
from qlora_edu.errors import PlanError, RunExistsError
from qlora_edu.memory import plan_memory
from qlora_edu.planner.fake_step import StepSettings
from qlora_edu.planner.trace import weigh
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.production.loading import load_base
from qlora_edu.production.random_weights import random_tensor, skeleton_of, write_random

SMALL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 1100,
    "tie_word_embeddings": False,
}
CPU = {"r": 8, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("random") / "small", SMALL, "float32", 600_000)


def test_the_real_loader_reads_what_is_written(folder):
    from transformers import AutoModelForCausalLM

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((folder / file).stat().st_size < 610_000 for file in files)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(t.nbytes for t in model.state_dict().values()) == index["metadata"]["total_size"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, random_tensor(name, tensor.shape, torch.float32))
    assert (model.model.norm.weight == 1).all()


def test_tied_weights_are_written_once(tmp_path):
    folder = write_random(tmp_path / "tied", {**SMALL, "tie_word_embeddings": True}, "bfloat16")
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (not a mapping)


def test_it_is_labelled_wherever_it_appears(folder, tmp_path, capsys):
    rows = str(write_jsonl(tmp_path / "rows.jsonl", make_rows(8)))
    config = FinetuneConfig.from_preset(
        "embedded",
        model=str(folder),
        train_data=rows,
        held_out_data=rows,
        max_steps=2,
        held_out_rows=2,
        answer_rows=0,
        output_dir=str(tmp_path / "run"),
    )
    run_finetune(config, progress=False)
    out = capsys.readouterr().out
    assert f"RANDOM WEIGHTS: {folder} was never trained" in out
    model, _ = load_base(config)
    assert model.config.random_init and "random_init" in (folder / "config.json").read_text()


def test_nothing_is_overwritten_and_unknown_models_are_named(folder, tmp_path):
    with pytest.raises(RunExistsError, match="nothing is overwritten"):
        write_random(folder, SMALL)
    with pytest.raises(PlanError, match="llama-8b"):
        write_random(tmp_path / "x", "llama-8b")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("backend", ["qlora_edu", "bitsandbytes"])
def test_layer_by_layer_or_at_once_is_the_same_base(folder, backend):
    from bitsandbytes.functional import dequantize_4bit

    built = build_random(SMALL, StepSettings(backend=backend, gradient_checkpointing=False, **CPU))
    loaded, _ = load_base(FinetuneConfig.from_preset("embedded", model=str(folder)))
    for name, layer in loaded.named_modules():
        if name.endswith("proj"):
            expected = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            if backend == "bitsandbytes":
                mine = built.get_submodule(name).base_layer.weight
                found = dequantize_4bit(mine.data, mine.quant_state)
            else:
                found = built.get_submodule(name).weight.dequantize()
            assert torch.equal(found, expected)
    assert torch.equal(built.get_input_embeddings().weight, loaded.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        ("qlora", "qlora_edu"),
        ("qlora", "bitsandbytes"),
        ("lora", "qlora_edu"),
        ("houlsby", "qlora_edu"),
        ("full", "qlora_edu"),
    ],
)
def test_a_repeated_batch_is_learned(method, backend):
    settings = StepSettings(method=method, backend=backend, **CPU)
    model = build_random(SMALL, settings)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any(p.is_meta for p in model.parameters())
    assert all("lora_" in n for n in names) or method in ("full", "houlsby")
    ids = torch.randint(0, 1100, (2, 20), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("backend", ["qlora_edu", "bitsandbytes"])
def test_a_layer_is_quantised_before_the_next_is_made(monkeypatch, backend):
    from benchmarks.gpu import build

    def filled():
        linear = [m for m in gc.get_objects() if type(m) is torch.nn.Linear]
        return [m for m in linear if not m.weight.is_meta and len(m.weight) != SMALL["vocab_size"]]

    gc.collect()
    before, made, real = len(filled()), set(), build.random_tensor

    def watched(name, *args):
        assert len(filled()) <= before + ("proj" not in name), f"before {name}"
        made.add(name)
        return real(name, *args)

    monkeypatch.setattr(build, "random_tensor", watched)
    build_random(SMALL, StepSettings(**CPU, backend=backend))
    assert sum("proj" in name for name in made) == 21


@pytest.mark.parametrize("backend", ["qlora_edu", "bitsandbytes"])
def test_layers_keep_their_biases(backend):
    qwen = {**SMALL, "model_type": "qwen2"}
    built = build_random(qwen, StepSettings(backend=backend, **CPU))
    layer = built.model.layers[0].self_attn.q_proj
    bias = getattr(layer, "base_layer", layer).bias
    assert torch.equal(bias, torch.zeros(128)) and not bias.requires_grad


def test_what_is_built_is_what_is_planned():
    """The planner counts held bytes of a model of this shape: the two must be one."""
    settings = StepSettings(**CPU)
    plan = plan_memory(SMALL, "qlora", batch_size=1, max_length=32, **CPU)
    weighed = weigh(build_random(SMALL, settings))
    assert sum(weighed.values()) == sum(
        plan.held[name] for name in plan.held if name not in ("gradients", "optimizer states")
    )


def test_norms_are_ones_and_names_decide():
    first = random_tensor("a.weight", [64, 64], torch.float32)
    assert torch.equal(first, random_tensor("a.weight", [64, 64], torch.float32))
    assert not torch.equal(first, random_tensor("b.weight", [64, 64], torch.float32))
    assert first.std().item() == pytest.approx(0.02, rel=0.05)
    assert (random_tensor("a.bias", [4], torch.float32) == 0).all()


def test_a_description_of_no_model_is_refused(tmp_path):
    with pytest.raises(PlanError):
        write_random(tmp_path / "x", {"model_type": "nothing"})


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "falcon", "gpt_neox"])
def test_the_norms_of_every_architecture_are_ones(kind):
    skeleton = skeleton_of({"model_type": kind, "num_hidden_layers": 1}, "float32")
    norms = [
        f"{n}.weight" for n, m in skeleton.named_modules() if isinstance(m, torch.nn.LayerNorm)
    ]
    assert norms
    for name in norms:
        assert (random_tensor(name, [4], torch.float32) == 1).all(), name
