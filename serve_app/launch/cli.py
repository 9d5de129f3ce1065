"""The command `shadecast`: a process of our own, so our own installation comes first."""

from serve_app.launch import own_installation


def main() -> None:
    """Run the command line."""
    own_installation.put_first()
    from serve_app.launch.commands import run  # noqa: PLC0415 - not before our installation is first

    run()
