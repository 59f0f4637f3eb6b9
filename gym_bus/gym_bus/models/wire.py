"""What is read of the OpenAI wire formats: only the fields that gym_bus needs, everything else is passed over."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gym_bus.messages import Usage
from gym_bus.models.api import IncompleteDetails

Count = Annotated[int, Meta(ge=0, le=2**48)]
"""Tokens. Larger ones are nonsense, and their sum would not travel."""


class TokenDetails(msgspec.Struct, frozen=True):
    """Details of a token count; None where the endpoint does not say."""

    cached_tokens: Count | None = None
    reasoning_tokens: Count | None = None


class ResponsesUsage(msgspec.Struct, frozen=True):
    """`usage` of a Responses object."""

    input_tokens: Count = 0
    output_tokens: Count = 0
    total_tokens: Count = 0
    input_tokens_details: TokenDetails | None = None
    output_tokens_details: TokenDetails | None = None

    def plain(self) -> Usage:
        """As it travels on the bus."""
        return Usage(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            total_tokens=self.total_tokens or self.input_tokens + self.output_tokens,
            cached_tokens=self.input_tokens_details.cached_tokens if self.input_tokens_details else None,
            reasoning_tokens=self.output_tokens_details.reasoning_tokens if self.output_tokens_details else None,
        )


_NO_USAGE = msgspec.Raw(b"null")


class WireResponse(msgspec.Struct, frozen=True):
    """A Responses object, or what came in its place."""

    output: list[msgspec.Raw] | None = None
    usage: msgspec.Raw = _NO_USAGE
    incomplete_details: IncompleteDetails | None = None
    error: Any = None
    status: str | None = None
    model: str | None = None

    def plain_usage(self) -> Usage | None:
        """None where there is none, or none that can be read."""
        return _plain(self.usage, responses_usage_decoder)


class ChatUsage(msgspec.Struct, frozen=True):
    """`usage` of a Chat Completions object."""

    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    total_tokens: Count = 0
    prompt_tokens_details: TokenDetails | None = None
    completion_tokens_details: TokenDetails | None = None

    def plain(self) -> Usage:
        """As it travels on the bus."""
        details, made = self.prompt_tokens_details, self.completion_tokens_details
        return Usage(
            input_tokens=self.prompt_tokens,
            output_tokens=self.completion_tokens,
            total_tokens=self.total_tokens or self.prompt_tokens + self.completion_tokens,
            cached_tokens=details.cached_tokens if details else None,
            reasoning_tokens=made.reasoning_tokens if made else None,
        )


class ChatFunction(msgspec.Struct, frozen=True):
    """The function of a tool call."""

    name: str | None = ""
    arguments: str | dict[str, Any] | None = ""
    """JSON text, as the model wrote it, or the object that it says."""


class ChatToolCall(msgspec.Struct, frozen=True):
    """One tool call of a message."""

    function: ChatFunction = ChatFunction()
    id: str | int | float | None = ""


class ChatMessage(msgspec.Struct, frozen=True):
    """The assistant's message."""

    content: str | list[str | dict[str, Any]] | None = None
    """Text, or parts, some of which may be reasoning, as Mistral's."""
    reasoning_content: str | None = None
    """DeepSeek's and vLLM's name."""
    reasoning: str | None = None
    """OpenRouter's name, and vLLM's newer one."""
    refusal: str | None = None
    tool_calls: list[ChatToolCall] | None = None


class TokenLogprob(msgspec.Struct, frozen=True):
    """One sampled token; vLLM writes `token_id:<int>` when asked to."""

    token: str = ""
    logprob: float = 0.0


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of the sampled tokens, natural logarithm."""

    content: list[TokenLogprob] | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One choice."""

    message: ChatMessage | None = None
    error: Any = None
    """OpenRouter's: the provider behind it gave up."""
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | None = None


class WireChat(msgspec.Struct, frozen=True):
    """A Chat Completions object, or what came in its place."""

    choices: list[ChatChoice] | None = None
    usage: msgspec.Raw = _NO_USAGE
    error: Any = None
    id: str | int | float | None = ""
    created: Any = None
    model: str | None = ""
    prompt_token_ids: list[int] | None = None

    def plain_usage(self) -> Usage | None:
        """None where there is none, or none that can be read."""
        return _plain(self.usage, chat_usage_decoder)


class PassingReply(msgspec.Struct, frozen=True):
    """A reply to somebody else, or an event of a streamed one, of which only the usage matters."""

    usage: msgspec.Raw = _NO_USAGE
    response: PassingReply | None = None
    """In events of the Responses API: the object as it is so far."""

    def plain_usage(self, *, chat: bool) -> Usage | None:
        """None where there is none, or none that can be read."""
        usage = self.response.usage if self.response else self.usage
        return _plain(usage, chat_usage_decoder if chat else responses_usage_decoder)


class TokenItem(msgspec.Struct, frozen=True):
    """The token arrays that NeMo Gym's model servers put on the last output item of a call."""

    prompt_token_ids: list[int] | None = None
    generation_token_ids: list[int] | None = None
    generation_log_probs: list[float] | None = None


def _plain(
    raw: msgspec.Raw, decoder: msgspec.json.Decoder[ResponsesUsage | None] | msgspec.json.Decoder[ChatUsage | None]
) -> Usage | None:
    try:
        found = decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError):  # it is an account: the answer beside it is still an answer
        return None
    return found.plain() if found else None


responses_usage_decoder = msgspec.json.Decoder(ResponsesUsage | None)
chat_usage_decoder = msgspec.json.Decoder(ChatUsage | None)
response_decoder = msgspec.json.Decoder(WireResponse)
chat_decoder = msgspec.json.Decoder(WireChat)
passing_decoder = msgspec.json.Decoder(PassingReply)
token_item_decoder = msgspec.json.Decoder(TokenItem)
