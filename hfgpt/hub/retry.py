"""Asking the Hub again where huggingface_hub does not, for as long as it makes sense, and saying in one line why not.

huggingface_hub (2.4) tries uploads of large files and the questions before them six times, a commit, a new repository
or a branch once, and waits for an answer for ever.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

TRIES = 5
FIRST_WAIT_SECONDS = 1.0
"""Before the second try; it doubles from one try to the next."""
LONGEST_WAIT_SECONDS = 300.0
PASSING = (408, 429, 500, 502, 503, 504)


Log = Callable[[str], None]


class HubError(OSError):
    """The Hub does not do what it should, and waiting did not help."""


def with_retries(
    call: Callable[[], Any], log: Log, is_final: Callable[[BaseException], bool] = lambda error: False
) -> Any:
    """Call, and call again while what fails is likely to pass; at most `TRIES` times.

    Args:
        call: must be safe to be called twice.
        log: called with a line on every failure.
        is_final: failures that are not to be tried again.
    """

    def wait(state: RetryCallState) -> float:
        asked = seconds_asked_for(failure(state))
        usual = FIRST_WAIT_SECONDS * 2 ** (state.attempt_number - 1)
        return min(usual if asked is None else asked, LONGEST_WAIT_SECONDS)

    def tell(state: RetryCallState) -> None:
        seconds = state.next_action.sleep if state.next_action else 0.0
        log(f"{reason(failure(state))}; trying again in {seconds:.0f} s ({state.attempt_number} of {TRIES - 1})")

    return Retrying(
        stop=stop_after_attempt(TRIES),
        wait=wait,
        retry=retry_if_exception(lambda error: is_transient(error) and not is_final(error)),
        before_sleep=tell,
        reraise=True,
    )(call)


def failure(state: RetryCallState) -> BaseException:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    return error


def origin_of(error: BaseException) -> BaseException:
    """The error of HTTP behind an error, or the error itself."""
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, httpx2.HTTPError):
            return one
        one = one.__cause__
    return error


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a little later."""
    origin = origin_of(error)
    if isinstance(origin, HfHubHTTPError):
        return origin.response.status_code in PASSING
    if isinstance(origin, httpx2.TransportError):
        return True
    return isinstance(error, json.JSONDecodeError)  # a proxy's page instead of the Hub's answer


def was_retried_by_the_client(error: BaseException) -> bool:
    """Whether huggingface_hub (2.4) has tried the failed request six times itself."""
    if isinstance(error, LocalEntryNotFoundError):  # asking for a file's checksum
        return True
    origin = origin_of(error)
    if isinstance(origin, HfHubHTTPError):
        request, is_retried = origin.response.request, origin.response.status_code in (408, 429)
    elif isinstance(origin, httpx2.TransportError):
        kinds = httpx2.ConnectError | httpx2.TimeoutException | httpx2.RemoteProtocolError
        request, is_retried = origin.request, isinstance(origin, kinds)
    else:
        return False
    if request.method == "GET" and not request.url.path.startswith("/api/"):  # a download
        return is_retried
    return request.method == "PUT" or re.search(r"/preupload/|\.git/info/lfs/", request.url.path) is not None


def seconds_asked_for(error: BaseException) -> float | None:
    """What the Hub says how long to wait, or None."""
    origin = origin_of(error)
    asked = origin.response.headers.get("Retry-After", "") if isinstance(origin, HfHubHTTPError) else ""
    return float(asked) if asked.isdigit() else None


def reason(error: BaseException) -> str:
    """What happened, in a few words and without addresses."""
    origin = origin_of(error)
    if isinstance(origin, HfHubHTTPError):
        return f"the Hub answered {origin.response.status_code}"
    if isinstance(origin, httpx2.TimeoutException):
        return "the Hub did not answer in time"
    if isinstance(origin, httpx2.TransportError):
        return "the connection to the Hub broke"
    return "the Hub answered nonsense"


@contextmanager
def one_line_errors(repo_id: str) -> Iterator[None]:
    """Say what the Hub's client explains in paragraphs in one line, and what to do.

    Raises:
        ValueError: for what the user can change.
        HubError: for what only waiting changes.
    """
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(f"{repo_id} is gated. Ask for access on its page on the Hub.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no repository {repo_id} on the Hub, or this token (`hf auth whoami`) may not see it."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no such revision. Name a branch, a tag or a commit.") from error
    except OfflineModeIsEnabled as error:
        if is_offline_mode():
            raise ValueError("HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it.") from error
        raise HubError(str(error)) from error
    except (httpx2.HTTPError, LocalEntryNotFoundError, RuntimeError, json.JSONDecodeError, ValueError) as error:
        origin = origin_of(error)
        if (
            isinstance(error, ValueError | RuntimeError)
            and origin is error
            and not isinstance(error, json.JSONDecodeError)
        ):
            raise
        status = origin.response.status_code if isinstance(origin, HfHubHTTPError) else None
        if status == 401:
            raise ValueError("the Hub does not know this token. Run `hf auth login`, or set HF_TOKEN.") from error
        if status == 403:
            raise ValueError(f"this token (`hf auth whoami`) may not write to {repo_id}. Take one that may.") from error
        if status is not None and status not in PASSING:
            told = origin.server_message if isinstance(origin, HfHubHTTPError) else None
            raise HubError(f"the Hub answered {status}: {' '.join(str(told).split())}") from error
        raise HubError(f"{reason(error)}, again and again. Try later; what arrived is not sent twice.") from error
