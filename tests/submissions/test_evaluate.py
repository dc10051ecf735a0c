import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from folds import ensemble
from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.stage import sha256_file
from submissions import evaluate
from tests.chain_tables import (
    FOLDS,
    SPLIT,
    TARGETS,
    edit,
    make_paths,
    write,
    write_run,
    write_structure_data,
    write_structure_run,
    write_values_data,
)
from tests.submissions.trace_cases import usalign_script

RIBONANZA, RNA3D = get_competition("ribonanza"), get_competition("rna3d")
RUNS = ["good.sim80_k3", "poor.sim80_k3"]


@pytest.fixture
def paths(tmp_path, rng) -> Paths:
    paths = make_paths(tmp_path)
    write_values_data(paths, rng)
    for run, noise in zip(RUNS, (0.1, 0.4), strict=True):
        write_run(paths, run, rng, noise=dict.fromkeys(TARGETS, noise))
    ensemble.run(paths, competition=RIBONANZA, name="all", runs=RUNS, split=SPLIT)
    return paths


def score(paths: Paths, comp=RIBONANZA, **subject):
    return evaluate.run(paths, competition=comp, split=SPLIT, **(subject or {"name": "all"}))


def errors(
    paths: Paths, run: str, *, train: pl.DataFrame | None = None, measured: Sequence[str] = TARGETS
) -> pl.DataFrame:
    """Every position that counts, by plain joins: keys, and an absolute error for each target."""
    tables = pl.concat([pl.read_parquet(paths.oof(run, fold)) for fold in range(FOLDS)])
    train = (pl.read_parquet(paths.clean("train")) if train is None else train).filter("scored")
    lengths = pl.col("sequence").str.len_chars()
    joined = train.join(tables, on="sequence_id", suffix="_predicted", validate="1:1").with_columns(
        position=pl.int_ranges(1, lengths + 1), length=lengths
    )
    flat = joined.explode("position", *measured, *(f"{target}_predicted" for target in measured)).drop_nulls(measured)
    error = [
        (pl.col(f"{target}_predicted") - pl.col(target).clip(0.0, 1.0)).abs().alias(f"error_{target}")
        for target in measured
    ]
    return flat.with_columns(error)


def mean_error(table: pl.DataFrame) -> float:
    return float(np.mean([table[f"error_{target}"].mean() for target in TARGETS]))


def test_score_is_the_organisers_mean_absolute_error(paths):
    facts = score(paths, run=RUNS[0]).facts
    table = errors(paths, RUNS[0])
    assert facts["score"] == pytest.approx(mean_error(table), abs=1e-6)
    for target in TARGETS:
        assert facts["per_target"][target] == pytest.approx(table[f"error_{target}"].mean(), abs=1e-6)
    assert facts["positions"] == table.height


