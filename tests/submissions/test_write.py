from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.stage import sha256_file
from submissions import check
from submissions import write as stage
from submissions.layout import LOWEST_SUBMITTED, MAX_SUBMITTED, IdRuns, layout_of
from submissions.structure_write import _plain_shapes
from tests.chain_tables import (
    TARGETS,
    edit,
    make_paths,
    prediction_table,
    write,
    write_structure_data,
    write_values_data,
)

RIBONANZA, RNA3D = get_competition("ribonanza"), get_competition("rna3d")


@pytest.fixture
def paths(tmp_path, rng) -> Paths:
    paths = make_paths(tmp_path)
    write_values_data(paths, rng, sequences=3)
    write_predictions(paths, rng)
    return paths


def write_predictions(paths: Paths, rng: np.random.Generator) -> None:
    test = pl.read_parquet(paths.clean("test"))
    lists = {name: [rng.uniform(-0.3, 1.3, size=len(letters)) for letters in test["sequence"]] for name in TARGETS}
    write(prediction_table(test["sequence_id"].to_list(), lists), predictions(paths))


def predictions(paths: Paths):
    return paths.ensemble_dir("all") / "test.parquet"


def run(paths: Paths, *, comp=RIBONANZA, **options):
    return stage.run(paths, competition=comp, name="all", **options)


def expected(paths: Paths) -> pl.DataFrame:
    """The submission, made by plain joins."""
    test = pl.read_parquet(paths.clean("test")).join(
        pl.read_parquet(predictions(paths)), on="sequence_id", validate="1:1"
    )
    ids = pl.int_ranges("id_min", pl.col("id_max") + 1).alias("id")
    return test.select(ids, *TARGETS).explode("id", *TARGETS).sort("id").with_columns(pl.col(TARGETS).clip(0.0, 1.0))


def test_csv_holds_the_clipped_predictions_in_the_order_of_the_ids(paths):
    report = run(paths)
    got = pl.read_csv(report.outputs["submission"])
    wanted = expected(paths)
    assert got.columns == ["id", "reactivity_DMS_MaP", "reactivity_2A3_MaP"]
    assert got["id"].to_list() == wanted["id"].to_list()
    for target in TARGETS:
        np.testing.assert_allclose(got[target], wanted[target], atol=0.50001e-4)
    assert report.facts["clipped_values"] > 0
    assert report.outputs["submission"].name == "ribonanza-all.csv"


def test_parquet_holds_the_same_without_rounding(paths):
    got = pl.read_parquet(run(paths, fmt="parquet").outputs["submission"])
    assert got.schema == pl.Schema({"id": pl.UInt32, **dict.fromkeys(TARGETS, pl.Float32)})
    assert got.cast({"id": pl.Int64}).equals(expected(paths))


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_chunks_and_order_of_predictions_do_not_change_the_file(paths, monkeypatch, rows):
    first = sha256_file(run(paths).outputs["submission"])
    monkeypatch.setattr(stage, "_CHUNK_ROWS", rows)
    monkeypatch.setattr(stage, "_SCRATCH_ROWS", 3 * rows)
    edit(predictions(paths), pl.read_parquet(predictions(paths)).reverse())
    second = run(paths)
    assert second.status == "built"
    assert sha256_file(second.outputs["submission"]) == first


def test_second_run_is_current_and_accepted_by_check(paths):
    report = run(paths)
    assert run(paths).status == "current"
    assert (
        check.run(paths, competition=RIBONANZA, file=report.outputs["submission"]).facts["rows"] == report.facts["rows"]
    )


@pytest.mark.parametrize("fmt", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(1), r"no prediction of t0000 \(1 of 7 test sequences\)"),
        (lambda t: pl.concat([t, t.head(1)]), "t0000 is predicted twice"),
        (lambda t: t.with_columns(sequence_id="x" + pl.col("sequence_id")), "is not among the test sequences"),
        (
            lambda t: t.with_columns(pl.col(TARGETS[0]).list.slice(1)),
            r"t\d+: \d+ values of reactivity_DMS_MaP; expected",
        ),
        (
            lambda t: t.with_columns(pl.col(TARGETS[1]).list.eval(pl.element() + float("inf"))),
            r"t\d+: prediction at position 1 is .*inf",
        ),
        (
            lambda t: t.with_columns(pl.lit(None, dtype=pl.List(pl.Float32)).alias(TARGETS[0])),
            "prediction at position 1",
        ),
    ],
)
def test_bad_predictions_leave_nothing_behind(paths, change, message, fmt):
    edit(predictions(paths), change(pl.read_parquet(predictions(paths))))
    with pytest.raises(DataError, match=message):
        run(paths, fmt=fmt)
    assert not list(paths.csv_dir.iterdir())


