"""The commands `tidal-compile policy ...`, which list, show, check, write and convert policy files."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import report
from ..errors import TidalError
from ..shapes import FORMS
from .common import (
    BudgetOption,
    JsonOption,
    budget_override,
    out,
    read_text,
)  # fmt: skip

if TYPE_CHECKING:
    from ..policy import Policy

app = typer.Typer(help="List, show, check and start policy files.", no_args_is_help=True)


@app.command("list")
def list_policies(as_json: JsonOption = False) -> None:
    """List the presets, which fit any model, and the shipped policy files, each of which is made for one model."""
    from .. import presets
    from ..policy import Policy, shipped

    rows = [(name, "preset", (make.__doc__ or "").partition("\n")[0]) for name, make in presets.PRESETS.items()]
    rows += [(name, "file", Policy.load(path).description) for name, path in shipped().items()]
    if as_json:
        print(json.dumps([dict(zip(("name", "kind", "description"), row, strict=True)) for row in rows]))
        return
    out.print(report.table(("name", "kind", "description"), rows))


NumLayersOption = Annotated[int | None, typer.Option(min=1, help="Layers of the model that the preset is for.")]
ForModelOption = Annotated[str | None, typer.Option("--model", help=f"The model that the policy is for: {FORMS}.")]


@app.command("show")
def show(
    policy: str, num_layers: NumLayersOption = None, model: ForModelOption = None, budget: BudgetOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Print a policy as a policy file, with the role of each layer as a comment."""
    shown = _load(policy, num_layers, model, budget)
    if as_json:
        print(json.dumps(shown.to_dict()))
        return
    print(f"# {report.roles_line(shown)}\n{shown.to_yaml()}", end="")  # not out.print, which would wrap lines


@app.command("validate")
def validate(policy: str, model: ForModelOption = None, as_json: JsonOption = False) -> None:
    """Check a policy file and, with --model, whether it fits the model. If not, print why, and exit with code 2."""
    from ..policy import is_preset, load_any

    if model is None and is_preset(policy):
        raise TidalError(f"preset {policy!r} is valid for any model; to check it for one, say which with --model")
    if model is None:
        checked = load_any(policy)
    else:
        from ..explain import explain as explain_model
        from ..models import load_model

        explanation = explain_model(load_model(model, device="meta"), policy)
        if explanation.problems:
            raise TidalError(f"{policy} does not fit {model}: {'; '.join(explanation.problems)}")
        checked = explanation.policy
    if as_json:
        print(json.dumps({"valid": True, "name": checked.name, "num_layers": checked.num_layers}))
        return
    out.print(f"{policy}: valid. {report.roles_line(checked)}", markup=False, highlight=False, soft_wrap=True)


@app.command("init")
def init(
    file: Path,
    preset: Annotated[str, typer.Option(help="The preset to start from.")] = "tidal",
    num_layers: NumLayersOption = None,
    model: ForModelOption = None,
    budget: BudgetOption = None,
    force: Annotated[bool, typer.Option(help="Overwrite the file if it exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a preset as a policy file, to edit. Name the model with --model, or its depth with --num-layers."""
    policy = _load(preset, num_layers, model, budget)
    if file.exists() and not force:
        raise TidalError(f"{file} exists; --force overwrites it")
    policy.save(file)
    if as_json:
        print(json.dumps({"file": str(file), "policy": policy.to_dict()}))
        return
    out.print(f"wrote {file}: {report.roles_line(policy)}", markup=False, highlight=False)


@app.command("export")
def export(policy: str, file: Path, num_layers: NumLayersOption = None, model: ForModelOption = None) -> None:
    """Write a policy to a file, in JSON if its name ends in .json, otherwise in YAML."""
    _load(policy, num_layers, model, None).save(file)
    out.print(f"wrote {file}", markup=False, highlight=False)


@app.command("import")
def import_policy(
    file: Annotated[Path, typer.Argument(help="The policy file to write.")],
    kascade: Annotated[Path | None, typer.Option(help="A head map of Kascade, <model>_layers_0_2_8.npy.")] = None,
    indexer_types: Annotated[
        str | None, typer.Option(help="FFSF..., or full,shared,...; or a config.json with indexer_types.")
    ] = None,
    omnikv: Annotated[str | None, typer.Option(help="OmniKV's filter layers: 2,8,18, with --num-layers.")] = None,
    num_layers: NumLayersOption = None, budget: BudgetOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Write a policy file of the layers that Kascade, OmniKV, or a DSA model with shared indexers publishes."""
    from .. import imports

    if sum(source is not None for source in (kascade, indexer_types, omnikv)) != 1:
        raise TidalError("policy import: give one of --kascade, --indexer-types and --omnikv")
    changes = budget_override(budget)
    if kascade is not None:
        policy = imports.from_kascade(kascade, **changes)
    elif indexer_types is not None:
        policy = imports.from_indexer_types(_read_types(indexer_types), **changes)
    elif num_layers is None or not re.fullmatch(r"\d+(,\d+)*", omnikv):
        raise TidalError(f"policy import: --omnikv {omnikv}: give layers as 2,8,18, and --num-layers")
    else:
        policy = imports.from_omnikv([int(layer) for layer in omnikv.split(",")], num_layers, **changes)
    policy.save(file)
    if as_json:
        print(json.dumps({"file": str(file), "policy": policy.to_dict()}))
        return
    out.print(f"wrote {file}: {report.roles_line(policy)}", markup=False, highlight=False, soft_wrap=True)


def _read_types(option: str) -> list[str]:
    """Return the indexer types that `--indexer-types` gives itself, or those of the JSON file that it names."""
    if not option.endswith(".json"):
        return [name.strip() for name in option.split(",")] if "," in option else list(option)
    try:
        types = json.loads(read_text(Path(option)))
    except ValueError as error:
        raise TidalError(f"{option}: not JSON: {error}") from None
    if isinstance(types, dict):
        types = types.get("indexer_types")
    if not isinstance(types, list):
        raise TidalError(f"{option}: has no list indexer_types")
    return types


def _load(policy: str, num_layers: int | None, model: str | None, budget: int | None) -> "Policy":
    """Load a policy by name or file, and check that it fits the model or the number of layers, if one is given."""
    from ..policy import is_preset, load_any, resolve

    overrides = budget_override(budget)
    if model is not None:
        from ..explain import decode_calls
        from ..models import load_model
        from ..passes.match import policy_layers

        calls, num_layers = decode_calls(load_model(model, device="meta"))
        return resolve(policy, num_layers, attention_layers=policy_layers(calls), model=model, **overrides)
    if num_layers is not None:
        return resolve(policy, num_layers, **overrides)
    if is_preset(policy):
        raise TidalError(f"preset {policy!r} fits any model: say which with --model or --num-layers")
    loaded = load_any(policy)
    return loaded.with_defaults(**overrides) if overrides else loaded