def test_every_part_is_the_score_of_its_positions(paths):
    facts = score(paths, run=RUNS[0]).facts
    table = errors(paths, RUNS[0])
    lowest = pl.min_horizontal(*(f"signal_to_noise_{target.removeprefix('reactivity_')}" for target in TARGETS))
    parts = {
        "per_fold": ("fold", pl.col("fold")),
        "by_dataset": ("dataset_name", pl.col("dataset_name")),
        "by_position": ("position", pl.col("position")),
        "by_length": ("from", pl.col("length") // 50 * 50),
        "by_signal_to_noise": ("from", pl.lit(2.0).pow(lowest.log(2).floor().clip(0, 4)).round().cast(pl.Int64)),
    }
    for name, (label, key) in parts.items():
        assert sum(row["positions"] for row in facts[name]) == table.height
        for row in facts[name]:
            part = table.filter(key == row[label])
            assert row["positions"] == part.height
            assert row["score"] == pytest.approx(mean_error(part), abs=1e-6)


def test_folds_are_summed_up_as_mean_and_standard_deviation(paths):
    facts = score(paths, run=RUNS[0]).facts
    scores = [row["score"] for row in facts["per_fold"]]
    assert (facts["fold_mean"], facts["fold_sd"]) == pytest.approx((np.mean(scores), np.std(scores, ddof=1)))


def test_clipping_predictions_helps_as_the_truth_is_clipped(paths):
    facts = score(paths, run=RUNS[1]).facts
    assert facts["score_clipped"] < facts["score"]


def test_of_a_truth_without_a_range_nothing_is_said_of_clipping(paths):
    """OpenVaccine's report said that clipped predictions would have the very same score."""
    assert (
        "score_clipped"
        not in score(paths, comp=replace(RIBONANZA, target_range=None, error_power=2), run=RUNS[1]).facts
    )


def test_what_the_name_of_a_metric_does_not_tell_is_told_below_the_scores(paths):
    """Three of OpenVaccine's five columns make its MCRMSE, and neither page nor terminal said which."""
    note = get_competition("openvaccine").metric_note
    assert "mean over reactivity, deg_Mg_pH10, deg_Mg_50C; the other columns do not count" in note
    facts = score(paths, comp=replace(RIBONANZA, metric_note=note), run=RUNS[1]).facts
    assert facts["floor_notes"][0] == note
    assert score(paths, run=RUNS[0]).facts["floor_notes"][:1] != [note]


def test_what_an_own_set_says_anew_is_scored_anew(paths):
    """Of another metric or range in columns.toml, which changes no table, `make evaluate` said: nothing to do."""
    told = {"targets": TARGETS, "range": None, "shown_ranges": [[0.0, 1.0]] * 2, "signal_to_noise": False}
    own = get_competition("profiles-mine")
    scores = [score(paths, own.with_facts(told | {"metric": metric})) for metric in ("MAE", "RMSE", "RMSE")]
    assert [report.status for report in scores] == ["built", "built", "current"]
    assert scores[0].facts["score"] < scores[1].facts["score"]


def test_own_filter_counts_profiles_whose_partner_failed(paths):
    facts = score(paths, run=RUNS[0]).facts
    train = pl.read_parquet(paths.clean("train"))
    assert train["scored"].sum() == facts["sequences"]["scored"]
    partner_failed = train.filter(pl.col("SN_filter_DMS_MaP") & ~pl.col("scored")).height
    assert partner_failed > 0
    for target in TARGETS:
        passed = train.with_columns(scored=pl.col(target.replace("reactivity", "SN_filter")))
        table = errors(paths, RUNS[0], train=passed, measured=[target])
        assert facts["per_target_own_filter"][target] == pytest.approx(table[f"error_{target}"].mean(), abs=1e-6)


def test_ensemble_is_scored_beside_its_runs(paths):
    facts = score(paths).facts
    weights = json.loads((paths.ensemble_dir("all") / "weights.json").read_text())
    assert facts["score"] == pytest.approx(weights["score"], abs=1e-6)
    for run in RUNS:
        assert facts["runs"][run]["score"] == pytest.approx(score(paths, run=run).facts["score"])


def test_floors_are_ordered_as_their_knowledge_is(tmp_path):
    """Reactivity follows the nucleotide and its neighbour here: each floor knows more than the one before."""
    rng = np.random.default_rng(0)
    paths = make_paths(tmp_path)
    write_values_data(paths, rng, sequences=400)
    write_run(paths, RUNS[0], rng, noise=dict.fromkeys(TARGETS, 0.1))
    facts = score(paths, run=RUNS[0]).facts
    assert facts["floors"]["constant"] > facts["floors"]["nucleotide"] + 0.03
    assert facts["floors"]["nucleotide"] > facts["floors"]["5-mer"] + 0.005
    assert list(evaluate.headline(facts).floors) == ["constant", "nucleotide", "5-mer"]


def test_constant_floor_is_the_median_of_the_other_folds(paths):
    facts = score(paths, run=RUNS[0]).facts
    table = errors(paths, RUNS[0])
    sums = np.zeros(2)
    for fold in range(FOLDS):
        inside, outside = table.filter(pl.col("fold") == fold), table.filter(pl.col("fold") != fold)
        for place, target in enumerate(TARGETS):
            median = outside[target].clip(0.0, 1.0).median()
            sums[place] += (inside[target].clip(0.0, 1.0) - median).abs().sum()
    assert facts["floors"]["constant"] == pytest.approx((sums / table.height).mean(), abs=1e-4)


def test_unpaired_floor_says_when_it_is_left_out_and_appears_with_bpp(paths, rng):
    facts = score(paths, run=RUNS[0]).facts
    assert "5-mer x unpaired" not in facts["floors"]
    assert "make bpp COMP=ribonanza" in facts["floor_notes"][0]
    sequences = pl.read_parquet(paths.clean("train"))["sequence"].unique().sort()
    unpaired = [rng.uniform(size=len(letters)).tolist() for letters in sequences]
    bpp = pl.DataFrame({"sequence": sequences, "unpaired": pl.Series(unpaired, dtype=pl.List(pl.Float32))})
    write(bpp.slice(1), paths.bpp)
    report = score(paths, run=RUNS[0])
    assert report.status == "built"
    assert set(report.facts["floors"]) == {"constant", "nucleotide", "5-mer", "5-mer x unpaired"}
    assert report.facts["floor_notes"] == [
        "5-mer x unpaired: 1 sequences without base-pair probabilities have their own bin"
    ]


def test_a_result_is_logged_once_and_rerun_is_current(paths):
    report = score(paths)
    first = paths.log.read_text()
    digest = sha256_file(report.outputs["scores"])
    again = score(paths)
    assert again.status == "current"
    assert paths.log.read_text() == first
    report.outputs["scores"].unlink()
    assert sha256_file(score(paths).outputs["scores"]) == digest
    assert paths.log.read_text() == first
    assert first.count("| all |") == 1
    score(paths, run=RUNS[0])
    assert paths.log.read_text().startswith(first)
    assert f"| {RUNS[0]} | {SPLIT} | 0,1,2 | MAE |" in paths.log.read_text()


def test_scores_file_holds_the_facts(paths):
    report = score(paths)
    assert json.loads(report.outputs["scores"].read_text()) == report.facts
    assert report.outputs["scores"] == paths.ensemble_dir("all") / "scores.json"


def test_missing_predictions_are_counted_not_hidden(paths):
    path = paths.oof(RUNS[0], 1)
    edit(path, pl.read_parquet(path).slice(1))
    facts = score(paths, run=RUNS[0]).facts
    assert facts["sequences"]["scored_without_prediction"] == 1
    assert facts["sequences"]["predicted"] == facts["sequences"]["in_folds"] - 1
    assert {floor["positions"] for floor in facts["floor_details"].values()} == {facts["positions"]}


def test_one_fold_has_no_standard_deviation_and_says_what_it_covers(paths):
    for fold in (1, 2):
        paths.oof(RUNS[0], fold).unlink()
    facts = score(paths, run=RUNS[0]).facts
    assert (facts["folds"], facts["fold_sd"]) == ([0], None)


def test_predictions_without_any_scored_position_are_refused(paths):
    edit(paths.clean("train"), pl.lit(False).alias("scored"))
    with pytest.raises(DataError, match="no scored position has a prediction of good"):
        score(paths, run=RUNS[0])


@pytest.mark.parametrize(
    ("subject", "kind", "message"),
    [
        ({"name": "all", "run": "good"}, ConfigError, "not both"),
        ({"name": None}, ConfigError, "give the name of an ensemble or that of a run"),
        (
            {"name": "absent"},
            DataError,
            r"weights.json: missing or unreadable. Next: make ensemble COMP=ribonanza NAME=absent",
        ),
        ({"run": "absent"}, ConfigError, "RUN=absent: no such run; there are: "),
    ],
)
def test_senseless_subjects_are_refused(paths, subject, kind, message):
    with pytest.raises(kind, match=message):
        score(paths, **subject)


def test_ensemble_of_another_split_is_refused(paths):
    told = r"made with split sim80_k3; got SPLIT=random_k5\. Next: make evaluate COMP=ribonanza SPLIT=sim80_k3\."
    with pytest.raises(ConfigError, match=told):
        evaluate.run(paths, competition=RIBONANZA, name="all", split="random_k5")


def test_weights_that_were_edited_are_refused(paths):
    """An edited weights.json was believed: a missing key ended in a traceback (KeyError: 'split')."""
    edited = paths.ensemble_dir("all") / "weights.json"
    edited.write_text("{}")
    with pytest.raises(
        DataError, match=r"weights.json: not what its stage wrote.* Next: make ensemble COMP=ribonanza NAME=all\."
    ):
        score(paths)
    edited.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"weights.json: missing or unreadable"):
        score(paths)


