"""Command line, control plane and local cluster: processes of our own."""
