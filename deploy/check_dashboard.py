"""Ask a running Prometheus every question that the dashboard asks: `python deploy/check_dashboard.py http://HOST:9090`.

Standard library only. Per expression it prints how many series came back and one value. Exit code 1 if Prometheus
refuses an expression or an alert rule is not healthy; with --require-data also if an expression has no value (after
traffic of every kind the dashboard shows).
"""

import argparse
import json
import math
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "grafana" / "dashboards" / "quire.json"
TIMEOUT_SECONDS = 10
_LABEL_VALUES = re.compile(r"label_values\((?P<metric>.+),\s*(?P<label>\w+)\)")


class QueryError(Exception):
    """Prometheus refused a query."""


@dataclass(frozen=True, slots=True)
class Expression:
    """One question of the dashboard."""

    panel: str
    """Title of the panel, or name of the template variable."""
    text: str
    """PromQL, or Grafana's `label_values(metric, label)`; still with Grafana's own variables."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What Prometheus said."""

    series: int
    example: str | None
    """A value of the first series that has one; None if none has (no series, or only NaN)."""


def expressions(dashboard: dict[str, Any]) -> Iterator[Expression]:
    """All expressions of the template variables and of the panels, those inside rows included."""
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield Expression(f"${variable['name']}", variable["definition"])
    for panel in _panels(dashboard["panels"]):
        for target in panel.get("targets", ()):
            yield Expression(panel["title"], target["expr"])


def _panels(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for panel in panels:
        yield panel
        yield from _panels(panel.get("panels", []))


def resolve(text: str, dashboard: dict[str, Any], interval: str) -> str:
    """`text` with Grafana's variables filled in: the interval, and `.*` for each variable of the dashboard."""
    text = text.replace("$__rate_interval", interval)
    for variable in dashboard["templating"]["list"]:
        text = text.replace(f"${variable['name']}", ".*")
    return text


class Prometheus:
    """The few routes of its HTTP API that are needed here. All raise `ConnectionError` if there is no such thing."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def ask(self, text: str) -> Answer:
        """Evaluate an expression now. Raises `QueryError` if it is refused."""
        if match := _LABEL_VALUES.fullmatch(text):
            values = self._get(f"label/{match['label']}/values", {"match[]": match["metric"]})
            return Answer(len(values), values[0] if values else None)
        result = self._get("query", {"query": text})["result"]
        numbers = [number for _, number in (series["value"] for series in result) if not math.isnan(float(number))]
        return Answer(len(result), numbers[0] if numbers else None)

    def rules(self) -> list[tuple[str, str]]:
        """Name and problem of each alert rule; an empty problem is none."""
        groups = self._get("rules", {"type": "alert"})["groups"]
        return [
            (rule["name"], "" if rule["health"] == "ok" else rule.get("lastError") or rule["health"])
            for group in groups
            for rule in group["rules"]
        ]

    def _get(self, route: str, query: dict[str, str]) -> Any:
        url = f"{self._url}/api/v1/{route}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            try:
                reason = json.load(error)["error"]
            except (ValueError, KeyError, TypeError):
                reason = str(error)
            raise QueryError(reason) from error
        except (OSError, ValueError) as error:
            raise ConnectionError(f"{self._url} does not answer like Prometheus: {error}") from error


def check(prometheus: Prometheus, dashboard: dict[str, Any], interval: str) -> tuple[int, int]:
    """Ask everything and print a line each; returns how many were refused and how many had no value."""
    refused = empty = 0
    for expression in expressions(dashboard):
        text = resolve(expression.text, dashboard, interval)
        try:
            answer = prometheus.ask(text)
        except QueryError as error:
            refused += 1
            print(f"REFUSED  {expression.panel}: {text}\n         {error}")
            continue
        if answer.example is None:
            empty += 1
        shown = "no value" if answer.example is None else answer.example
        print(f"{answer.series:3} series {expression.panel}: {text} = {shown}")
    for name, problem in prometheus.rules():
        refused += bool(problem)
        print(f"alert    {name}: {problem or 'ok'}")
    return refused, empty


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Evaluate the dashboard's expressions in a running Prometheus.")
    parser.add_argument("prometheus", help="its address, e.g. http://127.0.0.1:9090")
    parser.add_argument("--interval", default="1m", help="stands for Grafana's $__rate_interval (default: %(default)s)")
    parser.add_argument("--require-data", action="store_true", help="fail if an expression has no value")
    options = parser.parse_args()
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    try:
        refused, empty = check(Prometheus(options.prometheus), dashboard, options.interval)
    except (ConnectionError, QueryError) as error:
        sys.exit(f"error: {error}")
    print(f"{refused} refused, {empty} without a value")
    sys.exit(1 if refused or (empty and options.require_data) else 0)


if __name__ == "__main__":
    main()