def test_description_has_runs_and_floors_beside_the_score(paths):
    facts = score(paths).facts
    console = Console(width=1000)
    with console.capture() as captured:
        console.print(evaluate.describe(facts))
    for word in ("all", *RUNS, "floor: constant", "floor: 5-mer", "±"):
        assert word in captured.get()
    assert captured.get().splitlines()[-1] == facts["floor_notes"][0], "notes made the first column wide"


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_breaks_names_and_scores_and_cuts_none(paths, width):
    """At 80 columns two runs were both called "tiny_ri…", at 40 every score was "0.…"."""
    facts = score(paths).facts
    console = Console(width=width)
    with console.capture() as captured:
        console.print(evaluate.describe(facts | {"floor_notes": []}))
    assert "…" not in captured.get()


def test_structures_are_scored_beside_their_floors(tmp_path, rng):
    paths = make_paths(tmp_path, "rna3d")
    train = write_structure_data(paths, rng)
    write_structure_run(paths, "one.s", rng, confidences=[0.9, 0.7, 0.5, 0.3, 0.1])
    for fold in range(2):  # the third candidate is the truth
        table = pl.read_parquet(paths.oof("one.s", fold)).join(train, on="sequence_id", suffix="_true", validate="m:1")
        right = [pl.when(pl.col("candidate") == 3).then(f"{axis}_true").otherwise(axis).alias(axis) for axis in "xyz"]
        edit(paths.oof("one.s", fold), table.with_columns(right).drop("x_true", "y_true", "z_true"))
    ensemble.run(paths, competition=RNA3D, name="all", runs=["one.s"], split=SPLIT)
    for subject in ({"name": "all"}, {"run": "one.s"}):
        facts = score(paths, RNA3D, **subject).facts
        assert facts["score"] == pytest.approx(1.0, abs=1e-4)
        assert [row["sequences"] for row in facts["per_fold"]] == [3, 3]
        assert facts["score"] > max(facts["floors"].values())
    console = Console(width=200)
    with console.capture() as captured:
        console.print(evaluate.describe(facts))
    (hairpin,) = [line for line in captured.get().splitlines() if "hairpin" in line]  # it was told three times
    both = facts["floors"]["hairpin"], facts["sequence_independent"]["floors"]["hairpin"]
    assert hairpin.split() == ["floor:", "hairpin", *(f"{value:.4f}" for value in both)]
    assert "R0_A" in captured.get()
    assert paths.log.read_text().count("rna3d") == 2


