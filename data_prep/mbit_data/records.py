"""Documents out of files of records: JSON lines and Parquet, one record at a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import IO, Any

from mbit_data.input_file import InputFile
from mbit_data.json_values import MAX_VALUE, BrokenFile, JsonValues
from megatron_bit.errors import UserError

JSON_LINES = (".jsonl", ".ndjson")
JSON = ".json"
PARQUET = (".parquet",)
RECORDS = (*JSON_LINES, JSON, *PARQUET)  # what --text-key is for
MAX_LINE = MAX_VALUE  # bytes of a JSON line
CHUNK = 1 << 20
PARQUET_ROWS = 256  # decoded at a time, at most
PARQUET_BYTES = 1 << 24  # and no more rows than these can hold, were each as large as all of its row group
PARQUET_BUFFER = 1 << 20  # bytes of a column read at a time, whatever the size of a row group
BOM = b"\xef\xbb\xbf"

Damaged = Callable[[str, str], None]  # (where in the file, what is wrong): raises, or counts it


def json_lines(
    stream: IO[bytes], text_key: str, damaged: Damaged, first: tuple[int, bytes] | None = None
) -> Iterator[tuple[int, str, str]]:
    """(index of the line, text, place) of each line; blank lines are no records. `damaged` is told of the others.

    `first`: (index, line) that has been read already.
    """
    for index in itertools.count(first[0] if first else 0):
        line = first[1] if first else stream.readline(MAX_LINE + 1)
        first = None
        if not line:
            return
        if len(line) > MAX_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(CHUNK)
            damaged(f"line {index + 1}", f"more than {MAX_LINE >> 20} MiB in one line")
            continue
        if index == 0:
            line = line.removeprefix(BOM)
        if not line.strip():
            continue
        try:
            yield index, _text_of(_parsed(line), text_key), f"line {index + 1}"
        except ValueError as error:
            damaged(f"line {index + 1}", str(error))


def json_file(stream: IO[bytes], text_key: str, damaged: Damaged) -> Iterator[tuple[int, str, str]]:
    """The same of a .json file, told by its first line: lines of objects, or an array of objects, or objects that take
    several lines, whose index counts records. Raises BrokenFile where one of the latter is no JSON.
    """
    for index in itertools.count():
        line = stream.readline(MAX_LINE + 1)
        if not line:
            return
        if index == 0:
            line = line.removeprefix(BOM)
        if line.strip():
            break
    start = line.strip()[:1]
    if start == b"{" and _is_json(line):
        yield from json_lines(stream, text_key, damaged, (index, line))
    elif start in (b"[", b"{"):
        values = JsonValues(itertools.chain([line], iter(lambda: stream.read(CHUNK), b"")), index + 1)
        for number, (value, at) in enumerate(values.elements() if start == b"[" else values.objects()):
            place = f"record {number} (line {at})"
            try:
                yield number, _text_of(value, text_key), place
            except ValueError as error:
                damaged(place, str(error))
    else:
        raise BrokenFile(f"line {index + 1}", "neither a JSON object nor an array of them; give text another suffix")


def _is_json(line: bytes) -> bool:
    try:
        _parsed(line)
    except ValueError:
        return False
    return True


def _parsed(line: bytes) -> Any:
    """Raises ValueError saying what is wrong with the line."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None


def _text_of(record: Any, text_key: str) -> str:
    """Raises ValueError saying what is wrong with the record."""
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


def parquet_rows(file: InputFile, descriptor: int, text_key: str, damaged: Damaged) -> Iterator[tuple[int, str, float]]:
    """(row, text, share of the file's rows up to and with it). Only the text column is read, some rows at a time: of a
    dictionary's page few bytes may stand for many long texts. `descriptor` is the open file.

    Raises UserError: pyarrow is missing, the file is no Parquet or damaged, or it has no column of text of that name.
    """
    arrow, parquet = _library(file)
    try:
        # pre_buffer would hold every row group's column, an unbuffered stream one whole row group's
        path = f"/proc/self/fd/{descriptor}"  # the very file that is hashed, with a position of its own
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER) as source:
            _check_column(file, source.schema_arrow, text_key, arrow)
            rows, row = max(1, source.metadata.num_rows), 0
            for batch in source.iter_batches(
                _rows_at_once(source.metadata, text_key), columns=[text_key], use_threads=False
            ):
                for value in batch.column(0):
                    text = _value(value, text_key, f"row {row}", damaged)
                    row += 1
                    if text is not None:
                        yield row - 1, text, row / rows
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"input file {file.name} is damaged or no Parquet: {error}; copy it again") from error


def _rows_at_once(metadata: Any, text_key: str) -> int:
    largest = 1
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema == text_key:
                largest = max(largest, column.total_uncompressed_size)
    return max(1, min(PARQUET_ROWS, PARQUET_BYTES // largest))


def check_parquet(file: InputFile, text_key: str) -> None:
    """What can be said without reading rows. Raises UserError as `parquet_rows` does."""
    arrow, parquet = _library(file)
    try:
        schema = parquet.read_schema(str(file.path))
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"input file {file.name} is damaged or no Parquet: {error}; copy it again") from error
    _check_column(file, schema, text_key, arrow)


def _library(file: InputFile) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"input file {file.name} needs the package pyarrow; install it: pip install 'megatron-bit[data]'"
        ) from error
    return pyarrow, pyarrow.parquet


def _check_column(file: InputFile, schema: Any, text_key: str, arrow: Any) -> None:
    if text_key not in schema.names:
        names = ", ".join(schema.names[:12]) or "none"
        raise UserError(f"input file {file.name} has no column {text_key!r}; name one with --text-key (there: {names})")
    kind = schema.field(text_key).type
    inner = kind.value_type if arrow.types.is_dictionary(kind) else kind
    tests = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
    if not any(getattr(arrow.types, test)(inner) for test in tests):
        raise UserError(
            f"input file {file.name}: column {text_key!r} is {kind}, not text; name another with --text-key"
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
