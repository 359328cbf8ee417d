"""What starting costs: `import minichat` beyond torch's own import, and `python infer.py --help`; processor seconds.

python bench/startup.py --record
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
from recording import commit, cpu  # noqa: E402

IMPORT = """
import time, torch
start = time.process_time()
import minichat
minichat.load, minichat.save, minichat.generate, minichat.chat, minichat.int4, minichat.lora, minichat.losses
print(time.process_time() - start)
"""


def spent(*command: str) -> tuple[float, str]:
    """The processor's seconds of a command, and what it said."""
    before = os.times()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    after = os.times()
    seconds = after.children_user - before.children_user + after.children_system - before.children_system
    return seconds, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="write bench/results/startup.json")
    args = parser.parse_args()
    seconds = {"import minichat, beyond torch": [], "import torch": [], "infer.py --help": []}
    for _ in range(args.rounds):
        seconds["import minichat, beyond torch"].append(float(spent("-c", IMPORT)[1]))
        seconds["import torch"].append(spent("-c", "import torch")[0])
        seconds["infer.py --help"].append(spent("infer.py", "--help")[0])
    found = {what: {"median": statistics.median(s), "least": min(s), "most": max(s)} for what, s in seconds.items()}
    print(json.dumps(found, indent=2))
    if args.record:
        from importlib.metadata import version

        content = {
            "command": "python bench/startup.py --record",
            "commit": commit(),
            "machine": f"{cpu()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": version("torch")},
            "processor_seconds": found,
        }
        (ROOT / "bench" / "results" / "startup.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
