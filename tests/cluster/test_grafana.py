"""The dashboard shows every metric that a real pool exports to Prometheus, no other, and none twice."""

import json
import re
import time
from pathlib import Path

import httpx
import pytest
import ray
from ray.util.metrics import Counter, Gauge, Histogram

from actors.serving.handle import connect
from actors.serving.metrics import ScorerMetrics, http_refusals
from rlhf_critic.errors import ScorerRejected
from rlhf_critic.scoring.items import Text
from tests.actors.scorers import make_conversations
from tests.helpers import wait_until

DASHBOARD = json.loads((Path(__file__).parents[2] / "cluster" / "grafana" / "scorers.json").read_text())
METRIC_KINDS = (Counter, Gauge, Histogram)
METRIC = re.compile(r"ray_rlhf_critic_\w+")
SMALL_CACHE = 50_000  # bytes, so that prefixes are evicted
GAUGE_LIFE_S = 21  # Ray exports a gauge for two report intervals of 10 s after it was set


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_metric_of_a_pool_is_on_the_dashboard(no_pool, serving, critics):
    pool_url = serving(critics["first"], max_replicas=1, prefix_cache_bytes=SMALL_CACHE)
    httpx.post(f"{pool_url}/score", content=b"[", headers={"content-type": "application/json"}, timeout=60)
    with connect() as client:
        with pytest.raises(ScorerRejected):
            client.score_items([Text("")])
        time.sleep(GAUGE_LIFE_S)
        for half in (make_conversations(100)[:50], make_conversations(100)[50:]):
            scores = client.score_items(half)
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    asked_for = set(METRIC.findall(json.dumps(DASHBOARD)))
    exported = {}

    def read():
        exported["text"] = httpx.get(url, timeout=30).text
        return {name for name in METRIC.findall(exported["text"]) if not name.endswith("_created")}

    version = re.escape(scores.model_version)
    mean = scores.rewards_S.mean()
    values = {
        "items_total": (f'model_version="{version}"', lambda value: value == 100),
        "version": (f'model_version="{version}"', lambda value: value == 1),
        "refusals_total": ('kind="empty_text"', lambda value: value == 1),
        "http_refusals_total": ('kind="bad_request"', lambda value: value >= 1),  # counts all pools of this name
        "reward_mean": (f'model_version="{version}"', lambda value: abs(value - mean) < 1e-4),
        "shared_token_ratio": ("", lambda value: 0 < value < 1),  # the conversations share their prompts
    }

    def wrong():
        text = exported["text"]
        lines = {
            name: re.findall(rf"^ray_rlhf_critic_{name}{{.*{tag}.*}} (\S+)$", text, re.M)
            for name, (tag, _) in values.items()
        }
        return {name: found for name, found in lines.items() if not any(values[name][1](float(one)) for one in found)}

    # Ray exports each metric at its own time, so a name may be there before its value.
    wait_until(
        lambda: asked_for <= read() and not wrong(), lambda: f"the metrics {sorted(asked_for - read())}: {wrong()}", 60
    )
    histograms = re.compile(r"_(bucket|sum|count)$")
    assert {histograms.sub("", name) for name in read()} == {histograms.sub("", name) for name in asked_for}


def defined_metrics():
    """Lists the metrics of replicas and the gateway by name."""
    metrics = [one for one in vars(ScorerMetrics("app", "replica")).values() if isinstance(one, METRIC_KINDS)]
    metrics.append(http_refusals("app"))
    return {metric.info["name"]: metric for metric in metrics}


def test_every_metric_that_is_defined_is_asked_for_as_what_it_is():
    """Covers metrics that a short run omits; `test_every_metric_of_a_pool_is_on_the_dashboard` covers names."""
    defined = defined_metrics()
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    unused = dict(defined)
    for query in queries:
        for exported in METRIC.findall(query):
            name = exported.removeprefix("ray_")
            if name.endswith("_bucket"):
                name = name.removesuffix("_bucket")
                assert isinstance(defined[name], Histogram), query
                assert re.search(rf"histogram_quantile\(0\.\d+, sum by \(le\) \(rate\({exported}\{{", query), query
            elif isinstance(defined[name], Counter):
                assert name.endswith("_total"), "Ray exports a counter under this name alone"
                assert f"rate({exported}{{" in query, query
            else:
                assert isinstance(defined[name], Gauge), query
                assert "rate(" not in query, query
            for label in re.findall(r"by \((\w+)\)", query):
                assert label in {"le", *defined[name].info["tag_keys"]}, query
            unused.pop(name, None)
    assert not unused


def test_every_query_asks_the_chosen_source_for_the_chosen_pool():
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for panel in [*DASHBOARD["panels"], variables["app"]]:
        for asked in [panel, *panel.get("targets", [])]:
            assert asked["datasource"]["uid"] == "${datasource}"
    for panel in DASHBOARD["panels"]:
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert len(METRIC.findall(target["expr"])) == target["expr"].count('{app=~"$app"}'), target["expr"]


def test_the_dashboard_is_well_formed():
    assert DASHBOARD["schemaVersion"] >= 39
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    cells = set()
    for panel in panels:
        place = panel["gridPos"]
        taken = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, f"{panel['title']} lies on another"
        assert place["x"] + place["w"] <= 24
        cells |= taken
        assert panel["targets"]
        assert panel["description"]
        for target in panel["targets"]:
            assert METRIC.search(target["expr"])
            assert target["expr"].count("(") == target["expr"].count(")")
