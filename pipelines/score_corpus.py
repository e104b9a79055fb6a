"""Score a corpus that is there: stream its published partitions through reward pools into a corpus that has rewards.

    python pipelines/score_corpus.py reward=rules input.path=CORPUS output.root=SCORED

CORPUS is the output root of align_corpus.py; SCORED is another, with the same rows and columns and their `rewards`. The
same command resumes after a crash, and scores only the partitions that are new when it is run again, every night.
"""

import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root instead of this folder: each module has one name

from pipelines.config import compose
from pipelines.corpus.published import CorpusInput
from pipelines.corpus.storage import Storage
from pipelines.corpus_job import CorpusJob
from pipelines.job import exit_code, run_job
from pipelines.settings import ScoreCorpusConfig, pin_models


def main(argv: list[str]) -> int:
    """Run the job. Returns its exit code, see `exit_code`."""
    return exit_code(lambda: score_corpus(argv))


def score_corpus(argv: list[str]) -> int:
    """A published corpus -> rewards of its responses and aligned texts -> a published corpus that has them."""
    config, flags = compose(
        ScoreCorpusConfig,
        argv,
        prog="python pipelines/score_corpus.py",
        description="Score the responses and aligned texts of a published corpus, and publish it with the rewards.",
        groups=("reward", "site"),
    )
    source = CorpusInput(config.input.path, config.site.storage_options, config.site.storage_retry_s)
    output = Storage(config.output.root, config.site.storage_options, config.site.storage_retry_s)
    kept = source.kept_columns(config.input.keep_columns)
    config = replace(config, input=replace(config.input, keep_columns=kept))
    return run_job(CorpusJob(pin_models(config), source, output), flags)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` and schedulers end a job like Ctrl-C
    sys.exit(main(sys.argv[1:]))
