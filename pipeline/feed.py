"""From input files to rows in the workers' hands: Ray Data reads, parses, keys and skips; a dispatcher leases.

Why a dispatcher and not `map_batches` around the engine: leases let every replica take work as fast as it finishes it,
join and leave when it likes, and hand back what it held when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from engines.base import SINGLE_MODEL_KINDS
from engines.types import ConfigError, EngineError, Failure, GenerationParams, Request, invalid
from pipeline.budget import Budget, Seen, write_spent
from pipeline.formats import Parsed, RowParser
from pipeline.fs import resolve
from pipeline.keys import Keyer
from pipeline.ledger import FarIndex, Index, SeenKeys
from pipeline.lossless import dumps
from pipeline.ready import Ask, Ready, prefix_of
from pipeline.schema import ColumnKinds
from pipeline.source import Chunk, Row, read_chunk

# The columns of `Ask`.
ROWS_SCHEMA = pa.schema(
    [
        ("key", pa.binary(32)),
        ("id", pa.string()),
        ("request", pa.binary()),
        ("prefix", pa.int64()),
        ("max_tokens", pa.int64()),
    ]
)

# A row that was in an engine when its process died is tried again alone; after this many deaths it is the culprit.
CRASHES_TO_CONVICT = 2


@dataclass(frozen=True, slots=True)
class Piece:
    """What one read task reads: a chunk, or its first `limit` rows."""

    number: int
    chunk: Chunk
    limit: int | None = None


@dataclass(slots=True)
class Item:
    """One input row, understood: either a key and its parsed conversation, or the reason why it cannot be asked."""

    row: Row
    id: str
    key: bytes | None = None
    parsed: Parsed | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Interpreter:
    """Reads rows the same way in the feed and in finalize; small, and sent to every task."""

    parser: RowParser
    keyer: Keyer
    max_row_bytes: int

    def read(self, piece: Piece) -> Iterator[list[Item]]:
        """The items of a piece in order, in batches."""
        left = piece.limit
        for rows in read_chunk(piece.chunk, max_row_bytes=self.max_row_bytes):
            if left is not None:
                rows = rows[:left]
                left -= len(rows)
            if rows:
                yield [self._item(piece.chunk, row) for row in rows]
            if left == 0:
                return

    def _item(self, chunk: Chunk, row: Row) -> Item:
        place = f"{chunk.name}:{row.row + 1}"
        if row.columns is None:
            return Item(row, place, failure=_misread(place, row.error or "unreadable"))
        try:
            parsed = self.parser.parse(row.columns)
            if parsed.model and "body" in row.columns and self.keyer.engine.kind in SINGLE_MODEL_KINDS:
                # Every line of an OpenAI batch file names a model; an engine that holds one model answers as that one.
                parsed.model = None
            key = self.keyer.key(parsed, place)
        except EngineError as error:
            return Item(row, place, failure=_misread(place, str(error)))
        return Item(row, parsed.id if parsed.id is not None else place, key, parsed)


def _misread(place: str, reason: str) -> Failure:
    return Failure.of(invalid(f"{place}: {reason}"))


@dataclass(slots=True)
class Summary:
    """What reading one piece found."""

    rows: int = 0
    invalid: int = 0
    answered: int = 0  # skipped: the ledger has them
    kinds: ColumnKinds = field(default_factory=ColumnKinds)  # of JSON columns; Parquet has types of its own
    params: set[str] = field(default_factory=set)  # generation parameters that rows set for themselves


def read_piece(
    piece: Piece, interpreter: Interpreter, done: Index | FarIndex, fail_on_bad_input: bool, summary: Summary
) -> Iterator[pa.Table]:
    """Tables of the rows of `piece` that are still to be asked; fills `summary` on the way."""
    for items in interpreter.read(piece):
        summary.rows += len(items)
        if piece.chunk.kind != "parquet":
            summary.kinds.add([item.row.columns for item in items if item.row.columns is not None])
        good = [item for item in items if item.failure is None]
        if len(good) < len(items):
            summary.invalid += len(items) - len(good)
            if fail_on_bad_input:
                first = next(item.failure for item in items if item.failure is not None)
                raise ConfigError(f"{first.message} (dataset.on_bad_input=quarantine would go on)")
        for item in good:
            if item.parsed is not None and item.parsed.generation:
                summary.params.update(item.parsed.generation)
        wanted = np.flatnonzero(done.find([item.key or b"" for item in good]) < 0)
        summary.answered += len(good) - len(wanted)
        if len(wanted):
            yield _table([good[at] for at in wanted])


def _table(items: list[Item]) -> pa.Table:
    asks = [_ask(item.key, item.id, item.parsed) for item in items if item.key and item.parsed]
    columns = zip(*asks, strict=True)
    return pa.Table.from_arrays(
        [pa.array(column, kind) for column, kind in zip(columns, ROWS_SCHEMA.types, strict=True)], schema=ROWS_SCHEMA
    )


def _ask(key: bytes, id: str, parsed: Parsed) -> Ask:
    limit = parsed.generation.get("max_tokens")
    return Ask(key, id, _request(parsed), prefix_of(parsed), limit if isinstance(limit, int) and limit < 1 << 62 else 0)


def _request(parsed: Parsed) -> bytes:
    request: dict[str, Any] = {"messages": parsed.messages}
    for name in ("generation", "model", "adapter", "turns"):
        if value := getattr(parsed, name):
            request[name] = value
    return dumps(request)


def request_of(values: Mapping[str, Any], generation: GenerationParams, key: bytes) -> Request:
    """The request in what `_request` made, with its overrides laid over the run's parameters. Raises `EngineError`."""
    return Request(
        messages=values["messages"],
        generation=generation.override(values.get("generation") or {}),
        model=values.get("model"),
        adapter=values.get("adapter"),
        key=key.hex(),
        turns=values.get("turns") or [],
    )


