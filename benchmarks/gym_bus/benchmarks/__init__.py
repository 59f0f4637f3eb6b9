"""Benchmarks: the catalogue, their data, and the rows that jobs run on."""
