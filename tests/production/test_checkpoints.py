"""Nothing is lost: checkpoints that are whole or absent, and runs that resume to the same bits."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import make_base, make_rows, write_jsonl
from torch import nn

from qlora_edu import finetune as run_finetune
from qlora_edu.cli import main
from qlora_edu.errors import (
    CheckpointError,
    DamagedFileError,
    LoRAError,
    RunExistsError,
    TrainingError,
)
from qlora_edu.files import atomic
from qlora_edu.production import checkpoints as module
from qlora_edu.production import run_folder
from qlora_edu.production.checkpoints import (
    MANIFEST,
    checkpoints,
    fingerprint,
    latest_checkpoint,
    load_optimizer_state,
    optimizer_state,
    random_state,
    save_checkpoint,
    set_random_state,
    verify_manifest,
    write_manifest,
)
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.production.loading import attach_adapter, load_run
from qlora_edu.production.run_folder import (
    checkpoints_of,
    choose_output_dir,
    remove_checkpoints,
    remove_parts,
    reserved,
)

STEPS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", make_rows(30))


def make_config(base, data, folder, **changes):
    """Dropout, a schedule and accumulation: everything that a resumed run could get wrong."""
    return FinetuneConfig.from_preset(
        "embedded",
        **{
            "model": str(base),
            "train_data": str(data),
            "held_out_data": str(data),
            "r": 8,
            "lora_dropout": 0.2,
            "max_steps": STEPS,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "warmup_steps": 3,
            "logging_steps": 2,
            "save_steps": 2,
            "held_out_rows": 4,
            "answer_rows": 2,
            "max_new_tokens": 2,
            "output_dir": str(folder),
            **changes,
        },
    )


@pytest.fixture
def config(base, data, tmp_path):
    return make_config(base, data, tmp_path / "run")


class Stopped(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture
def stop_at(monkeypatch):
    """Have runs end at the beginning of a step, right after its checkpoint is written."""
    from qlora_edu.production.callback import FinetuneCallback

    original = FinetuneCallback.on_step_begin

    def stop(step):
        def on_step_begin(self, args, state, control, **others):
            original(self, args, state, control, **others)
            if state.global_step == step:
                raise Stopped

        monkeypatch.setattr(FinetuneCallback, "on_step_begin", on_step_begin)

    yield stop
    monkeypatch.undo()


def interrupted(config, stop_at, step=8):
    """Run until ``step``; the folder of its checkpoints."""
    stop_at(step)
    with pytest.raises(Stopped):
        run_finetune(config, progress=False)
    stop_at(None)
    return checkpoints_of(Path(config.output_dir))


def weights(folder):
    names = ("adapter_model.safetensors", "model.safetensors")
    return next((folder / name).read_bytes() for name in names if (folder / name).exists())


@pytest.fixture(scope="module")
def uninterrupted(base, data, tmp_path_factory):
    """The weights and losses that every resumed run must end with."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = run_finetune(make_config(base, data, folder), progress=False)
    return weights(folder), result.losses


# Killed at any moment


def fine_tune(config, resume):
    torch.set_num_threads(1)  # as every run that is compared here
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    run_finetune(config, progress=False, resume=resume)


@pytest.fixture(scope="module")
def processes():
    """A server that has imported everything, and forks runs from there."""
    context = multiprocessing.get_context("forkserver")
    heavy = [
        "trl",
        "peft",
        "bitsandbytes",
        "datasets",
        "qlora_edu.finetuning",
        "qlora_edu.production.callback",
    ]
    context.set_forkserver_preload([*heavy, "test_checkpoints"])
    return context


def killed_at_line(config, line):
    """Fine-tune, and be killed before the `line`-th line of the course that runs in training."""
    from qlora_edu.production import callback

    count = 0

    def step(frame, event, argument):
        nonlocal count
        count += event == "line"
        if count == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return step

    def trace(frame, event, argument):
        return step if frame.f_code.co_filename in watched else None

    watched = {module.__file__, callback.__file__, run_folder.__file__, atomic.__file__}
    sys.settrace(trace)
    fine_tune(config, resume=False)
    sys.settrace(None)
    Path(f"{config.output_dir}.lines").write_text(str(count))


