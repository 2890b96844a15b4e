"""Policy files: which layers attend to everything, which choose tokens, and which reuse the choice.

    version: 1
    num_layers: 32
    defaults: {budget: 1024, sinks: 4, recent: 64, share: kv_head}
    layers:
      0-1: full
      2: select
      3-12: reuse
      13: {role: select, budget: 2048}
      14-31: reuse                       # from the nearest selection before it, unless `from:` names another

A `Policy` is the checked content of such a file; `policy.roles` says what it means for each layer. A selection names
the method by which it chooses (`by`), whose own keys stand beside it: they are declared in `kernels/methods`.
"""

import dataclasses
import json
import os
import re
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from . import presets
from .errors import PolicyError
from .kernels.call import POOLS, SHARES, Selection, fitting
from .kernels.methods import METHODS, Method
from .passes.roles import ROLES, LayerRole

FILE = "tidal_policy.yaml"  # the name of the policy file in a folder or repository, beside the model's weights
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
Count = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Share = Literal[SHARES]
Pool = Literal[POOLS]
By = Literal[tuple(METHODS)]  # pyrefly: ignore
Output = Literal["full", "sparse"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class RatioBudget(_Strict):
    """A budget that grows with the context: `ratio` of the live tokens, at least `min`."""

    ratio: float = Field(gt=0, le=1, strict=True)
    min: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] = 1


Budget = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] | RatioBudget


class _WithMethodKeys(_Strict):
    """Also takes the keys of methods, which `_method` checks once it is known which method they are for."""

    model_config = ConfigDict(extra="allow")


class Defaults(_WithMethodKeys):
    """The settings of every select layer that doesn't set them itself.

    `budget`, `sinks`, `recent`, `share` and `pool` are those of a `Selection`. `by` is the method by which tokens are
    chosen (default: `scores`), and its own keys may stand beside it. `output` is what a select layer returns: `full`
    attention, or `sparse`, to what it chose (default: what the method gives first).
    """

    budget: Budget = 1024
    sinks: Count = 4
    recent: Count = 64
    share: Share = "kv_head"
    pool: Pool | None = None
    by: By | None = None
    output: Output | None = None


class Layer(_WithMethodKeys):
    """One entry of `layers`: a role, and the settings that differ from the defaults, which are those of `Defaults`.

    `from` (`source` here, since `from` is a keyword) is the select layer whose tokens a reuse layer attends to. `heads`
    has, for each kv head of the reuse layer, the kv head of the select layer whose tokens it takes (default: the head
    of the same number), as in Kascade (https://arxiv.org/abs/2512.16391).
    """

    role: Literal[ROLES]
    budget: Budget | None = None
    sinks: Count | None = None
    recent: Count | None = None
    share: Share | None = None
    pool: Pool | None = None
    by: By | None = None
    output: Output | None = None
    source: Count | None = Field(default=None, alias="from")
    heads: Annotated[list[Count], Field(min_length=1)] | None = None


