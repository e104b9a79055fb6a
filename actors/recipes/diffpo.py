"""Input of DiffPO aligners: nothing but the chat. The answer is no part of it, it is where the decoder begins."""

from actors.engines.base import Messages


def diffpo(messages: Messages) -> Messages:
    """The chat that a DiffPO aligner's own template is applied to, up to where its answer begins.

    As in the authors' inference script (Chen et al., arXiv 2503.04240): no instruction to edit, and the policy's answer
    follows as the aligner's own, token by token, as the guess y(0) that is then denoised (`Request.draft`). Earlier
    turns of the assistant are context, as the prompt has them. An engine that knows no drafts (`openai`) answers the
    chat greedily, which is what every draft comes to where `max_iterations` is null and nothing is reserved.
    """
    return messages
