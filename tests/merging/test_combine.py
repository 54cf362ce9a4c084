"""Adapters of one base are added up exactly, and refused where a sum is not what they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlora_cli.errors import MergeError, ModelError, OutputError, RequestError
from qlora_cli.merging.adapters.changes import Kind
from qlora_cli.merging.adapters.reading import read_changes
from qlora_cli.merging.combine import combine
from qlora_cli.model.adapter import load_adapter
from qlora_cli.model.base import load_base
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection
from tests.support.models import save_tiny_model, tiny_model
from tests.support.tokenizers import PLAIN, tiny_tokenizer

IDS = torch.arange(5, 29).reshape(2, 12)
A, B = ".lora_A.weight", ".lora_B.weight"


def _write(folder: Path, family: str = "llama", *, seed: int = 0, base: str = "org/base", **settings: Any) -> Path:
    """An adapter as PEFT writes it, with random weights, over a tiny model that is called `base`."""
    torch.manual_seed(100 + seed)
    model = tiny_model(family)
    model.name_or_path = base
    given = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings
    adapted = peft.get_peft_model(model, peft.LoraConfig(**given))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def _edit(folder: Path, **values: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def _edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def _updates(folder: Path, family: str = "llama") -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight for the adapter, computed by PEFT itself in float64."""
    model = peft.PeftModel.from_pretrained(tiny_model(family), folder).double()
    return {
        path: module.get_delta_weight("default")
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


VARIANTS: dict[str, list[dict[str, Any]]] = {
    "other ranks": [{"r": 4, "target_modules": ["q_proj"]}, {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]}],
    "other layers": [
        {"target_modules": ["q_proj", "v_proj"]},
        {"r": 2, "target_modules": ["v_proj", "model.layers.1.mlp.up_proj"]},
    ],
    "rank-stabilised": [
        {"target_modules": ["q_proj"], "use_rslora": True},
        {"target_modules": ["q_proj"]},
    ],
    "patterns": [
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"q_proj": 3},
        },
        {"r": 5, "target_modules": ["q_proj", "down_proj"]},
    ],
    "chosen otherwise": [
        {"target_modules": r".*\.0\..*(q|k)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    ],
    "embeddings": [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"r": 3, "target_modules": ["embed_tokens", "lm_head"]},
    ],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_sum_of_the_products(variant: str, tmp_path: Path) -> None:
    """Each layer's update, as PEFT computes it from what was written, is the weighted sum of the adapters' updates, to
    one rounding of float32; layers of one adapter alone too, and no others."""
    weights = [0.6, -1.5, 0.25]
    settings = VARIANTS[variant]
    folders = [_write(tmp_path / str(i), seed=i, **each) for i, each in enumerate(settings)]
    combined = combine(folders, weights[: len(folders)], tmp_path / "sum")
    expected: dict[str, torch.Tensor] = {}
    sizes: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, weights, strict=False):
        for path, update in _updates(folder).items():
            expected[path] = expected.get(path, 0) + weight * update
            sizes[path] = sizes.get(path, 0) + (weight * update).abs().max()
    got = _updates(tmp_path / "sum")
    assert got.keys() == expected.keys()
    assert combined.modules == len(expected)
    for path, update in got.items():
        # Not relative to each value: terms may cancel.
        assert (update - expected[path]).abs().max() <= 2e-7 * sizes[path]


