"""Which cases of a test `make test` runs; `make test-full`, and a GPU machine, run all."""

import pytest


def sampled(cases, kept):
    """The cases as parameters, those that are not `kept` marked `slow`. A case of several parameters is a tuple."""
    assert set(kept) <= set(cases), set(kept) - set(cases)
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[] if case in kept else [pytest.mark.slow])
        for case in cases
    ]
