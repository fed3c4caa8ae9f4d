"""Which requests are let in: a model that is served, a prompt that fits. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from dynctl.errors import ContextTooLong, ModelNotFound, RequestError
from dynctl.frontend.body import Body, excerpt
from dynctl.protocol.instances import Instance, ModelCard


class Models:
    """The names that are served, and what the workers say of the model. One base model a deployment."""

    def __init__(self, card: ModelCard) -> None:
        self.card = card
        self.adapters: frozenset[str] = frozenset(card.adapters)
        self.max_model_len = card.max_model_len

    def members_changed(self, instances: Iterable[Instance]) -> None:
        """Take over what the workers there are now report: the shortest context, all adapters."""
        cards = [instance.model for instance in instances if instance.model is not None]
        lengths = [card.max_model_len for card in cards if card.max_model_len > 0]
        self.max_model_len = min(lengths, default=self.card.max_model_len)
        self.adapters = frozenset(self.card.adapters).union(*(card.adapters for card in cards))

    def names(self) -> list[str]:
        """Every name a request may carry, the base model first."""
        return [self.card.name, *sorted(self.adapters - {self.card.name})]

    def adapter(self, name: str) -> str:
        """The LoRA adapter that `name` means, "" for the base model. Raises ModelNotFound."""
        if name == self.card.name:
            return ""
        if name in self.adapters:
            return name
        raise ModelNotFound(
            f"The model `{excerpt(name)}` does not exist",
            where="model",
            hint=f"served here: {', '.join(self.names())}",
        )


def asked_tokens(body: Body) -> int | None:
    """The most tokens the client wants; None when it does not say. Raises RequestError for a wrong type."""
    asked: int | None = None
    for name in ("max_completion_tokens", "max_tokens"):
        limit = body.get(name, int)
        if limit is not None and limit < 0:
            raise RequestError(f"`{name}` must not be negative", where=name)
        asked = limit if asked is None else asked
    return asked


def check_context(prompt_tokens: int, asked: int | None, max_model_len: int, field: str = "messages") -> None:
    """Raises ContextTooLong unless prompt and answer fit. 0 tokens or 0 length = not known: let through.

    `field` is where the prompt came in: `messages` or `prompt`.
    """
    if not prompt_tokens or not max_model_len:
        return
    if prompt_tokens + (1 if asked is None else asked) <= max_model_len:
        return
    told = f"This model's maximum context length is {max_model_len} tokens. However, "
    if asked is None or prompt_tokens >= max_model_len:
        told += f"your {field} resulted in {prompt_tokens} tokens. Please reduce the length of the {field}."
    else:
        told += (
            f"you requested {prompt_tokens + asked} tokens ({prompt_tokens} in the {field}, {asked} in the "
            f"completion). Please reduce the length of the {field} or completion."
        )
    raise ContextTooLong(told, where=field)
