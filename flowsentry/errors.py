"""Everything that FlowSentry raises on purpose.

FlowSentryError             shown to the user as one line, without a traceback
├── ConfigError             a command line or a configuration file says something impossible
├── SourceError             flows cannot be read: missing, empty, damaged or of an unknown layout
├── DownloadError           a published file could not be fetched whole
├── ValidationFailed        too many rows of a recording are bad
├── ProtocolError           a protocol cannot be carried out on these flows (one class, one family, ...)
├── NothingSelected         no candidate may ship
├── StoreError              a stored view, model, detector, bundle or stream is damaged or of another version
├── ServiceError            a service refuses a request, or does not answer
├── DeployError             a service could not be started, promoted or rolled back
├── GateFailed              a challenger may not become the champion
└── StackError              a stack is unknown, incomplete or not reachable
"""

from __future__ import annotations


class FlowSentryError(Exception):
    """A mistake or a state that the user can act on; the message names the place and the remedy."""


class ConfigError(FlowSentryError):
    """A command line or a configuration file says something impossible."""


class SourceError(FlowSentryError):
    """Flows cannot be read: missing, empty, damaged or of an unknown layout."""


class DownloadError(FlowSentryError):
    """A published file could not be fetched whole."""


class ValidationFailed(FlowSentryError):
    """Too many rows of a recording are bad."""


class ProtocolError(FlowSentryError):
    """A protocol cannot be carried out on these flows."""


class NothingSelected(FlowSentryError):
    """No candidate may ship."""


class StoreError(FlowSentryError):
    """A stored view, model, detector, bundle or stream is damaged or of another version."""


class ServiceError(FlowSentryError):
    """A service refuses a request, or does not answer."""


class DeployError(FlowSentryError):
    """A service could not be started, promoted or rolled back."""


class GateFailed(FlowSentryError):
    """A challenger may not become the champion."""


class StackError(FlowSentryError):
    """A stack is unknown, incomplete or not reachable."""
