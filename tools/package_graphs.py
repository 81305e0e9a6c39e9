"""Trace the graphs that travel with the package, and write the embedded checkpoints' references.

python tools/package_graphs.py export/demo/base export/demo/student
"""

from __future__ import annotations

import sys
from pathlib import Path

from fewstep.export.checkpoint import open_checkpoint
from fewstep.export.graphs import keep_graph
from fewstep.export.plan import plan_components
from fewstep.export.reference import make_reference
from fewstep.export.trace import trace_component

PACKAGED = Path(__file__).parents[1] / "export" / "graphs"


def main() -> int:
    for folder in sys.argv[1:]:
        checkpoint = open_checkpoint(folder)
        for plan in plan_components(checkpoint):
            path = PACKAGED / f"{plan.key}.graph"
            if not path.is_file():
                print(f"trace {plan.kind}", flush=True)
                keep_graph(trace_component(plan.kind, plan.config, plan.dtype, key=plan.key), PACKAGED).chmod(0o644)
        make_reference(checkpoint, checkpoint.folder / "reference.safetensors", dtypes={})
        print(f"{folder}: reference written", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
