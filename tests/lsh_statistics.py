"""What sampling by LSH must be good for, as statistics of an estimator that is given; the baselines to compare it with.

An estimator is `estimate(queries [G, D], keys [n, D], values [n, Dv], planes [L, K, D])` -> outputs `[G, Dv]` and how
many tokens each query has read, `[G]`: the query heads of one kv head, all of whose tokens are dynamic, at scale
D ** -0.5.
"""

import math

import torch
from oracle_lsh import inclusion


def sampler(threshold=2, epsilon=1e-4, corrected=True):
    """The estimator itself in the dtype of its arguments, quickly: u from a table over the cosine. Without log u: biased."""
    grid = torch.linspace(-1, 1, 20001, dtype=torch.float64)

    def estimate(queries, keys, values, planes):
        tables, bits, dim = planes.shape
        centred, flat = keys - keys.mean(0), planes.reshape(-1, dim).mT
        powers = 2.0 ** torch.arange(bits, dtype=planes.dtype)
        key_codes, query_codes = [
            ((x @ flat > 0).to(x.dtype).view(-1, tables, bits) @ powers) for x in (centred, queries)
        ]
        log_u = (inclusion(grid, bits, tables, threshold) + epsilon).log().to(keys.dtype)
        outputs, kept = [], []
        for query, code in zip(queries, query_codes, strict=True):
            hit = ((key_codes == code).sum(-1) >= threshold).nonzero()[:, 0]
            logits = keys[hit] @ query / math.sqrt(dim)
            if corrected:
                cos = centred[hit] @ query / query.norm() / centred[hit].norm(dim=-1)
                logits = logits - log_u[((cos + 1) * 10000).round().long()]
            outputs.append(logits.softmax(0) @ values[hit])
            kept.append(len(hit))
        return torch.stack(outputs), torch.tensor(kept)

    return estimate


def top_k(logits, values, count, _generator):
    """logits `[n]`, values `[n, Dv]` -> `[Dv]`: attention to the `count` tokens of the best scores."""
    best = logits.topk(count)
    return best.values.softmax(0) @ values[best.indices]


def uniform(logits, values, count, generator):
    """As `top_k`, of tokens drawn without replacement, all alike."""
    drawn = torch.randperm(len(logits), generator=generator)[:count]
    return logits[drawn].softmax(0) @ values[drawn]


def by_probability(logits, values, count, generator):
    """As `top_k`: the mean value of tokens drawn by their probabilities, with replacement (the paper's oracle sampling)."""
    return values[logits.softmax(0).multinomial(count, replacement=True, generator=generator)].mean(0)


BASELINES = {"top_k": top_k, "uniform": uniform, "by_probability": by_probability}


def values_of(kind, z, generator, dim):
    """Values `[n, D]` for tokens of standard scores z `[n]`, of unit variance about a mean that depends on the kind.

    `headtail`: one mean for the best 5% of the tokens, another for the rest; `linear`: z / 2 times a direction; `mean`: one
    for all, whatever the score.
    """
    first, second = torch.randn(2, dim, generator=generator)
    noise = torch.randn(len(z), dim, generator=generator)
    if kind == "headtail":
        return torch.where((z >= z.quantile(0.95))[:, None], first, second) + noise
    return noise + (z[:, None] / 2 * first if kind == "linear" else first)


def errors(
    estimators, sigmas=(0.5, 1, 2, 3), kinds=("headtail", "linear"), n=4096, dim=128, k=10, l=150, trials=20, seed=0
):
    """Mean relative errors of the output, `{(kind, sigma): {name: error}}`, for estimators by name and for `BASELINES`.

    Scores are Gaussian with standard deviation sigma; a baseline reads as many tokens as the first of the estimators has
    (`"budget"`: which part of n). Every trial has keys, values and planes of its own.
    """
    sums = {(kind, sigma): {} for kind in kinds for sigma in sigmas}
    for trial in range(trials):
        generator = torch.Generator().manual_seed(seed * 1000 + trial)
        keys, planes = torch.randn(n, dim, generator=generator), torch.randn(l, k, dim, generator=generator)
        towards = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)
        queries = torch.tensor(sigmas)[:, None] * math.sqrt(dim) * towards
        logits = queries @ keys.mT / math.sqrt(dim)
        for kind in kinds:
            values = values_of(kind, keys @ towards, generator, dim)
            exact, found, kept = logits.softmax(-1) @ values, {}, None
            for name, estimate in estimators.items():
                found[name], counts = estimate(queries, keys, values, planes)
                kept = counts if kept is None else kept
            for name, baseline in BASELINES.items():
                rows = zip(logits, kept.tolist(), strict=True)
                found[name] = torch.stack([baseline(row, values, count, generator) for row, count in rows])
            for i, sigma in enumerate(sigmas):
                into = sums[kind, sigma]
                into["budget"] = into.get("budget", 0.0) + kept[i].item() / n / trials
                for name, outputs in found.items():
                    error = ((outputs[i] - exact[i]).norm() / exact[i].norm()).item()
                    into[name] = into.get(name, 0.0) + error / trials
    return sums


def check_against_baselines(estimate, uncorrected, **settings):
    """T9: with flat scores and values that go with them it beats the best tokens threefold, and a sampler without log u."""
    both = {"sampler": estimate, "uncorrected": uncorrected}
    for case, error in errors(both, sigmas=(0.5, 1), **settings).items():
        assert error["sampler"] < error["top_k"] / 3, (case, error)
        assert error["sampler"] < error["uncorrected"] / 1.5, (case, error)
