"""Beyond one GPU, as far as two CPU processes can show it."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import make_base, make_rows, write_jsonl

from qlora_edu.errors import ConfigError
from qlora_edu.finetuning import main, trainer_settings
from qlora_edu.production.config import FinetuneConfig

LAUNCH = Path(__file__).resolve().parents[2] / "data" / "launch"
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", make_rows(30))


def launch(command):
    """Run a command that starts processes; its output. Each process gets one core."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=1500,  # ends a hang; nothing is judged by it
        env=settings,
    )


def settings_file(base, data, folder, name, **changes):
    config = FinetuneConfig.from_preset(
        "embedded",
        model=str(base),
        train_data=str(data),
        held_out_data=str(data),
        r=8,
        max_steps=8,
        batch_size=2,
        gradient_accumulation_steps=4,
        logging_steps=1,
        held_out_rows=4,
        answer_rows=0,
        output_dir=str(folder / name),
        **changes,
    )
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(asdict(config)))
    return path


def test_two_processes_train_as_one(base, data, tmp_path):
    one = settings_file(base, data, tmp_path, "one")
    two = settings_file(base, data, tmp_path, "two")
    assert main(["--config", str(one)]) == 0
    config_file = ("--config_file", LAUNCH / "two_processes.yaml")
    command = (*ACCELERATE, *config_file, "-m", "qlora_edu", "finetune", "--config", two)
    launched = launch(command)
    assert launched.returncode == 0, launched.stderr[-2000:]
    assert launched.stdout.count("2 processes share the rows of each step") == 1
    losses, weights = [], []
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        losses.append([entry["loss"] for entry in entries if entry["event"] == "step"])
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        weights.append(torch.cat([tensors[key].flatten() for key in sorted(tensors)]))
    assert len(losses[0]) == 8 and losses[0][-1] < 0.8 * losses[0][0]
    # The same rows in the same step; the sum over four batches is added up in another order.
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (weights[0] - weights[1]).norm() < 1e-3 * weights[0].norm()


def test_rows_that_cannot_be_shared_out_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = FinetuneConfig.from_preset("embedded", gradient_accumulation_steps=4)
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=4 cannot be shared by 3"):
        trainer_settings(config, tmp_path)


# In one write each, or the two lines may come out one inside the other.
SAY = """
import os
line = f"process {os.environ.get('RANK')} {os.environ.get('FSDP_VERSION')}\\n"
os.write(1, line.encode())
"""


@pytest.mark.parametrize(("name", "version"), [("two_processes", None), ("fsdp", "1")])
def test_the_launch_files_start_two_processes(tmp_path, name, version):
    script = tmp_path / "say.py"
    script.write_text(SAY)
    out = launch((*ACCELERATE, "--config_file", LAUNCH / f"{name}.yaml", script)).stdout
    lines = sorted(line for line in out.splitlines() if line.startswith("process"))
    assert lines == [f"process {rank} {version}" for rank in (0, 1)]


def test_accelerate_on_a_cpu_starts_one_process_where_two_were_asked_for(tmp_path):
    """The trap that the launch files go round, so that a release without it is noticed."""
    script = tmp_path / "say.py"
    script.write_text(SAY)
    asked = ("--cpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no")
    out = launch((*ACCELERATE, *asked, "--dynamo_backend", "no", script)).stdout
    assert out.splitlines() == ["process None None"]


def test_fsdp_is_not_passed_over_in_silence(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP needs CUDA"):
        trainer_settings(FinetuneConfig.from_preset("embedded", save_steps=0), tmp_path)


@pytest.mark.parametrize(
    ("version", "storage", "adapters", "works"),
    [
        ("1", "float32", "float32", True),
        ("1", "uint8", "float32", False),
        ("1", "float32", "bfloat16", False),
        ("2", "uint8", "float32", True),
    ],
)
def test_a_base_in_shares_trains_as_the_whole_base(base, data, version, storage, adapters, works):
    """And FSDP of version 1 wants one dtype for all: what it refuses, ``check_one_dtype`` names."""
    script = Path(__file__).with_name("sharded.py")
    done = launch((*TORCHRUN, script, base, data, version, storage, adapters))
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["rule"] == "kept") == (storage == adapters == "float32")
    assert ("error" not in report) == works, report
    if works:
        # Each process has half of the rows: sums in another order.
        assert report["shares"] == pytest.approx(report["whole"], abs=1e-5)
        assert report["whole"][-1] < 0.8 * report["whole"][0]
    else:
        assert "flatten" in report["error"] and "quant_storage" in report["rule"]
