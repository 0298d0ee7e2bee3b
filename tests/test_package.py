"""The public face: what `import qlora_edu` offers, and how little it loads."""

import subprocess
import sys
import tomllib

import pytest

import qlora_edu
from qlora_edu.files import ROOT

HEAVY = {
    *("transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate"),
    *("matplotlib", "scipy"),
}


def test_importing_and_quantising_load_no_heavy_library():
    """And only looking the other public names up loads none, either."""
    code = (
        "import sys, torch, qlora_edu\n"
        "qlora_edu.quantize(torch.ones(64)).dequantize()\n"
        "for name in qlora_edu.__all__: getattr(qlora_edu, name)\n"
        f"print(*({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_every_public_name_is_there():
    assert {"nf4_levels", "QuantizedTensor", "PagedAdamW", "__version__"} < set(qlora_edu.__all__)
    for name in qlora_edu.__all__:
        assert getattr(qlora_edu, name), name
    assert dir(qlora_edu) == sorted(qlora_edu.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qlora_edu.nothing


def test_the_version_is_that_of_this_clone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert qlora_edu.__version__ == project["version"]


def test_the_function_and_its_module_stand_side_by_side():
    import qlora_edu.finetuning as module

    assert qlora_edu.finetune is module.finetune and qlora_edu.finetuning is module
