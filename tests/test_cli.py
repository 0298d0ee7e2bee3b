"""The command line: what it lists, what it returns, and that no input ends in a traceback."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_base, make_rows, write_jsonl

from qlora_edu.cli import COMMANDS, PLANNED, main
from qlora_edu.files import ROOT
from qlora_edu.planner.fake_step import StepSettings
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.production.run_folder import checkpoints_of

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A YAML file of settings for a run of seconds, but for its `output_dir`."""
    folder = tmp_path_factory.mktemp("tiny")
    data = write_jsonl(folder / "rows.jsonl", make_rows(30))
    config = FinetuneConfig.from_preset(
        "embedded",
        model=str(make_base(folder / "base")),
        train_data=str(data),
        held_out_data=str(data),
        r=8,
        max_steps=4,
        batch_size=4,
        held_out_rows=4,
        answer_rows=0,
        save_steps=2,
        output_dir=str(folder / "unused"),
    )
    (folder / "config.yaml").write_text(json.dumps(asdict(config)))  # JSON is YAML
    return folder / "config.yaml"


@pytest.fixture
def shape(tmp_path):
    """A folder that describes a model of a few blocks, to be planned in a moment."""
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(SHAPE))
    return str(tmp_path / "shape")


# What it lists


def test_the_overview_names_every_command(capsys):
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"qlora_edu {command}" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["embedded", "guanaco-33b"])
def test_finetune_lists_every_setting_with_its_meaning_and_the_presets_value(capsys, preset):
    assert main(["finetune", "--preset", preset, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    config = FinetuneConfig.from_preset(preset)
    for setting in fields(FinetuneConfig):
        value, meaning = getattr(config, setting.name), setting.metadata["help"]
        assert f"--{setting.name} " in shown
        assert f"{meaning} (default: {value})" in shown


def test_plan_lists_every_setting_with_its_meaning(capsys):
    assert main(["plan", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    meanings = {field.name: field.metadata["help"] for field in fields(FinetuneConfig)} | PLANNED
    names = {"batch_size", "max_length", "optim", *(field.name for field in fields(StepSettings))}
    assert names > set(PLANNED)
    for name in names:
        assert f"--{name} " in shown and f"{meanings[name]} (default: " in shown


# What it does and returns


def test_settings_are_given_in_either_way(tiny, tmp_path, capsys):
    for folder, words in (
        ("a", ["--max_steps", "2", "--learning_rate", "1e-3", "--no_double_quant"]),
        ("b", ["max_steps=2", "learning_rate=1e-3", "--resume", "double_quant=false"]),
    ):
        out = str(tmp_path / folder)
        assert main(["finetune", "--config", str(tiny), *words, f"output_dir={out}"]) == 0
    assert "s of training" in capsys.readouterr().out.splitlines()[-1]
    first, second = (FinetuneConfig.from_yaml(tmp_path / f / "config.yaml") for f in "ab")
    assert first == second.replace(output_dir=first.output_dir)
    assert (first.max_steps, first.learning_rate, first.double_quant) == (2, 1e-3, False)


def test_plan_says_by_its_status_whether_the_step_fits(shape, capsys):
    assert main(["plan", shape, "--card", "24", "batch_size=2", "--method", "lora", "r=8"]) == 0
    out = capsys.readouterr().out
    assert "lora: batch 2 of 512 tokens" in out and "fits on a 24 GB card" in out
    assert main(["plan", shape, "--card", "0.5", "--target_modules", "q_proj, v_proj"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_doctor_answers(capsys):
    assert main(["doctor"]) in (0, 1)
    assert "Python" in capsys.readouterr().out


def test_ctrl_c_says_where_the_run_stopped_and_how_it_goes_on(tiny, tmp_path, monkeypatch, capsys):
    from qlora_edu.production.callback import FinetuneCallback

    original = FinetuneCallback.on_step_end

    def interrupted(self, args, state, control, **others):
        original(self, args, state, control, **others)
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(FinetuneCallback, "on_step_end", interrupted)
    out = tmp_path / "a run"
    words = ["--config", str(tiny), "--output_dir", str(out)]
    assert main(["finetune", *words]) == 130
    (said,) = capsys.readouterr().err.strip().splitlines()
    saved = checkpoints_of(out) / "checkpoint-000002"
    assert f"stopped at step 3 of 4; its newest checkpoint is {saved}. Go on with: " in said
    monkeypatch.undo()
    import shlex

    again = shlex.split(said.partition("Go on with: ")[2])
    assert again[:4] == ["python", "-m", "qlora_edu", "finetune"]
    assert main(again[3:]) == 0
    assert "resumed from checkpoint-000002" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["temperature", "top_p", "max_new_tokens"])
def test_an_option_of_chat_that_means_nothing_was_written_wrongly(option, capsys):
    assert main(["chat", f"--{option}", "-1"]) == 2
    assert option in capsys.readouterr().err


def test_the_way_to_go_on_names_the_folder_that_was_chosen(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(config, resume):
        raise KeyboardInterrupt(f"stopped in {config.output_dir}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlora_edu.finetuning.finetune", interrupted)
    other = checkpoints_of(tmp_path / "runs" / "embedded")  # of a run that still goes on
    other.mkdir(parents=True)
    assert main(["finetune", "--resume", "name=other"]) == 130
    assert capsys.readouterr().err.strip().endswith(" name=other output_dir=runs/other --resume")
    assert main(["finetune", "r=4"]) == 130
    said = capsys.readouterr().err.strip()
    assert said.startswith("stopped in runs/embedded-2")
    assert said.endswith("finetune r=4 output_dir=runs/embedded-2 --resume")


@pytest.mark.parametrize(
    ("words", "name", "r"),
    [
        (["--name", "r=8"], "r=8", 16),
        (["--name=a=b", "r=8"], "a=b", 8),
        (["--resume", "r=8"], "embedded", 8),
        (["--no_double_quant", "r=8", "name=x"], "x", 8),
    ],
)
def test_the_value_of_an_option_is_not_taken_for_a_setting(words, name, r, monkeypatch):
    runs = []
    monkeypatch.setattr("qlora_edu.finetuning.finetune", lambda config, resume: runs.append(config))
    assert main(["finetune", "output_dir=somewhere", *words]) == 0
    assert (runs[0].name, runs[0].r) == (name, r)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_output_survives_any_terminal(tiny, tmp_path, encoding):
    words = ["finetune", "--config", str(tiny), "max_steps=1", f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "qlora_edu", *words],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"held-out loss" in done.stdout.splitlines()[-1]


def test_a_reader_that_stops_reading_is_no_error(shape):
    words = [sys.executable, "-m", "qlora_edu", "plan", shape]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 1 and b"roken" not in said


# Junk


def refused(words, capsys) -> str:
    """Give the words; make sure that they are refused in few words; what was said."""
    status = main(words)
    said = capsys.readouterr().err
    assert status in (1, 2), words
    assert "error: " in said and "Traceback" not in said, words
    return said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["finetun"], "did you mean 'finetune'"),
        ([""], "no command ''"),
        (["finetune", "stepps=3"], "did you mean 'max_steps'"),
        (["finetune", "--lerning_rate", "3"], "did you mean 'learning_rate'"),
        (["finetune", "lr=3"], "no setting 'lr'"),
        (["finetune", "hello"], "no setting 'hello'"),
        (["finetune", "r=["], "--r: invalid int value: '['"),
        (["finetune", "r="], "--r: invalid int"),
        (["finetune", "r=0"], "r must be at least 1"),
        (["finetune", "learning_rate=nan"], "learning_rate must be above 0"),
        (["finetune", "double_quant=maybe"], "maybe"),
        (["finetune", "method=dora"], "invalid choice: 'dora'"),
        (["finetune", "preset=guanaco-8b"], "did you mean 'guanaco-"),
        (["finetune", "--preset", ""], "no preset ''"),
        (["finetune", "--preset"], "expected one argument"),
        (["finetune", "name=../x"], "name must be a folder's name"),
        (["finetune", "output_dir="], "output_dir must be"),
        (["finetune", "output_dir=."], "a folder of yours"),
        (["finetune", "seed=18446744073709551616"], "seed must be at most"),
        (["finetune", "--config", "no/such/file.yaml"], "cannot read no/such/file.yaml"),
        (["finetune", "--config", "data"], "cannot read data"),
        (["finetune", "--config", "{binary}"], "cannot read"),
        (["finetune", "--config", "{tiny}", "target_modules=query"], "called 'query'"),
        (["finetune", "--config", "{tiny}", "model={empty}"], "cannot load the base model"),
        (["finetune", "--config", "{tiny}", "model=no/such"], "cannot load the base model"),
        (["finetune", "--config", "{tiny}", "train_data={binary}"], "binary"),
        (["finetune", "--config", "{tiny}", "train_data=no/such.jsonl"], "no/such.jsonl"),
        (["finetune", "--config", "{tiny}", "output_dir={binary}/run"], "cannot write"),
        (["finetune", "--config", "{tiny}", "output_dir={empty}"], "exists"),
        (["finetune", "--config", "{tiny}", "output_dir=" + 300 * "x"], "xxx"),
        (["plan"], "required: model"),
        (["plan", ""], "''"),
        (["plan", "llama-9b"], "'llama-9b'"),
        (["plan", "{empty}"], "empty"),
        (["plan", "{shape}", "batch_size=["], "--batch_size: invalid int value: '['"),
        (["plan", "{shape}", "batch_size=0"], "batch_size must be a whole number"),
        (["plan", "{shape}", "lenght=3"], "did you mean 'max_length'"),
        (["plan", "{shape}", "rank=8"], "no setting 'rank'"),
        (["plan", "{shape}", "target_modules=query"], "query"),
        (["plan", "{shape}", "method=dora"], "dora"),
        (["plan", "{shape}", "optim=sdg"], "invalid choice: 'sdg'"),
        (["plan", "{shape}", "double_quant=maybe"], "Truthy value expected"),
        (["plan", "{shape}", "--card", "-3"], "more than 0 GB"),
        (["plan", "{shape}", "--card", "nan"], "more than 0 GB"),
        (["plan", "{shape}", "--card=inf"], "more than 0 GB"),
        (["plan", "{shape}", "--card", "big"], "--card: invalid float value: 'big'"),
        (["chat", "--model", "{empty}"], "cannot load the base model"),
        (["chat", "--adapter", "="], "NAME=FOLDER is wanted"),
        (["chat", "--adapter", "mine={empty}"], "cannot read the adapter"),
        (["chat", "--adapter", "a.b=data/adapters/all"], "without a dot"),
        (["chat", "--method", "magic"], "method must be one of"),
        (["chat", "--temperature", "nan"], "temperature"),
        (["chat", "--max_new_tokens", "0"], "max_new_tokens must be a whole number of at least 1"),
        (["chat", "--chat_template", "alpaca"], "chat_template must be one of ('guanaco', None)"),
        (["chat", "--adapter", "a=b", "--adapter", "a=c"], "each name once"),
        (["chat", "--use"], "expected at least one argument"),
        (["doctor", "please"], "please"),
    ],
)
def test_junk_is_refused_in_one_line(words, says, tiny, shape, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    places = {"{tiny}": tiny, "{shape}": shape}
    places |= {f"{{{name}}}": tmp_path / name for name in ("empty", "binary")}
    for place, path in places.items():
        words = [word.replace(place, str(path)) for word in words]
    said = refused(words, capsys)
    assert says in said
    assert not (ROOT / "runs").exists() or not list((ROOT / "runs").glob("*.part-*"))


ANY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@ANY
@given(words=st.lists(st.text(max_size=12), max_size=3))
def test_any_words_after_plan_are_refused_or_help(words, capsys):
    assert main(["plan", "no such model", *words]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


@ANY
@given(
    name=st.sampled_from([field.name for field in fields(FinetuneConfig)]),
    value=st.text(max_size=12) | st.floats().map(str) | st.integers().map(str),
)
def test_any_value_of_any_setting_is_taken_or_refused_by_name(name, value, capsys, monkeypatch):
    monkeypatch.setattr("qlora_edu.finetuning.finetune", lambda config, resume: None)
    status = main(["finetune", f"{name}={value}"])
    said = capsys.readouterr().err
    assert status in (0, 2) and "Traceback" not in said
    assert status == 0 or name in said or "answer_rows" in said


@ANY
@given(words=st.lists(st.text(max_size=12), max_size=3))
def test_any_words_are_a_command_or_are_refused(words, capsys):
    if not words or words[0] not in COMMANDS:
        assert main(words) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err
