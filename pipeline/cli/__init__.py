"""The program ``rna``: one verb per stage. The roof of the house: the only package that may call every other.

Verbs import what they need when they run, so that `rna --help` and the stages without a network start at once.
"""

# imported for their verbs, in the order of the help
from pipeline.cli import start, data, no_network, training, predictions, kaggle, scores, benchmarks  # noqa: F401, I001
from pipeline.cli.program import app, show
from pipeline.cli.process import main, run_verb

__all__ = ["app", "main", "run_verb", "show"]
