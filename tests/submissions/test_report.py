"""The report tells the scores, names what is missing, runs nothing and loads nothing."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from folds import ensemble
from pipeline.cli import run_verb
from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError
from pipeline.paths import REPOSITORY
from pipeline.runlog import MetricsLog
from pipeline.stage import write_json
from submissions import evaluate, figures, page, report
from submissions.classes_report import _numbers
from submissions.subject import Subject, brief
from submissions.training_report import Training
from submissions.values_report import _calibration_section, _errors_section, _Gathered, _key, _strip
from tests.chain_tables import (
    FOLDS,
    SPLIT,
    TARGETS,
    edit,
    make_paths,
    write_run,
    write_structure_data,
    write_structure_run,
    write_values_data,
)

RIBONANZA, RNA3D = get_competition("ribonanza"), get_competition("rna3d")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>$x^2$"
VOID = {"meta", "image", "path", "use", "rect", "circle", "img", "br", "link"}


class Reader(HTMLParser):
    """Collects what a browser would see, and complains about tags that do not match."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.open == []
    return reader


def visible(path):
    return " ".join(" ".join(read(path).texts).split())


def write_training(paths, run, folds):
    """Metrics logs and settings as training leaves them."""
    for fold in folds:
        folder = paths.fold_dir(run, fold)
        log = MetricsLog(folder / "metrics.jsonl")
        log.write("start", train=40, valid=20, precision="fp32")
        for step in range(1, 41):
            log.write("step", step=step, epoch=step // 10, loss=1 / step + fold / 50, lr=1e-3)
        for epoch in range(4):
            log.write(
                "epoch",
                step=10 * epoch + 10,
                epoch=epoch,
                metric=0.3 - epoch / 50,
                best=True,
                seconds=2.5,
                memory_mib=300,
            )
        log.close()
        write_json(folder / "config.json", {"config": {"model": {"name": "hyena", "kwargs": {"width": 48}}}})


def write_events(paths, run, fold, *, rows):
    """Events as training logs them, behind what is there."""
    log = MetricsLog(paths.fold_dir(run, fold) / "metrics.jsonl")
    for event, values in rows:
        log.write(event, **values)
    log.close()


def build_values(folder, *, runs=("a.sim80_k3", "b.sim80_k3"), dataset=None, training=True):
    paths, rng = make_paths(folder), np.random.default_rng(7)
    write_values_data(paths, rng)
    if dataset:
        edit(paths.clean("train"), pl.lit(dataset).alias("dataset_name"))
    for number, run in enumerate(runs):
        write_run(paths, run, rng, noise=dict.fromkeys(TARGETS, 0.1 + 0.05 * number))
        if training:
            write_training(paths, run, range(FOLDS))
    ensemble.run(paths, competition=RIBONANZA, name="all", runs=list(runs), split=SPLIT)
    evaluate.run(paths, competition=RIBONANZA, name="all", split=SPLIT)
    return paths


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """Paths and report of an ensemble of two runs with all there is."""
    paths = build_values(tmp_path_factory.mktemp("values"))
    return paths, report.run(paths, competition=RIBONANZA, name="all")


@pytest.fixture(scope="module")
def structures(tmp_path_factory):
    paths, rng = make_paths(tmp_path_factory.mktemp("structures"), "rna3d"), np.random.default_rng(7)
    write_structure_data(paths, rng)
    write_structure_run(paths, "a.sim80_k3", rng, confidences=(0.5, 0.4, 0.3, 0.2, 0.1))
    ensemble.run(paths, competition=RNA3D, name="all", runs=["a.sim80_k3"], split=SPLIT)
    evaluate.run(paths, competition=RNA3D, name="all", split=SPLIT)
    return paths, report.run(paths, competition=RNA3D, name="all")


@pytest.mark.parametrize(
    ("competition", "told", "words", "size"),
    [
        (
            RNA3D,
            {"policy": {"spare": ["b"]}},
            "Predicted by a, c. In reserve, as the five are better",
            "2 runs × 1 fold",
        ),
        (RNA3D, {"policy": None}, "Predicted by a, b, c.", "3 runs × 1 fold"),
        (
            RIBONANZA,
            {"weights": {"x": dict.fromkeys("abc", 1 / 3)}, "score": 0.19, "score_nested": 0.2},
            "Predicted by a, b, c. The choice was made by this score (0.1900); made for each fold by the others, ",
            "3 runs × 1 fold",
        ),
        (
            RIBONANZA,
            {"weights": {"x": {"a": 0.5, "b": 0.0, "c": 0.5}, "y": {"a": 0.0, "b": 0.0, "c": 1.0}}},
            "Predicted by a, c. Of weight 0: b.",
            "2 runs × 1 fold, 1 more idle",
        ),
    ],
)
def test_runs_that_do_not_predict_are_named(tmp_path, competition, told, words, size):
    """It said "3 runs × 5 folds" of five structures that two of them give, and a third where these have fewer."""
    write_json(tmp_path / "weights.json", told)
    scores = {"kind": "ensemble", "runs": dict.fromkeys("cab"), "folds": [0]}
    subject = Subject(paths=make_paths(tmp_path), competition=competition, home=tmp_path, scores=scores)
    assert report._roles(subject).startswith(words)
    assert report._size(subject).startswith(size)


@pytest.mark.parametrize(
    ("told", "joined", "words"),
    [
        ({}, {}, "2.2% below the best floor, ridge (0.4988): better."),
        ({}, {"score_nested": 0.5}, "0.2% above the best floor, ridge (0.4988): worse; the model has learned less than "
         "the floor knows; judged by 0.5000, where each fold has what the others choose."),
        ({"sequences": {"scored": 3}}, {}, "better. Only 3 sequences scored: such a difference may be chance."),
        ({"best_run": "all"}, {}, "below the best floor, ridge (0.4988): no clear difference, as its 95 % interval"),
        ({"runs": {"a": {}}}, {}, "below the best floor, ridge (0.4988): no clear difference, as its 95 % interval"),
    ],
)  # fmt: skip
def test_the_lead_judges_by_the_score_that_no_choice_has_seen_and_says_what_is_too_little(
    tmp_path, told, joined, words
):
    """It said "better" of 0.4878 beside a floor of 0.4988, though the nested score on the same page was 0.5000; and
    of an ensemble of one run, whose difference from the floor had an interval with 0 in it on the same page.
    """
    write_json(tmp_path / "weights.json", joined)
    scores = {"kind": "ensemble", "name": "all", "runs": {}, "score": 0.4878, "floors": {"ridge": 0.4988, "mean": 0.54}}
    scores |= {"sequences": {"scored": 120}, "floor_details": {"ridge": {"difference": {"low": -0.01, "high": 0.03}}}}
    subject = Subject(
        paths=make_paths(tmp_path), competition=RIBONANZA, home=tmp_path, scores=scores | {"best_run": "a"} | told
    )
    assert words in report._verdict(subject)


def test_the_page_shows_score_floors_runs_and_folds(values):
    paths, made = values
    scores = json.loads((paths.ensemble_dir("all") / "scores.json").read_text())
    text = visible(made.outputs["report"])
    assert made.status == "built"
    for told in (scores, *scores["runs"].values(), *scores["floor_details"].values(), *scores["per_fold"]):
        assert f"{told['score']:.4f}" in text
    for name in ("a.sim80_k3", "b.sim80_k3", "floor: 5-mer", "fold 2", "libA", "Stanford Ribonanza"):
        assert name in text
    assert "below the best floor" in text
    assert re.search(r"a\.sim80_k3 0 0\.2400 40 40 4 40 20 10 s 300 MiB fp32", text)
    assert "kwargs.width = 48" in text


@pytest.mark.parametrize("kind", ["values", "structures"])
def test_the_page_runs_nothing_loads_nothing_and_is_small(kind, request):
    _, made = request.getfixturevalue(kind)
    path = made.outputs["report"]
    reader = read(path)
    assert not {"script", "link", "iframe", "object", "form", "img"} & set(reader.tags)
    assert reader.tags.index("meta") < reader.tags.index("style")
    policy = next(
        value for tag, name, value in reader.attributes if (tag, name) == ("meta", "content") and "src" in value
    )
    assert policy.startswith("default-src 'none'")
    for _, name, value in reader.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert "url(" not in re.sub(r"url\(#\w+\)", "", path.read_text())
    assert made.facts["bytes"] == path.stat().st_size < 3_000_000


@pytest.mark.parametrize("kind", ["values", "structures"])
def test_every_colour_follows_the_theme(kind, request):
    text = request.getfixturevalue(kind)[1].outputs["report"].read_text()
    style = text[text.index("<style>") : text.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for variable in set(re.findall(r"var\((--\w+)\)", text)) - {"--sans", "--mono"}:
        assert f"{variable}:" in light
        assert f"{variable}:" in dark[: dark.index("* {")]
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "<text" in drawings
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", drawings)) == set()


def test_hostile_names_are_shown_and_do_nothing(tmp_path):
    paths = build_values(tmp_path, runs=("a.sim80_k3",), dataset=HOSTILE, training=False)
    for table in (paths.clean("train"), paths.fold_table(SPLIT), *(paths.oof("a.sim80_k3", k) for k in range(FOLDS))):
        edit(table, ("<b>" + pl.col("sequence_id")).alias("sequence_id"))
    evaluate.run(paths, competition=RIBONANZA, run="a.sim80_k3", split=SPLIT)
    made = report.run(paths, competition=RIBONANZA, run="a.sim80_k3")
    reader = read(made.outputs["report"])
    assert not {"script", "img", "b"} & set(reader.tags)
    assert HOSTILE in "".join(reader.texts)
    assert any(text.startswith("<b>s00") for text in reader.texts)


def test_a_run_has_scores_and_a_page_without_an_ensemble(tmp_path, capsys):
    """Only tests could ask for them."""
    run, here = "a.sim80_k3", ["--comp", "ribonanza", "--artifacts", str(tmp_path / "artifacts")]
    paths = build_values(tmp_path, runs=(run,), training=False)
    shutil.rmtree(paths.ensemble_dir("all"), ignore_errors=True)
    assert run_verb(["report", *here, "--run", run]) == 3
    assert f"Next: make evaluate COMP=ribonanza RUN={run}" in capsys.readouterr().err
    assert run_verb(["evaluate", *here, "--run", run]) == 0, "of its own split, whatever SPLIT is"
    assert run_verb(["report", *here, "--run", run]) == 0
    assert run in visible(paths.run_dir(run) / "report.html")
    assert run_verb(["evaluate", *here, "--run", "b.sim80_k3"]) == 2
    assert f"RUN=b.sim80_k3: no such run; there are: {run}. Next: name one of these" in capsys.readouterr().err
    for verb in ("evaluate", "report"):
        command = ["make", "-n", verb, f"RUN={run}", "PY=python3"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert f" --run {run}" in done.stdout


def test_a_run_may_be_named_without_its_split(tmp_path, capsys):
    """RUNS=a said "no run of sim80_k3; there are: a.sim80_k3"."""
    here = ["--artifacts", str(tmp_path / "artifacts"), "--split", "sim80_k3", "--run", "a"]
    build_values(tmp_path, runs=("a.sim80_k3", "b.sim80_k3"), training=False)
    for verb in ("ensemble", "evaluate", "report"):
        assert run_verb([verb, *here]) == 0
    assert run_verb(["ensemble", *here, "--run", "a.sim80_k3"]) == 2
    assert "a.sim80_k3" in capsys.readouterr().err, "one twice"


def test_a_target_named_as_markup_stays_text_inside_a_figure():
    drawing = figures.target_scores([HOSTILE], [0.5], [[0.2, 0.3]], xlabel="TM-score")
    reader = Reader()
    reader.feed(drawing)
    assert not {"script", "img"} & set(reader.tags)
    assert HOSTILE in "".join(reader.texts)


def test_a_training_of_two_steps_has_whole_steps_on_its_axis():
    """Between steps 1 and 2 stood 1.25, 1.5 and 1.75."""
    drawing = figures.curves({0: ([1.0, 2.0], [0.3, 0.2])}, xlabel="step", ylabel="loss")
    assert re.findall(r">([^<>\s][^<>]*)</text>", drawing)[:4] == ["0", "1", "2", "step"]


def test_long_names_are_cut_in_figures_so_that_none_lies_on_another():
    """Titles of four maps beside each other overlapped, and labels of rows took the drawing's place."""
    names = ("relative luminescence after 24 hours", "relative luminescence after 48 hours")
    example = {"sequence": "ACGU", "measured": np.ones((2, 4)), "predicted": np.ones((2, 4))}
    drawing = _strip(example, replace(RIBONANZA, targets=names))
    assert "relative lumi…r 24 hours measured" in drawing
    assert names[0] not in drawing
    assert max(len(brief("x" * length)) for length in range(1, 99)) == 24


def test_long_names_of_classes_leave_the_table_of_what_is_taken_for_what_in_sight():
    """A name of 160 letters stood upright above its column: a blank of two screens, and no number on the page."""
    names = ("a" * 30 + "b" * 130, "short")
    table = _numbers(np.eye(2, dtype=int), np.eye(2), names)
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", table)
    assert heads == ["", "aaaaaaaaaaaaa…bbbbbbbbbb", "short"]
    assert re.findall(r"<td>([^<]*)</td>", table) == list(names)


OTHER_UNITS = replace(RIBONANZA, targets=("shape", "dms"), target_range=None, shown_ranges=((-1e-4, 1e-4), (0.0, 50.0)))


def test_targets_of_other_units_have_axes_of_their_own():
    """They shared one, on which the bars and the line of the smaller unit were not to be seen."""
    row = {"label": "50-99", "letter": "A", "position": 7, "positions": 9, "dataset_name": "one", "score": 3.0}
    row["per_target"] = {"shape": 2e-5, "dms": 6.0}
    parts = ("by_signal_to_noise", "by_length", "by_position", "by_dataset")
    subject = SimpleNamespace(scores={part: [row] for part in parts} | {"metric": "MAE"}, competition=OTHER_UNITS)
    gathered = SimpleNamespace(nucleotides=SimpleNamespace(table=lambda label: [row]))
    reader = Reader()
    reader.feed(_errors_section(subject, gathered))
    titles = ("By nucleotide", "By signal-to-noise", "By length", "Along the sequence")
    assert all(f"{title}: {target}" in reader.texts for title in titles for target in OTHER_UNITS.targets)
    assert {"2e-05", "6"} <= set(reader.texts)


def test_every_unit_has_a_scale_of_colours():
    example = {"sequence": "A", "measured": np.array([[0.0], [25.0]]), "predicted": np.ones((2, 1))}
    drawing = _strip(example, OTHER_UNITS)
    pictures = re.findall(r"base64,([^\"]+)", drawing)
    assert len(pictures) == 4
    assert pictures[0] == pictures[2] != pictures[3], "the middle of both scales"
    reader = Reader()
    reader.feed(_key(OTHER_UNITS))
    assert [text for text in reader.texts if text.strip()] == [
        "shape:", "-0.0001 and below", "0.0001 and above", "dms:", "0 and below", "50 and above",
    ]  # fmt: skip


def test_what_is_no_reactivity_is_not_called_one():
    """The axes of a competition that somebody added said "measured, reactivity" of whatever it predicts."""
    targets = ("reactivity", "deg_50C", "shape")
    competition = replace(get_competition("openvaccine"), targets=targets, shown_ranges=((0.0, 1.0),) * 3)
    gathered = SimpleNamespace(competition=competition, counts_CBB=np.ones((3, 100, 100)))
    reader = Reader()
    reader.feed(_calibration_section(gathered))
    units = [text.removeprefix("measured, ") for text in reader.texts if text.startswith("measured, ")]
    assert units == ["reactivity", "degradation", "shape"]


def test_bars_of_small_heights_say_them():
    """They were 0.00."""
    drawing = figures.grouped_bars(["A", "C"], {0: [6.6e-5, 0.0125]}, xlabel="nucleotide", ylabel="error")
    assert "6.6e-05" in drawing
    assert "0.0125" not in drawing, "two digits are enough"
    assert "0.20" in figures.grouped_bars(["A"], {0: [0.2]}, xlabel="nucleotide", ylabel="error")


def test_more_targets_than_colours_begin_with_the_first_colour_again():
    """IndexError: tuple index out of range, of the report on profiles of seven values."""
    counts_BB = np.ones((100, 100))
    first, seventh = (
        figures.calibration(counts_BB, low=0, high=1, unit="value", colour=place) for place in (0, page.COLOURS)
    )
    assert "var(--s0)" in first
    assert seventh == first


def test_a_score_is_never_broken_into_two_lines():
    """7.185e-05 was 7.185e- and 05."""
    (rule,) = re.findall(r"\.score \{[^}]*\}", page.page("any", page.join()))
    assert "white-space: nowrap" in rule


def test_headings_of_numbers_may_take_two_lines_and_the_numbers_never_do():
    """The table of scores by fold was 1,268 px wide in the 1,048 of a page of 1,280, for its headings."""
    rules = re.findall(r"([^{}]*)\{[^}]*white-space: nowrap", page.page("any", page.join()))
    assert not any("th" in rule.replace("-width", "").split() or "th.number" in rule for rule in rules)
    assert any("td.number" in rule for rule in rules)


def test_a_drawing_that_a_small_screen_cuts_says_so():
    """Half of every row of 100 letters was out of sight at 390 px, and nothing showed that it scrolls."""
    assert "scroll sideways" in page.figure(page.text(""), wide=True)
    assert "scroll sideways" not in page.figure(page.text(""))


def test_a_second_run_is_current_and_a_rebuilt_page_has_the_same_bytes(values):
    paths, made = values
    before = made.outputs["report"].read_bytes()
    assert report.run(paths, competition=RIBONANZA, name="all").status == "current"
    made.outputs["report"].unlink()
    assert report.run(paths, competition=RIBONANZA, name="all").status == "built"
    assert made.outputs["report"].read_bytes() == before


def test_new_training_rows_make_a_new_page(values, tmp_path):
    shutil.copytree(values[0].root, tmp_path / "artifacts")
    paths = make_paths(tmp_path)
    log = MetricsLog(paths.fold_dir("a.sim80_k3", 1) / "metrics.jsonl")
    log.write("epoch", step=50, epoch=4, metric=0.123456, best=True, seconds=1.0, memory_mib=100)
    log.close()
    made = report.run(paths, competition=RIBONANZA, name="all")
    assert made.status == "built"
    assert "0.1235" in visible(made.outputs["report"])


def test_everything_that_went_wrong_in_training_is_on_the_page(values, tmp_path):
    shutil.copytree(values[0].root, tmp_path / "artifacts")
    paths = make_paths(tmp_path)
    bad = {
        "seen": "nonfinite_loss",
        "loss": math.nan,
        "precision": "bf16",
        "phase": "forward",
        "module": "blocks.1.<b>",
    }
    bad |= {"ids": ["s0001", "s0002", "s0003"], "sequences": 32}
    overflow = {"event": "guard", "seen": "scaler_overflow", "answer": "skip", "precision": "fp16"}
    events = [
        ("guard", {**bad, "answer": "skip", "step": 31}),
        ("guard", {**bad, "answer": "roll_back", "step": 32}),
        ("rollback", {"step": 32, "to_step": 30, "before": "bf16", "precision": "fp32", "rollbacks": 1}),
        ("micro_batch", {"step": 33, "before": 16, "now": 8}),
        ("start", {"resumed_step": 35, "precision": "fp32"}),
        (
            "changed",
            {"step": 35, "key": "config.train.epochs", "before": 3, "now": 4, "remark": "follows the longer run"},
        ),
    ]
    write_events(paths, "a.sim80_k3", 0, rows=events)
    many = [("guard", {**overflow, "step": step, "scale": 2.0**15}) for step in range(1, 61)]
    write_events(
        paths, "b.sim80_k3", 1, rows=[(kind, {k: v for k, v in row.items() if k != "event"}) for kind, row in many]
    )
    text = visible(report.run(paths, competition=RIBONANZA, name="all").outputs["report"])
    assert "4 of 6 folds went through without any of this" in text
    assert (
        "a.sim80_k3, fold 0: bad steps 2, rollbacks 1, smaller micro-batches 1, settings changed 1, interruptions 1"
        in text
    )
    assert "31 non-finite loss in bf16 forward of blocks.1.<b> s0001, s0002 and 30 more batch left out" in text
    assert "32 rollback – – everything from the checkpoint of step 30, now in fp32" in text
    assert "33 out of memory with 16 sequences at a time – – micro-batches of 8" in text
    assert "35 the run had ended before its time – – started again" in text
    assert "35 config.train.epochs 3 → 4 – – follows the longer run" in text
    assert "b.sim80_k3, fold 1: fp16 overflows 60" in text
    assert text.count("fp16 overflow, which its scale provokes") == 40
    assert "20 more between the first 20 and the last 20" in text


def test_a_page_does_not_call_out_of_fold_what_the_initial_weights_have_seen(values, tmp_path):
    shutil.copytree(values[0].root, tmp_path / "artifacts")
    paths = make_paths(tmp_path)
    assert "All scores are out of fold" in visible(paths.ensemble_dir("all") / "report.html")
    about = paths.fold_dir("a.sim80_k3", 1) / "config.json"
    own = {"competition": paths.comp, "split": "sim80_k3", "fold": 1}
    initial = {"trained_on": [own | {"fold": 0, "folds": None}]}
    write_json(about, json.loads(about.read_text()) | own | {"initial": initial})
    text = visible(report.run(paths, competition=RIBONANZA, name="all").outputs["report"])
    assert "a.sim80_k3: fold 1 began with weights that have learned, or may have, from what it holds out" in text
    assert "All other scores are out of fold" in text


def test_a_training_without_incident_says_so_in_one_sentence(values):
    text = visible(values[1].outputs["report"])
    assert "What went wrong, and what was done Nothing: no value that was not finite, no lack of memory" in text


def test_precisions_are_told_in_their_order():
    rows = [{"event": "start", "precision": "fp16"}, {"event": "rollback", "precision": "fp32"}]
    assert Training(rows=[*rows, {"event": "start", "precision": "fp32"}]).precisions == ["fp16", "fp32"]


def test_of_steps_that_a_rollback_repeated_the_last_is_drawn():
    rows = [{"event": "step", "step": step, "loss": loss} for step, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 1.0))]
    assert Training(rows=rows).curve("step", "loss") == ([1.0, 2.0, 3.0], [9.0, 1.0, 7.0])


def test_missing_pieces_are_named_on_the_page(tmp_path):
    paths = build_values(tmp_path, runs=("a.sim80_k3",), training=False)
    for fold in (1, 2):
        paths.oof("a.sim80_k3", fold).unlink()
    evaluate.run(paths, competition=RIBONANZA, run="a.sim80_k3", split=SPLIT)
    made = report.run(paths, competition=RIBONANZA, run="a.sim80_k3")
    text = visible(made.outputs["report"])
    assert len(made.facts["missing"]) == 5
    for reason in made.facts["missing"]:
        assert reason in text
    assert "Only fold 0 is trained" in text
    assert "No metrics log (metrics.jsonl) of a.sim80_k3 fold 0" in text
    assert "No base-pair probabilities" in text
    assert "nan" not in text.lower().split()


def test_runs_without_a_network_lack_no_log_and_no_settings(tmp_path, rng):
    paths = make_paths(tmp_path, "rna3d")
    write_structure_data(paths, rng)
    for run in ("a.sim80_k3", "denovo.sim80_k3"):
        write_structure_run(paths, run, rng, confidences=(0.5, 0.4, 0.3, 0.2, 0.1))
    ensemble.run(paths, competition=RNA3D, name="all", runs=["a.sim80_k3", "denovo.sim80_k3"], split=SPLIT)
    evaluate.run(paths, competition=RNA3D, name="all", split=SPLIT)
    made = report.run(paths, competition=RNA3D, name="all")
    told = " ".join(made.facts["missing"])
    assert "metrics.jsonl) of a.sim80_k3 fold 0" in told
    assert "(config.json) of a.sim80_k3" in told
    assert "denovo" not in told
    assert "never trained: denovo.sim80_k3" in visible(made.outputs["report"])


def test_wherever_a_score_of_complexes_stands_it_is_called_an_upper_bound(tmp_path, rng):
    """Page and terminal named the order of the copies alone, the log not even that: ours is never below part 2's."""
    paths = make_paths(tmp_path, "rna3d")
    train = write_structure_data(paths, rng)
    twice = [each[: len(each) // 2] * 2 + each[len(each) // 2 * 2 :] for each in train["sequence"]]
    lengths = [[len(each) // 2] * 2 + [1] * (len(each) % 2) for each in twice]
    chains = pl.Series("chain_lengths", lengths, dtype=pl.List(pl.Int32))
    edit(paths.clean("train"), train.with_columns(chains, pl.Series("sequence", twice)))
    write_structure_run(paths, "a.sim80_k3", rng, confidences=(0.5, 0.4, 0.3, 0.2, 0.1))
    ensemble.run(paths, competition=RNA3D, name="all", runs=["a.sim80_k3"], split=SPLIT)
    scores = evaluate.run(paths, competition=RNA3D, name="all", split=SPLIT).facts
    console = Console(width=300)
    with console.capture() as terminal:
        console.print(evaluate.describe(scores))
    page_ = visible(report.run(paths, competition=RNA3D, name="all").outputs["report"])
    for told in (terminal.get(), page_, paths.log.read_text()):
        assert "6 of 6 targets have copies of a chain" in told
        assert "an upper bound, as part 2's metric pairs them by shape (US-align -mm 1)" in told


def test_every_structure_has_its_score_and_some_their_traces(structures):
    paths, made = structures
    scores = json.loads((paths.ensemble_dir("all") / "scores.json").read_text())
    text = visible(made.outputs["report"])
    for row in scores["targets"]:
        assert row["sequence_id"] in text
        assert f"TM-score {row['score']:.3f}, RMSD" in text
    beaten = sum(row["score"] > max(row["floors"].values()) for row in scores["targets"])
    assert f"{beaten} of {len(scores['targets'])} targets beat every floor" in text


def test_both_scores_of_structures_stand_beside_their_floors(structures):
    """Only the residue-matched score was on the page."""
    paths, made = structures
    scores = json.loads((paths.ensemble_dir("all") / "scores.json").read_text())
    text = visible(made.outputs["report"])
    both = scores, scores["sequence_independent"]
    rows = {"best of the candidates": "score", "candidate 1 alone": "first_candidate"}
    for words, key in rows.items():
        assert f"{words} {both[0][key]:.4f} {both[1][key]:.4f}" in text
    for name in both[0]["floors"]:
        assert f"floor: {name} {both[0]['floors'][name]:.4f} {both[1]['floors'][name]:.4f}" in text
    assert f"computed by {both[0]['engine']} {both[1]['engine']}" in text
    for row in scores["targets"]:
        floors = [max(each["floors"].values()) for each in (row, row["sequence_independent"])]
        cells = f"{row['score']:.4f} {row['candidate']} {floors[0]:.4f} {row['sequence_independent']['score']:.4f}"
        assert f"{cells} {floors[1]:.4f}" in text


def test_the_traces_lie_on_each_other_when_the_prediction_is_the_truth_in_another_frame(tmp_path, rng):
    paths = make_paths(tmp_path, "rna3d")
    write_structure_data(paths, rng)
    write_structure_run(paths, "a.sim80_k3", rng, confidences=(0.5, 0.4, 0.3, 0.2, 0.1))
    truth = pl.read_parquet(paths.clean("references")).select("sequence_id", tx="x", ty="y", tz="z")
    shifted, negative = pl.col("ty").list.eval(pl.element() + 50.0), pl.col("tx").list.eval(-pl.element())
    turned = {"x": shifted, "y": negative, "z": pl.col("tz")}  # a rotation about z, and a shift
    for fold in range(2):
        table = pl.read_parquet(paths.oof("a.sim80_k3", fold))
        beside = table.join(truth, on="sequence_id").with_columns(
            pl.when(pl.col("candidate") == 2).then(value).otherwise(pl.col(axis)).alias(axis)
            for axis, value in turned.items()
        )
        edit(paths.oof("a.sim80_k3", fold), beside.select(table.columns))
    evaluate.run(paths, competition=RNA3D, run="a.sim80_k3", split=SPLIT)
    path = report.run(paths, competition=RNA3D, run="a.sim80_k3").outputs["report"]
    assert visible(path).count("TM-score 1.000, RMSD 0.0 Å") == 6
    traces = path.read_text().partition('id="traces"')[2]
    lines = re.findall(r'<path d="([^"]+)"[^>]*style="fill: none; stroke: var\(--(muted|s0)\)', traces)
    assert [colour for _, colour in lines] == ["muted", "s0"] * 6
    for (truth, _), (prediction, _) in zip(lines[::2], lines[1::2], strict=True):
        np.testing.assert_allclose(numbers(prediction), numbers(truth), atol=0.01)


def numbers(drawn):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", drawn)]


def test_errors_by_nucleotide_and_by_sequence_add_up_to_the_score(values):
    paths, _ = values
    scores = json.loads((paths.ensemble_dir("all") / "scores.json").read_text())
    gathered = gather(paths)
    letters = gathered.nucleotides.table("letter")
    total = sum(row["score"] * row["positions"] for row in letters) / sum(row["positions"] for row in letters)
    assert total == pytest.approx(scores["score"], rel=1e-6)
    assert [row["letter"] for row in letters] == list("ACGU")
    assert gathered.counts_CBB.sum(axis=(1, 2)).tolist() == [scores["positions"]] * 2
    assert len(gathered.ids) == scores["sequences"]["scored"]
    chosen = gathered.spread_out(6)
    assert len(chosen) == 6
    assert list(chosen.values()) == sorted(chosen.values())
    assert min(gathered.errors) <= next(iter(chosen.values())) < list(chosen.values())[-1] <= max(gathered.errors)


def gather(paths):
    from pipeline.tables import out_of_fold

    gathered = _Gathered(RIBONANZA)
    sources = {"all": [paths.ensemble_dir("all") / "oof.parquet"]}
    for batch in out_of_fold(
        paths.clean("train"),
        fold_table=paths.fold_table(SPLIT),
        folds=range(FOLDS),
        sources=sources,
        targets=TARGETS,
        columns=["scored", *TARGETS],
    ):
        gathered.add(batch, batch.predictions["all"], batch.missing["all"])
    return gathered


def test_what_cannot_be_reported_is_refused_in_one_sentence(tmp_path):
    paths = make_paths(tmp_path)
    with pytest.raises(ConfigError, match="not both and not neither"):
        report.run(paths, competition=RIBONANZA)
    with pytest.raises(DataError, match=r"scores\.json: missing.*make evaluate"):
        report.run(paths, competition=RIBONANZA, name="all")


@pytest.mark.parametrize("what", ["train", "folds", "predictions"])
def test_scores_of_earlier_tables_are_not_shown_beside_new_ones(values, tmp_path, what):
    """After make ensemble and without make evaluate, the page drew new predictions under the score of the old ones."""
    shutil.copytree(values[0].root, tmp_path / "artifacts")
    paths = make_paths(tmp_path)
    tables = {"train": paths.clean("train"), "folds": paths.fold_table(SPLIT)}
    table = tables.get(what, paths.ensemble_dir("all") / "oof.parquet")
    pl.read_parquet(table).write_parquet(table, compression="uncompressed")
    with pytest.raises(DataError, match=rf"{table.name}: became another one since it was scored. .* evaluate NAME=all"):
        report.run(paths, competition=RIBONANZA, name="all")


def test_a_broken_metrics_log_is_named_and_leaves_no_page(values, tmp_path):
    shutil.copytree(values[0].root, tmp_path / "artifacts")
    paths = make_paths(tmp_path)
    (paths.ensemble_dir("all") / "report.html").unlink()
    log = paths.fold_dir("a.sim80_k3", 0) / "metrics.jsonl"
    log.write_text("not json\n" + log.read_text())
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 1 is not JSON"):
        report.run(paths, competition=RIBONANZA, name="all")
    assert not (paths.ensemble_dir("all") / "report.html").exists()


def test_text_is_escaped_and_markup_is_not():
    assert page.text("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert page.text(page.text("a < b")) == "a &lt; b"
    assert page.element("p", "<i>", title='"x"') == '<p title="&quot;x&quot;">&lt;i&gt;</p>'
    assert page.number(None) == "–"
    assert page.number(12345.678, 1) == "12,345.7"


def test_the_better_bar_is_not_longer_than_the_page(values):
    widths = re.findall(r"width: ([\d.]+)%", values[1].outputs["report"].read_text())
    assert widths
    assert max(map(float, widths)) == 100.0
