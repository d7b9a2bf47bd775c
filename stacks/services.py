"""Put the services of a site into its cluster, and everything into them that a run needs.

    python -m stacks.services                     # ZenML, MLflow, object store, monitoring
    python -m stacks.services --overlay existing  # only what a site with services of its own needs
    python -m stacks.services --delete            # the namespace with all that is in it

The site is that of stacks/site.yaml. Can be done again at any time: what is there stays, secrets are never overwritten.
"""

from __future__ import annotations

import argparse
import base64
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import urllib3
import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import DynamicApiError, NotFoundError, ResourceNotFoundError

from flowsentry.errors import FlowSentryError, StackError
from stacks import bootstrap, site
from stacks.bootstrap import Keys
from stacks.site import Site

OVERLAYS: Final = Path(__file__).parent / "kubernetes" / "overlays"
MANAGER: Final = "flowsentry"
"""Owner of the fields that are applied; what others set beside them stays."""
NODE_PORTS: Final = range(30000, 32768)
SECONDS: Final = 600.0
"""Longest wait for the services; the first time their images have to be pulled."""

TOLD_SECONDS: Final = 15.0
"""Between two lines about the wait."""
_HOPELESS: Final = {"ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError"}
_RESTARTS: Final = 3
_PART_OF: Final = "app.kubernetes.io/part-of"