def dataset_of(pieces: list[Piece], interpreter: Interpreter, done: Any, fail_on_bad_input: bool, report: Any) -> Any:
    """A Ray Dataset of the rows to ask. `done` is a reference to an index; `report(number, summary)` a remote method."""
    import ray
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def task(piece: Piece) -> ReadTask:
        def read() -> Iterator[pa.Table]:
            summary = Summary()
            yield ROWS_SCHEMA.empty_table()
            yield from read_piece(piece, interpreter, ray.get(done), fail_on_bad_input, summary)
            ray.get(report.remote(piece.number, summary))

        return ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None))

    class Conversations(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            return [task(piece) for piece in pieces]

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    # Small blocks: the first rows arrive while a file is still being read.
    context.target_max_block_size = 2 << 20
    context.target_min_block_size = 1
    # A provider that is down for an hour must not end the run from inside Ray Data.
    if hasattr(context, "execution_no_progress_timeout_s"):
        context.execution_no_progress_timeout_s = -1
    return ray.data.read_datasource(
        Conversations(),
        override_num_blocks=max(1, len(pieces)),
        # No CPU is reserved: replicas may have reserved all of them, and would wait for rows for ever.
        ray_remote_args={"num_cpus": 0, "max_retries": 3},
        concurrency=max(2, int(ray.cluster_resources().get("CPU", 2))),
    )


@dataclass(slots=True)
class Lease:
    """Rows lent to one worker until it reports them durable, or dies."""

    number: int
    keys: list[bytes]
    ids: list[str]
    requests: list[bytes]
    alone: bool = False  # a suspect: nothing else may be in the engine beside it
    deaths: int = 0  # engine processes that died with these rows in them
    convicted: str | None = None  # not to be asked at all: why
    last: bool = False  # the feed has nothing more at the moment

    def __len__(self) -> int:
        return len(self.keys)


LEASED, COMPLETED, DURABLE = 0, 1, 2


@dataclass(slots=True)
class _Out:
    """A lease as its dispatcher sees it."""

    rows: list[Ask]
    states: bytearray  # LEASED, COMPLETED or DURABLE for each row
    costs: list[float] = field(default_factory=list)  # reserved for each row, where there is a budget
    durable: int = 0


@dataclass(slots=True)
class Pulse:
    """How a replica fares, as it tells with the calls it makes anyway."""

    state: str = "loading"  # then "working", and "leaving" when it takes no more rows
    busy: int = 0  # rows in the engine
    done: int = 0  # rows that came out of it, failed ones included
    admitted: float | None = None  # requests that may be in flight just now
    most: int = 0  # and at most
    retried: int = 0
    throttled: int = 0
    waited_s: float = 0.0  # for the limits a minute
    trouble: str = ""


@dataclass(slots=True)
class Status:
    """How the run stands; rows."""

    read: int = 0
    invalid: int = 0
    answered: int = 0  # by earlier runs
    duplicates: int = 0  # held back, because an equal request is asked already
    done: int = 0
    failed: int = 0
    in_flight: int = 0
    workers: int = 0  # that have asked for rows and not left
    crashes: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0  # of this run, as far as it is known
    cost_unknown: int = 0  # rows whose cost is not known
    unpriced: list[tuple[int, int]] = field(default_factory=list)  # (lease, row) of these, for the budget
    seen: Seen = field(default_factory=Seen)
    replicas: dict[str, Pulse] = field(default_factory=dict)  # by name
    gone: Pulse = field(default_factory=Pulse)  # sums over the replicas that have left
    spent: float = 0.0  # of the budget, by all runs; in a worker's counts, by its rows since the last ones
    broke: bool = False  # the budget has no room for any row that is left
    left: int = 0  # rows at hand that nobody has
    errors: Counter[str] = field(default_factory=Counter)  # failures by type
    first_errors: dict[str, str] = field(default_factory=dict)  # an example of each type
    fed: bool = False  # everything is read
    finished: bool = False
    broken: str | None = None  # why reading the input failed
    trouble: str = ""  # what keeps all of it from going on, for now


class Dispatcher:
    """The actor between the feed and the workers. Its methods are short, so that one serves hundreds of workers."""

    def __init__(
        self,
        pieces: list[Piece],
        interpreter: Interpreter,
        done: list[Any],
        fail_on_bad_input: bool,
        small: bool = False,
        budget: Budget | None = None,
        output_path: str = "",
    ) -> None:
        self.pieces, self.interpreter, self.done = pieces, interpreter, done[0]
        self.budget, self.output_path = budget, output_path
        self.writing = asyncio.Lock()
        self.fail_on_bad_input = fail_on_bad_input
        self.small = small  # so small that the processes of a Ray Dataset would take longer to start than to read it
        self.ready = Ready()
        self.suspects: deque[Ask] = deque()
        self.crashes: Counter[bytes] = Counter()
        self.crash_reason = ""
        self.leases: dict[str, dict[int, _Out]] = {}
        self.lent = 0  # rows in the state LEASED
        self.joined: set[str] = set()  # workers that are here, or loading their engine
        self.gone: set[str] = set()  # workers that left; a call of theirs may still be under way
        self.next_lease = 0
        self.summaries: dict[int, Summary] = {}
        self.status_ = Status()
        self.stopping = False
        self.changed = asyncio.Condition()
        self.room = threading.Event()
        self.room.set()

    async def start(self, report: Any, buffer_rows: int) -> None:
        """Starts reading. `report` is this actor's own method of that name."""
        self.buffer_rows = buffer_rows
        loop = self.loop = asyncio.get_running_loop()
        seen = SeenKeys()

        def feed() -> None:
            failure = None
            try:
                for table in self._tables(report):
                    if not len(table):
                        continue
                    fresh = table.filter(pa.array(seen.add(table["key"])))
                    rows = list(map(Ask, *(fresh[name].to_pylist() for name in ROWS_SCHEMA.names)))
                    asyncio.run_coroutine_threadsafe(self._add(rows, len(table) - len(fresh)), loop).result()
                    self.room.wait()
                    if self.stopping:
                        break
            except Exception as error:  # said to the driver, which ends the run with it
                failure = error
            asyncio.run_coroutine_threadsafe(self._fed(failure), loop).result()

        threading.Thread(target=feed, name="feed", daemon=True).start()

    def _tables(self, report: Any) -> Iterator[pa.Table]:
        """The rows to ask, from a thread."""
        if not self.small:
            dataset = dataset_of(self.pieces, self.interpreter, self.done, self.fail_on_bad_input, report)
            yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
            return
        import ray

        done = ray.get(self.done)
        for piece in self.pieces:
            summary = Summary()
            yield from read_piece(piece, self.interpreter, done, self.fail_on_bad_input, summary)
            self.loop.call_soon_threadsafe(self.summaries.__setitem__, piece.number, summary)

    async def _add(self, rows: list[Ask], duplicates: int) -> None:
        self.status_.duplicates += duplicates
        self.ready.add(rows)
        if len(self.ready) >= self.buffer_rows:
            self.room.clear()
        await self._notify()

    async def _fed(self, failure: Exception | None) -> None:
        self.status_.fed = True
        self.ready.longest_first()
        if failure is not None:
            self.stopping = True
            cause: Any = failure
            while getattr(cause, "cause", None) is not None:  # Ray wraps what a task raised
                cause = cause.cause
            self.status_.broken = str(cause) if isinstance(cause, ConfigError) else f"{type(cause).__name__}: {cause}"
        await self._notify()

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def report(self, number: int, summary: Summary) -> None:
        """A read task's account of its piece. Sent again when the task was, so it replaces."""
        self.summaries[number] = summary

    async def take_summaries(self) -> dict[int, Summary]:
        return self.summaries

    async def join(self, worker: str) -> None:
        """`worker` is loading its engine: rows are kept for it."""
        self.joined.add(worker)
        self.status_.replicas[worker] = Pulse()

    async def pull(
        self, worker: str, want: int, held: int, completed: list[tuple[int, list[int]]], pulse: Pulse | None = None
    ) -> Lease | None:
        """Up to `want` rows for `worker`, which still holds `held`; None when the run is over for it.

        `completed` are the (lease, rows) that came out of its engine since the last call. Waits while there is
        nothing, up to a second, then answers with an empty lease.
        """
        if worker in self.gone:
            return None
        if pulse is not None:
            self.status_.replicas[worker] = pulse
        mine = self.leases.setdefault(worker, {})
        for number, offsets in completed:
            out = mine.get(number)
            if out is not None:
                for at in offsets:
                    self.lent -= out.states[at] == LEASED
                    out.states[at] = max(out.states[at], COMPLETED)
        self.joined.add(worker)
        # One that has its share by now asks again soon, when it has less.
        deadline = asyncio.get_running_loop().time() + (1.0 if held == 0 else 0.1)
        while True:
            if self.stopping or worker in self.gone:
                return None
            lease = self._suspect(mine) if held == 0 and self.suspects else None
            if lease is None and self.ready and (share := self._share() - held) > 0:
                lease = self._lease(worker, mine, min(want, share))
            if lease is not None:
                await self._write_spent()
                return lease
            if self._over():
                return None
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return Lease(-1, [], [], [], last=self.status_.fed)
            async with self.changed:
                try:
                    await asyncio.wait_for(self.changed.wait(), left)
                except TimeoutError:
                    pass

    def _share(self) -> int:
        """The most rows that one worker may hold: an equal part of all that are left, so that none idles at the end."""
        left = len(self.ready) + len(self.suspects) + self.lent
        return -(-left // len(self.joined))

    def _lease(self, worker: str, mine: dict[int, _Out], want: int) -> Lease | None:
        """None where the budget has no room for any of the next rows."""
        rows, costs = self._affordable(self.ready.take(worker, want), want)
        if not rows and not self._any_leased():  # one further back may be cheaper
            rows, costs = self._affordable(self.ready.take(worker, len(self.ready)), want)
        if not rows:
            return None
        if len(self.ready) < self.buffer_rows:
            self.room.set()
        return self._lend(mine, rows, costs, last=self.status_.fed and not self.ready)

    def _affordable(self, rows: list[Ask], want: int) -> tuple[list[Ask], list[float]]:
        """Those, up to `want`, for which the budget has room, and what it reserves for them; the others go back."""
        if self.budget is None:
            return rows, []
        fit: list[Ask] = []
        costs: list[float] = []
        back: list[Ask] = []
        for row in rows:
            cost = self.budget.most(row.request)
            if len(fit) < want and self.budget.fits(cost):
                self.budget.reserved += cost
                fit.append(row)
                costs.append(cost)
            else:
                back.append(row)
        self.ready.put_back(back)
        return fit, costs

    def _any_leased(self) -> bool:
        return any(self.leases.values())

    async def _write_spent(self) -> None:
        """Writes down what is about to be spent, unless it is."""
        if self.budget is None:
            return
        async with self.writing:
            if (usd := self.budget.to_write()) is not None:
                await asyncio.to_thread(write_spent, *resolve(self.output_path), usd)
                self.budget.written = usd

    async def settle(self) -> None:
        """Writes down what was spent, when nothing is in flight any more."""
        if self.budget is not None:
            with contextlib.suppress(OSError):  # then more than was spent stands there
                await asyncio.to_thread(write_spent, *resolve(self.output_path), self.budget.spent + self.budget.reserved)

    async def lost(self, worker: str, number: int, at: int, usd: float | None = None) -> bool:
        """A try of this row failed that may have to be paid, with `usd` if that is known; whether the budget has room for
        another."""
        out = self.leases.get(worker, {}).get(number)
        if self.budget is None or out is None:
            return True
        self.budget.spent += out.costs[at] if usd is None else usd
        await self._write_spent()
        return not self.budget.exceeded

    def _suspect(self, mine: dict[int, _Out]) -> Lease | None:
        """The next one alone; None where the budget has room for none of them. A convict costs nothing."""
        for _ in range(len(self.suspects)):
            row = self.suspects[0]
            deaths = self.crashes[row.key]
            convicted = deaths >= CRASHES_TO_CONVICT
            cost = 0.0 if self.budget is None or convicted else self.budget.most(row.request)
            if self.budget is None or self.budget.fits(cost):
                break
            self.suspects.rotate(-1)
        else:
            return None
        self.suspects.popleft()
        if self.budget is not None:
            self.budget.reserved += cost
        lease = self._lend(mine, [row], [cost], last=self.status_.fed and not self.ready and not self.suspects)
        lease.alone, lease.deaths = True, deaths
        if convicted:
            lease.convicted = f"the engine's process died {deaths} times with this row in it ({self.crash_reason})"
        return lease

    def _lend(self, mine: dict[int, _Out], rows: list[Ask], costs: list[float], last: bool) -> Lease:
        self.next_lease += 1
        self.lent += len(rows)
        mine[self.next_lease] = _Out(rows, bytearray(len(rows)), costs)
        return Lease(
            self.next_lease, [row.key for row in rows], [row.id for row in rows], [row.request for row in rows], last=last
        )

    async def commit(
        self, worker: str, durable: list[tuple[int, list[int]]], counts: Status, pulse: Pulse | None = None
    ) -> None:
        """`worker` has made these rows durable; `counts` adds to the run's figures."""
        mine = self.leases.get(worker, {})
        if pulse is not None and worker not in self.gone:
            self.status_.replicas[worker] = pulse
        if self.budget is not None:
            self.budget.spent += counts.spent
            self.budget.seen.add(counts.seen)
            for number, at in counts.unpriced:  # at most what was reserved for them
                if number in mine:
                    self.budget.spent += mine[number].costs[at]
        for number, offsets in durable:
            out = mine.get(number)
            if out is None:
                continue
            for at in offsets:
                if self.budget is not None and out.states[at] != DURABLE:
                    self.budget.reserved -= out.costs[at]
                out.durable += out.states[at] != DURABLE
                self.lent -= out.states[at] == LEASED
                out.states[at] = DURABLE
            if out.durable == len(out.states):
                del mine[number]
        status = self.status_
        status.done += counts.done
        status.failed += counts.failed
        status.input_tokens += counts.input_tokens
        status.output_tokens += counts.output_tokens
        status.cost_usd += counts.cost_usd
        status.cost_unknown += counts.cost_unknown
        status.errors.update(counts.errors)
        status.first_errors = {**counts.first_errors, **status.first_errors}
        await self._notify()

    async def leave(self, worker: str, crash: str | None = None, inside: list[tuple[int, int]] | None = None) -> None:
        """`worker` is gone; what it held goes to others. `crash` tells how its process died, if it did; `inside` are the
        (lease, row) that were in its engine and may have to be paid: None where all may.

        Rows that were in its engine then are suspects: tried alone, and convicted after the second death.
        """
        if worker in self.gone:
            return
        self.gone.add(worker)
        self.joined.discard(worker)
        self.ready.leave(worker)
        gone, last = self.status_.gone, self.status_.replicas.pop(worker, Pulse())
        for name in ("done", "retried", "throttled", "waited_s"):
            setattr(gone, name, getattr(gone, name) + getattr(last, name))
        for number, out in self.leases.pop(worker, {}).items():
            back: list[Ask] = []
            self.lent -= out.states.count(LEASED)
            for at, (row, state) in enumerate(zip(out.rows, out.states, strict=True)):
                if state == DURABLE:
                    continue
                if self.budget is not None:
                    self.budget.reserved -= out.costs[at]
                    if inside is None or (number, at) in inside:
                        self.budget.spent += out.costs[at]
                if state == COMPLETED:  # it came out whole, so it is not to blame
                    self.crashes.pop(row.key, None)
                elif crash is not None:
                    self.crashes[row.key] += 1
                if not self.crashes.get(row.key):
                    back.append(row)
                elif self.crashes[row.key] >= CRASHES_TO_CONVICT:
                    # Who is convicted goes first, so that the verdict is durable before the next death.
                    self.suspects.appendleft(row)
                else:
                    self.suspects.append(row)
            self.ready.put_back(back)
        if crash is not None:
            self.crash_reason = crash
            self.status_.crashes += 1
        await self._notify()

    async def stop(self) -> None:
        """Leases nothing more; workers finish what they have in flight."""
        self.stopping = True
        self.room.set()
        await self._notify()

    def _over(self) -> bool:
        return self.status_.fed and not self.ready and not self.suspects and not self._any_leased()

    def _broke(self) -> bool:
        """Whether there are rows, none of them is in flight, and the budget has room for none."""
        waiting = [row for group in self.ready.groups.values() for row in group]
        waiting += [row for row in self.suspects if self.crashes[row.key] < CRASHES_TO_CONVICT]
        return bool(waiting) and not any(self.budget.fits(self.budget.most(row.request)) for row in waiting)  # type: ignore[union-attr]

    async def status(self) -> Status:
        status = self.status_
        found: Iterable[Summary] = self.summaries.values()
        status.read = sum(s.rows for s in found)
        status.invalid = sum(s.invalid for s in found)
        status.answered = sum(s.answered for s in found)
        status.in_flight = self.lent
        status.workers = len(self.leases)
        status.left = len(self.ready) + len(self.suspects)
        status.trouble = next((pulse.trouble for pulse in status.replicas.values() if pulse.trouble), "")
        if self.budget is not None:
            status.spent = self.budget.spent + self.budget.reserved
            status.broke = not self._any_leased() and self._broke()
        status.finished = self._over() or self.stopping
        return status
