"""Train a DiffPO aligner on the trajectories of a preference dataset, and leave it where `aligner.model=` takes it.

    python pipelines/train_aligner.py input.path=DATASET output.root=MODEL training.model=BASE reward=rules

The same command resumes after a crash, from the last checkpoint. With GPUs:

    python pipelines/train_aligner.py ... run.num_workers=8 run.use_gpu=true run.parallel=fsdp training.dtype=bfloat16
"""

import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root instead of this folder: each module has one name

from pipelines.config import FLAGS, compose
from pipelines.corpus.storage import Storage
from pipelines.job import exit_code
from pipelines.preferences.dataset import FOLDER
from pipelines.training.aligner import run_training
from pipelines.training.aligner_settings import TrainAlignerConfig


def main(argv: list[str]) -> int:
    """Run the job. Returns its exit code, see `exit_code`."""
    return exit_code(lambda: train_aligner(argv))


def train_aligner(argv: list[str]) -> int:
    """A dataset of trajectories -> steps, evaluations and checkpoints -> a model's folder."""
    config, flags = compose(
        TrainAlignerConfig,
        argv,
        prog="python pipelines/train_aligner.py",
        description="Train a DiffPO aligner on the published trajectories of a preference dataset.",
        groups=("reward", "site"),
        flags=FLAGS | {"--limit N": "train on at most N more trajectories, rounded up to whole steps; then stop"},
    )
    site = config.site
    dataset = Storage(config.input.path, site.storage_options, site.storage_retry_s, partitions=FOLDER)
    output = Storage(config.output.root, site.storage_options, site.storage_retry_s)
    return run_training(config, argv, dataset, output, flags)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` and schedulers end a job like Ctrl-C
    sys.exit(main(sys.argv[1:]))
