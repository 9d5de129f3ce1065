"""For user code: how a model declares its tensors."""

from serve_app.gateway.tensors import TensorSpec

__all__ = ["TensorSpec"]
