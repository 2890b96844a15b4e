"""Several tokens a step: somebody drafts them cheaply, and one step over all of them says which ones hold.

    draft    x -> d1, d2, ..., dD           steps under the policy, an assistant model, or what the prompt says
    verify   x, d1, ..., dD -> logits       one step of `WIDTH` tokens, which also writes their keys and values
    accept   the drafts before the first one that the verifying model would not have said; what comes next follows
             from its logits there

With `exact` the dense model verifies what the policy drafts: dense answers at nearly sparse speed. Greedy tokens are
those of the verifying model. Sampled ones come from its distribution, by rejection: a draft d, drawn with probability
q(d), is accepted with probability min(1, p(d) / q(d)), and else replaced by a draw from max(p - q, 0) (Leviathan et
al., https://arxiv.org/abs/2211.17192; with sparse attention as the draft: https://arxiv.org/abs/2404.11912).

Rows of a batch go on together, as far as the row with the fewest accepted drafts (`Drafter`), or where that can be done
each for itself (`RowDrafter`).
"""

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import Fp8Layer
from .errors import TidalError
from .run import rewind, take_back

WIDTH = 8  # tokens of a verification: it reads the cache and the weights once, however many are drafts
FIRST = 2  # drafts of a cycle that is to show what drafting is worth
GAIN = 1.1  # by which drafting must beat dense steps, as they are estimated
REST = 128  # dense steps before drafting is tried again


class Upcoming(NamedTuple):
    """What the loop is to choose the next token from: logits `[B, vocab]`; or it is chosen already."""

    logits: Tensor | None
    token: Tensor | None = None  # [B]
    weights: Tensor | None = None  # [B, vocab]: to draw from, in place of what the logits say


@dataclass
class Drafting:
    """How to draft, and what came of it. Pass one as `exact` to keep an eye on it.

    `tokens`: drafts a cycle, up to 7; None: as many as pay, by the acceptance and the times measured so far.
    """

    tokens: int | None = None
    cycles: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0  # cycles that ended at a draft which didn't hold
    steps: int = 0  # dense steps of one token, where drafting didn't pay

    @property
    def acceptance(self) -> float:
        """How likely a draft holds after others that did; those behind a rejected one are not judged."""
        return self.accepted / max(1, self.accepted + self.rejected)


@dataclass
class _Pace:
    """How many drafts pay: by the share accepted lately, and by what drafts and verifications take.

    The clocks of several ranks differ: `agree` returns what the first of them says.
    """

    agree: Callable[[int], int] = lambda drafts: drafts
    tried: float = 4.0  # as if so many had been tried before
    held: float = 3.4
    seconds: dict[str, deque] = field(default_factory=lambda: {"draft": deque(maxlen=8), "verify": deque(maxlen=8)})
    warm: int = 0  # cycles so far: the first ones compile, and record
    resting: int = 0

    def drafts(self) -> int:
        """How many drafts the next cycle is to have; 0: a dense step."""
        if self.resting:
            self.resting -= 1
            return 0 if self.resting else FIRST
        best = self.agree(self._best()) if self.seconds["verify"] else FIRST
        if not best:
            self.resting = REST
            self.tried, self.held = self.tried / 2, self.held / 2  # what was seen weighs less by then
        return best

    def _best(self) -> int:
        """By what was measured; 0: none pay."""
        draft, verify = (median(self.seconds[name]) for name in ("draft", "verify"))
        rate = self.held / self.tried
        speeds = {
            count: sum(rate**number for number in range(count + 1)) / (count * draft + verify)
            for count in range(1, WIDTH)
        }
        best = max(speeds, key=speeds.__getitem__)
        return best if speeds[best] * verify >= GAIN else 0

    def note(self, tried: float, held: float, draft: float, verify: float) -> None:
        """What a cycle came to in a row: drafts that were judged and that held; seconds of a draft and of the rest."""
        self.warm += 1
        self.tried = 0.95 * self.tried + tried
        self.held = 0.95 * self.held + held
        if self.warm > 3:
            self.seconds["draft"].append(draft)
            self.seconds["verify"].append(verify)


