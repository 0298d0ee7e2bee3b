"""The fine-tune on the production stack: its settings, its checks, and what it leaves behind."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_base, make_rows, write_jsonl

from qlora_edu import finetune as run_finetune
from qlora_edu.compat import forbid_cpu_repacking
from qlora_edu.errors import (
    ConfigError,
    DataError,
    DoesNotFitError,
    ModelUnavailableError,
    RunExistsError,
    TrainingError,
)
from qlora_edu.finetuning import make_trainer, plan_run, trainer_settings
from qlora_edu.production import callback, loading
from qlora_edu.production.callback import check_gradients
from qlora_edu.production.checkpoints import verify_manifest
from qlora_edu.production.config import PRESETS, FinetuneConfig
from qlora_edu.production.loading import load_base, quantization_config
from qlora_edu.text.conversations import encode_conversations
from qlora_edu.training import collate, held_out_loss

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", make_rows(30))


@pytest.fixture
def config(base, data, tmp_path):
    return FinetuneConfig.from_preset(
        "embedded",
        model=str(base),
        train_data=str(data),
        held_out_data=str(data),
        r=8,
        max_steps=4,
        batch_size=10,
        warmup_steps=0,
        logging_steps=2,
        held_out_rows=12,
        answer_rows=6,
        max_new_tokens=4,
        output_dir=str(tmp_path / "run"),
    )


# Settings


def test_guanaco_presets_are_the_papers():
    for size, rate, lora_dropout in (
        ("7b", 2e-4, 0.1),
        ("13b", 2e-4, 0.1),
        ("33b", 1e-4, 0.05),
        ("65b", 1e-4, 0.05),
    ):
        config = FinetuneConfig.from_preset(f"guanaco-{size}")
        assert (config.learning_rate, config.lora_dropout) == (rate, lora_dropout)
        assert (config.r, config.lora_alpha, config.adam_beta2, config.max_grad_norm) == (
            64,
            16,
            0.999,
            0.3,
        )
        assert (config.batch_size, config.gradient_accumulation_steps, config.max_steps) == (
            1,
            16,
            1875,
        )
        assert (config.max_length, config.lr_scheduler_type) == (512, "constant")
        assert (config.quant_type, config.double_quant, config.compute_dtype) == (
            "nf4",
            True,
            "bfloat16",
        )
        assert config.optim == "paged_adamw_32bit" and config.gradient_checkpointing
    assert set(PRESETS) == {"embedded", *(f"guanaco-{s}" for s in ("7b", "13b", "33b", "65b"))}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": 0}, "r must be at least 1, not 0"),
        ({"r": 8.5}, "r must be of type int, not 8.5"),
        ({"r": True}, "r must be of type int, not True"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0"),
        ({"learning_rate": "fast"}, "learning_rate must be of type float"),
        ({"learning_rate": float("inf")}, "learning_rate must be above 0 and finite"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"weight_decay": float("inf")}, "weight_decay must be at least 0"),
        ({"max_grad_norm": 0}, "max_grad_norm must be above 0"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"max_new_tokens": -5}, "max_new_tokens must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 10},
            r"warmup_steps must be 0 .*constant_with_warmup'\), not 10",
        ),
        ({"batch_size": 2**31}, "batch_size must be at most"),
        ({"seed": 2**64}, "seed must be at most 2,147,483,647"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"name": "../x"}, "name must be a folder's name: 1-100 letters, digits"),
        ({"name": ""}, "name must be text that can be printed"),
        ({"output_dir": ""}, "output_dir must be text that can be printed"),
        ({"train_data": "a\0b"}, "train_data must be text that can be printed"),
        ({"method": "dora"}, "method must be one of .*'qlora'"),
        ({"quant_type": "int4"}, "quant_type must be one of"),
        ({"compute_dtype": "float16"}, "compute_dtype must be one of"),
        ({"double_quant": "yes"}, "double_quant must be of type bool"),
        ({"model": None}, "model must be of type str"),
        ({"chat_template": "alpaca"}, "chat_template must be one of .*'guanaco'"),
        ({"method": ["qlora"]}, "method must be one of"),
        ({"answer_rows": 301}, "answer_rows must be in 0"),
        ({"target_modules": "q_proj,,v_proj"}, "target_modules must be 'all-linear' or names"),
        ({"target_modules": ""}, "target_modules must be text that can be printed"),
        ({"lerning_rate": 1.0}, "no setting 'lerning_rate'; did you mean 'learning_rate'"),
    ],
)
def test_a_wrong_setting_is_named(change, says):
    with pytest.raises(ConfigError, match=says):
        FinetuneConfig.from_preset("embedded", **change)
    with pytest.raises(ConfigError, match=says):
        FinetuneConfig.from_preset("embedded").replace(**change)


def test_settings_come_from_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    own = "learning_rate: 1e-4\nlora_alpha: 32\nmodel: my/model\nmax_steps: 7\n"
    path.write_text(f"preset: guanaco-7b\n{own}")
    config = FinetuneConfig.from_yaml(path)
    assert config == FinetuneConfig.from_preset(
        "guanaco-7b", learning_rate=1e-4, lora_alpha=32.0, model="my/model", max_steps=7
    )
    for text, says in {
        "presett: embedded": "no setting 'presett'; did you mean 'preset'",
        "r: 3": "missing 4 required .* beside a `preset: name`",
        "preset: embeded": "no preset 'embeded'",
        "preset: embedded\nsteps: 3": "no setting 'steps'",
        "- a": "cannot read .*config.yaml",
        "a: [": "cannot read .*config.yaml .*write a `name: value` per line",
        "[" * 2000: "cannot read .*config.yaml",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=says):
            FinetuneConfig.from_yaml(path)
    path.write_bytes(b"\xff\xfe\x00")
    for unreadable in (path, tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read"):
            FinetuneConfig.from_yaml(unreadable)


def test_every_quantisation_field_is_said(config):
    import inspect

    from transformers import BitsAndBytesConfig

    source = inspect.getsource(quantization_config)
    names = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    assert all(f"{name}=" in source for name in names)
    settings = quantization_config(config)
    assert settings.bnb_4bit_quant_type == "nf4" and settings.bnb_4bit_use_double_quant
    assert settings.bnb_4bit_compute_dtype == torch.float32
    assert quantization_config(config.replace(method="lora")) is None


def test_the_adapter_goes_where_the_config_says(config, tmp_path):
    everywhere, _ = make(config, tmp_path)
    some, _ = make(config.replace(target_modules="q_proj, v_proj"), tmp_path)
    adapted = [
        {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
        for model in (everywhere, some)
    ]
    assert adapted[1] == {"q_proj", "v_proj"} < adapted[0] and len(adapted[0]) == 7


@pytest.mark.parametrize("targets", ["query", "q_proj,vproj", "q_proj,lm"])
def test_each_target_must_be_a_layer(config, tmp_path, targets):
    with pytest.raises(ConfigError, match=targets.rpartition(",")[2]):
        run_finetune(config.replace(target_modules=targets))
    assert list(tmp_path.iterdir()) == []


# A whole run


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_run_measures_and_leaves_a_whole_folder(config, tmp_path, capfd, method):
    result = run_finetune(config.replace(method=method))
    captured = capfd.readouterr()
    folder = tmp_path / "run"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]  # nothing half-written beside it
    last = captured.out.strip().splitlines()[-1]
    assert re.fullmatch(
        r"held-out loss \d\.\d{3} → \d\.\d{3} nats on 12 rows, "
        r"exact match \d\.\d\d → \d\.\d\d on 6; \d+ s of training",
        last,
    )
    assert last == result.closing_line()
    assert "plain AdamW, not paged" in captured.out
    assert "leaves out loading and both measurements" in captured.out
    assert captured.err == ""
    assert captured.out.count("\n") == 6, captured.out  # the progress line is one of them
    assert f"run folder: {folder}\n" in captured.out

    assert FinetuneConfig.from_yaml(folder / "config.yaml") == config.replace(method=method)
    versions = verify_manifest(folder)["versions"]
    assert versions["device"] and versions["python"] and versions["torch"] == torch.__version__
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["event"] for m in metrics] == ["before", "step", "step", "after", "summary"]
    assert metrics[0]["held_out_loss"] == result.before.held_out_loss
    assert metrics[-1]["exact_match_after"] == result.after.exact_match
    assert [m["step"] for m in metrics[1:3]] == [2, 4]
    assert len(result.before.answers) == 6 and len(result.held_out) == 12
    assert result.after.held_out_loss < result.before.held_out_loss
    weights = {path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")}
    assert weights == {"model.safetensors" if method == "full" else "adapter_model.safetensors"}


def test_the_saved_adapter_gives_the_trained_model_back(config, base, tmp_path):
    from peft import PeftModel

    result = run_finetune(config, progress=False)
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7  # A and B, two layers, seven linear layers each
    assert all(t.any() and t.dtype == torch.float32 for t in tensors.values())
    fresh, tokenizer = load_base(config)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "run")
    rows = encode_conversations(tokenizer, result.held_out, 64)
    # Same weights, same batches, same kernels.
    assert held_out_loss(loaded, rows) == pytest.approx(result.after.held_out_loss, rel=1e-6)
    assert held_out_loss(loaded.unload(), rows) == pytest.approx(
        result.before.held_out_loss, rel=1e-6
    )


def test_the_seed_decides_the_run(config, tmp_path):
    def adapters(name, seed):
        settings = config.replace(output_dir=str(tmp_path / name), seed=seed, answer_rows=0)
        run_finetune(settings, progress=False)
        return load_file(tmp_path / name / "adapter_model.safetensors")

    first, again, other = adapters("a", 1), adapters("b", 1), adapters("c", 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_gradient_checkpointing_changes_memory_and_nothing_else(config, tmp_path):
    losses = []
    for on in (False, True):
        settings = config.replace(
            gradient_checkpointing=on, output_dir=str(tmp_path / f"run-{on}"), answer_rows=0
        )
        result = run_finetune(settings, progress=False)
        losses.append([loss for _, loss in result.losses])
        assert result.model.is_activation_checkpointing == on
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_without_answers_the_closing_line_reports_the_loss(config, capsys):
    result = run_finetune(config.replace(answer_rows=0), progress=False)
    assert result.after.exact_match is None
    assert re.fullmatch(
        r"held-out loss \d+\.\d{3} → \d+\.\d{3} nats on 12 rows; \d+ s of training",
        capsys.readouterr().out.splitlines()[-1],
    )


def test_nothing_is_overwritten_and_a_failed_run_leaves_nothing(config, tmp_path, monkeypatch):
    with pytest.raises(TrainingError, match="the loss is (nan|inf)"):
        run_finetune(config.replace(learning_rate=1e30, max_steps=8, logging_steps=1))
    assert list(tmp_path.iterdir()) == []

    run = tmp_path / "run"
    run.mkdir()
    (run / "precious").write_text("kept")
    with pytest.raises(RunExistsError, match="A run overwrites nothing"):
        run_finetune(config)
    assert (run / "precious").read_text() == "kept"

    monkeypatch.chdir(tmp_path)
    named = [run_finetune(config.replace(output_dir=None, answer_rows=0)).folder for _ in range(2)]
    assert [str(folder) for folder in named] == ["runs/embedded", "runs/embedded-2"]


def test_the_embedded_preset_teaches_the_base_its_tasks(tmp_path):
    """In half of its steps, at chapter 8's rate, so that this takes one minute and not three."""
    changes = {"max_steps": 300, "learning_rate": 5e-3, "held_out_rows": 90, "answer_rows": 90}
    preset = FinetuneConfig.from_preset("embedded", output_dir=str(tmp_path / "run"), **changes)
    result = run_finetune(preset, progress=False)
    assert len(result.after.answers) == 90
    assert result.before.exact_match < 0.10
    assert result.after.exact_match >= 0.6


