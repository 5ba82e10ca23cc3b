"""Commands with wrong arguments, broken files, outputs that are somebody's, and interruptions in the middle."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from hf_unigd.cli import main as cli
from hf_unigd.cli.parser import CommandParser
from hf_unigd.data import RowError

from .command_table import Command, workplace
from .outcomes import Outcomes


SOMEBODYS = b"somebody's\n"
# Files of a model or an index of which each is cut. Those that transformers may do without are not among them.
CUT = (
    *("config.json", "adapter_config.json", "model.safetensors", "adapter_model.safetensors", "probe.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "processor_config.json", "index.json"),
)
# The commands that the bounded attack runs.
BOUNDED = ("kernels", "search", "index")


@dataclass
class Run:
    """What came of a command: its exit status, what it says for it, and whether its work was begun."""

    status: int
    message: str
    crash: str
    worked: bool

    @property
    def fault(self) -> str | None:
        """What is wrong with the way in which it ended, whatever it should have done."""
        if self.crash:
            return f"traceback: {self.crash}"
        if self.status and (not self.message or "\n" in self.message):
            return f"not one line: {self.message!r}"
        if "`--debug` shows where" in self.message and len(self.message) < 600:
            return f"not explained: {self.message}"
        return None


def drive(command: Command, argv: list[str], work: Callable | None = None) -> Run:
    """
    Runs a command in this process.

    Args:
        command: The command.
        argv: Its arguments.
        work: Stands in for the command's work.
    """
    owner, _, attribute = command.work.rpartition(".")
    owner = _import(owner)
    original, began = getattr(owner, attribute), []

    def begin(*args, **kwargs):
        began.append(True)
        return (work or original)(*args, **kwargs)

    printed, errors, message, crash, status = io.StringIO(), io.StringIO(), "", "", 0
    with (
        mock.patch.object(owner, attribute, begin),
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(printed),
    ):
        try:
            cli.main(argv)
        except SystemExit as end:
            status = 1 if isinstance(end.code, str) else end.code or 0
            message = end.code if isinstance(end.code, str) else ""
        except BaseException as error:
            crash = repr(error)[:300]
    if status and not message:
        # argparse prints its usage before the reason, and an interruption begins on a new line.
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("hf-unigd ")]
        message = "\n".join(lines) or _faults(printed.getvalue(), argv)
    if "Traceback (most recent" in errors.getvalue():
        crash = errors.getvalue()[-300:]
    return Run(status, message, crash, bool(began))


def _faults(printed: str, argv: list[str]) -> str:
    """The report of a command that finds faults, which is its answer, not an error."""
    return f"{argv[-1]}: faults" if "FAULT" in printed else ""


def _import(path: str):
    """A module, or a class in one."""
    try:
        return import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)


class Attacker:
    """Runs cases and keeps their outcomes."""

    def __init__(self, outcomes: Outcomes):
        self.outcomes = outcomes

    def judge(self, case: str, run: Run, fault: str | None = None) -> None:
        if fault := fault or run.fault:
            self.outcomes.wrong.append(f"{case}: {fault}")
        elif run.status == 0:
            self.outcomes.right += 1
        else:
            self.outcomes.refused += 1

    def refuses(self, case: str, command: Command, argv: list[str], *names: str, early: bool = False) -> None:
        """The command must refuse, with a message that has one of `names`, and, if `early`, before it works."""
        run = drive(command, argv)
        fault = None
        if run.status not in (1, 2) and not run.crash:
            fault = f"status {run.status} {run.message}"
        elif not any(" ".join(name.split()) in run.message for name in names):
            fault = f"names none of {names}: {run.message}"
        elif early and run.worked:
            fault = f"refused after it began: {run.message}"
        self.judge(case, run, run.fault or fault)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """An empty folder, which is also where commands run."""
    before = Path.cwd()
    with TemporaryDirectory() as folder:
        (Path(folder) / "here").mkdir()
        os.chdir(Path(folder) / "here")
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def _output(command: Command, folder: Path) -> Path | None:
    return folder / f"output{command.suffix}" if command.output else None


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- Files


def bad_paths(valid: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Names of nothing, or of something else than `valid`, a file or a folder."""
    suffix = valid.suffix
    yield "nothing", str(folder / f"nothing{suffix}")
    empty = folder / f"empty{suffix}"
    empty.touch()
    yield "an empty file", str(empty)
    garbage = folder / f"garbage{suffix}"
    garbage.write_bytes(bytes(range(128, 256)) * 8)
    yield "garbage", str(garbage)
    other = folder / f"folder{suffix}"
    other.mkdir()
    yield "an empty folder", str(other)
    cut = folder / f"cut{suffix}"
    if valid.is_dir():
        for name in sorted(file.name for file in valid.iterdir() if file.name in CUT or file.suffix == ".arrow"):
            shutil.rmtree(cut, ignore_errors=True)
            shutil.copytree(valid, cut)
            content = (valid / name).read_bytes()
            (cut / name).write_bytes(content[: len(content) // 2])
            yield f"a folder whose {name} is cut", str(cut)
    else:
        content = valid.read_bytes()
        cut.write_bytes(content[: len(content) // 2 + 3])
        yield "a file that is cut", str(cut)
    yield "a name that is too long", str(folder / ("x" * 300 + suffix))
    yield "a null character", str(folder / f"a\0b{suffix}")
    yield "a line break", str(folder / f"a\nb{suffix}")
    yield "a name that is not UTF-8", str(folder / f"a\udcffb{suffix}")


def attack_paths(attacker: Attacker, command: Command, bounded: bool) -> None:
    for name in command.paths[:1] if bounded else command.paths:
        with _scratch() as folder:
            for kind, path in bad_paths(Path(command.arguments[name]), folder):
                output = _output(command, folder)
                case = f"{command.name} --{name} {kind}"
                if any(fnmatch(f"{name} {kind}", way) for way in command.unread):
                    continue
                names = (name, path, Path(path.replace("\0", "")).name[:40])
                attacker.refuses(case, command, command.call(output, **{name: path}), *names)
                if output and output.exists():
                    attacker.outcomes.wrong.append(f"{case}: {output} was begun")
                    shutil.rmtree(output) if output.is_dir() else output.unlink()


# ---- Flags and YAML files


def attack_flags(attacker: Attacker, command: Command, bounded: bool) -> None:
    with _scratch() as folder:
        call = command.call(_output(command, folder))
        files = {
            "broken": (b"a: [", "broken.yaml"),
            "bytes": (b"a: \xff\xfe", "bytes.yaml"),
            "list": (b"- a\n- b\n", "list.yaml"),
            "empty": (b"", "empty.yaml"),
            "unknown": (b"no_such_key: 1\n", "no_such_key"),
        }
        flags = [(["--no_such_flag", "1"], "no_such_flag"), (["--config"], "--config")]
        for name, (content, named) in files.items():
            (folder / f"{name}.yaml").write_bytes(content)
            flags.append((["--config", str(folder / f"{name}.yaml")], named))
        flags += [
            (["--config", str(folder / "nowhere.yaml")], "nowhere.yaml"),
            (["--config", str(folder)], str(folder)),
        ]
        for words, named in flags:
            case = f"{command.name} {' '.join(Path(word).name for word in words)}"
            attacker.refuses(case, command, [*call, *words], named, early=True)


# ---- Numbers


def numbers(command: Command) -> list[str]:
    """The arguments of a command that are whole numbers."""
    found: list[str] = []

    class StopParsingError(Exception):
        pass

    def look(parser, argv):
        for cls in parser.dataclass_types:
            hints = typing.get_type_hints(cls)
            for one in fields(cls):
                if one.init and int in (hints[one.name], *typing.get_args(hints[one.name])):
                    found.append(one.name)
        raise StopParsingError

    module = import_module(f"hf_unigd.cli.{command.name.replace('-', '_')}")
    with mock.patch.object(CommandParser, "parse", look), contextlib.suppress(StopParsingError):
        module.main([])
    return found


def attack_numbers(attacker: Attacker, command: Command, bounded: bool) -> None:
    stop = None if command.is_quick and not bounded else interrupt
    for name in numbers(command):
        for value in ("many", "0", "-1"):
            with _scratch() as folder:
                output = _output(command, folder)
                run = drive(command, command.call(output, **{name: value}), stop)
                fault = None
                if run.status in (1, 2) and name not in run.message:
                    fault = f"does not name it: {run.message}"
                elif run.status in (1, 2) and run.worked:
                    fault = f"refused after it began: {run.message}"
                elif value == "many" and run.status != 2:
                    fault = f"status {run.status}"
                elif run.status in (1, 2) and output and output.exists():
                    fault = f"{output} was begun"
                attacker.judge(f"{command.name} --{name} {value}", run, run.fault or fault)


# ---- Outputs


def attack_outputs(attacker: Attacker, command: Command, bounded: bool) -> None:
    """Outputs that cannot be written."""
    if not command.output:
        return
    suffix = command.suffix
    with _scratch() as folder:
        (folder / "file").touch()
        (folder / f"folder{suffix}").mkdir()
        outputs = {
            "below a file": folder / "file" / f"x{suffix}",
            "below /proc": Path(f"/proc/nowhere/x{suffix}"),
            "too long": folder / f"{'x' * 300}{suffix}",
            "a null character": f"{folder}/a\0b{suffix}",
        }
        if suffix:
            outputs |= {"a folder": folder / f"folder{suffix}", "no suffix": folder / "x"}
        else:
            outputs["a file"] = folder / "file"
        for kind, output in outputs.items():
            case = f"{command.name} --{command.output} {kind}"
            attacker.refuses(case, command, command.call(output), str(output), f"--{command.output}", early=True)
        if (folder / "file").read_bytes() or any((folder / f"folder{suffix}").iterdir()):
            attacker.outcomes.wrong.append(f"{command.name}: an output that was refused was written")


def attack_foreign_output(attacker: Attacker, command: Command, bounded: bool) -> None:
    """An output folder that is somebody's, where files may have the names of those that the command writes."""
    if not command.output:
        return
    names = list(command.writes)
    if command.is_quick:
        with _scratch() as folder:
            (folder / "output").mkdir()
            run = drive(command, command.call(folder / "output" / f"x{command.suffix}"))
            attacker.judge(f"{command.name}, a new output", run, f"{run.message}" if run.status else None)
            names = sorted(_snapshot(folder / "output"))
            names = names if command.suffix else [name.partition("/")[2] for name in names]
    tops = sorted({name.partition("/")[0] for name in names})
    groups = {"all of its names": names}
    if not bounded:
        groups |= {f"of the name {top}": [name for name in names if name.partition("/")[0] == top] for top in tops}
        groups["other names"] = []
    for kind, group in groups.items():
        with _scratch() as folder:
            theirs = folder / "output"
            for name in ("rows/data.jsonl", ".env", "notes.txt", "x.unfinished", "part-x/a", *group):
                (theirs / name).parent.mkdir(parents=True, exist_ok=True)
                (theirs / name).write_bytes(SOMEBODYS)
            before = _snapshot(folder)
            run = drive(
                command,
                command.call(theirs / f"x{command.suffix}" if command.suffix else theirs),
                _unless_quick(command),
            )
            after = _snapshot(folder)
            gone = sorted(name for name, content in before.items() if after.get(name) != content)
            fault = f"{', '.join(gone)} changed or gone" if gone else None
            if run.status in (1, 2) and after.keys() != before.keys():
                fault = f"refused after it wrote {', '.join(sorted(after.keys() - before.keys()))}"
            if command.suffix and group and not run.status:
                fault = "somebody's file was taken for its own"
            attacker.judge(f"{command.name}, a folder with files {kind}", run, run.fault or fault)


def _unless_quick(command: Command) -> Callable | None:
    return None if command.is_quick else interrupt


def attack_full_disk(attacker: Attacker, command: Command, bounded: bool) -> None:
    """What readers see, if the last step of writing fails: nothing."""
    # The checkpoints of `train` are another attack's, and LanceDB writes an index (tests/retrieval/test_writers.py).
    if not command.is_quick or not command.output or command.name in ("train", "index"):
        return
    with _scratch() as folder:
        with mock.patch.object(Path, "replace", side_effect=OSError(28, "No space left on device")):
            run = drive(command, command.call(_output(command, folder)))
        left = ", ".join(_snapshot(folder))
        fault = "written in place" if run.status == 0 else f"left {left}" if left else None
        attacker.judge(f"{command.name}, a full disk", run, run.fault or fault)


# ---- Interruptions and workers


def interrupt(*args, **kwargs):
    """Stands in for work, and is interrupted by Ctrl-C."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def attack_interruption(attacker: Attacker, command: Command, bounded: bool) -> None:
    with _scratch() as folder:
        run = drive(command, command.call(_output(command, folder)), interrupt)
        fault = None if run.status == 130 and "interrupted" in run.message else f"status {run.status} {run.message}"
        if not fault and ("kept" in run.message) != command.keeps:
            fault = f"does not say what is kept: {run.message}"
        attacker.judge(f"{command.name}, interrupted", run, run.fault or fault)


def attack_workers(attacker: Attacker, command: Command, bounded: bool) -> None:
    """A bad row has the same message, whether the main process or a worker reads it."""
    if command.name != "train":
        return
    messages = []
    for workers in ("0", "1"):
        with _scratch() as folder:
            rows = {"dataset_name": workplace()["bad.jsonl"], "check_rows": "off"}
            run = drive(command, command.call(_output(command, folder), **rows, dataloader_num_workers=workers))
            messages.append(run.message)
            attacker.judge(
                f"train, a bad row, {workers} workers", run, None if "Row 2 " in run.message else run.message
            )
    if messages[0] != messages[1]:
        attacker.outcomes.wrong.append(f"train: {messages[0]!r}, but of a worker {messages[1]!r}")


def attack_processes(attacker: Attacker, command: Command, bounded: bool) -> None:
    """What only a process of its own can show: Ctrl-C in the middle, and arguments that are not UTF-8."""
    if bounded or command.name not in ("train", "index"):
        return
    source = f"""import sys, time
from unittest import mock
from hf_unigd.cli.main import main
def work(*args, **kwargs):
    print("working", flush=True)
    time.sleep(60)
mock.patch({command.work!r}, work).start()
main(sys.argv[1:])"""
    with _scratch() as folder:
        start = [sys.executable, "-c", source, *command.call(_output(command, folder))]
        process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        lines = "\n".join(line for line in errors.splitlines() if line.startswith("hf-unigd"))
        run = Run(process.returncode, lines, errors if "Traceback" in errors else "", True)
        attacker.judge(f"{command.name}, SIGINT", run, None if process.returncode == 130 else errors)
        data = os.fsencode(folder / "x") + b"\xff.jsonl"
        call = [os.fsencode(word) for word in command.call(_output(command, folder), dataset_name="ROWS")]
        call[call.index(b"ROWS")] = data
        done = subprocess.run([sys.executable, "-m", "hf_unigd", *call], capture_output=True)
        errors = done.stderr.decode(errors="replace")
        lines = "\n".join(line for line in errors.splitlines() if line.startswith("hf-unigd"))
        run = Run(done.returncode, lines, errors if "Traceback" in errors else "", True)
        attacker.judge(
            f"{command.name}, not UTF-8", run, None if done.returncode == 1 else f"{done.returncode} {errors}"
        )


ATTACKS = (
    attack_paths,
    attack_flags,
    attack_numbers,
    attack_outputs,
    attack_foreign_output,
    attack_full_disk,
    attack_interruption,
    attack_workers,
    attack_processes,
)


def run(bounded: bool) -> Outcomes:
    """Every command of `COMMANDS` is attacked; one that the table does not have is wrong."""
    outcomes = Outcomes("commands")
    attacker = Attacker(outcomes)
    commands = workplace().commands
    outcomes.wrong += [
        f"{name} is not in the table" for name in cli.COMMANDS if name not in {c.name for c in commands}
    ]
    for command in commands:
        for attack in ATTACKS:
            if not bounded or command.name in BOUNDED or attack in (attack_interruption, attack_workers):
                attack(attacker, command, bounded)
    return outcomes


def _plant(target: str, fault) -> Callable[[], AbstractContextManager]:
    return lambda: mock.patch(target, fault)


def _uncaught(argv: list[str]) -> None:
    import_module(f"hf_unigd.cli.{argv[0].replace('-', '_')}").main(argv[1:])


@contextlib.contextmanager
def _in_place(path: str | Path) -> Iterator[Path]:
    yield Path(path)


PLANTED: dict[str, Callable[[], AbstractContextManager]] = {
    "errors are not caught": _plant("hf_unigd.cli.main.main", _uncaught),
    "errors keep all of their lines": _plant("hf_unigd.cli.main.one_line", lambda error: f"{error}\nat line 1"),
    "settings are not checked": _plant("hf_unigd.cli.parser.check_settings", lambda settings: None),
    "files of others are replaced": _plant("hf_unigd.outputs.check_new", lambda folder: None),
    "outputs are not tried": _plant("hf_unigd.outputs.check_writable", lambda *names: None),
    "a figure is written in place": _plant("hf_unigd.evaluation.figures.writing", _in_place),
    "a worker's error is its traceback": lambda: mock.patch.object(RowError, "message", False),
    "a command is not in the table": lambda: mock.patch.dict(cli.COMMANDS, {"dance": "Dance"}),
}
