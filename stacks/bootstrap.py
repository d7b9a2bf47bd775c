"""What the services of a site have to hold before a run: accounts, buckets, and the secrets that ZenML hands to pods.

Everything can be done again: what is there and right stays as it is.
"""
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from xml.sax.saxutils import escape

import boto3
import httpx
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError

from flowsentry.errors import StackError

REGION: Final = "us-east-1"
ARTIFACTS: Final = "zenml"
"""Bucket of ZenML's artifact store."""
SERVING: Final = "flowsentry"
"""Bucket of bundles and checkpoints."""
ACCOUNT: Final = "flowsentry"
"""ZenML's service account of the stack, and its API key."""
PATIENCE_SECONDS = 15.0
"""Longest wait for a connection to be accepted: a pod that is ready is behind its node port a moment later."""
_SECONDS: Final = 30.0


@dataclass(frozen=True)
class Keys:
    """Access to an S3 store."""

    access: str
    secret: str


class ZenML:
    """A ZenML server, spoken to without ZenML's client: that would change what the user is logged in to."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._headers: dict[str, str] = {}

    def log_in(self, user: str, password: str) -> None:
        """As a user.

        Raises:
            StackError: the server refuses, or does not answer.
        """
        self._log_in({"username": user, "password": password})

    def accepts(self, api_key: str) -> bool:
        """Whether a key is good; if so, what follows is done with it."""
        try:
            self._log_in({"grant_type": "zenml-api-key", "password": api_key})
        except _Refused:
            return False
        return True

    def new_api_key(self) -> str:
        """A key of the service account, which is made if there is none; a key of the same name is replaced."""
        found = self._items("/service_accounts", name=ACCOUNT)
        account = (
            found[0]
            if found
            else self._post("/service_accounts", {"name": ACCOUNT, "full_name": ACCOUNT, "active": True})
        )
        keys = f"/service_accounts/{account['id']}/api_keys"
        for key in self._items(keys, name=ACCOUNT):
            self._call("DELETE", f"{keys}/{key['id']}")
        return str(self._post(keys, {"name": ACCOUNT})["body"]["key"])

    def keep_secret(self, name: str, values: Mapping[str, str]) -> bool:
        """Make a secret of ZenML have these values.

        Returns:
            Whether it had to be made or changed.
        """
        found = self._items("/secrets", name=name)
        if not found:
            self._post("/secrets", {"name": name, "values": dict(values)})
            return True
        path = f"/secrets/{found[0]['id']}"
        present = self._call("GET", path, params={"hydrate": True})["body"]["values"]
        if present == values:
            return False
        self._call("PUT", path, json={"values": dict.fromkeys(present) | dict(values)})
        return True

    def _log_in(self, form: Mapping[str, str]) -> None:
        self._headers = {}
        self._headers = {"Authorization": f"Bearer {self._call('POST', '/login', data=form)['access_token']}"}

    def _items(self, path: str, **filters: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call("GET", path, params=filters)["items"]
        return found

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = self._call("POST", path, json=body)
        return made

    def _call(self, method: str, path: str, **given: Any) -> Any:
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                answer = httpx.request(
                    method, f"{self._url}/api/v1{path}", headers=self._headers, timeout=_SECONDS, **given
                )
                break
            except httpx.HTTPError as error:
                if not isinstance(error, httpx.ConnectError) or time.monotonic() > until:
                    raise StackError(f"ZenML at {self._url} does not answer ({type(error).__name__})") from None
                time.sleep(0.5)
        if answer.status_code in (401, 403):
            raise _Refused(f"ZenML at {self._url} refuses {method} {path} ({answer.status_code})")
        if answer.is_error:
            raise StackError(f"ZenML at {self._url}: {method} {path} failed with {answer.status_code}")
        return answer.json() if answer.content else None


class _Refused(StackError):
    """Not logged in, or not allowed."""


class S3:
    """An object store."""

    def __init__(self, url: str, keys: Keys) -> None:
        self._url = url.rstrip("/")
        self._keys = keys
        self._client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name=REGION,
            aws_access_key_id=keys.access,
            aws_secret_access_key=keys.secret,
            config=Config(connect_timeout=5, read_timeout=_SECONDS, s3={"addressing_style": "path"}),
        )

    def keep_bucket(self, name: str) -> bool:
        """Make a bucket if there is none.

        Returns:
            Whether it was made.

        Raises:
            StackError: the store refuses, or does not answer.
        """
        try:
            self._client.head_bucket(Bucket=name)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                raise self._failure(f"bucket {name}", error) from None
        except BotoCoreError as error:
            raise self._failure(f"bucket {name}", error) from None
        else:
            return False
        try:
            self._client.create_bucket(Bucket=name)
        except (ClientError, BotoCoreError) as error:
            raise self._failure(f"bucket {name}", error) from None
        return True

    def keep_account(self, keys: Keys) -> None:
        """Make an account of versitygw with these keys and no rights of its own.

        Raises:
            StackError: the store refuses, or does not answer.
        """
        account = f"<Access>{escape(keys.access)}</Access><Secret>{escape(keys.secret)}</Secret><Role>user</Role>"
        if self._administer("create-user", f"<Account>{account}</Account>") == 409:
            change = f"<MutableProps><Secret>{escape(keys.secret)}</Secret></MutableProps>"
            self._administer(f"update-user?access={keys.access}", change)

    def allow(self, bucket: str, accounts: list[str]) -> None:
        """Let these accounts, and no others, read and write a bucket.

        Raises:
            StackError: the store refuses, or does not answer.
        """
        statement = {
            "Effect": "Allow",
            "Principal": {"AWS": accounts},
            "Action": ["s3:GetBucketLocation", "s3:ListBucket", "s3:ListBucketMultipartUploads"],
            "Resource": [f"arn:aws:s3:::{bucket}"],
        }
        objects = {
            "Effect": "Allow",
            "Principal": {"AWS": accounts},
            "Action": [
                "s3:GetObject",
                "s3:PutObject",
                "s3:DeleteObject",
                "s3:AbortMultipartUpload",
                "s3:ListMultipartUploadParts",
            ],
            "Resource": [f"arn:aws:s3:::{bucket}/*"],
        }
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement, objects]})
        try:
            self._client.put_bucket_policy(Bucket=bucket, Policy=policy)
        except (ClientError, BotoCoreError) as error:
            raise self._failure(f"the policy of bucket {bucket}", error) from None

    def _administer(self, what: str, body: str) -> int:
        request = AWSRequest("PATCH", f"{self._url}/{what}", data=body.encode())
        S3SigV4Auth(Credentials(self._keys.access, self._keys.secret), "s3", REGION).add_auth(request)
        try:
            answer = httpx.request(
                "PATCH", request.url, content=body.encode(), headers=dict(request.headers), timeout=_SECONDS
            )
        except httpx.HTTPError as error:
            raise self._failure("accounts", error) from None
        if answer.is_error and answer.status_code != 409:
            raise StackError(f"S3 store {self._url}: {what.partition('?')[0]} failed with {answer.status_code}")
        return answer.status_code

    def _failure(self, what: str, error: Exception) -> StackError:
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else type(error).__name__
        return StackError(f"S3 store {self._url}: {what} failed ({code})")
