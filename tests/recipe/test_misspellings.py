"""Slips of the pen, by the thousand: the right word is suggested, nothing is passed over, nothing falls over."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from qlora_cli.cli import app
from qlora_cli.errors import Position, RecipeError
from qlora_cli.recipe.fields import all_fields, item_sections, section_fields, sections
from qlora_cli.recipe.foreign import is_anothers
from qlora_cli.recipe.keys import repair_keys
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.words import distance, is_slip
from qlora_cli.recipe.yaml_source import Path as Keys
from qlora_cli.recipe.yaml_source import Place, Source, dotted, parse_yaml

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
LETTERS = string.ascii_lowercase + string.digits + "_-"

WORDS = st.text("abcd", max_size=6)


def slips(word: str) -> Iterator[str]:
    """Everything that one edit makes of a word: a letter added, left out, mistaken, exchanged with the next."""
    for i in range(len(word) + 1):
        head, tail = word[:i], word[i:]
        yield from (head + letter + tail for letter in LETTERS)
        if tail:
            yield head + tail[1:]
            yield from (head + letter + tail[1:] for letter in LETTERS)
        if len(tail) > 1:
            yield head + tail[1] + tail[0] + tail[2:]


@given(WORDS, WORDS)
def test_a_slip_is_one_edit(a: str, b: str) -> None:
    """The short test that every key goes through agrees with the distance itself."""
    assert is_slip(a, b) == (distance(a, b) == 1)


def test_the_distance() -> None:
    """Known values; each letter takes part in one edit at most, so that `ca` to `abc` is 3."""
    pairs = {("", "abc"): 3, ("kitten", "sitting"): 3, ("rnak", "rank"): 1, ("ca", "abc"): 3, ("abcd", "abcd"): 0}
    assert {pair: distance(*pair) for pair in pairs} == pairs


SECTIONS: list[Keys] = [(), *((name,) for name in sections()), *((*path, 0) for path, _ in item_sections())]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda path: dotted(path) or "top")
def test_every_slip_in_every_key_is_understood(section: Keys) -> None:
    """All keys that the grammar has, those of items of lists too, all slips in each: the word that was meant is
    suggested, by name, first."""
    known = section_fields(section)
    # At the top level, a key of a section is told to belong there.
    keys = {*known, *(path[-1] for path, _ in all_fields() if not section)}
    place = Place(Position("r.yaml", 1, 1), Position("r.yaml", 1, 1))
    wrong = []
    for name in known:
        for slip in {slip for slip in slips(name) if slip not in keys and not is_anothers(slip)}:
            data: Any = {slip: 1}
            for part in reversed(section):
                data = [data] if part == 0 else {part: data}
            source = Source(data, {section: place, (*section, slip): place})
            (mistake,) = repair_keys(source)
            # A slip in one key may be one in another, too; its name is told in whichever way.
            likely = {name, *(other for other in known if is_slip(slip.replace("-", "_"), other))}
            meant = str(mistake.suggestion).split(".")
            if ".".join(meant[:-1]) != dotted(section) or meant[-1] not in likely or meant[-1] not in mistake.message:
                wrong.append((slip, name, mistake.message))
    assert wrong == []


@st.composite
def misspelt_recipes(draw: st.DrawFn) -> tuple[str, str, str]:
    """A shipped recipe with one slip in one of its keys; the key as it was, and as it is now."""
    text = draw(st.sampled_from(SHIPPED)).read_text(encoding="utf-8")
    source = parse_yaml(text, "r.yaml")
    keys = sorted(path for path, place in source.places.items() if path and isinstance(path[-1], str))
    path = draw(st.sampled_from(keys))
    key, place = str(path[-1]), source.places[path].key
    slip = draw(st.sampled_from(sorted(set(slips(key)) - {key})))
    lines = text.split("\n")
    line = lines[place.line - 1]
    assert line[place.column - 1 :].startswith(key)
    lines[place.line - 1] = line[: place.column - 1] + slip + line[place.column - 1 + len(key) :]
    return "\n".join(lines), key, slip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(misspelt_recipes())
def test_a_slip_in_a_shipped_recipe(drawn: tuple[str, str, str]) -> None:
    """`qlora train`: exit 2, and in the first line the place, what is there and what was meant."""
    text, key, slip = drawn
    path = Path("recipes/r.yaml")
    path.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code == 2, result.output
    first = result.stderr.splitlines()[0]
    assert first.startswith("error: recipes/r.yaml:")
    assert slip in first
    assert f"`{key}`" in first or f".{key}`" in first
    assert isinstance(result.exception, SystemExit)


ODD = st.sampled_from(
    [
        *("", "null", "yes", "no", "'4'", "1e3", "-1", "0", ".nan", ".inf", "[]", "{}", "[a, b]", "{a: b}", "x" * 50),
        *("'", '"', "[", "{", "&a", "*a", "!!int 1", "|", ">", "%", "@", "`", "# x", "\t", "1_000", "${HOME}", "${NO}"),
        *("all", "auto", "nf4", "NF4", "text", "16", "2.5", "é🙂", "\\", "<<: *a", "- x", "? x", "---", "../x", "~"),
    ]
)
LINES = st.sampled_from(
    [
        *("lora: {rank: 4}", "  rank: 4", "rank: 4", "learning_rate: 1", "\tseed: 1", "seed", "lora_r: 8", "x: y"),
        *("extends: r.yaml", "extends: none.yaml", "training:", "  - a", "  max_steps: 5", "  num_train_epochs: 2"),
        *("  train: [{path: a.jsonl, weight: 2}, b]", "  train:", "  - path: a.jsonl", "    weight: 2", "    split: x"),
        *("  - pth: b", "  validation: [a.csv, {path: b.csv}]", "  chat_template: '{{ x }}${Y}'", "  streaming: true"),
        *("quantization: {bits: 16, quant_type: fp4}", "dataset: 3", "  eval_steps: 5", "...", "? [a]", "<<: {a: b}"),
    ]
)


@st.composite
def mutated_recipes(draw: st.DrawFn) -> str:
    """A shipped recipe after one to four accidents: lines lost, doubled, indented; values and letters changed."""
    lines = draw(st.sampled_from(SHIPPED)).read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if not line.startswith("#")]
    for _ in range(draw(st.integers(1, 4))):
        number = draw(st.integers(0, len(lines) - 1))
        line = lines[number]
        match draw(st.integers(0, 7)):
            case 0:
                del lines[number]
            case 1:
                lines.insert(draw(st.integers(0, len(lines))), line)
            case 2:
                lines[number] = draw(st.sampled_from(["  ", "\t", " ", "    "])) + line
            case 3:
                lines[number] = line.strip()
            case 4:
                lines[number] = line.partition(":")[0] + ": " + draw(ODD)
            case 5:
                lines.insert(number, draw(LINES))
            case 6 if line:
                at = draw(st.integers(0, len(line) - 1))
                lines[number] = line[:at] + draw(st.characters(codec="utf-8")) + line[at + draw(st.integers(0, 1)) :]
            case _:
                lines[number] = line.swapcase()
        lines = lines or [""]
    return "\n".join(lines)


def unknown_keys(text: str) -> list[str]:
    """Keys that no section has, by PyYAML's own reading; [] for what it does not read as mappings of words."""
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError):
        return []
    if not isinstance(data, dict):
        return []
    found = [key for key in data if key not in section_fields(())]
    for name in sections():
        inner = data.get(name)
        found += [key for key in inner if key not in section_fields((name,))] if isinstance(inner, dict) else []
    dataset = data.get("dataset")
    rows = [dataset.get(name) for name in ("train", "validation")] if isinstance(dataset, dict) else []
    items = [item for items in rows if isinstance(items, list) for item in items if isinstance(item, dict)]
    return found + [key for item in items for key in item if key not in section_fields(("dataset", "train", 0))]


@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=mutated_recipes())
def test_any_accident_is_read_or_refused(text: str, tmp_path: Path) -> None:
    """Whatever happened to a recipe, it is read, or refused with a message at a place: never another exception, and
    never read with a key that means nothing."""
    path = tmp_path / "recipes" / "r.yaml"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    try:
        load_recipe(path, must_exist=False)
    except RecipeError as error:
        told = [(str(mistake), mistake.message) for mistake in error.mistakes]
    else:
        assert unknown_keys(text) == []
        return
    assert told
    assert all(line.startswith(str(tmp_path)) and message for line, message in told)
