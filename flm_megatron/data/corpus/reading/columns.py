"""Tables: Parquet, Arrow, and folders that `datasets.Dataset.save_to_disk` wrote. Through pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.data.corpus.reading.text import names
from flm_megatron.errors import DamagedError, RequestError, one_line, read_error
from flm_megatron.json_text import JsonObject, parse_json

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 1024
STATE, SPLITS = "state.json", "dataset_dict.json"


def of_table(path: Path, field: str) -> Iterator[str]:
    """The text in a column, row by row.

    Raises:
        RequestError: no such column, a value that is not text, or pyarrow is not installed.
        DamagedError: it is no such file.
    """
    try:
        import pyarrow
    except ImportError:
        raise RequestError(f"{path} needs pyarrow: pip install 'flm_megatron[data]'") from None
    try:
        row = 0
        for batch in _batches(path, field):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    raise RequestError(f"{path} row {row}: field {field!r} is not text but {type(text).__name__}")
                yield text
                row += 1
    except pyarrow.ArrowException as error:
        raise DamagedError(one_line(f"{path} cannot be read: {error}")) from None
    except OSError as error:
        if error.errno is None:  # pyarrow's, of a file that is none
            raise DamagedError(one_line(f"{path} cannot be read: {error}")) from None
        raise read_error(path, error) from error


def _batches(path: Path, field: str) -> Iterator[pyarrow.RecordBatch]:
    """Stretches of rows with the column alone."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as table:
            _require_column(path, field, table.schema_arrow.names)
            yield from table.iter_batches(ROWS_AT_ONCE, columns=[field])
        return
    from pyarrow import ArrowInvalid, ipc, memory_map

    with memory_map(str(path)) as source:
        try:
            reader = ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        except ArrowInvalid:  # a stream, as `datasets` writes
            source.seek(0)
            reader = batches = ipc.open_stream(source)
        _require_column(path, field, reader.schema.names)
        for batch in batches:
            yield batch.select([field])


def _require_column(path: Path, field: str, there: list[str]) -> None:
    if field not in there:
        raise RequestError(f"{path} has no field {field!r}; its fields are {names(there)} (choose with --field)")


def saved_dataset(folder: Path) -> list[Path] | None:
    """The files of a folder that `save_to_disk` wrote, in order; none if it is no such folder.

    Raises:
        RequestError: it holds several splits: names them.
        DamagedError: what it says of itself cannot be read, or a file is missing.
    """
    if (folder / SPLITS).is_file():
        splits = [str(folder / str(name)) for name in _object(folder / SPLITS).get("splits", [])]
        raise RequestError(f"{folder} holds splits: name {' or '.join(splits)}")
    if not (folder / STATE).is_file():
        return None
    listed = _object(folder / STATE).get("_data_files")
    if not isinstance(listed, list) or not all(isinstance(file, dict) and "filename" in file for file in listed):
        raise DamagedError(f"{folder / STATE} names no data files")
    files = [folder / Path(str(file["filename"])).name for file in listed]
    for file in files:
        if not file.is_file():
            raise DamagedError(f"{file}, which {folder / STATE} names, is missing")
    return files


def _object(path: Path) -> JsonObject:
    try:
        found = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise read_error(path, error) from error
    if not isinstance(found, dict):
        raise DamagedError(f"{path} is no JSON object")
    return found
