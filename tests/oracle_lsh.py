"""MagicPIG (arXiv 2410.16179), attention by LSH sampling, from its definition in float64. Imports nothing of the product.

A token is sampled when it shares the query's code in at least `threshold` of L tables; its weight is divided by the
probability u of that, over the draw of the planes. `planes` is `[L, K, D]`: K hyperplanes for each of L tables.
"""

import math

import torch


def codes(x, planes):
    """x `[..., D]`, planes `[L, K, D]` -> int64 `[..., L]`: bit j of table l says whether planes[l, j] . x > 0."""
    bits = torch.einsum("...d,lkd->...lk", x.double(), planes.double()) > 0
    return (bits.long() << torch.arange(planes.shape[1])).sum(-1)


def inclusion(cos, k, l, threshold):
    """cos (a number or a tensor) -> float64 u = P[Binomial(l, p^k) >= threshold], where p = 1 - arccos(cos) / pi.

    Its terms are added from `threshold` up, and p is arccos(-cos) / pi: small ones keep all their digits.
    """
    p = torch.arccos(-torch.as_tensor(cos, dtype=torch.float64).clamp(-1, 1)) / math.pi
    hit, miss = p**k, -torch.expm1(k * p.log())
    u = torch.zeros_like(p)
    for i in range(threshold, l + 1):
        u += (math.log(math.comb(l, i)) + torch.xlogy(i, hit) + torch.xlogy(l - i, miss)).exp()
    return u.clamp(max=1.0)


def cosines(query, keys, mean):
    """query `[D]`, keys `[n, D]`, mean `[D]` -> float64 `[n]` between the query and the centred keys.

    0 where either is zero: its code is 0, which a bit of the other's meets with probability 1/2, as at a right angle.
    """
    query, centred = query.double(), keys.double() - mean.double()
    norms = query.norm() * centred.norm(dim=-1)
    return torch.where(norms > 0, centred @ query / norms, 0.0).clamp(-1, 1)


def sampled(query, keys, mean, planes, threshold):
    """query `[D]`, keys `[n, D]`, mean `[D]` -> bool `[n]`: who has the query's code in `threshold` tables or more."""
    return (codes(keys.double() - mean.double(), planes) == codes(query, planes)).sum(-1) >= threshold


def doubtful(query, keys, mean, planes, threshold, slack):
    """As `sampled`: whose membership depends on bits with |w . x| <= slack |w| |x|, which rounding may turn."""
    planes, bits, close = planes.double(), [], []
    for x in (query.double(), keys.double() - mean.double()):
        products = torch.einsum("...d,lkd->...lk", x, planes)
        bits.append(products > 0)
        close.append(products.abs() <= slack * planes.norm(dim=-1) * x.norm(dim=-1)[..., None, None])
    same, unsure = bits[0] == bits[1], close[0] | close[1]
    most, least = (same | unsure).all(-1).sum(-1), (same & ~unsure).all(-1).sum(-1)
    return (least < threshold) & (most >= threshold)


def attend(
    query, keys, values, static, dynamic, mean, planes, scale, threshold, epsilon,
    softcap=0.0, bias=None, sink_logit=None,
):  # fmt: skip
    """One query head: query `[D]`, keys `[n, D]`, values `[n, Dv]`, static and dynamic bool `[n]` (disjoint), mean `[D]`.

    bias: float `[n]`; sink_logit: a number. -> float64 output `[Dv]` and the natural log of its denominator; of
    nothing: 0, -inf. Reads no other tokens than the static and the dynamic ones.
    """
    tables, bits, _ = planes.shape
    chosen, weights = static.nonzero()[:, 0], torch.zeros(int(static.sum()), dtype=torch.float64)
    free = dynamic.nonzero()[:, 0]
    hit = free[sampled(query, keys[free], mean, planes, threshold)]
    u = inclusion(cosines(query, keys[hit], mean), bits, tables, threshold)
    chosen, weights = torch.cat([chosen, hit]), torch.cat([weights, -(u + epsilon).log()])

    logits = keys[chosen].double() @ query.double() * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logits = logits + weights + (0.0 if bias is None else bias[chosen].double())
    sink = -math.inf if sink_logit is None else float(sink_logit)
    lse = torch.cat([logits, torch.tensor([sink], dtype=torch.float64)]).logsumexp(0)
    if not len(chosen):
        return torch.zeros(values.shape[1], dtype=torch.float64), lse
    return (logits - lse).exp() @ values[chosen].double(), lse


def roles(length, mask, batch, slots, sinks, recent, exact_from=None):
    """-> static and dynamic, bool `[B, S]`, and float64 bias `[B, S]`; mask as `layer` takes it."""
    valid, bias = torch.ones(batch, slots, dtype=torch.bool), torch.zeros(batch, slots, dtype=torch.float64)
    if mask is not None:
        mask = (mask[:, 0, 0] if mask.dim() == 4 else mask)[..., :slots].expand(batch, slots)
        valid = mask.clone() if mask.dtype == torch.bool else mask > -9900
        bias = bias if mask.dtype == torch.bool else mask.double()
    valid[:, int(length) :] = False
    static = torch.zeros_like(valid)
    for b in range(batch):
        alive = valid[b].nonzero()[:, 0].tolist()
        late = [] if exact_from is None else [slot for slot in alive if slot >= exact_from]
        static[b, alive[:sinks] + alive[max(0, len(alive) - recent) :] + late] = True
    return static, valid & ~static, bias


def layer(
    query, keys, values, length, mask, planes, scale, sinks, recent, threshold, epsilon,
    mean=None, exact_from=None, softcap=0.0, sink_logit=None,
):  # fmt: skip
    """A layer's decode step: query `[B, Hq, 1, D]`, keys `[B, Hkv, S, D]`, values `[B, Hkv, S, Dv]` -> `[B, Hq, 1, Dv]`.

    mask: None or `[B or 1, S]` or `[B or 1, 1, 1, S]`, bool or added to the scores, where below -9900 hides a token. Of
    each row's live valid tokens the first `sinks`, the last `recent` and those in slots from `exact_from` on are
    attended exactly, the others sampled. mean: `[B, Hkv, D]`, or that of the sampled ones. sink_logit: `[Hq]`.
    """
    batch, heads = query.shape[:2]
    num_kv, slots = keys.shape[1:3]
    static, dynamic, bias = roles(length, mask, batch, slots, sinks, recent, exact_from)
    output = torch.zeros(batch, heads, 1, values.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // num_kv)
            own = keys[b, kv, dynamic[b]].double()  # none: the mean is zero
            centre = own.sum(0) / max(1, len(own)) if mean is None else mean[b, kv]
            output[b, h, 0], _ = attend(
                query[b, h, 0], keys[b, kv], values[b, kv], static[b], dynamic[b], centre, planes, scale, threshold,
                epsilon, softcap, bias[b], None if sink_logit is None else sink_logit[h],
            )  # fmt: skip
    return output
