"""Outputs between the engine's thread and the clients' connections.

An `Answer` belongs to the event loop's thread. Unread outputs are joined, so that a slow connection
gets fewer and longer pieces, and a client that reads nothing costs no more memory than its tokens.
"""

import asyncio
from collections.abc import Iterable

from dsv3.request import RequestOutput

MAX_UNREAD_TOKENS = 8192  # of each of its completions


class HttpError(Exception):
    """An error response to a request.

    Attributes:
        message: in one line.
        status: of the response.
        code: OpenAI's `code`.
        retry_after: seconds after which the client may try again.
    """

    def __init__(
        self, message: str, status: int, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.retry_after = retry_after


class Answer:
    """The outputs of one HTTP request's answers.

    Attributes:
        unfinished: ids of the requests that have not got their last output.
    """

    def __init__(self, request_ids: Iterable[str]) -> None:
        self.unfinished = set(request_ids)
        self._unread: dict[str, RequestOutput] = {}
        self._failure: HttpError | None = None
        self._changed = asyncio.Event()

    def push(self, item: RequestOutput | HttpError) -> None:
        """Add an output, or the failure of all requests."""
        if isinstance(item, HttpError):
            self._failure = self._failure or item
            self.unfinished.clear()
        else:
            unread = self._unread.get(item.request_id)
            if unread is None:
                self._unread[item.request_id] = item
            else:
                _join(unread, item)
            if item.completion is not None:
                self.unfinished.discard(item.request_id)
        self._changed.set()

    def num_unread(self, request_id: str) -> int:
        """Return the number of a request's tokens that the connection has not taken."""
        output = self._unread.get(request_id)
        return 0 if output is None else len(output.new_token_ids)

    async def read(self, seconds: float | None = None) -> list[RequestOutput]:
        """Return new outputs; an empty list if none arrive within `seconds`.

        Raises:
            HttpError: the requests have failed.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return []
        self._changed.clear()
        outputs = list(self._unread.values())
        self._unread.clear()
        if self._failure is not None and not outputs:
            raise self._failure
        if self._failure is not None:
            self._changed.set()  # for the next call
        return outputs


def _join(earlier: RequestOutput, later: RequestOutput) -> None:
    """Add an output to an earlier one of the same request."""
    earlier.new_token_ids += later.new_token_ids
    earlier.new_text += later.new_text
    earlier.new_logprobs += later.new_logprobs
    earlier.completion = later.completion
