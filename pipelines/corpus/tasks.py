"""Pending units as the tasks of a Ray Data source: so few that they are made in no time, and run when there is room."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ray.data import Datasource
from ray.data.block import Block, BlockMetadata
from ray.data.datasource import ReadTask

if TYPE_CHECKING:
    from pipelines.corpus.read import Span

Call = Callable[[], Iterable[Block]]


class Tasks(Datasource):  # type: ignore[misc]  # Ray has no types
    """A Ray Data source of what calls yield, a task each: it is walked lazily, and held back when blocks pile up."""

    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__()
        self._calls = list(calls)

    def get_name(self) -> str:
        return "Units"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(call, unknown) for call in self._calls]


def grouped(spans: "Iterable[Span]", num_units: int) -> "Iterator[list[Span]]":
    """The spans in groups of about `num_units` units; a row group's units stay together, for it is read once."""
    held: list[Span] = []
    for span in spans:
        held.append(span)
        if sum(len(each.units) for each in held) >= num_units:
            yield held
            held = []
    if held:
        yield held
