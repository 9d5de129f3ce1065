"""The routers that are compared, each by what Serve is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.live.cgroups import LabError

_OURS = "serve_app.router:PredictiveRouter"
_LIVE_ONLY: Mapping[str, Any] = {"forecast_weight": 0.0}


@dataclass(frozen=True, slots=True)
class Arm:
    """One router: its import path ("" is Serve's default) and sections of our configuration, where it is ours."""

    name: str
    router: str = ""
    config: Mapping[str, Any] | None = None
    capacity_queue: bool = False

    @property
    def ours(self) -> bool:
        """Whether the control plane balances it."""
        return self.config is not None

    @property
    def over_http(self) -> bool:
        """Whether the project's gateway can be told to use it."""
        return self.router in ("", _OURS)

    def options(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a Serve deployment; `settings` are the scenario's own sections of our configuration."""
        from ray.serve.config import DeploymentActorConfig, RequestRouterConfig  # noqa: PLC0415 - slow to import

        if not self.router:
            return {}
        if self.capacity_queue:
            from ray.serve.experimental.capacity_queue import CapacityQueue  # noqa: PLC0415

            name = "capacity_queue"
            actor = DeploymentActorConfig(
                name=name,
                actor_class=CapacityQueue,
                init_kwargs={"acquire_timeout_s": 0.5, "token_ttl_s": 60.0},
                actor_options={"num_cpus": 0, "resources": {"head": 0.01}},
            )
            kwargs = {"capacity_queue_actor_name": name}
            router = RequestRouterConfig(request_router_class=self.router, request_router_kwargs=kwargs)
            return {"request_router_config": router, "deployment_actors": [actor]}
        ours: dict[str, Any] = {}
        if self.config is not None:
            ours = {"config": {s: {**settings.get(s, {}), **self.config.get(s, {})} for s in {*settings, *self.config}}}
        router = RequestRouterConfig(request_router_class=self.router, request_router_kwargs=ours)
        return {"request_router_config": router}


_ALL = (
    Arm("default"),
    Arm("round_robin", "ray.serve.experimental.round_robin_router:RoundRobinRouter"),
    Arm("consistent_hash", "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"),
    Arm("capacity_queue", "ray.serve.experimental.capacity_queue_router:CapacityQueueRouter", capacity_queue=True),
    Arm("prequal", "bench.live.prequal:PrequalRouter"),
    Arm("live_capacity", _OURS, {"balance": _LIVE_ONLY}),
    Arm("shadecast", _OURS, {}),
    Arm("shadecast_observe", "serve_app.router:ObservingRouter", {}),
    Arm("oracle", "bench.live.oracle:OracleRouter", {"balance": _LIVE_ONLY}),
)
ARMS: Mapping[str, Arm] = {arm.name: arm for arm in _ALL}


def find_arms(names: str) -> list[Arm]:
    """Arms by comma separated names. Raises LabError that lists what there is."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in ARMS:
            raise LabError(f"--arms {name!r}: unknown; known are {', '.join(ARMS)}")
    return [ARMS[name] for name in dict.fromkeys(wanted)] or list(ARMS.values())
