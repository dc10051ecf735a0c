"""Networks: PyTorch code, never saved weights."""
