"""Attention calls for tests of ops, and the ops to be tested: the reference, and the Triton kernels as conftest has chosen."""

import math

import oracle
import torch

from tidal_compile.kernels import reference
from tidal_compile.kernels.call import Call, Selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHARES = ("query_head", "kv_head", "layer")
HEAD_DIM = 32 if DEVICE == "cpu" else 64  # one program merges 32 values of a head: the interpreter's time


class Ops:
    """Ops with arguments one by one, as tests write them."""

    def __init__(self, full, select, choose, sparse):
        self.full, self.select, self.choose, self.sparse = full, select, choose, sparse

    def full_attention(self, q, k, v, length, mask, scale, sink=None, softcap=0.0):
        return self.full(Call(q, k, v, length, mask, scale, sink, softcap))

    def select_attention(
        self, q, k, v, length, mask, scale, budget, ratio, sinks, recent, share, pool="sum", sink=None, softcap=0.0
    ):
        selection = Selection(budget, ratio, sinks, recent, share, pool)
        return self.select(Call(q, k, v, length, mask, scale, sink, softcap), selection)

    def choose_by_scores(
        self, q, k, v, length, mask, scale, budget, ratio, sinks, recent, share, pool="sum", sink=None, softcap=0.0
    ):
        selection = Selection(budget, ratio, sinks, recent, share, pool)
        return self.choose(Call(q, k, v, length, mask, scale, sink, softcap), selection)

    def sparse_attention(self, q, k, v, index, length, mask, scale, sink=None, softcap=0.0):
        return self.sparse(Call(q, k, v, length, mask, scale, sink, softcap), index)


def implementations():
    """Triton is imported here, after conftest has chosen how it runs."""
    from tidal_compile.kernels.triton import dense, select, sparse

    return {
        "reference": Ops(
            reference.full_attention, reference.select_attention, reference.choose_by_scores, reference.sparse_attention
        ),
        "triton": Ops(dense.full_attention, select.select_attention, select.choose_by_scores, sparse.sparse_attention),
    }


IMPLEMENTATIONS = implementations()


def make_case(
    batch=2,
    heads=(4, 2),
    head_dim=HEAD_DIM,
    slots=150,
    length=97,
    dtype=torch.float32,
    padding=0,
    seed=0,
    bias=False,
    sink=False,
    softcap=0.0,
):
    """q, k, v, length, mask, scale, and as keywords sink and softcap. Beyond the live length, and under padding, stands garbage: NaN and huge numbers."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    q = torch.randn(batch, num_heads, 1, head_dim, generator=generator).to(dtype)
    k = torch.randn(batch, num_kv_heads, slots, head_dim, generator=generator).to(dtype)
    v = torch.randn(batch, num_kv_heads, slots, head_dim, generator=generator).to(dtype)
    k[:, :, length:], v[:, :, length:] = math.nan, math.nan
    k[:, :, length::2], v[:, :, length::2] = 6e4, -6e4
    mask = None
    if padding:
        mask = torch.ones(batch, 1, 1, slots, dtype=torch.bool)
        for b in range(batch):  # left padding of another length in every row, none in the last
            pad = padding * (batch - 1 - b)
            mask[b, ..., :pad] = False
            k[b, :, :pad], v[b, :, :pad] = math.nan, math.inf
        mask[..., length:] = False
    if bias:  # an additive mask, of the dtype of the scores
        hidden = torch.zeros(batch, 1, 1, slots, dtype=torch.bool) if mask is None else ~mask
        mask = (
            torch.randn(batch, 1, 1, slots, generator=generator).masked_fill(hidden, torch.finfo(dtype).min).to(dtype)
        )
    extra = {"sink": torch.randn(num_heads, generator=generator).to(dtype) * 2 if sink else None, "softcap": softcap}
    return (q, k, v, torch.tensor(length), mask, head_dim**-0.5), extra


def on_device(args):
    if isinstance(args, dict):
        return dict(zip(args, on_device(args.values()), strict=True))
    return [arg.to(DEVICE) if isinstance(arg, torch.Tensor) else arg for arg in args]


def check_index(index, importance, valid, budget, ratio, sinks, recent, slack):
    """Rows are ascending, -1 padded, of the right size, hold what is always kept, and the best of the rest.

    Near-ties within `slack` may fall either way, as float32 and float64 round differently.
    """
    index = index.cpu()
    for b in range(index.shape[0]):
        alive = valid[b].nonzero()[:, 0].tolist()
        keep = oracle.live_budget(budget, ratio, len(alive))
        always = set(alive[:sinks]) | set(alive[max(0, len(alive) - recent) :]) if keep < len(alive) else set(alive)
        for g in range(index.shape[1]):
            row = index[b, g].tolist()
            got, rest = row[:keep], row[keep:]
            assert rest == [-1] * len(rest)
            assert got == sorted(set(got)) and set(got) <= set(alive) and always <= set(got)
            free = [importance[b, g, p].item() for p in alive if p not in always and p in got]
            left = [importance[b, g, p].item() for p in alive if p not in got]
            if free and left:
                assert min(free) >= max(left) - slack * max(abs(max(left)), abs(min(free)))