def test_answers_longer_than_what_is_generated_are_counted(config, tmp_path, capsys):
    other = str(tmp_path / "other")
    run_finetune(config.replace(max_steps=1, answer_rows=0), progress=False)
    assert "warning" not in capsys.readouterr().out
    run_finetune(config.replace(max_steps=1, max_new_tokens=1, output_dir=other), progress=False)
    warning = "warning: 6 held-out answers have more than max_new_tokens=1 tokens"
    assert warning in capsys.readouterr().out


def test_of_a_conversation_the_last_answer_is_asked_for(config, tmp_path, capsys):
    first, last = make_rows(1)[0]["messages"], make_rows(2)[1]["messages"]
    first[1]["content"] *= 5
    rows = [{"messages": [*first, *last]}, {"messages": last}]
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    run_finetune(config.replace(held_out_data=data, max_steps=1, max_new_tokens=6), progress=False)
    assert "warning" not in capsys.readouterr().out
    long = [{"messages": last}, {"messages": first}]
    write_jsonl(tmp_path / "rows.jsonl", long)
    run = config.replace(held_out_data=data, max_steps=1, answer_rows=1, output_dir=data[:-6])
    run_finetune(run, progress=False)  # the second row is measured, and not asked
    assert "warning" not in capsys.readouterr().out


