"""What ComfyUI waits for when it starts."""

import json
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
SCHEMAS = "import json, sys, comfy_stand_in; comfy_stand_in.node_classes(); print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"


def test_schemas_are_read_without_the_networks_libraries():
    done = subprocess.run([sys.executable, "-c", SCHEMAS], cwd=TESTS, capture_output=True, text=True, check=True)
    imported = set(json.loads(done.stdout))
    assert {"refine_by_align_pack", "torch"} <= imported
    assert not {"diffusers", "transformers", "safetensors", "cv2", "matplotlib"} & imported
