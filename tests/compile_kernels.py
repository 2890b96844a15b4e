"""Compile every kernel for a Hopper GPU, without one: launches are caught and handed to Triton's compiler.

Run as a program, since a process that interprets kernels can't compile them. The interpreter forgives what the compiler
does not, such as a variable that changes its shape in a loop.
"""

import itertools
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tidal_compile.kernels.call import Call, Selection
from tidal_compile.kernels.triton import dense, linear, pages, pick, select, sparse, split, topk

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8", torch.int8: "*i8",
}  # fmt: skip
COMPILED = {}


def compile_instead(kernel, *args, grid, warmup, **options):
    """What a launch would compile, for sm_90."""
    given = dict(zip(kernel.arg_names, args, strict=False))
    given |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    signature, constants = {}, {}
    for param in kernel.params:
        value = given[param.name]
        if param.is_constexpr or value is None:
            signature[param.name], constants[(param.num,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = TYPES[value.dtype]
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants)
    key = source.hash()
    if key not in COMPILED:
        COMPILED[key] = kernel.__name__
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def main():
    JITFunction.run = compile_instead
    for module in (dense, linear, pages, pick, sparse, split, topk):
        module.num_splits = lambda *_, **__: 70  # more than are merged at once
        module.overlap = lambda _: {"PDL": True, "launch_pdl": True}
    kinds = [(torch.bfloat16, 128, 4), (torch.float32, 80, 3), (torch.float16, 256, 1)]
    for (dtype, head_dim, group), masking in itertools.product(kinds, (None, torch.bool, torch.float32)):
        q = torch.zeros(2, 2 * group, 1, head_dim, dtype=dtype)
        k = torch.zeros(2, 2, 512, head_dim, dtype=dtype)
        mask = None if masking is None else torch.ones(2, 1, 1, 512, dtype=masking)
        extra = {"sink_logit": q[0, :, 0, 0], "softcap": 30.0} if masking == torch.float32 else {}
        length = torch.tensor(300)
        for columns, weights in ((512, 1), (5000, 3)):
            weight, bias = torch.zeros(64, columns, dtype=dtype), [] if masking else [torch.zeros(64, dtype=dtype)]
            for tokens in (1, 3) if dtype != torch.float32 else (1,):
                linear.linear(torch.zeros(tokens, columns, dtype=dtype), [weight] * weights, bias * weights)
        call = Call(q, k, k, length, mask, 0.1, **extra)
        dense.full_attention(call)
        for share, pool in (("query_head", "sum"), ("kv_head", "max"), ("layer", "union"), ("layer", "sum")):
            selection = Selection(64, 0.0, 4, 8, share, pool)
            index = select.select_attention(call, selection)[1]
            select.choose_by_scores(call, selection)
            sparse.sparse_attention(call, index)
            if dtype == torch.bfloat16 or pool == "union":
                page = 16 if masking is None else 64
                bounds = torch.zeros(2, 2, 512 // page, 2, head_dim, dtype=dtype)
                pages.choose_again(call, selection, pages.choose_pages(call, selection, bounds, page))
    print(len(COMPILED), "kernels:", *sorted(set(COMPILED.values())))


if __name__ == "__main__":
    assert not split.INTERPRETED.value, "unset TRITON_INTERPRET"
    sys.exit(main())