class Policy(_Strict):
    """A checked policy. Make one with `preset`, `load`, `from_dict` or `resolve`; equal policies compare equal."""

    version: Literal[1] = 1
    name: str = "unnamed"
    description: str = ""
    num_layers: Annotated[int, Field(strict=True, ge=1, le=10_000)]
    defaults: Defaults = Defaults()
    layers: dict[str, Layer]
    calibration: dict[str, Any] | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _shorthand(cls, layers: Any) -> Any:
        if not isinstance(layers, dict):
            return layers
        entries = {str(key): {"role": entry} if isinstance(entry, str) else entry for key, entry in layers.items()}
        if len(entries) < len(layers):
            raise ValueError("layers: a layer is given twice, once as a number and once as text")
        return entries

    @model_validator(mode="after")
    def _resolves(self) -> Self:
        _ = self.roles
        return self

    @classmethod
    def preset(cls, name: str, num_layers: int, *, attention_layers: tuple[int, ...] | None = None,
               model: str | None = None, **defaults: Any) -> Self:  # fmt: skip
        """Make the policy of the preset `name` for a model of `num_layers` layers.

        `attention_layers` are the layers with full attention (default: all); the other layers, such as sliding-window
        layers, stay as they are. `model` is the model's name: where selection layers are published for it, the preset
        takes those. `defaults` are those of a policy file, and replace the preset's. Raises `PolicyError`.
        """
        if name not in presets.PRESETS:
            raise PolicyError(f"unknown preset {name!r}; presets are: {', '.join(presets.PRESETS)}")
        if not isinstance(num_layers, int) or num_layers < 1:
            raise PolicyError(f"preset {name!r}: num_layers must be a positive number, found {num_layers!r}")
        attention = tuple(range(num_layers)) if attention_layers is None else attention_layers
        preset = presets.PRESETS[name](len(attention), model, defaults.get("budget"))
        entries = dict.fromkeys(range(num_layers), "full") | dict(zip(attention, preset.layers, strict=True))
        layers = dict(_ranges(sorted(entries.items(), key=lambda item: item[0])))
        description = (presets.PRESETS[name].__doc__ or "").partition("\n")[0]
        data = {"name": name, "description": description, "num_layers": num_layers, "layers": layers}
        return cls.from_dict({**data, "defaults": preset.defaults | defaults}, where=f"preset {name!r}")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML or JSON policy file, or the `tidal_policy.yaml` of a folder or a Hugging Face repository.

        Raises `PolicyError` that names the file, the key and what is valid.
        """
        path = _find_file(path)
        try:
            data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_NoDuplicates)
        except OSError as error:
            raise PolicyError(f"{path}: can't read the policy file: {error.strerror or error}") from None
        except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or an impossible date
            raise PolicyError(f"{path}: not a YAML or JSON policy file: {' '.join(str(error).split())}") from None
        return cls.from_dict(data, where=str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str = "policy") -> Self:
        """Check a policy given as plain data; `where` starts the message of a `PolicyError`."""
        if not isinstance(data, dict):
            raise PolicyError(f"{where}: a policy is a mapping with the keys {_keys(cls)}; found {type(data).__name__}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = dict.fromkeys(_explain(problem) for problem in error.errors())
            raise PolicyError(f"{where}: " + "; ".join(filter(None, problems))) from None

    @cached_property
    def roles(self) -> tuple[LayerRole, ...]:
        """The role of every layer, in order. A mistake in `layers` raises a ValueError, which pydantic reports."""
        _method("defaults", self.defaults.by or "scores", self.defaults.model_extra or {}, Defaults)
        entries: dict[int, tuple[str, Layer]] = {}
        for key, entry in self.layers.items():
            for layer in _layer_range(key, self.num_layers):
                if layer in entries:
                    raise ValueError(f"layers.{key}: layer {layer} is already set by layers.{entries[layer][0]}")
                entries[layer] = (key, entry)
        missing = [layer for layer in range(self.num_layers) if layer not in entries]
        if missing:
            gaps = ", ".join(key for key, _ in _ranges([(layer, "gap") for layer in missing]))
            raise ValueError(
                f"layers: no role for layer {gaps} of {self.num_layers}; every layer needs one of {', '.join(ROLES)}"
            )
        roles: dict[int, LayerRole] = {}
        for layer in range(self.num_layers):
            roles[layer] = _role(layer, *entries[layer], self.defaults, roles)
        return tuple(roles.values())

    def with_defaults(self, **changes: Any) -> Self:
        """Return this policy with other defaults (`budget`, `sinks`, `by`, ...). Raises `PolicyError`."""
        data = self.to_dict()
        return type(self).from_dict(
            {**data, "defaults": {**data["defaults"], **changes}}, where=f"policy {self.name!r}"
        )

    def with_budget(self, budget: int) -> Self:
        """Return this policy with another budget, the same for every selection; a small one has fewer sinks and recent.

        Raises `PolicyError`.
        """
        data = self.to_dict()
        settings = fitting(budget, self.defaults.sinks, self.defaults.recent)
        layers = {
            key: {name: value for name, value in entry.model_dump(by_alias=True, exclude_none=True).items()
                  if name not in ("budget", "sinks", "recent")}
            for key, entry in self.layers.items()
        }  # fmt: skip
        data |= {"defaults": {**data["defaults"], **settings}, "layers": layers}
        return type(self).from_dict(data, where=f"policy {self.name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as plain data, as a policy file holds it."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        data["layers"] = {key: entry["role"] if len(entry) == 1 else entry for key, entry in data["layers"].items()}
        return data

    def save(self, path: str | Path) -> None:
        """Write a policy file, in JSON if the path ends in `.json`, otherwise in YAML. Raises `PolicyError`."""
        text = json.dumps(self.to_dict(), indent=1) + "\n" if Path(path).suffix == ".json" else self.to_yaml()
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise PolicyError(f"{path}: can't write: {error.strerror or error}") from None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload `tidal_policy.yaml` to a Hugging Face repository, and return the address of the commit.

        The repository is created if it doesn't exist.

        `options` are those of `huggingface_hub.HfApi.upload_file`, such as `token`. Raises `PolicyError`.
        """
        import huggingface_hub

        api = huggingface_hub.HfApi(token=options.pop("token", None))
        try:
            api.create_repo(repo_id, repo_type=options.get("repo_type"), exist_ok=True)
            commit = api.upload_file(
                path_or_fileobj=self.to_yaml().encode(), path_in_repo=FILE, repo_id=repo_id,
                commit_message=f"Policy {self.name}", **options,
            )  # fmt: skip
        except Exception as error:  # of any kind: the user needs to know which repository failed
            raise PolicyError(f"{repo_id}: can't push the policy: {error}") from None
        return commit.commit_url

    def to_yaml(self) -> str:
        """Return the text of a YAML policy file with this policy."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=120)


def resolve(
    policy: Policy | dict | str | Path, num_layers: int, *, attention_layers: tuple[int, ...] | None = None,
    model: str | None = None, **overrides: Any,
) -> Policy:  # fmt: skip
    """Make a policy of any form (object, plain data, file, preset or shipped name) one for a model of `num_layers`.

    `overrides` replace its defaults. The other arguments are those of `Policy.preset`. Raises `PolicyError`, also for a
    policy that is written for another number of layers.
    """
    if is_preset(policy):
        return Policy.preset(policy, num_layers, attention_layers=attention_layers, model=model, **overrides)
    loaded = load_any(policy)
    if loaded.num_layers != num_layers:
        title = str(policy) if isinstance(policy, str | Path) else f"policy {loaded.name!r}"
        raise PolicyError(f"{title}: num_layers is {loaded.num_layers}, but the model has {num_layers} decoder layers")
    return loaded.with_defaults(**overrides) if overrides else loaded


def is_preset(policy: Any) -> bool:
    """Whether `policy` names a preset, which becomes a policy only for a given model."""
    return isinstance(policy, str) and policy in presets.PRESETS


def load_any(policy: Policy | dict | str | Path) -> Policy:
    """Return a policy that is given as an object, plain data, a file or a shipped policy's name, but not as a preset.

    A preset needs to know the model: `resolve` takes those as well.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, dict):
        return Policy.from_dict(policy)
    if not isinstance(policy, str | Path):
        raise PolicyError(f"policy must be a Policy, a mapping, a file or a name, found {type(policy).__name__}")
    if str(policy) in shipped():
        return Policy.load(shipped()[str(policy)])
    looks_like_file = Path(policy).suffix or len(Path(policy).parts) > 1 or os.path.exists(policy)
    if not looks_like_file:
        raise PolicyError(
            f"unknown policy {str(policy)!r}: no such file; presets are: {', '.join(presets.PRESETS)}; "
            f"shipped policies are: {', '.join(shipped())}"
        )
    return Policy.load(policy)


