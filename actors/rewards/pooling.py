"""Sequence classification models as rewards through vLLM, whose pooling runner gives the same logits."""

import itertools

from transformers import AutoConfig
from vllm import PoolingParams
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input

from actors.contract import RowError
from actors.engines.base import Completion, EngineStats, Request, ScoringConfig
from actors.engines.process import end_group_with_this_process
from actors.engines.prompts import check_room, load_tokenizer
from actors.engines.vllm_engine import first_reason, make_vllm_config, set_environment, start_core
from actors.rewards.heads import check_head, check_weights, scored_ids


class PoolingEngine:
    """Holds an AsyncLLM. For the main thread of a process of its own, which becomes the head of a process group.

    `generate` is for one event loop. When it raises anything but RowError, the engine is closed and this process is to
    end.

    Args:
        num_threads: CPU threads, of all tensor parallel shards together.

    Raises ConfigError for what is wrong with the model or `engine_kwargs`; RuntimeError when the core does not start.
    """

    def __init__(self, config: ScoringConfig, num_threads: int) -> None:
        set_environment(config, num_threads)
        end_group_with_this_process()
        self._tokenizer = load_tokenizer(config.model, config.revision)
        check_head(config)
        check_weights(config)
        text = AutoConfig.from_pretrained(config.model, revision=config.revision).get_text_config()
        self._pad: int | None = text.pad_token_id
        # vLLM 0.32 takes a pooled answer for text where the interval is another.
        vllm_config = make_vllm_config(config, runner="pooling", convert="classify", stream_interval=1)
        self._limit: int = vllm_config.model_config.max_model_len
        self._num_words: int = vllm_config.model_config.get_vocab_size()
        self._llm = start_core(vllm_config)
        self._names = itertools.count()
        self._num_tokens = self._num_running = 0

    async def generate(self, request: Request) -> Completion:
        """Score a chat by its last message.

        Raises:
            RowError: `prompt_too_long`, `empty_prompt`, `rejected_by_engine`, or the causes of `encode_prompt`.
            ConfigError: a chat for a model without a chat template.
            EngineDeadError: the engine core is gone; any other error is vLLM's own.
        """
        ids = scored_ids(self._tokenizer, request, self._pad)
        check_room(ids, 0, self._limit)
        if max(ids) >= self._num_words:  # vLLM would let it through where the tokenizer knows it, and die of it
            raise RowError("rejected_by_engine", f"token {max(ids)} is not one of the model's {self._num_words}")
        self._num_running += 1
        try:
            # The activation would press the logit into 0 to 1.
            asked = self._llm.encode(
                tokens_input(ids), PoolingParams(task="classify", use_activation=False), str(next(self._names))
            )
            async for output in asked:
                (score,) = output.outputs.data.float().flatten().tolist()
        except VLLMClientError as error:
            raise RowError("rejected_by_engine", first_reason(error)) from error
        except Exception:
            self.close(timeout=0)  # or else this process would wait for the core at its end
            raise
        finally:
            self._num_running -= 1
        self._num_tokens += len(ids)
        return Completion("", None, len(ids), 0, score=score)

    def stats(self) -> EngineStats:
        """Tokens are those that were read; which of the running requests wait is vLLM's to know."""
        return EngineStats(self._num_tokens, self._num_running, 0)

    def close(self, timeout: float = 1) -> None:
        """End the engine core and its workers, by force after `timeout` seconds."""
        self._llm.shutdown(timeout=timeout)
