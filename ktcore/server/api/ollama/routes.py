"""Routes of the Ollama API: generate, chat, and what models there are."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from ktcore.dialects.base import Call
from ktcore.dialects.dialect import Part, dialect_of
from ktcore.engine import service as engine
from ktcore.engine.output import Output
from ktcore.engine.schedule.sequence import Finish
from ktcore.engine.stream import Stats
from ktcore.errors import FieldError
from ktcore.server.api.body import read
from ktcore.server.api.chat import Chat, Prompt, prompt_of, structure_of
from ktcore.server.api.logprobs import ollama_logprobs as logprobs
from ktcore.server.api.ollama.schemas import GenerateAsk, KeptAsk, OllamaAsk, OllamaChatAsk, Options, ShowAsk
from ktcore.server.api.sampling import params_for
from ktcore.server.http.errors import dumps, json_response, problem_of
from ktcore.server.models.answers import Answers
from ktcore.server.models.registry import Entry, Models
from ktcore.server.models.served import Served

LATEST = ":latest"
OLLAMA = "0.12.11"
"""The version of Ollama whose API this is, logprobs being its latest part; clients refuse servers below theirs."""


class Clock:
    """Times of one request, from when it came; in nanoseconds.

    Attributes:
        load_ns: until its model was there.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter_ns()
        self.load_ns = 0

    def now_ns(self) -> int:
        """Since it came."""
        return time.perf_counter_ns() - self._began

    def loaded(self) -> None:
        """Its model is there."""
        self.load_ns = self.now_ns()


def ollama_routes(models: Models) -> APIRouter:
    """The routes over a server's models."""
    routes = APIRouter(prefix="/api", tags=["Ollama"])

    @routes.get("/version")
    async def version() -> Response:
        return json_response({"version": OLLAMA})

    @routes.get("/tags")
    async def tags() -> Response:
        return json_response({"models": [_card(entry) for entry in models.entries.values()]})

    @routes.get("/ps")
    async def running() -> Response:
        return json_response({"models": [_loaded(entry) for entry in models.loaded]})

    @routes.post("/show")
    async def show(http: Request) -> Response:
        ask = await read(http, ShowAsk)
        entry = models.entry((ask.model or ask.name).removesuffix(LATEST))
        card = _card(entry)
        template = await asyncio.to_thread(entry.template)
        return json_response(
            {
                "modified_at": card["modified_at"],
                "details": card["details"],
                "template": template or "",
                "model_info": _info(entry),
                "capabilities": _capabilities(template),
            }
        )

    @routes.post("/generate")
    async def generate(http: Request) -> Response:
        clock = Clock()
        ask = await read(http, GenerateAsk)
        served = await served_of(models, ask, http)
        clock.loaded()
        if not ask.prompt:
            return json_response({**_base(ask), "response": "", "done": True, "done_reason": ask.emptied})
        system = [{"role": "system", "content": ask.system}] if ask.system else []
        messages = [*system, {"role": "user", "content": ask.prompt}]
        plain = ask.raw or (served.model.tokenizer.chat_template is None and not system)
        made = _plain if plain else _prompt
        prompt = await asyncio.to_thread(made, served, ask, messages)
        return await _answer(served, ask, prompt, http, clock, chat=False)

    @routes.post("/chat")
    async def chat(http: Request) -> Response:
        clock = Clock()
        ask = await read(http, OllamaChatAsk)
        served = await served_of(models, ask, http)
        clock.loaded()
        if not ask.messages:
            return json_response({**_base(ask), **_said(True, ""), "done": True, "done_reason": ask.emptied})
        tools = [tool.plain for tool in ask.tools or ()]
        prompt = await asyncio.to_thread(_prompt, served, ask, [m.plain for m in ask.messages], tools)
        return await _answer(served, ask, prompt, http, clock, chat=True)

    return routes


async def served_of(models: Models, ask: KeptAsk, http: Request) -> Served:
    """The model that a request names, kept loaded for as long as it says."""
    name = ask.model.removesuffix(LATEST)
    served = await models.of(name, http)
    if ask.keep_alive is not None:
        models.keep(name, ask.kept_s)
    return served


def _plain(served: Served, ask: OllamaAsk, messages: list[dict[str, Any]]) -> Prompt:
    """The last message as it is, without a template."""
    model = served.model
    ids = model.tokenizer.encode(messages[-1]["content"])
    return Prompt(ids, model.tokenizer, structure=structure_of(model, ask.form))


def _prompt(
    served: Served, ask: OllamaAsk, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()
) -> Prompt:
    prompt = prompt_of(served.model, Chat(messages, tools, form=ask.form, variables=ask.variables))
    if ask.think and not prompt.dialect.thinks:
        raise FieldError("think", "the model's chat template knows no thoughts")
    return prompt