Document = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Apply, wait, fill; or delete."""
    parser = argparse.ArgumentParser(prog="python -m stacks.services", description=__doc__.partition("\n")[0])
    known = sorted(path.name for path in OVERLAYS.iterdir() if path.is_dir())
    parser.add_argument("--overlay", default="quickstart", help=f"{', '.join(known)}, or a folder of your own")
    parser.add_argument("--delete", action="store_true", help="delete the namespace with everything in it")
    parser.add_argument("--yes", action="store_true", help="do not ask before deleting")
    given = parser.parse_args(arguments)
    try:
        place = site.load()
        cluster = Cluster.connect(place)
        if given.delete:
            cluster.delete(asked=given.yes)
        else:
            set_up(cluster, place, given.overlay)
    except FlowSentryError as error:
        sys.exit(f"error: {error}")
    except (urllib3.exceptions.HTTPError, ApiException, DynamicApiError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        sys.exit(f"error: the cluster of context {place.context} failed or does not answer: {reason}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; say the same again to go on")


def set_up(cluster: Cluster, place: Site, overlay: str) -> None:
    """Make the site's namespace what the overlay says, wait until its services are ready, fill them.

    Raises:
        StackError: something is missing, refused or does not become ready; the message says what.
    """
    documents = adapt(render(overlay), place, cluster.pod_networks(), cluster.api_servers())
    cluster.check_namespace()
    cluster.apply(document for document in documents if document["kind"] == "Namespace")
    make_secrets(cluster, {document["metadata"]["name"] for document in documents if document["kind"] == "Deployment"})
    cluster.apply(document for document in documents if document["kind"] != "Namespace")
    cluster.wait([document["metadata"]["name"] for document in documents if document["kind"] == "Deployment"])
    cluster.prune(document["metadata"]["name"] for document in documents if document["kind"] == "ConfigMap")
    fill(cluster, place)
    tell(place, documents)


def render(overlay: str) -> list[Document]:
    """The objects of an overlay, a name or a folder.

    Raises:
        StackError: there is no such overlay, no kubectl and no kustomize, or the overlay is wrong.
    """
    folder = OVERLAYS / overlay if (OVERLAYS / overlay).is_dir() else Path(overlay)
    if not (folder / "kustomization.yaml").is_file():
        raise StackError(f"overlay {overlay}: {folder / 'kustomization.yaml'} does not exist")
    command = _kustomize()
    built = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    if built.returncode:
        raise StackError(f"overlay {overlay}: {' '.join(command)} failed: {built.stderr.strip()}")
    return [document for document in yaml.safe_load_all(built.stdout) if document]


def _kustomize() -> list[str]:
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    raise StackError("neither kubectl nor kustomize is on PATH: install one of them, the manifests are built with it")


def adapt(
    documents: Iterable[Document], place: Site, pod_networks: list[str], api_servers: list[tuple[str, int]]
) -> list[Document]:
    """The same objects for one site: its namespace, node ports and addresses.

    `pod_networks` are CIDRs of pods, as far as the cluster tells: clients outside are those that are not in them.
    `api_servers` are addresses and ports of the API server, if the cluster tells: pods with rights reach only these.
    """
    ports = _node_ports(place)
    adapted = list(documents)
    for document in adapted:
        metadata = document["metadata"]
        if document["kind"] == "Namespace":
            metadata["name"] = place.namespace
        elif "namespace" in metadata:
            metadata["namespace"] = place.namespace
        for subject in document.get("subjects", ()):
            subject["namespace"] = place.namespace
        if document["kind"] == "Service" and (port := ports.get(metadata["name"])):
            document["spec"]["ports"][0]["nodePort"] = port
        if document["kind"] == "NetworkPolicy":
            for block in _blocks(document):
                if pod_networks and "except" in block:
                    block["except"] = pod_networks
            if metadata["name"] == "api-server" and api_servers:
                document["spec"]["egress"] = [
                    {"to": [{"ipBlock": {"cidr": f"{address}/32"}}], "ports": [{"port": port}]}
                    for address, port in api_servers
                ]
            if metadata["name"] in _TO_SITE:
                urls = [getattr(place, key) for key in _TO_SITE[metadata["name"]]]
                document["spec"]["egress"][0]["ports"] = [{"port": port} for port in sorted({*map(_port, urls)})]
        if document["kind"] == "Deployment" and metadata["name"] == "mlflow":
            _allow_hosts(document, place)
    return adapted


_TO_SITE: Final = {"pipelines-to-site": ("zenml_url", "s3_url", "mlflow_url"), "serving-to-site": ("s3_url",)}
"""Policies about services outside, and the addresses that they allow."""


def _node_ports(place: Site) -> dict[str, int]:
    """Of the services that the site reaches by node ports of its host."""
    urls = {"zenml": place.zenml_url, "s3": place.s3_url, "mlflow": place.mlflow_url, "champion": place.serving_url}
    ports = {name: _port(url) for name, url in urls.items() if urlsplit(url).hostname == place.host.strip("[]")}
    if "champion" in ports:
        ports["challenger"] = ports["champion"] + 1
    return {name: port for name, port in ports.items() if port in NODE_PORTS}


def _port(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def _blocks(policy: Document) -> Iterator[Document]:
    for rule in policy["spec"].get("ingress", ()):
        for peer in rule.get("from", ()):
            if "ipBlock" in peer:
                yield peer["ipBlock"]


def _allow_hosts(deployment: Document, place: Site) -> None:
    """MLflow answers only under names that it knows."""
    name = urlsplit(place.mlflow_url).netloc
    for variable in deployment["spec"]["template"]["spec"]["containers"][0]["env"]:
        if variable["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS":
            variable["value"] += f",{name}"


class Cluster:
    """The site's namespace."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self.namespace = namespace
        self._core = client.CoreV1Api(api)
        self._apps = client.AppsV1Api(api)
        self._discovery = client.DiscoveryV1Api(api)
        self._dynamic = DynamicClient(api)

    @classmethod
    def connect(cls, place: Site) -> Cluster:
        """As the kubeconfig says.

        Raises:
            StackError: it has no such context, or nothing answers there.
        """
        settings = client.Configuration()
        try:
            config.load_kube_config(context=place.context, client_configuration=settings)
        except config.ConfigException as error:
            raise StackError(
                f"context {place.context} cannot be used: {error}; see kubectl config get-contexts"
            ) from None
        settings.retries = False
        api = client.ApiClient(settings)
        try:
            client.VersionApi(api).get_code(_request_timeout=10)
        except (urllib3.exceptions.HTTPError, ApiException) as error:
            raise StackError(
                f"the cluster of context {place.context} does not answer at {settings.host} ({type(error).__name__})"
            ) from None
        return cls(api, place.namespace)

    def check_namespace(self) -> None:
        """Refuse a namespace that somebody else uses: pods there would lose rights and connections.

        Raises:
            StackError: it is there and not ours.
        """
        try:
            labels = self._core.read_namespace(self.namespace).metadata.labels or {}
        except ApiException as error:
            if error.status == 404:
                return
            raise
        if labels.get(_PART_OF) != MANAGER:
            raise StackError(
                f"namespace {self.namespace} was not made by this command. It would be closed to others and hold pods "
                f"to Pod Security `restricted`; if you want that: kubectl label namespace {self.namespace} "
                f"{_PART_OF}={MANAGER}"
            )

    def pod_networks(self) -> list[str]:
        """CIDRs that nodes give to pods; empty if the cluster does not tell, or not this user."""
        try:
            nodes = self._core.list_node().items
        except ApiException:
            return []
        return sorted({cidr for node in nodes for cidr in node.spec.pod_cid_rs or () if ":" not in cidr})

    def api_servers(self) -> list[tuple[str, int]]:
        """Addresses and ports of the API server; empty if this user may not know."""
        try:
            slices = self._discovery.list_namespaced_endpoint_slice(
                "default", label_selector="kubernetes.io/service-name=kubernetes"
            ).items
        except ApiException:
            return []
        return sorted(
            (address, port.port)
            for piece in slices
            if piece.address_type == "IPv4"
            for endpoint in piece.endpoints
            for address in endpoint.addresses
            for port in piece.ports
        )

    def apply(self, documents: Iterable[Document]) -> None:
        """Make objects what they should be, and print which were new or different.

        Raises:
            StackError: the cluster refuses one of them.
        """
        same = 0
        for document in documents:
            name = f"{document['kind']} {document['metadata']['name']}"
            try:
                resource = self._dynamic.resources.get(api_version=document["apiVersion"], kind=document["kind"])
            except ResourceNotFoundError:
                raise StackError(
                    f"{name}: the cluster does not know {document['apiVersion']} {document['kind']}"
                ) from None
            where = {"namespace": self.namespace} if resource.namespaced else {}
            try:
                before = resource.get(name=document["metadata"]["name"], **where).metadata.resourceVersion
            except NotFoundError:
                before = None
            try:
                after = resource.server_side_apply(
                    body=document, field_manager=MANAGER, force_conflicts=True, **where
                ).metadata.resourceVersion
            except DynamicApiError as error:
                raise StackError(f"{name}: the cluster refuses it: {error.summary()}") from None
            if before == after:
                same += 1
            else:
                print(f"  {'changed' if before else 'made'} {name}", flush=True)
        if same:
            print(f"  {same} objects are as they should be", flush=True)

    def prune(self, names: Iterable[str]) -> None:
        """Remove configurations that nothing uses any more: each content has a name of its own."""
        used = set(names)
        selector = f"{_PART_OF}={MANAGER},app in (prometheus, grafana)"
        for found in self._core.list_namespaced_config_map(self.namespace, label_selector=selector).items:
            if found.metadata.name not in used:
                self._core.delete_namespaced_config_map(found.metadata.name, self.namespace)

    def secret(self, name: str) -> dict[str, str] | None:
        """The values of a Secret; None if there is none."""
        try:
            data = self._core.read_namespaced_secret(name, self.namespace).data or {}
        except ApiException as error:
            if error.status == 404:
                return None
            raise
        return {key: base64.b64decode(value).decode() for key, value in data.items()}

    def make_secret(self, name: str, values: Mapping[str, str]) -> None:
        """Make a Secret; one that is there stays."""
        metadata = client.V1ObjectMeta(name=name, labels={_PART_OF: MANAGER})
        body = client.V1Secret(metadata=metadata, string_data=dict(values), type="Opaque")
        self._core.create_namespaced_secret(self.namespace, body, field_manager=MANAGER)
        print(f"  made Secret {name}", flush=True)

    def replace_secret(self, name: str, values: Mapping[str, str]) -> None:
        """Make a Secret, or give it other values."""
        if self.secret(name) is None:
            self.make_secret(name, values)
        else:
            self._core.patch_namespaced_secret(
                name, self.namespace, {"stringData": dict(values)}, field_manager=MANAGER
            )
            print(f"  changed Secret {name}", flush=True)

    def wait(self, names: list[str]) -> None:
        """Until these Deployments are ready.

        Raises:
            StackError: one is not in time; the message has what its pods say.
        """
        waiting, begin, told = list(names), time.monotonic(), 0.0
        while True:
            for deployment in self._apps.list_namespaced_deployment(self.namespace).items:
                name, status = deployment.metadata.name, deployment.status
                wanted = deployment.spec.replicas
                current = (status.observed_generation or 0) >= deployment.metadata.generation
                if name in waiting and current and wanted == status.updated_replicas == status.available_replicas:
                    waiting.remove(name)
                    print(f"  {name} is ready ({time.monotonic() - begin:.0f} s)", flush=True)
            if not waiting:
                return
            waited = time.monotonic() - begin
            for name in waiting:
                hopeless, trouble = self._trouble(name)
                if hopeless or waited > SECONDS:
                    raise StackError(f"{name} is not ready after {waited:.0f} s: {trouble}")
            if waited - told > TOLD_SECONDS:
                told = waited
                print(f"  waiting for {', '.join(waiting)} ({waited:.0f} s)", flush=True)
            time.sleep(1)

    def _trouble(self, name: str) -> tuple[bool, str]:
        """Whether waiting is of no use, and what the pods and the cluster say."""
        hopeless, told = False, []
        for pod in self._core.list_namespaced_pod(self.namespace, label_selector=f"app={name}").items:
            for status in pod.status.container_statuses or ():
                if (state := status.state.waiting) is None:
                    continue
                hopeless |= state.reason in _HOPELESS or status.restart_count >= _RESTARTS
                told.append(f"{state.reason} {state.message or ''}".strip())
                if status.restart_count:
                    log = self._core.read_namespaced_pod_log(
                        pod.metadata.name, self.namespace, container=status.name, previous=True, tail_lines=5
                    )
                    told.append(log.strip())
            selector = f"involvedObject.name={pod.metadata.name},type=Warning"
            events = self._core.list_namespaced_event(self.namespace, field_selector=selector).items
            told += [f"{event.reason}: {event.message}" for event in events[-2:]]
        return hopeless, "\n".join(dict.fromkeys(told)) or f"kubectl -n {self.namespace} describe deployment {name}"

    def delete(self, *, asked: bool) -> None:
        """Delete the namespace and wait until it is gone.

        Raises:
            StackError: it is not there, is not ours, or the user does not want it.
        """
        try:
            namespace = self._core.read_namespace(self.namespace)
        except ApiException as error:
            if error.status == 404:
                raise StackError(f"namespace {self.namespace} does not exist") from None
            raise
        if (namespace.metadata.labels or {}).get(_PART_OF) != MANAGER:
            raise StackError(f"namespace {self.namespace} was not made by this command; delete it yourself")
        question = f"Delete namespace {self.namespace} with all runs, artifacts and models in it? Type its name: "
        if not asked and input(question) != self.namespace:
            raise StackError("nothing was deleted")
        self._core.delete_namespace(self.namespace)
        begin = time.monotonic()
        while time.monotonic() - begin < SECONDS:
            try:
                self._core.read_namespace(self.namespace)
            except ApiException as error:
                if error.status != 404:
                    raise
                print(f"namespace {self.namespace} is gone ({time.monotonic() - begin:.0f} s)")
                return
            time.sleep(1)
        raise StackError(
            f"namespace {self.namespace} is still being deleted; see kubectl get namespace {self.namespace} -o yaml"
        )