def test_a_kill_at_any_of_twenty_moments_resumes_to_the_same_bits(base, data, tmp_path, processes):
    """SIGKILL, which nobody can catch, and then the same command again with `resume`.

    A moment is a line of the modules that write, so that no clock decides which are tried.
    """

    def start(target, *arguments):
        process = processes.Process(target=target, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    whole = make_config(base, data, tmp_path / "whole", answer_rows=0)
    assert start(killed_at_line, whole, -1) == 0
    lines = int((tmp_path / "whole.lines").read_text())
    expected = weights(Path(whole.output_dir))
    rng = random.Random(0)
    steps_found = set()
    for kill in range(20):
        config = make_config(base, data, tmp_path / f"killed-{kill}", answer_rows=0)
        line = rng.randrange(lines * kill // 20, lines * (kill + 1) // 20) + 1
        assert start(killed_at_line, config, line) == -signal.SIGKILL
        folder = Path(config.output_dir)
        found = checkpoints(checkpoints_of(folder))
        steps_found.add(found[-1].name if found else "none")
        if not folder.exists():
            assert start(fine_tune, config, True) == 0
        else:  # the kill came when the run was whole, and before all its checkpoints were removed
            assert start(fine_tune, config, True) == 1  # refused, as the run is there
            remove_checkpoints(folder)
        assert weights(folder) == expected, f"killed before line {line}, {steps_found}"
        assert verify_manifest(folder)["base_sha256"] == fingerprint(base)
        left = [path.name for path in tmp_path.iterdir() if f"killed-{kill}" in path.name]
        assert left == [f"killed-{kill}"]  # no half-written folder stays behind
    assert len(steps_found) >= 5, steps_found  # the kills came at different points of the run


def finished(folder):
    folder.mkdir(parents=True)
    (folder / "adapter").write_text("trained")
    write_manifest(folder, {"step": STEPS})
    (checkpoints_of(folder) / "checkpoint-000002").mkdir(parents=True)
    return checkpoints_of(folder)


def test_choosing_a_folder_changes_nothing(config):
    folder = Path(config.output_dir)
    saved = finished(folder)
    says = rf"a run that is finished.*\. {re.escape(str(saved))} is no longer needed"
    for resume in (False, True):
        with pytest.raises(RunExistsError, match=says):
            choose_output_dir(config, resume)
    assert list(saved.iterdir())


def test_when_checkpoints_go_notes_beside_them_stay(config):
    folder = Path(config.output_dir)
    saved = finished(folder)
    (saved / "note.txt").write_text("mine")
    remove_checkpoints(folder)
    assert [path.name for path in saved.iterdir()] == ["note.txt"]


def test_what_a_killed_run_had_half_written_goes_and_nothing_else(tmp_path):
    folder = tmp_path / "run[1]"
    mine = (tmp_path / ".run1.part-7", checkpoints_of(folder) / "checkpoint-000002")
    parts = (tmp_path / ".run[1].part-7", checkpoints_of(folder) / ".checkpoint-000004.part-7")
    for path in (*mine, *parts):
        path.mkdir(parents=True)
    remove_parts(folder)
    assert all(path.exists() for path in mine) and not any(path.exists() for path in parts)


# Two runs at a time


def test_two_processes_cannot_have_one_run(config):
    folder = Path(config.output_dir)
    with reserved(folder):
        with (
            pytest.raises(RunExistsError, match="another process is working on the run"),
            reserved(folder),
        ):
            pass
        with pytest.raises(RunExistsError, match="another process .* choose another output_dir"):
            run_finetune(config, progress=False, resume=True)
        with pytest.raises(RunExistsError, match="still goes on, or was interrupted"):
            run_finetune(config, progress=False)
        assert checkpoints_of(folder).exists()  # whoever is refused takes nothing away
    assert list(folder.parent.iterdir()) == []


def test_a_name_is_taken_before_the_first_checkpoint(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config.replace(output_dir=None, name="mine")
    with reserved(choose_output_dir(config)):
        assert choose_output_dir(config) == Path("runs/mine-2")
    assert choose_output_dir(config) == Path("runs/mine")


@pytest.mark.parametrize("path", [".", "/", ".."])
def test_a_folder_without_a_name_is_one_that_exists(config, path):
    with pytest.raises(
        RunExistsError, match="exists: a run that is finished, or a folder of yours"
    ):
        choose_output_dir(config.replace(output_dir=path))


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "No such file", "a/base"), BrokenPipeError()]
)
def test_only_what_hinders_the_writing_is_said_to(config, monkeypatch, tmp_path, error):
    def fail(config):
        raise error

    monkeypatch.setattr("qlora_edu.finetuning.load_base", fail)
    with pytest.raises(type(error)) as caught:
        run_finetune(config, progress=False)
    assert caught.value is error and list(tmp_path.iterdir()) == []


