"""The command `tidal-compile chat`, a conversation in the terminal."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import TidalError
from .common import (
    CacheKind,
    CacheOption,
    DeviceOption,
    DType,
    DTypeOption,
    ModelOption,
    Weights,
    WeightsOption,
    check_positions,
    check_weights,
    err,
    load,
    out,
    show_progress,
    where,
)

LEAVE, FORGET = "/exit", "/clear"


def chat(
    model: ModelOption = "smollm2",
    policy: Annotated[str, typer.Option(help="A preset, a shipped policy or a file.")] = "full",
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    context: Annotated[int, typer.Option(min=64, help="Tokens of the whole conversation, at most.")] = 4096,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of sampling.")] = 0.95,
    host: Annotated[
        bool, typer.Option(help="Keep layers that reuse tokens, or have `place: cpu`, in host memory.")
    ] = False,
    exact: Annotated[
        bool, typer.Option(help="Let the policy draft only, and the dense model verify: its answers, faster.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    cache: CacheOption = CacheKind.auto,
    weights: WeightsOption = Weights.auto,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
) -> None:
    """Talk to a model, whose answers are decoded under a policy. Each turn goes on from the cache of those before.

    A line is a turn. `/clear` begins anew, `/exit` or the end of the input ends; Ctrl-C ends an answer.
    """
    import torch
    from transformers.utils import logging as hf_logging

    from ..cache import HostCache, new_cache
    from ..drafts import WIDTH
    from ..models import load_config
    from ..policy import resolve

    if host and cache != CacheKind.auto:
        raise TidalError("chat: --host and --cache fp8 don't go together; layers in host memory keep the number format")
    hf_logging.disable_progress_bar()
    device, number = where(device, dtype)
    check_weights(weights, number)
    check_positions(load_config(model), model, context, "a conversation of", 0)
    with show_progress() as progress:
        net, tokenizer = load(progress, model, device, number, weights=weights)
    layers = net.config.get_text_config(decoder=True).num_hidden_layers
    chosen = policy if not Path(policy).is_file() else resolve(policy, layers)
    slots = context + WIDTH if exact else context
    held_in = HostCache(net.config, slots, chosen) if host else new_cache(net.config, slots, cache.value)
    options = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    options["exact"] = exact
    torch.manual_seed(seed)
    begin = [] if system is None else [{"role": "system", "content": system}]
    messages, held = list(begin), []
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if line == LEAVE:
            return
        if line == FORGET:
            messages = list(begin)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer, held = take_turn(net, tokenizer, chosen, messages, held_in, held, context, new_tokens, options)
            except TidalError as error:
                messages.pop()
                err.print(str(error), markup=False, highlight=False)
                continue
            messages.append({"role": "assistant", "content": answer})


def take_turn(
    model: Any, tokenizer: Any, policy: Any, messages: list[dict[str, str]], cache: Any, held: list[int], context: int,
    new_tokens: int, options: dict[str, Any],
) -> tuple[str, list[int]]:  # fmt: skip
    """Print the answer to a conversation `messages`: its text, and the tokens that the cache holds then.

    `held`: those that it holds now, of which the conversation may share the first ones only: templates write earlier
    turns anew. Raises `TidalError` where the conversation has no room for an answer.
    """
    import torch

    from ..generate import generate
    from ..run import shorten

    ids = as_ids(tokenizer, messages)
    if len(ids) >= context:
        raise TidalError(f"the conversation has {len(ids)} tokens, and --context is {context}: {FORGET} begins anew")
    shared = 0
    while shared < min(len(held), len(ids) - 1) and held[shared] == ids[shared]:
        shared += 1
    if shared < len(held) or not held:
        shorten(cache, shared)
    streamer = printer(tokenizer)
    try:
        generate(
            model, torch.tensor([ids], device=model.device), policy, past_key_values=cache, streamer=streamer,
            max_new_tokens=min(new_tokens, context - len(ids)), **options,
        )  # fmt: skip
    except KeyboardInterrupt:
        streamer.end()
    told = streamer.tokens
    filled = min(int(cache.get_seq_length()), len(told))
    if int(cache.get_seq_length()) > filled:  # a step that nobody was told of
        filled = shorten(cache, filled)
    return tokenizer.decode(told[len(ids) :], skip_special_tokens=True), told[:filled]


def as_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation, up to where the answer begins: by the model's template, or else line by line."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids
    return tokenizer("".join(one["content"] + "\n" for one in messages)).input_ids


def printer(tokenizer: Any) -> Any:
    """A streamer that prints the answer, and remembers all tokens."""
    from transformers import TextStreamer

    class Printer(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.tokens: list[int] = []

        def put(self, value: Any) -> None:
            self.tokens += value.flatten().tolist()
            super().put(value)

    return Printer()