def test_weights_of_powers_of_two_lose_nothing(tmp_path: Path) -> None:
    """With scales and weights that float32 multiplies by without rounding, A and B are the adapters' own, bit by bit,
    set side by side."""
    folders = [
        _write(tmp_path / "a", seed=1, r=4, lora_alpha=8, target_modules=["q_proj"]),
        _write(tmp_path / "b", seed=2, r=2, lora_alpha=1, target_modules=["q_proj"]),
    ]
    combine(folders, [0.5, -4], tmp_path / "sum")
    first, second, both = (load_file(f / "adapter_model.safetensors") for f in (*folders, tmp_path / "sum"))
    for name, tensor in both.items():
        dim = 0 if name.endswith(A) else 1
        factors = (1, 1) if dim == 0 else (1, -2)
        assert torch.equal(tensor, torch.cat([first[name] * factors[0], second[name] * factors[1]], dim=dim))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_as_peft_concatenates(family: str, tmp_path: Path) -> None:
    """The logits are those of PEFT's add_weighted_adapter with combination_type="cat", to 1e-5; read by PEFT and by
    us."""
    names = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_proj"), "gpt_neox": ("query_key_value", "dense")}
    first, second = names[family]
    base = save_tiny_model(tmp_path / "base", family)
    shape = {"family": family, "base": str(base), "fan_in_fan_out": family == "gpt2"}
    folders = [
        _write(tmp_path / "a", seed=1, r=4, target_modules=[first, second], rank_pattern={second: 2}, **shape),
        _write(tmp_path / "b", seed=2, r=6, target_modules=[first], use_rslora=True, **shape),
    ]
    combine(folders, [0.7, -0.3], tmp_path / "sum")

    def plain() -> torch.nn.Module:
        section = QuantizationSection(bits=16, compute_dtype="float32")
        return load_base(ModelSource(str(base)), section, torch.device("cpu"))

    oracle = peft.PeftModel.from_pretrained(plain(), folders[0], adapter_name="a")
    oracle.load_adapter(folders[1], adapter_name="b")
    oracle.add_weighted_adapter(["a", "b"], [0.7, -0.3], "both", combination_type="cat")
    oracle.set_adapter("both")
    expected = _logits(oracle)
    assert not torch.allclose(expected, _logits(plain()), atol=1e-3)
    torch.testing.assert_close(
        _logits(peft.PeftModel.from_pretrained(plain(), tmp_path / "sum")), expected, rtol=1e-5, atol=1e-5
    )
    ours = plain()
    load_adapter(ours, tmp_path / "sum", compute_dtype=torch.float32)
    torch.testing.assert_close(_logits(ours), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shapes_any_weights(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Drawn ranks, sizes, alphas, dtypes and weights: B A of what is written is the sum, alpha the rank everywhere."""
    tmp_path = tmp_path_factory.mktemp("drawn")
    count = data.draw(st.integers(1, 3))
    sizes = {path: data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9))) for path in ("a.x", "b.a.x", "a.y")}
    weights, folders, expected = [], [], {}
    for i in range(count):
        rank = data.draw(st.integers(1, 4))
        alpha = data.draw(st.sampled_from([1, 3, 16, 0.5]))
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        weight = data.draw(st.floats(-3, 3).filter(lambda value: abs(value) > 1e-3))
        paths = data.draw(st.lists(st.sampled_from(sorted(sizes)), min_size=1, unique=True))
        tensors = {}
        for path in paths:
            a, b = (torch.randn(s).to(dtype) for s in ((rank, sizes[path][0]), (sizes[path][1], rank)))
            tensors |= {f"base_model.model.{path}{A}": a, f"base_model.model.{path}{B}": b}
            expected[path] = expected.get(path, 0) + weight * alpha / rank * (b.double() @ a.double())
        folder = tmp_path / str(i)
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": "org/base"}
        (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": paths}))
        weights.append(weight)
        folders.append(folder)
    combine(folders, weights, tmp_path / "sum")
    config, tensors = _config(tmp_path / "sum"), load_file(tmp_path / "sum/adapter_model.safetensors")
    assert len(tensors) == 2 * len(expected)
    for path, update in expected.items():
        a, b = (tensors[f"base_model.model.{path}{part}"] for part in (A, B))
        assert a.dtype == b.dtype == torch.float32
        key = peft.utils.other.get_pattern_key(config["rank_pattern"], path)
        assert config["rank_pattern"].get(key, config["r"]) == len(a)
        torch.testing.assert_close(b.double() @ a.double(), update, rtol=1e-6, atol=1e-5)
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["lora_alpha"] == config["r"]


def test_the_config_written(tmp_path: Path) -> None:
    """Plain LoRA over the same base, the layers named as the adapters named them, ranks by name where that suffices."""
    folders = [
        _write(tmp_path / "a", target_modules=["q_proj", "v_proj"], use_rslora=True, lora_dropout=0.1),
        _write(tmp_path / "b", r=2, target_modules=["v_proj"], layers_to_transform=None),
    ]
    _edit(folders[0], revision="v1")
    _edit(folders[1], revision="v1")
    combine(folders, [1, 1], tmp_path / "sum")
    config = _config(tmp_path / "sum")
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"q_proj": 4}
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v1")
    assert (config["use_rslora"], config["task_type"], config["peft_type"]) == (False, "CAUSAL_LM", "LORA")
    peft.LoraConfig.from_pretrained(tmp_path / "sum")


def test_a_rank_pattern_for_some_layers_of_a_name(tmp_path: Path) -> None:
    """Where layers of one name have several ranks, each is named by its whole path."""
    folders = [
        _write(tmp_path / "a", target_modules=["q_proj"]),
        _write(tmp_path / "b", target_modules=["model.layers.1.self_attn.q_proj"]),
    ]
    combine(folders, [1, 1], tmp_path / "sum")
    assert _config(tmp_path / "sum")["rank_pattern"] == {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.1.self_attn.q_proj": 8,
    }


def test_what_is_written_can_be_merged(tmp_path: Path) -> None:
    """Merged into a base, the sum changes it by the sum of what the adapters change, embeddings and patterns of ranks
    too."""
    model = tiny_model("llama")
    kinds = {path: _kind(module) for path, module in model.named_modules()}

    def merged(folder: Path) -> dict[str, torch.Tensor]:
        found = read_changes(folder, kinds)
        return {
            name: torch.cat(list(change.merged(found.tensors, partial(iter, [torch.zeros(change.shape(None))]))))
            for name, change in found.changes.items()
        }

    folders = [
        _write(tmp_path / "a", seed=1, target_modules=["embed_tokens", "q_proj"]),
        _write(tmp_path / "b", seed=2, target_modules=["embed_tokens", "q_proj"], r=2, use_rslora=True),
        _write(tmp_path / "c", seed=3, target_modules=["lm_head", "model.layers.1.self_attn.q_proj"]),
    ]
    weights = (0.5, -0.3, 1.7)
    combine(folders, weights, tmp_path / "sum")
    parts = [merged(folder) for folder in folders]
    got = merged(tmp_path / "sum")
    assert got.keys() == {name for part in parts for name in part}
    for name, update in got.items():
        expected = sum(weight * part[name] for weight, part in zip(weights, parts, strict=True) if name in part)
        torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-6)


def _kind(module: torch.nn.Module) -> Kind:
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    return "linear" if isinstance(module, torch.nn.Linear) else "other"


def test_one_adapter_is_scaled(tmp_path: Path) -> None:
    """One adapter with a weight is that adapter made weaker."""
    folder = _write(tmp_path / "a", target_modules=["q_proj"])
    combine([folder], [0.5], tmp_path / "half")
    for path, update in _updates(tmp_path / "half").items():
        assert torch.equal(update, 0.5 * _updates(folder)[path])


def test_the_tokenizer_of_the_first_is_carried_over_and_another_one_told(tmp_path: Path) -> None:
    """The first adapter's tokenizer files are copied; one that differs is said, one that is absent is not."""
    folders = [_write(tmp_path / name, target_modules=["q_proj"]) for name in "abc"]
    tiny_tokenizer().save_pretrained(folders[1])
    tiny_tokenizer(PLAIN).save_pretrained(folders[2])
    combined = combine(folders, [1, 1, 1], tmp_path / "sum")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "sum" / name).read_bytes() == (folders[1] / name).read_bytes()
    assert combined.remarks == ("the tokenizer is that of b; c has another (chat_template.jinja)",)


def test_the_readme_tells_what_went_in(tmp_path: Path) -> None:
    """Weights, ranks and hashes of the parts are in the README; no folder of this machine is."""
    folders = [_write(tmp_path / name, target_modules=["q_proj"]) for name in ("maths", "poems")]
    combine(folders, [0.6, 0.4], tmp_path / "both")
    text = (tmp_path / "both/README.md").read_text()
    assert text.startswith("---\nbase_model: org/base\n")
    assert "| `maths` | 0.6 | 4 | 2 | `" in text
    assert "| `poems` | 0.4 | 4 | 2 | `" in text
    assert str(tmp_path) not in text
    assert {file.name for file in (tmp_path / "both").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_run_is_named_by_its_folder(tmp_path: Path) -> None:
    """A run folder stands for the adapter in it, and gives it its name."""
    _write(tmp_path / "maths/adapter", target_modules=["q_proj"])
    combine([tmp_path / "maths"], [0.5], tmp_path / "half")
    assert "| `maths` | 0.5 |" in (tmp_path / "half/README.md").read_text()


def test_weights_of_the_base_saved_with_an_adapter(tmp_path: Path) -> None:
    """PEFT saves an embedding that is adapted: it is carried over once, and refused where two adapters' differ."""
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    folders = [_write(tmp_path / each, target_modules=["embed_tokens"]) for each in "ab"]
    for folder in folders:
        _edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(512, 64, dtype=torch.bfloat16)}))
    combined = combine(folders, [1, 1], tmp_path / "sum")
    assert torch.equal(
        load_file(tmp_path / "sum/adapter_model.safetensors")[name], torch.ones(512, 64, dtype=torch.bfloat16)
    )
    assert combined.remarks == (
        "model.embed_tokens.base_layer.weight: the base's own weight, saved with an adapter, is carried over as it is",
    )
    _edit_tensors(folders[1], lambda tensors: tensors[name].mul_(2))
    with pytest.raises(ModelError, match=r"is saved whole, and differs from that in .*a: weights saved whole cannot"):
        combine(folders, [1, 1], tmp_path / "other")


