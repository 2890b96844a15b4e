"""`generate`: what `model.generate` returns, by a loop that never waits for the step it has just launched.

transformers prepares everything: the generation config, logits processors, stopping criteria, the mask, and hands it to
a function of ours (`custom_generate`) in place of its own loop. A turn of this loop is

    choose a token of the logits, write it down, see who is finished       on the device
    launch the next step under the policy
    read on the host what was chosen in this turn, while the device works on that step

so that the device always has work. At the end one step was launched too many, and is taken back. A step's inputs keep
their shapes whatever the prompt: a cache has as many slots as `slots_for` says, and is kept for the next call.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import StaticLayer
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from .backend import Options
from .cache import LiveCache
from .drafts import WIDTH, Drafter, Drafting, FromAssistant, FromPolicy, FromText, RowDrafter, Upcoming, check
from .errors import TidalError
from .models import continues, forgets, is_plain, is_recurrent, with_cache
from .policy import Policy, is_preset, load_any, resolve
from .prefill import positions, read, takes
from .ranks import as_first_rank, from_first_rank, share_random_state
from .run import as_new, rewind, shorten, windows

SMALLEST = 256  # slots of a cache
HOLES = 0.5  # slots for rejected drafts, a new token
BY_SCORES = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "LogitNormalization", "InfNanRemoveLogitsProcessor",
    "SuppressTokensLogitsProcessor",
}  # fmt: skip
REMEMBER = {"UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor"}

_caches: WeakKeyDictionary = WeakKeyDictionary()  # of each model: the last one


def generate(
    model: PreTrainedModel, input_ids: Tensor | None = None, policy: Policy | dict | str | Path = "full", *,
    generation_config: GenerationConfig | None = None, stopping_criteria: StoppingCriteriaList | None = None,
    streamer: Any = None, tokenizer: Any = None, options: dict[str, Any] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None, keep_cache: bool = True,
    correct_every: int | None = None, exact: bool | Drafting = False, assistant_model: PreTrainedModel | None = None,
    prompt_lookup_num_tokens: int | None = None, **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:  # fmt: skip
    """Generate tokens after input_ids `[B, n]`, with padding on the left, each by a step under the policy.

    What `model.generate` takes for greedy decoding and sampling, and what it returns: the sequences `[B, n + new]`, or
    with `return_dict_in_generate` also scores, logits and the cache. A cache with the first tokens of input_ids may be
    given as `past_key_values`, such as the one of an earlier call or a `HostCache`; it must have slots for what comes.
    What it lacks of them is read densely, but for a last token alone, which is a step like those that follow.

    Args:
        model: a decoder.
        input_ids: token ids; `attention_mask` among the other arguments, if some are padding.
        policy: in any form. A preset doesn't know the model's name: see `Policy.preset`.
        generation_config: as in `model.generate`, as are the other arguments (`max_new_tokens`, `do_sample`, ...).
        stopping_criteria: besides those of the config. What runs on the host waits for the device at each token.
        streamer: gets the prompt, and then the tokens of each step `[B]`.
        tokenizer: for `stop_strings`.
        options: of the backend.
        report: called with the tokens of the prompt that were read, and how many there are.
        keep_cache: keep the cache's memory for the next call, if that has as many rows and finds room in it, as long as
            the model lives. False lets go of it. A cache of the user's own, or one that is returned, is not kept.
        correct_every: after so many decoded tokens, pass these through the dense model once more, which writes their
            keys and values anew: what sparse steps left out of them doesn't add up. The next token follows from this
            pass. None: never. TidalDecode's "cache correction" (https://arxiv.org/abs/2410.05076).
        exact: return what the dense model would: the policy only drafts tokens, which a dense step of several tokens
            then accepts or corrects (see `drafts`). Greedy tokens are the dense model's, but for rounding; sampled ones
            come from its distribution, though not the ones that it would draw with a seed. Logits processors are asked
            more than once for a position. A `Drafting` says how many drafts to make, and counts them.
        assistant_model: let this model draft instead, whose vocabulary is the same, by compiled steps of its own. What
            verifies is a step of several tokens under the policy, or with `exact` the dense one.
        prompt_lookup_num_tokens: let the text draft instead, up to so many tokens (7 at most): what followed the last
            tokens where they stood before.

    Raises `TidalError` for a cache that is too small, or for what this loop doesn't do (beams, hidden states;
    corrections of recurrent layers, or of `place: cpu`; drafts for a model with layers that forget, for logits
    processors that remember, or without `exact` for methods that choose for one token a step); `PolicyError` and
    `UnsupportedModelError` as the backend does.
    """
    _refuse_arguments(input_ids, kwargs)
    criteria = StoppingCriteriaList(stopping_criteria or [])
    strings = kwargs.pop("stop_strings", None)
    config = model.generation_config if generation_config is None else generation_config
    strings = strings or config.stop_strings
    if strings is not None:  # `model.generate` would not hand a tokenizer on
        if tokenizer is None:
            raise TidalError("generate: stop_strings need the tokenizer; pass tokenizer=...")
        criteria.append(StopStringCriteria(tokenizer, strings))
    given = {name: kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None}
    step = _step(model, policy, options or {})
    if correct_every is not None:
        if correct_every < 1:
            raise TidalError(f"generate: correct_every {correct_every}; it is a number of tokens, or None")
        _check_rewrites(model, policy, "correct_every")
    lookup = config.prompt_lookup_num_tokens if prompt_lookup_num_tokens is None else prompt_lookup_num_tokens
    drafts = None
    if exact or assistant_model is not None or lookup is not None:
        if correct_every is not None:
            raise TidalError("generate: a verification corrects the cache by itself; leave out correct_every")
        ngram = kwargs.pop("max_matching_ngram_size", None) or config.max_matching_ngram_size
        drafts = _drafts_of(model, policy, exact, assistant_model, lookup, ngram, options or {})
    loop = functools.partial(
        _loop, step=step, drafts=drafts, streamer=streamer, report=report, own_cache=not given, keep_cache=keep_cache,
        correct_every=correct_every,
    )  # fmt: skip
    # Each number of rows, and of slots, is wanted, and compiled
    share_random_state(model)
    limits = torch._dynamo.config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20)
    with limits, _set_aside(config), _set_aside(model.generation_config):
        return model.generate(
            input_ids, generation_config=generation_config, stopping_criteria=criteria, streamer=streamer,
            custom_generate=loop, **kwargs,
        )  # fmt: skip


@contextmanager
def _set_aside(config: GenerationConfig) -> Iterator[None]:
    """While transformers reads a config: let it not see what is ours to do, and what it would refuse."""
    before = {name: getattr(config, name) for name in ("stop_strings", "prompt_lookup_num_tokens")}
    for name in before:
        setattr(config, name, None)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _step(model: PreTrainedModel, policy: Any, options: dict[str, Any]) -> Callable:
    """The compiled step of a policy. Dynamo finds what it has compiled for another one with the same options."""
    plain = policy if is_preset(policy) else load_any(policy).to_dict()
    Options.parse({"policy": plain, **options})
    return torch.compile(
        model.forward, backend="tidal", fullgraph=True, dynamic=False, options={"policy": plain, **options}
    )


@dataclass(frozen=True)
class _Drafts:
    """Who drafts, and who verifies: the dense step, or with None the policy's."""

    drafting: Drafting
    dense: Callable | None
    assistant: tuple[PreTrainedModel, Callable] | None
    lookup: int | None
    ngram: int  # the most tokens that a lookup compares

    @property
    def by_row(self) -> bool:
        """Whether rows may go on each for itself: the dense model verifies what the policy drafts."""
        return self.dense is not None and self.assistant is None and self.lookup is None


