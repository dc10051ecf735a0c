"""Numbers per nucleotide: the same clean tables from every format, and what is said of files that cannot be read."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipeline import bpp, preprocess, viennarna
from pipeline.cli import run_verb
from pipeline.competitions import competition_of, get_competition, openvaccine, profile_columns
from pipeline.errors import ConfigError, DataError
from pipeline.notebook import Trained
from pipeline.paths import Paths
from pipeline.synthetic import write_openvaccine

Rows = list[dict[str, Any]]


def make_rows(count: int = 12, *, seed: int = 0, shortest: int = 12, longest: int = 20) -> Rows:
    """Sequences with two targets, of which the first has errors; A reacts, and a tenth was not measured."""
    rng = np.random.default_rng(seed)
    rows: Rows = []
    for place in range(count):
        text = "".join(rng.choice(list("ACGU"), int(rng.integers(shortest, longest + 1))))
        values = [0.9 if letter == "A" else 0.2 for letter in text] + rng.normal(0, 0.05, len(text))
        shape = [None if rng.random() < 0.1 else round(float(value), 4) for value in values]
        row = {"id": f"s{place:03d}", "sequence": text.replace("U", "T" if place % 2 else "U"), "shape": shape}
        row["shape_error"] = [None if value is None else 0.25 for value in shape]
        rows.append(row | {"dms": [None if value is None else round(value / 2, 4) for value in shape]})
    return rows


ROWS = make_rows()
LISTS = ("shape", "shape_error", "dms")


def as_text(rows: Rows, write: Callable[[list[Any]], str]) -> pl.DataFrame:
    return pl.DataFrame([row | {name: write(row[name]) for name in LISTS} for row in rows])


def joined(values: list[Any], between: str, missing: str) -> str:
    return between.join(missing if value is None else repr(value) for value in values)


def as_wide(rows: Rows, width: int = 23) -> pl.DataFrame:
    """A column for each position, as Kaggle's Ribonanza has them."""
    wide = []
    for row in rows:
        cells = {f"{name}_{k + 1:04d}": value for name in LISTS for k, value in enumerate(row[name])}
        every = {f"{name}_{k + 1:04d}": None for name in LISTS for k in range(width)}
        wide.append({"id": row["id"], "sequence": row["sequence"]} | every | cells)
    return pl.DataFrame(wide, schema_overrides=dict.fromkeys(every, pl.Float64), infer_schema_length=None)


