"""The routes for responses that are kept, and for those that are made in the background."""

from __future__ import annotations

from aiohttp import web

from backends.requests import check_supported, invalid, refuse
from backends.server.answering import CAPTURES, KEEP_ALIVE_S, POLICY, read_body, token_form
from backends.server.errors import json_response
from backends.server.state.background import BackgroundLimits, BackgroundRuns
from backends.server.state.following import follow
from backends.server.state.history import StoredHistory
from backends.server.state.keys import RUNS, STORE
from backends.server.state.listing import Page, input_items
from backends.server.state.memory import MemoryStore
from backends.server.state.stored import ResponseStore, StoredResponse, failed, is_whole
from gym_sdk.errors import PolicyError
from gym_sdk.schema import Response, ResponseRequest

__all__ = ["add_state_routes"]

_MAX_PAGE = 100


def add_state_routes(
    app: web.Application, *, store: ResponseStore | None = None, background: BackgroundLimits | None = None
) -> None:
    """Add the routes to an application that has a policy and captures.

    Args:
        app: ends what runs in the background when it shuts down, and then closes the store.
        store: keeps responses; by default they are kept in memory.
        background: how much may run in the background.
    """
    app[STORE] = MemoryStore() if store is None else store
    app[RUNS] = BackgroundRuns(app[STORE], background)
    app.on_shutdown.append(_end_runs)
    app.on_cleanup.append(_close_store)
    for root in ("/v1", "/rollouts/{rollout_id}/v1"):
        app.router.add_post(f"{root}/responses/input_tokens", _count_input_tokens)
        app.router.add_get(f"{root}/responses/{{response_id}}", _retrieve, allow_head=False)
        app.router.add_delete(f"{root}/responses/{{response_id}}", _delete)
        app.router.add_get(f"{root}/responses/{{response_id}}/input_items", _list_input, allow_head=False)
        app.router.add_post(f"{root}/responses/{{response_id}}/cancel", _cancel)


async def _end_runs(app: web.Application) -> None:
    await app[RUNS].aclose()


async def _close_store(app: web.Application) -> None:
    await app[STORE].aclose()


async def _retrieve(http: web.Request) -> web.StreamResponse:
    query = _query(http, "include", "stream", "starting_after", "include_obfuscation")
    if _flag(query, "include_obfuscation"):
        raise refuse("include_obfuscation", "streams are not obfuscated here")
    if _flag(query, "stream"):
        return await _follow(http, query)
    if "starting_after" in query:
        raise invalid("starting_after", "is for streams; ask with `stream=true`")
    form = token_form(http)
    response = await _newest(http)
    return json_response(response.in_form(form))


async def _follow(http: web.Request, query: dict[str, str]) -> web.StreamResponse:
    starting_after = _number(query, "starting_after", -1, least=0)
    response_id, scope = _asked(http)
    run = http.app[RUNS].get(response_id, scope)
    if run is None or not run.streamed:
        await _kept(http)
        raise PolicyError(
            f"the response {response_id!r} cannot be streamed: it was not asked for with `background` and "
            "`stream`, or finished so long ago that its events are gone; ask without `stream`",
            code="invalid_value",
            param="stream",
        )
    return await follow(http, run, starting_after=starting_after, keep_alive_s=http.app[KEEP_ALIVE_S])


async def _delete(http: web.Request) -> web.Response:
    _query(http)
    response_id, scope = _asked(http)
    await http.app[RUNS].cancel(response_id, scope)
    if not await http.app[STORE].delete(response_id, scope):
        raise _not_found(response_id)
    http.app[RUNS].forget(response_id, scope)
    http.app[POLICY].forget(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def _list_input(http: web.Request) -> web.Response:
    query = _query(http, "include", "limit", "order", "after", "before")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid("order", f"must be `asc` or `desc`, not {order!r}")
    limit = _number(query, "limit", 20, least=1, most=_MAX_PAGE)
    page = Page(limit, "asc" if order == "asc" else "desc", query.get("after"), query.get("before"))
    response_id, scope = _asked(http)
    chain = await http.app[STORE].chain(response_id, scope)
    if chain is None:
        raise _not_found(response_id)
    if not is_whole(chain):
        raise PolicyError(
            f"the input of the response {response_id!r} is not all here: it goes back to "
            f"{chain[0].response.previous_response_id!r}, which was not stored",
            status=404,
            code="not_found",
            param="response_id",
        )
    return json_response(page.of(await input_items(chain, StoredHistory(http.app[STORE], scope))))


async def _cancel(http: web.Request) -> web.Response:
    form = token_form(http)
    response_id, scope = _asked(http)
    if not (await _newest(http)).background:
        raise PolicyError(
            f"the response {response_id!r} cannot be cancelled: it was not asked for with `background`; one "
            "that is answered directly ends when its client disconnects",
            code="invalid_value",
            param="response_id",
        )
    await http.app[RUNS].cancel(response_id, scope)
    return json_response((await _newest(http)).in_form(form))


async def _count_input_tokens(http: web.Request) -> web.Response:
    scope = _scope(http)
    request = ResponseRequest.model_validate(await read_body(http))
    history = StoredHistory(http.app[STORE], scope)
    count = await http.app[POLICY].count_input_tokens(request, scope=scope, history=history)
    return json_response({"object": "response.input_tokens", "input_tokens": count})


async def _newest(http: web.Request) -> Response:
    """Return a response as it is now.

    Raises:
        PolicyError: it is not here (404).
    """
    run = http.app[RUNS].get(*_asked(http))
    if run is not None:
        return run.response
    stored = await _kept(http)
    if stored.is_finished:
        return stored.response
    return failed(stored.response, "the server stopped before this was done")


async def _kept(http: web.Request) -> StoredResponse:
    response_id, scope = _asked(http)
    stored = await http.app[STORE].get(response_id, scope)
    if stored is None:
        raise _not_found(response_id)
    return stored


def _not_found(response_id: str) -> PolicyError:
    return PolicyError(
        f"Response with id '{response_id}' not found.", status=404, code="not_found", param="response_id"
    )


def _asked(http: web.Request) -> tuple[str, str]:
    """Return the response that a request names, and the rollout in which it does."""
    return http.match_info["response_id"], _scope(http)


def _scope(http: web.Request) -> str:
    rollout_id = http.match_info.get("rollout_id")
    if rollout_id is None:
        return ""
    return http.app[CAPTURES].get(rollout_id).id


def _query(http: web.Request, *known: str) -> dict[str, str]:
    """Read the query; `include` is checked, and changes nothing: a response has what it was asked for.

    Raises:
        PolicyError: a parameter is not known, stands there twice, or `include` names what there is not.
    """
    included: list[str] = []
    values: dict[str, str] = {}
    for key, value in http.query.items():
        name = key.removesuffix("[]")
        if name not in known or name in values:
            raise refuse(
                key, f"the query parameter {key!r} is {'doubled' if name in values else 'not known'} here"
            )
        if name == "include":
            included.append(value)
        else:
            values[name] = value
    check_supported(ResponseRequest(include=included))
    return values


def _flag(query: dict[str, str], name: str) -> bool:
    value = query.get(name, "false").lower()
    if value not in ("true", "false"):
        raise invalid(name, f"must be `true` or `false`, not {value!r}")
    return value == "true"


def _number(query: dict[str, str], name: str, default: int, *, least: int, most: int = 2**31) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and least <= int(text) <= most):
        raise invalid(name, f"must be a whole number of {least} to {most}, not {text!r}")
    return int(text)
