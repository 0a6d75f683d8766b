"""A request from its body to its last event: tickets to the worker, events back, rows freed when a client leaves."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from sva.serving.asking import Asking, Reader
from sva.serving.bank import BankFull, NoExpert, NoWeight
from sva.serving.bodies import Asked, ChatBody, CompletionBody, read
from sva.serving.config import ServerConfig
from sva.serving.errors import ApiError
from sva.serving.guard import ClientGone
from sva.serving.replies import Reply
from sva.serving.tickets import Event, Failed, Piece
from sva.serving.token_text import TokenText
from sva.serving.worker import Busy, Draining, Worker
from sva.utils.errors import UserError

_Result = TypeVar("_Result")


class Service:
    """The two kinds of completions over one worker."""

    def __init__(self, worker: Worker, reader: Reader, cfg: ServerConfig) -> None:
        self.worker, self._reader, self.cfg = worker, reader, cfg
        self._tokens = TokenText(worker.lm.tokenizer)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._complete(request, read(ChatBody, await request.body()))

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._complete(request, read(CompletionBody, await request.body()))

    async def _complete(self, request: Request, body: Asked) -> Response:
        exchange = _Exchange(self.worker)
        with api_errors():
            if isinstance(body, ChatBody):
                asking = await asyncio.to_thread(self._reader.chat, body, exchange.tell)
            else:
                assert isinstance(body, CompletionBody)
                asking = await asyncio.to_thread(self._reader.completion, body, exchange.tell)
            reply = Reply(
                asking, body.model, self.worker.lm.fingerprint, self._tokens, is_chat=isinstance(body, ChatBody)
            )
            if self.cfg.logs_prompts:
                request.state.log["prompts"] = [prompt.text or prompt.ids for prompt in asking.prompts]
            exchange.submit(asking)
        events = exchange.events(reply)
        try:
            first = await or_gone(anext(events), request.receive)
            if body.stream:
                usage = body.stream_options is not None and body.stream_options.include_usage
                return _Stream(self, request, exchange, reply, first, usage=usage)
            answer = await or_gone(self._whole(events, reply, first, request), request.receive)
        except BaseException:
            exchange.cancel()
            raise
        return JSONResponse(answer)

    async def _whole(self, events: Any, reply: Reply, first: tuple[int, Event], request: Request) -> dict[str, Any]:
        reply.add(*first)
        async for number, event in events:
            self.note(request, event, reply)
            reply.add(number, event)
        request.state.log.update(reply.log())
        return reply.whole()

    def note(self, request: Request, event: Event, reply: Reply) -> None:
        """Counts the time to the first token of a request."""
        if isinstance(event, Piece) and "first_token" not in request.state.log:
            seconds = time.monotonic() - reply.came
            request.state.log["first_token"] = round(seconds, 4)
            self.worker.metrics.first_token.observe(seconds)


class _Exchange:
    """The tickets of one request, and what the worker tells of them."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._asking: Asking | None = None

    def tell(self, number: int, event: Event) -> None:
        """Takes an event of prompt `number` from the worker's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, so that nobody waits
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

    def submit(self, asking: Asking) -> None:
        """Hands the tickets over."""
        self._asking = asking
        self._worker.submit(*asking.tickets)

    def cancel(self) -> None:
        """Gives up every ticket that is not finished; its rows are free at the next step."""
        for ticket in self._asking.tickets if self._asking else ():
            ticket.is_cancelled = True

    async def events(self, reply: Reply) -> AsyncIterator[tuple[int, Event]]:
        """(number of the prompt, event) until the reply is done; raises ApiError where a prompt fails."""
        while not reply.is_done:
            number, event = await self._queue.get()
            if isinstance(event, Failed):
                self.cancel()
                raise ApiError(event.status, event.message)
            yield number, event


async def or_gone(awaitable: Awaitable[_Result], receive: Receive) -> _Result:
    """The result, unless the client leaves first."""

    async def wait() -> _Result:
        return await awaitable

    work, gone = asyncio.ensure_future(wait()), asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        return work.result()
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Stream(Response):
    """Server-sent events: a chunk as soon as there is text."""

    def __init__(
        self,
        service: Service,
        request: Request,
        exchange: _Exchange,
        reply: Reply,
        first: tuple[int, Event],
        *,
        usage: bool,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._service, self._request, self._exchange, self._reply = service, request, exchange, reply
        self._first, self._usage = first, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream, and gives up the rows of a client that leaves."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await or_gone(self._send_all(send), receive)
        except ClientGone:
            pass
        finally:
            self._exchange.cancel()
            self._request.state.log.update(self._reply.log())

    async def _send_all(self, send: Send) -> None:
        reply = self._reply
        try:
            await self._send(send, reply.add(*self._first))
            async for number, event in self._exchange.events(reply):
                self._service.note(self._request, event, reply)
                await self._send(send, reply.add(number, event))
            if self._usage:
                await self._send(send, reply.last_chunk())
        except ApiError as error:
            await self._send(send, error.body)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _send(self, send: Send, chunk: dict[str, Any] | None) -> None:
        if chunk is not None:
            body = f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})


@contextlib.contextmanager
def api_errors() -> Iterator[None]:
    """Turns what the library and the worker raise into answers."""
    try:
        yield
    except Busy as error:
        raise ApiError(429, str(error), retry=error.seconds) from None
    except Draining:
        raise ApiError(503, "the server is shutting down; it finishes what runs", retry=5) from None
    except NoExpert as error:
        raise ApiError(404, str(error), code="model_not_found") from None
    except NoWeight as error:
        raise ApiError(404, str(error)) from None
    except BankFull as error:
        raise ApiError(409, str(error)) from None
    except UserError as error:
        raise ApiError(400, str(error)) from None
