"""What the autoscalers go by, evaluated by promtool from Debian's package `prometheus`; skipped without it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml

from tests.deploy.rendered import KUBERNETES

COMPONENTS = KUBERNETES / "components"
[GROUP] = yaml.safe_load((COMPONENTS / "monitoring" / "rules.yaml").read_text())["spec"]["groups"]
[RULE] = GROUP["rules"]


def series(namespace: str, count: int, **attained: float) -> list[dict[str, str]]:
    """What one gateway shows for some minutes."""
    shown = {f"tandem:attainment_window_requests{{namespace='{namespace}', model_name='m'}}": float(count)}
    for objective, share in attained.items():
        labels = f"namespace='{namespace}', model_name='m', objective='{objective}'"
        shown[f"tandem:attainment_ratio{{{labels}}}"] = share
    return [{"series": name, "values": f"{value}x20"} for name, value in shown.items()]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool to run")
def test_misses_are_counted_and_where_nothing_ends_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [GROUP]}))
    shown = series("busy", 8, both=0.5, ttft=0.75, tpot=0.5) + series("idle", 0)
    expected = {("busy", "both"): 0.5, ("busy", "ttft"): 0.25, ("busy", "tpot"): 0.5}
    # And none of a gateway that is not there: its autoscalers are to do nothing.
    expected |= {("idle", "ttft"): 0.0, ("idle", "tpot"): 0.0}
    samples = [
        {"labels": f"{RULE['record']}{{namespace='{namespace}', objective='{objective}'}}", "value": value}
        for (namespace, objective), value in expected.items()
    ]
    asked = {"expr": RULE["record"], "eval_time": "2m", "exp_samples": samples}
    test = {"interval": "15s", "input_series": shown, "promql_expr_test": [asked]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [test]}))
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_says_something_of_an_idle_gateway_for_each_autoscaler() -> None:
    told: set[str] = set()

    def note(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.Call) and node.func.name == "label_replace":
            told.add(node.args[2].val)

    promql_parser.walk(promql_parser.parse(RULE["expr"]), note)
    asked = {
        metric["external"]["metric"]["selector"]["matchLabels"]["objective"]
        for path in (COMPONENTS / "autoscaling" / "prefill.yaml", COMPONENTS / "autoscaling" / "decode.yaml")
        for metric in yaml.safe_load(path.read_text())["spec"]["metrics"]
    }
    assert told == asked


def test_the_adapter_asks_the_prometheus_that_the_policy_lets_in() -> None:
    values = yaml.safe_load((COMPONENTS / "autoscaling" / "prometheus-adapter-values.yaml").read_text())
    policy = yaml.safe_load((COMPONENTS / "monitoring" / "network-policy.yaml").read_text())
    [[peer]] = [rule["from"] for rule in policy["spec"]["ingress"]]
    namespace = peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert values["prometheus"] == {"url": f"http://prometheus-operated.{namespace}.svc", "port": 9090}
