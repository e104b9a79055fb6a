"""Align a corpus: stream Parquet prompt shards through a policy pool and an aligner pool, score both texts if
asked to, and publish what comes out.

    python pipelines/align_corpus.py policy=smollm2 aligner=rewrite_smollm2 input.path=PROMPTS output.root=CORPUS

The same command resumes after a crash, and aligns only what is new when it is run again, every night. On a cluster:

    ray job submit --working-dir . -- python pipelines/align_corpus.py key=value ...
"""

import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root instead of this folder: each module has one name

from pipelines.config import compose
from pipelines.corpus.shards import Input
from pipelines.corpus.storage import Storage
from pipelines.corpus_job import CorpusJob
from pipelines.job import exit_code, run_job
from pipelines.settings import AlignCorpusConfig, pin_models


def main(argv: list[str]) -> int:
    """Run the job. Returns its exit code, see `exit_code`."""
    return exit_code(lambda: align_corpus(argv))


def align_corpus(argv: list[str]) -> int:
    """Prompts -> answers -> aligned answers -> rewards, where there are any -> a published corpus."""
    config, flags = compose(
        AlignCorpusConfig,
        argv,
        prog="python pipelines/align_corpus.py",
        description="Answer prompts with a policy model, align the answers, and publish both as a corpus.",
        groups=("policy", "aligner", "reward", "site"),
    )
    source = Input(config.input.path, config.site.storage_options, config.site.storage_retry_s)
    output = Storage(config.output.root, config.site.storage_options, config.site.storage_retry_s)
    return run_job(CorpusJob(pin_models(config), source, output), flags)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` and schedulers end a job like Ctrl-C
    sys.exit(main(sys.argv[1:]))
