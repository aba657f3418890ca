from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.core.errors import InputError, RefusedError, RunError
from umbel.privacy.accounting import epsilon
from umbel.privacy.calibration import noise_multiplier, releases
from umbel.privacy.entries import EVERY_CLIENT, Entry
from umbel.privacy.ledger import Ledger
from umbel.privacy.mechanisms import Concentrated, Gaussian, Mechanism, Sampling, batches

MECHANISM = Gaussian(1.0, batches(1 / 16))
DELTA = 1e-5


def entry(round_number: int, client: str = "a", **changes: Any) -> Entry:
    base = Entry(
        run="r",
        round=round_number,
        client=client,
        unit="example",
        relation="add-or-remove-one",
        mechanism=MECHANISM,
        steps=16,
        clip_norm=1.0,
        delta=DELTA,
        generator="os",
        versions={"umbel": "0"},
    )
    return dataclasses.replace(base, **changes)


def ledger(path: Path, budget: float | None = None, **changes: Any) -> Ledger:
    about = {"owner": "site-a/heart", "unit": "example", "relation": "add-or-remove-one"}
    return Ledger(path, delta=DELTA, budget=budget, **{**about, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def test_rounds_compose_as_one_history(path: Path) -> None:
    book = ledger(path)
    online = [book.debit(entry(r)).epsilon for r in range(1, 11)]
    assert online == sorted(online)
    assert online[0] == pytest.approx(2.764, abs=1e-3)
    assert online[-1] == pytest.approx(6.098, abs=1e-3)
    assert book.epsilon(accountant="pld").epsilon == pytest.approx(5.418, abs=1e-3)
    report = book.report()
    assert report["epsilon"] == pytest.approx(5.418, abs=1e-3)
    assert (report["entries"], report["steps"], report["clients"]) == (10, 160, 1)
    assert report["generators"] == ["os"]
    assert report["amplified_because"] == ["drawn inside the site, never sent"]


def test_the_headline_is_the_maximum_and_who_sits_out_spends_nothing(path: Path) -> None:
    book = ledger(path)
    for r in range(1, 11):
        book.debit(entry(r, "eager"))
    book.debit(entry(1, "lazy"))
    one, ten = (epsilon({MECHANISM: 16 * n}, DELTA, "rdp").epsilon for n in (1, 10))
    assert book.epsilon("lazy").epsilon == pytest.approx(one)
    assert book.epsilon("eager").epsilon == pytest.approx(ten)
    assert book.epsilon("absent").epsilon == 0
    assert book.epsilon().epsilon == pytest.approx(ten)
    assert book.report()["client"] == "eager"
    assert book.clients() == ["eager", "lazy"]


def test_the_headline_by_pld_is_the_maximum_by_pld(path: Path) -> None:
    book = ledger(path)
    costs = {"a": Gaussian(9.0), "b": Gaussian(3.0, batches(0.2)), "c": Gaussian(5.0, batches(0.5))}
    for client, mechanism in costs.items():
        book.debit(entry(1, client, mechanism=mechanism))
    each = {c: epsilon({m: 16}, DELTA).epsilon for c, m in costs.items()}
    assert book.epsilon(accountant="pld").epsilon == max(each.values())
    assert each[book.report()["client"]] == max(each.values())


def test_everybody_pays_for_a_release_from_a_hidden_sample(path: Path) -> None:
    book = ledger(path, unit="client")
    hidden = Gaussian(1.0, Sampling("poisson", 0.01, "the adversary sees the final model alone"))
    book.debit(entry(1, "a", unit="client", mechanism=Gaussian(5.0), steps=1))
    book.debit(entry(1, EVERY_CLIENT, unit="client", mechanism=hidden, steps=1000))
    assert book.epsilon("b").epsilon == pytest.approx(2.101, abs=1e-3)
    assert book.epsilon("a").epsilon > 2.2
    assert book.epsilon().epsilon == book.epsilon("a").epsilon


def test_nothing_spent_is_nothing(path: Path) -> None:
    book = ledger(path)
    assert book.epsilon().epsilon == 0
    assert book.report()["epsilon"] == 0
    assert book.debit_all([]) == []
    assert book.verify() == 0


def test_a_retry_is_one_debit_and_says_so(path: Path) -> None:
    book = ledger(path)
    first, again = book.debit(entry(1)), book.debit(entry(1))
    assert (first.fresh, again.fresh) == (True, False)
    assert first.epsilon == again.epsilon
    assert len(book.lines()) == 1
    redone = book.debit(entry(1, attempt="after a crash"))
    assert redone.fresh
    assert redone.epsilon > first.epsilon
    with pytest.raises(InputError, match="other values"):
        book.debit(entry(1, steps=15))
    with pytest.raises(InputError, match="other values"):
        book.debit(entry(1, mechanism=Gaussian(2.0)))
    assert len(book.lines()) == 2


def test_refuses_before_the_budget_is_passed_and_spends_nothing(path: Path) -> None:
    rounds = 5
    z = noise_multiplier(2.0, DELTA, 16 * rounds, batches(1 / 16))
    book = ledger(path, budget=2.0)
    mechanism = Gaussian(z, batches(1 / 16))
    # RDP alone would stop before the last planned round; PLD, which calibrated it, does not.
    assert epsilon({mechanism: 16 * rounds}, DELTA, "rdp").epsilon > 2.0
    spent = [book.debit(entry(r, mechanism=mechanism)).epsilon for r in range(rounds)]
    assert spent == sorted(spent)
    assert spent[-1] <= 2.0
    before = book.report()
    with pytest.raises(RefusedError, match=r"would be 2\.\d+, the budget is 2 .* is spent") as no:
        book.debit(entry(rounds, mechanism=mechanism))
    assert no.value.exit_code == 3
    assert "client 'a'" in no.value.where
    assert no.value.fix
    after = book.report()
    (refusal,) = after.pop("refusals")
    assert before.pop("refusals") == []
    assert after == before
    assert "budget is 2" in refusal["reason"]
    # Another client has its own; one that refuses, refuses the whole cohort.
    with pytest.raises(RefusedError):
        book.debit_all([entry(9, "b"), entry(9, "a", mechanism=mechanism)])
    assert book.epsilon("b").epsilon == 0
    assert book.debit(entry(9, "b", mechanism=mechanism)).fresh


def test_no_noise_passes_every_budget(path: Path) -> None:
    book = ledger(path, budget=1e6)
    for mechanism in (Gaussian(0.0), Concentrated(math.inf)):
        with pytest.raises(RefusedError, match="would be inf"):
            book.debit(entry(1, mechanism=mechanism))
    assert book.epsilon().epsilon == 0
    free = ledger(path)
    assert free.debit(entry(1, mechanism=Gaussian(0.0))).epsilon == math.inf


def test_the_budget_covers_earlier_runs_and_other_purposes(path: Path) -> None:
    last = releases(Gaussian(30.0), 1.0, DELTA)
    ledger(path).debit(entry(1, run="last year", mechanism=Gaussian(30.0), steps=last - 1))
    book = ledger(path, budget=1.0)
    book.debit(entry(1, purpose="metrics", mechanism=Gaussian(30.0), steps=1))
    with pytest.raises(RefusedError):
        book.debit(entry(1, purpose="tuning", mechanism=Gaussian(30.0), steps=1))
    assert book.report()["purposes"] == {"training": 1, "metrics": 1}


def test_entries_that_do_not_belong_are_refused(path: Path) -> None:
    book = ledger(path)
    for wrong in (
        lambda: book.debit(entry(1, unit="client")),
        lambda: book.debit(entry(1, relation="zero-out", mechanism=Concentrated(1.0))),
        lambda: book.debit_all([entry(1), entry(1)]),
        lambda: entry(1, relation="zero-out"),
        lambda: entry(1, steps=0),
        lambda: entry(1, client=""),
        lambda: ledger(path, budget=0.0),
        lambda: ledger(path, budget=math.nan),
        lambda: ledger(path, owner="site-b/heart"),
        lambda: ledger(path, unit="client"),
        lambda: ledger(path.parent / "no folder" / "ledger.db"),
    ):
        with pytest.raises(InputError):
            wrong()
    assert book.lines() == []


MECHANISMS: list[Mechanism] = [
    MECHANISM,
    Gaussian(2.5),
    Gaussian(0.7, Sampling("poisson", 0.3)),
    Concentrated(0.01, "a sum"),
]
ENTRIES = st.builds(
    entry,
    st.integers(0, 5),
    st.sampled_from(["a", "b", EVERY_CLIENT]),
    mechanism=st.sampled_from(MECHANISMS),
    steps=st.integers(1, 50),
    attempt=st.sampled_from(["1", "2"]),
)


def bounds(book: Ledger) -> list[float]:
    return [book.epsilon(client).epsilon for client in (None, "a", "b", "c")]


@settings(max_examples=25)
@given(st.lists(ENTRIES, min_size=1, max_size=8, unique_by=lambda e: e.key), st.randoms())
def test_order_does_not_matter_nothing_decreases_and_the_disk_has_it_all(
    entries: list[Entry], shuffle: random.Random
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        book = ledger(Path(folder) / "one.db")
        before = bounds(book)
        for e in entries:
            spent = book.debit(e)
            assert spent.epsilon == pytest.approx(book.epsilon(e.client).epsilon, rel=1e-9)
            now = bounds(book)
            assert all(b <= n for b, n in zip(before, now, strict=True))
            before = now
            assert not book.debit(e).fresh
            assert bounds(book) == now
        shuffled = list(entries)
        shuffle.shuffle(shuffled)
        other = ledger(Path(folder) / "two.db")
        other.debit_all(shuffled)
        assert bounds(other) == pytest.approx(before, rel=1e-9)
        again = ledger(Path(folder) / "one.db")
        assert bounds(again) == pytest.approx(before, rel=1e-9)
        assert [line.entry for line in again.lines()] == entries
        assert again.verify(book.head()) == len(entries)


def test_lines_can_neither_be_changed_nor_taken_out_unseen(path: Path) -> None:
    book = ledger(path)
    heads = []
    for r in range(4):
        book.debit(entry(r))
        heads.append(book.head())
    raw = sqlite3.connect(path, isolation_level=None)
    for statement in ("UPDATE line SET steps = 1", "DELETE FROM line", "DELETE FROM terms"):
        with pytest.raises(sqlite3.IntegrityError, match="only appended"):
            raw.execute(statement)
    assert book.verify(heads[1]) == 4
    raw.execute("DROP TRIGGER no_delete_line")
    raw.execute("DELETE FROM line WHERE number = 4")
    assert book.verify(heads[2]) == 3
    with pytest.raises(RunError, match="its end is missing"):
        book.verify(heads[3])
    raw.execute("DROP TRIGGER no_update_line")
    raw.execute("UPDATE line SET steps = 1 WHERE number = 2")
    with pytest.raises(RunError, match="line 2 is not what was written"):
        book.verify()
    raw.close()


def test_a_damaged_file_releases_nothing(path: Path) -> None:
    path.write_bytes(b"this is not a data base, but long enough to look like one" * 100)
    with pytest.raises(RunError, match="nothing may be released"):
        ledger(path)


def test_only_its_owner_reads_it(path: Path) -> None:
    ledger(path)
    assert path.stat().st_mode & 0o077 == 0


# A process that debits for ever, saying so after each debit: the mechanism would run there.
DEBTOR = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from test_ledger import entry, ledger
book = ledger(Path({path!r}))
r = 0
while True:
    book.debit(entry(r, {client!r}))
    print(r, flush=True)
    r += 1
"""


def debtor(path: Path, client: str) -> subprocess.Popen[str]:
    script = DEBTOR.format(folder=str(Path(__file__).parent), path=str(path), client=client)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def test_killed_anywhere_the_ledger_overcounts_and_never_undercounts(path: Path) -> None:
    heads = []
    for attempt in range(2):
        client = f"c{attempt}"
        process = debtor(path, client)
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        time.sleep(0.013 * (attempt + 1))
        process.send_signal(signal.SIGKILL)
        used = 3 + len(process.stdout.readlines())
        process.wait()
        process.stdout.close()
        book = ledger(path)
        written = [line for line in book.lines() if line.entry.client == client]
        assert used <= len(written) <= used + 1
        least = epsilon({MECHANISM: 16 * used}, DELTA, "rdp").epsilon
        assert book.epsilon(client).epsilon >= least * (1 - 1e-9)
        heads.append(book.head())
    for head in heads:
        book.verify(head)


def _debit_many(path: str, client: str, shared: int) -> None:
    book = ledger(Path(path))
    for r in range(15):
        book.debit(entry(r, client))
        book.debit(entry(r, "shared", attempt=f"{client if r >= shared else 'same'}"))


def test_two_processes_at_once_lose_nothing(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_debit_many, args=(str(path), c, 5)) for c in ("x", "y")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    book = ledger(path)
    counts = dict.fromkeys(("x", "y", "shared"), 0)
    for line in book.lines():
        counts[line.entry.client] += 1
    assert counts == {"x": 15, "y": 15, "shared": 5 + 2 * 10}
    assert book.verify() == 55
    whole = epsilon({MECHANISM: 16 * 25}, DELTA, "rdp").epsilon
    assert book.epsilon("shared").epsilon == pytest.approx(whole)


def test_two_holders_of_one_file_share_its_budget(path: Path) -> None:
    last = releases(Gaussian(30.0), 1.0, DELTA)
    first, second = ledger(path, budget=1.0), ledger(path, budget=1.0)
    first.debit(entry(1, mechanism=Gaussian(30.0), steps=last))
    with pytest.raises(RefusedError):
        second.debit(entry(2, mechanism=Gaussian(30.0), steps=1))
    assert first.epsilon() == second.epsilon()


def test_a_ledger_survives_a_fork(path: Path) -> None:
    book = ledger(path)
    book.debit(entry(1))
    child = os.fork()
    if child == 0:
        book.debit(entry(2))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    book.debit(entry(3))
    assert book.verify() == 3
    assert book.epsilon().epsilon == pytest.approx(epsilon({MECHANISM: 48}, DELTA, "rdp").epsilon)
