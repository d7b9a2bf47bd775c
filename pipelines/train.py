"""The pipeline `train`: from files to a selected detector."""

from __future__ import annotations

from zenml import pipeline
from zenml.config.cache_policy import CachePolicy
from zenml.enums import ExecutionMode

from flowsentry.config import QualityGateSettings, SelectSettings, ServiceGateSettings, SplitSettings, TrainConfig
from flowsentry.learning.candidates import Recipe
from flowsentry.simulation import SimulationSettings
from pipelines.submit import Place, submit
from pipelines.summary import RunSummary
from steps.build import build
from steps.check_protocol import check_protocol
from steps.code_digest import code_digest
from steps.deploy import deploy
from steps.engineer import engineer
from steps.evaluate import evaluate
from steps.load import load
from steps.quality_gate import quality_gate
from steps.register import register
from steps.select import select
from steps.train_sweep import train_sweep
from steps.uploads import shared
from steps.validate import validate


@pipeline(name="train", execution_mode=ExecutionMode.FAIL_FAST, cache_policy=CachePolicy(cache_func=code_digest))
def train(
    data: list[str],
    digests: dict[str, str],
    simulation: SimulationSettings,
    max_quarantine_share: float,
    view: str,
    splitting: SplitSettings,
    families: list[str],
    recipe: Recipe,
    selecting: SelectSettings,
    deploying: bool,
    quality: QualityGateSettings,
    service: ServiceGateSettings,
) -> None:
    """Load → validate → engineer → train_sweep (one step for each family) → evaluate → select → register →
    quality_gate → build → deploy.

    Step check_protocol runs before any train_sweep: nothing is trained if the deciding protocol is impossible.
    """
    reports, unreadable_rows, files = load(data, digests, simulation)
    valid_reports, _, rules, rows, _ = validate(reports, unreadable_rows, max_quarantine_share)
    flows, features, splits, _ = engineer(valid_reports, files, rules, view, splitting)
    check_protocol(flows, splits, selecting.protocol, id="check_protocol")
    candidates = [
        train_sweep(features, flows, splits, family, recipe, id=f"train_sweep_{family}", after="check_protocol")
        for family in families
    ]
    evaluation, _ = evaluate(candidates, features, flows, splits, recipe, rows)
    selection, detector, exposure, _ = select(evaluation, candidates, flows, splits, recipe, selecting)
    version = register(detector, exposure, selection)
    if deploying:
        decision = quality_gate(detector, version, valid_reports, flows, features, splits, recipe, quality)
        bundle = build(detector, version, after="quality_gate")
        deploy(bundle, detector, version, decision, valid_reports, flows, splits, service)


def run(config: TrainConfig, *, cache: bool, place: Place | None = None) -> RunSummary | None:
    """Run the pipeline on the active stack and write its pages to the folder of reports; see `submit`."""
    data, digests = shared(config)
    parameters = {
        "data": data,
        "digests": digests,
        "simulation": config.simulation,
        "max_quarantine_share": config.validation.max_quarantine_share,
        "view": config.view,
        "splitting": config.splits,
        "families": list(config.families),
        "recipe": Recipe(
            labels=config.labels,
            metric=config.search.metric,
            inner_folds=config.search.folds,
            target_fpr=config.limit.target_fpr,
            needs_effect=config.limit.minimum_effect,
            seed=config.splits.seed,
        ),
        "selecting": config.select,
        "deploying": config.deploy,
        "quality": config.quality_gate,
        "service": config.service_gate,
    }
    return submit(train, config, parameters, cache=cache, place=place)
