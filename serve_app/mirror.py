"""For user code: whether the request that is being handled is a copy, or is made for one: its answer is thrown away."""

from serve_app.shadow import is_shadow

__all__ = ["is_shadow"]
