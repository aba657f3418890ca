from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest

from umbel.cli.main import run
from umbel.core.errors import InputError, RunError
from umbel.simulations.benchmarks import engine
from umbel.simulations.benchmarks.parts import environments, processes, systems, workloads

TELL = """
    import json, os, subprocess, sys, time
    def tell(**facts):
        print("\\n@bench " + json.dumps({"time": time.monotonic(), **facts}), flush=True)
"""


def program(folder: Path, text: str) -> list[str]:
    path = folder / "program.py"
    path.write_text(textwrap.dedent(TELL) + textwrap.dedent(text), encoding="utf-8")
    return [sys.executable, str(path)]


def living(argument: str) -> list[str]:
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        found += [place.parent.name] if argument in words else []
    return found


def test_flops_of_the_cnn_are_those_of_its_layers() -> None:
    conv1, conv2 = 28 * 28 * 16 * 9, 14 * 14 * 32 * 9 * 16
    dense = 1568 * 40 + 40 * 10
    forward = 2 * (conv1 + conv2 + dense)
    backward = forward + 2 * (conv2 + dense)  # the images need no gradient
    assert workloads.flops(workloads.W1) == (forward + backward) * 100 * 50


def test_flops_of_one_step_of_the_logistic_regression() -> None:
    assert workloads.flops(workloads.W2) == 2 * (2 * 640) * 100 * 10


def test_models_have_the_documented_sizes() -> None:
    sizes = [
        sum(p.numel() for p in workloads.module(w).parameters())
        for w in workloads.WORKLOADS.values()
    ]
    assert sizes == [67_970, 650]


def test_sgemm_rate_is_a_rate() -> None:
    assert 1e8 < workloads.sgemm_rate(side=256, tries=3) < 1e15


def test_files_hold_the_same_work_for_all(tmp_path: Path) -> None:
    import numpy as np

    from umbel.simulations.prepare import prepare

    files = workloads.write(workloads.W2, tmp_path)
    from umbel.core.run_file import load

    prepared = prepare(load(files.run_file))
    assert len(prepared.data.names) == 100
    assert set(prepared.data.train_holdings.sizes().tolist()) == {50}
    with np.load(files.init) as init:
        for name, value in prepared.model().params.items():
            np.testing.assert_array_equal(init[name], value.numpy())
    with np.load(files.data) as data:
        rows = prepared.data.train_holdings.of_client(prepared.data.names.index("7"))
        np.testing.assert_array_equal(prepared.data.train["x"][rows], data["x"][350:400])


SMALL = {"clients": 4, "examples": 8, "batch": 4, "cohort": 2}
SHRUNK = {
    "CIFAR": {"shape": (3, 8, 8), "model": {**workloads.RESNET18, "channels": [4], "groups": 2}},
    "LORA": {"shape": (6,), "model": {"name": "gpt", "layers": 1, "width": 8}, "vocabulary": 16},
}


@pytest.mark.parametrize("name", SHRUNK)
def test_programs_beside_umbel_train_the_same_model_by_the_same_loss(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    import torch

    from umbel.core.run_file import load
    from umbel.simulations.prepare import prepare

    monkeypatch.syspath_prepend(str(systems.PEERS))
    import peer_torch

    work = workloads.GPU[name]._replace(**SMALL, **SHRUNK[name])
    files = workloads.write(work, tmp_path)
    with np.load(files.data) as data:
        x, y = torch.from_numpy(data["x"][:4]), torch.from_numpy(data["y"][:4])
    theirs, ours = peer_torch.build(str(files.model), x), workloads.module(work)
    theirs.train()
    assert {n: p.requires_grad for n, p in theirs.named_parameters()} == {
        n: p.requires_grad for n, p in ours.named_parameters()
    }
    loss = peer_torch.loss(theirs(x), x, y)
    expected = workloads._task(work).losses(ours, {"x": x, "y": y}).mean()
    torch.testing.assert_close(loss, expected)
    torch.autograd.backward([loss, expected])
    for left, right in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad)
    params = prepare(load(files.run_file)).model().params
    with np.load(files.init) as init:
        assert params
        for key, value in params.items():
            np.testing.assert_array_equal(init[key], value.numpy())


def test_without_a_gpu_its_benchmark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch sees no GPU"):
        engine.measure(engine.parser().parse_args(["--device", "cuda"]))


