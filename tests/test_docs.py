"""The documentation: links, tables, command lines, code and policies in it are right. No network, and nothing compiled."""

import ast
import enum
import importlib
import inspect
import itertools
import os
import re
import shlex
import sys
from pathlib import Path

import PIL.Image
import pytest
import typer.main
import yaml
from typer.testing import CliRunner

import tidal_compile as tc
from tidal_compile.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SITE = "https://tidal-compile.github.io/tidal_compile/"
REPOSITORY = "https://github.com/tidal-compile/tidal_compile/"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/README.md")),
    *sorted(DOCS.glob("*.md")),
]
MARKER = re.compile(r"<!-- ([\w ]+): written by ([\w./]+) -->\n")
GENERATED = re.compile(r"<!-- ([\w ]+): written by [\w./]+ -->\n.*?<!-- end of \1 -->", re.DOTALL)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .+\n)+", re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())

sys.path.insert(0, str(ROOT / "benchmarks"))
import tables as written  # noqa: E402  the script that writes the tables


def text_of(page):
    """A page as somebody wrote it: tables of results hold the command lines of their time."""
    return GENERATED.sub("", page.read_text(encoding="utf-8"))


def prose_of(page):
    """A page without code."""
    return INLINE.sub("``", FENCED.sub("", page.read_text(encoding="utf-8")))


def code_of(page, language):
    return [code for kind, code in FENCED.findall(text_of(page)) if kind == language]


def anchors_of(page):
    """The anchors of a page's headings, as MkDocs makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def target_of(link, page):
    """The file or folder of this repository that a link means, and the anchor in it; None for another site."""
    path, _, anchor = link.partition("#")
    if path.startswith(SITE):
        return DOCS / f"{path.removeprefix(SITE).strip('/') or 'index'}.md", anchor
    if match := re.match(rf"{REPOSITORY}(?:blob|tree)/main/(.*)", path):
        return ROOT / match[1], anchor
    return (page.parent / path if path else page, anchor) if "://" not in path else None


@pages
def test_links_and_images_lead_somewhere(page):
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)|<(https://[^>]+)>", prose_of(page))
    for link in filter(None, (one for pair in links for one in pair)):
        target = target_of(link, page)
        if target is not None:
            assert target[0].exists(), f"{page.name}: {link} leads nowhere"
            assert not target[1] or target[1] in anchors_of(target[0]), f"{page.name}: {link} has no such heading"


def test_the_sites_pages_stay_inside_it():
    """A page of the site can't link to files beside `docs` by their path."""
    for page in DOCS.glob("*.md"):
        assert not re.findall(r"\]\((\.\./[^)]*)\)", prose_of(page)), page


def test_tables_are_those_of_todays_results():
    for page in written.PAGES:
        text = page.read_text(encoding="utf-8")
        assert written.with_tables(text) == text, f"{page}: run python benchmarks/tables.py"
    marked = {name for page in PAGES for name, script in MARKER.findall(page.read_text()) if "tables.py" in script}
    assert marked == set(written.SECTIONS)


def test_the_chart_is_of_todays_results():
    chart = PIL.Image.open(written.CHART)
    assert chart.text["Description"] == written.chart_data(), "run python benchmarks/tables.py"


def test_a_run_becomes_a_table(monkeypatch):
    policy = {"name": "x", "num_layers": 3, "layers": {"0": "full", "1": "select", "2": "reuse"}}
    numbers = {"kv_share": 0.5, "median_ms": 12.34, "first_step_s": 1.0}
    run = {
        "device": "a GPU", "dtype": "bfloat16", "context": 4000, "commit": "abc", "prompts": ["1234567", "7654321"],
        "variants": [
            {"name": "eager", "policy": None, "answers": ["1234567", "no"], "found": 1, **numbers},
            {"name": "tidal: x", "policy": policy, "answers": ["1234567", "7654321"], "found": 2, **numbers},
        ],
    }  # fmt: skip
    monkeypatch.setattr(written, "results", lambda kind: {"run-x": run})
    assert written.run_table("run-x").splitlines() == [
        "| variant | KV cache read | found, a GPU | ms per token, a GPU |",
        "|---|---|---|---|",
        "| eager | 50% | 1 of 2 | 12.3 |",
        "| policy `x` (selections at 1; budget 1024) | 50% | 2 of 2 | 12.3 |",
        "",
        "Sources: a GPU: bfloat16, 4,000 tokens, `benchmarks/results/run-x.json`, commit abc.",
    ]


def command_lines(page):
    """The command lines of a page as words, and whether each is one to type, not just a mention."""
    text = text_of(page)
    blocks = [code for kind, code in FENCED.findall(text) if kind not in ("python", "yaml")]
    blocks += INDENTED.findall(FENCED.sub("", text))
    typed = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    for line, whole in [*((line, True) for line in typed), *((line, False) for line in INLINE.findall(text))]:
        if re.match(r"\s*tidal-compile( |$)", line):
            yield shlex.split(line, comments=True)[1:], whole


