"""The `stored` engine: answers that the input shards hold already, passed through."""

from actors.contract import RowError
from actors.engines.base import Completion, EngineConfig, EngineStats, Request


class StoredEngine:
    """Returns what was stored; `config.model` is a provenance label and no model is loaded."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    async def generate(self, request: Request) -> Completion:
        """Return the stored answer. Raises RowError `missing_response` where there is none, or an empty one."""
        if not request.draft:
            raise RowError("missing_response", "the input shard holds no answer for this candidate")
        return Completion(text=request.draft, finish_reason=None, num_prompt_tokens=None, num_tokens=None)

    def stats(self) -> EngineStats:
        return EngineStats(num_tokens=0, num_running=0, num_waiting=0)

    def close(self) -> None:
        """Nothing is held."""
