"""`tidal-compile chat`, as a user types."""

import pytest
import torch
from models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tidal_compile.cache import LiveCache
from tidal_compile.cli import app, chat

pytestmark = pytest.mark.uncompiled

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and a tokenizer of single characters with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    model = tiny_model(num_hidden_layers=3, eos_token_id=7)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 7, 0
    model.save_pretrained(folder)
    vocab = {chr(33 + number): number for number in range(90)} | {f"<{number}>": number for number in range(90, 128)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="!", clean_up_tokenization_spaces=False)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def said(folder, lines, *options):
    result = CliRunner().invoke(
        app,
        ["chat", "--model", str(folder), "--device", "cpu", "--new-tokens", "8", "--context", "256", *options],
        input="\n".join(lines),
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def expected(folder, turns, system=None):
    """The answers of model.generate to a conversation."""
    from tidal_compile.models import load_model, load_tokenizer

    model, tokenizer = load_model(str(folder), "cpu", torch.float32), load_tokenizer(str(folder))
    messages, answers = [] if system is None else [{"role": "system", "content": system}], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = torch.tensor([chat.as_ids(tokenizer, messages)])
        new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.parametrize(
    "options", [(), ("--policy", "magicpig_cpu", "--host"), ("--system", "beshort"), ("--policy", "tidal", "--exact")]
)
def test_turns_are_those_of_generate(folder, options):
    """A cache in host memory, too; `/clear` begins anew, and an empty line is no turn."""
    printed = said(folder, ["hello", "", "and?", "/clear", "hello", "/exit", "unheard"], *options)
    if "magicpig_cpu" in options:  # approximate: it answers
        assert printed.count("> ") == 6
        return
    system = options[1] if "--system" in options else None
    first, second = expected(folder, ["hello", "and?"], system)
    assert printed.split("> ")[1:] == [f"{first}\n", "", f"{second}\n", "", f"{first}\n", ""]


def test_a_turn_reads_only_what_is_new(folder):
    from tidal_compile.models import load_model, load_tokenizer

    model, tokenizer = load_model(str(folder), "cpu", torch.float32), load_tokenizer(str(folder))
    read = []
    model.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"].shape[1]), with_kwargs=True)
    cache, held, messages, whole = LiveCache(model.config, 256), [], [], []
    for turn in ("one", "two", "three"):
        messages.append({"role": "user", "content": turn})
        whole.append(len(chat.as_ids(tokenizer, messages)))
        answer, held = chat.take_turn(model, tokenizer, "full", messages, cache, held, 256, 6, {"do_sample": False})
        assert cache.get_seq_length() == len(held)
        messages.append({"role": "assistant", "content": answer})
    prompts = [size for size in read if size > 1]
    assert prompts[0] == whole[0] and all(
        new <= all_ - whole[0] for new, all_ in zip(prompts[1:], whole[1:], strict=True)
    )
    messages[0]["content"] = "other"  # earlier turns changed: all is read again from there
    messages.append({"role": "user", "content": "four"})
    again, _ = chat.take_turn(model, tokenizer, "full", messages, cache, held, 256, 6, {"do_sample": False})
    ids = torch.tensor([chat.as_ids(tokenizer, messages)])
    right = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert again == tokenizer.decode(right, skip_special_tokens=True)


def test_a_conversation_that_is_too_long_and_an_interrupt(folder, monkeypatch):
    printed = CliRunner().invoke(
        app, ["chat", "--model", str(folder), "--device", "cpu", "--context", "64"], input="x" * 80 + "\nhello\n"
    )
    assert printed.exit_code == 0 and "tokens, and --context is 64: /clear begins anew" in printed.output

    from tidal_compile.models import load_model, load_tokenizer

    model, tokenizer = load_model(str(folder), "cpu", torch.float32), load_tokenizer(str(folder))
    make = chat.printer

    def stops(tokenizer):
        streamer = make(tokenizer)
        put = streamer.put

        def interrupt(value):
            put(value)
            if len(streamer.tokens) > 12:
                raise KeyboardInterrupt

        streamer.put = interrupt
        return streamer

    monkeypatch.setattr(chat, "printer", stops)
    cache, messages = LiveCache(model.config, 128), [{"role": "user", "content": "hello"}]
    answer, held = chat.take_turn(model, tokenizer, "full", messages, cache, [], 128, 30, {"do_sample": False})
    monkeypatch.undo()
    assert len(answer) < 10 and len(held) == cache.get_seq_length() <= 13
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "on"}]
    on, _ = chat.take_turn(model, tokenizer, "full", messages, cache, held, 128, 6, {"do_sample": False})
    ids = torch.tensor([chat.as_ids(tokenizer, messages)])
    right = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert on == tokenizer.decode(right, skip_special_tokens=True)
