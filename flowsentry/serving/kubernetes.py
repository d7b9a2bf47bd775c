"""The deployer of a Kubernetes namespace: one Deployment for each served bundle, two Services that lead to them.

The record (ConfigMap `flowsentry-deployment`) decides. It is written, by whoever has read its last version, before
anything follows from it; `_settle` then makes Deployments and Services what it says, whoever calls it next. So a
deployer that is killed at any moment leaves a champion that serves and a state that the next call completes.

At a switch the Service leads to the new pods first, which are ready. The old ones then are told to end: they store
their streams (`/v1/release`), close each connection with its next answer, answer for some seconds whoever still comes,
and end. A client that has gone on meets a service that remembers its stream or says what it remembers (409).
"""

from __future__ import annotations

import base64
import os
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flowsentry.errors import ConfigError, DeployError, FlowSentryError, StoreError
from flowsentry.serving import bundle as bundles
from flowsentry.serving import diagnosis, drain, manifests
from flowsentry.serving.client import Client
from flowsentry.serving.deployer import Deployed, Endpoint, Record, Service, Status
from flowsentry.serving.kubernetes_api import Api, Away, Conflict, Missing
from flowsentry.serving.manifests import Object, Shape

RECORD: Final = "flowsentry-deployment"
"""Name of the ConfigMap."""
CHAMPION: Final = "champion"
CHALLENGER: Final = "challenger"
TRIAL_SECONDS: Final = 900.0
"""For so long nobody but its owner may replace a challenger, unless the owner's pod has ended."""
SCHEDULING_SECONDS: Final = 60.0
"""For which a pod may find no node, before that is an error."""
ROUTING_SECONDS: Final = 30.0
"""For a Service's address to lead to other pods."""
KEPT_BUNDLES: Final = 3
"""Archives in the bucket that nothing refers to, the newest; others are removed."""
_ATTEMPTS: Final = 20
_SAME_ANSWERS: Final = 5
_POLL_SECONDS: Final = 0.5
_LABEL: Final = re.compile("[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")

Say = Callable[[str], None]


class _Trial(BaseModel):
    """Who has the challenger on trial."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    owner: str
    pod: str | None
    """Name of the owner's pod, which tells whether the owner still runs."""
    since: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class _State:
    """What the ConfigMap says."""

    record: Record = field(default_factory=Record)
    trial: _Trial | None = None
    unfinished: Literal["", "rollback"] = ""
    """A rollback is decided and may not be carried out yet."""
    log: str = ""
    """Last lines of the last challenger."""
    version: str | None = None
    """resourceVersion; None: there is no ConfigMap yet."""

    @classmethod
    def of(cls, found: Object) -> _State:
        data = found.get("data") or {}
        try:
            return cls(
                Record.model_validate_json(data.get("record.json") or "{}"),
                _Trial.model_validate_json(data["trial.json"]) if data.get("trial.json") else None,
                "rollback" if data.get("unfinished") else "",
                data.get("challenger.log", ""),
                found["metadata"]["resourceVersion"],
            )
        except ValidationError as error:
            raise DeployError(
                f"ConfigMap {RECORD}: the record of what is deployed is damaged; restore it, or remove it and deploy "
                "again"
            ) from error

    def to_object(self) -> Object:
        metadata = {"name": RECORD} | ({"resourceVersion": self.version} if self.version else {})
        data = {
            "record.json": self.record.model_dump_json(indent=1),
            "trial.json": self.trial.model_dump_json() if self.trial else "",
            "unfinished": self.unfinished,
            "challenger.log": self.log,
        }
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


