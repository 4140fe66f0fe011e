#!/bin/sh
# Rehearses the GPU day on a CPU: a bare environment of the GPU machine's versions, a copy of what would be carried and
# nothing else, no network, tiny sizes. Ends with the files that each part wrote; fails if any part does.
#
#     sh benchmarks/gpu_day_rehearsal.sh PYTHON3.12 [FOLDER]
#
# Needs `.gpuday/` (python -m benchmarks.gpu_day prepare), util-linux and iproute2, and to be root for a network
# namespace of its own.
set -eu

python=${1:?usage: gpu_day_rehearsal.sh PYTHON3.12 [FOLDER]}
folder=${2:-$(mktemp -d)}
bare=.venv-gpu-bare
# Of the packages on that machine, those that the suite uses.
on_machine="torch==2.11.0 transformers==5.17.0 numpy==2.5.2 safetensors==0.8.0 einops pyarrow fsspec pillow scipy rich \
    packaging typing-extensions pyyaml click filelock jinja2 psutil nvidia-ml-py pydantic requests pytest pytest-xdist hypothesis"

if [ "$on_machine" != "$(cat "$bare/.made-by" 2>/dev/null)" ]; then
    rm -rf "$bare"
    "$python" -m venv "$bare"
    "$bare/bin/python" -m pip install -qq --disable-pip-version-check "uv>=0.9,<1"
    # shellcheck disable=SC2086
    "$bare/bin/uv" pip install --quiet --compile-bytecode --python "$bare/bin/python" $on_machine
    printf '%s' "$on_machine" > "$bare/.made-by"
fi

rm -rf "$folder/carried" "$folder/out" /tmp/pixart-gpu-day-site
mkdir -p "$folder/carried" "$folder/out"
git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -cf - | tar -xf - -C "$folder/carried"
cp -r .gpuday "$folder/carried/"
du -sm "$folder/carried" | cut -f1 | xargs printf '%s MiB carried\n'
interpreter=$(realpath "$bare")/bin/python
failed=0
for part in correctness speed small training; do
    unshare --net sh -c "ip link set lo up && cd '$folder/carried' && exec '$interpreter' benchmarks/gpu_day.py $part \
        --tiny --out '$folder/out/$part'" > "$folder/out/$part.txt" 2>&1 || failed=1
    tail -n 3 "$folder/out/$part.txt"
    ls -l "$folder/out/$part"
done
exit $failed
