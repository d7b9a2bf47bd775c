"""What is in production, beside ZenML's account of it, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

from flowsentry.serving.commands import describe
from flowsentry.serving.deployer import Status
from steps.stages import deployer, difference, in_production, keep_equal


@dataclass(frozen=True)
class Production:
    """What is in production."""

    text: str
    difference: str | None
    """What ZenML's stages say otherwise, in one line; None if they agree."""


def status() -> Production:
    """The deployer's record and what runs, beside ZenML's stage; nothing is started to find out.

    Raises:
        DeployError: the record is damaged.
    """
    return _told(deployer().status())


def rollback() -> Production:
    """Put the champion before this one back into production.

    Raises:
        DeployError: there is none, or it did not start.
    """
    where = deployer()
    keep_equal(where.rollback())
    return _told(where.status())


def _told(told: Status) -> Production:
    stage = in_production()
    zenml = f"version {stage}" if stage else "no version"
    return Production(f"{describe(told)}\n{'ZenML':12}{zenml} at stage production", difference(told.record))
