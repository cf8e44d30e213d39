"""Compares the typed columns of outputs: the agreement of all, a confusion table for labels, differences of numbers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engines.errors import ConfigError, EngineError, no_such
from engines.params import GenerationParams
from engines.tasks import CHAT, TASKS
from jobs.reading import Output, StoredRow, StoredRows
from pipeline.output.answer_columns import AnswerColumn, answer_values, plan_answer_columns
from pipeline.storage.exact_json import dumps
from pipeline.storage.ledger import VALUE_COLUMNS

# The code of a value is its hash, which is never -1.
NULL = -1
# Labels are short texts that repeat. A column with more or longer ones is compared as text: without a confusion table.
MOST_LABELS, LONGEST_LABEL = 20, 40
Codes = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


class ColumnValues:
    """The columns of one output that are compared. A value becomes a number (NaN if it is none) and a code."""

    def __init__(self, out: Output, rows: StoredRows, labels: dict[str, dict[int, str]]) -> None:
        self.stored = rows.names()
        self.planned = {column.name: column for column in _planned(out)}
        kind = TASKS.get(out.config.get("task", CHAT), TASKS[CHAT])
        self.of_task = [name for name in kind.columns if name in self.stored]  # the columns of the task
        self.compared = [name for name in self.of_task if not pa.types.is_nested(VALUE_COLUMNS[name])]
        self.labels = labels  # of all outputs: column -> code -> text, for the codes that may be labels

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.planned, *self.stored]))

    def needed(self, names: Sequence[str]) -> list[str]:
        """The stored columns among `names`. The others come from the answers."""
        return [name for name in names if name in self.stored]

    def of(self, row: StoredRow, names: Sequence[str]) -> Iterator[tuple[float, int]]:
        """The number and the code of each column."""
        computed = [self.planned[name] for name in names if name not in self.stored]
        values = dict(zip((c.name for c in computed), answer_values(computed, row.get("response")), strict=True))
        for name in names:
            yield self._encoded(name, values[name] if name in values else row.get(name))

    def _encoded(self, name: str, value: Any) -> tuple[float, int]:
        if value is None or value != value:  # NaN differs from itself
            return np.nan, NULL
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        text = value if isinstance(value, str) else f"{value:g}" if is_number else dumps(value).decode()
        code, labels = hash(value if is_number else text), self.labels.setdefault(name, {})
        if isinstance(value, (str, bool, int, float)) and len(text) <= LONGEST_LABEL and len(labels) < MOST_LABELS:
            labels.setdefault(code, text)
        return float(value) if is_number else np.nan, code


def _planned(out: Output) -> list[AnswerColumn]:
    """The columns of `output.columns` that the configuration of the output names."""
    try:
        wanted, form = out.config["output"].get("columns"), out.config["generation"].get("response_format")
        return plan_answer_columns(wanted, GenerationParams.parse({"response_format": form}).response_format)
    except (ConfigError, EngineError, KeyError, AttributeError):  # an older version's configuration
        return []


def chosen_columns(outputs: Sequence[ColumnValues], wanted: Sequence[str] | None) -> list[str]:
    """The columns to compare: those that are named or, if none is, the labels and numbers of the task and the columns of
    `output.columns` that all outputs have."""
    for name in wanted or ():
        for values in outputs:
            if name not in values.names:
                raise ConfigError(f"--column {name}: {no_such('column', name, values.names)} in one of the outputs")
    if wanted is not None:
        return list(dict.fromkeys(wanted))
    first, *others = outputs
    return [name for name in (*first.compared, *first.planned) if all(name in values.names for values in others)]


def compare_column(labels: dict[int, str], numbers: Sequence[Numbers], codes: Sequence[Codes]) -> dict[str, Any]:
    """The comparison of one column. The arrays have a value for each row that all outputs answered, one array an output."""
    given = np.logical_and.reduce([code != NULL for code in codes])
    present = np.concatenate([code != NULL for code in codes])
    is_number = bool(present.any()) and not np.isnan(np.concatenate(numbers)[present]).any()
    kept = [code[given] for code in codes]
    distinct = np.unique(np.concatenate(kept)).tolist()
    few = len(distinct) * 2 <= sum(map(len, kept)) and all(code in labels for code in distinct)
    kind = "number" if is_number else "label" if few else "text"
    equal = np.logical_and.reduce([code == kept[0] for code in kept])
    found: dict[str, Any] = {
        "kind": kind, "rows": int(given.sum()), "without_value": int((~given).sum()), "agreement": _share(equal),
    }  # fmt: skip
    values = [number[given] for number in numbers]
    if is_number:
        found["means"] = [_mean(value) for value in values]
    found["pairs"] = []
    for a, b in itertools.combinations(range(len(codes)), 2):
        pair: dict[str, Any] = {"outputs": [a, b], "agreement": _share(kept[a] == kept[b])}
        if is_number:
            pair |= _difference(values[a], values[b])
        if few:
            counts = Counter(zip(kept[a].tolist(), kept[b].tolist(), strict=True))
            pair["confusion"] = [{"values": [labels[x], labels[y]], "rows": n} for (x, y), n in sorted(
                counts.items(), key=lambda item: (labels[item[0][0]], labels[item[0][1]]))]  # fmt: skip
        found["pairs"].append(pair)
    return found


def _difference(one: Numbers, two: Numbers) -> dict[str, float | None]:
    """The second output minus the first."""
    delta = two - one
    varies = len(delta) > 1 and one.std() > 0 and two.std() > 0
    return {
        "mean_difference": _mean(delta),
        "mean_absolute_difference": _mean(np.abs(delta)),
        "correlation": float(np.corrcoef(one, two)[0, 1]) if varies else None,
    }


def _mean(values: Numbers) -> float | None:
    return float(values.mean()) if len(values) else None


def _share(mask: npt.NDArray[np.bool_]) -> float | None:
    return float(mask.mean()) if len(mask) else None
