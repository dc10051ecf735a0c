"""Templates for a target: who may be used, how each aligns, and what is known of the match.

Letters: L target length, M template length (nt), N templates, T residues of all templates, W their words,
K probable pairs, P aligned residues, F features, 3 xyz. Lengths in Å.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property

import numpy as np

from pipeline.schema import CANONICAL_PAIRS, encode
from pipeline.structure.assembly import trace_from_pairs
from pipeline.structure.geometry import SHORTEST_STEP, similarity
from pipeline.structure.secondary import LEAST_PROBABILITY, nested_pairs, stacking_pairs, without_lone_pairs
from pipeline.templates.align import CLOSING, OPENING, UNPAIRED, Costs, Mode, align_all, letter_scores, state_scores
from pipeline.templates.gate import allowed_mask, entry_of
from pipeline.templates.pairs import pairs_from_trace
from pipeline.templates.transfer import complete, transfer

#: What the ranker reads of a match, all dimensionless.
FEATURES = (
    "score per residue",
    "score, normalised by both lengths",
    "identity of aligned letters",
    "share of the expected pairs that the template has",
    "template pairs per residue",
    "expected pairs of these",
    "surplus template pairs",
    "expected pairs that are missing",
    "share of template pairs with canonical letters",
    "template pairs with one residue in a gap",
    "mean probability of the template's states",
    "expected pairs per residue",
    "log template length",
    "log length ratio",
    "coverage",
    "log target length",
    "gaps per residue",
    "torn steps per residue",
    "log radius of gyration, per L^0.4",
    "longest uncovered stretch",
    "likeness to the most alike other template",
)

MODES: tuple[Mode, ...] = ("global", "local")
_COSTS = Costs()
_ALIGNED = 500  # templates of each kind (shared words, like length) that are aligned, where there are more
_WORD = 6  # nt
_KEPT = 30  # alignments of each mode that are looked at in detail
_COPIES = 3  # of them with one and the same sequence
_LEAST = 3  # residues to transfer
_TORN = 8.0  # Å
_CANONICAL = np.zeros((4, 4), dtype=bool)
_CANONICAL[tuple(encode("".join(CANONICAL_PAIRS)).reshape(-1, 2).T)] = True


@dataclass(frozen=True, kw_only=True)
class Target:
    """A sequence that needs a structure."""

    target_id: str
    sequence: str
    cutoff: date | None
    pairs_K: tuple[np.ndarray, np.ndarray, np.ndarray]  # i < j and probability, sorted by i, then j
    profile_L4: np.ndarray  # shares of the letters in its relatives; one-hot if there are none

    @staticmethod
    def of(
        target_id: str,
        sequence: str,
        *,
        cutoff: date | None = None,
        pairs_K: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
        profile_L4: np.ndarray | None = None,
    ) -> "Target":
        """A target; without pairing probabilities stems count by their stacking energy."""
        i_K, j_K, p_K = stacking_pairs(sequence) if pairs_K is None else pairs_K
        order = np.lexsort((j_K, i_K))
        in_order = (i_K[order].astype(np.int64), j_K[order].astype(np.int64), p_K[order].astype(np.float64))
        own = np.eye(4)[encode(sequence)] if profile_L4 is None else profile_L4
        return Target(target_id=target_id, sequence=sequence, cutoff=cutoff, pairs_K=in_order, profile_L4=own)

    def __len__(self) -> int:
        return len(self.sequence)

    @cached_property
    def tokens(self) -> np.ndarray:
        """[L] letters, index into the alphabet."""
        return encode(self.sequence)

    @cached_property
    def states(self) -> np.ndarray:
        """[L, 3] probabilities of unpaired, opening, closing."""
        i_K, j_K, p_K = self.pairs_K
        opening_L, closing_L = np.bincount(i_K, p_K, len(self)), np.bincount(j_K, p_K, len(self))
        total_L = np.maximum(opening_L + closing_L, 1.0)  # stacking pairs do not add up to probabilities
        opening_L, closing_L = opening_L / total_L, closing_L / total_L
        return np.stack([1.0 - opening_L - closing_L, opening_L, closing_L], axis=1)

    @cached_property
    def nested(self) -> list[tuple[int, int]]:
        """The pairs of its most accurate nested structure."""
        i_K, j_K, p_K = self.pairs_K
        likely = (p_K >= LEAST_PROBABILITY) & (j_K - i_K > 3)
        return without_lone_pairs(nested_pairs(len(self), i_K[likely], j_K[likely], p_K[likely]))

    @cached_property
    def novo(self) -> np.ndarray:
        """[L, 3] a trace from pairing alone, of which gaps are filled."""
        return trace_from_pairs(len(self), self.nested, np.random.default_rng(0))

    def probability(self, i_P: np.ndarray, j_P: np.ndarray) -> np.ndarray:
        """[P] probability of some pairs, ``i < j``."""
        key_K = self.pairs_K[0] * len(self) + self.pairs_K[1]
        if not len(key_K):
            return np.zeros(len(i_P))
        key_P = i_P * len(self) + j_P
        place_P = np.minimum(np.searchsorted(key_K, key_P), len(key_K) - 1)
        return np.where(key_K[place_P] == key_P, self.pairs_K[2][place_P], 0.0)


@dataclass(frozen=True, kw_only=True)
class Library:
    """Known structures, residues of all chains one after the other."""

    ids: tuple[str, ...]
    sequences: tuple[str, ...]
    dates_N: np.ndarray  # datetime64[D] of release, NaT = unknown
    folds_N: np.ndarray  # int64: fold of a training target, -1 = from elsewhere
    offsets: np.ndarray  # int64 [N + 1]
    tokens_T: np.ndarray  # uint8
    xyz_T3: np.ndarray  # Å, NaN where unresolved
    partner_T: np.ndarray  # int64, within the chain; -1 = none
    state_T: np.ndarray  # uint8

    @staticmethod
    def of(
        ids: Sequence[str],
        sequences: Sequence[str],
        traces: Sequence[np.ndarray],
        *,
        dates: Sequence[date | None],
        folds: Sequence[int],
    ) -> "Library":
        """Read pairs from the geometry and put the chains together.

        Args:
            ids: [N] unique names.
            sequences: [N] letters A, C, G, U.
            traces: [N] of [M, 3] Å, NaN where unresolved.
            dates: [N] of release.
            folds: [N] fold of a training target, -1 = from elsewhere.
        """
        partners = [pairs_from_trace(letters, xyz) for letters, xyz in zip(sequences, traces, strict=True)]
        partner_T = np.concatenate([np.empty(0, dtype=np.int64), *partners])
        within_T = np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(len(part)) for part in partners)])
        state_T = np.where(partner_T < 0, UNPAIRED, np.where(partner_T > within_T, OPENING, CLOSING))
        return Library(
            ids=tuple(ids),
            sequences=tuple(sequences),
            dates_N=np.array([day or "NaT" for day in dates], dtype="datetime64[D]"),
            folds_N=np.array(folds, dtype=np.int64),
            offsets=np.cumsum([0, *map(len, sequences)]),
            tokens_T=encode("".join(sequences)),
            xyz_T3=np.concatenate([np.empty((0, 3)), *traces]),
            partner_T=partner_T,
            state_T=state_T.astype(np.uint8),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N] nt."""
        return np.diff(self.offsets)

    @cached_property
    def words(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct words of all chains, sorted, and the chain of each."""
        each = [_words(self.tokens_T[self.part(n)]) for n in range(len(self))]
        word_W, chain_W = np.concatenate(each), np.repeat(np.arange(len(self)), [len(words) for words in each])
        order = np.argsort(word_W, kind="stable")
        return word_W[order], chain_W[order]

    def shared_words(self, tokens_L: np.ndarray) -> np.ndarray:
        """[N] how many distinct words each chain has in common with a sequence."""
        word_W, chain_W = self.words
        own = _words(tokens_L)
        starts, stops = np.searchsorted(word_W, own, side="left"), np.searchsorted(word_W, own, side="right")
        found = [chain_W[a:b] for a, b in zip(starts, stops, strict=True)]
        return np.bincount(np.concatenate([np.empty(0, dtype=np.int64), *found]), minlength=len(self))

    def part(self, n: int) -> slice:
        """Where a chain's residues are."""
        return slice(int(self.offsets[n]), int(self.offsets[n + 1]))


@dataclass(frozen=True, kw_only=True)
class Match:
    """A template on a target."""

    template: int  # position in the library
    partner_L: np.ndarray  # template residue at every target residue, -1 = none
    identity: float  # share of the shorter sequence
    features_F: np.ndarray
    xyz_L3: np.ndarray  # Å: copied, gaps filled, not refined

    def without_trace(self) -> "Match":
        """The same without its coordinates, which the alignment brings back."""
        return replace(self, xyz_L3=np.empty((0, 3)))


def find_matches(
    target: Target, library: Library, usable_N: np.ndarray, *, related: float | None = None
) -> list[Match]:
    """The templates that align best with a target, each with what a ranker wants to know.

    Args:
        target: whose structure is wanted.
        library: known structures.
        usable_N: [N] bool, which of them may be used at all; the date gate is applied here.
        related: chains without a fold are left out from this identity on: they may be the held-out target itself.

    Returns:
        At most 30 of each mode; not in order.
    """
    chosen = _prefiltered(target, library, np.flatnonzero(usable_N & released_for(target, library)))
    if not len(chosen):
        return []
    tokens_T, state_T, offsets = _packed(library, chosen)
    letters_L4, states_L3 = letter_scores(target.profile_L4, _COSTS), state_scores(target.states, _COSTS)
    found = []
    for mode in MODES:
        score_N, partner_NL = align_all(letters_L4, states_L3, tokens_T, state_T, offsets, mode=mode, costs=_COSTS)
        normalised_N = score_N / np.sqrt(library.lengths[chosen] * len(target))
        copies: Counter[str] = Counter()
        for place in np.argsort(-normalised_N, kind="stable"):
            sequence = library.sequences[chosen[place]]
            if sum(copies.values()) == _KEPT:
                break
            if copies[sequence] < _COPIES:
                match = _match(target, library, int(chosen[place]), float(score_N[place]), partner_NL[place])
                if match:
                    copies[sequence] += 1
                    found.append(match)
    if related is not None:
        close = {match.template for match in found if match.identity >= related and library.folds_N[match.template] < 0}
        found = [match for match in found if match.template not in close]
    return _with_agreement(found)


def released_for(target: Target, library: Library) -> np.ndarray:
    """[N] bool: which chains the date gate lets through."""
    mask_N = allowed_mask(target.cutoff, library.dates_N)
    own = entry_of(target.target_id)
    if target.cutoff is not None and own:
        mask_N &= np.array([entry_of(name) != own for name in library.ids], dtype=bool)
    return mask_N


def _with_agreement(matches: list[Match]) -> list[Match]:
    """Add the last feature: templates that give one and the same fold are seldom both wrong."""
    if not matches:
        return []
    alike_MM = similarity([match.xyz_L3 for match in matches])
    template_M = np.array([match.template for match in matches])
    alike_MM[template_M[:, None] == template_M] = 0.0
    rows = zip(matches, alike_MM.max(axis=1), strict=True)
    return [replace(match, features_F=np.append(match.features_F, alike)) for match, alike in rows]


def _words(tokens_L: np.ndarray) -> np.ndarray:
    if len(tokens_L) < _WORD:
        return np.empty(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens_L, _WORD).astype(np.int64)
    return np.unique(windows @ 4 ** np.arange(_WORD))


def _prefiltered(target: Target, library: Library, usable: np.ndarray) -> np.ndarray:
    """Positions to align: all, or those with the most words in common and those of the most similar length."""
    if len(usable) <= 2 * _ALIGNED:
        return usable
    share_N = library.shared_words(target.tokens)[usable] / np.sqrt(library.lengths[usable])
    unlike_N = np.abs(np.log(library.lengths[usable] / len(target)))
    by_words = np.argsort(-share_N, kind="stable")[:_ALIGNED]
    by_length = np.argsort(unlike_N, kind="stable")[:_ALIGNED]
    return usable[np.union1d(by_words, by_length)]


def _packed(library: Library, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Letters, states and offsets of some chains."""
    if len(chosen) == len(library):
        return library.tokens_T, library.state_T, library.offsets
    parts = [library.part(n) for n in chosen]
    tokens_T = np.concatenate([library.tokens_T[part] for part in parts])
    state_T = np.concatenate([library.state_T[part] for part in parts])
    return tokens_T, state_T, np.concatenate([[0], np.cumsum(library.lengths[chosen])])


def _match(target: Target, library: Library, n: int, score: float, partner_L: np.ndarray) -> Match | None:
    part = library.part(n)
    copied_L3 = transfer(partner_L, library.xyz_T3[part])
    if np.isfinite(copied_L3[:, 0]).sum() < _LEAST:
        return None
    xyz_L3 = complete(copied_L3, target.novo)
    own_P = np.flatnonzero(partner_L >= 0)
    same = int(np.sum(target.tokens[own_P] == library.tokens_T[part][partner_L[own_P]]))
    scores = [score / len(target), score / math.sqrt(len(target) * library.lengths[n]), same / len(own_P)]
    features_F = np.array(
        [*scores, *_pair_features(target, library, part, partner_L), *_shape_features(copied_L3, xyz_L3, partner_L)]
    )
    shorter = min(len(target), int(library.lengths[n]))
    return Match(
        template=n,
        partner_L=partner_L,
        identity=same / shorter,
        features_F=features_F,
        xyz_L3=xyz_L3,
    )


def _pair_features(target: Target, library: Library, part: slice, partner_L: np.ndarray) -> list[float]:
    """Agreement of the pairs that the target should form with those that the template has."""
    length, size = len(target), part.stop - part.start
    back_M = np.full(size, -1)
    own_P = np.flatnonzero(partner_L >= 0)
    back_M[partner_L[own_P]] = own_P
    mate_P = library.partner_T[part][partner_L[own_P]]
    opens_P = mate_P > partner_L[own_P]
    i, j = own_P[opens_P], back_M[mate_P[opens_P]]
    whole = j >= 0
    i, j = i[whole], j[whole]
    agreed = float(target.probability(i, j).sum())
    expected = float(target.pairs_K[2].sum())
    canonical = float(_CANONICAL[target.tokens[i], target.tokens[j]].mean()) if len(i) else 0.0
    states = target.states[own_P, library.state_T[part][partner_L[own_P]]]
    return [
        agreed / max(expected, 1.0),
        len(i) / length,
        agreed / length,
        (len(i) - agreed) / length,
        (expected - agreed) / length,
        canonical,
        float(np.sum(opens_P) - len(i)) / length,
        float(states.mean()),
        expected / length,
        math.log(size),
        math.log(size / length),
    ]


def _shape_features(copied_L3: np.ndarray, xyz_L3: np.ndarray, partner_L: np.ndarray) -> list[float]:
    """Coverage, gaps, torn steps and compactness of the transferred trace."""
    length, known_L = len(xyz_L3), np.isfinite(copied_L3[:, 0])
    own_P = np.flatnonzero(partner_L >= 0)
    gaps = np.sum(np.diff(own_P) > 1) + np.sum(np.diff(partner_L[own_P]) > 1)
    steps = np.linalg.norm(np.diff(xyz_L3, axis=0), axis=1)
    spread = math.sqrt(float(np.mean(np.sum((xyz_L3 - xyz_L3.mean(axis=0)) ** 2, axis=1))))
    edges = np.flatnonzero(np.concatenate([[True], known_L, [True]]))
    return [
        float(known_L.mean()),
        math.log(length),
        float(gaps) / length,
        float(np.sum(steps > _TORN)) / length,
        math.log(max(spread, SHORTEST_STEP) / length**0.4),
        float(np.diff(edges).max() - 1) / length,
    ]
