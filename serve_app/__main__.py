"""`python -m serve_app`: the same as `shadecast`."""

from serve_app.launch.cli import main

main()
