"""The merged model's README: true, whole, harmless whatever it is told, and read by the hub's own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from qlora_cli.merging.folder.model_card import (
    CardFacts,
    FidelityRow,
    describe_base,
    read_front_matter,
    recipe_for_card,
    render_card,
)
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import Recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"

FACTS: dict[str, Any] = {
    "title": "mine",
    "base": "org/model",
    "base_revision": COMMIT,
    "adapter_sha256": "ab" * 32,
    "adapter": "LoRA, rank 16, alpha 32, on 210 layers",
    "trained_base": "NF4, double quantisation, bfloat16 compute (the run's recipe)",
    "merged_into": "original",
    "dtype": "bfloat16",
}


def render(**changes: Any) -> str:
    return render_card(CardFacts(**FACTS | changes))


def front_matter(text: str, folder: Path) -> dict[str, Any]:
    (folder / "README.md").write_text(text, encoding="utf-8")
    return read_front_matter(folder)


def test_a_whole_card() -> None:
    """Every part of it, word for word."""
    row = FidelityRow("original", 0.00123, 0.4, 0.98765, 1.25, -0.0021, "layers.7", 0.0123)
    assert render(
        held_out="64 validation rows of the run",
        fidelity=[row, FidelityRow("dequantized", 1e-7)],
        recipe="base_model: org/model\n",
        base_card={"license": "apache-2.0", "language": ["en"], "model-index": "of the base alone"},
        versions={"qlora-cli": "0.1.0", "torch": "2.11"},
        remarks=["the run did not finish"],
    ) == (
        """---
base_model: org/model
base_model_relation: finetune
library_name: transformers
license: apache-2.0
language:
- en
pipeline_tag: text-generation
tags:
- qlora
- lora
- merged
---

# mine

