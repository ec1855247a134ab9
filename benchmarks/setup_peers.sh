#!/bin/sh
# Two environments beside .venv for the benchmarks' peers, and the fork of one of them that trains crosscoders. An existing folder (or link) is completed, not replaced.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
TORCH=2.13.0+cpu
FORK=${FORK:-https://github.com/science-of-finetuning/dictionary_learning} # the release on PyPI has no crosscoders
FORK_AT=173f7facbe80f16c837e7b5e4dca78a50c000115
CPU_INDEX=${CPU_INDEX:-https://download.pytorch.org/whl/cpu}

torch_first() { # The CPU build before anything that needs torch: it would pull the CUDA build, 4 GB larger.
    has_torch "$1" && return
    "$1/bin/pip" install --quiet "torch==$TORCH" 2>/dev/null ||
        "$1/bin/pip" install --quiet --extra-index-url "$CPU_INDEX" "torch==$TORCH"
}

has_torch() {
    "$1/bin/python" -c 'import sys, torch; sys.exit(torch.__version__ != sys.argv[1])' "$TORCH" 2>/dev/null
}

install() { # folder, requirements
    [ -e "$1/bin/python" ] || "$PYTHON" -m venv "$1"
    torch_first "$1"
    # Named again, or a dependency's newer torchvision replaces it by a newer torch: peers would run on another one.
    "$1/bin/pip" install --quiet "torch==$TORCH" --requirement "$2"
    has_torch "$1" || { echo "$1 has not got torch $TORCH" >&2; exit 1; }
}

install .venv-peers benchmarks/requirements-peers.txt
install .venv-dictionary benchmarks/requirements-dictionary.txt
# nnsight pulls a torchvision that does not fit a CPU torch; transformers imports it where it is there, and fails.
.venv-dictionary/bin/pip uninstall --quiet --yes torchvision || true
[ -e .peer-crosscoder/dictionary_learning ] ||
    { git clone --quiet "$FORK" .peer-crosscoder && git -C .peer-crosscoder checkout --quiet "$FORK_AT"; }

.venv-peers/bin/python -c 'import sae_lens, sparsify; print("sae-lens", sae_lens.__version__, "sparsify", sparsify.__version__)'
.venv-dictionary/bin/python -c 'import dictionary_learning; print("dictionary-learning", dictionary_learning.__version__)'
