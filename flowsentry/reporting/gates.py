"""The page of both gates: whether a challenger may take over, and every rule that was applied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowsentry.reporting.pages import render

if TYPE_CHECKING:
    from flowsentry.learning.quality_gate import QualityDecision
    from flowsentry.serving.service_gate import ServiceDecision


def gates_html(quality: QualityDecision | None, service: ServiceDecision | None) -> str:
    """One self-contained page.

    Args:
        quality: decision of the quality gate; None: it was not reached.
        service: decision of the service gate; None: it was not reached.
    """
    decisions = [decision for decision in (quality, service) if decision is not None]
    return render(
        "gates.html.j2",
        quality=quality,
        service=service,
        version=_version(quality, service),
        passed=len(decisions) == 2 and all(decision.passed for decision in decisions),
        refused=next((decision.reason for decision in decisions if not decision.passed), None),
    )


def _version(quality: QualityDecision | None, service: ServiceDecision | None) -> str:
    if service is not None:
        return service.model_version
    return "?" if quality is None else quality.challenger.version
