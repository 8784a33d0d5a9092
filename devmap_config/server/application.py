"""The server: OpenAI's paths, with answers, errors and streams in its format."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from threading import Timer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from devmap_config.files import REQUEST
from devmap_config.server.requests import MOST_CONNECTIONS, ChatCompletion, Completion, RequestError, asked

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from devmap_config.server.generation import Text, Writer
    from devmap_config.server.requests import GenerationRequest

GRACE_SECONDS = 30
"""The seconds in which requests must finish once the server is told to stop, and in which a body must arrive."""

POLL_SECONDS = 0.25
"""The seconds between checks whether a client that waits for a whole answer is still connected."""


@dataclass(frozen=True)
class Answer:
    """The answer to a request, in OpenAI's format."""

    text: Text
    asked: GenerationRequest
    tell: Callable[[RequestError], None]
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        """True if it answers a chat."""
        return isinstance(self.asked, ChatCompletion)

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer, once it is generated."""
        content = "".join([piece async for piece in self.text.pieces()])
        choice = {"message": {"role": "assistant", "content": content}} if self.is_chat else {"text": content}
        return self._told([self._choice(choice, self.text.finish_reason)], usage=self._usage())

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events, piece by piece."""
        options = self.asked.stream_options
        usage = {"usage": None} if options.include_usage else {}
        if self.is_chat:
            yield self._event([self._choice({"delta": {"role": "assistant", "content": ""}})], **usage)
        try:
            async for piece in self.text.pieces():
                part = {"delta": {"content": piece}} if self.is_chat else {"text": piece}
                yield self._event([self._choice(part)], **usage)
        except RequestError as error:
            self.tell(error)
            yield _event(error.to_json())
            return
        told: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
        yield self._event([self._choice(told, self.text.finish_reason)], **usage)
        if options.include_usage:
            yield self._event([], usage=self._usage())
        yield "data: [DONE]\n\n"

    def _choice(self, told: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": 0, **told, "logprobs": None, "finish_reason": finish_reason}

    def _usage(self) -> dict[str, int]:
        prompt, written = self.text.prompt_tokens, self.text.tokens
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _told(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        kind, prefix = ("chat.completion", "chatcmpl-") if self.is_chat else ("text_completion", "cmpl-")
        kind += ".chunk" if self.is_chat and self.asked.stream else ""
        head = {"id": prefix + self.id, "object": kind, "created": self.created, "model": self.asked.model}
        return {**head, "choices": choices, **more}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return _event(self._told(choices, **more))


def _event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


@dataclass(frozen=True)
class _EventStream:
    """A response of events that stops the text when it ends, because its client may have disconnected."""

    answer: Answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"Cache-Control": "no-store"}
        response = StreamingResponse(self.answer.events(), headers=headers, media_type="text/event-stream")
        try:
            await response(scope, receive, send)
        finally:
            self.answer.text.discard()


@dataclass(frozen=True, kw_only=True)
class Service:
    """Answers requests for one model.

    Attributes:
        model: its name.
        writer: generates the texts.
        is_local: whether only this machine reaches the server, so that requests by other host names are refused.
        tell: called with the errors of the model.
        created: the time of loading, in seconds since 1970.
    """

    model: str
    writer: Writer
    is_local: bool
    tell: Callable[[str], None]
    created: int = field(default_factory=lambda: int(time.time()))

    def application(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._one_model),
            Route("/v1/completions", partial(self._write, Completion), methods=["POST"]),
            Route("/v1/chat/completions", partial(self._write, ChatCompletion), methods=["POST"]),
        ]
        handlers = {RequestError: self._refused, HTTPException: self._refused, ClientDisconnect: _nobody}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": self.writer.waiting})

    async def _models(self, request: Request) -> Response:
        self._require_local(request)
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def _one_model(self, request: Request) -> Response:
        self._require_local(request)
        self._require_model(request.path_params["model"])
        return JSONResponse(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self.created, "owned_by": "devmap"}

    async def _write(self, kind: type[GenerationRequest], request: Request) -> Response | _EventStream:
        self._require_local(request)
        try:
            body = await asyncio.wait_for(_body(request), GRACE_SECONDS)
        except asyncio.TimeoutError:
            raise RequestError(f"the body did not come within {GRACE_SECONDS} s", status=408) from None
        parsed = asked(kind, body)
        self._require_model(parsed.model)
        answer = Answer(await self.writer.begin(parsed), parsed, self._tell)
        return _EventStream(answer) if parsed.stream else JSONResponse(await _whole(answer, request))

    def _require_model(self, name: str) -> None:
        if name != self.model:
            raise RequestError(
                f"there is no model `{name}` here, but `{self.model}`",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _require_local(self, request: Request) -> None:
        """Refuse requests from pages in a browser: with another host name for this machine, or as the text of a
        form.
        """
        if self.is_local and not _names_this_machine(request.headers.get("host", "")):
            raise RequestError("the server answers only this machine, by its own names", status=403)

    async def _refused(self, _request: Request, error: Any) -> Response:
        if isinstance(error, HTTPException):  # starlette's own: an unknown path or method
            error = RequestError(error.detail, status=error.status_code, headers=error.headers)
        self._tell(error)
        return JSONResponse(error.to_json(), error.status, error.headers)

    def _tell(self, error: RequestError) -> None:
        if error.status == 500:
            self.tell(str(error))


def _names_this_machine(host: str) -> bool:
    with suppress(ValueError):
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    return False


def _nobody(*_arguments: Any) -> Response:
    """Return the response for a client that has disconnected."""
    return Response(status_code=499)


async def _body(request: Request) -> bytes:
    """Return a request's body.

    Raises:
        RequestError: if it is not JSON, by its header, or too large.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("the body must be `application/json`", status=415)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > REQUEST.max_bytes:
            raise RequestError(f"the body is larger than {REQUEST.max_bytes:,} bytes", status=413)
    return bytes(body)


async def _whole(answer: Answer, request: Request) -> dict[str, Any]:
    """Return an answer once it is generated, unless the client disconnects before."""
    writing = asyncio.ensure_future(answer.whole())
    try:
        while not (await asyncio.wait({writing}, timeout=POLL_SECONDS))[0]:
            if await request.is_disconnected():
                raise ClientDisconnect
        return writing.result()
    finally:
        writing.cancel()
        answer.text.discard()


def listen(service: Service, listener: socket.socket) -> None:
    """Serve at a socket until the process is told to end, and then finish the requests that have begun."""
    config = uvicorn.Config(
        service.application(),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS + 5,  # for connections whose client does not read
    )
    server = uvicorn.Server(config)
    begin_to_end, timer = server.handle_exit, Timer(GRACE_SECONDS, service.writer.cut)

    def stop(number: int, frame: Any) -> None:
        if server.should_exit:  # a second signal
            service.writer.cut()
        else:
            begin_to_end(number, frame)
            timer.start()

    server.handle_exit = stop
    # uvicorn raises the signal again once it has stopped, which must not change the exit code.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    server.run([listener])
    timer.cancel()
    for number, handler in before.items():
        signal.signal(number, handler)
    service.writer.close()
