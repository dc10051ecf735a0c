"""Classes by counting words: naive Bayes of k-mers as a run of its own, beside those of networks.

On a small set counting beats many a network, and an ensemble with this run is out of fold no worse than either. How far
the counts are to be believed, one number, is learned on the folds that it is fitted on, from what each is told by the
rest of them: multinomial naive Bayes left to itself is far too sure. Of two or three folds the rest is too little (of
three: log loss 0.49 where all others give 0.33, on five families of RNA), so there each is told by all others, the
predicted fold among them.

Letters: N sequences, n some of them, K classes, V words (k-mers), F folds, T letters of all sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
from scipy.sparse import csr_matrix

from pipeline.classes import Classes, letters_of, log_losses, read_classes
from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.stage import Report, run_stage
from pipeline.tables import labels_that_count, open_parquet

#: Raised when the same tables give other predictions than before.
VERSION = 1
#: Most words: 6-mers of RNA, 3-mers of proteins.
MOST_WORDS = 8192

_LEARN_FROM = 20_000  # sequences by which the belief in the counts is tuned
_MODEL = "words.parquet"
#: Files of a run that `apply` needs on another machine.
CARRIED = (_MODEL,)


def run_name(split: str) -> str:
    """Of the run that this stage writes, as ensembles are given it."""
    return f"words.{split}"


def run(paths: Paths, *, competition: Competition, split: str) -> Report:
    """Write ``runs/words.<split>/fold<k>/{oof,test}.parquet``, which ensembles take like those of a network.

    Args:
        paths: clean and fold tables.
        competition: a labelled set.
        split: name of the split, whose fold table exists.

    Returns:
        Facts: ``k``, ``score`` (log loss out of fold).

    Raises:
        ConfigError: the competition is not about classes.
        DataError: a table is missing, damaged or of other data, or the split has a single fold.
    """
    _require_classes(competition)
    inputs = {"train": paths.clean("train"), "classes": paths.clean("classes"), "folds": paths.fold_table(split)}
    inputs |= {"test": paths.clean("test")} if paths.clean("test").is_file() else {}
    for label, path in inputs.items():
        open_parquet(path, ("sequence_id", "fold") if label == "folds" else ()).close()
    classes, table = read_classes(paths), _read_train(paths, split)
    folds = table["fold"].unique().sort().to_list()
    name = run_name(split)
    outputs = {f"fold{fold}/oof": paths.oof(name, fold) for fold in folds}
    outputs |= {f"fold{fold}/test": paths.test(name, fold) for fold in folds if "test" in inputs}

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        models, facts = _fit(table, classes)
        _write_models(models, parts["model"])
        for fold, model in models.items():
            model.predict(table.filter(fold=fold), classes).write_parquet(parts[f"fold{fold}/oof"])
        if "test" in inputs:
            _write_test(paths, models, classes, parts)
        told = pl.concat([pl.read_parquet(parts[f"fold{fold}/oof"]) for fold in folds])
        return facts | {"score": _score(table.join(told, on="sequence_id", validate="1:1"), classes)}

    return run_stage(
        "words",
        inputs=inputs,
        outputs=outputs | {"model": paths.run_dir(name) / _MODEL},
        params={"version": VERSION, "split": split},
        build=build,
        manifest=paths.run_dir(name) / "words.manifest.json",
    )


def apply(paths: Paths, *, competition: Competition, split: str, source: Path) -> Report:
    """Write the test tables alone, with what an earlier `run` counted: in a notebook that has no training data.

    Args:
        paths: the clean test table, and the classes.
        competition: a labelled set.
        split: of the earlier run.
        source: folder of the earlier run, ``runs/words.<split>``.

    Raises:
        ConfigError: the competition is not about classes.
        DataError: a table is missing or damaged.
    """
    _require_classes(competition)
    classes, name = read_classes(paths), run_name(split)
    open_parquet(source / _MODEL, ("fold", "factor", "frequency", "weights")).close()
    models = _read_models(source / _MODEL)

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        return {"test": _write_test(paths, models, classes, parts)}

    return run_stage(
        "words",
        inputs={"test": paths.clean("test"), "classes": paths.clean("classes"), "model": source / _MODEL},
        outputs={f"fold{fold}/test": paths.test(name, fold) for fold in models},
        params={"version": VERSION, "split": split, "test_only": True},
        build=build,
        manifest=paths.run_dir(name) / "words.manifest.json",
    )


def describe(facts: dict[str, Any]) -> list[str]:
    """What `run` or `apply` did, as lines for a terminal."""
    if "score" not in facts:
        return [f"{facts['test']:,} test sequences"]
    return [f"naive Bayes, {facts['k']}-mers: log loss {facts['score']:.4f} out of fold"]


def _require_classes(competition: Competition) -> None:
    if competition.task != "classes":
        raise ConfigError(f"words: {competition.name} is not a labelled set. Next: COMP=labelled-<name>.")


# -------------------------------------------------------------------------------------------------------------- stage


@dataclass(frozen=True, kw_only=True)
class Model:
    """What predicts the sequences of one fold and, with those of the other folds, the test set."""

    weights_KV: np.ndarray  #: float32: log probability of every word in each class; of several labels, less the rest's
    frequent_K: np.ndarray  #: float64: share of every class
    factor: float  #: how far words are believed: 0 not at all, 1 as if they were independent

    def predict(self, table: pl.DataFrame, classes: Classes) -> pl.DataFrame:
        """``sequence_id``, ``fold`` where the table has it, ``probabilities``, in the order of the ids."""
        rows = table.sort("sequence_id")
        letters = letters_of(classes.alphabet)
        words_NV = count_words(rows["sequence"].to_list(), letters, longest_words(len(letters), MOST_WORDS))
        said_NK = mix(self.frequent_K, words_NV @ self.weights_KV.T, self.factor, exclusive=classes.exclusive)
        kept = [name for name in ("sequence_id", "fold") if name in rows.columns]
        lists = pl.Series("probabilities", said_NK.astype(np.float32)).cast(pl.List(pl.Float32))
        return rows.select(kept).with_columns(lists)


def _read_train(paths: Paths, split: str) -> pl.DataFrame:
    """``sequence_id, sequence, labels, scored, fold`` of every training sequence."""
    train = pl.read_parquet(paths.clean("train"), columns=["sequence_id", "sequence", "labels", "scored"])
    folds = pl.read_parquet(paths.fold_table(split), columns=["sequence_id", "fold"])
    table = train.join(folds, on="sequence_id", how="left", maintain_order="left", validate="1:1")
    if table["fold"].null_count() or folds.height != train.height or folds["fold"].n_unique() < 2:
        raise DataError(
            f"{paths.fold_table(split)}: not the folds of {paths.clean('train')}, or a single one; expected one for "
            f"each sequence, of two or more. Next: make folds COMP={paths.comp} SPLIT={split}."
        )
    return table.with_columns(pl.col("fold").cast(pl.UInt8))


def _fit(table: pl.DataFrame, classes: Classes) -> tuple[dict[int, Model], dict[str, Any]]:
    """The model of every fold, fitted on the labelled sequences of the others."""
    labelled = table.filter("scored")
    letters = letters_of(classes.alphabet)
    k = longest_words(len(letters), MOST_WORDS)
    truth_NK = labels_that_count(labelled, width=len(classes.names)) > 0.5
    known = Known(truth_NK, labelled["fold"].to_numpy(), exclusive=classes.exclusive)
    bayes = NaiveBayes(count_words(labelled["sequence"].to_list(), letters, k), known)
    models = {
        fold: Model(
            weights_KV=bayes.weights({fold}).astype(np.float32),
            frequent_K=known.frequencies({fold}),
            factor=learn_factor(bayes, known, fold),
        )
        for fold in table["fold"].unique().sort().to_list()
    }
    return models, {"k": k, "factors": [round(model.factor, 4) for model in models.values()]}


def _score(table: pl.DataFrame, classes: Classes) -> float:
    scored = table.filter("scored")
    said_NK = np.array(scored["probabilities"].to_list())
    truth_NK = labels_that_count(scored, width=len(classes.names)) > 0.5
    return float(log_losses(said_NK, truth_NK, exclusive=classes.exclusive).mean())


def _write_test(paths: Paths, models: dict[int, Model], classes: Classes, parts: dict[str, Path]) -> int:
    test = pl.read_parquet(paths.clean("test"), columns=["sequence_id", "sequence"])
    for fold, model in models.items():
        model.predict(test, classes).write_parquet(parts[f"fold{fold}/test"])
    return test.height


def _write_models(models: dict[int, Model], path: Path) -> None:
    pl.DataFrame(
        {
            "fold": [fold for fold, model in models.items() for _ in model.frequent_K],
            "factor": [model.factor for model in models.values() for _ in model.frequent_K],
            "frequency": np.concatenate([model.frequent_K for model in models.values()]),
            "weights": pl.Series(np.concatenate([model.weights_KV for model in models.values()])),
        }
    ).cast({"fold": pl.UInt8, "weights": pl.List(pl.Float32)}).write_parquet(path, compression="zstd")


def _read_models(path: Path) -> dict[int, Model]:
    parts = pl.read_parquet(path).partition_by("fold", as_dict=True, maintain_order=True)
    return {
        fold: Model(
            weights_KV=np.array(part["weights"].to_list(), dtype=np.float32),
            frequent_K=part["frequency"].to_numpy(),
            factor=part["factor"][0],
        )
        for (fold,), part in parts.items()
    }


# -------------------------------------------------------------------------------------------------------------- words


def longest_words(letters: int, most: int) -> int:
    """The longest k for which there are at most so many k-mers.

    >>> longest_words(4, 8192), longest_words(20, 8192), longest_words(20, 512)
    (6, 3, 2)
    """
    return max(k for k in range(1, 9) if letters**k <= most or k == 1)


def count_words(sequences: Sequence[str], letters: str, k: int) -> csr_matrix:
    """[N, V] float32: how often each k-mer occurs, those with other letters left out; V = len(letters) ** k.

    >>> count_words(["ACACNA", "G"], "ACGU", 2).toarray()[:, [1, 4]].tolist()
    [[2.0, 1.0], [0.0, 0.0]]
    """
    lengths_N = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    place = np.full(256, -1)
    place[np.frombuffer(letters.encode(), dtype=np.uint8)] = np.arange(len(letters))
    token_T = place[np.frombuffer("".join(sequences).encode(), dtype=np.uint8)]
    start_T = np.flatnonzero(np.arange(len(token_T)) + k <= np.repeat(np.cumsum(lengths_N), lengths_N))
    parts_TK = np.stack([token_T[start_T + shift] for shift in range(k)], axis=1)
    known_T = (parts_TK >= 0).all(axis=1)
    word_T = parts_TK[known_T] @ len(letters) ** np.arange(k)[::-1]
    owner_T = np.repeat(np.arange(len(sequences)), lengths_N)[start_T[known_T]]
    ones_T = np.ones(len(word_T), dtype=np.float32)
    return csr_matrix((ones_T, (owner_T, word_T)), shape=(len(sequences), len(letters) ** k))


# ---------------------------------------------------------------------------------------------------------- naive Bayes


class Known:
    """The truth, and what it says of the classes without some of the folds."""

    def __init__(self, truth_NK: np.ndarray, fold_N: np.ndarray, *, exclusive: bool) -> None:
        self.truth_NK, self.fold_N, self.exclusive = truth_NK, fold_N, exclusive
        self.folds: list[int] = np.unique(fold_N).tolist()

    def without(self, folds: set[int]) -> np.ndarray:
        """[N] bool: sequences of other folds."""
        return ~np.isin(self.fold_N, list(folds))

    def frequencies(self, folds: set[int]) -> np.ndarray:
        """[K] share of every class without some folds, counted with one more of each kind."""
        truth_nK = self.truth_NK[self.without(folds)]
        return (truth_nK.sum(axis=0) + 1.0) / (len(truth_nK) + (truth_nK.shape[1] if self.exclusive else 2))


class Floor(Protocol):
    """Evidence for classes, from the sequences outside some folds."""

    def evidence(self, rows_n: np.ndarray, without: set[int]) -> np.ndarray:
        """[n, K] for the sequences at some places, all of one fold."""

    def mix(self, frequent_nK: np.ndarray, evidence_nK: np.ndarray, factor: float) -> np.ndarray:
        """[n, K] probabilities: class frequencies where `factor` is 0, and what the evidence says where it is 1."""


class NaiveBayes:
    """Multinomial naive Bayes with add-one smoothing; of several labels, each class against the rest."""

    def __init__(self, words_NV: csr_matrix, known: Known) -> None:
        self._words_NV, self._known = words_NV, known
        sums = [self._sums(known.fold_N == fold) for fold in known.folds]
        self._inside_FKV, self._all_FV = (np.stack(parts) for parts in zip(*sums, strict=True))

    def _sums(self, here_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[K, V] words in the sequences of each class, and [V] in all."""
        words_nV = self._words_NV[here_N]
        truth_nK = self._known.truth_NK[here_N].astype(np.float64)
        return (words_nV.T @ truth_nK).T, np.asarray(words_nV.sum(axis=0), dtype=np.float64).ravel()

    def evidence(self, rows_n: np.ndarray, without: set[int]) -> np.ndarray:
        """[n, K] log probability of the words in each class; of several labels, less that in the rest."""
        return self._words_NV[rows_n] @ self.weights(without).T

    def weights(self, without: set[int]) -> np.ndarray:
        """[K, V] what each word adds to the evidence, from the sequences outside some folds."""
        here_F = ~np.isin(self._known.folds, list(without))
        inside_KV, all_V = self._inside_FKV[here_F].sum(axis=0), self._all_FV[here_F].sum(axis=0)
        weight_KV = _log_shares(inside_KV)
        if not self._known.exclusive:
            weight_KV = weight_KV - _log_shares(all_V - inside_KV)
            truth_nK = self._known.truth_NK[self._known.without(without)]
            weight_KV[truth_nK.all(axis=0) | ~truth_nK.any(axis=0)] = 0.0  # nothing to compare with
        return weight_KV

    def mix(self, frequent_nK: np.ndarray, evidence_nK: np.ndarray, factor: float) -> np.ndarray:
        """[n, K] probabilities; factor 1 takes all words for independent."""
        return mix(frequent_nK, evidence_nK, factor, exclusive=self._known.exclusive)


