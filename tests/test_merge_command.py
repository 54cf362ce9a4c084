"""`qlora merge` as a person or a script meets it: what it prints and where, how it exits, and no traceback."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from qlora_cli.cli import app
from qlora_cli.commands.stopping import stopping
from qlora_cli.merge_view import MergeView
from qlora_cli.merging import merge as merging
from qlora_cli.merging.events import Compared, Comparing, Event, Merged, Planned, Writing, Written
from qlora_cli.merging.fidelity.measures import Fidelity, Reference
from qlora_cli.merging.report import MergeReport, Verification
from qlora_cli.training.events import Notice, Stage
from tests.support.cli import ENVIRONMENT, offline_libraries, process
from tests.support.merge_runs import merge_run, save_adapter
from tests.support.peft_adapters import edit_tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its base, and another adapter over that; nobody writes into them."""
    folder = tmp_path_factory.mktemp("merge")
    merge_run(folder)
    save_adapter(folder / "llama", folder / "peft", seed=2)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, with links to what was made."""
    for name in ("run", "llama", "peft"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    with offline_libraries(monkeypatch):
        yield tmp_path


def merge(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["merge", *arguments])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result


def refused(*arguments: str, code: int = 2) -> str:
    """The message of a merge that fails as it should, whole on stderr; there is no output."""
    before = sorted(Path.cwd().rglob("*"))
    result = merge(*arguments)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert sorted(Path.cwd().rglob("*")) == before
    return result.stderr.removeprefix("error: ").removesuffix("\n")


def misused(*arguments: str) -> str:
    """What is said of options that cannot be read, in words with single spaces."""
    result = merge(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Usage: ")
    assert not Path("out").exists()
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


# ------------------------------------------------------------------------------------------- What it prints


def test_a_whole_merge(here: Path, made: Path) -> None:
    """Every line, from the adapter to where the model is; nothing on stderr; exit code 0."""
    result = merge("run", "--output", "out", "--verify-rows", "4", "--device", "cpu")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(Path("out/merge_report.json").read_text())
    found = report["verification"]
    chosen = report["merged_onto"]
    size = sum(file.stat().st_size for file in Path("out").iterdir())
    lines = result.stdout.splitlines()
    assert lines[:10] == [
        "         reading the adapter and the headers of the base's files …",
        "adapter  run: LoRA on 4 weights",
        f"base     {made}/llama; in training NF4, double quantisation, float32 compute",
        f"write    the base's original weights + adapter: {Path('out/model.safetensors').stat().st_size / 1e3:.1f} kB",
        "write    the 4-bit weights of training, dequantised, + adapter: "
        f"{Path('out/model.safetensors').stat().st_size / 1e3:.1f} kB",
        "         reading the rows to compare on …",
        "compare  the trained model: the base as it was in training, the adapter beside it",
        "compare  what was written, the base's original weights + adapter",
        "compare  what was written, the 4-bit weights of training, dequantised, + adapter",
        "compared with the trained model, on 4 of 8 validation rows of the run: "
        f"{found['merges']['original']['tokens']} tokens",
    ]
    assert lines[10].split() == ["trained", "base", "original", "dequantized"]
    table = {line[:21].strip(): line[21:].split() for line in lines[11:19]}
    merges = found["merges"].values()
    assert table == {
        "loss per token": [
            f"{loss:.4f}" for loss in (found["trained_loss"], found["base_loss"], *(m["loss"] for m in merges))
        ],
        "loss difference": [
            f"{found['base_loss'] - found['trained_loss']:+.4f}",
            *(f"{m['loss_difference']:+.4f}".replace("-0.0000", "+0.0000") for m in merges),
        ],
        "standard error": [f"{m['loss_difference_error']:.4f}" for m in merges],
        "KL divergence, mean": table["KL divergence, mean"],
        "KL divergence, most": table["KL divergence, most"],
        "same likeliest token": [f"{m['top1_agreement']:.1%}" for m in merges],
        "effect of training": ["0.0%", *(f"{m['effect_kept']:.1%}" for m in merges)],
        "farthest layer off by": [f"{m['worst_layer_error']:.2%}" for m in merges],
    }
    told = [found["mean_kl_of_base"], *(m["mean_kl"] for m in merges)]
    assert [float(cell) for cell in table["KL divergence, mean"]] == pytest.approx(told, rel=0.05, abs=1e-6)
    assert lines[19].startswith("         KL divergence: how far a model's probabilities for the next token are from ")
    assert lines[20].startswith("         farthest layer: model.layers.")
    assert lines[21:23] == [
        f"verdict  {found['reason']}",
        f"         {found['findings'][chosen]}",
    ]
    assert re.fullmatch(rf"done     8 files, {size / 1e3:.1f} kB, in \d+ s", lines[23])
    assert lines[24:] == [
        f"model    out/  (merged onto the {chosen} weights)",
        "         how it was made and measured is told there, in README.md and merge_report.json",
    ]


def test_a_merge_that_is_not_verified(here: Path) -> None:
    """Onto the weights of training, and it is said that nothing was measured; the type and the files are as asked."""
    result = merge("run", "--output", "out", "--no-verify", "--dtype", "bfloat16", "--max-shard-size", "100kB")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[4] == "compared with nothing, as --no-verify says: whether it is the trained model is not known"
    assert lines[-2] == "model    out/  (merged onto the dequantized weights)"
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"
    assert Path("out/model.safetensors.index.json").is_file()
    assert not Path("out/model.safetensors").exists()


def test_down_again(here: Path) -> None:
    """A 4-bit checkpoint has a column of its own, and its name says so."""
    options = ("--quantize", "nf4", "--trained-base", "nf4", "--base", "original", "--verify-rows", "2")
    result = merge("peft", "--output", "out", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert any(line.startswith("write    ") and "in 4 bits" in line for line in lines)
    assert any(line.startswith("compare  what was written, ") and "in 4 bits" in line for line in lines)
    heads = lines.index("                       trained     base  original  original")
    assert lines[heads + 1].split() == ["in", "NF4"]
    stored = "merged onto the original weights, stored in NF4 with double quantisation"
    assert f"model    out/  ({stored})" in lines
    assert json.loads(Path("out/config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def test_adapters_added_up(here: Path, made: Path) -> None:
    """One adapter, of which a line is said."""
    result = merge("--into-adapter", "run", "--into-adapter", "peft", "--weights", "0.6,-0.4", "--output", "sum")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == (
        f"adapter  sum/  (PEFT format): rank 8 on 4 layers, 5,120 parameters, over {made}/llama"
    )
    assert Path("sum/adapter_model.safetensors").is_file()
    assert merge("sum", "--output", "out", "--no-verify").exit_code == 0


# ------------------------------------------------------------------------------------------- Before torch


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        [],
        ["run", "--output", "full"],
        ["run", "--output", "new", "--max-shard-size", "5G"],
        ["--into-adapter", "run", "--weights", "x", "--output", "new"],
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_what_needs_no_torch_imports_none(arguments: list[str], tmp_path: Path) -> None:
    """Help is there at once, and so is what is wrong with the output and with the numbers."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    done = process("merge", *arguments, folder=tmp_path, spy=True)
    assert done.stderr.endswith("IMPORTED ['typer']\n")
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if arguments == ["--help"] else 2)


