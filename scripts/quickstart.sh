#!/bin/sh
# Makes .venv, installs the package, and pretrains a tiny BERT on this machine. Arguments go to xformer-train.
set -eu
cd "$(dirname "$0")/.."
. scripts/venv.sh
install_into_venv .
exec .venv/bin/xformer-train --config configs/bert_tiny.yaml "$@"
