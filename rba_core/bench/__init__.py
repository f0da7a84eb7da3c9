"""Benchmark sets, metrics and the methods they compare."""
