"""`tidal-compile`, also as `python -m tidal_compile`. An interrupt ends it with one line, during imports too."""

import sys
from collections.abc import Callable


def main() -> None:
    """Entry point `tidal-compile`."""
    _interruptible(_command)


def lm_eval() -> None:
    """Entry point `tidal-lm-eval`."""
    _interruptible(_harness)


def _command() -> None:
    from .cli import main

    main()


def _harness() -> None:
    from .cli import lm_eval

    lm_eval()


def _interruptible(command: Callable[[], None]) -> None:
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    except SystemExit as stop:
        if stop.code == 130:  # an interrupt that a command has seen
            _interrupted()
        raise


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return 130


if __name__ == "__main__":
    main()