def test_file_that_fails_its_check_never_gets_its_name(paths, monkeypatch):
    whole = stage.FixedWidth._lines
    monkeypatch.setattr(stage.FixedWidth, "_lines", lambda self, *args: whole(self, *args).replace(b",0.", b",7.", 1))
    with pytest.raises(DataError, match=r"data row 1 .* is 7\.\d+; expected a finite number from 0 to 1"):
        run(paths)
    assert not list(paths.csv_dir.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pl.col("id_max") + 1, r"t\d+: ids \d+ to \d+ for a sequence of \d+ nt"),
        (pl.col("sequence_id").replace("t0001", "t0002"), "is there twice"),
    ],
)
def test_contradictory_test_tables_are_refused(paths, change, message):
    edit(paths.clean("test"), change)
    with pytest.raises(DataError, match=message):
        run(paths)


def test_overlapping_ids_are_refused(paths):
    edit(paths.clean("test"), pl.read_parquet(paths.clean("test")).reverse())
    with pytest.raises(DataError, match="overlap those of the sequence before it"):
        run(paths)


def test_missing_tables_and_unknown_format_are_refused(paths):
    table = paths.clean("test").rename(paths.clean("away"))
    with pytest.raises(DataError, match=r"test file .*clean/test\.parquet is missing"):
        run(paths)
    table.rename(paths.clean("test"))
    predictions(paths).unlink()
    with pytest.raises(DataError, match=r"predictions file .* is missing"):
        run(paths)
    with pytest.raises(ConfigError, match="FORMAT='xlsx': expected csv or parquet"):
        run(paths, fmt="xlsx")


def test_fixed_width_lines_equal_those_of_the_reference(rng):
    layout = layout_of(RIBONANZA, IdRuns(np.array([0]), np.array([1])))
    values_TC = rng.uniform(size=(40_000, 2)).astype(np.float32)
    values_TC[:4] = [[0.0, 1.0], [1.0, 0.0], [0.00004, 0.99996], [0.5, 0.25]]
    for first in (0, 9_990, 99_990_000, 4_294_927_295):
        ids_T = np.arange(first, first + len(values_TC))
        assert stage.FixedWidth(layout)(ids_T, values_TC) == stage.format_rows(ids_T, values_TC)


def test_description_names_rows_and_ranges(paths):
    console = Console(width=150)
    with console.capture() as captured:
        console.print(stage.describe(run(paths).facts))
    for word in ("rows", "reactivity_DMS_MaP", "0 to 1", "clipped"):
        assert word in captured.get()


def test_nothing_is_said_of_clipping_where_values_have_no_range(paths):
    """OpenVaccine's said "clipped 0 values were outside the range" of one that it does not have."""
    report = run(paths, comp=replace(RIBONANZA, target_range=None))
    assert pl.read_csv(report.outputs["submission"])[TARGETS[0]].max() > 1
    assert "clipped_values" not in report.facts


def profiles(target_range: tuple[float, float] | None):
    """A set of one's own with the targets of the tables here; `files` make a competition Kaggle's."""
    own = replace(RIBONANZA, files=(), row_key="id_seqpos", target_range=target_range)
    assert own.is_own
    return own


def test_numbers_of_ones_own_keep_their_digits_whatever_their_unit(paths):
    """Values of a few hundred-thousandths were all 0.0000, and accepted."""
    small = pl.read_parquet(predictions(paths)).with_columns(pl.col(TARGETS).list.eval(pl.element() * 1e-5))
    small.write_parquet(predictions(paths))
    written = pl.read_csv(run(paths, comp=profiles(None)).outputs["submission"])
    told = (
        pl.read_parquet(paths.clean("test")).select("sequence_id").join(small, on="sequence_id", maintain_order="left")
    )
    for name in TARGETS:
        np.testing.assert_allclose(written[name], told[name].explode(), rtol=1e-6)


