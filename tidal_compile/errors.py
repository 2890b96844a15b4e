"""What can go wrong, in one place. Every message names the file, layer or option, what was found, and what is valid."""


class TidalError(Exception):
    """Anything tidal_compile refuses to do. `message` is the whole text."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message  # Dynamo appends advice about reporting bugs to `args`


class PolicyError(TidalError):
    """A policy that is malformed, or does not fit the model."""


class UnsupportedModelError(TidalError):
    """A policy asks for something that the model's graph can't give."""
