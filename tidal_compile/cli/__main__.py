"""`python -m tidal_compile.cli`."""

from . import main

main()
