"""What is in production: the deployer's record, and ZenML's model stages that are kept equal to it."""

from __future__ import annotations

from zenml.client import Client
from zenml.enums import ModelStages
from zenml.models import ArtifactVersionResponse, ModelVersionResponse

from flowsentry.errors import ConfigError, StoreError
from flowsentry.serving.deployer import Deployer, Record
from flowsentry.serving.local import LocalDeployer
from steps.register import MODEL


def deployer() -> Deployer:
    """Where champions are served."""
    return LocalDeployer()


def version(name: str) -> ModelVersionResponse | None:
    """A version of the model by its number; None if ZenML's store has none."""
    try:
        return Client().get_model_version(MODEL, name)
    except KeyError:
        return None


def in_production() -> str | None:
    """Number of the version at stage production."""
    try:
        return str(Client().get_model_version(MODEL, ModelStages.PRODUCTION).name)
    except KeyError:
        return None


def stored_detector(name: str | None) -> tuple[str, ArtifactVersionResponse]:
    """Number of a version of the model, by default the one in production, and its detector's artifact.

    Raises:
        ConfigError: there is no such version.
        StoreError: it has no detector.
    """
    asked = name or in_production()
    found = version(asked) if asked else None
    if found is None:
        what = f"model version {asked} is unknown" if asked else "no model version is in production"
        known = ", ".join(_versions())
        other = f", or name one of {known} with --model-version" if known else ""
        raise ConfigError(f"{what}; run python run.py --pipeline train{other}")
    detector = found.get_artifact("detector")
    if detector is None:
        raise StoreError(f"model version {found.name} has no detector; train it again")
    return str(found.name), detector


def _versions() -> list[str]:
    """Numbers of the last versions of the model, the newest first."""
    try:
        return [str(v.name) for v in Client().list_model_versions(model=MODEL, size=10, sort_by="desc:number").items]
    except KeyError:
        return []


def keep_equal(record: Record) -> None:
    """Give the champion the stage production; ZenML archives the version that had it."""
    champion = record.champion and version(record.champion.model_version)
    if champion and champion.stage != ModelStages.PRODUCTION:
        champion.set_stage(ModelStages.PRODUCTION, force=True)


def difference(record: Record) -> str | None:
    """What ZenML says otherwise than the deployer, in one line; None if they agree."""
    serving = record.champion.model_version if record.champion else None
    stage = in_production()
    if serving == stage:
        return None
    if serving is not None and version(serving) is None:
        return f"version {serving} is in production, but this ZenML store does not know it"
    said = f"version {stage} at stage production" if stage else "no version at stage production"
    return f"{f'version {serving}' if serving else 'nothing'} is in production, but ZenML has {said}"