def test_rows_that_are_left_out_are_not_counted(config, tmp_path, capsys):
    rows = make_rows(4)
    rows[0]["messages"][0]["content"] *= 10  # so that max_length cuts the answer away
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    result = run_finetune(config.replace(held_out_data=data, max_steps=1, max_length=60))
    assert "1 row left out" in capsys.readouterr().out
    assert result.summary()["held_out_rows"] == 3 and "nats on 3 rows" in result.closing_line()


def test_no_step_is_taken_before_the_gradient_check(config, tmp_path, monkeypatch):
    seen = {}

    def refuse(model, batch):
        adapters = {name: p for name, p in model.named_parameters() if "lora_B" in name}
        seen["untouched"] = not any(p.any() for p in adapters.values())
        raise TrainingError("no gradient")

    monkeypatch.setattr(callback, "check_gradients", refuse)
    with pytest.raises(TrainingError, match="no gradient"):
        run_finetune(config)
    assert seen["untouched"] and list(tmp_path.iterdir()) == []


def test_bad_training_data_stops_the_run_with_its_line(config, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": null}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        run_finetune(config.replace(train_data=str(bad)))


def test_rows_beyond_the_positions_of_the_model_are_refused(config, tmp_path):
    long = make_rows(1)
    long[0]["messages"][0]["content"] *= 40
    data = write_jsonl(tmp_path / "long.jsonl", long)
    with pytest.raises(DataError, match="knows 256 positions; lower max_length"):
        run_finetune(config.replace(train_data=str(data), max_length=4096))


def test_a_row_that_asks_nothing_is_named(config, tmp_path):
    rows = [*make_rows(1), {"messages": [{"role": "assistant", "content": "Hello."}]}]
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the conversation begins with an answer"):
        run_finetune(config.replace(held_out_data=data))


@pytest.mark.parametrize("template", ["{% if", "{{ x.y.z }}"])
def test_a_chat_template_that_does_not_work_is_named(config, tmp_path, template):
    folder = make_base(tmp_path / "base")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(DataError, match=r"jsonl:1: the chat template refuses this conversation \("):
        run_finetune(config.replace(model=str(folder)))


@pytest.mark.parametrize("processes", ["2", "8"])
def test_several_processes_are_refused(config, tmp_path, monkeypatch, processes):
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(ConfigError, match="start `python -m qlora_edu finetune` by itself"):
        run_finetune(config)
    assert list(tmp_path.iterdir()) == []


def test_of_several_cards_one_is_used(config, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    settings = trainer_settings(config, tmp_path)
    monkeypatch.undo()
    assert settings.n_gpu == 1 and settings.train_batch_size == config.batch_size


def test_the_settings_of_the_tests_on_a_card_are_settings(tmp_path):
    """Those tests are skipped where there is no card, and would hide a name that is gone."""
    from test_cuda import embedded

    assert embedded(tmp_path).optim == "paged_adamw_32bit"


# The gradient check


def make(config, folder):
    model, tokenizer = load_base(config)
    rows = encode_conversations(tokenizer, [row["messages"] for row in make_rows(4)], 64)
    return make_trainer(config, model, tokenizer, rows, folder).model, collate(rows)


def test_a_batch_that_does_not_fit_is_refused_before_the_first_step(config, monkeypatch):
    """The longest rows are tried first, wherever they stand in the data."""
    tried = []

    def out_of_memory(model, batch, **_):
        tried.append(batch["input_ids"].shape)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(callback, "completion_loss", out_of_memory)
    with pytest.raises(DoesNotFitError, match="at step 0 .*lower batch_size"):
        run_finetune(config, progress=False)
    lengths = [len(row["input_ids"]) for row in encode_all(config)]
    assert tried == [(config.batch_size, max(lengths))]


def encode_all(config):
    _, tokenizer = load_base(config)
    rows = [row["messages"] for row in make_rows(30)]
    return encode_conversations(tokenizer, rows, config.max_length)


def test_the_plan_of_a_run_has_its_settings():
    config = FinetuneConfig.from_preset("guanaco-7b", adapter_dtype="float32", max_length=700)
    plan = plan_run(config, "llama-7b")
    step = plan.settings
    assert (plan.batch_size, plan.max_length, plan.optim) == (1, 700, "paged_adamw_32bit")
    assert (step.r, step.lora_dropout, step.adapter_dtype) == (64, 0.1, "float32")
    assert step.gradient_checkpointing and step.autocast and step.double_quant
    assert step.backend == "bitsandbytes" and not step.padding
    full = plan_run(config.replace(method="full", optim="adamw_torch"), "llama-7b")
    assert full.settings.dtype == "float32" and full.peak_bytes > 6.7e9 * 16
    embedded = FinetuneConfig.from_preset("embedded", target_modules="q_proj, v_proj")
    assert plan_run(embedded).settings.padding
    assert plan_run(embedded).settings.target_modules == ("q_proj", "v_proj")


def test_the_model_answers_as_it_learns(config, capsys):
    run_finetune(config.replace(sample_steps=2, max_steps=4), progress=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 2", "step 4", "step 4"]
    assert "-> " in lines[0] and "Who?" in lines[0]


def test_samples_change_nothing_of_the_run(config):
    ends = []
    for every in (0, 1):
        folder = f"{config.output_dir}-{every}"
        changed = config.replace(sample_steps=every, lora_dropout=0.3, output_dir=folder)
        ends.append(load_file(run_finetune(changed, progress=False).folder / ADAPTER))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_gradient_check_passes_and_leaves_no_trace(config, tmp_path):
    model, batch = make(config, tmp_path)
    state = torch.get_rng_state()
    check_gradients(model, batch)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("layers.0.self_attn.o_proj", "missing"),
        ("layers.0.self_attn.o_proj", "zero"),
        ("layers.1", "missing"),
    ],
)
def test_gradient_check_finds_a_cut(config, tmp_path, place, fault):
    model, batch = make(config, tmp_path)
    (layer,) = (m for name, m in model.named_modules() if name.endswith(place))

    def cut(module, inputs, output):
        if fault == "zero":
            return output * 0
        return output.detach() if place == "layers.1" else inputs[0].new_zeros(output.shape)

    layer.register_forward_hook(cut)
    with pytest.raises(TrainingError, match=f"before step 1: the gradient of .* is {fault}. A"):
        check_gradients(model, batch)


def test_a_batch_may_pass_an_expert_by_but_not_spoil_it(config, tmp_path):
    model, batch = make(config, tmp_path)
    model.base_model.experts = torch.nn.ParameterList([expert := torch.nn.Parameter(torch.ones(2))])
    check_gradients(model, batch)

    def use(module, inputs, output):
        output.logits = output.logits + expert.sum()

    model.register_forward_hook(use)
    expert.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        TrainingError, match=r"the gradient of base_model\.experts\.0 is not finite"
    ):
        check_gradients(model, batch)


