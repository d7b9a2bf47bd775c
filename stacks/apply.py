"""Create or update a stack from its file, and use it for this process alone."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal
from uuid import UUID

import zenml
from pydantic import Field, ValidationError, model_validator
from zenml.client import Client
from zenml.constants import ENV_ZENML_ACTIVE_STACK_ID
from zenml.enums import StackComponentType
from zenml.stack.flavor import Flavor
from zenml.utils import source_utils

from flowsentry.config import Section, load
from flowsentry.errors import StackError
from stacks import site

FOLDER: Final = Path(__file__).parent

ComponentType = Literal[
    "orchestrator",
    "artifact_store",
    "experiment_tracker",
    "container_registry",
    "image_builder",
    "step_operator",
    "alerter",
]


class Component(Section):
    """One component of a stack."""

    name: str = Field(min_length=1)
    flavor: str = Field(min_length=1)
    type: ComponentType
    configuration: dict[str, Any]


class StackFile(Section):
    """A stack in the form of `zenml stack export`; `${key}` within a configuration stands for a value of the site."""

    stack_name: str = Field(pattern="^flowsentry-")
    """Begins with our name: a stack that the user made is never changed."""
    zenml_version: str
    components: dict[ComponentType, list[Component]]

    @model_validator(mode="after")
    def _complete_and_consistent(self) -> StackFile:
        for kind in ("orchestrator", "artifact_store"):
            if not self.components.get(kind):
                raise ValueError(f"has no {kind}")
        for kind, components in self.components.items():
            for component in components:
                if component.type != kind:
                    raise ValueError(f"{component.name} is of type {component.type}, but stands under {kind}")
                if not component.name.startswith("flowsentry-"):
                    raise ValueError(f"the name of {kind} {component.name} should begin with flowsentry-")
        return self


def known() -> tuple[str, ...]:
    """Names of the stacks that have a file, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.name.startswith("site.")))


def path_of(name: str) -> Path:
    """The file of a stack.

    Raises:
        StackError: there is none.
    """
    if name not in known():
        near = difflib.get_close_matches(name, known(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise StackError(f"stack {name} is unknown; {hint}Known: {', '.join(known())}")
    return FOLDER / f"{name}.yaml"


def apply(path: Path) -> UUID:
    """Make ZenML's stack equal to the file: create it, or update what differs.

    Returns:
        The stack's id.

    Raises:
        ConfigError: the file, or the site that it needs, is not as it should be.
        StackError: it is for another version of ZenML, or ZenML refuses it.
    """
    wanted = _filled(path, load(path, StackFile))
    if wanted.zenml_version != zenml.__version__:
        raise StackError(f"{path}: is for ZenML {wanted.zenml_version}, but {zenml.__version__} is installed")
    client = Client()
    components = {
        StackComponentType(kind): [_component(client, path, component) for component in listed]
        for kind, listed in wanted.components.items()
    }
    try:
        stack = client.get_stack(wanted.stack_name, allow_name_prefix_match=False)
    except KeyError:
        return client.create_stack(wanted.stack_name, components).id
    if {kind: [component.id for component in present] for kind, present in stack.components.items()} != components:
        dropped: dict[StackComponentType, list[UUID]] = {kind: [] for kind in stack.components}
        client.update_stack(stack.id, component_updates=dropped | components)
    return stack.id


def activate(name: str) -> UUID:
    """Apply a stack and use it in this process; the user's own active stack stays what it is.

    Returns:
        The stack's id.

    Raises:
        ConfigError: the stack's file is not as it should be.
        StackError: there is no such stack, or it cannot be used.
    """
    # ZenML otherwise takes the folder of whatever program runs: pytest's, or none at all in a notebook
    source_utils.set_custom_source_root(str(FOLDER.parent))
    stack = apply(path_of(name))
    os.environ[ENV_ZENML_ACTIVE_STACK_ID] = str(stack)
    return stack


_PLACEHOLDER: Final = re.compile(r"\$\{([^}]*)\}")


def _filled(path: Path, file: StackFile) -> StackFile:
    """The file with the values of the site, which is read only if one is asked for."""
    values: dict[str, str] = {}

    def value(match: re.Match[str]) -> str:
        if not values:
            values.update(asdict(site.load()))
        if (key := match[1]) not in values:
            raise StackError(f"{path}: ${{{key}}} is no key of a site; known: {', '.join(values)}")
        return values[key]

    def fill(content: Any) -> Any:
        if isinstance(content, str):
            return _PLACEHOLDER.sub(value, content)
        if isinstance(content, dict):
            return {key: fill(below) for key, below in content.items()}
        return [fill(below) for below in content] if isinstance(content, list) else content

    components = {
        kind: [component.model_copy(update={"configuration": fill(component.configuration)}) for component in listed]
        for kind, listed in file.components.items()
    }
    return file.model_copy(update={"components": components})


def _component(client: Client, path: Path, wanted: Component) -> UUID:
    kind = StackComponentType(wanted.type)
    _check_settings(client, path, wanted)
    try:
        present = client.get_stack_component(kind, wanted.name, allow_name_prefix_match=False)
    except KeyError:
        return client.create_stack_component(
            name=wanted.name, flavor=wanted.flavor, component_type=kind, configuration=wanted.configuration
        ).id
    if present.flavor_name != wanted.flavor:
        raise StackError(
            f"{path}: {kind} {wanted.name} exists with flavor {present.flavor_name}, not {wanted.flavor}; "
            f"delete it first: zenml {kind.value.replace('_', '-')} delete {wanted.name}"
        )
    if present.configuration != wanted.configuration:
        forgotten = dict.fromkeys(present.configuration)
        client.update_stack_component(present.id, kind, configuration=forgotten | wanted.configuration)
    return present.id


def _check_settings(client: Client, path: Path, wanted: Component) -> None:
    """ZenML itself accepts settings that do not exist, in silence."""
    where = f"{path}: {wanted.type} {wanted.name}"
    try:
        flavor = Flavor.from_model(client.get_flavor_by_name_and_type(wanted.flavor, StackComponentType(wanted.type)))
    except KeyError:
        raise StackError(f"{where}: flavor {wanted.flavor} is unknown to ZenML") from None
    settings = flavor.config_class.model_fields
    for key in wanted.configuration:
        if key not in settings:
            near = difflib.get_close_matches(key, settings, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(settings))}"
            raise StackError(f"{where}: flavor {wanted.flavor} has no setting {key}; {hint}")
    try:
        flavor.config_class.model_validate(wanted.configuration)
    except ValidationError as error:
        told = (f"{'.'.join(map(str, details['loc']))} {details['msg']}".strip() for details in error.errors())
        raise StackError(f"{where}: {'; '.join(told)}") from None