class KubernetesDeployer:
    """Implements `Deployer` with pods.

    The namespace has the Services `champion` and `challenger` (port 3000, without a selector) and the Secret `serving`
    (`token`; `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` of the bucket, unless pods and this process know them by
    other means).
    """

    def __init__(
        self,
        namespace: str,
        shape: Shape,
        *,
        champion_url: str | None = None,
        challenger_url: str | None = None,
        context: str | None = None,
        ready_seconds: float = 300.0,
        on_progress: Say = lambda _: None,
    ) -> None:
        """Nothing is asked yet.

        Args:
            namespace: in which everything is.
            shape: of the pods.
            champion_url: address of the Service `champion`; by default the one that only pods can use.
            challenger_url: of the Service `challenger`, likewise.
            context: of the kubeconfig; by default the pod's own account, or the present context.
            ready_seconds: how long a service may take to become ready, the pull of its image included.
            on_progress: is told in a line what is waited for.
        """
        self.namespace = namespace
        self.shape = shape
        self._urls = {
            CHAMPION: champion_url or f"http://{CHAMPION}.{namespace}.svc:{drain.PORT}",
            CHALLENGER: challenger_url or f"http://{CHALLENGER}.{namespace}.svc:{drain.PORT}",
        }
        self._context = context
        self._ready_seconds = ready_seconds
        self._say = on_progress
        self._known_api: Api | None = None
        self._known_secret: dict[str, str] | None = None
        self._identity = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}"

    def start_challenger(self, bundle: Path, model_version: str, digest: str) -> Endpoint:
        """Serve a bundle beside the champion; returns when it answers at its address.

        It takes the place of an earlier challenger whose owner is this process, or a pod that has ended, or who began
        more than `TRIAL_SECONDS` ago.

        Raises:
            DeployError: it did not become ready, with the pod's events and last lines; it is removed then. Or the
                bundle is damaged, or somebody else's challenger is on trial.
        """
        self._check_bundle(bundle, model_version, digest)
        deployed = Deployed(model_version=model_version, digest=digest, url="")
        self._check_free(self._read())
        self._upload(bundles.Bundle(bundle, digest))
        state = self._change(lambda state: self._claimed(state, deployed))
        try:
            if state.record.champion is None or state.record.champion.digest != digest:
                self._put(deployed, replicas=1)
            self._settle()
            self._await_ready(deployed, 1, is_new=True)
            self._await_answer(CHALLENGER, digest)
        except BaseException:
            with suppress(DeployError):
                self._drop(digest)
            raise
        return Endpoint(url=self._urls[CHALLENGER], token=self._token())

    def stop_challenger(self, digest: str | None = None) -> None:
        """Stop serving the challenger; nothing happens if there is none.

        Raises:
            DeployError: it is another bundle than `digest` says.
        """
        challenger = self._read().record.challenger
        if challenger is not None:
            if digest is not None:
                _check_is(challenger, digest)
            self._drop(challenger.digest)

    def promote(self, digest: str, instead_of: str | None) -> Record:
        """Make the challenger the champion; no request fails. Done again, it completes what was interrupted.

        Raises:
            DeployError: there is no challenger, it is another bundle than `digest`, it is not ready or has died, or
                the champion is another one than `instead_of`. The champion stays.
        """
        record = self._read().record
        if record.challenger is None and record.champion is not None and record.champion.digest == digest:
            return self._moved(digest)
        challenger = _promotable(record, digest, instead_of)
        self._check_alive(challenger)
        self._scale(challenger, self.shape.replicas)
        self._await_ready(challenger, self.shape.replicas, is_new=True)

        def promoted(state: _State) -> _State:
            record = state.record
            challenger = _promotable(record, digest, instead_of)
            again = record.champion is not None and record.champion.digest == digest
            previous = record.previous if again else record.champion
            return replace(state, record=Record(champion=challenger, previous=previous), trial=None, unfinished="")

        self._change(promoted)
        return self._moved(digest)

    def rollback(self) -> Record:
        """Make the previous champion the champion again; no request fails.

        A rollback that was interrupted after it was decided is completed, not turned back.

        Raises:
            DeployError: there is none, or it does not become ready. The champion stays.
        """
        state = self._read()
        before = state.record
        if not state.unfinished:
            if (previous := before.previous) is None:
                raise DeployError("there is no previous champion to go back to")
            try:
                self._scale(previous, self.shape.replicas)
                self._await_ready(previous, self.shape.replicas, is_new=True)
            except DeployError:
                with suppress(DeployError):
                    self._settle()
                raise

            def turned(state: _State) -> _State:
                if (state.record.champion, state.record.previous) != (before.champion, before.previous):
                    raise DeployError("another run has changed the champion meanwhile; look at the status first")
                changed = {"champion": before.previous, "previous": before.champion}
                return replace(state, record=state.record.model_copy(update=changed), unfinished="rollback")

            state = self._change(turned)
        assert state.record.champion is not None
        self._moved(state.record.champion.digest)
        return self._shown(self._change(lambda state: replace(state, unfinished="")))

    def record(self) -> Record:
        """What is deployed.

        Raises:
            DeployError: the record is damaged, or the cluster does not answer.
        """
        return self._shown(self._read())

    def status(self) -> Status:
        """What is deployed and what runs; nothing is started to find out.

        Raises:
            DeployError: the record is damaged, or the cluster does not answer.
        """
        record = self.record()
        champion, challenger = map(self._service, (record.champion, record.challenger))
        runs = champion is not None and champion.state != "stopped"
        return Status(
            record=record,
            running=runs or challenger is not None,
            url=self._urls[CHAMPION],
            uptime=champion.uptime if champion else 0.0,
            champion=champion,
            challenger=challenger,
        )

    def endpoint(self) -> Endpoint:
        """The champion's stable address; the champion is started if it does not run.

        Raises:
            DeployError: there is no champion, or it does not become ready.
        """
        if self._read().record.champion is None:
            raise DeployError("no model has been deployed yet: python run.py --pipeline train")
        champion = self._settle().record.champion
        assert champion is not None
        self._await_ready(champion, 1, is_new=False)
        return Endpoint(url=self._urls[CHAMPION], token=self._token())

    def stop(self) -> None:
        """Stop everything; the record stays."""
        self._change(lambda state: replace(state, record=state.record.model_copy(update={"challenger": None})))
        self._settle(is_running=False)

    def challenger_log(self) -> str:
        """Last lines that the present or the last challenger wrote."""
        state = self._read()
        return self._log_of(state.record.challenger.digest) if state.record.challenger else state.log

    def _moved(self, digest: str) -> Record:
        """Carry a decision out; returns when the champion's address leads to the bundle."""
        state = self._settle()
        try:
            self._await_answer(CHAMPION, digest)
        except DeployError as error:
            self._say(f"traffic has moved, but this cannot be seen from here: {error}")
        self._tidy(state.record)
        return self._shown(state)

    def _drop(self, digest: str) -> None:
        """Stop a challenger, if it is one, and keep what it said."""
        said = self._log_of(digest)

        def dropped(state: _State) -> _State:
            if state.record.challenger is None or state.record.challenger.digest != digest:
                return state
            record = state.record.model_copy(update={"challenger": None})
            return replace(state, record=record, trial=None, log=said)

        self._change(dropped)
        self._settle()

    def _check_bundle(self, bundle: Path, model_version: str, digest: str) -> None:
        try:
            found = bundles.verify(bundle, digest).about["model_version"]
        except StoreError as error:
            raise DeployError(str(error)) from error
        if found != model_version:
            raise DeployError(f"{bundle}: is model version {found}, not {model_version}")
        if not _LABEL.fullmatch(model_version):
            raise DeployError(f"model version {model_version}: Kubernetes takes letters, digits, '.', '_' and '-'")

    def _check_free(self, state: _State) -> None:
        trial, other = state.trial, state.record.challenger
        if other is None or trial is None or trial.owner == self._identity or not self._lives(trial):
            return
        age = time.time() - trial.since
        if age < TRIAL_SECONDS:
            raise DeployError(
                f"model version {other.model_version} is on trial, for {trial.pod or trial.owner} since {age:.0f} s; "
                "wait for its end and try again"
            )

    def _claimed(self, state: _State, deployed: Deployed) -> _State:
        self._check_free(state)
        holder = os.environ.get("HOSTNAME") if self._api.is_inside else None
        trial = _Trial(owner=self._identity, pod=holder, since=time.time())
        record = state.record.model_copy(update={"challenger": deployed})
        return replace(state, record=record, trial=trial, log="")

    def _lives(self, trial: _Trial) -> bool:
        """Whether a trial's owner may still run; of one outside the cluster nothing is known."""
        if trial.pod is None:
            return True
        try:
            found = self._api.get("v1/pods", trial.pod)
        except Missing:
            return False
        return "deletionTimestamp" not in found["metadata"] and found["status"].get("phase") in {"Pending", "Running"}

    def _check_alive(self, challenger: Deployed) -> None:
        """A challenger that has died is not promoted, even if it was started again."""
        try:
            deployment = self._api.get(_DEPLOYMENTS, manifests.name(challenger.digest))
        except Missing:
            raise DeployError(f"{_named(challenger)} does not run: start it again") from None
        found = self._pods(deployment)
        trouble = diagnosis.find(deployment, found)
        if trouble is not None or not diagnosis.is_rolled_out(deployment, 1):
            what = trouble.what if trouble else f"it {diagnosis.stage(found)}"
            raise DeployError(self._told(f"{_named(challenger)} cannot be promoted: {what}", trouble))

    def _settle(self, *, is_running: bool = True) -> _State:
        """Make Deployments and Services what the record says."""
        for _ in range(_ATTEMPTS):
            # What is to be changed is read before the record, so that whatever was made since is left alone.
            there = {found["metadata"]["name"]: found for found in self._api.list(_DEPLOYMENTS, **_OURS)}
            services = {name: self._api.get("v1/services", name) for name in (CHAMPION, CHALLENGER)}
            state = self._read()
            record = state.record
            if is_running and record.champion is not None:
                self._scale(record.champion, self.shape.replicas, there)
            try:
                self._route(services[CHAMPION], record.champion)
                self._route(services[CHALLENGER], record.challenger)
            except Conflict:
                continue
            self._sort(there, record, is_running=is_running)
            return state
        raise DeployError("the Services change all the time: is another deployer at work?")

    def _route(self, service: Object, deployed: Deployed | None) -> None:
        wanted = manifests.route(deployed.digest if deployed else None)
        if any(service["spec"].get(key) != value for key, value in wanted["spec"].items()):
            metadata = {"resourceVersion": service["metadata"]["resourceVersion"]}
            self._api.patch("v1/services", service["metadata"]["name"], wanted | {"metadata": metadata})

    def _sort(self, there: dict[str, Object], record: Record, *, is_running: bool) -> None:
        """Give each Deployment its role; scale the previous champion's to none, remove those of no role."""
        roles = {
            manifests.name(deployed.digest): role
            for role in ("previous", CHALLENGER, CHAMPION)
            if (deployed := getattr(record, role)) is not None
        }
        for name, found in there.items():
            role = roles.get(name)
            if role is None:
                self._api.delete(_DEPLOYMENTS, name, found["metadata"]["uid"])
                continue
            rests = role == "previous" or not is_running
            patch: Object = {}
            if found["metadata"]["labels"].get(manifests.ROLE) != role:
                patch["metadata"] = {"labels": {manifests.ROLE: role}}
            if rests and found["spec"].get("replicas", 1):
                patch["spec"] = {"replicas": 0}
            if patch:
                with suppress(Missing):
                    self._api.patch(_DEPLOYMENTS, name, patch)

    def _put(self, deployed: Deployed, *, replicas: int) -> Object:
        """Make the Deployment of a bundle, or start it anew in its present shape."""
        wanted = manifests.deployment(self.shape, deployed, replicas=replicas, attempt=secrets.token_hex(4))
        try:
            return self._api.create(_DEPLOYMENTS, wanted)
        except Conflict:
            return self._api.patch(_DEPLOYMENTS, manifests.name(deployed.digest), wanted)

    def _scale(self, deployed: Deployed, replicas: int, there: dict[str, Object] | None = None) -> None:
        """See that so many pods of a champion, or of one to be, are wanted; what was lost is made again."""
        name = manifests.name(deployed.digest)
        try:
            found = there[name] if there and name in there else self._api.get(_DEPLOYMENTS, name)
        except Missing:
            found = self._put(deployed, replicas=replicas)
        present = found["spec"].get("replicas", 1)
        if present < replicas or (present > replicas and self.shape.most_replicas is None):
            self._api.patch(_DEPLOYMENTS, name, {"spec": {"replicas": replicas}})
        if replicas > 1:
            self._ensure("policy/v1/poddisruptionbudgets", manifests.disruption_budget(deployed.digest, found))
        if self.shape.most_replicas is not None:
            scaler = manifests.autoscaler(self.shape, deployed.digest, found)
            self._ensure("autoscaling/v2/horizontalpodautoscalers", scaler)

    def _ensure(self, kind: str, wanted: Object) -> None:
        try:
            self._api.create(kind, wanted)
        except Conflict:
            self._api.patch(kind, wanted["metadata"]["name"], wanted)

    def _await_ready(self, deployed: Deployed, replicas: int, *, is_new: bool) -> None:
        """Wait until so many pods are ready; one that is new may not die, one at work is started again if it does."""
        begin, said = time.monotonic(), ""
        while True:
            waited = time.monotonic() - begin
            is_late = waited > self._ready_seconds
            try:
                deployment = self._api.get(_DEPLOYMENTS, manifests.name(deployed.digest))
                found = self._pods(deployment)
            except Away:
                if is_late:
                    raise
                time.sleep(_POLL_SECONDS)
                continue
            trouble = diagnosis.find(deployment, found)
            if diagnosis.is_rolled_out(deployment, replicas) and not (is_new and trouble):
                return
            if trouble is not None and is_new and (trouble.is_lasting or waited > SCHEDULING_SECONDS):
                raise DeployError(
                    self._told(f"{_named(deployed)} did not become ready: {trouble.what}", trouble, found)
                )
            if is_late:
                what = trouble.what if trouble else f"it {diagnosis.stage(found)}"
                raise DeployError(
                    self._told(f"{_named(deployed)} was not ready after {waited:.0f} s: {what}", trouble, found)
                )
            if said != (said := diagnosis.stage(found)):
                self._say(f"{_named(deployed)} {said}")
            time.sleep(_POLL_SECONDS)

    def _await_answer(self, service: str, digest: str) -> None:
        """Wait until a Service's address leads to a bundle's pods, and to no others."""
        url, token = self._urls[service], self._token()
        limit = time.monotonic() + ROUTING_SECONDS
        same, problem = 0, "another model answers"
        while same < _SAME_ANSWERS:
            if time.monotonic() > limit:
                raise DeployError(f"the Service {service} does not lead to bundle {digest[:12]} at {url}: {problem}")
            try:
                with Client(url, token, timeout=5, patience=0) as client:
                    same = same + 1 if client.model().get("digest") == digest else 0
            except FlowSentryError as error:
                same, problem = 0, str(error)
            time.sleep(0.1)

    def _told(self, what: str, trouble: diagnosis.Trouble | None, pods: list[Object] | None = None) -> str:
        """What went wrong, with the events of the pod and the last lines of the container."""
        name = trouble.pod if trouble and trouble.pod else None
        if name is None and pods:
            name = pods[0]["metadata"]["name"]
        if name is None:
            return what
        lines = [f"{what} (pod {name})"]
        with suppress(DeployError):
            lines += _events(self._api.list("v1/events", fieldSelector=f"involvedObject.name={name}"))
        container = trouble.container if trouble and trouble.container else manifests.CONTAINER
        with suppress(DeployError):
            previous = trouble.is_restarted if trouble else False
            if said := self._api.log(name, container, previous=previous):
                lines += [f"last lines of container {container}:", said]
        return "\n".join(lines)

    def _log_of(self, digest: str) -> str:
        """Last lines of a bundle's pods: of the container that ended, or else of the running one."""
        try:
            deployment = self._api.get(_DEPLOYMENTS, manifests.name(digest))
            found = self._pods(deployment)
            trouble = diagnosis.find(deployment, found)
            if trouble is not None and trouble.pod and trouble.container:
                said = self._api.log(trouble.pod, trouble.container, previous=trouble.is_restarted)
                return f"{said}\nflowsentry: {trouble.what}".strip()
            return self._api.log(found[0]["metadata"]["name"], manifests.CONTAINER, previous=False) if found else ""
        except DeployError:
            return ""

    def _pods(self, deployment: Object) -> list[Object]:
        labels = ",".join(f"{k}={v}" for k, v in deployment["spec"]["selector"]["matchLabels"].items())
        return diagnosis.present(deployment, self._api.list("v1/pods", labelSelector=labels))

    def _service(self, deployed: Deployed | None) -> Service | None:
        """A deployed bundle's pods as they are now."""
        if deployed is None:
            return None
        try:
            deployment = self._api.get(_DEPLOYMENTS, manifests.name(deployed.digest))
        except Missing:
            deployment = {"spec": {"replicas": 0}}
        wanted = deployment["spec"].get("replicas", 1)
        found = self._pods(deployment) if wanted else []
        trouble = diagnosis.find(deployment, found) if wanted else None
        ready = deployment.get("status", {}).get("readyReplicas", 0) if wanted else 0
        states = [one for each in found for one in each.get("status", {}).get("containerStatuses", [])]
        ended = [one["lastState"]["terminated"] for one in states if "terminated" in one.get("lastState", {})]
        begun = [one["state"]["running"]["startedAt"] for one in states if "running" in one.get("state", {})]
        return Service(
            state="stopped" if not wanted else "ready" if ready else "waiting" if trouble else "starting",
            healthy=ready > 0,
            url=deployed.url,
            pid=None,
            uptime=(datetime.now(UTC) - datetime.fromisoformat(min(begun))).total_seconds() if begun else 0.0,
            restarts=diagnosis.restarts(found),
            exit_status=ended[-1]["exitCode"] if ended else None,
            problem=trouble.what if trouble else f"{ready} of {wanted} pods are ready" if ready < wanted else None,
            log=f"kubectl -n {self.namespace} logs -l {manifests.DIGEST}={manifests.short(deployed.digest)}",
        )

    def _read(self) -> _State:
        try:
            return _State.of(self._api.get("v1/configmaps", RECORD))
        except Missing:
            return _State()

    def _change(self, change: Callable[[_State], _State]) -> _State:
        """Write what a function makes of the present state; it is asked again if somebody else was faster."""
        for _ in range(_ATTEMPTS):
            before = self._read()
            after = change(before)
            if after == before:
                return after
            try:
                if before.version is None:
                    return _State.of(self._api.create("v1/configmaps", after.to_object()))
                return _State.of(self._api.patch("v1/configmaps", RECORD, after.to_object()))
            except Conflict:
                continue
        raise DeployError(f"ConfigMap {RECORD} changes all the time: is another deployer at work?")

    def _shown(self, state: _State) -> Record:
        """The record with addresses as they are seen from here."""
        addresses = {"champion": CHAMPION, "previous": CHAMPION, "challenger": CHALLENGER}
        return Record(
            **{
                role: deployed and deployed.model_copy(update={"url": self._urls[service]})
                for role, service in addresses.items()
                for deployed in [getattr(state.record, role)]
            }
        )

    @property
    def _api(self) -> Api:
        if self._known_api is None:
            self._known_api = Api(self.namespace, self._context)
        return self._known_api

    def _secret(self) -> dict[str, str]:
        if self._known_secret is None:
            try:
                data = self._api.get("v1/secrets", manifests.SECRET).get("data") or {}
            except Missing:
                raise DeployError(
                    f"namespace {self.namespace} has no Secret `{manifests.SECRET}`: set the services up first"
                ) from None
            self._known_secret = {key: base64.b64decode(value).decode() for key, value in data.items()}
        return self._known_secret

    def _token(self) -> str:
        if not (token := self._secret().get("token", "").strip()):
            raise DeployError(f"Secret `{manifests.SECRET}` of namespace {self.namespace} holds no token")
        return token

    def _bucket(self) -> tuple[Any, str]:
        """File system and root of the archives."""
        from fsspec.core import url_to_fs

        options: dict[str, Any] = {}
        if self.shape.bucket_url.startswith("s3://"):
            secret = self._secret()
            place = {"region_name": self.shape.region}
            if self.shape.s3_url is not None:
                place["endpoint_url"] = self.shape.s3_url
            options = {"client_kwargs": place, "use_listings_cache": False}
            if "AWS_ACCESS_KEY_ID" in secret:
                options |= {"key": secret["AWS_ACCESS_KEY_ID"], "secret": secret["AWS_SECRET_ACCESS_KEY"]}
        try:
            files, root = url_to_fs(f"{self.shape.bucket_url}/bundles", **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{self.shape.bucket_url}: not a store of bundles that can be reached ({error})"
            ) from error
        return files, str(root)

    def _upload(self, bundle: bundles.Bundle) -> None:
        """Store a bundle's archive, unless it is there."""
        files, root = self._bucket()
        path = f"{root}/{bundle.digest}.tar.gz"
        with tempfile.TemporaryDirectory(prefix="flowsentry-") as scratch:
            packed = Path(scratch, "bundle.tar.gz")
            bundles.pack(bundle, packed)
            try:
                if files.exists(path) and files.size(path) == packed.stat().st_size:
                    return
                self._say(
                    f"uploading {packed.stat().st_size / 1e6:.1f} MB to {manifests.archive(self.shape, bundle.digest)}"
                )
                files.makedirs(root, exist_ok=True)
                files.put_file(str(packed), path)
            except Exception as error:  # each client has exceptions of its own
                raise DeployError(f"{self.shape.bucket_url}: the bundle cannot be stored ({error})") from error

    def _tidy(self, record: Record) -> None:
        """Forget archives that nothing refers to, but for the newest, and checkpoints that nobody goes on with."""
        from flowsentry.serving.supervisor import has_outlived

        kept = {one.digest for one in (record.champion, record.previous, record.challenger) if one is not None}
        try:
            files, root = self._bucket()
            stored = {path: files.modified(path) for path in files.find(root) if path.endswith(".tar.gz")}
            others = [path for path in stored if PurePosixPath(path).name.removesuffix(".tar.gz") not in kept]
            old = sorted(others, key=stored.__getitem__)[:-KEPT_BUNDLES]
            now = datetime.now(UTC)
            for path in files.find(f"{PurePosixPath(root).parent}/state"):
                if has_outlived(PurePosixPath(path).name, (now - files.modified(path)).total_seconds()):
                    old.append(path)
            for path in old:
                files.rm_file(path)
        except Exception as error:  # nothing of it matters to who serves
            self._say(f"old bundles and checkpoints could not be removed: {error}")


