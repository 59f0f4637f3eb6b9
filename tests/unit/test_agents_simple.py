"""The simple agent against a real endpoint and real tools: what it asks, when it stops, and what it hands on."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
import pytest
from aiohttp import web
from openai.types.responses import Response
from openai.types.responses.response_input_param import FunctionCallOutput
from pydantic import TypeAdapter

from gym_bus.agents.base import Context, Produced, Task, add_usage
from gym_bus.agents.example_multi_step import ExampleMultiStep
from gym_bus.agents.registry import AGENTS, TOOLBOXES
from gym_bus.agents.simple import SimpleAgent
from gym_bus.agents.tools import ToolError, call_tool, idempotency_key
from gym_bus.errors import DeadlineExceeded, FailureKind, ModelError, TaskError, ToolBudgetExceeded, UsageError
from gym_bus.messages import Call, RolloutId, Usage
from gym_bus.models.api import CallInfo, Reply, ResponseHead
from gym_bus.models.registry import Models
from gym_bus.models.serve import serve
from gym_bus.settings import ModelConfig, RetryConfig

Tool = Callable[..., Awaitable[Any]]

ROLLOUT = RolloutId("job", 3, 1)
USER = {"role": "user", "content": "1+1?"}
THOUGHT = {"type": "reasoning", "id": "rs", "summary": []}


def says(text: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "id": "msg", "role": "assistant", "status": "completed", "content": content}


def calls(name: str, call_id: str = "a", arguments: str = "{}") -> dict[str, Any]:
    return {"type": "function_call", "id": "fc", "call_id": call_id, "name": name, "arguments": arguments}


def output(text: str, call_id: str = "a") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def response(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    usage = {"input_tokens": 10, "output_tokens": 2, "total_tokens": 12}
    head = {"id": "r", "object": "response", "created_at": 1, "model": "m", "tools": [], "tool_choice": "auto"}
    return {**head, "parallel_tool_calls": True, "output": list(items), "usage": usage, **more}


class Box:
    """A toolbox of the test's own functions; the `box` fixture puts one in the registry."""

    tools: dict[str, Tool] = {}  # noqa: RUF012 -- the fixture gives every test its own
    made: list[Box] = []  # noqa: RUF012

    def __init__(self, row: Mapping[str, msgspec.Raw], rollout: RolloutId) -> None:
        self.row, self.rollout, self.closed = row, rollout, 0
        self.made.append(self)

    def names(self) -> tuple[str, ...]:
        return tuple(self.tools)

    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        return await self.tools[name](**arguments)

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> type[Box]:
    """The toolbox registered as `box`, empty."""
    fresh = type("Box", (Box,), {"tools": {}, "made": []})
    monkeypatch.setattr(sys.modules[__name__], "Fresh", fresh, raising=False)
    monkeypatch.setitem(TOOLBOXES._paths, "box", f"{__name__}:Fresh")
    return fresh


class Endpoint:
    """A Responses endpoint that gives its answers in turn, and remembers what it was asked."""

    def __init__(self, *answers: dict[str, Any] | int) -> None:
        self._answers = list(answers)
        self.bodies: list[dict[str, Any]] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.bodies.append(msgspec.json.decode(await request.read()))
        answer = self._answers[min(len(self.bodies), len(self._answers)) - 1]
        if isinstance(answer, int):
            return web.json_response({"error": {"message": "no such thing"}}, status=answer)
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    @property
    def inputs(self) -> list[Any]:
        return [body["input"] for body in self.bodies]


@asynccontextmanager
async def context_of(endpoint: Endpoint, limit_s: float = 60.0) -> AsyncIterator[Context]:
    """What a rollout may use when this endpoint is its model."""
    app = web.Application()
    app.router.add_post("/v1/responses", endpoint.answer)
    runner, port = await serve(app, "127.0.0.1", 0)
    retry = RetryConfig(server_error=0, timeout=0)
    models = Models({"m": ModelConfig(base_url=f"http://127.0.0.1:{port}/v1", retry=retry)})
    try:
        yield Context(models.get("m"), ROLLOUT, 1, limit_s, partial(models.client, "m"))
    finally:
        await models.close()
        await runner.cleanup()


def task(given: Any = "1+1?", **params: Any) -> Task:
    return Task(rollout=ROLLOUT, row={"id": msgspec.Raw(b"7")}, params={"input": given, **params})