def _drafts_of(
    model: PreTrainedModel, policy: Any, exact: bool | Drafting, assistant: PreTrainedModel | None, lookup: int | None,
    ngram: int | None, options: dict[str, Any],
) -> _Drafts:  # fmt: skip
    """What the arguments of `generate` say of drafts, checked."""
    _check_rewrites(model, policy, "exact" if exact else "drafts")
    if assistant is not None and lookup is not None:
        raise TidalError("generate: assistant_model and prompt_lookup_num_tokens exclude each other")
    if lookup is not None and lookup < 1:
        raise TidalError(f"generate: prompt_lookup_num_tokens {lookup}; it is a number of tokens, or None")
    drafting = exact if isinstance(exact, Drafting) else Drafting()
    check(drafting)
    roles = resolve(policy, model.config.get_text_config(decoder=True).num_hidden_layers).roles
    if not exact and (one := next((role for role in roles if role.is_sparse and not role.method.several), None)):
        raise TidalError(
            f"generate: layer {one.layer} chooses by {one.by}, for one token a step, so that the policy can't verify "
            "several; with exact=True the dense model does"
        )
    if assistant is not None:
        if not all(map(is_plain, LiveCache(assistant.config, 1).layers)):
            raise TidalError(
                "generate: the assistant_model has sliding windows or recurrent layers, which can't take back a draft"
            )
        sizes = [one.get_input_embeddings().num_embeddings for one in (model, assistant)]
        if sizes[0] != sizes[1] or assistant.device != model.device:
            raise TidalError(
                f"generate: assistant_model has {sizes[1]} tokens on {assistant.device}; it must have the model's "
                f"{sizes[0]} on {model.device}"
            )
    return _Drafts(
        drafting=drafting,
        dense=_step(model, "full", options) if exact else None,
        assistant=None if assistant is None else (assistant, _step(assistant, "full", options)),
        lookup=lookup,
        ngram=ngram or 3,
    )


