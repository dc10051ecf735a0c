"""Notebooks on Kaggle: what is sent there, what runs there, how it is followed and fetched, and a rehearsal here."""
