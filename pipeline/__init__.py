"""Raw competition files to predictions, one fold at a time."""
