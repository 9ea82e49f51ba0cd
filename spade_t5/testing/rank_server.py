"""Forks groups of ranks from one process that has imported everything: the other side of `spade_t5.testing.ranks`.

Every line of the standard input is a request in JSON. The server forks a launcher, which forks the ranks, answers with one line (the process
ids) and then behaves as torchrun does: it passes signals on, ends the others when a rank fails, and takes its ranks with it when it is
killed. The server ends with its input, and everything that it forked ends with the server.
"""

import ctypes
import gc
import importlib
import importlib.util
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

PRELOADED = (
    "torch.utils.tensorboard",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "transformers",
    "deepspeed",
    "spade_t5.launch.cli",
    "spade_t5.launch.commands.pretrain",
    "spade_t5.launch.commands.finetune",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pandas",
    # what DeepSpeed imports when an engine is made
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
"""Modules that a rank would otherwise import in seconds; those that are not installed are left out."""
EXIT_CODES = "exit_codes.json"
EXIT_STOPPED = 75
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def serve() -> None:
    """Answers requests until the input ends."""
    for module in PRELOADED:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("spade_t5"):
                raise
    gc.freeze()
    # Ranks that lose their launcher become children of this process, which leaves no dead ones behind.
    _process_control(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            _launch(json.loads(line))


def _launch(request: dict[str, Any]) -> NoReturn:
    """The life of a launcher."""
    code = 1
    try:
        _process_control(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ranks = []
        for rank in range(request["num_ranks"]):
            pid = os.fork()
            if pid == 0:
                _run_rank(request, rank)
            ranks.append(pid)
        os.write(1, (json.dumps({"launcher": os.getpid(), "ranks": ranks}) + "\n").encode())
        logs = Path(request["log_dir"])
        _redirect(logs / "launcher.out", logs / "launcher.err")
        code = _supervise(ranks, logs, request["grace_seconds"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _supervise(ranks: list[int], logs: Path, grace_seconds: float) -> int:
    """Waits for all ranks, ends the others once one has failed, and returns the first failure's code."""
    codes: dict[int, int] = {}
    first_failure = 0

    def send(number: int) -> None:
        for pid in ranks:
            if pid not in codes:
                os.kill(pid, number)

    def pass_on(number: int, frame: FrameType | None) -> None:
        send(number)

    def kill_rest(number: int, frame: FrameType | None) -> None:
        send(signal.SIGKILL)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGUSR1, pass_on)
    signal.signal(signal.SIGALRM, kill_rest)
    while len(codes) < len(ranks):
        # Reaped only once it is noted as ended: no signal goes to a number that the system has given away again.
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        status = ended.si_status
        codes[ended.si_pid] = status if ended.si_code == os.CLD_EXITED else -status
        os.waitpid(ended.si_pid, 0)
        code = codes[ended.si_pid]
        if code not in (0, EXIT_STOPPED) and first_failure in (0, EXIT_STOPPED):
            first_failure = code
            send(signal.SIGTERM)
            signal.setitimer(signal.ITIMER_REAL, grace_seconds)
        first_failure = first_failure or code
    (logs / EXIT_CODES).write_text(json.dumps([codes[pid] for pid in ranks]))
    return first_failure if first_failure >= 0 else 128 - first_failure


def _run_rank(request: dict[str, Any], rank: int) -> NoReturn:
    """The life of a rank: the hook, then the command or the function."""
    code = 1
    try:
        _process_control(PR_SET_PDEATHSIG, signal.SIGKILL)
        logs = Path(request["log_dir"])
        _redirect(logs / f"rank-{rank}.out", logs / f"rank-{rank}.err")
        os.environ.clear()
        os.environ.update(request["env"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.chdir(request["cwd"])
        if request["hook"] is not None:
            _load(request["hook"])(**request["hook"]["arguments"])
        if request["argv"] is not None:
            code = importlib.import_module("spade_t5.launch.cli").main(request["argv"])
        else:
            result = _load(request["function"])(**request["function"]["arguments"])
            (logs / f"rank-{rank}.json").write_text(json.dumps(result))
            code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _load(function: dict[str, Any]) -> Callable[..., Any]:
    """A function by the file it is in and its name, as test files are no importable modules."""
    spec = importlib.util.spec_from_file_location(f"_ranks_{Path(function['file']).stem}", function["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, function["name"])


def _redirect(out: Path, err: Path) -> None:
    """Takes the standard streams from those of the server to files."""
    sources = (
        os.open(os.devnull, os.O_RDONLY),
        *(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) for path in (out, err)),
    )
    for number, source in enumerate(sources):
        os.dup2(source, number)
        os.close(source)


def _process_control(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")
