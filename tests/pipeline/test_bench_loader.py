"""The loader's benchmark measures what training does, and says whether a GPU would have to wait."""

import json

import numpy as np
import pytest
from rich.console import Console

from pipeline import bench_loader
from pipeline.packing import read_packed
from pipeline.paths import Paths
from tests.pipeline import tiny


@pytest.mark.parametrize("bpp", [False, True])
def test_made_up_arrays_are_read_like_real_ones(tmp_path, bpp):
    examples = bench_loader.make_examples(tmp_path / "arrays", sequences=300, bpp=bpp, length=20)
    packed = read_packed(examples, np.arange(5))
    assert packed.tokens_BL.shape == (5, 20)
    assert (packed.pairs_3K is not None) == bpp
    assert bench_loader.tokens_per_second(examples, workers=0, batches=2) > 0


def test_padding_is_that_of_the_clean_table(tmp_path):
    paths = Paths(comp="tiny", root=tmp_path)
    assert bench_loader.real_padding(paths) is None
    tiny.write_values(paths, count=300)
    found = bench_loader.real_padding(paths)
    assert found["sequences"] == 300
    assert found["share_by_bucket"]["64"] < 0.1 < found["share_by_bucket"]["0"]


@pytest.mark.parametrize(
    ("rate", "says"),
    [
        (None, "which make bench-models has to measure there"),
        (200_000.0, "= 2,000,000 nt/s: met, 2.0 times that"),
        (1e6, "= 10,000,000 nt/s: NOT met, 0.4 times that"),
    ],
)
def test_the_rate_is_compared_with_ten_times_that_of_training_on_an_h100(tmp_path, monkeypatch, rate, says):
    rows = [{"model": "ribonanza_mamba", "length": 177, "train": rate}, {"model": "hyena", "length": 177, "train": 9e9}]
    (tmp_path / "models-cuda-h100.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "models-cuda-t4.json").write_text(json.dumps({"rows": [{**rows[0], "train": 1.0}]}))
    monkeypatch.setattr(bench_loader, "RECORDS", tmp_path)
    monkeypatch.setattr(bench_loader, "machine_class", lambda: "cpu-9core")
    monkeypatch.setattr(bench_loader, "_SEQUENCES", 300)
    monkeypatch.setattr(bench_loader, "tokens_per_second", lambda *_, workers: 3e6 + workers * 5e5)
    console = Console(width=120)
    with console.capture() as shown:
        console.print(bench_loader.run(Paths(comp="tiny", root=tmp_path)))
    assert says in shown.get()
    assert "4,000,000" in shown.get()
    record = json.loads((tmp_path / "loader-cpu-9core.json").read_text())
    assert (record["machine"], record["bar"]) == ("cpu-9core", None if rate is None else round(10 * rate))
