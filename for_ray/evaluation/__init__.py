"""Measures: how good a ranking is (`ranking.py`) and what an exact search would have found (`exact.py`)."""