def test_a_whole_embedding_that_one_adapter_alone_has(tmp_path: Path) -> None:
    """A weight that may have been trained stands for itself: it is no term of a sum."""
    folders = [_write(tmp_path / each, target_modules=["q_proj"]) for each in "ab"]
    name = "base_model.model.model.embed_tokens.weight"
    _edit_tensors(folders[0], lambda tensors: tensors.update({name: torch.ones(600, 64)}))
    with pytest.raises(ModelError, match=r"embed_tokens\.weight: is saved whole, and .*b has none"):
        combine(folders, [1, 1], tmp_path / "sum")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora: DoRA rescales the base's weights, and that does not add up"),
    "saved modules": (
        {"modules_to_save": ["ln_f"]},
        "modules_to_save: modules saved whole stand in the base's place, and cannot be added to each other",
    ),
    "biases": (
        {"bias": "all"},
        "bias: trained biases stand in the base's place, and cannot be added to each other",
    ),
    "biases beside B": ({"lora_bias": True}, "lora_bias: the adapter written has no biases of its own"),
    "tokens": (
        {"trainable_token_indices": [3]},
        "trainable_token_indices: tokens trained whole stand in the base's place, and cannot be added to each other",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_more_than_a_product(what: str, tmp_path: Path) -> None:
    """An adapter, as PEFT writes it, that does more than add B A is refused with the reason."""
    settings, message = REFUSED[what]
    plain = _write(tmp_path / "plain", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    more = _write(tmp_path / "more", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True, **settings)
    with pytest.raises(ModelError) as caught:
        combine([plain, more], [0.5, 0.5], tmp_path / "sum")
    assert str(caught.value) == f"the adapters cannot be combined:\n{more}/adapter_config.json: {message}"
    assert not (tmp_path / "sum").exists()


def test_all_that_is_wrong_at_once(tmp_path: Path) -> None:
    """Every reason of every adapter is told in one message."""
    first = _write(tmp_path / "first", target_modules=["q_proj"])
    other = _write(tmp_path / "other", base="org/other", target_modules=["q_proj"])
    task = _edit(_write(tmp_path / "task", target_modules=["q_proj"]), task_type="SEQ_CLS")
    wide = _write(tmp_path / "wide", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    mlp = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{mlp}{A}": torch.ones(4, 32), f"{mlp}{B}": torch.ones(64, 4)}
    _edit_tensors(wide, lambda tensors: (tensors.clear(), tensors.update(shapes)))
    dora = _write(tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ModelError) as caught:
        combine([first, other, task, wide, dora, tmp_path / "none"], [1] * 6, tmp_path / "sum")
    reasons = str(caught.value).splitlines()
    assert reasons[0] == "the adapters cannot be combined:"
    assert (
        reasons[1]
        == f"{dora}/adapter_config.json: use_dora: DoRA rescales the base's weights, and that does not add up"
    )
    assert str(tmp_path / "none") in reasons[2]
    assert reasons[3:] == [
        f"{other}/adapter_config.json: was trained over org/other, and {first} over org/base; only changes to one base "
        "can be added up. If these are one model under two names, --base-model NAME says so",
        f"{task}/adapter_config.json: task_type: expected CAUSAL_LM as in {first}, got SEQ_CLS",
        f"{wide}/adapter_model.safetensors: model.layers.0.self_attn.q_proj: is for a layer of 32 inputs and 64 "
        f"outputs, and in {first} for a layer of 64 inputs and 64 outputs",
    ]


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"base_model.model.model.layers.0.self_attn.q_proj{B}"][1, 1] = float("nan")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"base_model.model.model.layers.1.self_attn.q_proj{B}"), "q_proj.lora_A.weight: without base"),
        (lambda t: t.update({"base_model.model.x.lora_C": torch.ones(1)}), "x.lora_C: unknown tensor; expected base"),
        (_nan, "layers.0.self_attn.q_proj.lora_B.weight: has values that are NaN or infinite"),
        (lambda t: t.clear(), "it has no LoRA weights"),
    ],
)
def test_a_damaged_adapter(damage: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path) -> None:
    """A tensor that is missing, unknown or no number is named."""
    folder = _edit_tensors(_write(tmp_path / "a", target_modules=["q_proj"]), damage)
    with pytest.raises(ModelError) as caught:
        combine([folder], [1], tmp_path / "sum")
    assert message in str(caught.value)


