"""All checks, one after the other; each is told as it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence

from qlora_cli.errors import Interrupted, QloraError, RequestError
from qlora_cli.selftest.accumulation import check_accumulation
from qlora_cli.selftest.adapter_files import check_adapter_files
from qlora_cli.selftest.events import Begun, Check, Checking, Listener, Report, Result
from qlora_cli.selftest.four_bits import check_four_bits
from qlora_cli.selftest.killed import check_killed
from qlora_cli.selftest.packed import check_packed
from qlora_cli.selftest.same_seed import check_same_seed
from qlora_cli.selftest.workbench import Workbench, workbench
from qlora_cli.training.devices import make_accelerator
from qlora_cli.training.environment import hardware, versions

# Nothing was measured, so what a failure would mean must not be said: it sends people after what may be in order.
_NOT_KNOWN = (
    "It could not be carried out, so whether this holds for your runs is not known: mend that and run the self-test "
    "again."
)
CHECKS = (
    Check(
        "same_seed",
        "same seed, same bits",
        "The same recipe does not give the same adapter twice on this device: results cannot be reproduced to the bit.",
        check_same_seed,
    ),
    Check(
        "killed_and_resumed",
        "killed and resumed, same bits",
        "A run that is stopped and resumed on this device will not end as it would have ended without.",
        check_killed,
    ),
    Check(
        "accumulation",
        "accumulation: 1×4 = 4×1",  # noqa: RUF001
        "Smaller batches with more accumulation are not the same training here: a recipe that is changed to save "
        "memory learns something else.",
        check_accumulation,
    ),
    Check(
        "packing",
        "packed = unpacked",
        "Rows in one pack disturb each other, or are weighed wrongly: leave dataset.packing at false here.",
        check_packed,
    ),
    Check(
        "adapter_files",
        "adapter saved = loaded",
        "What is in the adapter folder is not the adapter that was trained: do not trust adapters written here.",
        check_adapter_files,
    ),
    Check(
        "four_bits",
        "NF4 and FP4 round trip",
        "bitsandbytes does not store weights in 4 bits as it should here: the base that is trained over is a wrong "
        "one. Try other versions of bitsandbytes and torch, or set quantization.bits to 16.",
        check_four_bits,
    ),
)


def run_selftest(
    device: str = "auto", *, checks: Sequence[Check] | None = None, listeners: Sequence[Listener] = ()
) -> Report:
    """Check everything that this tool promises on a device, in a temporary folder that is gone afterwards.

    Args:
        device: auto, cpu or cuda.
        checks: which; None makes all.
        listeners: told what is checked and what came of it.

    Raises:
        DeviceError: if the device is not there.
        RequestError: if there are several processes.
        KeyboardInterrupt: if it is ended from outside.
    """
    start = time.monotonic()
    accelerator = make_accelerator(device, "--device")
    if accelerator.num_processes > 1:
        raise RequestError(
            f"qlora selftest: expected one process, got {accelerator.num_processes}. Start it without accelerate launch"
        )
    on = accelerator.device
    begun = Begun(on.type, hardware(on, 1), versions())

    def emit(event: Begun | Checking | Result) -> None:
        for listener in listeners:
            listener(event)

    emit(begun)
    results = []
    with workbench(on) as bench:
        for check in CHECKS if checks is None else checks:
            emit(Checking(check.title))
            results.append(_result(check, bench))
            emit(results[-1])
    return Report(begun, tuple(results), time.monotonic() - start)


def _result(check: Check, bench: Workbench) -> Result:
    """What came of a check; one that cannot be carried out keeps no other from being made."""
    start = time.monotonic()
    try:
        measured = check.measure(bench)
    except Interrupted:  # what a run makes of the first Ctrl-C; its folder is about to go, so there is no going on
        raise KeyboardInterrupt from None
    except Exception as error:
        seconds = time.monotonic() - start
        detail = str(error) if isinstance(error, QloraError) else f"{type(error).__name__}: {error}"
        return Result(check.name, check.title, "error", {}, {}, seconds, detail, _NOT_KNOWN)
    return Result(
        check.name,
        check.title,
        "passed" if measured.passed else "failed",
        measured.figure,
        measured.bound,
        time.monotonic() - start,
        measured.detail,
        None if measured.passed else check.meaning,
    )
