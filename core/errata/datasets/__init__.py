"""Benchmarks as requests: one module per data set."""
