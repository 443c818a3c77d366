#!/bin/sh
# What needs a GPU: every test with the marker `gpu`, then the benchmarks of GPT-2's size; ten minutes at most.
#
#   tests/gpu.sh PYTHON PEERS [--rehearse]
#
# PYTHON has the dependencies; no network is used. With --rehearse the same runs on a CPU at a tiny size: the tests are
# collected only. What is printed stays in out/gpu/, beside the figures of each benchmark as JSON.
set -u
cd "$(dirname "$0")/.." || exit 1
python=$1 peers=$2 rehearse=${3:-}
out=out/gpu
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ -z "$rehearse" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch finds no GPU here, which these tests and this benchmark are for." >&2
    exit 2
fi
mkdir -p "$out"

# Where only the dependencies are installed, the version of hfgpt has to be found, too.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c 'from importlib.metadata import version; version("hfgpt")' 2> /dev/null; then
    mkdir -p "$out/metadata/hfgpt-0.dist-info"
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
    printf 'Metadata-Version: 2.1\nName: hfgpt\nVersion: %s\n' "$version" > "$out/metadata/hfgpt-0.dist-info/METADATA"
    export PYTHONPATH="$PYTHONPATH:$PWD/$out/metadata"
fi

if [ -n "$rehearse" ]; then
    how="--collect-only" train="--size tiny --steps 2" compile="" write="--size tiny --rounds 2 --steps 1"
else
    how="--durations=5" train="--size 124M --precision bf16 --steps 10" compile="--compile"
    write="--size 124M --precision bf16 --new-tokens 128"
fi

failed=0
# shellcheck disable=SC2046,SC2086 # several words
timeout 150 "$python" -m pytest -q -rs $how -m gpu -p no:cacheprovider $(grep -rl --include='test_*.py' 'mark\.gpu' tests) \
    > "$out/tests.txt" 2>&1 || failed=1
tail -n 40 "$out/tests.txt"

# bench NAME SECONDS OPTION...: a benchmark, whose figures go to NAME.json and NAME.txt
bench() {
    name=$1 seconds=$2
    shift 2
    if timeout "$seconds" "$python" -m hfgpt bench "$@" --json > "$out/$name.json"; then
        "$python" -c 'import json, sys; from hfgpt.studio.report import render; print(render(json.load(sys.stdin)))' \
            < "$out/$name.json" | tee "$out/$name.txt"
    else
        failed=1
    fi
}
# shellcheck disable=SC2086
bench train 270 train $train $compile --rounds 4 --against "$peers"
for rows in 1 64; do
    # shellcheck disable=SC2086
    bench "generate-$rows" 80 generate $write --batch-size $rows --against transformers,transformers-static
done
exit $failed
