"""Networks: PyTorch code. The imports below are the registry that one can read."""

from models import drsn, hyena, ribonanza_mamba, transformer_sepconv
from models.registry import create_model, list_models

__all__ = ["create_model", "drsn", "hyena", "list_models", "ribonanza_mamba", "transformer_sepconv"]
