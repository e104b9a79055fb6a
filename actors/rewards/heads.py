"""What every engine of sequence classification models asks of a model, and what it has the model read."""

from transformers import AutoConfig, PreTrainedTokenizerBase

from actors.contract import ConfigError
from actors.engines.base import Request, ScoringConfig
from actors.engines.footprint import tensor_names
from actors.engines.prompts import encode_prompt, load_failure

AUTO = "AutoModelForSequenceClassification"


def scored_ids(tokenizer: PreTrainedTokenizerBase, request: Request, pad: int | None) -> list[int]:
    """Token ids of a chat with its answer, less the padding tokens that its template may put at the end.

    There are models whose padding is their end of turn, and Hugging Face takes their score from the token before.
    """
    ids = encode_prompt(tokenizer, request.prompt, to_answer=False)
    while ids and ids[-1] == pad:
        ids.pop()
    return ids


def check_head(config: ScoringConfig) -> None:
    """Raises ConfigError in one line for a model whose head is its own code, or gives anything but one number."""
    try:
        found = AutoConfig.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(load_failure("model config", config.model, error)) from error
    own = (getattr(found, "auto_map", None) or {}).get(AUTO)
    if own:
        raise ConfigError(f"{config.model!r} is scored by code of its own ({own}), and no model's code is run here")
    if found.num_labels != 1:
        raise ConfigError(f"{config.model!r} has {found.num_labels} labels: a reward model has one")


def check_weights(config: ScoringConfig) -> None:
    """Raises ConfigError in one line where the files hold no head: vLLM would leave it as memory happens to be."""
    names = tensor_names(config)
    if names is not None and not any(name.split(".")[0] in ("score", "classifier") for name in names):
        raise ConfigError(f"{config.model!r} is no reward model: its files hold no score.weight")
