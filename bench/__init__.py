"""Benchmarks: every figure with its floor, measured in the same run."""
