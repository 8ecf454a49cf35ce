"""An exhaustive model of how one shard is committed: every interleaving of a few workers.

Claims are left out of the protocol proper: any worker may start, sleep or stay away at any step,
which is more than any expiry allows. Payloads differ between workers on purpose. A worker that
is killed is one that is never scheduled again; a sweep may remove any temporary file at any
moment. `find_violation` returns the shortest sequence of steps that breaks an invariant.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

NOBODY = -1


@dataclass(frozen=True)
class Protocol:
    """The protocol as it is; each field, changed, weakens it in one place."""

    create_only_tar: bool = True
    create_only_idx: bool = True
    index_of_tar_there: bool = True
    keep_orphan_tar: bool = True
    handle_before_look: bool = True
    withdraw_by_rename: bool = True
    check_claim_before_rename: bool = False


@dataclass(frozen=True)
class Folder:
    """One folder: whose payload the tar holds, whose payload the index describes."""

    tar: int = NOBODY
    idx: int = NOBODY
    staged: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Worker:
    """Where a worker stands; `at` names the step it takes next."""

    at: str = "open"
    folder: int = 0
    described: int = NOBODY


@dataclass(frozen=True)
class State:
    """Folders of the set, the last one under the set's name, and all workers."""

    folders: tuple[Folder, ...]
    workers: tuple[Worker, ...]
    claim: int = NOBODY
    withdrawal: str = "none"

    def with_folder(self, number: int, **changes: object) -> State:
        folders = list(self.folders)
        folders[number] = replace(folders[number], **changes)  # type: ignore[arg-type]
        return replace(self, folders=tuple(folders))

    def with_worker(self, number: int, **changes: object) -> State:
        workers = list(self.workers)
        workers[number] = replace(workers[number], **changes)  # type: ignore[arg-type]
        return replace(self, workers=tuple(workers))


def find_violation(
    protocol: Protocol, num_workers: int, *, withdraw: bool = False, of: str = ""
) -> tuple[list[str], int]:
    """Return the steps of a shortest violation, empty when there is none, and the states seen.

    Args:
        protocol: what to examine.
        num_workers: that build the shard.
        withdraw: whether the set is withdrawn once, at any moment.
        of: how the violated invariant's name begins; others are let pass.
    """
    start = State((Folder(),), (Worker(),) * num_workers)
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    waiting = deque([start])
    while waiting:
        state = waiting.popleft()
        for label, following in _steps(state, protocol, withdraw=withdraw):
            seen = following in came_from
            if not seen:
                came_from[following] = (state, label)
            faults = [_fault(state, label, following)]
            if not seen:
                waiting.append(following)
                faults.append(_fault_of_lone_worker(following, protocol))
            for fault in faults:
                if fault and fault.startswith(of):
                    return [*_path(came_from, state), label, fault], len(came_from)
    return [], len(came_from)


def _path(came_from: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    steps: list[str] = []
    while (previous := came_from[state]) is not None:
        state, label = previous
        steps.append(label)
    return steps[::-1]


def _fault(before: State, label: str, after: State) -> str | None:
    """Return which invariant a step breaks."""
    old, new = before.folders[-1], after.folders[-1]
    if NOBODY not in (new.idx, new.tar) and new.idx != new.tar:
        return "I2: the index describes another tar"
    if new.idx != NOBODY and new.tar == NOBODY:
        return "I3: an index without its tar"
    withdrawn = label.startswith("withdraw")
    if old.tar not in (NOBODY, new.tar) and not withdrawn:
        return "I1: a committed tar was changed"
    if after.withdrawal == "done" and not withdrawn and (old.tar, old.idx) != (new.tar, new.idx):
        zombie = before.workers[int(label.split()[1])]
        if zombie.folder != len(before.folders) - 1:
            return "I9: a zombie changed the new set"
    return None


def _fault_of_lone_worker(state: State, protocol: Protocol) -> str | None:
    """I5: whatever the others left, one worker that runs on commits the shard."""
    if state.withdrawal not in ("none", "done"):
        return None
    lone = replace(state, workers=(*state.workers, Worker()))
    number = len(state.workers)
    while lone.workers[number].at not in ("done", "lost"):
        lone = _worker_step(lone, number, protocol)[1]
    return None if lone.folders[-1].idx != NOBODY else "I5: one worker alone does not finish"


def _steps(state: State, protocol: Protocol, *, withdraw: bool) -> Iterator[tuple[str, State]]:
    for number, worker in enumerate(state.workers):
        if worker.at not in ("done", "lost"):
            yield _worker_step(state, number, protocol)
    for number, folder in enumerate(state.folders):
        for owner in folder.staged:
            yield (
                f"sweep {owner}",
                state.with_folder(number, staged=folder.staged - {owner}),
            )
    if withdraw:
        yield from _withdraw(state, protocol)


def _withdraw(state: State, protocol: Protocol) -> Iterator[tuple[str, State]]:
    if state.withdrawal == "done":
        return
    if protocol.withdraw_by_rename:
        folders = (*state.folders, Folder())
        yield "withdraw by rename", replace(state, folders=folders, withdrawal="done")
    elif state.withdrawal == "none":
        yield "withdraw idx", replace(state.with_folder(0, idx=NOBODY), withdrawal="tar")
    else:
        yield "withdraw tar", replace(state.with_folder(0, tar=NOBODY), withdrawal="done")


def _worker_step(state: State, number: int, protocol: Protocol) -> tuple[str, State]:
    worker = state.workers[number]
    label = f"worker {number} {worker.at}"
    place = worker.folder if protocol.handle_before_look else len(state.folders) - 1
    folder = state.folders[place]
    if worker.at == "open":
        opened = state.with_worker(number, at="look", folder=len(state.folders) - 1)
        return label, replace(opened, claim=number)
    if worker.at == "look":
        return label, _look(state, number, place, protocol)
    if worker.at == "stage":
        staged = state.with_folder(place, staged=folder.staged | {number})
        following = "check" if protocol.check_claim_before_rename else "tar"
        return label, staged.with_worker(number, at=following)
    if worker.at == "check":
        return label, state.with_worker(number, at="tar" if state.claim == number else "lost")
    if worker.at == "tar":
        return label, _publish_tar(state, number, place, protocol)
    if worker.at == "read":
        return label, state.with_worker(number, at="idx", described=folder.tar)
    assert worker.at == "idx"
    done = state.with_worker(number, at="done")
    if protocol.create_only_idx and folder.idx != NOBODY:
        return label, done
    return label, done.with_folder(place, idx=worker.described)


def _look(state: State, number: int, place: int, protocol: Protocol) -> State:
    folder = state.folders[place]
    if folder.idx != NOBODY:
        return state.with_worker(number, at="done")
    if folder.tar == NOBODY:
        return state.with_worker(number, at="stage")
    if protocol.keep_orphan_tar:
        return state.with_worker(number, at="read")
    return state.with_folder(place, tar=NOBODY).with_worker(number, at="stage")


def _publish_tar(state: State, number: int, place: int, protocol: Protocol) -> State:
    folder = state.folders[place]
    if number not in folder.staged:
        return state.with_worker(number, at="lost")
    state = state.with_folder(place, staged=folder.staged - {number})
    if protocol.create_only_tar and folder.tar != NOBODY:
        if protocol.index_of_tar_there:
            return state.with_worker(number, at="read")
        return state.with_worker(number, at="idx", described=number)
    state = state.with_folder(place, tar=number)
    return state.with_worker(number, at="idx", described=number)