@dataclass
class FromPolicy:
    """Drafts by `step(token [B, 1], at [B, 1])` under the policy over the cache itself, which it leaves as it was.

    `step` returns logits `[B, 1, vocab]`, `place [B, slots]` are positions, and `processor` and `samples` say how
    tokens are chosen.
    """

    step: Callable
    cache: Any
    place: Tensor
    processor: Callable
    samples: bool

    def propose(self, sequences: Tensor, length: int, drafts: int) -> tuple[Tensor, Tensor | None]:
        """Drafts `[B, D]` behind the first `length` of sequences, and what each was drawn from `[B, D, vocab]`."""
        found = _go_on(self, sequences, length, drafts)
        take_back(self.cache, drafts)
        return found


@dataclass
class FromAssistant:
    """Drafts by another model: `step` over its own cache, which holds `known` tokens.

    `read(input_ids, past)` passes tokens that it missed through the model, the first of which belong in slot `past`.
    """

    step: Callable
    read: Callable
    cache: Any
    place: Tensor
    processor: Callable
    samples: bool
    known: int

    def propose(self, sequences: Tensor, length: int, drafts: int) -> tuple[Tensor, Tensor | None]:
        """See `FromPolicy.propose`."""
        held = min(self.known, length - 1)  # the others were drafts that didn't hold
        take_back(self.cache, self.known - held)
        if length - 1 - held > WIDTH:
            self.read(sequences[:, held : length - 1], held)
        else:
            for number in range(held, length - 1):
                self.step(sequences[:, number : number + 1], self.place[:, number : number + 1])
        self.known = length - 1 + drafts
        return _go_on(self, sequences, length, drafts)


@dataclass
class FromText:
    """Drafts that the text itself holds: what followed the last tokens when they stood there before, for certain.

    Prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding). The longest match of up to `most`
    tokens counts, and of these the latest.
    """

    most: int = 3

    def propose(self, sequences: Tensor, length: int, drafts: int) -> tuple[Tensor, Tensor | None]:
        """See `FromPolicy.propose`."""
        text = sequences[:, :length]
        begin = torch.full((len(text),), length - 1, device=text.device)  # without a match: anything
        for size in range(1, min(self.most, length - 1) + 1):
            same = (text.unfold(1, size, 1)[:, :-1] == text[:, None, -size:]).all(-1)  # [B, length - size]
            place = torch.arange(same.shape[1], device=text.device)
            latest = torch.where(same, place, -1).amax(1)
            begin = torch.where(latest >= 0, latest + size, begin)
        where = begin[:, None] + torch.arange(drafts, device=text.device)
        found = text.gather(1, where.clamp(max=length - 1))
        sequences[:, length : length + drafts] = found
        return found, None


def _go_on(by: FromPolicy | FromAssistant, sequences: Tensor, length: int, drafts: int) -> tuple[Tensor, Tensor | None]:
    """Write drafts into sequences, one by one, each by a step over what is there."""
    weights: list[Tensor] = []
    for number in range(length, length + drafts):
        token = sequences[:, number - 1 : number].to(by.place.device)
        logits = by.step(token, by.place[:, number - 1 : number])[:, -1]
        scores = by.processor(sequences[:, :number], logits.to(sequences.device, torch.float32))
        sequences[:, number] = _choose(scores, by.samples, weights)
    return sequences[:, length : length + drafts].clone(), torch.stack(weights, 1) if weights else None


def _choose(scores: Tensor, samples: bool, weights: list[Tensor]) -> Tensor:
    """A draft `[B]` by scores `[B, vocab]`; what it was drawn from is added to the weights."""
    if not samples:
        return scores.argmax(-1)
    weights.append(scores.softmax(-1))
    return torch.multinomial(weights[-1], num_samples=1).squeeze(1)


