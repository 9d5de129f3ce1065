"""Runnable examples: five programs to copy from, and the demo with its model and its arrivals. See README.md."""
