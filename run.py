"""Run a pipeline of FlowSentry."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from pydantic import ValidationError

from flowsentry import telemetry
from flowsentry.config import InferenceConfig, PipelineConfig, ReplayConfig, TrainConfig, load
from flowsentry.errors import ConfigError, FlowSentryError, StackError
from flowsentry.flows import sources

if TYPE_CHECKING:
    from pipelines.summary import RunSummary
    from stacks.place import ClusterPlace

ROOT: Final = Path(__file__).resolve().parent
CRON: Final = re.compile(r"[0-9A-Za-z*/,?-]+( +[0-9A-Za-z*/,?-]+){4}")
"""The form of a cron expression; Kubernetes checks the values."""


@dataclass(frozen=True)
class Pipeline:
    """What can be run, and what it is run with when nothing else is said."""

    summary: str
    module: str
    config: Path
    model: type[PipelineConfig]


PIPELINES: Final[dict[str, Pipeline]] = {
    "train": Pipeline(
        summary="from flows to a champion: load, validate, engineer, train, evaluate, select, deploy",
        module="pipelines.train",
        config=ROOT / "configs" / "train.yaml",
        model=TrainConfig,
    ),
    "inference": Pipeline(
        summary="from flows to verdicts of the champion, or of --model-version: load, validate, detect",
        module="pipelines.inference",
        config=ROOT / "configs" / "inference.yaml",
        model=InferenceConfig,
    ),
    "replay": Pipeline(
        summary="labelled flows sent to the champion's address, and how right its answers were",
        module="pipelines.replay",
        config=ROOT / "configs" / "replay.yaml",
        model=ReplayConfig,
    ),
}

EPILOG: Final = f"""\
pipelines:
{chr(10).join(f"  {name:<12}{pipeline.summary}" for name, pipeline in PIPELINES.items())}

examples:
  python run.py --pipeline train
  python run.py --pipeline train --config configs/paper.yaml --data flows.csv.gz
  python run.py --pipeline train --data recordings/ 'more/*.parquet'
  python run.py --pipeline inference --data flows.csv --model-version 3
  python run.py --pipeline train --stack cluster
  python run.py --pipeline inference --stack cluster --schedule '*/30 * * * *'
  python run.py --status

Exit status: 0 if the run did what was asked, 1 if it failed, 2 if the command line or the config is wrong.
FLOWSENTRY_TELEMETRY=on lets the libraries send usage reports; without it nothing is sent."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see python run.py --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python run.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pipeline", metavar="NAME", help="run a pipeline, see below")
    what.add_argument("--status", action="store_true", help="say what is in production and whether ZenML agrees")
    what.add_argument("--schedules", action="store_true", help="list the pipelines that run by themselves, and when")
    what.add_argument("--rollback", action="store_true", help="put the champion before this one back into production")
    parser.add_argument("--stack", metavar="NAME", default="local", help="where it runs: a file in stacks/ (local)")
    parser.add_argument("--config", metavar="FILE", type=Path, help="its settings (configs/<pipeline>.yaml)")
    parser.add_argument(
        "--data", metavar="FLOWS", nargs="+", help="files, folders, globs, or simulate; instead of the config's data"
    )
    parser.add_argument(
        "--model-version", metavar="NUMBER", help="with inference: this version of the model instead of the champion"
    )
    parser.add_argument(
        "--schedule",
        metavar="CRON",
        help="with --stack cluster: when to run it by itself, such as '*/30 * * * *'; or off",
    )
    parser.add_argument("--no-cache", action="store_true", help="run every step, also those with nothing new to do")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; gives the exit status."""
    telemetry.disable()  # before ZenML and MLflow are imported, which is done below
    try:
        asked = _parser().parse_args(arguments)
        _check(asked)
        if asked.status or asked.rollback:
            return _production(asked)
        if asked.schedules or asked.schedule == "off":
            return _schedules(asked)
        pipeline = _pipeline(asked.pipeline)
        config = load(asked.config or pipeline.config, pipeline.model)
        if asked.data:
            config = _with_data(config, asked.data)
        _check_writable(Path(config.reports))
        if not config.simulated:
            sources.check(config.data)
        summary = _run(pipeline, config, asked)
    except FlowSentryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt as error:
        print(f"error: interrupted{f'; {error}' if str(error) else ''}", file=sys.stderr)
        return 130
    if summary is None:
        print(f"{asked.pipeline} runs by itself: {asked.schedule}; python run.py --stack cluster --schedules lists all")
        return 0
    print(f"\n{summary.text}")
    if summary.failure:
        print(f"error: {summary.failure}", file=sys.stderr)
    return 1 if summary.failure else 0


def _check(asked: argparse.Namespace) -> None:
    """Options that would otherwise be ignored in silence."""
    if asked.model_version and asked.pipeline != "inference":
        raise ConfigError("--model-version goes with --pipeline inference only; see python run.py --help")
    if asked.pipeline is None:
        given = [name for name in ("config", "data", "schedule", "no_cache") if getattr(asked, name)]
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise ConfigError(f"{option} goes with --pipeline only; see python run.py --help")

    if (asked.schedule or asked.schedules) and asked.stack != "cluster":
        raise ConfigError(
            "schedules are CronJobs: add --stack cluster; on this machine cron does it, "
            f"for example: {asked.schedule or '*/30 * * * *'} cd {ROOT} && {sys.executable} run.py --pipeline inference"
        )
    if asked.schedule and asked.schedule != "off" and not CRON.fullmatch(asked.schedule):
        raise ConfigError(f"--schedule should have five fields, such as '*/30 * * * *', not {asked.schedule!r}")
    if asked.schedule and asked.schedule != "off" and asked.pipeline == "train":
        raise ConfigError("--schedule is for pipelines that watch, not for train; see python run.py --help")


def _pipeline(name: str) -> Pipeline:
    if name in PIPELINES:
        return PIPELINES[name]
    near = difflib.get_close_matches(name, PIPELINES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"pipeline {name} is unknown; {hint}Known: {', '.join(PIPELINES)}")


def _with_data(config: PipelineConfig, data: list[str]) -> PipelineConfig:
    try:
        return type(config).model_validate(config.model_dump() | {"data": data})
    except ValidationError as error:
        raise ConfigError(f"--data {error.errors()[0]['ctx']['error']}") from None


def _check_writable(folder: Path) -> None:
    """Before minutes of work, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{folder}: reports cannot be written there: {error.strerror}") from None
    except ValueError as error:  # a NUL within the name
        raise ConfigError(f"{str(folder)!r}: reports cannot be written there: {error}") from None


