"""Every chapter's mechanism on a CUDA card. Skipped where there is none, so not in CI."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from torch import nn

from benchmarks.gpu.build import build_random
from qlora_edu.finetuning import finetune
from qlora_edu.kernels import PrefetchingPagedAdamW
from qlora_edu.memory import plan_memory
from qlora_edu.paging import PagedAdamW
from qlora_edu.planner.fake_step import training_loss
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.production.loading import load_run
from qlora_edu.qlora import QLoRALinear
from qlora_edu.quantized import quantize
from qlora_edu.training import generate_answers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ADAPTER = "adapter_model.safetensors"


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator).to(dtype)


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_card_gives_the_packed_bytes_and_values_of_the_processor(double_quant):
    weight = normal(300, 1000).cpu()
    here, there = (quantize(weight.to(device), "nf4", 64, False) for device in ("cpu", "cuda"))
    assert torch.equal(here.packed, there.packed.cpu())
    assert torch.equal(here.dequantize(), there.dequantize().cpu())
    there = quantize(weight.cuda(), double_quant=double_quant)
    assert torch.equal(there.dequantize().cpu(), there.to("cpu").dequantize())


@pytest.mark.parametrize("levels", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_bitsandbytes_packed_on_the_card_reads_as_it_reads_it(dtype, levels):
    weight = normal(256, 512, dtype=dtype)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type=levels)
    mine = quantize(weight, levels, double_quant=False)
    mine.packed.copy_(packed)
    mine.constants.copy_(state.absmax)
    assert torch.equal(mine.dequantize(), dequantize_4bit(packed, state))


@pytest.mark.parametrize("tokens", [1, 15])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layer_gives_the_outputs_and_gradients_of_bitsandbytes(dtype, tokens):
    """To two roundings of the dtype's: a matrix product on a card may sum in any order."""
    torch.manual_seed(0)
    linear = nn.Linear(512, 256, bias=False, device="cuda", dtype=dtype)
    layer = QLoRALinear(linear, 8, 16.0, compute_dtype=dtype, double_quant=False)
    twin = bitsandbytes.nn.Linear4bit(
        512, 256, bias=False, compute_dtype=dtype, compress_statistics=False, quant_type="nf4"
    )
    twin.weight.data = linear.weight.detach().cpu().clone()
    twin = twin.to("cuda").requires_grad_(False)
    outputs = []
    for module in (layer, twin):
        x = normal(tokens, 512, dtype=dtype, seed=1).requires_grad_()
        y = module(x)
        y.backward(normal(tokens, 256, dtype=dtype, seed=2))
        outputs.append((y.detach(), x.grad))
    tolerance = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    for mine, theirs in zip(*outputs, strict=True):
        size = theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2 * tolerance * size)


@pytest.mark.parametrize("kind", [PagedAdamW, PrefetchingPagedAdamW])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_paged_step_is_torchs_to_the_bit(dtype, kind):
    shapes = [(300, 70), (1,), (7, 11), (5000,), (64, 64)]
    ours, theirs = (
        [nn.Parameter(normal(*s, dtype=dtype, seed=i)) for i, s in enumerate(shapes)]
        for _ in range(2)
    )
    paged = kind(ours, lr=1e-2, budget_bytes=2**14, page_bytes=2**12)
    plain = torch.optim.AdamW(theirs, lr=1e-2, foreach=False)
    for step in range(6):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = normal(*a.shape, dtype=dtype, seed=100 * step + i)
            b.grad = a.grad.clone()
        paged.step()
        plain.step()
    assert paged.table.faults > paged.table.frames  # so some pages had to leave
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_plan_is_what_the_card_gives(method):
    """Within 8 MiB: PyTorch's pieces are of 512 bytes, and cuBLAS takes some room of its own."""
    tiny = {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "vocab_size": 2048,
        "tie_word_embeddings": False,
    }
    plan = plan_memory(tiny, method, max_length=512, device="cuda")
    for dtype in DTYPES:  # the work spaces of the libraries, which no plan sees
        normal(512, 512, dtype=dtype) @ normal(512, 512, dtype=dtype)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    model = build_random(tiny, plan.settings, "cuda")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(0, 2048, (plan.batch_size, plan.max_length)).cuda()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        training_loss(model, ids, plan.settings).backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() - before
    assert plan.peak_bytes == pytest.approx(peak, abs=2**23)


def embedded(tmp_path, **changes):
    settings = {"max_steps": 8, "answer_rows": 4, "held_out_rows": 8, "lora_dropout": 0.1}
    settings |= {"save_steps": 4, "optim": "paged_adamw_32bit"}
    return FinetuneConfig.from_preset("embedded", **settings | changes)


def test_a_run_on_the_card_comes_back_from_its_folder(tmp_path):
    config = embedded(tmp_path, output_dir=str(tmp_path / "run"))
    result = finetune(config, progress=False)
    model, tokenizer = load_run(tmp_path / "run")
    assert next(model.parameters()).device.type == "cuda"
    answers = generate_answers(
        model, tokenizer, [[{"role": "user", "content": "Which city?"}]], 8, 1
    )
    assert len(answers) == 1 and result.folder == tmp_path / "run"


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "adamw_torch"])
def test_a_killed_run_on_the_card_resumes_to_the_same_adapter(tmp_path, optimizer, monkeypatch):
    """Within float32's noise: backward passes of a card may sum in any order."""
    whole = embedded(tmp_path, output_dir=str(tmp_path / "whole"), optim=optimizer)
    finetune(whole, progress=False)
    from qlora_edu.production import callback as watch

    class Killed(BaseException):
        pass

    real, steps = watch.save_checkpoint, []

    def save_and_die(*args, **kwargs):
        steps.append(real(*args, **kwargs))
        raise Killed

    cut = whole.replace(output_dir=str(tmp_path / "cut"))
    monkeypatch.setattr(watch, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        finetune(cut, progress=False)
    monkeypatch.setattr(watch, "save_checkpoint", real)
    finetune(cut, progress=False, resume=True)
    a, b = (load_file(tmp_path / name / ADAPTER) for name in ("whole", "cut"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)
