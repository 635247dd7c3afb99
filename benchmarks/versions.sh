#!/usr/bin/env bash
# The core tests on each torch version named, each in an environment of its own: versions.sh 2.11.0 …
set -uo pipefail
cd "$(dirname "$0")/.."
failed=0
for version in "$@"; do
    env="build/torch-$version"
    numpy=
    # the interpreter of Triton 3.6 takes arrays of one element for numbers; numpy 2.4 does not
    case "$version" in 2.11.*) numpy="numpy<2.4" ;; esac
    if [ ! -e "$env/.done" ]; then
        "${PYTHON:-python3}" -m venv "$env" &&
            grep -v -i -E "^(torch|triton|numpy)==" constraints.txt > "$env/constraints.txt" &&
            echo "$numpy" >> "$env/constraints.txt" &&
            "$env/bin/pip" install --quiet "torch==$version" &&
            "$env/bin/pip" install --quiet --constraint "$env/constraints.txt" --editable ".[test]" &&
            touch "$env/.done" || { echo "torch $version: set-up failed"; failed=1; continue; }
    fi
    if "$env/bin/python" -m pytest -q -n 2 -p no:cacheprovider -m "not slow and not sweep and not gpu" \
        tests/core tests/passes tests/kernels > "$env/log" 2>&1; then
        echo "torch $version: $(tail -1 "$env/log")"
    else
        grep -E '^(FAILED|ERROR)' "$env/log"
        echo "torch $version: $(tail -1 "$env/log")"
        failed=1
    fi
done
exit $failed
