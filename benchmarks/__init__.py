"""Benchmarks of fastfocal: `pytest --benchmark-only`, then `python -m benchmarks.report`. See README.md."""
