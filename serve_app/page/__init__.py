"""The live page: HTML, JSON, metrics."""
