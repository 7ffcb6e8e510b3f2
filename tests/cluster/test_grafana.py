"""The dashboard shows every metric that a real pool exports to Prometheus, no other, and none twice."""

import json
import re
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


@pytest.mark.timeout(300)
def test_every_metric_of_a_pool_is_on_the_dashboard(no_pool, serving, critics):
    pool_url = serving(critics["first"], max_replicas=1)
    httpx.post(f"{pool_url}/score", content=b"[", timeout=60)
    with connect() as client:
        scores = client.score_items(make_conversations(50))
        with pytest.raises(ScorerRejected):
            client.score_items([Text("")])
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    asked_for = set(METRIC.findall(json.dumps(DASHBOARD)))
    exported = {}

    def read():
        exported["text"] = httpx.get(url, timeout=30).text
        return {name for name in METRIC.findall(exported["text"]) if not name.endswith("_created")}

    wait_until(lambda: asked_for <= read(), f"the metrics {sorted(asked_for)}", 60)
    histograms = re.compile(r"_(bucket|sum|count)$")
    assert {histograms.sub("", name) for name in read()} == {histograms.sub("", name) for name in asked_for}
    text = exported["text"]
    version = re.escape(scores.model_version)
    assert re.search(rf'ray_rlhf_critic_items_total{{.*model_version="{version}".*}} 50\.0', text)
    assert re.search(rf'ray_rlhf_critic_version{{.*model_version="{version}".*}} 1\.0', text)
    assert re.search(r'ray_rlhf_critic_refusals_total{.*kind="empty_text".*} 1\.0', text)
    assert re.search(
        r'ray_rlhf_critic_http_refusals_total{.*kind="bad_request".*} [1-9]', text
    )  # all metrics of this app
    mean = float(re.search(rf'ray_rlhf_critic_reward_mean{{.*model_version="{version}".*}} (\S+)', text).group(1))
    assert mean == pytest.approx(float(scores.rewards_S.mean()), abs=1e-4)
    shared = float(re.search(r"ray_rlhf_critic_shared_token_ratio{.*} (\S+)", text).group(1))
    assert 0 < shared < 1, "the conversations share their prompts"


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
