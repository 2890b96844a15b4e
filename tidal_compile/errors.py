"""What can go wrong, in one place. Every message names the file, layer or option, what was found, and what is valid."""

from torch._dynamo.exc import ShortenTraceback


class TidalError(ShortenTraceback):
    """Anything tidal_compile refuses to do.

    The base class is Dynamo's: it re-raises such an error from a backend as it is, and would wrap any other in a
    `BackendCompilerFailed`, so that `except tidal_compile.PolicyError` around a compiled call would not catch it.
    """

    def __init__(self, message: str):
        super().__init__(message, first_useful_frame=None)
        self.message = message  # Dynamo appends advice of its own to the text


class PolicyError(TidalError):
    """A policy that is malformed, or does not fit the model."""


class UnsupportedModelError(TidalError):
    """A policy asks for something that the model's graph can't give."""