async def _answer(served: Served, ask: OllamaAsk, prompt: Prompt, http: Request, clock: Clock, chat: bool) -> Response:
    o = ask.options or Options.model_validate({})
    params = params_for(
        served.model.plan.graph.vocab,
        temperature=o.temperature,
        top_p=o.top_p,
        top_k=o.top_k,
        min_p=o.min_p,
        typical_p=o.typical_p,
        repetition_penalty=o.repeat_penalty,
        presence_penalty=o.presence_penalty,
        frequency_penalty=o.frequency_penalty,
        seed=o.seed,
    )
    longest = served.settings.default_tokens if o.num_predict is None else o.num_predict
    if longest < 0:
        longest = served.model.context
    timeout = served.settings.timeout(None)
    output = Output(logprobs=ask.top, structure=prompt.structure, shown=prompt.shown)
    request = engine.Request(prompt.ids, params, longest, o.stops, timeout, output)
    answers = served.answers([request], http, [prompt.reader()])
    if ask.stream:
        return StreamingResponse(_lines(served, answers, ask, clock, chat), media_type="application/x-ndjson")
    (answer,) = await answers.whole()
    told = logprobs(served.model.tokenizer, answer.chosen)
    said = _said(chat, answer.content, answer.reasoning, answer.calls)
    return json_response({**_base(ask), **said, **told, **_end(answer.finish, answer.stats, clock)})


async def _lines(served: Served, answers: Answers, ask: OllamaAsk, clock: Clock, chat: bool) -> AsyncIterator[str]:
    try:
        async for _, delta, part in answers:
            if part != Part() or delta.chosen:
                told = logprobs(served.model.tokenizer, delta.chosen)
                said = _said(chat, part.content, part.reasoning, part.calls)
                yield dumps({**_base(ask), **said, **told, "done": False}) + "\n"
            if delta.finish is not None:
                yield dumps({**_base(ask), **_said(chat, ""), **_end(delta.finish, delta.stats, clock)}) + "\n"
    except Exception as error:  # the status is sent already, so the stream itself must tell
        yield dumps({"error": problem_of(error).message}) + "\n"
    finally:
        answers.close()


def _base(ask: OllamaAsk) -> dict[str, Any]:
    return {"model": ask.model, "created_at": _iso(datetime.now(timezone.utc))}


def _said(chat: bool, text: str, reasoning: str = "", calls: Sequence[Call] = ()) -> dict[str, Any]:
    thinking = {"thinking": reasoning} if reasoning else {}
    if not chat:
        return {"response": text, **thinking}
    told = [(call, _object(call.arguments)) for call in calls]
    made = [{"function": {"name": call.name, "arguments": given}} for call, given in told if given is not None]
    # Ollama's clients take objects alone: a call that has none is told as text, rather than made with other arguments
    text += "".join(f"\n{call.name}({call.arguments})" for call, given in told if given is None)
    return {"message": {"role": "assistant", "content": text, **thinking, **({"tool_calls": made} if made else {})}}


def _object(arguments: str) -> dict[str, Any] | None:
    """Arguments as Ollama's clients take them; None where the model has written no object."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _end(finish: Finish, stats: Stats, clock: Clock) -> dict[str, Any]:
    """The last piece's figures; durations are in nanoseconds."""
    return {
        "done": True,
        "done_reason": "length" if finish is Finish.LENGTH else "stop",
        "total_duration": clock.now_ns(),
        "load_duration": clock.load_ns,
        "prompt_eval_count": stats.prompt_tokens,
        "prompt_eval_duration": round(stats.prefill_s * 1e9),
        "eval_count": stats.new_tokens,
        "eval_duration": round(stats.decode_s * 1e9),
    }


def _card(entry: Entry) -> dict[str, Any]:
    facts = entry.facts
    return {
        "name": entry.name,
        "model": entry.name,
        "modified_at": _iso(facts.changed),
        "size": facts.size,
        "details": {"format": facts.format, "family": facts.family, "families": [facts.family]},
    }


def _info(entry: Entry) -> dict[str, Any]:
    """What clients look up under the names of GGUF's metadata."""
    family = entry.facts.family
    context = entry.facts.context if entry.served is None else entry.served.model.context
    return {
        "general.architecture": family,
        **({} if context is None else {f"{family}.context_length": context}),
    }


def _loaded(entry: Entry) -> dict[str, Any]:
    context = {} if entry.served is None else {"context_length": entry.served.model.context}
    expires = {} if entry.expires is None else {"expires_at": _iso(entry.expires)}
    return {**_card(entry), **context, **expires}


def _capabilities(template: str | None) -> list[str]:
    dialect = dialect_of(template)
    tools = ["tools"] if dialect.tools is not None else []
    return ["completion", *tools, *(["thinking"] if dialect.thinks else [])]


def _iso(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
