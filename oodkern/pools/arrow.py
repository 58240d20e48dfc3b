"""Features [N, D] in Parquet and Arrow files: a column of lists of floats, all of one length."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from oodkern._errors import brief
from oodkern.pools.blocks import Block, Loaded, Loader, Whole, from_read_only
from oodkern.pools.formats import listed
from oodkern.pools.manifest import PoolError


class Columns(NamedTuple):
    """Blocks in the order of the file, and what their features have in common."""

    blocks: list[Block]
    dimension: int
    dtype: torch.dtype


def pyarrow() -> Any:
    try:
        import pyarrow as found
    except ImportError:
        raise ImportError("Parquet and Arrow files need pyarrow: pip install 'oodkern[pool]'") from None
    return found


def kinds() -> dict[Any, torch.dtype]:
    pa = pyarrow()
    return {pa.float16(): torch.float16, pa.float32(): torch.float32, pa.float64(): torch.float64}


def is_list(kind: Any) -> bool:
    types = pyarrow().types
    return types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind)


def column_of(path: Path, schema: Any, name: str | None) -> tuple[str, int, torch.dtype]:
    """Name, position and dtype of the column of features: of that name, or the only one of lists of floats."""
    dtypes = kinds()
    fitting = [one.name for one in schema if is_list(one.type) and one.type.value_type in dtypes]
    if name is None:
        if len(fitting) != 1:
            raise PoolError(f"{path}: expected one column of lists of floats, or its name, got {listed(fitting)}")
        name = fitting[0]
    if schema.names.count(name) != 1:
        raise PoolError(f"{path}: expected one column {name!r}, got {listed(schema.names)}")
    position = schema.names.index(name)
    kind = schema.field(position).type
    if name not in fitting:
        raise PoolError(f"{path}: {name}: expected lists of float16, float32 or float64, got {kind}")
    return name, position, dtypes[kind.value_type]


def features_of(where: str, column: Any, dimension: int) -> Tensor:
    """[n, D] of a column, D = `dimension`, or of its first list for 0; a view where it is one array.

    Raises PoolError where lists or numbers are null, or lists of another length.
    """
    parts = [part_of(where, one, dimension) for one in getattr(column, "chunks", [column]) if len(one)]
    if not parts:
        return torch.empty(0, dimension)
    if len({part.shape[1] for part in parts}) > 1:
        raise PoolError(f"{where}: expected lists of one length, got {sorted({part.shape[1] for part in parts})}")
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def part_of(where: str, array: Any, dimension: int) -> Tensor:
    pa = pyarrow()
    if array.null_count:
        raise PoolError(f"{where}: expected a list in every row, got {array.null_count:,} nulls")
    if pa.types.is_fixed_size_list(array.type):
        shortest = longest = array.type.list_size
    else:
        lengths = np.diff(array.offsets.to_numpy())
        shortest, longest = int(lengths.min()), int(lengths.max())
    expected = dimension or longest
    if not shortest == longest == expected or not expected:
        got = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
        raise PoolError(f"{where}: expected lists of {expected or 'some'} numbers each, got {got}")
    values = array.flatten()
    if values.null_count:
        raise PoolError(f"{where}: expected numbers, got {values.null_count:,} nulls")
    return from_read_only(values.to_numpy(zero_copy_only=True)).view(len(array), expected)


def unreadable(path: Path, what: str, error: Exception) -> PoolError:
    return PoolError(f"{path}: not a readable {what} file ({brief(error)})")


def open_parquet(path: Path, name: str | None) -> Columns:
    """A block for each row group, read when it is asked for. Raises PoolError."""
    pyarrow()
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        schema = file.schema_arrow
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except Exception as error:  # Arrow's own, and whatever the bytes of a damaged file happen to mean
        raise unreadable(path, "Parquet", error) from None
    column, position, dtype = column_of(path, schema, name)

    def read(group: int) -> Tensor:
        where = f"{path}: row group {group}: {column}"
        try:
            found = file.read_row_group(group, columns=[column], use_threads=False).column(0)
        except Exception as error:
            raise PoolError(f"{where}: cannot be read ({brief(error)})") from None
        if len(found) != rows[group]:
            raise PoolError(f"{where}: expected {rows[group]:,} rows, got {len(found):,}")
        return features_of(where, found, dimension)

    kind = schema.field(position).type
    dimension = getattr(kind, "list_size", 0)
    if not dimension:
        dimension = length_of_first(path, file, column)
    loader = Loader(read)
    return Columns([Loaded(loader, group, count) for group, count in enumerate(rows)], dimension, dtype)


def length_of_first(path: Path, file: Any, column: str) -> int:
    """Of the first list that has numbers."""
    try:
        for batch in file.iter_batches(batch_size=1, columns=[column]):
            if len(batch) and (first := batch.column(0)[0]).is_valid and len(first):
                return len(first)
    except Exception as error:
        raise unreadable(path, "Parquet", error) from None
    raise PoolError(f"{path}: {column}: expected features, and there are none")


def open_arrow(path: Path, name: str | None) -> Columns:
    """A block for each record batch of a file or stream, mapped where it is not compressed. Raises PoolError."""
    pa = pyarrow()
    try:
        content = pa.memory_map(str(path)).read_buffer()
        try:
            file, streamed = pa.ipc.open_file(content), False
        except pa.ArrowInvalid:
            file, streamed = pa.ipc.open_stream(content), True
        schema = file.schema
    except Exception as error:
        raise unreadable(path, "Arrow", error) from None
    column, position, dtype = column_of(path, schema, name)
    dimension = getattr(schema.field(position).type, "list_size", 0)

    def found(number: int) -> Any:
        try:
            return file.read_next_batch() if streamed else file.get_batch(number)
        except StopIteration:
            return None
        except Exception as error:
            raise PoolError(f"{path}: record batch {number}: cannot be read ({brief(error)})") from None

    def features(number: int, batch: Any) -> Tensor:
        return features_of(f"{path}: record batch {number}: {column}", batch.column(column), dimension)

    loader = Loader(lambda number: features(number, found(number)))
    blocks: list[Block] = []
    packed = False
    first, end = content.address, content.address + content.size
    while streamed or len(blocks) < file.num_record_batches:
        if (batch := found(len(blocks))) is None:
            break
        block: Block = Loaded(loader, len(blocks), len(batch))
        try:
            values = features(len(blocks), batch)
        except PoolError:
            if streamed:
                raise
        else:
            dimension = dimension or values.shape[1]
            if not len(values) or first <= values.data_ptr() < end:
                block = Whole(values)
            elif streamed:
                raise PoolError(
                    f"{path}: a compressed stream, of which batches cannot be read alone: write a file of it"
                )
            elif not packed:
                # The column alone is unpacked from now on; not from the start, for such a reader copies what is mapped.
                packed = True
                file = pa.ipc.open_file(content, options=pa.ipc.IpcReadOptions(included_fields=[position]))
        blocks.append(block)
    return Columns(blocks, dimension, dtype)
