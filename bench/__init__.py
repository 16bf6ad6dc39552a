"""Benchmark cases, one file per op: `kimi_ops.bench.cases` when imported, and `pytest bench`."""