def shipped() -> dict[str, Path]:
    """Return the policy files that come with the package, by policy name."""
    folder = Path(str(resources.files(presets)))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def _find_file(path: str | Path) -> str | Path:
    """Return the policy file at a path: the path itself, or the file in that folder or Hugging Face repository.

    A repository's file is downloaded. A path that can't name a repository is returned even if there is no such file.
    """
    if Path(path).is_dir():
        return Path(path) / FILE
    if Path(path).exists() or Path(path).suffix in (".yaml", ".yml", ".json") or not _REPO.fullmatch(str(path)):
        return path
    import huggingface_hub

    try:
        return huggingface_hub.hf_hub_download(str(path), FILE)
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path}: no such file, and no {FILE} in a repository of this name: {error}") from None


def _role(layer: int, key: str, entry: Layer, defaults: Defaults, earlier: dict[int, LayerRole]) -> LayerRole:
    """Return the role of `layer`, given the roles of the layers before it. `key` is the entry's key in `layers`.

    A mistake raises a ValueError, which pydantic reports.
    """
    settings = {name: getattr(entry, name) for name in Defaults.model_fields if getattr(entry, name) is not None}
    own = entry.model_extra or {}
    if entry.role != "select":
        known = [name for name in own if any(name in _method_keys(by) for by in METHODS)]
        if unknown := set(own) - set(known):
            raise ValueError(f"layers.{key}.{min(unknown)}: unknown key; valid keys are {_keys(Layer)}")
        if misplaced := [*settings, *known]:
            raise ValueError(
                f"layers.{key}: {', '.join(misplaced)} can only be set on a select layer, not on {entry.role}"
            )
    if entry.role != "reuse" and entry.source is not None:
        raise ValueError(f"layers.{key}.from: only a reuse layer takes its tokens from another, not {entry.role}")
    if entry.role != "reuse" and entry.heads is not None:
        raise ValueError(f"layers.{key}.heads: only a reuse layer maps its heads to another's, not {entry.role}")
    if entry.role == "full":
        return LayerRole(layer, "full")
    if entry.role == "select":
        return _select(layer, f"layers.{key}", entry, defaults.model_copy(update=settings), defaults)
    selections = [role.layer for role in earlier.values() if role.role == "select" and not role.method.attends]
    alone = sorted({role.by for role in earlier.values() if role.method.attends})
    unless = f" (what by: {', '.join(alone)} attends to can't be reused)" if alone else ""
    if not selections:
        raise ValueError(f"layers.{key}: layer {layer} reuses tokens, but no layer before it selects any{unless}")
    if entry.source is not None and entry.source not in selections:
        raise ValueError(
            f"layers.{key}.from: layer {entry.source} is no selection before layer {layer}; "
            f"selections are: {', '.join(map(str, selections))}{unless}"
        )
    source = earlier[selections[-1] if entry.source is None else entry.source]
    if entry.heads is not None and source.selection.share != "kv_head":
        raise ValueError(
            f"layers.{key}.heads: layer {source.layer} shares its tokens by {source.selection.share}; a head map needs "
            "kv_head"
        )
    heads = None if entry.heads is None else tuple(entry.heads)
    return dataclasses.replace(source, layer=layer, role="reuse", source=source.layer, output="sparse", heads=heads)


