"""`python -m serve_app`: the same as `shadecast`."""

from serve_app.cli import main

main()