def make_secrets(cluster: Cluster, deployments: set[str]) -> None:
    """Make the Secrets that are missing.

    Raises:
        StackError: a variable is not set.
    """
    for name, make in secret_makers(deployments, os.environ).items():
        if cluster.secret(name) is None:
            cluster.make_secret(name, make())


def secret_makers(deployments: set[str], environment: Mapping[str, str]) -> dict[str, Callable[[], dict[str, str]]]:
    """What makes each Secret: random values for the services of the overlay, those of the user's environment for
    services that the site has already, or a StackError that names the variable that is not set.
    """

    def mine(name: str) -> str:
        if not (value := environment.get(name)):
            raise StackError(
                f"set {name}: the site's own services are used, and Secrets for them are made from it once"
            )
        return value

    def new() -> str:
        return secrets.token_urlsafe(32)

    def mlflow() -> dict[str, str]:
        password = new()
        return {
            "username": MANAGER,
            "password": password,
            "secret_key": new(),
            "basic_auth.ini": "\n".join(
                (
                    "[mlflow]",
                    "default_permission = READ",
                    "database_uri = sqlite:////data/auth.db",
                    f"admin_username = {MANAGER}",
                    f"admin_password = {password}",
                    "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
                    "",
                )
            ),
        }

    def store(account: str) -> dict[str, str]:
        if "s3" in deployments:
            return {"AWS_ACCESS_KEY_ID": account, "AWS_SECRET_ACCESS_KEY": new()}
        return {name: mine(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}

    makers: dict[str, Callable[[], dict[str, str]]] = {
        "pipelines": lambda: store("pipelines"),
        "serving": lambda: {"token": new()} | store("serving"),
    }
    if "s3" in deployments:
        makers["s3"] = lambda: {"ROOT_ACCESS_KEY": "root", "ROOT_SECRET_KEY": new()}
    if "zenml" in deployments:
        makers["zenml-server"] = lambda: {
            "ZENML_DEFAULT_USER_NAME": "admin",
            "ZENML_DEFAULT_USER_PASSWORD": new(),
            "ZENML_SERVER_JWT_SECRET_KEY": secrets.token_hex(32),
            "ZENML_SECRETS_STORE_TYPE": "sql",
            "ZENML_SECRETS_STORE_ENCRYPTION_KEY": secrets.token_hex(32),
        }
    else:
        makers["flowsentry-client"] = lambda: {"zenml_api_key": mine("ZENML_STORE_API_KEY")}
    makers["mlflow"] = (
        mlflow
        if "mlflow" in deployments
        else lambda: {"username": mine("MLFLOW_TRACKING_USERNAME"), "password": mine("MLFLOW_TRACKING_PASSWORD")}
    )
    if "grafana" in deployments:
        makers["grafana"] = lambda: {"admin-user": "admin", "admin-password": new()}
    return makers


def fill(cluster: Cluster, place: Site) -> None:
    """Accounts, buckets and ZenML's secrets, as far as they are missing.

    Raises:
        StackError: a service refuses or does not answer.
    """
    pipelines, serving, mlflow = (_values(cluster, name) for name in ("pipelines", "serving", "mlflow"))
    root = cluster.secret("s3")
    keys = [Keys(values["AWS_ACCESS_KEY_ID"], values["AWS_SECRET_ACCESS_KEY"]) for values in (pipelines, serving)]
    store = bootstrap.S3(place.s3_url, Keys(root["ROOT_ACCESS_KEY"], root["ROOT_SECRET_KEY"]) if root else keys[0])
    for bucket in (bootstrap.ARTIFACTS, bootstrap.SERVING):
        if store.keep_bucket(bucket):
            print(f"  made bucket {bucket}", flush=True)
    if root:
        for account in keys:
            store.keep_account(account)
        store.allow(bootstrap.ARTIFACTS, [keys[0].access])
        store.allow(bootstrap.SERVING, [account.access for account in keys])
    zenml = bootstrap.ZenML(place.zenml_url)
    known = cluster.secret("flowsentry-client")
    if known is None or not zenml.accepts(known["zenml_api_key"]):
        server = cluster.secret("zenml-server")
        if server is None:
            raise StackError(
                f"ZenML at {place.zenml_url} refuses the API key of Secret flowsentry-client: delete the Secret, "
                "set ZENML_STORE_API_KEY and say the same again"
            )
        zenml.log_in(server["ZENML_DEFAULT_USER_NAME"], server["ZENML_DEFAULT_USER_PASSWORD"])
        key = zenml.new_api_key()
        cluster.replace_secret("flowsentry-client", {"zenml_api_key": key})
        zenml.accepts(key)
    wanted = {
        "flowsentry-s3": {"aws_access_key_id": keys[0].access, "aws_secret_access_key": keys[0].secret},
        "flowsentry-mlflow": {"username": mlflow["username"], "password": mlflow["password"]},
    }
    for name, values in wanted.items():
        if zenml.keep_secret(name, values):
            print(f"  gave ZenML the secret {name}", flush=True)


def _values(cluster: Cluster, name: str) -> dict[str, str]:
    values = cluster.secret(name)
    if values is None:
        raise StackError(f"Secret {name} is missing in namespace {cluster.namespace}")
    return values


def tell(place: Site, documents: list[Document]) -> None:
    """Where things are, and what comes next."""
    deployed = {document["metadata"]["name"] for document in documents if document["kind"] == "Deployment"}
    read = f"kubectl --context {place.context} -n {place.namespace} get secret"
    lines = [("ZenML", place.zenml_url), ("MLflow", place.mlflow_url), ("S3", place.s3_url)]
    print("\n" + "\n".join(f"{name:<8} {url}" for name, url in lines))
    if "zenml" in deployed:
        path = "{.data.ZENML_DEFAULT_USER_PASSWORD}"
        print(f"ZenML's user is admin, its password: {read} zenml-server -o jsonpath='{path}' | base64 -d")
    if "grafana" in deployed:
        print(
            f"Grafana's user is admin, its password: {read} grafana -o jsonpath='{{.data.admin-password}}' | base64 -d"
        )
    if "mlflow" in deployed:
        print(f"MLflow's user is {MANAGER}, its password: {read} mlflow -o jsonpath='{{.data.password}}' | base64 -d")
    print("\nNext: make images, then python run.py --pipeline train --stack cluster")


if __name__ == "__main__":
    main()