def _select(layer: int, where: str, entry: Layer, chosen: Defaults, defaults: Defaults) -> LayerRole:
    """Return the role of a select layer: `chosen` are the defaults with the settings of its entry."""
    ratio, budget = (
        (chosen.budget.ratio, chosen.budget.min) if isinstance(chosen.budget, RatioBudget) else (0.0, chosen.budget)
    )
    if budget < chosen.sinks + chosen.recent:
        raise ValueError(
            f"{where}: budget {budget} is smaller than sinks + recent ({chosen.sinks} + {chosen.recent}), "
            "which are kept inside it"
        )
    selection = Selection(budget, ratio, chosen.sinks, chosen.recent, chosen.share, chosen.pool or "sum")
    by, default_by = chosen.by or "scores", defaults.by or "scores"
    inherited = defaults.model_extra or {} if by == default_by else {}
    method = _method(where, by, inherited | (entry.model_extra or {}), Layer)
    if method.attends:
        for name in ("budget", "share", "pool"):
            if getattr(entry, name) is not None:
                own = ", ".join(_method_keys(by))
                raise ValueError(
                    f"{where}.{name}: by: {by} attends by itself and has no {name}; its own keys are {own}"
                )
    output = chosen.output or method.outputs[0]
    if output not in method.outputs:
        raise ValueError(f"{where}.output: by: {by} returns {' or '.join(method.outputs)}, found {output}")
    return LayerRole(layer, "select", None, selection, by, method, output)


