from __future__ import annotations

from typing import Any

import msgspec
import pytest

from dynctl.errors import RequestError
from dynctl.frontend.body import Body, messages
from dynctl.frontend.prompt.template import ChatTemplate, Unrenderable

PLAIN = (
    "{% for message in messages %}<{{ message.role }}>{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS = (
    "{{ bos_token }}{% for m in messages %}{% set content = m['content'] %}"
    "{% for part in content %}[{{ part.text | trim }}]{% endfor %}{% endfor %}"
)


def render(source: str, fields: dict[str, Any], **special: str) -> str:
    body = Body.parse(msgspec.json.encode(fields))
    return ChatTemplate(source, special).render(body, messages(body))


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def test_plain_template_with_generation_prompt() -> None:
    assert render(PLAIN, user("hi")) == "<user>hi</s>\n<assistant>"
    assert render(PLAIN, {**user("hi"), "add_generation_prompt": False}) == "<user>hi</s>\n"


def test_text_parts_are_joined_for_templates_that_take_strings() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
    assert "a\nb\nc" in render(PLAIN, user(parts))
    assert render(PLAIN, user(None)) == "<user></s>\n<assistant>"


def test_strings_are_wrapped_for_templates_that_loop_over_parts() -> None:
    assert render(PARTS, user(" hi "), bos_token="<s>") == "<s>[hi]"
    direct = "{% for m in messages %}{% for p in m.content | list %}({{ p['text'] }}){% endfor %}{% endfor %}"
    assert render(direct, user([{"type": "text", "text": "x"}])) == "(x)"


def test_images_cannot_be_rendered_here() -> None:
    with pytest.raises(Unrenderable) as caught:
        render(PLAIN, user([{"type": "image_url", "image_url": {"url": "x"}}]))
    assert caught.value.reason == "multimodal"
    with pytest.raises(Unrenderable) as caught:
        render(PLAIN, user(5))
    assert caught.value.reason == "content_unknown"


def test_images_are_left_to_templates_that_go_through_parts() -> None:
    parts = "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
    loops = "{% for m in messages %}" + parts + "{% endfor %}"
    seen = [{"type": "text", "text": "see "}, {"type": "image_url", "image_url": {"url": "x"}}]
    body = Body.parse(msgspec.json.encode(user([*seen, "!"])))
    assert ChatTemplate(loops, {}).render(body, messages(body), images=True) == "see <image>!"
    for source, images in ((PLAIN, True), (loops, False)):
        with pytest.raises(Unrenderable) as caught:
            ChatTemplate(source, {}).render(body, messages(body), images=images)
        assert caught.value.reason == "multimodal"


def test_a_template_that_refuses_the_messages() -> None:
    with pytest.raises(Unrenderable) as caught:
        render("{{ raise_exception('roles must alternate') }}", user("x"))
    assert caught.value.reason == "template_error"
    assert "roles must alternate" in str(caught.value)


def test_a_template_that_trips_over_its_own_data() -> None:
    with pytest.raises(Unrenderable):
        render("{{ 1 / 0 }}", user("x"))


def test_templates_run_in_a_sandbox() -> None:
    with pytest.raises(Unrenderable):
        render("{{ messages.__class__.__mro__[1].__subclasses__() }}", user("x"))
    with pytest.raises(Unrenderable):
        render("{{ messages.append(1) }}", user("x"))


def test_broken_template_is_told_at_once() -> None:
    with pytest.raises(Unrenderable) as caught:
        ChatTemplate("{% for %}", {})
    assert caught.value.reason == "template_broken"


def test_tools_come_as_vllm_gives_them() -> None:
    tool = {"type": "function", "function": {"parameters": {"é": 1}, "name": "f"}}
    text = render("{{ tools | tojson }}", {**user("x"), "tools": [tool]})
    assert text == (
        '[{"type": "function", "function": {"name": "f", "description": null, "parameters": {"é": 1}}}]'
    )
    assert render("{{ tools is none }}", user("x")) == "True"
    with pytest.raises(Unrenderable) as caught:
        render("x", {**user("x"), "tools": [{"type": "web_search"}]})
    assert caught.value.reason == "tools_unknown"


def test_tool_call_arguments_are_objects_in_the_template() -> None:
    calls = "{% for c in m.tool_calls %}{{ c.function.arguments['a'] }}{% endfor %}"
    source = "{% for m in messages %}" + calls + "{% endfor %}"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 7}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert render(source, {"messages": [message]}) == "7"
    odd: list[Any] = [1, {"function": {"arguments": {"a": 8}}}, {"function": {"arguments": ""}}]
    assert render("ok", {"messages": [{**message, "tool_calls": odd}]}) == "ok"
    with pytest.raises(Unrenderable):
        render(source, {"messages": [{**message, "tool_calls": [{"function": {"arguments": "{"}}]}]})


def test_template_arguments_of_the_request() -> None:
    fields = {**user("x"), "chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    assert render("{{ enable_thinking }} {{ reasoning_effort }}", fields) == "False low"
    with pytest.raises(RequestError, match="chat_template_kwargs"):
        render("x", {**user("x"), "chat_template_kwargs": 1})


def test_generation_block_and_loop_controls_are_known() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    assert render(source, {"messages": user("a")["messages"] * 2}) == "a4"


def test_continue_final_message_cuts_what_follows_it() -> None:
    fields = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "so far "}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    }
    assert render(PLAIN, fields) == "<user>q</s>\n<assistant>so far"
    assert render(PARTS, fields, bos_token="") == "[q][so far"
    with pytest.raises(Unrenderable):
        render("nothing of it", fields)


def test_tool_call_arguments_nested_too_deeply_are_left_to_the_engine() -> None:
    call = {"function": {"name": "f", "arguments": "[" * 100_000}}
    with pytest.raises(Unrenderable) as caught:
        render(PLAIN, {"messages": [{"role": "assistant", "content": "x", "tool_calls": [call]}]})
    assert caught.value.reason == "nested_too_deeply"


def test_a_template_that_asks_for_what_a_value_lacks() -> None:
    with pytest.raises(Unrenderable):
        render("{{ messages | dictsort }}", user("x"))