def save_three(folder):
    """Write three checkpoints of one tensor; killed at the file operation ``KILL_AT``."""
    for step in (1, 2, 3):
        tensor = {"weight": torch.full((50_000,), float(step))}
        save_checkpoint(folder, step, lambda part, t=tensor: save_file(t, part / "w"), {}, keep=2)


def killed_at(folder, operation):
    """Run ``save_three`` and be killed right before the ``operation``-th call of the system."""
    calls = 0

    def counting(real):
        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return counted

    for name in ("mkdir", "rename", "fsync", "rmdir", "unlink", "open", "replace"):
        setattr(os, name, counting(getattr(os, name)))
    save_three(folder)
    os._exit(7)


def test_a_kill_before_any_file_operation_leaves_whole_checkpoints(tmp_path, processes):
    """Not at random: once before each call by which a file or folder is made, moved or removed."""
    survived = 0
    newest = []
    while survived < 1:
        operation = len(newest) + 1
        folder = tmp_path / str(operation)
        process = processes.Process(target=killed_at, args=(folder, operation))
        process.start()
        process.join()
        survived += process.exitcode == 7
        found = latest_checkpoint(folder)
        newest.append(found[1]["step"] if found else 0)
        if found:
            value = load_file(found[0] / "w")["weight"]
            assert (value == found[1]["step"]).all()
    assert newest == sorted(newest) and set(newest) == {0, 1, 2, 3} and len(newest) > 20


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_a_resumed_run_is_the_run(config, stop_at, method, capsys):
    config = config.replace(method=method)
    whole = run_finetune(config.replace(output_dir=f"{config.output_dir}-whole"), progress=False)
    saved = interrupted(config, stop_at)
    assert [path.name for path in checkpoints(saved)] == ["checkpoint-000006", "checkpoint-000008"]
    result = run_finetune(config, progress=False, resume=True)
    assert "resumed from checkpoint-000008: step 8 of 12" in capsys.readouterr().out
    assert weights(result.folder) == weights(whole.folder)
    assert result.losses == whole.losses and len(result.losses) == STEPS / 2
    assert result.before == whole.before and result.after == whole.after
    assert not saved.exists()


def test_grouped_rows_resume_in_the_same_order(base, data, tmp_path, stop_at):
    """Over several passes: the trainer's own sampler would draw a new order on resuming."""
    config = make_config(base, data, tmp_path / "run", group_by_length=True, batch_size=8)
    whole = run_finetune(config.replace(output_dir=f"{config.output_dir}-whole"), progress=False)
    interrupted(config, stop_at, step=10)
    assert weights(run_finetune(config, progress=False, resume=True).folder) == weights(
        whole.folder
    )


@pytest.mark.parametrize("forgotten", ["optimizer", "scheduler", "random state"])
def test_each_part_of_the_state_is_needed(config, stop_at, uninterrupted, forgotten, monkeypatch):
    """What the faults in the stack forget silently; if one made no difference, tests were blind."""
    from qlora_edu.production import callback

    interrupted(config, stop_at)
    if forgotten == "optimizer":
        monkeypatch.setattr(callback, "load_optimizer_state", lambda *args: None)
    elif forgotten == "random state":
        monkeypatch.setattr(callback, "set_random_state", lambda state: None)
    else:
        from torch.optim.lr_scheduler import LambdaLR

        monkeypatch.setattr(LambdaLR, "load_state_dict", lambda self, state: None)
    result = run_finetune(config, progress=False, resume=True)
    assert weights(result.folder) != uninterrupted[0]


# Damage, found and named


