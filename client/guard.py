"""Who stands before a site's data: opens the seal, asks the policy, writes down what was decided.

Every request passes here before the process that can open the data hears of it. What was decided is
durable in the audit log before anything is done, so that neither a crash nor a restart lets a
request through twice.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

from umbel.client.folder import Kit, SiteFolder
from umbel.client.machine import Allowance
from umbel.client.policy import Policy, PolicyError, check_round, check_run, read_policy
from umbel.core import messages, seal
from umbel.core.audit_log import AuditLog, read
from umbel.core.errors import InputError
from umbel.core.messages import HELLO, MANIFEST, SECURE_STAGES, STAGES, TRAIN, Problem
from umbel.core.seal import SEAL, BrokenSealError, Records, Seal

ACCEPTED, REFUSED = "accepted", "refused"

COUNTED = (TRAIN, f"{TRAIN}.{SECURE_STAGES[0]}")
"""Requests that begin a round of training: the policy bounds how few sites may be asked. In later
stages of a secure sum sites may be missing; how many, its own protocol bounds by the same rule."""

GREETINGS = (HELLO, STAGES)
"""Requests whose answer is the same each time. A run begins with them whenever it is started again:
bounding them would end a run that was paused, or whose server was killed, once too often."""


class Accepted(NamedTuple):
    """A request that may be carried out.

    Args:
        seal: the server's.
        own_parts: the user's own code that the policy lets runs name.
        maximum_epsilon: of all runs on the site's data; ``None``: no bound.
        share: how much of the machine it may use.
    """

    seal: Seal
    own_parts: tuple[str, ...]
    maximum_epsilon: float | None
    share: Allowance


class Refusal(NamedTuple):
    """A request that may not.

    Args:
        problem: what the server is told: the rule's name, nothing of the site.
        nonce: of the request, where its seal held; empty: the server is told nothing.
    """

    problem: Problem
    nonce: str


class Guard:
    """Decides about requests; one for a site, for as long as its process lives.

    Args:
        folder: the site's.
        kit: what it pinned when it joined.
        local_time: the clock that ``hours`` go by.
    Raises:
        InputError: no policy, or a damaged one.
        RunError: the audit log was changed.
    """

    def __init__(
        self,
        folder: SiteFolder,
        kit: Kit,
        *,
        local_time: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._folder = folder
        self._kit = kit
        self._name = folder.settings().name
        self._local_time = local_time
        self._nonces: dict[str, float] = {}
        self._rounds: Counter[tuple[str, str, str, str]] = Counter()
        for entry in read(folder.audit_file):
            if entry["event"] == ACCEPTED:
                self._remember(entry)
        self.audit = AuditLog(folder.audit_file)
        read_policy(folder.policy_file)

    def decide(self, kind: str, records: Records) -> Accepted | Refusal:
        """Whether a request may be carried out; written down either way, before this returns.

        Args:
            kind: the message's type.
            records: what the message holds.
        """
        facts: dict[str, Any] = {"kind": kind}
        nonce = ""
        try:
            opened = self._open(kind, records)
            nonce = opened.nonce
            facts |= {
                "job": opened.job,
                "round": opened.group,
                "asked": opened.asked,
                "nonce": nonce,
                "expires": opened.expires,
                "digest": opened.digest,
            }
            policy = self._check(opened, records, facts)
        except BrokenSealError as broken:
            self.audit.add(REFUSED, rule="seal", reason=str(broken), **facts)
            return Refusal(Problem(error="policy", exception="seal"), nonce)
        except PolicyError as refused:
            self.audit.add(REFUSED, rule=refused.rule, reason=str(refused), **facts)
            return Refusal(Problem(error="policy", exception=refused.rule), nonce)
        except InputError as wrong:
            self.audit.add(REFUSED, rule="request", reason=str(wrong), **facts)
            return Refusal(Problem(error="request", exception="InputError"), nonce)
        self.audit.add(ACCEPTED, **facts)
        self._remember(facts)
        return _accepted(opened, policy)

    def known(self, kind: str, records: Records) -> Accepted | None:
        """A request that was accepted before the process died, to be carried out after all."""
        try:
            opened = seal.open_seal(
                records.get(SEAL, {}).get(SEAL),
                self._kit.manifest_key,
                records,
                kind=kind,
                site=self._name,
            )
        except BrokenSealError:
            return None
        if opened.nonce not in self._nonces:
            return None
        policy = read_policy(self._folder.policy_file)
        return _accepted(opened, policy)

    def _open(self, kind: str, records: Records) -> Seal:
        opened = seal.open_seal(
            records.get(SEAL, {}).get(SEAL),
            self._kit.manifest_key,
            records,
            kind=kind,
            site=self._name,
        )
        if opened.nonce in self._nonces:
            raise BrokenSealError("it was answered before")
        return opened

    def _check(self, opened: Seal, records: Records, facts: dict[str, Any]) -> Policy:
        # Read again each time: who edits the file need not restart the site.
        policy = read_policy(self._folder.policy_file)
        size = sum(
            len(value)
            for record in records.values()
            for value in record.values()
            if isinstance(value, str | bytes)
        )
        if size > policy.limits.maximum_bytes:
            raise PolicyError(
                "maximum_bytes", f"{size} bytes, at most {policy.limits.maximum_bytes}"
            )
        request = messages.read_request(records.get(MANIFEST, {}).get(MANIFEST))
        if request.stage is not None:
            facts |= {"stage": request.stage.number + 1, "question": request.stage.question}
        if opened.kind != HELLO and str(request.round) != opened.group:
            raise BrokenSealError(f"it is sealed for round {opened.group}, not {request.round}")
        run = request.run
        facts["run"] = run.run.name
        facts["task"], facts["strategy"] = run.task.kind, run.strategy.name
        check_run(policy, run)
        check_round(
            policy,
            opened.asked,
            self._rounds[_what(facts)],
            self._local_time(),
            trains=opened.kind in COUNTED,
        )
        return policy

    def _remember(self, facts: dict[str, Any]) -> None:
        now = time.time()
        if facts["expires"] + seal.CLOCK_SKEW > now:
            self._nonces[facts["nonce"]] = facts["expires"]
        if len(self._nonces) > 10_000:
            self._nonces = {
                n: ends for n, ends in self._nonces.items() if ends + seal.CLOCK_SKEW > now
            }
        if facts["kind"] not in GREETINGS:
            self._rounds[_what(facts)] += 1


def _what(facts: dict[str, Any]) -> tuple[str, str, str, str]:
    """What was asked: a round of stages may have several questions, and each may be repeated."""
    return facts["job"], facts["round"], facts["kind"], str(facts.get("question", ""))


def _accepted(opened: Seal, policy: Policy) -> Accepted:
    epsilon = policy.privacy.maximum_epsilon_total
    return Accepted(opened, policy.allow.own_parts, epsilon, policy.limits.share())
