"""The dispatcher's book-keeping, called directly: who holds what, who is a suspect, who is to blame."""

from __future__ import annotations

import asyncio

from pipeline.dataset.formats import Parsed
from pipeline.executors.live.dispatcher import Dispatcher
from pipeline.executors.live.queue import PrefixQueue
from pipeline.executors.requests import PendingRequest, prefix_of
from pipeline.monitor.status import RunStatus


def dispatcher(rows: int) -> Dispatcher:
    made = Dispatcher([], None, [None], False)  # type: ignore[arg-type]  # nothing is read here
    made.run_status.fed = True
    names = [f"r{i}" for i in range(rows)]
    made.queue.add(PendingRequest(name.encode(), name, b"", 0, 0) for name in names)
    return made


def test_a_call_of_a_worker_that_died_takes_no_rows_with_it() -> None:
    async def scene() -> None:
        d = dispatcher(4)
        lease = await d.pull("w1", 4, 0, [])
        assert lease is not None and len(lease) == 4
        waiting = asyncio.create_task(d.pull("w1", 4, 4, []))
        await asyncio.sleep(0.05)
        await d.leave("w1", None)
        assert await waiting is None
        assert await d.pull("w1", 4, 0, []) is None
        again = await d.pull("w2", 4, 0, [])
        assert again is not None and again.ids == ["r0", "r1", "r2", "r3"]

    asyncio.run(scene())


def test_a_worker_that_was_ended_while_it_joined_gets_no_part_of_the_rows() -> None:
    async def scene() -> None:
        d = dispatcher(4)
        await d.leave("w1")
        await d.join("w1")
        assert not d.table.joined and not d.run_status.replicas
        lease = await d.pull("w2", 4, 0, [])
        assert lease is not None and len(lease) == 4

    asyncio.run(scene())


def test_rows_that_came_out_are_not_suspected_and_the_second_death_convicts() -> None:
    async def scene() -> None:
        d = dispatcher(3)
        lease = await d.pull("w1", 3, 0, [])
        assert lease is not None
        waiting = asyncio.create_task(d.pull("w1", 1, 2, [(lease.number, [0])]))
        await asyncio.sleep(0.05)
        await d.leave("w1", "killed")
        await waiting
        assert [row.id for row in d.trial.suspects()] == ["r1", "r2"]
        busy = await d.pull("w2", 3, 1, [])
        assert busy is not None and busy.ids == ["r0"]  # who holds a row gets no suspect
        alone = await d.pull("w3", 3, 0, [])
        assert alone is not None and (alone.ids, alone.alone, alone.poison) == (["r1"], True, None)
        await d.leave("w3", "killed")
        guilty = await d.pull("w4", 3, 0, [])
        assert guilty is not None and guilty.ids == ["r1"]
        assert "died 2 times" in (guilty.poison or "")
        innocent = await d.pull("w5", 3, 0, [])
        assert innocent is not None and (innocent.ids, innocent.poison) == (["r2"], None)
        # It answers, but its worker is killed by something else before the answer is durable.
        last = asyncio.create_task(d.pull("w5", 3, 0, [(innocent.number, [0])]))
        await asyncio.sleep(0.05)
        await d.leave("w5", "killed")
        await last
        assert d.trial.deaths[b"r2"] == 0
        assert not list(d.trial.suspects())

    asyncio.run(scene())


def test_no_worker_takes_more_than_its_share_and_rows_are_kept_for_those_that_load() -> None:
    async def scene() -> None:
        d = dispatcher(12)
        await d.join("late")
        first = await d.pull("w1", 100, 0, [])
        assert first is not None and len(first) == 6
        more = await d.pull("w1", 94, 6, [])
        assert more is not None and len(more) == 0
        late = await d.pull("late", 100, 0, [])
        assert late is not None and len(late) == 6
        await d.leave("late", None)
        rest = await d.pull("w1", 94, 6, [])
        assert rest is not None and len(rest) == 6

    asyncio.run(scene())


def test_the_run_is_over_when_everything_is_durable() -> None:
    async def scene() -> None:
        d = dispatcher(2)
        lease = await d.pull("w1", 2, 0, [])
        assert lease is not None
        assert not (await d.status()).finished
        await d.commit("w1", [(lease.number, [0])], RunStatus(done=1))
        assert not (await d.status()).finished
        await d.commit("w1", [(lease.number, [1])], RunStatus(failed=1))
        status = await d.status()
        assert (status.finished, status.done, status.failed) == (True, 1, 1)
        assert await d.pull("w1", 2, 0, []) is None

    asyncio.run(scene())


def asks(*rows: tuple[int, int]) -> list[PendingRequest]:
    """Rows of (prefix, max_tokens), named by their place."""
    return [PendingRequest(b"", f"{i}", b"", prefix, tokens) for i, (prefix, tokens) in enumerate(rows)]


def ids(rows: list[PendingRequest]) -> str:
    return "".join(row.id for row in rows)


def test_rows_of_a_prefix_go_to_one_worker_and_nobody_waits() -> None:
    ready = PrefixQueue()
    ready.add(asks((1, 0), (2, 0), (1, 0), (2, 0), (1, 0), (3, 0), (1, 0)))
    assert ids(ready.take("a", 2)) == "02"
    assert ids(ready.take("b", 1)) == "1"
    assert ids(ready.take("a", 1)) == "4"
    ready.add(asks((2, 0)))
    assert ids(ready.take("b", 3)) == "305"  # its own first, the late one too, then what waited longest
    assert len(ready) == 1
    assert ids(ready.take("c", 5)) == "6"  # everything is somebody's: it helps
    assert ready.take("a", 1) == []


def test_rows_given_back_are_the_next_and_a_worker_that_left_owns_nothing() -> None:
    ready = PrefixQueue()
    ready.add(asks((1, 0), (2, 0), (2, 0)))
    held = ready.take("a", 1)
    ready.leave("a")
    ready.put_back(held)
    assert ids(ready.take("b", 3)) == "012"
    assert not ready.owners or list(ready.owners) == [2]


def test_at_the_end_the_longest_go_first() -> None:
    ready = PrefixQueue()
    ready.add(asks((1, 5), (2, 0), (1, 9), (3, 7), (2, 8)))
    ready.longest_first()
    assert ids(ready.take("a", 5)) == "20413"


def test_prompts_that_begin_alike_have_one_prefix() -> None:
    def parsed(text: object, **more: str) -> Parsed:
        return Parsed([{"role": "system", "content": text}, {"role": "user", "content": "?"}], **more)  # type: ignore[arg-type, typeddict-item]

    system = "You are a careful judge. " * 20
    assert prefix_of(parsed(system + "one")) == prefix_of(parsed(system + "two")) >= 0
    assert prefix_of(parsed(system)) != prefix_of(parsed(system, adapter="poet"))
    assert prefix_of(parsed("a")) != prefix_of(parsed("b"))
    assert prefix_of(parsed([{"type": "text", "text": "a"}])) != prefix_of(parsed(None))
    assert prefix_of(parsed("\ud800")) != prefix_of(parsed("a"))