FILES = (
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "random_state.safetensors",
    "progress.json",
    "trainer_state.json",
)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "bit flip"])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    config, stop_at, uninterrupted, capsys, file, damage
):
    saved = interrupted(config, stop_at)
    path = saved / "checkpoint-000008" / file
    harm(path, damage)
    result = run_finetune(config, progress=False, resume=True)
    out = capsys.readouterr().out
    assert f"checkpoint-000008 is passed over: cannot read {path}" in out
    assert "resumed from checkpoint-000006" in out
    assert (weights(result.folder), result.losses) == uninterrupted


def harm(path, damage):
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_a_checkpoint_without_a_manifest_was_not_written_to_its_end(config, stop_at, capsys):
    saved = interrupted(config, stop_at)
    (saved / "checkpoint-000008" / "manifest.json").unlink()
    assert latest_checkpoint(saved)[1]["step"] == 6
    assert "manifest.json ([Errno 2] No such file" in capsys.readouterr().out


def test_if_no_checkpoint_is_whole_nothing_is_begun_anew(config, stop_at):
    saved = interrupted(config, stop_at)
    for path in saved.iterdir():
        harm(path / "optimizer.safetensors", "missing")
    with pytest.raises(DamagedFileError, match="none of the 2 checkpoints .* to begin again"):
        run_finetune(config, progress=False, resume=True)


@given(content=st.binary(min_size=1, max_size=200), place=st.data())
@settings(max_examples=50, deadline=None)
def test_any_flipped_bit_is_found(content, place):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "file").write_bytes(content)
        write_manifest(folder, {"step": 1})
        assert verify_manifest(folder) == {"step": 1}
        bit = place.draw(st.integers(0, 8 * len(content) - 1))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / "file").write_bytes(changed)
        with pytest.raises(DamagedFileError, match="its SHA-256 sum is not that"):
            verify_manifest(folder)


# Another run's checkpoint


def test_a_checkpoint_of_another_base_is_refused(config, stop_at, base, tmp_path):
    interrupted(config, stop_at)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3  # the same shapes, one number of 100,000
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    sums = "base_sha256 was '[0-9a-f]{64}' and is '[0-9a-f]{64}'; bring it back, or start a new run"
    with pytest.raises(CheckpointError, match=sums):
        # The settings name the same folder: its content has changed since.
        run_finetune(config.replace(model=str(other)), progress=False, resume=True)


def test_other_settings_or_rows_are_refused_by_name(config, stop_at, tmp_path):
    interrupted(config, stop_at)
    with pytest.raises(CheckpointError, match="learning_rate was 0.003 and is 0.001"):
        run_finetune(config.replace(learning_rate=1e-3), progress=False, resume=True)
    rows = Path(config.train_data).read_text().splitlines(keepends=True)
    changed = tmp_path / "rows.jsonl"
    changed.write_text("".join(rows))
    moved = config.replace(train_data=str(changed), output_dir=str(tmp_path / "second"))
    interrupted(moved, stop_at)
    changed.write_text("".join(reversed(rows)))
    with pytest.raises(CheckpointError, match="rows_sha256 was .* and is "):
        run_finetune(moved, progress=False, resume=True)