def test_scores_and_log_say_which_engine_gave_the_numbers(tmp_path, rng, monkeypatch):
    paths = make_paths(tmp_path, "rna3d")
    write_structure_data(paths, rng)
    write_structure_run(paths, "templates.s", rng, confidences=[0.9, 0.7, 0.5, 0.3, 0.1])
    ours = score(paths, RNA3D, run="templates.s").facts
    assert {row["templates"] for row in ours["targets"]} == {5}
    program = usalign_script(tmp_path / "bin", matched=0.25, aligned=0.75)
    monkeypatch.setenv("PATH", str(program.parent))
    theirs = score(paths, RNA3D, run="templates.s", engine="auto").facts
    assert (theirs["score"], theirs["sequence_independent"]["score"]) == (0.25, 0.75)
    assert (ours["engine"], theirs["engine"]) == ("built-in residue-matched search", "US-align")
    assert score(paths, RNA3D, run="templates.s", engine="usalign").status == "current"
    usalign_script(tmp_path / "bin", matched=0.5, aligned=0.75)
    assert score(paths, RNA3D, run="templates.s", engine="usalign").facts["score"] == 0.5  # another program
    assert [line.split("|")[-2].strip() for line in paths.log.read_text().splitlines()[-3:]] == ["", *["US-align"] * 2]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(evaluate.describe(theirs))
    assert "0.2500 (candidate 1 alone 0.2500); US-align" in captured.get()


