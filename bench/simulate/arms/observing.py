"""Serve's default with the product looking on, as `serve_app.router:ObservingRouter` does: what it would report."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from bench.simulate.arms.product import Product
from bench.simulate.arms.ray_p2c import RayPowerOfTwo
from shadecast.config import CHOICES
from shadecast.observing import Observations

if TYPE_CHECKING:
    from bench.simulate.engine import Request, Simulation
    from bench.simulate.scenario import World


class Observing(Product):
    """Requests go by Serve's rule; nothing is copied, sent again or handed over."""

    sticky = True

    def start(self, sim: Simulation, world: World, rng: random.Random) -> None:
        """Both."""
        self.observations = Observations()
        self._serve = RayPowerOfTwo()
        self._serve.start(sim, world, random.Random(f"{world.seed}/serve"))
        super().start(sim, world, rng)

    def on_members(self) -> None:
        """Both hear of it."""
        super().on_members()
        self._serve.on_members()

    def pick(self, request: Request) -> int:
        """Serve's choice."""
        return self._serve.pick(request)

    def score(self, request: Request, replica: int) -> float:
        """Serve's."""
        return self._serve.score(request, replica)

    def on_sent(self, request: Request) -> None:
        """Note what both would have, as `serve_app.routing.request_router` does, before the request counts."""
        router = self._routers[request.router]
        picks = router.picks
        i, ours = picks.index.get(self.ids[request.replica]), picks.pick(self.rng.random, CHOICES)
        predicted = None
        if i is not None and ours >= 0 and router.table is not None:
            predicted = picks.score(i), picks.score(ours), picks.share[i] <= 0.0
        super().on_sent(request)
        if predicted is not None:
            router.ledger.observed(router.open[request.id], *predicted[:2], refused=predicted[2])
        self._serve.on_sent(request)

    def on_rejected(self, request: Request, replica: int) -> None:
        """Serve learns from it."""
        self._serve.on_rejected(request, replica)

    def on_done(self, request: Request, ok: bool) -> None:
        """Both hear of it."""
        super().on_done(request, ok)
        self._serve.on_done(request, ok)

    def rescue(self, *_: Any) -> None:
        """Who observes sends nothing again."""

    def _copy(self, *_: Any) -> None:
        """Who observes copies nothing."""

    def _tick(self, _: Any) -> None:
        for report in self._reports:
            for view in report.replicas:
                for outcome in view.outcomes:
                    self.observations.add(self.sim.now_s, outcome, max(view.finished, 0) / len(view.outcomes))
        super()._tick(None)
