"""How the model is served: `ray.serve.llm` as in docs/llm.md, with engines that need no GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL = "tiny"
"""What clients call it."""
OURS = "serve_app.router:PredictiveRouter"
CACHE_GB = 1
"""Each engine's memory for keys and values."""
CACHE_TOKENS = 131_072
"""What fits in it: 8 kB a token with the model's usual size."""
_NEEDED = ("vllm", "transformers", "tokenizers", "pandas", "pyarrow", "smart_open", "mmh3", "psutil")
_ROOT = Path(__file__).resolve().parents[2]
SETTINGS: Mapping[str, Any] = {
    "balance": {
        "prefix": "auto",
        "resume": "openai",
        "kv_tokens": CACHE_TOKENS // 4,  # routers take four bytes for a token; here each byte is one
    },
    "trial": {"copy_methods": ["chat", "completions"]},
}
"""What our router is told."""


def missing() -> str:
    """What to do where something that is needed is not installed; empty where all is there."""
    gone = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if not gone:
        return ""
    return (
        f"examples.llm needs {', '.join(gone)}, not installed here. vLLM's CPU build takes an environment of its own "
        "(2 minutes, 3.5 GB):\n    examples/llm/install.sh .venv-llm\n    .venv-llm/bin/python -m examples.llm"
    )


def environment() -> dict[str, str]:
    """Environment of every process of the application."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        "PYTHONPATH": path,
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GB),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",  # a replica is one core's worth
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def application(
    model: Path,
    replicas: int,
    router: str = OURS,
    settings: Mapping[str, Any] | None = SETTINGS,
    *,
    server: str = "examples.llm.server:TellingServer",
    env: Mapping[str, str] | None = None,
    exact: bool = False,
) -> Any:
    """The application, to be run by `serve.run`.

    An empty `router` is Serve's default; `settings` are for ours only. `env` is in place of
    `environment()`. `exact` is for a model that is: vLLM would compute it with 16 bits.
    """
    from ray.serve.llm import LLMConfig, build_openai_app  # noqa: PLC0415 - it imports vLLM

    deployment: dict[str, Any] = {"num_replicas": replicas, "max_ongoing_requests": 64}
    if router:
        kwargs = {"config": dict(settings)} if settings else {}
        deployment["request_router_config"] = {"request_router_class": router, "request_router_kwargs": kwargs}
    config = LLMConfig(
        model_loading_config={"model_id": MODEL, "model_source": str(model)},
        deployment_config=deployment,
        server_cls=server,
        log_engine_metrics=False,  # the engine's metrics stay in its process, where `server` reads them
        accelerator_type=None,
        placement_group_config={"bundles": [{"CPU": 1}]},
        runtime_env={"env_vars": dict(env) if env is not None else environment()},
        engine_kwargs={
            "max_model_len": 8192,
            "max_num_batched_tokens": 1024,
            "enforce_eager": True,
            "enable_prefix_caching": True,
            "disable_log_stats": False,
            "tensor_parallel_size": 1,
            "dtype": "float32" if exact else "bfloat16",
        },
    )
    app: dict[str, Any] = {"llm_configs": [config]}
    if os.environ.get("RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING") != "1":
        app["ingress_deployment_config"] = {"num_replicas": 1}  # else two for each replica of the model
    return build_openai_app(app)
