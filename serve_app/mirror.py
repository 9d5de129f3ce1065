"""For user code: whether the request that is being handled is a copy, whose answer is thrown away."""

from serve_app.routing.mirror import is_shadow

__all__ = ["is_shadow"]
