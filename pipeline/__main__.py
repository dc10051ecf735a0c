"""``python -m pipeline <verb>``: the same program as ``rna``."""

from pipeline.cli import main

main()
