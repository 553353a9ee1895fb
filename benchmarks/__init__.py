"""Measurements beside peers in the same run: `make bench-embedding`; figures are kept in RESULTS.md."""
