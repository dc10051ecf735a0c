"""The benchmark of whole networks: its peer is the published size, and its record has the promised form."""

import json
from pathlib import Path

import pytest
import torch

from pipeline import bench_models, measure

KEYS = {"model", "parameters", "batch", "length", "precision", "checkpointing"}
MEASURED = {"forward", "train", "peak_mib", "forward_peak_mib"}


@pytest.fixture(scope="module")
def ribonanzanet():
    torch.manual_seed(0)
    return measure.load_peer("ribonanzanet").RibonanzaNet().eval()


def test_the_peer_has_the_published_number_of_parameters(ribonanzanet: torch.nn.Module):
    assert sum(parameter.numel() for parameter in ribonanzanet.parameters()) == 11_296_898


def test_the_peer_trains_every_parameter_and_masks_its_padding(ribonanzanet: torch.nn.Module):
    tokens_BL = torch.randint(4, (1, 12))
    alone = ribonanzanet(tokens_BL, torch.ones(1, 12, dtype=torch.bool))
    padded_BL = torch.nn.functional.pad(tokens_BL, (0, 3), value=3)
    padded = ribonanzanet(padded_BL, torch.arange(15).unsqueeze(0) < 12)
    torch.testing.assert_close(padded[:, :12], alone, rtol=1e-4, atol=1e-4)
    alone.square().sum().backward()
    assert all(parameter.grad is not None for parameter in ribonanzanet.parameters())


def test_a_tiny_run_writes_rows_and_a_header(tmp_path: Path):
    rows = bench_models.run(size="tiny", rounds=1, record=tmp_path / "models.json")
    written = json.loads((tmp_path / "models.json").read_text())
    assert written["rows"] == rows
    assert {"date", "machine", "versions", "threads", "promises"} <= written.keys()
    assert [row["model"] for row in rows] == ["tiny_ribonanza_mamba", "tiny_hyena"]
    assert all(row.keys() == KEYS | MEASURED for row in rows)
    assert all(row["train"] > 0 and row["forward"] > 0 for row in rows)


def test_promises_compare_the_base_network_with_the_peer():
    def row(model: str, train: float, forward: float, peak: float) -> dict:
        cell = {"model": model, "length": 177, "precision": "fp32", "checkpointing": 0}
        return cell | {"train": train, "forward": forward, "peak_mib": peak}

    rows = [
        row("ribonanza_mamba", 500.0, 900.0, 100.0),
        row("small_ribonanza_mamba", 1400.0, 0, 0),
        row(bench_models.PEER, 20.0, 100.0, 5000.0),
    ]
    promises = {promise.wanted: (promise.found, promise.met) for promise in bench_models._cpu_promises(rows)}
    assert promises == {20: (25, True), 10: (9, False), 0.1: (0.02, True), 1500: (1400, False)}