@pages
def test_command_lines_are_what_the_command_takes(page):
    for words, whole in command_lines(page):
        command, said = typer.main.get_command(app), " ".join(words)
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            name, *words = words
            assert name in command.commands, f"{page.name}: tidal-compile {said}: no command {name}"
            command = command.commands[name]
        if hasattr(command, "commands"):  # a mention of a group, or its own options
            assert set(words) <= {option for one in command.params for option in one.opts} | {"--help"}, said
            continue
        try:
            command.make_context("tidal-compile", words)
        except Exception as problem:  # an error of the parser: the words
            missing = type(problem).__name__ == "MissingParameter"
            assert missing and not whole, f"{page.name}: tidal-compile {said}: {problem}"


def commands(command=None, path=()):
    """Every command that does something, by its path."""
    command = command or typer.main.get_command(app)
    for name, one in command.commands.items():
        yield from commands(one, (*path, name)) if hasattr(one, "commands") else [((*path, name), one)]


def default_of(option):
    """The default of an option as docs/cli.md says it."""
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default
    values = option.default if isinstance(option.default, tuple | list) else [option.default]
    said = ["off" if one is False else one.value if isinstance(one, enum.Enum) else str(one) for one in values]
    return "-" if values == [None] else ", ".join(said) or "-"


def test_the_reference_has_every_command_and_option():
    """With its default of today."""
    text = (DOCS / "cli.md").read_text()
    sections = {section.partition("\n")[0]: section for section in text.split("\n## ")[1:]}
    rows = re.compile(r"^\| `(--[\w-]+)` \| (.*?) \|", re.MULTILINE)
    shared = dict(rows.findall(sections.pop("Options that many commands share")))
    assert set(sections) == {" ".join(path) for path, _ in commands()}
    for path, command in commands():
        options = {one.opts[0]: default_of(one) for one in command.params if one.opts[0].startswith("--")}
        said = dict(rows.findall(sections[" ".join(path)]))
        assert said == {name: value for name, value in options.items() if name not in shared}, path
        assert {name: options[name] for name in shared if name in options}.items() <= shared.items(), path


def test_cheap_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner()

    def output(*words):
        done = run.invoke(app, words)
        assert done.exit_code == 0, (words, done.output)
        return done.output

    assert tc.__version__ in output("--version")
    for path, _ in commands():
        assert "Usage" in output(*path, "--help")
    for name in ("full", "tidal", "smollm2", "gemma3-270m"):
        assert name in output("policy", "list")
    assert "num_layers: 32" in output("policy", "show", "tidal", "--num-layers", "32", "--budget", "512")
    output("policy", "init", "my.yaml", "--num-layers", "32")
    assert "valid" in output("policy", "validate", "my.yaml")
    output("policy", "export", "smollm2", "smollm2.json")
    output("policy", "import", "mine.yaml", "--indexer-types", "FFSFSSSS")
    output("policy", "import", "mine.yaml", "--omnikv", "2,8,18", "--num-layers", "32")
    assert sorted(os.listdir()) == ["mine.yaml", "my.yaml", "smollm2.json"]


def public(node):
    """What `tc.name` or `tc.name.name` means; None for other expressions. Raises AttributeError if there is no such."""
    if isinstance(node, ast.Name):
        return tc if node.id == "tc" else None
    if isinstance(node, ast.Attribute):
        owner = public(node.value)
        return None if owner is None else getattr(owner, node.attr)
    return None


@pages
def test_python_is_right(page):
    """It parses; names of the package exist, and take the arguments that are given."""
    for code in code_of(page, "python"):
        for node in ast.walk(ast.parse(code)):
            public(node)
            if isinstance(node, ast.ImportFrom) and node.module.startswith("tidal_compile"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
            if isinstance(node, ast.Call) and public(node.func) is not None:
                named = {one.arg: None for one in node.keywords if one.arg is not None}
                inspect.signature(public(node.func)).bind(*node.args, **named)
    for name in re.findall(r"\btc\.([A-Za-z_]+)", " ".join(INLINE.findall(text_of(page)))):
        assert hasattr(tc, name), f"{page.name}: tc.{name}"


@pages
def test_policies_are_what_they_say(page):
    """A policy loads; one that an error message follows is refused with that message."""
    blocks = FENCED.findall(text_of(page))
    for (kind, code), (following, message) in itertools.pairwise([*blocks, ("", "")]):
        data = yaml.safe_load(code) if kind == "yaml" else None
        if not isinstance(data, dict) or "num_layers" not in data:
            continue
        if following == "text":
            with pytest.raises(tc.PolicyError) as refused:
                tc.Policy.from_dict(data, where="my.yaml")
            assert str(refused.value) == message.strip()
        else:
            assert len(tc.Policy.from_dict(data).roles) == data["num_layers"]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_navigation_has_every_page():
    def files(entry):
        return [entry] if isinstance(entry, str) else [one for part in entry for one in files(*part.values())]

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(files(settings["nav"])) == sorted(page.name for page in DOCS.glob("*.md"))
    assert settings["site_url"] == SITE and settings["repo_url"] == REPOSITORY.rstrip("/")
