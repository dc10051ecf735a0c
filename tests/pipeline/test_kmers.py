"""Words are counted in parts, with the same counts, in memory that follows the part and not the set."""

import tracemalloc

import numpy as np
import pytest

from pipeline import kmers
from pipeline.ridge import View


@pytest.mark.parametrize("length", [0, 20])
def test_parts_do_not_change_what_is_counted(length, rng, monkeypatch):
    texts = ["".join(rng.choice(list("ACGUN"), size=length or int(rng.integers(1, 90)))) for _ in range(60)]
    view = View.of(texts, "ACGUN")
    assert view.span == length
    whole = kmers.count_words(texts, "ACGU", 3), view.features(texts)
    monkeypatch.setattr(kmers, "_LETTERS", 100)
    assert len(list(kmers.in_parts(texts))) > 10
    assert [text for part in kmers.in_parts(texts) for text in part] == texts
    for before, after in zip(whole, (kmers.count_words(texts, "ACGU", 3), view.features(texts)), strict=True):
        assert (before != after).nnz == 0


def test_counting_needs_little_beside_the_counts(rng, monkeypatch):
    """100 bytes for each letter of the set: 1.0 GB for 100,000 sequences of 100 nt."""
    monkeypatch.setattr(kmers, "_LETTERS", 1 << 14)
    texts = ["".join(row) for row in np.array(list("ACGU"))[rng.integers(0, 4, (5000, 100))]]
    tracemalloc.start()
    kmers.count_words(texts, "ACGU", 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 5000 * 100
