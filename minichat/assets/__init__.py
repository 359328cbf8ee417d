"""The embedded default: a tiny base model (base/) and the generators of its data (sums.py)."""