def _method(where: str, by: str, keys: dict[str, Any], model: type[BaseModel]) -> Method:
    """Return a method with the keys that a policy gives it. A mistake raises a ValueError."""
    types = {name: get_type_hints(METHODS[by])[name] for name in _method_keys(by)}
    for name, value in keys.items():
        if name not in types:
            others = [other for other in METHODS if name in _method_keys(other)]
            what = f"a key of by: {' and by: '.join(others)}, not of by: {by}" if others else "unknown key"
            own = f"; of by: {by}, {', '.join(types)}" if types else f"; by: {by} has none of its own"
            raise ValueError(f"{where}.{name}: {what}; valid keys are {_keys(model)}{own}")
        try:
            keys = keys | {name: TypeAdapter(types[name]).validate_python(value, strict=True)}
        except ValidationError as error:
            raise ValueError(f"{where}.{name}: {error.errors()[0]['msg']}; found {_show(value)}") from None
    try:
        return METHODS[by](**keys)
    except ValueError as error:  # of the method itself, which names the key
        raise ValueError(f"{where}: by: {by}: {error}") from None


def _method_keys(by: str) -> tuple[str, ...]:
    """Return the names of a method's own keys."""
    return tuple(field.name for field in dataclasses.fields(METHODS[by]))


def _layer_range(key: str, num_layers: int) -> range:
    """Return the layers that a key of `layers` names, such as "2" or "3-12"."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", key)
    if not match:
        raise ValueError(f"layers.{key}: a key is a layer (2) or an inclusive range (3-12)")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"layers.{key}: the range runs backwards")
    if last >= num_layers:
        raise ValueError(
            f"layers.{key}: the layers of this policy are 0 to {num_layers - 1} (num_layers: {num_layers})"
        )
    return range(first, last + 1)


def _ranges(entries: list[tuple[int, Any]]) -> list[tuple[str, Any]]:
    """Join neighbouring layers with equal entries: [(0, "full"), (1, "full")] -> [("0-1", "full")]."""
    runs: list[list] = []
    for layer, entry in entries:
        if runs and runs[-1][1] == layer - 1 and runs[-1][2] == entry:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer, entry])
    return [(str(first) if first == last else f"{first}-{last}", entry) for first, last, entry in runs]


def _explain(problem: Any) -> str:
    """Put a pydantic problem in the words of a policy file: the key, what was found, and what is valid.

    Returns "" for a problem that only repeats another one.
    """
    if problem["type"] == "value_error":  # raised in this file, with a message of its own
        return str(problem["ctx"]["error"])
    path = [str(part) for part in problem["loc"] if not str(part).startswith(("function-", "constrained-"))]
    in_entry = path[:1] == ["layers"] and len(path) > 2
    model = Layer if in_entry else Defaults if path[:1] == ["defaults"] else Policy
    if "budget" in path:  # pydantic reports a wrong budget once for each form that a budget may have
        if path[path.index("budget") + 1 :]:
            return ""
        return (
            f"{'.'.join(path)}: a budget is a number of tokens >= 1, or {{ratio: 0.1, min: 128}} with a ratio up to 1; "
            f"found {_show(problem['input'])}"
        )
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; valid keys are {_keys(model)}"
    if problem["type"] == "missing":
        return f"{key}: missing; it is required"
    if problem["type"] == "literal_error":
        return f"{key}: found {_show(problem['input'])}; valid values are {problem['ctx']['expected']}"
    if problem["type"] == "model_type" and model is Policy and path[:1] == ["layers"]:
        valid = f"a role ({', '.join(ROLES)}) or a mapping with {_keys(Layer)}"
        return f"{key}: an entry is {valid}; found {_show(problem['input'])}"
    return f"{key}: {problem['msg']}; found {_show(problem['input'])}"


def _show(value: Any) -> str:
    """Return a value as JSON, cut off at 60 characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(field.alias or name for name, field in model.model_fields.items())


class _NoDuplicates(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # the faster C parser, where it is installed
    """A loader that refuses a key given twice: YAML keeps the last of the two, which would hide a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                message = f"key {key_node.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)