def test_held_out_rows_may_not_change_between_kill_and_resume(config, stop_at, tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    rows = Path(config.held_out_data).read_text().splitlines(keepends=True)
    held_out.write_text("".join(rows))
    config = config.replace(held_out_data=str(held_out))
    interrupted(config, stop_at)
    held_out.write_text("".join(reversed(rows)))
    with pytest.raises(CheckpointError, match="held_out_sha256 was .* and is "):
        run_finetune(config, progress=False, resume=True)


def test_a_base_whose_configuration_has_changed_is_refused(config, stop_at, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    config = config.replace(model=str(other))
    interrupted(config, stop_at)
    said = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(said | {"rms_norm_eps": 1e-2}))
    with pytest.raises(CheckpointError, match="base_config_sha256 was .* and is "):
        run_finetune(config, progress=False, resume=True)


def test_what_decides_no_weight_may_be_changed_by_who_resumes(
    config, stop_at, uninterrupted, tmp_path
):
    interrupted(config, stop_at)
    moved = shutil.copy(config.train_data, tmp_path / "moved.jsonl")
    changes = {
        "train_data": str(moved),
        "eval_batch_size": 1,
        "save_total_limit": 3,
        "sample_steps": 0,
        "save_steps": 5,
    }
    result = run_finetune(config.replace(**changes), progress=False, resume=True)
    assert weights(result.folder) == uninterrupted[0]


def test_other_versions_are_said(config, stop_at, monkeypatch, capsys):

    interrupted(config, stop_at)
    real = module.version
    monkeypatch.setattr(module, "version", lambda n: "9" if n == "trl" else real(n))
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    run_finetune(config, progress=False, resume=True)
    out = capsys.readouterr().out
    assert "warning: trl was 1." in out
    assert f"warning: threads was {threads} and is 99; the result may differ in its last" in out


def test_checkpoints_are_not_run_over_by_a_new_run(config, stop_at, capsys):
    saved = interrupted(config, stop_at)
    with pytest.raises(RunExistsError, match="resume=True"):
        run_finetune(config, progress=False)
    assert len(checkpoints(saved)) == 2


def test_resuming_before_the_first_checkpoint_begins_and_says_so(config, uninterrupted, capsys):
    result = run_finetune(config, progress=False, resume=True)
    assert "no checkpoint in" in capsys.readouterr().out
    assert weights(result.folder) == uninterrupted[0]


def test_the_command_line_resumes(config, stop_at, uninterrupted, tmp_path, capsys):
    import yaml

    interrupted(config, stop_at)
    from dataclasses import asdict

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(asdict(config)))
    assert main(["finetune", "--config", str(file)]) == 1
    assert "--resume" in capsys.readouterr().err
    assert main(["finetune", "--config", str(file), "--resume"]) == 0
    assert weights(Path(config.output_dir)) == uninterrupted[0]


# Losses that are not finite; a disk that is full


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    config, monkeypatch
):
    from qlora_edu.production.callback import FinetuneCallback

    original = FinetuneCallback.on_step_end

    def poison(self, args, state, control, model, **others):
        original(self, args, state, control, model=model, **others)
        if state.global_step == 6:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    monkeypatch.setattr(FinetuneCallback, "on_step_end", poison)
    with pytest.raises(
        TrainingError, match="step 6 .*checkpoint-000004.*lora_A.* holds NaN or infinity"
    ):
        run_finetune(config, progress=False)
    saved = checkpoints_of(Path(config.output_dir))
    path, _ = latest_checkpoint(saved)
    assert not Path(config.output_dir).exists()
    # The weights went bad in step 6: its checkpoint is not written, and the one before it is sound.
    assert path.name == "checkpoint-000004"
    assert all(t.isfinite().all() for t in load_file(path / "adapter_model.safetensors").values())


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_weights_that_the_last_step_spoilt_are_never_written(config, monkeypatch, method):
    """No loss is logged after the last step, unless it is a multiple of `logging_steps`."""
    from qlora_edu.production import callback

    def poison(self, args, state, control, model, **others):
        if state.global_step == 5:
            trained = [p for p in model.parameters() if p.requires_grad]
            trained[-1].data.view(-1)[0] = float("inf")

    monkeypatch.setattr(callback.FinetuneCallback, "on_step_end", poison)
    settings = config.replace(method=method, max_steps=5, logging_steps=4, save_steps=0)
    with pytest.raises(TrainingError, match="(holds NaN or infinity|held-out loss is nan)"):
        run_finetune(settings, progress=False)
    assert list(Path(config.output_dir).parent.iterdir()) == []


def test_a_base_with_nan_is_found_before_training(config, base, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="held-out loss is nan; the weights are damaged"):
        run_finetune(config.replace(model=str(broken)), progress=False)


