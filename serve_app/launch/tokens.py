"""Tokens for the live page: read from files that only their owner can read, from the environment, or made."""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from serve_app.launch.own_files import operate_token_file
from serve_app.page.rights import Role
from shadecast.errors import ConfigError

VARIABLES = {Role.OPERATE: "SHADECAST_TOKEN", Role.LOOK: "SHADECAST_LOOK_TOKEN"}
OPTIONS = {Role.OPERATE: "--token-file", Role.LOOK: "--look-token-file"}
LEAST_CHARACTERS = 16
"""A token of random letters and digits of this length cannot be guessed from its digest."""
_MOST_BYTES = 4096


class TokenError(ConfigError):
    """A token, or the file that it is in, cannot be used. The text never holds the token."""


@dataclass(frozen=True, slots=True, repr=False)
class Token:
    """A token and where it is from, such as `the file ...`. Its text form is the latter alone."""

    value: str
    source: str

    def __repr__(self) -> str:
        return f"Token({self.source})"


@dataclass(frozen=True, slots=True)
class Given:
    """What a user gives; None: nothing."""

    operate: Token | None = None
    look: Token | None = None


def given(operate_file: str = "", look_file: str = "") -> Given:
    """From files, or else from the environment. Raises TokenError.

    It is taken out of the environment: processes that are started from here, replicas among them, must not have it.
    """
    found = Given(_given(Role.OPERATE, operate_file), _given(Role.LOOK, look_file))
    if found.operate is not None and found.look is not None and found.operate.value == found.look.value:
        raise TokenError("the token for looking is the one for operating: give two, or only the latter")
    return found


def _given(role: Role, path: str) -> Token | None:
    variable = VARIABLES[role]
    from_environment = os.environ.pop(variable, "").strip()
    if path:
        file = Path(os.path.expanduser(path))
        return Token(read(file, OPTIONS[role]), f"the file {path}")
    return Token(_checked(from_environment, variable), f"the variable {variable}") if from_environment else None


def kept() -> Token | None:
    """The token that was made for whoever gives none; None if none was. Raises TokenError."""
    path = operate_token_file()
    return Token(read(path, "token file"), f"the file {path}") if path.exists() else None


def kept_or_made() -> Token:
    """The same, made now if there is none. Raises TokenError, OSError."""
    path = operate_token_file()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    return Token(read(path, "token file"), f"the file {path}")


def read(path: Path, what: str) -> str:
    """A file's token without the white space around it. Raises TokenError."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise TokenError(f"{what} {path}: must be a plain file")
            if found.st_mode & 0o077:
                mode = stat.S_IMODE(found.st_mode)
                raise TokenError(f"{what} {path}: others may read it (mode {mode:03o}): chmod 600 {path}")
            if found.st_uid not in (os.geteuid(), 0):
                raise TokenError(f"{what} {path}: belongs to another user, who may know it and change it")
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise TokenError(f"{what} {path}: cannot be read ({error.strerror})") from None
    if len(content) > _MOST_BYTES:
        raise TokenError(f"{what} {path}: is longer than {_MOST_BYTES} bytes, which no token is")
    return _checked(content.decode("latin-1").strip(), f"{what} {path}")


def _checked(token: str, where: str) -> str:
    if len(token) < LEAST_CHARACTERS:
        raise TokenError(
            f"{where}: the token has {len(token)} characters, and must have {LEAST_CHARACTERS} at least; "
            "`openssl rand -hex 32` makes one"
        )
    if not all("!" <= character <= "~" for character in token):
        raise TokenError(f"{where}: the token must be one word of ASCII letters, digits and signs")
    return token
