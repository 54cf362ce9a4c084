"""What lies beside the weights: edited where the merge changes it, byte for byte the same where it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from qlora_cli.data.templates import PLAIN
from qlora_cli.errors import DataError, ModelError
from qlora_cli.merging.adapters.source import AdapterSource, find_adapter
from qlora_cli.merging.folder.surroundings import Surroundings, carry_over, edit_config
from qlora_cli.recipe.schema import Recipe
from tests.support.adapters import write_adapter, write_run
from tests.support.cli import ENVIRONMENT
from tests.support.models import save_tiny_model
from tests.support.tokenizers import CHATML, tiny_tokenizer


def base_folder(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, **generation: Any) -> Path:
    """A tiny model's folder, with these values in its generation configuration."""
    save_tiny_model(folder, tokenizer=tokenizer)
    edit(folder / "generation_config.json", generation)
    return folder


def edit(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2) + "\n")


def from_elsewhere(tmp_path: Path, base: Path, **config: Any) -> AdapterSource:
    folder = write_adapter(tmp_path / "peft", str(base), **config)
    return find_adapter(folder, base_model=None, revision=None, trained_base="16bit")


def from_run(tmp_path: Path, base: Path, *, adapter: bool = False, **dataset: Any) -> AdapterSource:
    """A checkpoint of a run, or its adapter without a tokenizer."""
    data = {"base_model": str(base), "dataset": {"train": str(tmp_path / "gone.jsonl")} | dataset}
    recipe = Recipe.model_validate(data | {"output_dir": str(tmp_path / "run")})
    run = write_run(recipe, steps=(5,), adapter=adapter, status="completed" if adapter else "interrupted")
    return find_adapter(run.path, base_model=None, revision=None, trained_base=None)


def carried(base: Path, adapter: AdapterSource, staging: Path, **arguments: Any) -> Surroundings:
    staging.mkdir()
    return carry_over(base, adapter, staging, **{"dtype": None} | arguments)


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def same(base: Path, staging: Path, *names: str) -> bool:
    return all((base / name).read_bytes() == (staging / name).read_bytes() for name in names)