class Drafter:
    """The cycles of one call of `generate`.

    `verify(tokens [B, WIDTH], at [B, WIDTH])` runs a step over the cache, and returns logits `[B, WIDTH, vocab]`.
    `place [B, slots]` are positions. `pad`: the token of rows that have ended, if they do. `most`: drafts a cycle.
    """

    def __init__(
        self, drafting: Drafting, source: FromPolicy | FromAssistant | FromText, cache: Any, verify: Callable,
        place: Tensor, processor: Callable, samples: bool, pad: Tensor | None, most: int = WIDTH - 1,
        agree: Callable[[int], int] = lambda drafts: drafts,
    ):  # fmt: skip
        self.drafting, self.source, self.cache, self.verify = drafting, source, cache, verify
        self.place, self.processor, self.samples, self.pad, self.most = place, processor, samples, pad, most
        self.pace = _Pace(agree)
        self.clock = _Clock(place.device)

    def drafts(self, room: int) -> int:
        """How many drafts the next cycle is to have, if there is room for so many tokens."""
        wanted = self.pace.drafts() if self.drafting.tokens is None else self.drafting.tokens
        drafts = max(0, min(wanted, self.most, room - 1))
        self.drafting.steps += drafts == 0
        return drafts

    def cycle(self, sequences: Tensor, length: int, going: Tensor, drafts: int) -> list[Upcoming]:
        """Go on from sequences `[B, >= length + WIDTH]`, whose token length - 1 isn't in the cache yet.

        What comes next: accepted drafts, which are in the cache then, and what follows them.
        """
        start = length - 1
        self.clock.tick()
        drafted, draws = self.source.propose(sequences, length, drafts)  # [B, D], [B, D, vocab]
        self.clock.tick()
        ended = ~going[:, None]
        if self.pad is not None:
            drafted = torch.where(ended, self.pad, drafted)
            sequences[:, length : length + drafts] = drafted
        tokens = torch.zeros(len(sequences), WIDTH, dtype=torch.long, device=self.place.device)
        tokens[:, : drafts + 1] = sequences[:, start : length + drafts]
        dense = self.verify(tokens, self.place[:, start : start + WIDTH])
        self.clock.tick()
        dense = dense[:, : drafts + 1].to(sequences.device, torch.float32, copy=True)  # [B, D + 1, vocab]
        prefixes = [sequences[:, : length + number] for number in range(drafts + 1)]
        rows = [self.processor(one, row.clone()) for one, row in zip(prefixes, dense.unbind(1), strict=True)]
        scores = torch.stack(rows, 1)
        if self.samples and draws is None:
            draws = torch.nn.functional.one_hot(drafted, scores.shape[-1]).float()
        held = (holds(drafted, scores, draws) | (ended & (self.pad is not None))).long().cumprod(1).sum(1)  # [B]
        accepted = int(held.min())
        take_back(self.cache, WIDTH - 1 - accepted)
        self._note(drafts, accepted)
        after = Upcoming(dense[:, accepted])
        if draws is not None and accepted < drafts:
            p = scores[:, accepted].softmax(-1)
            rest = _instead(p, draws[:, accepted])
            own = torch.nn.functional.one_hot(drafted[:, accepted], p.shape[-1]).to(p.dtype)  # accepted in this row
            after = Upcoming(dense[:, accepted], weights=torch.where((held > accepted)[:, None], own, rest))
        return [Upcoming(dense[:, number], drafted[:, number]) for number in range(accepted)] + [after]

    def _note(self, drafts: int, accepted: int) -> None:
        draft, verify = self.clock.seconds()
        rejected = int(accepted < drafts)
        self.pace.note(accepted + rejected, accepted, draft / drafts, verify)
        _count(self.drafting, drafts, accepted, rejected)


def holds(drafted: Tensor, scores: Tensor, draws: Tensor | None) -> Tensor:
    """Which drafts `[B, D]` hold, by the verifying scores `[B, D + 1, vocab]` and what they were drawn from."""
    if draws is None:
        return scores[:, :-1].argmax(-1) == drafted
    wanted, drawn = (each.gather(2, drafted[..., None])[..., 0] for each in (scores[:, :-1].softmax(-1), draws))
    return torch.rand_like(wanted) * drawn < wanted


