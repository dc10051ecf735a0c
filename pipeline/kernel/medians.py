"""What a notebook writes where it predicts nothing: training's medians of each nucleotide, packed with its weights."""

import numpy as np
import polars as pl

from pipeline.competitions.base import Competition
from pipeline.paths import Paths
from pipeline.schema import ALPHABET, encode
from pipeline.tables import read_batches

_SEQUENCES = 20_000  # of training, that the medians are of


def training_medians(paths: Paths, competition: Competition) -> dict[str, list[float]]:
    """Letter, or ``any``, -> median of each target over the scored sequences; {} where no training data are here."""
    if not paths.clean("train").is_file():
        return {}
    letters, values, seen = list[np.ndarray](), list[np.ndarray](), 0
    for batch in read_batches(paths.clean("train"), ["sequence", "scored", *competition.targets]):
        batch = batch.filter("scored").drop_nulls(list(competition.targets))
        letters.append(encode("".join(batch["sequence"])))
        flat = [batch[target].explode(empty_as_null=False).cast(pl.Float32) for target in competition.targets]
        values.append(np.stack([each.to_numpy() for each in flat], axis=1))
        seen += batch.height
        if seen >= _SEQUENCES:
            break
    token_T, value_TC = np.concatenate(letters), np.concatenate(values)
    if competition.target_range:
        value_TC = np.clip(value_TC, *competition.target_range)
    found = {letter: value_TC[token_T == token] for token, letter in enumerate(ALPHABET)} | {"any": value_TC}
    if any(np.isnan(those_TC).all(axis=0).any() for those_TC in found.values()):
        return {}  # a letter that no scored sequence has
    return {letter: np.nanmedian(those_TC, axis=0).astype(float).tolist() for letter, those_TC in found.items()}
