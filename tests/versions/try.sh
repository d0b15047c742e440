#!/usr/bin/env bash
# Run the named subset of the suite on other releases of torch, transformers and the rest.
#
#   try.sh floors                     every core dependency at the floor that pyproject.toml names (floors.txt)
#   try.sh newest                     the newest releases that pip finds
#   try.sh pair TRANSFORMERS TORCH    these two; everything else as constraints.txt pins it
#
# Each has a virtual environment of its own under $VERSIONS (default .venv-versions), made anew; remove it to get the disk back. A torch
# from PyPI may bring several GB of CUDA libraries. The last line says what ran, for docs/versions.md. Arguments for pytest come by $ARGS.
set -euo pipefail
cd "$(dirname "$0")/../.."

SUBSET="tests/contract tests/families tests/attention tests/injection tests/callers tests/formats tests/config tests/data
  tests/adapters/test_reft.py tests/adapters/test_prompt.py tests/adapters/test_prefix.py tests/generation/test_caches.py
  tests/generation/test_seq2seq.py tests/generation/test_generation.py tests/test_every_architecture.py"
PYTHON=${PYTHON:-python3}
ROOM=${VERSIONS:-.venv-versions}
JOBS=${JOBS:-$(getconf _NPROCESSORS_ONLN)}

case "${1:-}" in
  floors) name=floors ;;
  newest) name=newest ;;
  pair) name="transformers-$2-torch-$3" ;;
  *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
mkdir -p "$ROOM"
venv="$ROOM/$name"
"$PYTHON" -m venv --clear "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

echo "Installing into $venv"
case "$name" in
  floors)
    pip install --constraint tests/versions/floors.txt "$(grep '^torch==' tests/versions/floors.txt)"
    pip install --constraint tests/versions/floors.txt --editable '.[dev]' ;;
  newest)
    pip install torch
    pip install --editable '.[dev]' ;;
  *)
    # What a release of transformers brings along is its own choice, so those pins go too.
    grep -vE '^(torch|transformers|tokenizers|huggingface_hub|hf-xet|safetensors|httpx|httpcore|triton)' constraints.txt > "$venv/pins.txt"
    pip install "torch==$3"
    pip install --constraint "$venv/pins.txt" "transformers==$2" "torch==$3" --editable '.[dev]' ;;
esac

# shellcheck disable=SC2086
OMP_NUM_THREADS=1 PATH="$venv/bin:$PATH" "$venv/bin/python" -m pytest -q -n "$JOBS" -p no:cacheprovider $SUBSET ${ARGS:-} \
  | tee "$venv/result.txt" || failed=1
"$venv/bin/python" - "$venv/result.txt" <<'SAY'
import datetime, pathlib, sys
from importlib.metadata import version
last = pathlib.Path(sys.argv[1]).read_text().strip().splitlines()[-1].strip("= ")
print(f"{datetime.date.today()}: torch {version('torch')}, transformers {version('transformers')}: {last}")
SAY
exit "${failed:-0}"
