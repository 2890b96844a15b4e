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
from tidal_compile.kernels.methods.lsh import Lsh
from tidal_compile.kernels.reference import packed
from tidal_compile.kernels.triton import dense, int4, linear, lsh, pages, pick, select, sparse, split, topk

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16",
    torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
COMPILED = {}
SHARED = 232_448  # bytes that a program may have on a Hopper GPU


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
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        shared = compiled.metadata.shared
        assert shared <= SHARED, f"{kernel.__name__}: {shared} bytes of shared memory, of {constants} {options}"


def compile_linears():
    """Of dtypes, biases and lengths of a row, every two together."""
    for of_type, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
        for biased in (0, 1):
            columns, weights = ((512, 1), (5000, 3))[(of_type + biased) % 2]
            weight, bias = torch.zeros(64, columns, dtype=dtype), [torch.zeros(64, dtype=dtype)] * biased
            for tokens in (1, 3) if dtype != torch.float32 else (1,):
                linear.linear(torch.zeros(tokens, columns, dtype=dtype), [weight] * weights, bias * weights, [])


def compile_quantised_linears():
    for tokens, dtype in ((1, torch.bfloat16), (5, torch.float16), (1, torch.float32)):
        weight, scale = torch.zeros(64, 512, dtype=torch.int8), torch.zeros(64, 1)
        linear.linear(torch.zeros(tokens, 512, dtype=dtype), [weight] * 2, [], [scale] * 2)
    for tokens, dtype, groups, rows, columns in (
        (1, torch.bfloat16, 16, 64, 512),
        (1, torch.float16, 1, 64, 512),
        (1, torch.bfloat16, 34, 16 * 128, 34 * 128),
        (7, torch.bfloat16, 4, 16 * 384, 512),
        (16, torch.float16, 4, 16 * 1024, 512),
        (3, torch.bfloat16, 8, 64, 512),
    ):
        pairs = torch.zeros(rows, groups, 2, dtype=dtype)
        held, scale = packed(torch.zeros(rows, columns, dtype=torch.int32), pairs)
        weights, bias = (3, [torch.zeros(rows, dtype=dtype)] * 3) if groups == 16 else (1, [])
        x = torch.zeros(tokens, columns, dtype=dtype)
        linear.linear(x, [held] * weights, bias, [scale] * weights, [held, scale] * (tokens != 3))
        int4.dense_weight(held, scale, columns - 12)


