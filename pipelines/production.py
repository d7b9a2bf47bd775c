"""What is in production, beside ZenML's account of it, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

from flowsentry.serving.deployer import Deployed
from steps.stages import deployer, difference, in_production, keep_equal


@dataclass(frozen=True)
class Production:
    """What is in production."""

    text: str
    difference: str | None
    """What ZenML's stages say otherwise, in one line; None if they agree."""


def status() -> Production:
    """The deployer's record and ZenML's stage, side by side."""
    where = deployer()
    record = where.record()
    address = where.endpoint().url if record.champion else "nothing is deployed: python run.py --pipeline train"
    lines = [
        f"Champion:   {_told(record.champion)}",
        f"Previous:   {_told(record.previous)}",
        f"Challenger: {_told(record.challenger)}",
        f"ZenML:      {f'version {stage}' if (stage := in_production()) else 'no version'} at stage production",
        f"Address:    {address}",
    ]
    return Production("\n".join(lines), difference(record))


def rollback() -> Production:
    """Put the champion before this one back into production.

    Raises:
        DeployError: there is none, or it did not start.
    """
    keep_equal(deployer().rollback())
    return status()


def _told(deployed: Deployed | None) -> str:
    return f"version {deployed.model_version}, bundle {deployed.digest[:12]}" if deployed else "none"