def test_rounds_are_what_lies_between_their_ends(tmp_path: Path) -> None:
    command = program(
        tmp_path,
        """
        print("something else, and no newline", end="")
        for number in range(4):
            tell(round=number)
            time.sleep(0.1)
        tell(versions={"x": "1"})
        """,
    )
    taken = processes.measure(command, os.environ, rounds=3)
    assert not taken.error
    assert len(taken.rounds) == 2
    assert all(0.09 < seconds < 5 for seconds in taken.rounds)
    assert taken.first_round > 0.1
    assert taken.facts == {"versions": {"x": "1"}}


def test_memory_and_cpu_of_the_whole_tree_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "REST", 0)
    # The grandchild is in a session of its own, and its parent has gone.
    command = program(
        tmp_path,
        """
        inner = (
            "import time; held = bytearray(b'x') * 150_000_000\\n"
            "open('held', 'w').close()\\n"
            "end = time.monotonic() + 2\\n"
            "while time.monotonic() < end: pass"
        )
        os.chdir(os.path.dirname(__file__))
        outer = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {inner!r}])"
        subprocess.run([sys.executable, "-c", outer], start_new_session=True)
        while not os.path.exists("held"):
            time.sleep(0.01)
        for number in range(3):
            tell(round=number)
            time.sleep(0.7)
        """,
    )
    taken = processes.measure(command, os.environ, rounds=2)
    assert not taken.error
    assert taken.peak_bytes is not None
    assert 150e6 < taken.peak_bytes < 400e6
    assert taken.cpu_seconds > 0.05


def test_memory_that_processes_share_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "REST", 0)
    command = program(
        tmp_path,
        """
        held = bytearray(b"x") * 150_000_000
        if os.fork() == 0:
            time.sleep(2)
            os._exit(0)
        for number in range(3):
            tell(round=number)
            time.sleep(0.5)
        """,
    )
    taken = processes.measure(command, os.environ, rounds=2)
    assert taken.peak_bytes is not None
    assert 150e6 < taken.peak_bytes < 250e6


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    taken = processes.measure(program(tmp_path, "raise ValueError('no luck')"), os.environ, 2)
    assert taken.error == "exit code 1: ValueError: no luck"


def test_a_program_that_ends_early_has_no_figures(tmp_path: Path) -> None:
    taken = processes.measure(program(tmp_path, "tell(round=0); tell(round=1)"), os.environ, 2)
    assert taken.error
    assert not taken.rounds


def test_a_program_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    argument = f"time.sleep(600)  # {tmp_path}"
    command = program(
        tmp_path,
        f"""
        subprocess.Popen([sys.executable, "-c", "import time; " + {argument!r}])
        tell(round=0)
        time.sleep(600)
        """,
    )
    taken = processes.measure(command, os.environ, rounds=2, limit=2.0)
    assert taken.error == "ended after 2 s, in round 1 of 2"
    assert not living("import time; " + argument)


def row(name: str, seconds: float, loss: float) -> engine.Result:
    return {"name": name, "seconds_per_round": seconds, "loss": loss}


def test_ratios_are_to_umbel_and_a_system_that_did_not_learn_is_marked() -> None:
    rows = [row("umbel", 0.5, 1.0), row("a", 2.0, 1.04), row("b", 0.1, 2.3), {"error": "no"}]
    engine._compare(rows, start=2.3)
    assert [r.get("ratio") for r in rows] == [1.0, 4.0, 0.2, None]
    assert [r.get("comparable") for r in rows] == [True, True, False, None]