async def run(endpoint: Endpoint, given: Any = "1+1?", **options: Any) -> tuple[dict[str, Any], Context]:
    """The final response, decoded, and the rollout's accounts."""
    async with context_of(endpoint) as context:
        produced: Produced = await asyncio.wait_for(SimpleAgent(**options).run(task(given), context), 60)
    return msgspec.json.decode(produced.response), context


async def test_an_answer_in_words_is_handed_on_as_it_came() -> None:
    endpoint = Endpoint(response(THOUGHT, says("2"), mine="kept"))

    async with context_of(endpoint) as context:
        produced = await SimpleAgent().run(task(temperature=0.5), context)

    assert produced.response == msgspec.json.encode(response(THOUGHT, says("2"), mine="kept"))
    assert produced.extra == {}
    assert endpoint.bodies == [{"input": "1+1?", "temperature": 0.5, "model": "m"}]
    assert (context.usage, context.timings.model_calls) == (
        Usage(input_tokens=10, output_tokens=2, total_tokens=12),
        1,
    )
    assert context.timings.model_s > 0 and context.timings.tools_s == 0


async def test_tools_are_run_until_the_model_answers_in_words(box: type[Box]) -> None:
    async def add(a: int, b: int) -> int:
        return a + b

    box.tools["add"] = add
    first, second, last = calls("add", "a", '{"a":1,"b":1}'), calls("add", "b", '{"a":2,"b":2}'), says("2 and 4")
    endpoint = Endpoint(response(THOUGHT, first), response(says("And"), second), response(last, id="last"))

    final, context = await run(endpoint, toolbox="box")

    produced = [THOUGHT, first, output("2", "a"), says("And"), second, output("4", "b"), last]
    assert endpoint.inputs == ["1+1?", [USER, *produced[:3]], [USER, *produced[:6]]]
    assert (final["id"], final["output"]) == ("last", produced)
    assert context.timings.model_calls == 3
    assert context.timings.tools_s > 0
    assert [(made.rollout, dict(made.row), made.closed) for made in box.made] == [
        (ROLLOUT, {"id": msgspec.Raw(b"7")}, 1)
    ]


async def test_the_final_response_is_of_the_official_type_with_its_other_fields_as_they_came() -> None:
    final, _ = await run(Endpoint(response(calls("x")), response(says("2"), metadata={"a": "b"})))

    told = final["output"].pop(1)
    checked = Response.model_validate({**final, "usage": None})
    assert [item.type for item in checked.output] == ["function_call", "message"]
    assert (checked.output_text, checked.metadata) == ("2", {"a": "b"})
    assert TypeAdapter(FunctionCallOutput).validate_python(told) == told


async def test_usage_of_all_calls_is_summed_details_where_they_are_known() -> None:
    details = {"input_tokens_details": {"cached_tokens": 4}, "output_tokens_details": {"reasoning_tokens": 1}}
    rich = {"input_tokens": 20, "output_tokens": 3, "total_tokens": 23, **details}

    final, context = await run(Endpoint(response(calls("x")), response(calls("x"), usage=rich), response(says("2"))))

    assert context.usage == Usage(
        input_tokens=40, output_tokens=7, total_tokens=47, cached_tokens=4, reasoning_tokens=1
    )
    assert (final["usage"]["input_tokens"], final["usage"]["output_tokens"], final["usage"]["total_tokens"]) == (
        40,
        7,
        47,
    )
    assert final["usage"]["input_tokens_details"]["cached_tokens"] == 4
    assert final["usage"]["output_tokens_details"]["reasoning_tokens"] == 1


async def test_a_conversation_given_as_items_is_gone_on_with() -> None:
    given = [{"role": "system", "content": "Be brief."}, USER]
    endpoint = Endpoint(response(calls("x")), response(says("2")))

    await run(endpoint, given)

    assert endpoint.inputs[0] == given
    assert endpoint.inputs[1][:3] == [*given, calls("x")]


@pytest.mark.parametrize("given", [None, 3, {"role": "user"}])
async def test_an_input_that_is_no_conversation_is_the_tasks_fault(given: Any) -> None:
    with pytest.raises(TaskError, match="must be a string or a list"):
        await run(Endpoint(response(says("2"))), given)


