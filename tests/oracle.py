"""What the product must compute, written from the definition in float64 and plain Python. Imports nothing of it.

`attend` and `choose` are one attention call; `OracleModel` runs a whole Hugging Face model eagerly, with a DynamicCache and
an attention function of its own that masks by the policy's roles.
"""

import contextlib
import math
from fractions import Fraction

import oracle_lsh
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask


def scores_of(q, k, length, mask, scale, softcap=0.0):
    """q `[B, Hq, 1, D]`, k `[B, Hkv, S, D]` -> float64 scores `[B, Hq, n]` and valid `[B, n]`, for n live slots.

    mask `[B or 1, 1, 1, S]`: bool, or added to the scores, where -1e4 (-9984 in bfloat16) and below hides a token.
    """
    batch, num_heads = q.shape[:2]
    group = num_heads // k.shape[1]
    n = min(length, k.shape[2])
    scores = torch.full((batch, num_heads, n), -math.inf, dtype=torch.float64)
    valid = torch.ones(batch, n, dtype=torch.bool)
    bias = torch.zeros(batch, n, dtype=torch.float64)
    if mask is not None and mask.dtype == torch.bool:
        valid = mask[:, 0, 0, :n].expand(batch, n).clone()
    elif mask is not None:
        bias = mask[:, 0, 0, :n].expand(batch, n).double()
        valid = bias > -9900
    for b in range(batch):
        for h in range(num_heads):
            keys = k[b, h // group, :n].double()
            row = keys @ q[b, h, 0].double() * scale
            row = softcap * torch.tanh(row / softcap) if softcap else row
            scores[b, h] = torch.where(valid[b], row + bias[b], -math.inf)
    return scores, valid


def probabilities(scores, sink=None):
    """float64 scores `[n]` of one head -> their softmax, beside the logit `sink` of a token that nobody sees; empty: 0."""
    weights = (scores - max(scores.max().item(), -1e300 if sink is None else float(sink))).exp()
    total = weights.sum() + (0.0 if sink is None else math.exp(float(sink) - max(scores.max().item(), float(sink))))
    return weights / total


def attend(scores, v, allowed=None, sink=None):
    """Softmax over the allowed tokens (`[B, Hq, n]` bool) times v `[B, Hkv, S, D]` -> float64 `[B, Hq, 1, D]`; empty: 0."""
    batch, num_heads, _ = scores.shape
    group = num_heads // v.shape[1]
    out = torch.zeros(batch, num_heads, 1, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(num_heads):
            keep = scores[b, h] > -math.inf
            if allowed is not None:
                keep &= allowed[b, h]
            where = keep.nonzero()[:, 0]
            if len(where):
                probs = probabilities(scores[b, h, where], None if sink is None else sink[h])
                out[b, h, 0] = probs @ v[b, h // group, where].double()
    return out


def importance_of(scores, num_kv_heads, share, sink=None, pool="sum", sinks=0, recent=0):
    """float64 scores `[B, Hq, n]` -> what each token set ranks by, `[B, G, n]`; `sinks` and `recent` for a union."""
    if share == "query_head":
        return scores
    batch, num_heads, n = scores.shape
    if pool == "union" and num_heads > (num_kv_heads if share == "kv_head" else 1):
        return in_turn(scores, num_kv_heads if share == "kv_head" else 1, sinks, recent)
    probs = torch.zeros_like(scores)
    for b in range(batch):
        for h in range(num_heads):
            if (scores[b, h] > -math.inf).any():
                probs[b, h] = probabilities(scores[b, h], None if sink is None else sink[h])
    num_sets = num_kv_heads if share == "kv_head" else 1
    sets = probs.view(batch, num_sets, num_heads // num_sets, n)
    return sets.amax(2) if pool == "max" else sets.sum(2)


def in_turn(scores, num_sets, sinks, recent):
    """The heads of a set take turns, each with its best token that is left beside sinks and recent ones: minus the turn."""
    batch, num_heads, n = scores.shape
    members = num_heads // num_sets
    worth = torch.full((batch, num_sets, n), -math.inf, dtype=torch.float64)
    for b in range(batch):
        alive = [p for p in range(n) if scores[b, 0, p] > -math.inf]
        free = alive[sinks : max(sinks, len(alive) - recent)]
        for g in range(num_sets):
            rows = [scores[b, g * members + m].tolist() for m in range(members)]
            orders = [sorted(free, key=lambda p, row=row: (-row[p], p)) for row in rows]
            turn = 0
            for rank in range(len(free)):
                for order in orders:
                    position = order[rank]
                    if worth[b, g, position] == -math.inf:
                        worth[b, g, position] = -turn
                    turn += 1
    return worth


def live_budget(budget, ratio, count):
    """The tokens that a selection keeps of `count` valid ones."""
    return min(count, max(budget, math.ceil(Fraction(str(ratio)) * count)))


def choose(importance, valid, budget, ratio, sinks, recent):
    """The sets as Python: for every row of `[B, G, n]` the sorted list of chosen positions."""
    chosen = []
    for b in range(importance.shape[0]):
        alive = valid[b].nonzero()[:, 0].tolist()
        keep = live_budget(budget, ratio, len(alive))
        always = set(alive[:sinks]) | set(alive[max(0, len(alive) - recent) :])
        sets = []
        for g in range(importance.shape[1]):
            worth = importance[b, g].tolist()
            others = sorted((p for p in alive if p not in always), key=lambda p: (-worth[p], p))
            sets.append(sorted(always | set(others[: max(0, keep - len(always))])) if keep < len(alive) else alive)
        chosen.append(sets)
    return chosen


def sets_as_mask(chosen, num_heads, n):
    """Lists of positions `[B][G]` -> bool `[B, Hq, n]`."""
    allowed = torch.zeros(len(chosen), num_heads, n, dtype=torch.bool)
    for b, sets in enumerate(chosen):
        for h in range(num_heads):
            allowed[b, h, sets[h * len(sets) // num_heads]] = True
    return allowed


def page_scores(q, k, scores, scale, softcap, page):
    """What stands in for the scores `[B, Hq, n]`: the most that the visible keys of a token's page allow, by their bounds."""
    batch, num_heads, n = scores.shape
    group, bounds = num_heads // k.shape[1], torch.full_like(scores, -math.inf)
    for b in range(batch):
        for h in range(num_heads):
            query, keys = q[b, h, 0].double(), k[b, h // group, :n].double()
            products = keys @ query * scale
            capped = softcap * torch.tanh(products / softcap) if softcap else products
            for first in range(0, n, page):
                there = [p for p in range(first, min(first + page, n)) if scores[b, h, p] > -math.inf]
                if there:
                    low, high = keys[there].min(0).values, keys[there].max(0).values
                    bound = torch.maximum(query * low, query * high).sum() * scale
                    bound = softcap * torch.tanh(bound / softcap) if softcap else bound
                    for p in there:
                        added = round((scores[b, h, p] - capped[p]).item(), 6)  # by the mask to this token
                        bounds[b, h, p] = bound + added
    return bounds


def choose_by_pages(q, k, scores, valid, scale, softcap, sink, settings):
    """Sets `[B][G]` of positions: the tokens of the best pages, the newest page first; with `keep`, the best of these."""
    num_heads, num_kv_heads, page = scores.shape[1], k.shape[1], settings.get("page", 16)
    budget, ratio, sinks, recent = (settings[name] for name in ("budget", "ratio", "sinks", "recent"))
    share, pool, keep = settings["share"], settings.get("pool", "sum"), settings.get("keep", 0)
    bounds = page_scores(q, k, scores, scale, softcap, page)
    worth = importance_of(bounds, num_kv_heads, share, sink, pool, sinks, recent).clone()
    for b in range(len(valid)):
        newest = max(valid[b].nonzero()[:, 0].tolist(), default=-1) // page
        worth[b, :, max(0, newest * page) : (newest + 1) * page] = 1e300
    if not keep:
        return choose(worth, valid, budget, ratio, sinks, recent)
    wide = Fraction(str(keep)) * Fraction(str(ratio))
    candidates = choose(worth, valid, math.ceil(Fraction(str(keep)) * budget), min(Fraction(1), wide), sinks, recent)
    members = num_heads // worth.shape[1]
    exact = scores.masked_fill(~sets_as_mask(candidates, num_heads, scores.shape[2]), -math.inf)
    ranked = []
    for g in range(worth.shape[1]):
        heads = slice(g * members, (g + 1) * members)
        own_sink = None if sink is None else sink[heads]
        one = "layer" if members > 1 else "query_head"
        ranked.append(importance_of(exact[:, heads], 1, one, own_sink, pool, sinks, recent)[:, 0])
    ranked = torch.stack(ranked, 1)
    for b, sets in enumerate(candidates):
        for g, some in enumerate(sets):
            outside = [p for p in range(scores.shape[2]) if p not in set(some)]
            ranked[b, g, outside] = -math.inf
    return choose(ranked, valid, budget, ratio, sinks, recent)


class OracleModel:
    """A Hugging Face model, run eagerly, whose decode steps attend by the roles `{layer: (role, source, settings)}`."""

    def __init__(self, model, roles, planes=None):
        """`planes(settings, head_dim)`: the hyperplanes `[L, K, D]` of a layer that samples by LSH."""
        self.model, self.roles, self.sets, self.planes, self.began = model, roles, {}, planes, {}
        AttentionInterface.register("oracle", self._attention)
        AttentionMaskInterface.register("oracle", sdpa_mask)

    @contextlib.contextmanager
    def _installed(self):
        before = self.model.config._attn_implementation
        self.model.config._attn_implementation = "oracle"
        try:
            yield
        finally:
            self.model.config._attn_implementation = before

    def _attention(self, module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if query.shape[2] > 1:
            group = query.shape[1] // key.shape[1]
            k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
            causal = torch.ones(query.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - query.shape[2])
            mask = causal if attention_mask is None else attention_mask[..., : k.shape[2]]
            scores = query.double() @ k.double().mT * scale
            scores = (torch.tanh(scores / softcap) * softcap if softcap else scores).masked_fill(~mask, -math.inf)
            sink = torch.full_like(scores[..., :1], -math.inf)
            if s_aux is not None:
                sink[:] = s_aux.double()[:, None, None]
            weights = torch.cat([scores, sink], -1).softmax(-1).nan_to_num(0.0)[..., :-1]
            return (weights @ v.double()).to(query.dtype).transpose(1, 2), None
        n = key.shape[2]
        mask = None if attention_mask is None else attention_mask[..., :n].expand(query.shape[0], 1, 1, n)
        scores, valid = scores_of(query, key, n, mask, scale, softcap or 0.0)
        role, source, settings = self.roles[module.layer_idx]
        if settings.get("by") == "lsh":
            return self._sample(module.layer_idx, query, key, value, mask, scale, softcap or 0.0, s_aux, settings), None
        allowed = None
        if role == "select":
            if settings.get("by") == "pages":
                chosen = choose_by_pages(query, key, scores, valid, scale, softcap or 0.0, s_aux, settings)
            else:
                chosen = self._choose(scores, valid, key.shape[1], settings, s_aux)
            self.sets[module.layer_idx] = sets_as_mask(chosen, query.shape[1], n)
            if settings.get("output", "full" if settings.get("by", "scores") == "scores" else "sparse") == "sparse":
                allowed = self.sets[module.layer_idx]
        if role == "reuse":
            allowed = self.sets[source]
            if settings.get("heads"):  # kv head h of this layer takes the tokens of kv head heads[h] of the source
                group = query.shape[1] // key.shape[1]
                allowed = torch.cat([allowed[:, group * head : group * (head + 1)] for head in settings["heads"]], 1)
        return attend(scores, value, allowed, s_aux).to(query.dtype).transpose(1, 2), None

    def _sample(self, layer, q, k, v, mask, scale, softcap, sink, settings):
        """MagicPIG's layer `[B, 1, Hq, D]`: the mean is that of the first decode step, and decoded tokens follow it."""
        n, sizes = k.shape[2], (settings["sinks"], settings["recent"])
        if layer not in self.began:
            exact_from = n - 1 if settings.get("decoded") == "exact" else None
            _, dynamic, _ = oracle_lsh.roles(n, mask, len(k), n, *sizes, exact_from)
            rows = zip(k.double(), dynamic, strict=True)
            means = [keys[:, own].sum(1) / max(1, int(own.sum())) for keys, own in rows]
            self.began[layer] = torch.stack(means), n - 1
        mean, since = self.began[layer]
        out = oracle_lsh.layer(
            q, k, v, n, mask, self.planes(settings, q.shape[3]), scale, *sizes, settings.get("threshold", 2),
            settings.get("epsilon", 1e-4), mean, since if settings.get("decoded") == "exact" else None, softcap, sink,
        )  # fmt: skip
        return out.to(q.dtype).transpose(1, 2)

    @staticmethod
    def _choose(scores, valid, num_kv_heads, settings, sink):
        """The sets of a selection, by its method."""
        sizes = [settings[name] for name in ("budget", "ratio", "sinks", "recent")]
        pool, share = settings.get("pool", "sum"), settings["share"]
        if settings.get("by") == "window":  # the later, the better
            return choose(torch.arange(scores.shape[2]).expand(scores.shape[0], 1, -1), valid, *sizes)
        ranked = importance_of(scores, num_kv_heads, share, sink, pool, settings["sinks"], settings["recent"])
        return choose(ranked, valid, *sizes)

    @torch.no_grad()
    def logits(self, prompt, tokens, mask=None):
        """Prefill prompt `[B, n]` (2-D mask for padding), then feed tokens `[B, T]`: logits `[B, T, vocab]`."""
        cache, rows, self.began = DynamicCache(config=self.model.config), [], {}
        with self._installed():
            self.model(input_ids=prompt, attention_mask=mask, past_key_values=cache, use_cache=True)
            for i in range(tokens.shape[1]):
                if mask is not None:
                    mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
                out = self.model(
                    input_ids=tokens[:, i : i + 1], attention_mask=mask, past_key_values=cache, use_cache=True
                )
                rows.append(out.logits[:, -1])
        return torch.stack(rows, 1)


def roles_of(policy):
    """The policy as the oracle takes it, read from the file's words rather than the product's plan."""
    data = policy.to_dict()
    defaults, roles, last = data["defaults"], {}, None
    for key, entry in data["layers"].items():
        entry = {"role": entry} if isinstance(entry, str) else entry
        first, _, end = key.partition("-")
        for layer in range(int(first), int(end or first) + 1):
            settings = {**defaults, **{name: value for name, value in entry.items() if name not in ("role", "from")}}
            budget = settings["budget"]
            settings["ratio"] = budget["ratio"] if isinstance(budget, dict) else 0
            settings["budget"] = budget["min"] if isinstance(budget, dict) else budget
            last = layer if entry["role"] == "select" and settings.get("by") != "lsh" else last
            roles[layer] = (entry["role"], entry.get("from", last), settings)
    return roles
