"""The routers that deployments name: `PredictiveRouter` picks and mirrors, `ObservingRouter` only looks.

    request_router_config=RequestRouterConfig(request_router_class="serve_app.router:PredictiveRouter")

Serve sends these classes by value to every process that routes; a process that cannot take one gets no more news of the
deployment (Ray 2.60). While an upgrade rolls through a cluster, some have another version of Shadecast, or have loaded
one. So nothing of ours is needed to take a class: what it does is put to it when a router is made, from that process's
own installation, and where that cannot be, the process routes as Serve does.
"""

from __future__ import annotations

from typing import Any, Self

from ray.serve.request_router import RequestRouter


class PredictiveRouter(RequestRouter):
    """Least predicted score among d random eligible replicas; power of two choices without a usable table."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """A router of this very class, with all that `serve_app.routing.request_router.Router` does."""
        does: Any
        try:
            from serve_app.routing.request_router import Router as does  # noqa: N813, PLC0415 - not to take the class
        except Exception as error:
            import logging  # noqa: PLC0415

            from ray.serve.config import RequestRouterConfig  # noqa: PLC0415

            does = RequestRouterConfig().get_request_router_class()  # Serve's own
            logging.getLogger("ray.serve").warning(
                f"shadecast: this process has another version of Shadecast than the application ({error}): it routes "
                "as Serve does until it is restarted with that version"
            )
        kind: Any = type(cls)
        return object.__new__(kind(cls.__name__, (cls, does), {"__module__": cls.__module__}))  # type: ignore[no-any-return]


class ObservingRouter(PredictiveRouter):
    """Routes exactly as Serve's default does, and only reports: what requests do, and what Shadecast would have chosen.

    For a look before anything is switched on. Nothing is copied, retried or sent again, no replica is left out. The
    comparison is by Shadecast's own estimates: of the time on the replica that was chosen, and on the one it would have
    chosen at that moment.
    """

    observes = True