async def test_the_calls_of_one_step_run_at_once_and_answer_in_order(box: type[Box]) -> None:
    everyone = asyncio.Barrier(3)
    finished: list[int] = []
    turns = [asyncio.Event() for _ in range(4)]
    turns[3].set()

    async def meet(i: int) -> str:
        await everyone.wait()  # passes only when all three are running
        await turns[i + 1].wait()  # and they end in the reverse order
        finished.append(i)
        turns[i].set()
        return f"done {i}"

    box.tools["meet"] = meet
    three = [calls("meet", f"c{i}", f'{{"i":{i}}}') for i in range(3)]

    final, _ = await run(Endpoint(response(*three), response(says("ok"))), toolbox="box")

    assert finished == [2, 1, 0]
    assert final["output"][3:6] == [output(f"done {i}", f"c{i}") for i in range(3)]


async def test_one_failing_call_leaves_the_others_of_its_step_alone(box: type[Box]) -> None:
    failed = asyncio.Event()

    async def fail() -> None:
        failed.set()
        raise ToolError("cannot")

    async def work() -> str:
        await failed.wait()
        return "worked"

    box.tools.update(fail=fail, work=work)

    final, _ = await run(
        Endpoint(response(calls("fail", "a"), calls("work", "b")), response(says("ok"))), toolbox="box"
    )

    assert final["output"][2:4] == [output('{"error":"cannot"}', "a"), output("worked", "b")]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (calls("echo", arguments="{broken"), "Invalid tool call arguments: "),
        (calls("echo", arguments="[1]"), "Invalid tool call arguments: Expected `object`, got `array`"),
        (calls("echo", arguments="null"), "Invalid tool call arguments: "),
        (calls("ecko"), "Unknown tool 'ecko': did you mean 'echo'? known: crash, echo, hang, refuse"),
        (calls("refuse"), "not today"),
        (calls("crash"), "ZeroDivisionError: division by zero"),
        (calls("echo", arguments='{"b":1}'), "TypeError: "),
        (calls("hang"), "The tool did not answer within 0.05 s"),
    ],
)
async def test_whatever_is_wrong_with_a_tool_call_is_told_to_the_model(
    box: type[Box], item: dict[str, Any], words: str
) -> None:
    async def echo(a: int = 0) -> int:
        return a

    async def refuse() -> None:
        raise ToolError("not today")

    async def crash() -> float:
        return 1 / 0

    async def hang() -> None:
        await asyncio.Event().wait()

    box.tools.update(echo=echo, refuse=refuse, crash=crash, hang=hang)
    endpoint = Endpoint(response(item), response(says("Sorry.")))

    final, _ = await run(endpoint, toolbox="box", tool_limit_s=0.05 if item["name"] == "hang" else 60.0)

    told = endpoint.inputs[1][-1]
    assert (told["type"], told["call_id"]) == ("function_call_output", "a")
    assert msgspec.json.decode(told["output"])["error"].startswith(words)
    assert final["output"][-1] == says("Sorry.")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        ("", ""),
        (None, "null"),
        (3.5, "3.5"),
        ({"a": [1, "é"]}, '{"a":[1,"é"]}'),
    ],
)
async def test_what_a_tool_returns_is_text_or_json_for_the_model(box: type[Box], value: Any, text: str) -> None:
    async def give() -> Any:
        return value

    box.tools["give"] = give

    assert await call_tool(box({}, ROLLOUT), "give", "", 60.0) == text


async def test_a_tool_call_that_breaks_down_is_not_repeated_and_counts_against_the_budget(box: type[Box]) -> None:
    made = 0

    async def crash() -> None:
        nonlocal made
        made += 1
        raise ConnectionResetError("by peer")

    async def refuse() -> None:
        raise ToolError("not today")

    box.tools.update(crash=crash, refuse=refuse)
    endpoint = Endpoint(response(calls("crash"), calls("refuse", "b")), response(calls("crash")), response(says("2")))

    with pytest.raises(ToolBudgetExceeded, match="2 tool calls broke down, 1 may; the last: crash: Connection") as e:
        await run(endpoint, toolbox="box", tool_error_budget=1)

    assert (made, len(endpoint.bodies), e.value.kind) == (2, 2, FailureKind.TOOL_ERROR_BUDGET)


async def test_every_delivery_of_a_rollout_names_its_tool_calls_alike(box: type[Box]) -> None:
    keys: list[str] = []

    async def book() -> None:
        keys.append(idempotency_key())

    box.tools["book"] = book
    for _ in range(2):  # its worker died, and the request was delivered again
        twice = response(calls("book"), calls("book", "b"))
        await run(Endpoint(twice, response(calls("book")), response(says("Done."))), toolbox="box")

    assert keys[:3] == ["job.3.1#1/1.0", "job.3.1#1/1.1", "job.3.1#1/2.0"]
    assert keys[3:] == keys[:3]


