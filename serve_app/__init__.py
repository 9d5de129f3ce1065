"""The request path on Ray Serve: router, mirror, gateway, application, command line."""
