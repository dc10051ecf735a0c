"""Arrays hold exactly what the tables hold, and never what other tables held."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import arrays
from pipeline.arrays import build_arrays
from pipeline.dataset import dense_bpp, fold_members, open_examples, read_folds
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.paths import Paths
from pipeline.schema import decode, encode
from pipeline.stage import sha256_file
from pipeline.training import stop
from tests.pipeline import tiny
from tests.pipeline.tiny import TINY, TINY3D


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(comp="tiny", root=tmp_path)


def change_table(path: Path, **columns: pa.Array) -> None:
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, path)


def test_every_value_of_the_clean_table_is_in_its_example(paths):
    tiny.write_values(paths, count=64)
    rows = pq.read_table(paths.clean("train")).to_pylist()
    examples = open_examples(TINY, paths=paths, table="train")
    assert len(examples) == 64
    for k, row in enumerate(rows):
        example = examples.example(k)
        assert (example.id, decode(example.tokens_L)) == (row["sequence_id"], row["sequence"])
        assert examples.scored_N[k] == row["scored"]
        for c in range(2):
            values = row[tiny.TARGETS[c]] or [None] * len(row["sequence"])
            expected = np.array([np.nan if v is None else v for v in values], dtype=np.float32)
            np.testing.assert_array_equal(example.target_LC[:, c], expected)
            noise = row[tiny.NOISE[c]]
            np.testing.assert_array_equal(example.weight_C[c], np.float32(np.nan if noise is None else noise))


def test_the_test_table_keeps_its_order_and_has_no_targets(paths):
    tiny.write_values(paths)
    examples = open_examples(TINY, paths=paths, table="test")
    assert [examples.example(k).id for k in range(3)] == ["t9", "t8", "t7"]
    assert examples.example(0).target_LC is None


def test_structures_keep_unresolved_nucleotides_as_nan_and_weigh_one(paths):
    tiny.write_structures(paths)
    example = open_examples(TINY3D, paths=paths, table="train").example(0)
    assert example.target_LC.shape == (len(example.tokens_L), 3)
    assert np.isnan(example.target_LC[:, 0]).nonzero()[0].tolist() == [4]
    np.testing.assert_array_equal(example.weight_C, [1, 1, 1])


def test_an_example_cannot_be_written_to(paths):
    tiny.write_values(paths)
    example = open_examples(TINY, paths=paths, table="train").example(0)
    with pytest.raises(ValueError, match="read-only"):
        example.tokens_L[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        example.target_LC[0] = 1


def test_arrays_are_built_once_and_two_builds_are_byte_identical(paths, tmp_path):
    tiny.write_values(paths)
    other = Paths(comp="tiny", root=tmp_path / "other")
    tiny.write_values(other)
    first, second = (build_arrays(TINY, paths=p, table="train") for p in (paths, other))
    assert (first.status, build_arrays(TINY, paths=paths, table="train").status) == ("built", "current")
    for file in sorted(first.outputs["arrays"].iterdir()):
        assert file.read_bytes() == (second.outputs["arrays"] / file.name).read_bytes(), file.name


def test_a_changed_table_gets_arrays_of_its_own_and_the_old_ones_go(paths):
    tiny.write_values(paths, seed=1)
    before = build_arrays(TINY, paths=paths, table="train").outputs["arrays"]
    tiny.write_values(paths, seed=2)
    after = build_arrays(TINY, paths=paths, table="train").outputs["arrays"]
    assert before != after
    assert [path for path in paths.arrays_dir.iterdir() if path.name.startswith("train")] == [after]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(b"x"), lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["tokens.npy", "targets.npy", "meta.json"])
def test_damaged_arrays_are_made_again_and_carried_ones_refused(paths, name, damage):
    """Zeros in the place of targets were trained on without a word; a cut file ended the run."""
    tiny.write_values(paths, count=8)
    whole = open_examples(TINY, paths=paths, table="train")
    folder, targets = paths.arrays_dir / whole.key, whole.targets_TC.copy()
    damage(folder / name)
    mended = open_examples(TINY, paths=paths, table="train")
    assert mended.key == whole.key
    np.testing.assert_array_equal(mended.targets_TC, targets)
    paths.clean("train").unlink()
    damage(folder / name)
    with pytest.raises(DataError, match=r"not what was written. Next: copy the folder here|no clean table"):
        open_examples(TINY, paths=paths, table="train")


def no_locks(*_, **__):
    raise StorageError("its file system gives no locks")


def test_arrays_that_another_machine_or_container_writes_are_waited_for(paths, monkeypatch):
    """A process that had the same number, or whose number was nobody's here, had its half-written arrays removed, or
    completed by the other: two machines that began a sweep at once, and sets that were damaged and said to be whole."""
    tiny.write_values(paths)
    write, waits, second = arrays._write_table, threading.Event(), []
    monkeypatch.setattr(stop, "say", lambda _: waits.set())
    monkeypatch.setattr(arrays, "is_alive", lambda _: False)
    other = threading.Thread(target=lambda: second.append(build_arrays(TINY, paths=paths, table="train")))

    def beside(*args, **kwargs):
        if not waits.is_set():
            other.start()
            assert waits.wait(600)
        return write(*args, **kwargs)

    monkeypatch.setattr(arrays, "_write_table", beside)
    assert build_arrays(TINY, paths=paths, table="train").status == "built"
    other.join()
    assert second[0].status == "current"
    assert open_examples(TINY, paths=paths, table="train").lengths.size


def test_where_there_are_no_locks_a_slower_process_leaves_the_arrays_of_a_faster_one_alone(paths, monkeypatch):
    """Was: the second of two folds started at once removed the arrays that the first had just put in place."""
    monkeypatch.setattr(stop, "run_lock", no_locks)
    tiny.write_values(paths)
    write, faster = arrays._write_table, []

    def overtaken(*args, **kwargs):
        facts = write(*args, **kwargs)
        if not faster:
            faster.append(None)
            faster[0] = build_arrays(TINY, paths=paths, table="train").outputs["meta"].stat().st_ino
        return facts

    monkeypatch.setattr(arrays, "_write_table", overtaken)
    report = build_arrays(TINY, paths=paths, table="train")
    assert report.outputs["meta"].stat().st_ino == faster[0]
    assert [path.name for path in paths.arrays_dir.iterdir()] == [report.outputs["arrays"].name]


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_build_left_is_removed_by_the_next(paths, monkeypatch, locks):
    """Was: half-written arrays of killed processes stayed for good."""
    if not locks:
        monkeypatch.setattr(stop, "run_lock", no_locks)
    tiny.write_values(paths)
    for pid in (2**22 + 1, os.getppid()):
        (paths.arrays_dir / f".part-train-0123456789abcdef-{pid}").mkdir(parents=True)
    build_arrays(TINY, paths=paths, table="train")
    left = [path.name for path in paths.arrays_dir.glob(".part-*")]
    assert left == ([] if locks else [f".part-train-0123456789abcdef-{os.getppid()}"])


def test_arrays_are_enough_where_the_clean_table_is_not(paths):
    tiny.write_values(paths)
    expected = open_examples(TINY, paths=paths, table="train")
    paths.clean("train").unlink()
    carried = open_examples(TINY, paths=paths, table="train")
    assert carried.key == expected.key
    np.testing.assert_array_equal(carried.tokens_T, expected.tokens_T)


def test_a_failed_build_leaves_nothing_behind(paths):
    tiny.write_values(paths, count=4)
    change_table(paths.clean("train"), **{tiny.TARGETS[0]: pa.array([[0.5]] * 4, pa.list_(pa.float32()))})
    with pytest.raises(
        DataError, match=r"reactivity_DMS_MaP of 's0000' has 1 values; expected \d\d, one per nucleotide"
    ):
        build_arrays(TINY, paths=paths, table="train")
    assert [path.name for path in paths.arrays_dir.iterdir()] == [".building"]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("sequence_id", ["b", "a", "c", "d"], "not sorted by sequence_id"),
        ("sequence_id", ["a", "a", "c", "d"], "not sorted by sequence_id, or an id twice"),
        ("sequence", ["ACGX"] * 4, "letter outside ACGU"),
    ],
)
def test_a_table_that_breaks_its_schema_is_refused(paths, column, values, message):
    tiny.write_values(paths, count=4)
    change_table(paths.clean("train"), **{column: pa.array(values)})
    with pytest.raises(DataError, match=message):
        build_arrays(TINY, paths=paths, table="train")


def test_a_missing_table_or_column_or_a_cut_file_is_named(paths):
    with pytest.raises(DataError, match="no clean table"):
        open_examples(TINY, paths=paths, table="train")
    tiny.write_values(paths)
    whole = paths.clean("train").read_bytes()
    pq.write_table(pq.read_table(paths.clean("train")).drop_columns(["scored"]), paths.clean("train"))
    with pytest.raises(DataError, match="no column 'scored'"):
        open_examples(TINY, paths=paths, table="train")
    paths.clean("train").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a readable parquet file"):
        open_examples(TINY, paths=paths, table="train")


def test_dense_probabilities_equal_the_table_they_came_from(paths):
    texts = tiny.write_values(paths)
    dense = tiny.write_bpp(paths, [*texts, "GGGAAACCC"])
    examples = open_examples(TINY, paths=paths, table="train", bpp=True)
    for k, text in enumerate(texts):
        np.testing.assert_array_equal(dense_bpp(examples.example(k)), dense[text])


def test_a_sequence_without_any_pair_has_a_matrix_of_zeros(paths):
    tiny.write_values(paths, count=2)
    texts = pq.read_table(paths.clean("train"))["sequence"].to_pylist()
    empty = {name: pa.array([[]] * 2, pa.list_(kind)) for name, kind in (("i", pa.uint16()), ("j", pa.uint16()))}
    columns = {**empty, "p": pa.array([[]] * 2, pa.list_(pa.float32()))}
    tiny.write_table(paths.bpp, {"sequence": sorted(texts), **columns})
    examples = open_examples(TINY, paths=paths, table="train", bpp=True)
    np.testing.assert_array_equal(dense_bpp(examples.example(1)), np.zeros((len(texts[1]), len(texts[1]))))


def test_probabilities_that_are_missing_say_which_command_makes_them(paths):
    texts = tiny.write_values(paths)
    with pytest.raises(ConfigError, match="make bpp"):
        open_examples(TINY, paths=paths, table="train", bpp=True)
    tiny.write_bpp(paths, texts[1:])
    with pytest.raises(DataError, match=f"for 1 of 64 sequences .such as {texts[0][:20]}"):
        open_examples(TINY, paths=paths, table="train", bpp=True)


def test_new_probabilities_do_not_change_the_key_of_the_examples(paths):
    texts = tiny.write_values(paths)
    before = open_examples(TINY, paths=paths, table="train").key
    tiny.write_bpp(paths, texts)
    assert open_examples(TINY, paths=paths, table="train", bpp=True).key == before


def test_pairs_outside_their_sequence_are_refused(paths):
    texts = tiny.write_values(paths, count=2)
    rows = {"sequence": sorted(texts), "i": [[0], [0]], "j": [[5], [400]], "p": [[0.5], [0.5]]}
    kinds = {"i": pa.uint16(), "j": pa.uint16(), "p": pa.float32()}
    columns = {
        name: pa.array(values, pa.list_(kinds[name])) if name in kinds else values for name, values in rows.items()
    }
    tiny.write_table(paths.bpp, columns)
    with pytest.raises(DataError, match="i < j < length"):
        open_examples(TINY, paths=paths, table="train", bpp=True)


def test_folds_are_joined_on_the_id_whatever_the_order_of_the_table(paths):
    tiny.write_values(paths, count=6)
    table = paths.fold_table(tiny.SPLIT)
    pq.write_table(pq.read_table(table).take([5, 3, 1, 0, 2, 4]), table)
    examples = open_examples(TINY, paths=paths, table="train")
    np.testing.assert_array_equal(read_folds(table, examples=examples), [0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize("ids", [["s0000", "s0001"], ["s0000", "s0001", "s0002", "x"], ["s0000"] * 4])
def test_a_fold_table_from_other_data_is_refused(paths, ids):
    tiny.write_values(paths, count=4)
    tiny.write_folds(paths, ids)
    examples = open_examples(TINY, paths=paths, table="train")
    with pytest.raises(DataError, match="fold table from other data"):
        read_folds(paths.fold_table(tiny.SPLIT), examples=examples)


def test_tables_that_are_not_what_their_stages_wrote_are_refused(paths):
    """Of single bits turned in a set's clean table 73 % gave other values that trained, and 9 % in a fold table."""
    tiny.write_values(paths)
    table, folds = paths.clean("train"), paths.fold_table(tiny.SPLIT)
    for path, label, manifest in (
        (table, "train", "data.manifest.json"),
        (folds, "folds", f"{folds.stem}.manifest.json"),
    ):
        found = {"facts": {}, "outputs": {label: sha256_file(path)}}
        path.with_name(manifest).write_text(json.dumps(found))
    examples = open_examples(TINY, paths=paths, table="train")
    read_folds(folds, examples=examples)
    change_table(folds, fold=pa.array([0] * len(examples), pa.uint8()))
    with pytest.raises(
        DataError, match=rf"{folds}: not what its stage wrote: damaged or edited since\. Next: make folds"
    ):
        read_folds(folds, examples=examples)
    change_table(table, scored=pa.array([False] * len(examples)))
    with pytest.raises(DataError, match=rf"{table}: not what its stage wrote: .* Next: make data"):
        open_examples(TINY, paths=paths, table="train")


def test_a_fold_that_does_not_exist_is_refused(paths):
    with pytest.raises(ConfigError, match=r"FOLD=2: the folds of sim80_k2 are \[0, 1\]"):
        fold_members(np.array([0, 1, 1]), 2, where="sim80_k2")
    with pytest.raises(DataError, match="no fold table"):
        read_folds(paths.fold_table("sim80_k9"), examples=None)


def test_tokens_follow_the_alphabet(paths):
    texts = tiny.write_values(paths, count=3)
    examples = open_examples(TINY, paths=paths, table="train")
    np.testing.assert_array_equal(examples.tokens_T, encode("".join(texts)))
