"""Ray's LLM server, which tells routers how large its cache is and how full."""

from __future__ import annotations

from typing import Any

import prometheus_client
from ray.serve.llm.deployment import LLMServer


class TellingServer(LLMServer):
    """Says by `record_routing_stats` what vLLM's own metrics say. It needs `LLMConfig(log_engine_metrics=False)`."""

    async def record_routing_stats(self) -> dict[str, Any]:
        """Serve asks for it every few seconds."""
        return {**(await super().record_routing_stats()), **cache_of_engine()}


def cache_of_engine() -> dict[str, float]:
    """Tokens that the engine of this process can keep, and the fraction of them that requests take."""
    told: dict[str, float] = {}
    for family in prometheus_client.REGISTRY.collect():
        for sample in family.samples:
            if sample.name == "vllm:kv_cache_usage_perc":
                told["kv_cache_usage_perc"] = sample.value
            elif sample.name == "vllm:cache_config_info":
                blocks, size = (sample.labels.get(name, "") for name in ("num_gpu_blocks", "block_size"))
                if blocks.isdigit() and size.isdigit():
                    told["kv_tokens"] = float(int(blocks) * int(size))
    return told
