"""Documents out of files of records: JSON lines and Parquet, one record at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import IO, Any

from mbit_data.inputs import InputFile
from megatron_bit.errors import UserError

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
PARQUET_ROWS = 256  # decoded at a time
PARQUET_BUFFER = 1 << 20  # bytes of a column read at a time, whatever the size of a row group
BOM = b"\xef\xbb\xbf"

Damaged = Callable[[str, str], None]  # (where in the file, what is wrong): raises, or counts it


def json_lines(stream: IO[bytes], text_key: str, damaged: Damaged) -> Iterator[tuple[int, str]]:
    """(index of the line, text) of each line; blank lines are no records. `damaged` is told of the others."""
    for index, line in enumerate(stream):
        if index == 0 and line.startswith(BOM):
            line = line[len(BOM) :]
        if not line.strip():
            continue
        try:
            yield index, _text_of(line, text_key)
        except ValueError as error:
            damaged(f"line {index + 1}", str(error))


def _text_of(line: bytes, text_key: str) -> str:
    """Raises ValueError saying what is wrong with the line."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {_kind(record)}, not an object")
    if text_key not in record:
        raise ValueError(
            f"no key {text_key!r} (there: {', '.join(list(record)[:8]) or 'none'}; --text-key names another)"
        )
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is {_kind(text)}, not a string")
    return text


def _kind(value: Any) -> str:
    kinds = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "string",
        list: "array",
    }
    return kinds.get(type(value), "object")


def parquet_rows(file: InputFile, text_key: str, damaged: Damaged) -> Iterator[tuple[int, str, float]]:
    """(row, text, share of the file's rows up to and with it). Only the text column is read, PARQUET_ROWS at a time.

    Raises UserError: pyarrow is missing, the file is no Parquet or damaged, or it has no column of text of that name.
    """
    arrow, parquet = _library(file)
    try:
        # pre_buffer would hold every row group's column, an unbuffered stream one whole row group's
        with parquet.ParquetFile(str(file.path), pre_buffer=False, buffer_size=PARQUET_BUFFER) as source:
            _check_column(file, source.schema_arrow, text_key, arrow)
            rows, row = max(1, source.metadata.num_rows), 0
            for batch in source.iter_batches(PARQUET_ROWS, columns=[text_key], use_threads=False):
                for value in batch.column(0):
                    text = _value(value, text_key, f"row {row}", damaged)
                    row += 1
                    if text is not None:
                        yield row - 1, text, row / rows
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"input file {file.path} is damaged or no Parquet: {error}; copy it again") from error


def check_parquet(file: InputFile, text_key: str) -> None:
    """What can be said without reading rows. Raises UserError as `parquet_rows` does."""
    arrow, parquet = _library(file)
    try:
        schema = parquet.read_schema(str(file.path))
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"input file {file.path} is damaged or no Parquet: {error}; copy it again") from error
    _check_column(file, schema, text_key, arrow)


def _library(file: InputFile) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"input file {file.path} needs the package pyarrow; install it: pip install 'megatron-bit[data]'"
        ) from error
    return pyarrow, pyarrow.parquet


def _check_column(file: InputFile, schema: Any, text_key: str, arrow: Any) -> None:
    if text_key not in schema.names:
        names = ", ".join(schema.names[:12]) or "none"
        raise UserError(f"input file {file.path} has no column {text_key!r}; name one with --text-key (there: {names})")
    kind = schema.field(text_key).type
    inner = kind.value_type if arrow.types.is_dictionary(kind) else kind
    tests = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
    if not any(getattr(arrow.types, test)(inner) for test in tests):
        raise UserError(
            f"input file {file.path}: column {text_key!r} is {kind}, not text; name another with --text-key"
        )


def _value(value: Any, text_key: str, where: str, damaged: Damaged) -> str | None:
    try:
        text = value.as_py()
        if isinstance(text, bytes):  # written without the annotation that it is UTF-8
            text = text.decode()
    except UnicodeDecodeError as error:
        damaged(where, f"not UTF-8 (byte {error.start} of the text)")
        return None
    if text is None:
        damaged(where, f"{text_key!r} is null")
    return text
