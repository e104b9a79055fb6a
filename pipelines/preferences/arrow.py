"""What pyarrow leaves to be done: a column as one array."""

import pyarrow as pa


def whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The column as one array, whether it had one chunk, several or none."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # combine_chunks keeps a chunked array where it holds no chunk
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    return column