@pytest.mark.parametrize("fmt", ["csv", "parquet"])
def test_values_at_the_end_of_a_range_that_float32_rounds_outwards_are_accepted(paths, fmt):
    """0.1 is 0.10000000149 as float32: a parquet file with it was refused by its own check."""
    report = run(paths, comp=profiles((0.05, 0.1)), fmt=fmt)
    assert report.facts["clipped_values"] > 0
    assert report.facts["ranges"][TARGETS[0]] == pytest.approx([0.05, 0.1])


# -- structures


@pytest.fixture
def structure_paths(tmp_path, rng) -> Paths:
    paths = make_paths(tmp_path, "rna3d")
    write_structure_data(paths, rng)
    test = pl.read_parquet(paths.clean("test"))
    rows = [
        {"sequence_id": key, "candidate": number, "confidence": 0.5}
        | {axis: rng.normal(0.0, 30.0, size=len(letters)).tolist() for axis in "xyz"}
        for key, letters in test.select("sequence_id", "sequence").rows()
        for number in range(1, 6)
    ]
    lists = dict.fromkeys("xyz", pl.List(pl.Float32))
    write(pl.DataFrame(rows, schema_overrides=lists | {"candidate": pl.UInt8}), predictions(paths))
    return paths


def test_structure_rows_follow_the_sample_and_hold_the_coordinates(structure_paths):
    report = run(structure_paths, comp=RNA3D)
    got = pl.read_csv(report.outputs["submission"])
    sample = pl.read_parquet(structure_paths.clean("sample"))
    assert got.select("ID", "resname", "resid").rows() == sample.rows()
    table = pl.read_parquet(predictions(structure_paths))
    for (target, number), rows in table.group_by("sequence_id", "candidate"):
        here = got.filter(
            pl.col("ID").str.starts_with(f"{target}_") & (pl.col("ID").str.count_matches("_") == target.count("_") + 1)
        )
        for axis in "xyz":
            np.testing.assert_allclose(here[f"{axis}_{number}"], rows[axis][0], atol=0.51e-3)
    assert report.outputs["submission"].name == "rna3d-all.csv"


def test_structure_parquet_is_accepted_too(structure_paths):
    assert run(structure_paths, comp=RNA3D, fmt="parquet").facts["format"] == "parquet"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.filter(pl.col("candidate") < 5), "Q1 has no candidate 5; expected 5"),
        (lambda t: t.filter(pl.col("sequence_id") != "Q2_B"), "Q2_B has no candidate 1"),
        (lambda t: t.with_columns(pl.col("x", "y", "z").list.slice(1)), "Q1: 3 values of x; expected 4"),
        (
            lambda t: t.with_columns(pl.col("x").list.eval(pl.element() + 1e6)),
            "expected a finite number from -999.999",
        ),
    ],
)
def test_bad_structures_leave_nothing_behind(structure_paths, change, message):
    edit(predictions(structure_paths), change(pl.read_parquet(predictions(structure_paths))))
    with pytest.raises(DataError, match=message):
        run(structure_paths, comp=RNA3D)
    assert not list(structure_paths.csv_dir.iterdir())


def test_residue_without_prediction_is_named(structure_paths):
    sample = pl.read_parquet(structure_paths.clean("sample"))
    more = pl.DataFrame({"ID": ["Q9_1"], "resname": ["A"], "resid": [1]})
    edit(structure_paths.clean("sample"), pl.concat([sample, more]))
    with pytest.raises(DataError, match=r"no coordinates for Q9_1 \(1 rows of the sample submission\)"):
        run(structure_paths, comp=RNA3D)


def test_what_is_not_predicted_is_filled_with_shapes_and_what_is_stays(structure_paths):
    run(structure_paths, comp=RNA3D)
    whole = pl.read_csv(structure_paths.submission("all"))
    table = pl.read_parquet(predictions(structure_paths))
    first = table["sequence_id"].unique().sort()[0]
    write(table.filter((pl.col("sequence_id") != first) | (pl.col("candidate") < 3)), predictions(structure_paths))
    with pytest.raises(DataError, match=f"{first} has no candidate 3"):
        run(structure_paths, comp=RNA3D)
    run(structure_paths, comp=RNA3D, fill=True)
    filled = pl.read_csv(structure_paths.submission("all"))
    absent = [f"{axis}_{number}" for number in (3, 4, 5) for axis in "xyz"]
    lacking = pl.col("ID").str.starts_with(f"{first}_")
    assert filled.filter(~lacking).equals(whole.filter(~lacking))
    assert filled.drop(absent).equals(whole.drop(absent))
    traces = filled.filter(lacking).select(absent).to_numpy().reshape(-1, 3, 3).transpose(1, 0, 2)
    assert np.abs(traces[0] - traces[1]).max() > 1.0
    assert np.abs(traces[1] - traces[2]).max() > 1.0


