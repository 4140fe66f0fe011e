"""Damaged inputs by the thousand, the same ones in every run, and the process in which they are tried.

A module of attacks has a `main` that calls `attack`, and a test that calls `outcomes_of` the module: inputs are tried
in a process of their own, which ends with a traceback at an unexpected exception, at a hang, and where code of an input
is run. ATTACK_SCALE multiplies the numbers of inputs (10 in the campaign of `make attack`), and ATTACK_SEED selects
others: `ATTACK_SCALE=50 ATTACK_SEED=7`.
"""

import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.mutations import damaged

ROOT = Path(__file__).parents[2]
SECONDS = 5  # that one input may take
LONG = 10  # times as many inputs in the long campaign
SCALE = float(os.environ.get("ATTACK_SCALE", LONG if os.environ.get("PIXART_ATTACK") == "long" else 1))
SEED = int(os.environ.get("ATTACK_SEED", "0"))
EXTREMES = (0, 1, 127, 128, 255, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
# Values that parsers of texts stumble over.
TOKENS = (
    *(b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\\ud83d", b"\x1b[31m", b"\r", b"\n", b"\t"),
    *(b"null", b"NaN", b"-Infinity", b"1e999", b"-1", b"true", b"[]", b"{}", b'""', b'"', b",", b":", b"["),
    *(b"9" * 400, b"[" * 2000, b"{" * 2000, b"../", b"/etc/passwd", b"%s%n", b"A" * 5000),
)
# Events of the interpreter that reading an input never causes: they run code, or change what is outside of it.
FORBIDDEN_EVENTS = frozenset(
    (
        *(
            "os.system",
            "os.exec",
            "os.fork",
            "os.forkpty",
            "os.posix_spawn",
            "os.spawn",
            "subprocess.Popen",
            "pty.spawn",
        ),
        *("os.mkdir", "os.chmod", "os.chown", "os.symlink", "os.putenv", "os.kill", "shutil.rmtree", "shutil.move"),
        *("socket.connect", "socket.bind", "urllib.Request", "webbrowser.open", "code.__new__", "ctypes.dlopen"),
    )
)

TEMPORARY = f"{tempfile.gettempdir()}/{tempfile.gettempprefix()}"  # start of the names of temporary folders


def number(share: int) -> int:
    """Return how many inputs of a kind are tried, `share` of them without ATTACK_SCALE."""
    return max(int(share * SCALE), 1)


def generator(kind: str) -> np.random.Generator:
    """Return the generator of the random numbers of a kind of input."""
    return np.random.default_rng([SEED, *kind.encode()])


def mutated(files: Mapping[str, bytes], count: int, kind: str) -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of `count` damaged files: in turn by bits and blocks, by numbers and by texts."""
    random = generator(kind)
    turns = zip(damaged(dict(files), random), with_tokens(files, random), with_numbers(files, random), strict=False)
    return islice((case for turn in turns for case in turn), count)


def with_tokens(files: Mapping[str, bytes], random: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield files endlessly into which one of TOKENS is inserted, or which have it in place of as many bytes."""
    while True:
        for name, data in files.items():
            token = TOKENS[random.integers(len(TOKENS))]
            start = int(random.integers(len(data) + 1))
            is_insertion = bool(random.integers(2))
            rest = data[start:] if is_insertion else data[start + len(token) :]
            yield f"{name}: {token[:10]!r} {'inserted' if is_insertion else 'written'}", data[:start] + token + rest


def with_numbers(files: Mapping[str, bytes], random: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield files endlessly that have one of EXTREMES in place of 1 to 8 bytes, in either byte order."""
    while True:
        for name, data in files.items():
            size = int(random.choice([1, 2, 4, 8]))
            value = EXTREMES[random.integers(len(EXTREMES))] % 256**size
            start = int(random.integers(max(len(data) - size, 1)))
            changed = value.to_bytes(size, "little" if random.integers(2) else "big")
            yield f"{name}: {value} in {size} bytes", data[:start] + changed + data[start + size :]


def attack(cases: Iterable[tuple[str, Any]], attempt: Callable[[Any], str]) -> None:
    """Try every input, and print a JSON line with its name, its outcome and the seconds that it took.

    `attempt` returns what became of the input. Its ValueError means that the input is refused; it has to have one line.
    Any other exception ends the process, as do a hang and a forbidden event.
    """
    trying = ""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        is_temporary = arguments and str(arguments[0]).startswith(TEMPORARY)
        if trying and event in FORBIDDEN_EVENTS and not is_temporary:
            print(f"{trying}: causes {event} {arguments!r:.200}", file=sys.stderr, flush=True)
            os._exit(70)

    sys.addaudithook(watch)
    for name, content in cases:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        trying, begun = name, time.perf_counter()
        try:
            outcome = attempt(content)
        except ValueError as error:
            if "\n" in str(error) or "\x1b" in str(error) or not str(error):
                raise AssertionError(f"{name}: {str(error)!r} is not one printable line") from error
            outcome = f"refused: {error}"
        except BaseException:
            print(f"while trying {name}", file=sys.stderr, flush=True)
            raise
        seconds, trying = time.perf_counter() - begun, ""
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"name": name, "outcome": outcome, "seconds": seconds}), flush=True)


def attack_kind(kind: str, share: int, files: Callable[[], Mapping[str, bytes]], attempt: Callable[[Any], str]) -> None:
    """Try the damaged files of one kind, `share` of them without ATTACK_SCALE."""
    attack(mutated(files(), number(share), kind), attempt)


def outcomes_of(module: str, *words: str) -> list[dict[str, Any]]:
    """Run a module in a process of its own and return its outcomes. Fails unless every input has one, in time."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300 * max(SCALE, 1),
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"after {lines[-1:]}: {done.stderr[-4000:]}"
    outcomes = [json.loads(line) for line in lines]
    slowest = max(outcomes, key=lambda outcome: outcome["seconds"])
    print(f"{len(outcomes)} inputs, {sum(item['seconds'] for item in outcomes):.1f} s, slowest {slowest}")
    assert slowest["seconds"] < SECONDS
    return outcomes