def test_a_full_disk_is_an_error_that_says_so_and_harms_nothing(tmp_path):
    """A real one, as far as a test can: the system lets no file grow beyond 100 kB."""
    script = f"""
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from qlora_edu.errors import CheckpointError
from qlora_edu.production.checkpoints import save_checkpoint

folder = Path({str(tmp_path)!r}) / "run"
small, large = ({{"w": torch.zeros(n)}} for n in (1_000, 100_000))
save_checkpoint(folder, 1, lambda part: save_file(small, part / "w.safetensors"), {{}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(folder, 2, lambda part: save_file(large, part / "w.safetensors"), {{}})
except CheckpointError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "cannot write" in out.stdout and "Free some space" in out.stdout
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-000001"]
    assert latest_checkpoint(tmp_path / "run")[1]["step"] == 1


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Free some space"),
        (OSError(errno.EACCES, "Permission denied"), "its rights"),
    ],
)
def test_a_disk_that_refuses_ends_a_run_that_can_be_resumed(
    config, uninterrupted, monkeypatch, error, says
):
    real = module.write_manifest

    def refuse(folder, metadata):
        if metadata.get("step") == 6:
            raise error
        real(folder, metadata)

    monkeypatch.setattr(module, "write_manifest", refuse)
    with pytest.raises(CheckpointError, match=says):
        run_finetune(config, progress=False)
    monkeypatch.undo()
    result = run_finetune(config, progress=False, resume=True)
    assert weights(result.folder) == uninterrupted[0]


# The parts


def test_what_is_written_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    real = {name: getattr(os, name) for name in ("fsync", "rename")}

    def fsync(descriptor):
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real["fsync"](descriptor)

    def rename(old, new):
        calls.append("rename")
        real["rename"](old, new)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to see what a descriptor stands for")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with atomic.folder(tmp_path / "made") as part:
        (part / "sub").mkdir()
        (part / "sub" / "a").write_text("1")
        (part / "b").write_text("2")
    at = calls.index("rename")
    assert {"a", "b", "sub", f".made.part-{os.getpid()}"} == set(calls[:at])
    assert calls[at + 1 :] == [tmp_path.name]


@pytest.mark.parametrize("sums", [{}, [1], None])
def test_a_manifest_that_vouches_for_nothing_is_refused(tmp_path, sums):
    (tmp_path / "file").write_text("x")
    write_manifest(tmp_path, {"step": 1})
    text = json.dumps(json.loads((tmp_path / MANIFEST).read_text()) | {"sha256": sums})
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DamagedFileError, match=MANIFEST):
        verify_manifest(tmp_path)


def test_a_run_folder_that_cannot_be_written_is_said_before_anything_is_loaded(config, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    settings = config.replace(output_dir=str(tmp_path / "file" / "run"), model="nobody/nothing")
    with pytest.raises(CheckpointError, match="cannot write .*run .*look at the folder"):
        run_finetune(settings, progress=False)


def test_a_disk_that_is_full_at_the_end_keeps_the_checkpoints(config, uninterrupted, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "write_manifest", full)
    with pytest.raises(
        CheckpointError, match="cannot write .*run .*Free some space, .*then resume"
    ):
        run_finetune(config, progress=False)
    monkeypatch.undo()
    result = run_finetune(config, progress=False, resume=True)
    assert weights(result.folder) == uninterrupted[0]


@pytest.mark.parametrize(
    ("loader", "file"),
    [("load_optimizer_state", "optimizer"), ("set_random_state", "random_state")],
)
def test_a_state_that_other_libraries_wrote_is_refused(config, stop_at, monkeypatch, loader, file):
    def of_another_version(*_):
        raise ValueError("unknown state")

    interrupted(config, stop_at)
    monkeypatch.setattr(f"qlora_edu.production.callback.{loader}", of_another_version)
    says = rf"{file}\.safetensors.*resume with the libraries that the run began with"
    with pytest.raises(CheckpointError, match=says):
        run_finetune(config, progress=False, resume=True)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in range(1, 12):
        save_checkpoint(tmp_path, step, lambda part: (part / "a").write_text("x"), {}, keep=3)
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["checkpoint-000009", "checkpoint-000010", "checkpoint-000011"]


def test_a_damaged_checkpoint_of_a_later_step_counts_for_none(tmp_path):
    for step in (2, 8):
        save_checkpoint(tmp_path, step, lambda part: (part / "a").write_text("x"), {}, keep=2)
    (tmp_path / "checkpoint-000008" / "a").write_text("damaged")
    save_checkpoint(tmp_path, 4, lambda part: (part / "a").write_text("x"), {}, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000004"]


def test_a_folder_that_is_none_is_said(tmp_path):
    with pytest.raises(DamagedFileError, match="cannot read .*runn/manifest.json .*if its name is"):
        verify_manifest(tmp_path / "runn")


def test_the_fingerprint_is_of_the_weights_not_of_their_files(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n] for n in part}, tmp_path / f"model-{i}.safetensors")
    assert fingerprint(tmp_path) == fingerprint(base)
    tensors[names[0]].view(-1)[0] += 1
    save_file({n: tensors[n] for n in names[::2]}, tmp_path / "model-0.safetensors")
    assert fingerprint(tmp_path) != fingerprint(base)
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        fingerprint(tmp_path.parent)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.1), "parameter group"),
        (lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True), "parameter group"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "parameter group"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "parameter group"),
        (lambda p: bitsandbytes.optim.AdamW32bit(p, lr=0.1), "match the broadcast shape"),
    ],
)
def test_an_optimizer_goes_on_as_if_nothing_had_happened(make, says, tmp_path):
    def steps(model, optimizer, count):
        for _ in range(count):
            model(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = make(model.parameters())
    steps(model, optimizer, 3)
    tensors, rest = optimizer_state(optimizer)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    rest = json.loads(json.dumps(rest))
    other = nn.Linear(4, 2)
    other.load_state_dict(model.state_dict())
    again = make(other.parameters())
    load_optimizer_state(again, load_file(tmp_path / "optimizer.safetensors"), rest)
    steps(model, optimizer, 3)
    steps(other, again, 3)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    with pytest.raises((ValueError, RuntimeError), match=says):
        load_optimizer_state(make([nn.Parameter(torch.ones(1))]), tensors, rest)


def test_the_random_state_is_put_back(tmp_path):
    save_file(random_state(), tmp_path / "state")
    expected = torch.rand(3)
    set_random_state(load_file(tmp_path / "state"))
    assert torch.equal(torch.rand(3), expected)


# Run folders: the adapter, its base, and what may have happened to them since


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    """A run folder, to be copied before it is harmed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return run_finetune(make_config(base, data, folder), progress=False)


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run.folder, tmp_path / "copied")


