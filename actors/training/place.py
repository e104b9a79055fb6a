"""Where a process stands among those that train together."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that train together."""

    rank: int = 0
    num_ranks: int = 1
    device: torch.device = torch.device("cpu")

    def agreed(self, number: int) -> int:
        """The first process's number, in each of them. All must call it alike."""
        if self.num_ranks == 1:
            return number
        told = torch.tensor(number, device=self.device)
        dist.broadcast(told, src=0)
        return int(told)

    def free(self) -> None:
        """Give memory that nothing holds any more back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
