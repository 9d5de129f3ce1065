"""Routers in front of language-model engines, simulated: `python -m bench.llm`."""
