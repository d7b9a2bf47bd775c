"""The site: the cluster, registry and addresses that the stack `cluster` is for. One file says all of it.

`stacks/site.yaml` (documented in `stacks/site.example.yaml`), or the file that FLOWSENTRY_SITE names; each key can be
given, or given otherwise, by FLOWSENTRY_SITE_<KEY>, so that a file is not needed at all. No secret belongs there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import Field, ValidationError

from flowsentry import config
from flowsentry.config import Section
from flowsentry.errors import ConfigError

ROOT: Final = Path(__file__).resolve().parent.parent
FILE: Final = ROOT / "stacks" / "site.yaml"
VARIABLE: Final = "FLOWSENTRY_SITE"
"""Names another file; with `_<KEY>` behind it, one key."""

BUILD_CONTEXT: Final = ".dockerignore"
"""Lists, each behind a `!`, what the images are made from. Pipelines' code is not among it: pods fetch that."""

_NAME: Final = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
_URL: Final = r"^https?://[^\s/]+(/[^\s]*)?$"


class _Given(Section):
    """What a file or the environment says; the file's keys are these."""

    context: str | None = Field(default=None, min_length=1)
    namespace: str = Field(default="flowsentry", pattern=_NAME, max_length=63)
    host: str | None = Field(default=None, pattern=r"^[^\s/:]+$|^\[[0-9a-fA-F:]+\]$")
    registry: str | None = Field(default=None, pattern=r"^[^\s/@]+(/[^\s/@]+)*$")
    tag: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")
    zenml_url: str | None = Field(default=None, pattern=_URL)
    s3_url: str | None = Field(default=None, pattern=_URL)
    mlflow_url: str | None = Field(default=None, pattern=_URL)
    serving_url: str | None = Field(default=None, pattern=_URL)


@dataclass(frozen=True)
class Site:
    """Where the stack `cluster` is. Addresses are the same inside pods and outside."""

    context: str
    """Context of the kubeconfig."""
    namespace: str
    host: str
    """Address or name at which node ports answer, for pods and for this machine."""
    registry: str
    tag: str
    """Of both images."""
    zenml_url: str
    s3_url: str
    mlflow_url: str
    serving_url: str
    """Of the champion."""

    @property
    def pipeline_image(self) -> str:
        """What steps run in."""
        return f"{self.registry}/flowsentry-pipeline:{self.tag}"

    @property
    def serving_image(self) -> str:
        """What champions are served by."""
        return f"{self.registry}/flowsentry-serving:{self.tag}"


def load(environment: Mapping[str, str] = os.environ) -> Site:
    """Read the site's file and what the environment says otherwise.

    Raises:
        ConfigError: the file or a variable says something impossible, or a key is missing.
    """
    named = environment.get(VARIABLE)
    path = Path(named) if named else FILE
    given = config.load(path, _Given).model_dump(exclude_unset=True) if named or path.exists() else {}
    said = {
        name.removeprefix(f"{VARIABLE}_").lower(): value
        for name, value in environment.items()
        if name.startswith(f"{VARIABLE}_")
    }
    try:
        site = _Given.model_validate(given | said)
    except ValidationError as error:  # the file alone was right
        first = error.errors(include_url=False, include_input=False)[0]
        key = str(first["loc"][0])
        why = f"is no key of a site; known: {', '.join(_Given.model_fields)}"
        raise ConfigError(
            f"{VARIABLE}_{key.upper()}: {why if first['type'] == 'extra_forbidden' else first['msg']}"
        ) from None
    for key in ("context", "host", "registry"):
        if not getattr(site, key):
            raise ConfigError(
                f"the cluster stack needs to know {key}: write it into {path} "
                f"(stacks/site.example.yaml explains each key), or set {VARIABLE}_{key.upper()}"
            )
    address = f"http://{site.host}"
    return Site(
        context=site.context or "",
        namespace=site.namespace,
        host=site.host or "",
        registry=site.registry or "",
        tag=site.tag or image_tag(),
        zenml_url=site.zenml_url or f"{address}:30080",
        s3_url=site.s3_url or f"{address}:30070",
        mlflow_url=site.mlflow_url or f"{address}:30050",
        serving_url=site.serving_url or f"{address}:30033",
    )


def image_inputs() -> list[str]:
    """What the images are made from: all that is sent to the builder, and the list of it.

    Raises:
        ConfigError: the list cannot be read.
    """
    try:
        lines = (ROOT / BUILD_CONTEXT).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{BUILD_CONTEXT}: cannot be read ({type(error).__name__}); it says what images hold"
        ) from None
    return [BUILD_CONTEXT, *sorted(line[1:] for line in lines if line.startswith("!"))]


def image_tag() -> str:
    """First 12 digits of the SHA-256 of what the images are made from: equal inputs are built once.

    Raises:
        ConfigError: one of the files is missing.
    """
    digest = hashlib.sha256()
    for name in image_inputs():
        try:
            digest.update(f"{name}\0".encode() + hashlib.sha256((ROOT / name).read_bytes()).digest())
        except OSError as error:
            raise ConfigError(f"{name}: cannot be read: {error.strerror}; the images are made from it") from None
    return digest.hexdigest()[:12]
