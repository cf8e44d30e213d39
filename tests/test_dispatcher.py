"""The dispatcher's book-keeping, called directly: who holds what, who is a suspect, who is to blame."""

from __future__ import annotations

import asyncio

from pipeline.feed import Dispatcher, Status, _Rows


def dispatcher(rows: int) -> Dispatcher:
    made = Dispatcher([], None, [None], False)  # type: ignore[arg-type]  # nothing is read here
    made.buffer_rows = 1000
    made.status_.fed = True
    names = [f"r{i}" for i in range(rows)]
    made.ready.append(_Rows([name.encode() for name in names], names, [b"" for _ in names]))
    made.ready_rows = rows
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


def test_rows_that_came_out_are_not_suspected_and_the_second_death_convicts() -> None:
    async def scene() -> None:
        d = dispatcher(3)
        lease = await d.pull("w1", 3, 0, [])
        assert lease is not None
        waiting = asyncio.create_task(d.pull("w1", 1, 2, [(lease.number, [0])]))
        await asyncio.sleep(0.05)
        await d.leave("w1", "killed")
        await waiting
        assert [rows.ids for rows in d.suspects] == [["r1"], ["r2"]]
        busy = await d.pull("w2", 3, 1, [])
        assert busy is not None and busy.ids == ["r0"]  # who holds a row gets no suspect
        alone = await d.pull("w3", 3, 0, [])
        assert alone is not None and (alone.ids, alone.alone, alone.convicted) == (["r1"], True, None)
        await d.leave("w3", "killed")
        guilty = await d.pull("w4", 3, 0, [])
        assert guilty is not None and guilty.ids == ["r1"]
        assert "died 2 times" in (guilty.convicted or "")
        innocent = await d.pull("w5", 3, 0, [])
        assert innocent is not None and (innocent.ids, innocent.convicted) == (["r2"], None)
        # It answers, but its worker is killed by something else before the answer is durable.
        last = asyncio.create_task(d.pull("w5", 3, 0, [(innocent.number, [0])]))
        await asyncio.sleep(0.05)
        await d.leave("w5", "killed")
        await last
        assert d.crashes[b"r2"] == 0
        assert not d.suspects

    asyncio.run(scene())


def test_the_run_is_over_when_everything_is_durable() -> None:
    async def scene() -> None:
        d = dispatcher(2)
        lease = await d.pull("w1", 2, 0, [])
        assert lease is not None
        assert not (await d.status()).finished
        await d.commit("w1", [(lease.number, [0])], Status(done=1))
        assert not (await d.status()).finished
        await d.commit("w1", [(lease.number, [1])], Status(failed=1))
        status = await d.status()
        assert (status.finished, status.done, status.failed) == (True, 1, 1)
        assert await d.pull("w1", 2, 0, []) is None

    asyncio.run(scene())
