"""Tensors of a GPU whose memory is the host's. Both use it at one address, the GPU over PCIe without a copy.

So a KV cache in host memory is a tensor like others to a model, to Dynamo, to CUDA graphs and to Triton. A kernel that
reads a few rows of it moves only these. On other devices such a tensor is an ordinary one.
"""

import ctypes
import functools
import math
import mmap
import sys

import torch
from torch import Tensor

PORTABLE, MAPPED = 1, 2  # CU_MEMHOSTREGISTER_*
MEMORY_TYPE, IN_HOST_MEMORY = 2, 1  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_MEMORYTYPE_HOST
HUGE_PAGE = 2**21


class _Registered:
    """Memory of the host that a GPU can address, for `torch.as_tensor`. Given back when the last tensor of it goes."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.memory, self.device = _pages(num_bytes), device
        address = self.memory.data_ptr()
        call_driver("cuMemHostRegister_v2", address, self.memory.nbytes, PORTABLE | MAPPED)
        self.address = address
        seen_by_gpu = ctypes.c_void_p()
        call_driver("cuMemHostGetDevicePointer_v2", ctypes.byref(seen_by_gpu), self.address, ctypes.c_uint(0))
        if seen_by_gpu.value != self.address:
            raise RuntimeError(
                "this GPU addresses the host's memory otherwise than the host does: place: cpu needs that"
            )
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (self.address, False), "version": 3,
        }  # fmt: skip

    def __del__(self) -> None:
        if not hasattr(self, "address") or sys.is_finalizing():
            return
        if torch.cuda.is_current_stream_capturing():  # when nobody may wait for the device
            _left.append((self.memory, self.address, self.device))
        else:
            _give_back(self.memory, self.address, self.device)


_left: list[tuple[Tensor, int, torch.device]] = []  # memory that is given back later


def _give_back(memory: Tensor, address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # kernels, and the host's part of a step, may read it still
    call_driver("cuMemHostUnregister", address)
    del memory


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros `[*shape]` on the device, in host memory, which is page-locked if the device is a GPU.

    Raises RuntimeError where the driver refuses to page-lock so much.
    """
    size = max(1, math.prod(shape)) * dtype.itemsize
    if device.type != "cuda":
        return _pages(size).view(dtype)[: math.prod(shape)].view(shape)
    while _left:
        _give_back(*_left.pop())
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # so that there is a context
        storage = torch.as_tensor(_Registered(size, device), device=device).untyped_storage()
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape)


def is_host(tensor: Tensor) -> bool:
    """Whether its memory is the host's."""
    if not tensor.is_cuda:
        return tensor.device.type == "cpu"
    kind = ctypes.c_uint()
    call_driver("cuPointerGetAttribute", ctypes.byref(kind), MEMORY_TYPE, ctypes.c_void_p(tensor.data_ptr()))
    return kind.value == IN_HOST_MEMORY


def as_cpu(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor for which `is_host`, as a CPU tensor, which does not keep it alive."""
    if tensor.device.type == "cpu" or tensor.numel() == 0:
        return tensor.cpu()
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)


def call_driver(name: str, *arguments: object) -> None:
    """Call a function of the CUDA driver. Raises RuntimeError with its name for the error."""
    result = getattr(_driver(), name)(
        *(ctypes.c_size_t(one) if isinstance(one, int) else one for one in arguments)  # addresses, sizes, flags
    )
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'error').decode()} ({result})")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _pages(num_bytes: int) -> Tensor:
    """Zeros `[>= num_bytes]` uint8, in large pages where the system has them: rows here and there are found sooner."""
    size = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size > HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).zero_()  # by all threads: page-locking would do it by one
