"""Benchmarks: simulation, live cluster, forecasts, micro."""
