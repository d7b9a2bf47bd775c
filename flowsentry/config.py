"""The YAML files: strict models, and a loader whose errors say where the mistake is and what was probably meant."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from flowsentry.errors import ConfigError
from flowsentry.features.splits import MOST_ROTATIONS
from flowsentry.monitoring.pace import Pace
from flowsentry.simulation.settings import NEW_SEED, SimulationSettings

SIMULATE: Final = "simulate"
"""Stands for a simulated recording where data are named."""

FamilyName = Literal["logistic_regression", "svc", "knn", "decision_tree", "gradient_boosting", "effects", "tails"]
_LARGEST: Final = 1 << 20

M = TypeVar("M", bound=BaseModel)


class Section(BaseModel):
    """Part of a configuration: no conversion of types, no unknown keys, no changes later."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _families(given: Mapping[str, Any]) -> list[FamilyName]:
    return [name for name in get_args(FamilyName) if name != "effects" or given.get("view") != "paper"]


def _data(value: object) -> list[str]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not given or not all(isinstance(name, str) and name.strip() for name in given):
        raise ValueError(f"should be {SIMULATE} or a list of files, folders or globs")
    if SIMULATE in given and len(given) > 1:
        raise ValueError(f"should be either {SIMULATE} or a list of files, not both")
    return given


class ValidationSettings(Section):
    """When bad rows end a run."""

    max_quarantine_share: float = Field(default=0.05, ge=0, le=1)
    """Largest share of rows in quarantine, as a fraction."""


class SplitSettings(Section):
    """How flows are divided."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    rotations: int = Field(default=2, ge=1, le=MOST_ROTATIONS)
    """Divisions of the benign flows under protocol `family`; each held-out family is tested on all of them."""


class SearchSettings(Section):
    """How the parameters of a family are chosen."""

    folds: int = Field(default=3, ge=2, le=10)
    metric: Literal["accuracy", "balanced_accuracy", "recall_at_fpr", "average_precision"] = "recall_at_fpr"


class LimitSettings(Section):
    """Where the limit between ordinary and alarming lies."""

    target_fpr: float = Field(default=0.002, gt=0, le=0.5)
    """Share of benign flows that may be flagged, as a fraction."""
    minimum_effect: bool = True
    """Flag only what differs from ordinary by an amount that matters, however rare it is."""


class SelectSettings(Section):
    """What decides which candidate ships."""

    protocol: Literal["family", "random", "time", "recording"] = "family"
    metric: Literal["accuracy", "balanced_accuracy", "recall", "f1"] = "recall"
    max_fpr: float = Field(default=0.005, gt=0, le=1)
    """With the metric `recall`, the highest false-positive rate that a candidate may have, as a fraction."""


class QualityGateSettings(Section):
    """What a challenger must achieve on flows that neither it nor the champion has learned from."""

    metric: Literal["accuracy", "balanced_accuracy", "recall", "f1"] = "recall"
    """At the limit."""
    max_loss: float = Field(default=0.01, ge=0, le=1)
    """How far the metric may lie below the champion's: a new draw of the training flows moves it about as much."""
    max_family_loss: float = Field(default=0.05, ge=0, le=1)
    """The same for the recall of each family, of which there are fewer flows: one of twenty."""
    max_fpr: float = Field(default=0.01, gt=0, le=1)
    """Highest false positive rate. Wider than `select.max_fpr`, a mean over folds: this is one part of few flows."""
    min_metric: float = Field(default=0.4, ge=0, le=1)
    """Least metric where there is nothing to compare with. Low, as the limit may hold back whole families that are too
    weak for it, as two of six in the simulated default; the baselines are to be beaten besides."""
    min_flows: int = Field(default=50, ge=1)
    """Least flows of each class, new to both models, for a comparison."""
    min_family_flows: int = Field(default=20, ge=1)
    """A family with fewer is reported, not decided: a single flow would weigh more than `max_family_loss`."""
    resamples: int = Field(default=1000, ge=100, le=100_000)
    """Of the bootstrap that gives the 95% intervals."""
    without_champion: bool = False
    """Hold the challenger to the absolute bars alone where there is a champion that cannot be compared: of another
    version of the view, or unknown to this ZenML store. Without it the gate then fails."""


class ServiceGateSettings(Section):
    """What the challenger's service must achieve before traffic moves to it."""

    max_p99_ms: float = Field(default=250.0, gt=0)
    """Highest 99th percentile of the time of a request with one flow. Answers take some 2 ms; this leaves room for a
    busy machine and still tells a service that is stuck."""
    single_requests: int = Field(default=200, ge=20, le=100_000)
    """Requests with one flow, spread over the recordings: the least from which a 99th percentile can be read."""
    largest_request: int = Field(default=5_000, ge=1, le=10_000)
    """Flows of the largest requests."""
    timeout_seconds: float = Field(default=30.0, gt=0)
    """Longest wait for one answer; after it the service counts as dead."""


