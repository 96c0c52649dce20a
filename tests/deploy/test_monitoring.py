"""Prometheus and Grafana files: they fit together, and every metric and label they name is one the server exports."""

import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from quire.core.errors import InvalidRequestError
from quire.core.messages import EngineStats
from quire.core.speculation import DraftInfo
from quire.scheduler.client import EngineClient
from quire.server.metrics import Metrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/quire.json").read_text())
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
ALERTS = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
_METRIC = re.compile(r"\b(?:vllm|quire):\w+")
_SELECTOR = re.compile(r"((?:vllm|quire):\w+)\{([^}]*)\}")
_GROUPED = re.compile(r"by \(([^)]*)\) \(rate\(((?:vllm|quire):\w+)")


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_dashboard", DEPLOY / "check_dashboard.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _exported() -> dict[str, set[str]]:
    """Sample name -> label names, of a server to which everything has happened once."""
    listeners: list[Callable[[EngineStats], None]] = []
    info = SimpleNamespace(policies=("window",), draft=DraftInfo(method="ngram", name="ngram", most=4))
    client = SimpleNamespace(
        status="ready", heartbeat_age=0.0, restarts=0, info=info, add_stats_listener=listeners.append
    )
    metrics = Metrics(cast(EngineClient, client), "m", "vllm:")
    listeners[0](EngineStats(running=1, steps_total=1, pages_total=4))
    metrics.finished("stop")
    metrics.aborted(True)
    metrics.failed(InvalidRequestError("wrong"))
    metrics.answered("/v1/models", 200)
    exported: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            exported[sample.name] |= set(sample.labels)
    return dict(exported)


EXPORTED = _exported()
EXPRESSIONS = [expression.text for expression in _script().expressions(DASHBOARD)] + [rule["expr"] for rule in ALERTS]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_metrics_and_labels_are_exported(text: str) -> None:
    names = _METRIC.findall(text)
    assert names or text.startswith("up{")
    assert set(names) <= set(EXPORTED)
    for name, selectors in _SELECTOR.findall(text):
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selectors)) <= EXPORTED[name]
    for labels, name in _GROUPED.findall(text):
        assert {label.strip() for label in labels.split(",")} <= EXPORTED[name]


def test_dashboard_shows_what_an_operator_asks_first() -> None:
    shown = {name for text in EXPRESSIONS for name in _METRIC.findall(text)}
    wanted = """vllm:num_requests_running vllm:num_requests_waiting vllm:request_success_total
        vllm:time_to_first_token_seconds_bucket vllm:inter_token_latency_seconds_bucket
        vllm:e2e_request_latency_seconds_bucket vllm:request_queue_time_seconds_bucket vllm:prompt_tokens_total
        vllm:generation_tokens_total vllm:kv_cache_usage_perc vllm:num_preemptions_total quire:engine_up
        quire:engine_restarts quire:engine_heartbeat_age_seconds quire:requests_failed_total
        quire:http_requests_total vllm:prefix_cache_hits_total vllm:prefix_cache_queries_total
        quire:request_timeouts_total quire:watchdog_total quire:page_leaks_total
        quire:pruned_entries_total quire:prune_pages_freed_total quire:prunes_total quire:prune_seconds_total
        quire:lossy_preemptions_total quire:prefix_pruned_hits_total
        vllm:spec_decode_num_drafts_total vllm:spec_decode_num_draft_tokens_total
        vllm:spec_decode_num_accepted_tokens_total vllm:spec_decode_num_accepted_tokens_per_pos_total
        quire:draft_lengths_total quire:draft_seconds_total quire:drafter_info
        quire:structured_requests_total quire:requests_waiting_for_grammar quire:grammars_compiled_total
        quire:grammar_compile_seconds_total quire:grammar_mask_seconds_total quire:grammar_cache_hits_total"""
    assert set(wanted.split()) <= shown


def test_panels_have_titles_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"] and (panel["type"] == "row" or panel["description"])
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + column, place["y"] + line) for column in range(place["w"]) for line in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_dashboard_is_found_by_grafana() -> None:
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/quire.yaml").read_text())["providers"][0]
    grafana = COMPOSE["services"]["grafana"]
    mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in grafana["volumes"]}
    assert (DEPLOY / mounts[provider["options"]["path"]] / "quire.json").is_file()
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].startswith(provider["options"]["path"])
    assert (DEPLOY / mounts["/etc/grafana/provisioning"] / "datasources").is_dir()


def test_dashboard_uses_only_variables_that_it_defines() -> None:
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used - {"__rate_interval", "__all"} == defined


def test_datasource_is_the_prometheus_of_compose() -> None:
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()  # type: ignore[union-attr]
    assert COMPOSE["services"][host]["ports"][0].endswith(f":{port}")
    assert source["isDefault"]
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]


def test_scrape_job_asks_the_server_of_compose() -> None:
    job = next(job for job in PROMETHEUS["scrape_configs"] if job["job_name"] == "quire")
    host, port = job["static_configs"][0]["targets"][0].split(":")
    for service in (COMPOSE["services"]["quire-cpu"], COMPOSE["services"]["quire-cuda"]):
        assert host in service["networks"]["default"]["aliases"]
        assert service["ports"][0].endswith(f":{port}")


def test_prometheus_finds_its_files() -> None:
    folder = "/etc/prometheus"
    mounted = {volume.rsplit(":", 2)[-2] for volume in COMPOSE["services"]["prometheus"]["volumes"] if ":ro" in volume}
    job: dict[str, Any] = PROMETHEUS["scrape_configs"][0]
    named = [*PROMETHEUS["rule_files"], job["authorization"]["credentials_file"]]
    assert {f"{folder}/{name}" for name in named} <= mounted
    assert (DEPLOY / "prometheus/no-api-key").read_text() == ""


def test_alerts_say_what_to_do() -> None:
    assert {rule["alert"] for rule in ALERTS} >= {"QuireEngineDown", "QuireHeartbeatOld", "QuireQueueGrowing"}
    tested = (DEPLOY / "prometheus/alerts_test.yaml").read_text()
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "description"} <= set(rule["annotations"])
        assert re.search(rf"alertname: {rule['alert']}\n", tested), f"{rule['alert']} has no test that it fires"