def test_help() -> None:
    """Every option, and the exit codes."""
    text = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["merge", "--help"]).stdout
    for word in (
        "ADAPTER", "--output", "--base", "--dtype", "--quantize", "--max-shard-size", "--device", "--no-verify",
        "--verify-rows", "--base-model", "--revision", "--trained-base", "--allow-unchanged", "--into-adapter",
        "--weights", "130 interrupted", "there is no DIR", "auto|original|dequantized",
    ):  # fmt: skip
        assert word in text


# ------------------------------------------------------------------------------------------- Options


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run"], "Missing option '--output'."),
        (["--output", "out"], "expected an ADAPTER to merge, or --into-adapter for each of several to add up"),
        (["run", "--output", "out", "--weights", "1"], "--weights are those of several --into-adapter"),
        (["run", "--output", "out", "--base", "both"], "'--base': .*'both' is not one of 'auto', 'original', 'deq"),
        (["run", "--output", "out", "--dtype", "int8"], "'--dtype': .*'int8' is not one of 'bfloat16', 'float16'"),
        (["run", "--output", "out", "--quantize", "int4"], "'--quantize': .*'int4' is not one of 'nf4', 'fp4'"),
        (["run", "--output", "out", "--device", "tpu"], "'--device': .*'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["run", "--output", "out", "--trained-base", "8bit"], "'--trained-base': .*'8bit' is not one of '16bit', "),
        (["run", "--output", "out", "--verify-rows", "0"], "Invalid value for '--verify-rows': "),
        (["run", "--output", "out", "--verify-rows", "few"], "Invalid value for '--verify-rows': "),
        (["run", "--output", "out", "--verfy"], "No such option"),
        (["run", "peft", "--output", "out"], "unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_read(here: Path, arguments: list[str], told: str) -> None:
    """The usage, and what was expected."""
    assert re.search(told, misused(*arguments))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--max-shard-size", "5G"], "--max-shard-size: expected a size such as 5GB, 500MB or 2GiB, got '5G'"),
        (["--max-shard-size", "0"], "--max-shard-size: expected a size such as 5GB, 500MB or 2GiB, got '0'"),
        (["--trained-base", "fp4"], "--trained-base: fp4 was said, but the run's recipe has NF4, double quantisation"),
        (["--base-model", "nowhere"], "base_model: the model of nowhere (revision main) cannot be had"),
        (["--base-model", "./nowhere"], "--base-model: the base model nowhere: there is no such folder"),
        (["--base-model", "a b"], "--base-model: the base model 'a b' is no folder that is there, and no hub name"),
        (["--revision", "main"], "--revision: is for models of the hub, and the base model is a local folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_followed(here: Path, arguments: list[str], told: str) -> None:
    """One line that says which, and why."""
    assert refused("run", "--output", "out", "--no-verify", *arguments).startswith(told)


def test_a_base_that_there_is_none_of(here: Path) -> None:
    """An adapter over 16 bits has no 4-bit weights to be merged onto."""
    assert refused("peft", "--output", "out", "--base", "dequantized") == (
        "--base dequantized: no weight was in 4 bits while the adapter was trained (assumed, as nothing tells). Use "
        "--base original, or say how the base was stored with --trained-base"
    )


BOTH = ("--into-adapter", "run", "--into-adapter", "peft", "--output", "out")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--weights", "1"], "--weights: expected 2 numbers, one for each --into-adapter, got 1"),
        (["--weights", "1,2,3"], "--weights: expected 2 numbers, one for each --into-adapter, got 3"),
        *(
            (["--weights", text], f"--weights: expected numbers with commas between them, as in 0.6,0.4, got {text!r}")
            for text in ("", "1,", "a,b", "1;2", "nan,1", "inf,1")
        ),
        (["--weights", "0,1"], "--weights: got 0 for run: leave that adapter out, for it adds nothing"),
        (["peft"], "ADAPTER: --into-adapter adds adapters up, and has no use for this"),
        (
            ["--no-verify", "--base", "auto", "--dtype", "float16"],
            "--no-verify, --base, --dtype: --into-adapter adds adapters up, and has no use for this",
        ),
        (["--quantize", "nf4"], "--quantize: --into-adapter adds adapters up, and has no use for this"),
        (["--revision", "x"], "--revision: with --into-adapter, it is that of a --base-model, which was not given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_adapters_to_be_added_up(here: Path, arguments: list[str], told: str) -> None:
    """Of what does not go with it all is named, also where it says what is so anyway."""
    assert refused(*BOTH, *arguments) == told


def test_one_weight(here: Path) -> None:
    assert refused("--into-adapter", "run", "--output", "out", "--weights", "1,2") == (
        "--weights: expected 1 number, one for each --into-adapter, got 2"
    )


# ------------------------------------------------------------------------------------------- Wrong paths


def test_what_is_no_adapter(here: Path) -> None:
    """Each is told for what it is, with what to give instead."""
    (here / "pickled").mkdir()
    (here / "pickled/adapter_config.json").write_text("{}")
    (here / "pickled/adapter_model.bin").touch()
    (here / "bare").mkdir()
    (here / "file.txt").touch()
    for path, told in (
        ("nowhere", "nowhere: there is no such folder"),
        ("rum", "rum: there is no such folder; did you mean run?"),
        (
            "run/recipe.yaml",
            "run/recipe.yaml is a recipe; expected an adapter: the folder of the run, which it says is",
        ),
        ("llama", "llama is a whole model, not an adapter. Give the adapter here, and the model it was trained over"),
        ("file.txt", "file.txt is a file; expected a run folder, a checkpoint or an adapter folder"),
        ("run/adapter/adapter_model.safetensors", "run/adapter/adapter_model.safetensors is a file of an adapter; "),
        ("bare", "bare: no adapter in this folder. Expected a run folder (adapter/ or checkpoints/ in it), "),
        ("pickled", "pickled: has its weights only as pickle (adapter_model.bin), which can run code when read"),
        ("x" * 300, f"{here}/{'x' * 300}: cannot be read: File name too long"),
    ):
        assert refused(path, "--output", "out").startswith(told)
        assert told.split(" ")[0] in refused("--into-adapter", path, "--output", "out")


def test_an_output_in_the_way(here: Path) -> None:
    """The adapter's own folder, say."""
    told = "is not empty. Name another folder, or delete it: nothing is ever written over"
    assert refused("run", "--output", "run/adapter").endswith(told)
    assert refused(*BOTH[:-1], "peft").endswith(told)


# ------------------------------------------------------------------------------------------- Stopped, failed


def test_a_merge_that_fails(here: Path) -> None:
    """Exit code 1 for one that was begun: here one that would be the base."""
    untrained = save_adapter(here / "llama", here / "untrained", seed=3)
    edit_tensors(untrained, **{"model.layers.0.mlp.down_proj.lora_B.weight": torch.zeros(64, 4)})
    told = refused("untrained", "--output", "out", code=1)
    assert "These weights would not change by a bit, 1 in all:\n  model.layers.0.mlp.down_proj.weight\n" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_stopped(here: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """Ctrl-C, or from outside, while it writes: exit code 130, nothing is left, and the signal means what it did."""
    before = signal.getsignal(number)
    monkeypatch.setattr(merging, "carry_over", lambda *_, **__: signal.raise_signal(number))
    assert refused("run", "--output", "out", "--no-verify", code=130) == "stopped; nothing was written"
    assert signal.getsignal(number) == before


def test_stopped_in_an_import(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which makes another error of it: transformers does."""

    def break_off(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ModuleNotFoundError("Could not import module") from None

    monkeypatch.setattr(merging, "carry_over", break_off)
    assert refused("run", "--output", "out", "--no-verify", code=130) == "stopped; nothing was written"


def test_a_fault_of_our_own_is_not_hidden(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a traceback to be reported; and there is no output all the same."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(merging, "carry_over", fail)
    result = CliRunner().invoke(app, ["merge", "run", "--output", "out", "--no-verify"])
    assert isinstance(result.exception, ZeroDivisionError)
    assert not Path("out").exists()


def test_stopped_too_late(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the model is in its place, that is said."""

    def stop(view: MergeView, event: Event) -> None:
        if isinstance(event, Merged):
            raise KeyboardInterrupt

    monkeypatch.setattr(MergeView, "__call__", stop)
    result = merge("run", "--output", "out", "--no-verify")
    assert (result.exit_code, result.stderr) == (130, "error: stopped; out is whole\n")
    assert Path("out/model.safetensors").is_file()


def test_a_hangup_that_is_ignored_stays_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        real: Callable[..., object] = merging.carry_over

        def hang_up(*arguments: object, **options: object) -> object:
            signal.raise_signal(signal.SIGHUP)
            return real(*arguments, **options)

        monkeypatch.setattr(merging, "carry_over", hang_up)
        assert merge("run", "--output", "out", "--no-verify").exit_code == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_process_that_is_stopped(here: Path) -> None:
    """SIGTERM once it writes: one line on stderr, exit code 130, nothing left."""
    before = sorted(here.iterdir())
    command = [sys.executable, "-m", "qlora_cli", "merge", "run", "--output", "out", "--device", "cpu"]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert any(line.startswith("write ") for line in running.stdout)
        running.terminate()
        _, stderr = running.communicate(timeout=60)
    assert (running.returncode, stderr) == (130, "error: stopped; nothing was written\n")
    assert sorted(here.iterdir()) == before


def test_what_is_asked_of_the_hub_is_known_before_its_client_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would ask a hub that cannot be reached, six times a file: the view is imported after that."""
    done = subprocess.run(
        [
            sys.executable, "-c",
            "import sys\nfrom pathlib import Path\n"
            "from qlora_cli.commands import libraries, merge\n"
            "def look(*_, **__):\n    print(sorted({'torch', 'huggingface_hub', 'transformers'} & {*sys.modules}))\n"
            "    raise KeyboardInterrupt\n"
            "libraries.set_up_libraries = look\n"
            "merge.merge(merge.MergeRequest(Path('a'), Path('b')))\n"
            "merge.combine([Path('a')], None, Path('b'), base_model=None, revision=None, given={})\n",
        ],
        env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "[]\n[]\n"


def test_in_a_thread_no_signal_is_touched() -> None:
    """Python has no way to: who calls it there stops it in a way of his own."""
    ran = []

    def run() -> None:
        with stopping():
            ran.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ran == [True]


# ------------------------------------------------------------------------------------------- On a terminal

PLANNED = Planned("runs/x", "LoRA on 210 weights", "org/base", "NF4", ("original", "dequantized"))
LOSSES = {"loss": 1.5, "trained_loss": 1.5, "loss_difference": 0.0, "loss_difference_error": 0.01}
FIDELITY = Fidelity(
    2, 270, 270, "kl", 0.0794, 1.0, 0.907, 0.958, 0.012, **LOSSES, worst_layer="model.layers.29", worst_layer_error=0.28
)
REFERENCE = Reference((), 270, 270, 1.16, 25.3, 1.5, 2.5, True)


def report(quantized: bool = True) -> MergeReport:
    found = Verification(
        rows="64 rows",
        held_out=True,
        reference=REFERENCE,
        merges={"original": FIDELITY, "dequantized": FIDELITY},
        quantized={"original": FIDELITY, "dequantized": FIDELITY} if quantized else {},
        refused={},
        findings={"original": "the merged model has 96% of what the adapter changed, and this is a sentence of 90"},
        winner="original",
        reason="original has the lower held-out loss, which is a sentence that is longer than eighty letters are",
    )
    form = "NF4 with double quantisation" if quantized else None
    return MergeReport({}, {}, "NF4", "original", None, "LoRA", found, form)


EVERY: tuple[Event, ...] = (
    Stage("reading"),
    Notice("this is to be known"),
    PLANNED,
    Writing("original", 200_000_000),
    Written(50_000_000),
    Written(150_000_000),
    Comparing("trained", 32),
    Compared(8),
    Compared(32),
    Merged(Path("/models/out"), 8, 270_000_000, 12.3, report()),
)


def shown(*events: Event, terminal: bool = False, width: int = 80) -> str:
    file = StringIO()
    # As make_console makes it.
    console = Console(file=file, force_terminal=terminal, width=width, highlight=False, soft_wrap=True, emoji=False)
    with MergeView(console) as view:
        for event in events:
            view(event)
    return file.getvalue()


def test_a_log_has_no_control_codes_and_no_bar() -> None:
    """Each line whole, however long it is."""
    text = shown(*EVERY)
    assert set(text) - {"\n"} == {character for character in text if character.isprintable()}
    assert "━" not in text
    assert f"verdict  {report().verification.reason}\n" in text  # type: ignore[union-attr]
    assert text == shown(*EVERY, width=200)


def test_a_terminal_has_a_bar_with_bytes_and_time_left() -> None:
    """In bytes while it writes, in rows while it compares; gone when that is done."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(*EVERY, terminal=True))
    assert "200.0/200.0 MB 0:00:00" in plain
    assert "32/32 rows 0:00:00" in plain
    during = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(*EVERY[:5], terminal=True))
    assert re.search(r"━ 50\.0/200\.0 MB (\d:\d\d:\d\d|-:--:--)", during)
    before = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(*EVERY[:4], terminal=True))
    assert "0.0/200.0 MB -:--:--" in before


@pytest.mark.parametrize("width", [80, 200])
def test_nothing_is_cut_or_broken_on_a_terminal(width: int) -> None:
    """No line is wider than the terminal, none ends within a word, and no number is missing."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(*EVERY, terminal=True, width=width))
    lines = [line for part in plain.split("\n") for line in part.split("\r")]
    assert max(map(len, lines)) <= width
    assert "…" not in plain.replace("reading …", "")
    words = " ".join(plain.split())
    assert report().verification.reason in words  # type: ignore[union-attr]
    assert "merged model has 96% of what the adapter changed, and this is a sentence of 90" in words
    heads = next(line for line in lines if line.split()[:2] == ["trained", "base"])
    assert heads.split() == ["trained", "base", "original", "dequant.", "original", "dequant."]
    assert lines[lines.index(heads) + 1].split() == ["in", "NF4", "in", "NF4"]
    table = lines[lines.index(heads) + 2 :][:8]
    assert [line[:21].rstrip() for line in table] == [
        "loss per token",
        "loss difference",
        "  standard error",
        "KL divergence, mean",
        "KL divergence, most",
        "same likeliest token",
        "effect of training",
        "farthest layer off by",
    ]
    # Every column ends where its head does.
    ends = [match.end() for match in re.finditer(r"\S+", heads)]
    for line in table:
        assert {match.end() for match in re.finditer(r"\S+", line[21:])} <= {end - 21 for end in ends}


def test_what_was_not_measured_has_no_row() -> None:
    """A model without a head has no losses and no tokens; what there is has another name."""
    headless = Fidelity(2, 9, 9, "squared_distance", 0.1, 0.2, None, 0.9, 0.1, None, None, None, None, None, None)
    found = Verification("24 prompts", False, Reference((), 9, 9, 1.0, 2.0, None, None, False), {"original": headless},
                         {}, {}, {}, "original", "the only one")  # fmt: skip
    made = MergeReport({}, {}, "16 bits", "original", None, "LoRA", found)
    lines = shown(Merged(Path("out"), 8, 500, 1.0, made)).splitlines()
    assert lines[:7] == [
        "compared with the trained model, on 24 prompts: 9 tokens",
        "                    base  original",
        "distance, mean      1.00     0.100",
        "distance, most      2.00     0.200",
        "effect of training  0.0%     90.0%",
        "         distance: how far what a model gives for a token is from what the trained one gives, squared and "
        "relative to that; 0 is no difference, and the base's is what training has changed",
        "verdict  the only one",
    ]
