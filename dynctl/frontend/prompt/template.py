"""Chat messages to prompt text, as engines do it with Hugging Face chat templates.

Only this module imports jinja2; it is itself imported when a template is first needed. The environment is
what templates are written against: sandboxed, trimmed blocks, loop controls, `tojson` without HTML escapes,
`raise_exception`, `strftime_now`, and the `generation` block, which renders as its content.
Content parts are joined or wrapped as vLLM does (`--chat-template-content-format auto`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from dynctl.frontend.body import Body, Message, field_value

_TEXT_PARTS = {"text", "input_text", "output_text"}
_IMAGE = {"type": "image"}
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
)


class Unrenderable(Exception):
    """This request cannot be rendered here; `reason` is the stable word for the metric."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's part for training; here it is plain."""

    tags = {"generation"}  # noqa: RUF012 - the name and type jinja2 reads

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The content alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template. Raises Unrenderable when `source` is not a template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.wraps_parts = _loops_over_content(environment.parse(source))
        except jinja2.TemplateError as error:
            raise Unrenderable("template_broken", str(error)) from error
        self._always = {**self._template.globals, **special_tokens}

    def render(self, body: Body, messages: Sequence[Message], *, images: bool = False) -> str:
        """The prompt text. Raises Unrenderable; RequestError for fields of a wrong type.

        `images`: they are left to the template, where it goes through contents part by part.
        """
        try:
            return self._render(body, messages, images and self.wraps_parts)
        except RecursionError as error:
            # Nested as deeply as a body may just be, or JSON in a string that is nested deeper.
            raise Unrenderable("nested_too_deeply") from error

    def _render(self, body: Body, messages: Sequence[Message], images: bool) -> str:
        conversation = [_message(message, self.wraps_parts, images) for message in messages]
        variables: dict[str, Any] = {
            **self._always,
            "messages": conversation,
            "tools": _tools(body),
            "documents": body.get("documents", list),
            "add_generation_prompt": body.get("add_generation_prompt", bool) is not False,
            **(body.get("chat_template_kwargs", dict) or {}),
        }
        effort = body.get("reasoning_effort", str)
        if effort is not None:
            variables.setdefault("reasoning_effort", effort)
        try:
            context = self._template.new_context(variables, shared=True)
            text = "".join(self._template.root_render_func(context))
        except _TEMPLATE_ERRORS as error:
            # A template is the model owner's program: what it raises on odd messages is its word.
            raise Unrenderable("template_error", str(error)) from error
        return _continued(text, conversation) if body.get("continue_final_message", bool) else text


def _loops_over_content(tree: jinja2.nodes.Template) -> bool:
    """Whether the template goes through a message's content part by part."""
    holders = {
        node.target.name
        for node in tree.find_all(jinja2.nodes.Assign)
        if isinstance(node.target, jinja2.nodes.Name) and _is_content(node.node, frozenset())
    }
    return any(_is_content(loop.iter, frozenset(holders)) for loop in tree.find_all(jinja2.nodes.For))


def _is_content(node: jinja2.nodes.Node | None, holders: frozenset[str]) -> bool:
    while isinstance(node, jinja2.nodes.Filter):
        node = node.node
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    return isinstance(node, jinja2.nodes.Name) and node.name in holders


def _message(message: Message, wraps_parts: bool, images: bool) -> dict[str, Any]:
    opened = {name: field_value(raw, object, name) for name, raw in message.items()}
    texts = _texts(opened.get("content"), images)
    opened["content"] = (
        [_IMAGE if text is None else {"type": "text", "text": text} for text in texts]
        if wraps_parts
        else "\n".join(text for text in texts if text is not None)
    )
    calls = opened.get("tool_calls")
    if isinstance(calls, list):
        opened["tool_calls"] = [_tool_call(call) for call in calls]
    return opened


def _texts(content: object, images: bool) -> list[str | None]:
    """Texts, and None for each image."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise Unrenderable("content_unknown")
    texts: list[str | None] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and _is_text(part):
            texts.append(part["text"])
        elif images and isinstance(part, dict) and part.get("type") == "image_url":
            texts.append(None)
        else:
            raise Unrenderable("multimodal")
    return texts


def _is_text(part: dict[Any, Any]) -> bool:
    kind = part.get("type")
    return isinstance(kind, str) and kind in _TEXT_PARTS and isinstance(part.get("text"), str)


def _tool_call(call: object) -> object:
    """Arguments come as a JSON string; templates want the object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments) if arguments else {}
    except ValueError as error:
        raise Unrenderable("template_error", "tool call arguments are not JSON") from error
    return {**call, "function": {**function, "arguments": parsed}}


def _tools(body: Body) -> list[dict[str, Any]] | None:
    """Tools as vLLM hands them to a template: description and parameters always there."""
    tools = body.get("tools", list)
    if not tools:
        return None
    shown: list[dict[str, Any]] = []
    for tool in tools:
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
            raise Unrenderable("tools_unknown")
        function = {"name": None, "description": None, "parameters": None, **tool["function"]}
        shown.append({"type": "function", **tool, "function": function})
    return shown


def _continued(text: str, conversation: Sequence[Mapping[str, Any]]) -> str:
    """Cut what the template wrote after the last message, so that the model goes on with it."""
    content = conversation[-1]["content"]
    last = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    at = text.rfind(last.strip())
    if at < 0:
        raise Unrenderable("template_error", "the final message is not in the rendered text")
    return text[: at + len(last.strip())]