def compile_attention():
    """Of heads, masks, scans and shares, every two together, in nine of 81 cases; and of pages."""
    kinds = [(torch.bfloat16, 128, 4), (torch.float32, 80, 3), (torch.float16, 256, 1)]
    shares = [[("query_head", "sum")], [("kv_head", "max")], [("layer", "union"), ("layer", "sum")]]
    scans = [dense.full_attention, select.select_attention, select.choose_by_scores]
    for of_kind, of_mask in itertools.product(range(3), range(3)):
        dtype, head_dim, group = kinds[of_kind]
        masking = (None, torch.bool, torch.float32)[of_mask]
        q = torch.zeros(2, 2 * group, 1, head_dim, dtype=dtype)
        k = torch.zeros(2, 2, 512, head_dim, dtype=dtype)
        mask = None if masking is None else torch.ones(2, 1, 1, 512, dtype=masking)
        extra = {"sink_logit": q[0, :, 0, 0], "softcap": 30.0} if masking == torch.float32 else {}
        call = Call(q, k, k, torch.tensor(300), mask, 0.1, **extra)
        scan = scans[(of_kind + of_mask) % 3]
        for share, pool in shares[(of_kind + 2 * of_mask) % 3]:
            selection = Selection(64, 0.0, 4, 8, share, pool)
            scan(call) if scan is dense.full_attention else scan(call, selection)
            page = 64 if of_kind == of_mask else 16
            bounds = torch.zeros(2, 2, 512 // page, 2, head_dim, dtype=dtype)
            picked = pages.choose_pages(call, selection, bounds, page)
            pages.choose_again(call, selection, picked)
            sparse.sparse_attention(call, picked.index)
        method = (Lsh(), Lsh(8, 75, threshold=1), Lsh(9, 5, threshold=4, decoded="exact"))[(of_kind + of_mask) % 3]
        planes, center, codes, since, log_weights = method.summarize(k)
        lsh.attend(call, selection, method, planes, center, codes, since, log_weights)
        edges = lsh.edges(call, selection, method, center, since)
        splits = lsh.attend_to_static(call, method, center, since, log_weights, edges)
        lsh.merge_with(splits, q[:, :, 0].float(), q[:, :, 0, 0].float(), call)


def compile_several_tokens():
    """Of a large cache, whose tiles are the largest."""
    for group, tokens, masking in ((4, 8, torch.bool), (8, 16, torch.bfloat16), (1, 16, None)):
        q = torch.zeros(1, 4 * group, tokens, 128, dtype=torch.bfloat16)
        k = torch.zeros(1, 4, 2**15, 128, dtype=torch.bfloat16)
        mask = None if masking is None else torch.ones(1, 1, tokens, 2**15, dtype=masking)
        call = Call(q, k, k, torch.tensor(300), mask, 0.1)
        dense.full_attention(call)
        if group == 4:
            _, index = select.select_attention(call, Selection(64, 0.0, 4, 8))
            sparse.sparse_attention(call, index)


def compile_fp8():
    """Of dtypes, masks and tokens."""
    for dtype, head_dim, tokens, masking in (
        (torch.bfloat16, 128, 1, None), (torch.bfloat16, 128, 8, torch.bool), (torch.float16, 80, 1, torch.float16),
        (torch.float32, 64, 1, torch.bool),
    ):  # fmt: skip
        q = torch.zeros(1, 8, tokens, head_dim, dtype=dtype)
        k = torch.zeros(1, 4, 2**15, head_dim, dtype=torch.uint8)
        mask = None if masking is None else torch.ones(1, 1, tokens, 2**15, dtype=masking)
        scales = torch.ones(1, 4, 2**15, 2, dtype=torch.bfloat16)
        call = Call(q, k, k, torch.tensor(300), mask, 0.1, scales=scales)
        dense.full_attention(call)
        _, index = select.select_attention(call, Selection(64, 0.0, 4, 8))
        select.choose_by_scores(call, Selection(64, 0.0, 4, 8))
        sparse.sparse_attention(call, index)
        if tokens == 1:
            bounds = torch.zeros(1, 4, 2**11, 2, head_dim, dtype=dtype)
            picked = pages.choose_pages(call, Selection(64, 0.0, 4, 8), bounds, 16)
            pages.choose_again(call, Selection(64, 0.0, 4, 8), picked)
            method, numbers = Lsh(), torch.zeros(1, 4, 2**15, head_dim, dtype=dtype)
            lsh.attend(call, Selection(64, 0.0, 4, 8), method, *method.summarize(numbers))


def compile_more_pages_than_a_program_holds():
    pick.MOST = 64
    q, k = (torch.zeros(1, *shape, 128, dtype=torch.bfloat16) for shape in ((8, 1), (2, 2048)))
    mask = torch.ones(1, 1, 1, 2048, dtype=torch.bool)
    call, bounds = Call(q, k, k, torch.tensor(300), mask, 0.1), torch.zeros(1, 2, 128, 2, 128, dtype=torch.bfloat16)
    pages.choose_pages(call, Selection(64, 0.0, 4, 8), bounds, 16)


def main():
    JITFunction.run = compile_instead
    for module in (dense, linear, lsh, pages, pick, sparse, split, topk):
        module.num_splits = lambda *_, **__: 70  # more than are merged at once
        module.overlap = lambda _: {"PDL": True, "launch_pdl": True}
    compile_linears()
    compile_quantised_linears()
    compile_attention()
    compile_several_tokens()
    compile_fp8()
    compile_more_pages_than_a_program_holds()
    print(len(COMPILED), "kernels:", *sorted(set(COMPILED.values())))


if __name__ == "__main__":
    assert not split.INTERPRETED.value, "unset TRITON_INTERPRET"
    sys.exit(main())