@pytest.mark.parametrize(
    "options",
    [
        ["--systems", "umbel,flwr"],
        ["--workload", "W9"],
        ["--rounds", "1"],
        ["--repeat", "-1"],
        ["--values", "ten", "--sweep", "cohort"],
        ["--values", "10"],
        ["--colour"],
        ["--draw", "no/such/file.json"],
    ],
)
def test_wrong_options_are_refused_before_anything_runs(options: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        engine.measure(engine.parser().parse_args(options))
    assert caught.value.where == "umbel bench engine"
    assert caught.value.fix


@pytest.mark.parametrize("sweep", ["cohort", None])
def test_pictures_are_drawn_again_from_a_saved_result(
    sweep: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    systems_ = [row("umbel", 0.5, 1.0) | {"title": "Umbel", "repetitions": [0.4, 0.6]}]
    shared = {"title": "work", "parameters": 650, "initial_loss": 2.0}
    floor = {"seconds": 0.1, "flops": 1, "flops_per_second": 10.0}
    saved = {
        "date": "today",
        "machine": {"cores": 2, "cpu": "x"},
        "load": {"before": [0.0], "after": [0.0]},
        "versions": {"torch": "2"},
        "repeat": 1,
        "sweep": sweep,
        "workloads": [
            {"name": f"W{n}", "value": n, "systems": systems_, "floor": floor, **shared}
            for n in (10, 100)
        ],
    }
    (tmp_path / "saved.json").write_text(json.dumps(saved))
    options = ["--draw", str(tmp_path / "saved.json"), "--save", str(tmp_path / "new")]
    result = engine.measure(engine.parser().parse_args(options))
    names = ["engine-cohort.png"] if sweep else ["engine-W10.png", "engine-W100.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    assert [Path(path).name for path in result["pictures"]] == names


def test_every_system_has_a_program_and_says_how_it_is_set_up() -> None:
    for system in systems.SYSTEMS.values():
        assert (systems.PEERS / system.program).is_file()
        assert system.settings
        assert not system.environment or system.environment in environments.requirements()


def test_threads_are_nobodys_business(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" not in systems.environment(tmp_path, "cpu")


@pytest.mark.slow
def test_an_environment_that_cannot_be_made_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"pfl": ["no-such-distribution-anywhere==1.0"]}
    monkeypatch.setattr(environments, "requirements", lambda: wanted)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RunError, match="no-such-distribution-anywhere"):
        environments.python("pfl", tmp_path, lambda text: None)


def test_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["benchmarks"]
    summaries = {found["name"]: found["summary"] for found in rows}
    assert {"engine", "heart_disease", "mnist_2nn", "vectorised_vs_sequential"} <= set(summaries)
    assert all(summaries.values())


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "enigne", "--format", "json"],
        ["bench", "engine", "--format", "json", "--colour"],
        ["bench", "heart-disease", "--format=json"],
    ],
)
def test_a_wrong_name_or_option_is_bad_input(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["message"]
    assert error["fix"]


def test_a_benchmark_that_prints_has_its_lines_in_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from umbel.simulations.benchmarks import mnist_2nn

    def main() -> None:
        print("a table", sys.argv[1:])
        raise SystemExit(1)

    monkeypatch.setattr(mnist_2nn, "main", main)
    assert run(["bench", "mnist-2nn", "--data", "D", "--format", "json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"] is False
    assert answer["lines"] == ["a table ['--data', 'D']"]


@pytest.mark.slow
def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--workload", "W2", "--rounds", "3", "--save", str(tmp_path)]
    assert run(["bench", "engine", *options, "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (work,) = result["workloads"]
    assert [found["name"] for found in work["systems"]] == ["umbel", "plain-1", "plain-2"]
    assert work["floor"]["seconds"] > 0
    for found in work["systems"]:
        assert "error" not in found, found
        assert 0 < found["seconds_per_round"] < found["first_round_seconds"]
        assert found["peak_bytes"] > 5e6
        assert found["loss"] < work["initial_loss"]
        assert found["versions"]["torch"]
    assert work["systems"][0]["ratio"] == 1
    assert len(result["load"]["before"]) == 3
    assert result["machine"]["cores"] == os.cpu_count()
    assert json.loads((tmp_path / "engine.json").read_text())["workloads"] == result["workloads"]
    assert (tmp_path / "engine-W2.png").stat().st_size > 5000
    assert "| plain loop, 2 processes | " in (tmp_path / "engine.md").read_text()
    engine.show(result)
    table = capsys.readouterr().out
    assert "plain loop, 2 processes" in table
    assert "floor" in table


@pytest.mark.slow
def test_sweep_has_a_point_a_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sweep", "clients", "--values", "200,20000", "--rounds", "3"]
    arguments = engine.parser().parse_args([*options, "--save", str(tmp_path)])
    result = engine.measure(arguments)
    assert [work["value"] for work in result["workloads"]] == [200, 20000]
    assert not [r["error"] for w in result["workloads"] for r in w["systems"] if "error" in r]
    assert (tmp_path / "engine-clients.png").exists()
    engine.show(result)
    assert "clients 20000" in capsys.readouterr().out
