"""The version. Here, and not in the package itself: in a clone's parent folder that may be found as a namespace."""

VERSION = "0.2.0"
