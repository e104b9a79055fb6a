"""Build a preference dataset: stream a published corpus, rank each prompt's candidates, and publish what trainers read.

    python pipelines/build_preferences.py input.path=CORPUS output.root=DATASET build=pairs build.reward=NAME export=trl

The same command resumes after a crash, and builds only from new partitions when it is run again, every night. Without a
reward (no build.reward) what was aligned is preferred to its response. On a cluster:

    ray job submit --working-dir . -- python pipelines/build_preferences.py key=value ...
"""

import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root instead of this folder: each module has one name

from pipelines.config import compose
from pipelines.corpus.storage import Storage
from pipelines.job import exit_code, run_job
from pipelines.preferences.dataset import FOLDER
from pipelines.preferences.fingerprint import pin_encoder
from pipelines.preferences.job import PreferencesJob
from pipelines.preferences.settings import BuildPreferencesConfig
from pipelines.preferences.source import PublishedCorpus


def main(argv: list[str]) -> int:
    """Run the job. Returns its exit code, see `exit_code`."""
    return exit_code(lambda: build_preferences(argv))


def build_preferences(argv: list[str]) -> int:
    """A published corpus -> ranked candidates -> what the strategy makes of them -> a published dataset."""
    config, flags = compose(
        BuildPreferencesConfig,
        argv,
        prog="python pipelines/build_preferences.py",
        description="Build a preference dataset from the published partitions of a corpus.",
        groups=("build", "site"),
    )
    site = config.site
    source = PublishedCorpus(config.input.path, site.storage_options, site.storage_retry_s)
    output = Storage(config.output.root, site.storage_options, site.storage_retry_s, partitions=FOLDER)
    kept = source.kept_columns(config.input.keep_columns)
    config = replace(config, input=replace(config.input, keep_columns=kept))
    return run_job(PreferencesJob(pin_encoder(config), source, output), flags)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` and schedulers end a job like Ctrl-C
    sys.exit(main(sys.argv[1:]))
