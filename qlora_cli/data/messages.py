"""A list of messages, in OpenAI's shape or in ShareGPT's, as what chat templates take: role, content and the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from qlora_cli.data.cells import check_unicode, got
from qlora_cli.data.files import describe, shorten
from qlora_cli.errors import DataError

Message = dict[str, Any]

# OpenAI's newer word for system.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_SPEAKERS = {
    **_ROLES,
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
}


class Turns(NamedTuple):
    """Messages, and the positions of assistant turns that are not to be learned."""

    messages: tuple[Message, ...]
    unlearned: frozenset[int]


class _Shape(NamedTuple):
    """What errors call the list, one of its items, and the keys that one has."""

    name: str
    noun: str
    keys: str


def read_messages(value: object, name: str, where: str, *, column: str) -> Turns:
    """The messages of a row in OpenAI's shape; errors call the value `name`. Raises DataError."""

    def read(message: Mapping[str, Any], where_message: str) -> Message:
        if message.get("role") is None and {"from", "value"} <= message.keys():
            raise DataError(
                f"{where_message}: expected role and content, got from and value, as in ShareGPT. "
                f"Set dataset.format: conversations, and dataset.columns: {{conversations: {column}}}."
            )
        return _message(message, ("role", "content"), _ROLES, "system, user, assistant or tool", where_message)

    return _read(value, read, _Shape(name, "message", "role and content"), where)


def read_turns(value: object, name: str, where: str) -> Turns:
    """The turns of a row in ShareGPT's shape, or in OpenAI's under that name. Raises DataError as `read_messages`."""

    def read(turn: Mapping[str, Any], where_turn: str) -> Message:
        keys = ("role", "content") if turn.get("from") is None and turn.get("role") is not None else ("from", "value")
        return _message(turn, keys, _SPEAKERS, "system, human, gpt or tool", where_turn)

    return _read(value, read, _Shape(name, "turn", "from and value"), where)


def read_exchange(prompt: list[Any], completion: list[Any], where: str) -> Turns:
    """A prompt and its completion as two lists of messages, as TRL has them: the completion's turns are learned."""
    turns = read_messages([*prompt, *completion], "prompt and completion", where, column="messages")
    said = {i for i, message in enumerate(turns.messages) if message["role"] == "assistant"}
    unlearned = turns.unlearned | {i for i in said if i < len(prompt)}
    if said <= unlearned:
        raise DataError(f"{where}: completion: there is no assistant turn, so nothing to learn.")
    return Turns(turns.messages, unlearned)


def read_tools(value: object, where: str) -> tuple[Message, ...] | None:
    """The functions that a conversation may call: a list of objects, or JSON text of one. None if there are none."""
    tools = _parsed(value) if isinstance(value, str) else value
    if tools is None or tools == [] or (isinstance(tools, str) and not tools.strip()):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: expected a list of objects, or JSON text of one, got {describe(value)}.")
    return tuple(tools)


def _read(value: object, read: Callable[[Mapping[str, Any], str], Message], shape: _Shape, where: str) -> Turns:
    name, noun, keys = shape
    if isinstance(value, str):  # as tables have it
        value = _parsed(value)
    if not isinstance(value, list):
        raise DataError(f"{where}: {name}: expected a list of {noun}s, got {describe(value)}.")
    if not value:
        raise DataError(f"{where}: {name}: expected at least one {noun}, got an empty list.")
    messages = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise DataError(f"{where}: {noun} {number}: expected an object with {keys}, got {describe(item)}.")
        messages.append(read(item, f"{where}: {noun} {number}"))
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not said:
        raise DataError(f"{where}: {name}: there is no assistant turn, so nothing to learn.")
    unlearned = frozenset(_without_weight(messages, noun, where))
    if unlearned.issuperset(said):
        raise DataError(f"{where}: {name}: every assistant turn has weight 0, so there is nothing to learn.")
    return Turns(tuple(messages), unlearned)


def _message(
    given: Mapping[str, Any], keys: tuple[str, str], roles: Mapping[str, str], expected: str, where: str
) -> Message:
    role_key, content_key = keys
    # Arrow fills keys that other messages have with null; a template would take those for given. A turn in ShareGPT's
    # keys may have OpenAI's as well, which must not say who speaks.
    taken = {*keys, "role", "content"}
    rest = {key: value for key, value in given.items() if value is not None and key not in taken}
    role = given.get(role_key)
    if not isinstance(role, str) or role not in roles:
        raise DataError(f"{where}: {role_key}: expected {expected}, got {got(given, role_key)}.")
    message = {"role": roles[role], "content": "", **rest}
    if rest.get("tool_calls"):
        message["tool_calls"] = _tool_calls(rest["tool_calls"], where)
    if given.get(content_key) is not None or message["role"] != "assistant" or not rest.get("tool_calls"):
        message["content"] = _content(given, content_key, where)
    return message


def _content(message: Mapping[str, Any], key: str, where: str) -> str:
    content = message.get(key)
    if isinstance(content, list) and content:
        content = _joined(content, f"{where}: {key}")
    if not isinstance(content, str):
        raise DataError(f"{where}: {key}: expected text, got {got(message, key)}.")
    check_unicode(content, f"{where}: {key}")
    return content


def _joined(parts: list[object], where: str) -> str:
    """OpenAI's content in parts, if all of them are text."""
    texts = []
    for number, part in enumerate(parts, 1):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            what = f"a part of type {shorten(kind)}" if isinstance(kind, str) and kind != "text" else describe(part)
            raise DataError(f"{where}: expected text, or parts of type text, got {what} as part {number}.")
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: object, where: str) -> list[Message]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where}: tool_calls: expected a list of objects, got {describe(calls)}.")
    return [_call(call) for call in calls]


def _call(call: Mapping[str, Any]) -> Message:
    """A call with its arguments as an object, which is what transformers asks for; OpenAI writes them as JSON text."""
    given = {key: value for key, value in call.items() if value is not None}
    if isinstance(given.get("function"), dict):
        return {**given, "function": _call(given["function"])}
    if isinstance(given.get("arguments"), str) and isinstance(parsed := _parsed(given["arguments"]), dict):
        return {**given, "arguments": parsed}
    return given


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _without_weight(messages: Iterable[Message], noun: str, where: str) -> Iterable[int]:
    """Positions of turns with `weight: 0`, OpenAI's word for a turn that is read and not learned; takes it off all."""
    for position, message in enumerate(messages):
        weight = message.pop("weight", None)
        if weight is None:
            continue
        place = f"{where}: {noun} {position + 1}: weight"
        if isinstance(weight, bool) or weight not in (0, 1):
            raise DataError(f"{place}: expected 0 or 1, got {describe(weight)}.")
        if message["role"] != "assistant" and weight == 1:
            raise DataError(f"{place}: expected 0, got 1: of a conversation, only assistant turns are learned.")
        if message["role"] == "assistant" and weight == 0:
            yield position
