"""What the launcher runs once per data folder; counts its runs there."""

import json
import os
from pathlib import Path

runs = Path(os.environ["FINEMESH_DATA_DIR"]) / "bootstraps"
runs.write_text((runs.read_text() if runs.exists() else "") + "x")
print("a line that is not the answer")
print(json.dumps({"organization": "org_1", "project": "proj_1", "api_key": "fm_dummy"}))
