"""What operators see of real turns over two workers: metrics, the queries that are made of them, spans."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import promql_parser
import pytest
import yaml
from openai import APIStatusError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from proxy.api.metrics import Metrics
from proxy.api.visit import Stats
from tests.e2e.answers import error
from tests.e2e.data import REPO
from tests.e2e.harness import ServerProcess, message_of
from tests.e2e.processes import free_port
from tests.e2e.script import Chat, Script, Workers, fault, paged_config, search, talk

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "sk-verysecret"
ALERTS, DASHBOARD = REPO / "deploy/prometheus/alerts.yaml", REPO / "deploy/grafana/llm-pager.json"
Labels = frozenset[tuple[str, str]]


class Receiver:
    """An OTLP collector over HTTP."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self.bytes = b""
        self.resource: dict[str, Any] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                outer.take(data)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, data: bytes) -> None:
        self.bytes += data
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            self.resource = values(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [
                    {"name": span.name, "trace": span.trace_id.hex(), "id": span.span_id.hex(), "parent": span.parent_span_id.hex(),
                     "kind": span.kind, "error": span.status.code == 2, "ns": span.end_time_unix_nano - span.start_time_unix_nano,
                     **values(span.attributes)}
                    for span in scope.spans
                ]  # fmt: skip

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def values(attributes: Any) -> dict[str, Any]:
    found = {}
    for pair in attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        found[pair.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    return found


@dataclass
class Seen:
    metrics: dict[str, dict[Labels, float]]
    receiver: Receiver
    script: Script
    requests: int
    log: str

    def of(self, name: str, **labels: str) -> float:
        """The sum of the series with these labels."""
        return sum(value for found, value in self.metrics[name].items() if labels.items() <= dict(found).items())


def scraped(text: str) -> dict[str, dict[Labels, float]]:
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


async def turns(script: Script, server: ServerProcess, receiver: Receiver) -> Seen:
    workers, marks = Workers(server), list[str]()
    assert len(server.worker_pids) == 2
    chat = Chat(None)  # type: ignore[arg-type]
    for half in range(2):
        async with workers.client(half, SECRET) as chat.client:
            await talk(chat, script, f"t{half}", 8, marks)
    requests = 16
    for which, headers in enumerate(({"traceparent": f"00-{TRACE}-{PARENT}-01"}, None)):
        script.plan(f"ask{which}", fault("msg_0008", "msg_0012", "msg_9999"), search(marks[0]), message_of("So it was."))
        async with workers.client(which, SECRET) as chat.client:
            chat.headers = headers
            await chat.fork().say(f"What did I say of {marks[1]}?", f"ask{which}", stream=True)
        requests += 1
    script.plan("no", lambda _: error(401, "no", code="bad"))
    async with workers.client(0, SECRET) as chat.client:
        with pytest.raises(APIStatusError):
            await chat.fork().say("Refuse this.", "no")
    requests += 1
    root = server.base_url.removesuffix("/v1")
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {SECRET}"}) as http:
        await http.post(f"{root}/v1/embeddings", json={"input": "x"})
        requests += 1
        for one in (await http.get(f"{root}/vm/conversations")).json()["conversations"]:
            await http.delete(f"{root}/vm/conversations/{one['conversation']}")
        until_s = time.monotonic() + 15
        while True:  # until both workers have told, and the spans are there
            metrics = scraped((await http.get(f"{root}/metrics")).text)
            told = sum(metrics.get("llm_pager_requests_total", {}).values())
            servers = sum(span["kind"] == 2 for span in receiver.spans)
            if (told, servers) == (requests, requests) and metrics.get("llm_pager_erasures_total"):
                return Seen(metrics, receiver, script, requests, server.log)
            assert time.monotonic() < until_s, (told, servers, requests)
            await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    receiver, script = Receiver(), Script()

    async def run() -> Seen:
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        async with script.upstream:
            with ServerProcess(paged_config(script.upstream, models={"gpt-4*": {}}), workers=2, env=env) as server:
                return await turns(script, server, receiver)

    yield asyncio.run(run())
    receiver.close()


def test_metrics_of_two_workers_are_the_sums(seen: Seen) -> None:
    of = seen.of
    assert of("llm_pager_requests_total") == seen.requests
    assert of("llm_pager_requests_total", model="gpt-4*", status="2xx") == 18
    assert of("llm_pager_requests_total", status="4xx", model="gpt-4*") == 1
    assert of("llm_pager_requests_total", channel="unpaged") == of("llm_pager_unpaged_total", path="other") == 1
    assert of("llm_pager_chat_seconds_count") == 19 and of("llm_pager_first_token_seconds_count") == 10
    said = len(seen.script.upstream.calls) - 1  # but for the refused one
    assert of("llm_pager_rounds_total") == of("llm_pager_step_seconds_count", step="upstream") - 1 == said
    assert of("llm_pager_upstream_refusals_total") == 1
    assert of("llm_pager_faults_total") == 6 and of("llm_pager_faults_total", reason="failed") == 2
    reasons = {dict(labels)["reason"] for labels in seen.metrics["llm_pager_faults_total"]}
    assert reasons - {"failed", "resident"}, "pages were faulted in"
    assert of("llm_pager_fault_seconds_count") == 6 and of("llm_pager_searches_total") == 2
    assert of("llm_pager_epochs_total", cause="first") >= 1 and of("llm_pager_epochs_total") >= 2
    assert of("llm_pager_evicted_pages_total") > 0
    assert of("llm_pager_evidence_pages_total") >= of("llm_pager_evidence_used_pages_total") >= 0
    assert of("llm_pager_evidence_pages_total") > 0
    assert 0 < of("llm_pager_window_fill_sum") <= of("llm_pager_window_fill_count")
    assert of("llm_pager_step_seconds_count", step="commit") >= 18
    assert of("llm_pager_billed_tokens_total", kind="prompt") > 0
    assert of("llm_pager_paged_billed_tokens_total", what="full_history") > 0
    assert of("llm_pager_erasures_total", by="tenant") >= 1
    assert of("llm_pager_queue") == 0 and {dict(labels)["queue"] for labels in seen.metrics["llm_pager_queue"]} == {
        "pool", "writer", "decoders", "embedder"}  # fmt: skip


# ---------------------------------------------------------------- what is made of them


def queries() -> dict[str, str]:
    """The expressions of alerts and dashboard, by where they are."""
    found = {rule["alert"]: rule["expr"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            found[f"{panel['title']} {target['refId']}"] = target["expr"].replace("$__rate_interval", "5m")
    return found


def selected(node: Any) -> Iterator[tuple[str, dict[str, str], set[str]]]:
    """The metrics that an expression reads: name, exact matchers, names of all labels that it matches or sums by."""
    by: set[str] = set()
    if isinstance(node, promql_parser.VectorSelector):
        matchers = node.matchers.matchers
        exact = {m.name: m.value for m in matchers if m.op == promql_parser.MatchOp.Equal}
        yield node.name, exact, {m.name for m in matchers}
        return
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        by = set(node.modifier.labels)
    for part in ("lhs", "rhs", "expr", "vector_selector"):
        if (below := getattr(node, part, None)) is not None:
            yield from ((name, exact, labels | by) for name, exact, labels in selected(below))
    for below in getattr(node, "args", ()):
        yield from ((name, exact, labels | by) for name, exact, labels in selected(below))


def declared() -> dict[str, set[str]]:
    """Every metric that there is, and its labels."""

    class Nothing:
        class store:
            damaged: ClassVar[dict[str, int]] = {}
            losses = 0

    stats = Stats(Nothing(), Nothing())  # type: ignore[arg-type]
    stats.watch(dict, {})
    metrics: Metrics = stats.prometheus
    collectors = set(metrics._own._names_to_collectors.values())
    return {one._name: set(one._labelnames) for one in collectors}  # type: ignore[attr-defined]


def test_every_query_reads_metrics_and_labels_that_there_are(seen: Seen) -> None:
    known, rare, read = declared(), {"llm_pager_values_read", "llm_pager_values_read_seconds"}, set()
    for where, expression in queries().items():
        found = list(selected(promql_parser.parse(expression)))
        assert found, where
        for name, exact, labels in found:
            if name == "up":
                continue
            base = re.sub(r"_(total|bucket|sum|count)$", "", name)
            read.add(base)
            assert base in known, f"{where}: there is no {name}"
            assert labels - {"instance", "le", "job"} <= known[base], f"{where}: {labels} of {name}"
            if base not in rare:  # they need a store of objects
                assert any(exact.items() <= dict(series).items() for series in seen.metrics.get(name, {})), f"{where}: no {exact} of {name}"
    assert read == set(known), "a metric that nobody looks at"


def test_the_alert_rules_are_prometheus_own(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    done = subprocess.run(["promtool", "check", "rules", str(ALERTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = tmp_path / "test.yaml"
    series = {
        'llm_pager_memory_lost_total{instance="a"}': "0 0 0 1 1 1", 'llm_pager_store_losses_total{instance="a"}': "0x5",
        'llm_pager_requests_total{instance="a",status="5xx"}': "0+6x30", 'llm_pager_requests_total{instance="a",status="2xx"}': "0+60x30",
        'llm_pager_step_seconds_bucket{step="commit",le="1.0"}': "0+1x30", 'llm_pager_step_seconds_bucket{step="commit",le="+Inf"}': "0+60x30",
    }  # fmt: skip
    fires = {"LlmPagerMemoryLost": ("5m", 1), "LlmPagerStoreLost": ("5m", 0), "LlmPagerServerErrors": ("20m", 1),
             "LlmPagerSlowStore": ("25m", 0)}  # fmt: skip
    tests.write_text(json.dumps({
        "rule_files": [str(ALERTS)], "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": [{"series": k, "values": v} for k, v in series.items()],
                   "promql_expr_test": [{"expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)', "eval_time": at,
                                         "exp_samples": [{"labels": "{}", "value": count}]} for name, (at, count) in fires.items()]}],
    }))  # fmt: skip
    done = subprocess.run(["promtool", "test", "rules", str(tests)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_one(seen: Seen) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) and dashboard["uid"] and dashboard["schemaVersion"] >= 36
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"


def test_the_docs_list_every_metric_with_its_labels_and_nothing_else() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| ([\w, ]*?) ?\| (?:\S)", section("Metrics"), re.M))
    assert {f"llm_pager_{name}": set(filter(None, labels.split(", "))) for name, labels in told.items()} == declared()


def section(title: str) -> str:
    return (REPO / "docs/observability.md").read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


# ---------------------------------------------------------------- spans and lines


def test_spans_are_of_the_clients_trace_and_upstream_goes_on_with_ours(seen: Seen) -> None:
    spans = [span for span in seen.receiver.spans if span["trace"] == TRACE]
    (request,) = [span for span in spans if span["kind"] == 2]
    assert request["parent"] == PARENT and request["name"] == "POST /chat/completions"
    assert request["http.response.status_code"] == 200 and request["llm_pager.channel"] == "tools"
    assert request["llm_pager.rounds"] == 3 and request["llm_pager.faults"] == 3 and request["llm_pager.searches"] == 1
    rounds = [span for span in spans if span["kind"] == 3]
    assert [span["name"] for span in rounds] == ["chat gpt-4o"] * 3
    sent = [recorded.header("traceparent") for recorded in seen.script.calls["ask0"]]
    assert sent == [f"00-{TRACE}-{span['id']}-01" for span in rounds]
    for span in rounds:
        assert span["gen_ai.operation.name"] == "chat" and span["gen_ai.request.model"] == "gpt-4o"
        assert span["gen_ai.provider.name"] == "openai" and span["gen_ai.usage.input_tokens"] > 0
        assert span["gen_ai.usage.output_tokens"] > 0 and span["gen_ai.usage.cache_read.input_tokens"] >= 0
        assert span["gen_ai.conversation.id"] == request["gen_ai.conversation.id"]
    assert rounds[0]["gen_ai.response.finish_reasons"] == ["tool_calls"]
    faults = [span for span in spans if span.get("gen_ai.tool.name") == "page_fault"]
    assert sorted(span["error"] for span in faults) == [False, False, True]
    assert {"search", "commit"} <= {span["name"] for span in spans}
    assert all(span["parent"] == request["id"] for span in spans if span is not request)
    assert all(span["ns"] >= 0 for span in spans)


def test_each_request_has_one_span_and_the_refused_round_says_so(seen: Seen) -> None:
    requests = [span for span in seen.receiver.spans if span["kind"] == 2]
    assert len(requests) == seen.requests and {span["name"] for span in requests} == {"POST /chat/completions", "POST"}
    (refused,) = [span for span in seen.receiver.spans if span["kind"] == 3 and span["error"]]
    assert refused["error.type"] == "401"
    assert seen.receiver.resource["service.name"] == "llm-pager"
    (other,) = seen.script.upstream.others
    assert other.header("traceparent") is not None, "what passes, too"
    assert f"trace_id={TRACE}" in seen.log


def test_spans_have_no_content_and_no_keys_and_are_in_the_docs(seen: Seen) -> None:
    for word in (SECRET, "t0u1q", "t0a1q", "What did I say"):
        assert word.encode() not in seen.receiver.bytes
    shown = section("Traces")
    for span in seen.receiver.spans:
        for name in span.keys() - {"name", "trace", "id", "parent", "kind", "error", "ns"}:
            tail = name.partition(".")[2]
            assert name in shown or f".{tail}" in shown or f".{tail.partition('.')[2]}" in shown, name


def test_with_nobody_to_tell_no_request_and_no_end_waits() -> None:
    receiver_gone = f"http://127.0.0.1:{free_port()}"

    async def run() -> tuple[float, str]:
        script = Script()
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver_gone, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        async with script.upstream:
            with ServerProcess(paged_config(script.upstream), env=env) as server:
                async with httpx.AsyncClient() as http:
                    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
                    began_s = time.monotonic()
                    for _ in range(20):
                        reply = await http.post(f"{server.base_url}/chat/completions", json=body, headers={"x-turn-tag": "a"})
                        assert reply.status_code == 200
                    took_s = time.monotonic() - began_s
                began_s = time.monotonic()
                await asyncio.to_thread(server.stop)
                return max(took_s, time.monotonic() - began_s), server.log

    slowest_s, log = asyncio.run(run())
    assert slowest_s < 8, log[-3000:]


def test_without_an_endpoint_nothing_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from proxy.config import load_config; from proxy.app import create_app; from pathlib import Path\n"
        "app = create_app(load_config(Path('c.yaml'), {}, {}))\n"
        "assert app._tracing is None\n"
        "found = [n for n in sys.modules if n.startswith(('opentelemetry.sdk', 'opentelemetry.exporter', 'proxy.api.tracing'))]\n"
        "assert not found, found"  # FastAPI imports the API where it finds it
    )
    (tmp_path / "c.yaml").write_text(json.dumps({"tiers": {"l2": {"path": str(tmp_path / "data")}}}))
    env = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**env, "PYTHONPATH": str(REPO)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_docs_list_every_field_of_a_requests_line(seen: Seen) -> None:
    shown = section("Logs")
    fields = set(re.findall(r" (\w+)=", "\n".join(line for line in seen.log.splitlines() if " proxy.request: channel=" in line)))
    assert {"channel", "status", "trace_id", "fault_tiers"} <= fields
    assert [name for name in fields if f"`{name}`" not in shown] == []
