"""The doctor names everything that a run may use here, and survives whatever is broken."""

import os
import sys
from pathlib import Path

import pytest
import torch

from models.layers import kernels
from pipeline.doctor import Finding, examine
from pipeline.errors import ConfigError
from pipeline.training import precision


def findings(folder: Path, what: str) -> list[Finding]:
    return [finding for finding in examine(folder) if finding.what == what]


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled here."""
    monkeypatch.setenv("RNA_KERNELS", "reference")


@pytest.mark.parametrize("operator", kernels.HOMES)
def test_every_operator_is_told_with_its_path_and_why(operator: str, tmp_path: Path) -> None:
    """Hyena's long convolution was missing."""
    found = findings(tmp_path / "not" / "there", operator)
    assert [finding.state for finding in found] == ["absent"] * len(found)
    assert found[0].detail == "on cpu: reference (RNA_KERNELS=reference asks for plain PyTorch)"


@pytest.mark.parametrize(
    "err",
    [
        ConfigError("Tesla P100: torch has no code for it."),
        torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy\nCUDA kernel errors might be"),
    ],
)
def test_a_gpu_that_does_not_compute_is_a_problem(err, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second ended in a traceback."""

    def refuse() -> torch.device:
        raise err

    monkeypatch.setattr(precision, "choose_device", refuse)
    states = {finding.detail: finding.state for finding in findings(tmp_path, "GPU")}
    assert states[str(err).splitlines()[0]] == "problem"
    assert not findings(tmp_path, "precision")


def test_a_user_without_a_home_has_no_credentials_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container of an unknown user make doctor ended with a traceback: Could not determine home directory."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(Path, "home", lambda: pytest.fail("asked for the home"))
    for name in ("KAGGLE_CONFIG_DIR", "KAGGLE_API_TOKEN", "KAGGLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert [found.state for found in findings(tmp_path, "credentials")] == ["absent"]


def test_a_package_that_breaks_at_its_import_is_a_problem_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    (found,) = findings(tmp_path, "timm")
    assert found.state == "problem"
    assert "RuntimeError: operator torchvision::nms does not exist" in found.detail
