from __future__ import annotations

from datetime import datetime, time
from pathlib import Path
from typing import Any

import pytest

from umbel.client.policy import (
    POLICY,
    Policy,
    PolicyError,
    check_round,
    check_run,
    read_policy,
    within,
)
from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve

NOON = datetime(2026, 11, 22, 12, 0)


def run(**sections: dict[str, Any]) -> RunFile:
    table: dict[str, Any] = {
        "data": {"name": "npz", "classes": 2},
        "task": {"kind": "classification", "model": "logistic"},
    }
    for name, keys in sections.items():
        table[name] = {**table.get(name, {}), **keys}
    return resolve(table)


def policy(**sections: dict[str, Any]) -> Policy:
    return Policy.model_validate(sections)


def test_a_new_sites_policy_can_be_read_and_allows_what_comes_with_umbel(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(POLICY)
    rules = read_policy(tmp_path / "policy.toml")
    check_run(rules, run())
    check_round(rules, 1, 0, NOON, trains=True)
    every_key = POLICY.replace("# ", "")
    for section in ("allow", "privacy", "limits"):
        for key in getattr(rules, section).model_dump():
            assert f"\n{key} =" in every_key


@pytest.mark.parametrize(
    ("rules", "sections", "rule"),
    [
        ({"allow": {"tasks": ("regression",)}}, {}, "tasks"),
        ({"allow": {"strategies": ("fedprox",)}}, {}, "strategies"),
        ({"allow": {"datasets": ()}}, {}, "datasets"),
        ({"allow": {"models": ("mlp",)}}, {}, "models"),
        ({"allow": {"models": ("mlp",)}}, {"task": {"model": {"name": "cnn"}}}, "models"),
        ({}, {"task": {"model": {"name": "os:system"}}}, "own_parts"),
        ({}, {"strategy": {"name": "subprocess:run"}}, "own_parts"),
        ({}, {"task": {"kind": "grpo", "reward": "os:system"}}, "own_parts"),
        ({}, {"task": {"kind": "grpo", "judge_from": "/etc/judge"}}, "own_parts"),
        ({}, {"task": {"kind": "grpo", "judge": {"name": "x", "path": "/etc"}}}, "own_parts"),
        ({}, {"task": {"model": {"name": "encoder", "of": {"name": "os:system"}}}}, "own_parts"),
        ({"privacy": {"unit": "example"}}, {}, "unit"),
        ({"privacy": {"minimum_noise": 1.0}}, {}, "unit"),
        ({"privacy": {"maximum_epsilon_run": 1.0}}, {}, "unit"),
        (
            {"privacy": {"minimum_noise": 1.0}},
            {"privacy": {"unit": "example", "noise_multiplier": 0.9}},
            "minimum_noise",
        ),
        (
            {"privacy": {"minimum_noise": 1.0}},
            {"privacy": {"unit": "example", "epsilon": 0.5}},
            "minimum_noise",
        ),
        (
            {"privacy": {"maximum_epsilon_run": 1.0}},
            {"privacy": {"unit": "example", "epsilon": 1.1}},
            "maximum_epsilon_run",
        ),
        (
            {"privacy": {"maximum_epsilon_run": 1.0}},
            {"privacy": {"unit": "example", "noise_multiplier": 9.0}},
            "maximum_epsilon_run",
        ),
        (
            {"privacy": {"unit": "example"}},
            {"privacy": {"unit": "client", "noise_multiplier": 9.0}},
            "unit",
        ),
        ({"privacy": {"secure_aggregation": True}}, {}, "secure_aggregation"),
        (
            {"allow": {"defences": ["naive"]}},
            {"continual": {"experiences": 2, "defence": "ewc"}},
            "defences",
        ),
        ({"allow": {"defences": []}}, {"continual": {"experiences": 2}}, "defences"),
        ({"limits": {"maximum_rounds": 9}}, {"run": {"rounds": 10}}, "maximum_rounds"),
    ],
)
def test_each_rule_refuses_by_its_name(
    rules: dict[str, Any], sections: dict[str, Any], rule: str
) -> None:
    with pytest.raises(PolicyError) as refused:
        check_run(policy(**rules), run(**sections))
    assert refused.value.rule == rule
    assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    ("rules", "sections"),
    [
        ({"allow": {"tasks": ("classification",), "strategies": ("fedavg",)}}, {}),
        ({"allow": {"own_parts": ("a.b:c",)}}, {"task": {"model": {"name": "a.b:c"}}}),
        (
            {"privacy": {"unit": "example", "minimum_noise": 1.0, "maximum_epsilon_run": 2.0}},
            {"privacy": {"unit": "example", "noise_multiplier": 1.0, "epsilon": 2.0}},
        ),
        ({"limits": {"maximum_rounds": 10}}, {"run": {"rounds": 10}}),
    ],
)
def test_what_is_at_the_bound_is_allowed(rules: dict[str, Any], sections: dict[str, Any]) -> None:
    check_run(policy(**rules), run(**sections))


def test_small_cohorts_late_hours_and_repetitions_are_refused() -> None:
    rules = policy(limits={"minimum_cohort": 3, "hours": "20:00-06:00", "repeats": 2})
    night = NOON.replace(hour=23)
    check_round(rules, 3, 2, night, trains=True)
    check_round(rules, 1, 0, night, trains=False)  # a greeting tells nothing of a sum
    for asked, before, now, rule in (
        (2, 0, night, "minimum_cohort"),
        (3, 3, night, "repeats"),
        (3, 0, NOON, "hours"),
    ):
        with pytest.raises(PolicyError) as refused:
            check_round(rules, asked, before, now, trains=True)
        assert refused.value.rule == rule


def test_hours_go_past_midnight() -> None:
    for hours, inside, outside in (
        ("20:00-06:00", ("20:00", "23:59", "00:00", "05:59"), ("06:00", "12:00", "19:59")),
        ("08:00-17:00", ("08:00", "16:59"), ("07:59", "17:00", "00:00")),
    ):
        assert all(within(hours, time.fromisoformat(t)) for t in inside)
        assert not any(within(hours, time.fromisoformat(t)) for t in outside)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[allow]\ntask = ['x']", "unknown key 'task'"),
        ("[limits]\nhours = '8-17'", "hours"),
        ("[limits]\nhours = '08:00-08:00'", "hours"),
        ("[privacy]\nminimum_noise = -1", "minimum_noise"),
        ("[limits", "cannot read it"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_policy(tmp_path / "policy.toml")
    with pytest.raises(InputError, match="no such file"):
        read_policy(tmp_path / "none.toml")
