"""Name -> network. One decorator, one dict, no import by string."""
