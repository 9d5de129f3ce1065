"""Serve's own preferences within what is eligible: replicas with a multiplexed model, on this node, in this zone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol


class Tried(Protocol):
    """Serve's marks of what was tried for a request."""

    tried_first_multiplexed_models: bool
    tried_fewest_multiplexed_models: bool
    tried_same_node: bool
    tried_same_az: bool


class Place(Protocol):
    """Where a replica is and what it has loaded."""

    node_id: str
    availability_zone: str | None
    multiplexed_model_ids: Collection[str]


class Locality:
    """Laid out for one table and membership. Pools are indices in rising order."""

    __slots__ = ("_near_node", "_near_zone", "_replicas", "_well", "_with_model", "any_near")

    def __init__(
        self,
        eligible: Sequence[int],
        replicas: Sequence[Place],
        node: str | None,
        zone: str | None,
        collapsed: Collection[int] = (),
    ) -> None:
        """`eligible` are indices into `replicas`. `node` and `zone` are this process's own, None where indifferent.

        No preference holds on to a `collapsed` replica: a load elsewhere, or a longer way, costs less than to stay.
        """
        self._replicas = replicas
        self._well = well = [i for i in eligible if i not in collapsed] or eligible
        self._near_node = [i for i in well if replicas[i].node_id == node] if node is not None else []
        self._near_zone = [i for i in well if replicas[i].availability_zone == zone] if zone is not None else []
        self.any_near = bool(self._near_node or self._near_zone)
        """Whether some eligible replica is nearer than others."""
        self._with_model: dict[str, list[int]] = {}

    def pool(self, model_id: str, tried: Tried) -> Sequence[int] | None:
        """Those to pick from first: replicas that have the multiplexed model, else those with the fewest models; or
        the same node, then the same zone. None if all are alike. Each is tried, and marked so, once per request.
        """
        if model_id:
            if not tried.tried_first_multiplexed_models:
                tried.tried_first_multiplexed_models = True
                if pool := self._pool_with_model(model_id):
                    return pool
            if not tried.tried_fewest_multiplexed_models:
                tried.tried_fewest_multiplexed_models = True
                return self._pool_with_model("") or None
            return None
        if self._near_node and not tried.tried_same_node:
            tried.tried_same_node = True
            return self._near_node
        if self._near_zone and not tried.tried_same_az:
            tried.tried_same_az = True
            return self._near_zone
        return None

    def _pool_with_model(self, model_id: str) -> list[int]:
        """Eligible replicas that have the model, or with "" those with the fewest."""
        pool = self._with_model.get(model_id)
        if pool is None:
            replicas, eligible = self._replicas, self._well
            if model_id:
                pool = [i for i in eligible if model_id in replicas[i].multiplexed_model_ids]
            else:
                fewest = min((len(replicas[i].multiplexed_model_ids) for i in eligible), default=0)
                pool = [i for i in eligible if len(replicas[i].multiplexed_model_ids) == fewest]
            self._with_model[model_id] = pool
        return pool
