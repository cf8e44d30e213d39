"""Holds back rows that a server refused, until it is known if the rows are the cause.

A wrong key, an empty account, a misspelt model or URL, or a refused parameter would fail every row. Such rows are not
recorded: the run stops, and they stay open. The scope of an error shows if all rows would fail. Before the first answer,
equal errors of the first requests show it too.
"""

from __future__ import annotations

import time

from engines.base import Engine
from engines.errors import REFUSALS, ErrorCode, Failure
from engines.types import Completion
from pipeline.errors import Stopped
from pipeline.executors.live.recorder import LeasedRow, RowRecorder
from pipeline.executors.stop_reasons import ACCOUNT_EMPTY, KEY_REFUSED
from pipeline.storage.exact_json import loads

# After an answer, a refusal of the key or model may be temporary. So many refusals without an answer between them end the
# run.
REFUSALS_TO_STOP = 20
# Before any answer, so many refusals of single rows end the run, if all have the same message.
SAME_TO_STOP = 20

Held = list[tuple[LeasedRow, Completion]]


class RefusalGate:
    """Between one worker's engine and its recorder. `same_stops`: if true, equal errors of the first rows stop the run."""

    def __init__(self, recorder: RowRecorder, engine: Engine, same_stops: bool) -> None:
        self.recorder, self.engine = recorder, engine
        self.is_remote = engine.remote is not None  # a local engine refuses rows only
        self.same_stops = same_stops and self.is_remote
        self.answered = self.stopped = False
        self.first_answered = False  # the first engine itself answered, not a fallback
        self.for_all: Held = []  # refused for a reason that would hit every row
        self.same: Held = []  # refused before the first answer, all with the same message
        # The first engine's refusals of rows that a fallback took over, while it has answered nothing and all are the same.
        self.passed_on: list[Failure] = []
        self.watches_first = self.same_stops
        self.refused_at = 0.0  # when the first of `for_all` was refused (monotonic)

    def finish(self, row: LeasedRow, completion: Completion) -> None:
        """Records a row that came out of the engine, or holds it back."""
        error = completion.error
        self._watch_first(completion)
        if error is None or completion.usage.output:
            self._answer(time.monotonic() - completion.latency_s, completion.place)
        elif self.stopped and not error.retryable and error.type in REFUSALS:
            self.for_all.append((row, completion))
            return
        elif self._is_for_all(row, error, completion.place):
            self.refused_at = self.refused_at if self.for_all else time.monotonic()
            self.for_all.append((row, completion))
            return
        elif not self.answered and self.same_stops and not error.retryable and error.type in REFUSALS:
            self.same.append((row, completion))
            if error != self.same[0][1].error:  # the rows cause them
                self.same_stops = False
                self._record_same()
            return
        self.recorder.record(row, completion)

    def _watch_first(self, completion: Completion) -> None:
        """Counts the rows that a fallback took over because the first engine refused them, until it answers one."""
        refused = completion.passed_on
        if not self.watches_first or (refused is None and completion.error is not None):
            return
        if refused is not None and refused.retryable:
            return  # an outage
        if refused is not None and refused.type in REFUSALS and refused == (self.passed_on or [refused])[0]:
            self.passed_on.append(refused)
        else:  # it works, or the rows cause the refusals
            self.watches_first, self.passed_on = False, []

    def _answer(self, sent_at: float, place: int) -> None:
        """The engine at `place` answered a request that was sent at `sent_at`. Rows refused before it are the cause of
        their refusals. But a fallback's answer does not show that the first engine's key and model work."""
        if self.stopped:
            return
        self.answered = True
        self.first_answered |= place == 0
        self._record_same()
        if self.for_all and sent_at > self.refused_at:  # the key and the model work
            for held in self.for_all:
                if place == 0 or held[1].place > 0:
                    self.recorder.record(*held)
            self.for_all = [held for held in self.for_all if place > 0 and held[1].place == 0]

    def _record_same(self) -> None:
        for row, completion in self.same:
            self.recorder.record(row, completion)
        self.same = []

    def give_back(self) -> None:
        """At the end of the worker: the rows that are held back return to the dispatcher. Their tries are recorded."""
        for row, completion in self.for_all + self.same:
            self.recorder.record_tries(row, completion)

    def _is_for_all(self, row: LeasedRow, error: Failure, place: int) -> bool:
        """True if the error of the engine at `place` would hit every row.

        A row's own model or parameters may be the cause. A fallback does not get the row's model.
        """
        if error.scope == "row" or error.type == "rate_limit" or not self.is_remote:
            return False
        own = loads(row.request) if row.request else {}
        if error.scope == "model":
            return place > 0 or own.get("model") in (None, self.engine.config.model)
        return error.type != "bad_request" or not own.get("generation")

    def stop_reason(self, idle: bool) -> Stopped | None:
        """The reason to stop the run, returned only once. None: the run continues. `idle`: no other row is left to ask."""
        if self.stopped or not (self.for_all or self.same or self.passed_on):
            return None
        works = self.answered if self.for_all and self.for_all[0][1].place > 0 else self.first_answered
        if len(self.for_all) >= (REFUSALS_TO_STOP if works and not idle else 1):
            error, place = self.for_all[0][1].error, self.for_all[0][1].place
        elif len(self.same) >= SAME_TO_STOP:
            error, place = self.same[0][1].error, self.same[0][1].place
        elif len(self.passed_on) >= SAME_TO_STOP:
            error, place = self.passed_on[0], 0
        else:
            if idle:  # no more rows can confirm it
                self._record_same()
            return None
        assert error is not None
        self.stopped = True
        code = error.code if error.scope == "key" and error.code else ErrorCode.REQUESTS_REFUSED
        asked = self.engine.at(place)
        at = f" at {asked.remote.url}" if asked.remote is not None else ""
        where = f"engine={asked.config.kind}{at} with engine.model={asked.config.model}"
        return Stopped(f"{self._explanation(error)} ({where}: {error.message}); no row is recorded as failed", code=code)

    def _explanation(self, error: Failure) -> str:
        if error.code == ErrorCode.ACCOUNT_EMPTY:
            return ACCOUNT_EMPTY
        if error.scope == "key":
            return KEY_REFUSED
        if error.scope == "model":
            return "the model does not exist there, or the key may not use it"
        if error.type == "connection":
            return "no server has ever answered at engine.base_url"
        if error.scope == "run":
            return "the server refuses a parameter" if error.type == "bad_request" else "the URL is wrong"
        return (
            f"the first {len(self.same) or len(self.passed_on)} requests are all refused with the same error; "
            "if the rows cause it, run.max_error_rate=1 records them as failed and goes on"
        )
