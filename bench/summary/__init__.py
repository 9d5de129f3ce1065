"""One page and one file for all benchmarks, from their committed rows: `python -m bench.summary`."""
