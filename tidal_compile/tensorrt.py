"""The dense parts of a step as TensorRT engines, through torch_tensorrt: `dense_compiler="tensorrt"`, extra `tensorrt`.

https://docs.pytorch.org/TensorRT. No engine was built while this was written, for want of TensorRT: what is tested is
the partition (`passes/regions.py`), with another compiler in its place.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from .errors import TidalError


def check() -> None:
    """Raise `TidalError` where TensorRT can't be used."""
    try:
        import torch_tensorrt  # noqa: F401
    except (ImportError, OSError) as error:  # the latter: its libraries are missing
        raise TidalError(
            f"dense_compiler 'tensorrt': {str(error).splitlines()[0]}; pip install 'tidal-compile[tensorrt]', and the "
            "libraries of TensorRT that it names"
        ) from None


def compile_region(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable:
    """The engine of a region, which computes in the number formats of the module. Raises what the build raises."""
    import torch_tensorrt

    exported = torch.export.export(module, tuple(inputs))
    return torch_tensorrt.dynamo.compile(
        exported, inputs=list(inputs), min_block_size=1, pass_through_build_failures=True
    )  # fmt: skip
