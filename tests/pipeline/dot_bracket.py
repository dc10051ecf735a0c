"""Secondary structures of tests, as they are written."""


def pairs_of(dots: str) -> list[tuple[int, int]]:
    """0-based pairs of a nested structure in dot-bracket notation, sorted.

    >>> pairs_of("((...).)")
    [(0, 7), (1, 5)]
    """
    opened, pairs = [], []
    for place, sign in enumerate(dots):
        if sign == "(":
            opened.append(place)
        elif sign == ")":
            pairs.append((opened.pop(), place))
    return sorted(pairs)
