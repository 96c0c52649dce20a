"""`python -m quire.server` is the same as the command `quire`."""

from .cli import main

main()