[org/model](https://huggingface.co/org/model) with a LoRA adapter merged into its weights.

## How it was made

| | |
| --- | --- |
| Base | `org/model` |
| Revision | `0123456789abcdef0123456789abcdef01234567` |
| Base in training | NF4, double quantisation, bfloat16 compute (the run's recipe) |
| Adapter | LoRA, rank 16, alpha 32, on 210 layers |
| Adapter's SHA-256 | `abababababababababababababababababababababababababababababababab` |
| Merged into | the base's original weights (W + BA) |
| Weights | bfloat16 |

- the run did not finish

## How near it is to the model that was trained

Against the base as it was stored in training with the adapter beside it, on 64 validation rows of the run.
KL is in nats per token, the loss is per token, and a layer's error is relative to its output.

| | mean KL | max KL | same top token | loss | loss difference | largest layer error |
| --- | --- | --- | --- | --- | --- | --- |
| original | 0.00123 | 0.4 | 98.77% | 1.2500 | -0.00210 | `layers.7` 1.23% |
| dequantized | 1e-07 | | | | | |

## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
```

## Recipe

```yaml
base_model: org/model
```

## Versions

qlora-cli 0.1.0, torch 2.11
"""
    )


def test_the_hub_reads_it(tmp_path: Path) -> None:
    """The hub's own client finds base, licence and tags."""
    card = ModelCard(render(base_card={"license": "other", "license_name": "own", "license_link": "LICENSE"}))
    data = card.data.to_dict()
    assert data["base_model"] == "org/model"
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "own", "LICENSE")
    assert data["library_name"] == "transformers"


def test_a_local_base_is_not_linked(tmp_path: Path) -> None:
    """The hub takes only names of its own for `base_model`; and what is not known is said to be so."""
    text = render(base="my model", base_revision=None)
    assert "base_model" not in front_matter(text, tmp_path)
    assert "\n`my model` with a LoRA adapter merged into its weights.\n" in text
    assert "| Revision | not known (a local folder) |" in text


def test_quantised_again() -> None:
    """It is said how it is stored, in the words of the hub too."""
    text = render(quantized="4 bits (NF4, double quantisation)")
    assert "base_model_relation: quantized" in text
    assert "merged into its weights, stored in 4 bits (NF4, double quantisation)." in text
    assert "| Stored in | 4 bits (NF4, double quantisation) |" in text


@pytest.mark.parametrize(
    ("task", "name", "pipeline"),
    [
        ("SEQ_CLS", "AutoModelForSequenceClassification", "text-classification"),
        ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM", None),
        (None, "AutoModelForCausalLM", None),
    ],
)
def test_every_task_is_loaded_by_its_class(task: str | None, name: str, pipeline: str | None, tmp_path: Path) -> None:
    """And has its name on the hub, where it has one."""
    text = render(task_type=task, custom_code=True)
    assert f'model = {name}.from_pretrained(folder, dtype="auto", trust_remote_code=True)' in text
    assert front_matter(text, tmp_path).get("pipeline_tag") == pipeline


def test_no_folder_and_no_secret_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a text comes from: of paths the last part stays, of secrets nothing; addresses and fractions stay."""
    monkeypatch.setenv("HOME", "/home/jo hn")
    secret = "hf_" + "a1B2" * 8
    text = render(
        title="/home/jo hn/models/mine",
        trained_base="see /srv/team/x.yaml and https://example.org/a/b/c.html, 3/4 of it",
        held_out="rows of /data/private/rows.jsonl",
        fidelity=[FidelityRow("C:\\Users\\me\\model")],
        recipe=f"token: {secret}\n",
        remarks=["read /home/jo hn/notes.txt", f"with {secret}"],
        base_card={"license_link": "https://huggingface.co/org/model/blob/main/LICENSE"},
    )
    for hidden in ("/home", "jo hn", "/srv", "team", "/data", "private", "Users", secret):
        assert hidden not in text, hidden
    for kept in ("x.yaml", "https://example.org/a/b/c.html, 3/4 of it", "rows.jsonl", "notes.txt", "(left out)"):
        assert kept in text, kept
    assert "https://huggingface.co/org/model/blob/main/LICENSE" in text


def test_no_text_breaks_out_of_its_place(tmp_path: Path) -> None:
    """Bars, line breaks, backticks and markup in names; a fence within the recipe; YAML in a licence."""
    text = render(
        title="a\n---\n# b",
        base="a|b`c",
        adapter="x | y\n\n<script>",
        recipe="chat_template: |\n  ```\n  ````\n",
        base_card={"license": "mit\nevil: true"},
    )
    assert "\n# a --- \\# b\n" in text
    assert "| Base | `a\\|b'c` |" in text
    assert "| Adapter | x \\| y \\<script\\> |" in text
    assert "`````yaml\nchat_template: |\n  ```\n  ````\n`````\n" in text
    assert front_matter(text, tmp_path)["license"] == "mit\nevil: true"


def test_the_recipe_of_a_card_names_no_folder() -> None:
    """Of absolute paths the last part is left, everything else is as the run's recipe has it."""
    recipe = Recipe.model_validate(
        {
            "base_model": "/home/me/models/base",
            "dataset": {"train": [{"path": "/home/me/rows.jsonl"}, "org/rows"], "chat_template": "{{ messages }}</s>"},
            "output_dir": "runs/one",
        }
    )
    data = yaml.safe_load(recipe_for_card(recipe))
    assert data["base_model"] == "…/base"
    assert data["dataset"]["train"][0]["path"] == "…/rows.jsonl"
    assert data["dataset"]["train"][1] == "org/rows"
    assert data["dataset"]["chat_template"] == "{{ messages }}</s>"
    assert (data["output_dir"], data["lora"]["rank"]) == ("runs/one", 16)


def test_what_the_base_is_called(tmp_path: Path) -> None:
    """A hub name with the commit that was read; the name within a folder of the hub's cache; else a folder's name."""
    snapshot = tmp_path / "models--org--my--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert describe_base(ModelSource("org/model", "main"), snapshot) == ("org/model", COMMIT)
    assert describe_base(ModelSource(str(snapshot)), snapshot) == ("org/my--model", COMMIT)
    assert describe_base(ModelSource(str(tmp_path)), tmp_path) == (tmp_path.name, None)


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("---\nlicense: mit\n---\n# A model", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("# A model\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("---\na: !!python/object/apply:os.system [true]\n---\n", {}),
        ("", {}),
    ],
)
def test_front_matter(tmp_path: Path, text: str, data: dict[str, Any]) -> None:
    """What is no front matter is none; nothing in it is carried out."""
    (tmp_path / "README.md").write_text(text, newline="")
    assert read_front_matter(tmp_path) == data
    assert read_front_matter(tmp_path / "nowhere") == {}
