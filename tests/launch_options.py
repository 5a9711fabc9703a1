"""Prints {kernel: values of enable_fp_fusion} of all launches: python -m tests.launch_options.

Nothing is compiled. `mocofast_bench.inspected_calls` lists the calls.
"""

from __future__ import annotations

import json
from collections import defaultdict

from mocofast_bench import inspect_code, inspected_calls

if __name__ == "__main__":
    found: dict[str, set[int | None]] = defaultdict(set)
    for case in inspected_calls.cases():
        for launch in inspect_code.record(case.call):
            found[launch.kernel.__name__].add(launch.options.get("enable_fp_fusion"))
    print(json.dumps({name: list(values) for name, values in found.items()}))