_DEPLOYMENTS: Final = "apps/v1/deployments"
_OURS: Final = {"labelSelector": f"app={manifests.APP}"}


def _named(deployed: Deployed) -> str:
    return f"model version {deployed.model_version}"


def _check_is(challenger: Deployed, digest: str) -> None:
    if challenger.digest != digest:
        raise DeployError(
            f"the challenger is {_named(challenger)}, bundle {challenger.digest[:12]}, not bundle {digest[:12]}: "
            "another run has started it meanwhile"
        )


def _promotable(record: Record, digest: str, instead_of: str | None) -> Deployed:
    """The challenger, if it is the tested one and the champion the one that it was compared with."""
    if (challenger := record.challenger) is None:
        raise DeployError("there is no challenger to promote")
    _check_is(challenger, digest)
    champion = record.champion
    if instead_of != (champion.digest if champion else None):
        serving = f"{_named(champion)}, bundle {champion.digest[:12]}" if champion else "none"
        raise DeployError(
            f"the champion is {serving}, and {_named(challenger)} was compared with "
            f"{f'bundle {instead_of[:12]}' if instead_of else 'none'}: another run has changed it meanwhile; run the "
            "pipeline again"
        )
    return challenger


def _events(found: list[Object]) -> list[str]:
    """The last warning of each kind among a pod's events, one line each."""
    found.sort(key=lambda one: one.get("lastTimestamp") or one.get("eventTime") or "")
    last = {one.get("reason"): one for one in found if one.get("type") == "Warning"}
    return [f"  {reason}: {' '.join(str(one.get('message', '')).split())[:400]}" for reason, one in last.items()]
