"""Routers in front of real vLLM engines under `ray.serve.llm`, on CPUs."""