def _refuse_memory(processors: list) -> None:
    """Raise `TidalError` for logits processors that remember what they were asked: drafts are not what was said."""
    for one in processors:
        if type(one).__name__ in REMEMBER:
            raise TidalError(
                f"generate: {type(one).__name__} remembers each token that it sees, and drafts may not hold; leave out "
                "exact, assistant_model and prompt_lookup_num_tokens"
            )


def _by_scores_alone(processors: list) -> bool:
    """Whether logits processors look at no token: they can then be asked for several places at once."""
    return all(
        type(one).__name__ in BY_SCORES and type(one).__module__.startswith("transformers.") for one in processors
    )


def _check_rewrites(model: PreTrainedModel, policy: Any, option: str) -> None:
    """Raise `TidalError` for a policy to which writing keys and values anew, again and again, costs too much."""
    roles = resolve(policy, model.config.get_text_config(decoder=True).num_hidden_layers).roles
    if any(role.keeps and role.method.prepares for role in roles):
        raise TidalError(f"generate: {option} with place: cpu, which would sort all tokens anew each time")


def slots_for(length: int) -> int:
    """The slots of a cache for so many tokens: a quarter more at most, so that few sizes are ever compiled."""
    if length <= SMALLEST:
        return SMALLEST
    step = 2 ** ((length - 1).bit_length() - 3)
    return -(-length // step) * step


def _loop(
    model: PreTrainedModel, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
    generation_config: GenerationConfig, *, step: Callable, drafts: _Drafts | None, streamer: Any, report: Callable,
    own_cache: bool, keep_cache: bool, correct_every: int | None, **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:  # fmt: skip
    """In place of transformers' own loop, for its own arguments; by name it may only take what is not among these."""
    batch, prompt = input_ids.shape
    most = generation_config.max_length
    config = generation_config
    caches = [model_kwargs.pop(name, None) for name in ("cache", "past_key_values")]
    given = None if own_cache else next(one for one in caches if one is not None)
    attention_mask = model_kwargs.pop("attention_mask", None)
    _refuse(config, model_kwargs)
    keeps = keep_cache and not config.return_dict_in_generate
    if drafts is not None:
        _refuse_memory(logits_processor)
    wants_scores = config.return_dict_in_generate and (config.output_scores or config.output_logits)
    by_row = drafts is not None and drafts.by_row and batch > 1 and _by_scores_alone(logits_processor)
    by_row = by_row and not wants_scores
    room = most if drafts is None else most + WIDTH  # of which a verification may write some for nothing
    room += int(HOLES * (most - prompt)) if by_row and own_cache else 0
    with _cache_of(model, given, batch, room, keeps) as cache:
        _check_layers(cache, drafts, correct_every)
        slots = max(_slots(cache), room)  # of windows alone there are fewer
        mask, place = None, torch.arange(slots, device=model.device).expand(batch, slots)  # of each slot [B, slots]
        padded = attention_mask is not None and not attention_mask.all()  # a step without a mask reads less
        if padded or by_row:
            mask = torch.ones(batch, slots, dtype=torch.bool, device=model.device)
            mask[:, :prompt] = attention_mask.bool() if padded else True
            place = positions(mask)
        seen = mask.clone() if padded else None  # of the prompt, which rows by themselves hide more of
        told = drafts.dense if drafts and drafts.dense else step  # what returned tokens follow from

        def one_by_one(token: Tensor, slot: int) -> Tensor:
            """The logits `[B, vocab]` after a token `[B, 1]` whose keys go into a slot."""
            return _decode(model, told, token, place[:, slot : slot + 1], cache=cache, mask=mask)[:, -1]

        if int(cache.get_seq_length()) == prompt - 1 > 0:  # as after any other token
            with _torn_by_an_interrupt(cache, prompt - 1):
                logits = one_by_one(input_ids[:, -1:].to(model.device), prompt - 1)
            report(prompt, prompt)
        else:
            logits = _read_prompt(model, input_ids, cache, seen, report)

        sequences = torch.zeros(batch, room, dtype=torch.long, device=input_ids.device)
        sequences[:, :prompt] = input_ids
        going = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
        has_eos = any(hasattr(one, "eos_token_id") for one in stopping_criteria)
        stops = _Stops(stopping_criteria, most, input_ids.device)
        pad = config._pad_token_tensor.to(input_ids.device) if has_eos else None  # rows that have ended go on with it
        ends = torch.full((batch,), most, device=input_ids.device)  # how many tokens each row had then
        late = _Late(batch, input_ids.device)
        kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
        length = cached = prompt
        upcoming = [Upcoming(logits)]
        drafter = None
        if drafts is not None:
            place = place.clamp(max=most - 1)  # what stands behind is never an answer, and may be behind all positions
            chooses = logits_processor, config.do_sample
            if by_row:
                draft, verify = (
                    functools.partial(_decode, model, one, cache=cache, mask=mask) for one in (step, drafts.dense)
                )
                agree = functools.partial(as_first_rank, model)
                drafter = RowDrafter(drafts.drafting, cache, draft, verify, mask, prompt, most, *chooses, agree)
            else:
                decode = functools.partial(_decode, model, step, cache=cache, mask=mask)
                drafter = _drafter(drafts, decode, input_ids, cache, mask, place, *chooses, pad)
        saved = windows(cache) if correct_every else {}
        # A step too many can't be taken back from layers that forget: only where nobody sees the cache again
        looks_first = any(map(forgets, cache.layers)) and not (own_cache and keeps)
        try:
            while True:
                now = upcoming.pop(0)
                if now.token is None or wants_scores:
                    raw = scores = now.logits.to(input_ids.device)
                    if logits_processor or config.do_sample or wants_scores:  # not for the largest one alone
                        raw = raw.to(torch.float32, copy=True)
                        scores = logits_processor(sequences[:, :length], raw)
                if config.return_dict_in_generate and config.output_scores:
                    kept["scores"].append(scores)
                if config.return_dict_in_generate and config.output_logits:
                    kept["logits"].append(raw)
                if now.token is not None:
                    chosen = now.token
                elif config.do_sample:
                    weights = scores.softmax(-1) if now.weights is None else now.weights
                    chosen = torch.multinomial(weights, num_samples=1).squeeze(1)
                else:
                    chosen = scores.argmax(-1)
                if pad is not None:
                    chosen = torch.where(going, chosen, pad)
                sequences[:, length] = chosen
                length += 1
                going = stops.leave(going, sequences[:, :length], kept["scores"])
                if stops.others:  # which may look at a clock
                    going = from_first_rank(model, going)
                if drafter is not None:
                    ends = torch.where(~going & (ends == most), length, ends)
                late.send(chosen, going)
                launches = length < most and not upcoming
                ahead = drafter.drafts(most - length) if drafter and launches else 0  # tokens to draft
                is_over = late.is_over() if looks_first or ahead else False
                if launches and not is_over:
                    with _torn_by_an_interrupt(cache, length - 1):
                        if ahead or by_row:
                            says = going if pad is not None else torch.ones_like(going)  # which rows go on
                            upcoming = drafter.cycle(sequences, length, says, ahead)
                        else:
                            upcoming = [Upcoming(one_by_one(chosen[:, None].to(model.device), length - 1))]
                        if correct_every and (length - prompt) % correct_every == 0:
                            logits, saved = _correct(model, sequences, length, correct_every, cache, mask, saved)
                            upcoming = [Upcoming(logits)]
                    cached = length + len(upcoming) - 1
                is_over = late.is_over()
                if streamer is not None:
                    streamer.put(late.tokens())
                if is_over or length == most:
                    break
        except BaseException:
            if drafter is not None:  # which may have filled the cache with more than was said
                _take_back_drafts(drafter, cache, cached, length)
            raise
        if drafter is not None:
            _take_back_drafts(drafter, cache, cached, length)
            if not own_cache or config.return_dict_in_generate:
                _read_ends(model, sequences[:, :length], int(ends.min()), cache, seen)
        elif cached >= length:
            rewind(cache, length - 1)
    if streamer is not None:
        streamer.end()
    sequences = sequences[:, :length].clone()
    if not config.return_dict_in_generate:
        return sequences
    tuples = {name: tuple(found) if config.to_dict()[f"output_{name}"] else None for name, found in kept.items()}
    return GenerateDecoderOnlyOutput(sequences=sequences, **tuples, **_named(cache))


def _check_layers(cache: Any, drafts: _Drafts | None, correct_every: int | None) -> None:
    """Raise `TidalError` for layers that can't be set back as far as drafts or corrections need."""
    if drafts is not None and not all(map(is_plain, cache.layers)):
        raise TidalError(
            "generate: drafts, but the model has sliding windows or recurrent layers, which can't take one back"
        )
    if correct_every and any(map(is_recurrent, cache.layers)):
        raise TidalError("generate: correct_every, but the model has recurrent layers, which can't be set back")


def _read_prompt(
    model: PreTrainedModel, input_ids: Tensor, cache: Any, mask: Tensor | None, report: Callable
) -> Tensor:
    """Read what the cache lacks of a prompt: the logits `[B, vocab]` after it."""
    past, prompt = int(cache.get_seq_length()), input_ids.shape[1]
    if past and prompt - past > 1 and not continues(model):
        raise TidalError(f"generate: the cache holds {past} of {prompt} tokens, and this model can't read several more")
    if past >= prompt:
        raise TidalError(
            f"generate: the cache holds {past} tokens, and the prompt has {prompt}; it must have a new one"
        )
    with _torn_by_an_interrupt(cache, past):
        for done, after in read(model, input_ids.to(model.device), cache, past=past, mask=mask):
            logits = after
            report(done, prompt)
    return logits


def _correct(
    model: PreTrainedModel, sequences: Tensor, length: int, every: int, cache: Any, mask: Tensor | None,
    saved: dict[int, Any],
) -> tuple[Tensor, dict[int, Any]]:  # fmt: skip
    """Pass the last tokens through the dense model: the logits after them, and the cache's windows then.

    `saved` are the windows before these tokens.
    """
    start = length - every
    rewind(cache, start, saved)
    latest = sequences[:, start:length].to(model.device)
    _, logits = next(read(model, latest, cache, past=start, first=start, mask=mask, chunk=length))
    return logits, windows(cache)


def _read_ends(model: PreTrainedModel, sequences: Tensor, ends: int, cache: Any, mask: Tensor | None) -> None:
    """Where a row ended at `ends` tokens, before others did: drafts stand in the cache in place of what follows."""
    first, last = ends - 1, sequences.shape[1] - 1
    if first < last:
        rewind(cache, first)
        for _ in read(model, sequences[:, first:last], cache, past=first, first=first, mask=mask):
            pass


def _take_back_drafts(drafter: Drafter | RowDrafter, cache: Any, cached: int, length: int) -> None:
    """Leave all but the last of `length` tokens in a cache that holds `cached`, some of which nobody was told."""
    if isinstance(drafter, RowDrafter):
        drafter.settle(length - 1)
    elif cached >= length:
        rewind(cache, length - 1)


def _drafter(
    drafts: _Drafts, decode: Callable, input_ids: Tensor, cache: Any, mask: Tensor | None, place: Tensor,
    processor: Callable, samples: bool, pad: Tensor | None,
) -> Drafter:  # fmt: skip
    """The drafter of one call, whose `decode` is a step under the policy over the cache."""
    model = decode.args[0]
    source: FromPolicy | FromAssistant | FromText = FromPolicy(decode, cache, place, processor, samples)
    if drafts.lookup is not None:
        source = FromText(drafts.ngram)
    if drafts.assistant is not None:
        assistant, step = drafts.assistant
        own = LiveCache(assistant.config, place.shape[1])

        def catch_up(tokens: Tensor, past: int) -> None:
            for _ in read(assistant, tokens.to(assistant.device), own, past=past, first=past, mask=mask):
                pass

        known = input_ids.shape[1] - 1  # all of the prompt but its last token
        if known:
            catch_up(input_ids[:, :known], 0)
        own_decode = functools.partial(_decode, assistant, step, cache=own, mask=mask)
        source = FromAssistant(own_decode, catch_up, own, place, processor, samples, known)
    verify = decode if drafts.dense is None else functools.partial(_decode, model, drafts.dense, cache=cache, mask=mask)
    most = min(drafts.lookup or WIDTH, WIDTH - 1)
    agree = functools.partial(as_first_rank, model)
    return Drafter(drafts.drafting, source, cache, verify, place, processor, samples, pad, most, agree)


def _named(cache: Any) -> dict[str, Any]:
    """The cache, as the output of `generate` calls it."""
    names = GenerateDecoderOnlyOutput.__dataclass_fields__
    return {"cache" if "cache" in names else "past_key_values": cache}


def _decode(
    model: Any, step: Callable, tokens: Tensor, at: Tensor, *, cache: Any, mask: Tensor | None
) -> Tensor:  # fmt: skip
    """The logits `[B, n, vocab]` after each of tokens `[B, n]`, whose positions are `at [B, n]`."""
    torch.compiler.cudagraph_mark_step_begin()
    more = {} if mask is None else {"attention_mask": mask}
    if takes(type(model), "position_ids"):
        more["position_ids"] = as_new(at)
    return step(input_ids=as_new(tokens), **with_cache(model, cache), **more).logits


@contextmanager
def _torn_by_an_interrupt(cache: Any, complete: int) -> Iterator[None]:
    """Where some layers may have taken tokens and others not: set the cache back to what all of them have."""
    try:
        yield
    except BaseException:
        shorten(cache, complete)
        raise


def _refuse_arguments(input_ids: Tensor | None, given: dict[str, Any]) -> None:
    """Raise `TidalError` for arguments that would be dropped."""
    for name in ("position_ids", "inputs_embeds", "custom_generate", "assistant_tokenizer"):
        if given.get(name) is not None:
            raise TidalError(f"generate: {name} is not taken; use model.generate")
    types, mask = given.get("token_type_ids"), given.get("attention_mask")
    if types is not None and types.any():
        raise TidalError("generate: token_type_ids other than 0 are not taken; use model.generate")
    if mask is not None and (input_ids is None or mask.shape != input_ids.shape):
        found = None if input_ids is None else tuple(input_ids.shape)
        raise TidalError(f"generate: attention_mask {tuple(mask.shape)} must be as large as input_ids {found}")


def _refuse(config: GenerationConfig, others: dict[str, Any]) -> None:
    """Raise `TidalError` for what this loop doesn't do."""
    known = {"position_ids", "use_cache", "logits_to_keep", "token_type_ids"}  # which follow from the mask
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise TidalError(f"generate: {mode.value.replace('_', ' ')}; use model.generate for it")
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name):
            raise TidalError(f"generate: {name} is not returned; use model.generate")
    if config.use_cache is False:
        raise TidalError("generate: use_cache=False; a step goes on from a cache")
    if unknown := sorted(name for name, value in others.items() if name not in known and value is not None):
        raise TidalError(f"generate: {unknown[0]} is not handed to the model; use model.generate, or leave it out")


@contextmanager
def _cache_of(model: PreTrainedModel, given: Any, batch: int, length: int, keeps: bool) -> Iterator[Any]:
    """The cache to use: the given one, or one of ours, which is kept for the next call if that is wanted."""
    if given is not None:
        _check_cache(model, given, batch, length)
        yield given
        return
    cache = _caches.pop(model, None)  # while it is in use, nobody else takes it
    if cache is None or _slots(cache) < slots_for(length) or not _suits(model, cache, batch):
        cache = LiveCache(model.config, slots_for(length))
    else:
        shorten(cache, 0)
    yield cache
    if keeps and _suits(model, cache, batch):
        _caches[model] = cache


def _suits(model: PreTrainedModel, cache: Any, batch: int) -> bool:
    """Whether a kept cache can take what a model writes."""
    all_keys = [layer.keys for layer in cache.layers if isinstance(layer, StaticLayer) and not is_recurrent(layer)]
    if len(all_keys) < len(cache.layers) or torch.is_autocast_enabled(model.device.type):
        return False
    return all(
        keys is not None and len(keys) == batch and (keys.dtype, keys.device) == (model.dtype, model.device)
        and not keys.is_inference()
        for keys in all_keys
    )  # fmt: skip


def _check_cache(model: PreTrainedModel, cache: Any, batch: int, length: int) -> None:
    """Raise `TidalError` for a cache of the user's that can't take so many rows and tokens."""
    if not isinstance(cache, StaticCache):
        raise TidalError(
            f"generate: the cache is a {type(cache).__name__}; give a StaticCache, Fp8Cache or HostCache, or none"
        )
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    for layer in cache.layers:
        slots = getattr(layer, "max_cache_len", None)
        needed = min(length, window or length) if getattr(layer, "is_sliding", False) else length
        if slots is not None and slots < needed:
            raise TidalError(f"generate: the cache has {slots} slots; {needed} are needed")
        keys = getattr(layer, "keys", None)
        if keys is not None and len(keys) != batch:
            raise TidalError(f"generate: the cache has {len(keys)} rows; {batch} are needed")


def _slots(cache: Any) -> int:
    """How many tokens the layers hold that forget none."""
    return max((layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len")), default=0)


class _Stops:
    """Which rows go on after a token. That there is room for it, the loop sees by itself."""

    def __init__(self, criteria: StoppingCriteriaList, most: int, device: torch.device):
        self.eos = [one.eos_token_id.to(device) for one in criteria if type(one) is EosTokenCriteria]
        self.others = StoppingCriteriaList(
            one for one in criteria
            if type(one) is not EosTokenCriteria and not (type(one) is MaxLengthCriteria and one.max_length >= most)
        )  # fmt: skip

    def leave(self, going: Tensor, sequences: Tensor, scores: list[Tensor]) -> Tensor:
        """Of the rows that were going on `[B]`, those that still do after the last of their tokens `[B, n]`."""
        for eos in self.eos:
            going = going & (sequences[:, -1:] != eos).all(-1)
        if self.others:
            going = going & ~self.others(sequences, tuple(scores) or None)
        return going


class _Late:
    """Tells the host what was chosen, without a wait for what was launched since."""

    def __init__(self, batch: int, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.said = torch.zeros(2, batch, dtype=torch.long, pin_memory=self.on_gpu)
        self.event = torch.cuda.Event() if self.on_gpu else None
        self.device = device

    def send(self, tokens: Tensor, going: Tensor) -> None:
        """Of this turn: tokens `[B]`, and which rows go on `[B]`."""
        self.said.copy_(torch.stack([tokens, going.long()]), non_blocking=True)
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(self.device))

    def is_over(self) -> bool:
        """Whether all rows are finished; waits for what was sent."""
        if self.event is not None:
            self.event.synchronize()
        return not self.said[1].any().item()

    def tokens(self) -> Tensor:
        """The tokens that were sent `[B]`, on the host; after `is_over`."""
        return self.said[0].clone()