def test_repacking_is_forbidden_wherever_it_could_be():
    layer = torch.nn.Linear(1, 1)
    layer.support_avx512bf16_for_cpu = True
    model = torch.nn.Sequential(torch.nn.Sequential(layer), torch.nn.Linear(1, 1))
    forbid_cpu_repacking(model)
    assert layer.support_avx512bf16_for_cpu is False
    assert not hasattr(model[1], "support_avx512bf16_for_cpu")


def test_evaluation_before_training_cuts_gradients_only_if_repacking_is_allowed(config, tmp_path):
    """bitsandbytes 0.50.2's defect; when this fails, the guard in `loading` is no longer needed."""
    from bitsandbytes.functional import has_avx512bf16

    model, batch = make(config, tmp_path)
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    held_out_loss(model, rows)
    check_gradients(model, batch)  # guarded: an evaluation does no harm

    if not has_avx512bf16():
        pytest.skip("the defect shows on processors with AVX512-BF16 alone")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    held_out_loss(model, rows)
    with pytest.raises(TrainingError, match="gradient"):
        check_gradients(model, batch)


# Loading


def test_a_model_out_of_reach_is_named_with_a_way_out(config, capfd, monkeypatch):
    from huggingface_hub import HfApi

    def refuse(self, name, timeout):
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(ModelUnavailableError) as caught:
        load_base(config.replace(model="nobody/no-model"))
    for part in ("'nobody/no-model'", "no route to the Hub", "hf download", "'embedded'"):
        assert part in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("change", ["fewer", "more"])
