"""What is in production: the deployer's record, and ZenML's model stages that are kept equal to it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from zenml.client import Client
from zenml.enums import ModelStages
from zenml.models import ArtifactVersionResponse, ModelVersionResponse

from flowsentry.errors import ConfigError, StoreError
from flowsentry.serving.deployer import Deployed, Deployer, Record
from flowsentry.serving.kubernetes import KubernetesDeployer
from flowsentry.serving.local import LocalDeployer
from flowsentry.serving.manifests import Shape
from steps.register import MODEL


def deployer() -> Deployer:
    """Where champions are served: on this machine, or in the cluster that the stack has put into the environment.

    Raises:
        ConfigError: FLOWSENTRY_DEPLOYER names neither.
    """
    kind = os.environ.get("FLOWSENTRY_DEPLOYER", "local")
    if kind == "local":
        return LocalDeployer()
    if kind != "kubernetes":
        raise ConfigError(f"FLOWSENTRY_DEPLOYER should be local or kubernetes, not {kind!r}")
    return KubernetesDeployer(
        os.environ["FLOWSENTRY_NAMESPACE"],
        Shape(
            image=os.environ["FLOWSENTRY_SERVING_IMAGE"],
            bucket_url=os.environ["FLOWSENTRY_BUCKET_URL"],
            s3_url=os.environ["FLOWSENTRY_S3_URL"],
        ),
        champion_url=os.environ["FLOWSENTRY_SERVING_URL"],
        context=os.environ.get("FLOWSENTRY_CONTEXT"),
        on_progress=print,
    )


def version(deployed: Deployed) -> ModelVersionResponse | None:
    """The version of the model that a deployed bundle was built from, None if ZenML's store does not know it.

    The number alone would not do: every store counts from 1. Step build notes the digest with the version.
    """
    found = _numbered(deployed.model_version)
    return found if found and found.run_metadata.get("bundle_digest") == deployed.digest else None


def in_production() -> str | None:
    """Number of the version at stage production."""
    found = staged()
    return str(found.name) if found else None


def staged() -> ModelVersionResponse | None:
    """The version at stage production."""
    return _numbered(ModelStages.PRODUCTION)


def _numbered(name: str | ModelStages) -> ModelVersionResponse | None:
    try:
        return Client().get_model_version(MODEL, name)
    except KeyError:
        return None


@dataclass(frozen=True)
class Judge:
    """A stored detector that is to judge flows."""

    model_version: str
    detector: ArtifactVersionResponse
    why: str
    """Why this one, for people."""


def judge(name: str | None, record: Record) -> Judge:
    """The version of the model with this number; without one the champion, or else the one at stage production.

    Args:
        name: number of a version.
        record: what is deployed.

    Raises:
        ConfigError: there is no such version, or this ZenML store does not know the champion.
        StoreError: it has no detector.
    """
    known = ", ".join(_versions())
    other = f", or name one of {known} with --model-version" if known else ""
    if name:
        found, why = _numbered(name), "as asked"
        problem = f"model version {name} is unknown; run python run.py --pipeline train{other}"
    elif record.champion:
        found, why = version(record.champion), "the champion"
        problem = f"{_stranger(record.champion)}: use the ZenML store that it was trained in{other}"
    else:
        found, why = staged(), "at stage production, as nothing is deployed"
        problem = f"no model version is in production; run python run.py --pipeline train{other}"
    if found is None:
        raise ConfigError(problem)
    detector = found.get_artifact("detector")
    if detector is None:
        raise StoreError(f"model version {found.name} has no detector; train it again")
    return Judge(str(found.name), detector, why)


def _versions() -> list[str]:
    """Numbers of the last versions of the model, the newest first."""
    try:
        return [str(v.name) for v in Client().list_model_versions(model=MODEL, size=10, sort_by="desc:number").items]
    except KeyError:
        return []


def _stranger(deployed: Deployed) -> str:
    return (
        f"version {deployed.model_version} is in production, "
        f"but this ZenML store does not know its bundle {deployed.digest[:12]}"
    )


def keep_equal(record: Record) -> None:
    """Give the champion the stage production; ZenML archives the version that had it."""
    champion = record.champion and version(record.champion)
    if champion and champion.stage != ModelStages.PRODUCTION:
        champion.set_stage(ModelStages.PRODUCTION, force=True)


def difference(record: Record) -> str | None:
    """What ZenML says otherwise than the deployer and what to do, in one line; None if they agree."""
    stage = staged()
    if record.champion is None:
        if stage is None:
            return None
        return (
            f"nothing is in production, but ZenML has version {stage.name} at stage production: "
            "python run.py --pipeline train deploys again"
        )
    champion = version(record.champion)
    if champion is None:
        return (
            f"{_stranger(record.champion)}: use the ZenML store that it was trained in, put the previous version back "
            "with python run.py --rollback, or train anew with quality_gate.without_champion: true"
        )
    if stage is not None and stage.id == champion.id:
        return None
    said = f"version {stage.name}" if stage else "no version"
    return (
        f"version {champion.name} is in production, but ZenML has {said} at stage production: "
        "python run.py --pipeline train again, or --rollback, makes them equal"
    )
