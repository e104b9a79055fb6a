"""What the job prints besides its progress: the dry run's plan and the summary."""

from collections import Counter
from typing import Any

from pipelines.corpus.plan import Plan
from pipelines.corpus.publish import Published
from pipelines.corpus.state import manifests
from pipelines.corpus.storage import Storage
from pipelines.preferences import checks
from pipelines.preferences.build import output_columns
from pipelines.preferences.filters import benchmarks_of
from pipelines.preferences.settings import BuildPreferencesConfig
from pipelines.report import say

WAYS_OUT = {
    "no_candidate": "they have no answers",
    "failed": "their answers or aligned texts failed; `responses` and `aligned` of the corpus tell why",
    "other_kind": "build.candidates takes none of what they have",
    "other_policy": "build.models and build.exclude_models leave none of their policies",
    "unfinished": "their answers were cut at max_tokens; build.require_finish=[] takes them all the same",
    "empty": "their answers are empty",
    "not_scored": "their texts have no such reward; the card of the corpus tells why, score_corpus.py scores them anew",
    "duplicate_prompt": "they are in another partition already; prompts.dedup=none takes them all the same",
    "contaminated": "they share text with the files of prompts.decontaminate",
    "one_candidate": "there is nothing to compare; align with more candidates or policies, or without build.candidates",
    "aligned_lost": "the response has the higher reward; build.prefer=best_worst takes the better text, of both kinds",
    "tie": "their texts have equal rewards; take another reward, or several by build.reward_weights",
    "same_text": "the aligned text is the response; build.prefer=best_worst compares candidates with each other",
    "small_margin": "lower build.min_margin",
    "length_ratio": "raise build.max_length_ratio",
    "no_step": "one answer begins with all of the other",
}
"""What to do about each cause for which prompts are dropped."""


def print_dry_run(config: BuildPreferencesConfig, plan: Plan) -> None:
    """What a run would do."""
    print(f"parts: {plan.num_shards} published, {plan.num_finished} of them done")
    print(f"to build: {plan.num_rows} prompts in {plan.num_units} units; {plan.num_done_rows} done in the other parts")
    print(f"columns: {', '.join(output_columns(config, plan.kept_types))}")
    print_benchmarks(config)


def print_benchmarks(config: BuildPreferencesConfig) -> None:
    """How much prompts are compared with, where they are compared with benchmarks."""
    found = benchmarks_of(config.prompts, config.site.storage_options)
    if found:
        print(f"benchmarks: {found.num_texts} texts in {len(config.prompts.decontaminate)} files")


def print_summary(output: Storage, published: Published, *, jsonl: bool) -> None:
    """Counts in, dropped by reason, rows out and checked facts of what is new, and where the dataset is; which
    partitions were published without the JSON lines that are asked for now."""
    if published.withheld:
        say(f"error: {published.withheld}")
        return
    found = manifests(output)
    without = [f"run={each['number']:06d}" for each in found if len(each["jsonl"]) < len(each["preferences"])]
    if jsonl and without:
        say(
            f"output.jsonl=true is for new partitions, and {', '.join(without)} has no JSON lines: to have them, take "
            f"another output.root"
        )
    partitions = "1 partition" if len(found) == 1 else f"{len(found)} partitions"
    where = f"{output.url}/{output.partitions} ({sum(each['num_made'] for each in found)} rows in {partitions})"
    new = [manifest for manifest in found if manifest["number"] in published.partitions]
    if not new:
        print(f"nothing new: {where}")
        return
    for manifest in new:
        print(
            f"published: run={manifest['number']:06d}: {manifest['num_rows']} prompts in = {manifest['num_ok']} used + "
            f"{manifest['num_quarantined']} dropped{_listed(manifest['causes'])}; {manifest['num_made']} rows out"
            f"{_listed(manifest['made'])}"
        )
        print(f"candidates: {manifest['num_candidates']} usable{_listed(manifest['unused'], 'not usable: ')}")
    for line in facts(checks.report(checks.summed(manifest["checks"] for manifest in new))):
        print(line)
    print(f"dataset: {where}")
    if not any(manifest["num_made"] for manifest in new):
        causes = sum((Counter(manifest["causes"]) for manifest in new), Counter[str]())
        ((cause, count),) = causes.most_common(1)
        print(f"no rows came out: {count} of {causes.total()} prompts were dropped as {cause}: {WAYS_OUT[cause]}")


def _listed(counts: dict[str, int], before: str = "") -> str:
    told = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return f" ({before}{told})" if told else ""


def facts(told: dict[str, Any]) -> list[str]:
    lines = []
    means = {name: told.get(f"mean_chosen_minus_rejected_{name}") for name in checks.COUNTED_IN}
    longer = [f"{mean:+.1f} {name}" for name, mean in means.items() if mean is not None]
    if longer:
        mean = " (where texts are stored, ".join(longer) + ")" * (len(longer) - 1)
        lines.append(
            f"length: chosen is {mean} longer on average, longer in {told['share_chosen_longer']:.1%} of pairs"
        )
    slopes = [name for name in checks.COUNTED_IN if f"reward_slope_by_{name}" in told]
    advice = "build.length_slope takes it out" if len(slopes) == 1 else "no one build.length_slope is right for both"
    for name in slopes:
        lines.append(
            f"length: correlation of {name} with the reward {told[f'correlation_of_reward_with_{name}']:+.3f}, slope "
            f"{told[f'reward_slope_by_{name}']:.4g} per {name[:-1]} ({advice})"
        )
    if "reward_before" in told:
        low, high = told["reward_gain_95"]
        lines.append(
            f"reward: {told['reward_before']:.4g} before -> {told['reward_after']:.4g} after aligning, "
            f"{told['reward_gain']:+.4g} (95%: {low:+.4g} to {high:+.4g}); the aligned answer lost "
            f"{told['share_aligned_lost']:.1%} of comparisons and tied {told['share_aligned_tied']:.1%}"
        )
    return lines
