"""Data for both kinds of run: rows from files, packing, and the built-in corpus."""
