"""`by: lsh`: attention to a random sample of tokens, with weights that make up for those left out.

MagicPIG (https://arxiv.org/abs/2410.16179). `l` tables of `k` random hyperplanes give each key, less the mean of all
keys, `l` codes of `k` bits, and each query head as many. A token is sampled by a query head if at least `threshold` of
their codes are equal. Let c be the cosine of query and key, less that mean; then a code is equal with probability
t = (1 - arccos(c) / pi)^k, and a token is sampled with u = P[Binomial(l, t) >= threshold]. Its score is lowered by
log(u + epsilon), so that both sums of softmax are those of all tokens in expectation, but for `epsilon`, which bounds
what one token can weigh. Sinks and recent tokens are attended to as they are. There is no budget: how many tokens are
sampled is random, and every query head has a sample of its own, so that no other layer can reuse it.

The mean is that of a row's tokens at the first step after a prefill, without sinks and recent ones, and then stays; any
other one would do, since softmax doesn't change if all scores do, but a good one lets keys differ in direction. Decoded
tokens are hashed as they come. Keys stay as they are in the cache.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from . import Method

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..call import Call, Selection

WORD = 32  # tokens whose bits of one hyperplane stand in one int32
STEPS = 2**12  # of the kernel's table of weights: what lies between is off by less than a float32 cosine makes it
MOST_WORDS = 2**22  # that the definition looks at in one go
DECODED = ("sampled", "exact")
PLACES = ("gpu", "cpu")
MOST_BITS_ON_CPU = 15  # codes are int16 there


@dataclass(frozen=True)
class Lsh(Method):
    """`k`: bits of a code, 1 to 16. `l`: tables. `threshold`: equal codes that it takes to be sampled, 1 to 4.

    `seed`: of the hyperplanes; layers of one seed err alike. `epsilon`: 0 for the unbiased estimator. `decoded`:
    whether tokens decoded after the prefill are `sampled` like others, or attended to as they are (`exact`). A prefill
    ends with the first step after somebody else wrote to the cache.

    `place`: where the sample is looked up and attended to: on the `gpu` that holds the cache, or, for a cache in host
    memory (`HostCache`), on the `cpu` (see `host.step`), which takes decoded tokens as `exact` only, and k up to 15.
    """

    attends: ClassVar[bool] = True
    keeps: ClassVar[tuple[str, ...]] = ("planes", "center", "codes", "since", "log_weights")

    k: int = 10
    l: int = 150
    threshold: int = 2
    seed: int = 0
    epsilon: float = 1e-4
    decoded: str = "sampled"
    place: str = "gpu"

    def __post_init__(self) -> None:
        for name, least, most in (
            ("k", 1, 16),
            ("l", 1, 1024),
            ("threshold", 1, min(4, self.l)),
            ("seed", 0, 2**31 - 1),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be {least} to {most}; found {getattr(self, name)}")
        if not 0.0 <= self.epsilon < 1.0:
            raise ValueError(f"epsilon must be at least 0, and below 1; found {self.epsilon}")
        if self.decoded not in DECODED:
            raise ValueError(f"decoded must be {' or '.join(DECODED)}; found {self.decoded}")
        if self.place not in PLACES:
            raise ValueError(f"place must be {' or '.join(PLACES)}; found {self.place}")
        if self.place == "cpu" and (self.decoded != "exact" or self.k > MOST_BITS_ON_CPU):
            raise ValueError(
                f"place: cpu takes decoded: exact, and k up to {MOST_BITS_ON_CPU}; found {self.decoded}, and {self.k}"
            )

    @property
    def prepares(self) -> bool:
        """On the host, tables are sorted before a step and not in it."""
        return self.place == "cpu"

    def summarize(self, key: Tensor) -> tuple[Tensor, ...]:
        """Hyperplanes `[l, k, D]`, `log_weights()`, and room for what the next step makes of the keys, as only it knows
        which are live.

        The mean `[B, Hkv, D]` float32; of each hyperplane, on which side of it the keys are, a bit a slot
        `[B, Hkv, l, k, >= S / 32]` int32; and the live slots at the first step, 0 before it, and how many slots have
        their bits: `[2]` int32. On the host, in place of the bits, the tables of `host.step`, int32.
        """
        import torch
        from torch._subclasses import FakeTensor

        from ..host import memory, step

        batch, num_kv_heads, slots, head_dim = key.shape
        words = -(-slots // (16 * WORD)) * 16  # rows are aligned, for wide loads
        new = torch.zeros
        codes: tuple[int, ...] = batch, num_kv_heads, self.l, self.k, words
        if self.place == "cpu":
            new = torch.zeros if isinstance(key, FakeTensor) or key.is_meta else memory.zeros
            codes = (sum(step.table_words(self, batch, num_kv_heads, slots)),)
        return (
            torch.tensor(normals(self.l, self.k, head_dim, self.seed), device=key.device, dtype=key.dtype),
            new((batch, num_kv_heads, head_dim), dtype=torch.float32, device=key.device),
            new(codes, dtype=torch.int32, device=key.device),
            torch.zeros(2, dtype=torch.int32, device=key.device),
            self.log_weights().to(key.device),
        )

    def renew(self, key: Tensor, *kept: Tensor) -> None:
        """Only say so: the next step hashes all live keys, and others have no say until they are."""
        kept[3].zero_()

    def prepare(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> None:
        """Hash the prompt, and sort its tokens into tables."""
        from ..host import step

        step.prepare(call, selection, self, *kept[:4])

    def connect(self, call: Call[Tensor], *kept: Tensor) -> None:
        """Make what the GPU and the host exchange."""
        from ..host import step

        step.connect(call, self, kept[1], kept[2])

    def step(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> Tensor:
        """On a CPU."""
        from ..host import step

        if kept and self.place == "cpu":
            return step.attend(call, selection, self, *kept[:4])
        return super().step(call, selection, *kept)

    def update(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> None:
        """At the first step the mean, and the bits of all live keys; then those of keys that have none yet.

        That is the newest one, and more of them where a counter was set forth. One that was set back counts anew.
        """
        import torch

        from .. import reference

        planes, center, codes, since, _ = kept
        live = min(int(call.length), call.key.shape[2])
        if int(since[0]) == 0 and live:
            seen = reference.seen(call)[:, 0, :live]  # [B, n], of the first query
            since[0] = live
            if call.query.shape[2] > 1 and seen.any():  # up to the first query, as only its mask says
                since[0] = int(seen.nonzero()[:, 1].max()) + 1
            dynamic = seen & ~reference.always_kept(seen, selection)
            if self.decoded == "exact":
                dynamic[:, int(since[0]) - 1 :] = False
            dynamic = dynamic[:, None, :, None]
            total = reference.keys_of(call, slice(live)).masked_fill(~dynamic, 0.0).sum(2)
            center.copy_(total / dynamic.sum(2).clamp(min=1))
            since[1] = 0
        begin = max(0, min(int(since[1]), live - 1)) // WORD * WORD
        since[0].clamp_(max=live)
        since[1] = live
        keys = reference.model_keys(call, slice(begin, live)).float()
        flat = planes.flatten(0, 1).float()  # [l k, D]
        sides = flat @ keys.mT > (center @ flat.mT)[..., None]  # [B, Hkv, l k, n]
        sides = torch.nn.functional.pad(sides, (0, -sides.shape[3] % WORD)).unflatten(3, (-1, WORD))
        words = (sides.long() << torch.arange(WORD, device=sides.device)).sum(4).int()
        codes.flatten(2, 3)[..., begin // WORD : begin // WORD + words.shape[3]] = words

    def attend(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> Tensor:
        """Attention to the sample, sinks and recent tokens: `[B, Hq, T, D]`."""
        import torch

        from .. import reference

        if not kept:
            method = replace(self, place="gpu")  # which samples the same tokens
            kept = method.summarize(reference.model_keys(call, slice(None)))
            method.update(call, selection, *kept)
        planes, center, codes, since, _ = kept
        scores = reference.score_live_tokens(call)  # [B, Hkv, g, T, n]
        n = scores.shape[4]
        seen = reference.seen(call)[..., :n]
        static = seen & reference.always_kept(seen, selection)  # [B, T, n]
        if self.decoded == "exact":
            static |= seen & (torch.arange(n, device=seen.device) >= since[0] - 1)
        sampled = self._sampled(call, planes, codes, n) & (seen & ~static)[:, None, None]
        chances = self.inclusion(_cosines(call, center, n)[sampled]) + self.epsilon
        scores = scores.masked_fill(~sampled & ~static[:, None, None], -math.inf)
        scores[sampled] -= chances.log().float()
        return reference.weigh_live_tokens(call, scores)

    def step_on_gpu(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> Tensor:
        """A scan of the bits, and attention to whom it finds; or the host's part and the GPU's."""
        from ..host import step
        from ..triton import lsh

        if self.place == "cpu":
            return step.attend_beside_gpu(call, selection, self, *kept)
        return lsh.attend(call, selection, self, *kept)

    def inclusion(self, cosine: Tensor) -> Tensor:
        """The probability to be sampled, by the cosine."""
        return self._found(1.0 - cosine.double().clamp(-1.0, 1.0).arccos() / math.pi)

    def log_weights(self) -> Tensor:
        """-log2(u + epsilon) `[STEPS + 1]` float32, by the probability that both are on one side of a hyperplane."""
        import torch

        chances = self._found(torch.linspace(0.0, 1.0, STEPS + 1, dtype=torch.float64))
        return -(chances + self.epsilon).log2().float()

    def _found(self, agreement: Tensor) -> Tensor:
        """P[Binomial(l, agreement^k) >= threshold], of float64."""
        import torch

        t = agreement.clamp(0.0, 1.0 - 1e-12) ** self.k
        odds = t / (1.0 - t)
        fewer = sum(math.comb(self.l, hits) * odds**hits for hits in range(1, self.threshold))
        missed = self.l * (-t).log1p() + torch.as_tensor(fewer, device=t.device).double().log1p()
        return -missed.expm1().clamp(max=-1e-30)  # what is left of the smallest chances is rounding

    def keys_read(self, selection: Selection, length: int, key_bytes: int) -> float:
        """The bits, as so many keys; or on the host a bucket of every table."""
        bits_a_token = self.k * self.l
        if self.place == "cpu":
            bits_a_token = (16 if length <= 2**16 else 32) * self.l / 2**self.k
        return length * bits_a_token / 8 / key_bytes

    def tokens_kept(self, selection: Selection, length: int) -> int:
        """An estimate: the sample of keys that point nowhere in particular, with heads of 128."""
        static = min(length, selection.sinks + selection.recent)
        return static + math.ceil((length - static) * self._typical_share())

    @functools.lru_cache  # noqa: B019
    def _typical_share(self) -> float:
        import torch

        cosine = torch.linspace(-0.5, 0.5, 1001)
        weight = (-(cosine**2) * 64).exp()
        return float((self.inclusion(cosine) * weight).sum() / weight.sum())

    def _sampled(self, call: Call[Tensor], planes: Tensor, codes: Tensor, n: int) -> Tensor:
        """Which tokens each query head samples, of all live ones: `[B, Hkv, g, T, n]` bool."""
        import torch

        batch, num_heads, num_tokens, head_dim = call.query.shape
        num_kv_heads, words = call.key.shape[1], -(-n // WORD)
        rows = call.query.float().reshape(batch, num_kv_heads, -1, head_dim)  # [B, Hkv, g T, D]
        sides = -(torch.einsum("lkd,bhrd->bhrlk", planes.float(), rows) > 0).int()  # 0, or all bits
        levels: list[Tensor] = []
        at_once = max(1, MOST_WORDS // max(1, batch * num_kv_heads * rows.shape[2] * words))  # tables
        for first in range(0, self.l, at_once):
            some = slice(first, first + at_once)
            miss = torch.zeros(1, dtype=torch.int32, device=rows.device)
            for bit in range(self.k):
                miss = miss | (codes[:, :, None, some, bit, :words] ^ sides[..., some, bit, None])
            hits = [~miss]  # [B, Hkv, g T, tables, words]
            while hits[0].shape[3] > 1:  # of every two tables
                hits = [torch.nn.functional.pad(one, (0, 0, 0, one.shape[3] % 2)) for one in hits]
                hits = _hits_of_both(*([one[..., half::2, :] for one in hits] for half in (0, 1)), self.threshold)
            levels = _hits_of_both(levels, [one[..., 0, :] for one in hits], self.threshold)
        if len(levels) < self.threshold:
            levels.append(torch.zeros_like(levels[0]))
        bits = (levels[-1][..., None] >> torch.arange(WORD, device=rows.device)) & 1
        sampled = bits.flatten(3).bool()[..., :n]
        return sampled.view(batch, num_kv_heads, num_heads // num_kv_heads, num_tokens, n)


def _hits_of_both(some: list[Tensor], others: list[Tensor], most: int) -> list[Tensor]:
    """Words of who has 1, 2, ... hits or more, up to `most`, from those of some tables and those of others."""
    levels = []
    for hits in range(1, min(most, len(some) + len(others)) + 1):
        both = [
            some[one - 1] & others[hits - one - 1]
            for one in range(max(1, hits - len(others)), min(hits, len(some) + 1))
        ]
        alone = [levels_of[hits - 1] for levels_of in (some, others) if len(levels_of) >= hits]
        levels.append(functools.reduce(lambda one, other: one | other, [*both, *alone]))
    return levels


def _cosines(call: Call[Tensor], center: Tensor, n: int) -> Tensor:
    """The cosines of queries and the first n keys, less the mean: `[B, Hkv, g, T, n]`; 0 with a vector of zeros."""
    from .. import reference

    batch, num_heads, num_tokens, head_dim = call.query.shape
    num_kv_heads = call.key.shape[1]
    keys = reference.keys_of(call, slice(n)) - center[:, :, None]
    rows = call.query.float().reshape(batch, num_kv_heads, -1, head_dim)
    norms = rows.norm(dim=-1)[..., None] * keys.norm(dim=-1)[:, :, None]
    cosines = ((rows @ keys.mT) / norms).where(norms > 0.0, 0.0)
    return cosines.view(batch, num_kv_heads, num_heads // num_kv_heads, num_tokens, n)


@functools.lru_cache(maxsize=128)
def normals(tables: int, bits: int, head_dim: int, seed: int) -> np.ndarray:
    """Normal vectors `[l, k, D]` float32, which bfloat16 and float16 can hold, too."""
    import numpy as np

    normal = np.random.default_rng(seed).standard_normal((tables, bits, head_dim), dtype=np.float32)
    rounded = ((normal.view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)  # 7 bits after the first
    return np.where(np.abs(rounded) > 2.0**-14, rounded, np.float32(0.0))
