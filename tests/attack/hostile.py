"""Hostile values: texts, numbers and JSON values that programs often mishandle."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

MARKER = "attack-ran"  # a file that no hostile text may create
ESCAPES = ("\x1b[2J\x1b[31mred", "\x07", "a\rb", "a\nforged: line", "\u202eabc", "\x9b31m", "\x00", "\u2028", "\udcff")
INJECTIONS = (
    f"$(touch {MARKER})",
    f"`touch {MARKER}`",
    f"; touch {MARKER} #",
    f"' ; touch {MARKER} ; '",
    f'" ; touch {MARKER} ; "',
    f"a\n#SBATCH --wrap='touch {MARKER}'",
    f"a\ntouch {MARKER}",
    f"| touch {MARKER}",
    f"& touch {MARKER} &",
    f"--wrap=touch {MARKER}",
    "${IFS}touch",
    "\\",
    "%n%s%n",
    "*",
    "~root",
)
PATHS = (
    "",
    "/",
    "//",
    ".",
    "..",
    "../../../../etc/passwd",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "/proc/self/environ",
    "/nowhere/at/all",
    "a" * 300,
    "/".join(["a"] * 3000),
    "file:///etc/passwd",
    "http://127.0.0.1:9/x",
    "s3://",
    "://",
    "bad://x",
    "a b",
    "~",
    "-",
    "--",
    "-rf",
    "#1",
    "[",
    "*",
    "?",
    "{a,b}",
    "\\\\host\\share",
    "C:\\x",
    "ü" * 200,
    "e\u0301",
)
NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "1e3",
    "1e400",
    "-1e400",
    "1e-400",
    "nan",
    "inf",
    "-inf",
    "0x10",
    "1_000",
    "1__0",
    "١٢",
    "9223372036854775807",
    "9223372036854775808",
    "1e18",
    "-9223372036854775809",
    "0.5",
    "1.5",
    "+1",
    "01",
    "1e",
    "1,1",
    "-1,1",
    "0,1",
    "[0,1]",
    "true",
    "false",
    "none",
    "None",
    "null",
    "True",
    "yes",
]
TEXTS = (
    *ESCAPES,
    *INJECTIONS,
    *PATHS,
    *NUMBERS,
    "9" * 5000,
    " ",
    "\t",
    "=",
    "a=b",
    "{}",
    "[[[[",
    "@/etc/passwd",
    "@",
    "@a",
)
MARKUP = (
    "<script>window.attacked=1</script>",
    "<img src=x onerror=window.attacked=1>",
    '"><svg onload=window.attacked=1>',
    "'><iframe srcdoc='<script>parent.attacked=1</script>'></iframe>",
    "</style><script>window.attacked=1</script>",
    "</title></head><body onload=window.attacked=1>",
    "javascript:window.attacked=1",
    "--><script>window.attacked=1</script><!--",
    "{{7*7}}{% raw %}",
    "&lt;script&gt;",
    "]]><script>window.attacked=1</script>",
    '" onmouseover="window.attacked=1" autofocus onfocus="window.attacked=1',
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1 << 62,
    10**400,
    -(10**400),
    1.5,
    float("nan"),
    float("inf"),
    "",
    "a\nforged: line",
    "\x1b[2J",
    "\ud800",
    "/",
    "x" * 100_000,
    [],
    [[]],
    {},
    {"1": 1},
    [None] * 1000,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON value, at most three of each list."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy of a JSON value with another value at a path."""
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


def without(value: Any, path: tuple[Any, ...]) -> Any:
    """Return a copy of a JSON value without the value at a path."""
    changed = copy.deepcopy(value)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return changed


def damages(content: bytes, generator: random.Random) -> list[tuple[str, Callable[[], bytes]]]:
    """Return the damages of a JSON record by name, in a random order."""
    value = json.loads(content)
    made: list[tuple[str, Callable[[], bytes]]] = [
        ("empty", lambda: b""),
        ("cut", lambda: content[: len(content) // 2]),
        ("utf-16", lambda: content.decode().encode("utf-16")),
        ("latin-1", lambda: content[:-3] + b"\xff\xfe" + content[-3:]),
        ("zeros", lambda: bytes(len(content))),
        ("deep list", lambda: b"[" * 100_000),
        ("deep object", lambda: b'{"a":' * 50_000),
        ("many lists", lambda: b"[" + b"[]," * 100_000 + b"[]]"),
        ("digits", lambda: b"9" * 100_000),
        ("twice", lambda: content * 2),
        ("list", lambda: b"[" + content + b"]"),
    ]
    for path in places(value):
        name = ".".join(map(str, path)) or "all"
        made += [
            (f"{name} is {str(new)[:20]!r}", lambda path=path, new=new: dumped(replaced(value, path, new)))
            for new in VALUES
        ]
        made.append((f"{name} is nested", lambda path=path: dumped(replaced(value, path, nested(200)))))
        if path:
            made.append((f"{name} is missing", lambda path=path: dumped(without(value, path))))
    generator.shuffle(made)
    return made


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value