def _activate(stack: str, *, runs: bool = True) -> ClusterPlace | None:
    """Put a stack to use; gives the place where its pipelines run if that is not this process.

    Args:
        stack: its name.
        runs: whether pipelines are about to run, which asks more of a cluster.
    """
    if not sys.stdout.isatty():
        os.environ.setdefault("ZENML_LOGGING_COLORS_DISABLED", "true")
    ready = None
    if stack == "cluster":
        from stacks import preflight

        ready = preflight.pass_or_raise() if runs else preflight.log_in()  # has to come before ZenML is imported
    try:
        from stacks import apply, console  # imports ZenML: seconds, and log output that has to be tamed first

        console.quiet()
        apply.activate(stack)
    except OSError as error:
        raise StackError(f"ZenML cannot use its folder {error.filename or ''}: {error.strerror}") from None
    if ready is None:
        return None
    from stacks.place import ClusterPlace

    return ClusterPlace(*ready)


def _run(pipeline: Pipeline, config: PipelineConfig, asked: argparse.Namespace) -> RunSummary | None:
    place = _activate(asked.stack)
    if asked.schedule and place:
        from stacks import schedules

        place = schedules.place(place, asked.pipeline, asked.schedule)
    options = {"model_version": asked.model_version} if asked.pipeline == "inference" else {}
    module = importlib.import_module(pipeline.module)
    summary: RunSummary | None = module.run(config, cache=not asked.no_cache, place=place, **options)
    return summary


def _schedules(asked: argparse.Namespace) -> int:
    if asked.pipeline:
        _pipeline(asked.pipeline)
    place = _activate(asked.stack, runs=False)
    from stacks import schedules

    if asked.pipeline and place:
        removed = schedules.remove(place, asked.pipeline)
        print(f"{asked.pipeline} {'is off its schedule' if removed else 'was on no schedule'}")
    else:
        print(schedules.told())
    return 0


def _production(asked: argparse.Namespace) -> int:
    _activate(asked.stack, runs=False)
    from pipelines import production

    state = production.rollback() if asked.rollback else production.status()
    print(state.text)
    if state.difference:
        print(f"error: {state.difference}", file=sys.stderr)
    return 1 if state.difference else 0


if __name__ == "__main__":
    sys.exit(main())
