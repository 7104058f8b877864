#!/usr/bin/env bash
# The CUDA compiler from PyPI into a folder, for containers without a CUDA toolkit: install_nvcc.sh DIR [PYTHON]
# then CUDACXX=DIR/nvidia/cu13/bin/nvcc
set -euo pipefail
folder=${1:?install_nvcc.sh: say where to}
"${2:-python3}" -m pip install -q --target "$folder" --no-deps \
  "nvidia-cuda-nvcc==13.0.*" "nvidia-cuda-runtime==13.0.*" "nvidia-cuda-crt==13.0.*" "nvidia-nvvm==13.0.*" \
  "nvidia-cuda-cccl==13.0.*"
ln -sfn lib "$folder/nvidia/cu13/lib64" # where nvcc looks for the static runtime
chmod +x "$folder"/nvidia/cu13/bin/* "$folder"/nvidia/cu13/nvvm/bin/*
"$folder/nvidia/cu13/bin/nvcc" --version
