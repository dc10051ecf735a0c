"""Which sequence is held out where, and how the folds come together again."""
