"""Secure aggregation in whole runs: the same model, whatever is hidden and whoever vanishes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from umbel.core import registry
from umbel.core.errors import InputError
from umbel.core.payloads import EvaluatePlan, Evaluation, Failure, TrainPlan, Updates
from umbel.core.run_file import RunFile, Strategy, resolve
from umbel.privacy.secure_aggregation.agreement import KeyPair
from umbel.privacy.secure_aggregation.server import Stage
from umbel.server.evaluation import evaluation
from umbel.server.records import RoundResult
from umbel.server.rounds import Cohort, Start, rounds, uniform
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.prepare import Prepared, prepare
from umbel.simulations.secure import SecureFederation
from umbel.simulations.simulate import simulate
from umbel.strategies.build import build_strategy
from umbel.strategies.parts.secure_sum import SecureSum, value_bits

CLIENTS = 8


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_file(
    secure: dict[str, Any] | None, store: Path | str = "runs", **tables: dict[str, Any]
) -> RunFile:
    table: dict[str, Any] = {
        "run": {"rounds": 2, "store": str(store), "seed": 5} | tables.pop("run", {}),
        "data": {
            "name": "breast-cancer",
            "split": {"kind": "dirichlet", "clients": CLIENTS, "alpha": 1.0},
            "client_holdout": 0.2,
        },
        "task": {"kind": "classification", "model": "logistic"},
        "client": {"device": "cpu", "local_steps": 3},
        "strategy": {"cohort": 6, "max_weight": 100.0} | tables.pop("strategy", {}),
        **tables,
    }
    if secure is not None:
        table["secure_aggregation"] = {"enabled": True, **secure}
    return resolve(table)


def federation(
    prepared: Prepared, silent: Callable[[Stage, int], bool] | None = None
) -> SecureFederation:
    inner = sequential(prepared.run, prepared.data, prepared.task, prepared.strategy.client)
    more = {} if silent is None else {"silent": silent}
    return SecureFederation(inner, prepared.run, prepared.strategy, **more)


def plan(prepared: Prepared) -> TrainPlan:
    names = list(prepared.data.names[:6])
    return TrainPlan(1, names, prepared.model(), len(names))


def whole(items: list[Any]) -> Cohort:
    (found,) = (item for item in items if isinstance(item, Cohort))
    return found


def model_of(path: str | None) -> dict[str, torch.Tensor]:
    assert path is not None
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize("weights", ["examples", "uniform"])
@pytest.mark.parametrize("bits", [32, 24])
def test_the_mean_is_the_plain_one_to_the_stated_error(weights: str, bits: int) -> None:
    run = run_file({"bits": bits}, strategy={"weights": weights})
    prepared = prepare(run)
    asked = plan(prepared)
    inner = sequential(run, prepared.data, prepared.task, prepared.strategy.client)
    combine = prepared.strategy.combine
    plain = combine.zero(asked.expected())
    for update in inner.train(asked):
        assert isinstance(update, Updates)
        weighed = uniform(update) if weights == "uniform" else update
        capped = weighed.weights.clamp(max=100.0)
        plain = combine.add(plain, Updates(1, update.clients, update.delta, capped))
    hidden = whole(list(federation(prepared).train(asked)))
    assert hidden.participants == asked.clients
    assert hidden.sums.clients == plain.clients == 6
    cap = 1.0 if weights == "uniform" else 100.0
    sums = SecureSum(
        combine,
        lambda: combine.zero(asked.expected()),
        asked.expected(),
        frozenset(),
        run.secure_aggregation,
        cap,
        value_bits(6, run.secure_aggregation),
    )
    bound = sums.error_bound(6)
    # Six values in the ring, clip 4: the bound is what docs/secure-aggregation.md says it is.
    levels = 2 ** (29 if bits == 32 else 21) - 1
    assert bound["0/" + next(iter(plain.delta))] == pytest.approx(6 * cap * 2 * 4.0 / levels)
    for name, tensor in plain.delta.items():
        error = float((hidden.sums.delta[name] - tensor).abs().max())
        assert error <= bound[f"0/{name}"]
        assert error > 0, "rounding shows, or nothing was rounded"
    assert abs(hidden.sums.weight - plain.weight) <= bound["1"]


def test_masks_workers_and_engines_change_no_bit(tmp_path: Path) -> None:
    kept = {}
    for name, secure, engine, processes in (
        ("masked", {}, "vectorised", 0),
        ("unmasked", {"accounting_only": True}, "vectorised", 0),
        ("sequential", {}, "sequential", 0),
        ("workers", {"accounting_only": True}, "vectorised", 2),
    ):
        section = {"processes": processes, "engine_plan": "stacked:chunk=3"}
        run = run_file(secure, tmp_path / name, run=section)
        outcome = simulate(run, engine=engine)
        assert outcome.status == "finished"
        kept[name] = model_of(outcome.model)
    plain = model_of(simulate(run_file(None, tmp_path / "plain"), engine="sequential").model)
    for name, tensor in kept["masked"].items():
        assert torch.equal(tensor, kept["unmasked"][name])
        assert torch.equal(tensor, kept["workers"][name])
        torch.testing.assert_close(tensor, kept["sequential"][name], rtol=0, atol=1e-6)
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "stage", [Stage.ADVERTS, Stage.SHARES, Stage.MASKED, Stage.CONSENTS, Stage.UNMASK]
)
def test_a_client_lost_in_any_stage_costs_at_most_its_own_update(stage: Stage) -> None:
    run = run_file({})
    prepared = prepare(run)
    asked = plan(prepared)
    items = list(federation(prepared, lambda s, member: s is stage and member == 2).train(asked))
    late = stage in (Stage.CONSENTS, Stage.UNMASK)  # its vector is in the sum already
    there = asked.clients if late else [c for i, c in enumerate(asked.clients) if i != 2]
    found = whole(items)
    assert found.participants == there
    failures = [item for item in items if isinstance(item, Failure)]
    assert [f.client for f in failures] == ([] if late else [asked.clients[2]])
    assert all("silent" in f.reason for f in failures)
    combine = prepared.strategy.combine
    inner = sequential(run, prepared.data, prepared.task, prepared.strategy.client)
    plain = combine.zero(asked.expected())
    for update in inner.train(asked.part(there)):
        assert isinstance(update, Updates)
        capped = update.weights.clamp(max=100.0)
        plain = combine.add(plain, Updates(1, update.clients, update.delta, capped))
    assert found.sums.clients == len(there)
    assert found.sums.weight == pytest.approx(plain.weight, abs=1e-3)
    for name, tensor in plain.delta.items():
        torch.testing.assert_close(found.sums.delta[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", [Stage.SHARES, Stage.MASKED, Stage.CONSENTS, Stage.UNMASK])
def test_too_many_lost_end_the_round_and_the_run_goes_on(stage: Stage) -> None:
    run = run_file({})
    prepared = prepare(run)
    lost: list[int] = []

    def silent(now: Stage, member: int) -> bool:
        if now is stage and len(lost) < 4:  # in the first round; the second is whole again
            lost.append(member)
            return True
        return False

    secure = federation(prepared, silent)
    score = evaluation(run, secure, prepared.task, prepared.module, prepared.data.test, "cpu")
    start = Start(0, prepared.model(), prepared.strategy.init(prepared.model().params))
    found: list[RoundResult] = list(rounds(run, prepared.strategy, secure, start, score))
    first, second = (result.record for result in found)
    assert first.participants == []
    assert "secure aggregation" in "".join(f.reason for f in first.failures)
    assert len({f.client for f in first.failures}) == len(first.failures) == 6
    assert first.note.startswith("quorum missed: 0 of 1")
    assert "secure aggregation ended without a sum" in first.note
    assert all(torch.equal(t, start.model.params[n]) for n, t in found[0].model.params.items())
    assert len(second.participants) == 6
    assert second.note == ""


def test_a_client_with_a_broken_update_is_named_and_left_out() -> None:
    prepared = prepare(run_file({}))
    asked = plan(prepared)
    inner = federation(prepared)._inner

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def train(self, given: TrainPlan) -> Any:
            for item in inner.train(given):
                if isinstance(item, Updates) and item.clients[0] == asked.clients[1]:
                    for tensor in item.delta.values():
                        tensor.fill_(float("nan"))
                yield item

    items = list(SecureFederation(Broken(), prepared.run, prepared.strategy).train(asked))
    assert [i.client for i in items if isinstance(i, Failure)] == [asked.clients[1]]
    assert asked.clients[1] not in whole(items).participants
    assert all(t.isfinite().all() for t in whole(items).sums.delta.values())


def test_groups_are_random_disjoint_and_sum_to_the_whole() -> None:
    prepared = prepare(run_file({"groups": 2}))
    asked = plan(prepared)
    found = whole(list(federation(prepared).train(asked)))
    assert found.participants == asked.clients
    one = whole(list(federation(prepare(run_file({}))).train(asked)))
    assert found.sums.clients == one.sums.clients
    for name, tensor in one.sums.delta.items():
        torch.testing.assert_close(found.sums.delta[name], tensor, rtol=0, atol=1e-4)


def test_a_robust_rule_sees_the_sums_of_groups_alone(tmp_path: Path) -> None:
    strategy = {"name": "median", "weights": "uniform", "cohort": 8}
    with pytest.raises(InputError, match=r"needs single updates.*groups"):
        prepare(run_file({}, strategy=strategy))
    run = run_file({"groups": 2}, tmp_path, strategy=strategy)
    prepared = prepare(run)
    asked = TrainPlan(1, list(prepared.data.names), prepared.model(), CLIENTS)
    found = whole(list(federation(prepared).train(asked)))
    assert len(found.participants) == CLIENTS
    combined = prepared.strategy.combine.finish(found.sums)
    # The median of two groups is their mean, and the mean of means of four is that of eight.
    inner = sequential(run, prepared.data, prepared.task, prepared.strategy.client)
    rows = [u.delta for u in inner.train(asked) if isinstance(u, Updates)]
    for name, tensor in combined.delta.items():
        mean = torch.stack([row[name][0].double() for row in rows]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-5)
    outcome = simulate(run, engine="sequential")
    assert outcome.status == "finished"
    assert len(outcome.history[-1].participants) == CLIENTS


def test_nobodys_own_figures_are_shown(tmp_path: Path) -> None:
    run = run_file({}, tmp_path)
    outcome = simulate(run, engine="sequential")
    assert outcome.per_client == {}
    assert outcome.metrics
    prepared = prepare(run)
    names = prepared.data.names
    items = list(federation(prepared).evaluate(EvaluatePlan(1, names, prepared.model())))
    assert [type(item) for item in items] == [Evaluation]
    inner = sequential(run, prepared.data, prepared.task, prepared.strategy.client)
    each = [
        e
        for e in inner.evaluate(EvaluatePlan(1, names, prepared.model()))
        if isinstance(e, Evaluation)
    ]
    assert items[0].examples == sum(e.examples for e in each)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("secure", "tables", "words"),
    [
        ({}, {"strategy": {"over_selection": 0.5}}, "over_selection"),
        ({}, {"strategy": {"max_weight": 1e9, "cohort": 2}}, "below min_cohort = 3"),
        ({"groups": 3}, {}, "a sum of 2 is below min_cohort"),
        ({}, {"evaluate": {"per_client": True}}, "per_client"),
        ({"corrupt_fraction": 0.5, "dropout_fraction": 0.4}, {}, "no graph"),
        ({"threshold": 2}, {}, "need 3 to 5"),
        ({"neighbours": 4, "threshold": 5}, {}, "need 3 to 4"),
        ({"min_cohort": 7}, {}, "below min_cohort = 7"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    secure: dict[str, Any], tables: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        prepare(run_file(secure, **tables))


def test_unbounded_weights_are_refused() -> None:
    table = run_file({}).model_dump(mode="json", exclude_none=True)
    del table["strategy"]["max_weight"]
    with pytest.raises(InputError, match="max_weight"):
        prepare(resolve(table))


def test_a_claimed_weight_counts_for_no_more_than_the_cap() -> None:
    prepared = prepare(run_file({}, strategy={"max_weight": 5.0}))
    found = whole(list(federation(prepared).train(plan(prepared))))
    assert found.sums.weight == pytest.approx(30.0, abs=1e-6)
    assert found.capped == found.participants


def strategies() -> list[str]:
    return sorted(registry.known("strategies"))


@pytest.mark.parametrize("name", strategies())
def test_what_workers_fold_is_a_sum_and_goes_under_masks_whole(name: str) -> None:
    try:
        strategy = build_strategy(Strategy.model_validate({"name": name}))
    except InputError as error:
        pytest.skip(f"has no defaults: {error}")
    if strategy.combine.merge is None:
        pytest.skip("needs the whole cohort; groups are tested above")
    model = prepare(run_file(None)).model()
    template = {**model.tensors(), **strategy.upload_template(model.params)}
    generator = torch.Generator().manual_seed(1)

    def update(client: str, weight: float) -> Updates:
        delta = {
            n: 0.1 * torch.randn((1, *t.shape), generator=generator) for n, t in template.items()
        }
        return Updates(1, [client], delta, torch.tensor([weight], dtype=torch.float64))

    def zero() -> Any:
        return strategy.combine.zero(template)

    given = [update("a", 3.0), update("b", 8.0), update("c", 1.0)]
    section = run_file({}).secure_aggregation
    sums = SecureSum(
        strategy.combine, zero, template, frozenset(), section, 10.0, value_bits(3, section)
    )
    words = sum(sums.encode(u) for u in given)
    found = strategy.combine.finish(sums.decode(words, 3, []).accumulator)  # type: ignore[arg-type]
    plain = zero()
    for u in given:
        plain = strategy.combine.add(plain, u)
    expected = strategy.combine.finish(plain)
    assert found.clients == expected.clients == 3
    assert found.weight == pytest.approx(expected.weight, abs=1e-6)
    assert found.delta.keys() == expected.delta.keys()
    for key, tensor in expected.delta.items():
        torch.testing.assert_close(found.delta[key], tensor, rtol=0, atol=1e-6)


def test_a_fixed_cohort_agrees_on_keys_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreed: list[int] = []
    agree = KeyPair.agree

    def counted(self: KeyPair, public_key: bytes, member: int) -> bytes:
        agreed.append(member)
        return agree(self, public_key, member)

    monkeypatch.setattr(KeyPair, "agree", counted)
    models = []
    for keep, times in ((True, 1), (False, 2)):
        agreed.clear()
        run = run_file({"keep_setup": keep}, tmp_path / str(keep), strategy={"cohort": CLIENTS})
        models.append(model_of(simulate(run, engine="sequential").model))
        assert len(agreed) == times * CLIENTS * (CLIENTS - 1)
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name])


def test_client_level_privacy_clips_under_the_mask(tmp_path: Path) -> None:
    privacy = {"unit": "client", "noise_multiplier": 0.0, "clip_norm": 0.05, "delta": 1e-3}
    strategy = {"weights": "uniform"}
    plain = simulate(
        run_file(None, tmp_path / "plain", privacy=privacy, strategy=strategy), engine="sequential"
    )
    hidden = simulate(
        run_file({}, tmp_path / "hidden", privacy=privacy, strategy=strategy), engine="sequential"
    )
    assert plain.status == hidden.status == "finished"
    left, right = model_of(plain.model), model_of(hidden.model)
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=0, atol=1e-5)
    free = model_of(
        simulate(run_file(None, tmp_path / "free", strategy=strategy), engine="sequential").model
    )
    assert any(not torch.allclose(free[n], t, atol=1e-3) for n, t in left.items()), "it clips"
