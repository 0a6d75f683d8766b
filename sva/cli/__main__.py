"""`python -m sva.cli` is `sva`."""

from sva.cli.main import main

main()