def test_an_engine_is_refused_where_it_has_nothing_to_do_or_is_not_there(paths, tmp_path, rng, monkeypatch):
    with pytest.raises(ConfigError, match="ENGINE=auto is for structures"):
        score(paths, name="all", engine="auto")
    monkeypatch.setenv("PATH", "")
    other = make_paths(tmp_path / "other", "rna3d")
    write_structure_data(other, rng)
    write_structure_run(other, "one.s", rng, confidences=[0.9, 0.7, 0.5, 0.3, 0.1])
    with pytest.raises(ConfigError, match="evaluate: USalign is not on the PATH"):
        score(other, RNA3D, run="one.s", engine="usalign")


def test_test_targets_of_known_structure_are_scored_beside_the_folds(tmp_path, rng):
    paths = make_paths(tmp_path, "rna3d")
    write_structure_data(paths, rng)
    write_structure_run(paths, "one.s", rng, confidences=[0.9, 0.7, 0.5, 0.3, 0.1])
    ensemble.run(paths, competition=RNA3D, name="all", runs=["one.s"], split=SPLIT)
    assert score(paths, RNA3D).facts["test"] is None
    truth = pl.read_parquet(paths.test("one.s", 0)).filter(sequence_id="Q10", candidate=1)
    known = truth.select("sequence_id", pl.lit(1, dtype=pl.UInt8).alias("conformer"), "x", "y", "z")
    references = pl.concat([pl.read_parquet(paths.clean("references")), known]).sort("sequence_id")
    write(references, paths.clean("references"))
    facts = score(paths, RNA3D).facts
    assert [row["sequence_id"] for row in facts["test"]["targets"]] == ["Q10"]
    assert facts["test"]["score"] == pytest.approx(1.0, abs=1e-5)
    assert facts["test"]["without_reference"] == ["Q1", "Q2_B"]
    assert len(facts["targets"]) == 6
    console = Console(width=200)
    with console.capture() as captured:
        console.print(evaluate.describe(facts))
    assert "test targets of known structure\nTM-score, best candidate of each of 1 targets: 1.0000" in captured.get()


def test_structures_that_are_not_out_of_fold_are_refused(tmp_path, rng):
    paths = make_paths(tmp_path, "rna3d")
    write_structure_data(paths, rng)
    write_structure_run(paths, "one.s", rng, confidences=[0.9, 0.7, 0.5, 0.3, 0.1])
    edit(paths.oof("one.s", 1), pl.lit(0, dtype=pl.UInt8).alias("fold"))
    with pytest.raises(DataError, match=r"R1_A.* predicted by fold 0; the split sim80_k3 holds it out in fold 1"):
        score(paths, RNA3D, run="one.s")


def test_damaged_structures_are_refused(tmp_path, rng):
    """Of a byte that another one stood for in their table there were other scores, or a traceback."""
    paths = make_paths(tmp_path, "rna3d")
    write_structure_data(paths, rng)
    write_structure_run(paths, "one.s", rng, confidences=[0.9, 0.7, 0.5, 0.3, 0.1])
    path = paths.oof("one.s", 1)
    pq.write_table(pq.read_table(path), path, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"fold1/oof.parquet: damaged \(.*\)\. Next: "):
        score(paths, RNA3D, run="one.s")