def questions():
    return [[row["messages"][0]] for row in make_rows(6)]


def test_a_run_folder_answers_as_the_run_did(run, copied):
    from qlora_edu.training import generate_answers

    model, tokenizer = load_run(copied)
    answers = generate_answers(model, tokenizer, questions(), 4)
    assert answers == generate_answers(run.model, run.tokenizer, questions(), 4)
    mine, theirs = (
        {k: v for k, v in m.state_dict().items() if "lora" in k} for m in (model, run.model)
    )
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_full_fine_tune_is_loaded_from_its_folder(config):
    result = run_finetune(config.replace(method="full"), progress=False)
    model, _ = load_run(result.folder)
    theirs = result.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "adapter_config.json", "config.yaml"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "bit flip"])
def test_a_damaged_run_folder_is_refused_by_the_name_of_the_file(copied, file, damage):
    harm(copied / file, damage)
    with pytest.raises(DamagedFileError, match=file):
        load_run(copied)


def make_other(base, folder, change):
    """The base with something changed, as a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if change == "one number":
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    else:
        model.config.num_hidden_layers += 1 if change == "deeper" else -1
        model.config.layer_types = None
        torch.manual_seed(0)
        model = LlamaForCausalLM(model.config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("change", ["one number", "deeper", "shallower"])
def test_an_adapter_on_another_base_is_refused(copied, base, tmp_path, change):
    other = make_other(base, tmp_path / "other", change)
    with pytest.raises(CheckpointError, match="would load, and answer badly"):
        load_run(copied, base=str(other))


def test_a_base_that_has_moved_is_still_the_base(copied, base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    load_run(copied, base=str(moved))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("deeper", r"tensors that do not fit \(14\): .* is missing from the adapter"),
        ("shallower", "is not a"),
    ],
)
def test_without_a_manifest_an_adapter_must_still_fit(copied, base, tmp_path, change, says):
    """Adapters from elsewhere have none. PEFT only warns of a deeper base."""
    from transformers import AutoModelForCausalLM

    other = make_other(base, tmp_path / "other", change)
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(LoRAError, match=says):
        attach_adapter(model, copied)
    assert [name for name, _ in model.named_parameters()] == names


def test_an_adapter_that_names_its_layers_is_refused_on_a_deeper_base(copied, base, tmp_path):
    from transformers import AutoModelForCausalLM

    tensors = load_file(copied / "adapter_model.safetensors")
    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors}
    file = copied / "adapter_config.json"
    named = json.loads(file.read_text()) | {"target_modules": sorted(layers)}
    file.write_text(json.dumps(named))
    other = make_other(base, tmp_path / "other", "deeper")
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with pytest.raises(LoRAError, match="is missing from the adapter"):
        attach_adapter(model, copied)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 1e308}, "lora_alpha is 1e\\+308"),
        ({"lora_alpha": "32"}, "lora_alpha is '32'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"r": 2**40}, "says r = 1099511627776; take both files from one place$"),
        ({"r": 0}, "says r = 0; take both files from one place$"),
        ({"peft_type": "PREFIX_TUNING"}, "LoRA is wanted"),
        ({"peft_type": "NOTHING"}, "cannot read the adapter"),
    ],
)
def test_settings_that_no_adapter_has_are_refused_and_the_base_is_untouched(
    copied, base, change, says
):
    from transformers import AutoModelForCausalLM

    file = copied / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(LoRAError, match=says):
        attach_adapter(model, copied)
    assert [name for name, _ in model.named_modules()] == names


def test_a_strangers_regular_expression_is_not_run(copied, base):
    from transformers import AutoModelForCausalLM

    file = copied / "adapter_config.json"
    endless = {"target_modules": "(.*)*(.*)*(.*)*(.*)*Z"}
    file.write_text(json.dumps(json.loads(file.read_text()) | endless))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = attach_adapter(model, copied)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 14


def test_a_strangers_expression_of_what_to_leave_out_is_refused(copied, base):
    from transformers import AutoModelForCausalLM

    file = copied / "adapter_config.json"
    endless = {"exclude_modules": "(.*)*(.*)*(.*)*(.*)*Z"}
    file.write_text(json.dumps(json.loads(file.read_text()) | endless))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with pytest.raises(LoRAError, match="exclude_modules; make it a list of names"):
        attach_adapter(model, copied)


def test_an_adapter_of_another_architecture_is_refused(copied):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(LoRAError, match="_proj of the adapter in .* is not a layer of this model"):
        attach_adapter(model, copied)
    assert [name for name, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")


def test_a_second_adapter_needs_a_name_of_its_own_and_what_peft_returned(copied, base):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = attach_adapter(model, copied)
    with pytest.raises(LoRAError, match="an adapter 'default' already; pass another name="):
        attach_adapter(adapted, copied)
    with pytest.raises(LoRAError, match="adapted layers already"):
        attach_adapter(model, copied, name="second")
    assert attach_adapter(adapted, copied, name="second") is adapted
    assert adapted.active_adapter == "default"  # until set_adapter


def test_an_adapter_on_some_layers_is_attached_if_it_says_which(base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1])
    theirs = get_peft_model(model, settings)
    theirs.get_submodule(
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default"
    ).weight.data.fill_(1)
    theirs.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = attach_adapter(fresh, tmp_path)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_tensors_that_are_no_numbers_of_an_adapter_are_refused(copied, base, dtype):
    from transformers import AutoModelForCausalLM

    file = copied / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with pytest.raises(LoRAError, match="no floating dtype"):
        attach_adapter(model, copied)


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda t: {}, LoRAError, "empty"),
        (lambda t: {"base_model.model.lm_head.weight": torch.ones(2)}, LoRAError, "empty: no LoRA"),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, LoRAError, "NaN"),
        (
            lambda t: {k: v * ("lora_B" not in k) for k, v in t.items()},
            LoRAError,
            "B is zero",
        ),
    ],
)
def test_an_adapter_that_is_empty_damaged_or_untrained_is_refused(copied, base, spoil, error, says):
    from transformers import AutoModelForCausalLM

    file = copied / "adapter_model.safetensors"
    save_file(spoil(load_file(file)), file)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with pytest.raises(error, match=says):
        attach_adapter(model, copied)
    file.write_bytes(b"cut")
    with pytest.raises(LoRAError, match="cannot read the adapter in .*a folder with"):
        attach_adapter(model, copied)
