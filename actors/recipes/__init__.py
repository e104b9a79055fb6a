"""How a prompt and its answer become an aligner's input: pure functions, one module per kind of recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actors.contract import ConfigError, option
from actors.engines.base import Messages
from actors.recipes import correction
from actors.recipes.diffpo import diffpo

RECIPE_VERSIONS = {"rewrite": 1, "aligner": 1, "metaaligner": 1, "diffpo": 1}
"""Counted up when a recipe makes another input of the same config, so that its runs do not mix with older ones."""


@dataclass(frozen=True)
class RecipeConfig:
    """Which input the aligner was made for. A class that inherits this must call `RecipeConfig.__post_init__`."""

    recipe: Literal["rewrite", "aligner", "metaaligner", "diffpo"] = option(
        "rewrite",
        "rewrite: any instruct model; aligner: PKU Aligner; metaaligner: MetaAligner; diffpo: DiffPO, for which the "
        "response is not a prompt but a draft",
        changes_rows=True,
    )
    template: str | None = option(
        None,
        "Jinja text for `rewrite` (question, history, messages, answer) or a file ending in .jinja; null: built in",
        changes_rows=True,
    )
    aspects: list[str] = option(
        correction.DEFAULT_ASPECTS, "what `metaaligner` is asked to improve, in this order", changes_rows=True
    )

    def __post_init__(self) -> None:
        """Put a template file's text in place of its path: the text, not the path, is what changes rows."""
        template = self.template
        if template is not None and self.recipe != "rewrite":
            raise ConfigError(f"template is read by recipe=rewrite only; with recipe={self.recipe} it must be null")
        if template is not None and template.endswith(".jinja") and "\n" not in template:
            try:
                template = Path(template).read_text("utf-8")
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or error
                raise ConfigError(f"template {template!r} cannot be read: {why}") from None
            object.__setattr__(self, "template", template)
        if template is not None:
            correction.check_template(template)
        if not self.aspects or not all(aspect.strip() for aspect in self.aspects):
            raise ConfigError("aspects must hold at least one aspect and no empty one")


def recipe_version(config: RecipeConfig) -> int:
    """Version of the config's recipe, part of a run's fingerprint."""
    return RECIPE_VERSIONS[config.recipe]


def aligner_input(config: RecipeConfig, messages: Messages, answer: str) -> Messages | str:
    """Make what the aligner reads for one answer: a chat, or raw text for models without a chat template.

    Args:
        messages: the prompt, its last message the user's.
        answer: the policy's answer to it.

    Raises:
        RowError: `recipe_failed`, the template cannot be rendered for this row.
    """
    if config.recipe == "diffpo":
        return diffpo(messages)
    if config.recipe == "aligner":
        return correction.aligner(messages, answer)
    if config.recipe == "metaaligner":
        return correction.metaaligner(config.aspects, messages, answer)
    return correction.rewrite(config.template, messages, answer)