def json_lines(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


WRITERS: dict[str, Callable[[Path, Rows], Any]] = {
    "parquet": lambda raw, rows: pl.DataFrame(rows).write_parquet(raw / "train.parquet"),
    "csv-brackets": lambda raw, rows: as_text(rows, lambda values: f"[{joined(values, ', ', 'null')}]").write_csv(
        raw / "train.csv"
    ),
    "csv-commas": lambda raw, rows: as_text(rows, lambda values: joined(values, ",", "")).write_csv(raw / "train.csv"),
    "tsv-spaces": lambda raw, rows: as_text(rows, lambda values: joined(values, " ", "nan")).write_csv(
        raw / "train.tsv", separator="\t"
    ),
    "csv-999": lambda raw, rows: as_text(rows, lambda values: joined(values, ";", "-999.0")).write_csv(
        raw / "train.csv"
    ),
    "json": lambda raw, rows: (raw / "train.jsonl").write_text(json_lines(rows)),
    "json.gz": lambda raw, rows: (raw / "train.json.gz").write_bytes(gzip.compress(json_lines(rows).encode())),
    "wide-csv": lambda raw, rows: as_wide(rows).write_csv(raw / "train.csv"),
    "wide-parquet": lambda raw, rows: as_wide(rows).write_parquet(raw / "train.parquet"),
    "permuted": lambda raw, rows: pl.DataFrame(rows[::-1]).write_parquet(raw / "train.parquet"),
    "a-row-twice": lambda raw, rows: pl.DataFrame([*rows, rows[3]]).write_parquet(raw / "train.parquet"),
    "columns-permuted": lambda raw, rows: (
        pl.DataFrame(rows).select("shape", "sequence", "shape_error", "id", "dms").write_parquet(raw / "train.parquet")
    ),
}


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(comp="profiles-mine", root=tmp_path / "artifacts")


@pytest.fixture
def clean(raw: Path, run: Callable[..., dict[str, Any]], paths: Paths) -> Callable[..., pl.DataFrame]:
    """Write rows and ``columns.toml``, run the data stage, and give the clean train table."""

    def build(rows: Rows, *settings: str) -> pl.DataFrame:
        pl.DataFrame(rows, infer_schema_length=None).write_parquet(raw / "train.parquet")
        (raw / "columns.toml").write_text("\n".join(settings))
        run()
        return pl.read_parquet(paths.clean("train"))

    return build


def one(**columns: Any) -> Rows:
    """Two rows of 5 letters, the second as it should be."""
    first = {"id": "a", "sequence": "GGAAC", "shape": [0.1, 0.2, 0.3, 0.4, 0.5]} | columns
    return [first, {name: None for name in columns} | {"id": "b", "sequence": "GGAAC", "shape": [0.5] * 5}]


# --- formats ---


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_and_order_gives_the_same_bytes(
    form: str, raw: Path, paths: Paths, run: Any, tmp_path: Path
) -> None:
    WRITERS[form](raw, ROWS)
    run()
    table = pl.read_parquet(paths.clean("train"))
    for row in ROWS:
        got = table.row(by_predicate=pl.col("sequence_id") == row["id"], named=True)
        assert got["sequence"] == row["sequence"].replace("T", "U")
        for target in ("shape", "dms"):
            assert [v is None for v in got[target]] == [v is None for v in row[target]]
            assert got[target] == pytest.approx([v if v is None else np.float32(v) for v in row[target]])
    other = tmp_path / "other"
    other.mkdir()
    WRITERS["parquet"](other, ROWS)
    like = Paths(comp=paths.comp, root=tmp_path / "like")
    preprocess.run(get_competition(paths.comp), other, like)
    for name in ("train", "profiles"):
        assert paths.clean(name).read_bytes() == like.clean(name).read_bytes()


def test_openvaccines_files_say_the_same_as_they_do_to_its_own_reader(raw: Path, paths: Paths, run: Any) -> None:
    write_openvaccine(raw, sequences=12, test=3)
    run()
    theirs = Paths(comp="openvaccine", root=paths.root)
    preprocess.run(get_competition("openvaccine"), raw, theirs)
    assert competition_of(paths).targets == openvaccine.TARGETS
    for target in openvaccine.TARGETS:
        columns = ["sequence_id", "sequence", "scored", target, f"signal_to_noise_{target}", f"SN_filter_{target}"]
        ours, own = (pl.read_parquet(each.clean("train"), columns=columns) for each in (paths, theirs))
        assert ours.select(columns).equals(own.select(columns))
    ids = ["sequence_id", "sequence", "id_min", "id_max"]
    assert pl.read_parquet(paths.clean("test")).equals(pl.read_parquet(theirs.clean("test"), columns=ids).select(ids))


def test_whole_numbers_and_fractions_may_be_mixed_in_json(raw: Path, paths: Paths, run: Any) -> None:
    rows = [*one(shape=[1, 0, None, 1, 0]), {"id": "c", "sequence": "GGAAC", "shape": [0.5, 1, "NaN", 0.25, None]}]
    (raw / "train.json").write_text(json_lines(rows))
    run()
    got = pl.read_parquet(paths.clean("train"))["shape"].to_list()
    assert got == [[1, 0, None, 1, 0], [0.5] * 5, [0.5, 1, None, 0.25, None]]


def test_several_rdat_files_make_one_set(raw: Path, paths: Paths, run: Any) -> None:
    (raw / "eterna.a.rdat").write_text(rdat())
    without = "".join(line for line in rdat().splitlines(keepends=True) if "signal" not in line and ":2\t" not in line)
    (raw / "eterna.b.rdat").write_text(without)
    run()
    ids = pl.read_parquet(paths.clean("train"))["sequence_id"].to_list()
    assert ids == ["eterna.a-1", "eterna.a-2", "eterna.b-1"]


def test_the_file_itself_may_be_raw_and_ids_are_numbered_where_there_are_none(
    raw: Path, paths: Paths, run: Any
) -> None:
    pl.DataFrame(ROWS).drop("id").write_parquet(raw / "mine.parquet")
    run(raw / "mine.parquet")
    assert pl.read_parquet(paths.clean("train"))["sequence_id"].to_list()[:2] == ["train-01", "train-02"]


@pytest.mark.parametrize("kind", ["parquet", "csv-999", "wide-csv"])
def test_rows_are_taken_apart_in_parts_and_named_as_they_are(
    kind: str, raw: Path, paths: Paths, run: Any, monkeypatch: Any
) -> None:
    """50,000 profiles of 100 values as text took 0.8 GB at once, and take 0.4 GB in parts."""
    WRITERS[kind](raw, ROWS)
    run()
    whole = pl.read_parquet(paths.clean("train"))
    monkeypatch.setattr(profile_columns, "_AT_ONCE", 5)
    run(force=True)
    assert pl.read_parquet(paths.clean("train")).equals(whole)
    rows = [row | {"dms": [*row["dms"], 1.0] if row["id"] == "s007" else row["dms"]} for row in ROWS]
    WRITERS[kind](raw, rows)
    with pytest.raises(DataError, match=r"row 8 \(id s007\): dms(_0001)? holds 1 at position"):
        run()


def test_facts_say_what_the_competition_predicts(clean: Any, paths: Paths) -> None:
    clean(ROWS, 'metric = "RMSE"', "range = [0, 1]")
    mine = competition_of(paths)
    assert mine.targets == ("shape", "dms")
    assert (mine.metric, mine.error_power, mine.target_range) == ("RMSE", 2, (0.0, 1.0))
    assert mine.signal_to_noise == ("signal_to_noise_shape", "signal_to_noise_dms")
    assert get_competition(paths.comp).with_facts(json.loads(json.dumps(mine.facts))).targets == mine.targets


def test_every_target_has_figures_of_its_own_range(raw: Path, run: Any, paths: Paths) -> None:
    """All shared one: of a target whose values were a thousandth of another's, floors and figures showed nothing."""
    rows = [row | {"dms": [None if value is None else 1e-3 * value for value in row["dms"]]} for row in ROWS]
    WRITERS["parquet"](raw, rows)
    run()
    shape, dms = competition_of(paths).shown_ranges
    assert dms[1] <= 1e-3 < 0.5 < shape[1]
    earlier = competition_of(paths).facts | {"shown_ranges": None, "shown_range": [0.0, 2.0]}
    assert get_competition(paths.comp).with_facts(earlier).shown_ranges == ((0.0, 2.0),) * 2


def test_without_clean_tables_nothing_is_known(paths: Paths) -> None:
    assert competition_of(paths).targets == ()


def test_a_structure_is_read_as_unpaired_or_paired(clean: Any) -> None:
    rows = [{"id": "a", "sequence": "GGACCA", "structure": "([.)]."}]
    table = clean([*rows, {"id": "b", "sequence": "GGACCA", "structure": "<A.>a."}])
    assert table["unpaired"].to_list() == [[0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 1]]


def test_numbers_win_over_a_structure_unless_columns_toml_says_otherwise(clean: Any) -> None:
    rows = [row | {"structure": "." * 5} for row in one()]
    assert "shape" in clean(rows).columns
    assert "unpaired" in clean(rows, 'targets = ["structure"]').columns


@pytest.mark.parametrize("unit", [1.0, 100.0, 1e-5])
def test_no_unit_is_rounded_away_in_the_report(unit: float, raw: Path, run: Any) -> None:
    rows = [{"id": "a", "sequence": "GGAAC", "shape": [unit * value for value in (0.5, 0.75, 1.0, 1.25, 1.5)]}]
    pl.DataFrame(rows).write_parquet(raw / "train.parquet")
    assert run()["targets"]["shape"]["median"] == pytest.approx(unit)


def test_a_short_list_begins_where_a_column_says(clean: Any) -> None:
    table = clean(one(shape=[1.0, 2.0], first_pos=3))
    assert table["shape"].to_list()[0] == [None, None, 1.0, 2.0, None]
    table = clean([{"id": "a", "sequence": "GGAAC", "shape": [1.0, 2.0], "from": 2}] * 1, 'first = "from"')
    assert table["shape"].to_list() == [[None, 1.0, 2.0, None, None]]


def test_a_list_of_seq_scored_values_begins_at_the_first_letter(clean: Any) -> None:
    table = clean(one(shape=[1.0, 2.0], seq_scored=2))
    assert table["shape"].to_list()[0] == [1.0, 2.0, None, None, None]


def test_padding_beyond_the_sequence_is_no_value(clean: Any) -> None:
    assert clean(one(shape=[1.0] * 5 + [None, -999.0]))["shape"].to_list()[0] == [1.0] * 5


def test_a_full_list_is_taken_as_it_is_whatever_first_pos_says(clean: Any) -> None:
    assert clean(one(first_pos=3))["shape"].to_list()[0] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


# --- what a profile weighs, and what counts ---


def test_signal_to_noise_is_mean_value_over_mean_error(clean: Any) -> None:
    table = clean(one(shape=[1.0, 3.0, None, 2.0, -999.0], shape_error=[0.5, 0.5, 0.1, 1.0, 9.0]))
    assert table["signal_to_noise_shape"][0] == pytest.approx(6.0 / 2.0)


@pytest.mark.parametrize("word", ["sem", "std", "stddev"])
def test_errors_are_known_by_their_names_beside_the_values(clean: Any, word: str) -> None:
    """shape_sem was a second target, which a network learned and a submission held; shape_std was not read."""
    rows = [{"id": "a", "sequence": "GGAAC", "shape": [1.0, 3.0, None, 2.0, 0.0], f"shape_{word}": [0.5] * 5}]
    assert clean(rows)["signal_to_noise_shape"][0] == pytest.approx(6.0 / 2.0)
    rows[0] |= {"id": "a", "other_sem": [1.0] * 4 + [2.0], f"shape_{word}": 0.5}  # of nothing here; of the whole
    assert set(clean(rows).columns) > {"shape", "other_sem"}
    assert not {"signal_to_noise_shape", f"shape_{word}"} & set(clean(rows).columns)


def test_a_profile_of_unknown_quality_weighs_as_the_median(clean: Any) -> None:
    rows = [
        {"id": name, "sequence": "GGAAC", "shape": [0.5] * 5, "signal_to_noise": signal}
        for name, signal in zip("abcd", (1.0, 4.0, None, 3.0), strict=True)
    ]
    table = clean(rows)
    assert table["signal_to_noise_shape"].to_list() == [1.0, 4.0, 3.0, 3.0]
    assert table["scored"].all()


def test_sn_filter_decides_what_is_scored(clean: Any) -> None:
    rows = [row | {"SN_filter": passes} for row, passes in zip(ROWS, [1, 0] * 6, strict=True)]
    table = clean(rows)
    assert table["scored"].to_list() == [True, False] * 6
    assert table["SN_filter_dms"].to_list() == [True, False] * 6


def test_a_row_without_any_value_is_left_out_and_one_without_a_common_position_not_scored(clean: Any) -> None:
    rows = [
        {"id": "a", "sequence": "GGAAC", "x": [1.0] * 5, "y": [1.0, None, None, None, None]},
        {"id": "b", "sequence": "GGAAC", "x": [None] * 5, "y": [None] * 5},
        {"id": "c", "sequence": "GGAAC", "x": [None, 1.0, 1.0, 1.0, 1.0], "y": [1.0, None, None, None, None]},
    ]
    table = clean(rows)
    assert table.select("sequence_id", "scored").rows() == [("a", True), ("c", False)]


def test_rows_with_other_letters_are_left_out_up_to_a_twentieth(clean: Any) -> None:
    rows = make_rows(40)
    table = clean([rows[0] | {"sequence": "N" + rows[0]["sequence"][1:]}, *rows[1:]])
    assert table.height == 39
    with pytest.raises(DataError, match=r"row 1 \(id s000\): letter 'N'; 3 of 40 rows"):
        clean([row | {"sequence": "N" + row["sequence"][1:]} for row in rows[:3]] + rows[3:])


CONSTANT = [{"id": f"s{k}", "sequence": "GGAAC", "a": [0.5] * 5, "b": [float(k)] * 2 + [1.5] * 3} for k in range(4)]


def test_targets_and_profiles_of_one_value_are_told(clean: Any, capsys: Any) -> None:
    clean([*CONSTANT, {"id": "t", "sequence": "GGA", "a": [0.5] * 3, "b": [0.0, None, 0.0]}])
    told = capsys.readouterr().err
    assert "train.parquet: a is 0.5 wherever it was measured: there is nothing to learn" in told
    assert "train.parquet: row 5 (id t): b is 0 throughout; 1 of 5 profiles are such. Next, if their" in told


def test_a_structure_without_pairs_is_nothing_odd(clean: Any, capsys: Any) -> None:
    clean(
        [{"id": "a", "sequence": "GGAAC", "structure": "....."}, {"id": "b", "sequence": "GGAAC", "structure": "(...)"}]
    )
    assert "throughout" not in capsys.readouterr().err


# --- what is refused ---


REFUSED: dict[str, tuple[Rows, str, str]] = {
    "short": (one(shape=[0.1, 0.2]), "", r"row 1 \(id a\): shape holds 2 values; the sequence has 5 letters"),
    "long": (one(shape=[0.1] * 7), "", r"row 1 \(id a\): shape holds 0.1 at position 6; .* nothing beyond"),
    "beyond": (one(shape=[0.1] * 3, first_pos=4), "", "3 values, from position 4 on"),
    "between": (one(shape=[0.1] * 3, first_pos=2.5), "", "3 values, from position 2.5 on"),
    "before": (one(shape=[0.1] * 3, first_pos=0), "", "3 values, from position 0 on"),
    "infinite": (one(shape=[0.1, float("inf"), 0.3, 0.4, 0.5]), "", r"shape holds 'inf' at position 2"),
    "too-large": (
        one(shape=[0.1, 1e39, 0.3, 0.4, 0.5]),
        "",
        r"shape holds '1e\+39' at position 2; .* at most 3.4e\+38",
    ),
    "no-target": (one(), 'targets = ["dms"]', r"no column 'dms', a target; found shape"),
    "no-column": (one(), 'group = "family"', "no column 'family', which columns.toml names; found id, "),
    "another-sequence": (
        [*one(), {"id": "a", "sequence": "GGAAA", "shape": [0.5] * 5}],
        "",
        "id a comes again with another sequence",
    ),
    "other-values": (
        [*one(), {"id": "a", "sequence": "GGAAC", "shape": [0.5] * 5}],
        "",
        "id a comes again with other values",
    ),
    "no-number": ([{"id": "a", "sequence": "GGAAC", "note": "good"}], "", "no column holds numbers"),
    "two-sequences": ([row | {"rna": "A"} for row in one()], "", "sequence and rna may each be the sequence"),
    "taken": ([row | {"fold": row["shape"]} for row in one()], "", "a target is called 'fold'"),
    "metric": (one(), 'metric = "R2"', "metric = 'R2'"),
    "range": (one(), "range = [1, 0]", "two rising numbers"),
    "setting": (one(), 'label = "x"', "label = 'x'; expected id"),
    "structure-length": (
        [{"id": "a", "sequence": "GGAAC", "structure": "(.)"}],
        "",
        "a structure of 3 signs; expected 5",
    ),
    "structure-open": ([{"id": "a", "sequence": "GGAAC", "structure": "((.)."}], "", "dots and brackets that close"),
    "sn-filter": ([row | {"SN_filter": 2} for row in one()], "", "SN_filter holds '2'; expected 0 or 1"),
    "sn": ([row | {"signal_to_noise": "good"} for row in one()], "", "signal_to_noise holds 'good'; expected a number"),
    "no-id": ([row | {"id": ""} for row in one()], "", "row 1: no id"),
    "never-together": (
        [{"id": "a", "sequence": "GG", "x": [1.0, None], "y": [None, 1.0]}],
        "",
        "no scored position with a value of x and y",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_sentence(case: str, clean: Any) -> None:
    rows, settings, sentence = REFUSED[case]
    with pytest.raises(DataError, match=sentence) as caught:
        clean(rows, settings)
    assert "Next: " in str(caught.value)


@pytest.mark.parametrize("cell", ["[0.1, x, 0.3, 0.4, 0.5]", "0.1 0.2 ... 0.4 0.5"])
def test_text_among_numbers_is_refused_with_its_place(cell: str, raw: Path, run: Any) -> None:
    rows = [{"id": f"r{k}", "sequence": "GGAAC", "shape": "0.1 0.2 0.3 0.4 0.5"} for k in range(300)]
    rows[250]["shape"] = cell
    pl.DataFrame(rows).write_csv(raw / "train.csv")
    with pytest.raises(
        DataError, match=r"row 251 \(id r250\): shape holds '(x|\.\.\.)' at position [23]; expected a number"
    ):
        run()


def test_text_in_a_list_of_json_is_refused_with_its_place(raw: Path, run: Any) -> None:
    (raw / "train.json").write_text(json_lines(one(shape=[0.1, "x", 0.3, 0.4, 0.5])))
    with pytest.raises(DataError, match=r"train\.json: row 1: shape holds 'x'; expected a number"):
        run()


def test_fewer_numbered_columns_than_letters_are_not_guessed_at(raw: Path, run: Any, paths: Paths) -> None:
    as_wide(ROWS, 20).select(pl.exclude("^.*_00(1[0-9]|2.)$")).write_parquet(raw / "train.parquet")
    with pytest.raises(DataError, match=r"columns shape 1 to 9; expected one for each of the 20 letters"):
        run()
    (raw / "columns.toml").write_text('targets = ["shape"]')
    run()
    beyond = pl.read_parquet(paths.clean("train"))["shape"].list.slice(9)
    assert beyond.list.drop_nulls().list.len().sum() == 0


# --- RDAT ---


def rdat(*, offset: int = 10, revision: str = "0.34", modifier: str = "1M7") -> str:
    """Two profiles of one construct, positions backwards, and one of untreated molecules."""
    own = "sequence:GGAACGU\tsignal_to_noise:weak:0.5"
    lines = [
        f"RDAT_VERSION\t{revision}",
        "NAME\ttest",
        "SEQUENCE\tGGAAC",
        "STRUCTURE\t.....",
        f"OFFSET\t{offset}",
        "SEQPOS\t" + "\t".join(f"{letter}{k + offset}" for k, letter in ((4, "A"), (3, "A"), (2, "G"))),
        "ANNOTATION\texperimentType:StandardState\tchemical:MgCl2:10mM",
        "",
        f"ANNOTATION_DATA:1\tmodifier:{modifier}\tmutation:G{2 + offset}C",
        f"ANNOTATION_DATA:2\tmodifier:1M7\t{own}",
        "ANNOTATION_DATA:3\tmodifier:Nomod",
        "REACTIVITY:1\t0.4\t0.3\t0.2",
        "REACTIVITY_ERROR:1\t0.1\t0.1\t0.1",
        "REACTIVITY:2\t1\tnan\t3",
        "REACTIVITY:3\t9\t9\t9",
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("offset", [0, 10, -30])
def test_rdat_places_values_by_seqpos_and_offset(offset: int, raw: Path, run: Any, paths: Paths) -> None:
    (raw / "ETERNA_R00.rdat").write_text(rdat(offset=offset))
    run()
    table = pl.read_parquet(paths.clean("train"))
    assert table["sequence_id"].to_list() == ["ETERNA_R00-1", "ETERNA_R00-2"]
    assert table["sequence"].to_list() == ["GCAAC", "GGAACGU"]
    assert table["reactivity"][0].to_list() == [None, *map(pytest.approx, (0.2, 0.3, 0.4)), None]
    assert table["reactivity"][1].to_list() == [None, 3.0, None, 1.0, None, None, None]
    assert table["signal_to_noise_reactivity"].to_list() == pytest.approx([3.0, 0.5])


def test_an_early_revision_with_spaces_says_the_same(raw: Path, run: Any, paths: Paths) -> None:
    text = (
        rdat(offset=0, revision="0.22")
        .replace("SEQPOS\tA4\tA3\tG2", "SEQPOS  4 3 2")
        .replace("REACTIVITY:", "AREA_PEAK  ")
    )
    text = text.replace("REACTIVITY_ERROR:", "AREA_PEAK_ERROR ").replace("ANNOTATION_DATA:", "ANNOTATION_DATA   ")
    (raw / "train.rdat").write_text(text)
    run()
    assert pl.read_parquet(paths.clean("train"))["sequence"].to_list() == ["GCAAC", "GGAACGU"]


def test_several_modifiers_are_not_mixed(raw: Path, run: Any, paths: Paths) -> None:
    (raw / "a.rdat").write_text(rdat(modifier="DMS"))
    with pytest.raises(DataError, match="profiles of 1M7, DMS; expected one modifier"):
        run()
    (raw / "columns.toml").write_text('modifier = "DMS"')
    run()
    assert pl.read_parquet(paths.clean("train"))["dataset_name"].to_list() == ["DMS"]


def test_rdat_without_seqpos_has_a_value_for_each_letter(raw: Path, run: Any, paths: Paths) -> None:
    """It said "SEQPOS has 0 positions"; and a comment in Latin-1 was "no UTF-8 text"."""
    lines = [
        "RDAT_VERSION 0.34",
        "COMMENT 37 \u00b0C",
        "NAME a",
        "SEQUENCE GGAAC",
        "OFFSET 7",
        "ANNOTATION modifier:1M7",
    ]
    lines += ["ANNOTATION_DATA:1 mutation:A9C", "REACTIVITY:1 1 2 3 4 5"]
    (raw / "train.rdat").write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(DataError, match="mutation A9C does not fit"):
        run()
    (raw / "train.rdat").write_bytes("\n".join(lines).replace("A9C", "G9C").encode("latin-1"))
    run()
    table = pl.read_parquet(paths.clean("train"))
    assert (table["sequence"][0], table["reactivity"][0].to_list()) == ("GCAAC", [1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("0.34", "0.1"), "revision 0.1; expected 0.2 to 0.34"),
        (("REACTIVITY:1\t0.4", "REACTIVITY:1\t0.4\t0.5"), "profile 1: 4 values; SEQPOS has 3 positions"),
        (("REACTIVITY:1\t0.4", "REACTIVITY:1\tx"), "line 12: REACTIVITY holds"),
        (("mutation:G12C", "mutation:A12C"), "mutation A12C does not fit its construct"),
        (("NAME\ttest\n", ""), "line 2: 'SEQUENCE"),
        (("\tGGAAC\n", "\tAGG GGAAC\n"), "line 3: SEQUENCE holds 'AGG GGAAC'"),
        (("SEQPOS\tA14\tA13\tG12", ""), "3 values; there is no SEQPOS, and the sequence has 5 positions"),
        (("SEQPOS\tA14\tA13\tG12", "SEQPOS\t4 3 2"), "SEQPOS 2 to 4 with OFFSET 10; expected 11 to 15"),
        (("signal_to_noise:weak:0.5", "signal_to_noise:weak"), "profile 2: signal_to_noise:weak; expected a number"),
    ],
)
def test_a_faulty_rdat_file_is_refused(change: tuple[str, str], sentence: str, raw: Path, run: Any) -> None:
    (raw / "train.rdat").write_text(rdat().replace(*change))
    with pytest.raises(DataError, match=sentence):
        run()


# --- test set ---


def test_a_sample_submission_orders_the_targets(raw: Path, run: Any, paths: Paths) -> None:
    WRITERS["parquet"](raw, ROWS)
    (raw / "test.csv").write_text("id,sequence\nx,GGA\ny,CC\n")
    sample = [f"{name}_{k}" for name, length in (("x", 3), ("y", 2)) for k in range(length)]
    table = pl.DataFrame({"id_seqpos": sample, "dms": [0.0] * 5, "shape": [0.0] * 5})
    table.write_csv(raw / "sample_submission.csv")
    assert run()["test"]["sample_submission_rows"] == 5
    assert competition_of(paths).targets == ("dms", "shape")
    assert pl.read_parquet(paths.clean("test")).rows() == [("x", "GGA", 0, 2), ("y", "CC", 3, 4)]
    table[:4].write_csv(raw / "sample_submission.csv")
    with pytest.raises(DataError, match="ends after row 4; expected 'y_1' next"):
        run()
    table.rename({"dms": "cmct"}).write_csv(raw / "sample_submission.csv")
    with pytest.raises(DataError, match="columns id_seqpos, cmct, shape; expected id_seqpos and"):
        run()


def test_a_test_set_need_not_hold_what_only_training_needs(raw: Path, run: Any, paths: Paths) -> None:
    """test.csv: no column 'family', which columns.toml names."""
    rows = [row | {"family": f"g{place // 2}", "quality": 2.0, "start": 1} for place, row in enumerate(ROWS)]
    (raw / "train.jsonl").write_text(json_lines(rows))
    pl.DataFrame(ROWS).select("id", "sequence").write_csv(raw / "test.csv")
    (raw / "columns.toml").write_text('group = "family"\nsignal_to_noise = "quality"\nfirst = "start"\n')
    run()
    assert pl.read_parquet(paths.clean("test"))["sequence_id"].to_list() == [row["id"] for row in ROWS]
    assert pl.read_parquet(paths.clean("train"))["group"].n_unique() == 6


def test_odd_letters_are_refused_in_a_test_set_and_read_as_another_in_a_hidden_one(
    raw: Path, run: Any, paths: Paths
) -> None:
    WRITERS["parquet"](raw, ROWS)
    (raw / "test.csv").write_text("id,sequence\nx,GGN\n")
    with pytest.raises(DataError, match=r"row 1 \(id x\): letter 'N' at position 3"):
        run()
    (raw / "test.csv").write_text("id,sequence\nx,GGN\nx,CC\n,AC\n")
    run(test_only=True)
    table = pl.read_parquet(paths.clean("test"))
    assert table["sequence_id"].to_list() == ["x", "row-3"]
    assert table["sequence"].to_list() == ["GGA", "AC"]


def test_an_empty_row_of_a_hidden_test_set_without_ids_is_predicted(raw: Path, run: Any, paths: Paths) -> None:
    """It was left out, and the submission lacked a row; an empty line is no row, to Kaggle's reader neither."""
    WRITERS["parquet"](raw, ROWS)
    run()
    (raw / "test.csv").write_text("sequence,note\nGGA,1\n,\n\nAC,2\n")
    run(test_only=True)
    table = pl.read_parquet(paths.clean("test"))
    assert table.select("sequence_id", "sequence").rows() == [("test-1", "GGA"), ("test-2", "A"), ("test-3", "AC")]


def test_the_rows_of_a_hidden_sample_are_those_of_the_submission(raw: Path, run: Any, paths: Paths) -> None:
    """They were those of the test set in its order, whatever the sample said."""
    WRITERS["parquet"](raw, ROWS)
    run()
    (raw / "test.csv").write_text("id,sequence\nx,GG\ny,C\n")
    for rows, own in ((["y_0", "x_1", "x_0"], ["y_0", "x_1", "x_0"]), (["x_0", "x_1", "y_0"], None)):
        (raw / "sample_submission.csv").write_text("\n".join(["id_seqpos,shape", *(f"{row},0" for row in rows), ""]))
        run(test_only=True)
        found = paths.clean("sample")
        assert (pl.read_parquet(found)["id_seqpos"].to_list() if found.is_file() else None) == own
    (raw / "sample_submission.csv").write_text("id_seqpos,shape\nz_0,0\n")
    with pytest.raises(DataError, match="none of its 1 row, such as id_seqpos 'z_0', is of the test set"):
        run(test_only=True)


KNOWN: dict[str, tuple[dict[str, list[Any]], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "all": ({"shape": ["1 2 3", "4 -999"], "dms": ["1 1 nan", "2 2"]}, {"measured": 2}),
    "some": ({"shape": ["1 2 3", ""], "dms": ["1 1 1", ""]}, {"measured": 1}),
    "filtered": ({"shape": ["1 2 3", "1 2"], "dms": ["1 1 1", "1 2"], "SN_filter": [1, 0]}, {"measured": 1}),
    "one of two": ({"shape": ["1 2 3", "4 5"]}, {"values": "not used: no dms"}),
    "zeros": ({"shape": ["0 0 0", "0 0"], "dms": ["0 0 0", "0 0"]}, {"values": "not used: all the same"}),
    "apart": ({"shape": ["1 2 nan", "1 2"], "dms": ["nan nan 1", "nan nan"]}, {"values": "not used: none is measured"}),
    "short": (
        {"shape": ["1 2 3", "4 5"], "dms": ["1 1 1", "2 2 2"]},
        {"values": "not used: test.csv: row 2 (id y): dms holds 2 at position 3"},
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_values_of_a_test_set_are_kept_where_they_are_such(case: str, raw: Path, run: Any, paths: Paths) -> None:
    """They were ignored without a word."""
    columns, told = KNOWN[case]
    WRITERS["parquet"](raw, ROWS)
    pl.DataFrame({"id": ["x", "y"], "sequence": ["GGA", "CC"]} | columns).write_csv(raw / "test.csv")
    facts = run()["test"]
    assert {name: facts[name] for name in ("measured", "values") if name in facts} == told
    table = pl.read_parquet(paths.clean("test"))
    assert table.columns[4:] == (["shape", "dms"] if "measured" in told else [])
    if case == "all":
        assert table["shape"].to_list() == [[1, 2, 3], [4, None]]
    if case == "filtered":
        assert table["dms"].to_list() == [[1, 1, 1], [None, None]]
    run(test_only=True)
    assert pl.read_parquet(paths.clean("test")).columns == ["sequence_id", "sequence", "id_min", "id_max"]


@pytest.mark.skipif(not viennarna.available()[0], reason="needs ViennaRNA")
def test_pairing_needs_no_test_set(clean: Any, paths: Paths) -> None:
    """It said "bpp: test file …/clean/test.parquet is missing"."""
    clean(ROWS[:3])
    bpp.run(paths, workers=1)
    assert pl.read_parquet(paths.bpp).height == 3


# --- the whole chain ---


def test_the_whole_chain_runs_by_command_and_a_checkpoint_predicts_elsewhere(tmp_path: Path, monkeypatch: Any) -> None:
    raw, home = tmp_path / "raw", tmp_path / "a"
    raw.mkdir()
    WRITERS["csv-brackets"](raw, make_rows(36, seed=3))
    (raw / "columns.toml").write_text('targets = ["shape", "dms"]')  # which embed passes over
    test = make_rows(4, seed=4)
    as_text(test, lambda values: f"[{joined(values, ', ', 'null')}]").drop("shape_error").write_csv(raw / "test.csv")
    at = ("--comp", "profiles-mine", "--artifacts", str(home))
    model = ("--model", "tiny_drsn", "--split", "sim80_k2", "--tag", "short", "--set", "train.epochs=2")
    for verb in (
        ("data", "--raw", str(raw)),
        ("folds", "--split", "sim80_k2"),
        ("audit", "--split", "sim80_k2"),
        ("train", *model, "--all-folds"),
        ("ensemble", "--split", "sim80_k2"),
        ("evaluate", "--split", "sim80_k2"),
        ("report",),
        ("submit",),
        ("embed", "--model", "tiny_drsn", "--split", "sim80_k2", "--tag", "short", str(raw / "test.csv")),
    ):
        assert run_verb([verb[0], *at, *verb[1:]]) == 0, verb
    paths = Paths(comp="profiles-mine", root=home)
    scores = json.loads((paths.ensemble_dir("all") / "scores.json").read_text())
    assert set(scores["floors"]) == {"constant", "nucleotide", "5-mer"}
    assert scores["columns"] == ["shape", "dms"]
    page = (paths.ensemble_dir("all") / "report.html").read_text()
    assert "Profiles, mine" in page
    assert "train, fold" not in page, "no data set was named"
    assert "By data set" not in page
    assert "The test set" in page
    said = dict(pl.read_parquet(paths.ensemble_dir("all") / "test.parquet")["sequence_id", "shape"].iter_rows())
    misses = [abs(p - t) for row in test for p, t in zip(said[row["id"]], row["shape"], strict=True) if t is not None]
    assert scores["test"]["per_target"]["shape"] == pytest.approx(np.mean(misses), abs=1e-6)
    assert (scores["test"]["scored"], scores["test"]["positions"]) == (4, len(misses))
    lines = paths.submission("all").read_text().splitlines()
    assert lines[0] == "id_seqpos,shape,dms"
    length = len(make_rows(4, seed=4)[0]["sequence"])
    assert lines[length].startswith(f"s000_{length - 1},")
    trained = Trained(paths.fold_dir("tiny_drsn+short.sim80_k2", 0))
    assert trained.targets == ("shape", "dms")
    for table in ("train", "profiles"):  # a machine that only predicts
        paths.clean(table).unlink()
    again = ("predict", *at, *model[:6], "--fold", "0", "--test-only")
    paths.test("tiny_drsn+short.sim80_k2", 0).unlink()
    assert run_verb(again) == 0
    assert pl.read_parquet(paths.test("tiny_drsn+short.sim80_k2", 0)).columns == ["sequence_id", "shape", "dms"]


def test_a_checkpoint_of_other_targets_is_refused_with_the_difference(tmp_path: Path, capsys: Any) -> None:
    raw, home = tmp_path / "raw", tmp_path / "a"
    raw.mkdir()
    WRITERS["parquet"](raw, make_rows(24, seed=3))
    at = ("--comp", "profiles-mine", "--artifacts", str(home))
    model = ("--model", "tiny_drsn", "--split", "sim80_k2", "--tag", "short")
    for verb in (
        ("data", "--raw", str(raw)),
        ("folds", "--split", "sim80_k2"),
        ("train", *model, "--set", "train.epochs=1", "--max-steps", "1"),
    ):
        assert run_verb([verb[0], *at, *verb[1:]]) in (0, 75), verb
    (raw / "columns.toml").write_text('targets = ["shape"]')
    assert run_verb(["data", *at, "--raw", str(raw)]) == 0
    assert run_verb(["predict", *at, *model]) == 2
    assert "trained on shape, dms; the data have shape. Next: " in capsys.readouterr().err


def test_training_before_the_data_stage_says_what_comes_first(tmp_path: Path, capsys: Any) -> None:
    at = ("--comp", "profiles-mine", "--artifacts", str(tmp_path))
    assert run_verb(["train", *at, "--model", "tiny_drsn"]) == 3
    assert "make data COMP=profiles-mine" in capsys.readouterr().err


def test_the_name_is_offered_beside_the_others() -> None:
    with pytest.raises(ConfigError, match=r"labelled-<name> or profiles-<name>\. Did you mean 'profiles'"):
        get_competition("profile")


@pytest.mark.shared
def test_cloud_lab_profiles_are_read_as_they_are(
    shared_data: Callable[[str], Path], paths: Paths, tmp_path: Path
) -> None:
    source = shared_data("eternabench") / "cloudlab.parquet"
    table = pl.read_parquet(source)[::100]
    table.write_parquet(tmp_path / "train.parquet")
    facts = preprocess.run(get_competition(paths.comp), tmp_path / "train.parquet", paths).facts
    assert facts["sequences"] == table.height
    got = pl.read_parquet(paths.clean("train"))
    assert got["reactivity"].to_list() == table["reactivity"].to_list()
    told = table["signal_to_noise"]
    assert got["signal_to_noise_reactivity"].filter(told.is_not_null()).to_list() == told.drop_nulls().to_list()
    table.drop("signal_to_noise").write_parquet(tmp_path / "train.parquet")
    preprocess.run(get_competition(paths.comp), tmp_path / "train.parquet", paths)
    computed = pl.read_parquet(paths.clean("train"))["signal_to_noise_reactivity"].filter(told.is_not_null())
    both = pl.DataFrame({"said": told.drop_nulls(), "computed": computed})
    assert both.select(pl.corr("said", "computed", method="spearman")).item() > 0.99
