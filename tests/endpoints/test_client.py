"""The client against a misbehaving server on loopback: everything is answered once, in bounded time, without a key."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from deepalign.endpoints.client import Client, ServersGoneError
from deepalign.endpoints.exchange import Reply, Request
from deepalign.endpoints.servers import Server
from deepalign.errors import UserError
from fake_endpoint import FAULTS, FakeEndpoint, say, seeded_faults

KEY = "sk-fake-0123456789abcdefghij"


def ask(text: str, prefix: str = "") -> Request:
    return Request(body={"messages": [{"role": "user", "content": text}]}, prefix=prefix)


def echo(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    return 200, say(body["messages"][-1]["content"].upper())


def text(reply: Reply) -> str:
    return str(reply.body["choices"][0]["message"]["content"])


def client(*servers: FakeEndpoint | str, **settings: Any) -> Client:
    made = [Server(url=one if isinstance(one, str) else one.url, model="fake") for one in servers]
    return Client(made, **{"first_pause_seconds": 0.01, "timeout_seconds": 10.0, **settings})


def test_each_request_is_answered_once_with_its_own_answer() -> None:
    with FakeEndpoint(echo) as server:
        replies = dict(client(server).send([ask(f"word {i}") for i in range(50)]))
        assert {index: text(reply) for index, reply in replies.items()} == {i: f"WORD {i}" for i in range(50)}
        assert len(server.calls) == 50
        assert {body["model"] for body in server.calls} == {"fake"}
    assert (replies[0].status, replies[0].tries, replies[0].server) == ("ok", 1, server.url)
    assert (replies[0].prompt_tokens, replies[0].completion_tokens) == (10, 2)


def test_nothing_to_send_connects_to_nothing() -> None:
    assert list(client("http://127.0.0.1:9/v1").send([])) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_tried_again(fault: str) -> None:
    with FakeEndpoint(echo, faults=[fault, fault]) as server:
        ((_, reply),) = client(server, timeout_seconds=0.6, retries=20).send([ask("one")])
        assert (reply.status, text(reply)) == ("ok", "ONE")
        # A machine under load may time out once more by itself.
        assert reply.tries == len(server.calls) >= 3


@pytest.mark.parametrize("fault", ["500", "429", "no choices"])
def test_a_fault_that_does_not_pass_is_given_up_with_its_reason(fault: str) -> None:
    with FakeEndpoint(echo, faults=lambda number: fault) as server:
        ((_, reply),) = client(server, retries=2).send([ask("one")])
        assert (reply.status, reply.tries, len(server.calls)) == ("failed", 3, 3)
        assert reply.reason.startswith("gave up after 3 tries: ")
        assert reply.body == {}


def test_many_requests_under_many_faults() -> None:
    quick = [fault for fault in FAULTS if fault not in ("hang", "slow")]
    with FakeEndpoint(echo, faults=seeded_faults(0.3, kinds=quick), retry_after="0.01") as server:
        found = list(client(server, retries=12).send([ask(f"w{i}") for i in range(200)]))
        assert sorted(index for index, _ in found) == list(range(200))
        assert all(text(reply) == f"W{index}" for index, reply in found)
        assert server.answered == 200
        assert len(server.calls) == sum(reply.tries for _, reply in found) > 240


@pytest.mark.parametrize("status", ["400", "403", "422"])
def test_what_is_wrong_in_itself_is_not_tried_again(status: str) -> None:
    with FakeEndpoint(echo, faults=[status]) as server:
        replies = dict(client(server, concurrency=1).send([ask("one"), ask("two")]))
        assert sorted(reply.status for reply in replies.values()) == ["failed", "ok"]
        (failed,) = (reply for reply in replies.values() if reply.status == "failed")
        assert failed.tries == 1
        assert f"HTTP {status}" in failed.reason


def test_a_refused_key_is_told_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with FakeEndpoint(echo, faults=lambda number: "401 echo") as server:
        one = Client(Server(url=server.url, model="fake", key_env="JUDGE_KEY"), concurrency=2)
        with pytest.raises(ServersGoneError, match="the key in JUDGE_KEY") as stopped:
            list(one.send([ask(f"{i}") for i in range(100)]))
        assert len(server.calls) <= 2, "the other 98 must not be sent in vain"
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(stopped.value) + caplog.text
    assert KEY not in repr(one.servers)


def test_an_error_that_repeats_the_key_is_told_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeEndpoint(echo, faults=lambda number: "500") as server:
        ((_, reply),) = client(server, retries=0).send([ask("one")])
    assert "out of memory while serving Bearer [key]" in reply.reason


def test_an_answer_that_repeats_the_key_loses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeEndpoint(f"your key is {KEY}") as server:
        ((_, reply),) = client(server).send([ask("one")])
    assert text(reply) == "your key is [key]"


def test_a_short_key_is_no_reason_to_change_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    with FakeEndpoint("The box is EMPTY.") as server:
        ((_, reply),) = client(server).send([ask("one")])
    assert text(reply) == "The box is EMPTY."


def test_no_more_calls_at_a_time_than_asked_for() -> None:
    with FakeEndpoint(echo, seconds=0.02) as server:
        list(client(server, concurrency=3).send([ask(f"{i}") for i in range(20)]))
        assert server.most_at_once == 3


def test_retry_after_is_waited_for_by_all() -> None:
    with FakeEndpoint(echo, faults=["429"], retry_after="0.5") as server:
        list(client(server, concurrency=1).send([ask("one"), ask("two")]))
        assert server.times[1] - server.times[0] >= 0.5


def test_two_busy_servers_are_given_their_pauses() -> None:
    """Handing a request to and fro at once would use up its tries in no time."""

    def busy(number: int) -> str:
        return "429" if number < 2 else ""

    with (
        FakeEndpoint(echo, faults=busy, retry_after="0.3") as one,
        FakeEndpoint(echo, faults=busy, retry_after="0.3") as two,
    ):
        started = time.monotonic()
        found = list(client(one, two, concurrency=1, retries=4).send([ask("one")]))
        assert [reply.status for _, reply in found] == ["ok"]
        assert time.monotonic() - started >= 0.3


def test_the_last_byte_must_come_in_time() -> None:
    with FakeEndpoint(echo, faults=lambda number: "slow") as server:
        started = time.monotonic()
        ((_, reply),) = client(server, timeout_seconds=0.3, retries=1).send([ask("one")])
        assert (reply.status, reply.tries) == ("failed", 2)
        assert "no whole answer within 0.3 seconds" in reply.reason
        assert time.monotonic() - started < 3


def test_the_same_prefix_goes_to_the_same_server() -> None:
    with FakeEndpoint(echo) as one, FakeEndpoint(echo) as two:
        both = client(one, two, concurrency=1)
        where: dict[str, set[str]] = {}
        for number in range(3):
            requests = [ask(f"{number} {i}", prefix=f"group {i}") for i in range(16)]
            for index, reply in both.send(requests[:1]):
                where.setdefault(requests[index].prefix, set()).add(reply.server)
        assert [len(servers) for servers in where.values()] == [1]
        list(both.send([ask(f"{i}", prefix=f"group {i}") for i in range(40)]))
        assert one.calls
        assert two.calls


def test_an_idle_server_takes_over_from_a_busy_one() -> None:
    with FakeEndpoint(echo, seconds=0.03) as one, FakeEndpoint(echo, seconds=0.03) as two:
        list(client(one, two, concurrency=1).send([ask(f"{i}", prefix="all alike") for i in range(12)]))
        assert min(len(one.calls), len(two.calls)) >= 4


def test_the_work_of_a_server_that_keeps_failing_goes_to_the_others() -> None:
    with FakeEndpoint(echo, faults=lambda number: "500") as broken, FakeEndpoint(echo) as sound:
        found = list(client(broken, sound, concurrency=2).send([ask(f"w{i}") for i in range(200)]))
        assert sorted(text(reply) for _, reply in found) == sorted(f"W{i}" for i in range(200))
        assert len(broken.calls) < 40


def test_the_work_of_a_server_that_stops_goes_to_the_others() -> None:
    with FakeEndpoint(echo, seconds=0.01) as going, FakeEndpoint(echo, seconds=0.01) as sound:
        found = []
        for number, (index, reply) in enumerate(
            client(going, sound, concurrency=2).send([ask(f"w{i}") for i in range(100)])
        ):
            found.append((index, reply))
            if number == 10:
                going.stop()
        assert sorted(index for index, _ in found) == list(range(100))
        assert all(reply.status == "ok" for _, reply in found)
        going.stop = lambda: None  # type: ignore[method-assign]


def test_a_server_that_is_not_there_is_told_in_one_line() -> None:
    with pytest.raises(ServersGoneError, match=r"no server is left for 5 requests \(http://127.0.0.1:9/v1: .*reached"):
        list(client("http://127.0.0.1:9/v1").send([ask(f"{i}") for i in range(5)]))


def test_an_unknown_model_is_told_once() -> None:
    with FakeEndpoint(echo, faults=lambda number: "404") as server:
        with pytest.raises(ServersGoneError, match="no such model or path"):
            list(client(server, concurrency=1).send([ask(f"{i}") for i in range(5)]))
        assert len(server.calls) == 1


def test_the_model_and_a_missing_v1_are_found_out() -> None:
    with FakeEndpoint(echo, models=["only-one"]) as server:
        one = Client(Server(url=server.host))
        assert [(found.url, found.model) for found in one.open()] == [(server.url, "only-one")]
        list(one.send([ask("one")]))
        assert server.calls[0]["model"] == "only-one"


def test_a_model_must_be_named_where_there_are_several() -> None:
    with FakeEndpoint(echo, models=["a", "b"]) as server, pytest.raises(UserError, match=r"serves 2 models \(a, b\)"):
        Client(Server(url=server.url)).open()


def test_an_address_that_lists_no_models_is_told() -> None:
    with FakeEndpoint(echo, root="/elsewhere/v1") as server, pytest.raises(UserError, match="answers 404; give the"):
        Client(Server(url=server.host)).open()


def test_proxies_of_the_environment_are_not_used_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with FakeEndpoint(echo) as server:
        ((_, reply),) = Client(Server(url=server.host)).send([ask("one")])
        assert reply.status == "ok"


def test_closing_early_cancels_the_rest() -> None:
    before = threading.active_count()
    with FakeEndpoint(echo, seconds=0.05) as server:
        replies = client(server, concurrency=2).send([ask(f"{i}") for i in range(500)])
        next(replies)
        started = time.monotonic()
        replies.close()  # type: ignore[attr-defined]
        assert time.monotonic() - started < 2
        time.sleep(0.3)
        seen = len(server.calls)  # what was on its way has arrived
        assert seen < 20
        time.sleep(0.3)
        assert len(server.calls) == seen
        assert not [thread for thread in threading.enumerate() if thread.name == "deepalign-endpoints"]
    assert threading.active_count() <= before + 3


def test_a_running_loop_is_no_hindrance() -> None:
    async def notebook() -> list[str]:
        with FakeEndpoint(echo) as server:
            return [text(reply) for _, reply in client(server).send([ask("one")])]

    assert asyncio.run(notebook()) == ["ONE"]


def test_a_path_beside_the_version() -> None:
    seen = []

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        seen.append(path)
        return 200, {"tokens": [1, 2]}

    with FakeEndpoint(answer) as server:
        ((_, reply),) = client(server).send([Request(body={"prompt": "x"}, path="/tokenize")])
    assert (seen, reply.body) == (["/tokenize"], {"tokens": [1, 2]})


@pytest.mark.parametrize("settings", [{"concurrency": 0}, {"retries": -1}, {"timeout_seconds": 0}])
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="give at least 1"):
        Client(Server(url="http://127.0.0.1:1/v1"), **settings)


def test_ctrl_c_ends_at_once() -> None:
    code = (
        "import sys\n"
        "from deepalign.endpoints.client import Client\n"
        "from deepalign.endpoints.exchange import Request\n"
        "from deepalign.endpoints.servers import Server\n"
        "client = Client(Server(url=sys.argv[1], model='m'))\n"
        "sys.stdout.write('ready\\n'); sys.stdout.flush()\n"
        "try:\n"
        "    list(client.send([Request(body={}) for _ in range(100)]))\n"
        "except KeyboardInterrupt:\n"
        "    sys.stdout.write('stopped\\n')\n"
    )
    with FakeEndpoint(echo, faults=lambda number: "hang", hang_seconds=30) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", code, server.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        while not server.calls:
            time.sleep(0.01)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert (out, err, process.returncode) == (b"stopped\n", b"", 0)
        assert time.monotonic() - started < 5


def test_a_key_that_the_list_of_models_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer_get(handler: Any) -> None:
        handler.send_response(401)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with FakeEndpoint(echo) as server:
        monkeypatch.setattr(server, "_get", answer_get)
        with pytest.raises(UserError, match=r"HTTP 401: .* wants a key, and OPENAI_API_KEY is not set"):
            Client(Server(url=server.url)).open()
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        with pytest.raises(UserError, match="does not take the key in OPENAI_API_KEY"):
            Client(Server(url=server.url)).open()
