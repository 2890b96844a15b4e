"""A text that no calibration saw, for `tidal-compile eval --text`: Python's own manual, to standard output."""

from pydoc_data.topics import topics

print("\n\n".join(topics[name] for name in sorted(topics)))