def _instead(p: Tensor, q: Tensor) -> Tensor:
    """What to draw from in place of a draft that was drawn from q `[B, vocab]`, and didn't hold."""
    rest = (p - q).clamp(min=0.0)
    return torch.where(rest.sum(-1, keepdim=True) > 0.0, rest, p)


def check(drafting: Drafting) -> None:
    """Raise `TidalError` for a number of drafts that can't be verified at once."""
    if drafting.tokens is not None and not 1 <= drafting.tokens < WIDTH:
        raise TidalError(f"generate: exact drafts {drafting.tokens} tokens; from 1 to {WIDTH - 1} are possible")


def _count(drafting: Drafting, drafted: int, accepted: int, rejected: int) -> None:
    drafting.cycles += 1
    drafting.drafted += drafted
    drafting.accepted += accepted
    drafting.rejected += rejected


class RowDrafter:
    """Cycles in which each row keeps what it accepted, however little the others did. The policy drafts.

    All rows write to the same slots of the cache. Slots in which a draft was rejected are holes, which the mask
    `[B, S]` hides; when the cache is full, they are closed. `draft` runs a step of one token under the policy, and
    `verify` a dense one of one token or of `WIDTH`. `processor` looks at scores alone. Rows end at `most` tokens.
    """

    def __init__(
        self, drafting: Drafting, cache: Any, draft: Callable, verify: Callable, mask: Tensor, length: int, most: int,
        processor: Callable, samples: bool, agree: Callable[[int], int] = lambda drafts: drafts,
    ):  # fmt: skip
        self.drafting, self.cache, self.draft, self.verify = drafting, cache, draft, verify
        self.mask, self.most, self.processor, self.samples = mask, most, processor, samples
        self.padding = length - mask[:, :length].sum(1)  # [B]
        self.known = torch.full_like(self.padding, length + 1)  # tokens of each row, whose last is not in the cache
        self.prompt = self.used = length  # slots of the prompt, and of the cache
        self.pace = _Pace(agree)
        self.clock = _Clock(mask.device)

    def drafts(self, room: int) -> int:
        """How many drafts the next cycle is to have; 0: a dense step."""
        drafts = self.pace.drafts() if self.drafting.tokens is None else self.drafting.tokens
        self.drafting.steps += drafts == 0
        return drafts

    def cycle(self, sequences: Tensor, length: int, going: Tensor, drafts: int) -> list[Upcoming]:
        """Go on from sequences `[B, > most]`, of which all rows know `length` tokens: those that all know then."""
        if self.used + WIDTH > self.mask.shape[1]:
            self._close_holes()
        width = WIDTH if drafts else 1
        active = (self.known < self.most) & going
        at = (self.known - 1)[:, None] + torch.arange(WIDTH, device=self.known.device)
        at = at.clamp(max=self.most - 1) - self.padding[:, None]  # positions [B, WIDTH]
        tokens = torch.zeros(len(sequences), width, dtype=torch.long, device=self.mask.device)
        tokens[:, :1] = sequences.gather(1, self.known[:, None] - 1)
        weights: list[Tensor] = []
        self.clock.tick()
        for number in range(drafts):
            logits = self.draft(tokens[:, number : number + 1], at[:, number : number + 1])
            scores = self.processor(tokens, logits[:, -1].float())
            tokens[:, number + 1] = _choose(scores, self.samples, weights)
        take_back(self.cache, drafts)
        self.clock.tick()
        logits = self.verify(tokens, at[:, :width])[:, : drafts + 1].to(torch.float32, copy=True)
        self.clock.tick()
        scores = self.processor(tokens.repeat_interleave(drafts + 1, 0), logits.flatten(0, 1)).view_as(logits)
        drafted, draws = tokens[:, 1 : drafts + 1], torch.stack(weights, 1) if weights else None  # [B, D]
        held = torch.zeros_like(self.known)  # [B]
        if drafts:
            held = holds(drafted, scores, draws).long().cumprod(1).sum(1)
        after = self._after(scores, draws, held)

        place = torch.arange(drafts + 1, device=held.device)
        said = torch.cat([drafted, after[:, None]], 1).where(place < held[:, None], after[:, None])  # [B, D + 1]
        new = active[:, None] & (place <= held[:, None])
        sequences.scatter_(1, torch.where(new, self.known[:, None] + place, self.most).clamp(max=self.most), said)
        before, self.known = self.known, (self.known + (held + 1) * active).clamp(max=self.most)
        slots = 1
        if drafts:
            tried = held + (held < drafts)
            ready = torch.where(going, self.known, self.most).min()
            numbers = [ready, (held * active).max(), (held * active).sum(), (tried * active).sum(), active.sum()]
            ready, most_held, accepted, judged, rows = torch.stack(numbers).tolist()
            draft, verify = self.clock.seconds()
            self.pace.note(judged / max(1, rows), accepted / max(1, rows), draft / drafts, verify)
            _count(self.drafting, drafts * rows, accepted, judged - accepted)
            slots = most_held + 1
            take_back(self.cache, WIDTH - slots)
        else:
            ready = length + 1
        self.mask[:, self.used : self.used + slots] = place[:slots] < (self.known - before)[:, None]
        self.used += slots
        return [Upcoming(None, sequences[:, column].clone()) for column in range(length, ready)]

    def _after(self, scores: Tensor, draws: Tensor | None, held: Tensor) -> Tensor:
        """The token `[B]` that follows the drafts that held."""
        row = torch.arange(len(held), device=held.device)
        of_row = scores[row, held]  # [B, vocab]
        if not self.samples:
            return of_row.argmax(-1)
        weights = of_row.softmax(-1)
        if draws is not None:
            drafts = draws.shape[1]
            rest = _instead(weights, draws[row, held.clamp(max=drafts - 1)])
            weights = torch.where((held < drafts)[:, None], rest, weights)
        return torch.multinomial(weights, num_samples=1).squeeze(1)

    def settle(self, length: int) -> None:
        """Leave the first `length` tokens of each row in the cache, as if all rows had gone together.

        A row that ended earlier has no more than it had: what stands behind is anything.
        """
        self._gather(max(0, min(length, self.used) - self.prompt))

    def _close_holes(self) -> None:
        """Move the tokens of each row together. Rows that have fewer than others end with slots that are hidden."""
        count = self.mask[:, self.prompt : self.used].sum(1)
        self._gather(int(count.max()))
        place = torch.arange(self.prompt, self.mask.shape[1], device=count.device) - self.prompt
        self.mask[:, self.prompt :] = (place < count[:, None]) | (place >= self.used - self.prompt)

    def _gather(self, slots: int) -> None:
        """Put what each row has said since the prompt, first of all, into so many slots behind it."""
        order = torch.argsort((~self.mask[:, self.prompt : self.used]).long(), dim=1, stable=True)[:, :slots]
        for layer in self.cache.layers:
            for tensor in (layer.keys, layer.values, *([layer.scales] if isinstance(layer, Fp8Layer) else [])):
                index = order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]).to(tensor.device)
                said = tensor[:, :, self.prompt : self.used].gather(2, index)
                tensor[:, :, self.prompt : self.prompt + slots] = said
        self.used = self.prompt + slots
        rewind(self.cache, self.used)


class _Clock:
    """Seconds between ticks on the device; read after it was waited for."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.ticks = device.type == "cuda", deque(maxlen=3)

    def tick(self) -> None:
        if self.on_gpu:
            self.ticks.append(torch.cuda.Event(enable_timing=True))
            self.ticks[-1].record()
        else:
            self.ticks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        pairs = itertools.pairwise(self.ticks)
        return [one.elapsed_time(other) / 1e3 if self.on_gpu else other - one for one, other in pairs]
