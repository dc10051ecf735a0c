"""A trained fold at hand in Python predicts what the commands predict; the lines that the READMEs show do run."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import bpp, notebook, predict
from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError, DivergedError, StorageError
from pipeline.notebook import Trained
from pipeline.paths import Paths
from pipeline.training.checkpoint import CheckpointStore
from tests.pipeline import labelled_sets, tiny
from tests.pipeline.test_classes import RUN, make_set, predict_one, train_one

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def known_competitions(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {competition.name: competition for competition in (tiny.TINY, tiny.TINY3D)}
    monkeypatch.setattr(
        notebook, "get_competition", lambda name, **more: own.get(name) or get_competition(name, **more)
    )


def rows_by_sequence(paths: Paths, predicted: Path) -> dict[str, dict]:
    """Sequence -> the row of the test table that `make predict` wrote."""
    texts = pq.read_table(paths.clean("test")).to_pylist()
    rows = {row["sequence_id"]: row for row in pq.read_table(predicted).to_pylist()}
    return {row["sequence"]: rows[row["sequence_id"]] for row in texts}


@pytest.mark.parametrize(
    ("data", "model"),
    [({}, {}), ({"flip": 0.5}, {}), ({}, {"use_bpp": True})],
    ids=["as it is", "both directions", "pairing from ViennaRNA"],
)
def test_values_are_those_of_make_predict_in_any_order_and_spelling(paths, data, model):
    if model:
        pytest.importorskip("RNA")
        bpp.run(paths, workers=1)
    tiny.fit(paths, tiny.config(epochs=1, data=data, model=model))
    report = predict.run(competition=tiny.TINY, paths=paths, run=tiny.RUN, fold=0)
    rows = rows_by_sequence(paths, report.outputs["test"])
    trained = Trained(paths.fold_dir(tiny.RUN, 0))
    assert trained.targets == tiny.TARGETS
    assert trained.predict([]) == []
    found = trained.predict([text.lower().replace("u", "t") for text in reversed(rows)])
    for row, values_LC in zip(reversed(rows.values()), found, strict=True):
        expected_LC = np.array([row[name] for name in tiny.TARGETS]).T
        np.testing.assert_allclose(values_LC, expected_LC, atol=1e-6)


def test_classes_are_those_of_make_predict(tmp_path, rng):
    table = labelled_sets.planted(rng, count=160)
    paths = make_set(tmp_path, table, test=table.select("id", "sequence")[:9])
    train_one(paths)
    rows = rows_by_sequence(paths, predict_one(paths).outputs["test"])
    trained = Trained(paths.fold_dir(RUN, 0))
    assert len(trained.targets) == 2
    for row, p_C in zip(rows.values(), trained.predict(list(rows)), strict=True):
        np.testing.assert_allclose(p_C, row["probabilities"], atol=1e-6)
    assert trained.predict(["acg-t"])[0].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("sequence", "sentence"),
    [
        ("MKVLLAWERTYIPSDFGHKLQW", r"19 letters other than ACGU \(T is read as U\), and the network was trained on"),
        ("GG12", r"'1' in the sequence; expected letters"),
        (" ", r"empty sequence"),
    ],
)
def test_letters_that_make_predict_refuses_are_refused_with_the_place(tmp_path, rng, sequence, sentence):
    """A protein, GG12 and GGXX got numbers from a network of RNA: every sign was read as N."""
    paths = make_set(tmp_path, labelled_sets.planted(rng, count=40))
    train_one(paths)
    with pytest.raises(DataError, match=rf"^sequence 1: {sentence}.* Next: repair the sequence"):
        Trained(paths.fold_dir(RUN, 0)).predict(["ACGU", sequence])


def test_odd_letters_are_read_up_to_the_share_that_make_predict_takes(tmp_path, rng):
    table = labelled_sets.planted(rng, count=40)
    paths = make_set(tmp_path, table.with_columns(sequence="N" + table["sequence"]))
    train_one(paths)
    trained = Trained(paths.fold_dir(RUN, 0))
    text = table["sequence"][0]
    n, r = trained.predict([f"{text}N", f"{text}R"])
    np.testing.assert_array_equal(n, r)
    with pytest.raises(
        DataError, match=r"50\.0% of the letters are none of ACGU .*at most 5%\. Next: repair the sequences\.$"
    ):
        trained.predict(["GGXX"])


def test_what_it_cannot_do_is_said_in_a_sentence(paths, tmp_path, monkeypatch):
    tiny.fit(paths)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(StorageError, match="no readable checkpoint"):
        Trained(tmp_path)
    with pytest.raises(DataError, match="no checkpoints in it; expected the folder of a fold"):
        Trained(paths.run_dir(tiny.RUN))
    trained = Trained(paths.fold_dir(tiny.RUN, 0))
    with pytest.raises(DataError, match=r"got a single text; expected a list of sequences\. Next: predict\(\[text\]"):
        trained.predict("ACGU")
    with pytest.raises(DataError, match=r"sequence 1: got None; expected letters\. Next: leave it out"):
        trained.predict(["ACGU", None])
    with pytest.raises(DataError, match="sequence 1: letter 'N' at position 2"):
        trained.predict(["ACGU", "ANGU"])
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "best_folder", lambda _: tmp_path / "checkpoints")
        with pytest.raises(StorageError, match=r"damaged: .*\. Next: remove this folder"):
            Trained(paths.fold_dir(tiny.RUN, 0))
    monkeypatch.setattr(notebook, "predict_values", lambda *_: [np.full((4, 2), np.nan)])
    with pytest.raises(DivergedError, match="'sequence 0' is not finite"):
        trained.predict(["ACGU"])
    solid = Paths(comp="tiny3d", root=tmp_path)
    tiny.write_structures(solid)
    tiny.fit(solid, tiny.config(epochs=1), competition=tiny.TINY3D)
    with pytest.raises(ConfigError, match="predicts structures; expected anything else"):
        Trained(solid.fold_dir(tiny.RUN, 0))


@pytest.mark.parametrize("name", ["models/README.md", "pipeline/OWN_DATA.md"])
def test_the_python_that_a_readme_shows_runs(name, paths):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "@register_model" not in block)  # tests/models has that
    tiny.fit(paths)
    exec(re.sub(r"artifacts/[^\"]*/fold0", str(paths.fold_dir(tiny.RUN, 0)), block), {})
