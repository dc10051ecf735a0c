"""Competition files: written, checked, scored, reported."""
