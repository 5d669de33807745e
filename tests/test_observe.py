import json
import re
from pathlib import Path

from serve.observe import Observed

DASHBOARD = json.loads((Path(__file__).parents[1] / "serve" / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def labels():
    """Of each metric."""
    return {metric.info["name"]: set(metric.info["tag_keys"]) for metric in vars(Observed()).values()}


def names(expression):
    return {re.sub(r"_(total|bucket)$", "", found) for found in re.findall(r"ray_(\w+)", expression)}


def test_the_dashboard_asks_for_every_metric_that_there_is_and_for_no_other():
    assert set().union(*map(names, EXPRESSIONS)) == set(labels())


def test_the_dashboard_asks_for_labels_that_its_metrics_have():
    for expression in EXPRESSIONS:
        asked = set(re.findall(r'(\w+)(?:=|!=|=~)"', expression))
        asked |= {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
        assert asked - {"le"} <= set.intersection(*(labels()[name] for name in names(expression))), expression


def test_no_panel_lies_on_another():
    cells = []
    for at in (panel["gridPos"] for panel in DASHBOARD["panels"]):
        cells += [(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
