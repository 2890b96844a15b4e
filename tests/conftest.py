"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before its import."""

import dataclasses
import functools
import gc
import os
import sys
from importlib import import_module

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import pytest
from models import MODELS

if not torch.cuda.is_available():
    from triton.language import core
    from triton.runtime import interpreter

    def call_device_function(self, *args, **kwargs):
        """As the interpreter's own, which searches the language for what is to be patched at every call: half its time.

        Its kernel has patched `triton.language`. `core`, which the standard library uses, stays patched.
        """
        if self.fn.__globals__.get("core") is core and core.is_builtin(core.load):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_device_function
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # it looks for integers that overflow, a quarter of its time, and says nothing
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


@pytest.fixture(autouse=True)
def _fresh_dynamo(request):
    """No test sees what Dynamo traced for another one, unless both are marked `shares_traces`."""
    shares = request.node.get_closest_marker("shares_traces")
    if not shares:
        torch._dynamo.reset()
    # Beside the shapes of this test, those of all others: a backend that counts its own compilations sets its own limit
    limits = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), 2**20) if shares else {}
    with torch._dynamo.config.patch(limits):
        yield
    if not shares:
        torch._dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def _own_inductor_cache(tmp_path_factory):
    """Compiled code of an earlier run must not stand in for what this one tests. The processes of a run share theirs."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "inductor"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


@pytest.fixture(scope="session", autouse=True)
def _collect_only_what_tests_make():
    """Imports leave a million objects, which Python would search for garbage at every second trace of Dynamo's."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _inductor(request, monkeypatch):
    """What is marked `uncompiled` runs the rewritten graph as it is: numbers need no Inductor.

    A test or a case of such a module that is marked `compiled` goes through Inductor nevertheless.
    """
    marked = request.node.get_closest_marker
    if marked("uncompiled") and not marked("compiled"):
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, *_, **__: gm.forward)


@pytest.fixture
def traced_once(monkeypatch):
    """Several runs with one model find its attention calls once: without this, tracing is most of their time."""
    explain, *runs = (import_module(f"tidal_compile.{name}") for name in ("explain", "calibrate", "evaluate"))
    found = functools.cache(explain.decode_calls)
    for module in (explain, *runs):
        monkeypatch.setattr(module, "decode_calls", found)


@pytest.fixture(params=MODELS)
def tiny(request):
    """A tiny random model of each head layout, of four layers."""
    return MODELS[request.param]()


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))


@pytest.fixture
def fails(monkeypatch, capsys):
    """Run in this process a command that must fail: exit code, standard output, standard error."""

    from tidal_compile import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tidal-compile", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def one_of_two_ranks(monkeypatch):
    """This process, whose group has another rank that answers nothing: graphs are traced, not run."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setenv("LOCAL_RANK", "0")
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    distributed.destroy_process_group()
