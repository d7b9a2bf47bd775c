"""Watch a run in the cluster until it ends: what each step does, and why it failed.

ZenML's own waiting shows the log of its orchestrator only, ends normally whatever becomes of the run, and leaves a run
whose pod cannot start at `provisioning` for ever.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

import requests
from kubernetes.client import ApiException, BatchV1Api, CoreV1Api
from urllib3.exceptions import HTTPError
from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.integrations.kubernetes.constants import STEP_NAME_ANNOTATION_KEY
from zenml.models import PipelineRunResponse, StepRunResponse
from zenml.orchestrators.publish_utils import publish_failed_pipeline_run

from flowsentry.errors import StackError
from stacks.cluster import TIMEOUT_SECONDS
from stacks.site import Site

HOPELESS: Final = {"InvalidImageName", "ErrImagePull", "ImagePullBackOff", "CreateContainerConfigError"}
"""Reasons for which a pod waits that do not go away by themselves."""

_INTERVAL_SECONDS: Final = 2.0
_PATIENCE_SECONDS: Final = 180.0
_LOG_LINES: Final = 8
_LOST: Final = (requests.ConnectionError, requests.Timeout, HTTPError)


def follow(started: PipelineRunResponse, site: Site, api: Any) -> None:
    """Wait until a run has ended, and tell of its steps meanwhile.

    Raises:
        StackError: it failed; with each failed step's error and the last lines of its log.
        KeyboardInterrupt: the user does not want to wait; the message says that the run goes on.
    """
    try:
        _told_until_end(started, site, api)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"the run {started.name} goes on in the cluster. Look: {site.zenml_url}/runs/{started.id}, or kubectl "
            f"--context {site.context} -n {site.namespace} get pods -l run_id={started.id}. "
            f"Stop it: python -m stacks.stop {started.id}"
        ) from None


def _told_until_end(started: PipelineRunResponse, site: Site, api: Any) -> None:
    told: dict[str, str] = {}
    answered = time.monotonic()
    while True:
        try:
            run = Client().get_pipeline_run(started.id)
            steps = run.steps
            problem = None if run.status.is_finished else _hopeless(started, site, api)
        except _LOST as error:
            if time.monotonic() - answered > _PATIENCE_SECONDS:
                raise StackError(
                    f"the cluster has not answered for {_PATIENCE_SECONDS:.0f} s ({type(error).__name__}); "
                    f"the run {started.name} may go on: {site.zenml_url}/runs/{started.id}"
                ) from None
            time.sleep(_INTERVAL_SECONDS)
            continue
        answered = time.monotonic()
        _tell(steps, told)
        if run.status.is_finished:
            if run.status != ExecutionStatus.COMPLETED:
                raise StackError("\n".join([f"the run {run.name} is {run.status}", *_why(run, steps, site, api)]))
            return
        if problem:
            publish_failed_pipeline_run(run.id)
            raise StackError(f"the run {run.name} could not go on: {problem}")
        time.sleep(_INTERVAL_SECONDS)


def _tell(steps: dict[str, StepRunResponse], told: dict[str, str]) -> None:
    for name, step in sorted(steps.items(), key=lambda item: str(item[1].start_time)):
        said = str(step.status)
        if step.status == ExecutionStatus.COMPLETED and step.start_time and step.end_time:
            said = f"completed in {(step.end_time - step.start_time).total_seconds():.0f} s"
        elif step.status == ExecutionStatus.RETRYING and _is_ours(step):
            said = "failed"  # ZenML does not know that its pod is not started again
        if told.get(name) != said:
            told[name] = said
            print(f"step {name}: {said}", flush=True)


def _hopeless(run: PipelineRunResponse, site: Site, api: Any) -> str | None:
    """Why nothing will come of the run's orchestrator, if so; its Job is removed then."""
    batch, selector = BatchV1Api(api), f"run_id={run.id}"
    jobs = batch.list_namespaced_job(site.namespace, label_selector=selector, _request_timeout=TIMEOUT_SECONDS).items
    own = [job for job in jobs if STEP_NAME_ANNOTATION_KEY not in (job.metadata.annotations or {})]
    for job in own:
        for condition in job.status.conditions or []:
            if condition.type == "Failed" and condition.status == "True":
                return f"its orchestrator failed: {condition.message}"
        for pod in _pods(site, api, f"job-name={job.metadata.name}"):
            for status in pod.status.container_statuses or []:
                waiting = status.state.waiting
                if waiting and waiting.reason in HOPELESS:
                    batch.delete_namespaced_job(job.metadata.name, site.namespace, propagation_policy="Background")
                    return f"{waiting.reason}: {waiting.message or status.image}; is the image there? (make images)"
    return None


def _pods(site: Site, api: Any, selector: str) -> list[Any]:
    """Newest first."""
    found = CoreV1Api(api).list_namespaced_pod(
        site.namespace, label_selector=selector, _request_timeout=TIMEOUT_SECONDS
    )
    return sorted(found.items, key=lambda pod: pod.metadata.creation_timestamp, reverse=True)


def _why(run: PipelineRunResponse, steps: dict[str, StepRunResponse], site: Site, api: Any) -> Iterator[str]:
    """The failed steps' errors, and where there is no error of ours the last lines of the pod's log."""
    for name, step in steps.items():
        if step.status.is_successful or step.status in (ExecutionStatus.RUNNING, ExecutionStatus.STOPPED):
            continue
        yield f"step {name}: {step.exception_info.message if step.exception_info else 'failed'}"
        if _is_ours(step):  # and says all
            continue
        try:
            pods = _pods(site, api, f"run_id={run.id},step_name={name}")
            yield from (f"  {line}" for line in (_end(site, api, pods[0]) if pods else []))
        except (ApiException, HTTPError) as error:
            yield f"  its log cannot be read: {type(error).__name__}"


def _is_ours(step: StepRunResponse) -> bool:
    """Whether a step ended with an error that was raised on purpose."""
    return bool(step.exception_info and (step.exception_info.source or "").startswith("flowsentry."))


def _end(site: Site, api: Any, pod: Any) -> list[str]:
    """What became of a pod, and the end of its log."""
    lines = []
    for status in pod.status.container_statuses or []:
        if ended := status.state.terminated:
            lines.append(f"pod {pod.metadata.name}: {ended.reason}, exit code {ended.exit_code}")
    log = CoreV1Api(api).read_namespaced_pod_log(
        pod.metadata.name, site.namespace, tail_lines=_LOG_LINES, _request_timeout=TIMEOUT_SECONDS
    )
    return [*lines, *log.splitlines()]
