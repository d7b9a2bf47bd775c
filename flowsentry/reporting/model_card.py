"""The model card: what a selected detector was made from, what it can do, and what it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pydantic import JsonValue

from flowsentry.features.views import ViewManifest
from flowsentry.learning.selection import Selection, measure
from flowsentry.reporting.pages import render
from flowsentry.reporting.results import Entry, Evaluation, FoldScores, Labels, ProtocolScores, Spread
from flowsentry.reporting.tables import percent

FORMAT: Final = 1
WEAK_RECALL: Final = 0.9
"""A family with a lower mean recall when held out is named among the known limits."""
FLOWS_PER_DAY: Final = 100_000
_UNTESTED: Final = (
    "Kinds of attack that are not in these recordings are untested; so are other clusters and other meters."
)
_EFFECTS: Final = (
    "The minimum effects were set by hand, on the recording of February 2022 and on simulated flows of seeds 0 to 2."
)


def model_card(
    *,
    evaluation: Evaluation,
    selection: Selection,
    manifest: ViewManifest,
    parameters: Mapping[str, JsonValue],
    rows: Mapping[str, int],
    target_fpr: float,
    validation: Mapping[Labels, FoldScores],
) -> dict[str, JsonValue]:
    """The card of the chosen candidate as JSON values; rates are fractions, undefined ones None.

    Args:
        evaluation: of all candidates and baselines.
        selection: names the chosen one.
        manifest: of the view it was trained on.
        parameters: of the chosen family.
        rows: flows by part of the split that the shipped fit was made from.
        target_fpr: that the limit was set for on calibration flows.
        validation: the shipped fit's scores on the untouched validation part.

    Raises:
        ValueError: nothing was selected.
    """
    if selection.chosen is None:
        raise ValueError(f"there is no model to describe: {selection.reason}")
    entry = evaluation.entry(selection.chosen)
    return {
        "format": FORMAT,
        "model": {"family": entry.name, "title": entry.title, "parameters": dict(parameters)},
        "view": {
            "name": manifest.name,
            "version": manifest.version,
            "digest": manifest.digest,
            "uses_identity": entry.uses_identity,
            "warm_up_seconds": manifest.warm_up_seconds,
            "features": list(manifest.names),
        },
        "data": {
            "evaluated": dict(evaluation.data),
            "lineage": dict(manifest.lineage),
            "rows": dict(rows),
            "corrected_labels": evaluation.corrections,
        },
        "limit": {"surprise": evaluation.limit, "target_fpr": target_fpr},
        "selection": {
            "protocol": selection.protocol,
            "metric": selection.metric,
            "labels": selection.labels,
            "reason": selection.reason,
        },
        "protocols": {
            protocol: {labels: _protocol(scores) for labels, scores in by_labels.items()}
            for protocol, by_labels in entry.scores.items()
        },
        "validation": {labels: _validation(scores) for labels, scores in validation.items()},
        "baselines": _baselines(evaluation, entry, selection),
        "limits": list(_limits(evaluation, entry, manifest)),
    }


def model_card_html(card: Mapping[str, JsonValue]) -> str:
    """The card as a self-contained page."""
    return render("model_card.html.j2", card=card)


def _protocol(scores: ProtocolScores) -> dict[str, JsonValue]:
    rates: dict[str, JsonValue] = {}
    for prefix, mean, worst in (
        ("own_", scores.own_mean.model_dump(), scores.own_worst.model_dump()),
        ("", scores.mean.model_dump(), scores.worst.model_dump()),
    ):
        rates |= {f"{prefix}{name}": {"mean": mean[name], "worst": worst[name]} for name in mean}
    return {
        "folds": len(scores.folds),
        "benign": scores.benign,
        "malicious": scores.malicious,
        "rates": rates,
        "family_recall": _spread(scores.family_recall),
        "families": {name: _spread(spread) for name, spread in scores.families.items()},
        "places": {name: _spread(spread) for name, spread in scores.places.items()},
    }


def _spread(spread: Spread) -> dict[str, JsonValue]:
    return {"flows": spread.flows, "mean": spread.mean, "worst": spread.worst}


def _validation(scores: FoldScores) -> dict[str, JsonValue]:
    return {
        "counts": dict(scores.counts.model_dump()),
        "rates": scores.at_limit.model_dump()
        | {f"own_{name}": value for name, value in scores.own.model_dump().items()},
        "families": {name: dict(share.model_dump()) for name, share in scores.families.items()},
        "places": {name: dict(share.model_dump()) for name, share in scores.places.items()},
    }


def _baselines(evaluation: Evaluation, entry: Entry, selection: Selection) -> list[JsonValue]:
    protocol, metric, labels = selection.protocol, selection.metric, selection.labels
    mine, _ = measure(entry.scores[protocol][labels], protocol=protocol, metric=metric)
    excluded = {ranked.name: ranked.excluded for ranked in selection.ranking}
    result: list[JsonValue] = []
    for baseline in evaluation.baselines:
        scores = baseline.scores[protocol][labels]
        value, _ = measure(scores, protocol=protocol, metric=metric)
        beaten = mine is not None and (value is None or mine > value)
        result.append(
            {
                "name": baseline.name,
                "title": baseline.title,
                "uses_identity": baseline.uses_identity,
                "value": value,
                "fpr": scores.mean.fpr,
                "beaten": beaten,
                "excluded": excluded.get(baseline.name),
            }
        )
    return result


def _limits(evaluation: Evaluation, entry: Entry, manifest: ViewManifest) -> list[str]:
    """What a user must know, from the measurements themselves."""
    lines = []
    if entry.uses_identity:
        lines.append(
            "The view holds identities (addresses, ports, flow ids, timestamps): the model knows the attacks of its "
            "training data by who and when, and attacks from elsewhere hardly at all."
        )
    protocol = evaluation.family_protocol
    if protocol is not None:
        scores = entry.scores[protocol]["corrected"]
        how = "when never trained on" if protocol == "family" else f"under the protocol {protocol}"
        for name, spread in scores.families.items():
            if spread.mean is not None and spread.mean < WEAK_RECALL:
                lines.append(
                    f"Misses much of {name} {how}: recall {percent(spread.mean)} %, "
                    f"worst {percent(spread.worst)} % ({spread.flows:,} flows)."
                )
        for name, spread in scores.places.items():
            if spread.mean and scores.mean.fpr is not None and spread.mean > 2 * scores.mean.fpr:
                lines.append(
                    f"False alarms are more frequent in the place “{name}”: {percent(spread.mean)} % of its benign "
                    f"flows, {percent(scores.mean.fpr)} % over all places."
                )
        if scores.mean.fpr is not None and scores.worst.fpr is not None:
            lines.append(
                f"Of {FLOWS_PER_DAY:,} benign flows a day about {round(FLOWS_PER_DAY * scores.mean.fpr):,} would be "
                f"flagged, in the worst fold {round(FLOWS_PER_DAY * scores.worst.fpr):,}, before grouping into alerts."
            )
    lines += [f"Not tested under the protocol {name}: {why}." for name, why in evaluation.impossible.items()]
    if manifest.warm_up_seconds:
        lines.append(
            f"The first {manifest.warm_up_seconds:,} s of a stream teach the baseline; verdicts in them are not to be "
            "relied on, and an attack that runs from the start is learned as normal."
        )
    if evaluation.corrections:
        lines.append(
            f"{evaluation.corrections:,} published labels count as wrong by a versioned rule; scores on published "
            "labels punish a detector for being right about them."
        )
    if any(feature.minimum_effect is not None for feature in manifest.features):
        lines.append(_EFFECTS)
    lines.append(_UNTESTED)
    return lines
