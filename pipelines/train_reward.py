"""Train a reward model: preference pairs become a sequence classification model that the reward pools load as it is.

    python pipelines/train_reward.py input.path=DATASET training.model=MODEL output.root=REWARD

DATASET is the output root of build_preferences.py, or Parquet files with columns prompt, chosen and rejected. REWARD is
a Hugging Face folder, for `reward.engine=torch reward.model=REWARD`. A small one, on a laptop's CPU:

    python pipelines/train_reward.py input.path=DATASET training.model=~/.cache/burnish/SmolLM2-135M-Instruct \\
        output.root=REWARD training.num_layers=4 training.max_tokens=512

The same command resumes after a crash, with the losses that it would have had. On a cluster, a GPU for each worker:

    ray job submit --working-dir . -- python pipelines/train_reward.py run.num_workers=8 run.use_gpu=true key=value ...
"""

import shlex
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root instead of this folder: each module has one name

from pipelines.config import FLAGS, compose
from pipelines.job import exit_code
from pipelines.training.reward import run
from pipelines.training.reward_settings import TrainRewardConfig

PROG = "python pipelines/train_reward.py"


def main(argv: list[str]) -> int:
    """Run the job. Returns its exit code, see `exit_code`."""
    return exit_code(lambda: train_reward(argv))


def train_reward(argv: list[str]) -> int:
    """Preference pairs -> a model that scores answers -> how often it is right on pairs that it has not seen."""
    config, flags = compose(
        TrainRewardConfig,
        argv,
        prog=PROG,
        description="Train a reward model from preference pairs, and tell how often it is right on held-out ones.",
        groups=("site",),
        flags={**FLAGS, "--limit N": "train on at most N pairs, drawn by the seed; held-out ones are not limited"},
    )
    return run(config, flags, command=shlex.join([*PROG.split(), *argv]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` and schedulers end a job like Ctrl-C
    sys.exit(main(sys.argv[1:]))
