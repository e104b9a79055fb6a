"""Strategies: pure functions from the `ranked` table to the rows of a dataset, one a file."""

from collections.abc import Callable

import pyarrow as pa

from pipelines.preferences.picks import Made
from pipelines.preferences.settings import BuildConfig
from pipelines.preferences.strategies.curriculum import curriculum
from pipelines.preferences.strategies.pairs import pairs
from pipelines.preferences.strategies.ranked import ranked
from pipelines.preferences.strategies.refinement import refinement
from pipelines.preferences.strategies.steps import steps
from pipelines.preferences.strategies.trajectory import trajectory
from pipelines.preferences.strategies.triple import triple
from pipelines.preferences.strategies.unpaired import unpaired

STRATEGIES: dict[str, Callable[[pa.Table, BuildConfig], Made]] = {
    "pairs": pairs,
    "unpaired": unpaired,
    "ranked": ranked,
    "curriculum": curriculum,
    "triple": triple,
    "steps": steps,
    "refinement": refinement,
    "trajectory": trajectory,
}
"""By the name that `build.strategy` takes."""