def mix(frequent_nK: np.ndarray, evidence_nK: np.ndarray, factor: float, *, exclusive: bool) -> np.ndarray:
    """[n, K] probabilities from the shares of the classes and so much of the evidence of words."""
    if not exclusive:
        odds_nK = np.log(frequent_nK / (1 - frequent_nK)) + factor * evidence_nK
        return 1.0 / (1.0 + np.exp(-np.clip(odds_nK, -50.0, 50.0)))
    log_nK = np.log(frequent_nK) + factor * evidence_nK
    share_nK = np.exp(log_nK - log_nK.max(axis=1, keepdims=True))
    return share_nK / share_nK.sum(axis=1, keepdims=True)


def _log_shares(counts_KV: np.ndarray) -> np.ndarray:
    return np.log((counts_KV + 1.0) / (counts_KV + 1.0).sum(axis=1, keepdims=True))


# --------------------------------------------------------------------------------------------------------------- tuning


def tuned(floor: Floor, known: Known) -> np.ndarray:
    """[N, K] predictions of every fold with the factor that is best on the others."""
    tuned_NK = np.empty(known.truth_NK.shape)
    for fold in known.folds:
        mine, factor = np.flatnonzero(known.fold_N == fold), learn_factor(floor, known, fold)
        tuned_NK[mine] = floor.mix(known.frequencies({fold})[None], floor.evidence(mine, {fold}), factor)
    return tuned_NK