async def test_the_words_of_a_tool_error_are_bounded(box: type[Box]) -> None:
    async def fail() -> None:
        raise ToolError("x" * 10_000)

    box.tools["fail"] = fail

    assert len(await call_tool(box({}, ROLLOUT), "fail", "{}", 60.0)) < 2100


async def test_without_a_toolbox_every_tool_is_unknown() -> None:
    final, _ = await run(Endpoint(response(calls("add")), response(says("2"))))

    assert final["output"][1] == output('{"error":"Unknown tool \'add\': known: none"}')


@pytest.mark.parametrize("reason", ["max_output_tokens", "content_filter"])
@pytest.mark.parametrize("items", [[says("2+")], [calls("add")], []])
async def test_an_incomplete_response_is_the_last_and_its_tools_are_not_run(
    items: list[dict[str, Any]], reason: str
) -> None:
    endpoint = Endpoint(response(*items, status="incomplete", incomplete_details={"reason": reason}))

    final, _ = await run(endpoint)

    assert len(endpoint.bodies) == 1
    assert (final["output"], final["incomplete_details"]) == (items, {"reason": reason})


@pytest.mark.parametrize("silent", [[THOUGHT], [], [{**says("hi"), "role": "user"}]])
async def test_a_model_that_says_nothing_is_asked_again(silent: list[dict[str, Any]]) -> None:
    endpoint = Endpoint(response(*silent), response(says("2")))

    final, _ = await run(endpoint)

    assert endpoint.inputs == ["1+1?", [USER, *silent]]
    assert final["output"] == [*silent, says("2")]


@pytest.mark.parametrize("steps", [1, 3])
async def test_the_last_allowed_step_still_runs_its_tools(box: type[Box], steps: int) -> None:
    ran: list[int] = []

    async def count() -> int:
        ran.append(1)
        return len(ran)

    box.tools["count"] = count
    endpoint = Endpoint(response(calls("count")))

    final, context = await run(endpoint, toolbox="box", max_steps=steps)

    assert (len(endpoint.bodies), len(ran)) == (steps, steps)
    assert final["output"] == [item for i in range(steps) for item in (calls("count"), output(str(i + 1)))]
    assert final["usage"]["total_tokens"] == context.usage.total_tokens == 12 * steps


@pytest.mark.parametrize(("most", "steps"), [(12, 1), (13, 2), (24, 2), (25, 3)])
async def test_the_loop_ends_once_its_tokens_are_spent(most: int, steps: int) -> None:
    endpoint = Endpoint(response(calls("add")))

    final, context = await run(endpoint, max_total_tokens=most)

    assert (len(endpoint.bodies), context.usage.total_tokens) == (steps, 12 * steps)
    assert final["output"][-1] == calls("add")  # no tool is run whose answer nobody would read


async def test_a_failing_model_ends_the_rollout_and_the_tools_are_closed(box: type[Box]) -> None:
    async with context_of(Endpoint(response(calls("x")), 500)) as context:
        with pytest.raises(ModelError, match="no such thing"):
            await SimpleAgent(toolbox="box").run(task(), context)

    assert [made.closed for made in box.made] == [1]
    assert (context.timings.model_calls, context.usage.total_tokens) == (2, 12)


async def test_a_cancelled_rollout_stops_its_tools_and_closes_them(box: type[Box]) -> None:
    running, stopped = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    box.tools["hang"] = hang
    async with context_of(Endpoint(response(calls("hang")))) as context:
        going = asyncio.create_task(SimpleAgent(toolbox="box").run(task(), context))
        await asyncio.wait_for(running.wait(), 60)
        going.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going

    assert stopped.is_set()
    assert [made.closed for made in box.made] == [1]


async def test_a_rollout_without_time_left_asks_nothing() -> None:
    endpoint = Endpoint(response(says("2")))
    async with context_of(endpoint, limit_s=0) as context:
        with pytest.raises(DeadlineExceeded, match="past its 0 s"):
            await SimpleAgent().run(task(), context)
    assert (endpoint.bodies, context.timings.model_calls) == ([], 0)


class LateModel:
    """Answers with a tool call, when the rollout's time is just over."""

    def __init__(self) -> None:
        self.context = Context(self, ROLLOUT, 1, 60.0, no_client)

    async def respond(self, params: Mapping[str, Any], info: CallInfo) -> Reply:
        self.context._deadline = 0.0
        item = msgspec.Raw(msgspec.json.encode(calls("add")))
        return Reply(body=b"{}", head=ResponseHead(output=[item]), call=Call(token_ids=b"\0" * 4, logprobs=b"\0" * 4))

    async def close(self) -> None:
        """Nothing is held."""


