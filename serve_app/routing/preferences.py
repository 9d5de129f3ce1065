"""Serve's own preferences within what the table makes eligible: replicas with a model, on this node, in this zone."""

from __future__ import annotations

from collections.abc import Sequence

from ray.serve.request_router import PendingRequest, RunningReplica


class Preferences:
    """Laid out for one table and membership; each preference is tried once per request, as Serve does."""

    __slots__ = ("_eligible", "_held", "_near_node", "_near_zone", "_with_model")

    def __init__(
        self, eligible: Sequence[int], held: Sequence[RunningReplica], node: str | None, zone: str | None
    ) -> None:
        """`eligible` are indices into `held`. `node` and `zone` are this process's own, None if they do not matter."""
        self._eligible, self._held = eligible, held
        self._near_node = [i for i in eligible if held[i].node_id == node] if node is not None else []
        self._near_zone = [i for i in eligible if held[i].availability_zone == zone] if zone is not None else []
        self._with_model: dict[str, list[int]] = {}

    @property
    def any_near(self) -> bool:
        """Whether some eligible replica is nearer than others."""
        return bool(self._near_node or self._near_zone)

    def pool(self, pending_request: PendingRequest) -> Sequence[int] | None:
        """Those to pick from first: replicas that have the multiplexed model, else those with the fewest models; or
        the same node, then the same zone. None if all are alike.
        """
        context, model_id = pending_request.routing_context, pending_request.metadata.multiplexed_model_id
        if model_id:
            if not context.tried_first_multiplexed_models:
                context.tried_first_multiplexed_models = True
                if pool := self._pool_with_model(model_id):
                    return pool
            if not context.tried_fewest_multiplexed_models:
                context.tried_fewest_multiplexed_models = True
                return self._pool_with_model("") or None
            return None
        if self._near_node and not context.tried_same_node:
            context.tried_same_node = True
            return self._near_node
        if self._near_zone and not context.tried_same_az:
            context.tried_same_az = True
            return self._near_zone
        return None

    def _pool_with_model(self, model_id: str) -> list[int]:
        """Eligible replicas that have the model, or with "" those with the fewest."""
        pool = self._with_model.get(model_id)
        if pool is None:
            held, eligible = self._held, self._eligible
            if model_id:
                pool = [i for i in eligible if model_id in held[i].multiplexed_model_ids]
            else:
                fewest = min((len(held[i].multiplexed_model_ids) for i in eligible), default=0)
                pool = [i for i in eligible if len(held[i].multiplexed_model_ids) == fewest]
            self._with_model[model_id] = pool
        return pool