def learn_factor(floor: Floor, known: Known, fold: int) -> float:
    """How far evidence is to be believed in a fold: as is best on the others; the log loss is convex in it.

    Its limit is below 1: what was always right on n sequences may be wrong once in n + 2. It is 0 where the others have
    no labels.
    """
    if (known.fold_N == fold).all():
        return 0.0
    rows_n, frequent_nK, evidence_nK = _told_by_the_rest(floor, known, fold)
    truth_nK = known.truth_NK[rows_n]

    def loss(factor: float) -> float:
        said_nK = floor.mix(frequent_nK, evidence_nK, factor)
        return float(log_losses(said_nK, truth_nK, exclusive=known.exclusive).mean())

    return _least(loss, high=1.0 - 1.0 / (len(rows_n) + 2))


def _told_by_the_rest(floor: Floor, known: Known, fold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places, frequencies and evidence of the sequences of the other folds, each from the rest of them."""
    step = max(1, -(-int((known.fold_N != fold).sum()) // _LEARN_FROM))
    rows, frequent, evidence = [], [], []
    for other in known.folds:
        if other != fold:
            without = {other, fold} if len(known.folds) > 3 else {other}
            some = np.flatnonzero(known.fold_N == other)[::step]
            rows.append(some)
            frequent.append(np.repeat(known.frequencies(without)[None], len(some), axis=0))
            evidence.append(floor.evidence(some, without))
    return np.concatenate(rows), np.concatenate(frequent), np.concatenate(evidence)


def _least(loss: Callable[[float], float], *, high: float) -> float:
    """Where a convex function of [0, high] is least, to 1e-4, by golden section."""
    low, share = 0.0, (5**0.5 - 1) / 2
    inner = [high - share * (high - low), low + share * (high - low)]
    values = [loss(at) for at in inner]
    while high - low > 1e-4:
        if values[0] <= values[1]:
            high, inner[1], values[1] = inner[1], inner[0], values[0]
            inner[0] = high - share * (high - low)
            values[0] = loss(inner[0])
        else:
            low, inner[0], values[0] = inner[0], inner[1], values[1]
            inner[1] = low + share * (high - low)
            values[1] = loss(inner[1])
    return (low + high) / 2
