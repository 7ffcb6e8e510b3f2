"""The dashboard asks for every metric that a real pool gives to Prometheus, for no other, and draws nothing twice."""

import json
import re
from pathlib import Path

import httpx
import pytest
import ray

from actors.scorer_handle import connect
from rlhf_critic.errors import ScorerRejected
from rlhf_critic.scoring import Text
from tests.actors.scorers import make_conversations
from tests.helpers import wait_until

DASHBOARD = json.loads((Path(__file__).parents[2] / "cluster" / "grafana" / "scorers.json").read_text())
METRIC = re.compile(r"ray_rlhf_critic_\w+")


@pytest.mark.timeout(300)
def test_every_metric_of_a_pool_is_on_the_dashboard(serving, critics):
    serving(critics["first"], max_replicas=1)
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
    mean = float(re.search(rf'ray_rlhf_critic_reward_mean{{.*model_version="{version}".*}} (\S+)', text).group(1))
    assert mean == pytest.approx(float(scores.rewards_S.mean()), abs=1e-4)
    shared = float(re.search(r"ray_rlhf_critic_shared_token_ratio{.*} (\S+)", text).group(1))
    assert 0 < shared < 1, "the conversations share their prompts"


def test_the_dashboard_is_well_formed():
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