def no_client(*_: object) -> Any:
    raise AssertionError("nobody asked for a client")


async def test_no_tool_is_started_after_the_deadline() -> None:
    context = LateModel().context

    with pytest.raises(DeadlineExceeded, match="before its tools could run"):
        await SimpleAgent().run(task(), context)
    assert len(context.calls) == 1


async def test_an_agent_may_use_the_official_client_of_its_model() -> None:
    async with context_of(Endpoint(response(says("2"), usage=None))) as context:
        made = await context.openai().responses.create(model="m", input="1+1?")
        assert context.openai() is context.openai()
    assert (made.output_text, context.timings.model_calls, context.usage) == ("2", 1, Usage())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"max_step": 3}, "options of agent 'simple': .*max_step"),
        ({"max_steps": 0}, "options of agent 'simple': .*>= 1"),
        ({"max_total_tokens": 0}, "options of agent 'simple': .*>= 1"),
        ({"tool_limit_s": 0}, r"options of agent 'simple': .*> 0"),
        ({"toolbox": "exampel_multi_step"}, "unknown toolbox .*did you mean 'example_multi_step'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        SimpleAgent(**options)


def test_the_simple_agent_is_found_by_its_name() -> None:
    assert AGENTS.load("simple") is SimpleAgent
    assert TOOLBOXES.load("example_multi_step") is ExampleMultiStep


@pytest.mark.parametrize(
    ("a", "b", "total"),
    [
        (Usage(), Usage(), Usage()),
        (Usage(cached_tokens=1), Usage(reasoning_tokens=2), Usage(cached_tokens=1, reasoning_tokens=2)),
        (
            Usage(input_tokens=1, output_tokens=2, total_tokens=3, cached_tokens=0, reasoning_tokens=5),
            Usage(input_tokens=10, output_tokens=20, total_tokens=30, cached_tokens=4, reasoning_tokens=6),
            Usage(input_tokens=11, output_tokens=22, total_tokens=33, cached_tokens=4, reasoning_tokens=11),
        ),
    ],
)
def test_usage_adds_up_and_stays_unknown_only_where_nobody_knows(a: Usage, b: Usage, total: Usage) -> None:
    assert add_usage(a, b) == total
    assert add_usage(b, a) == total


async def test_the_example_environment_is_played_to_its_end() -> None:
    steps = [
        response(
            calls("get_synonym_value", "a", '{"synonym":"Blazing"}'), calls("get_synonym_value", "b", '{"synonym":""}')
        ),
        response(calls("get_synonym_value", "c", '{"synonym":5}'), calls("get_synonym", "d")),
        response(calls("extract_synonym_values", "e", '{"synonym_values":[711,0]}')),
        response(says("Done.")),
    ]

    final, _ = await run(Endpoint(*steps), toolbox="example_multi_step")

    told = {item["call_id"]: item["output"] for item in final["output"] if item["type"] == "function_call_output"}
    assert told["a"] == f'{{"synonym_value":{sum(map(ord, "Blazing"))}}}'
    assert (told["b"], told["e"]) == ('{"synonym_value":0}', '{"success":true}')
    assert told["c"] == '{"error":"argument \'synonym\' must be a string"}'
    assert "did you mean 'get_synonym_value'" in told["d"]


@pytest.mark.parametrize("made", [object(), "\ud800", {"a": "\ud800"}])
async def test_whatever_a_tool_makes_is_text_for_the_model(box: type[Box], made: object) -> None:
    async def give() -> object:
        return made

    box.tools["give"] = give

    msgspec.json.encode(await call_tool(box({}, ROLLOUT), "give", "{}", 60.0))


async def test_arguments_nested_too_deeply_are_told_to_the_model(box: type[Box]) -> None:
    arguments = '{"a":' + "[" * 1000 + "]" * 1000 + "}"

    assert "Invalid tool call arguments" in await call_tool(box({}, ROLLOUT), "give", arguments, 60.0)


async def test_output_items_of_other_kinds_are_kept_and_passed_over() -> None:
    search = {"type": "tool_search_call", "arguments": {"a": 1}, "call_id": None}

    made, _ = await run(Endpoint(response(search, says("2"))))

    assert made["output"] == [search, says("2")]