def test_tensors_that_are_missing_or_left_out_are_said(config, tmp_path, change, capsys):
    folder = make_base(tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    if change == "fewer":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    else:
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = config.replace(model=str(folder))
    if change == "fewer":
        with pytest.raises(ModelUnavailableError, match="lack 1 tensors .model.layers.1.mlp.up_"):
            load_base(settings)
    else:
        load_base(settings)
        assert (
            "left out: there is no layer for 1 tensors (model.layers.2.mlp.up_proj"
            in capsys.readouterr().out
        )


def test_pickled_weights_are_never_loaded(config, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_base(tmp_path / "pickled")
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ModelUnavailableError, match="safetensors"):
        load_base(config.replace(model=str(folder)))


def test_code_that_comes_with_a_model_is_never_run(config, tmp_path):
    folder = make_base(tmp_path / "hostile")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "hostile", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelUnavailableError):
        load_base(config.replace(model=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_a_base_without_a_pad_token_or_a_template_gets_both(config, tmp_path):
    folder = make_base(tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    _, tokenizer = load_base(config.replace(model=str(folder), chat_template="guanaco"))
    assert tokenizer.pad_token == tokenizer.eos_token and "### Human" in tokenizer.chat_template


def test_local_paths_are_seen_from_the_repository_too(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "ROOT", tmp_path)
    (tmp_path / "data" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "data")
    assert loading.locate("data") == str(tmp_path / "data")
    assert loading.locate("notebooks") == "notebooks"
    assert loading.locate("some/model") == "some/model"
