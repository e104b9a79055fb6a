"""What each recipe hands to its aligner, to the letter, and which templates are refused before a run starts."""

from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from actors.contract import ConfigError, RowError
from actors.engines.base import Messages
from actors.recipes import RECIPE_VERSIONS, RecipeConfig, aligner_input, recipe_version

ONE: Messages = (("user", "What is 2 + 2?"),)
MANY: Messages = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "What is 2 + 2?"))


def test_aligner_reads_the_published_text() -> None:
    assert aligner_input(RecipeConfig(recipe="aligner"), ONE, "5") == (
        "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more helpful and "
        "harmless: What is 2 + 2? | 5 ASSISTANT:"
    )


def test_metaaligner_reads_the_published_text_with_its_last_space() -> None:
    config = RecipeConfig(recipe="metaaligner", aspects=["Honesty: no lies", "Brevity: few words"])
    assert aligner_input(config, ONE, "5") == (
        "You are an assistant to human. You will be provided with a query and an answer. Consider the query, then edit "
        "the answer to improve it considering these aspects: Honesty: no lies; Brevity: few words | "
        "Query: What is 2 + 2? | Answer: 5 | Edit: "
    )


@pytest.mark.parametrize("recipe", ["aligner", "metaaligner"])
def test_several_messages_are_flattened_in_order(recipe: str) -> None:
    text = aligner_input(RecipeConfig(recipe=recipe), MANY, "5")  # type: ignore[arg-type]
    assert " System: Be brief. Human: Hi Assistant: Hello. Human: What is 2 + 2? | " in text


def test_default_rewrite_of_one_message() -> None:
    content = (
        "Improve a draft answer: make it more helpful, more correct and harmless.\n\n"
        "Question:\nWhat is 2 + 2?\n\n"
        "Draft answer:\n5\n\n"
        "Write the improved answer to the question, in the language of the question. Keep what is already good. "
        "Write only the answer itself: no introduction, no comment on the draft or on what was changed."
    )
    assert aligner_input(RecipeConfig(), ONE, "5") == (("user", content),)


def test_default_rewrite_shows_the_system_message_as_history_not_as_its_own() -> None:
    ((role, content),) = aligner_input(RecipeConfig(), MANY, "5")
    assert role == "user"
    assert "\n\nConversation so far:\nsystem: Be brief.\nuser: Hi\nassistant: Hello.\n\nQuestion:\nWhat is" in content


def test_template_variables_and_trailing_newline() -> None:
    config = RecipeConfig(template="{{ question }}|{{ history | length }}|{{ messages[-1].role }}|{{ answer }}\n")
    assert aligner_input(config, MANY, "a & <b>") == (("user", "What is 2 + 2?|3|user|a & <b>\n"),)


@pytest.mark.parametrize("messages", [ONE, MANY])
def test_diffpo_reads_the_chat_and_not_the_answer(messages: Messages) -> None:
    assert aligner_input(RecipeConfig(recipe="diffpo"), messages, "5") == messages


@pytest.mark.parametrize("recipe", ["rewrite", "aligner", "metaaligner"])
def test_prompts_and_answers_are_never_evaluated(recipe: str) -> None:
    config = RecipeConfig(recipe=recipe)  # type: ignore[arg-type]
    attack = "{{ 7 * 7 }}{% raw %}{answer}{0}%s{{ answer.__class__ }}"
    made = str(aligner_input(config, (("system", attack), ("user", attack)), attack))
    assert made.count(attack) == 3
    assert "49" not in made


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ answer }}\n{{ question", "line 2"),
        ("{{ answr }}", "unknown answr"),
        ("{{ question }}", "must read {{ answer }}"),
        ("{{ answer }}{{ history[0].content }}", "cannot be rendered"),  # a prompt may be one message
        ("{{ answer }}{% for m in history %}{{ m.text }}{% endfor %}", "no attribute 'text'"),
        ("{{ answer.__class__.__mro__ }}", "unsafe"),
        ("{{ answer }}{{ messages.append(1) }}", "unsafe"),
        ("{{ answer }}{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ answer }}{{ [1, 2] | random }}", "random"),
        ("{{ answer }}{{ lipsum() }}", "unknown lipsum"),
        ("missing.jinja", "cannot be read: No such file or directory"),
    ],
)
def test_a_bad_template_is_refused_in_one_line(template: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        RecipeConfig(template=template)
    assert str(error.value).startswith("template ")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_that_the_template_cannot_take_fails_alone() -> None:
    config = RecipeConfig(template="{{ answer }}{{ 1 / (question | length - 14) }}")
    with pytest.raises(RowError) as error:
        aligner_input(config, ONE, "5")
    assert error.value.cause == "recipe_failed"


def test_a_template_file_becomes_its_text(tmp_path: Path) -> None:
    path = tmp_path / "edit.jinja"
    path.write_text("Better: {{ answer }}\n", encoding="utf-8")
    config = RecipeConfig(template=str(path))
    assert config.template == "Better: {{ answer }}\n"
    path.unlink()
    assert replace(config) == config  # the text is not taken for a path again


@pytest.mark.parametrize("recipe", ["aligner", "metaaligner", "diffpo"])
def test_a_template_that_no_recipe_would_read_is_refused(recipe: str) -> None:
    with pytest.raises(ConfigError, match="template is read by recipe=rewrite only"):
        RecipeConfig(recipe=recipe, template="{{ answer }}")  # type: ignore[arg-type]


@pytest.mark.parametrize("aspects", [[], ["Honesty", " "]])
def test_empty_aspects_are_refused(aspects: list[str]) -> None:
    with pytest.raises(ConfigError, match="aspects"):
        RecipeConfig(aspects=aspects)


def test_every_recipe_has_a_version_and_every_field_changes_rows() -> None:
    assert set(RECIPE_VERSIONS) == set(get_args(get_type_hints(RecipeConfig)["recipe"]))
    assert recipe_version(RecipeConfig(recipe="aligner")) == RECIPE_VERSIONS["aligner"]
    assert all(field.metadata["doc"].changes_rows for field in fields(RecipeConfig))