def test_a_rank_that_the_config_does_not_have(tmp_path: Path) -> None:
    """Scales depend on the rank: a config of another rank would scale wrongly."""
    folder = _edit(_write(tmp_path / "a", target_modules=["q_proj"]), r=8)
    with pytest.raises(ModelError, match=r"expected A \[8, in\] and B \[out, 8\], got \[4, 64\] and \[64, 4\]"):
        combine([folder], [1], tmp_path / "sum")


def test_one_base_under_two_names(tmp_path: Path) -> None:
    """Adapters that call one base by several names, or by none, are combined when the name is given."""
    folders = [_write(tmp_path / "a", base="org/base", target_modules=["q_proj"])]
    folders.append(_edit(_write(tmp_path / "b", target_modules=["q_proj"]), base_model_name_or_path=None))
    with pytest.raises(ModelError, match=r"b/adapter_config.json: does not say which base"):
        combine(folders, [1, 1], tmp_path / "sum")
    combine(folders, [1, 1], tmp_path / "sum", base_model="org/renamed", revision="v2")
    config = _config(tmp_path / "sum")
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/renamed", "v2")


def test_another_revision_of_the_base(tmp_path: Path) -> None:
    """Two revisions of a base are two bases; none and `main` are one."""
    folders = [_write(tmp_path / name, target_modules=["q_proj"]) for name in "ab"]
    _edit(folders[1], revision="v2")
    with pytest.raises(ModelError, match=r"was trained over revision v2 of org/base, and .*a over main"):
        combine(folders, [1, 1], tmp_path / "sum")
    _edit(folders[1], revision="main")
    combine(folders, [1, 1], tmp_path / "sum")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "--weights: expected a number for each --into-adapter, in their order: 2 of them, got 1"),
        ([1.0, float("nan")], "--weights: expected a number such as 0.5 for {b}, got nan"),
        ([0.0, 1.0], "--weights: got 0 for {a}: leave that adapter out, for it adds nothing"),
    ],
)
def test_weights_that_do_not_go_with_the_adapters(weights: list[float], message: str, tmp_path: Path) -> None:
    """One finite weight other than 0 for each adapter."""
    with pytest.raises(RequestError) as caught:
        combine([tmp_path / "a", tmp_path / "b"], weights, tmp_path / "sum")
    assert str(caught.value) == message.format(a=tmp_path / "a", b=tmp_path / "b")


def test_a_weight_too_large_for_float32(tmp_path: Path) -> None:
    """Nothing infinite is written, and nothing is left behind."""
    folder = _write(tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(MergeError, match="it is too large for float32"):
        combine([folder], [1e300], tmp_path / "sum")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_an_output_in_the_way(tmp_path: Path) -> None:
    """A folder with something in it, the adapter's own above all, is not written; an empty one is."""
    folder = _write(tmp_path / "a", target_modules=["q_proj"])
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(
        OutputError, match=r"a is not empty\. Name another folder, or delete it: nothing is ever written over"
    ):
        combine([folder], [1], folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file is a file; expected an empty folder, or nothing, there"):
        combine([folder], [1], tmp_path / "file")
    with pytest.raises(OutputError, match=r"file is no folder, so .*file/sum cannot be made"):
        combine([folder], [1], tmp_path / "file/sum")
    (tmp_path / "empty").mkdir()
    combine([folder], [1], tmp_path / "empty")
    assert (tmp_path / "empty/adapter_config.json").is_file()
