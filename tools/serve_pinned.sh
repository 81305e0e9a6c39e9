#!/bin/sh
# `fewstep serve` from a store that was pinned when it was built: its digest lies beside the engines.
set -eu
FEWSTEP_STORE_DIGEST=$(cat "$FEWSTEP_CACHE_DIR/digest")
export FEWSTEP_STORE_DIGEST
exec fewstep serve "$@"