class PipelineConfig(Section):
    """What every pipeline is told: where flows come from and where its pages go."""

    data: Annotated[list[str], PlainValidator(_data)] = [SIMULATE]
    """Files, folders and globs, relative to the working directory; or `simulate`."""
    simulation: SimulationSettings = SimulationSettings()
    validation: ValidationSettings = ValidationSettings()
    reports: str = Field(default="reports", min_length=1)
    """Folder that the reports are written to, relative to the working directory."""

    @property
    def simulated(self) -> bool:
        """Whether the flows come from the simulator."""
        return self.data == [SIMULATE]


class TrainConfig(PipelineConfig):
    """The configuration of the pipeline `train`."""

    labels: Literal["corrected", "published"] = "corrected"
    view: Literal["behaviour", "paper"] = "behaviour"
    splits: SplitSettings = SplitSettings()
    families: list[FamilyName] = Field(default_factory=_families, min_length=1)
    """Model families to train; without any given all that the view allows."""
    search: SearchSettings = SearchSettings()
    limit: LimitSettings = LimitSettings()
    select: SelectSettings = SelectSettings()
    deploy: bool = True
    """Put what was selected into production, if it passes both gates; without it the run ends with a model version."""
    quality_gate: QualityGateSettings = QualityGateSettings()
    service_gate: ServiceGateSettings = ServiceGateSettings()

    @field_validator("families")
    @classmethod
    def _each_family_once(cls, value: list[FamilyName]) -> list[FamilyName]:
        if repeated := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"names {repeated[0]} more than once")
        return value

    @field_validator("families")
    @classmethod
    def _families_suit_the_view(cls, value: list[FamilyName], info: ValidationInfo) -> list[FamilyName]:
        if "effects" in value and info.data.get("view") == "paper":
            raise ValueError("should leave effects out: the view paper states no minimum effects")
        return value


class NewFlowsConfig(PipelineConfig):
    """Of a pipeline that shows flows to a model in production: simulated ones are not those of the training."""

    simulation: SimulationSettings = SimulationSettings(seed=NEW_SEED)

    @field_validator("simulation", mode="before")
    @classmethod
    def _another_seed(cls, value: object) -> object:
        return {"seed": NEW_SEED, **value} if isinstance(value, dict) else value


class InferenceConfig(NewFlowsConfig):
    """The configuration of the pipeline `inference`."""


class ReplayConfig(NewFlowsConfig):
    """The configuration of the pipeline `replay`."""

    speed: str = "max"
    """See `Pace.parse`. As fast as the service answers: nobody watches a run, its pages come at the end."""

    @field_validator("speed")
    @classmethod
    def _is_a_pace(cls, value: str) -> str:
        try:
            Pace.parse(value)
        except ConfigError:
            raise ValueError("should be a factor such as 10x, or max") from None
        return value


def load(path: Path, model: type[M]) -> M:
    """Read a YAML file into a model.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or says something that the model does not know. One line for
            each mistake, with the file, the line, the key and the nearest that would be right.
    """
    lines: dict[tuple[str | int, ...], int] = {}
    document = _parse(path, lines)
    try:
        return model.model_validate(document)
    except ValidationError as error:
        keys = dict(_keys(model))
        # A default that depends on a key that is wrong is no mistake of its own.
        mistakes = [d for d in error.errors(include_url=False) if d["type"] != "default_factory_not_called"]
        told = [_explain(path, details, keys, lines) for details in mistakes]
    raise ConfigError("\n".join(line for _, line in sorted(told)))


