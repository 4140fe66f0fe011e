#!/bin/sh
# Makes DIRECTORY an environment with the suite and what its tests need, with PYTHON as the interpreter and the REQUIREMENTs
# (such as torch==2.11.0) in place of the versions that would be chosen. Does nothing if it was made by this very command.
#
#     sh tests/environment_of_versions.sh DIRECTORY PYTHON [REQUIREMENT ...]
set -eu

directory=${1:?usage: environment_of_versions.sh DIRECTORY PYTHON [REQUIREMENT ...]}
python=${2:?usage: environment_of_versions.sh DIRECTORY PYTHON [REQUIREMENT ...]}
shift 2
made_by="$python $* $(cat "$0" pyproject.toml)"
[ "$made_by" = "$(cat "$directory/.made-by" 2>/dev/null)" ] && exit 0

"$python" --version >/dev/null 2>&1 || {
    echo "error: $directory needs $python, which does not run here; install it or name another by GPU_PYTHON" >&2
    exit 2
}
rm -rf "$directory"
"$python" -m venv "$directory"
"$directory/bin/python" -m pip install -qq --disable-pip-version-check "uv>=0.9,<1"
printf '%s\n' "$@" > "$directory/overrides.txt"
"$directory/bin/uv" pip install --quiet --compile-bytecode --python "$directory/bin/python" \
    --override "$directory/overrides.txt" --editable ".[dev,torchao]"
printf '%s' "$made_by" > "$directory/.made-by"
