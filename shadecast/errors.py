"""The project's own errors; each message names the field, the value, the bound and what to do next."""


class ShadecastError(Exception):
    """Base of everything that this project raises on purpose."""


class ConfigError(ShadecastError, ValueError):
    """A configuration value is out of bounds, of the wrong type, or unknown."""


class TransitionError(ShadecastError):
    """An event that the state table does not list for the connection's state; nothing was changed."""


class MessageError(ShadecastError):
    """A message between processes cannot be read: most likely they are of different versions."""


class OrderError(ShadecastError):
    """What a person orders cannot be done: nothing of that id is known, or a value is out of bounds."""


class NotInstalledError(ShadecastError):
    """A package that is needed is missing; the message names the extra that brings it."""


class AwayError(ShadecastError):
    """No cluster, or no control plane on it, can be reached."""
