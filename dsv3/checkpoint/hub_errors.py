"""Errors of the Hugging Face hub, the network and the cache's disk, each as one line."""

import errno
import ssl
from collections.abc import Iterator
from pathlib import Path

from dsv3.checkpoint.hub_cache import HubName
from dsv3.errors import CheckpointError, one_line

# Type names of the HTTP library's errors; the library depends on the version of huggingface_hub.
_UNREACHABLE = {"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "ConnectionError"}
_CUT = {"ReadError", "WriteError", "RemoteProtocolError", "ConnectionResetError", "ReadTimeout"}
_TRANSIENT = {408, 429, 500, 502, 503, 504}  # HTTP statuses
_UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"


def hub_error(name: HubName, cache: Path, error: Exception) -> CheckpointError:
    """Return a CheckpointError for an error that was raised while fetching a checkpoint."""
    if isinstance(error, CheckpointError):
        return error
    return CheckpointError(f"{name}: {hub_reason(name, cache, error)}")


def hub_reason(name: HubName, cache: Path, error: Exception) -> str:
    """Return the reason of an error in words.

    Args:
        name: the checkpoint's name on the hub.
        cache: the directory that it is downloaded to.
        error: an error of huggingface_hub, the HTTP library or the system.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    causes = list(_causes(error))
    hub = constants.ENDPOINT
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            return _of_answer(name, hub, cause)
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so the hub is not asked"
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError) or _UNTRUSTED in str(cause):
            return (
                f"the certificate of {hub} cannot be verified; if a proxy signs for it, set "
                "SSL_CERT_FILE to the proxy's certificates"
            )
    for cause in causes:  # the outermost has most information
        types = _types(cause)
        if types & _UNREACHABLE:
            return f"the hub ({hub}) cannot be reached: {_text(causes[-1])}"
        if types & _CUT:
            reason = _text(cause)
            return f"the connection to {hub} was cut ({reason}); run it again to resume"
        if isinstance(cause, OSError) and cause.errno:
            return _of_disk(cache, cause)
    return f"{hub} does not answer as a hub does ({type(error).__name__}: {_text(error)})"


def is_transient(error: Exception) -> bool:
    """Return True for a failure of the network or of a server that a retry may not hit."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT
    return bool(_types(error) & (_UNREACHABLE | _CUT)) and not isinstance(
        error, OfflineModeIsEnabled
    )


def _of_answer(name: HubName, hub: str, error: Exception) -> str:
    """Return the reason for an HTTP error response of the hub."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    assert isinstance(error, HfHubHTTPError)
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return (
            f"its owner asks to accept a licence first: do so on {hub}/{name.repository}, then set "
            "HF_TOKEN to a token of your account"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{hub}/{name.repository} has no revision {name.revision}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{hub} has no repository of this name; if it is a private one, set HF_TOKEN to a "
            "token that may read it"
        )
    if status in (401, 403):
        return f"{hub} refuses access ({status}); set HF_TOKEN to a token that may read it"
    if status == 404:
        return f"{hub} has nothing of this name ({error.response.url})"
    return f"{hub} answers with status {status}; try again later"


def _of_disk(cache: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {cache} is full; free some space, then run it again to resume"
    path = error.filename or cache
    reason = error.strerror
    return f"{path}: cannot be written: {reason}; set HF_HOME to a directory that can be"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, and so on."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _types(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _text(error: BaseException) -> str:
    return one_line(str(error).strip().split("\n")[0]) or type(error).__name__
