"""A client that goes on in another process is the client that it was, and leaves nothing behind."""

from __future__ import annotations

import json

import numpy as np
import pytest

from umbel.privacy.secure_aggregation.freezing import freeze, thaw
from umbel.privacy.secure_aggregation.messages import encode
from umbel.privacy.secure_aggregation.server import Outbox, Stage, Total


@pytest.mark.parametrize(("n", "neighbours"), [(5, None), (12, 6)])
def test_a_round_of_clients_that_live_for_one_message(cohort_of, n, neighbours):
    cohort = cohort_of(n, neighbours)
    frozen = {m: freeze(cohort.clients[m]) for m in range(n)}
    server = cohort.server()
    out = server.invite()
    while isinstance(out, Outbox):
        for member, data in out.messages.items():
            if server.stage is Stage.MASKED and member == 2:
                continue
            client = cohort.client(member)
            thaw(frozen[member], client)
            answer = encode(client.step(data), cohort.terms.digest)
            frozen[member] = freeze(client)
            server.receive(member, answer)
        out = server.advance()
    assert isinstance(out, Total)
    assert np.array_equal(out.words, sum(cohort.inputs[m] for m in out.survivors))
    assert len(out.survivors) == n - 1
    secrets = []
    for member, data in frozen.items():
        table = json.loads(data)
        if member == 2:  # it still waits
            secrets += [table["seed"], *(e[0] for e in table["edges"].values())]
            continue
        assert table["over"] is not None
        assert table["seed"] == ""
        assert table["edges"] == {}
        assert table["pair"] is table["chain"] is table["roster"] is None
    assert all(secrets)


def test_a_kept_set_up_is_frozen_too(cohort_of):
    cohort = cohort_of(4)
    cohort.clients = {m: cohort.client(m, keep=True) for m in range(4)}
    server = cohort.server()
    out = server.invite()
    while isinstance(out, Outbox):
        cohort.answer(server, out)
        out = server.advance()
    later = cohort.next_round()
    for m in range(4):
        old = cohort.client(m)
        thaw(freeze(cohort.clients[m]), old)
        assert old.setup == cohort.clients[m].setup
        later.clients[m] = later.client(m, setup=old.setup)
    again = later.server(server.setup)
    out = again.invite()
    while isinstance(out, Outbox):
        later.answer(again, out)
        out = again.advance()
    assert isinstance(out, Total)
    assert np.array_equal(out.words, sum(later.inputs))