def test_of_a_plain_merge_only_the_configuration_is_edited(tmp_path: Path) -> None:
    """Tokenizer, template and generation configuration are the base's own bytes; weights and README are not touched;
    the configuration is the base's but for the dtype."""
    base = base_folder(tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"weights in another form")
    (base / "README.md").write_text("the base's own")
    written = carried(base, from_elsewhere(tmp_path, base), tmp_path / "out", dtype="float16")
    assert written.files == (
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    assert (written.tokenizer_from, written.remarks) == ("the base", ())
    assert same(base, tmp_path / "out", *(name for name in written.files if name != "config.json"))
    assert read(tmp_path / "out/config.json") == read(base / "config.json") | {"dtype": "float16"}


def test_a_quantised_base_leaves_no_word_of_it() -> None:
    """Neither at the top nor in the part for text; nor the folder that somebody once had it in."""
    config = {
        "quantization_config": {"load_in_4bit": True},
        "_name_or_path": "/home/somebody/model",
        "text_config": {"quantization_config": {}, "dtype": "float16", "hidden_size": 64},
        "vision_config": {"torch_dtype": "float16"},
    }
    assert edit_config(config, dtype="bfloat16", changes={}) == {
        "text_config": {"dtype": "bfloat16", "hidden_size": 64},
        "vision_config": {"torch_dtype": "bfloat16"},
        "dtype": "bfloat16",
    }
    assert config["_name_or_path"]  # what was given is as it was


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_is_named_as_the_base_names_it(name: str) -> None:
    """Clients before transformers 4.56 know only the older name; None changes nothing."""
    assert edit_config({name: "float32"}, dtype="bfloat16", changes={}) == {name: "bfloat16"}
    assert edit_config({name: "float32"}, dtype=None, changes={}) == {name: "float32"}


def test_changes_go_where_the_base_has_the_value() -> None:
    """Within the part for text if it is there, in both if it is in both, and at the top if it is in neither."""
    config = {"tie_word_embeddings": True, "text_config": {"vocab_size": 10, "tie_word_embeddings": True}}
    changes = {"vocab_size": 12, "tie_word_embeddings": False, "architectures": ["X"]}
    assert edit_config(config, dtype=None, changes=changes) == {
        "tie_word_embeddings": False,
        "text_config": {"vocab_size": 12, "tie_word_embeddings": False},
        "architectures": ["X"],
    }


def test_the_number_of_labels_is_read_back(tmp_path: Path) -> None:
    """transformers reads the number that was asked for, whatever the base had; names of as many labels stay."""
    base = base_folder(tmp_path / "base")
    written = edit_config(read(base / "config.json"), dtype=None, changes={"num_labels": 5})
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert AutoConfig.from_pretrained(tmp_path).num_labels == 5
    named = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    assert edit_config(named, dtype=None, changes={"num_labels": 2}) == named


def test_a_tokenizer_of_the_adapter_replaces_the_bases(tmp_path: Path) -> None:
    """Whole: nothing of the base's is beside it, and the vocabulary it has beyond the model's is said."""
    base = base_folder(tmp_path / "base")
    (base / "merges.txt").write_text("of the base")
    (base / "special_tokens_map.json").write_text("{}")
    adapter = from_elsewhere(tmp_path, base)
    theirs = tiny_tokenizer(chat_template=None, extra_special=["<new>"])
    theirs.save_pretrained(adapter.folder)
    written = carried(base, adapter, tmp_path / "out")
    assert written.tokenizer_from == "the adapter"
    assert {"merges.txt", "special_tokens_map.json", "chat_template.jinja"}.isdisjoint(written.files)
    assert same(adapter.folder, tmp_path / "out", "tokenizer.json", "tokenizer_config.json")
    rows = read(base / "config.json")["vocab_size"]
    assert written.remarks == (
        f"the tokenizer has tokens up to id {rows:,}, but the model has embeddings for {rows:,} tokens: a text with "
        "one of the others cannot be read",
    )


def test_parts_of_a_tokenizer_are_not_mixed_in(tmp_path: Path) -> None:
    """An adapter with a template or a configuration but no vocabulary: the base's whole, and said."""
    base = base_folder(tmp_path / "base")
    adapter = from_elsewhere(tmp_path, base)
    (adapter.folder / "tokenizer_config.json").write_text('{"eos_token": "<|bos|>"}')
    written = carried(base, adapter, tmp_path / "out")
    assert same(base, tmp_path / "out", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert written.remarks == (
        "the adapter has tokenizer_config.json, but no vocabulary: the base's tokenizer is taken, and all of that",
    )


def test_a_checkpoint_gets_the_template_of_its_run(tmp_path: Path) -> None:
    """A template from the recipe takes the place of the base's in every file that has one; the rest of the tokenizer
    is the base's."""
    base = base_folder(tmp_path / "base")
    edit(base / "tokenizer_config.json", {"chat_template": "of old"})
    (base / "chat_template.json").write_text('{"chat_template": "older still"}')
    template = CHATML.replace("assistant\n", "assistant: ")
    written = carried(base, from_run(tmp_path, base, chat_template=template), tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "chat_template.jinja").read_text() == template
    assert "chat_template" not in read(out / "tokenizer_config.json")
    assert "chat_template.json" not in written.files
    assert same(base, out, "tokenizer.json")
    assert AutoTokenizer.from_pretrained(out).chat_template == template
    assert written.remarks == ("the chat template is that of the run, not the base's own",)


def test_a_checkpoint_of_conversations_gets_the_plain_template(tmp_path: Path) -> None:
    """A base without a template, and rows that are conversations by the recipe or by a look at them: what training
    rendered them with, and its end of turn stops generation."""
    base = base_folder(tmp_path / "base", tiny_tokenizer(chat_template=None), eos_token_id=3)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    for number, dataset in enumerate(({"format": "messages"}, {"train": str(rows)})):
        adapter = from_run(tmp_path, base, **dataset)
        written = carried(base, adapter, tmp_path / f"out{number}")
        assert AutoTokenizer.from_pretrained(tmp_path / f"out{number}").chat_template == PLAIN
        assert read(tmp_path / f"out{number}/generation_config.json")["eos_token_id"] == [3, 2]
        assert "the chat template is that of the run, not the base's own" in written.remarks


def test_rows_that_are_gone_are_said(tmp_path: Path) -> None:
    """Whether there was a template cannot be told then."""
    base = base_folder(tmp_path / "base", tiny_tokenizer(chat_template=None))
    written = carried(base, from_run(tmp_path, base), tmp_path / "out")
    assert "chat_template.jinja" not in written.files
    (remark,) = written.remarks
    assert remark.startswith(
        "whether the run's rows are conversations, which would be rendered with a template, cannot"
    )


def test_a_template_file_that_is_gone_is_told(tmp_path: Path) -> None:
    """The model would be asked in words that it was not trained on."""
    base = base_folder(tmp_path / "base")
    with pytest.raises(DataError, match="the template cannot be read: No such file"):
        carried(base, from_run(tmp_path, base, chat_template=str(tmp_path / "gone.jinja")), tmp_path / "out")


@pytest.mark.parametrize(("before", "after"), [(3, [3, 2]), ([3, 1], [3, 1, 2]), (None, 2)])
def test_the_end_of_a_turn_stops_generation(tmp_path: Path, before: object, after: object) -> None:
    """A base model that stops at the end of a text alone would chatter on after its answer: the token of its template
    is added, and said; everything else in the file stays."""
    base = base_folder(tmp_path / "base", eos_token_id=before, temperature=0.7, unheard_of={"a": 1})
    written = carried(base, from_elsewhere(tmp_path, base), tmp_path / "out")
    assert read(tmp_path / "out/generation_config.json") == read(base / "generation_config.json") | {
        "eos_token_id": after
    }
    assert written.remarks == (
        "the chat template ends an answer with <|im_end|> (2), at which the base does not stop: added to eos_token_id "
        "in generation_config.json",
    )
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.eos_token_id == after


def test_a_base_without_generation_settings_gets_some_only_if_needed(tmp_path: Path) -> None:
    """Where the configuration stops at the end of a turn, no file is made up; where it does not, one is, and it keeps
    what the configuration has."""
    base = base_folder(tmp_path / "base")
    (base / "generation_config.json").unlink()
    adapter = from_elsewhere(tmp_path, base)
    assert "generation_config.json" not in carried(base, adapter, tmp_path / "one").files
    edit(base / "config.json", {"eos_token_id": 3, "bos_token_id": 3, "pad_token_id": 0})
    carried(base, adapter, tmp_path / "two")
    assert read(tmp_path / "two/generation_config.json") == {
        "bos_token_id": 3,
        "pad_token_id": 0,
        "eos_token_id": [3, 2],
    }


def test_a_model_that_writes_nothing_gets_no_generation_settings(tmp_path: Path) -> None:
    """An encoder stops nowhere, whatever its tokenizer ends a text with."""
    base = base_folder(tmp_path / "base")
    (base / "generation_config.json").unlink()
    edit(base / "config.json", {"architectures": ["RobertaModel"], "eos_token_id": 3})
    written = carried(base, from_elsewhere(tmp_path, base, task_type=None), tmp_path / "out")
    assert "generation_config.json" not in written.files


def test_rows_without_a_template_end_with_eos(tmp_path: Path) -> None:
    """A run whose rows were rendered bare ended each with the tokenizer's eos."""
    base = base_folder(tmp_path / "base", tiny_tokenizer(chat_template=None), eos_token_id=3)
    carried(base, from_run(tmp_path, base, format="text"), tmp_path / "out")
    assert read(tmp_path / "out/generation_config.json")["eos_token_id"] == [3, 2]
    # Of an adapter from elsewhere, nothing of the kind is known.
    carried(base, from_elsewhere(tmp_path, base), tmp_path / "other")
    assert same(base, tmp_path / "other", "generation_config.json")


def test_a_classifier_knows_its_padding(tmp_path: Path) -> None:
    """A decoder that classifies reads the last token that is no padding, and generates nothing."""
    base = base_folder(tmp_path / "base", eos_token_id=3)
    edit(base / "config.json", {"pad_token_id": None})
    adapter = from_elsewhere(tmp_path, base, task_type="SEQ_CLS")
    written = carried(base, adapter, tmp_path / "out", config_changes={"num_labels": 3})
    assert read(tmp_path / "out/config.json")["pad_token_id"] == 0
    assert same(base, tmp_path / "out", "generation_config.json")
    assert written.remarks == ()


def test_code_licences_and_processors_are_carried_over(tmp_path: Path) -> None:
    """The model's code only if its configuration names it; licences by their names, not whatever begins so."""
    base = base_folder(tmp_path / "base")
    (base / "1_Pooling").mkdir()
    for name in ("modeling_x.py", "LICENSE", "Notice.txt", "licensed.safetensors", "processor_config.json"):
        (base / name).write_text(name)
    (base / "1_Pooling/config.json").write_text("{}")
    adapter = from_elsewhere(tmp_path, base)
    first = set(carried(base, adapter, tmp_path / "one").files)
    assert {"LICENSE", "Notice.txt", "processor_config.json", "1_Pooling/config.json"} <= first
    assert not {"modeling_x.py", "licensed.safetensors"} & first
    edit(base / "config.json", {"auto_map": {"AutoConfig": "modeling_x.X"}})
    assert "modeling_x.py" in carried(base, adapter, tmp_path / "two").files


def test_code_of_a_tokenizer_does_not_run_unasked(tmp_path: Path) -> None:
    """It is carried over, but what it would stop at is not looked at."""
    base = base_folder(tmp_path / "base")
    (base / "tokenization_x.py").write_text("raise SystemExit('ran')")
    edit(base / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}})
    written = carried(base, from_elsewhere(tmp_path, base), tmp_path / "out")
    assert "tokenization_x.py" in written.files


def test_a_base_without_a_tokenizer(tmp_path: Path) -> None:
    """It is said."""
    base = base_folder(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink()
    written = carried(base, from_elsewhere(tmp_path, base), tmp_path / "out")
    assert (written.tokenizer_from, written.remarks) == ("", ("neither the adapter nor the base has a tokenizer",))


def test_a_merge_does_not_pay_for_what_reads_rows() -> None:
    """`datasets` holds 80 MB as soon as it is imported."""
    code = "import sys, qlora_cli.merging.folder.surroundings; print('datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_configuration_is_told(tmp_path: Path, name: str) -> None:
    """With its file."""
    base = base_folder(tmp_path / "base")
    adapter = from_elsewhere(tmp_path, base)
    (base / name).write_text("{")
    with pytest.raises(ModelError, match=f"base/{name}: not valid JSON: "):
        carried(base, adapter, tmp_path / "out")


def test_a_damaged_tokenizer_is_told(tmp_path: Path) -> None:
    """By the folder that it comes from, not by where it was just copied to."""
    base = base_folder(tmp_path / "base")
    (base / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="/base: the tokenizer cannot be read: "):
        carried(base, from_elsewhere(tmp_path, base), tmp_path / "out")
