"""Every kind of mistake in a recipe: its place, what was expected, what was got, what was meant."""

from __future__ import annotations

import pytest

from qlora_cli.errors import Mistake, Position, RecipeError
from tests.support.recipes import MINIMAL, load, refusal

TOP_LEVEL = (
    "    the top level takes extends, base_model, revision, trust_remote_code, task, quantization, lora, dataset, "
    "training, evaluation, output_dir"
)
LORA = "    `lora` takes rank, alpha, dropout, target_modules"
QUANTIZATION = "    `quantization` takes bits, quant_type, double_quant, compute_dtype"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        # Misspelt
        ("lora:\n  rnk: 3", f"6:3: lora.rnk: unknown key; did you mean `rank`?\n{LORA}"),
        ("trainng: {}", f"5:1: trainng: unknown key; did you mean `training`?\n{TOP_LEVEL}"),
        ("quantization: {bit: 4}", f"5:16: quantization.bit: unknown key; did you mean `bits`?\n{QUANTIZATION}"),
        ("LoRA: {}", f"5:1: LoRA: unknown key; did you mean `lora`?\n{TOP_LEVEL}"),
        ("lora: {Target-Modules: all-linear}",
         f"5:8: lora.Target-Modules: unknown key; did you mean `target_modules`?\n{LORA}"),
        ("lora: {targetModules: all-linear}",
         f"5:8: lora.targetModules: unknown key; did you mean `target_modules`?\n{LORA}"),
        ("lora: {learnin_rate: 1}",
         f"5:8: lora.learnin_rate: unknown key; did you mean `training.learning_rate`?\n{LORA}"),
        ("xyzzy: 1", f"5:1: xyzzy: unknown key\n{TOP_LEVEL}"),
        ("lora: {xyzzy: 1}", f"5:8: lora.xyzzy: unknown key\n{LORA}"),
        # In the wrong place
        ("learning_rate: 1", "5:1: learning_rate: `learning_rate` belongs under `training`"),
        ("lora: {max_length: 9}", "5:8: lora.max_length: `max_length` belongs under `dataset`"),
        ("lora: {revision: x}", "5:8: lora.revision: `revision` belongs at the top level"),
        ("lora: {quantization: {bits: 4}}", "5:8: lora.quantization: `quantization` belongs at the top level"),
        ("lora.rank: 4", "5:1: lora.rank: write `rank` on a line of its own, indented under `lora`"),
        ("lora.rnk: 4", "5:1: lora.rnk: write `rank` on a line of its own, indented under `lora`"),
        ("prompt: question", "5:1: prompt: `prompt` belongs under `dataset.columns`"),
        # Another tool's
        ("lora_r: 8", "5:1: lora_r: `lora_r` is PEFT's name; here it is `lora.rank`"),
        ("lora: {r: 8}", "5:8: lora.r: `r` is PEFT's name; here it is `lora.rank`"),
        ("load_in_4bit: true",
         "5:1: load_in_4bit: `load_in_4bit` is Hugging Face's name; here it is `quantization.bits`: 4 in place of "
         "true, 16 in place of false"),
        ("datasets: [{path: x}]",
         "5:1: datasets: `datasets` is axolotl's name; here it is `dataset.train`"),
        ("sample_packing: true",
         "5:1: sample_packing: `sample_packing` is axolotl's name; here it is `dataset.packing`"),
        ("group_by_length: true",
         "5:1: group_by_length: `group_by_length` is Hugging Face's name; rows of similar length always share a batch"),
        ("quantization: {type: nf4}",
         f"5:16: quantization.type: unknown key; did you mean `quant_type`?\n{QUANTIZATION}"),
        ("training: {optimizer: adamw_bnb_8bit}",
         "5:23: training.optimizer: expected adamw_torch, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit, lion_8bit "
         "or paged_lion_8bit, got 'adamw_bnb_8bit'; did you mean `adamw_8bit`?"),
        ("quantization: {compute_dtype: bf16}",
         "5:31: quantization.compute_dtype: expected bfloat16 or float32, got 'bf16'; did you mean `bfloat16`?"),
        ("lora: {target_modules: all}", "5:24: lora.target_modules: got 'all'; did you mean `all-linear`?"),
        # Of the wrong type
        ("lora: {rank: '4'}",
         "5:14: lora.rank: expected a whole number from 1 to 65,536, got '4'; without quotes it is a number: 4"),
        ("lora: {rank: four}", "5:14: lora.rank: expected a whole number from 1 to 65,536, got 'four'"),
        ("lora: {rank: 4.5}", "5:14: lora.rank: expected a whole number from 1 to 65,536, got 4.5"),
        ("training: {max_steps: 1e3}",
         "5:23: training.max_steps: expected a whole number above 0, or null, got 1e3; write 1000"),
        ("lora: {rank: true}", "5:14: lora.rank: expected a whole number from 1 to 65,536, got true"),
        ("lora: {alpha: True}", "5:15: lora.alpha: expected a number above 0, got True"),
        ("lora: {rank:}",
         "5:8: lora.rank: expected a whole number from 1 to 65,536, got nothing; its default is 16"),
        ("lora: {rank: [4]}", "5:14: lora.rank: expected a whole number from 1 to 65,536, got [4]"),
        ("lora: {rank: {a: 4}}", "5:14: lora.rank: expected a whole number from 1 to 65,536, got a section"),
        ("lora: {rank: 1,000}", f"5:16: lora.000: unknown key\n{LORA}"),
        ("revision: 5", "5:11: revision: expected text, or null, got 5; in quotes it is text: '5'"),
        ("revision: 12345e6", "5:11: revision: expected text, or null, got 12345e6; in quotes it is text: '12345e6'"),
        ("revision: true", "5:11: revision: expected text, or null, got true; in quotes it is text: 'true'"),
        ("trust_remote_code: yes", "5:20: trust_remote_code: expected true or false, got 'yes'; write true"),
        ("trust_remote_code: Off", "5:20: trust_remote_code: expected true or false, got 'Off'; write false"),
        ("trust_remote_code: 'true'", "5:20: trust_remote_code: expected true or false, got 'true'; write true"),
        ("trust_remote_code: 1", "5:20: trust_remote_code: expected true or false, got 1"),
        ("lora: {target_modules: 3}",
         "5:24: lora.target_modules: expected text or a list of text, got 3; in quotes it is text: '3'"),
        ("lora: {target_modules: [q_proj, 7]}",
         "5:33: lora.target_modules.1: expected text, got 7; in quotes it is text: '7'"),
        ("lora: {target_modules: []}",
         "5:24: lora.target_modules: expected text or a list of text, with at least one item, got []"),
        ("lora:", "5:1: lora: expected a section of `key: value` lines, got nothing\n" + LORA),
        ("lora: fast", "5:7: lora: expected a section of `key: value` lines, got 'fast'\n" + LORA),
        ("lora: [a]", "5:7: lora: expected a section of `key: value` lines, got [a]\n" + LORA),
        ("lora:\n- rank: 4", "6:1: lora: expected a section of `key: value` lines, got [{rank: 4}]\n" + LORA),
        # Out of range
        ("lora: {rank: 0}", "5:14: lora.rank: expected a whole number from 1 to 65,536, got 0"),
        ("lora: {dropout: 1}", "5:17: lora.dropout: expected a number from 0 to below 1, got 1"),
        ("training: {max_steps: -1}", "5:23: training.max_steps: expected a whole number above 0, or null, got -1"),
        ("training: {warmup_steps: -1}", "5:26: training.warmup_steps: expected a whole number of at least 0, got -1"),
        ("training: {learning_rate: .nan}",
         "5:27: training.learning_rate: expected a number above 0, at most 1; one that is finite, got .nan"),
        ("training: {max_grad_norm: .inf}",
         "5:27: training.max_grad_norm: expected a number above 0, or null; one that is finite, got .inf"),
        ("training: {seed: 4294967296}",
         "5:18: training.seed: expected a whole number from 0 to 4,294,967,295, got 4294967296"),
        # Not among the choices
        ("quantization: {bits: 5}", "5:22: quantization.bits: expected 4 or 16, got 5"),
        ("quantization: {bits: '4'}", "5:22: quantization.bits: expected 4 or 16, got '4'; did you mean `4`?"),
        ("quantization: {quant_type: NF4}",
         "5:28: quantization.quant_type: expected nf4 or fp4, got 'NF4'; did you mean `nf4`?"),
        ("quantization: {quant_type: int8}", "5:28: quantization.quant_type: expected nf4 or fp4, got 'int8'"),
        ("quantization: {quant_type: null}",
         "5:16: quantization.quant_type: expected nf4 or fp4, got nothing; its default is 'nf4'"),
        ("training: {lr_scheduler_type: cosin}",
         "5:31: training.lr_scheduler_type: expected linear, cosine or constant, got 'cosin'; did you mean `cosine`?"),
        ("lora: {target_modules: all_linear}",
         "5:24: lora.target_modules: got 'all_linear'; did you mean `all-linear`?"),
        ("lora: {target_modules: '(q_proj'}",
         "5:24: lora.target_modules: '(q_proj' is not a regular expression: missing ), unterminated subpattern at "
         "position 0"),
        # One excludes the other, or needs it
        ("training: {max_steps: 1, num_train_epochs: 1}",
         "5:26: training.num_train_epochs: excludes `max_steps` (line 5): give one of the two"),
        ("training:\n  num_train_epochs: 1\n  max_steps: 1",
         "7:3: training.max_steps: excludes `num_train_epochs` (line 6): give one of the two"),
        ("quantization:\n  quant_type: fp4\n  bits: 16",
         "6:3: quantization.quant_type: has no meaning with `bits: 16` (line 7), which quantises nothing: leave one "
         "out"),
        ("quantization: {bits: 16, double_quant: false}",
         "5:26: quantization.double_quant: has no meaning with `bits: 16` (line 5), which quantises nothing: leave "
         "one out"),
        ("training:\n  eval_steps: 5",
         "6:3: training.eval_steps: needs rows to evaluate on: give dataset.validation or "
         "dataset.validation_fraction"),
        # A name that can match nothing
        ("lora: {target_modules: q_proj}",
         "5:24: lora.target_modules: got 'q_proj', an expression that matches no whole path of a module; write "
         "[q_proj]"),
        ("lora: {target_modules: 'q_proj, v_proj'}",
         "5:24: lora.target_modules: got 'q_proj, v_proj', an expression that matches no whole path of a module; write "
         "[q_proj, v_proj]"),
        ("lora: {target_modules: [all-linear]}",
         "5:25: lora.target_modules.0: `all-linear` is written without a list"),
        ("lora: {target_modules: [q_proj, '']}",
         "5:33: lora.target_modules.1: expected the name of a module, got ''"),
        ("lora: {target_modules: 'a{99999999999999999999}'}",
         "5:24: lora.target_modules: 'a{99999999999999999999}' is not a regular expression: the repetition number is "
         "too large"),
        ("training:\n  learning_rate:2e-4\n  seed: 3",
         "6:3: not valid YAML: a space is missing after `learning_rate:`"),
        ("lora:\n  rank:4",
         "6:3: lora: expected a section of `key: value` lines, got 'rank:4'; a space is missing after "
         "`rank:`\n" + LORA),
        # Given twice, or not YAML
        ("lora: {rank: 1}\nlora: {alpha: 2}", "6:1: lora: `lora` is given twice (first on line 5); leave one out"),
        ("lora:\n\trank: 4", "6:1: not valid YAML: a tab; YAML takes spaces only"),
        ("lora: {rank: !!int 4}", "5:14: the tag !!int is not allowed in a recipe"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(lines: str, message: str) -> None:
    """File, line and column; the whole name; what is allowed, what was got and, where it can be known, what was
    meant."""
    assert refusal(MINIMAL + lines + "\n") == f"r.yaml:{message}"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("  validation: org/x\n  validation_fraction: 0.1",
         "5:3: dataset.validation_fraction: excludes `validation` (line 4): give one of the two"),
        ("  validation_fraction: 1",
         "4:24: dataset.validation_fraction: expected a number between 0 and 1, or null, got 1"),
        ("  max_length: 1", "4:15: dataset.max_length: expected a whole number of at least 2, got 1"),
        ("  overlong: cut", "4:13: dataset.overlong: expected error, drop or truncate, got 'cut'"),
        ("  columns: [prompt]",
         "4:12: dataset.columns: expected a mapping such as {prompt: question}, got [prompt]"),
        ("  columns: {prompt: 3}", "4:21: dataset.columns.prompt: expected text, got 3; in quotes it is text: '3'"),
        ("  columns: {promt: q}", "4:13: dataset.columns.promt: no format has a field 'promt'; did you mean `prompt`?"),
        ("  columns: {prompt: q, completion: q}",
         "4:24: dataset.columns.completion: takes the same column as `prompt`: 'q'"),
        ("  format: text\n  columns: {prompt: q}",
         "5:13: dataset.columns.prompt: the format text has no field 'prompt'; expected text"),
        ("  format: aplaca", "4:11: dataset.format: expected auto, messages, conversations, alpaca, "
         "prompt_completion, classification or text, got 'aplaca'; did you mean `alpaca`?"),
        ("  format: sharegpt", "4:11: dataset.format: expected auto, messages, conversations, alpaca, "
         "prompt_completion, classification or text, got 'sharegpt'; did you mean `conversations`?"),
        ("  supervise: all", "4:14: dataset.supervise: expected all_assistant, last_assistant or everything, got "
         "'all'; did you mean `everything`?"),
        ("  on_bad_row: drop", "4:15: dataset.on_bad_row: expected error or skip, got 'drop'; did you mean `skip`?"),
        ("  packing: yes", "4:12: dataset.packing: expected true or false, got 'yes'; write true"),
        ("  train: x", "4:3: dataset.train: `train` is given twice (first on line 3); leave one out"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_dataset(lines: str, message: str) -> None:
    """The section that every recipe has."""
    assert refusal(MINIMAL.replace("output_dir", lines + "\noutput_dir")) == f"r.yaml:{message}"


def test_what_is_missing() -> None:
    """Told at the section it belongs in, and at the top where the file begins, with what it is for."""
    assert refusal("# nothing much\ntask: causal_lm\ndataset: {}\n") == (
        "r.yaml:2:1: base_model: is required and was not given: hub name or local folder (relative to the recipe)\n"
        "r.yaml:2:1: output_dir: is required and was not given: the run folder, relative to where the command is run\n"
        "r.yaml:3:1: dataset.train: is required and was not given: file, folder, glob or hub name, or a list of them; "
        "a path is relative to the recipe"
    )


def test_a_key_that_was_meant_is_not_missing_too() -> None:
    """One slip is one mistake."""
    assert refusal(MINIMAL.replace("base_model", "base_mdel")) == (
        f"r.yaml:1:1: base_mdel: unknown key; did you mean `base_model`?\n{TOP_LEVEL}"
    )
    assert refusal(MINIMAL.replace("dataset", "datset")) == (
        f"r.yaml:2:1: datset: unknown key; did you mean `dataset`?\n{TOP_LEVEL}"
    )


def test_what_is_wrong_below_a_wrong_key_is_told_as_well() -> None:
    """Under a misspelt section, in a key in the wrong place or of another tool, and across two spellings of one
    section: nobody runs again to see the next mistake."""
    text = MINIMAL + "learning_rate: fast\nlora_r: 0\ntrainng:\n  max_step: 1\n  num_train_epochs: 1\n  seed: -1\n"
    assert [line for line in refusal(text).splitlines() if not line.startswith(" ")] == [
        "r.yaml:5:1: learning_rate: `learning_rate` belongs under `training`",
        "r.yaml:5:16: training.learning_rate: expected a number above 0, at most 1, got 'fast'",
        "r.yaml:6:1: lora_r: `lora_r` is PEFT's name; here it is `lora.rank`",
        "r.yaml:6:9: lora.rank: expected a whole number from 1 to 65,536, got 0",
        "r.yaml:7:1: trainng: unknown key; did you mean `training`?",
        "r.yaml:8:3: training.max_step: unknown key; did you mean `max_steps`?",
        "r.yaml:9:3: training.num_train_epochs: excludes `max_steps` (line 8): give one of the two",
        "r.yaml:10:9: training.seed: expected a whole number from 0 to 4,294,967,295, got -1",
    ]


def test_what_was_said_in_another_tools_way_is_not_missing() -> None:
    """`datasets` cannot be taken over as it is, but nobody forgot the dataset; nor the rows that eval_steps needs."""
    text = "base_model: a/b\noutput_dir: o\ndatasets: [{path: x}]\nsequence_len: 9\nval_set_size: 5\neval_steps: 3\n"
    assert [line.split(":")[1:4] for line in refusal(text).splitlines()] == [
        ["3", "1", " datasets"],
        ["4", "1", " sequence_len"],
        ["5", "1", " val_set_size"],
        ["6", "1", " eval_steps"],
    ]


def test_a_value_that_is_there_is_kept() -> None:
    """A key in the wrong place does not replace what stands in the right one."""
    text = MINIMAL + "rank: x\nlora: {rank: 4, rnk: y}\n"
    assert [line for line in refusal(text).splitlines() if not line.startswith(" ")] == [
        "r.yaml:5:1: rank: `rank` belongs under `lora`",
        "r.yaml:6:17: lora.rnk: unknown key; did you mean `rank`?",
    ]


def test_every_mistake_is_told_at_once() -> None:
    """Faults of YAML beside unknown keys, types, ranges, choices and pairs, in the file and in overrides, from top to
    bottom; the keys that are allowed once each."""
    text = (
        "base_model: 3\n"
        "lora:\n"
        "  rnk: 3\n"
        "  rnak: 4\n"
        "  target_modules: [q_proj, 7]\n"
        "dataset:\n"
        "  train: org/rows\n"
        "  columns: {int: 3, 'a[0]': 4}\n"
        "training:\n"
        "  num_train_epochs: 1\n"
        "  max_steps: 3\n"
        "quantization:\n"
        "  bits: 3\n"
    )
    columns = "instruction, output, input, messages, prompt, completion, text"
    told = refusal(text, "quantization.quant_type=nf5", "output_dir=~", "lora.alfa=1").splitlines()
    assert [line for line in told if "columns" not in line] == [
        "r.yaml:1:13: base_model: expected text, got 3; in quotes it is text: '3'",
        "r.yaml:3:3: lora.rnk: unknown key; did you mean `rank`?",
        LORA,
        "r.yaml:4:3: lora.rnak: unknown key; did you mean `rank`?",
        "r.yaml:5:28: lora.target_modules.1: expected text, got 7; in quotes it is text: '7'",
        "r.yaml:11:3: training.max_steps: excludes `num_train_epochs` (line 10): give one of the two",
        "r.yaml:13:9: quantization.bits: expected 4 or 16, got 3",
        "--set lora.alfa=1: lora.alfa: unknown key; did you mean `alpha`?",
        "--set quantization.quant_type=nf5: quantization.quant_type: expected nf4 or fp4, got 'nf5'; did you mean "
        "`nf4`?",
        "--set output_dir=~: output_dir: expected text, got nothing",
    ]
    assert {word for word in columns.split(", ") if word in " ".join(told)} == set(columns.split(", "))


def test_faults_of_yaml_do_not_hide_the_rest() -> None:
    """What can be read beside a fault is checked; what may be in the unreadable part is not missing."""
    text = "base_model: org/model\ndataset:\n\ttrain: org/rows\nlora: {rnk: 4}\ntraining: {seed: x, eval_steps: 5}\n"
    assert refusal(text).splitlines() == [
        "r.yaml:3:1: not valid YAML: a tab; YAML takes spaces only",
        "r.yaml:4:8: lora.rnk: unknown key; did you mean `rank`?",
        LORA,
        "r.yaml:5:18: training.seed: expected a whole number from 0 to 4,294,967,295, got 'x'",
    ]


def test_a_long_value_is_cut_in_the_message() -> None:
    told = refusal(f"{MINIMAL}lora: {{rank: {'x' * 5000}}}\n")
    assert told == f"r.yaml:5:14: lora.rank: expected a whole number from 1 to 65,536, got '{'x' * 99}…"
    assert len(refusal(f"{MINIMAL}{'k' * 900}: 1\n").splitlines()[0]) < 200


@pytest.mark.parametrize("field", ["base_model", "output_dir", "train"])
def test_no_name_at_all_is_refused(field: str) -> None:
    """`base_model: ""` is not the recipe's own folder."""
    lines = [f'{line.split(":")[0]}: ""' if line.strip().startswith(field) else line for line in MINIMAL.splitlines()]
    assert refusal("\n".join(lines)).endswith(": expected text that is not empty, got ''")


def test_what_a_mistake_is_made_of() -> None:
    """For programs: the parts of the message, and the word that was meant by itself."""
    with pytest.raises(RecipeError) as caught:
        load(MINIMAL + "lora: {rnk: 3, dropout: 2}\ntraining: {optimizer: lion_8bits}\nseed: 3\n")
    at = [Position("recipes/r.yaml", *place) for place in ((5, 8), (5, 25), (6, 23), (7, 1))]
    optimizers = "adamw_torch, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit, lion_8bit or paged_lion_8bit"
    assert caught.value.mistakes == (
        Mistake(at[0], "lora.rnk", "unknown key; did you mean `rank`?", "lora.rank", LORA.strip()),
        Mistake(at[1], "lora.dropout", "expected a number from 0 to below 1, got 2"),
        Mistake(at[2], "training.optimizer",
                f"expected {optimizers}, got 'lion_8bits'; did you mean `lion_8bit`?", "lion_8bit"),
        Mistake(at[3], "seed", "`seed` belongs under `training`", "training.seed"),
    )  # fmt: skip


def messages(told: str) -> list[str]:
    """The lines that tell of mistakes, without the lists of what is allowed."""
    return [line.removeprefix("r.yaml:") for line in told.splitlines() if not line.startswith(" ")]


def test_what_is_moved_is_looked_at_again() -> None:
    """Sections inside others, with their own keys wrong: told as what they are."""
    text = MINIMAL + "training: {lora: {rnk: 8}, dataset: {trian: x}}\n"
    assert messages(refusal(text)) == [
        "5:12: training.lora: `lora` belongs at the top level",
        "5:19: lora.rnk: unknown key; did you mean `rank`?",
        "5:28: training.dataset: `dataset` belongs at the top level",
        "5:38: dataset.trian: unknown key; did you mean `train`?",
    ]


def test_a_guess_is_not_acted_upon() -> None:
    """What is only alike is suggested, and no further mistakes are made up from it."""
    assert messages(refusal(MINIMAL + "training: {total_steps: x}\n")) == [
        "5:12: training.total_steps: unknown key; did you mean `eval_steps`?"
    ]
    assert messages(refusal(MINIMAL + "version: 5\n")) == ["5:1: version: unknown key; did you mean `revision`?"]


def test_rows_by_other_names() -> None:
    assert messages(refusal("base_model: a/b\noutput_dir: o\ndataset: {path: t.csv, test: v.csv}\n")) == [
        "3:11: dataset.path: unknown key; did you mean `train`?",
        "3:24: dataset.test: unknown key; did you mean `validation`?",
    ]


def test_what_stands_in_a_section_given_twice_is_looked_at() -> None:
    """Also if another fault keeps the file from being read as a whole."""
    text = MINIMAL + "lora: {rank: 1}\nlora: {rnk: x}\n"
    told = ["6:1: lora: `lora` is given twice (first on line 5); leave one out"]
    assert messages(refusal(text)) == [*told, "6:8: lora.rnk: unknown key; did you mean `rank`?"]
    assert messages(refusal(text + "training:\n\tseed: 4\n")) == [
        *told,
        "8:1: not valid YAML: a tab; YAML takes spaces only",
    ]


def test_pairs_are_told_beside_a_fault() -> None:
    """Only what is missing may be hidden by a fault; what is there twice is there."""
    text = MINIMAL + "training: {max_steps: 5, num_train_epochs: 2, eval_steps: 5}\nlora:\n\trank: 8\n"
    assert messages(refusal(text)) == [
        "5:26: training.num_train_epochs: excludes `max_steps` (line 5): give one of the two",
        "7:1: not valid YAML: a tab; YAML takes spaces only",
    ]


def test_a_value_behind_an_anchor_is_told_where_it_is_used() -> None:
    assert messages(refusal(MINIMAL + "lora: {rank: &r 0}\ntraining:\n  max_steps: *r\n")) == [
        "5:14: lora.rank: expected a whole number from 1 to 65,536, got 0",
        "7:14: training.max_steps: expected a whole number above 0, or null, got 0",
    ]


@pytest.mark.parametrize("field", ["train_split: nope", "validation_split: test"])
def test_a_split_of_a_local_file(field: str) -> None:
    """It would be passed over."""
    text = f"base_model: a/b\noutput_dir: o\ndataset:\n  train: /d/t.csv\n  validation: /d/v.csv\n  {field}\n"
    name = field.partition("_")[0]
    assert messages(refusal(text)) == [
        f"6:3: dataset.{name}_split: is for datasets of the hub, and `{name}` is a local path: leave it out"
    ]


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "text",
    [
        "? " + "x" * 900_000 + "\n: 1\n",
        "".join(f"key_{number}: 1\n" for number in range(4900)),
        '{"prompt": "a", "completion": "b"}\n' * 8000,
        "line of prose\n" * 3000 + "a: b: c\n",
        f"training: {{optimizer: {'x' * 900_000}}}\n",
        f"lora: {{target_modules: {'x' * 900_000}}}\n",
        f"revision: '{'${' * 200_000}'\n",
        f"output_dir: '{'${' * 200_000}'\n",
        f"extends: {'x/' * 400_000}\n",
        f"base_model: {'/x' * 400_000}\n",
    ],
    ids=lambda text: text[:20],
)
def test_what_could_take_long_does_not(text: str) -> None:
    """Long words, many keys, many faults, long paths and references: refused, each in a second or so. (The timeout is a
    net for what took minutes, not a measurement.)"""
    assert len(refusal(text, must_exist=True).splitlines()) < 200
