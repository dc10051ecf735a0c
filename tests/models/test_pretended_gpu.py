"""Code for a GPU runs to its end on a pretended one: in a process of its own, where torch believes in a CUDA device."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA: hooks exist already"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def hooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tells torch of a device, compiled."""
    folder, home = tmp_path_factory.mktemp("hooks"), Path(torch.__file__).parent
    source = (ROOT / "tests" / "models" / "pretended_gpu.py").read_text().split('HOOKS = """')[1].split('"""')[0]
    (folder / "hooks.cpp").write_text(source)
    options = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{home}/include", f"-L{home}/lib", f"-Wl,-rpath,{home}/lib"]
    command = ["g++", *options, "hooks.cpp", "-o", "hooks.so", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "hooks.so"


CONTRACT = "cuda and /all-heads and changes_no_gradient"  # under autocast they are in the other files
RUNS = "memory_that or predicts_the_same or structures_train or test_a_run_stopped and fp16 and muon"


@pytest.mark.parametrize(
    ("files", "which"),
    [
        (
            ["models/on_pretended_gpu.py", *(f"models/test_{name}.py" for name in ("causal_conv", "sepconv", "ssd"))],
            "(gpu or cuda) and not (test_ssd and True)",  # backwards it is in the first file
        ),
        (
            ["pipeline/test_training_gpu.py", "pipeline/test_muon.py", "models/test_contract.py"],
            f"{RUNS} or on_a_gpu or {CONTRACT}",
        ),
    ],
    ids=["operators and networks", "runs and contracts"],
)
def test_what_is_for_a_gpu_runs_to_its_end_on_a_pretended_one(hooks: Path, files: list[str], which: str):
    command = [sys.executable, "-m", "pytest", "-p", "tests.models.pretended_gpu", "-p", "no:cacheprovider", "-v", "-x"]
    done = subprocess.run(
        [*command, "-k", which, *(f"tests/{name}" for name in files)],
        cwd=ROOT,
        env=os.environ | {"LD_PRELOAD": str(hooks), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    passed = [line for line in done.stdout.splitlines() if " PASSED " in line]
    for name in (*files, *re.findall(r"\w{5,}", which)):
        assert any(name in line for line in passed), f"nothing of {name} was run to its end"