def test_a_file_is_there_before_there_is_any_prediction(structure_paths):
    predictions(structure_paths).unlink()
    report = run(structure_paths, comp=RNA3D, fill=True)
    check.run(structure_paths, competition=RNA3D, file=report.outputs["submission"])
    with pytest.raises(DataError, match=r"predictions file .* is missing"):
        run(structure_paths, comp=RNA3D)


@pytest.mark.parametrize("length", [1, 2, 3, 30, 4640, 125_000])
def test_five_shapes_of_any_length_are_within_what_a_file_holds(length):
    shapes = _plain_shapes(length)
    assert len(shapes) >= 5
    for xyz_L3 in shapes:
        assert xyz_L3.shape == (length, 3)
        assert xyz_L3.min() >= LOWEST_SUBMITTED
        assert xyz_L3.max() <= MAX_SUBMITTED


@pytest.mark.parametrize("fmt", ["csv", "parquet"])
def test_a_structure_beside_what_a_file_holds_is_moved_into_it(structure_paths, fmt):
    """A thousand unpaired nucleotides, about the origin: the check refused -1298.7 Å of a good prediction."""
    read, path = {"csv": pl.read_csv, "parquet": pl.read_parquet}[fmt], predictions(structure_paths)
    before = read(run(structure_paths, comp=RNA3D, fmt=fmt).outputs["submission"])
    write(pl.read_parquet(path).with_columns(pl.col("x").list.eval(pl.element() - 1500.0)), path)
    report = run(structure_paths, comp=RNA3D, fmt=fmt)
    check.run(structure_paths, competition=RNA3D, file=report.outputs["submission"])
    after = read(report.outputs["submission"])
    moved = [name for name in before.columns if name.startswith("x_")]
    assert after.drop(moved).equals(before.drop(moved))
    for target in ("Q1", "Q10", "Q2_B"):
        own = pl.col("ID").str.starts_with(f"{target}_")
        ways = [table.filter(own).select(moved).to_numpy() for table in (before, after)]
        np.testing.assert_allclose(*(way - way[0] for way in ways), atol=2e-3)
        assert ways[1].min() >= LOWEST_SUBMITTED


def test_values_are_not_filled_without_medians(paths):
    with pytest.raises(ConfigError, match="nothing to fill in here"):
        run(paths, fill=True)


def test_of_coordinates_one_range_an_axis_is_told_and_of_small_files_no_zero():
    """Fifteen ranges without a unit, "0.0 MiB" and "0 KiB"."""
    ranges = {f"{axis}_{number}": (-float(number), 2.0 * number) for number in range(1, 6) for axis in "xyz"}
    console = Console(width=100)
    with console.capture() as printed:
        console.print(stage.describe({"rows": 9, "sequences": 1, "bytes": 2048, "ranges": ranges}))
    lines = [line.split() for line in printed.get().splitlines()]
    assert lines[0] == ["rows", "9", "for", "1", "sequence,", "2", "KiB"]
    assert lines[1:] == [[f"{axis},", "Å", "-5", "to", "10"] for axis in "xyz"]
    with console.capture() as printed:
        console.print(stage.describe({"rows": 9, "sequences": 9, "bytes": 300, "ranges": ranges}))
    assert "9 sequences, 300 bytes" in printed.get()


def test_of_very_many_columns_the_ranges_of_the_first_are_told_and_one_of_the_others():
    """A submission of 919 classes printed 919 lines."""
    ranges = {f"class {number}": (number / 1000, number / 1000 + 0.01) for number in range(919)}
    console = Console(width=100)
    with console.capture() as printed:
        console.print(stage.describe({"rows": 9, "sequences": 9, "bytes": 2048, "ranges": ranges}))
    lines = printed.get().splitlines()
    assert len(lines) == 32
    assert lines[-1].split() == ["889", "more", "0.03", "to", "0.928"]
