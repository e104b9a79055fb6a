"""The `stored` engine: the answer is already a column of the shard, and nothing is computed."""

from actors.contract import RowError
from actors.engines.base import Completion, EngineConfig, EngineStats, Request


class StoredEngine:
    """Returns each request's stored answer."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config

    async def generate(self, request: Request) -> Completion:
        """Raises RowError `missing_response` where nothing is stored."""
        if not request.stored:
            raise RowError("missing_response", "the shard holds no answer to this prompt")
        return Completion(request.stored, None, None, None)

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0)

    def close(self) -> None:
        pass
