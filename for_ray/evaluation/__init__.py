"""Measures: of rankings, of classification, of pseudo-labels, and what an exact search would have found."""
