"""A language model behind Shadecast's router: Ray's LLM server, vLLM's CPU build, a tiny random model."""
