"""Figures for Prometheus, read anew at each scrape."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from umbel.deploy.dashboard.source import Source, alerts, budget

RUNS = 20
"""The newest runs have figures of their own."""

RUN = ("run", "name")


class _Figures(Collector):
    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        yield from self._of_server()
        yield from self._of_runs()
        yield from self._of_clients()
        firing = GaugeMetricFamily("umbel_alert", "What somebody should look at.", labels=["kind"])
        kinds = [alert.kind for alert in alerts(self._source)]
        for kind in sorted(set(kinds)):
            firing.add_metric([kind], kinds.count(kind))
        yield firing

    def _of_server(self) -> Iterable[Metric]:
        state = self._source.server()
        if state is None:
            return
        up = GaugeMetricFamily("umbel_server_up", "Whether the server runs.")
        up.add_metric([], state.running)
        online = GaugeMetricFamily(
            "umbel_site_online", "Whether a site is there now.", labels=["site"]
        )
        for name, site in sorted(state.sites.items()):
            online.add_metric([name], bool(site.get("online")))
        yield from (up, online)
        states = GaugeMetricFamily("umbel_queue", "Runs in the queue.", labels=["state"])
        found = [job.state for job in self._source.queue()]
        for state_name in sorted(set(found)):
            states.add_metric([state_name], found.count(state_name))
        yield states

    def _of_runs(self) -> Iterable[Metric]:
        runs = self._source.runs()
        count = GaugeMetricFamily("umbel_runs", "Runs of the store.", labels=["status"])
        for status in sorted({entry.status for entry in runs}):
            count.add_metric([status], sum(entry.status == status for entry in runs))
        done = GaugeMetricFamily("umbel_run_rounds_done", "Committed rounds.", labels=RUN)
        planned = GaugeMetricFamily("umbel_run_rounds_planned", "Planned rounds.", labels=RUN)
        seconds = GaugeMetricFamily("umbel_round_seconds", "Of the last round.", labels=RUN)
        clients = GaugeMetricFamily(
            "umbel_round_clients", "Of the last round.", labels=[*RUN, "outcome"]
        )
        value = GaugeMetricFamily(
            "umbel_run_metric", "Of the last evaluated round.", labels=[*RUN, "metric"]
        )
        spent = GaugeMetricFamily("umbel_epsilon", "Spent so far.", labels=RUN)
        limit = GaugeMetricFamily("umbel_epsilon_budget", "What may be spent.", labels=RUN)
        for entry in runs[:RUNS]:
            labels = [entry.run_id, entry.name]
            done.add_metric(labels, entry.rounds_done)
            planned.add_metric(labels, entry.rounds_planned)
            for name, figure in entry.metrics.items():
                if figure is not None:
                    value.add_metric([*labels, name], figure)
            last = self._source.store.history_json(entry.run_id, entry.rounds_done - 1)
            if not last:
                continue
            seconds.add_metric(labels, last[-1]["seconds"])
            clients.add_metric([*labels, "done"], len(last[-1]["participants"]))
            clients.add_metric([*labels, "failed"], len(last[-1]["failures"]))
            found = budget(entry, last)
            if found is not None and found.spent is not None:
                spent.add_metric(labels, found.spent)
                if found.limit is not None:
                    limit.add_metric(labels, found.limit)
        yield from (count, done, planned, seconds, clients, value, spent, limit)

    def _of_clients(self) -> Iterable[Metric]:
        asked = CounterMetricFamily(
            "umbel_client_rounds", "In which it was asked.", labels=["client"]
        )
        failed = CounterMetricFamily("umbel_client_failures", "Of these.", labels=["client"])
        received = CounterMetricFamily("umbel_client_bytes", "From it.", labels=["client"])
        for client in self._source.clients(most=100):
            asked.add_metric([client.name], client.rounds)
            failed.add_metric([client.name], client.failed)
            received.add_metric([client.name], client.received)
        yield from (asked, failed, received)


def exposition(source: Source) -> tuple[bytes, str]:
    """The figures as text, and its media type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(source))
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
