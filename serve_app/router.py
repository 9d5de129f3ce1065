"""The routers that deployments name: `PredictiveRouter` picks and mirrors, `ObservingRouter` only looks.

    request_router_config=RequestRouterConfig(request_router_class="serve_app.router:PredictiveRouter")

Serve sends these classes by value to every process that routes, and what they import by reference. So there is nothing
in them: each process runs its own installation's `serve_app.routing`, whole, while an upgrade rolls through a cluster.
"""

from __future__ import annotations

from serve_app.routing.request_router import Router


class PredictiveRouter(Router):
    """Least predicted score among d random eligible replicas; power of two choices without a usable table."""


class ObservingRouter(Router):
    """Routes exactly as Serve's default does, and only reports: what requests do, and what Shadecast would have chosen.

    For a look before anything is switched on. Nothing is copied, retried or sent again, no replica is left out. The
    comparison is by Shadecast's own estimates: of the time on the replica that was chosen, and on the one it would have
    chosen at that moment.
    """

    observes = True
