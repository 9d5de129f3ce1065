"""The HTTP ingress of the Open Inference Protocol, and the model server behind it."""