class _Loader(yaml.SafeLoader):
    """Plain YAML: no dates, and numbers like 1e-3 are numbers."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(path: Path, lines: dict[tuple[str | int, ...], int]) -> object:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file{_neighbours(path)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > _LARGEST:
        raise ConfigError(f"{path}: is larger than 1 MiB and hardly a configuration")
    try:
        loader = _Loader(content.decode("utf-8"))
        if isinstance(root := loader.get_single_node(), yaml.MappingNode):
            _walk(root, (), path, lines, set())
            return loader.construct_document(root)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start + 1} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "unreadable character"
        raise ConfigError(f"{path}{f':{mark.line + 1}' if mark else ''}: is no valid YAML: {problem}") from None
    except (RecursionError, ValueError):
        raise ConfigError(f"{path}: is no valid YAML: nested too deeply, or with an impossible value") from None
    raise ConfigError(f"{path}: should hold keys with values, such as 'view: behaviour'")


def _neighbours(path: Path) -> str:
    near = difflib.get_close_matches(path.name, sorted(other.name for other in path.parent.glob("*.yaml")), n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _walk(
    node: yaml.Node, at: tuple[str | int, ...], path: Path, lines: dict[tuple[str | int, ...], int], seen: set[int]
) -> None:
    line = node.start_mark.line + 1
    lines.setdefault(at, line)
    if id(node) in seen:
        raise ConfigError(f"{path}:{line}: anchors and aliases are not supported; write the value again")
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _walk(item, (*at, number), path, lines, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise ConfigError(f"{path}:{line}: keys should be plain words")
            here = (*at, key.value)
            if here in lines:
                raise ConfigError(f"{path}:{line}: {_dotted(here)} is given twice, first in line {lines[here]}")
            lines[here] = line
            _walk(value, here, path, lines, seen)


def _keys(model: type[BaseModel], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Each place of a configuration that holds keys, with its keys; `*` is any number or name."""
    yield at, tuple(model.model_fields)
    for name, field in model.model_fields.items():
        for inner, below in _models(field.annotation):
            yield from _keys(inner, (*at, name, *below))


def _models(annotation: Any, below: tuple[str, ...] = ()) -> Iterator[tuple[type[BaseModel], tuple[str, ...]]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, below
    elif (origin := get_origin(annotation)) in (Union, types.UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _models(argument, below)
    elif isinstance(origin, type) and issubclass(origin, Sequence | Mapping):
        yield from _models(get_args(annotation)[-1], (*below, "*"))


def _explain(
    path: Path,
    details: ErrorDetails,
    keys: Mapping[tuple[str, ...], tuple[str, ...]],
    lines: Mapping[tuple[str | int, ...], int],
) -> tuple[int, str]:
    """The line of a mistake and what to say about it."""
    at = tuple(details["loc"])
    line = next(lines[at[:n]] for n in range(len(at), -1, -1) if at[:n] in lines)
    return line, f"{path}:{line}: {_dotted(at)} {_mistake(at, details, keys)}"


def _mistake(at: tuple[str | int, ...], details: ErrorDetails, keys: Mapping[tuple[str, ...], tuple[str, ...]]) -> str:
    given, context = details["input"], details.get("ctx", {})
    match details["type"]:
        case "extra_forbidden":
            return f"is no key of this file; {_nearest_key(at, keys)}"
        case "missing":
            return "is missing"
        case "value_error":
            return f"{context['error']}{_shown(given)}"
        case "literal_error":
            known = re.findall(r"'([^']*)'", context["expected"])
            near = difflib.get_close_matches(str(given), known, n=1)
            hint = f"did you mean {near[0]}?" if near else ""
            return f"should be one of {', '.join(known)}{_shown(given, hint)}"
        case "int_type" | "int_from_float":
            return f"should be a whole number{_shown(given)}"
        case "bool_type":
            return f"should be true or false{_shown(given)}"
        case "too_short":
            return "should not be empty"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"should hold keys with values{_shown(given)}"
        case _:
            return f"{details['msg'].removeprefix('Input ').replace('a valid', 'a')}{_shown(given)}"


def _shown(given: object, hint: str = "") -> str:
    kinds = {str: "text", type(None): "nothing", list: "a list", dict: "keys with values"}
    said = repr(given) if len(repr(given)) <= 60 else repr(given)[:57] + "..."
    kind = kinds.get(type(given))
    return f", not {said}{f' ({kind})' if kind else ''}{f'; {hint}' if hint else ''}"


def _nearest_key(at: Sequence[str | int], keys: Mapping[tuple[str, ...], tuple[str, ...]]) -> str:
    key = str(at[-1])
    parent = tuple(at[:-1])
    place = next(
        (p for p in keys if len(p) == len(parent) and all(a in ("*", b) for a, b in zip(p, parent, strict=True))), ()
    )
    if elsewhere := [p for p, names in keys.items() if key in names and p != place]:
        return f"it belongs {'under ' + _dotted(elsewhere[0]) if elsewhere[0] else 'at the top level'}"
    if near := difflib.get_close_matches(key, keys.get(place, ()), n=1):
        return f"did you mean {_dotted((*parent, near[0]))}?"
    everywhere = {name: p for p, names in keys.items() for name in names}
    if near := difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75):
        return f"did you mean {_dotted((*everywhere[near[0]], near[0]))}?"
    return f"known here: {', '.join(keys.get(place, ()))}"


def _dotted(at: Sequence[str | int]) -> str:
    """Where something is in a configuration: `components.orchestrator[0].name`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in at)
    return "".join(parts).removeprefix(".")
