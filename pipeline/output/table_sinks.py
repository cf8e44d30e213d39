"""Commits rows to Delta Lake and Lance tables. The number of a commit is part of its transaction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pyarrow as pa

from engines.errors import ErrorCode
from pipeline.dataset.tables import Table, location, missing_package
from pipeline.errors import Stopped

# Names of the properties of a Lance transaction.
APP, NUMBER = "eagleray.app", "eagleray.number"


class Sink(Protocol):
    """A table that rows are appended to. It may not exist yet."""

    def version(self) -> int | None:
        """The version of the table now. None if there is no table."""
        ...

    def is_committed(self, app: str, number: int, before: int | None) -> bool:
        """True if the table has this commit. `before`: its version before the commit was tried."""
        ...

    def commit(self, batches: Iterator[pa.RecordBatch], schema: pa.Schema, app: str, number: int) -> None:
        """Appends the batches in one transaction. Creates the table, and columns that it does not have."""
        ...


def sink_of(table: Table) -> Sink:
    """Raises `ConfigError` if the package of the table is missing."""
    try:
        return DeltaSink(table.path) if table.kind == "delta" else LanceSink(table.path)
    except ImportError:
        raise missing_package(table.kind) from None


class DeltaSink:
    """Delta Lake: an application's transaction id (`txn`) is a part of the protocol."""

    def __init__(self, path: str) -> None:
        import deltalake

        self.library = deltalake
        self.uri, self.options = location(path)

    def _table(self) -> Any:
        if not self.library.DeltaTable.is_deltatable(self.uri, self.options):
            return None
        return self.library.DeltaTable(self.uri, storage_options=self.options)

    def version(self) -> int | None:
        table = self._table()
        return None if table is None else table.version()

    def is_committed(self, app: str, number: int, before: int | None) -> bool:
        table = self._table()
        last = None if table is None else table.transaction_version(app)
        return last is not None and last >= number

    def commit(self, batches: Iterator[pa.RecordBatch], schema: pa.Schema, app: str, number: int) -> None:
        table = self._table()
        there = {} if table is None else {field.name: field.type for field in pa.schema(table.schema().to_arrow())}
        target = pa.schema([(field.name, there.get(field.name, delta_type(field.type))) for field in schema])
        transaction = self.library.Transaction(app, number)
        self.library.write_deltalake(
            self.uri if table is None else table,
            _reader(batches, target),
            mode="append",
            schema_mode=None if table is None else "merge",
            storage_options=self.options,
            commit_properties=self.library.CommitProperties(app_transactions=[transaction]),
        )


class LanceSink:
    """Lance: a transaction has properties, and the transactions of all versions can be read."""

    def __init__(self, path: str) -> None:
        import lance

        self.library = lance
        self.uri, self.options = location(path)

    def _table(self) -> Any:
        try:
            return self.library.dataset(self.uri, storage_options=self.options or None)
        except (ValueError, OSError) as error:
            if "not found" in str(error).lower():
                return None
            raise

    def version(self) -> int | None:
        table = self._table()
        return None if table is None else table.version

    def is_committed(self, app: str, number: int, before: int | None) -> bool:
        table = self._table()
        if table is None:
            return False
        for version in range((before or 0) + 1, table.version + 1):
            try:
                transaction = table.read_transaction(version)
            except Exception:
                transaction = None
            if transaction is None:
                text = f"output.table: version {version} of {self.uri} was removed before this run could read it"
                raise Stopped(f"{text}: it is not known if rows were appended in it", code=ErrorCode.TABLE)
            properties = transaction.transaction_properties or {}
            if (properties.get(APP), properties.get(NUMBER)) == (app, str(number)):
                return True
        return False

    def commit(self, batches: Iterator[pa.RecordBatch], schema: pa.Schema, app: str, number: int) -> None:
        table = self._table()
        there = {} if table is None else {field.name: field.type for field in table.schema}
        target = pa.schema([(field.name, there.get(field.name, field.type)) for field in schema])
        if table is not None and (new := [field for field in target if field.name not in there]):
            table.add_columns(pa.schema(new))
        self.library.write_dataset(
            _reader(batches, target),
            self.uri,
            mode="create" if table is None else "append",
            storage_options=self.options or None,
            transaction_properties={APP: app, NUMBER: str(number)},
        )


def _reader(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatchReader:
    """The batches with these types. A value that a type cannot hold raises `pa.ArrowInvalid`."""
    return pa.RecordBatchReader.from_batches(
        schema, (batch for given in batches for batch in pa.Table.from_batches([given]).cast(schema).to_batches())
    )


def delta_type(kind: pa.DataType) -> pa.DataType:
    """The type of a Delta table that holds all values of this one."""
    wider = {
        pa.uint8(): pa.int16(),
        pa.uint16(): pa.int32(),
        pa.uint32(): pa.int64(),
        pa.uint64(): pa.decimal128(20, 0),
        pa.float16(): pa.float32(),
        pa.null(): pa.string(),
    }
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(delta_type(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(delta_type(kind.value_type))
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", "UTC" if kind.tz else None)
    if pa.types.is_time(kind):
        return pa.string()
    if pa.types.is_duration(kind):
        return pa.int64()
    return wider.get(kind, kind)
