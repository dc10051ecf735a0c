"""A trained fold at hand in Python: its network, and predictions of any sequences, without a table or a command.

Letters: L length (nt), C target or class.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from pipeline import viennarna
from pipeline.competitions import get_competition
from pipeline.competitions.sequence_rows import known_letters
from pipeline.config import config_from_dict
from pipeline.dataset import BppArrays, ExampleSet, Features
from pipeline.errors import ConfigError, DataError
from pipeline.features import in_half
from pipeline.inference import Job, as_trained, in_batches, load_network, meta_of, not_finite
from pipeline.labels import labels_of
from pipeline.predict import predict_values
from pipeline.schema import decode, encode, normalise_sequence
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.stop import StopRequest


class Trained:
    """The best checkpoint of a fold, which carries its own configuration.

    ``Trained("artifacts/openvaccine/runs/small_hyena.sim80_k5/fold0").predict(["GGAAAC"])`` is one array, [6, 5].

    Attributes:
        model: the network, ready to predict, on the best device there is.
        targets: names of the values, classes or numbers that it predicts.
        meta: what the checkpoint says of itself: step, progress, configuration, data.

    Args:
        fold: folder of a trained fold, wherever it lies.

    Raises:
        ConfigError: the fold predicts structures, which take more than its network.
        DataError: the folder is not that of a trained fold.
        StorageError: there is no readable checkpoint, or the best one is damaged.
    """

    def __init__(self, fold: str | Path) -> None:
        store = CheckpointStore(Path(fold) / "checkpoints")
        if not store.folder.is_dir():
            raise DataError(
                f"{fold}: no checkpoints in it; expected the folder of a fold that was trained. Next: make train, or "
                "Trained('…/runs/<model>.<split>/fold<k>')."
            )
        path = store.best_folder()
        self.meta = meta_of(path)
        competition = as_trained(get_competition(self.meta["competition"]), self.meta)
        if competition.task == "structure":
            raise ConfigError(
                f"{fold}: predicts structures; expected anything else. Next: make predict COMP={competition.name}."
            )
        self._labels = labels_of(self.meta)
        self.targets = self._labels.names if self._labels else competition.targets
        self._job = Job(
            competition=competition,
            config=config_from_dict(self.meta["config"], where=f"{path}/meta.json"),
            checkpoint=path,
            examples=self._examples([]),
            positions=np.arange(0),
            fold=None,
            stop=StopRequest(),
        )
        self.model, self._device = load_network(self._job)

    def predict(self, sequences: Sequence[str], features: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
        """Predict as `make predict` does: averaged over both directions where training saw both, in float32.

        Networks that read base-pair probabilities get them from ViennaRNA.

        Args:
            sequences: RNA or DNA, or letters of the labelled set; odd ones as `make predict` takes them.
            features: of each sequence, [L, F] or [F], where training had some (``data.features``).

        Returns:
            For each sequence its values, [L, C], or of a labelled set [C]: probabilities of classes, or numbers.

        Raises:
            ConfigError: ViennaRNA is needed and missing.
            DataError: a sequence is empty or has other letters than `make predict` takes; it is a text, no list;
                features are needed and missing, or do not fit.
            DivergedError: a prediction is not finite.
            StorageError: a single sequence does not fit into memory.
        """
        if isinstance(sequences, str):  # each of its letters would be a sequence
            raise DataError("predict: got a single text; expected a list of sequences. Next: predict([text]).")
        odd = next(((k, x) for k, x in enumerate(sequences) if not isinstance(x, str)), None)
        if odd:  # an empty cell of a table, say
            raise DataError(f"predict: sequence {odd[0]}: got {odd[1]!r}; expected letters. Next: leave it out.")
        tokens = self._tokens(sequences)
        examples = self._examples(tokens, features)
        job = replace(self._job, examples=examples, positions=np.arange(len(sequences)))
        found = [np.empty(0)] * len(sequences)
        compute = partial(predict_values, job, self.model, self._device)
        for part, values in in_batches(job, compute, device=self._device, label="predict"):
            for k, values_LC in zip(part, values, strict=True):
                if not np.isfinite(values_LC).all():
                    raise not_finite(job, k)
                found[k] = values_LC[:, 0] if self._labels else values_LC
        return found

    def _tokens(self, sequences: Sequence[str]) -> list[np.ndarray]:
        """Of a labelled set, letters by the same rules as those of a file."""
        names = [f"sequence {k}" for k in range(len(sequences))]
        if self._labels is None:
            return [encode(normalise_sequence(text, where=name)) for text, name in zip(sequences, names, strict=True)]
        if not names:
            return []
        frame = pl.DataFrame({"sequence": list(sequences), "where": names, "row": [None] * len(names)})
        return [
            encode(text, self._labels.readable) for text in known_letters(frame, self._labels.alphabet)[0]["sequence"]
        ]

    def _features(self, tokens: Sequence[np.ndarray], given: Sequence[np.ndarray]) -> Features | None:
        name = self.meta["config"]["data"].get("features", "")  # of older checkpoints, none
        width = self.meta["config"]["model"]["kwargs"].get("num_features", 0)
        if len(given) != len(tokens) * bool(name):
            wanted = (
                f"one for each of {len(tokens)}, [L, {width}] or [{width}]" if name else "none, as it reads no features"
            )
            raise DataError(
                f"predict: got {len(given)} arrays of features; expected {wanted}. Next: give as many as that."
            )
        values = [np.zeros((0, width), np.float16)]
        for k, (tokens_L, x) in enumerate(zip(tokens, given, strict=True) if name else ()):
            like = "those of training", (width,) if np.ndim(x) < 2 else (0, width)
            half = in_half(f"sequence {k}", np.asarray(x), length=len(tokens_L), like=like, where="predict")
            values.append(np.broadcast_to(half, (len(tokens_L), width)))
        return Features(name=name, key="notebook", values=np.concatenate(values), per_nucleotide=True) if name else None

    def _examples(self, tokens: Sequence[np.ndarray], features: Sequence[np.ndarray] = ()) -> ExampleSet:
        """Sequences as the arrays that the pipeline keeps of a table."""
        return ExampleSet(
            key="notebook",
            tokens_T=np.concatenate([np.zeros(0, np.uint8), *tokens]),
            offsets=_offsets(tokens),
            ids_N=np.array([f"sequence {k}".encode() for k in range(len(tokens))], dtype="S32"),
            bpp=_pair_probabilities(tokens) if "bpp" in self.meta["data"] else None,
            features=self._features(tokens, features),
            labels=self._labels,
            crop=self.meta["config"]["data"].get("crop", 0),  # of older checkpoints, none
        )


def _pair_probabilities(tokens: Sequence[np.ndarray]) -> BppArrays:
    usable, why = viennarna.available()
    if not usable:
        raise ConfigError(f"the network reads base-pair probabilities: {why}.")
    found = [viennarna.fold(decode(tokens_L)) for tokens_L in tokens]
    pairs = [np.stack([one.i_K, one.j_K], axis=1) for one in found]
    return BppArrays(
        key="notebook",
        row_N=np.arange(len(tokens)),
        offsets=_offsets(pairs),
        ij_K2=np.concatenate([np.zeros((0, 2), np.uint16), *pairs]),
        p_K=np.concatenate([np.zeros(0, np.float32), *(one.p_K for one in found)]),
    )


def _offsets(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)
