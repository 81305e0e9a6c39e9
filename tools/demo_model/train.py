"""Train the embedded model, stage by stage; every stage can be stopped and goes on where it was.

python tools/demo_model/train.py vae     --folder build/demo --minutes 25
python tools/demo_model/train.py unet    --folder build/demo --minutes 70
python tools/demo_model/train.py student --folder build/demo --minutes 30
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "unet", "student"))
    parser.add_argument("--folder", type=Path, required=True, help="where states and the finished parts lie")
    parser.add_argument("--minutes", type=float, required=True, help="how long the stage may train")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    from workers import launch

    if options.stage == "vae":
        from vae import train_vae as stage
    elif options.stage == "unet":
        from unet import train_unet as stage
    else:
        from student import train_student as stage
    launch(stage, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
